"""Three probes of the demo: larger reward models, many samples per prompt, and shaped rewards.

    python classroom/probes.py runs/seed0 runs/seed1 ... [--parts sizes samples shaping] [--out runs/probes]

Each RUN_DIR holds a demo and its baselines, as `make results` leaves them; it is only read. Every step is a
command of train.py whose result stays in <out>; a second call makes what is missing and prints the tables.
The protocol, written before the runs, is in classroom/protocol.md.

    sizes     Q-RM in three widths on the same pairs, the same policy and critic: PPO with each
    samples   pass@1 to pass@64 of sampled answers, before and after RL
    shaping   PPO on Z + Phi(s') - Phi(s), which has the same loss as Z
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from credit import corr, held_out
from demo_table import mean_and_range
from granularity import call, markdown, read_rows
from guided import moments
from study import reach

import train
from model import LanguageModel, build_model, init_weights, save_model
from parallel import Grid
from qrm import last_token_mask
from support.settings import ARITH
from support.tokenizers import Tokenizer

WIDTHS = (32, 64, 128)  # of the reward model; the policy and the critic have 64
POLICIES = {
    "sft": "SFT",
    "ppo": "PPO, Q-RM",
    "ppo-orm": "PPO, outcome model",
    "ppo-outcome": "PPO, graded",
}
K, PROMPTS = 64, 200  # samples of each held-out prompt
READINGS = {"tokens": {}, "summed": {"advantage": "gae", "lam": 1.0, "gamma": 1.0}}
TARGETS = (0.5, 0.7)


def once(made, stage, **flags):
    """train.py --stage ..., unless its result exists."""
    if not made.exists():
        began = time.process_time()
        call(stage, **flags)
        print(f"{time.process_time() - began:6.1f} s  {made}", flush=True)


def result(path):
    return json.loads(path.read_text(encoding="utf-8"))


def inputs_of(run, stage):
    """{"data", "seed" and, where it has one, "heldout"} of a stage of a run, found in the run's directory."""
    config = result(run / stage / "run.json")["config"]
    paths = {name: config[name] for name in ("data", "heldout") if config[name]}
    here = {name: run / Path(path).relative_to(config["run_dir"]) for name, path in paths.items()}
    return here | {"seed": config["seed"]}


def ppo_curve(run, out, reward_of_run, **flags):
    """[[trajectories, greedy pass@1], ...] of PPO with the demo's settings, whatever reward it is given."""
    given = inputs_of(run, "ppo") | {"model": run / "sft", "reward_model": run / "rm"}
    with mock.patch.object(train, "reward_of_run", reward_of_run):
        once(out, "ppo", out=out, **given, **flags)
    return [[row["trajectories"], row["pass@1"]] for row in read_rows(out / "metrics.jsonl")]


# ------------------------------------------------------------------------------------------------ sizes


def base_of(run, out, width):
    """An SFT policy as wide as the reward model that starts from it, on the answers that the policy had."""
    start, base = out / f"start-{width}", out / f"sft-{width}"
    given = inputs_of(run, "sft")
    if not start.exists():
        tokenizer = Tokenizer.load(run / "sft")
        shape = train.arith_shape(tokenizer)
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        scaled = {name: getattr(shape, name) * width // 64 for name in names}
        policy = build_model(LanguageModel, dataclasses.replace(shape, **scaled), Grid())
        start.mkdir(parents=True)
        tokenizer.save(start)
        save_model(init_weights(policy, given["seed"]), start)
    once(base, "sft", model=start, out=base, lr=lr_of("sft", width), **given)
    return base


def lr_of(stage, width):
    """The demo's learning rate at its width, 64, and in inverse proportion to the width elsewhere."""
    return ARITH[stage]["lr"] * 64 / width


def reward_model_of(run, out, width):
    """-> directory of Q-RM in a width (64: the demo's own), its accuracy on the held-out pairs"""
    path = run / "rm"
    if width != 64:
        path = out / f"rm-{width}"
        given = {"data": run / "pairs.jsonl", "seed": inputs_of(run, "rm")["seed"]}
        once(path, "rm", model=base_of(run, out, width), out=path, lr=lr_of("rm", width), **given)
    measured = out / f"accuracy-{width}"
    once(measured / "eval.json", "eval", model=path, data=run / "pairs-heldout.jsonl", out=measured, limit=0)
    return path, result(measured / "eval.json")["pair_accuracy"]


def with_model(path):
    """train.py's reward_of_run for another reward model than the one that the critic starts from."""
    original = train.reward_of_run

    def reward_of_run(cfg, tokenizer, rows, grid):
        return original(dataclasses.replace(cfg, reward_model=str(path)), tokenizer, rows, grid)

    return reward_of_run


def sizes(runs, out):
    found = {width: [] for width in WIDTHS}  # [(pair accuracy, curve), ...], one a run
    for run in runs:
        home = out / run.name
        for width in WIDTHS:
            path, accuracy = reward_model_of(run, home, width)
            where = run / "ppo" if width == 64 else home / f"ppo-{width}"
            found[width].append((accuracy, ppo_curve(run, where, with_model(path))))
    rows = [["width of the reward model", "seeds", "pair accuracy", *CURVE_COLUMNS]]
    for width, results in found.items():
        accuracies, curves = zip(*results)
        cells = [str(width), str(len(runs)), mean_and_range(accuracies, 3)]
        rows.append(cells + curve_cells(curves, [curve for _, curve in found[64]]))
    print(markdown(rows))
    points = [["run: pair accuracy, final pass@1", *map(str, WIDTHS)]]
    accuracies, finals = [], []
    for run, of_run in zip(runs, zip(*found.values())):
        ends = [(accuracy, curve[-1][1]) for accuracy, curve in of_run]
        points.append([run.name, *(f"{accuracy:.3f}, {final:.2f}" for accuracy, final in ends)])
        accuracies += centred([accuracy for accuracy, _ in ends])
        finals += centred([final for _, final in ends])
    print("\n" + markdown(points))
    print(f"\ncorrelation of accuracy and final pass@1 within seeds: {corr(accuracies, finals):.2f}")


def centred(numbers):
    return [x - statistics.fmean(numbers) for x in numbers]


# ------------------------------------------------------------------------------------------------ samples


def samples(runs, out):
    found = {}  # {policy: {column: [share, one a run]}}
    for name in POLICIES:
        results = [sampled(run, out / run.name / f"samples-{name}", name) for run in runs]
        found[name] = {"greedy": [r["pass@1"] for r in results]}
        for k in results[0]["pass@k"]:
            found[name][f"pass@{k}"] = [r["pass@k"][k] for r in results]
    rows = [["policy", *found["sft"]]]
    for name, columns in found.items():
        rows.append([POLICIES[name], *(mean_and_range(shares, 3) for shares in columns.values())])
    for name, columns in list(found.items())[1:]:
        pairs = zip(columns.values(), found["sft"].values())
        rows.append([f"{POLICIES[name]}, minus SFT", *(difference(*pair, 3) for pair in pairs)])
    print(markdown(rows))


def sampled(run, path, name):
    """eval.json of a policy of a run, with K samples of each prompt."""
    given = {"data": inputs_of(run, "ppo")["heldout"], "limit": PROMPTS, "k": K, "seed": 1}
    once(path / "eval.json", "eval", model=run / name, out=path, **given)
    return result(path / "eval.json")


# ------------------------------------------------------------------------------------------------ shaping


def shaping(ids, response_mask, potential):
    """Phi(s_{t+1}) - Phi(s_t), (B, T), 0 outside the mask; each answer's sum is 0, and so is its mean.

    ids (B, T+1), response_mask (B, T)
    potential   (longest answer + 1, V): Phi by the number of response tokens so far and the last of them; it
                is 0 before the first and after the last one
    """
    within = response_mask & ~last_token_mask(response_mask)
    after = potential[response_mask.cumsum(1), ids[:, 1:]] * within  # (B, T)
    return (after - F.pad(after, (1, 0))[:, :-1]) * response_mask


def shaped(run, scale):
    """train.py's reward_of_run plus the shaping of a random potential, its std `scale` times that of Z."""
    original = train.reward_of_run

    def reward_of_run(cfg, tokenizer, rows, grid):
        reward = original(cfg, tokenizer, rows, grid)
        pairs = held_out(run, tokenizer, 200)
        examples = [pair[key] for pair in pairs for key in ("chosen", "rejected")]
        _, std = moments(reward.rewards, examples, cfg)
        generator = torch.Generator().manual_seed(cfg.seed)
        potential = torch.randn(cfg.max_new_tokens + 1, tokenizer.vocab_size, generator=generator)
        potential *= scale * std / 2**0.5  # a difference of two has std scale * std

        def rewards(ids, response_mask):
            return reward.rewards(ids, response_mask) + shaping(ids, response_mask, potential)

        return dataclasses.replace(reward, rewards=rewards)

    return reward_of_run


def shaping_table(runs, out):
    found = {}  # {(reading, scale): [curve, ...]}
    for run in runs:
        for reading, flags in READINGS.items():
            for scale in (0, 1):
                where = out / run.name / f"shaped-{reading}-{scale}"
                if reading == "tokens" and scale == 0:
                    where = run / "ppo"
                curve = ppo_curve(run, where, shaped(run, scale), **flags)
                found.setdefault((reading, scale), []).append(curve)
    rows = [["rewards", "shaping's std / Z's", "seeds", *CURVE_COLUMNS]]
    for (reading, scale), curves in found.items():
        cells = curve_cells(curves, found[reading, 0])
        rows.append([reading, str(scale), str(len(runs)), *cells])
    print(markdown(rows))


# ------------------------------------------------------------------------------------------------ tables

CURVE_COLUMNS = ["final pass@1", "mean over the run", "final, difference", *(f"to {t}" for t in TARGETS)]


def difference(numbers, base, digits=2):
    """Mean and range over the seeds of a paired difference."""
    return mean_and_range([a - b for a, b in zip(numbers, base)], digits)


def curve_cells(curves, base):
    """Cells of CURVE_COLUMNS, mean and range over the seeds; the difference is to `base`, seed by seed.

    A target that is never reached counts as the whole run; then how many seeds reach it.
    """
    finals = [curve[-1][1] for curve in curves]
    means = [statistics.fmean(passed for _, passed in curve) for curve in curves]
    cells = [mean_and_range(finals), mean_and_range(means)]
    cells.append("" if list(curves) == base else difference(finals, [curve[-1][1] for curve in base]))
    for target in TARGETS:
        times = [reach(curve, target) for curve in curves]
        hits = sum(time is not None for time in times)
        counted = [curve[-1][0] if time is None else time for time, curve in zip(times, curves)]
        cells.append(f"{mean_and_range(counted, 0)}, {hits}/{len(times)}")
    return cells


PARTS = {"samples": samples, "sizes": sizes, "shaping": shaping_table}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/probes"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for part in args.parts:
        print(f"\n{part}")
        PARTS[part](args.runs, args.out)


if __name__ == "__main__":
    main()
