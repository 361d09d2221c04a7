"""Sampling and grading answers, eval, score and show."""

import dataclasses
import json
import math
import os
import re
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from data import (
    Example,
    arith_rows,
    arith_solve,
    collate,
    encode,
    encode_prompts,
    error_places,
    first_error,
    load_rows,
    rows_by_prompt,
    sequence_length,
    spans,
    stable_hash,
)
from model import LanguageModel, ScalarModel, load_model, read_config
from parallel import Grid, all_sum, say
from qrm import (
    POLICY_LIKE,
    REWARD_MODELS,
    credit_counts,
    last_token_mask,
    reward_function,
    sequence_score,
    token_reward,
)
from reinforce import standardize
from support.files import BadInput, at_line, read_json, write_atomically
from support.graders import MAX_CHARS, extract_answer, grade, meaning
from support.sampling import generate
from support.settings import ARITH, out_path, stage_config
from support.tokenizers import Tokenizer


def sample_graded(policy, tokenizer, rows, cfg, grid, seed, temperature, k):
    """k answers a row: -> [[(text, response ids, correct, truncated)] * k] for this dp rank's rows, and the token count."""
    prompts = [ids for ids in encode_prompts(rows, tokenizer, cfg.data or "built-in task") for _ in range(k)]
    responses, truncated = generate(
        policy, prompts, cfg.max_new_tokens, tokenizer.stop_ids, temperature, seed
    )
    texts = [tokenizer.decode([t for t in ids if t not in tokenizer.stop_ids]) for ids in responses]
    labels = [row["label"] for row in rows for _ in range(k)]
    graded = [
        (text, ids, grade(text, label, cfg.task, cfg.grader)[1], cut)
        for text, ids, label, cut in zip(texts, responses, labels, truncated)
    ]
    return [graded[i : i + k] for i in range(0, len(graded), k)], sum(map(len, responses))


def make_pairs(row, answers, most):
    """Right answers paired with wrong ones of the same prompt; each pair once, the shorter list again from its start.
    Truncated answers are left out: written as text they would gain a stop token that they never had."""
    right = list(
        dict.fromkeys(text for text, _, correct, cut in answers if correct and not cut and text.strip())
    )
    wrong = list(
        dict.fromkeys(text for text, _, correct, cut in answers if not correct and not cut and text.strip())
    )
    n = min(max(len(right), len(wrong)), most) if right and wrong else 0
    return [
        {
            "prompt": row["prompt"],
            "chosen": right[i % len(right)],
            "rejected": wrong[i % len(wrong)],
            "label": row["label"],
        }
        for i in range(n)
    ]


def pass_at_k(n, correct, k):
    """Chance that at least one of k answers drawn from these n is right: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_is_right(answers, cfg):
    """Whether the claim that most of k graded answers make is right (maj@k): equal values are one claim, of equally frequent
    ones the earliest counts, and an answer that claims nothing does not vote."""
    votes = {}
    for text, _, correct, _ in answers:
        if (claim := extract_answer(text, cfg.task, cfg.grader)) is not None:
            votes.setdefault(meaning(claim[:MAX_CHARS]), []).append(correct)
    return bool(votes) and max(votes.values(), key=len)[0]


def greedy_pass(policy, tokenizer, rows, cfg, grid):
    """Share of rows whose greedy answer is right, over all dp ranks."""
    answers, _ = sample_graded(policy, tokenizer, rows[grid.dp_rank :: grid.dp_size], cfg, grid, 0, 0.0, 1)
    return all_sum({"right": sum(row[0][2] for row in answers)}, grid)["right"] / len(rows)


def graded_reward(kind, tokenizer, rows, cfg):
    """A reward_fn that knows the truth: it looks up the prompts of `rows` and grades the answers.

    outcome   1 or 0 at the last token; an answer without its stop token is wrong
    oracle    1 before the first wrong token and 0 from there on (the built-in task knows the one right answer)
    """
    known = rows_by_prompt(rows, tokenizer, cfg.data or "built-in task")

    def reward_fn(ids, response_mask):
        out = torch.zeros(response_mask.shape, device=ids.device)
        for i, (row_ids, mask) in enumerate(zip(ids.tolist(), response_mask.tolist())):
            start, n = (
                mask.index(True),
                sum(mask),
            )  # targets[start] = ids[start + 1] is the first response token
            row, response = known[tuple(row_ids[: start + 1])], row_ids[start + 1 : start + 1 + n]
            text = tokenizer.decode([t for t in response if t not in tokenizer.stop_ids])
            correct = (
                response[-1] in tokenizer.stop_ids and grade(text, row["label"], cfg.task, cfg.grader)[1]
            )
            if kind == "outcome":
                out[i, start + n - 1] = float(correct)
            else:
                right = n if correct else error_places(tokenizer, row["prompt"], [Example([], response)])[0]
                out[i, start : start + right] = 1.0
        return out

    return reward_fn


def load(kind, directory, cfg, grid):
    """A LanguageModel or ScalarModel from a directory, in the run's dtype."""
    model = load_model(kind, directory, grid, getattr(torch, cfg.dtype))
    model.model.remat = cfg.remat
    size = sum(f.stat().st_size for f in Path(directory).glob("*.safetensors"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )  # bytes there, KiB elsewhere
    say(grid, f"load: {directory}: {size / 1e9:.3g} GB, peak host memory of this process {peak / 1e9:.3g} GB")
    return model


def load_tokenizer(directory, cfg):
    """The tokenizer of a model directory in the run's chat template; BadInput if the model has no row for an id, or is used
    otherwise than it was trained (to train it on, as sft and rm do, in another template is fine)."""
    tokenizer, path = Tokenizer.load(directory, cfg.chat, cfg.date or None), Path(directory) / "run.json"
    n = read_config(directory)[0].vocab_size
    if tokenizer.vocab_size > n:
        raise BadInput(
            f"{directory}: the tokenizer's ids go up to {tokenizer.vocab_size - 1}, but config.json says vocab_size {n}"
        )
    made = read_json(path, path.read_bytes()) if path.exists() and cfg.stage not in ("sft", "rm") else {}
    if made.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        chat = re.search(r"'chat': '(\w+)'", str(made.get("config")))
        raise BadInput(
            f"{directory}: was trained with another tokenizer or chat template (--chat {chat and chat[1]}); found --chat {cfg.chat}"
        )
    return tokenizer


def write_rows(path, rows, grid):
    """JSON lines from all dp ranks: rows is a list of (line, object), written in the order of the lines."""
    if grid.dp_size > 1:
        parts = [None] * grid.dp_size
        dist.all_gather_object(parts, rows, group=grid.dp_group)
        rows = sorted((row for part in parts for row in part), key=lambda row: row[0])
    if grid.is_main:
        write_atomically(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows))
    return len(rows)


def heldout_pairs(cfg):
    """Where the built-in task keeps the pairs that no reward model was trained on."""
    return out_path(dataclasses.replace(cfg, stage="pairs")).with_name("pairs-heldout.jsonl")


def hash_seed(*parts):
    """A sampling seed that depends on all of `parts` and on nothing else: no generator state to save."""
    return stable_hash(repr(parts))


def reward_kind(directory, otherwise="qrm"):
    """One of REWARD_MODELS, as the rm stage noted it in run.json; a directory made elsewhere is taken for `otherwise`."""
    path = Path(directory) / "run.json"
    kind = read_json(path, path.read_bytes()).get("reward", otherwise) if path.exists() else otherwise
    if kind not in REWARD_MODELS:
        raise BadInput(f"{path}: reward is {kind!r}, expected one of {', '.join(REWARD_MODELS)}")
    return "qrm" if kind == "plain" else kind


def load_reward(kind, directory, tokenizer, cfg, grid, rows=()):
    """-> reward_fn, reward_mask_fn (None: every response token), whether the reward is a token's own Q.

    outcome and oracle grade the answers to `rows`; the others are models from `directory`.
    """
    if kind in ("outcome", "oracle"):
        return (
            graded_reward(kind, tokenizer, rows, cfg),
            (lambda ids, mask: last_token_mask(mask)) if kind == "outcome" else None,
            kind == "oracle",
        )
    own = load_tokenizer(directory, cfg)
    if own.fingerprint != tokenizer.fingerprint:
        raise BadInput(
            f"{directory}: its tokenizer or chat template is not that of the policy; expected the same token ids"
        )
    reference = None
    if kind == "dpo":
        path = Path(directory) / "run.json"
        if not isinstance(reference := read_json(path, path.read_bytes()).get("reference"), str):
            raise BadInput(
                f"{path}: reference is {reference!r}, expected the directory of the model that DPO started from"
            )
        reference = load(LanguageModel, reference, cfg, grid).requires_grad_(False)
    model = load(LanguageModel if kind in POLICY_LIKE else ScalarModel, directory, cfg, grid).requires_grad_(
        False
    )
    return reward_function(kind, model, reference, tokenizer.ids_with("\n"))


def is_reward_model(directory):
    """Whether config.json names a model with one scalar a token."""
    return "ForTokenClassification" in str(read_config(directory)[1].get("architectures"))


@torch.no_grad()
def score_examples(reward_fn, examples, cfg, grid):
    """One number per response token of each example, in chunks: list of (n_i,) fp32 tensors on the CPU."""
    out = []
    for a, b in spans(list(map(sequence_length, examples)), cfg.micro_tokens):
        ids, mask = collate(examples[a:b], grid.device)
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
    path = cfg.data
    rows = load_rows(path, ("prompt", "chosen", "rejected"), cfg.limit)
    pairs, rows = encode(
        rows, tokenizer, cfg.max_seq_len, ("chosen", "rejected"), str(path), lambda text: say(grid, text)
    )
    mine, n = pairs[grid.dp_rank :: grid.dp_size], len(pairs)
    scores = score_examples(reward_fn, [example for pair in mine for example in pair], cfg, grid)
    right = sum(
        float(sequence_score(kind, w) > sequence_score(kind, l)) for w, l in zip(scores[0::2], scores[1::2])
    )
    shorter = sum((len(w) < len(l)) + 0.5 * (len(w) == len(l)) for w, l in zip(scores[0::2], scores[1::2]))
    counts = {"right": right, "shorter": shorter}
    known = (
        cfg.task == "arith"
    )  # the built-in task has one right answer a prompt, so the first wrong token is known
    if known:
        if kind in ("orm", "prm"):  # their head read at every token, trained there or not
            reward_fn = token_reward(load(ScalarModel, directory, cfg, grid))
            scores = score_examples(reward_fn, [example for pair in mine for example in pair], cfg, grid)
        errors, repaired = [], []
        for row, (_, rejected) in zip(rows[grid.dp_rank :: grid.dp_size], mine):
            with at_line(path, row["line"]):
                solution = tokenizer.encode_response(arith_solve(row["prompt"]))
            place = first_error(rejected.response_ids, solution)
            errors.append(
                place if place < min(len(rejected.response_ids), len(solution)) else 0
            )  # nothing wrong in it: left out
            repaired.append(
                rejected._replace(response_ids=[*rejected.response_ids[: errors[-1]], solution[errors[-1]]])
            )
        counts |= credit_counts(scores[1::2], errors, score_examples(reward_fn, repaired, cfg, grid))
    c = all_sum(counts, grid)
    out = {
        "n_pairs": n,
        "pair_accuracy": c["right"] / n,
        "pair_accuracy_95": wilson(c["right"], n),
        "length_baseline": c["shorter"] / n,
    }
    if known:
        out |= {
            "error_auc": c["wins"] / max(c["comparisons"], 1),
            "first_error_hit": c["hits"] / max(c["n_errors"], 1),
            "first_error_choice": c["choices"] / max(c["n_errors"], 1),
        }
    return out  # length_baseline: the accuracy of always preferring the shorter answer, ties counted half


def eval_policy(directory, cfg, grid):
    """Greedy pass@1, unbiased pass@k of k samples, the majority of all k, and best-of-k by a reward model's mean score when one is at hand."""
    tokenizer = load_tokenizer(directory, cfg)
    policy, judge = load(LanguageModel, directory, cfg, grid), cfg.reward_model
    if (
        not judge
        and not cfg.data
        and Path(directory).absolute().parent == Path(cfg.run).absolute()
        and (own := out_path(stage_config(cfg, "rm"))).exists()
    ):
        judge = str(own)  # of the same run
    if judge:
        kind = reward_kind(judge)
        reward_fn, _, _ = load_reward(kind, judge, tokenizer, cfg, grid)
    rows = (
        load_rows(cfg.data, ("prompt", "label"), cfg.limit)
        if cfg.data
        else arith_rows("test", cfg.limit or ARITH["eval"]["limit"], cfg.seed)
    )
    mine, began = rows[grid.dp_rank :: grid.dp_size], time.perf_counter()
    greedy, tokens = sample_graded(policy, tokenizer, mine, cfg, grid, 0, 0.0, 1)
    samples, more = sample_graded(
        policy, tokenizer, mine, cfg, grid, hash_seed(cfg.seed, "eval", grid.dp_rank), cfg.temperature, cfg.k
    )
    seconds, ks = time.perf_counter() - began, sorted({*(2**i for i in range(cfg.k.bit_length())), cfg.k})
    counts = [
        len(mine),
        sum(row[0][2] for row in greedy),
        tokens + more,
        sum(majority_is_right(row, cfg) for row in samples),
    ]
    counts += [sum(pass_at_k(cfg.k, sum(a[2] for a in row), k) for row in samples) for k in ks]
    if judge:
        examples = [
            Example(tokenizer.encode_prompt(row["prompt"]), a[1])
            for row, answers in zip(mine, samples)
            for a in answers
        ]
        scores = score_examples(reward_fn, examples, cfg, grid)
        ranks = [sequence_score(kind, z) for z in scores]
        best = [max(range(cfg.k), key=lambda j: ranks[i * cfg.k + j]) for i in range(len(mine))]
        counts.append(sum(samples[i][j][2] for i, j in enumerate(best)))
    counts = list(all_sum(dict(enumerate(counts)), grid).values())
    n = int(counts[0])
    out = {
        "pass@1": counts[1] / n,
        "pass@k": {str(k): c / n for k, c in zip(ks, counts[4:])},
        "maj@k": counts[3] / n,
        "n_prompts": n,
    }
    if len(counts) > 4 + len(ks):
        out["best_of_k"] = counts[-1] / n
    return out | {"generated_tokens": int(counts[2]), "tokens_per_s": counts[2] / seconds}


SHADES = (
    208,
    215,
    223,
    231,
    153,
    111,
    75,
)  # of the terminal's 256 colours: orange is low, white the mean, blue high; safe for the colour-blind


def show_tokens(cfg, tokenizer, key):
    """Prints the answers that stage_score has just written: every token on a background by its number, standardised over all of them,
    the first wrong one underlined where the task knows it. Into a file or pipe, or with NO_COLOR set: the numbers instead, and a ✗."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    rows = load_rows(out_path(cfg), ("prompt",))
    numbers = torch.tensor([x for row in rows for x in row["raw"][key]])
    z = iter(standardize(numbers, torch.ones_like(numbers, dtype=torch.bool), "mean_std", Grid()).tolist())
    plain = lambda text: "".join(
        c if c.isprintable() else "↵" if c == "\n" else "·" for c in text
    )  # no control codes from someone's data
    for row in rows:
        ids, tokens = row["raw"]["ids"], row["raw"]["tokens"]
        error = len(ids)
        if cfg.task == "arith" or not cfg.data:
            with at_line(out_path(cfg), row["line"]):
                error = error_places(tokenizer, row["prompt"], [Example([], ids)])[0]
        print(f"\n{plain(tokenizer.decode(row['raw']['prompt_ids'])).rstrip('↵')}")
        for i, (text, x) in enumerate(zip(tokens, z)):
            shade = SHADES[round(1.5 * min(max(x, -2), 2)) + 3]
            shown = (
                f"\x1b[{'1;4;' * (i == error)}38;5;16;48;5;{shade}m{plain(text)}\x1b[0m"
                if colour
                else f"{'✗' * (i == error)}{plain(text)}[{x:+.1f}] "
            )
            print(shown, end="\n" if "\n" in text or i + 1 == len(tokens) else "")
