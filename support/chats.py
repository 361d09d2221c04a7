"""Chat templates: what a model directory's own template says, found by rendering it.

Two templates are written out in this project (llama3 and chatml, see Tokenizer.parts). Which of them a
directory's Jinja template is, and with which default system message, is decided by rendering it on a few
conversations: where the texts are equal, so are the ids of transformers' apply_chat_template.
"""

import json
import re
from functools import cached_property
from typing import NamedTuple

CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# Template: the special tokens it needs, its stop token last.
CHATS = {"none": (), "llama3": LLAMA3, "chatml": CHATML}
CUTTING = "Cutting Knowledge Date: December 2023\nToday Date: "


class Chat(NamedTuple):
    """One of the templates, filled in."""

    name: str  # one of CHATS
    date: str | None = None  # llama3: the system block of Llama 3.1 and 3.2 opens with it
    system: str | None = None  # the system message of a prompt that has none
    bos: bool = True  # whether a conversation opens with the tokenizer's BOS, if it has one

    def parts(self, messages):
        """(role, content) messages, up to the reply's header -> [(is it a special token's name, text)]"""
        messages = [(role, self.trimmed(content)) for role, content in messages]
        if self.system is not None and messages[0][0] != "system":
            messages.insert(0, ("system", self.trimmed(self.system)))
        if self.date is not None:  # Llama 3.1's template puts this before the system message, or alone
            system = messages.pop(0)[1] if messages[0][0] == "system" else ""
            messages.insert(0, ("system", f"{CUTTING}{self.date}\n\n{system}"))
        found = []
        for role, content in messages:
            found += [*self.header(role, content), (True, CHATS[self.name][-1])]
            found += [(False, "\n")] if self.name == "chatml" else []
        return found + self.header("assistant", "")

    def header(self, role, content):
        """The parts of one message, without its end."""
        if self.name == "chatml":
            return [(True, CHATML[0]), (False, f"{role}\n{content}")]
        return [(True, LLAMA3[1]), (False, role), (True, LLAMA3[2]), (False, f"\n\n{content}")]

    def trimmed(self, content):
        """Llama 3's template trims every content."""
        return content.strip() if self.name == "llama3" else content


SYSTEM, USER, REPLY, AGAIN = (
    ("system", " Be\nbrief. "),
    ("user", " one\n"),
    ("assistant", " two "),
    ("user", "three"),
)
PROBES = ([USER], [SYSTEM, USER], [USER, REPLY, AGAIN], [SYSTEM, USER, REPLY, AGAIN])


def template_of(files):
    """The Jinja template of a model directory's files {name: bytes}, or None."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8")
    template = json.loads(files.get("tokenizer_config.json", "{}")).get("chat_template")
    if isinstance(template, list):  # several by name; without a default one there is none to recognise
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default", "")
    return template if isinstance(template, str) else None


class OwnTemplate:
    """The Jinja template of a model directory.

    bos, eos   the texts of the tokenizer's BOS and EOS, or ""
    """

    def __init__(self, source, bos, eos):
        self.source, self.bos, self.eos = source, bos, eos

    @cached_property
    def compiled(self):
        """The template, compiled in an environment like that of transformers.

        Its tags around what the assistant says, which change no text, are read as `if true`.
        """
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        source = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", self.source)
        source = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", source)
        return environment.from_string(source, globals={"raise_exception": refuse})

    def write(self, messages):
        """The text that transformers' apply_chat_template makes of messages, with add_generation_prompt.

        messages   [(role, content)]
        A template that asks for the date gets none: it then uses the one it was trained with, and a run does
        not depend on the day. Raises whatever is wrong with the template.
        """
        named = [{"role": role, "content": content} for role, content in messages]
        tokens = {"bos_token": self.bos, "eos_token": self.eos}
        return self.compiled.render(messages=named, add_generation_prompt=True, **tokens)

    def agrees(self, chat, messages):
        """Whether the template writes (role, content) messages as a Chat does."""
        opening = self.bos if chat.bos else ""
        return self.write(messages) == opening + "".join(text for _, text in chat.parts(messages))

    @cached_property
    def chat(self):
        """The Chat that the template is, or None: same text on every probe."""
        try:
            return self.recognise()
        except Exception:  # anything may be wrong with a template; then it is none of ours
            return None

    def recognise(self):
        """`chat`, with whatever the template raises."""
        text = self.write(PROBES[0])
        date = re.search(re.escape(CUTTING) + r"(.*)\n\n", text)
        default = r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n<\|im_start\|>user\n"
        system = re.search(default, text, re.DOTALL)
        for chat in (Chat("chatml", system=system and system[1]), Chat("llama3", date=date and date[1])):
            for bos in (False, True):  # SmolLM2's BOS is <|im_start|>, which opens every message
                candidate = chat._replace(bos=bos)
                if all(self.agrees(candidate, messages) for messages in PROBES):
                    return candidate
        return None


def refuse(message):
    """raise_exception, which templates call for messages that they cannot write."""
    raise ValueError(message)
