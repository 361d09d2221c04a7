"""Every stage of Q-RM from the command line; read top to bottom, it is the method.

python train.py                                        the whole path on the built-in task (--stage demo)
torchrun --nproc_per_node 8 train.py --stage rm        the same code on 8 GPUs (NCCL) or 8 CPU processes (gloo)

sft ─► policy ─► pairs ─► pairs.jsonl ─► rm ─► reward model ─► reinforce, ppo ─► policy
                                                                 eval, score and grade look at any of them
"""

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import (
    arith_rows,
    arith_tokenizer,
    batch_indices,
    collate,
    encode,
    encode_prompts,
    error_places,
    load_rows,
    sequence_length,
    spans,
)
from model import (
    LanguageModel,
    ModelConfig,
    Packed,
    ScalarModel,
    add_lora,
    build_model,
    init_weights,
    save_adapter,
    save_model,
    token_logprobs,
)
from parallel import Grid, Optimizer, Update, all_sum, barrier, make_grid, say
from ppo import ppo_step
from qrm import REWARD_MODELS, response_scores, reward_model_loss
from reinforce import collect_rollout, minibatches, reinforce_step, rollout_stats
from support.checkpoints import (
    Workdir,
    deferred_interrupt,
    fingerprints,
    save_bad_inputs,
)
from support.evaluate import (
    eval_policy,
    eval_reward_model,
    greedy_pass,
    hash_seed,
    heldout_pairs,
    is_reward_model,
    load,
    load_reward,
    load_tokenizer,
    make_pairs,
    reward_kind,
    sample_graded,
    score_examples,
    show_tokens,
    write_rows,
)
from support.files import BadInput, at_line, write_atomically
from support.graders import grade
from support.sampling import KVCache
from support.settings import ARITH, check_paths, flags, out_path, parse, stage_config

# ------------------------------------------------------------------------------------------------ files and logs


def adapted(model, cfg, rank):
    """What is to be trained: the model itself, or, with a rank, adapters on its frozen weights."""
    return add_lora(model, rank, cfg.seed, cfg.lora_alpha) if rank else model


def need(stage, cfg, grid):
    """Path of an earlier stage's result of the built-in task; what is missing is made first.

    The main rank makes it alone (the model is far too small to share), so it is the same as one process makes.
    """
    earlier = stage_config(cfg, stage)
    path = out_path(earlier)
    barrier(grid)
    if grid.is_main and not path.exists():
        say(grid, f"{cfg.stage} needs {path}: running --stage {stage} first")
        STAGES[stage](earlier, Grid(grid.device))
    barrier(grid)
    return path


# ------------------------------------------------------------------------------------------------ the training loop


def lr_at(step, cfg, steps):
    """Linear warm-up from 0, then linear decay that would be at final_lr * lr right after the last update (constant when that is 1)."""
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    return cfg.lr * warm * (1 - (1 - cfg.final_lr) * step / max(steps, 1))


def train_loop(cfg, grid, steps, optimizers, step_fn, inputs):
    """Calls `step_fn(step, lr) -> metrics` for each step that is still to do, logs, saves; -> the Workdir to finish.

    optimizers   {name: (model, Optimizer)}: what a checkpoint holds. Everything random is a function of (seed, step), so
                 nothing else is needed to go on exactly.
    inputs       fingerprints of the files that decide what is learned; `--resume` insists on the same
    """
    work = Workdir(cfg, out_path(cfg), grid, optimizers, inputs)
    skipped = lambda: sum(optimizer.skipped for _, optimizer in optimizers.values())
    with deferred_interrupt(grid) as interrupted:
        for step in tqdm(
            range(work.first_step, steps),
            cfg.stage,
            initial=work.first_step,
            total=steps,
            disable=None if grid.is_main else True,
        ):
            began, lr, before = time.perf_counter(), lr_at(step, cfg, steps), skipped()
            row = step_fn(step, lr)
            tokens = row.pop("_tokens")
            if skipped() > before:
                row["skipped"] = skipped() - before
                save_bad_inputs(work, step)
            work.log(
                {
                    "step": step,
                    **row,
                    "lr": lr,
                    "tokens": tokens,
                    "tokens_per_s": tokens / (time.perf_counter() - began),
                }
            )
            if (n := max(optimizer.in_a_row for _, optimizer in optimizers.values())) >= cfg.max_skipped:
                if not work.saved_step:  # skipped updates left the weights as they were
                    work.save(step + 1)
                raise BadInput(
                    f"--stage {cfg.stage}: {n} updates in a row had a loss or gradient that is not finite; the last good checkpoint is "
                    f"{work.state.parent} (step {work.saved_step}), the inputs of the first are in {work.path}/skipped.*.json"
                )
            stop = interrupted()
            if stop or cfg.save_every and (step + 1) % cfg.save_every == 0:
                work.save(step + 1)
            if stop:
                raise KeyboardInterrupt
    return work


def train_on_rows(cfg, grid, model, rows, weigh, loss_fn, count_tokens, inputs):
    """Supervised training of one model on shuffled batches of rows (sft, rm); -> the Workdir.

    weigh(row)          what the loss is a mean over: tokens, or 1 a pair
    loss_fn(rows)       -> mean loss, {name: mean}
    """
    if cfg.batch_size < grid.dp_size:
        raise BadInput(
            f"--batch_size {cfg.batch_size} gives some of the {grid.dp_size} data-parallel processes nothing to do"
        )
    optimizer = Optimizer(model, grid, cfg.lr, weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm)

    def step_fn(step, lr):
        batch = [rows[i] for i in batch_indices(len(rows), cfg.batch_size, step, cfg.seed)]
        mine = batch[grid.dp_rank :: grid.dp_size]
        parts = [mine[a:b] for a, b in spans([count_tokens(row) for row in mine], cfg.micro_tokens)]
        update = Update(optimizer, [(sum(map(weigh, part)), part) for part in parts])
        for part in update:
            update.backward(*loss_fn(part))
        return {**update.step(lr), "_tokens": sum(map(count_tokens, batch))}

    return train_loop(
        cfg,
        grid,
        cfg.steps or -(-len(rows) // cfg.batch_size),
        {"model": (model, optimizer)},
        step_fn,
        inputs,
    )


# ------------------------------------------------------------------------------------------------ sft


def stage_sft(cfg, grid):
    """Supervised fine-tuning: -log pi(a_t | s_t), mean over the response tokens of the batch."""
    if cfg.model:
        tokenizer = load_tokenizer(cfg.model, cfg)
        policy = adapted(load(LanguageModel, cfg.model, cfg, grid), cfg, cfg.lora_rank)
    else:
        tokenizer = arith_tokenizer()
        policy = init_weights(
            build_model(LanguageModel, arith_model(tokenizer), grid, getattr(torch, cfg.dtype)), cfg.seed
        )
    rows = load_rows(cfg.data, ("prompt", "response")) if cfg.data else arith_rows("train", 16_000, cfg.seed)
    rows, _ = encode(
        rows, tokenizer, cfg.max_seq_len, source=cfg.data or "built-in task", log=lambda text: say(grid, text)
    )

    def loss_fn(part):
        ids, mask = collate([row[0] for row in part], grid.device)
        logprobs, entropy = token_logprobs(policy, ids, mask)
        return -logprobs.sum() / mask.sum(), {"entropy": (entropy.sum() / mask.sum()).item()}

    work = train_on_rows(
        cfg,
        grid,
        policy,
        rows,
        lambda row: len(row[0].response_ids),
        loss_fn,
        lambda row: sequence_length(row[0]),
        fingerprints(tokenizer, cfg.data),
    )
    finish(work, policy, tokenizer, cfg.model)


def arith_model(tokenizer):
    """0.15 M parameters; eight heads, so that eight processes can share it."""
    return ModelConfig(
        tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
    )


# ------------------------------------------------------------------------------------------------ pairs


def stage_pairs(cfg, grid):
    """Preference pairs as the paper makes them: sample, grade, pair right with wrong, deduplicate."""
    directory = cfg.model or need("sft", cfg, grid)
    tokenizer = load_tokenizer(directory, cfg)
    policy = load(LanguageModel, directory, cfg, grid)
    out = out_path(cfg)
    jobs = [(cfg.data or "built-in task", out, None)]
    if not cfg.data:  # held-out pairs, for eval
        jobs = [
            ("built-in task, training prompts", out, "train"),
            ("built-in task, held-out prompts", heldout_pairs(cfg), "test"),
        ]
    for source, path, split in jobs:
        n = cfg.limit or ARITH["pairs"]["limit"]
        n = max(n // 5, 1) if split == "test" else n
        rows = (
            arith_rows(split, n, cfg.seed + 1)
            if split
            else load_rows(cfg.data, ("prompt", "label"), cfg.limit)
        )
        mine, found, correct = rows[grid.dp_rank :: grid.dp_size], [], 0
        chunk = max(1, 1024 // cfg.k)
        for start in tqdm(range(0, len(mine), chunk), "pairs", disable=None if grid.is_main else True):
            part = mine[start : start + chunk]
            seed = hash_seed(cfg.seed, split, grid.dp_rank, start)
            answers, _ = sample_graded(policy, tokenizer, part, cfg, grid, seed, cfg.temperature, cfg.k)
            correct += sum(a[2] for row in answers for a in row)
            for row, answer in zip(part, answers):
                found += [(row["line"], pair) for pair in make_pairs(row, answer, cfg.pairs_per_prompt)]
        correct = all_sum({"correct": correct}, grid)["correct"]
        written = write_rows(path, found, grid)
        if not written:
            raise BadInput(
                f"{source}: no prompt has both a right and a wrong answer; raise --k or --limit, or use another policy"
            )
        say(
            grid,
            f"pairs: {path}: {written} pairs from {len(rows)} prompts x {cfg.k} samples, {correct / len(rows) / cfg.k:.3f} of them right",
        )
    barrier(grid)


# ------------------------------------------------------------------------------------------------ rm


def stage_rm(cfg, grid):
    """The reward model: pairs -> token scores -> length-normalised pairwise loss (qrm.py); or one to compare it with."""
    directory = str(cfg.model or need("sft", cfg, grid))
    path = cfg.data or need("pairs", cfg, grid)
    tokenizer = load_tokenizer(directory, cfg)
    base = load(REWARD_MODELS[cfg.reward].base, directory, cfg, grid)
    model = adapted(base, cfg, cfg.lora_rank)
    rows = load_rows(path, ("prompt", "chosen", "rejected"))
    pairs, rows = encode(
        rows, tokenizer, cfg.max_seq_len, ("chosen", "rejected"), str(path), lambda text: say(grid, text)
    )
    if REWARD_MODELS[cfg.reward].needs_steps:
        if cfg.task != "arith":
            raise BadInput(
                "--reward prm learns from step labels, which only the built-in task (--task arith) knows"
            )
        for i, row in enumerate(rows):
            with at_line(path, row["line"]):
                pairs[i] += tuple(error_places(tokenizer, row["prompt"], pairs[i]))
    reference = None
    if REWARD_MODELS[cfg.reward].needs_reference:
        reference = base if cfg.lora_rank else load(LanguageModel, directory, cfg, grid).requires_grad_(False)
    step_ids = tokenizer.ids_with("\n")

    def loss_fn(part):
        ids, mask = collate(
            [example for pair in part for example in pair[:2]], grid.device
        )  # (2P, T+1), (2P, T)
        errors = torch.tensor(
            [error for pair in part for error in pair[2:]], device=grid.device
        )  # (2P,), prm only
        return reward_model_loss(model, ids, mask, cfg, reference, step_ids, errors)

    work = train_on_rows(
        cfg,
        grid,
        model,
        pairs,
        lambda pair: 1,
        loss_fn,
        lambda pair: sum(map(sequence_length, pair[:2])),
        fingerprints(tokenizer, path),
    )
    finish(work, model, tokenizer, directory, reward=cfg.reward, reference=directory)


# ------------------------------------------------------------------------------------------------ reinforce, ppo


def stage_rl(cfg, grid):
    """REINFORCE or PPO: sample, score every token, update; greedy pass@1 on held-out prompts now and then."""
    is_ppo = cfg.stage == "ppo"
    directory = str(cfg.model or need("sft", cfg, grid))
    graded = cfg.reward in ("outcome", "oracle")
    if graded and cfg.reward_model:
        raise BadInput(f"--reward {cfg.reward} grades the answers itself; expected no --reward_model")
    judge = "" if graded else str(cfg.reward_model or need("rm", cfg, grid))
    tokenizer = load_tokenizer(directory, cfg)
    reference = load(LanguageModel, directory, cfg, grid).requires_grad_(False)
    policy = adapted(
        reference if cfg.lora_rank else load(LanguageModel, directory, cfg, grid), cfg, cfg.lora_rank
    )
    if cfg.data:
        rows = load_rows(cfg.data, ("prompt", "label") if graded else ("prompt",), optional=("label",))
        cut = max(len(rows) - cfg.limit, 0)
        rows, heldout = rows[:cut], [row for row in rows[cut:] if "label" in row]
        if not rows:
            raise BadInput(
                f"--limit {cfg.limit} holds out all rows of {cfg.data}; nothing is left to learn from"
            )
    else:
        rows, heldout = (
            arith_rows("train", 8192, cfg.seed + 2),
            arith_rows("test", cfg.limit or ARITH[cfg.stage]["limit"], 0),
        )
    prompts, n, room = (
        encode_prompts(rows, tokenizer, cfg),
        cfg.batch_size // cfg.group_size,
        cfg.max_seq_len - cfg.max_new_tokens,
    )
    if long := sum(len(ids) > room for ids in prompts):
        prompts = [ids for ids in prompts if len(ids) <= room]
        text = f"{cfg.data or 'built-in task'}: dropped {long} prompts longer than --max_seq_len {cfg.max_seq_len} - --max_new_tokens {cfg.max_new_tokens}"
        say(grid, f"{text}; {len(prompts)} left")
        if not prompts:
            raise BadInput(f"{text}; none is left")
    kind = cfg.reward if graded else reward_kind(judge, cfg.reward)
    if not graded and cfg.reward not in ("qrm", "plain", kind):
        raise BadInput(
            f"--reward {cfg.reward}: {judge} was trained as {kind!r}; expected the reward that it was trained for, or none"
        )
    reward = load_reward(kind, judge, tokenizer, cfg, grid, rows)
    if not cfg.advantage:
        cfg = dataclasses.replace(cfg, advantage="token" if reward.is_q else "gae" if is_ppo else "return")
    settings = dict(weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm)
    optimizers = {"policy": (policy, Optimizer(policy, grid, cfg.lr, **settings))}
    if is_ppo:  # the critic starts from the reward model, with a new head
        critic = load(ScalarModel, judge if judge and is_reward_model(judge) else directory, cfg, grid)
        critic.score.weight.data.zero_()
        critic = adapted(critic, cfg, cfg.critic_lora_rank)
        optimizers["critic"] = (critic, Optimizer(critic, grid, cfg.critic_lr, **settings))
    steps, cuts = cfg.steps or -(-len(prompts) // n), len(minibatches([], cfg))
    if n // grid.dp_size * cfg.group_size < cuts:
        raise BadInput(
            f"--batch_size {cfg.batch_size}: too few trajectories for {grid.dp_size} processes x {cuts} minibatches"
        )

    def step_fn(step, lr):
        batch = [prompts[i] for i in batch_indices(len(prompts), n, step, cfg.seed)][
            grid.dp_rank :: grid.dp_size
        ]
        seed = hash_seed(cfg.seed, cfg.stage, step, grid.dp_rank)
        rollout = collect_rollout(policy, reference, reward, batch, tokenizer.stop_ids, cfg, seed)
        if is_ppo:
            critic_lr = lr_at(step, dataclasses.replace(cfg, lr=cfg.critic_lr), steps)  # the same schedule
            stats = ppo_step(
                policy, critic, *(o for _, o in optimizers.values()), rollout, cfg, lr, critic_lr
            )
        else:
            stats = reinforce_step(policy, optimizers["policy"][1], rollout, cfg, lr)
        row = {"trajectories": (step + 1) * n * cfg.group_size, **stats, **rollout_stats(rollout, grid)}
        if heldout and (step + 1 == steps or (step + 1) % cfg.eval_every == 0):
            row["pass@1"] = greedy_pass(policy, tokenizer, heldout, cfg, grid)
        return row | {"_tokens": round(row["response_length"] * n * cfg.group_size)}

    work = train_loop(cfg, grid, steps, optimizers, step_fn, fingerprints(tokenizer, cfg.data))
    if is_ppo:
        if grid.is_main:
            (work.path / "critic").mkdir(exist_ok=True)
        save_model(critic, work.path / "critic")
    finish(work, policy, tokenizer, directory)


def finish(work, model, tokenizer, base, **run):
    """Writes the model directory and puts it in the place of `<out>`; base is the directory that the model started from."""
    save_model(model, work.path)
    if work.cfg.lora_rank:
        save_adapter(model, work.path / "adapter", base)
    if work.grid.is_main:
        tokenizer.save(work.path)
        run |= {
            "config": dataclasses.asdict(work.cfg),
            "tokenizer": tokenizer.fingerprint,
            "torch": torch.__version__,
        }
        write_atomically(work.path / "run.json", json.dumps(run, indent=1))
    work.publish()


# ------------------------------------------------------------------------------------------------ eval, score, grade


def stage_eval(cfg, grid):
    """eval.json in the model's own directory: a policy's pass@k, or a reward model's accuracy and credit."""
    if cfg.model or cfg.out:
        directories = [cfg.model or cfg.out]
    else:
        need("rm", cfg, grid)
        directories = [
            d for d in sorted(Path(cfg.run).iterdir()) if (d / "config.json").exists() and d.suffix == ""
        ]
    for directory in map(Path, directories):
        judges = is_reward_model(directory) or REWARD_MODELS[reward_kind(directory)].base is LanguageModel
        if judges:
            path = cfg.data or (need("pairs", cfg, grid), heldout_pairs(stage_config(cfg, "pairs")))[1]
            result = eval_reward_model(directory, dataclasses.replace(cfg, data=str(path)), grid)
        else:
            result = eval_policy(directory, cfg, grid)
        path = Path(cfg.out) / "eval.json" if cfg.out else directory / "eval.json"
        if grid.is_main:
            write_atomically(path, json.dumps(result, indent=1))
        say(
            grid,
            f"eval: {path}: "
            + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()),
        )


def stage_score(cfg, grid):
    """One number a response token: a reward model's raw Z, or a policy's log-probability in nats."""
    directory = cfg.model or need("rm", cfg, grid)
    tokenizer, scalar = load_tokenizer(directory, cfg), is_reward_model(directory)
    model, key = (
        load(ScalarModel if scalar else LanguageModel, directory, cfg, grid),
        "scores" if scalar else "logprobs",
    )
    if cfg.data:
        rows = load_rows(cfg.data, ("prompt", "response"), cfg.limit)
    else:
        rows = [
            row | {"raw": {"prompt": row["prompt"], "response": row["response"]}}
            for row in arith_rows("test", cfg.limit or 8, cfg.seed)
        ]
    kept, rows = encode(
        rows,
        tokenizer,
        cfg.max_seq_len,
        ("response",),
        cfg.data or "built-in task",
        lambda text: say(grid, text),
    )
    kept, rows, written = kept[grid.dp_rank :: grid.dp_size], rows[grid.dp_rank :: grid.dp_size], []
    numbers = score_examples(
        lambda ids, mask: (
            response_scores(model, ids, mask) if scalar else token_logprobs(model, ids, mask)[0]
        ),
        [e for (e,) in kept],
        cfg,
        grid,
    )
    for row, (example,), x in zip(rows, kept, numbers):
        more = {
            "prompt_ids": example.prompt_ids,
            "ids": example.response_ids,
            "tokens": tokenizer.token_texts(example.response_ids),
        }
        written.append((row["line"], row["raw"] | more | {key: x.tolist()}))
    n = write_rows(out_path(cfg), written, grid)
    if cfg.show and grid.is_main:
        show_tokens(cfg, tokenizer, key)
    say(grid, f"score: {out_path(cfg)}: {n} rows")


def stage_grade(cfg, grid):
    """The rows with `answer` (what the response claims, or null) and `correct`."""
    if not cfg.data:
        raise BadInput("--stage grade needs --data: JSON lines with a response and a label")
    rows = load_rows(cfg.data, ("response", "label"), cfg.limit)
    written = []
    for row in rows:
        text = (
            row["response"] if isinstance(row["response"], str) else row["response"][-1]["content"]
        )  # the reply of a list of messages
        answer, correct = grade(text, row["label"], cfg.task, cfg.grader)
        written.append((row["line"], row["raw"] | {"answer": answer, "correct": correct}))
    if grid.is_main:
        write_rows(out_path(cfg), written, Grid())
    say(
        grid, f"grade: {out_path(cfg)}: {sum(row['correct'] for _, row in written)} of {len(written)} correct"
    )


# ------------------------------------------------------------------------------------------------ demo


def stage_demo(cfg, grid):
    """The whole path on the built-in task: what is there already is kept, the rest is made."""
    for stage in ("sft", "pairs", "rm", "reinforce", "ppo"):
        need(stage, cfg, grid)
    stage_eval(stage_config(cfg, "eval"), grid)
    if grid.is_main:
        from classroom.report import (
            write_report,  # course material: the method does not depend on it
        )

        say(grid, f"demo: results are in {cfg.run}; open {write_report(cfg.run)}")
    barrier(grid)


STAGES = {
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


def main(argv=None):
    """-> exit status: 0, 2 for bad input or a disk that takes no more (one line on stderr), 130 after Ctrl-C (a checkpoint is written)."""
    status, cfg = 0, None
    try:
        cfg = parse(sys.argv[1:] if argv is None else argv)
        check_paths(cfg)
        grid = make_grid(cfg.tp, cfg.device, cfg.timeout)
        if not cfg.model and not cfg.data:
            torch.set_num_threads(
                1
            )  # the built-in model is too small for more; and so every machine gives the same numbers
        if (cfg.flex or cfg.graphs) and grid.device.type != "cuda":
            raise BadInput(
                f"--{'flex' if cfg.flex else 'graphs'}: works on CUDA only; expected --device cuda"
            )
        Packed.flex, KVCache.graphs, KVCache.spare = (
            cfg.flex,
            cfg.graphs,
            256 if cfg.graphs else 64,
        )  # each growth is recorded anew
        say(grid, "config: " + "  ".join(f"{k} {getattr(cfg, k)}" for k in flags() if getattr(cfg, k) != ""))
        STAGES[cfg.stage](cfg, grid)
    except (BadInput, OSError) as e:
        if int(os.environ.get("RANK", 0)):
            time.sleep(
                2
            )  # rank 0 mostly says the same, and torchrun then ends this one; what only this one met must still be seen
        reason = (
            f"{e.filename or out_path(cfg)}: {e.strerror}"
            if isinstance(e, OSError) and e.strerror
            else str(e)
        )
        print(" ".join(reason.split()).encode("utf-8", "backslashreplace").decode()[:2000], file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted: --resume goes on from the last checkpoint", file=sys.stderr)
        status = 130
    except RuntimeError as e:
        if re.search("timed out|timeout", str(e), re.I):
            print(
                f"--stage {cfg.stage}: rank {os.environ.get('RANK')} waited longer than --timeout {cfg.timeout} s for another one",
                file=sys.stderr,
            )
        raise
    if status == 2 and dist.is_initialized() and dist.get_backend() == "nccl":
        os._exit(
            status
        )  # to take NCCL down is a collective, and the other ranks may not have met what this one did
    if (
        dist.is_initialized()
    ):  # not after an exception: what other ranks still wait for would be waited for here
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
