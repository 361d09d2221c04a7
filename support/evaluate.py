"""Sampling and grading answers, eval, score and show, and the rewards that need no model."""

import dataclasses
import functools
import importlib.util
import json
import math
import numbers
import os
import re
import reprlib
import resource
import sys
import time
import traceback
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
    sequence_length,
    spans,
    stable_hash,
)
from model import LanguageModel, ScalarModel, load_model, read_config
from parallel import Grid, all_reduce, all_sum, say
from qrm import (
    REWARD_MODELS,
    Reward,
    at_every_token,
    at_last_token,
    bind_reward,
    credit_counts,
    mean_of_rewards,
    response_scores,
    sum_of_rewards,
)
from reinforce import standardize
from support.files import BadInput, at_line, read_json, require, write_atomically
from support.graders import MAX_CHARS, extract_answer, grade, meaning
from support.sampling import generate
from support.settings import ARITH, out_path, stage_config
from support.tokenizers import Tokenizer


def sample_graded(policy, tokenizer, rows, cfg, grid, seed, temperature, k):
    """k answers a row: -> [[(text, response ids, correct, truncated)] * k] for this dp rank's rows, and the token count."""
    prompts = [ids for ids in encode_prompts(rows, tokenizer, cfg) for _ in range(k)]
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
    if not isinstance(kind, str) or kind not in REWARD_MODELS:
        raise BadInput(f"{path}: reward is {kind!r}, expected one of {', '.join(REWARD_MODELS)}")
    return "qrm" if kind == "plain" else kind


def load_reward(kind, directory, tokenizer, cfg, grid, rows=()):
    """The Reward of a run.

    kind   outcome, oracle: graded_reward of the answers to `rows`; FILE.py:FUNCTION: user_reward, also of `rows`;
           a key of REWARD_MODELS: the model in `directory`, which must have the policy's tokenizer
    """
    if kind in ("outcome", "oracle"):
        return graded_reward(kind, tokenizer, rows, cfg)
    if kind not in REWARD_MODELS:
        return user_reward(kind, tokenizer, rows, grid)
    own = load_tokenizer(directory, cfg)
    if own.fingerprint != tokenizer.fingerprint:
        raise BadInput(
            f"{directory}: its tokenizer or chat template is not that of the policy; expected the same token ids"
        )
    reference = None
    if REWARD_MODELS[kind].needs_reference:
        path = Path(directory) / "run.json"
        if not isinstance(reference := read_json(path, path.read_bytes()).get("reference"), str):
            raise BadInput(
                f"{path}: reference is {reference!r}, expected the directory of the model that DPO started from"
            )
        reference = load(LanguageModel, reference, cfg, grid).requires_grad_(False)
    model = load(REWARD_MODELS[kind].base, directory, cfg, grid).requires_grad_(False)
    return bind_reward(kind, model, reference, tokenizer.ids_with("\n"))


def is_reward_model(directory):
    """Whether config.json names a model with one scalar a token."""
    return "ForTokenClassification" in str(read_config(directory)[1].get("architectures"))


@torch.no_grad()
def score_examples(token_numbers, examples, cfg, grid):
    """One number per response token of each example, in chunks: list of (n_i,) fp32 tensors on the CPU.

    token_numbers   (ids (B, T+1), response_mask (B, T)) -> (B, T)
    """
    out = []
    for a, b in spans(list(map(sequence_length, examples)), cfg.micro_tokens):
        ids, mask = collate(examples[a:b], grid.device)
        out += [row[m].cpu() for row, m in zip(token_numbers(ids, mask), mask)]
    return out


def wilson(right, n, z=1.96):
    """The 95 % interval of a share of n independent trials (Wilson 1927); unlike p +- z sigma it stays within [0, 1]."""
    half = z * math.sqrt(right * (n - right) / n + z * z / 4)
    return [(right + z * z / 2 - half) / (n + z * z), (right + z * z / 2 + half) / (n + z * z)]


def eval_reward_model(directory, cfg, grid):
    """Pair accuracy on held-out pairs, a length-only baseline, and credit metrics where the first error is known."""
    kind, tokenizer = reward_kind(directory), load_tokenizer(directory, cfg)
    reward = load_reward(kind, directory, tokenizer, cfg, grid)
    read_tokens = reward.rewards
    path = cfg.data
    rows = load_rows(path, ("prompt", "chosen", "rejected"), cfg.limit)
    pairs, rows = encode(
        rows, tokenizer, cfg.max_seq_len, ("chosen", "rejected"), str(path), lambda text: say(grid, text)
    )
    mine, n = pairs[grid.dp_rank :: grid.dp_size], len(pairs)
    scores = score_examples(read_tokens, [example for pair in mine for example in pair], cfg, grid)
    right = sum(float(reward.total(w) > reward.total(l)) for w, l in zip(scores[0::2], scores[1::2]))
    shorter = sum((len(w) < len(l)) + 0.5 * (len(w) == len(l)) for w, l in zip(scores[0::2], scores[1::2]))
    counts = {"right": right, "shorter": shorter}
    known = (
        cfg.task == "arith"
    )  # the built-in task has one right answer a prompt, so the first wrong token is known
    if known:
        if kind in ("orm", "prm"):  # their head read at every token, trained there or not
            read_tokens = functools.partial(response_scores, load(ScalarModel, directory, cfg, grid))
            scores = score_examples(read_tokens, [example for pair in mine for example in pair], cfg, grid)
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
        counts |= credit_counts(scores[1::2], errors, score_examples(read_tokens, repaired, cfg, grid))
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
        reward = load_reward(reward_kind(judge), judge, tokenizer, cfg, grid)
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
        scores = score_examples(reward.rewards, examples, cfg, grid)
        ranks = [reward.total(z) for z in scores]
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


# -------------------------------------------------------------------------------- rewards without a model


def rows_by_prompt(tokenizer, rows):
    """{prompt ids: row}: how a reward finds the row of the data that a sampled answer belongs to.

    Of several rows with one prompt the first counts. Raises BadInput if their labels differ.
    """
    known = {}
    for row in rows:
        first = known.setdefault(tuple(tokenizer.encode_prompt(row["prompt"])), row)
        require(
            first.get("label") == row.get("label"),
            f"lines {first['line']} and {row['line']} have the same prompt and different labels, found "
            f"{first.get('label')!r} and {row.get('label')!r}; expected one label per prompt",
        )
    return known


def answers_in(ids, response_mask, known):
    """Yields (row of the batch, column of its first response token, row of the data, response ids).

    ids (B, T+1), response_mask (B, T); known as from rows_by_prompt
    """
    for i, (row_ids, mask) in enumerate(zip(ids.tolist(), response_mask.tolist())):
        start = mask.index(True)  # targets[start] = ids[start + 1] is the first response token
        prompt_ids = row_ids[: start + 1]
        response_ids = row_ids[start + 1 : start + 1 + sum(mask)]
        yield i, start, known[tuple(prompt_ids)], response_ids


def answer_text(tokenizer, response_ids):
    """The text of an answer, without its stop token."""
    return tokenizer.decode([t for t in response_ids if t not in tokenizer.stop_ids])


def graded_reward(kind, tokenizer, rows, cfg):
    """A Reward that knows the truth: it grades the answers to the prompts of `rows`.

    outcome   1 or 0 at the last token; an answer without its stop token is wrong
    oracle    1 before the first wrong token and 0 from there on (only the built-in task knows the place)
    """
    known = rows_by_prompt(tokenizer, rows)

    def rewards(ids, response_mask):
        out = torch.zeros(response_mask.shape, device=ids.device)
        for i, start, row, response_ids in answers_in(ids, response_mask, known):
            n = len(response_ids)
            ended = response_ids[-1] in tokenizer.stop_ids
            text = answer_text(tokenizer, response_ids)
            correct = ended and grade(text, row["label"], cfg.task, cfg.grader)[1]
            if kind == "outcome":
                out[i, start + n - 1] = float(correct)
            elif correct:
                out[i, start : start + n] = 1.0
            else:
                error = error_places(tokenizer, row["prompt"], [Example([], response_ids)])[0]
                out[i, start : start + error] = 1.0
        return out

    if kind == "outcome":
        return Reward(rewards, at_last_token, is_q=False, total=sum_of_rewards)
    return Reward(rewards, at_every_token, is_q=True, total=mean_of_rewards)


def load_function(spec):
    """The FUNCTION of FILE.py:FUNCTION; BadInput if the file cannot be run or has no such function."""
    path, _, name = spec.rpartition(":")
    require(path.endswith(".py") and name.isidentifier(), f"--reward {spec}: expected FILE.py:FUNCTION")
    require(Path(path).is_file(), f"--reward {spec}: no file {path}; expected a Python file")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, Path(path).absolute())
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput(describe_error(path, error)) from error
    function = getattr(module, name, None)
    require(callable(function), f"--reward {spec}: {path} has no function {name}")
    return function


def describe_error(path, error):
    """An exception in a user's file in one line: FILE.py, line N: ZeroDivisionError: division by zero"""
    file = str(Path(path).absolute())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    place = f"{path}, line {lines[-1]}" if lines else path  # no line: called with arguments it does not take
    return " ".join(f"{place}: {type(error).__name__}: {error}".split())


def check_value(value, n, where):
    """A user's reward as a float, or a list of n floats; BadInput for anything else, naming `where`."""
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy, torch
    is_list = isinstance(value, (list, tuple))
    values = value if is_list else [value]
    largest = torch.finfo(torch.float32).max
    require(
        all(isinstance(x, numbers.Real) for x in values) and (len(values) == n or not is_list),
        f"{where}: found {reprlib.repr(value)}; expected a number, or a list of {n}, one per response token",
    )
    require(
        all(abs(x) <= largest for x in values),  # False for nan
        f"{where}: found {reprlib.repr(value)}; expected finite numbers",
    )
    return [float(x) for x in values] if is_list else float(value)


def call_function(function, spec, tokenizer, row, response_ids):
    """A user's FUNCTION of one answer to the prompt of `row` -> float, or a list, one per response token"""
    text = answer_text(tokenizer, response_ids)
    truncated = response_ids[-1] not in tokenizer.stop_ids
    try:
        value = function(row["prompt"], text, list(response_ids), dict(row.get("raw", row)), truncated)
    except Exception as error:
        path = spec.rpartition(":")[0]
        raise BadInput(f"{describe_error(path, error)} (data line {row['line']})") from error
    return check_value(value, len(response_ids), f"--reward {spec}, data line {row['line']}")


def user_reward(spec, tokenizer, rows, grid=Grid()):
    """The Reward that a user's own function gives: --reward FILE.py:FUNCTION, for reinforce and ppo.

    FUNCTION(prompt, response, ids, row, truncated) is called once per answer:

        prompt      as in the data: a text, or a list of {"role", "content"} messages
        response    the text of the answer, without its stop token
        ids         list of its n token ids, with its stop token
        row         the prompt's row of the data, a dict with all of its keys
        truncated   True if the answer has no stop token: it reached --max_new_tokens

    It returns a number, which becomes the reward of the last response token, or a list of n numbers, one per
    response token; the same of the two for all answers. They count as rewards to be accumulated (--advantage
    return, or gae with ppo) unless --advantage says otherwise. With tensor parallelism every rank calls it,
    and the value of the first one counts. For example, with --reward length_penalty.py:reward

        # length_penalty.py: a right answer earns 1, and every token after the 64th costs 0.01
        from support.graders import grade

        FREE, PRICE = 64, 0.01


        def reward(prompt, response, ids, row, truncated):
            answer, correct = grade(response, row["label"], "arith")
            earned = 1.0 if correct and not truncated else 0.0
            return earned - PRICE * max(len(ids) - FREE, 0)

    rows   the prompts' rows, as from load_rows
    Raises BadInput, when called or in the Reward: the file or function cannot be loaded, the function raises,
    or it returns another type or length, or a number that is not finite in fp32.
    """
    function = load_function(spec)
    known = rows_by_prompt(tokenizer, rows)
    per_token = None  # whether FUNCTION returns lists: decided by the first answer

    def rewards(ids, response_mask):
        nonlocal per_token
        out = torch.zeros(response_mask.shape, device=ids.device)
        for i, start, row, response_ids in answers_in(ids, response_mask, known):
            value = call_function(function, spec, tokenizer, row, response_ids)
            is_list = isinstance(value, list)
            per_token = is_list if per_token is None else per_token
            require(
                is_list == per_token,
                f"--reward {spec}: found a number for one answer and a list for another; expected one kind",
            )
            last = start + len(response_ids) - 1
            out[i, start if is_list else last : last + 1] = torch.tensor(value)
        return all_reduce(out if grid.tp_rank == 0 else torch.zeros_like(out), grid.tp_group)

    def speaks(ids, response_mask):
        return at_every_token(ids, response_mask) if per_token else at_last_token(ids, response_mask)

    return Reward(rewards, speaks, is_q=False, total=sum_of_rewards)
