"""The study: which token rewards help, by how much, and which of the disputed choices matter.

    python classroom/study.py [--minutes 40] [--seeds 5] [--out runs/study] [--fast | --quick]
    python classroom/study.py --curves runs/arith       PPO on that run's reward model, healthy and with three mistakes: <out>/curves.png

    per seed   sft ─► pairs (train | validation | test) ─► reward models ─► REINFORCE and PPO ─► curves, tables, figure

Every step is a command of train.py, in one of --workers processes with one thread each. A finished run is one line of
<out>/runs.jsonl; a restart does what is missing. Results: <out>/study.md, study.json and study.png.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
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
VALIDATION = (
    1000  # seed of the held-out prompts that learning rates are chosen on; the curves are those of seed 0's
)

# "long" has more verbs to unlearn, more of them in a problem, and longer answers: the outcome says less about a token.
TASKS = {"demo": data.Arith(), "long": data.Arith(steps=(6, 8), operand=1, verbs=16, misread=8)}

# The choices on which the paper and its code differ, and controls: {label: (algorithm, reward, flags that differ from part 2)}
DISPUTED = {
    "std only": ("ppo", "qrm", {"standardize": "std"}),
    "baseline weight 0.01": ("ppo", "qrm", {"baseline_weight": 0.01}),
    "stop token's reward = sequence mean": ("ppo", "qrm", {"eos_to_mean": True}),
    "absolute k1": ("ppo", "qrm", {"kl": "abs"}),
    "exact KL (Algorithm 1)": ("ppo", "qrm", {"kl": "exact"}),
    "one epoch": ("ppo", "qrm", {"ppo_epochs": 1}),
    "one epoch, no baseline": (
        "ppo",
        "qrm",
        {"ppo_epochs": 1, "baseline_weight": 0.0},
    ),  # REINFORCE with PPO's ratio and clip
    "std only, REINFORCE": ("reinforce", "qrm", {"standardize": "std"}),
    "no KL (Algorithm 2)": ("reinforce", "qrm", {"kl_coef": 0.0}),
    "sequence mean on every token": ("reinforce", "qrm", {"advantage": "grpo", "group_size": 8}),
    "ORM, lambda 1": ("ppo", "orm", {"lam": 1.0}),
    "oracle's outcome, lambda 1": ("ppo", "outcome", {"lam": 1.0}),
}


@dataclass(frozen=True)
class Plan:
    seeds: int = 5  # each with its own SFT policy, pairs, reward models and RL runs
    rl_lrs: dict = field(
        default_factory=lambda: {"ppo": (1e-4, 3e-4, 1e-3), "reinforce": (3e-5, 1e-4, 3e-4)}
    )  # grid of every RL arm, on seed 0
    rm_lrs: tuple = (2e-4, 7e-4, 2e-3)  # grid of every reward model, on seed 0
    task: str = "long"  # of parts 1 to 3: the one on which token credit can show, see part 0
    ceilings: tuple = tuple(TASKS)  # tasks of part 0
    arms: tuple = tuple(
        (a, r) for r in REWARDS for a in ALGORITHMS if r != "logit" or a == "ppo"
    )  # of part 2
    disputed: tuple = tuple(DISPUTED)  # of part 3
    flags: dict = field(
        default_factory=dict
    )  # {stage: what differs from train.py's defaults for the built-in task}


_RL = {"limit": 300, "eval_every": 2}
FULL = Plan(flags={"rm": {"steps": 400}, "eval": {"limit": 300, "k": 1}, "reinforce": _RL, "ppo": _RL})
_RL = {"steps": 1, "batch_size": 16, "minibatch": 8, "limit": 8, "eval_every": 1, "max_new_tokens": 40}
_LRS = {"ppo": (1e-4,), "reinforce": (1e-4,)}
FAST = dataclasses.replace(
    FULL,
    rl_lrs=_LRS,
    rm_lrs=(2e-3,),
    ceilings=(),
    disputed=(),
    arms=tuple(("ppo", r) for r in ("oracle", "outcome", "qrm", "orm")),
)
QUICK = Plan(
    1,
    _LRS,
    (2e-3,),
    ceilings=(),
    arms=(("ppo", "outcome"), ("ppo", "qrm"), ("reinforce", "qrm"), ("ppo", "orm")),
    disputed=("exact KL (Algorithm 1)", "std only, REINFORCE"),
    flags={
        "sft": {"steps": 60, "warmup": 10},
        "pairs": {"limit": 100, "max_new_tokens": 40},
        "rm": {"steps": 2},
        "eval": {"limit": 8, "k": 1, "max_new_tokens": 40},
        "reinforce": _RL,
        "ppo": _RL,
    },
)

# ------------------------------------------------------------------------------------------------ jobs, in a worker


def call(stage, **flags):
    """train.py --stage ... with its defaults for the built-in task (which --model and --data would switch off), silently."""
    argv, log = ["--stage", stage], io.StringIO()
    for name, value in {**settings.ARITH.get(stage, {}), "device": "cpu", **flags}.items():
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
    """The SFT policy, and its greedy pass@1 on the prompts of the curves."""
    call("sft", run=home, seed=seed, **flags.get("sft", {}))
    call("eval", run=home, model=home / "sft", out=home / "start", **flags["eval"])
    return read_json(home / "start" / "eval.json")["pass@1"]


def make_pairs(home, seed, flags):
    """Pairs; the held-out ones are cut in two halves that share no prompt."""
    call("pairs", run=home, seed=seed, **flags.get("pairs", {}))
    rows = read_lines(home / "pairs-heldout.jsonl")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    first = set(prompts[: len(prompts) // 2])
    write_lines(home / "pairs-validation.jsonl", [row for row in rows if row["prompt"] in first])
    write_lines(home / "pairs-test.jsonl", [row for row in rows if row["prompt"] not in first])
    return len(read_lines(home / "pairs.jsonl"))


def make_untrained(home, seed, flags):
    """What there is to know before training -> {name: what eval says}: the SFT policy's trunk under a random head (training starts
    from a head of zeros), read as Q-RM and as ORM, and the policy's own logits. (DPO-RM starts at log pi/pi = 0, and ranks nothing.)"""
    model, tokenizer, out = (
        load_model(ScalarModel, home / "sft", Grid()),
        tokenizers.Tokenizer.load(home / "sft", "none"),
        {},
    )
    model.score.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    for reward in ("qrm", "orm", "logit"):
        directory = home / f"untrained-{reward}"
        directory.mkdir(exist_ok=True)
        save_model(load_model(LanguageModel, home / "sft", Grid()) if reward == "logit" else model, directory)
        tokenizer.save(directory)
        (directory / "run.json").write_text(json.dumps({"reward": reward}), encoding="utf-8")
        call(
            "eval", run=home, model=directory, data=home / "pairs-test.jsonl", **{**flags["eval"], "limit": 0}
        )
        out[reward] = read_json(directory / "eval.json")
    return out


def make_reward_model(home, seed, flags, reward, lr):
    """-> {"validation" and "test": what train.py's eval says on that half of the held-out pairs}"""
    directory = home / f"rm-{reward}-{lr:g}"
    beta = {"beta": 0.1} if reward == "dpo" else {}  # the paper's
    call("rm", run=home, seed=seed, out=directory, reward=reward, lr=lr, **beta, **flags.get("rm", {}))
    for part in ("validation", "test"):
        call(
            "eval",
            run=home,
            model=directory,
            data=home / f"pairs-{part}.jsonl",
            out=directory / part,
            **{**flags["eval"], "limit": 0},
        )
    return {part: read_json(directory / part / "eval.json") for part in ("validation", "test")}


def make_rl(home, seed, flags, algorithm, reward, lr, rm_lr, options):
    """-> {"curve": [[trajectories, pass@1, KL k1 in nats a token]], "validation": final pass@1 on the other prompts}"""
    directory = (
        home / "rl" / "-".join([algorithm, reward, f"{lr:g}", *(f"{k}={v}" for k, v in options.items())])
    )
    judge = {"reward": reward} if reward in GRADED else {"reward_model": home / f"rm-{reward}-{rm_lr:g}"}
    call(algorithm, run=home, seed=seed, out=directory, lr=lr, **judge, **{**flags[algorithm], **options})
    call("eval", run=home, model=directory, out=directory, seed=VALIDATION, **flags["eval"])
    curve = [
        [row[k] for k in ("trajectories", "pass@1", "kl_k1")]
        for row in read_lines(directory / "metrics.jsonl")
        if "pass@1" in row
    ]
    result = {"curve": curve, "validation": read_json(directory / "eval.json")["pass@1"]}
    shutil.rmtree(directory)  # the curve is what is kept
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
    """One job in a worker process -> result, seconds of its core."""
    torch.set_num_threads(1)
    data.arith_rows = functools.partial(
        ARITH_ROWS, task=TASKS[job["task"]]
    )  # all stages take the built-in task's rows from it
    arguments, began = {k: v for k, v in job.items() if k not in ("kind", "task")}, time.process_time()
    return KINDS[job["kind"]](
        out / job["task"] / f"seed{job['seed']}", **arguments
    ), time.process_time() - began


# ------------------------------------------------------------------------------------------------ jobs, in order


class Study:
    """What has been run, {job as JSON: record}, as in runs.jsonl; and what should be, {job as JSON: job}."""

    def __init__(self, out, plan, minutes, pool, workers):
        self.workers = workers
        self.out, self.plan, self.pool, self.deadline = Path(out), plan, pool, time.monotonic() + 60 * minutes
        self.log, self.asked = self.out / "runs.jsonl", {}
        self.out.mkdir(parents=True, exist_ok=True)
        text = self.log.read_text(encoding="utf-8") if self.log.exists() else ""
        self.log.write_text(
            text[: text.rfind("\n") + 1], encoding="utf-8"
        )  # a line without its end was cut off by a crash
        self.done = {json.dumps(record["job"]): record for record in read_lines(self.log)}

    def job(self, kind, seed, task="", **arguments):
        flags = {stage: self.plan.flags[stage] for stage in READS[kind] if stage in self.plan.flags}
        return {"kind": kind, "task": task or self.plan.task, "seed": seed, "flags": flags, **arguments}

    def rm(self, reward, seed, lr):
        return self.job("rm", seed, reward=reward, lr=lr)

    def result(self, job):
        return self.done.get(json.dumps(job), {}).get("result")

    def run(self, title, jobs):
        """Runs what is not there yet, --workers at a time and in this order; starts nothing after the deadline."""
        jobs = {json.dumps(job): job for job in jobs}
        self.asked |= jobs
        waiting = [job for job in jobs.values() if self.result(job) is None]
        bar, running = tqdm(total=len(waiting), desc=title, disable=not waiting or None), {}
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
                    continue
                result, seconds = future.result()
                record = self.done[json.dumps(job)] = {
                    "job": job,
                    "result": result,
                    "seconds": round(seconds, 1),
                }
                with open(self.log, "a", encoding="utf-8") as f:
                    f.write(json.dumps(record) + "\n")
        bar.close()

    @property
    def missing(self):
        return [job for job in self.asked.values() if self.result(job) is None]


def best_lr(scores):
    """{lr: validation score} -> the best lr, of equals the smaller; None while one of them has not been run"""
    return None if None in scores.values() else max(scores, key=lambda lr: (scores[lr], -lr))


def part_policies(study, task, seeds):
    """-> {seed: pass@1 at the start}"""
    jobs = {seed: study.job("policy", seed, task) for seed in range(seeds)}
    study.run(f"policies, {task}", jobs.values())
    return {seed: r for seed, job in jobs.items() if (r := study.result(job)) is not None}


def part_reward_models(study, starts, kinds):
    """-> {reward: lr}, {reward: [test metrics of each seed]}"""
    lrs = study.plan.rm_lrs
    for kind in ("pairs", "untrained"):
        study.run(kind, [study.job(kind, seed) for seed in starts])
    ready = [seed for seed in starts if study.result(study.job("pairs", seed))]
    study.run(
        "reward models, learning rates", [study.rm(r, 0, lr) for r in kinds for lr in lrs if 0 in ready]
    )
    grid = {r: {lr: study.result(study.rm(r, 0, lr)) for lr in lrs} for r in kinds}
    chosen = {
        r: best_lr({lr: x and x["validation"]["pair_accuracy"] for lr, x in grid[r].items()}) for r in kinds
    }
    chosen = {r: lr for r, lr in chosen.items() if lr is not None}
    study.run("reward models", [study.rm(r, seed, lr) for r, lr in chosen.items() for seed in ready])
    return chosen, {
        r: [x["test"] for seed in starts if (x := study.result(study.rm(r, seed, lr)))]
        for r, lr in chosen.items()
    }


def part_rl(study, starts, rm_lrs, arms, task=""):
    """The learning rate of each (algorithm, reward) on seed 0, then the other seeds -> {arm: lr}, {arm: {seed: curve}}"""

    def job(algorithm, reward, seed, lr):
        return study.job(
            "rl", seed, task, algorithm=algorithm, reward=reward, lr=lr, rm_lr=rm_lrs.get(reward), options={}
        )

    def ready(reward, seed):
        return seed in starts and (
            reward in GRADED or reward in rm_lrs and study.result(study.rm(reward, seed, rm_lrs[reward]))
        )

    study.run(
        "RL, learning rates",
        [job(*arm, 0, lr) for arm in arms if ready(arm[1], 0) for lr in study.plan.rl_lrs[arm[0]]],
    )
    grid = {arm: {lr: study.result(job(*arm, 0, lr)) for lr in study.plan.rl_lrs[arm[0]]} for arm in arms}
    chosen = {arm: best_lr({lr: r and r["validation"] for lr, r in grid[arm].items()}) for arm in arms}
    chosen = {arm: lr for arm, lr in chosen.items() if lr is not None}
    study.run(
        "RL, seeds", [job(*arm, s, lr) for arm, lr in chosen.items() for s in starts if ready(arm[1], s)]
    )
    found = {
        arm: {s: r["curve"] for s in starts if (r := study.result(job(*arm, s, lr)))}
        for arm, lr in chosen.items()
    }
    return chosen, {
        arm: {s: [[0, starts[s], 0.0], *curve] for s, curve in curves.items()}
        for arm, curves in found.items()
    }


def part_disputed(study, starts, rm_lrs, rl_lrs):
    """-> {label: {seed: curve}}; the learning rate is that of the arm in part 2, not tuned again."""
    jobs = {
        (label, seed): study.job(
            "rl", seed, algorithm=a, reward=r, lr=rl_lrs[a, r], rm_lr=rm_lrs.get(r), options=options
        )
        for seed in starts
        for label in study.plan.disputed
        for a, r, options in [DISPUTED[label]]
        if (a, r) in rl_lrs and (r in GRADED or r in rm_lrs and study.result(study.rm(r, seed, rm_lrs[r])))
    }
    study.run("disputed choices", jobs.values())
    found = {key: r["curve"] for key, job in jobs.items() if (r := study.result(job))}
    return {
        label: {s: [[0, starts[s], 0.0], *curve] for (name, s), curve in found.items() if name == label}
        for label in study.plan.disputed
    }


# ------------------------------------------------------------------------------------------------ tables


def spread(values, digits=2):
    """mean (lowest to highest)"""
    if not values:
        return "not run"
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):.{digits}f}" + (
        f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else ""
    )


def mean_curve(curves):
    """[(trajectories, mean pass@1)] over the seeds"""
    return [(points[0][0], statistics.fmean(p[1] for p in points)) for points in zip(*curves.values())]


def reach(curve, target):
    """Trajectories at which a curve first reaches the target, on a straight line between evaluations; None if never.

    >>> reach([(0, 0.2), (512, 0.4), (1024, 0.3)], 0.3)
    256.0
    """
    before = curve[0]
    for now in curve:
        if now[1] >= target:
            return (
                float(now[0])
                if now[1] == before[1]
                else before[0] + (now[0] - before[0]) * (target - before[1]) / (now[1] - before[1])
            )
        before = now
    return None


def reached(curves, target):
    """Of the mean curve; then of the seeds the median (lowest to highest) and how many ever do."""
    last = next(iter(curves.values()))[-1][0]
    seeds = [reach(c, target) for c in curves.values()]
    show = lambda x: f">{last}" if x is None or x > last else f"{x:.0f}"
    in_order = [show(x) for x in sorted(last + 1 if x is None else x for x in seeds)]
    return f"{show(reach(mean_curve(curves), target))}; {in_order[len(seeds) // 2]} ({in_order[0]} to {in_order[-1]}), {sum(x is not None for x in seeds)}/{len(seeds)}"


def rate(lr, grid):
    return f"{lr:g}" + (", edge" if len(grid) > 1 and lr in (grid[0], grid[-1]) else "")


def tuning(grid, by):
    if len(grid) == 1:
        return f"The learning rate, {grid[0]:g}, is not tuned."
    return f"Tuned: the learning rate, {len(grid)} values for every row, on seed 0, by {by}; the other seeds run at the best ('edge': an end of the grid)."


def results(curves):
    """Three cells: best and final pass@1, final KL."""
    ends = [c[-1] for c in curves.values()]
    return [
        spread([max(p[1] for p in c) for c in curves.values()]),
        spread([p[1] for p in ends]),
        spread([p[2] for p in ends], 3),
    ]


def rl_table(study, title, base, parts):
    """parts: [(label of the task, {arm: lr}, {arm: {seed: curve}}, rewards)]; base: the arm whose best mean pass@1 is the target"""
    rows = [
        [
            "task",
            "algorithm",
            "reward",
            "lr",
            "seeds",
            "best pass@1",
            "final pass@1",
            "final KL",
            "target",
            "trajectories to it",
        ]
    ]
    for task, chosen, curves, rewards in parts:
        for a in sorted({arm[0] for arm in curves}, key=list(ALGORITHMS).index):
            target = (
                max((y for _, y in mean_curve(curves[a, base])), default=None)
                if curves.get((a, base))
                else None
            )
            for r in rewards:
                if c := curves.get((a, r)):
                    goal = ["", ""] if target is None else [f"{target:.2f}", reached(c, target)]
                    rows.append(
                        [
                            task,
                            ALGORITHMS[a],
                            REWARDS[r],
                            rate(chosen[a, r], study.plan.rl_lrs[a]),
                            len(c),
                            *results(c),
                            *goal,
                        ]
                    )
                elif (a, r) in study.plan.arms:
                    rows.append([task, ALGORITHMS[a], REWARDS[r], "not run", *[""] * 6])
    text = (
        f"Greedy pass@1 on {study.plan.flags['ppo']['limit']} held-out prompts. {tuning(study.plan.rl_lrs['ppo'], 'final pass@1 on other held-out prompts')} "
        f"Not tuned: KL k1 with coefficient {settings.ARITH['ppo']['kl_coef']} (where rewards are summed over time, as for outcome and steps, so is the KL), epochs, clip, minibatch; "
        f"gamma 1 and lambda {settings.Config().lam} for PPO on outcome and steps (token rewards have neither). The critic starts from the reward model, or from the policy where there is none of its kind. "
        "Final KL is that of the last rollout, before its update. Best is the best of each seed's evaluations. Target: the best "
        f"point of the {REWARDS[base]} arm's mean curve, same algorithm; trajectories to it: of the mean curve; of the seeds the median (lowest to "
        "highest) and how many reach it. (The target's own arm is measured at its peak, which lets the others look fast.)"
    )
    return {"title": title, "text": text, "rows": rows}


def reward_model_table(study, chosen, metrics):
    columns = ("pair_accuracy", "error_auc", "first_error_choice", "first_error_hit")
    rows = [["reward", "lr", "seeds", "pair accuracy", "error AUC", "choice", "drop hit"]]
    for r, found in metrics.items():
        rows.append(
            [
                REWARDS[r],
                rate(chosen[r], study.plan.rm_lrs),
                len(found),
                *(spread([m[c] for m in found]) for c in columns),
            ]
        )
    starts = [r for s in range(study.plan.seeds) if (r := study.result(study.job("untrained", s)))]
    for key, label in (
        ("qrm", "untrained trunk, random head, mean (Q-RM, step PRM)"),
        ("orm", "untrained trunk, random head, last token (ORM)"),
        ("logit", "untrained: the policy's own logits, mean"),
    ):
        rows.append([label, "", len(starts), *(spread([s[key][c] for s in starts]) for c in columns)])
    lengths = [m["length_baseline"] for m in metrics.get("qrm", [])]
    rows.append(["the shorter answer", "", len(lengths), spread(lengths), "", "", ""])
    text = (
        f"Per seed one SFT policy, its own pairs, one training run; {spread([m['n_pairs'] for m in metrics.get('qrm', [])], 0)} test pairs. "
        f"{tuning(study.plan.rm_lrs, 'pair accuracy on the validation half of the held-out pairs')} The rows are the test half. "
        "AUC: Z at the first wrong token against tokens before it (.5 is blind). Choice: there, the right token scores higher than the wrong one. "
        "Hit: the largest drop of Z is there. The step PRM learns from exact step "
        "labels, the others from pairs. DPO-RM starts at 0 everywhere."
    )
    return {"title": "1. Reward models", "text": text, "rows": rows}


def disputed_table(study, curves, arms):
    rows = [["algorithm", "choice", "seeds", "best pass@1", "final pass@1", "final KL", "change"]]
    for a, r in dict.fromkeys(DISPUTED[label][:2] for label in study.plan.disputed):
        base = arms.get((a, r), {})
        rows.append(
            [
                ALGORITHMS[a],
                f"{REWARDS[r]} as in part 2",
                len(base),
                *(results(base) if base else ["not run", "", ""]),
                "",
            ]
        )
        for label in (label for label in study.plan.disputed if DISPUTED[label][:2] == (a, r)):
            change = [c[-1][1] - base[s][-1][1] for s, c in curves[label].items() if s in base]
            rows.append(
                [
                    ALGORITHMS[a],
                    label,
                    len(curves[label]),
                    *(results(curves[label]) if curves[label] else ["not run", "", ""]),
                    spread(change) if change else "",
                ]
            )
    text = (
        f"Each row changes what it names in part 2 (mean and std, baseline weight 1, stop token as it is, KL k1 at {settings.ARITH['ppo']['kl_coef']}) and keeps its learning "
        "rate, tuned for the unchanged row only. Change: final pass@1 against the unchanged row, seed by seed. The rows with one epoch lie between PPO and REINFORCE. "
        "'Sequence mean on every token' is GRPO with the same model: the answer's mean score, compared within 8 answers to a prompt, of which there are 32 a rollout. Z as the LM's logit stands in parts 1 and 2."
    )
    return {"title": "3. Disputed choices", "text": text, "rows": rows}


def markdown(table):
    head, *rows = [[str(cell) for cell in row] for row in table["rows"]]
    return "\n".join(
        [
            f"## {table['title']}",
            "",
            table["text"],
            "",
            *("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)),
            "",
        ]
    )


def draw(path, arms, disputed):
    """Mean curves, and the range over seeds: one panel an algorithm, one for the disputed choices (means only)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(ALGORITHMS[a], {REWARDS[r]: c for (b, r), c in arms.items() if b == a}) for a in ALGORITHMS]
    panels = [
        (title, lines)
        for title, lines in [*panels, ("disputed choices (means)", disputed)]
        if any(lines.values())
    ]
    figure, axes = plt.subplots(
        1, max(len(panels), 1), figsize=(1 + 5 * max(len(panels), 1), 4.5), sharey=True, squeeze=False
    )
    axes = axes[0]
    for axis, (title, lines) in zip(axes, panels):
        for i, (label, curves) in enumerate((label, curves) for label, curves in lines.items() if curves):
            axis.plot(
                *zip(*mean_curve(curves)),
                f"C{i}",
                label=f"{label} (n={len(curves)})",
                linestyle="--" if "oracle" in label else ":" if i > 9 else "-",
            )
            if lines is not disputed:
                points = list(zip(*curves.values()))
                low, high = ([pick(q[1] for q in p) for p in points] for pick in (min, max))
                axis.fill_between([p[0][0] for p in points], low, high, color=f"C{i}", alpha=0.12)
        axis.set(title=title, xlabel="sampled trajectories")
        if axis.lines:
            axis.legend(
                fontsize=7, **(dict(loc="upper left", bbox_to_anchor=(1, 1)) if lines is disputed else {})
            )
    axes[0].set_ylabel("greedy pass@1, held-out prompts")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ what mistakes look like


def scores_one_late(reward_model, ids, response_mask):
    """The mistake: Z is read where the state ends, so that every token gets the score of the token before it."""
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
    """PPO as it should be and with three mistakes, on the policy and the reward model in `run`; a run that is there is kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image  # comes with matplotlib

    figure, axes = plt.subplots(3, 4, figsize=(13, 7.5), sharex=True)
    for name, (changed, scores, style) in CURVES.items():
        directory = Path(out) / name.replace(" ", "-")
        if not directory.exists():
            with mock.patch.object(qrm, "response_scores", scores):
                call("ppo", run=run, out=directory, **flags, **changed)
        for axis, key in zip(axes.flat, METRICS):
            points = [
                (row["trajectories"], row[key])
                for row in read_lines(directory / "metrics.jsonl")
                if key in row
            ]
            axis.plot(*zip(*points), label=name, **style)
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


# ------------------------------------------------------------------------------------------------ main


def write_results(study, tables, arms, disputed):
    done = [study.done[key] for key in study.asked if key in study.done]
    head = f"{len(done)} runs, {sum(record['seconds'] for record in done) / 60:.0f} core-minutes; {len(study.missing)} not run. Parts 1 to 3: task {study.plan.task}, {TASKS[study.plan.task]}."
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


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=40,
        help="no run is started after so many minutes; call again to go on",
    )
    parser.add_argument("--seeds", type=int, default=FULL.seeds)
    parser.add_argument(
        "--workers", type=int, default=2, help="runs at a time; the numbers do not depend on it"
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        default=FULL.task,
        help="of parts 1 to 3; the ceiling is measured on all of them",
    )
    parser.add_argument("--out", default="runs/study")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="PPO with the oracles, Q-RM and ORM only, at one untuned learning rate",
    )
    parser.add_argument(
        "--quick", action="store_true", help="every path with tiny settings: a test, not a result"
    )
    parser.add_argument(
        "--curves",
        metavar="RUN",
        help="only the figure of healthy and unhealthy learning curves, from this run of train.py",
    )
    args = parser.parse_args(argv)
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
        for task in (t for t in plan.ceilings if t != plan.task):
            others = part_policies(study, task, plan.seeds)
            ceilings.append((task, *part_rl(study, others, {}, [("ppo", r) for r in GRADED], task), GRADED))
        rm_lrs, metrics = part_reward_models(
            study, starts, [r for r in REWARDS if r not in GRADED and r in {r for _, r in plan.arms}]
        )
        rl_lrs, arms = part_rl(
            study, starts, rm_lrs, [(a, r) for a, r in plan.arms if r in GRADED or r in rm_lrs]
        )
        disputed = part_disputed(study, starts, rm_lrs, rl_lrs)
    tables = [
        rl_table(
            study,
            "0. The ceiling: exact token rewards against the exact outcome",
            "outcome",
            [(plan.task, rl_lrs, arms, GRADED), *ceilings],
        ),
        reward_model_table(study, rm_lrs, metrics),
        rl_table(study, "2. Algorithms and rewards", "orm", [(plan.task, rl_lrs, arms, REWARDS)]),
        disputed_table(study, disputed, arms),
        theory_table(),
    ]
    print(write_results(study, tables, arms, disputed))
    for job in study.missing:
        print(f"not run: {json.dumps(job)}")
    print(
        f"{study.out}: study.md, study.json, study.png"
        + (f"; {len(study.missing)} runs missing, call again to go on" if study.missing else "")
    )


if __name__ == "__main__":
    main()
