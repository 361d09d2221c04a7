"""The label of a row: what its keys state as the right answer."""

import json
import math
import re
from decimal import Decimal

from support.claims import after_hashes, last_boxes, without_thoughts
from support.files import BadInput, require
from support.graders import gsm8k_label, same_answer
from support.meanings import MAX_CHARS, is_value
from support.row_keys import LABEL, NAMES, is_empty, missing
from support.surroundings import NUMBER_WORD


def read_label(fields, reply_key=None):
    """The label of a row as text, None if it is empty or in a box that cannot be read whole.

    reply_key   the key that the response is read from, which may well be wrong
    Raises BadInput for no final answer, and if two keys state different ones.
    """
    found = stated_labels(fields)
    if not found:
        if any(key in fields for key in NAMES["label"]):
            return None
        raise missing(fields, "label")
    (first, label), *others = found
    for name, other in others:
        if None in (label, other) or name == reply_key:
            continue
        differ = is_final(label) and is_final(other) and not same_answer(label, other, "math")
        require(
            not differ,
            f"{first} says {label!r}, but {name} says {other!r}; expected one answer"
            f" (--ignore_keys {name}, if that is none)",
        )
    return label


def stated_labels(fields):
    """[(key, label)] of the keys that state one; None for a box that cannot be read whole.

    BadInput if the first key states no final answer: those after it may be texts without any.
    """
    names = [name for name in LABEL if not is_empty(fields.get(name)) and fields[name] not in ABSENT]
    if "label" in names and isinstance(fields.get("correct"), bool):
        names = ["label"]  # a row that --stage grade wrote: its `answer` is what the response claimed
    found = []
    for name in names:
        try:
            found.append((name, label_in(fields, name)))
        except BadInput:
            if not found:
                raise
    return found


def same_label(one, other):
    """Whether two labels, or the absence of any (None), are the same."""
    return one == other or None not in (one, other) and same_answer(one, other, "math")


# Texts that say that there is none, as pandas writes it.
ABSENT = ("nan", "NaN", "None", "none", "null", "NULL", "N/A", "n/a", "NA", "<NA>", "#N/A", "undefined")
ANSWER_IS = re.compile(r"(?i)\W*(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is\b|\s*:)\s*:?")


def is_final(answer):
    """Whether a text is a final answer: a value, or a word or two; no sentence, no "18 eggs" or "seven"."""
    has_number = re.search(rf"(?i)\d|\b{NUMBER_WORD}\b", answer)
    return is_value(answer) or len(answer.split()) <= 2 and not has_number


def label_in(fields, name):
    """What a field states as label (1e-05 is 0.00001), None if its box cannot be read whole, or if nothing
    follows "The answer is"; BadInput for what is no final answer."""
    value = fields[name]
    if isinstance(value, str):
        value = without_thoughts(value)
        if "####" in value and (after_hashes(value) is not None or "\\boxed" not in value):
            value = gsm8k_label(value)
        elif name == "solution" or "\\boxed" in value:
            boxes = last_boxes(value)
            if boxes is None and "\\boxed" in fields[name]:
                return None  # as in \boxed{-15}x^3: the row is dropped and counted
            value = boxes or value
            has_number = is_value(value) and re.search(r"\d", value)
            require(boxes or has_number, f"{name} is {value[-60:]!r}; expected \\boxed{{...}} in it")
        elif said := ANSWER_IS.match(value):
            value = value[said.end() :].removesuffix(".")
        value = re.sub(r"(?<!\\)[,;]+$", "", value.strip())  # of the sentence around it; \, is a space
        if not value:
            return None  # "The answer is", and nothing after it
    elif is_number(value):
        value = plain_digits(value)
    short = isinstance(value, str) and len(value) <= MAX_CHARS
    require(
        short,
        f"{name} is {json.dumps(value)[:60]}; expected a final answer: a finite number, or a text of at most "
        f"{MAX_CHARS} characters",
    )
    return value


def is_number(value):
    """Whether value is a finite number; true and false are none."""
    return type(value) is int or type(value) is float and math.isfinite(value)


def plain_digits(number):
    """Digits without an exponent: 1e-05 -> "0.00001", 8.0 -> "8"."""
    digits = format(Decimal(repr(number)), "f")
    return re.sub(r"\.0+$", "", digits)
