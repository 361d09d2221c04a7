"""Every stage of Q-RM from the command line; read top to bottom, it is the method.

    python train.py                                        the whole path on the built-in task (--stage demo)
    torchrun --nproc_per_node 8 train.py --stage rm        one stage on 8 GPUs (NCCL) or CPU processes (gloo)

    sft ─► policy ─► pairs ─► pairs.jsonl ─► rm ─► reward model ─► reinforce, ppo ─► policy
                                                                   eval, score and grade look at any of them

Each stage reads files and writes files; `prepare`, near the end, creates missing files of the built-in task.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (
    Example,
    arith_rows,
    arith_tokenizer,
    batch_indices,
    collate,
    encode,
    encode_prompts,
    sequence_length,
    spans,
)
from model import LanguageModel, ModelConfig, ScalarModel, add_lora, build_model, init_weights, token_logprobs
from parallel import Grid, Optimizer, Update, barrier, make_grid, say
from ppo import ppo_step
from qrm import REWARD_MODELS, count_response_tokens, logprob_rewards, reward_model_loss
from reinforce import collect_rollout, count_minibatches, reinforce_step, rollout_stats
from support.checkpoints import Training, fingerprints, in_words, out_of_date, run_path, sources, write_model
from support.compare import eval_candidates, eval_judge
from support.evaluate import (
    all_ranks,
    best_rows,
    count_graded,
    eval_policy,
    eval_reward_model,
    greedy_pass,
    hash_seed,
    make_pairs,
    refuse_overwritten,
    sample_graded,
    score_examples,
    show_tokens,
    sum_graded,
    write_rows,
)
from support.files import BadInput, at_line, require, write_atomically
from support.graders import grade
from support.loading import (
    has_scalar_head,
    has_steps,
    holds_reward_model,
    kind_of_eval,
    load,
    load_ranker,
    load_reward,
    load_tokenizer,
    log_to,
    read_rows,
    reward_name,
    reward_of_run,
    say_first,
)
from support.row_messages import plain_prompt
from support.settings import (
    ARITH,
    BESIDE,
    FIELDS,
    POLICY_GRADIENT,
    STAGES_OF,
    TRAINING,
    check_paths,
    heldout_path,
    out_path,
    parse,
    stage_config,
)
from support.steps import collate_steps, eval_steps, load_step_rows, rollout_rows, task_steps
from support.unread import check_kept, flag_notes

# -------------------------------------------------------------------------------- the stages


def stage_sft(cfg, grid):
    """Supervised fine-tuning: -log pi(a_t | s_t), mean over the response tokens of the batch."""
    tokenizer = load_tokenizer(cfg.model, cfg)
    rows = read_rows(cfg.data, ("prompt", "response"), cfg, grid)
    examples, rows = encode(rows, tokenizer, cfg.max_seq_len, source=cfg.data, log=log_to(grid))
    say_first(tokenizer, rows[0], examples[0], cfg.data, grid)
    policy = with_adapters(load(LanguageModel, cfg.model, cfg, grid), cfg.lora_rank, cfg)
    optimizer = make_optimizer(policy, cfg.lr, cfg, grid)
    steps = cfg.steps or -(-len(examples) // cfg.batch_size)
    trained = {"model": (policy, optimizer)}
    with Training(cfg, grid, steps, trained, fingerprints(tokenizer, cfg.data)) as training:
        for step in training:
            lr = lr_at(step, steps, cfg.lr, cfg)
            batch = [examples[i] for i in batch_indices(len(examples), cfg.batch_size, step, cfg.seed)]
            parts = cut_by_tokens(batch, cfg, grid)
            update = Update(optimizer, [(count_response_tokens(examples_of(part)), part) for part in parts])
            for part in update:
                ids, mask = collate(examples_of(part), grid.device)  # (B, T+1), (B, T)
                logprobs, entropy = token_logprobs(policy, ids, mask)  # (B, T)
                stats = {"entropy": (entropy.sum() / mask.sum()).item()}
                update.backward(-logprobs.sum() / mask.sum(), stats)
            training.log(update.step(lr) | {"lr": lr}, tokens=count_tokens(batch))
    training.publish(policy, tokenizer)


def stage_rm(cfg, grid):
    """The reward model: pairs -> token scores -> pairwise loss on their means; --reward names other kinds."""
    tokenizer = load_tokenizer(cfg.model, cfg)
    pairs = load_pairs(cfg, tokenizer, grid)
    kind = REWARD_MODELS[cfg.reward]
    start = load(kind.base, cfg.model, cfg, grid)
    reference = frozen_start(start, cfg, grid) if kind.needs_reference else None
    model = with_adapters(start, cfg.lora_rank, cfg)
    optimizer = make_optimizer(model, cfg.lr, cfg, grid)
    steps = cfg.steps or -(-len(pairs) // cfg.batch_size)
    trained = {"model": (model, optimizer)}
    with Training(cfg, grid, steps, trained, fingerprints(tokenizer, cfg.data)) as training:
        for step in training:
            lr = lr_at(step, steps, cfg.lr, cfg)
            batch = pick_pairs(pairs, step, cfg)
            parts = cut_by_tokens(batch, cfg, grid)
            update = Update(optimizer, [(kind.weigh(examples_of(part)), part) for part in parts])
            for part in update:
                examples = examples_of(part)
                ids, mask = collate(examples, grid.device)  # (2P, T+1), (2P, T)
                step_labels = collate_steps(examples, mask)  # (2P, T) for --reward prm, else None
                loss_cfg = with_margins(cfg, part, grid)  # the margin of a row wins over --margin
                loss, stats = reward_model_loss(model, ids, mask, loss_cfg, reference, step_labels)
                update.backward(loss, stats)
            training.log(update.step(lr) | {"lr": lr}, tokens=count_tokens(batch))
    training.publish(model, tokenizer, reward=cfg.reward, reference=cfg.model)
    if cfg.heldout:
        say_accuracy(cfg, grid)


def stage_rl(cfg, grid):
    """REINFORCE or PPO: sample, score every token, update; every --eval_every rollouts, held-out pass@1."""
    tokenizer = load_tokenizer(cfg.model, cfg)
    rows, heldout = load_prompts(cfg, grid)
    prompts = short_prompts(rows, tokenizer, cfg, grid)
    encode_prompts(heldout, tokenizer, cfg.heldout or cfg.data, log_to(grid))  # it may be refused
    check_rollout_size(cfg, grid)
    start = load(LanguageModel, cfg.model, cfg, grid)
    reference = frozen_start(start, cfg, grid)
    policy = with_adapters(start, cfg.lora_rank, cfg)
    reward = reward_of_run(cfg, tokenizer, rows, grid)
    cfg = with_advantage(cfg, reward)
    optimizer = make_optimizer(policy, cfg.lr, cfg, grid)
    trained = {"policy": (policy, optimizer)}
    if cfg.stage == "ppo":
        critic = load_critic(cfg, grid)
        critic_optimizer = make_optimizer(critic, cfg.critic_lr, cfg, grid)
        trained["critic"] = (critic, critic_optimizer)
    n = cfg.batch_size // cfg.group_size  # prompts per rollout
    steps = cfg.steps or -(-len(prompts) // n)
    with Training(cfg, grid, steps, trained, fingerprints(tokenizer, cfg.data)) as training:
        for step in training:
            lr = lr_at(step, steps, cfg.lr, cfg)
            batch = [prompts[i] for i in batch_indices(len(prompts), n, step, cfg.seed)]
            mine = batch[grid.dp_rank :: grid.dp_size]
            seed = hash_seed(cfg.seed, cfg.stage, step)
            places = range(grid.dp_rank, n, grid.dp_size)  # of `mine` in `batch`
            rollout = collect_rollout(policy, reference, reward, mine, tokenizer.stop_ids, cfg, seed, places)
            if cfg.stage == "ppo":
                critic_lr = lr_at(step, steps, cfg.critic_lr, cfg)
                stats = ppo_step(policy, critic, optimizer, critic_optimizer, rollout, cfg, lr, critic_lr)
            else:
                stats = reinforce_step(policy, optimizer, rollout, cfg, lr)
            row = {"trajectories": (step + 1) * cfg.batch_size, **stats, **rollout_stats(rollout, grid)}
            if heldout and (step + 1 == steps or (step + 1) % cfg.eval_every == 0):
                row["pass@1"] = greedy_pass(policy, tokenizer, heldout, cfg, grid)
            tokens = round(row["response_length"] * cfg.batch_size)
            training.log(row | {"lr": lr}, tokens)
    training.publish(policy, tokenizer, extra={"critic": critic} if cfg.stage == "ppo" else None)


# -------------------------------------------------------------------------------- their parts


def lr_at(step, steps, peak, cfg):
    """The learning rate of update `step` (from 0): linear warm-up from 0 to `peak`, times linear decay.

    The decay would reach final_lr * peak right after the last update; final_lr 1 is constant.
    """
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    return peak * warm * (1 - (1 - cfg.final_lr) * step / max(steps, 1))


def make_optimizer(model, lr, cfg, grid):
    """AdamW on the trainable parameters of `model`."""
    return Optimizer(model, grid, lr, weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm)


def with_adapters(model, rank, cfg):
    """The model to train: `model` itself, or, with a rank, LoRA adapters on its frozen weights."""
    return add_lora(model, rank, cfg.seed, cfg.lora_alpha) if rank else model


def frozen_start(model, cfg, grid):
    """The model that training starts from, for losses that compare with it."""
    if cfg.lora_rank:
        return model  # adapters do not change it
    return load(type(model), cfg.model, cfg, grid).requires_grad_(False)


def load_critic(cfg, grid):
    """PPO's critic: the reward model's decoder (else the policy's) with a new scalar head, zero at first."""
    start = cfg.model
    if cfg.reward_model and has_scalar_head(cfg.reward_model):
        start = cfg.reward_model
    critic = load(ScalarModel, start, cfg, grid)
    critic.score.weight.data.zero_()
    return with_adapters(critic, cfg.critic_lora_rank, cfg)


def cut_by_tokens(batch, cfg, grid):
    """This rank's rows of a batch as micro-batches (parts) of at most cfg.micro_tokens tokens each."""
    mine = batch[grid.dp_rank :: grid.dp_size]
    lengths = [count_tokens([row]) for row in mine]
    return [mine[start:stop] for start, stop in spans(lengths, cfg.micro_tokens)]


def examples_of(rows):
    """The Examples of rows, each of which is an (Example,), or a Pair: two, and a margin."""
    return [example for row in rows for example in row[:2]]


def count_tokens(rows):
    """Tokens of all prompts and responses."""
    return sum(map(sequence_length, examples_of(rows)))


def say_accuracy(cfg, grid):
    """The new reward model's accuracy on the pairs of --heldout."""
    measured = dataclasses.replace(cfg, data=cfg.heldout, limit=0)
    if has_steps(cfg.heldout, cfg):
        found = in_words(eval_steps(out_path(cfg), measured, grid), digits=4)
        say(grid, f"rm: on the steps of {cfg.heldout}: {found}")
        return
    result = eval_reward_model(out_path(cfg), measured, grid)
    low, high = result["pair_accuracy_95"]
    accuracy = f"{result['pair_accuracy']:.3f} ({low:.3f} to {high:.3f})"
    say(grid, f"rm: pair accuracy {accuracy} on {result['n_pairs']} held-out pairs of {cfg.heldout}")


class Pair(NamedTuple):
    """A row of preference data."""

    chosen: Example
    rejected: Example
    margin: float | None  # the row's own; None: --margin applies


def load_pairs(cfg, tokenizer, grid):
    """A list of Pair; with --balance_prompts, a list of such lists, one per prompt.

    For --reward prm their Examples are StepExamples; a step-labelled row is (StepExample,) instead of a Pair.
    """
    needs_steps = REWARD_MODELS[cfg.reward].needs_steps
    if needs_steps and has_steps(cfg.data, cfg):
        return by_prompt(load_step_rows(cfg.data, tokenizer, cfg, grid)[0], cfg)
    require(
        not needs_steps or cfg.task == "arith",
        f"{cfg.data}: --reward {cfg.reward} learns from labels of steps; expected rows of prompt, completions"
        " and labels, or pairs of the built-in task (--task arith)",
    )
    rows = read_rows(cfg.data, ("prompt", "chosen", "rejected"), cfg, grid)
    examples, rows = encode(rows, tokenizer, cfg.max_seq_len, ("chosen", "rejected"), cfg.data, log_to(grid))
    say_first(tokenizer, rows[0], examples[0], cfg.data, grid)
    pairs = []
    for row, pair in zip(rows, examples):
        if needs_steps:
            with at_line(cfg.data, row["line"]):
                pair = task_steps(tokenizer, row["prompt"], pair)
        pairs.append(Pair(*pair, row.get("margin")))
    if "margin" not in REWARD_MODELS[cfg.reward].reads and any(pair.margin is not None for pair in pairs):
        say(grid, f"note: {cfg.data}: rows have a margin, which --reward {cfg.reward} does not use")
    return by_prompt(pairs, cfg)


def by_prompt(pairs, cfg):
    """The pairs as they are, or, with --balance_prompts, a list of those of each prompt."""
    if not cfg.balance_prompts:
        return pairs
    prompts = {}
    for pair in pairs:
        prompts.setdefault(tuple(pair[0].prompt_ids), []).append(pair)
    return list(prompts.values())


def with_margins(cfg, pairs, grid):
    """cfg; if a row has a margin of its own, with cfg.margin a (P,) tensor instead of a number."""
    if not isinstance(pairs[0], Pair) or all(pair.margin is None for pair in pairs):
        return cfg
    margins = [cfg.margin if pair.margin is None else pair.margin for pair in pairs]
    return dataclasses.replace(cfg, margin=torch.tensor(margins, device=grid.device))


def pick_pairs(pairs, step, cfg):
    """The pairs of update `step`. Balanced, each prompt counts once an epoch, by one of its pairs in turn."""
    places = range(step * cfg.batch_size, (step + 1) * cfg.batch_size)
    picked = [pairs[i] for i in batch_indices(len(pairs), cfg.batch_size, step, cfg.seed)]
    if cfg.balance_prompts:
        epochs = [place // len(pairs) for place in places]
        return [of_prompt[epoch % len(of_prompt)] for of_prompt, epoch in zip(picked, epochs)]
    return picked


def load_prompts(cfg, grid):
    """Rows to learn from and rows held out for pass@1: --heldout, or the last --limit rows of --data."""
    graded = cfg.reward in ("outcome", "oracle")
    needs = ("prompt", "label") if graded else ("prompt",)
    rows = read_rows(cfg.data, needs, cfg, grid, optional=("label",))
    if cfg.heldout:
        return rows, read_rows(cfg.heldout, ("prompt", "label"), cfg, grid)
    cut = max(len(rows) - cfg.limit, 0)
    require(cut, f"--limit {cfg.limit} holds out all rows of {cfg.data}; nothing is left to learn from")
    heldout = [row for row in rows[cut:] if row.get("label") is not None]
    if cfg.limit:
        say(grid, f"{cfg.data}: the last {len(rows) - cut} rows are held out for pass@1 (--limit)")
    if len(heldout) < len(rows) - cut:
        needs_labels = f"pass@1 needs labels, which {len(heldout)} of --limit {cfg.limit} rows have"
        say(grid, f"note: {cfg.data}: {needs_labels}")
    learned = {plain_prompt(row["prompt"]) for row in rows[:cut]}
    shared = sum(plain_prompt(row["prompt"]) in learned for row in heldout)
    if shared:
        say(grid, f"note: {cfg.data}: {shared} of the last --limit {cfg.limit} rows repeat earlier prompts")
    return rows[:cut], heldout


def short_prompts(rows, tokenizer, cfg, grid):
    """The prompts as ids, without those that leave no room for an answer (counted in one line)."""
    prompts = encode_prompts(rows, tokenizer, cfg.data, log_to(grid))
    say_first(tokenizer, rows[0], prompts[0], cfg.data, grid)
    room = cfg.max_seq_len - cfg.max_new_tokens
    kept = [ids for ids in prompts if len(ids) <= room]
    dropped = (
        f"{cfg.data}: dropped {len(prompts) - len(kept)} prompts longer than"
        f" --max_seq_len {cfg.max_seq_len} - --max_new_tokens {cfg.max_new_tokens}"
    )
    require(kept, f"{dropped}; none is left")
    if len(kept) < len(prompts):
        say(grid, f"{dropped}; {len(kept)} left")
    return kept


def check_rollout_size(cfg, grid):
    """BadInput unless every process samples at least one trajectory for each minibatch."""
    cuts = count_minibatches(cfg)
    mine = cfg.batch_size // cfg.group_size // grid.dp_size * cfg.group_size
    require(
        mine >= cuts,
        f"--batch_size {cfg.batch_size}: too few trajectories for"
        f" {grid.dp_size} processes x {cuts} minibatches",
    )


def with_advantage(cfg, reward):
    """cfg with --advantage filled in: a reward that is a Q is used as it is, others are summed over time."""
    summed = "gae" if cfg.stage == "ppo" else "return"
    default = "token" if reward.is_q else summed
    return dataclasses.replace(cfg, advantage=cfg.advantage or default)


# -------------------------------------------------------------------------------- pairs


def stage_pairs(cfg, grid):
    """Preference pairs as the paper makes them: sample, grade, pair right with wrong, deduplicate.

    With --best, the best answer of each prompt instead, as rows for --stage sft (rejection sampling); with
    --step_rollouts, the samples with a label for each step, for --reward prm.
    """
    tokenizer = load_tokenizer(cfg.model, cfg)
    rows = read_rows(cfg.data, ("prompt", "label"), cfg, grid, cfg.limit)
    prompts = encode_prompts(rows, tokenizer, cfg.data, log_to(grid))  # before sampling: it may be refused
    say_first(tokenizer, rows[0], prompts[0], cfg.data, grid)
    if cfg.heldout:
        of_heldout = dataclasses.replace(cfg, data=cfg.heldout)
        heldout = read_rows(cfg.heldout, ("prompt", "label"), of_heldout, grid)
        encode_prompts(heldout, tokenizer, cfg.heldout, log_to(grid))
    policy = load(LanguageModel, cfg.model, cfg, grid)
    reward = None
    if cfg.best and cfg.reward_model:
        reward = load_reward(reward_name(cfg.reward_model), cfg.reward_model, tokenizer, cfg, grid)
    sample_rows(policy, tokenizer, reward, rows, out_path(cfg), cfg, grid)
    if cfg.heldout:
        sample_rows(policy, tokenizer, reward, heldout, heldout_path(cfg), of_heldout, grid)
    barrier(grid)


def sample_rows(policy, tokenizer, reward, rows, path, cfg, grid):
    """Writes the pairs (or best answers, or labelled steps) of the prompts in `rows` to `path`."""
    mine = rows[grid.dp_rank :: grid.dp_size]
    found = []  # (line of the prompt, row to write)
    counts = {"correct": 0, "ended": 0, "silent": 0}
    seed = hash_seed(cfg.seed, "pairs")
    chunk = max(1, 1024 // (cfg.k * max(cfg.step_rollouts, 1)))  # prompts per call of the sampler
    for start in tqdm(range(0, len(mine), chunk), "pairs", disable=None if grid.is_main else True):
        part = mine[start : start + chunk]
        samples = sample_graded(policy, tokenizer, part, cfg, seed, cfg.temperature, cfg.k)
        of_part = count_graded(samples, cfg)
        counts = {name: n + of_part[name] for name, n in counts.items()}
        if cfg.step_rollouts:
            found += rollout_rows(policy, tokenizer, part, samples, cfg)
        elif cfg.best:
            found += best_rows(part, samples, reward, tokenizer, cfg, grid)
        else:
            for row, answers in zip(part, samples):
                pairs = make_pairs(row, answers, cfg.pairs_per_prompt, tokenizer)
                found += [(row["line"], pair) for pair in pairs]
    counts = sum_graded(counts, cfg, grid)
    found = all_ranks(found, grid)
    missing = "has a right answer" if cfg.best else "has both a right and a wrong answer"
    missing = "has an answer that ends" if cfg.step_rollouts or reward else missing
    require(found, f"{cfg.data}: no prompt {missing}; raise --k or --limit, or use another policy")
    if grid.is_main:
        write_rows(path, found, Grid())
        run = {"config": dataclasses.asdict(cfg), "made_from": sources(cfg)}
        write_atomically(run_path(path), json.dumps(run, indent=1))
    share = counts["correct"] / len(rows) / cfg.k
    noun = "answers" if cfg.best or cfg.step_rollouts else "pairs"
    made = f"{len(found)} {noun} from {len(rows)} prompts x {cfg.k} samples"
    say(grid, f"pairs: {path}: {made}, {share:.3f} of them right")


# -------------------------------------------------------------------------------- eval, score, grade


def stage_eval(cfg, grid):
    """eval.json in the model's directory: a policy's pass@k, or how well a reward model or judge ranks."""
    directories = [Path(cfg.model or cfg.out)]
    if not cfg.model and not cfg.out:
        results = sorted(Path(cfg.run_dir).iterdir())
        directories = [path for path in results if (path / "config.json").exists()]
        directories = [path for path in directories if path.suffix not in BESIDE]
    on_heldout = dataclasses.replace(cfg, data=cfg.heldout or cfg.data)  # where given answers are read
    for directory in directories:
        kind = kind_of_eval(directory, on_heldout)
        read = dataclasses.replace(cfg if kind == "policy" else on_heldout, model=str(directory))
        if kind in ("reward model", "steps"):
            read = dataclasses.replace(read, reward_model="")  # none but the one in the directory
        result = EVALUATIONS[kind](directory, read, grid)
        path = Path(cfg.out or directory) / "eval.json"
        if grid.is_main:
            write_atomically(path, json.dumps(result | {"made_from": sources(read)}, indent=1))
        say(grid, f"eval: {path}: {in_words(result, digits=4)}")


EVALUATIONS = {
    "candidates": eval_candidates,
    "judge": eval_judge,
    "steps": eval_steps,
    "reward model": eval_reward_model,
    "policy": eval_policy,
}


def stage_score(cfg, grid):
    """One number per response token: a reward model's Z, a judge's log-odds, or a policy's log-prob."""
    tokenizer = load_tokenizer(cfg.model, cfg)
    rows = read_rows(cfg.data, ("prompt", "response"), cfg, grid, cfg.limit)
    if cfg.reward == "judge":
        key = "scores"
        numbers_of = load_ranker(cfg.model, tokenizer, rows, cfg, grid).rewards
    elif holds_reward_model(cfg.model):
        key = "scores"
        name = "qrm" if has_scalar_head(cfg.model) else reward_name(cfg.model)  # dpo: against its reference
        numbers_of = load_reward(name, cfg.model, tokenizer, cfg, grid).rewards
    else:
        key = "logprobs"
        numbers_of = partial(logprob_rewards, load(LanguageModel, cfg.model, cfg, grid))
    refuse_overwritten(cfg.data, rows, ("prompt_ids", "ids", "tokenizer", "tokens", key))
    examples, rows = encode(rows, tokenizer, cfg.max_seq_len, ("response",), cfg.data, log_to(grid))
    say_first(tokenizer, rows[0], examples[0], cfg.data, grid)
    examples, rows = examples[grid.dp_rank :: grid.dp_size], rows[grid.dp_rank :: grid.dp_size]
    scored = score_examples(numbers_of, examples_of(examples), cfg, grid)
    written = []
    for row, (example,), numbers in zip(rows, examples, scored):
        ids = {
            "prompt_ids": example.prompt_ids,
            "ids": example.response_ids,
            "tokenizer": tokenizer.fingerprint,
        }
        texts = {"tokens": tokenizer.token_texts(example.response_ids)}
        written.append((row["line"], row["raw"] | ids | texts | {key: numbers.tolist()}))
    n = write_rows(out_path(cfg), written, grid)
    if cfg.show and grid.is_main:
        show_tokens(cfg, tokenizer, key)
    say(grid, f"score: {out_path(cfg)}: {n} rows")


def stage_grade(cfg, grid):
    """The rows with `answer` (what the response claims, or null), `correct`, and the label."""
    written = []
    rows = read_rows(cfg.data, ("response", "label"), cfg, grid, cfg.limit)
    refuse_overwritten(cfg.data, rows, ("correct",))
    for row in rows:
        text = row["response"]
        text = text if isinstance(text, str) else text[-1]["content"]  # the reply in a list of messages
        answer, correct = grade(text, row["label"], cfg.task, cfg.grader)
        graded = {"answer": answer, "correct": correct}
        if str(row["raw"].get("label")) != row["label"]:
            graded["label"] = row["label"]  # it may come from `answer`, which is written over
        if row["raw"].get("answer") == row["response"]:
            graded["response"] = row["response"]
        written.append((row["line"], row["raw"] | graded))
    if grid.is_main:
        write_rows(out_path(cfg), written, Grid())
    correct = sum(row["correct"] for _, row in written)
    silent = sum(row["answer"] is None for _, row in written)
    unread = f"; {silent} claim nothing that --task {cfg.task} reads" if silent else ""
    say(grid, f"grade: {out_path(cfg)}: {correct} of {len(written)} correct{unread}")


# -------------------------------------------------------------------------------- the built-in task


DEMO = {  # what the demo runs, in order, and how long that takes on one core (November 2026)
    "sft": ("a policy, fine-tuned on an author's answers, mistakes included", "half a minute"),
    "pairs": ("its samples, right ones paired with wrong ones", "half a minute"),
    "rm": ("the reward model, from these pairs alone", "a minute"),
    "reinforce": ("REINFORCE with its token scores", "a minute"),
    "ppo": ("PPO with its token scores", "a minute"),
    "eval": ("all of them on held-out prompts", "half a minute"),
}


def stage_demo(cfg, grid):
    """The whole path on the built-in task; results that exist and are up to date are kept."""
    for number, (stage, (about, duration)) in enumerate(DEMO.items(), 1):
        say(grid, f"\nstage {number} of {len(DEMO)}, about {duration}: {about}")
        if stage == "eval":
            run_stage(stage_config(cfg, stage), grid)
        else:
            result_of(stage, cfg, grid)
    if grid.is_main:
        say(grid, accuracy_table(cfg))
        report = Path(__file__).parent / "classroom" / "report.py"  # course material: nothing imports it
        subprocess.run([sys.executable, report, cfg.run_dir], check=True)
        say(grid, f"demo: results are in {cfg.run_dir}; open {Path(cfg.run_dir) / 'report.html'}")
    barrier(grid)


def accuracy_table(cfg):
    """The policies of a run side by side: accuracy with its standard error, in percent."""
    lines = ["", f"{'policy':<11}{'greedy':>14}{'sampled':>14}{'best of k':>14}"]
    for name in ("sft", "reinforce", "ppo"):
        path = Path(cfg.run_dir) / name / "eval.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        shares = [result["pass@1"], result["pass@k"]["1"], result["best_of_k"]]
        cells = [f"{100 * p:.1f} +- {100 * (p * (1 - p) / result['n_prompts']) ** 0.5:.1f}" for p in shares]
        lines.append(f"{name:<11}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join([*lines, f"percent of {result['n_prompts']} held-out prompts, with standard errors", ""])


def prepare(cfg, grid):
    """cfg with every missing path set to a file of the built-in task, which is made first if need be.

    A missing result is made by its own stage (result_of), whose inputs are prepared first, and so on down to
    sft. After this, a stage only reads and writes files.
    """
    paths = {}
    if not cfg.model and cfg.stage in ("pairs", "rm", *POLICY_GRADIENT):
        paths["model"] = result_of("sft", cfg, grid)
    elif not cfg.model and cfg.stage == "sft":
        paths["model"] = start_model(cfg, grid)
    elif not cfg.model and cfg.stage == "score":
        paths["model"] = result_of("rm", cfg, grid)
    if cfg.stage in POLICY_GRADIENT and cfg.reward in REWARD_MODELS and not cfg.reward_model:
        paths["reward_model"] = result_of("rm", cfg, grid)
    if not cfg.data:
        paths |= task_files(cfg, grid)
    return dataclasses.replace(cfg, **paths)


def task_files(cfg, grid):
    """{field: path}: the built-in task's files for a stage without --data, less the paths that were given."""
    limit = cfg.limit or ARITH.get(cfg.stage, {}).get("limit", 0)
    paths = {}
    if cfg.stage == "sft":
        paths["data"] = arith_file("train", 16_000, cfg.seed, cfg, grid)
    if cfg.stage == "pairs":
        paths["data"] = arith_file("train", limit, cfg.seed + 1, cfg, grid)
        paths["heldout"] = arith_file("test", max(limit // 5, 1), cfg.seed + 1, cfg, grid)
    if cfg.stage == "rm":
        paths["data"] = result_of("pairs", cfg, grid)
        paths["heldout"] = str(heldout_path(stage_config(cfg, "pairs")))
    if cfg.stage in POLICY_GRADIENT:
        paths["data"] = arith_file("train", 8192, cfg.seed + 2, cfg, grid)
        paths["heldout"] = arith_file("test", limit, 0, cfg, grid)
    if cfg.stage == "score":
        paths["data"] = arith_file("test", limit, cfg.seed, cfg, grid)
    if cfg.stage == "eval":
        paths["data"] = arith_file("test", limit, cfg.seed, cfg, grid)
        paths |= judge_files(cfg, grid)
    given = {name for name in paths if getattr(cfg, name)}
    return {name: path for name, path in paths.items() if name not in given}


def judge_files(cfg, grid):
    """{field: path} of eval: held-out pairs for reward models, and the run's reward model for best-of-k."""
    paths = {}
    chosen = cfg.model or cfg.out
    if not chosen:
        result_of("rm", cfg, grid)
    alone = cfg.reward == "judge" and not cfg.reward_model  # it is the model to evaluate
    if not chosen or holds_reward_model(chosen) or alone:
        result_of("pairs", cfg, grid)
        paths["heldout"] = str(heldout_path(stage_config(cfg, "pairs")))
    own = out_path(stage_config(cfg, "rm"))
    in_run = not chosen or Path(chosen).absolute().parent == Path(cfg.run_dir).absolute()
    if in_run and own.exists() and not alone:
        paths["reward_model"] = str(own)
    return paths


def result_of(stage, cfg, grid):
    """Path of a stage's result in --run_dir; the main rank makes it first if missing or out of date."""
    earlier = stage_config(cfg, stage)
    path = out_path(earlier)
    barrier(grid)
    changed = out_of_date(path) if grid.is_main and path.exists() else []
    if changed:
        say(grid, f"{path} is out of date: {changed[0]} has changed since; running --stage {stage} again")
    elif grid.is_main and not path.exists() and cfg.stage != "demo":
        say(grid, f"{cfg.stage} needs {path}: running --stage {stage} first")
    if grid.is_main and (changed or not path.exists()):
        check_paths(earlier)
        run_stage(earlier, Grid(grid.device))
    elif grid.is_main:
        check_kept(path, earlier, cfg, log_to(grid))
    barrier(grid)
    return str(path)


def arith_file(split, n, seed, cfg, grid):
    """Path of n rows of the built-in task as JSON lines in <run_dir>/data, written unless already there."""
    path = Path(cfg.run_dir) / "data" / f"{split}-seed{seed}-{n}.jsonl"
    if grid.is_main and not path.exists():
        keys = ("prompt", "response", "label")
        rows = [{key: row[key] for key in keys} for row in arith_rows(split, n, seed)]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    barrier(grid)
    return str(path)


def arith_shape(tokenizer):
    """0.15 M parameters; eight heads, so that eight processes can share it."""
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
    )


def start_model(cfg, grid):
    """Directory of the built-in task's untrained policy."""
    path = Path(cfg.run_dir) / "data" / f"start-seed{cfg.seed}"
    if grid.is_main and not (path / "config.json").exists():
        tokenizer = arith_tokenizer()
        policy = init_weights(build_model(LanguageModel, arith_shape(tokenizer), Grid()), cfg.seed)
        write_model(policy, tokenizer, path)
    barrier(grid)
    return str(path)


STAGE_FUNCTIONS = {
    "sft": stage_sft,
    "pairs": stage_pairs,
    "rm": stage_rm,
    "reinforce": stage_rl,
    "ppo": stage_rl,
    "eval": stage_eval,
    "score": stage_score,
    "grade": stage_grade,
    "demo": stage_demo,
}


def run_stage(cfg, grid):
    """Prepares the inputs of a stage, prints its settings, and runs it."""
    cfg = prepare(cfg, grid)
    if cfg.stage != "demo":
        say(grid, config_text(cfg, grid))
    STAGE_FUNCTIONS[cfg.stage](cfg, grid)


# -------------------------------------------------------------------------------- the process


def main(argv=None):
    """-> exit status: 0; 2 for bad input or a full disk, after one line on stderr; 130 after Ctrl-C; 141 when
    whoever reads the output (`| head`) has gone."""
    argv = sys.argv[1:] if argv is None else argv
    status, cfg = 0, None
    try:
        cfg = parse(argv)
        check_paths(cfg)
        grid = make_grid(cfg.tp, cfg.device, cfg.timeout)
        if cfg.preset == "tiny" or not (cfg.model or cfg.data):
            # The built-in model is too small for more, and every machine gets the same numbers.
            torch.set_num_threads(1)
        for name in ("flex", "graphs"):
            on_cuda = grid.device.type == "cuda" or not getattr(cfg, name)
            require(on_cuda, f"--{name}: works on CUDA only; expected --device cuda")
        for note in flag_notes(argv):
            say(grid, f"note: {note}")
        run_stage(cfg, grid)
        print(end="", flush=True)  # a full disk or a closed pipe shows here, not at exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        status = 141
    except (BadInput, OSError) as e:
        if os.environ.get("RANK", "0") != "0":
            # Rank 0 usually reports the same error, and its exit ends this process before it prints; an error
            # that only this rank hit must still be printed.
            time.sleep(2)
        print(one_line(e, cfg), file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        goes_on = dict.fromkeys(TRAINING, "--resume continues from the last checkpoint")
        goes_on["demo"] = "the same command keeps the stages that are finished"
        print(f"interrupted: {goes_on.get(cfg and cfg.stage, 'no file is half-written')}", file=sys.stderr)
        status = 130
    except RuntimeError as e:
        if re.search("timed out|timeout", str(e), re.I):
            waited = f"rank {os.environ.get('RANK')} waited longer than --timeout {cfg.timeout} s for a peer"
            print(f"--stage {cfg.stage}: {waited}", file=sys.stderr)
        raise
    if status == 2 and dist.is_initialized() and dist.get_backend() == "nccl":
        os._exit(status)  # NCCL's shutdown is a collective, and the other ranks may not have met this error
    if dist.is_initialized():  # not reached by a re-raised error: the shutdown would wait for stuck ranks
        dist.destroy_process_group()
    return status


def config_text(cfg, grid):
    """The resolved settings as text: the size of the grid, and the fields that the stage reads."""
    sizes = f"tp {grid.tp_size} x dp {grid.dp_size} = {grid.tp_size * grid.dp_size} process(es)"
    lines = [f"--stage {cfg.stage} on {grid.device}, {sizes}"]
    read = [name for name in FIELDS if cfg.stage in STAGES_OF[name] and name not in ("stage", "tp", "device")]
    cells = [f"{name} {getattr(cfg, name)}" for name in read if getattr(cfg, name) not in ("", False)]
    for start in range(0, len(cells), 3):
        lines.append("  " + "".join(f"{cell:<32}  " for cell in cells[start : start + 3]).rstrip())
    return "\n".join(lines)


def one_line(error, cfg):
    """The message of an error for the user, as one printable line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or (cfg and out_path(cfg))}: {error.strerror}"
    return " ".join(text.split()).encode("utf-8", "backslashreplace").decode()[:2000]


if __name__ == "__main__":
    sys.exit(main())
