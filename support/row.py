"""One row of a JSON lines file: its prompt, replies, label, steps. What it says is not ignored in silence."""

import json
import re
from typing import NamedTuple

from support.files import BadInput, require
from support.row_keys import (
    CANDIDATES,
    CONTEXT,
    HARMLESS,
    NAMES,
    PAIR,
    PROMPT,
    REPLIES,
    RESPONSE,
    SOLUTION,
    SPEAKING,
    STEPS,
    SYSTEM,
    is_empty,
    missing,
    pick,
    texts_in,
)
from support.row_labels import is_number, read_label, same_label, stated_labels
from support.row_messages import adds_nothing, read_conversation, reply_keys, split_reply, used_histories


def read_row(fields, needs, optional=()):
    """One row's canonical keys -> values, with its margin if it is a pair; BadInput for what would be lost.

    A label that is empty, or in a box that cannot be read whole, is None; an optional one that is no final
    answer is left out.
    """
    wanted = [*needs, *(key for key in optional if states(fields, key))]
    row = {}
    refuse_header(fields)
    refuse_undoubled(fields)
    refuse_prm800k(fields)
    if {"prompt", "response", "chosen", "rejected"} & set(wanted):
        row = read_conversation(fields, wanted)
    if "label" in wanted:
        reply_key = dict(reply_keys(fields, wanted)).get("response")
        try:
            row["label"] = read_label(fields, reply_key)
        except BadInput:
            if "label" in needs:
                raise
    if "responses" in wanted:
        row |= read_candidates(fields)
        fields = {key: value for key, value in fields.items() if key not in CANDIDATES}
    if "steps" in wanted:
        row["steps"] = read_steps(fields)
        fields = {name: value for name, value in fields.items() if name not in STEPS}
    refuse_verdict(fields)
    refuse_unknown(fields)
    row = {key: row[key] for key in (*wanted, "labels") if key in row}
    if "chosen" in wanted and not is_empty(fields.get("margin")):
        row["margin"] = read_margin(fields["margin"])
    return row


def keys_read(fields, row):
    """{key of the row: what it was read as}, for the canonical keys that read_row found"""
    read = {}
    for names in (PROMPT, CONTEXT, SYSTEM) if "prompt" in row else ():
        name, value = pick(fields, names)
        if name and not (names is CONTEXT and adds_nothing(value, fields)):
            read[name] = "prompt"
    keys = reply_keys(fields, row) if {"prompt", *REPLIES} & set(row) else ()
    split = {name: split_reply(fields[name], name) for _, name in keys}
    histories = used_histories(fields, row, keys, split)
    _, stated = pick(fields, PROMPT)
    known = len(stated) if isinstance(stated, list) else int(stated is not None)  # messages
    for key, name in keys:
        parts = ["prompt"] * ("prompt" in row and len(histories[name]) > known)
        parts += [key] * (key in row and key in REPLIES)
        read |= {name: " and ".join(parts)} if parts else {}
    for name, label in stated_labels(fields) if row.get("label") is not None else ():
        if same_label(label, row["label"]):
            read[name] = f"{read[name]} and label" if name in read else "label"
    read |= {"responses": "responses"} if "responses" in row else {}
    read |= {"labels": "labels"} if "labels" in row else {}
    read |= {"completions": "steps", "labels": "steps"} if "steps" in row else {}
    read |= {"margin": "margin"} if "margin" in row else {}
    return read


def states(fields, key):
    """Whether a row says something of an optional key."""
    return any(not is_empty(fields.get(name)) for name in NAMES[key])


def read_margin(value):
    """What the scaled difference of a pair must exceed, in the place of --margin: finite in fp32."""
    finite = type(value) in (int, float) and abs(value) < 1e38  # False for nan
    require(finite, f"margin is {json.dumps(value)[:60]}; expected a finite number")
    return float(value)


def read_candidates(fields):
    """{"responses": texts, and where the row says which of them are right, "labels": bools}

    A sampled answer may be empty.
    """
    responses, labels = fields.get("responses"), fields.get("labels")
    if is_empty(responses):
        raise missing(fields, "responses")
    texts = isinstance(responses, list) and all(isinstance(x, str) for x in responses)
    require(texts, f"responses is {json.dumps(responses)[:60]}; expected a list of texts")
    if is_empty(labels):
        return {"responses": responses}
    verdicts = isinstance(labels, list) and len(labels) == len(responses) and all(x in (0, 1) for x in labels)
    require(
        verdicts,
        f"labels is {json.dumps(labels)[:60]}; expected true or false (or 1, 0) for each of the"
        f" {len(responses)} responses",
    )
    return {"responses": responses, "labels": [bool(x) for x in labels]}


# -------------------------------------------------------------------------------- steps


class Step(NamedTuple):
    """A step of an answer and what it was found to be."""

    text: str  # ends with a line break, unless it is the last one of a finished answer
    label: float  # from 1, right, by 0, neutral, to -1, wrong


def read_steps(fields):
    """The `completions` of one answer with their `labels`: a list of Step

    A line break is put after each step but the last that has none of its own. A label is true or false, or a
    number from -1 to 1. Raises BadInput for anything else.
    """
    texts, labels = fields.get("completions"), fields.get("labels")
    shown = f"completions is {json.dumps(texts)[:60]} and labels is {json.dumps(labels)[:60]}"
    lists = isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels) > 0
    require(lists, f"{shown}; expected two lists of one length, the steps of an answer and a label for each")
    require(
        all(isinstance(text, str) and text.strip() for text in texts),
        f"{shown}; expected steps that are texts and not empty",
    )
    known = [isinstance(label, (int, float)) and -1 <= label <= 1 for label in labels]  # False for nan
    require(all(known), f"{shown}; expected labels that are true or false, or numbers from -1 to 1")
    texts = [text if text.endswith("\n") else text + "\n" for text in texts[:-1]] + texts[-1:]
    numbers = [2.0 * label - 1.0 if isinstance(label, bool) else float(label) for label in labels]
    return [Step(text, number) for text, number in zip(texts, numbers)]


def refuse_prm800k(fields):
    """BadInput for a row as PRM800K ships it: its labeller's choices among completions are not read here."""
    label = fields.get("label")
    require(
        not (isinstance(label, dict) and "steps" in label),
        f"label is {json.dumps(label)[:60]}, PRM800K's verdicts on steps; expected prompt, completions and "
        'labels, which the lines under "Step labels" in classroom/recipes.md make of them',
    )


# -------------------------------------------------------------------------------- what is refused


def refuse_header(fields):
    """BadInput for a row that repeats the names of its keys: the header of a table."""
    named = [name for name in SPEAKING if str(fields.get(name)).strip().lower() == name]
    require(len(named) < 2, f"{' and '.join(named)} have their own names as texts: the header of a table?")


def refuse_verdict(fields):
    """BadInput for a label that is no answer, wanted or not: TRL's unpaired preferences have a verdict on the
    response there."""
    verdict = fields.get("label")
    require(
        is_empty(verdict) or isinstance(verdict, str) or is_number(verdict),
        f"label is {json.dumps(verdict)[:60]}; expected an answer: a finite number or a text (if it is a "
        "verdict on the response, keep the rows that are wanted, then --ignore_keys label)",
    )


def refuse_unknown(fields):
    """BadInput for a field that says something and that nothing here reads."""
    read = "\n".join(texts_in([fields.get(name) for name in SPEAKING]))
    for name, value in fields.items():
        own = [text for text in texts_in(value) if is_prose(text) and text.strip() not in read]
        harmless = name.replace("-", "_") in HARMLESS
        if name in SPEAKING or is_empty(value) or harmless and not own:
            continue
        if name == "text" and is_rendering(value, fields):
            continue
        raise BadInput(
            f"{name} is {json.dumps(value)[:60]}, which nothing here reads; expected keys among "
            f"{', '.join(SPEAKING)}; if it may be left out: --ignore_keys {name}"
        )


# LaTeX commands whose backslash JSON takes for an escape, so that \frac becomes a form feed and "rac". Some
# can be words after a tab or at the start of a line: they count within $...$, \(...\) and \[...\] only, where
# every tab and line break begins such a command; and "e", "i" and "u", of \ne, \ni and \nu, only after a
# space.
AFTER_TAB = r"(?:an[hn]?|au|o|op|imes|heta|ext[a-z]*|frac|riangle[a-z]*|ilde|herefore|binom)(?![a-zA-Z])"
AFTER_BREAK = r"(?:eq|abla|otin|mid|ot|eg|earrow|exists|parallel|subseteq)(?![a-zA-Z])"
UNDOUBLED = re.compile(
    r"(\x08(?:oxed|egin|eta|inom|ar|mod|ullet|ot|ecause|race|ig(?:cup|cap|oplus|otimes|[lrg]{0,2})|lack[a-z]*"
    r"|ackslash|old(?:math|symbol))(?![a-zA-Z])"
    r"|(?<!\w)\x08[fm](?![a-zA-Z])"
    r"|\f(?:rac(?=[{\d\\ ])|(?:orall|box|lat|rown)(?![a-zA-Z]))"
    r"|\r(?:ight[a-z]*|angle|ho|floor|ceil|brace|[vV]ert|m|times)(?![a-zA-Z])"
    r"|\t(?:(?:ext[a-z]*|ag)(?= ?{)|frac(?=[{\d]))"
    r"|\t(?:imes|heta|riangle[a-z]*|ilde|anh|herefore|binom)(?![a-zA-Z]))"
    rf"|(?:\$|\\[(\[])[^$\n\t]*(?:(\t{AFTER_TAB}|\n{AFTER_BREAK}|(?<= )\n[eiu](?![a-zA-Z]))[^$\n\t]*)+"
    r"(?:\$|\\[)\]])"
)


def refuse_undoubled(fields):
    """BadInput for texts in which a backslash of LaTeX was not doubled when they were written as JSON."""
    for found in filter(None, map(UNDOUBLED.search, texts_in(fields))):
        command = json.dumps(found[found.lastindex])[1:-1]
        raise BadInput(
            f"a text has {command} with one backslash, which JSON reads as a control character and"
            f" {command[2:]!r}; expected two, as json.dumps writes it"
        )


def is_prose(text):
    """Whether a text, in any script, is longer than what names a source or a topic; no URL or hash is."""
    return len(text.encode("utf-8", "replace")) > 200 and not (text.isascii() and len(text.split()) < 2)


def is_rendering(text, fields):
    """Whether a text is Alpaca's rendering of its row: all that the row says, the reply last, and headers."""
    said = [fields.get(name) for name in (*PROMPT, *CONTEXT, *PAIR, *SOLUTION, *RESPONSE)]
    parts = [part for part in said if not is_empty(part)]
    rest = str(text).strip()
    if not all(isinstance(part, str) and part.strip() in rest for part in parts):
        return False
    ends_with_reply = bool(parts) and rest.endswith(parts[-1].strip())
    for part in sorted(parts, key=len, reverse=True):
        rest = rest.replace(part.strip(), "")
    return ends_with_reply and not is_prose(re.sub(r"\s*### \w+:\s*", "", rest))
