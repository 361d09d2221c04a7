"""Text to tensors: JSON lines, ids, the shift and the mask; and the built-in task.

    rows ─ load_rows ─► encode (ids) ─► batch_indices (shuffle) ─► collate (the shift, the mask) ─► the models

B sequences · T positions
"""

import functools
import hashlib
import random
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from support.files import BadInput, at_line, require
from support.row_labels import same_label
from support.row_messages import is_hh, prompt_text
from support.rows import OF_ONE_ROW, load_rows, turn_in  # noqa: F401 (load_rows: the first stop)
from support.tokenizers import build_tokenizer

# -------------------------------------------------------------------------------- rows to tensors


class Example(NamedTuple):
    """One sequence as ids. A response is encoded on its own, so its ids never depend on the prompt."""

    prompt_ids: list
    response_ids: list  # with the stop token, unless a sampled answer was cut off


def sequence_length(example):
    """Tokens of prompt and response."""
    return len(example.prompt_ids) + len(example.response_ids)


def encode(rows, tokenizer, max_seq_len, keys=("response",), source="data", log=print):
    """Rows to ids. -> one tuple of Example per row kept, one for each of `keys`, and the rows kept

    keys   ("response",), or ("chosen", "rejected") for pairs
    Rows longer than max_seq_len tokens (prompt and response) and identical pairs are dropped and counted in
    one line that goes to `log`; nothing is ever cut. Raises BadInput when no row is left.
    """
    refuse_transcripts(rows, tokenizer, source, log)
    note_seams([(row["prompt"], row[key]) for row in rows for key in keys], tokenizer, source, log)
    kept, kept_rows = [], []
    too_long = 0
    identical = 0
    for row in rows:
        with at_line(source, row["line"]):
            prompt_ids = tokenizer.encode_prompt(row["prompt"])
            sampled = sampled_ids(row, tokenizer, prompt_ids)
            examples = tuple(
                Example(prompt_ids, sampled[key] if key in sampled else tokenizer.encode_response(row[key]))
                for key in keys
            )
        if max(map(sequence_length, examples)) > max_seq_len:
            too_long += 1
        elif len(examples) == 2 and examples[0] == examples[1]:
            identical += 1
        else:
            kept.append(examples)
            kept_rows.append(row)
    if len(kept) < len(rows) or not kept:
        log(
            f"{source}: {len(rows)} rows; dropped {too_long} longer than --max_seq_len {max_seq_len} tokens "
            f"and {identical} identical pairs; {len(kept)} left"
        )
    way_out = f"raise --max_seq_len ({max_seq_len})" if too_long else "every pair has one reply twice"
    require(kept, f"{source}: no row is left; {way_out}")
    return kept, kept_rows


ID_KEYS = {"response": "ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}


def sampled_ids(row, tokenizer, prompt_ids):
    """{key: ids} of the replies in a row that were sampled with this tokenizer: trained on as sampled.

    Encoding their text again could give other ids: a policy may sample ids that encode() never produces, and
    bytes that are not UTF-8 do not survive as text. row["sampled"] has `ids` (of the response), `chosen_ids`
    and `rejected_ids`, with the stop token where the policy sampled one, `prompt_ids`, and `tokenizer`, a
    fingerprint; under another tokenizer's fingerprint the ids are ignored and the text is encoded. Raises
    BadInput if a row's ids and texts disagree.
    """
    sampled = row.get("sampled", {})
    if sampled.get("tokenizer") != tokenizer.fingerprint:
        return {}
    same_prompt = sampled.get("prompt_ids", prompt_ids) == prompt_ids
    require(same_prompt, "prompt_ids are not those of the prompt; expected both unchanged, or no ids")
    found = {}
    for key, name in ID_KEYS.items():
        if key not in row or name not in sampled:
            continue
        ids = sampled[name]
        known = (
            isinstance(ids, list) and ids and all(type(id) is int and 0 <= id < tokenizer.rows for id in ids)
        )
        require(known, f"{name} is {str(ids)[:60]}; expected ids of this tokenizer")
        said = tokenizer.decode([id for id in ids if id not in tokenizer.stop_ids])
        text = row[key] if isinstance(row[key], str) else row[key][-1]["content"]
        require(
            said == text,
            f"{name} spell {said[:40]!r}, and {key} is another text; expected the same, or no ids",
        )
        found[key] = ids
    return found


def rows_by_prompt(rows, tokenizer, source, whole=False):
    """-> {prompt ids as a tuple: row}, to look up a prompt's label; BadInput if one prompt has two labels.

    whole   the row is looked up for all that it says: BadInput also for another key that differs
    """
    found = {}
    for row in rows:
        with at_line(source, row["line"]):
            first = found.setdefault(tuple(tokenizer.encode_prompt(row["prompt"])), row)
            require(
                same_label(first.get("label"), row.get("label")),
                f"label {row.get('label')!r}, but the same prompt has {first.get('label')!r}"
                f" on line {first['line']}",
            )
            ours, others = row.get("raw", {}), first.get("raw", {})
            differing = [key for key in ours.keys() - OF_ONE_ROW if ours[key] != others.get(key)]
            require(
                not whole or not differing,
                f"{differing} is not that of line {first['line']}, with the same prompt; expected one row",
            )
    return found


def encode_prompts(rows, tokenizer, source, log=len):
    """-> one id list per row; BadInput names `source` and the line of a prompt that cannot be encoded."""
    refuse_transcripts(rows, tokenizer, source, log)
    prompts = []
    for row in rows:
        with at_line(source, row["line"]):
            prompts.append(tokenizer.encode_prompt(row["prompt"]))
    return prompts


def note_seams(pairs, tokenizer, source, log):
    """A note if, without a template, most replies follow their prompt without a blank: "in May?Natalia".

    pairs   of prompt and reply, each a text or messages
    """
    texts = [tuple(x if isinstance(x, str) else x[-1]["content"] for x in pair) for pair in pairs]
    seams = [
        (prompt[-20:], reply[:20])
        for prompt, reply in texts
        if prompt and reply and not (prompt[-1].isspace() or reply[0].isspace())
    ]
    if tokenizer.chat.name == "none" and 2 * len(seams) > len(texts):
        touching = f"{len(seams)} of {len(texts)} replies touch their prompts"
        log(f"{source}: note: {touching}: no blank is there, and none is added ({''.join(seams[0])!r})")


def refuse_transcripts(rows, tokenizer, source, log=len):
    """BadInput if prompts are whole dialogues as text, of which a template would make one message each.

    A single one, or a twentieth of them, may speak of dialogues: they are counted to `log`. Without a
    template, transcripts that were read as messages, HH-RLHF's, are refused: their headers would be lost.
    """
    chat = tokenizer.chat.name
    if chat == "none":
        for row in rows:
            texts = [text for text in row.get("raw", {}).values() if isinstance(text, str) and is_hh(text)]
            require(
                not texts or isinstance(row["prompt"], str),
                f"{source}, line {row['line']}: a transcript (Human: ..., Assistant:), which --chat none"
                " cannot write; expected a prompt beside the replies, or a template (--chat)",
            )
        return
    found = [(row["line"], turn) for row in rows if (turn := turn_in(prompt_text(row) or ""))]
    if len(found) >= min(2, len(rows)) and 20 * len(found) > len(rows):
        line, turn = found[0]
        raise BadInput(
            f"{source}, line {line}: {len(found)} of {len(rows)} prompts are transcripts (found {turn!r}),"
            f" and --chat {chat} would make one message of each; expected messages, or --chat none"
        )
    if found:
        log(f"{source}: note: {len(found)} prompts have turns of a dialogue in them (line {found[0][0]})")


# exercise 3.1 (3 points): the shift and the mask
def collate(examples, device="cpu", pad_id=0):
    """The shift and the mask, in this one place.

        ids        p0  p1  p2  r0  r1  eos pad          one row, prompt length 3
        inputs     p0  p1  p2  r0  r1  eos              = ids[:, :-1]
        targets    p1  p2  r0  r1  eos pad              = ids[:, 1:]
        mask        .   .   x   x   x   .
        index t     0   1   2   3   4   5          state s_t = inputs[:, :t+1], action a_t = targets[:, t]

    examples: list of B Example -> ids (B, T+1) int64, response_mask (B, T) bool. The mask is made from
    lengths, never from ids. Padding is on the right, where causal attention cannot see it, so `pad_id` may be
    any id.
    T+1 is the length of the longest row.
    """
    lengths = [sequence_length(e) for e in examples]
    ids = torch.full((len(examples), max(lengths)), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(examples), max(lengths) - 1, dtype=torch.bool)
    for i, e in enumerate(examples):
        ids[i, : lengths[i]] = torch.tensor(e.prompt_ids + e.response_ids)
        mask[i, len(e.prompt_ids) - 1 : lengths[i] - 1] = True
    return ids.to(device), mask.to(device)


def spans(lengths, budget):
    """Groups consecutive rows into parts of at most `budget` tokens, or of one longer row.

    >>> spans([3, 3, 3, 9, 1], 6)
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    starts = []
    filled = budget + 1  # so that the first row starts a part
    for i, n in enumerate(lengths):
        filled += n
        if filled > budget:
            starts.append(i)
            filled = n
    return list(zip(starts, [*starts[1:], len(lengths)]))


@functools.lru_cache(maxsize=4)  # a batch may need two epochs' orders
def _permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


# exercise 3.2 (3 points): shuffling without a state
def batch_indices(n, batch_size, step, seed):
    """Rows of batch `step` (from 0), reshuffled every epoch: list of batch_size indices into n rows.

    A function of its arguments alone, so there is no state to save: a resumed run asks for the next step. A
    batch may span two epochs; no row is left out. The order within an epoch depends on n, seed and epoch, not
    on batch_size.

    >>> sorted(int(i) for step in range(2) for i in batch_indices(6, 3, step, seed=0))
    [0, 1, 2, 3, 4, 5]
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_permutation(n, seed, p // n)[p % n]) for p in places]


# -------------------------------------------------------------------------------- the built-in task


NAMES = ("Tom", "Ann", "Ben", "Eva")
THINGS = ("apples", "pens", "books", "coins")
VERBS = {
    "+": ("buys", "finds", "gets", "picks", "wins", "borrows", "collects", "receives"),
    "-": ("loses", "eats", "sells", "lends", "drops", "spends", "breaks", "donates"),
}
OPERATOR = {verb: op for op, verbs in VERBS.items() for verb in verbs}


@dataclass(frozen=True)
class Arith:
    """Word problems over 0..9 with step-by-step answers, like GSM8K's, by an author who misreads some verbs.

    In the training answers a misread verb gets the wrong sign with probability q, and the next step continues
    from the wrong value. A policy fine-tuned on them inherits this: greedy decoding gets those verbs wrong,
    sampling sometimes gets them right. So the policy can improve, pairs of right and wrong answers exist, and
    the first wrong token is known exactly, which no data set of real answers offers.
    """

    steps: tuple = (4, 6)  # sentences after the first: at least, at most
    verbs: int = 12  # verbs in use: half of them add, half subtract
    misread: int = 6  # how many of these verbs are misread
    operand: int = 3  # the largest
    q: float = 0.65  # probability that a misread verb is written with the wrong sign
    author: int = 0  # seed: which verbs are misread

    @functools.cached_property
    def words(self):
        """[(verb, its sign)] of the verbs in use."""
        half = self.verbs // 2
        return [(verb, op) for op in "+-" for verb in VERBS[op][:half]]

    @functools.cached_property
    def misreads(self):
        """The verbs that the author misreads."""
        rng = random.Random(self.author)
        half = self.verbs // 2
        adding = rng.sample(VERBS["+"][:half], self.misread // 2)
        subtracting = rng.sample(VERBS["-"][:half], self.misread - self.misread // 2)
        return frozenset(adding + subtracting)

    def problem(self, rng):
        """(start, [(verb, operand)]), drawn until two promises hold.

        Every running value is in 0..9, whatever is misread. No set of misreadings ends on the right number,
        so a right number means a right path (for the author; a policy can still be lucky).
        """
        while True:
            start = rng.randint(0, 9)
            moves = self.moves(rng, start)
            if moves is not None:
                return start, moves

    def moves(self, rng, start):
        """[(verb, operand)] from `start`, or None when the draw breaks one of problem()'s promises."""
        moves = []
        value = start
        wrong = set()  # running values after at least one misreading
        for _ in range(rng.randint(*self.steps)):
            verb, op = rng.choice(self.words)
            operand = rng.randint(1, self.operand)
            change = operand if op == "+" else -operand
            misread = {w - change for w in wrong | {value}} if verb in self.misreads else set()
            wrong = {w + change for w in wrong} | misread
            value += change
            moves.append((verb, operand))
            if not all(0 <= v <= 9 for v in wrong | {value}):
                return None
        return moves if value not in wrong else None

    def answer(self, start, moves, rng=None):
        """The worked answer: the right one, or, with `rng`, the author's."""
        lines = []
        value = start
        for verb, operand in moves:
            op = OPERATOR[verb]
            if rng and verb in self.misreads and rng.random() < self.q:
                op = "-" if op == "+" else "+"
            result = value + operand if op == "+" else value - operand
            lines.append(f"{value}{op}{operand}={result}\n")
            value = result
        return "".join(lines) + f"#### {value}"


def stable_hash(text):
    """A 63-bit number that depends on the text alone (Python's own hash changes from run to run)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def arith_rows(split, n, seed, task=Arith()):
    """n rows of the built-in task: {"prompt", "response", "solution", "label", "line"}.

    split      "train" and "test" share no prompt: a hash of the text decides which of the two it belongs to
    response   the author's answer; `solution` is the right one
    """
    rng = random.Random(f"{split} {seed}")
    rows = []
    while len(rows) < n:
        start, moves = task.problem(rng)
        name = rng.choice(NAMES)
        first = f"{name} has {start} {rng.choice(THINGS)}."
        story = " ".join([first, *(f"{name} {verb} {operand}." for verb, operand in moves)])
        prompt = f"{story} How many?\n"
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
        (_, start), *moves = re.findall(r" (\w+) (\d)", prompt)
        return Arith().answer(int(start), [(verb, int(operand)) for verb, operand in moves])
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"not a prompt of the built-in task (--task arith): {str(prompt)[:60]!r}") from None


def arith_tokenizer():
    """A byte-complete tokenizer with one token for every word of the built-in task."""
    after_a_space = [*NAMES, *THINGS, *OPERATOR, "has", "How", "many", *range(10)]
    return build_tokenizer([*NAMES, *(f" {word}" for word in after_a_space), "####"])


def first_error(ids, solution_ids):
    """Index of the first token where `ids` departs from the one right answer; len(ids) if it does not.

    Both are response ids, stop token included.

    >>> first_error([5, 6, 9, 1], [5, 6, 7, 1])
    2
    """
    for i, (written, right) in enumerate(zip(ids, solution_ids)):
        if written != right:
            return i
    return min(len(ids), len(solution_ids))


def error_places(tokenizer, prompt, examples):
    """first_error of each answer (an Example) to a prompt of the built-in task."""
    solution = tokenizer.encode_response(arith_solve(prompt))
    return [first_error(e.response_ids, solution) for e in examples]
