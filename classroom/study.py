"""The study: which token rewards help, by how much, and which of the disputed choices matter, on the built-in task.

    python classroom/study.py [--minutes 40] [--seeds 5] [--out runs/study] [--quick]

    per seed  sft ─► pairs (train | validation | test) ─► reward models ─► REINFORCE and PPO ─► curves, tables, figure

Every step is a command of train.py, run in one of two worker processes with one thread each. A finished run is one line
of <out>/runs.jsonl; a restart does only what is missing. Results: <out>/study.md, study.json and study.png.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import multiprocessing
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import train
from model import ScalarModel, load_model, save_model
from parallel import Grid
from qrm import credit_counts, pairwise_loss

REWARDS = {"oracle": "oracle, tokens", "outcome": "oracle, outcome", "qrm": "Q-RM", "orm": "ORM", "dpo": "DPO-RM", "prm": "step PRM"}
ALGORITHMS = {"ppo": "PPO", "reinforce": "REINFORCE"}
GRADED = ("oracle", "outcome")  # need no reward model
FEW = ("dpo", "prm")  # arms with plan.few seeds
VALIDATION = 1000  # seed of the held-out prompts that learning rates are chosen on; curves are measured on those of seed 0

# The choices on which the paper and its code differ, and controls: {label: (algorithm, flags that differ from part 2)}
DISPUTED = {
    "PPO, std only": ("ppo", {"standardize": "std"}),
    "PPO, baseline weight 0.01": ("ppo", {"baseline_weight": 0.01}),
    "PPO, stop token's reward = sequence mean": ("ppo", {"eos_to_mean": True}),
    "PPO, KL |k1|": ("ppo", {"kl": "abs"}),
    "PPO, KL exact (Algorithm 1)": ("ppo", {"kl": "exact"}),
    "PPO, no KL": ("ppo", {"kl_coef": 0.0}),
    "REINFORCE, std only": ("reinforce", {"standardize": "std"}),
    "REINFORCE, stop token's reward = sequence mean": ("reinforce", {"eos_to_mean": True}),
    "REINFORCE, no KL": ("reinforce", {"kl_coef": 0.0}),
    "REINFORCE, control: sequence mean on every token": ("reinforce", {"advantage": "grpo", "group_size": 8}),
}


@dataclass(frozen=True)
class Plan:
    seeds: int = 5  # of everything: one SFT policy, one set of pairs, one reward model of a kind, one RL run of an arm
    few: int = 3  # the same for DPO-RM, step PRM and part 3
    rl_lrs: tuple = (3e-5, 1e-4, 3e-4)  # grid of every RL arm, on seed 0
    rm_lrs: tuple = (7e-4, 2e-3, 6e-3)  # grid of every reward model, on seed 0
    changes: dict = field(default_factory=dict)  # {stage: flags} that differ from train.py's for the built-in task
    theory_steps: int = 1000  # updates of the table

    def flags(self, *stages):
        return {stage: self.changes[stage] for stage in stages if stage in self.changes}


_RL = {"limit": 300, "eval_every": 2}
FULL = Plan(changes={"eval": {"limit": 300, "k": 1}, "reinforce": _RL, "ppo": _RL})
_RL = {"steps": 2, "batch_size": 16, "minibatch": 8, "limit": 16, "eval_every": 1, "max_new_tokens": 40}
QUICK = Plan(1, 1, (1e-4,), (2e-3,), {"sft": {"steps": 80, "warmup": 10}, "pairs": {"limit": 100, "max_new_tokens": 40}, "rm": {"steps": 3},
                                      "eval": {"limit": 16, "k": 1, "max_new_tokens": 40}, "reinforce": _RL, "ppo": _RL}, 100)  # fmt: skip

# ------------------------------------------------------------------------------------------------ jobs, in a worker


def call(stage, **flags):
    """train.py --stage ... with its defaults for the built-in task, silently; --model and --data would switch them off."""
    argv, log = ["--stage", stage], io.StringIO()
    for name, value in {**train.ARITH.get(stage, {}), "device": "cpu", **flags}.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        status = train.main(argv)
    if status:
        raise RuntimeError(f"train.py {' '.join(argv)}: {log.getvalue().strip().splitlines()[-1]}")


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_policy(home, seed, flags):
    """sft and pairs; the held-out pairs are cut in two between prompts; pass@1 at the start, on the prompts of the curves."""
    call("sft", run=home, seed=seed, **flags.get("sft", {}))
    call("pairs", run=home, seed=seed, **flags.get("pairs", {}))
    rows = read_lines(home / "pairs-heldout.jsonl")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    first = set(prompts[: len(prompts) // 2])
    write_lines(home / "pairs-validation.jsonl", [row for row in rows if row["prompt"] in first])
    write_lines(home / "pairs-test.jsonl", [row for row in rows if row["prompt"] not in first])
    call("eval", run=home, model=home / "sft", out=home / "start", **flags["eval"])
    return {"pass@1": read_json(home / "start" / "eval.json")["pass@1"], "pairs": len(read_lines(home / "pairs.jsonl"))}


def make_untrained(home, seed, flags):
    """What the reward models' starts know: a random head on the SFT policy's trunk (Q-RM, ORM, step PRM), and the SFT
    policy's own log-probabilities (DPO-RM itself starts at log pi/pi = 0 everywhere: it ranks nothing)."""
    model, tokenizer = load_model(ScalarModel, home / "sft", Grid()), data.Tokenizer.load(home / "sft", "none")
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(seed))
    (home / "untrained").mkdir(exist_ok=True)
    save_model(model, home / "untrained")
    tokenizer.save(home / "untrained")
    pairs = read_lines(home / "pairs-test.jsonl")
    texts = home / "pairs-test-texts.jsonl"
    write_lines(texts, [{"prompt": p["prompt"], "response": p[side]} for p in pairs for side in ("chosen", "rejected")])
    out = {}
    for directory, key in (("untrained", "scores"), ("sft", "logprobs")):
        path = home / f"{directory}-test.jsonl"
        call("score", run=home, model=home / directory, data=texts, out=path)
        rows = read_lines(path)
        z = [torch.tensor(row[key]) for row in rows]
        solutions = [tokenizer.encode_response(data.arith_solve(pair["prompt"])) for pair in pairs]
        errors = [data.first_error(row["ids"], solution) for row, solution in zip(rows[1::2], solutions)]
        c = credit_counts(z[1::2], errors)
        for name, rank in (("mean", torch.Tensor.mean), ("last", lambda x: x[-1])):
            right = [float(rank(w) > rank(l)) for w, l in zip(z[0::2], z[1::2])]
            out[f"{directory}-{name}"] = {"pair_accuracy": statistics.fmean(right), "error_auc": c["wins"] / max(c["comparisons"], 1),
                                          "first_error_hit": c["hits"] / max(c["n_errors"], 1)}  # fmt: skip
    return out


def rm_directory(home, reward, lr):
    return home / f"rm-{reward}-{lr:g}"


def make_reward_model(home, seed, flags, reward, lr):
    directory = rm_directory(home, reward, lr)
    beta = {"beta": 0.1} if reward == "dpo" else {}  # the paper's
    call("rm", run=home, seed=seed, out=directory, reward=reward, lr=lr, **beta, **flags.get("rm", {}))
    for part in ("validation", "test"):
        call("eval", run=home, model=directory, data=home / f"pairs-{part}.jsonl", out=directory / part, **{**flags["eval"], "limit": 0})
    return {part: read_json(directory / part / "eval.json") for part in ("validation", "test")}


def make_rl(home, seed, flags, algorithm, reward, lr, rm_lr, options):
    """-> {"curve": [[trajectories, pass@1, KL k1 in nats a token, mean reward]], "validation": final pass@1 there}"""
    name = "-".join([algorithm, reward, f"{lr:g}", *(f"{k}={v}" for k, v in options.items())])
    directory = home / "rl" / name
    judge = {"reward": reward} if reward in GRADED else {"reward_model": rm_directory(home, reward, rm_lr)}
    call(algorithm, run=home, seed=seed, out=directory, lr=lr, **judge, **{**flags[algorithm], **options})
    call("eval", run=home, model=directory, out=directory, seed=VALIDATION, **flags["eval"])
    rows = [row for row in read_lines(directory / "metrics.jsonl") if "pass@1" in row]
    curve = [[row[k] for k in ("trajectories", "pass@1", "kl_k1", "reward")] for row in rows]
    result = {"curve": curve, "validation": read_json(directory / "eval.json")["pass@1"]}
    shutil.rmtree(directory)  # the curve is what is kept
    return result


KINDS = {"policy": make_policy, "untrained": make_untrained, "rm": make_reward_model, "rl": make_rl}


def perform(out, job):
    """One job in a worker process -> result, seconds."""
    torch.set_num_threads(1)
    began, arguments = time.perf_counter(), {k: v for k, v in job.items() if k != "kind"}
    return KINDS[job["kind"]](Path(out) / f"seed{job['seed']}", **arguments), time.perf_counter() - began


# ------------------------------------------------------------------------------------------------ jobs, in order


class Study:
    """What was run: {job as JSON: result}, kept in runs.jsonl; and what could not be."""

    def __init__(self, out, plan, minutes, pool):
        self.out, self.plan, self.pool, self.deadline = Path(out), plan, pool, time.monotonic() + 60 * minutes
        self.out.mkdir(parents=True, exist_ok=True)
        self.log, self.missing = self.out / "runs.jsonl", []
        self.log.touch()
        text = self.log.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()  # a line without its end was cut off by a crash
        self.log.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        self.done = {json.dumps(r["job"]): r for r in map(json.loads, lines)}

    def job(self, kind, seed, **arguments):
        stages = {"policy": ("sft", "pairs", "eval"), "untrained": (), "rm": ("rm", "eval"), "rl": (arguments.get("algorithm"), "eval")}[kind]
        return {"kind": kind, "seed": seed, "flags": self.plan.flags(*stages), **arguments}

    def result(self, job):
        return self.done.get(json.dumps(job), {}).get("result")

    def run(self, title, jobs):
        """Runs what is not there yet, two at a time and in this order; starts nothing after the deadline."""
        jobs = [job for job in {json.dumps(j): j for j in jobs}.values() if self.result(job) is None]
        waiting, running = list(jobs), {}
        bar = tqdm(total=len(jobs), desc=title, disable=not jobs or None)
        while waiting or running:
            while waiting and len(running) < 2 and time.monotonic() < self.deadline:
                job = waiting.pop(0)
                running[self.pool.submit(perform, self.out, job)] = job
            if not running:
                break
            for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED")[0]:
                job = running.pop(future)
                bar.update()
                if future.exception():
                    self.missing.append(job)
                    tqdm.write(f"failed: {json.dumps(job)}: {future.exception()}")
                    continue
                result, seconds = future.result()
                record = {"job": job, "result": result, "seconds": round(seconds, 1)}
                self.done[json.dumps(job)] = record
                with open(self.log, "a", encoding="utf-8") as f:
                    f.write(json.dumps(record) + "\n")
        self.missing += waiting
        bar.close()

    def seeds(self, reward):
        return range(self.plan.few if reward in FEW else self.plan.seeds)


def best_lr(scores):
    """{lr: validation score, None where it did not run} -> the best lr (the smaller of equals), or None"""
    known = {lr: s for lr, s in scores.items() if s is not None}
    return max(known, key=lambda lr: (known[lr], -lr)) if len(known) == len(scores) else None


def part_policies(study):
    study.run("policies", [study.job("policy", seed) for seed in range(study.plan.seeds)])
    study.run("untrained starts", [study.job("untrained", seed) for seed in range(study.plan.seeds) if study.result(study.job("policy", seed))])
    return {seed: r for seed in range(study.plan.seeds) if (r := study.result(study.job("policy", seed)))}


def part_reward_models(study, starts):
    """-> {reward: lr}, {reward: [test metrics of each seed]}"""
    plan, kinds = study.plan, [r for r in REWARDS if r not in GRADED]
    job = lambda reward, seed, lr: study.job("rm", seed, reward=reward, lr=lr)
    if 0 in starts:
        study.run("reward models, learning rates", [job(r, 0, lr) for r in kinds for lr in plan.rm_lrs])
    score = lambda r, lr: (study.result(job(r, 0, lr)) or {}).get("validation", {}).get("pair_accuracy")
    chosen = {r: best_lr({lr: score(r, lr) for lr in plan.rm_lrs}) for r in kinds}
    chosen = {r: lr for r, lr in chosen.items() if lr is not None}
    study.run("reward models", [job(r, s, lr) for s in starts for r, lr in chosen.items() if s in study.seeds(r)])
    return chosen, {r: [x["test"] for s in study.seeds(r) if (x := study.result(job(r, s, lr)))] for r, lr in chosen.items()}


def part_rl(study, starts, rm_lrs, arms):
    """The learning rate of each (algorithm, reward) on seed 0, then the other seeds -> {arm: lr}, {arm: {seed: curve}}"""
    plan = study.plan

    def job(algorithm, reward, seed, lr):
        return study.job("rl", seed, algorithm=algorithm, reward=reward, lr=lr, rm_lr=rm_lrs.get(reward), options={})

    def ready(reward, seed):
        rm = reward in GRADED or reward in rm_lrs and study.result(study.job("rm", seed, reward=reward, lr=rm_lrs[reward]))
        return seed in starts and bool(rm)

    study.run("RL, learning rates", [job(a, r, 0, lr) for a, r in arms if ready(r, 0) for lr in plan.rl_lrs])
    chosen = {(a, r): best_lr({lr: (study.result(job(a, r, 0, lr)) or {}).get("validation") for lr in plan.rl_lrs}) for a, r in arms}
    chosen = {arm: lr for arm, lr in chosen.items() if lr is not None}
    study.run("RL, seeds", [job(*arm, s, lr) for s in starts for arm, lr in chosen.items() if s in study.seeds(arm[1]) and ready(arm[1], s)])
    curves = {}
    for arm, lr in chosen.items():
        found = {s: r["curve"] for s in study.seeds(arm[1]) if (r := study.result(job(*arm, s, lr)))}
        curves[arm] = {s: [[0, starts[s]["pass@1"], 0.0, None], *curve] for s, curve in found.items()}
    return chosen, curves


def part_disputed(study, starts, rm_lrs, rl_lrs):
    """-> {label: {seed: curve}}; the learning rate is that of the arm in part 2, not tuned again."""
    jobs = {}
    for seed in range(study.plan.few):
        for label, (algorithm, options) in DISPUTED.items():
            rm = "qrm" in rm_lrs and study.result(study.job("rm", seed, reward="qrm", lr=rm_lrs["qrm"]))
            if rm and (algorithm, "qrm") in rl_lrs:
                jobs[label, seed] = study.job("rl", seed, algorithm=algorithm, reward="qrm", lr=rl_lrs[algorithm, "qrm"],
                                              rm_lr=rm_lrs["qrm"], options=options)  # fmt: skip
    study.run("disputed choices", jobs.values())
    curves = {label: {} for label in DISPUTED}
    for (label, seed), job in jobs.items():
        if r := study.result(job):
            curves[label][seed] = [[0, starts[seed]["pass@1"], 0.0, None], *r["curve"]]
    return curves


# ------------------------------------------------------------------------------------------------ the theory, in a table


def theory(seed, margin=0.0, beta=0.2, T=4, A=3, updates=1000):
    """What the pairwise loss identifies, where everything can be enumerated (sections 3.1 to 3.4, Prop. 3.4).

    All A^T answers of a tree with random token rewards r; preferences by Bradley-Terry on their returns, which is what
    maximum-entropy RL (temperature 1, no discount) makes of them; Z one free number per (state, action), fitted from 0.

        Q*(s, a) = r(s, a) + V*(s'),   V*(s) = log sum_a exp Q*(s, a),   A* = Q* - V*

    -> max |error| of the returns and of the backed-up advantage in nats; correlations of Z itself with Q* and A*
    """
    n = sum(A**t for t in range(T))  # states, numbered so that the children of s are s*A + 1 ... s*A + A
    states, places = torch.zeros(A**T, dtype=torch.long), []
    for action in torch.cartesian_prod(*[torch.arange(A)] * T).T:
        places.append(states * A + action)
        states = states * A + 1 + action
    places = torch.stack(places, 1)  # (A^T, T): the table entries that an answer passes through
    r = torch.randn(n * A, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    returns = r[places].sum(1)  # (A^T,)
    i, j = (~torch.eye(A**T, dtype=torch.bool)).nonzero().T  # every pair, both ways round
    preferred = torch.sigmoid(returns[i] - returns[j])  # P(i is chosen)
    z = torch.zeros(n * A, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=2.0)
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = 2.0 * (1 - step / updates)
        means = z[places].mean(1)
        chosen, rejected = means[i], means[j]
        for x in (chosen, rejected):  # each pair counts as often as it is preferred: the expectation, without sampling
            x.register_hook(lambda grad: grad * preferred)
        optimizer.zero_grad()
        pairwise_loss(chosen, rejected, beta, margin)[0].backward()
        optimizer.step()
    fitted = beta / T * z.detach()  # Z as a token reward: its sums are what the loss compares

    def backed_up(reward):
        Q, V = reward.view(n, A).clone(), torch.zeros(n * A + 1, dtype=torch.float64)  # V is 0 behind the last token
        for s in reversed(range(n)):
            Q[s] += V[s * A + 1 : s * A + A + 1]
            V[s] = Q[s].logsumexp(0)
        return Q, Q - V[:n, None]

    def corr(x, y):
        return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()

    def centred(x):
        return x - x.mean(-1, keepdim=True)

    (Q, advantage), (_, from_z), Z, sums = backed_up(r), backed_up(fitted), z.detach().view(n, A), fitted[places].sum(1)
    return {"returns_error": (centred(sums) - centred(returns)).abs().max().item(), "advantage_error": (from_z - advantage).abs().max().item(),
            "return_corr": corr(sums, returns), "q_corr": corr(Z, Q), "advantage_corr": corr(Z, advantage),
            "within_state_corr": corr(centred(Z), centred(advantage))}  # fmt: skip


# ------------------------------------------------------------------------------------------------ tables


def spread(values, digits=2):
    """mean (min to max)"""
    if not values:
        return "not run"
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else "")


def mean_curve(curves):
    """[(trajectories, mean pass@1)] over the seeds"""
    return [(points[0][0], statistics.fmean(p[1] for p in points)) for points in zip(*curves.values())]


def reach(curve, target):
    """Trajectories at which a curve first reaches the target, between evaluations by a straight line; None if it does not."""
    for (x0, y0), (x1, y1) in zip([curve[0][:2], *(p[:2] for p in curve)], (p[:2] for p in curve)):
        if y1 >= target:
            return x1 if y1 == y0 else x0 + (x1 - x0) * max(0.0, target - y0) / (y1 - y0)
    return None


def reached(curves, target):
    """'mean curve; of the seeds: median, lowest to highest, how many'; >N for those that never do"""
    last = next(iter(curves.values()))[-1][0]
    per_seed = sorted(last + 1 if (x := reach(c, target)) is None else x for c in curves.values())
    show = lambda x: f">{last}" if x is None or x > last else f"{x:.0f}"
    hits = sum(x <= last for x in per_seed)
    return f"{show(reach(mean_curve(curves), target))}; {show(statistics.median_low(per_seed))} ({show(per_seed[0])} to {show(per_seed[-1])}), {hits}/{len(per_seed)}"


def rate(lr, grid):
    return f"{lr:g}" + (" (edge)" if len(grid) > 1 and lr in (grid[0], grid[-1]) else "")


def results(curves):
    """The columns best, final and KL of a table of RL arms."""
    final = [c[-1] for c in curves.values()]
    return [spread([max(p[1] for p in c) for c in curves.values()]), spread([p[1] for p in final]), spread([p[2] for p in final], 3)]


def reward_model_table(study, chosen, metrics):
    columns, rows = ("pair_accuracy", "error_auc", "first_error_hit"), []
    for r, found in metrics.items():
        rows.append([REWARDS[r], rate(chosen[r], study.plan.rm_lrs), len(found), *(spread([m[c] for m in found]) for c in columns)])
    jobs = [study.job("untrained", s) for s in range(study.plan.seeds)]
    starts = [r for job in jobs if (r := study.result(job))]
    for key, label in (("untrained-mean", "untrained: random head, mean of tokens (Q-RM, step PRM)"), ("untrained-last", "untrained: random head, last token (ORM)"),
                       ("sft-mean", "untrained: the policy's own log pi (DPO-RM's start is 0 everywhere)")):  # fmt: skip
        rows.append([label, "", len(starts), *(spread([s[key][c] for s in starts]) for c in columns)])
    flat = [m for found in metrics.values() for m in found]
    if flat:
        rows.append(["length: the shorter answer", "", len(flat), spread([m["length_baseline"] for m in flat]), "", ""])
    n = f"{flat[0]['n_pairs']} or so" if flat else "no"
    text = (f"One training run per seed, each on its own SFT policy's pairs; {n} test pairs a seed. Learning rate: {len(study.plan.rm_lrs)} values per "
            "kind on seed 0, chosen on the validation half of the held-out pairs; the rows are the test half. AUC: Z at the first wrong token "
            "below Z at a token before it (.5 is blind). Hit: the largest drop of Z is at the first wrong token. The step PRM learns from exact "
            "step labels, the others from pairs only. Mean (lowest to highest seed).")  # fmt: skip
    return {"title": "1. Reward models", "text": text, "rows": [["reward", "lr", "seeds", "pair accuracy", "error AUC", "drop hit"], *rows]}


def rl_tables(study, chosen, curves):
    """Part 0 (the oracles) and part 2 (every reward), each algorithm on its own."""
    tables = []
    for number, title, base, arms in (("0", "The ceiling: exact token rewards against the exact outcome", "outcome", GRADED),
                                      ("2", "Algorithms and rewards", "orm", tuple(REWARDS))):  # fmt: skip
        rows = []
        for a in ALGORITHMS:
            target = max((y for _, y in mean_curve(curves[a, base])), default=None) if curves.get((a, base)) else None
            for r in arms:
                if not curves.get((a, r)):
                    rows.append([ALGORITHMS[a], REWARDS[r], *["not run"] * 6])
                    continue
                c = curves[a, r]
                goal = "" if target is None else f"{target:.2f}: {reached(c, target)}"
                rows.append([ALGORITHMS[a], REWARDS[r], rate(chosen[a, r], study.plan.rl_lrs), len(c), *results(c), goal])
        text = (f"Greedy pass@1 on {study.plan.changes['ppo']['limit']} held-out prompts. Learning rate: {len(study.plan.rl_lrs)} values per arm on seed 0, by final pass@1 "
                f"on other held-out prompts; then one run per seed at that rate (seed 0 is the run that was chosen). KL k1 with coefficient "
                f"{train.ARITH['ppo']['kl_coef']} in every arm. Not tuned: critic, epochs, clip, minibatch, gamma 1, lambda. 'To reach': sampled trajectories until "
                f"the best mean pass@1 of the {REWARDS[base]} arm of the same algorithm: of the mean curve; then of the seeds the median "
                "(lowest to highest) and how many of them reach it.")  # fmt: skip
        tables.append({"title": f"{number}. {title}", "text": text,
                       "rows": [["algorithm", "reward", "lr", "seeds", "best pass@1", "final pass@1", "final KL", "trajectories to reach"], *rows]})  # fmt: skip
    return tables


def disputed_table(study, curves, arms):
    rows = []
    for a in ALGORITHMS:
        if base := {s: c for s, c in arms.get((a, "qrm"), {}).items() if s < study.plan.few}:
            rows.append([f"{ALGORITHMS[a]}, as in part 2", len(base), *results(base), ""])
        for label, (algorithm, _) in DISPUTED.items():
            if algorithm == a:
                found = curves[label]
                change = [c[-1][1] - base[s][-1][1] for s, c in found.items() if s in base]
                rows.append([label, len(found), *(results(found) if found else ["not run"] * 3), spread(change)])
    text = ("Q-RM; each row changes one choice of part 2 (mean and std, baseline weight 1, stop token as it is, KL k1 with coefficient "
            f"{train.ARITH['ppo']['kl_coef']}) and keeps its learning rate, which was tuned for the unchanged row only. Change: final pass@1 against the unchanged row, "
            "seed by seed. The control gives every token its answer's mean score, compared within groups of 8 answers to one prompt (GRPO). Not "
            "studied: Z as the LM's logit, which train.py does not have.")  # fmt: skip
    return {"title": "3. Disputed choices", "text": text, "rows": [["choice", "seeds", "best pass@1", "final pass@1", "final KL", "change"], *rows]}


def theory_table(seeds, updates):
    rows = []
    for margin in (0.0, 2.0):
        found = [theory(seed, margin, updates=updates) for seed in range(seeds)]
        rows.append([f"{margin:g}", *(spread([f[k] for f in found], d) for k, d in
                     (("returns_error", 3), ("advantage_error", 3), ("return_corr", 3), ("q_corr", 2), ("advantage_corr", 2), ("within_state_corr", 2)))])  # fmt: skip
    text = (f"4 tokens, 3 actions, all 81 answers, exact preferences, Z a free table fitted with beta 0.2; {seeds} random reward tables. Without margin the loss "
            "recovers every return (up to one constant), and Z backed up by the soft Bellman equation gives the exact advantage. Z itself is "
            "Q* or A* only up to a shift per state, and not exactly even then: Prop. 3.4 holds for the Z* it is stated for, not for every Z that "
            "minimises the loss. The margin stretches the returns, and hardly changes the order within a state.")  # fmt: skip
    head = ["margin", "max error of returns", "max error of backed-up advantage", "corr(returns)", "corr(Z, Q*)", "corr(Z, A*)", "the same, centred in each state"]
    return {"title": "4. The theory, checked", "text": text, "rows": [head, *rows]}


def markdown(table):
    head, *rows = [[str(cell) for cell in row] for row in table["rows"]]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([f"## {table['title']}", "", table["text"], "", *lines, ""])


def draw(path, arms, disputed):
    """Curves with the spread over seeds: one panel an algorithm, one for the disputed choices."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.5), sharey=True)
    panels = [(ALGORITHMS[a], {REWARDS[r]: c for (b, r), c in arms.items() if b == a}) for a in ALGORITHMS]
    panels.append(("Q-RM, disputed choices (means)", disputed))
    for axis, (title, lines) in zip(axes, panels):
        for i, (label, curves) in enumerate((label, curves) for label, curves in lines.items() if curves):
            x, y = zip(*mean_curve(curves))
            n = len(curves)
            axis.plot(x, y, label=f"{label} ({n} seed{'s' * (n > 1)})", color=f"C{i}", linestyle="--" if "oracle" in label else "-")
            if lines is not disputed:
                points = list(zip(*curves.values()))
                axis.fill_between(x, [min(q[1] for q in p) for p in points], [max(q[1] for q in p) for p in points], color=f"C{i}", alpha=0.12)
        axis.set(title=title, xlabel="trajectories")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("greedy pass@1, held-out prompts")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ main


def write_results(study, tables, arms, disputed):
    minutes = sum(r["seconds"] for r in study.done.values()) / 60
    starts = [r["result"]["pass@1"] for r in study.done.values() if r["job"]["kind"] == "policy"]
    head = f"{len(study.done)} runs, {minutes:.0f} core-minutes; {len(study.missing)} not run. SFT policy: pass@1 {spread(starts)}, {len(starts)} seeds."
    text = "\n".join(["# The study", "", head, "", *map(markdown, tables)])
    (study.out / "study.md").write_text(text, encoding="utf-8")
    curves = {f"{a} {r}": c for (a, r), c in arms.items()} | disputed
    report = {"plan": dataclasses.asdict(study.plan), "tables": tables, "curves": curves, "missing": study.missing}
    (study.out / "study.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    draw(study.out / "study.png", arms, disputed)
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40, help="no run is started after so many minutes; call again to go on")
    parser.add_argument("--seeds", type=int, default=FULL.seeds)
    parser.add_argument("--out", default="runs/study")
    parser.add_argument("--quick", action="store_true", help="every path with tiny settings: a test, not a result")
    args = parser.parse_args(argv)
    plan = QUICK if args.quick else dataclasses.replace(FULL, seeds=args.seeds, few=min(FULL.few, args.seeds))
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        study = Study(args.out, plan, args.minutes, pool)
        starts = part_policies(study)
        part_rl(study, starts, {}, [(a, r) for a in ALGORITHMS for r in GRADED])
        rm_lrs, metrics = part_reward_models(study, starts)
        rl_lrs, arms = part_rl(study, starts, rm_lrs, [(a, r) for r in REWARDS for a in ALGORITHMS])
        disputed = part_disputed(study, starts, rm_lrs, rl_lrs)
    ceiling, rl = rl_tables(study, rl_lrs, arms)
    tables = [ceiling, reward_model_table(study, rm_lrs, metrics), rl, disputed_table(study, disputed, arms), theory_table(plan.few, plan.theory_steps)]
    print(write_results(study, tables, arms, disputed))
    for job in study.missing:
        print(f"not run: {json.dumps(job)}")
    print(f"{study.out}/study.md, study.json, study.png" + (f"; {len(study.missing)} runs missing: call again to go on" if study.missing else ""))


if __name__ == "__main__":
    main()
