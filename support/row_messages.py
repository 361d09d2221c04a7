"""The prompt and the replies of a row: texts, messages, and dialogues as text; one prompt for all replies."""

import html
import json
import re

from support.files import BadInput, require
from support.row_keys import (
    CONTEXT,
    CONVERSATION,
    PAIR,
    PROMPT,
    REPLIES,
    RESPONSE,
    SOLUTION,
    SYSTEM,
    is_empty,
    missing,
    pick,
)
from support.tokenizers import ROLES, is_conversation


def read_conversation(fields, wanted):
    """{"prompt", "response" ...} of one row: one prompt for all replies, and all of it."""
    keys = reply_keys(fields, wanted)
    split = {name: split_reply(fields[name], name) for _, name in keys}
    replies = {key: split[name][1] for key, name in keys}
    histories = used_histories(fields, wanted, keys, split)
    for name, history in histories.items():
        reads_reply = bool({*wanted} - {"prompt", "label"})
        goes_on = reads_reply and split[name][1] is None and history != split[name][0]
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
        prompt = whole_prompt(read_prompt(fields), common_history(histories))
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


def used_histories(fields, wanted, keys, split):
    """{reply key of the row: the messages before its reply}; up to the stated prompt if it is not used.

    A reply is used if its key is wanted, or if its text is that of a wanted one: it answers all that is
    before it. chosen and rejected answer the same.
    """
    stated = read_prompt(fields) if "prompt" in wanted else None
    replies = {name: last_text(reply) for name, (_, reply) in split.items() if reply}
    used = {replies[name] for key, name in keys if key in wanted and name in replies}
    given = fields.get("responses") if "responses" in wanted else None
    if isinstance(given, list):
        used |= {text.strip() for text in given if isinstance(text, str)}
    whole = {name for key, name in keys if key in wanted or replies.get(name) in used}
    if whole & {*PAIR}:
        whole |= {*PAIR}
    histories = {}
    for name, (history, _) in split.items():
        histories[name] = history if name in whole else up_to_prompt(history, stated)
    return histories


def reply_keys(fields, wanted):
    """[(canonical key, the row's key)] of the wanted replies, and of conversations that hold the prompt."""
    found = []
    if "response" in wanted:
        name, _ = pick(fields, RESPONSE)
        graded = "label" in wanted
        if name is None and not has_empty_text(fields, RESPONSE, graded):
            name = next((key for key in (*CONVERSATION, *SOLUTION) if not is_empty(fields.get(key))), None)
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
    used = [last_text(replies[key]) for key in ("response", "chosen", "rejected") if key in wanted]
    for name in CONVERSATION:
        if used and replies.get(name) is not None:
            others = " and ".join(key for key in wanted if key in REPLIES)
            require(last_text(replies[name]) in used, f"{name} ends with another reply than {others}")


def last_text(said):
    """A text, or that of the last of some messages, without blanks around it."""
    return said.strip() if isinstance(said, str) else said[-1]["content"].strip()


def as_messages(prompt):
    """A prompt as messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def common_history(histories):
    """The messages before every reply; BadInput if they differ, or if only one of a pair has any."""
    if "chosen" in histories and "rejected" in histories:
        same = histories["chosen"] == histories["rejected"]
        require(same, "chosen and rejected answer different messages; expected one prompt for both")
    (first, history), *others = [item for item in histories.items() if item[1]] or [(None, [])]
    for name, other in others:
        require(other == history, f"{first} and {name} answer different messages; expected one prompt")
    return history


def up_to_prompt(history, prompt):
    """The messages of a conversation up to the last one that is the stated prompt, if it goes on after that.

    So a conversation whose reply is not wanted adds what was said before a prompt, and nothing after it.
    """
    asked = [message["role"] == "user" and message["content"].strip() for message in history]
    if isinstance(prompt, str) and prompt.strip() in asked:
        return history[: len(history) - asked[::-1].index(prompt.strip())]
    if isinstance(prompt, list) and history[: len(prompt)] == prompt:
        return prompt
    return history


def whole_prompt(stated, history):
    """The messages before a row's replies, or the prompt that it states if there are none; BadInput if they
    do not contain it."""
    if not history:
        return stated
    if isinstance(stated, str):
        asked = [message["content"].strip() for message in history if message["role"] == "user"]
        require(
            stated.strip() in asked, "the conversation does not contain the prompt; expected the same one"
        )
    else:
        require(stated in (None, history), "the conversation goes on from other messages than the prompt's")
    return history


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
        {"role": role[name.strip()], "content": text.strip()} for name, text in zip(parts[0::2], parts[1::2])
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
        says_something = not is_empty(message["content"]) or role == "system"
        require(says_something, f"{name}: the content of a message of the {role} is empty")
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


# Alpaca's spellings of "there is none", and those of tools: "<noinput>", "No input is required.", "nan".
IS_NEEDED = r"\s(?:is\s|was\s)?(?:needed|required|necessary|provided|given|applicable)"
NOTHING = re.compile(
    rf"(?i)\W*(?:(?:no\s?(?:additional\s|further\s)?(?:in|out)put[es]?|none)(?:{IS_NEEDED})?|not{IS_NEEDED}"
    r"|n/a|(?-i:NA)|nan|null|(?<=<)empty(?=>)"
    r"|(?:无|無|没有|沒有)(?:需|任何|提供|额外|额外的|相关)*(?:[输輸][入出]|内容|信息)?|不(?:适用|適用|需要输入)|无需)\W*"
)


def says_none(text):
    """Whether a text is a spelling of none, such as Alpaca's "<noinput>", or pandas' NaN."""
    text = str(text).strip()
    return len(text) <= 60 and NOTHING.fullmatch(html.unescape(text)) is not None


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
    """The prompt that a row states as a text, alone if it has a system message; None if it states none so."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    stated = [row.get("fields", {}).get(name) for name in PROMPT]
    return next((text for text in stated if isinstance(text, str) and text in prompt[-1]["content"]), None)


def plain_prompt(prompt):
    """A prompt as a text that is the same for a text and for one message of it, with blanks around it or
    not."""
    return str([(message["role"], message["content"].strip()) for message in as_messages(prompt)])


def with_system(prompt, fields):
    """The prompt after the row's own system message."""
    name, system = pick(fields, SYSTEM)
    if system is None:
        return prompt
    require(isinstance(system, str), f"{name} is {json.dumps(system)[:60]}; expected a text")
    first = {"role": "system", "content": system}
    messages = as_messages(prompt)
    if messages[0]["role"] != "system":
        return [first, *messages]
    require(messages[0] == first, f"{name} differs from the system message of the conversation; expected one")
    return messages
