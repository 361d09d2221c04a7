"""Granularity alone: does the same reward model teach a policy faster token by token than once per answer?

    python classroom/granularity.py [--out runs/granularity] [--seeds 8] [--minutes 60] [--workers 2]
    python classroom/granularity.py --table        the tables of what has run so far, and granularity.png
    python classroom/granularity.py --write        the same, and puts them into README.md and science.md

The protocol, written before the runs, is classroom/protocol.md. Everything is a command of train.py on files
that this script writes; a finished job is one line of <out>/runs.jsonl, and a restart does what is missing.

    per seed   sft ─► pairs ─► Q-RM, ORM, verifier ─► PPO: {all tokens; one number an answer, lambda 1}
"""

import argparse
import concurrent.futures
import contextlib
import io
import json
import multiprocessing
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "classroom")]
from demo_table import mean_and_range, write_blocks, write_readme
from study import draw_panel, reach

import train
from data import Arith, arith_rows
from qrm import Reward, at_last_token, last_token_mask, masked_mean
from support.settings import ARITH

TASK = Arith(steps=(6, 8), operand=1, verbs=16, misread=8)  # the study's "long" task: about 45 tokens
TUNING_SEEDS = (100,)  # with policies, pairs, reward models and prompts of their own
RM_LRS = (7e-4, 2e-3, 4e-3)
RM_STEPS = 400  # batches of 32 pairs
RL_LRS = (1e-4, 3e-4, 1e-3)  # tuned first, at KL coefficient .3
KL_COEFS = (0.3, 0.1, 1.0)  # then this, at that learning rate
TUNING_ROLLOUTS, ROLLOUTS = 12, 24  # of 256 trajectories
TARGETS = (0.5, 0.7, 0.9)
HELD_OUT = 300  # prompts that greedy pass@1 is measured on, after each rollout

# {arm: (what scores, how it is read)}
ARMS = {
    "qrm tokens": ("qrm", "tokens"),
    "qrm answer": ("qrm", "mean"),
    "verifier tokens": ("verifier", "tokens"),
    "orm answer": ("orm", "last"),
    "grpo graded": ("outcome", "group"),
    "verifier answer": ("verifier", "mean"),
    "oracle tokens": ("oracle", "tokens"),
}
REWARD_MODELS = ("qrm", "orm", "verifier")
READINGS = {  # how an arm's rewards become advantages
    "tokens": {"advantage": "token"},  # Algorithm 1: Z_std - KL - V
    "mean": {"advantage": "gae", "lam": 1.0, "gamma": 1.0},  # the answer's number at its last token
    "last": {"advantage": "gae", "lam": 1.0, "gamma": 1.0},
    "group": {"advantage": "grpo", "group_size": 8},
}

# ------------------------------------------------------------------------------------------------ rewards


def answer_mean(reward):
    """A Reward read once per answer: the mean of its token rewards, at the last token."""

    def rewards(ids, mask):
        means = masked_mean(reward.rewards(ids, mask), mask)  # (B,)
        return means[:, None] * last_token_mask(mask)

    return Reward(rewards, at_last_token, is_q=False)


def read_as(reading, reward_of_run):
    """train.py's reward_of_run, with the reward read as an arm says."""

    def patched(cfg, tokenizer, rows, grid):
        reward = reward_of_run(cfg, tokenizer, rows, grid)
        return answer_mean(reward) if reading == "mean" else reward

    return patched


# ------------------------------------------------------------------------------------------------ jobs


def call(stage, **flags):
    """train.py --stage ... with its settings for the built-in task, silently."""
    settings = {**ARITH.get(stage, {}), "device": "cpu", **flags}
    argv, log = ["--stage", stage], io.StringIO()
    for name, value in settings.items():
        argv += [f"--{name}", str(value)]
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        status = train.main(argv)
    if status:
        raise RuntimeError(f"train.py {' '.join(argv)}: {log.getvalue().strip().splitlines()[-1]}")


def write_rows(path, rows):
    keep = ("prompt", "response", "label")
    text = "".join(json.dumps({k: row[k] for k in keep}) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_start(home, seed):
    """The SFT policy, pairs and held-out pairs -> {"pass@1": greedy, before RL}"""
    home.mkdir(parents=True, exist_ok=True)
    heldout = arith_rows("test", HELD_OUT, 1000 * (seed in TUNING_SEEDS), TASK)
    write_rows(home / "sft.jsonl", arith_rows("train", 16_000, seed, TASK))
    write_rows(home / "train.jsonl", arith_rows("train", 3000, seed + 1, TASK))
    write_rows(home / "test.jsonl", arith_rows("test", 600, seed + 1, TASK))
    write_rows(home / "rl.jsonl", arith_rows("train", 8192, seed + 2, TASK) + heldout)
    write_rows(home / "heldout.jsonl", heldout)
    call("sft", data=home / "sft.jsonl", out=home / "sft", seed=seed)
    sampling = {"model": home / "sft", "limit": 0, "seed": seed}
    call("pairs", data=home / "train.jsonl", out=home / "pairs.jsonl", **sampling)
    call("pairs", data=home / "test.jsonl", out=home / "pairs-heldout.jsonl", **sampling)
    call("eval", data=home / "heldout.jsonl", out=home / "start", k=1, **sampling)
    return json.loads((home / "start" / "eval.json").read_text())


def make_reward_model(home, seed, reward, lr):
    """-> what train.py's eval says about it on the held-out pairs"""
    out = home / f"rm-{reward}-{lr:g}"
    data = {"model": home / "sft", "data": home / "pairs.jsonl"}
    call("rm", out=out, seed=seed, reward=reward, lr=lr, steps=RM_STEPS, **data)
    call("eval", model=out, data=home / "pairs-heldout.jsonl", limit=0)
    return json.loads((out / "eval.json").read_text())


def make_arm(home, seed, arm, rm_lr, lr, kl_coef, rollouts):
    """-> [[trajectories, greedy pass@1, KL k1 in nats a token], ...], one entry a rollout"""
    scorer, reading = ARMS[arm]
    out = home / f"rl-{arm.replace(' ', '-')}-{lr:g}-{kl_coef:g}-{rollouts}"
    if scorer in REWARD_MODELS:
        judge = {"reward_model": home / f"rm-{scorer}-{rm_lr:g}"}
    else:
        judge = {"reward": scorer}
    flags = {"lr": lr, "kl_coef": kl_coef, "steps": rollouts, "eval_every": 1, "limit": HELD_OUT}
    with mock.patch.object(train, "reward_of_run", read_as(reading, train.reward_of_run)):
        call(
            "ppo",
            model=home / "sft",
            data=home / "rl.jsonl",
            out=out,
            seed=seed,
            **judge,
            **flags | READINGS[reading],
        )
    curve = [[row["trajectories"], row["pass@1"], row["kl_k1"]] for row in read_rows(out / "metrics.jsonl")]
    shutil.rmtree(out)  # the curve is what is kept
    return curve


KINDS = {"start": make_start, "rm": make_reward_model, "arm": make_arm}


def perform(out, job):
    """One job in a worker process -> its result, CPU seconds."""
    torch.set_num_threads(1)
    began = time.process_time()
    arguments = {k: v for k, v in job.items() if k not in ("kind", "seed")}
    result = KINDS[job["kind"]](Path(out) / f"seed{job['seed']}", job["seed"], **arguments)
    return result, time.process_time() - began


class Runs:
    """What has been run: {job as JSON: record}, one record a line of <out>/runs.jsonl."""

    def __init__(self, out, minutes=0.0, workers=2):
        self.out, self.workers = Path(out), workers
        self.deadline = time.monotonic() + 60 * minutes
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = self.out / "runs.jsonl"
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that a crash cut off is left out
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        self.done = {json.dumps(record["job"]): record for record in map(json.loads, whole.splitlines())}

    def result(self, job):
        return self.done.get(json.dumps(job), {}).get("result")

    def run(self, jobs):
        """Runs what is missing, `workers` at a time and in this order; starts nothing after the deadline."""
        waiting = [job for job in jobs if self.result(job) is None]
        context = multiprocessing.get_context("spawn")
        running = {}
        with concurrent.futures.ProcessPoolExecutor(self.workers, mp_context=context) as pool:
            while waiting or running:
                while waiting and len(running) < self.workers and time.monotonic() < self.deadline:
                    job = waiting.pop(0)
                    running[pool.submit(perform, self.out, job)] = job
                if not running:
                    return
                for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED")[0]:
                    job = running.pop(future)
                    if future.exception():
                        print(f"failed: {json.dumps(job)}: {future.exception()}", flush=True)
                    else:
                        self.keep(job, *future.result())

    def keep(self, job, result, seconds):
        record = {"job": job, "result": result, "seconds": round(seconds, 1)}
        self.done[json.dumps(job)] = record
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
        print(f"{seconds:6.1f} s  {json.dumps(job)}", flush=True)


# ------------------------------------------------------------------------------------------------ protocol


def start_job(seed):
    return {"kind": "start", "seed": seed}


def rm_job(seed, reward, lr):
    return {"kind": "rm", "seed": seed, "reward": reward, "lr": lr}


def arm_job(seed, arm, rm_lr, lr, kl_coef, rollouts):
    job = {"kind": "arm", "seed": seed, "arm": arm, "rm_lr": rm_lr}
    return job | {"lr": lr, "kl_coef": kl_coef, "rollouts": rollouts}


def best(runs, candidates, jobs_of, score):
    """The candidate with the highest mean score, the first of equals; None until all have run."""
    means = {}
    for candidate in candidates:
        results = [runs.result(job) for job in jobs_of(candidate)]
        if None in results:
            return None
        means[candidate] = statistics.fmean(map(score, results))
    return max(means, key=means.get)


def tuning_score(curve):
    """Mean greedy pass@1 over the last half of the rollouts: counts speed and height, and a collapse."""
    half = curve[len(curve) // 2 :]
    return statistics.fmean(point[1] for point in half)


def tuned_rms(runs):
    """{reward: learning rate} by accuracy on held-out pairs of the tuning seeds; runs what is missing"""
    jobs_of = {r: lambda lr, r=r: [rm_job(seed, r, lr) for seed in TUNING_SEEDS] for r in REWARD_MODELS}
    runs.run([job for r in REWARD_MODELS for lr in RM_LRS for job in jobs_of[r](lr)])
    return {r: best(runs, RM_LRS, jobs_of[r], lambda x: x["pair_accuracy"]) for r in REWARD_MODELS}


def tuned_arms(runs, rm_lrs):
    """{arm: (learning rate, KL coefficient)}: first the rate, then the coefficient; 5 runs an arm and seed"""

    def jobs_of(arm, lr, kl_coef):
        rm_lr = rm_lrs.get(ARMS[arm][0])
        return [arm_job(seed, arm, rm_lr, lr, kl_coef, TUNING_ROLLOUTS) for seed in TUNING_SEEDS]

    runs.run([job for arm in ARMS for lr in RL_LRS for job in jobs_of(arm, lr, KL_COEFS[0])])
    lrs = {}
    for arm in ARMS:
        lrs[arm] = best(runs, RL_LRS, lambda lr, arm=arm: jobs_of(arm, lr, KL_COEFS[0]), tuning_score)
    ready = [arm for arm in ARMS if lrs[arm]]
    runs.run([job for arm in ready for kl_coef in KL_COEFS for job in jobs_of(arm, lrs[arm], kl_coef)])
    chosen = {}
    for arm in ready:
        kl = best(runs, KL_COEFS, lambda kl, arm=arm: jobs_of(arm, lrs[arm], kl), tuning_score)
        if kl is not None:
            chosen[arm] = (lrs[arm], kl)
    return chosen


def test_jobs(rm_lrs, chosen, seeds):
    """Seed by seed, so that a run that is cut short has the same seeds for every arm."""
    jobs = []
    for seed in seeds:
        jobs += [rm_job(seed, r, rm_lrs[r]) for r in REWARD_MODELS]
        for arm, (lr, kl_coef) in chosen.items():
            jobs.append(arm_job(seed, arm, rm_lrs.get(ARMS[arm][0]), lr, kl_coef, ROLLOUTS))
    return jobs


# ------------------------------------------------------------------------------------------------ tables


def bootstrap(values, draws=10_000, seed=0):
    """95 % interval of the mean over seeds, percentile bootstrap; with few seeds read it as too narrow."""
    rng = random.Random(seed)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def interval(values, digits=2):
    """mean [95 % interval]"""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "not run"
    low, high = bootstrap(values)
    return f"{statistics.fmean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def test_curves(runs, rm_lrs, chosen, seeds):
    """{arm: {seed: curve from 0 trajectories}} of the seeds that every chosen arm has run"""
    curves = {arm: {} for arm in chosen}
    for job in test_jobs(rm_lrs, chosen, seeds):
        curve = runs.result(job)
        if job["kind"] == "arm" and curve:
            start = runs.result(start_job(job["seed"]))["pass@1"]
            curves[job["arm"]][job["seed"]] = [[0, start, 0.0], *curve]
    common = [seed for seed in seeds if all(seed in c for c in curves.values())]
    return {arm: {seed: c[seed] for seed in common} for arm, c in curves.items()}


def arm_rows(curves, chosen, end):
    """Final and mean pass@1, trajectories to the targets; a seed that never gets there counts as `end`."""
    rows = [["arm", "lr", "kl", "seeds", "final pass@1", "mean over the run", *(f"to {t}" for t in TARGETS)]]
    for arm, by_seed in curves.items():
        cells = [arm, f"{chosen[arm][0]:g}", f"{chosen[arm][1]:g}", str(len(by_seed))]
        cells.append(interval([curve[-1][1] for curve in by_seed.values()]))
        cells.append(interval([statistics.fmean(p[1] for p in curve) for curve in by_seed.values()]))
        for target in TARGETS:
            times = [reach(curve, target) for curve in by_seed.values()]
            hits = sum(x is not None for x in times)
            cells.append(f"{interval([end if x is None else x for x in times], 0)}, {hits}/{len(times)}")
        rows.append(cells)
    return rows


def paired_rows(curves, end):
    """Each arm minus "qrm tokens", seed by seed: the differences that the claims are about."""
    rows = [["arm minus qrm tokens", "final pass@1", "mean over the run", *(f"to {t}" for t in TARGETS)]]
    base = curves["qrm tokens"]
    for arm, by_seed in curves.items():
        if arm == "qrm tokens":
            continue
        pairs = [(by_seed[seed], base[seed]) for seed in by_seed]
        cells = [arm, interval([a[-1][1] - b[-1][1] for a, b in pairs])]
        gaps = [statistics.fmean(p[1] for p in a) - statistics.fmean(p[1] for p in b) for a, b in pairs]
        cells.append(interval(gaps))
        for target in TARGETS:
            times = [[reach(c, target) or end for c in pair] for pair in pairs]
            cells.append(interval([a - b for a, b in times], 0))
        rows.append(cells)
    return rows


def rm_rows(runs, rm_lrs, seeds):
    rows = [["reward model", "lr", "seeds", "pair accuracy", "choice", "largest drop at the error"]]
    for reward, lr in rm_lrs.items():
        found = [r for seed in seeds if (r := runs.result(rm_job(seed, reward, lr)))]
        cells = [reward, f"{lr:g}", str(len(found))]
        for key in ("pair_accuracy", "first_error_choice", "first_error_hit"):
            cells.append(interval([r[key] for r in found if key in r]))  # no known error, no such key
        rows.append(cells)
    return rows


def markdown(rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


BLOCKS = ("granularity: reward models", "granularity: arms", "granularity: differences")  # in science.md
README_ARMS = {  # arm: policy, reward in README.md's table
    "qrm tokens": ("PPO", "**Q-RM, every token**"),
    "verifier tokens": ("PPO", "verifier, every token"),
    "orm answer": ("PPO, λ = 1", "outcome model, last token"),
    "grpo graded": ("PPO, groups of 8", "graded outcome"),
    "oracle tokens": ("PPO", "exact token rewards"),
}


def readme_rows(curves):
    """README's rows of this study: greedy pass@1 before RL and at the end, mean and range over the seeds."""
    before = [curve[0][1] for curve in curves["qrm tokens"].values()]
    rows = [("SFT, before RL", "", before)]
    for arm, (policy, reward) in README_ARMS.items():
        rows.append((policy, reward, [curve[-1][1] for curve in curves[arm].values()]))
    return [f"| long | {p} | {r} | {mean_and_range(found)} | {len(found)} |" for p, r, found in rows]


def draw(path, curves):
    """Small multiples, one arm each: mean and range over the seeds, dashed the arm "qrm tokens"."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(10, 4.6), layout="constrained", sharex=True, sharey=True)
    for axis, (arm, by_seed) in zip(axes.flat, curves.items()):
        draw_panel(axis, arm, by_seed, None if arm == "qrm tokens" else curves["qrm tokens"])
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    figure.supxlabel("sampled trajectories", fontsize=11)
    figure.supylabel("greedy pass@1", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_tables(curves, tables):
    """Puts the tables into science.md, the figure beside it, and the final accuracies into README.md."""
    write_blocks("science.md", {name: markdown(rows).split("\n") for name, rows in zip(BLOCKS, tables)})
    draw(ROOT / "classroom" / "granularity.png", curves)
    write_readme("long", readme_rows(curves))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/granularity")
    parser.add_argument("--seeds", type=int, default=8, help="test seeds 0, 1, ...")
    parser.add_argument("--minutes", type=float, default=60, help="no job starts after so many minutes")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time; results do not depend on it")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--write", action="store_true", help="run nothing; tables into README.md, science.md")
    args = parser.parse_args(argv)
    minutes = 0 if args.table or args.write else args.minutes
    runs, seeds = Runs(args.out, minutes, args.workers), range(args.seeds)
    runs.run([start_job(seed) for seed in TUNING_SEEDS])
    rm_lrs = tuned_rms(runs)
    if None in rm_lrs.values():
        return print("not all reward models are tuned yet; call again to go on")
    chosen = tuned_arms(runs, rm_lrs)
    if len(chosen) == len(ARMS):  # test seeds wait until every arm is tuned
        runs.run([start_job(seed) for seed in seeds])
        runs.run(test_jobs(rm_lrs, chosen, seeds))
    curves = test_curves(runs, rm_lrs, chosen, seeds)
    end = 256 * ROLLOUTS
    if not curves.get("qrm tokens"):
        return print("no test seed has run every arm yet; call again to go on")
    tables = rm_rows(runs, rm_lrs, seeds), arm_rows(curves, chosen, end), paired_rows(curves, end)
    print("\n\n".join(map(markdown, tables)), "", sep="\n")
    draw(runs.out / "granularity.png", curves)
    if args.write:
        write_tables(curves, tables)
    seconds = sum(record["seconds"] for record in runs.done.values())
    print(f"{len(runs.done)} jobs, {seconds / 60:.0f} core-minutes")


if __name__ == "__main__":
    main()
