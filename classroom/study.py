"""The study: which token rewards help, by how much, and which of the disputed choices matter.

    python classroom/study.py [--minutes 40] [--seeds 5] [--out runs/study] [--fast | --quick]
    python classroom/study.py --curves runs/arith       PPO on that run's reward model, healthy and with three
                                                        mistakes: <out>/curves.png

    per seed   sft ─► pairs (train | validation | test) ─► reward models ─► REINFORCE, PPO ─► tables, figure

Every step is a command of train.py, in one of --workers processes with one thread each. A finished run is one
line of <out>/runs.jsonl, and a restart runs only those that are missing. Results: <out>/study.md, study.json
and study.png.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import shutil
import statistics
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from theory import theory_table

import data
import qrm
import train
from model import LanguageModel, ScalarModel, at_states, load_model, save_model, scatter_to_mask
from parallel import Grid
from support import settings, tokenizers

REWARDS = {
    "oracle": "oracle, tokens",
    "outcome": "oracle, outcome",
    "qrm": "Q-RM",
    "orm": "ORM",
    "dpo": "DPO-RM",
    "prm": "step PRM",
    "logit": "Z as the LM's logit",
}
ALGORITHMS = {"ppo": "PPO", "reinforce": "REINFORCE"}
GRADED = ("oracle", "outcome")  # need no reward model
KL_COEF = 0.2  # of every arm
VALIDATION = 1000  # seed of the held-out prompts that select learning rates; the curves use those of seed 0

# "long" has more verbs to unlearn, more of them per problem, and longer answers: the outcome says less about
# a token.
TASKS = {"demo": data.Arith(), "long": data.Arith(steps=(6, 8), operand=1, verbs=16, misread=8)}

# Choices on which the paper and its code differ, and controls: {label: (algorithm, reward, flags that part 2
# has not)} "one epoch, no baseline" is REINFORCE with PPO's ratio and clip.
DISPUTED = {
    "std only": ("ppo", "qrm", {"standardize": "std"}),
    "baseline weight 0.01": ("ppo", "qrm", {"baseline_weight": 0.01}),
    "stop token's reward = sequence mean": ("ppo", "qrm", {"eos_to_mean": True}),
    "absolute k1": ("ppo", "qrm", {"kl": "abs"}),
    "exact KL (Algorithm 1)": ("ppo", "qrm", {"kl": "exact"}),
    "one epoch": ("ppo", "qrm", {"ppo_epochs": 1}),
    "one epoch, no baseline": ("ppo", "qrm", {"ppo_epochs": 1, "baseline_weight": 0.0}),
    "std only, REINFORCE": ("reinforce", "qrm", {"standardize": "std"}),
    "no KL (Algorithm 2)": ("reinforce", "qrm", {"kl_coef": 0.0}),
    "sequence mean on every token": ("reinforce", "qrm", {"advantage": "grpo", "group_size": 8}),
    "ORM, lambda 1": ("ppo", "orm", {"lam": 1.0}),
    "oracle's outcome, lambda 1": ("ppo", "outcome", {"lam": 1.0}),
}


RL_LRS = {"ppo": (1e-4, 3e-4, 1e-3), "reinforce": (3e-5, 1e-4, 3e-4)}
ARMS = tuple((a, r) for r in REWARDS for a in ALGORITHMS if r != "logit" or a == "ppo")


@dataclass(frozen=True)
class Plan:
    seeds: int = 5  # each with its own SFT policy, pairs, reward models and RL runs
    rl_lrs: dict = field(default_factory=RL_LRS.copy)  # grid of every RL arm, on seed 0
    rm_lrs: tuple = (2e-4, 7e-4, 2e-3)  # grid of every reward model, on seed 0
    task: str = "long"  # of parts 1 to 3: the one on which token credit can show, see part 0
    ceilings: tuple = tuple(TASKS)  # tasks of part 0
    arms: tuple = ARMS  # of part 2
    disputed: tuple = tuple(DISPUTED)  # of part 3
    flags: dict = field(default_factory=dict)  # {stage: flags that differ from the built-in task's defaults}


FULL_RL = {"limit": 300, "eval_every": 2}
FULL = Plan(
    flags={"rm": {"steps": 400}, "eval": {"limit": 300, "k": 1}, "reinforce": FULL_RL, "ppo": FULL_RL}
)
ONE_LR = {"ppo": (1e-4,), "reinforce": (1e-4,)}
FAST = dataclasses.replace(
    FULL,
    rl_lrs=ONE_LR,
    rm_lrs=(2e-3,),
    ceilings=(),
    disputed=(),
    arms=tuple(("ppo", r) for r in ("oracle", "outcome", "qrm", "orm")),
)
QUICK_RL = {
    "steps": 1,
    "batch_size": 16,
    "minibatch": 8,
    "limit": 8,
    "eval_every": 1,
    "max_new_tokens": 40,
}
QUICK = Plan(
    seeds=1,
    rl_lrs=ONE_LR,
    rm_lrs=(2e-3,),
    ceilings=(),
    arms=(("ppo", "outcome"), ("ppo", "qrm"), ("reinforce", "qrm"), ("ppo", "orm")),
    disputed=("exact KL (Algorithm 1)", "std only, REINFORCE"),
    flags={
        "sft": {"steps": 60, "warmup": 10},
        "pairs": {"limit": 100, "max_new_tokens": 40},
        "rm": {"steps": 2},
        "eval": {"limit": 8, "k": 1, "max_new_tokens": 40},
        "reinforce": QUICK_RL,
        "ppo": QUICK_RL,
    },
)

# -------------------------------------------------------------------------------- jobs, in a worker


def call(stage, **flags):
    """train.py --stage ..., silently, with the built-in task's defaults (which --model and --data would
    switch off).
    """
    argv = ["--stage", stage]
    log = io.StringIO()
    usual = settings.ARITH.get(stage, {}) | ({"kl_coef": KL_COEF} if stage in ALGORITHMS else {})
    for name, value in {**usual, "device": "cpu", **flags}.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        status = train.main(argv)
    if status:
        raise RuntimeError(f"train.py {' '.join(argv)}: {log.getvalue().strip().splitlines()[-1]}")


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_policy(home, seed, flags):
    """Trains the SFT policy and returns its greedy pass@1 on the prompts of the curves."""
    call("sft", run=home, seed=seed, **flags.get("sft", {}))
    call("eval", run=home, model=home / "sft", out=home / "start", **flags["eval"])
    return read_json(home / "start" / "eval.json")["pass@1"]


def make_pairs(home, seed, flags):
    """Makes pairs, cuts the held-out ones into halves that share no prompt, and returns the number to train
    on.
    """
    call("pairs", run=home, seed=seed, **flags.get("pairs", {}))
    rows = read_lines(home / "pairs-heldout.jsonl")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    first = set(prompts[: len(prompts) // 2])
    write_lines(home / "pairs-validation.jsonl", [row for row in rows if row["prompt"] in first])
    write_lines(home / "pairs-test.jsonl", [row for row in rows if row["prompt"] not in first])
    return len(read_lines(home / "pairs.jsonl"))


def make_untrained(home, seed, flags):
    """How well each reward ranks before training -> {name: its eval.json}.

    The SFT policy's trunk under a random head (training starts from a head of zeros), read as Q-RM and as
    ORM, and the policy's own logits. DPO-RM starts at log pi/pi = 0, and ranks nothing.
    """
    model = load_model(ScalarModel, home / "sft", Grid())
    model.score.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    tokenizer = tokenizers.Tokenizer.load(home / "sft", "none")
    eval_flags = {**flags["eval"], "limit": 0}
    out = {}
    for reward in ("qrm", "orm", "logit"):
        directory = home / f"untrained-{reward}"
        directory.mkdir(exist_ok=True)
        save_model(load_model(LanguageModel, home / "sft", Grid()) if reward == "logit" else model, directory)
        tokenizer.save(directory)
        (directory / "run.json").write_text(json.dumps({"reward": reward}), encoding="utf-8")
        call("eval", run=home, model=directory, data=home / "pairs-test.jsonl", **eval_flags)
        out[reward] = read_json(directory / "eval.json")
    return out


def make_reward_model(home, seed, flags, reward, lr):
    """-> {"validation", "test": the eval.json of that half of the held-out pairs}"""
    directory = home / f"rm-{reward}-{lr:g}"
    beta = {"beta": 0.1} if reward == "dpo" else {}  # the paper's
    call("rm", run=home, seed=seed, out=directory, reward=reward, lr=lr, **beta, **flags.get("rm", {}))
    eval_flags = {**flags["eval"], "limit": 0}
    for part in ("validation", "test"):
        pairs = home / f"pairs-{part}.jsonl"
        call("eval", run=home, model=directory, data=pairs, out=f"{directory}-{part}", **eval_flags)
    return {part: read_json(Path(f"{directory}-{part}", "eval.json")) for part in ("validation", "test")}


def make_rl(home, seed, flags, algorithm, reward, lr, rm_lr, options):
    """-> {"curve": [[trajectories, pass@1, KL k1 in nats per token]], "validation": final pass@1 on other
    prompts}
    """
    name = "-".join([algorithm, reward, f"{lr:g}", *(f"{k}={v}" for k, v in options.items())])
    directory = home / "rl" / name
    judge = {"reward": reward} if reward in GRADED else {"reward_model": home / f"rm-{reward}-{rm_lr:g}"}
    call(algorithm, run=home, seed=seed, out=directory, lr=lr, **judge, **{**flags[algorithm], **options})
    call("eval", run=home, model=directory, out=directory, seed=VALIDATION, **flags["eval"])
    evaluated = [row for row in read_lines(directory / "metrics.jsonl") if "pass@1" in row]
    curve = [[row["trajectories"], row["pass@1"], row["kl_k1"]] for row in evaluated]
    result = {"curve": curve, "validation": read_json(directory / "eval.json")["pass@1"]}
    shutil.rmtree(directory)  # only the curve is kept
    return result


KINDS = {
    "policy": make_policy,
    "pairs": make_pairs,
    "untrained": make_untrained,
    "rm": make_reward_model,
    "rl": make_rl,
}
READS = {
    "policy": ("sft", "eval"),
    "pairs": ("pairs",),
    "untrained": ("eval",),
    "rm": ("rm", "eval"),
    "rl": ("ppo", "reinforce", "eval"),
}
ARITH_ROWS = functools.lru_cache(data.arith_rows)  # every run of a seed reads the same


def perform(out, job):
    """One job in a worker process -> result, CPU seconds"""
    torch.set_num_threads(1)
    data.arith_rows = functools.partial(
        ARITH_ROWS, task=TASKS[job["task"]]
    )  # where all stages take rows from
    home = out / job["task"] / f"seed{job['seed']}"
    arguments = {key: value for key, value in job.items() if key not in ("kind", "task")}
    began = time.process_time()
    result = KINDS[job["kind"]](home, **arguments)
    return result, time.process_time() - began


# -------------------------------------------------------------------------------- jobs, in order


class Study:
    """The jobs that are done, as in runs.jsonl, and those that were asked for."""

    def __init__(self, out, plan, minutes, pool, workers):
        self.out, self.plan = Path(out), plan
        self.pool, self.workers = pool, workers
        self.deadline = time.monotonic() + 60 * minutes
        self.asked = {}  # {job as JSON: job}
        self.log = self.out / "runs.jsonl"
        self.out.mkdir(parents=True, exist_ok=True)
        text = self.log.read_text(encoding="utf-8") if self.log.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line without its end was cut off by a crash
        self.log.write_text(whole, encoding="utf-8")
        # {job as JSON: record}
        self.done = {json.dumps(record["job"]): record for record in read_lines(self.log)}

    def job(self, kind, seed, task="", **arguments):
        flags = {stage: self.plan.flags[stage] for stage in READS[kind] if stage in self.plan.flags}
        return {"kind": kind, "task": task or self.plan.task, "seed": seed, "flags": flags, **arguments}

    def rm(self, reward, seed, lr):
        return self.job("rm", seed, reward=reward, lr=lr)

    def result(self, job):
        return self.done.get(json.dumps(job), {}).get("result")

    def run(self, title, jobs):
        """Runs the missing jobs, --workers at a time and in this order; starts none after the deadline."""
        jobs = {json.dumps(job): job for job in jobs}
        self.asked |= jobs
        waiting = [job for job in jobs.values() if self.result(job) is None]
        bar = tqdm(total=len(waiting), desc=title, disable=not waiting or None)
        running = {}
        while waiting or running:
            while waiting and len(running) < self.workers and time.monotonic() < self.deadline:
                job = waiting.pop(0)
                running[self.pool.submit(perform, self.out, job)] = job
            if not running:
                break
            for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED")[0]:
                job = running.pop(future)
                bar.update()
                if future.exception():
                    tqdm.write(f"failed: {json.dumps(job)}: {future.exception()}")
                else:
                    self.record(job, *future.result())
        bar.close()

    def record(self, job, result, seconds):
        record = {"job": job, "result": result, "seconds": round(seconds, 1)}
        self.done[json.dumps(job)] = record
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    @property
    def missing(self):
        return [job for job in self.asked.values() if self.result(job) is None]


def best_lr(scores):
    """{lr: validation score} -> the best lr, the smaller of equals; None while one of them is missing"""
    if None in scores.values():
        return None
    return max(scores, key=lambda lr: (scores[lr], -lr))


def best_lrs(grid, measure):
    """{what: {lr: result or None}} -> {what: best lr by result[measure]}, for those whose whole grid has been
    run
    """
    chosen = {}
    for what, results in grid.items():
        lr = best_lr({lr: measure(result) if result else None for lr, result in results.items()})
        if lr is not None:
            chosen[what] = lr
    return chosen


def part_policies(study, task, seeds):
    """-> {seed: pass@1 at the start}"""
    jobs = {seed: study.job("policy", seed, task) for seed in range(seeds)}
    study.run(f"policies, {task}", jobs.values())
    results = {seed: study.result(job) for seed, job in jobs.items()}
    return {seed: result for seed, result in results.items() if result is not None}


def part_reward_models(study, starts, kinds):
    """-> {reward: lr}, {reward: [test metrics of each seed]}"""
    lrs = study.plan.rm_lrs
    for kind in ("pairs", "untrained"):
        study.run(kind, [study.job(kind, seed) for seed in starts])
    ready = [seed for seed in starts if study.result(study.job("pairs", seed))]
    tried = itertools.product(kinds, lrs) if 0 in ready else []
    study.run("reward models, learning rates", [study.rm(reward, 0, lr) for reward, lr in tried])
    grid = {r: {lr: study.result(study.rm(r, 0, lr)) for lr in lrs} for r in kinds}
    chosen = best_lrs(grid, lambda result: result["validation"]["pair_accuracy"])
    study.run("reward models", [study.rm(r, seed, lr) for r, lr in chosen.items() for seed in ready])
    metrics = {}
    for reward, lr in chosen.items():
        results = [study.result(study.rm(reward, seed, lr)) for seed in starts]
        metrics[reward] = [result["test"] for result in results if result]
    return chosen, metrics


def curves_from(starts, study, jobs):
    """{seed: job} -> {seed: curve with its start}, for the runs that are there"""
    curves = {}
    for seed, job in jobs.items():
        result = study.result(job)
        if result:
            curves[seed] = [[0, starts[seed], 0.0], *result["curve"]]
    return curves


def has_reward(study, rm_lrs, reward, seed):
    """Whether a reward needs no model, or its model has been trained."""
    if reward in GRADED:
        return True
    return reward in rm_lrs and bool(study.result(study.rm(reward, seed, rm_lrs[reward])))


def part_rl(study, starts, rm_lrs, arms, task=""):
    """Tunes the learning rate of each (algorithm, reward) on seed 0, then runs the other seeds.

    -> {arm: lr}, {arm: {seed: curve}}
    """

    def job(algorithm, reward, seed, lr):
        return study.job(
            "rl", seed, task, algorithm=algorithm, reward=reward, lr=lr, rm_lr=rm_lrs.get(reward), options={}
        )

    def ready(reward, seed):
        return seed in starts and has_reward(study, rm_lrs, reward, seed)

    lrs = study.plan.rl_lrs
    tried = []
    for algorithm, reward in arms:
        if ready(reward, 0):
            tried += [job(algorithm, reward, 0, lr) for lr in lrs[algorithm]]
    study.run("RL, learning rates", tried)
    grid = {arm: {lr: study.result(job(*arm, 0, lr)) for lr in lrs[arm[0]]} for arm in arms}
    chosen = best_lrs(grid, lambda result: result["validation"])
    jobs = {arm: {seed: job(*arm, seed, lr) for seed in starts} for arm, lr in chosen.items()}
    wanted = []
    for (_, reward), by_seed in jobs.items():
        wanted += [one for seed, one in by_seed.items() if ready(reward, seed)]
    study.run("RL, seeds", wanted)
    return chosen, {arm: curves_from(starts, study, by_seed) for arm, by_seed in jobs.items()}


def part_disputed(study, starts, rm_lrs, rl_lrs):
    """-> {label: {seed: curve}}; the learning rate is that of the arm in part 2, not tuned again."""
    jobs = {label: {} for label in study.plan.disputed}
    for seed in starts:
        for label, by_seed in jobs.items():
            algorithm, reward, options = DISPUTED[label]
            if (algorithm, reward) in rl_lrs and has_reward(study, rm_lrs, reward, seed):
                by_seed[seed] = study.job(
                    "rl",
                    seed,
                    algorithm=algorithm,
                    reward=reward,
                    lr=rl_lrs[algorithm, reward],
                    rm_lr=rm_lrs.get(reward),
                    options=options,
                )
    in_order = [by_seed[seed] for seed in starts for by_seed in jobs.values() if seed in by_seed]
    study.run("disputed choices", in_order)
    return {label: curves_from(starts, study, by_seed) for label, by_seed in jobs.items()}


# -------------------------------------------------------------------------------- tables


def spread(values, digits=2):
    """mean (lowest to highest)"""
    if not values:
        return "not run"
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def mean_curve(curves):
    """[(trajectories, mean pass@1)] over the seeds"""
    return [(points[0][0], statistics.fmean(p[1] for p in points)) for points in zip(*curves.values())]


def reach(curve, target):
    """Trajectories at which a curve first reaches the target, on a straight line between evaluations; None if
    never.

    >>> reach([(0, 0.2), (512, 0.4), (1024, 0.3)], 0.3)
    256.0
    """
    before = curve[0]
    for now in curve:
        if now[1] >= target:
            if now[1] == before[1]:
                return float(now[0])
            share = (target - before[1]) / (now[1] - before[1])
            return before[0] + (now[0] - before[0]) * share
        before = now
    return None


def reached(curves, target):
    """Trajectories to the target: of the mean curve; of the seeds the median, the range, and how many reach
    it.
    """
    last = next(iter(curves.values()))[-1][0]
    seeds = [reach(curve, target) for curve in curves.values()]

    def show(x):
        return f">{last}" if x is None or x > last else f"{x:.0f}"

    in_order = [show(x) for x in sorted(last + 1 if x is None else x for x in seeds)]
    median = in_order[len(seeds) // 2]
    n_reached = sum(x is not None for x in seeds)
    mean = show(reach(mean_curve(curves), target))
    return f"{mean}; {median} ({in_order[0]} to {in_order[-1]}), {n_reached}/{len(seeds)}"


def rate(lr, grid):
    at_edge = len(grid) > 1 and lr in (grid[0], grid[-1])
    return f"{lr:g}, edge" if at_edge else f"{lr:g}"


def tuning(grid, by):
    if len(grid) == 1:
        return f"The learning rate, {grid[0]:g}, is not tuned."
    return (
        f"Tuned: the learning rate, {len(grid)} values for every row, on seed 0, by {by}; the other seeds "
        "run at the best ('edge': an end of the grid)."
    )


def results(curves):
    """Three cells: best and final pass@1, final KL."""
    ends = [c[-1] for c in curves.values()]
    return [
        spread([max(p[1] for p in c) for c in curves.values()]),
        spread([p[1] for p in ends]),
        spread([p[2] for p in ends], 3),
    ]


class Part(NamedTuple):
    task: str
    lrs: dict  # {(algorithm, reward): learning rate}
    curves: dict  # {(algorithm, reward): {seed: curve}}
    rewards: tuple  # the rows of each algorithm


def rl_rows(study, part, algorithm, base):
    """The rows of one algorithm; the best mean pass@1 of the `base` reward is the target of all."""
    target = None
    if part.curves.get((algorithm, base)):
        target = max(y for _, y in mean_curve(part.curves[algorithm, base]))
    rows = []
    for reward in part.rewards:
        arm = algorithm, reward
        curves = part.curves.get(arm)
        row = [part.task, ALGORITHMS[algorithm], REWARDS[reward]]
        if curves:
            lr = rate(part.lrs[arm], study.plan.rl_lrs[algorithm])
            goal = ["", ""] if target is None else [f"{target:.2f}", reached(curves, target)]
            rows.append([*row, lr, len(curves), *results(curves), *goal])
        elif arm in study.plan.arms:
            rows.append([*row, "not run", *[""] * 6])
    return rows


def rl_table(study, title, base, parts):
    head = (
        "task, algorithm, reward, lr, seeds, best pass@1, final pass@1, final KL, target, trajectories to it"
    )
    rows = [head.split(", ")]
    for part in parts:
        for algorithm in ALGORITHMS:
            if any(arm[0] == algorithm for arm in part.curves):
                rows += rl_rows(study, part, algorithm, base)
    text = (
        f"Greedy pass@1 on {study.plan.flags['ppo']['limit']} held-out prompts. "
        f"{tuning(study.plan.rl_lrs['ppo'], 'final pass@1 on other held-out prompts')} Not tuned: KL k1 with "
        f"coefficient {KL_COEF} (where rewards are summed over time, as for outcome "
        f"and steps, so is the KL), epochs, clip, minibatch; gamma 1 and lambda {settings.Config().lam} for "
        "PPO on outcome and steps (token rewards have neither). The critic starts from the reward model, or "
        "from the policy where there is none of its kind. Final KL is that of the last rollout, before its "
        f"update. Best is the best of each seed's evaluations. Target: the best point of the {REWARDS[base]} "
        "arm's mean curve, same algorithm; trajectories to it: of the mean curve; of the seeds the median "
        "(lowest to highest) and how many reach it. (The target's own arm is measured at its peak, which "
        "lets the others look fast.)"
    )
    return {"title": title, "text": text, "rows": rows}


def reward_model_table(study, chosen, metrics):
    columns = ("pair_accuracy", "error_auc", "first_error_choice", "first_error_hit")
    rows = [["reward", "lr", "seeds", "pair accuracy", "error AUC", "choice", "drop hit"]]
    for reward, found in metrics.items():
        lr = rate(chosen[reward], study.plan.rm_lrs)
        rows.append([REWARDS[reward], lr, len(found), *spreads(found, columns)])
    untrained = [study.result(study.job("untrained", seed)) for seed in range(study.plan.seeds)]
    untrained = [result for result in untrained if result]
    for key, label in (
        ("qrm", "untrained trunk, random head, mean (Q-RM, step PRM)"),
        ("orm", "untrained trunk, random head, last token (ORM)"),
        ("logit", "untrained: the policy's own logits, mean"),
    ):
        found = [result[key] for result in untrained]
        rows.append([label, "", len(found), *spreads(found, columns)])
    qrm_metrics = metrics.get("qrm", [])
    length_baseline, n_pairs = spreads(qrm_metrics, ("length_baseline", "n_pairs"), (2, 0))
    rows.append(["the shorter answer", "", len(qrm_metrics), length_baseline, "", "", ""])
    text = (
        f"Per seed one SFT policy, its own pairs, one training run; {n_pairs} test pairs. "
        f"{tuning(study.plan.rm_lrs, 'pair accuracy on the validation half of the held-out pairs')} The rows "
        "are the test half. AUC: Z at the first wrong token against tokens before it (minus the index "
        "scores 1). Choice: there, the right token scores higher than the wrong one. Hit: the largest drop "
        "of Z is there. The "
        "step PRM learns from exact step labels, the others from pairs. DPO-RM starts at 0 everywhere."
    )
    return {"title": "1. Reward models", "text": text, "rows": rows}


def spreads(found, columns, digits=()):
    """Mean and range over the seeds of each column of found, a list of dicts; one may lack a column."""
    digits = digits or [2] * len(columns)
    out = []
    for column, d in zip(columns, digits):
        out.append(spread([metrics[column] for metrics in found if column in metrics], d))
    return out


def disputed_table(study, curves, arms):
    rows = [["algorithm", "choice", "seeds", "best pass@1", "final pass@1", "final KL", "change"]]

    def add(algorithm, label, found, change):
        cells = results(found) if found else ["not run", "", ""]
        rows.append([ALGORITHMS[algorithm], label, len(found), *cells, change])

    for algorithm, reward in dict.fromkeys(DISPUTED[label][:2] for label in study.plan.disputed):
        base = arms.get((algorithm, reward), {})
        add(algorithm, f"{REWARDS[reward]} as in part 2", base, "")
        for label in study.plan.disputed:
            if DISPUTED[label][:2] == (algorithm, reward):
                final = {seed: curve[-1][1] for seed, curve in curves[label].items()}
                change = [y - base[seed][-1][1] for seed, y in final.items() if seed in base]
                add(algorithm, label, curves[label], spread(change) if change else "")
    text = (
        "Each row changes the named setting of part 2 (mean and std, baseline weight 1, stop token as it "
        f"is, KL k1 at {KL_COEF}) and keeps its learning rate, tuned for the "
        "unchanged row only. Change: final pass@1 against the unchanged row, seed by seed. The rows with "
        "one epoch lie between PPO and REINFORCE. 'Sequence mean on every token' is GRPO with the same "
        "model: the answer's mean score, compared within 8 answers to a prompt, 32 prompts per rollout. Z "
        "as the LM's logit is in parts 1 and 2."
    )
    return {"title": "3. Disputed choices", "text": text, "rows": rows}


def markdown(table):
    head, *rows = [[str(cell) for cell in row] for row in table["rows"]]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([f"## {table['title']}", "", table["text"], "", *lines, ""])


BLUE, ORANGE, GREY = "#2166ac", "#c8590a", "#9aa3ad"


def draw_panel(axis, title, curves, other):
    """One arm: its mean curve with the range over the seeds and its last value, before a dashed mean curve.

    curves   {seed: curve}
    other    the curves to compare it with, or None
    """
    if other:
        axis.plot(*zip(*mean_curve(other)), color=GREY, linestyle="--", linewidth=1.6)
    colour = ORANGE if other else BLUE
    points = list(zip(*curves.values()))
    trajectories = [point[0][0] for point in points]
    low = [min(y for _, y, _ in point) for point in points]
    high = [max(y for _, y, _ in point) for point in points]
    axis.fill_between(trajectories, low, high, color=colour, alpha=0.18, linewidth=0)
    mean = mean_curve(curves)
    axis.plot(*zip(*mean), color=colour, linewidth=2.4)
    axis.annotate(
        f"{mean[-1][1]:.2f}".removeprefix("0"), mean[-1], (5, 0), textcoords="offset points", va="center",
        color=colour, fontsize=12, annotation_clip=False,
    )  # fmt: skip
    axis.set_title(title, loc="left", fontsize=11.5)
    axis.set(ylim=(0, 1), xlim=(0, trajectories[-1]), xticks=(0, trajectories[-1]), yticks=(0, 0.5, 1))
    axis.tick_params(labelsize=10, length=0)
    axis.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axis.spines[:].set_visible(False)


def figure_parts(arms, disputed):
    """[(title, [(title of a panel, curves, curves to compare with, or None)])] of the arms that were run."""
    parts = []
    for algorithm, title in ALGORITHMS.items():
        qrm = arms.get((algorithm, "qrm"))
        panels = [(REWARDS["qrm"], qrm, None)]
        panels += [(REWARDS[r], arms.get((algorithm, r)), qrm) for r in REWARDS if r != "qrm"]
        parts.append((f"{title}: the reward (dashed: Q-RM)", panels))
        panels = []
        for label, curves in disputed.items():
            own, reward, _ = DISPUTED[label]
            panels += [(label, curves, arms.get((own, reward)))] if own == algorithm else []
        parts.append((f"{title}: disputed choices (dashed: unchanged)", panels))
    parts = [(title, [panel for panel in panels if panel[1]]) for title, panels in parts]
    return [(title, panels) for title, panels in parts if panels]


def draw(path, arms, disputed):
    """Small multiples, one arm each: mean and range over the seeds, and dashed what it is compared with."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 4
    parts = figure_parts(arms, disputed)
    heights = [-(-len(panels) // columns) for _, panels in parts] or [1]
    figure = plt.figure(figsize=(10, 2.05 * sum(heights) + 0.4 * len(parts)), layout="constrained")
    blocks = figure.subfigures(max(len(parts), 1), 1, height_ratios=heights, squeeze=False)[:, 0]
    for block, rows, (title, panels) in zip(blocks, heights, parts):
        block.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
        axes = block.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axis, (name, curves, other) in zip(axes, panels):
            draw_panel(axis, textwrap.fill(name, 22), curves, other)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        block.supxlabel("sampled trajectories", fontsize=11)
        block.supylabel("greedy pass@1", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# -------------------------------------------------------------------------------- what mistakes look like


def scores_one_late(reward_model, ids, response_mask):
    """The mistake: Z is read where the state ends, so every token gets the score of the token before it."""
    return scatter_to_mask(response_mask, reward_model.scalars(at_states(reward_model, ids, response_mask)))


CURVES = {  # {name: (flags, how Z is read, line)}
    "healthy": ({}, qrm.response_scores, dict(color="k", lw=2.5)),
    "learning rate x 10": ({"lr": 1e-3}, qrm.response_scores, dict(color="#d55e00", ls="--")),
    "no KL penalty": ({"kl_coef": 0.0}, qrm.response_scores, dict(color="#0072b2", ls="-.")),
    "rewards one token late": ({}, scores_one_late, dict(color="#aa4499", ls=":", lw=2)),
}
METRICS = {
    "pass@1": "greedy pass@1, held-out",
    "reward": "reward: mean raw Z",
    "kl_k1": "kl_k1 (nats per token)",
    "kl_k3": "kl_k3 (nats per token)",
    "entropy": "entropy (nats per token)",
    "response_length": "response_length (tokens)",
    "ratio_max": "ratio_max",
    "clip_frac": "clip_frac (share)",
    "value_loss": "value_loss",
    "explained_variance": "explained_variance",
    "grad_norm": "grad_norm",
    "loss": "loss",
}


def draw_curves(out, run, **flags):
    """PPO as it should be and with three mistakes, on the policy and the reward model in `run`; keeps
    finished runs.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image  # comes with matplotlib

    figure, axes = plt.subplots(3, 4, figsize=(13, 7.5), sharex=True)
    for name, (changed, scores, style) in CURVES.items():
        directory = Path(out) / name.replace(" ", "-")
        if not directory.exists():
            with mock.patch.object(qrm, "response_scores", scores):
                usual = {"kl_coef": settings.ARITH["ppo"]["kl_coef"]}
                call("ppo", run=run, out=directory, **usual | flags | changed)
        for axis, key in zip(axes.flat, METRICS):
            rows = [row for row in read_lines(directory / "metrics.jsonl") if key in row]
            axis.plot([row["trajectories"] for row in rows], [row[key] for row in rows], label=name, **style)
    for axis, (key, title) in zip(axes.flat, METRICS.items()):
        axis.set_title(title, fontsize=10)
        axis.set(
            yscale="log" if key == "ratio_max" else "linear",
            xlabel="sampled trajectories" if axis in axes[-1] else None,
        )
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    path = Path(out) / "curves.png"
    figure.savefig(path, dpi=85)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a quarter of the bytes
    plt.close(figure)
    return path


# -------------------------------------------------------------------------------- main


def write_results(study, tables, arms, disputed):
    done = [study.done[key] for key in study.asked if key in study.done]
    minutes = sum(record["seconds"] for record in done) / 60
    head = (
        f"{len(done)} runs, {minutes:.0f} core-minutes; {len(study.missing)} not run. "
        f"Parts 1 to 3: task {study.plan.task}, {TASKS[study.plan.task]}."
    )
    text = "\n".join(["# The study", "", head, "", *map(markdown, tables)])
    (study.out / "study.md").write_text(text, encoding="utf-8")
    curves = {f"{a} {r}": c for (a, r), c in arms.items()} | disputed
    report = {
        "plan": dataclasses.asdict(study.plan),
        "tables": tables,
        "curves": curves,
        "missing": study.missing,
    }
    (study.out / "study.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    draw(study.out / "study.png", arms, disputed)
    return text


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=40, help="start no run after this; call again to continue")
    add("--seeds", type=int, default=FULL.seeds)
    add("--workers", type=int, default=2, help="runs at a time; the numbers do not depend on it")
    add("--task", choices=TASKS, default=FULL.task, help="of parts 1 to 3; the ceiling is measured on all")
    add("--out", default="runs/study")
    add("--fast", action="store_true", help="PPO, oracles, Q-RM and ORM only, one untuned learning rate")
    add("--quick", action="store_true", help="every path with tiny settings: a test, not a result")
    add(
        "--curves",
        metavar="RUN",
        help="only the figure of healthy and unhealthy learning curves, from this run",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(1)
    if args.curves:
        return print(draw_curves(args.out, args.curves, steps=32, eval_every=2))
    full = FAST if args.fast else FULL
    plan = QUICK if args.quick else dataclasses.replace(full, seeds=args.seeds, task=args.task)
    with concurrent.futures.ProcessPoolExecutor(
        args.workers, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        study = Study(args.out, plan, args.minutes, pool, args.workers)
        starts = part_policies(study, plan.task, plan.seeds)
        part_rl(study, starts, {}, [(a, r) for a, r in plan.arms if r in GRADED])
        ceilings = []
        for task in plan.ceilings:
            if task != plan.task:
                others = part_policies(study, task, plan.seeds)
                lrs, curves = part_rl(study, others, {}, [("ppo", r) for r in GRADED], task)
                ceilings.append(Part(task, lrs, curves, GRADED))
        used = {reward for _, reward in plan.arms}
        trained = [reward for reward in REWARDS if reward in used and reward not in GRADED]
        rm_lrs, metrics = part_reward_models(study, starts, trained)
        possible = [(a, r) for a, r in plan.arms if r in GRADED or r in rm_lrs]
        rl_lrs, arms = part_rl(study, starts, rm_lrs, possible)
        disputed = part_disputed(study, starts, rm_lrs, rl_lrs)
    ceiling = "0. The ceiling: exact token rewards against the exact outcome"
    tables = [
        rl_table(study, ceiling, "outcome", [Part(plan.task, rl_lrs, arms, GRADED), *ceilings]),
        reward_model_table(study, rm_lrs, metrics),
        rl_table(study, "2. Algorithms and rewards", "orm", [Part(plan.task, rl_lrs, arms, tuple(REWARDS))]),
        disputed_table(study, disputed, arms),
        theory_table(),
    ]
    print(write_results(study, tables, arms, disputed))
    for job in study.missing:
        print(f"not run: {json.dumps(job)}")
    more = f"; {len(study.missing)} runs missing, call again to continue" if study.missing else ""
    print(f"{study.out}: study.md, study.json, study.png{more}")


if __name__ == "__main__":
    main()
