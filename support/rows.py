"""Rows of a JSON lines file, and what only the whole file shows: chat marks, verdicts, repeated prompts."""

import collections
import itertools
import re

from support.files import BadInput, at_line, read_jsonl, require
from support.row import (
    CONVERSATION,
    HARMLESS,
    LABEL,
    OF_PROMPTS,
    OF_ROWS,
    PAIR,
    REPLIES,
    RESPONSE,
    SAMPLED,
    SOLUTION,
    is_empty,
    read_row,
    reply_keys,
    said,
)
from support.tokenizers import is_conversation

# Keys in which rows of one prompt may differ: what describes a row, and sampled replies.
OF_ONE_ROW = HARMLESS - {"meta", "metadata"} | {*RESPONSE, *PAIR, *CONVERSATION}


def load_rows(path, needs, limit=0, optional=(), ignore_keys=(), log=print):
    """Rows of a JSON lines file with the canonical keys of `needs` (and those of `optional` that it has).

    needs, optional   among "prompt", "response", "chosen", "rejected", "responses", "label", for which NAMES
                      lists the spellings, and "steps", which `completions` and `labels` supply
    limit             reads only so many rows; 0 reads all
    ignore_keys       keys to treat as if no row had them
    log               gets one line that counts the rows dropped for want of a label that can be read
    -> list of {"prompt": ..., "line": int, "raw": the row as read, "fields": raw without ignore_keys,
       "sampled": see data.sampled_ids}. A prompt is a text or a list of {"role", "content"} that does not end
       with the assistant; a reply is a text or a list of one assistant message; a label is a text; steps are
       a list of Step. Beside "responses" a row may have "labels".
    Raises BadInput with the line number for a row that lacks something or says something that would be lost.
    """
    rows = []
    unlabelled = 0
    for line, raw in itertools.islice(read_jsonl(path), limit or None):
        fields = {key: value for key, value in raw.items() if key not in ignore_keys}
        with at_line(path, line):
            row = read_row(fields, needs, optional)
        if "label" in needs and row["label"] is None:
            unlabelled += 1
        else:
            sampled = {key: fields[key] for key in SAMPLED if key in fields}
            rows.append({**row, "line": line, "raw": raw, "fields": fields, "sampled": sampled})
    require(rows or unlabelled, f"{path}: no rows; expected one JSON object a line")
    if unlabelled:
        log(f"{path}: dropped {unlabelled} rows with an empty or unreadable label; {len(rows)} left")
    require(rows, f"{path}: no row is left: every label is empty")
    refuse_replaced(path, rows, needs)
    with at_line(path, rows[0]["line"]):
        refuse_repeated(rows)
        refuse_marked(rows)
        refuse_verdicts(rows)
        if "steps" in needs:
            refuse_one_sided(rows)
    for note in notes_on_ratings(rows, needs):
        log(f"{path}: note: {note}")
    return rows


def replies_of(row):
    """The texts of all replies of a row; its steps are one."""
    replies = [row[key] for key in REPLIES if key in row] + row.get("responses", [])
    if "steps" in row:
        replies.append("".join(step.text for step in row["steps"]))
    return [said(reply) for reply in replies]


def refuse_repeated(rows):
    """BadInput for a file most of whose replies have their prompts in them; in one row it can be chance."""
    replies = [(said(row["prompt"]), reply) for row in rows if "prompt" in row for reply in replies_of(row)]
    repeated = sum(repeats(prompt, reply) for prompt, reply in replies)
    require(
        2 * repeated <= len(replies),
        f"{repeated} of {len(replies)} replies begin with their prompt, or have it after a header, which"
        " would be trained on; expected replies alone",
    )


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
    return re.compile(
        rf"(?:\A|[\n\r])(?:### ?)?(?:{roles}):|(?-i:\b(?:{roles.upper()}):)|{more}"
        rf"|<(?:extra_id_\d+|start_of_turn|\|im_start\||\|start_header_id\|)>(?:{roles})"
        rf"|<\|(?:{roles})\|>|<\uff5c(?:{roles})\uff5c>",
        re.IGNORECASE,
    )


TURN = turns_of("assistant", r"### Response:|\[/INST\]|<start_of_turn>model")
ASKING = turns_of("human|user", r"### Instruction:|\[INST\]")
# Messages written as text: as JSON or by Python, a list of them, one alone, or the object around them.
MESSAGE = r"""\{\s*['"](?:role|content|from|value)['"]\s*:"""
SERIALISED = re.compile(
    rf"""\A\s*(?:(?:array\()?\[\s*{MESSAGE}|\{{\s*['"](?:messages|conversations)['"]\s*:\s*\["""
    rf"""|(?=.*['"](?:role|from)['"]\s*:\s*['"](?:user|human|assistant|gpt|system)['"]){MESSAGE})""",
    re.DOTALL,
)


def refuse_marked(rows):
    """BadInput if most prompts, or replies, begin or end with the spelling of a special token.

    It would be read letter by letter, beside the token itself. A reply whose ids are known is not read as
    text.
    """
    prompted = [row for row in rows if "prompt" in row]  # replies without prompts are only graded
    prompts = [said(row["prompt"]) for row in prompted]
    read = [row for row in prompted if not row["sampled"]]
    replies = [reply for row in read for reply in replies_of(row)]
    token = "the spelling of a special token, which would be read as letters (a chat template was applied?)"
    for texts, name in ((prompts, "prompts"), (replies, "replies")):
        refuse_most(
            texts, MARKED, f"{name} begin or end with {token}; expected messages, or texts without it"
        )
        refuse_most(texts, SERIALISED, f"{name} are messages written as text; expected a list of messages")
    for turn in (TURN, ASKING):
        refuse_most(replies, turn, "replies have turns of a dialogue in them; expected replies alone")


def refuse_most(texts, marker, says):
    """BadInput if most of the texts have the marker."""
    found = [match[0] for match in map(marker.search, texts) if match]
    if 2 * len(found) > len(texts):
        raise BadInput(f"{len(found)} of {len(texts)} {says} (found {found[0]!r})")


VERDICTS = ("correct", "score", "reward", "rating")  # keys that may hold one, beside label
BAD = {"0", "-1", "false", "bad", "incorrect", "rejected", "undesirable"}
GOOD = {"1", "true", "good", "correct", "chosen", "desirable"}


def as_word(value):
    """A value in lower case; "0" for 0, 0.0 and "0"."""
    return str(value).strip().lower().removesuffix(".0")


def verdicts_among(values):
    """The values as a set of words if all are verdicts, some of them bad; else an empty one."""
    words = {as_word(value) for value in values if not is_empty(value)}
    return words if words & BAD and words <= BAD | GOOD else set()


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


def replied(row):
    """The text of a row's reply, whether or not it is wanted; "" if there is none."""
    found = [row["fields"].get(name) for name in (*RESPONSE, "chosen", *CONVERSATION, *SOLUTION)]
    value = next((value for value in found if not is_empty(value)), "")
    if not is_conversation(value):
        return str(value)
    return value[-1]["content"] if value[-1]["role"] == "assistant" else ""


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


RATINGS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
DECIMAL = re.compile(r"-?\d+(?:\.\d+)?")


def notes_on_ratings(rows, needs):
    """What the user should know of rows that are used against what they say: list of texts."""
    notes = []
    if "chosen" in needs:
        pairs = [(row["raw"].get(ours), row["raw"].get(other)) for row in rows for ours, other in RATINGS]
        rated = [[float(x) for x in pair] for pair in pairs if all(DECIMAL.fullmatch(str(x)) for x in pair)]
        lower = sum(chosen < rejected for chosen, rejected in rated)
        equal = sum(chosen == rejected for chosen, rejected in rated)
        if lower or equal:
            notes.append(
                f"{lower} rows rate the chosen reply below the rejected one, {equal} rate both equal"
            )
    if {"response", "label"} <= {*needs}:
        same = [row for row in rows if reads_one_field(row["fields"], needs)]
        if same:
            where = f"line {same[0]['line']}"
            notes.append(
                f"{len(same)} rows have reply and label in one field ({where}): they grade themselves"
            )
    for key in VERDICTS if "response" in needs and "label" not in needs else ():
        values = [row["raw"].get(key) for row in rows]
        bad_words = BAD & verdicts_among(values)
        bad = [word for word in map(as_word, values) if word in bad_words]
        if bad:
            notes.append(f"{len(bad)} rows have {key} {bad[0]}; they are used like the others")
    return notes + notes_on_prompts(rows)


def reads_one_field(fields, needs):
    """Whether the response of a row is the text that states its label."""
    stating = next(name for name in LABEL if not is_empty(fields.get(name)))
    return dict(reply_keys(fields, needs))["response"] == stating


def notes_on_prompts(rows):
    """Which of OF_PROMPTS differ in most rows from a row with the same prompt: list of texts

    If most rows have one prompt, OF_ROWS count as well: what it asks about must be somewhere.
    """
    prompts = collections.Counter(str(row["prompt"]) for row in rows if "prompt" in row)
    alike = 2 * max(prompts.values(), default=0) > len(rows)
    notes = []
    for key in sorted(OF_PROMPTS | OF_ROWS if alike else OF_PROMPTS) if prompts else ():
        found = [(str(row["prompt"]), str(row["raw"][key])) for row in rows if key in row["raw"]]
        kinds = collections.Counter(prompt for prompt, _ in set(found))
        differ = sum(kinds[prompt] > 1 for prompt, _ in found)
        if 2 * differ > len(rows):
            says = f"{differ} rows have the prompt of another row, but not its {key}"
            notes.append(f"{says}; if that is a part of the prompt, name it input")
    return notes


def refuse_one_sided(rows):
    """BadInput for a file of numbers among which 0 could mean wrong as well as neutral: none is negative."""
    numbers = [x for row in rows for x in row["raw"]["labels"] if not isinstance(x, bool)]
    require(
        not numbers or min(numbers) < 0 or min(numbers) == 1,
        "the labels of the file are numbers from 0 to 1, of which 0 could be wrong or neutral; expected true "
        "and false, or numbers from -1 (wrong) by 0 (neutral) to 1 (right): a share p is 2p - 1",
    )
