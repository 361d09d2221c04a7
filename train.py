"""Every stage of Q-RM from the command line; read top to bottom, it is the method.

    python train.py                                        the whole path on the built-in task (--stage demo)
    torchrun --nproc_per_node 8 train.py --stage rm        the same code on 8 GPUs (NCCL) or 8 CPU processes (gloo)

    sft ─► policy ─► pairs ─► pairs.jsonl ─► rm ─► reward model ─► reinforce, ppo ─► policy
                                                                     eval, score and grade look at any of them
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from data import BadInput, Example
from model import (KVCache, LanguageModel, ModelConfig, Packed, ScalarModel, add_lora, build_model, init_weights, load_model, read_config, save_adapter,  # fmt: skip
                   save_model, token_logprobs)
from parallel import Grid, Optimizer, Workdir, all_sum, barrier, make_grid, say, update, write_atomically
from ppo import PPO, ppo_step
from qrm import POLICY_LIKE, REWARD_MODELS, Reward, credit_counts, last_token_mask, reward_function, reward_model_loss, sequence_score, token_reward
from reinforce import (RL, collect_rollout, encode_prompts, graded_reward, greedy_pass, majority_is_right, make_pairs, minibatches,  # fmt: skip
                       pass_at_k, reinforce_step, rollout_stats, sample_graded, standardize)

# ------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class Run:
    """What to run, where, and on what."""

    stage: str = "demo"  # sft | pairs | rm | reinforce | ppo | eval | score | grade | demo
    preset: str = ""  # paper-rm | paper-ppo | paper-reinforce: the settings of the paper's runs, the stage included; a flag wins over them
    run: str = "runs/arith"  # directory where the stages of the built-in task keep and find everything
    out: str = ""  # result; "" is <run>/<stage>, for pairs <run>/pairs.jsonl, for eval the model's own directory
    model: str = ""  # a Hugging Face directory to start from; "" is the built-in task's
    reward_model: str = ""  # [reinforce ppo eval] a reward model's directory (eval: it judges best-of-k)
    data: str = ""  # a JSON lines file; "" is the built-in task
    seed: int = 0  # of weights, data order and sampling
    tp: int = 0  # processes that share one model; 0 is all of them, the rest is data parallel
    device: str = "auto"  # auto | cpu | cuda
    timeout: int = 1800  # seconds that a process waits for another one before the run is given up
    dtype: str = "float32"  # float32 | bfloat16 (with fp32 masters)
    graphs: bool = False  # [pairs reinforce ppo eval] sampling replays CUDA graphs (CUDA only): pays where a step is too short to be launched kernel by kernel
    flex: bool = False  # packed rows by torch's FlexAttention, one compiled kernel (CUDA only); off: one call for each length
    chat: str = "none"  # none | llama3 | chatml: how prompts are written for the model
    date: str = ""  # with --chat llama3: the system block of Llama 3.1 and 3.2 with this date, such as "26 Jul 2024"; "" leaves it out
    max_seq_len: int = 1024  # tokens of prompt and response; longer rows are dropped and counted


@dataclass(frozen=True)
class Train:
    """How a model is updated, in every stage that trains one."""

    steps: int = 0  # [sft rm reinforce ppo] updates (reinforce, ppo: rollouts); 0 is one pass over the data
    lr: float = 1e-5  # [sft rm reinforce ppo] learning rate after warm-up (the paper's value for the reward model)
    batch_size: int = 2  # [sft rm reinforce ppo] rows, pairs or trajectories a step, over all processes (the paper: 2 pairs)
    micro_tokens: int = 8192  # [sft rm reinforce ppo eval score] tokens per forward; changes memory and speed, not results
    remat: bool = False  # [sft rm reinforce ppo] keep only each block's input, and compute the block again in backward
    warmup: int = 0  # [sft rm reinforce ppo] updates (reinforce, ppo: rollouts) of linear warm-up
    final_lr: float = 1.0  # [sft rm reinforce ppo] share of lr that is left after the last update (linear decay); 1 is constant, as in the paper
    max_grad_norm: float = 1.0  # [sft rm reinforce ppo] gradients are scaled down to this norm; 0 is off
    weight_decay: float = 0.0  # [sft rm reinforce ppo] AdamW's
    lora_rank: int = 0  # [sft rm reinforce ppo] train adapters of this rank beside frozen weights (the paper's reward model: 128); 0 trains all
    lora_alpha: int = 0  # [sft rm reinforce ppo] adapters count alpha / rank; 0 is the rank (the paper)
    max_skipped: int = 10  # [sft rm reinforce ppo] updates in a row without a finite loss and gradient before the run stops
    save_every: int = 0  # [sft rm reinforce ppo] updates (reinforce, ppo: rollouts) between resumable checkpoints; 0 is only on Ctrl-C and SIGTERM
    resume: bool = False  # [sft rm reinforce ppo] go on from the last checkpoint of the same command


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled and graded."""

    task: str = "gsm8k"  # [pairs reinforce ppo eval grade score] which grader: gsm8k | math | arith (--show: where the first error is known)
    grader: str = "ours"  # [pairs reinforce ppo eval grade] ours | strict | authors | math_verify
    limit: int = 0  # [pairs reinforce ppo eval grade score] use only so many rows; 0 is all. reinforce, ppo: hold out the last so many
    k: int = 8  # [pairs eval] samples a prompt
    temperature: float = 1.0  # [pairs reinforce ppo eval] of the samples; pass@1 is always greedy
    max_new_tokens: int = 512  # [pairs reinforce ppo eval] longest answer, tokens
    pairs_per_prompt: int = 4  # [pairs] at most
    show: bool = False  # [score] also print the answers, every token coloured by its number


@dataclass(frozen=True)
class Config(Run, Train, Reward, Sampling, RL, PPO):
    """All of the above: a stage reads the fields it needs, and nothing else."""


# What the built-in task needs instead: a model of 0.1 M parameters learns at rates that would ruin a large one.
ARITH = {
    "sft": dict(steps=400, lr=4e-3, batch_size=64, warmup=50, final_lr=0.05),
    "pairs": dict(limit=3000, k=8, max_new_tokens=64, task="arith"),
    "rm": dict(steps=800, lr=2e-3, batch_size=32, warmup=20, final_lr=0.05, task="arith"),
    "reinforce": dict(steps=12, lr=1e-4, batch_size=256, minibatch=64, kl_coef=0.2, limit=300, max_new_tokens=64,
                      task="arith"),
    "ppo": dict(steps=12, lr=1e-4, critic_lr=5e-4, ppo_epochs=2, batch_size=256, minibatch=64, kl_coef=0.2, limit=300,
                max_new_tokens=64, task="arith"),
    "eval": dict(limit=500, k=8, max_new_tokens=64, task="arith"),
}

# The paper's runs. Sources: "paper" is Chen et al. 2025 with its appendix, "scripts" and "code" are the authors', "ours" is what they leave open.
PAPER = dict(
    chat="llama3", date="26 Jul 2024",  # code: written into it, for every model
    max_seq_len=1024,  # paper: GSM8K and MATH, prompt and response (2048 for QA-Feedback and UltraFeedback)
    dtype="bfloat16",  # paper (ours: with fp32 masters, or fp32 adapters)
    warmup=0, final_lr=1.0, weight_decay=0.0, max_grad_norm=0.0,  # paper: Adam; code: its defaults, constant rates, no clipping
    seed=1)  # code  # fmt: skip
PAPER_RL = PAPER | dict(
    steps=12, batch_size=3072, group_size=1,  # paper: prompts a rollout, one sample each; scripts: 12 rollouts, five passes over GSM8K
    temperature=1.0, max_new_tokens=768,  # scripts: no top-p; ours: 256 of the 1024 tokens are kept for the prompt
    standardize="mean_std", eval_every=1)  # paper; scripts: an evaluation after every rollout  # fmt: skip
PRESETS = {
    "paper-rm": PAPER | dict(
        stage="rm", reward="qrm", beta=0.2, margin=2.0,  # scripts
        lora_rank=128, lora_alpha=128,  # paper: the seven linear layers, and the head trained; code: no alpha, scale 1
        lr=1e-5, steps=0, batch_size=2),  # paper; scripts: one pass, 2 pairs a step
    "paper-ppo": PAPER_RL | dict(
        stage="ppo", lr=5e-6, clip=0.2, kl="exact", kl_coef=0.01,  # paper, section 4 and Algorithm 1 (code: lr x 0.075 in the first two rollouts)
        lora_rank=0, critic_lora_rank=128, critic_lr=1e-5,  # paper: all of the policy; code: the critic
        ppo_epochs=1, minibatch=10,  # scripts: 308 updates a rollout
        baseline_weight=1.0,  # paper (code: 0.01)
        gamma=0.9, lam=0.8),  # paper: for reward models without token scores
    "paper-reinforce": PAPER_RL | dict(
        stage="reinforce", lr=1e-6, kl_coef=0.0,  # paper
        lora_rank=0, minibatch=8),  # paper: all of the policy; scripts: 384 updates a rollout
}  # fmt: skip


def stages_of(comment):
    """The stages that a field's comment names in brackets; None is all."""
    return set(m[1].split()) if (m := re.match(r"\[([^\]]*)\]", comment)) else None


@functools.lru_cache
def flags():
    """{field: (default, type, comment)} of Config; the comments are those that stand behind the fields."""
    out = {}
    for cls in Config.__mro__[1:-1]:
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
        out |= {f.name: (f.default, type(f.default), comments[f.name]) for f in dataclasses.fields(cls) if f.name in comments}
    return out


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"train.py: {message}; flags: {' '.join('--' + name for name in flags())}")


def parse(argv):
    """argv -> Config. Raises BadInput for an unknown flag, a wrong type or a value out of range."""
    parser = _Parser(usage="train.py --stage STAGE [--flag value ...]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False)
    first = _Parser(add_help=False, allow_abbrev=False)
    for name in ("--stage", "--model", "--data", "--preset"):
        first.add_argument(name)
    given = first.parse_known_args(argv)[0]
    preset = PRESETS.get(given.preset, {})
    stage = given.stage or preset.get("stage")
    defaults = {} if given.data else ARITH.get(stage, {})
    if given.model:  # someone's model on the built-in task
        defaults = {k: v for k, v in defaults.items() if k in ("task", "limit", "k", "max_new_tokens")}
    defaults = defaults | preset
    parser.add_argument("--help", "-h", action="help", help="the flags; with --stage X those of that stage")
    for name, (default, kind, comment) in flags().items():
        default = defaults.get(name, default)
        stages = stages_of(comment)
        text = comment if stage is None or stages is None or stage in stages else argparse.SUPPRESS
        options = dict(action="store_true") if kind is bool else dict(type=kind, metavar=kind.__name__)
        text = text if text is argparse.SUPPRESS else f"{text} (default: {default})".replace("%", "%%")
        parser.add_argument(f"--{name}", default=default, help=text, **options)
    cfg = Config(**vars(parser.parse_args(argv)))
    for name, value in vars(cfg).items():
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise BadInput(f"--{name} {value!r}: expected text in UTF-8 without NUL")
    choices = {"stage": tuple(STAGES), "preset": ("", *PRESETS), "device": ("auto", "cpu", "cuda"), "dtype": ("float32", "bfloat16"),
               "chat": tuple(data.CHATS), "task": data.TASKS, "grader": data.GRADERS,
               "reward": (*REWARD_MODELS, "outcome", "oracle"), "standardize": ("mean_std", "std", "none"),
               "advantage": ("", "token", "return", "gae", "rloo", "grpo"), "kl": ("exact", "k1", "k3", "abs")}  # fmt: skip
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise BadInput(f"--{name} {getattr(cfg, name)!r}: expected one of {', '.join(allowed)}")
    for name in ("steps", "tp", "limit", "warmup", "save_every", "max_grad_norm", "weight_decay", "temperature", "seed", "minibatch", "final_lr",
                 "lora_rank", "lora_alpha", "critic_lora_rank", "kl_coef", "clip", "baseline_weight", "gamma", "lam"):  # fmt: skip
        if not 0 <= getattr(cfg, name) < 2**63:
            raise BadInput(f"--{name} {getattr(cfg, name)}: expected 0 or more, below 2^63")
    for name in ("batch_size", "micro_tokens", "k", "max_new_tokens", "lr", "max_seq_len", "beta", "pairs_per_prompt", "group_size", "eval_every",
                 "ppo_epochs", "critic_lr", "timeout", "max_skipped"):  # fmt: skip
        if not 0 < getattr(cfg, name) < 2**63:
            raise BadInput(f"--{name} {getattr(cfg, name)}: expected more than 0, below 2^63")
    check_combinations(cfg)
    return cfg


def check_combinations(cfg):
    """Flags that are right each by itself, but not together."""
    rl = cfg.stage in ("reinforce", "ppo")
    if cfg.preset and not (cfg.model and cfg.data):
        raise BadInput(f"--preset {cfg.preset} is not meant for the built-in task: expected --model and --data")
    if cfg.stage == "rm" and cfg.reward in ("outcome", "oracle"):
        raise BadInput(f"--reward {cfg.reward} needs no reward model; --stage rm expects one of {', '.join(REWARD_MODELS)}")
    if rl and cfg.reward == "oracle" and cfg.task != "arith":
        raise BadInput("--reward oracle knows the first wrong token of the built-in task only (--task arith)")
    if rl and cfg.batch_size % cfg.group_size:
        raise BadInput(f"--batch_size {cfg.batch_size} counts trajectories: expected a multiple of --group_size {cfg.group_size}")
    if rl and cfg.advantage in ("rloo", "grpo") and cfg.group_size < 2:
        raise BadInput(f"--advantage {cfg.advantage} compares the samples of one prompt: expected --group_size 2 or more")
    if cfg.stage == "reinforce" and cfg.advantage == "gae":
        raise BadInput("--advantage gae needs a critic: use --stage ppo, or --advantage return")
    if cfg.stage == "sft" and cfg.lora_rank and not cfg.model:
        raise BadInput(f"--lora_rank {cfg.lora_rank} adapts a model that has learned something: expected --model")
    if rl and not cfg.temperature:
        raise BadInput(f"--temperature 0.0: --stage {cfg.stage} learns from samples; expected more than 0")


def check_paths(cfg):
    """What can be known before any work: the inputs are there, and --out replaces nothing but a result of the same kind."""
    for name in ("model", "reward_model"):
        if (directory := getattr(cfg, name)) and not Path(directory).is_dir():
            raise BadInput(f"--{name} {directory}: no such directory; expected a Hugging Face model directory")
    if cfg.data:
        next(data.read_jsonl(cfg.data), None)
    out = out_path(cfg)
    if cfg.stage in ("sft", "rm", "reinforce", "ppo") and (out.exists() and not (out / "run.json").exists() or not out.name):
        raise BadInput(f"--out {out}: is there and not a result of train.py (no run.json in it); it would be replaced")
    if cfg.stage == "eval" and out.is_file():
        raise BadInput(f"--out {out}: is a file; expected a directory, for eval.json")
    if cfg.stage in ("pairs", "score", "grade") and out.is_dir():
        raise BadInput(f"--out {out}: is a directory; expected the name of a JSON lines file")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise BadInput(f"--out {out}: {above} is not a directory that can be written to")


def stage_config(cfg, stage):
    """The Config with which a stage of the built-in task runs when another stage needs its result."""
    reward = cfg.reward if stage == "rm" and cfg.reward not in ("outcome", "oracle") else "qrm"
    return Config(stage=stage, run=cfg.run, seed=cfg.seed, device=cfg.device, reward=reward, **ARITH.get(stage, {}))


# ------------------------------------------------------------------------------------------------ files and logs


@contextlib.contextmanager
def user_files():
    """Inside, what model.py and parallel.py refuse (ValueError) is the user's input, not a bug."""
    try:
        yield
    except ValueError as e:
        raise BadInput(str(e)) from None


def load(kind, directory, cfg, grid):
    """A LanguageModel or ScalarModel from a directory, in the run's dtype."""
    with user_files():
        model = load_model(kind, directory, grid, getattr(torch, cfg.dtype))
    model.model.remat = cfg.remat
    size = sum(f.stat().st_size for f in Path(directory).glob("*.safetensors"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes there, KiB elsewhere
    say(grid, f"load: {directory}: {size / 1e9:.3g} GB, peak host memory of this process {peak / 1e9:.3g} GB")
    return model


def load_tokenizer(directory, cfg):
    """The tokenizer of a model directory in the run's chat template; BadInput if the model has no row for an id, or is used
    otherwise than it was trained (to train it on, as sft and rm do, in another template is fine)."""
    tokenizer, path = data.Tokenizer.load(directory, cfg.chat, cfg.date or None), Path(directory) / "run.json"
    with user_files():
        n = read_config(directory)[0].vocab_size
    if tokenizer.vocab_size > n:
        raise BadInput(f"{directory}: the tokenizer's ids go up to {tokenizer.vocab_size - 1}, but config.json says vocab_size {n}")
    made = data.read_json(path, path.read_bytes()) if path.exists() and cfg.stage not in ("sft", "rm") else {}
    if made.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        chat = re.search(r"'chat': '(\w+)'", str(made.get("config")))
        raise BadInput(f"{directory}: was trained with another tokenizer or chat template (--chat {chat and chat[1]}); found --chat {cfg.chat}")
    return tokenizer


def adapted(model, cfg, rank):
    """What is to be trained: the model itself, or, with a rank, adapters on its frozen weights."""
    return add_lora(model, rank, cfg.seed, cfg.lora_alpha) if rank else model


def write_rows(path, rows, grid):
    """JSON lines from all dp ranks: rows is a list of (line, object), written in the order of the lines."""
    if grid.dp_size > 1:
        parts = [None] * grid.dp_size
        dist.all_gather_object(parts, rows, group=grid.dp_group)
        rows = sorted((row for part in parts for row in part), key=lambda row: row[0])
    if grid.is_main:
        write_atomically(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows))
    return len(rows)


def out_path(cfg):
    """--out, or the place where the other stages look for this one's result."""
    names = {"pairs": "pairs.jsonl", "rm": "rm" if cfg.reward == "qrm" else f"rm-{cfg.reward}", "score": "score.jsonl", "grade": "grade.jsonl"}
    return Path(cfg.out or Path(cfg.run) / names.get(cfg.stage, cfg.stage))


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


@contextlib.contextmanager
def deferred_interrupt(grid):
    """Yields a function that tells all ranks alike whether one got Ctrl-C or SIGTERM: an update that is cut in two could not be
    resumed. Without torchrun, which passes Ctrl-C on a second time, a second one stops at once, without a checkpoint.
    Torchrun's SIGTERM may also mean that another rank died: a rank that gets no agreement within 4 seconds ends."""
    pressed = [0]

    def handler(number, _):
        pressed[0] = 1
        if not dist.is_initialized():
            signal.signal(number, before[number])
        elif number == signal.SIGTERM:
            signal.alarm(4)

    def agreed():
        stop = all_sum(all_sum(pressed, grid), grid, "tp")[0] > 0
        if stop:
            signal.alarm(0)  # all ranks live: saving may take its time
        return stop

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield agreed
    finally:
        for number in before:
            signal.signal(number, before[number])


def save_bad_inputs(work, step):
    """What the first update that was skipped had read goes to <out>.partial/skipped.<dp rank>.json; the weights are in no way changed."""
    path = work.path / f"skipped.{work.grid.dp_rank}.json"
    inputs = {name: optimizer.bad_inputs for name, (_, optimizer) in work.optimizers.items() if optimizer.bad_inputs}
    if work.grid.tp_rank == 0 and not path.exists():
        write_atomically(path, json.dumps({"step": step, **inputs}, default=lambda x: x.tolist() if torch.is_tensor(x) else vars(x)))


def train_loop(cfg, grid, steps, optimizers, step_fn, inputs):
    """Calls `step_fn(step, lr) -> metrics` for each step that is still to do, logs, saves; -> the Workdir to finish.

    optimizers   {name: (model, Optimizer)}: what a checkpoint holds. Everything random is a function of (seed, step), so
                 nothing else is needed to go on exactly.
    inputs       fingerprints of the files that decide what is learned; `--resume` insists on the same
    """
    with user_files():
        work = Workdir(cfg, out_path(cfg), grid, optimizers, inputs)
    skipped = lambda: sum(optimizer.skipped for _, optimizer in optimizers.values())
    with deferred_interrupt(grid) as interrupted:
        for step in tqdm(range(work.first_step, steps), cfg.stage, initial=work.first_step, total=steps, disable=None if grid.is_main else True):
            began, lr, before = time.perf_counter(), lr_at(step, cfg, steps), skipped()
            row = step_fn(step, lr)
            tokens = row.pop("_tokens")
            if skipped() > before:
                row["skipped"] = skipped() - before
                save_bad_inputs(work, step)
            work.log({"step": step, **row, "lr": lr, "tokens": tokens, "tokens_per_s": tokens / (time.perf_counter() - began)})
            if (n := max(optimizer.in_a_row for _, optimizer in optimizers.values())) >= cfg.max_skipped:
                if not work.saved_step:  # skipped updates left the weights as they were
                    work.save(step + 1)
                raise BadInput(f"--stage {cfg.stage}: {n} updates in a row had a loss or gradient that is not finite; the last good checkpoint is "
                               f"{work.state.parent} (step {work.saved_step}), the inputs of the first are in {work.path}/skipped.*.json")  # fmt: skip
            stop = interrupted()
            if stop or cfg.save_every and (step + 1) % cfg.save_every == 0:
                work.save(step + 1)
            if stop:
                raise KeyboardInterrupt
    return work


def fingerprints(tokenizer, path=""):
    """What decides which ids a run reads: {description: sha256}."""
    return {"data of sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else "", "tokenizer and chat of sha256": tokenizer.fingerprint}


def train_on_rows(cfg, grid, model, rows, weigh, loss_fn, count_tokens, inputs):
    """Supervised training of one model on shuffled batches of rows (sft, rm); -> the Workdir.

    weigh(row)          what the loss is a mean over: tokens, or 1 a pair
    loss_fn(rows)       -> mean loss, {name: mean}
    """
    if cfg.batch_size < grid.dp_size:
        raise BadInput(f"--batch_size {cfg.batch_size} gives some of the {grid.dp_size} data-parallel processes nothing to do")
    optimizer = Optimizer(model, grid, cfg.lr, weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm)

    def step_fn(step, lr):
        batch = [rows[i] for i in data.batch_indices(len(rows), cfg.batch_size, step, cfg.seed)]
        mine = batch[grid.dp_rank :: grid.dp_size]
        parts = [mine[a:b] for a, b in data.spans([count_tokens(row) for row in mine], cfg.micro_tokens)]
        return {**update(optimizer, [(sum(map(weigh, part)), part) for part in parts], loss_fn, lr), "_tokens": sum(map(count_tokens, batch))}

    return train_loop(cfg, grid, cfg.steps or -(-len(rows) // cfg.batch_size), {"model": (model, optimizer)}, step_fn, inputs)


# ------------------------------------------------------------------------------------------------ sft


def sequence_length(example):
    """Tokens of prompt and response."""
    return len(example.prompt_ids) + len(example.response_ids)


def stage_sft(cfg, grid):
    """Supervised fine-tuning: -log pi(a_t | s_t), mean over the response tokens of the batch."""
    if cfg.model:
        tokenizer = load_tokenizer(cfg.model, cfg)
        policy = adapted(load(LanguageModel, cfg.model, cfg, grid), cfg, cfg.lora_rank)
    else:
        tokenizer = data.arith_tokenizer()
        with user_files():
            policy = init_weights(build_model(LanguageModel, arith_model(tokenizer), grid, getattr(torch, cfg.dtype)), cfg.seed)
    rows = data.load_rows(cfg.data, ("prompt", "response")) if cfg.data else data.arith_rows("train", 16_000, cfg.seed)
    rows, _ = data.encode(rows, tokenizer, cfg.max_seq_len, source=cfg.data or "built-in task", log=lambda text: say(grid, text))

    def loss_fn(part):
        ids, mask = data.collate([row[0] for row in part], grid.device)
        logprobs, entropy = token_logprobs(policy, ids, mask)
        return -logprobs.sum() / mask.sum(), {"entropy": (entropy.sum() / mask.sum()).item()}

    work = train_on_rows(cfg, grid, policy, rows, lambda row: len(row[0].response_ids), loss_fn, lambda row: sequence_length(row[0]),
                         fingerprints(tokenizer, cfg.data))  # fmt: skip
    finish(work, policy, tokenizer, cfg.model)


def arith_model(tokenizer):
    """0.15 M parameters; eight heads, so that eight processes can share it."""
    return ModelConfig(tokenizer.vocab_size, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
                       num_attention_heads=8, num_key_value_heads=4, head_dim=16)  # fmt: skip


# ------------------------------------------------------------------------------------------------ pairs


def stage_pairs(cfg, grid):
    """Preference pairs as the paper makes them: sample, grade, pair right with wrong, deduplicate."""
    directory = cfg.model or need("sft", cfg, grid)
    tokenizer = load_tokenizer(directory, cfg)
    policy = load(LanguageModel, directory, cfg, grid)
    out = out_path(cfg)
    jobs = [(cfg.data or "built-in task", out, None)]
    if not cfg.data:  # held-out pairs, for eval
        jobs = [("built-in task, training prompts", out, "train"), ("built-in task, held-out prompts", heldout_pairs(cfg), "test")]
    for source, path, split in jobs:
        n = cfg.limit or ARITH["pairs"]["limit"]
        n = max(n // 5, 1) if split == "test" else n
        rows = data.arith_rows(split, n, cfg.seed + 1) if split else data.load_rows(cfg.data, ("prompt", "label"), cfg.limit)
        mine, found, correct = rows[grid.dp_rank :: grid.dp_size], [], 0
        chunk = max(1, 1024 // cfg.k)
        for start in tqdm(range(0, len(mine), chunk), "pairs", disable=None if grid.is_main else True):
            part = mine[start : start + chunk]
            seed = hash_seed(cfg.seed, split, grid.dp_rank, start)
            answers, _ = sample_graded(policy, tokenizer, part, cfg, grid, seed, cfg.temperature, cfg.k)
            correct += sum(a[2] for row in answers for a in row)
            for row, answer in zip(part, answers):
                found += [(row["line"], pair) for pair in make_pairs(row, answer, cfg.pairs_per_prompt)]
        (correct,) = all_sum([correct], grid)
        written = write_rows(path, found, grid)
        if not written:
            raise BadInput(f"{source}: no prompt has both a right and a wrong answer; raise --k or --limit, or use another policy")
        say(grid, f"pairs: {path}: {written} pairs from {len(rows)} prompts x {cfg.k} samples, {correct / len(rows) / cfg.k:.3f} of them right")
    barrier(grid)


def heldout_pairs(cfg):
    """Where the built-in task keeps the pairs that no reward model was trained on."""
    return out_path(dataclasses.replace(cfg, stage="pairs")).with_name("pairs-heldout.jsonl")


def hash_seed(*parts):
    """A sampling seed that depends on all of `parts` and on nothing else: no generator state to save."""
    return data.stable_hash(repr(parts))


# ------------------------------------------------------------------------------------------------ rm


def stage_rm(cfg, grid):
    """The reward model: pairs -> token scores -> length-normalised pairwise loss (qrm.py); or one to compare it with."""
    directory = str(cfg.model or need("sft", cfg, grid))
    path = cfg.data or need("pairs", cfg, grid)
    tokenizer = load_tokenizer(directory, cfg)
    base = load(LanguageModel if cfg.reward in POLICY_LIKE else ScalarModel, directory, cfg, grid)
    model = adapted(base, cfg, cfg.lora_rank)
    rows = data.load_rows(path, ("prompt", "chosen", "rejected"))
    pairs, rows = data.encode(rows, tokenizer, cfg.max_seq_len, ("chosen", "rejected"), str(path), lambda text: say(grid, text))
    if cfg.reward == "prm":
        if cfg.task != "arith":
            raise BadInput("--reward prm learns from step labels, which only the built-in task (--task arith) knows")
        for i, row in enumerate(rows):
            with data.at_line(path, row["line"]):
                pairs[i] += tuple(data.error_places(tokenizer, row["prompt"], pairs[i]))
    reference = None
    if cfg.reward == "dpo":
        reference = base if cfg.lora_rank else load(LanguageModel, directory, cfg, grid).requires_grad_(False)
    step_ids = tokenizer.ids_with("\n")

    def loss_fn(part):
        ids, mask = data.collate([example for pair in part for example in pair[:2]], grid.device)  # (2P, T+1), (2P, T)
        errors = torch.tensor([error for pair in part for error in pair[2:]], device=grid.device)  # (2P,), prm only
        return reward_model_loss(model, ids, mask, cfg, reference, step_ids, errors)

    work = train_on_rows(cfg, grid, model, pairs, lambda pair: 1, loss_fn, lambda pair: sum(map(sequence_length, pair[:2])), fingerprints(tokenizer, path))
    finish(work, model, tokenizer, directory, reward=cfg.reward, reference=directory)


# ------------------------------------------------------------------------------------------------ reinforce, ppo


def reward_kind(directory, otherwise="qrm"):
    """One of REWARD_MODELS, as the rm stage noted it in run.json; a directory made elsewhere is taken for `otherwise`."""
    path = Path(directory) / "run.json"
    kind = data.read_json(path, path.read_bytes()).get("reward", otherwise) if path.exists() else otherwise
    if kind not in REWARD_MODELS:
        raise BadInput(f"{path}: reward is {kind!r}, expected one of {', '.join(REWARD_MODELS)}")
    return "qrm" if kind == "plain" else kind


def load_reward(kind, directory, tokenizer, cfg, grid, rows=()):
    """-> reward_fn, reward_mask_fn (None: every response token), whether the reward is a token's own Q.

    outcome and oracle grade the answers to `rows`; the others are models from `directory`.
    """
    if kind in ("outcome", "oracle"):
        return graded_reward(kind, tokenizer, rows, cfg), (lambda ids, mask: last_token_mask(mask)) if kind == "outcome" else None, kind == "oracle"
    own = load_tokenizer(directory, cfg)
    if own.fingerprint != tokenizer.fingerprint:
        raise BadInput(f"{directory}: its tokenizer or chat template is not that of the policy; expected the same token ids")
    reference = None
    if kind == "dpo":
        path = Path(directory) / "run.json"
        if not isinstance(reference := data.read_json(path, path.read_bytes()).get("reference"), str):
            raise BadInput(f"{path}: reference is {reference!r}, expected the directory of the model that DPO started from")
        reference = load(LanguageModel, reference, cfg, grid).requires_grad_(False)
    model = load(LanguageModel if kind in POLICY_LIKE else ScalarModel, directory, cfg, grid).requires_grad_(False)
    return reward_function(kind, model, reference, tokenizer.ids_with("\n"))


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
    policy = adapted(reference if cfg.lora_rank else load(LanguageModel, directory, cfg, grid), cfg, cfg.lora_rank)
    if cfg.data:
        rows = data.load_rows(cfg.data, ("prompt", "label") if graded else ("prompt",), optional=("label",))
        cut = max(len(rows) - cfg.limit, 0)
        rows, heldout = rows[:cut], [row for row in rows[cut:] if "label" in row]
        if not rows:
            raise BadInput(f"--limit {cfg.limit} holds out all rows of {cfg.data}; nothing is left to learn from")
    else:
        rows, heldout = data.arith_rows("train", 8192, cfg.seed + 2), data.arith_rows("test", cfg.limit or ARITH[cfg.stage]["limit"], 0)
    prompts, n, room = encode_prompts(rows, tokenizer, cfg), cfg.batch_size // cfg.group_size, cfg.max_seq_len - cfg.max_new_tokens
    if long := sum(len(ids) > room for ids in prompts):
        prompts = [ids for ids in prompts if len(ids) <= room]
        text = f"{cfg.data or 'built-in task'}: dropped {long} prompts longer than --max_seq_len {cfg.max_seq_len} - --max_new_tokens {cfg.max_new_tokens}"
        say(grid, f"{text}; {len(prompts)} left")
        if not prompts:
            raise BadInput(f"{text}; none is left")
    kind = cfg.reward if graded else reward_kind(judge, cfg.reward)
    if not graded and cfg.reward not in ("qrm", "plain", kind):
        raise BadInput(f"--reward {cfg.reward}: {judge} was trained as {kind!r}; expected the reward that it was trained for, or none")
    reward_fn, reward_mask_fn, is_q = load_reward(kind, judge, tokenizer, cfg, grid, rows)
    if not cfg.advantage:
        cfg = dataclasses.replace(cfg, advantage="token" if is_q else "gae" if is_ppo else "return")
    settings = dict(weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm)
    optimizers = {"policy": (policy, Optimizer(policy, grid, cfg.lr, **settings))}
    if is_ppo:  # the critic starts from the reward model, with a new head
        critic = load(ScalarModel, judge if judge and is_reward_model(judge) else directory, cfg, grid)
        critic.score.weight.data.zero_()
        critic = adapted(critic, cfg, cfg.critic_lora_rank)
        optimizers["critic"] = (critic, Optimizer(critic, grid, cfg.critic_lr, **settings))
    steps, cuts = cfg.steps or -(-len(prompts) // n), len(minibatches([], cfg))
    if n // grid.dp_size * cfg.group_size < cuts:
        raise BadInput(f"--batch_size {cfg.batch_size}: too few trajectories for {grid.dp_size} processes x {cuts} minibatches")

    def step_fn(step, lr):
        batch = [prompts[i] for i in data.batch_indices(len(prompts), n, step, cfg.seed)][grid.dp_rank :: grid.dp_size]
        seed = hash_seed(cfg.seed, cfg.stage, step, grid.dp_rank)
        rollout = collect_rollout(policy, reference, reward_fn, batch, tokenizer.stop_ids, cfg, seed, reward_mask_fn)
        if is_ppo:
            critic_lr = lr_at(step, dataclasses.replace(cfg, lr=cfg.critic_lr), steps)  # the same schedule
            stats = ppo_step(policy, critic, *(o for _, o in optimizers.values()), rollout, cfg, lr, critic_lr)
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
        run |= {"config": dataclasses.asdict(work.cfg), "tokenizer": tokenizer.fingerprint, "torch": torch.__version__}
        write_atomically(work.path / "run.json", json.dumps(run, indent=1))
    work.publish()


# ------------------------------------------------------------------------------------------------ eval, score, grade


def is_reward_model(directory):
    """Whether config.json names a model with one scalar a token."""
    with user_files():
        return "ForTokenClassification" in str(read_config(directory)[1].get("architectures"))


@torch.no_grad()
def score_examples(reward_fn, examples, cfg, grid):
    """One number per response token of each example, in chunks: list of (n_i,) fp32 tensors on the CPU."""
    out = []
    for a, b in data.spans(list(map(sequence_length, examples)), cfg.micro_tokens):
        ids, mask = data.collate(examples[a:b], grid.device)
        out += [row[m].cpu() for row, m in zip(reward_fn(ids, mask), mask)]
    return out


def wilson(right, n, z=1.96):
    """The 95 % interval of a share of n independent trials (Wilson 1927); unlike p +- z sigma it stays within [0, 1]."""
    half = z * math.sqrt(right * (n - right) / n + z * z / 4)
    return [(right + z * z / 2 - half) / (n + z * z), (right + z * z / 2 + half) / (n + z * z)]


def eval_reward_model(directory, cfg, grid):
    """Pair accuracy on held-out pairs, a length-only baseline, and credit metrics where the first error is known."""
    kind, tokenizer = reward_kind(directory), load_tokenizer(directory, cfg)
    reward_fn, _, _ = load_reward(kind, directory, tokenizer, cfg, grid)
    path = cfg.data or (need("pairs", cfg, grid), heldout_pairs(stage_config(cfg, "pairs")))[1]
    rows = data.load_rows(path, ("prompt", "chosen", "rejected"), cfg.limit)
    pairs, rows = data.encode(rows, tokenizer, cfg.max_seq_len, ("chosen", "rejected"), str(path), lambda text: say(grid, text))
    mine, n = pairs[grid.dp_rank :: grid.dp_size], len(pairs)
    scores = score_examples(reward_fn, [example for pair in mine for example in pair], cfg, grid)
    right = sum(float(sequence_score(kind, w) > sequence_score(kind, l)) for w, l in zip(scores[0::2], scores[1::2]))
    shorter = sum((len(w) < len(l)) + 0.5 * (len(w) == len(l)) for w, l in zip(scores[0::2], scores[1::2]))
    counts = {"right": right, "shorter": shorter}
    known = cfg.task == "arith"  # the built-in task has one right answer a prompt, so the first wrong token is known
    if known:
        if kind in ("orm", "prm"):  # their head read at every token, trained there or not
            reward_fn = token_reward(load(ScalarModel, directory, cfg, grid))
            scores = score_examples(reward_fn, [example for pair in mine for example in pair], cfg, grid)
        errors, repaired = [], []
        for row, (_, rejected) in zip(rows[grid.dp_rank :: grid.dp_size], mine):
            with data.at_line(path, row["line"]):
                solution = tokenizer.encode_response(data.arith_solve(row["prompt"]))
            place = data.first_error(rejected.response_ids, solution)
            errors.append(place if place < min(len(rejected.response_ids), len(solution)) else 0)  # nothing wrong in it: left out
            repaired.append(rejected._replace(response_ids=[*rejected.response_ids[: errors[-1]], solution[errors[-1]]]))
        counts |= credit_counts(scores[1::2], errors, score_examples(reward_fn, repaired, cfg, grid))
    c = dict(zip(counts, all_sum(list(counts.values()), grid)))
    out = {"n_pairs": n, "pair_accuracy": c["right"] / n, "pair_accuracy_95": wilson(c["right"], n), "length_baseline": c["shorter"] / n}
    if known:
        out |= {"error_auc": c["wins"] / max(c["comparisons"], 1), "first_error_hit": c["hits"] / max(c["n_errors"], 1),
                "first_error_choice": c["choices"] / max(c["n_errors"], 1)}  # fmt: skip
    return out  # length_baseline: the accuracy of always preferring the shorter answer, ties counted half


def eval_policy(directory, cfg, grid):
    """Greedy pass@1, unbiased pass@k of k samples, the majority of all k, and best-of-k by a reward model's mean score when one is at hand."""
    tokenizer = load_tokenizer(directory, cfg)
    policy, judge = load(LanguageModel, directory, cfg, grid), cfg.reward_model
    if not judge and not cfg.data and Path(directory).absolute().parent == Path(cfg.run).absolute() and (own := out_path(stage_config(cfg, "rm"))).exists():
        judge = str(own)  # of the same run
    if judge:
        kind = reward_kind(judge)
        reward_fn, _, _ = load_reward(kind, judge, tokenizer, cfg, grid)
    rows = data.load_rows(cfg.data, ("prompt", "label"), cfg.limit) if cfg.data else data.arith_rows("test", cfg.limit or ARITH["eval"]["limit"], cfg.seed)
    mine, began = rows[grid.dp_rank :: grid.dp_size], time.perf_counter()
    greedy, tokens = sample_graded(policy, tokenizer, mine, cfg, grid, 0, 0.0, 1)
    samples, more = sample_graded(policy, tokenizer, mine, cfg, grid, hash_seed(cfg.seed, "eval", grid.dp_rank), cfg.temperature, cfg.k)
    seconds, ks = time.perf_counter() - began, sorted({*(2**i for i in range(cfg.k.bit_length())), cfg.k})
    counts = [len(mine), sum(row[0][2] for row in greedy), tokens + more, sum(majority_is_right(row, cfg) for row in samples)]
    counts += [sum(pass_at_k(cfg.k, sum(a[2] for a in row), k) for row in samples) for k in ks]
    if judge:
        examples = [Example(tokenizer.encode_prompt(row["prompt"]), a[1]) for row, answers in zip(mine, samples) for a in answers]
        scores = score_examples(reward_fn, examples, cfg, grid)
        ranks = [sequence_score(kind, z) for z in scores]
        best = [max(range(cfg.k), key=lambda j: ranks[i * cfg.k + j]) for i in range(len(mine))]
        counts.append(sum(samples[i][j][2] for i, j in enumerate(best)))
    counts = all_sum(counts, grid)
    n = int(counts[0])
    out = {"pass@1": counts[1] / n, "pass@k": {str(k): c / n for k, c in zip(ks, counts[4:])}, "maj@k": counts[3] / n, "n_prompts": n}
    if len(counts) > 4 + len(ks):
        out["best_of_k"] = counts[-1] / n
    return out | {"generated_tokens": int(counts[2]), "tokens_per_s": counts[2] / seconds}


def stage_eval(cfg, grid):
    """eval.json in the model's own directory: a policy's pass@k, or a reward model's accuracy and credit."""
    if cfg.model or cfg.out:
        directories = [cfg.model or cfg.out]
    else:
        need("rm", cfg, grid)
        directories = [d for d in sorted(Path(cfg.run).iterdir()) if (d / "config.json").exists() and d.suffix == ""]
    for directory in map(Path, directories):
        judges = is_reward_model(directory) or reward_kind(directory) in POLICY_LIKE
        result = (eval_reward_model if judges else eval_policy)(directory, cfg, grid)
        path = Path(cfg.out) / "eval.json" if cfg.out else directory / "eval.json"
        if grid.is_main:
            write_atomically(path, json.dumps(result, indent=1))
        say(grid, f"eval: {path}: " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()))


def stage_score(cfg, grid):
    """One number a response token: a reward model's raw Z, or a policy's log-probability in nats."""
    directory = cfg.model or need("rm", cfg, grid)
    tokenizer, scalar = load_tokenizer(directory, cfg), is_reward_model(directory)
    model, key = load(ScalarModel if scalar else LanguageModel, directory, cfg, grid), "scores" if scalar else "logprobs"
    if cfg.data:
        rows = data.load_rows(cfg.data, ("prompt", "response"), cfg.limit)
    else:
        rows = [row | {"raw": {"prompt": row["prompt"], "response": row["response"]}} for row in data.arith_rows("test", cfg.limit or 8, cfg.seed)]
    kept, rows = data.encode(rows, tokenizer, cfg.max_seq_len, ("response",), cfg.data or "built-in task", lambda text: say(grid, text))
    kept, rows, written = kept[grid.dp_rank :: grid.dp_size], rows[grid.dp_rank :: grid.dp_size], []
    numbers = score_examples(token_reward(model) if scalar else lambda ids, mask: token_logprobs(model, ids, mask)[0], [e for (e,) in kept], cfg, grid)
    for row, (example,), x in zip(rows, kept, numbers):
        more = {"prompt_ids": example.prompt_ids, "ids": example.response_ids, "tokens": tokenizer.token_texts(example.response_ids)}
        written.append((row["line"], row["raw"] | more | {key: x.tolist()}))
    n = write_rows(out_path(cfg), written, grid)
    if cfg.show and grid.is_main:
        show_tokens(cfg, tokenizer, key)
    say(grid, f"score: {out_path(cfg)}: {n} rows")


SHADES = (208, 215, 223, 231, 153, 111, 75)  # of the terminal's 256 colours: orange is low, white the mean, blue high; safe for the colour-blind


def show_tokens(cfg, tokenizer, key):
    """Prints the answers that stage_score has just written: every token on a background by its number, standardised over all of them,
    the first wrong one underlined where the task knows it. Into a file or pipe, or with NO_COLOR set: the numbers instead, and a ✗."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    rows = data.load_rows(out_path(cfg), ("prompt",))
    numbers = torch.tensor([x for row in rows for x in row["raw"][key]])
    z = iter(standardize(numbers, torch.ones_like(numbers, dtype=torch.bool), "mean_std", Grid()).tolist())
    plain = lambda text: "".join(c if c.isprintable() else "↵" if c == "\n" else "·" for c in text)  # no control codes from someone's data
    for row in rows:
        ids, tokens = row["raw"]["ids"], row["raw"]["tokens"]
        error = len(ids)
        if cfg.task == "arith" or not cfg.data:
            with data.at_line(out_path(cfg), row["line"]):
                error = data.error_places(tokenizer, row["prompt"], [Example([], ids)])[0]
        print(f"\n{plain(tokenizer.decode(row['raw']['prompt_ids'])).rstrip('↵')}")
        for i, (text, x) in enumerate(zip(tokens, z)):
            shade = SHADES[round(1.5 * min(max(x, -2), 2)) + 3]
            shown = f"\x1b[{'1;4;' * (i == error)}38;5;16;48;5;{shade}m{plain(text)}\x1b[0m" if colour else f"{'✗' * (i == error)}{plain(text)}[{x:+.1f}] "
            print(shown, end="\n" if "\n" in text or i + 1 == len(tokens) else "")


def stage_grade(cfg, grid):
    """The rows with `answer` (what the response claims, or null) and `correct`."""
    if not cfg.data:
        raise BadInput("--stage grade needs --data: JSON lines with a response and a label")
    rows = data.load_rows(cfg.data, ("response", "label"), cfg.limit)
    written = []
    for row in rows:
        text = row["response"] if isinstance(row["response"], str) else row["response"][-1]["content"]  # the reply of a list of messages
        answer, correct = data.grade(text, row["label"], cfg.task, cfg.grader)
        written.append((row["line"], row["raw"] | {"answer": answer, "correct": correct}))
    if grid.is_main:
        write_rows(out_path(cfg), written, Grid())
    say(grid, f"grade: {out_path(cfg)}: {sum(row['correct'] for _, row in written)} of {len(written)} correct")


# ------------------------------------------------------------------------------------------------ demo


def stage_demo(cfg, grid):
    """The whole path on the built-in task: what is there already is kept, the rest is made."""
    for stage in ("sft", "pairs", "rm", "reinforce", "ppo"):
        need(stage, cfg, grid)
    stage_eval(stage_config(cfg, "eval"), grid)
    if grid.is_main:
        from classroom.report import write_report  # course material: the method does not depend on it

        say(grid, f"demo: results are in {cfg.run}; open {write_report(cfg.run)}")
    barrier(grid)


STAGES = {"sft": stage_sft, "pairs": stage_pairs, "rm": stage_rm, "reinforce": stage_rl, "ppo": stage_rl, "eval": stage_eval, "score": stage_score,
          "grade": stage_grade, "demo": stage_demo}  # fmt: skip


def main(argv=None):
    """-> exit status: 0, 2 for bad input or a disk that takes no more (one line on stderr), 130 after Ctrl-C (a checkpoint is written)."""
    status, cfg = 0, None
    try:
        cfg = parse(sys.argv[1:] if argv is None else argv)
        check_paths(cfg)
        with user_files():
            grid = make_grid(cfg.tp, cfg.device, cfg.timeout)
        if not cfg.model and not cfg.data:
            torch.set_num_threads(1)  # the built-in model is too small for more; and so every machine gives the same numbers
        if (cfg.flex or cfg.graphs) and grid.device.type != "cuda":
            raise BadInput(f"--{'flex' if cfg.flex else 'graphs'}: works on CUDA only; expected --device cuda")
        Packed.flex, KVCache.graphs, KVCache.spare = cfg.flex, cfg.graphs, 256 if cfg.graphs else 64  # each growth is recorded anew
        say(grid, "config: " + "  ".join(f"{k} {getattr(cfg, k)}" for k in flags() if getattr(cfg, k) != ""))
        STAGES[cfg.stage](cfg, grid)
    except (BadInput, OSError) as e:
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)  # rank 0 mostly says the same, and torchrun then ends this one; what only this one met must still be seen
        reason = f"{e.filename or out_path(cfg)}: {e.strerror}" if isinstance(e, OSError) and e.strerror else str(e)
        print(" ".join(reason.split()).encode("utf-8", "backslashreplace").decode()[:2000], file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted: --resume goes on from the last checkpoint", file=sys.stderr)
        status = 130
    except RuntimeError as e:
        if re.search("timed out|timeout", str(e), re.I):
            print(f"--stage {cfg.stage}: rank {os.environ.get('RANK')} waited longer than --timeout {cfg.timeout} s for another one", file=sys.stderr)
        raise
    if status == 2 and dist.is_initialized() and dist.get_backend() == "nccl":
        os._exit(status)  # to take NCCL down is a collective, and the other ranks may not have met what this one did
    if dist.is_initialized():  # not after an exception: what other ranks still wait for would be waited for here
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
