"""Text to tensors: tokenizers, JSON lines, the shift and the mask, the built-in task, and the answer graders.

    rows ─ load_rows ─► encode (ids) ─► batch_indices (shuffle) ─► collate (the shift, the mask) ─► the models

Imports nothing of ours. B sequences · T positions
"""

import functools
import hashlib
import itertools
import json
import random
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from support.files import BadInput, at_line, read_jsonl
from support.graders import gsm8k_label
from support.tokenizers import build_tokenizer

# ------------------------------------------------------------------------------------------------ JSON lines


KEYS = {
    "prompt": ("prompt", "instruction", "question"),
    "response": ("response", "completion", "output", "answer"),
    "label": ("label", "answer"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}


def _messages(value):
    return (
        isinstance(value, list)
        and value
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in value
        )
    )


def load_rows(path, needs, limit=0, optional=()):
    """Rows of a JSON lines file with the canonical keys of `needs` (and those of `optional` that it has).

    needs, optional   among "prompt", "response", "chosen", "rejected", "label"; the accepted spellings stand in KEYS
    limit             reads only so many rows; 0 reads all
    -> list of {"prompt": ..., ..., "line": int, "raw": the row as read}. Texts, or lists of {"role", "content"}; a
    TRL pair without a prompt gets the messages before the last one. A label is a str; in OpenAI's GSM8K rows it is
    what follows "####" in `answer`. Raises BadInput with the line number for a row that lacks something.
    """
    rows = []
    for number, raw in itertools.islice(read_jsonl(path), limit or None):
        row = {"line": number, "raw": raw}
        if (
            "prompt" in needs
            and "chosen" in needs
            and not any(k in raw for k in KEYS["prompt"])
            and _messages(raw.get("chosen"))
        ):
            raw = {**raw, "prompt": raw["chosen"][:-1]}
        for key in (*needs, *optional):
            name = next((k for k in KEYS[key] if k in raw), None)
            value = raw.get(name)
            if name is None and key in optional:
                continue
            if name is None:
                raise BadInput(
                    f"{path}, line {number}: found keys {sorted(raw)[:8]}, expected {' or '.join(KEYS[key])}"
                )
            if key == "label" and isinstance(value, (int, float, str)):
                with at_line(path, number):
                    value = gsm8k_label(value) if isinstance(value, str) and "####" in value else str(value)
            if not (isinstance(value, str) and value.strip() or key != "label" and _messages(value)):
                raise BadInput(
                    f"{path}, line {number}: {name} is {json.dumps(value)[:60]}; expected a text that is not empty, "
                    'or a list of {"role", "content"} messages'
                )
            row[key] = (
                value[-1:] if key in ("chosen", "rejected", "response") and isinstance(value, list) else value
            )
        rows.append(row)
    if not rows:
        raise BadInput(f"{path}: no rows; expected one JSON object a line")
    return rows


# ------------------------------------------------------------------------------------------------ rows to tensors


class Example(NamedTuple):
    """One sequence as ids. Prompt and response are encoded apart, so a response's ids never depend on its prompt."""

    prompt_ids: list
    response_ids: list  # with the stop token, unless a sampled answer was cut off


def encode(rows, tokenizer, max_seq_len, keys=("response",), source="data", log=print):
    """Rows -> tuples with one Example per key, (response,) or (chosen, rejected), and the rows that they came from.

    Rows longer than max_seq_len tokens (prompt and response) and identical pairs are dropped and counted in one line
    that goes to `log`; nothing is ever cut. Raises BadInput when no row is left.
    """
    kept, too_long, identical = [], 0, 0
    for row in rows:
        with at_line(source, row["line"]):
            prompt = tokenizer.encode_prompt(row["prompt"])
            examples = tuple(Example(prompt, tokenizer.encode_response(row[key])) for key in keys)
        if max(len(prompt) + len(e.response_ids) for e in examples) > max_seq_len:
            too_long += 1
        elif len(examples) == 2 and examples[0] == examples[1]:
            identical += 1
        else:
            kept.append((examples, row))
    if too_long or identical or not kept:
        log(
            f"{source}: {len(rows)} rows; dropped {too_long} longer than --max_seq_len {max_seq_len} tokens and "
            f"{identical} identical pairs; {len(kept)} left"
        )
    if not kept:
        raise BadInput(f"{source}: no row is left; raise --max_seq_len ({max_seq_len}) or look at the data")
    return [examples for examples, _ in kept], [row for _, row in kept]


# exercise 3.1 (7 lines): the shift and the mask
def collate(examples, device="cpu", pad_id=0):
    """The shift and the mask, in this one place.

        ids        p0  p1  p2  r0  r1  eos pad          one row, prompt length 3
        inputs     p0  p1  p2  r0  r1  eos              = ids[:, :-1]
        targets    p1  p2  r0  r1  eos pad              = ids[:, 1:]
        mask        .   .   x   x   x   .
        index t     0   1   2   3   4   5               state s_t = inputs[:, :t+1], action a_t = targets[:, t]

    examples: list of B Example -> ids (B, T+1) int64, response_mask (B, T) bool. The mask is made from lengths, never
    from ids, and pads stand on the right, where causal attention cannot see them: `pad_id` may be any id.
    """
    lengths = [len(e.prompt_ids) + len(e.response_ids) for e in examples]
    ids = torch.full((len(examples), max(lengths)), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(examples), max(lengths) - 1, dtype=torch.bool)
    for i, e in enumerate(examples):
        ids[i, : lengths[i]] = torch.tensor(e.prompt_ids + e.response_ids)
        mask[i, len(e.prompt_ids) - 1 : lengths[i] - 1] = True
    return ids.to(device), mask.to(device)


def spans(lengths, budget):
    """Cuts neighbours into parts of at most `budget` tokens, at least one row each.

    >>> spans([3, 3, 3, 9, 1], 6)
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    starts, filled = [], budget + 1
    for i, n in enumerate(lengths):
        filled += n
        if filled > budget:
            starts, filled = [*starts, i], n
    return list(zip(starts, [*starts[1:], len(lengths)]))


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


# exercise 3.2 (2 lines): shuffling without a state
def batch_indices(n, batch_size, step, seed):
    """Which of n rows make up batch `step` (from 0): shuffled anew each epoch, a function of its arguments alone.

    No state to save: a resumed run asks for the next step. A batch may span two epochs, and no row is left out.

    >>> sorted(int(i) for step in range(2) for i in batch_indices(6, 3, step, seed=0))
    [0, 1, 2, 3, 4, 5]
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_permutation(n, seed, p // n)[p % n]) for p in places]


# ------------------------------------------------------------------------------------------------ the built-in task


NAMES, THINGS = ("Tom", "Ann", "Ben", "Eva"), ("apples", "pens", "books", "coins")
VERBS = {
    "+": ("buys", "finds", "gets", "picks", "wins", "borrows", "collects", "receives"),
    "-": ("loses", "eats", "sells", "lends", "drops", "spends", "breaks", "donates"),
}

OPERATOR = {verb: op for op, verbs in VERBS.items() for verb in verbs}


@dataclass(frozen=True)
class Arith:
    """Word problems over 0..9 whose answers restate each step, like GSM8K's, and an author who misreads some verbs.

    The training answers give a misread verb the wrong sign with probability q, and go on from what was written. A
    policy fine-tuned on them inherits that: greedily it is wrong on those verbs, sampled it is sometimes right. So it can
    improve, pairs of right and wrong answers exist, and the first wrong token is known exactly, which no data set of
    real answers offers.
    """

    steps: tuple = (4, 6)  # sentences after the first: at least, at most
    verbs: int = 12  # half of them add, half take away
    misread: int = 6  # of these verbs
    operand: int = 3  # largest
    q: float = 0.65  # chance that a misread verb is written with the wrong sign
    author: int = 0  # which verbs are misread

    @functools.cached_property
    def words(self):
        half = self.verbs // 2
        return [(verb, op) for op in "+-" for verb in VERBS[op][:half]]

    @functools.cached_property
    def misreads(self):
        rng, half = random.Random(self.author), self.verbs // 2
        plus, minus = VERBS["+"][:half], VERBS["-"][:half]
        return frozenset(
            rng.sample(plus, self.misread // 2) + rng.sample(minus, self.misread - self.misread // 2)
        )

    def problem(self, rng):
        """(start, [(verb, operand)]): all values stay in 0..9, and no set of misreadings ends on the right number, so
        that a right number means a right path (for the author; a policy can still be lucky)."""
        while True:
            start, moves, wrong = (
                rng.randint(0, 9),
                [],
                set(),
            )  # wrong: running values after at least one misreading
            value = start
            for _ in range(rng.randint(*self.steps)):
                verb, op = rng.choice(self.words)
                b = rng.randint(1, self.operand)
                d = b if op == "+" else -b
                wrong = {w + d for w in wrong} | (
                    {w - d for w in wrong | {value}} if verb in self.misreads else set()
                )
                value += d
                moves.append((verb, b))
                if not all(0 <= v <= 9 for v in wrong | {value}):
                    break
            else:
                if value not in wrong:
                    return start, moves

    def answer(self, start, moves, rng=None):
        """The worked answer; with `rng`, as the author writes it."""
        lines, value = [], start
        for verb, b in moves:
            op = OPERATOR[verb]
            if rng and verb in self.misreads and rng.random() < self.q:
                op = "-" if op == "+" else "+"
            result = value + b if op == "+" else value - b
            lines.append(f"{value}{op}{b}={result}\n")
            value = result
        return "".join(lines) + f"#### {value}"


def arith_rows(split, n, seed, task=Arith()):
    """n rows of the built-in task: {"prompt", "response" (the author's), "solution" (the right one), "label", "line"}.

    split   "train" and "test" share no prompt: a hash of the text decides where it belongs
    """
    rng, rows = random.Random(f"{split} {seed}"), []
    while len(rows) < n:
        start, moves = task.problem(rng)
        name = rng.choice(NAMES)
        story = [f"{name} has {start} {rng.choice(THINGS)}."] + [f"{name} {verb} {b}." for verb, b in moves]
        prompt = " ".join(story) + " How many?\n"
        if (stable_hash(prompt) % 10 == 0) == (split == "test"):
            solution = task.answer(start, moves)
            rows.append(
                {
                    "prompt": prompt,
                    "response": task.answer(start, moves, rng),
                    "solution": solution,
                    "label": solution.split()[-1],
                    "line": len(rows) + 1,
                }
            )
    return rows


def arith_solve(prompt):
    """The one right answer to a prompt of the built-in task, from its text."""
    try:
        start, *moves = re.findall(r" (\w+) (\d)", prompt)
        return Arith().answer(int(start[1]), [(verb, int(b)) for verb, b in moves])
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"not a prompt of the built-in task (--task arith): {str(prompt)[:60]!r}") from None


def arith_tokenizer():
    """A byte-complete tokenizer with one token for every word of the built-in task."""
    words = [
        *NAMES,
        *(f" {w}" for w in (*NAMES, *THINGS, *OPERATOR, "has", "How", "many", *range(10))),
        "####",
    ]
    return build_tokenizer(words)


def first_error(ids, solution_ids):
    """Index of the first token that departs from the one right answer (both as ids, stop token included); len(ids) if none.

    >>> first_error([5, 6, 9, 1], [5, 6, 7, 1])
    2
    """
    return next(
        (i for i, (a, b) in enumerate(zip(ids, solution_ids)) if a != b), min(len(ids), len(solution_ids))
    )


def error_places(tokenizer, prompt, examples):
    """Index of the first wrong token of each answer to a prompt of the built-in task; its length when nothing is wrong."""
    solution = tokenizer.encode_response(arith_solve(prompt))
    return [first_error(e.response_ids, solution) for e in examples]


def stable_hash(text):
    """A 63-bit number that depends on the text alone (Python's own hash changes from run to run)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def encode_prompts(rows, tokenizer, cfg):
    """-> list of id lists; a prompt that cannot be encoded is named by its file and line"""
    prompts = []
    for row in rows:
        with at_line(cfg.data or "built-in task", row["line"]):
            prompts.append(tokenizer.encode_prompt(row["prompt"]))
    return prompts


def sequence_length(example):
    """Tokens of prompt and response."""
    return len(example.prompt_ids) + len(example.response_ids)
