"""Granularity in tables: one reward read at every token or once per answer, 20 tasks, tuned alike.

    python classroom/tabular.py                                       # right answers rare: five minutes
    python classroom/tabular.py --share 0.2 --batch 64 --steps 100    # plenty of them, large batches

The tasks are those of classroom/limits.py (6 tokens, 3 actions, errors local and final, right answers rare);
a policy is a table of logits, trained by REINFORCE on sampled answers. Reward models are tables too, learned
from 1,000 sampled pairs, whose cost is not counted. So this is the granularity study (classroom/protocol.md)
without networks: nothing generalises, and everything else is the same.

    tokens   A_t = Z_std(s_t, a_t) - c k1 - V(s_t), V the exact mean of Z_std over the policy's actions
    answer   A_t = sum of the rewards from t on, minus the mean over the batch. Rewards: the standardised mean
             Z of the answer at its last token, and - c k1 at each token
    graded   the same with the graded outcome; "critic": outcome minus the exact value of the state instead

Every arm has the grid of learning rates and KL coefficients below, chosen on TUNING tasks by the mean success
rate over the run. The success rate is exact: all answers are enumerated.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from granularity import interval, reach
from limits import learned_scores, tasks, token_scores_of, verifier_pairs_loss
from theory import show

from qrm import qrm_loss
from reinforce import kl_estimates

LRS, KL_COEFS = (0.1, 0.3, 1.0), (0.0, 0.1)
TUNING, TEST = slice(20, 30), slice(0, 20)  # of the solvable tasks
TARGETS = (0.5, 0.7, 0.9)
UPDATES = 100  # of a reward model, each on all pairs
ARMS = {  # {arm: (scores, how they are read)}
    "qrm tokens": ("qrm", "tokens"),
    "qrm answer": ("qrm", "answer"),
    "verifier tokens": ("verifier", "tokens"),
    "verifier answer": ("verifier", "answer"),
    "graded answer": (None, "answer"),
    "graded answer, exact critic": (None, "critic"),
    "exact Q of sft, tokens": ("exact", "tokens"),
}


def reward_tables(task):
    """{name: scores (n, A)}, learned from pairs, and the exact Q of sft"""
    out = {"exact": token_scores_of(task)["exact Q of sft"]}
    for name, loss in (("qrm", qrm_loss), ("verifier", verifier_pairs_loss)):
        out[name] = learned_scores(task, loss, (UPDATES,))[UPDATES]
    return out


def standardized(x):
    return (x - x.mean()) / x.std().clamp(min=1e-6)


def weights_of(task, reading, scores, answers, log_policy, coef):
    """Advantages (B, T) of sampled answers (B,), without gradient."""
    places = task.places[answers]  # (B, T)
    k1, _ = kl_estimates(log_policy.flatten()[places], task.log_sft.flatten()[places])
    if reading == "tokens":
        z = scores.flatten()[places]
        expected = (log_policy.exp() * scores).sum(1)[places // task.A]  # V(s_t)
        return (z - expected) / z.std().clamp(min=1e-6) - coef * k1
    total = task.right[answers] if scores is None else scores.flatten()[places].mean(1)
    rewards = -coef * k1
    if reading == "critic":
        value = (log_policy.exp() * task.q(task.answer_logprobs(log_policy).exp())).sum(1)  # (n,)
        return total[:, None] - value[places // task.A] + to_go(rewards)
    rewards[:, -1] += standardized(total)
    returns = to_go(rewards)
    return returns - returns.mean(0)


def to_go(rewards):
    return rewards.flip(1).cumsum(1).flip(1)


def train(task, tables, arm, lr, coef, batch, steps, seed=0):
    """Success rate before each update and at the end: list of steps + 1 floats."""
    name, reading = ARMS[arm]
    scores = None if name is None else tables[name]
    generator = torch.Generator().manual_seed(seed)
    logits = task.log_sft.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    curve = []
    for _ in range(steps):
        with torch.no_grad():
            log_policy = logits.log_softmax(1)
            probabilities = task.answer_logprobs(log_policy).exp()
            curve.append((probabilities @ task.right).item())
            answers = torch.multinomial(probabilities, batch, replacement=True, generator=generator)
            weights = weights_of(task, reading, scores, answers, log_policy, coef)
        optimizer.zero_grad()
        logprobs = logits.log_softmax(1).flatten()[task.places[answers]]
        (-(weights * logprobs).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        return [*curve, (task.answer_logprobs(logits.log_softmax(1)).exp() @ task.right).item()]


def tune(pool, batch, steps):
    """{arm: (learning rate, KL coefficient)}"""
    chosen = {}
    for arm in ARMS:
        means = {}
        for lr, coef in itertools.product(LRS, KL_COEFS):
            curves = [train(*pair, arm, lr, coef, batch, steps) for pair in pool]
            means[lr, coef] = statistics.fmean(statistics.fmean(curve) for curve in curves)
        chosen[arm] = max(means, key=means.get)
    return chosen


def tables_of_text(curves, chosen, batch):
    """Rows of the results, and of the differences to "qrm tokens", paired by task."""
    end = batch * (len(curves["qrm tokens"][0]) - 1)
    times = {}
    for arm, by_task in curves.items():
        points = [[[batch * i, rate] for i, rate in enumerate(curve)] for curve in by_task]
        times[arm] = {t: [reach(p, t) if reach(p, t) is not None else end for p in points] for t in TARGETS}
    head = ["final", "mean", *(f"to {t}" for t in TARGETS)]
    results, paired = [["arm", "lr, kl", *head]], [["minus qrm tokens", *head]]
    base = curves["qrm tokens"]
    for arm, by_task in curves.items():
        cells = [interval([c[-1] for c in by_task]), interval([statistics.fmean(c) for c in by_task])]
        for t in TARGETS:
            reached = sum(max(curve) >= t for curve in by_task)
            median = statistics.median(times[arm][t])
            cells.append(f"{interval(times[arm][t], 0)}, median {median:.0f}, {reached}/{len(by_task)}")
        results.append([arm, "{:g}, {:g}".format(*chosen[arm]), *cells])
        pairs = list(zip(by_task, base))
        cells = [interval([a[-1] - b[-1] for a, b in pairs])]
        cells.append(interval([statistics.fmean(a) - statistics.fmean(b) for a, b in pairs]))
        for t in TARGETS:
            cells.append(interval([a - b for a, b in zip(times[arm][t], times["qrm tokens"][t])], 0))
        paired.append([arm, *cells])
    return results, paired


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=0.05, help="right answers under uniform play, about")
    parser.add_argument("--batch", type=int, default=8, help="trajectories an update")
    parser.add_argument("--steps", type=int, default=200, help="updates")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pool = [(task, reward_tables(task)) for task in tasks(6, TUNING.stop, share=args.share)]
    chosen = tune(pool[TUNING], args.batch, args.steps)
    print(json.dumps(chosen))
    curves = {}
    for arm in ARMS:
        settings = (*chosen[arm], args.batch, args.steps)
        curves[arm] = [train(*pair, arm, *settings, seed=1) for pair in pool[TEST]]
    results, paired = tables_of_text(curves, chosen, args.batch)
    show(f"Success rate and trajectories, {len(pool[TEST])} tasks, mean [95 % interval]", results)
    show("Differences, paired by task", paired)


if __name__ == "__main__":
    main()
