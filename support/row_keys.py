"""The keys of a row: what each of them says, in which spellings, and which of them say nothing.

Every key of a row is one of three: it is read (SPEAKING, and CANDIDATES, STEPS or SAMPLED by the stages that
use them), it may say what it likes (HARMLESS), or the row is refused by name, unless --ignore_keys lists it.
"""

import json

from support.files import BadInput, require

PROMPT = ("prompt", "instruction", "question", "problem")
CONTEXT = ("input", "context")  # Alpaca, Dolly: goes with the instruction, after a blank line
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


# Keys that say nothing that is trained on, but for SAMPLED: what a prompt is about, unless that is a part of
# the prompt ...
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
# needs -> the keys that can supply it
NAMES = {
    "prompt": PROMPT,
    "response": (*RESPONSE, "answer", "solution"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "responses": ("responses",),
    "label": LABEL,
}


# Every kind of space, and signs without a width (U+200B to U+200F, U+2060, U+FEFF, U+00AD).
BLANKS = (
    "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\xad"
)


def is_empty(value):
    """Whether a field says nothing: null, a blank text, or an object or a list of nulls."""
    if isinstance(value, (list, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return all(not isinstance(part, str) and is_empty(part) for part in parts)
    return value is None or isinstance(value, str) and not value.strip(BLANKS)


def pick(fields, names):
    """-> (key, value) of the one key among `names` that says something, or (None, None)

    Raises BadInput if two of them disagree.
    """
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
            kinds = 'a text that is not empty, or a list of {"role", "content"} messages'
            expected = "a list of texts" if name == "responses" else kinds
            return BadInput(f"{name} is {json.dumps(fields[name])[:60]}; expected {expected}")
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
