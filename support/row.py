"""One row of a JSON lines file -> a prompt, replies, a label. Nothing that it says is ignored in silence.

Every key of a row is one of three: it says something this project uses (PROMPT to CONVERSATION below), it is
known to carry nothing for training (HARMLESS), or the row is refused by name, unless --ignore_keys lists the
key.
"""

import json
import math
import re
from decimal import Decimal
from typing import NamedTuple

from support.claims import after_hashes, last_boxes, without_thoughts
from support.files import BadInput, require
from support.graders import gsm8k_label, same_answer
from support.meanings import MAX_CHARS, is_value
from support.surroundings import NUMBER_WORD
from support.tokenizers import ROLES, is_conversation

# -------------------------------------------------------------------------------- the keys of a row


PROMPT = ("prompt", "instruction", "question", "problem")
CONTEXT = ("input", "context")  # Alpaca, Dolly: goes with the instruction, after a blank line
# Alpaca's spellings of "there is none", and those of tools: "<noinput>", "No input is required.", "nan".
IS_NEEDED = r"\s(?:is\s|was\s)?(?:needed|required|necessary|provided|given|applicable)"
NOTHING = re.compile(
    rf"(?i)\W*(?:(?:no\s?(?:additional\s|further\s)?(?:in|out)put[es]?|none)(?:{IS_NEEDED})?|not{IS_NEEDED}"
    r"|n/a|(?-i:NA)|nan|null|(?<=<)empty(?=>))\W*"
)
SYSTEM = ("system", "system_prompt")  # a system message before the prompt
RESPONSE = ("response", "completion", "output")
SOLUTION = ("solution", "answer")  # the response if there is no RESPONSE (MATH, GSM8K), else the reference
PAIR = ("chosen", "rejected")
CANDIDATES = ("responses", "labels")  # several answers to one prompt, and which of them are right
REPLIES = ("response", *PAIR)
LABEL = ("label", "answer", "solution")  # what follows "####" (GSM8K), what stands in the last \boxed (MATH)
CONVERSATION = ("messages", "conversations")  # a prompt and, if the assistant has the last word, its response
STEPS = ("completions", "labels")  # TRL's stepwise form: the steps of one answer, and a label for each
SPEAKING = (*PROMPT, *CONTEXT, *SYSTEM, *RESPONSE, *SOLUTION, *PAIR, "label", "margin", *CONVERSATION)
# The ids that a policy sampled, and the fingerprint of its tokenizer.
SAMPLED = ("tokenizer", "prompt_ids", "ids", "chosen_ids", "rejected_ids")


def names_in(text):
    """The words of a text as a set."""
    return set(text.split())


# Keys that carry nothing for training: what a prompt is about, unless that is a part of the prompt ...
OF_PROMPTS = names_in(
    """
    category categories subject level type difficulty domain topic task tags language lang source sources
    data_source original_instruction
    """
)
# ... names of rows and where they come from ...
OF_ROWS = names_in(
    """
    id idx index ids uid uuid qid hash line unique_id prompt_id row_id example_id sample_id question_id
    message_id conversation_id session_id subset split dataset license url turn turns num_turns timestamp
    created_at date metadata meta
    """
)
# ... who replied, how that was rated, and what this project's own stages add to their output.
OF_REPLIES = names_in(
    """
    model models model_name generator annotator chosen_model rejected_model chosen_source rejected_source
    score scores score_chosen score_rejected chosen_score rejected_score rating ratings chosen_rating
    rejected_rating chosen_avg_rating rejected_avg_rating reward rewards helpfulness correctness coherence
    complexity verbosity prompt_ids chosen_ids rejected_ids tokenizer tokens logprobs correct shares
    """
)
HARMLESS = OF_PROMPTS | OF_ROWS | OF_REPLIES
# needs -> the keys that can supply it, for messages
NAMES = {
    "prompt": PROMPT,
    "response": (*RESPONSE, "answer", "solution"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "responses": ("responses",),
    "label": ("label", "answer"),
}


def read_row(fields, needs, optional=()):
    """One row's canonical keys -> values; an empty label is None, an optional one that cannot be read is left
    out."""
    wanted = [*needs, *(key for key in optional if states(fields, key))]
    row = {}
    refuse_header(fields)
    refuse_undoubled(fields)
    refuse_prm800k(fields)
    if {"prompt", "response", "chosen", "rejected"} & set(wanted):
        row = read_conversation(fields, wanted)
    if "label" in wanted:
        response = dict(reply_keys(fields, wanted)).get("response")
        try:
            row["label"] = read_label(fields, response)
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
    """{key of the row: what it was read as}, for a row as read_row returns it"""
    read = {}
    for names in (PROMPT, CONTEXT, SYSTEM) if "prompt" in row else ():
        name, value = pick(fields, names)
        if name and not (names is CONTEXT and adds_nothing(value, fields)):
            read[name] = "prompt"
    keys = reply_keys(fields, row) if {"prompt", *REPLIES} & set(row) else ()
    split = {name: split_reply(fields[name], name) for _, name in keys}
    contexts = used_contexts(fields, row, keys, split)
    _, stated = pick(fields, PROMPT)
    known = len(stated) if isinstance(stated, list) else int(stated is not None)  # messages
    for key, name in keys:
        parts = ["prompt"] * ("prompt" in row and len(contexts[name]) > known)
        parts += [key] * (key in row and key in REPLIES)
        read |= {name: " and ".join(parts)} if parts else {}
    for name, label in stated_labels(fields) if row.get("label") is not None else ():
        if label == row["label"] or label is not None and same_answer(label, row["label"], "math"):
            read[name] = f"{read[name]} and label" if name in read else "label"
    read |= {"responses": "responses"} if "responses" in row else {}
    read |= {"labels": "labels"} if "labels" in row else {}
    read |= {"completions": "steps", "labels": "steps"} if "steps" in row else {}
    read |= {"margin": "margin"} if "margin" in row else {}
    return read


def refuse_header(fields):
    """BadInput for a row that repeats the names of its keys: the header of a table."""
    named = [name for name in SPEAKING if str(fields.get(name)).strip().lower() == name]
    require(len(named) < 2, f"{' and '.join(named)} have their own names as texts: the header of a table?")


def states(fields, key):
    """Whether a row says something of an optional key."""
    names = LABEL if key == "label" else NAMES[key]
    return any(not is_empty(fields.get(name)) for name in names)


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


def refuse_verdict(fields):
    """BadInput for a label that is no answer, wanted or not: TRL's unpaired preferences and PRM800K have
    verdicts on the response there."""
    verdict = fields.get("label")
    require(
        is_empty(verdict) or isinstance(verdict, str) or is_number(verdict),
        f"label is {json.dumps(verdict)[:60]}; expected an answer: a finite number or a text (if it is a "
        "verdict on the response, keep the rows that are wanted, then --ignore_keys label)",
    )


def is_empty(value):
    """Whether a field says nothing: null, a blank text, or an object or a list of nulls."""
    if isinstance(value, (list, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return all(not isinstance(part, str) and is_empty(part) for part in parts)
    return value is None or isinstance(value, str) and not value.strip()


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


def texts_in(value):
    """All texts of a JSON value, at any depth, and the keys of its objects."""
    found, left = [], [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            found.append(part)
        elif isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, list):
            left += part
    return found


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


def pick(fields, names):
    """-> (key, value) of the one key among `names` that says something; BadInput if two of them disagree"""
    found = [name for name in names if not is_empty(fields.get(name))]
    if not found:
        return None, None
    first = found[0]
    for other in found[1:]:
        require(
            fields[other] == fields[first],
            f"found both {first} and {other}, and they differ; expected one of them (--ignore_keys {other})",
        )
    return first, fields[first]


def missing(fields, key):
    """The BadInput for a row that does not say `key`."""
    for name in sorted(NAMES[key], key=lambda name: not is_empty(fields.get(name))):
        if name in fields:
            return BadInput(
                f"{name} is {json.dumps(fields[name])[:60]}; expected a text that is not empty, "
                'or a list of {"role", "content"} messages'
            )
    for name in CONVERSATION:
        if key == "response" and not is_empty(fields.get(name)):
            return BadInput(f"{name} ends with a message of the user; expected the assistant's reply")
    hint = ""
    if key == "prompt" and "chosen" in fields:
        hint = (
            "; a pair of texts needs its common beginning as prompt, a pair of conversations has it already"
        )
    if key == "label" and "responses" in fields:
        hint = ", or labels: right or wrong for each response"
    if "completions" in fields:
        hint = "; completions with labels are steps, which --stage rm --reward prm and --stage eval read"
    return BadInput(f"found keys {sorted(fields)[:8]}, expected {' or '.join(NAMES[key])}{hint}")


# -------------------------------------------------------------------------------- labels


def read_label(fields, response=None):
    """The label of a row as text, None if it is empty; BadInput if two fields state different values.

    response   the field that supplies the response, which may well be wrong
    """
    found = stated_labels(fields)
    if not found:
        if any(key in fields for key in NAMES["label"]):
            return None
        raise missing(fields, "label")
    (first, label), *others = found
    for name, other in others:
        if None in (label, other) or name == response:
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


# Labels that say that there is none, as pandas writes it.
ABSENT = ("nan", "NaN", "None", "none", "null", "NULL", "N/A", "n/a", "NA", "<NA>", "#N/A", "undefined")
ANSWER_IS = re.compile(r"(?i)\W*(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is\b|\s*:)\s*:?")


def is_final(answer):
    """Whether a text is a final answer: a value, or a word or two; no sentence, no "18 eggs" or "seven"."""
    has_number = re.search(rf"(?i)\d|\b{NUMBER_WORD}\b", answer)
    return is_value(answer) or len(answer.split()) <= 2 and not has_number


def label_in(fields, name):
    """What a field states as label, None if its box cannot be read whole; 1e-05 is 0.00001."""
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


# -------------------------------------------------------------------------------- steps


class Step(NamedTuple):
    """A step of an answer and what it was found to be."""

    text: str  # ends with a line break, unless it is the last one of a finished answer
    label: float  # 1 right, 0 neutral, -1 wrong


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


# -------------------------------------------------------------------------------- prompts and replies


def read_conversation(fields, wanted):
    """Prompt and replies of one row: one prompt for all replies, and all of it."""
    keys = reply_keys(fields, wanted)
    split = {name: split_reply(fields[name], name) for _, name in keys}
    replies = {key: split[name][1] for key, name in keys}
    contexts = used_contexts(fields, wanted, keys, split)
    for name, context in contexts.items():
        reads_reply = bool({*wanted} - {"prompt", "label"})
        goes_on = reads_reply and split[name][1] is None and context != split[name][0]
        require(
            not goes_on,
            f"{name} goes on after the prompt and its reply, and ends with another message of the user;"
            f" expected the conversation up to the reply (--ignore_keys {name}, or the prompt's key)",
        )
    for key in ("chosen", "rejected", "response"):
        if key in wanted and replies.get(key) is None:
            raise missing(fields, key)
    check_same_reply(replies, wanted)
    if "prompt" in wanted:
        prompt = join_context(read_prompt(fields), common_context(contexts))
        if prompt is None:
            raise missing(fields, "prompt")
        prompt = with_system(prompt, fields)
        is_text = isinstance(prompt, str)
        require(
            is_text or prompt[-1]["role"] != "assistant",
            "the prompt ends with a message of the assistant; expected one that awaits a reply",
        )
        replies["prompt"] = prompt
    return replies


def used_contexts(fields, wanted, keys, split):
    """{key of the row: the messages before its reply}, up to the stated prompt where that reply is not used.

    A reply is used if its key is wanted, or if its text is that of a wanted one: it answers all that is
    before it. chosen and rejected answer the same.
    """
    stated = read_prompt(fields) if "prompt" in wanted else None
    replies = {name: said(reply) for name, (_, reply) in split.items() if reply}
    used = {replies[name] for key, name in keys if key in wanted and name in replies}
    given = fields.get("responses") if "responses" in wanted else None
    used |= {text.strip() for text in given if isinstance(text, str)} if isinstance(given, list) else set()
    whole = {name for key, name in keys if key in wanted or replies.get(name) in used}
    whole |= {*PAIR} if whole & {*PAIR} else set()
    contexts = {name: context for name, (context, _) in split.items()}
    return {
        name: context if name in whole else up_to_prompt(context, stated)
        for name, context in contexts.items()
    }


def reply_keys(fields, wanted):
    """[(canonical key, the row's key)] of the wanted replies, and of conversations that hold the prompt."""
    found = []
    if "response" in wanted:
        name, _ = pick(fields, RESPONSE)
        graded = "label" in wanted
        others = (
            (name, *CONVERSATION, *SOLUTION) if name or not has_empty_text(fields, RESPONSE, graded) else ()
        )
        name = next((name for name in others if name and not is_empty(fields.get(name))), None)
        if name == "answer" and has_empty_text(fields, ("solution",)):
            name = None
        require(
            graded or name not in SOLUTION or is_empty(fields.get("chosen")),
            f"{name} would be the reply, beside chosen and rejected; expected response or completion"
            f" (--ignore_keys chosen,rejected if {name} is meant)",
        )
        if name:
            found.append(("response", name))
    for name in (*RESPONSE, *SOLUTION, *PAIR, *CONVERSATION):
        if is_empty(fields.get(name)) or ("response", name) in found:
            continue
        has_prompt = "prompt" in wanted and (name in CONVERSATION or is_dialogue(fields[name]))
        if name in wanted or has_prompt:
            found.append((name, name))
    return found


def has_empty_text(fields, names, or_null=False):
    """Whether one of the keys holds a text that says nothing: an empty reply, which no other key replaces.

    or_null   null is such a reply too: as it is where replies are graded
    """
    found = [fields[name] for name in names if name in fields and (or_null or fields[name] is not None)]
    return any(not isinstance(value, list) and is_empty(value) for value in found)


def check_same_reply(replies, wanted):
    """BadInput if `messages` ends with another reply than those that are used: it would be lost."""
    used = [said(replies[key]) for key in ("response", "chosen", "rejected") if key in wanted]
    for name in CONVERSATION:
        if used and replies.get(name) is not None:
            others = " and ".join(key for key in wanted if key in REPLIES)
            require(said(replies[name]) in used, f"{name} ends with another reply than {others}")


def said(reply):
    """The text of a reply."""
    return reply.strip() if isinstance(reply, str) else reply[-1]["content"].strip()


def common_context(contexts):
    """The messages before every reply; BadInput if they differ, or if only one of a pair has any."""
    if "chosen" in contexts and "rejected" in contexts:
        same = contexts["chosen"] == contexts["rejected"]
        require(same, "chosen and rejected answer different messages; expected one prompt for both")
    (first, context), *others = [(name, found) for name, found in contexts.items() if found] or [(None, [])]
    for name, other in others:
        require(other == context, f"{first} and {name} answer different messages; expected one prompt")
    return context


def up_to_prompt(context, prompt):
    """The messages of a conversation up to the last one that is the stated prompt, if it goes on after that.

    So a conversation whose reply is not wanted adds what was said before a prompt, and nothing after it.
    """
    asked = [message["role"] == "user" and message["content"].strip() for message in context]
    if isinstance(prompt, str) and prompt.strip() in asked:
        return context[: len(context) - asked[::-1].index(prompt.strip())]
    if isinstance(prompt, list) and context[: len(prompt)] == prompt:
        return prompt
    return context


def join_context(prompt, context):
    """The prompt that a row states and the messages before its replies, which must contain it."""
    if not context:
        return prompt
    if isinstance(prompt, str):
        asked = [message["content"].strip() for message in context if message["role"] == "user"]
        require(
            prompt.strip() in asked, "the conversation does not contain the prompt; expected the same one"
        )
    else:
        require(prompt in (None, context), "the conversation goes on from other messages than the prompt's")
    return context


def is_dialogue(value):
    """Whether value is a whole conversation, prompt included: messages, or HH-RLHF's text."""
    return is_hh(value) if isinstance(value, str) else has_turns(value)


def has_turns(value):
    """Whether value is a list of several objects, which should be messages."""
    return isinstance(value, list) and len(value) > 1 and isinstance(value[0], dict)


def is_hh(text):
    """Whether text is a transcript as in HH-RLHF."""
    return text.startswith(("\n\nHuman:", "\n\nSystem:")) and "\n\nAssistant:" in text


def hh_messages(text):
    """Messages of an HH-RLHF transcript: "\\n\\nHuman: ...\\n\\nAssistant: ..."; "System:" may open it."""
    parts = re.split(r"(\A\n\nSystem|\n\nHuman|\n\nAssistant):", text)[1:]
    role = {"Human": "user", "Assistant": "assistant", "System": "system"}
    return [
        {"role": role[name.strip()], "content": said.strip()} for name, said in zip(parts[0::2], parts[1::2])
    ]


def check_messages(value, name):
    """The role and content of each message of a list, if they say nothing else."""
    if not is_conversation(value):
        raise BadInput(
            f"{name} is {json.dumps(value)[:60]}; expected a text that is not empty, or a list of "
            '{"role", "content"} messages (from/value: rename to role/content, human/gpt to user/assistant)'
        )
    for message in value:
        extra = [key for key in message if key not in ("role", "content") and not is_empty(message[key])]
        require(
            not extra, f"{name}: a message has {extra}, which nothing here reads; expected role and content"
        )
        role = message["role"]
        require(role in ROLES, f"{name}: a message of role {role!r}; expected {', '.join(ROLES)}")
        said = message["content"].strip() or role == "system"
        require(said, f"{name}: the content of a message of the {role} is empty")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def split_reply(value, name):
    """-> (context, reply): a text or one message is a reply without context; a conversation ends with its
    reply.

    A conversation that is only wanted for its prompt (messages) may end with the user: its reply is None.
    """
    if isinstance(value, str) and is_hh(value):
        value = hh_messages(value)
    if isinstance(value, str) and name not in CONVERSATION:
        return [], value
    messages = check_messages(value, name)
    last = messages[-1]["role"]
    if name in CONVERSATION and last != "assistant":
        return messages, None
    require(last == "assistant", f"{name}: the last message is the {last}'s; expected the assistant's reply")
    return messages[:-1], messages[-1:]


def says_none(text):
    """Whether a text is a spelling of none, such as Alpaca's "<noinput>", or pandas' NaN."""
    text = str(text).strip()
    return len(text) <= 60 and NOTHING.fullmatch(text) is not None


def adds_nothing(context, fields):
    """Whether a context says that there is none, or stands in the row's text prompt already: as lines that
    begin or end a paragraph, or anywhere if it is too long for chance (more than 60 characters)."""
    _, prompt = pick(fields, PROMPT)
    if says_none(context) or not isinstance(context, str) or not isinstance(prompt, str):
        return says_none(context)
    text = context.strip()
    paragraphs = f"\n\n{prompt.strip()}\n\n"
    is_paragraph = f"\n\n{text}\n" in paragraphs or f"\n{text}\n\n" in paragraphs
    return is_paragraph or len(text) > 60 and text in prompt


def read_prompt(fields):
    """The prompt that a row states: a text or messages, with what belongs to it; None if it states none.

    A context that the prompt has in it already, as after a map that joined them, is not added again
    (adds_nothing).
    """
    name, prompt = pick(fields, PROMPT)
    context_name, context = pick(fields, CONTEXT)
    if says_none(context):
        context = None
    if prompt is None:
        beside = f"{context_name} is {json.dumps(context)[:60]}; expected {' or '.join(PROMPT)} beside it"
        require(context is None, f"{beside} (--ignore_keys {context_name})")
        return None
    if not isinstance(prompt, str):
        prompt = check_messages(prompt, name)
    if context is not None:
        both = isinstance(prompt, str) and isinstance(context, str)
        require(both, f"{context_name} is {json.dumps(context)[:60]}; expected a text beside a text {name}")
        if not adds_nothing(context, fields):
            prompt = f"{prompt}\n\n{context}"
    return prompt


def prompt_text(row):
    """The prompt of a row that states it as a text, whether or not it has a system message; else None."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    stated = [row.get("fields", {}).get(name) for name in PROMPT]
    return next((text for text in stated if isinstance(text, str) and text in prompt[-1]["content"]), None)


def plain_prompt(prompt):
    """A prompt as a text that is the same for a text and for one message of it, with blanks around it or
    not."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return str([(message["role"], message["content"].strip()) for message in messages])


def with_system(prompt, fields):
    """The prompt after the row's own system message."""
    name, system = pick(fields, SYSTEM)
    if system is None:
        return prompt
    require(isinstance(system, str), f"{name} is {json.dumps(system)[:60]}; expected a text")
    first = {"role": "system", "content": system}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[0]["role"] != "system":
        return [first, *messages]
    require(messages[0] == first, f"{name} differs from the system message of the conversation; expected one")
    return messages
