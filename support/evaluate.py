"""Answers sampled, graded and measured: pairs, pass@k, the eval of policies and reward models; rows out."""

import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from data import (
    Example,
    arith_solve,
    collate,
    encode,
    encode_prompts,
    error_places,
    first_error,
    load_rows,
    sequence_length,
    spans,
    stable_hash,
)
from model import LanguageModel, ScalarModel
from parallel import Grid, all_sum, say
from qrm import credit_counts, response_scores
from reinforce import standardize
from support.files import at_line, require, write_atomically
from support.graders import extract_answer, grade
from support.loading import (
    load,
    load_ranker,
    load_reward,
    load_tokenizer,
    log_to,
    printable,
    read_rows,
    reward_name,
    say_first,
)
from support.meanings import MAX_CHARS, meaning
from support.rewards import answer_text
from support.row_keys import is_empty
from support.sampling import generate
from support.settings import out_path

# -------------------------------------------------------------------------------- answers


class Answer(NamedTuple):
    """One sampled answer."""

    text: str  # without the stop token
    ids: list  # with it, unless the answer is truncated
    correct: bool  # never if it is truncated: "12" may have been cut to "1"
    truncated: bool  # no stop token within max_new_tokens


def sample_graded(policy, tokenizer, rows, cfg, seed, temperature, k):
    """k answers to each row's prompt, graded -> one list of k Answers per row

    An answer depends on its prompt and (seed, line of the row, 0 .. k - 1), and on no rank. The callers have
    had encode_prompts refuse what cannot be read: of all rows, where these may be a few of them.
    """
    prompts = [tokenizer.encode_prompt(row["prompt"]) for row in rows for _ in range(k)]
    numbers = [row["line"] * k + i for row in rows for i in range(k)]
    stop_ids = tokenizer.stop_ids
    responses, truncated = generate(
        policy, prompts, cfg.max_new_tokens, stop_ids, temperature, seed, numbers, graphs=cfg.graphs
    )
    answers = []
    for i, (ids, cut) in enumerate(zip(responses, truncated)):
        text = answer_text(tokenizer, ids)
        correct = not cut and grade(text, rows[i // k]["label"], cfg.task, cfg.grader)[1]
        answers.append(Answer(text, ids, correct, cut))
    return [answers[i : i + k] for i in range(0, len(answers), k)]


def count_right(answers):
    """How many Answers are correct."""
    return sum(answer.correct for answer in answers)


def count_graded(samples, cfg):
    """Lists of Answers -> how many are correct, have ended, and, of these, claim nothing that is read."""
    answers = flat(samples)
    ended = [answer for answer in answers if not answer.truncated]
    claims = [answer.correct or extract_answer(answer.text, cfg.task, cfg.grader) for answer in ended]
    silent = sum(claim is None for claim in claims)
    return {"correct": count_right(answers), "ended": len(ended), "silent": silent}


def sum_graded(counts, cfg, grid):
    """The counts over all ranks; a note if some of what ended is silent: another --task or wording?"""
    counts = all_sum(counts, grid)
    if counts["silent"]:
        silent = f"{counts['silent']:.0f} of {counts['ended']:.0f} sampled answers that end"
        say(grid, f"note: {silent} claim nothing that --task {cfg.task} reads: they count as wrong")
    return counts


def greedy_pass(policy, tokenizer, rows, cfg, grid):
    """Share of rows whose greedy answer is right, over all dp ranks."""
    mine = rows[grid.dp_rank :: grid.dp_size]
    right = sum(count_right(answers) for answers in sample_graded(policy, tokenizer, mine, cfg, 0, 0.0, 1))
    return all_sum({"right": right}, grid)["right"] / len(rows)


def make_pairs(row, answers, most, tokenizer):
    """Right answers paired with wrong ones of the same prompt; each pair once, the shorter list repeated.

    Beside its texts a pair holds the ids that were sampled, which data.encode uses. Truncated answers are
    left out: as text they would look complete.
    """
    right, wrong = {}, {}
    for answer in answers:
        side = right if answer.correct else wrong
        if not answer.truncated and answer.text.strip():
            side.setdefault(answer.text, answer)
    if not right or not wrong:
        return []
    right, wrong = list(right.values()), list(wrong.values())
    pairs = []
    for i in range(min(max(len(right), len(wrong)), most)):
        chosen, rejected = right[i % len(right)], wrong[i % len(wrong)]
        texts = {
            "prompt": row["prompt"],
            "chosen": chosen.text,
            "rejected": rejected.text,
            "label": row["label"],
        }
        ids = {
            "prompt_ids": tokenizer.encode_prompt(row["prompt"]),
            "chosen_ids": chosen.ids,
            "rejected_ids": rejected.ids,
            "tokenizer": tokenizer.fingerprint,
        }
        pairs.append(texts | ids)
    return pairs


def pass_at_k(n, correct, k):
    """P(at least one of k of these n answers is right) = 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_is_right(answers, cfg):
    """Whether the most frequent claim among the answers is right (maj@k).

    Equal values are one claim; the earliest wins a tie; an answer without a claim does not vote.
    """
    votes = {}
    for answer in answers:
        claim = extract_answer(answer.text, cfg.task, cfg.grader)
        if claim is not None:
            votes.setdefault(meaning(claim[:MAX_CHARS]), []).append(answer.correct)
    return bool(votes) and max(votes.values(), key=len)[0]


def hash_seed(*parts):
    """A sampling seed that depends on all of `parts` and on nothing else: no generator state to save."""
    return stable_hash(repr(parts))


# -------------------------------------------------------------------------------- eval


@torch.no_grad()
def score_examples(rewards, examples, cfg, grid):
    """One number per response token of each example: list of (n_i,) fp32 tensors on the CPU.

    rewards   (ids (B, T+1), response_mask (B, T)) -> (B, T), called on at most cfg.micro_tokens tokens
    """
    out = []
    for start, stop in spans(list(map(sequence_length, examples)), cfg.micro_tokens):
        ids, mask = collate(examples[start:stop], grid.device)
        out += [row[m].cpu() for row, m in zip(rewards(ids, mask), mask)]
    return out


def wilson(right, n, z=1.96):
    """95 % interval of a share of n independent trials (Wilson 1927); it stays within [0, 1]."""
    half = z * math.sqrt(right * (n - right) / n + z * z / 4)
    low, high = (right + z * z / 2 - half) / (n + z * z), (right + z * z / 2 + half) / (n + z * z)
    return [max(low, 0.0), min(high, 1.0)]  # rounding may leave them outside by 1e-17


def clustered_interval(hits, clusters, draws=2000):
    """95 % interval of the mean of `hits` by a percentile bootstrap over clusters, such as prompts.

    hits (n,) float, clusters (n,) labels; each draw takes as many clusters as there are, with replacement
    -> [low, high]
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    which = np.array([names[name] for name in clusters])
    sums, sizes = np.bincount(which, hits), np.bincount(which)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(draws):
        drawn = rng.integers(len(names), size=len(names))
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    return [float(x) for x in np.quantile(means, (0.025, 0.975))]


def means_of(values, names):
    """{name: mean of the values under it}, in the order of the names."""
    found = {}
    for value, name in zip(values, names):
        found.setdefault(name, []).append(value)
    return {name: sum(own) / len(own) for name, own in sorted(found.items())}


def eval_reward_model(directory, cfg, grid):
    """Pair accuracy on held-out pairs, a length-only baseline, and credit where the first error is known.

    pair_accuracy_95   bootstrap over prompts, since the pairs of one prompt are not independent
    length_baseline    always preferring the shorter answer, or always the longer one, whichever is better
                       (ties count half)
    error_auc, first_error_hit, first_error_choice   see qrm.credit_counts; left out where no rejected answer
                       has a first error that is known
    """
    name = reward_name(directory)
    tokenizer = load_tokenizer(directory, cfg)
    reward = load_reward(name, directory, tokenizer, cfg, grid)
    rows = read_rows(cfg.data, ("prompt", "chosen", "rejected"), cfg, grid, cfg.limit)
    pairs, rows = encode(rows, tokenizer, cfg.max_seq_len, ("chosen", "rejected"), cfg.data, log=log_to(grid))
    say_first(tokenizer, rows[0], pairs[0], cfg.data, grid)
    n = len(pairs)
    mine, rows = pairs[grid.dp_rank :: grid.dp_size], rows[grid.dp_rank :: grid.dp_size]
    scores = score_examples(reward.rewards, flat(mine), cfg, grid)
    counts = {"right": 0.0, "shorter": 0.0}
    ordered = []  # (line, (prompt, whether its pair is in the right order, RewardBench's subset))
    for row, chosen, rejected in zip(rows, scores[0::2], scores[1::2]):
        right = float(reward.total(chosen) > reward.total(rejected))
        ordered.append((row["line"], (str(row["prompt"]), right, str(row["raw"].get("subset", "")))))
        counts["right"] += right
        counts["shorter"] += (len(chosen) < len(rejected)) + 0.5 * (len(chosen) == len(rejected))
    prompts, hits, subsets = zip(*(pair for _, pair in all_ranks(ordered, grid)))
    if cfg.task == "arith":  # one right answer per prompt, so the first wrong token is known
        counts |= count_credit(name, directory, reward, tokenizer, rows, mine, cfg, grid)
    counts = all_sum(counts, grid)
    shorter = counts["shorter"] / n
    out = {
        "n_pairs": n,
        "pair_accuracy": counts["right"] / n,
        "pair_accuracy_95": clustered_interval(hits, prompts),
        "length_baseline": max(shorter, 1 - shorter),
    }
    if any(subsets):
        out["pair_accuracy_of"] = means_of(hits, subsets)
    errors = counts.get("n_errors", 0)
    if errors:
        out["error_auc"] = counts["wins"] / counts["comparisons"]
        out["first_error_hit"] = counts["hits"] / errors
        out["first_error_choice"] = counts["choices"] / errors
    return out


def count_credit(name, directory, reward, tokenizer, rows, pairs, cfg, grid):
    """credit_counts of the rejected answers of the built-in task."""
    rewards = reward.rewards
    if name in ("orm", "prm"):  # read their head at every token, trained there or not
        rewards = partial(response_scores, load(ScalarModel, directory, cfg, grid))
    scores = score_examples(rewards, [rejected for _, rejected in pairs], cfg, grid)
    errors, repaired = [], []
    for row, (_, rejected) in zip(rows, pairs):
        with at_line(cfg.data, row["line"]):
            solution = tokenizer.encode_response(arith_solve(row["prompt"]))
        place = first_error(rejected.response_ids, solution)
        nothing_wrong = place >= min(len(rejected.response_ids), len(solution))
        place = 0 if nothing_wrong else place  # 0: left out
        errors.append(place)
        right_there = [*rejected.response_ids[:place], solution[place]]
        repaired.append(rejected._replace(response_ids=right_there))
    return credit_counts(scores, errors, score_examples(rewards, repaired, cfg, grid))


def eval_policy(directory, cfg, grid):
    """Greedy pass@1; of k samples the unbiased pass@k, maj@k, and best-of-k if --reward_model is given."""
    tokenizer = load_tokenizer(directory, cfg)
    policy = load(LanguageModel, directory, cfg, grid)
    rows = read_rows(cfg.data, ("prompt", "label"), cfg, grid, cfg.limit)
    say_first(tokenizer, rows[0], encode_prompts(rows, tokenizer, cfg.data, log_to(grid))[0], cfg.data, grid)
    reward = None
    if cfg.reward_model:
        reward = load_ranker(cfg.reward_model, tokenizer, rows, cfg, grid)
    mine = rows[grid.dp_rank :: grid.dp_size]
    began = time.perf_counter()
    greedy = sample_graded(policy, tokenizer, mine, cfg, 0, 0.0, 1)
    seed = hash_seed(cfg.seed, "eval")
    samples = sample_graded(policy, tokenizer, mine, cfg, seed, cfg.temperature, cfg.k)
    seconds = time.perf_counter() - began
    ks = sorted({*(2**i for i in range(cfg.k.bit_length())), cfg.k})
    counts = {
        "prompts": len(mine),
        "greedy": count_right(flat(greedy)),
        "tokens": sum(len(answer.ids) for answer in flat(greedy + samples)),
        "majority": sum(majority_is_right(answers, cfg) for answers in samples),
    }
    counts |= count_graded(greedy + samples, cfg)
    for k in ks:
        counts[f"pass@{k}"] = sum(pass_at_k(cfg.k, count_right(answers), k) for answers in samples)
    if reward:
        counts["best"] = count_right(best_answers(reward, tokenizer, mine, samples, cfg, grid))
    counts = sum_graded(counts, cfg, grid)
    n = counts["prompts"]
    out = {
        "pass@1": counts["greedy"] / n,
        "pass@1_95": wilson(counts["greedy"], n),
        "pass@k": {str(k): counts[f"pass@{k}"] / n for k in ks},
        "maj@k": counts["majority"] / n,
        "n_prompts": int(n),
    }
    if reward:
        out["best_of_k"] = counts["best"] / n
        out["best_of_k_95"] = wilson(counts["best"], n)
    return out | {"generated_tokens": int(counts["tokens"]), "tokens_per_s": counts["tokens"] / seconds}


def best_answers(reward, tokenizer, rows, samples, cfg, grid):
    """The answer with the highest total reward for each row; the first wins a tie."""
    examples = []
    for row, answers in zip(rows, samples):
        prompt = tokenizer.encode_prompt(row["prompt"])
        examples += [Example(prompt, answer.ids) for answer in answers]
    totals = iter([reward.total(rewards) for rewards in score_examples(reward.rewards, examples, cfg, grid)])
    best = []
    for answers in samples:
        ranked = [(next(totals), answer) for answer in answers]
        best.append(max(ranked, key=lambda pair: pair[0])[1])
    return best


def best_rows(rows, samples, reward, tokenizer, cfg, grid):
    """[(line, row for --stage sft)]: each prompt's best answer, with the ids that were sampled.

    reward   the highest total wins, right or wrong; None: the first right answer, and a prompt without one is
             left out
    """
    kept_rows, kept = [], []
    for row, answers in zip(rows, samples):
        whole = [answer for answer in answers if not answer.truncated and answer.text.strip()]
        chosen = whole if reward else [answer for answer in whole if answer.correct][:1]
        if chosen:
            kept_rows.append(row)
            kept.append(chosen)
    best = best_answers(reward, tokenizer, kept_rows, kept, cfg, grid) if reward else flat(kept)
    out = []
    for row, answer in zip(kept_rows, best):
        ids = {
            "prompt_ids": tokenizer.encode_prompt(row["prompt"]),
            "ids": answer.ids,
            "tokenizer": tokenizer.fingerprint,
        }
        sft_row = {"prompt": row["prompt"], "response": answer.text, "label": row["label"], **ids}
        out.append((row["line"], sft_row))
    return out


def flat(lists):
    """The items of several lists as one list."""
    return [item for items in lists for item in items]


# -------------------------------------------------------------------------------- rows out


def all_ranks(rows, grid):
    """The (line, object) of all dp ranks, in the order of the lines."""
    if grid.dp_size == 1:
        return rows
    parts = [None] * grid.dp_size
    dist.all_gather_object(parts, rows, group=grid.dp_group)
    return sorted(flat(parts), key=lambda row: row[0])


def refuse_overwritten(source, rows, names):
    """BadInput for a field of the user's under one of `names`, which a stage writes over.

    It is not the user's beside a tokenizer's fingerprint, or beside a label and what a response claimed: this
    project wrote the row.
    """
    for row in rows:
        fields = row["fields"]
        graded = names == ("correct",) and "answer" in fields and not is_empty(fields.get("label"))
        if graded or len(str(fields.get("tokenizer"))) == 64:
            continue
        for name in names:
            with at_line(source, row["line"]):
                require(
                    is_empty(fields.get(name)),
                    f"{name} is {json.dumps(fields.get(name))[:60]}, which the output would have no more;"
                    f" rename it, or --ignore_keys {name}",
                )


def write_rows(path, rows, grid):
    """Writes the (line, object) rows of all dp ranks as JSON lines, ordered by line. -> how many"""
    rows = all_ranks(rows, grid)
    if grid.is_main:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows)
        write_atomically(Path(path), text)
    return len(rows)


# Of the terminal's 256 colours: orange is low, white the mean, blue high; safe for the colour-blind.
SHADES = (208, 215, 223, 231, 153, 111, 75)


def show_tokens(cfg, tokenizer, key):
    """Prints the answers that stage_score has just written, each token coloured by its number.

    The numbers are standardised over all answers. The first wrong token is underlined where the task knows
    it. If stdout is no terminal, or NO_COLOR is set, the numbers are printed, and a cross marks that token.
    key   "scores" or "logprobs"
    """
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    rows = load_rows(out_path(cfg), ("prompt",), log=len)
    numbers = torch.tensor([x for row in rows for x in row["raw"][key]])
    everywhere = torch.ones_like(numbers, dtype=torch.bool)
    standardized = iter(standardize(numbers, everywhere, "mean_std", Grid()).tolist())
    for row in rows:
        ids = row["raw"]["ids"]
        error = len(ids)
        if cfg.task == "arith":
            with at_line(out_path(cfg), row["line"]):
                error = error_places(tokenizer, row["prompt"], [Example([], ids)])[0]
        print(f"\n{printable(tokenizer.decode(row['raw']['prompt_ids'])).rstrip('↵')}")
        for i, (text, x) in enumerate(zip(row["raw"]["tokens"], standardized)):
            ends_line = "\n" in text or i + 1 == len(ids)
            show = coloured if colour else annotated
            print(show(printable(text), x, i == error), end="\n" if ends_line else "")


def coloured(text, x, wrong):
    """A token on the colour of its standardised number x; bold and underlined if it is wrong."""
    shade = SHADES[round(1.5 * min(max(x, -2), 2)) + 3]
    return f"\x1b[{'1;4;' * wrong}38;5;16;48;5;{shade}m{text}\x1b[0m"


def annotated(text, x, wrong):
    """A token with its standardised number in brackets."""
    return f"{'✗' * wrong}{text}[{x:+.1f}] "
