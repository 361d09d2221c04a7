"""OpenAI's graded GSM8K solutions: rows, folds by question, pairs, and what is counted on them."""

import hashlib
import json
import re
from collections import Counter

import numpy as np

from support.files import require

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the model's default
SAMPLERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
FOLDS = 5

# ---------------------------------------------------------------------------------------- questions and folds


def stable_number(text):
    """A number that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def fold_of(question):
    """The fold of a question, from its letters and digits only, so that two spellings of it share a fold."""
    return stable_number(re.sub(r"[^a-z0-9]", "", question.lower())) % FOLDS


def read_lines(path):
    require(path.exists(), f"{path}: no such file; see the head of classroom/real.py for where it comes from")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_solutions(data):
    """OpenAI's rows -> list of {"line", "question", "truth", "answers": 4 texts, "correct": 4 bools}.

    Questions with right and wrong answers come first, since the others make no pairs; within both groups a
    hash decides the order, so that any number of questions from the start is a random sample.
    """
    rows = []
    for line, raw in enumerate(read_lines(data / "example_model_solutions.jsonl"), 1):
        row = {"line": line, "question": raw["question"], "truth": raw["ground_truth"]}
        row["answers"] = [raw[name]["solution"] for name in SAMPLERS]
        row["correct"] = [bool(raw[name]["is_correct"]) for name in SAMPLERS]
        rows.append(row)
    return sorted(rows, key=lambda row: (len(set(row["correct"])) == 1, stable_number(row["question"])))


def right_solutions(row):
    """The reference solution of a question and those of the four answers that are right."""
    return [row["truth"], *(a for a, right in zip(row["answers"], row["correct"]) if right)]


def mixed_pairs(questions, correct):
    """All (right, wrong) pairs of answers to one question: (A,), (A,) bool -> (P, 2) int64 answer numbers"""
    pairs = []
    for question in np.unique(questions):
        places = np.flatnonzero(questions == question)
        right = places[correct[places]]
        wrong = places[~correct[places]]
        pairs += [(r, w) for r in right for w in wrong]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def read_pairs(data):
    """The authors' test pairs -> list of (question, [chosen, rejected]), in an order that a hash decides."""
    rows = read_lines(data / "pairs_test.jsonl")
    rows.sort(key=lambda row: stable_number(row["instruction"] + row["chosen"] + row["rejected"]))
    return [(row["instruction"], [row["chosen"], row["rejected"]]) for row in rows]


def prompt_ids(tokenizer, question):
    """The question in the model's chat template with its default system message."""
    return tokenizer.encode_prompt(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    )


# ------------------------------------------------------------------------------------------------- statistics


def clustered_interval(values, clusters, weights=None, draws=2000, seed=0):
    """95 % bootstrap interval of the (weighted) mean of `values`, resampling whole clusters (questions)."""
    _, place = np.unique(clusters, return_inverse=True)
    weights = np.ones(len(values)) if weights is None else weights
    sums, counts = np.bincount(place, weights * np.asarray(values)), np.bincount(place, weights)
    picks = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def clustered_gap(ours, others, draws=2000, seed=0):
    """The difference of two means with its 95 % interval, as a text: lists of (value, cluster)

    Clusters are drawn with replacement, each with its values of both lists.
    """
    names, place = np.unique([name for _, name in [*ours, *others]], return_inverse=True)
    values = np.array([value for value, _ in [*ours, *others]])
    is_ours = np.arange(len(values)) < len(ours)
    picks = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means, drawn = [], []
    for side in (is_ours, ~is_ours):
        sums, counts = np.bincount(place, values * side), np.bincount(place, side)
        means.append(sums.sum() / counts.sum())
        drawn.append(sums[picks].sum(1) / counts[picks].sum(1))
    low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
    return f"{means[0] - means[1]:.3f} ({low:.3f} to {high:.3f})"


def wins(above, below):
    """1 where `above` is larger, .5 where both are equal, else 0."""
    return (above > below) + 0.5 * (above == below)


def best_of(scores, correct):
    """Chance that the highest-scored candidate is right, ties shared: (Q, k), (Q, k) bool -> (Q,)"""
    top = scores == scores.max(1, keepdims=True)
    return (top & correct).sum(1) / top.sum(1)


def votes(claims, weights=None):
    """The votes for each candidate's claim: summed weights of all candidates with that claim; None gets 0.

    claims (Q lists of k values), weights (Q, k) or None for one vote each -> (Q, k)
    """
    out = np.zeros((len(claims), len(claims[0])))
    for q, row in enumerate(claims):
        for i, claim in enumerate(row):
            same = [j for j, other in enumerate(row) if claim is not None and other == claim]
            out[q, i] = len(same) if weights is None else weights[q, same].sum()
    return out


def balanced_weights(winners, losers):
    """Weights of pairs, from who wrote the right and the wrong answer, (P,) each -> (P,), of sum 1.

    For any two authors, pairs that one wins weigh as much in sum as those that the other one wins, so that
    knowing the author says nothing; two authors of whom one never wins against the other weigh nothing.
    """
    keys = list(zip(winners.tolist(), losers.tolist()))
    counts = Counter(keys)
    weights = np.array([1 / counts[key] if key[::-1] in counts else 0.0 for key in keys])
    return weights / weights.sum()


def describe(values, clusters, weights=None):
    """'.612 (.590 to .634)', the mean and its clustered interval"""
    low, high = clustered_interval(values, clusters, weights)
    return f"{np.average(values, weights=weights):.3f} ({low:.3f} to {high:.3f})"
