"""Answers that a file gives, compared: one of several chosen by a reward, and pairs decided by a judge."""

from typing import NamedTuple

import numpy as np
import torch

from data import Example, encode_prompts, note_seams, sequence_length
from parallel import say
from support.evaluate import all_ranks, clustered_interval, flat, means_of, score_examples
from support.files import at_line, require
from support.graders import extract_answer, grade
from support.judge import compare, fill, text_of
from support.loading import (
    first_keys,
    holds_reward_model,
    load_judge,
    load_ranker,
    load_tokenizer,
    log_to,
    read_rows,
    say_first,
)
from support.meanings import MAX_CHARS, meaning

# -------------------------------------------------------------------------------- one of several


class Candidates(NamedTuple):
    """The answers that a row gives to its prompt."""

    prompt: str
    subset: str  # "" where the row names none
    correct: list  # of bool
    claims: list  # meaning of each answer's final result; None: it claims nothing
    lengths: list  # tokens
    totals: list  # reward of each answer


def eval_candidates(directory, cfg, grid):
    """Share of prompts of which the chosen one of the given answers is right, for several ways to choose.

    best_of_n       the highest reward; the reward is a reward model's or, with --reward judge, a judge's
    weighted_vote   the final result with the largest sum of sigmoid(reward), standardised over all answers
    majority        the final result that most answers have
    shortest        the answer with the fewest tokens
    random, oracle  any answer; a right one wherever there is one
    n_claims        how many answers have a final result that --task reads; the others have no vote
    <way>_95        95 % interval by a bootstrap over prompts; by_subset where rows have a subset
    Answers that are equal in the number they are chosen by share the choice.
    """
    ranker = cfg.reward_model or directory
    require(
        cfg.reward == "judge" or holds_reward_model(ranker),
        f"{ranker}: is no reward model, and {cfg.data} has responses to be ranked;"
        " expected --reward_model, or --reward judge",
    )
    tokenizer = load_tokenizer(ranker, cfg)
    label = () if "labels" in first_keys(cfg.data, cfg) else ("label",)
    rows = read_rows(cfg.data, ("prompt", "responses", *label), cfg, grid, cfg.limit)
    rows, examples = encode_candidates(rows, tokenizer, cfg, log_to(grid))
    say_first(tokenizer, rows[0], (examples[0][0],), cfg.data, grid)
    reward = load_ranker(ranker, tokenizer, rows, cfg, grid)
    rows, examples = rows[grid.dp_rank :: grid.dp_size], examples[grid.dp_rank :: grid.dp_size]
    scores = iter(score_examples(reward.rewards, flat(examples), cfg, grid))
    found = []
    for row, answers in zip(rows, examples):
        own = [next(scores) for _ in answers]
        correct, claims = grade_candidates(row, cfg)
        candidates = Candidates(
            prompt=str(row["prompt"]),
            subset=str(row["raw"].get("subset", "")),
            correct=correct,
            claims=claims,
            lengths=[len(rewards) for rewards in own],
            totals=[reward.total(rewards) for rewards in own],
        )
        found.append((row["line"], candidates))
    result = shares_right([candidates for _, candidates in all_ranks(found, grid)])
    silent = result["n_answers"] - result["n_claims"]
    if silent:
        says = f"{silent} of {result['n_answers']} answers claim nothing that --task {cfg.task} reads"
        say(grid, f"{cfg.data}: note: {says}: they have no vote")
    return result


def encode_candidates(rows, tokenizer, cfg, log):
    """-> rows, and a list of Example for each; rows with too long an answer are dropped and counted"""
    kept, kept_rows = [], []
    note_seams([(row["prompt"], x) for row in rows for x in row["responses"]], tokenizer, cfg.data, log)
    for row, prompt_ids in zip(rows, encode_prompts(rows, tokenizer, cfg.data, log)):
        with at_line(cfg.data, row["line"]):
            examples = [Example(prompt_ids, tokenizer.encode_response(text)) for text in row["responses"]]
        if max(map(sequence_length, examples)) <= cfg.max_seq_len:
            kept.append(examples)
            kept_rows.append(row)
    dropped = f"{cfg.data}: {len(rows)} rows; dropped {len(rows) - len(kept)} with an answer longer than"
    require(kept, f"{dropped} --max_seq_len {cfg.max_seq_len} tokens; none is left")
    if len(kept) < len(rows):
        log(f"{dropped} --max_seq_len {cfg.max_seq_len} tokens; {len(kept)} left")
    return kept_rows, kept


def grade_candidates(row, cfg):
    """-> whether each response of a row is right, by its own labels or by its label; what each one claims"""
    correct, claims = [], []
    for i, text in enumerate(row["responses"]):
        claim = extract_answer(text, cfg.task, cfg.grader)
        claims.append(None if claim is None else meaning(claim[:MAX_CHARS]))
        if "labels" in row:
            correct.append(row["labels"][i])
        else:
            with at_line(cfg.data, row["line"]):
                require("label" in row, "has no labels, and the first row has; expected them in every row")
            correct.append(grade(text, row["label"], cfg.task, cfg.grader)[1])
    return correct, claims


def votes(claims, weights):
    """The summed weight of all answers with the same claim, for each answer; one without a claim gets 0."""
    sums = {None: 0.0}
    for claim, weight in zip(claims, weights):
        if claim is not None:
            sums[claim] = sums.get(claim, 0.0) + weight
    return [sums[claim] for claim in claims]


def share_right(numbers, correct):
    """Chance that the answer with the highest number is right, equal ones drawn by lot."""
    top = [right for number, right in zip(numbers, correct) if number == max(numbers)]
    return sum(top) / len(top)


def shares_right(rows):
    """The result of eval_candidates: rows is a list of Candidates."""
    totals = np.array(flat(row.totals for row in rows))
    mean, std = totals.mean(), max(totals.std(), 1e-9)
    right = {}  # way -> one share per row
    for row in rows:
        weights = 1 / (1 + np.exp((mean - np.array(row.totals)) / std))
        numbers = {
            "best_of_n": row.totals,
            "weighted_vote": votes(row.claims, weights.tolist()),
            "majority": votes(row.claims, [1.0] * len(row.claims)),
            "shortest": [-length for length in row.lengths],
            "random": [0] * len(row.correct),
            "oracle": row.correct,
        }
        for way, of_way in numbers.items():
            right.setdefault(way, []).append(share_right(of_way, row.correct))
    claims = flat(row.claims for row in rows)
    out = {"n_prompts": len(rows), "n_answers": len(totals)}
    out["n_claims"] = sum(claim is not None for claim in claims)
    for way, shares in right.items():
        out[way] = sum(shares) / len(shares)
        out[f"{way}_95"] = clustered_interval(shares, [row.prompt for row in rows])
    subsets = [row.subset for row in rows]
    if any(subsets):
        out["by_subset"] = {way: means_of(shares, subsets) for way, shares in right.items()}
    return out


# -------------------------------------------------------------------------------- pairs


def eval_judge(directory, cfg, grid):
    """How often a judge prefers `chosen` to `rejected`: its accuracy, or the win rate of an author's answers.

    win_rate        share of pairs with a positive mean log-odds over both orders (ties count half)
    soft_win_rate   mean sigmoid of that number: the judge's own probability, as in AlpacaEval 2.0
    first_wins      share of questions in which the answer shown first wins: .5 is no preference for a place
    order_flips     share of pairs that are decided otherwise in the other order
    shorter         share of pairs whose chosen answer is the shorter one (characters; ties count half)
    """
    judge = load_judge(cfg.reward_model or directory, cfg, grid)
    rows = read_rows(cfg.data, ("prompt", "chosen", "rejected"), cfg, grid, cfg.limit)
    shown = {"prompt": rows[0]["prompt"], "response": rows[0]["chosen"]}
    shown |= {"a": rows[0]["chosen"], "b": rows[0]["rejected"]}
    question = judge.tokenizer.encode_prompt(fill(judge.template, **shown))
    say_first(judge.tokenizer, rows[0], question, cfg.data, grid)
    mine = rows[grid.dp_rank :: grid.dp_size]
    asked = compare(judge, mine) if mine else torch.zeros(0, 2)  # (n, 2)
    found = [(row["line"], both) for row, both in zip(mine, asked.tolist())]
    both = np.array([numbers for _, numbers in all_ranks(found, grid)])  # (n, 2): chosen first, chosen second
    gap = both.mean(1)
    wins = half_for_ties(gap)
    lengths = np.array([[len(text_of(row[name])) for name in ("chosen", "rejected")] for row in rows])
    subsets = [str(row["raw"].get("subset", "")) for row in rows]
    out = {
        "n_pairs": len(rows),
        "win_rate": wins.mean(),
        "win_rate_95": clustered_interval(wins, [str(row["prompt"]) for row in rows]),
        "soft_win_rate": (1 / (1 + np.exp(-gap))).mean(),
        "shorter": half_for_ties(lengths[:, 1] - lengths[:, 0]).mean(),
    }
    if judge.is_pairwise:
        out["first_wins"] = half_for_ties(both * [1, -1]).mean()
        out["order_flips"] = (both[:, 0] * both[:, 1] < 0).mean()
    out = {name: value if isinstance(value, (int, list)) else float(value) for name, value in out.items()}
    if any(subsets):
        out["win_rate_of"] = means_of(wins.tolist(), subsets)
    return out


def half_for_ties(gaps):
    """1 where a number is positive, .5 where it is 0, else 0."""
    return 0.5 * (np.sign(gaps) + 1)
