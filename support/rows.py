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
    names_in,
    plain_prompt,
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
    log               gets lines: how many rows were dropped for want of a label that can be read, and notes
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
        notes = refuse_repeated(rows) + refuse_marked(rows)
        refuse_verdicts(rows)
        if "steps" in needs:
            refuse_one_sided(rows)
    if "chosen" in needs:
        notes += notes_on_pairs(rows)
    if "response" in needs:
        notes += notes_on_replies(rows, needs)
    for note in notes + notes_on_prompts(rows) + notes_on_line_breaks(rows):
        log(f"{path}: note: {note}")
    return rows


def replies_of(row):
    """[(key, text)] of all replies of a row; its steps are one."""
    replies = [(key, row[key]) for key in REPLIES if key in row]
    replies += [("responses", text) for text in row.get("responses", [])]
    if "steps" in row:
        replies.append(("completions", "".join(step.text for step in row["steps"])))
    return [(key, said(reply)) for key, reply in replies]


def refuse_repeated(rows):
    """BadInput for a file most of whose replies have their prompts in them; in one row it can be chance."""
    found = {}
    for row in rows:
        for key, reply in replies_of(row) if "prompt" in row else ():
            prompt = said(row["prompt"])
            found.setdefault(key, []).append(prompt[:40] if repeats(prompt, reply) else None)
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
    prompts = {"prompt": [said(row["prompt"]) for row in prompted]}
    replies = {}
    for row in prompted:
        for key, reply in replies_of(row) if not row["sampled"] else ():
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
    return notes


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


# Keys that may hold a verdict on the reply, beside label; keys that may do so in words; and these words.
VERDICTS = names_in("correct correctness score scores reward rewards rating ratings helpfulness")
VERDICTS_IN_WORDS = names_in("type category subset split")
BAD = names_in(
    """
    0 -1 false f bad poor worse worst incorrect wrong fail failed no negative lose loss loses lost reject
    rejected undesirable dispreferred unsafe
    """
)
GOOD = names_in(
    """
    1 true t good better best correct right pass passed yes positive win wins won accept accepted chosen
    desirable preferred safe
    """
)


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
RATED_PAIR = ("score", "scores", "rating", "ratings", "reward", "rewards")  # [chosen's, rejected's]
DECIMAL = re.compile(r"-?\d+(?:\.\d+)?")


def notes_on_pairs(rows):
    """What the user should know of pairs that are used against what they, or others, say: list of texts."""
    pairs = [(row["raw"].get(ours), row["raw"].get(other)) for row in rows for ours, other in RATINGS]
    lists = [row["raw"].get(name) for row in rows for name in RATED_PAIR]
    pairs += [tuple(value) for value in lists if isinstance(value, list) and len(value) == 2]
    texts = [[str(x) for x in pair] for pair in pairs]
    rated = [[float(x) for x in pair] for pair in texts if all(map(DECIMAL.fullmatch, pair))]
    lower = sum(chosen < rejected for chosen, rejected in rated)
    equal = sum(chosen == rejected for chosen, rejected in rated)
    notes = []
    if lower or equal:
        notes.append(f"{lower} rows rate the chosen reply below the rejected one, {equal} rate both equal")
    orders = []  # (prompt, chosen, rejected)
    for row in rows:
        prompt = plain_prompt(row["prompt"]) if "prompt" in row else ""
        orders.append((prompt, said(row["chosen"]), said(row["rejected"])))
    known = {order for order in orders if order[1] != order[2]}
    turned = sum((prompt, rejected, chosen) in known for prompt, chosen, rejected in orders)
    if turned:
        notes.append(f"{turned} rows prefer the reply that another row with the same two rejects")
    return notes


def notes_on_replies(rows, needs):
    """What the user should know of replies that are learned from whatever is said of them: list of texts."""
    if "label" in needs:
        same = [row for row in rows if reads_one_field(row["fields"], needs)]
        where = f"line {same[0]['line']}" if same else ""
        says = f"{len(same)} rows have reply and label in one field ({where}): they grade themselves"
        return [says] if same else []
    notes = []
    for key in sorted(VERDICTS | VERDICTS_IN_WORDS):
        values = [row["raw"].get(key) for row in rows]
        bad_words = BAD & verdicts_among(values)
        if key in VERDICTS_IN_WORDS:
            bad_words -= {"0", "-1"}
        bad = [word for word in map(as_word, values) if word in bad_words]
        if bad:
            notes.append(f"{len(bad)} rows have {key} {bad[0]}; they are used like the others")
        elif key in VERDICTS or key == "split":
            kinds = kinds_of(values)
            if kinds and not re.search(r"\d", "".join(kinds)):
                notes.append(f"rows have {key} {' or '.join(kinds)}; they are used alike")
    labelled = [row for row in rows if not is_empty(row["fields"].get("label"))]
    unsaid = [row for row in labelled if as_word(row["fields"]["label"]) not in replied(row).lower()]
    kinds = kinds_of([row["fields"]["label"] for row in unsaid])
    if kinds and 2 * len(unsaid) > len(labelled):
        notes.append(
            f"{len(unsaid)} rows have a label that their reply does not say ({', '.join(kinds)}); if it is a"
            " verdict on the reply, keep the rows that are wanted"
        )
    return notes


def kinds_of(values):
    """The words of a key that sorts its rows into a few kinds, in order; none if it has only one, or many."""
    words = {as_word(value) for value in values if not is_empty(value)}
    return sorted(words) if 1 < len(words) <= 10 and 2 * len(words) <= len(values) else []


# Backslash and n, where it is not the beginning of a LaTeX command.
ESCAPED_BREAK = re.compile(
    r"(?<!\\)\\n(?!(?:abla|atural|cong|e|earrow|eg|eq|exists|geq|i|leq|ewcommand|ewline|ewpage|less|mid"
    r"|olimits|onumber|ormalsize|ot|otin|parallel|prec|sim|sqsubset|subseteq|u|warrow|ode)(?![a-z]))"
)


def notes_on_line_breaks(rows):
    """A note on a file escaped twice: most rows have a backslash and n, and no text has a line break."""
    texts = []
    for row in rows:
        prompt = [said(row["prompt"])] if "prompt" in row else []
        texts.append("\0".join(prompt + [reply for _, reply in replies_of(row)]))
    escaped = sum(ESCAPED_BREAK.search(text) is not None for text in texts)
    if 2 * escaped <= len(texts) or any("\n" in text for text in texts):
        return []
    return [
        f"{escaped} rows have a backslash and n, and none has a line break: escaped twice? Read as letters"
    ]


def reads_one_field(fields, needs):
    """Whether the response of a row is the text that states its label."""
    stating = next(name for name in LABEL if not is_empty(fields.get(name)))
    return dict(reply_keys(fields, needs))["response"] == stating


def notes_on_prompts(rows):
    """Which of OF_PROMPTS differ in most rows from a row with the same prompt: list of texts

    If most rows have one prompt, OF_ROWS count as well: what it asks about must be somewhere.
    """
    prompts = collections.Counter(plain_prompt(row["prompt"]) for row in rows if "prompt" in row)
    alike = 2 * max(prompts.values(), default=0) > len(rows)
    notes = []
    for key in sorted(OF_PROMPTS | OF_ROWS if alike else OF_PROMPTS) if prompts else ():
        found = [(plain_prompt(row["prompt"]), str(row["raw"][key])) for row in rows if key in row["raw"]]
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
