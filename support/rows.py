"""Rows of a JSON lines file, and what only the whole file shows: chat marks, verdicts, repeated prompts."""

import itertools
import re

from support.files import BadInput, at_line, read_jsonl, require
from support.row import keys_read, read_row
from support.row_keys import CONVERSATION, HARMLESS, PAIR, PROMPT, RESPONSE, SAMPLED, SOLUTION, is_empty
from support.row_messages import last_text, reply_keys
from support.row_notes import (
    notes_on_absent,
    notes_on_contexts,
    notes_on_keys,
    notes_on_pairs,
    notes_on_prompts,
    notes_on_replies,
    notes_on_spelling,
    notes_on_steps,
    notes_on_values,
    replied,
    replies_of,
    verdicts_among,
)

# Keys in which rows of one prompt may differ: what describes a row, and sampled replies.
OF_ONE_ROW = HARMLESS - {"meta", "metadata"} | {*RESPONSE, *PAIR, *CONVERSATION}


def load_rows(path, needs, limit=0, optional=(), ignore_keys=(), log=print):
    """Rows of a JSON lines file with the canonical keys of `needs` (and those of `optional` that it has).

    needs, optional   among "prompt", "response", "chosen", "rejected", "responses", "label", for which NAMES
                      lists the spellings, and "steps", which `completions` and `labels` supply
    limit             reads only so many rows; 0 reads all
    ignore_keys       keys to treat as if no row had them
    log               gets lines: how many rows were dropped for want of a label that can be read, and notes
    -> list of {"prompt": ..., "line": int, "raw": the row as read, "fields": raw without ignore_keys,
       "read": {key of fields: what it was read as}, "sampled": see data.sampled_ids}. A prompt is a text or a
       list of {"role", "content"} that does not end with the assistant; a reply is a text or a list of one
       assistant message; a label is a text; steps are a list of Step. Beside "responses" a row may have
       "labels", a pair a "margin".
    Raises BadInput with the line number for a row that lacks something or says something that would be lost.
    """
    rows = []
    unlabelled = 0
    lines = read_jsonl(path)
    for line, raw in itertools.islice(lines, limit or None):
        fields = {key: value for key, value in raw.items() if key not in ignore_keys}
        with at_line(path, line):
            row = read_row(fields, needs, optional)
            read = keys_read(fields, row)
        if "label" in needs and row["label"] is None:
            unlabelled += 1
        else:
            kept = {"line": line, "raw": raw, "fields": fields, "read": read, "sampled": sampled_in(fields)}
            rows.append({**row, **kept})
    require(rows or unlabelled, f"{path}: no rows; expected one JSON object a line")
    if limit and goes_on(lines):
        log(f"{path}: the first {limit} rows are read (--limit)")
    if unlabelled:
        log(f"{path}: dropped {unlabelled} rows with an empty or unreadable label; {len(rows)} left")
    require(rows, f"{path}: no row is left: every label is empty or unreadable")
    refuse_replaced(path, rows, needs)
    with at_line(path, rows[0]["line"]):
        notes = refuse_repeated(rows) + refuse_marked(rows)
        refuse_verdicts(rows)
        if "steps" in needs:
            refuse_one_sided(rows)
            notes += refuse_answers(rows) + notes_on_steps(rows)
    if "chosen" in needs:
        notes += notes_on_pairs(rows)
    if "response" in needs:
        notes += notes_on_replies(rows, needs)
    notes += notes_on_prompts(rows) + notes_on_keys(rows, needs) + notes_on_values(rows)
    for note in notes + notes_on_absent(rows) + notes_on_contexts(rows) + notes_on_spelling(rows):
        log(f"{path}: note: {note}")
    return rows


def sampled_in(fields):
    """A row's sampled ids with the fingerprint of their tokenizer; {} without it, or ids of a reply."""
    sampled = {key: fields[key] for key in SAMPLED if fields.get(key) is not None}
    has_ids = not {"ids", "chosen_ids", "rejected_ids"}.isdisjoint(sampled)
    is_named = re.fullmatch("[0-9a-f]{64}", str(sampled.get("tokenizer")))  # sha256
    return sampled if has_ids and is_named else {}


def goes_on(lines):
    """Whether a file has another row, good or bad."""
    try:
        return next(lines, None) is not None
    except BadInput:
        return True


def refuse_repeated(rows):
    """BadInput for a file most of whose replies have their prompts in them; in one row it can be chance, and
    is noted: list of texts."""
    found = {}
    for row in rows:
        for key, reply in replies_of(row) if "prompt" in row else ():
            stated = [row["fields"].get(name) for name in PROMPT]  # without its context
            prompts = [last_text(row["prompt"]), *(text.strip() for text in stated if isinstance(text, str))]
            repeated = [prompt[:40] for prompt in prompts if prompt and repeats(prompt, reply)]
            found.setdefault(key, []).append(repeated[0] if repeated else None)
    says = "replies begin with their prompt, or have it after a header, which would be trained on"
    return refuse_most(found, says, "replies alone")


# What may stand before a prompt in a rendered dialogue: "Human:", "[INST]", "<|user|>", a line "## Question".
HEADER_END = re.compile(r"[:\uff1a>\]][\s*]{0,3}\Z|(?:\A|\n)#[^\n]*\n\s*\Z")


def repeats(prompt, reply):
    """Whether a text begins with its prompt, or has it after a header."""
    place = reply.find(prompt)
    headed = place > 0 and HEADER_END.search(reply[:place]) is not None
    return reply != prompt and (place == 0 or headed)


# Spellings of special tokens that open or close a text for some model, or a message inside it.
MARKER = (
    r"<\|[^\s|<>]{1,40}\|>|<\uff5c[^\s\uff5c<>]{1,40}\uff5c>|</?s>"
    r"|<(?:bos|eos|pad|start_of_turn|end_of_turn)>|\[(?:/?INST|BOS|EOS|PAD)\]"
)
HEADER = r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>"
MARKED = re.compile(rf"\A(?:{MARKER})|(?:{MARKER})\Z|{HEADER}")


def turns_of(roles, more):
    """A pattern for what opens a turn in a text: HH-RLHF, Vicuna, Alpaca; HelpSteer; models' templates."""
    line = r"(?:\A|[\n\r])"
    return re.compile(
        rf"(?:{line}|### ?|(?<=[.?!]) +)(?:{roles}) ?:|{line}<(?:{roles})>:"
        rf"|(?-i:\b(?:{roles.upper()}):)|{line}(?:{roles})[\n\r]|[\n\r](?:{roles})\Z|{more}"
        rf"|<(?:extra_id_\d+|start_of_turn|\|im_start\||\|start_header_id\|)>(?:{roles})"
        rf"|<\|(?:{roles})\|>|<\uff5c(?:{roles})\uff5c>",
        re.IGNORECASE,
    )


TURN = turns_of("assistant|bot|chatbot|ai", r"### Response:|\[/INST\]|<start_of_turn>model")
ASKING = turns_of("human|user|prompter", r"### Instruction:|\n\d+\. Instruction:|\[INST\]")


def turn_in(text):
    """What opens the assistant's turn in a text, or, at its beginning, the user's; None if nothing does."""
    found = TURN.search(text) or ASKING.match(text.lstrip())
    return found and found[0].strip()


RESULT = re.compile(r"\\boxed|####|^# Answer", re.MULTILINE)  # the last one is PRM800K's
MARK_OF_STEP = re.compile(r"(?:^|\s)(?:[-+]|\u043a\u0438)\s*\Z")  # Math-Shepherd's
# Messages written as text: as JSON or by Python, a list of them, one alone, or the object around them.
MESSAGE = r"""\{\s*['"](?:role|content|from|value)['"]\s*:"""
SERIALISED = re.compile(
    rf"""\A\s*(?:(?:array\()?\[\s*{MESSAGE}|\{{\s*['"](?:messages|conversations)['"]\s*:\s*\["""
    rf"""|(?=.*['"](?:role|from)['"]\s*:\s*['"](?:user|human|assistant|gpt|system)['"]){MESSAGE})""",
    re.DOTALL,
)


def refuse_marked(rows):
    """BadInput if most prompts, or replies, have marks of a chat in them; else notes: list of texts.

    Spellings of special tokens, where a text begins or ends, would be read letter by letter; messages written
    as text, and turns inside a reply, as one message. A reply whose ids are known is not read as text.
    """
    prompted = [row for row in rows if "prompt" in row]  # replies without prompts are only graded
    prompts = {"prompt": [text for row in prompted for text in texts_of(row["prompt"])]}
    replies = {}
    for row in prompted:
        for key, reply in () if row["sampled"] else replies_of(row):
            replies.setdefault(key, []).append(reply)
    token = "the spelling of a special token, which would be read as letters (a chat template was applied?)"
    notes = []
    for texts, name in ((prompts, "prompts"), (replies, "replies")):
        says = f"{name} begin or end with {token}"
        notes += refuse_most(spelled(texts, MARKED), says, "messages, or texts without it")
        says = f"{name} are messages written as text"
        notes += refuse_most(spelled(texts, SERIALISED), says, "a list of messages")
    for turn in (TURN, ASKING):
        says = "replies have turns of a dialogue in them"
        notes += refuse_most(spelled(replies, turn), says, "replies alone")
    spoken = [row["prompt"] for row in prompted if not isinstance(row["prompt"], str)]
    texts = [text for prompt in spoken for text in texts_of(prompt)]
    inside = [turn for text in texts if (turn := TURN.search(text) or ASKING.search(text))]
    if inside:
        found = inside[0][0].strip()
        notes.append(f"{len(inside)} messages of prompts have turns of a dialogue in them (found {found!r})")
    return notes


def texts_of(prompt):
    """The texts of a prompt's messages, without blanks around them."""
    return [prompt.strip()] if isinstance(prompt, str) else [last_text([message]) for message in prompt]


def spelled(texts, marker):
    """{key: texts} -> {key: the marker as it is found in each of them, or None}"""
    found = {}
    for key, of_key in texts.items():
        matches = map(marker.search, of_key)
        found[key] = [match and match[0] for match in matches]
    return found


def refuse_most(found, says, expected):
    """BadInput if something was found in most texts of a key; else a note that counts those that have it.

    found   {key: what was found in each of its texts, or None}: chosen and rejected apart, since a mark on
            one side of the pairs would be all that a reward model learns
    """
    some = []  # (key, what was found)
    for key, of_key in found.items():
        there = [text for text in of_key if text]
        some += [(key, text) for text in there]
        if 2 * len(there) > len(of_key):
            counted = f"{len(there)} of {len(of_key)} {says}"
            raise BadInput(f"{counted}; expected {expected} (found {there[0]!r} in {key})")
    if not some:
        return []
    key, text = some[0]
    n = sum(map(len, found.values()))
    return [f"{len(some)} of {n} {says} (found {text!r} in {key}); they are used like the others"]


def refuse_verdicts(rows):
    """BadInput for a file whose labels, such as 0 and 1, are verdicts on the replies beside them.

    They are answers if most replies begin or end with such a word.
    """
    verdicts = verdicts_among(row["fields"].get("label") for row in rows)
    if not verdicts:
        return
    replies = [["", *re.findall(r"-?\w+", text.lower())] for text in map(replied, rows) if text]
    stated = sum(not verdicts.isdisjoint((*words[:2], words[-1])) for words in replies)
    require(
        2 * stated > len(replies) or not replies,
        f"label is {' or '.join(sorted(verdicts))} in all rows: a verdict on the response? Keep the rows that"
        " are wanted, then --ignore_keys label; if it is the right answer, name it answer",
    )


def refuse_replaced(path, rows, needs):
    """BadInput for a row whose reply is absent, if it would be replaced by a key that holds the reference
    beside other rows' replies."""
    references = {}  # (key, kind of text) -> the line of a row that has it beside its reply
    replies = {}  # line -> the key and kind that its reply was read from
    for row in rows if "response" in needs else ():
        kinds = {key: (key, "####" in str(row["fields"].get(key))) for key in row["fields"]}
        name = dict(reply_keys(row["fields"], needs))["response"]
        replies[row["line"]] = kinds[name]
        beside = [key for key in SOLUTION if key != name and not is_empty(row["fields"].get(key))]
        references |= {kinds[key]: row["line"] for key in beside}
    for line, (name, kind) in replies.items():
        with at_line(path, line):
            require(
                (name, kind) not in references,
                f"the reply is absent or null, and {name} is the reference beside that of line"
                f" {references.get((name, kind))}; expected a reply in every row, or --ignore_keys {name}",
            )


def refuse_answers(rows):
    """BadInput for a file most of whose `completions` are whole answers, since several of a row state a
    result, or are rated in their own text; a minority is counted in a note: list of texts"""
    marked = sum(all(map(MARK_OF_STEP.search, (step.text for step in row["steps"]))) for row in rows)
    require(
        2 * marked <= len(rows),
        "the steps of most rows end in + or -, their labels, which would be read; expected their texts alone",
    )
    several = []  # lines
    for row in rows:
        if sum(RESULT.search(step.text) is not None for step in row["steps"]) > 1:
            several.append(row["line"])
    require(
        2 * len(several) <= len(rows),
        "several completions of a row state a result (\\boxed, ####, # Answer): answers, or alternatives?"
        " expected the steps of one answer; answers with labels are named responses",
    )
    says = "have several steps that state a result, which are read as steps of one answer"
    return [f"{len(several)} rows {says} (line {several[0]})"] if several else []


def refuse_one_sided(rows):
    """BadInput for a file of numbers among which 0 could mean wrong as well as neutral: none is negative."""
    numbers = [x for row in rows for x in row["raw"]["labels"] if not isinstance(x, bool)]
    require(
        not numbers or min(numbers) < 0 or min(numbers) == 1,
        "the labels of the file are numbers from 0 to 1, of which 0 could be wrong or neutral; expected true "
        "and false, or numbers from -1 (wrong) by 0 (neutral) to 1 (right): a share p is 2p - 1",
    )
