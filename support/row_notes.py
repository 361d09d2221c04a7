"""Notes on the rows of a file, which are used all the same: what their texts and other keys hint at."""

import collections
import re

from support.claims import after_hashes, boxed, without_thoughts
from support.meanings import is_value
from support.row_keys import (
    CONTEXT,
    CONVERSATION,
    OF_PROMPTS,
    OF_ROWS,
    PAIR,
    PROMPT,
    REPLIES,
    RESPONSE,
    SOLUTION,
    is_empty,
    names_in,
    texts_in,
)
from support.row_labels import ABSENT
from support.row_messages import hh_messages, is_hh, last_text, plain_prompt, says_none
from support.tokenizers import is_conversation


def replies_of(row):
    """[(key, text)] of all replies of a row; its steps are one."""
    replies = [(key, row[key]) for key in REPLIES if key in row]
    replies += [("responses", text) for text in row.get("responses", [])]
    if "steps" in row:
        replies.append(("completions", "".join(step.text for step in row["steps"])))
    return [(key, last_text(reply)) for key, reply in replies]


# Keys that may hold a verdict on the reply, beside label; keys that may do so in words; and these words.
VERDICTS = names_in("correct correctness score scores reward rewards rating ratings helpfulness")
VERDICTS_IN_WORDS = names_in("type category subset split")
BAD = names_in(
    """
    0 -1 - false f bad poor worse worst incorrect wrong fail failed no negative lose loss loses lost reject
    rejected undesirable dispreferred unsafe
    """
)
GOOD = names_in(
    """
    1 + true t good better best correct right pass passed yes positive win wins won accept accepted chosen
    desirable preferred safe
    """
)


def as_word(value):
    """A value in lower case; "0" for 0, 0.0 and "0"."""
    return str(value).strip().lower().removesuffix(".0")


def words_of(values):
    """The values that say something, as words; JSON's NaN, pandas' null, says nothing."""
    return {as_word(value) for value in values if not is_empty(value)} - {"nan"}


def verdicts_among(values):
    """The values as a set of words if all are verdicts, some of them bad; else an empty one."""
    words = words_of(values)
    return words if words & BAD and words <= BAD | GOOD else set()


def replied(row):
    """The text of a row's reply, whether or not it is wanted; "" if there is none."""
    found = [row["fields"].get(name) for name in (*RESPONSE, "chosen", *CONVERSATION, *SOLUTION)]
    value = next((value for value in found if not is_empty(value)), "")
    value = hh_messages(value) if isinstance(value, str) and is_hh(value) else value
    if not is_conversation(value):
        return str(value)
    return value[-1]["content"] if value[-1]["role"] == "assistant" else ""


def used_keys(rows):
    """What was read from which keys, and which keys were not used: one line of text

    A key that only some rows have is counted: prompt from question, input (in 2); not used: id, source
    """
    used = {}  # what was read -> Counter of keys
    unused = collections.Counter()
    for row in rows:
        for key, value in row["fields"].items():
            if key in row["read"]:
                used.setdefault(row["read"][key], collections.Counter())[key] += 1
            elif not is_empty(value) and key not in row["sampled"]:
                unused[key] += 1

    def listed(keys):
        counted = [name if n == len(rows) else f"{name} (in {n})" for name, n in keys.items()]
        return ", ".join(counted)

    own = {what: {what: len(rows)} for what in used}  # keys of that very name, in all rows
    parts = [what if keys == own[what] else f"{what} from {listed(keys)}" for what, keys in used.items()]
    parts += [f"not used: {listed(unused)}"] if unused else []
    return "; ".join(parts)


RATINGS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
RATED_PAIR = ("score", "scores", "rating", "ratings", "reward", "rewards")  # [chosen's, rejected's]
DECIMAL = re.compile(r"-?\d+(?:\.\d+)?(?:[eE]-?\d{1,2})?")


def rated_pairs(raw):
    """[(rating of chosen, rating of rejected)] of a row, from its own keys and those of objects in it."""
    objects = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    found = []
    for part in objects:
        named = {key.replace("-", "_"): value for key, value in part.items()}
        found += [(named[ours], named[other]) for ours, other in RATINGS if {ours, other} <= named.keys()]
        lists = [named.get(name) for name in RATED_PAIR]
        found += [tuple(value) for value in lists if isinstance(value, list) and len(value) == 2]
    rated = [raw.get(name) for name in RATED_PAIR]
    return found + [
        (of["chosen"], of["rejected"]) for of in rated if isinstance(of, dict) and {*PAIR} <= of.keys()
    ]


def notes_on_pairs(rows):
    """What the user should know of pairs that are used against what they, or others, say: list of texts."""
    pairs = [pair for row in rows for pair in rated_pairs(row["raw"])]
    texts = [[re.sub(r"\s*/\s*10\Z", "", str(x)) for x in pair] for pair in pairs]  # 8/10
    rated = [[float(x) for x in pair] for pair in texts if all(map(DECIMAL.fullmatch, pair))]
    lower = sum(chosen < rejected for chosen, rejected in rated)
    equal = sum(chosen == rejected for chosen, rejected in rated)
    notes = []
    if lower or equal:
        notes.append(f"{lower} rows rate the chosen reply below the rejected one, {equal} rate both equal")
    for where, place in (("begin", 0), ("end", -1)):
        blank = {}  # side: how many of its replies have a blank there
        for side in ("chosen", "rejected"):
            texts = [row[side] if isinstance(row[side], str) else row[side][-1]["content"] for row in rows]
            blank[side] = sum(text[place].isspace() for text in texts if text)
        if 10 * min(blank.values()) <= max(blank.values()) and 2 * max(blank.values()) > len(rows):
            side = max(blank, key=blank.get)
            notes.append(f"{blank[side]} {side} replies {where} with a blank, and few or none of the others")
    notes += notes_on_sides(rows)
    orders = []  # (prompt, chosen, rejected)
    for row in rows:
        prompt = plain_prompt(row["prompt"]) if "prompt" in row else ""
        orders.append((prompt, last_text(row["chosen"]), last_text(row["rejected"])))
    known = {order for order in orders if order[1] != order[2]}
    turned = sum((prompt, rejected, chosen) in known for prompt, chosen, rejected in orders)
    if turned:
        notes.append(f"{turned} rows prefer the reply that another row with the same two rejects")
    return notes


def notes_on_sides(rows):
    """Which beginning or end most replies of one side of the pairs have, and few of the other: texts"""
    sides = {side: [last_text(row[side]) for row in rows] for side in ("chosen", "rejected")}
    notes = []
    for where, part, least in (("begin", slice(20), 0), ("end", slice(-20, None), 20)):
        counts = {
            side: collections.Counter(text[part] for text in texts if len(text) > least)
            for side, texts in sides.items()
        }
        for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
            for common, n in counts[side].most_common(1):
                if len(rows) >= 10 and 2 * n > len(rows) and 10 * counts[other][common] <= n:
                    notes.append(f"{n} {side} replies {where} with {common!r}, and few or none of the others")
    return notes


def notes_on_replies(rows, needs):
    """What the user should know of replies that are learned from whatever is said of them: list of texts."""
    if "label" in needs:
        same = [row for row in rows if "response and label" in row["read"].values()]
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
    words = words_of(values)
    return sorted(words) if 1 < len(words) <= 10 and 2 * len(words) <= len(values) else []


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


LATEX = (  # commands that begin with n
    r"n(?:abla|atural|cong|e|earrow|eg|eq|exists|geq|i|leq|ewcommand|ewline|ewpage|less|mid|olimits|onumber"
    r"|ormalsize|ot|otin|parallel|prec|sim|sqsubset|subseteq|u|warrow|ode)(?![a-z])"
)
ESCAPED_BREAK = re.compile(rf"(?<!\\)\\(?!{LATEX})n")
SPELLINGS = {  # of signs, by tools that write or read a text in another way than it was meant
    "an escaped sign: escaped twice?": re.compile(r"(?<!\\)\\(?:\"(?!\w)|u[0-9a-fA-F]{4})"),
    "UTF-8 that was read as another encoding": re.compile(
        "[\u00c2\u00c3\u00d0\u00d1][\u0080-\u00bf]|\u00e4[\u00b8-\u00bf]|\u00e5[\u00a5\u0152]"
        "|\u00f0\u0178|\u00c3[\u0152-\u0192\u2013-\u20ac]|\u00e2(?:\u0080|\u20ac)"
    ),
    "a sign that could not be read": re.compile("\ufffd|_x000D_"),
    "a carriage return": re.compile("\r"),
    "a special token as text": re.compile(r"<\|(?:im_end|im_start|eot_id|endoftext|end_of_text)\|>|</s>"),
    "LaTeX with two backslashes": re.compile(r"\\\\(?:frac|sqrt|boxed|cdot|left|pi)(?![a-z])"),
    "LaTeX without its backslash": re.compile(r"(?<![\\\w{])(?:frac|sqrt|boxed)\{"),
    "a place that was not filled in": re.compile(r"\{\{ ?\w+ ?\}\}"),
    "quotation marks twice, as CSV has them": re.compile(r'(?<!")""\w[^"\n]{0,80}""(?!")'),
    "HTML's spelling of a sign": re.compile(r"&(?:[a-zA-Z]{2,8}|#\d{2,6}|#x[\da-fA-F]{2,5});|<br ?/?>"),
}
# A text that is a value of JSON or Python: "..." with its marks, b'...', ['...'], [{'type': ...
VALUE = re.compile(
    r"""\s*(?: b?"(?:[^"\\]|\\.)*" | b?'(?:[^'\\]|\\.)*'
            | \[\s*(?:['"]|\{\s*['"]).*\] | \{\s*['"]\w+['"]\s*:.*\}
            | \[?(?:\w+\()?(?:content|role)=['"].*
         )\s*\Z""",
    re.DOTALL | re.VERBOSE,
)


def notes_on_spelling(rows):
    """Which rows have texts that a tool has spelled in its own way, and what is read as letters: a list.

    Replies whose sampled ids are known are not read as text.
    """
    rows = [row for row in rows if not row["sampled"]]
    texts = [texts_in([row["fields"][key] for key in row["read"]]) for row in rows]
    said = ["\0".join(of_row) for of_row in texts]
    flat = [[text for text in of_row if "\n" not in text and "\\n" in text] for of_row in texts]
    escaped = sum(any(map(ESCAPED_BREAK.search, of_row)) for of_row in flat)
    notes = []
    if escaped:
        notes.append(f"{escaped} rows have a backslash and n: escaped twice? They are read as two letters")
    for spelling, pattern in SPELLINGS.items():
        found = [match[0] for match in map(pattern.search, said) if match]
        if found:
            notes.append(f"{len(found)} rows have {spelling} ({found[0]!r})")
    for key in sorted({key for row in rows for key in row["read"]}):
        texts = [row["fields"][key] for row in rows if isinstance(row["fields"].get(key), str)]
        values = [text for text in texts if VALUE.match(text)]
        if 2 * len(values) > len(texts):
            says = f"{len(values)} of {len(texts)} texts of {key} are values of JSON or Python"
            notes.append(f"{says} ({values[0][:40]!r}); they are read as letters")
    return notes


NO_INPUT = re.compile(r"(?i)no\s?\w*\s?input|[无無没沒不]\w{0,4}[输輸]入")


def notes_on_absent(rows):
    """Which keys have texts such as "nan", by which a tool says that there is none, and prompts to which such
    a text was joined: list of texts"""
    found = {}  # key -> such texts
    joined = []
    for row in rows:
        stated = [(key, row["fields"][key]) for key, what in row["read"].items() if what == "prompt"]
        none = none_in(last_text(row["prompt"])) if "prompt" in row else None
        if none and none not in [text.strip() for _, text in stated if isinstance(text, str)]:
            joined.append(none)
        for key, text in [*stated, *replies_of(row)]:
            if isinstance(text, str) and (text.strip() in ABSENT or says_none(text)):
                found.setdefault(key, []).append(text.strip())
    says = "which is used like other texts"
    notes = [f"{len(texts)} rows have {key} {texts[0]!r}, {says}" for key, texts in sorted(found.items())]
    if joined:
        notes.append(f"{len(joined)} prompts have {joined[0]!r} at the end of a line, {says}")
    return notes


def none_in(prompt):
    """What says "no input" in a prompt to which it was joined, at the end of a line; or None."""
    lines = [line for line in prompt.split("\n") if line.strip()]
    ends = [line.rpartition(": ")[2].strip() for line in lines]
    found = [end for end in ends if says_none(end) and (NO_INPUT.search(end) or end == lines[-1].strip())]
    return found[0] if found else None


def without_marks(text):
    """A text without its blanks, and without the numbers of footnotes ("[1]") that Wikipedia's texts have."""
    return re.sub(r"\[\d+\]|\s", "", text)


def notes_on_contexts(rows):
    """What is added to prompts, and may say that there is nothing, or be in them already: list of texts"""
    added = []  # (context, stated prompt)
    for row in rows:
        context = next((row["fields"][key] for key in CONTEXT if row["read"].get(key) == "prompt"), None)
        prompt = next((row["fields"][key] for key in PROMPT if key in row["read"]), "")
        if context is not None:
            added.append((context.strip(), prompt))
    notes = []
    short = collections.Counter(context for context, _ in added if len(context) <= 30)
    often = [(text, n) for text, n in short.most_common(10) if n >= 3]
    if often:  # spellings of none, in any language?
        counted = ", ".join(f"{text!r} (in {n})" for text, n in often)
        notes.append(f"rows have {counted} beside their prompts, and it is added to them")
    joined = sum(without_marks(context) in without_marks(prompt) for context, prompt in added)
    if 2 * joined > len(added):
        says = f"{joined} of {len(added)} prompts have in them what is beside them"
        notes.append(f"{says}, and it is added again (--ignore_keys, if they were joined)")
    return notes


def notes_on_boxes(rows):
    """Which labels are one of several boxes, and which are several boxes: list of texts"""
    last, together = [], []  # their rows' lines
    for row in rows:
        texts = [row["fields"][key] for key, what in row["read"].items() if "label" in what.split(" and ")]
        texts = [without_thoughts(text) for text in texts if isinstance(text, str)]
        texts = [text for text in texts if text.count("\\boxed") > 1 and after_hashes(text) is None]
        several = any(boxed(text) != boxed(text.rpartition("\\boxed")[0]) for text in texts)
        if several:
            is_last = any(row["label"] == boxed(text) for text in texts)
            (last if is_last else together).append(row["line"])
    notes = []
    for lines, what in ((last, "the last alone is"), (together, "all of a list, in any order, are")):
        if lines:
            says = f"{len(lines)} solutions have several boxes, and {what} the label"
            notes.append(f"{says} (line {', '.join(map(str, lines[:20]))})")
    return notes


def notes_on_steps(rows):
    """Which steps have two labels after the same prompt and steps: list of texts"""
    labels = collections.defaultdict(set)  # (prompt, the texts so far, all as one number) -> labels
    for row in rows:
        place = hash(plain_prompt(row["prompt"])) if "prompt" in row else 0
        for step in row["steps"]:
            place = hash((place, step.text.strip()))
            labels[place].add(step.label)
    several = sum(len(of_step) > 1 for of_step in labels.values())
    says = "have more than one label after the same prompt and steps, and each is learned"
    return [f"{several} steps {says}"] if several else []


# "21\text{ dogs}"; "12\text{ and }13" is a list.
HAS_WORDS = re.compile(r"\d(?:\s|\\[;,:! ])*\\(?:text|mbox|mathrm)\w*\s*\{(?!\s*(?:and|or)\b)[^{}]*[a-z]{3}")


def is_sentence(row):
    """Whether a label has more words than a final answer has."""
    return len(row["label"].split()) > 8


def has_three_decimals(row):
    """Whether a label is like 70.000 or 1.080, which may mean thousands."""
    return re.fullmatch(r"[1-9]\d{0,2}\.\d\d0", row["label"]) is not None


def has_many_decimals(row):
    """Whether a label was written by floating-point arithmetic, as 0.30000000000000004."""
    return re.search(r"\.\d{12}", row["label"]) is not None


def has_words(row):
    """Whether a label has a number and words that are no unit."""
    return HAS_WORDS.search(row["label"]) is not None and not is_value(row["label"])


ASKS_FOR_SEVERAL = re.compile(
    r"(?i)\bseparated\s+by\s+commas\b|\b(?:find|list|enter|determine|compute)\s+all\b"
)


def is_asked_for_as_list(row):
    """Whether a label is a number with thousands, and its prompt asks for all values, or separates them."""
    is_number = re.fullmatch(r"\d{1,3}(?:,\d{3})+", row["label"])
    stated = [row["fields"].get(name) for name in PROMPT]  # of a row that is read without its prompt
    asked = last_text(row["prompt"]) if "prompt" in row else " ".join(texts_in(stated))
    return is_number is not None and ASKS_FOR_SEVERAL.search(asked) is not None


KINDS_OF_LABELS = {  # what labels of a kind are noted for
    is_sentence: "have more than 8 words",
    has_three_decimals: "have a point and three digits, which are read as decimals",
    has_many_decimals: "have 12 decimals or more",
    is_asked_for_as_list: "are read as one number, and their prompts may ask for several",
}
KINDS_OF_MATH_LABELS = {
    has_words: "have words beside a number, which an answer needs, too",
}


def notes_on_labels(rows, task):
    """Which labels may be no final answers, or are read in another way than they are meant: list of texts"""
    labelled = [row for row in rows if row.get("label") is not None]
    notes = []
    kinds = KINDS_OF_LABELS | (KINDS_OF_MATH_LABELS if task == "math" else {})
    for is_kind, says in kinds.items():
        found = [row for row in labelled if is_kind(row)]
        if found:
            first = f"line {found[0]['line']} has {found[0]['label'][:60]!r}"
            notes.append(f"{len(found)} labels {says} ({first})")
    return notes


def are_places(rows):
    """Whether the label of every row could be the place of one of its given answers, and is none of them."""
    labels = [row["label"] for row in rows if "responses" in row and row.get("label") is not None]
    if len(labels) < max(2, len(rows)) or not all(map(str.isdecimal, labels)):
        return False
    if any(row["label"] in [text.strip() for text in row["responses"]] for row in rows):
        return False
    left = [len(row["responses"]) - int(row["label"]) for row in rows]
    return min(left) > 0 or min(left) == 0 and "0" not in labels  # counted from 0, or from 1


def notes_on_keys(rows, needs):
    """Which keys sort rows, or join them, and are not used: list of texts"""
    notes = []
    unused = ("split", "label", "correct") if "chosen" in needs else ("split",)
    for key in unused:
        kinds = kinds_of([row["fields"].get(key) for row in rows])
        numbers = len(kinds) > 2 and all(kind.isdigit() for kind in kinds)  # answers
        if kinds and not numbers and "response" not in needs:
            notes.append(f"rows have {key} {' or '.join(kinds)}; they are used alike")
    for key in ("conversation_id", "session_id", "thread_id", "dialogue_id"):
        prompts = collections.defaultdict(set)
        for row in rows:
            if key in row["fields"] and "prompt" in row:
                prompts[str(row["fields"][key])].add(plain_prompt(row["prompt"]))
        joined = [name for name, of_name in prompts.items() if len(of_name) > 1]
        if joined:
            says = f"{len(joined)} values of {key} have several prompts, each of which is used on its own"
            notes.append(f"{says}; a dialogue is one row of messages")
    return notes


def notes_on_values(rows):
    """What prompts, replies, labels and margins say that may not be meant: list of texts"""
    notes = notes_on_boxes(rows)
    if are_places(rows):
        notes.append("all labels could be places in responses; they are read as answers")
    labels = collections.defaultdict(set)
    for row in rows:
        if row.get("label") is not None and "prompt" in row:
            labels[plain_prompt(row["prompt"])].add(row["label"])
    several = sum(len(of_prompt) > 1 for of_prompt in labels.values())
    if several:
        notes.append(f"{several} prompts have more than one label, each of which is right in its own row")
    echoed = sum(
        last_text(row["prompt"]) in [reply for _, reply in replies_of(row)] for row in rows if "prompt" in row
    )
    if echoed:
        notes.append(f"{echoed} rows have a reply that is the prompt itself")
    negative = sum(row.get("margin", 0.0) < 0 for row in rows)
    if negative:
        notes.append(f"{negative} rows have a negative margin: the rejected reply may score higher")
    marked = sum(
        re.search(r"#### ?[-$]?\d", last_text(row["prompt"])) is not None for row in rows if "prompt" in row
    )
    if marked:
        notes.append(f"{marked} prompts have ####, which marks an answer")
    return notes
