"""Text to tensors: tokenizers, JSON lines, the shift and the mask, the built-in task, and the answer graders.

    rows ─ load_rows ─► encode (ids) ─► batch_indices (shuffle) ─► collate (the shift, the mask) ─► the models

Imports nothing of ours. B sequences · T positions
"""

import base64
import contextlib
import functools
import hashlib
import itertools
import json
import random
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch


class BadInput(ValueError):
    """A file, row or flag that cannot be used; the message is one line that names it."""


# ------------------------------------------------------------------------------------------------ tokenizers

# Regular expressions that cut text into pieces; no token reaches from one piece into the next.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts out every digit first, then uses GPT2 on what lies between: before a digit a run of blanks stays whole.
GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
BUILT_IN = r" ?\p{L}+| ?\p{N}|\s| ?[^\s\p{L}\p{N}]+"  # a word or one digit with the blank before it; "\n" alone

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
         "generation_config.json", "config.json")
CHATS = {"none": (), "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
         "chatml": ("<|im_start|>", "<|im_end|>")}  # template: the special tokens it needs, its stop token last
LONGEST_RUN = 25_000  # characters without a change between blank and not blank, as in Meta's llama3/tokenizer.py

# GPT-2's alphabet (encoder.py, bytes_to_unicode): printable bytes stand for themselves, the others for U+0100 onwards.
HIDDEN = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
BYTE_TO_CHAR = {byte: chr(256 + HIDDEN.index(byte)) if byte in HIDDEN else chr(byte) for byte in range(256)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def last_merge(token, ranks):
    """The two parts that byte-pair encoding by lowest rank joins last to form token; None if it never gets there."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, float("inf")) for a, b in zip(parts, parts[1:])]
        i = joined.index(min(joined))  # the leftmost of equals, as tiktoken and tokenizers do
        if joined[i] == float("inf"):
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts) if len(parts) == 2 else None


def read_json(path, raw):
    """The JSON object in `raw` (text or bytes) of the file `path`; BadInput if it is none."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object, found {str(value)[:40]!r}")
    return value


def split_pattern(pre_tokenizer, path):
    """One regular expression that cuts as the pre_tokenizer of a tokenizer.json does."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    kinds, first, last = [step.get("type") for step in steps], steps[0], steps[-1]
    if kinds[-1] == "ByteLevel" and last.get("add_prefix_space") is False:
        gpt2 = last.get("use_regex", True)  # files older than this key always use GPT-2's expression
        if kinds == ["ByteLevel"] and gpt2:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and gpt2 and first["individual_digits"]:
            return GPT2_DIGITS
        if kinds == ["Split", "ByteLevel"] and not gpt2 and first["behavior"] == "Isolated" and not first["invert"]:
            return first["pattern"]["Regex"]
    raise BadInput(f"{path}: pre_tokenizer is not supported: {json.dumps(pre_tokenizer)[:200]}")


def read_tokenizer_json(path, raw):
    """Hugging Face's tokenizer.json, if it is byte-level BPE: ranks {bytes: id}, specials {name: id}, the pattern,
    whether text is normalised to NFC, and the name of the token that it puts first, or None.

    The file lists pairs to merge; tiktoken merges any pair whose joint bytes are a token, the lowest id first. On every
    text the two agree if for each token the pair that is joined last, when it is encoded alone, is in the list, and
    these pairs stand there in the order of the ids: until a merge crosses its edges, a token's inside merges as it does
    alone. A token that merges never reach (Llama 3 has some) tiktoken finds when it is a whole piece, and so does
    Hugging Face with ignore_merges.
    """
    spec = read_json(path, raw)
    model, normalizer = spec["model"], spec.get("normalizer")
    for key, usual in {"type": "BPE", "byte_fallback": False, "dropout": 0, "continuing_subword_prefix": "",
                       "end_of_word_suffix": ""}.items():
        if model.get(key) not in (None, usual):
            raise BadInput(f"{path}: model.{key} is {model[key]!r}, but only byte-level BPE is supported")
    if normalizer not in (None, {"type": "NFC"}):
        raise BadInput(f"{path}: normalizer is not supported: {json.dumps(normalizer)[:200]}")
    pattern = split_pattern(spec.get("pre_tokenizer"), path)

    to_bytes = lambda word: bytes(CHAR_TO_BYTE[char] for char in word)
    specials = {token["content"]: token["id"] for token in spec["added_tokens"]}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    try:
        ranks = {to_bytes(word): id for word, id in model["vocab"].items() if word not in specials}
        merges = {(to_bytes(left), to_bytes(right)): i for i, (left, right) in enumerate(pairs)}
    except KeyError as error:
        raise BadInput(f"{path}: {error} is no letter of the byte-level alphabet (a SentencePiece model?)") from None

    for left, right in merges:
        if not {left, right, left + right} <= ranks.keys():
            raise BadInput(f"{path}: merge of {left} and {right}: these and their sum must be in the vocabulary")
    previous = -1
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        pair = last_merge(token, ranks)
        if pair is None and model.get("ignore_merges"):
            continue
        if merges.get(pair, -1) <= previous:
            raise BadInput(f"{path}: token {token}: its merge {pair} is missing or out of the order of the ids")
        previous = merges[pair]

    processor = spec.get("post_processor") or {}
    templates = [step["single"] for step in processor.get("processors", [processor]) if "single" in step]
    first = templates[0][0].get("SpecialToken", {}).get("id") if templates else None
    return ranks, specials, pattern, normalizer is not None, first


def read_tokenizer_model(path, raw):
    """The same of Meta's tokenizer.model: lines of base64 and rank; its specials are those of llama3/tokenizer.py."""
    ranks = {}
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise BadInput(f"{path}, line {number}: expected 'base64 rank', found {line[:40]} "
                           "(SentencePiece models are not supported)") from None
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise BadInput(f"{path}: expected tokens with the ranks 0, 1, 2 and so on, each once")
    spare = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    names = ["<|begin_of_text|>", "<|end_of_text|>", *spare[:4], "<|start_header_id|>", "<|end_header_id|>",
             spare[4], "<|eot_id|>", *spare[5:]]
    return ranks, {name: len(ranks) + i for i, name in enumerate(names)}, LLAMA3, False, names[0]


class Tokenizer:
    """A model's tokenizer with its chat template: every id that a model reads is made here.

    chat            none: text as it is; llama3 and chatml: their templates, without a default system message
    date            None, or such as "26 Jul 2024": llama3 then opens with the system block of Llama 3.1 and 3.2
    bos_id          what the tokenizer itself puts first, or None (Qwen2.5, SmolLM2, GPT-2)
    stop_id         what encode_response appends: the template's stop token; for "none" tokenizer_config's eos_token
    stop_ids        stop_id and eos_token_id of generation_config.json, else of config.json, else eos_token
    vocab_size      largest id + 1; a model may have more rows
    fingerprint     sha256 of all that decides which ids a text becomes: equal fingerprints, equal ids
    """

    def __init__(self, files, path, chat="none", date=None):
        """files: {name: bytes} of a model directory; path: that directory, for messages."""
        if chat not in CHATS or date and chat != "llama3":
            raise BadInput(f"expected chat {', '.join(CHATS)}, and a date only with llama3; found {chat!r}, {date!r}")
        self.files, self.path, self.chat, self.date = files, Path(path), chat, date
        name = "tokenizer.json" if "tokenizer.json" in files else "tokenizer.model"
        if name not in files:
            raise BadInput(f"{path}: neither tokenizer.json nor tokenizer.model is there")
        read = read_tokenizer_json if name == "tokenizer.json" else read_tokenizer_model
        try:
            ranks, self.specials, pattern, self.nfc, first = read(self.path / name, files[name])
            named = [(special.encode(), id) for special, id in self.specials.items()]
            self.token_bytes = {id: token for token, id in [*ranks.items(), *named]}
            if len(self.token_bytes) < len(ranks) + len(named) or not all(
                    type(id) is int and 0 <= id < 2**31 and token for id, token in self.token_bytes.items()):
                raise ValueError("expected tokens that are not empty, each with an id of its own from 0")
            self.vocab_size = max(self.token_bytes) + 1
            # A vocabulary may lack bytes (SmolLM2's does): these get ids without text, which encode() notices.
            every_byte = {bytes([byte]): self.vocab_size + byte for byte in range(256)} | ranks
            self.bpe = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=every_byte, special_tokens={})
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"{self.path / name}: not laid out as expected: {error!r}") from error

        config, generation, model = (read_json(self.path / name, files.get(name, "{}")) for name in
                                     ("tokenizer_config.json", "generation_config.json", "config.json"))
        bos, eos = (token.get("content") if isinstance(token, dict) else token
                    for token in (config.get("bos_token"), config.get("eos_token")))
        if chat == "llama3":
            first = "<|begin_of_text|>"  # its template says so itself
        elif first is None and config.get("add_bos_token"):
            first = bos
        stops = generation.get("eos_token_id")
        stops = model.get("eos_token_id") if stops is None else stops
        if stops is None:  # without any settings these are Meta's files: its code stops at these two
            stops = [self.special(name) for name in ([eos] if eos else ["<|end_of_text|>", "<|eot_id|>"])]
        stops = stops if isinstance(stops, list) else [stops]
        if not stops or not all(stop in self.specials.values() for stop in stops):
            raise BadInput(f"{path}: eos_token_id {stops}: expected ids of special tokens")

        needed = [self.special(name) for name in CHATS[chat]]
        self.bos_id = None if first is None else self.special(first)
        self.stop_id = needed[-1] if needed else self.special(eos) if eos else stops[0]
        self.stop_ids = tuple(sorted({*stops, self.stop_id}))
        rules = sorted(ranks.items()), pattern, self.nfc, chat, date, self.bos_id, needed, self.stop_id
        self.fingerprint = hashlib.sha256(repr(rules).encode()).hexdigest()

    @classmethod
    def load(cls, directory, chat="none", date=None):
        try:
            files = {path.name: path.read_bytes() for path in (Path(directory, name) for name in FILES)
                     if path.exists()}
        except OSError as error:
            raise BadInput(f"{error.filename}: {error.strerror}") from None
        return cls(files, directory, chat, date)

    def save(self, directory):
        """The files as they were read, without config.json, which is the model's."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, raw in self.files.items():
            if name != "config.json":
                Path(directory, name).write_bytes(raw)

    def special(self, name):
        if not isinstance(name, str) or name not in self.specials:
            raise BadInput(f"{self.path}: the tokenizer has no special token {name!r} (chat {self.chat})")
        return self.specials[name]

    def encode(self, text):
        """Ids of ordinary text: no BOS, and what spells a special token stays text. decode(encode(text)) == text.

        Runs of more than LONGEST_RUN characters without a change between blank and not blank are cut, for on very long
        ones tiktoken overflows its stack. Meta's llama3/tokenizer.py cuts them too, Hugging Face does not.
        """
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        cuts = [0, len(text)]
        if len(text) > LONGEST_RUN:
            for run in re.finditer(r"\s+|\S+", text):
                cuts[-1:-1] = range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
        try:
            ids = [id for start, end in zip(cuts, cuts[1:]) for id in self.bpe.encode_ordinary(text[start:end])]
        except BaseException as error:  # what Rust calls a panic is no Exception, and its class cannot be imported
            if type(error).__name__ != "PanicException":
                raise
            raise BadInput(f"{self.path}: the tokenizer's pattern takes forever on {text[:60]!r}") from None
        if b"".join(self.token_bytes.get(id, b"") for id in ids) != text.encode("utf-8", "surrogatepass"):
            raise BadInput(f"the tokenizer has no ids for a character or lone surrogate in {text[:60]!r}")
        return ids

    def decode(self, ids):
        return b"".join(self.token_bytes.get(id, b"\xff") for id in ids).decode("utf-8", "replace")

    def ids_with(self, text):
        """Ids of all tokens whose text contains `text`, such as the ends of lines."""
        return [id for id, raw in self.token_bytes.items() if text.encode() in raw]

    def token_texts(self, ids):
        return [self.decode([id]) for id in ids]

    def messages(self, value, role):
        """[(role, content)] of a text, a message or a list of messages; Llama 3's template trims every content."""
        value = {"role": role, "content": value} if isinstance(value, str) else value
        value = [value] if isinstance(value, dict) else value
        if not value or not isinstance(value, list) or not all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in value):
            raise BadInput(f"expected text or a list of {{role, content}} messages, found {str(value)[:60]!r}")
        return [(m["role"], m["content"].strip() if self.chat == "llama3" else m["content"]) for m in value]

    def turn(self, role, content):
        """One message in the template; with None as content only its header, for the model to go on from there."""
        if self.chat == "llama3":
            start, end = self.special("<|start_header_id|>"), self.special("<|end_header_id|>")
            ids = [start, *self.encode(role), end, *self.encode("\n\n" + (content or ""))]
        else:
            ids = [self.special("<|im_start|>"), *self.encode(f"{role}\n{content or ''}")]
        after = self.encode("\n") if self.chat == "chatml" else []
        return ids if content is None else [*ids, self.stop_id, *after]

    def encode_prompt(self, prompt):
        """Ids of a text or of messages in the chat template, up to the reply's header; BOS once, if there is one."""
        messages = self.messages(prompt, "user")
        if self.chat == "none":
            if len(messages) > 1:
                raise BadInput(f"{len(messages)} messages need a chat template (--chat llama3 or chatml)")
            ids = self.encode(messages[0][1])
        else:
            if self.date is not None:  # Llama 3.1's template puts this before the system message, or alone
                system = messages.pop(0)[1] if messages[0][0] == "system" else ""
                block = f"Cutting Knowledge Date: December 2023\nToday Date: {self.date}\n\n{system}"
                messages.insert(0, ("system", block))
            ids = [id for message in messages for id in self.turn(*message)] + self.turn("assistant", None)
        return ids if self.bos_id is None else [self.bos_id, *ids]

    def encode_response(self, response):
        """Ids of a reply (text or one message) and its stop token; they do not depend on the prompt."""
        messages = self.messages(response, "assistant")
        if len(messages) > 1:
            raise BadInput(f"expected one message as response, found {len(messages)}")
        return self.encode(messages[0][1]) + [self.stop_id]


def build_tokenizer(words):
    """A small tokenizer in Hugging Face's format: the 256 bytes, a token for each word, BOS and end of text.

    words       each one piece of BUILT_IN, such as "Tom", " Tom", " 3" or "####"; bytes need no word
    A word is found as a whole (ignore_merges, as in Llama 3), so no tokens are spent on the steps towards it.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    spell = lambda token: "".join(BYTE_TO_CHAR[byte] for byte in token)
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    first, text, other = ({"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                          {"Sequence": {"id": "B", "type_id": 1}})
    split = {"type": "Split", "pattern": {"Regex": BUILT_IN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": len(ranks) + i, "content": name, **flags} for i, name in enumerate((bos, eos))],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, other],
                           "special_tokens": {bos: {"id": bos, "ids": [len(ranks)], "tokens": [bos]}}},
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": {spell(token): id for token, id in ranks.items()},
                  "merges": [list(map(spell, pair)) for token in ranks if (pair := last_merge(token, ranks))]},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos,
              "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": spec, "tokenizer_config.json": config}
    tokenizer = Tokenizer({name: json.dumps(value, indent=1).encode() for name, value in files.items()}, "built-in")
    for word in words:
        if len(tokenizer.encode(word)) != 1:
            raise BadInput(f"word {word!r} is cut into several pieces and would never be a token")
    return tokenizer


# ------------------------------------------------------------------------------------------------ JSON lines

KEYS = {"prompt": ("prompt", "instruction", "question"), "response": ("response", "completion", "output", "answer"),
        "label": ("label", "answer"), "chosen": ("chosen",), "rejected": ("rejected",)}  # fmt: skip


def read_jsonl(path):
    """Yields (line number from 1, object) of a UTF-8 file, one object a line.

    Lines end at a newline only: real data holds U+2028, at which str.splitlines() would cut. Blank lines are skipped.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise BadInput(f"{path}: is a directory or a device; --data names a JSON lines file")
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line.decode("utf-8"))
                    except (ValueError, RecursionError) as e:
                        reason = f"{e.msg}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else e
                        raise BadInput(f"{path}, line {number}: not valid JSON in UTF-8 ({reason})") from None
                    if not isinstance(row, dict):
                        raise BadInput(f"{path}, line {number}: found {type(row).__name__}, expected a JSON object")
                    yield number, row
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror}); --data names a JSON lines file") from None


@contextlib.contextmanager
def at_line(source, number):
    """Inside, what is wrong with a row gets the name of its file and its line."""
    try:
        yield
    except BadInput as e:
        raise BadInput(f"{source}, line {number}: {e}") from None


def _messages(value):
    return isinstance(value, list) and value and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)  # fmt: skip


def load_rows(path, needs, limit=0, optional=()):
    """Rows of a JSON lines file with the canonical keys of `needs` (and those of `optional` that it has).

    needs, optional   among "prompt", "response", "chosen", "rejected", "label"; the accepted spellings stand in KEYS
    limit             reads only so many rows; 0 reads all
    -> list of {"prompt": ..., ..., "line": int, "raw": the row as read}. Texts, or lists of {"role", "content"}; a
    TRL pair without a prompt gets the messages before the last one. A label is a str; in OpenAI's GSM8K rows it is
    what follows "####" in `answer`. Raises BadInput with the line number for a row that lacks something.
    """
    rows = []
    for number, raw in itertools.islice(read_jsonl(path), limit or None):
        row = {"line": number, "raw": raw}
        if "prompt" in needs and "chosen" in needs and not any(k in raw for k in KEYS["prompt"]) and _messages(raw.get("chosen")):
            raw = {**raw, "prompt": raw["chosen"][:-1]}
        for key in (*needs, *optional):
            name = next((k for k in KEYS[key] if k in raw), None)
            value = raw.get(name)
            if name is None and key in optional:
                continue
            if name is None:
                raise BadInput(f"{path}, line {number}: found keys {sorted(raw)[:8]}, expected {' or '.join(KEYS[key])}")
            if key == "label" and isinstance(value, (int, float, str)):
                with at_line(path, number):
                    value = gsm8k_label(value) if isinstance(value, str) and "####" in value else str(value)
            if not (isinstance(value, str) and value.strip() or key != "label" and _messages(value)):
                raise BadInput(f"{path}, line {number}: {name} is {json.dumps(value)[:60]}; expected a text that is not empty, "
                               'or a list of {"role", "content"} messages')  # fmt: skip
            row[key] = value[-1:] if key in ("chosen", "rejected", "response") and isinstance(value, list) else value
        rows.append(row)
    if not rows:
        raise BadInput(f"{path}: no rows; expected one JSON object a line")
    return rows


# ------------------------------------------------------------------------------------------------ rows to tensors


class Example(NamedTuple):
    """One sequence as ids. Prompt and response are encoded apart, so a response's ids never depend on its prompt."""

    prompt_ids: list
    response_ids: list  # with the stop token, unless a sampled answer was cut off


def encode(rows, tokenizer, max_seq_len, keys=("response",), source="data", log=print):
    """Rows -> tuples with one Example per key, (response,) or (chosen, rejected), and the rows that they came from.

    Rows longer than max_seq_len tokens (prompt and response) and identical pairs are dropped and counted in one line
    that goes to `log`; nothing is ever cut. Raises BadInput when no row is left.
    """
    kept, too_long, identical = [], 0, 0
    for row in rows:
        with at_line(source, row["line"]):
            prompt = tokenizer.encode_prompt(row["prompt"])
            examples = tuple(Example(prompt, tokenizer.encode_response(row[key])) for key in keys)
        if max(len(prompt) + len(e.response_ids) for e in examples) > max_seq_len:
            too_long += 1
        elif len(examples) == 2 and examples[0] == examples[1]:
            identical += 1
        else:
            kept.append((examples, row))
    if too_long or identical or not kept:
        log(f"{source}: {len(rows)} rows; dropped {too_long} longer than --max_seq_len {max_seq_len} tokens and "
            f"{identical} identical pairs; {len(kept)} left")  # fmt: skip
    if not kept:
        raise BadInput(f"{source}: no row is left; raise --max_seq_len ({max_seq_len}) or look at the data")
    return [examples for examples, _ in kept], [row for _, row in kept]


# exercise 3.1 (7 lines): the shift and the mask
def collate(examples, device="cpu", pad_id=0):
    """The shift and the mask, in this one place.

        ids        p0  p1  p2  r0  r1  eos pad          one row, prompt length 3
        inputs     p0  p1  p2  r0  r1  eos              = ids[:, :-1]
        targets    p1  p2  r0  r1  eos pad              = ids[:, 1:]
        mask        .   .   x   x   x   .
        index t     0   1   2   3   4   5               state s_t = inputs[:, :t+1], action a_t = targets[:, t]

    examples: list of B Example -> ids (B, T+1) int64, response_mask (B, T) bool. The mask is made from lengths, never
    from ids, and pads stand on the right, where causal attention cannot see them: `pad_id` may be any id.
    """
    lengths = [len(e.prompt_ids) + len(e.response_ids) for e in examples]
    ids = torch.full((len(examples), max(lengths)), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(examples), max(lengths) - 1, dtype=torch.bool)
    for i, e in enumerate(examples):
        ids[i, : lengths[i]] = torch.tensor(e.prompt_ids + e.response_ids)
        mask[i, len(e.prompt_ids) - 1 : lengths[i] - 1] = True
    return ids.to(device), mask.to(device)


def spans(lengths, budget):
    """Cuts neighbours into parts of at most `budget` tokens, at least one row each.

    >>> spans([3, 3, 3, 9, 1], 6)
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    starts, filled = [], budget + 1
    for i, n in enumerate(lengths):
        filled += n
        if filled > budget:
            starts, filled = [*starts, i], n
    return list(zip(starts, [*starts[1:], len(lengths)]))


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


# exercise 3.2 (2 lines): shuffling without a state
def batch_indices(n, batch_size, step, seed):
    """Which of n rows make up batch `step` (from 0): shuffled anew each epoch, a function of its arguments alone.

    No state to save: a resumed run asks for the next step. A batch may span two epochs, and no row is left out.

    >>> sorted(int(i) for step in range(2) for i in batch_indices(6, 3, step, seed=0))
    [0, 1, 2, 3, 4, 5]
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_permutation(n, seed, p // n)[p % n]) for p in places]


# ------------------------------------------------------------------------------------------------ the built-in task

NAMES, THINGS = ("Tom", "Ann", "Ben", "Eva"), ("apples", "pens", "books", "coins")
VERBS = {"+": ("buys", "finds", "gets", "picks", "wins", "borrows", "collects", "receives"),
         "-": ("loses", "eats", "sells", "lends", "drops", "spends", "breaks", "donates")}  # fmt: skip
OPERATOR = {verb: op for op, verbs in VERBS.items() for verb in verbs}


@dataclass(frozen=True)
class Arith:
    """Word problems over 0..9 whose answers restate each step, like GSM8K's, and an author who misreads some verbs.

    The training answers give a misread verb the wrong sign with probability q, and go on from what was written. A
    policy fine-tuned on them inherits that: greedily it is wrong on those verbs, sampled it is sometimes right. So it can
    improve, pairs of right and wrong answers exist, and the first wrong token is known exactly, which no data set of
    real answers offers.
    """

    steps: tuple = (4, 6)  # sentences after the first: at least, at most
    verbs: int = 12  # half of them add, half take away
    misread: int = 6  # of these verbs
    operand: int = 3  # largest
    q: float = 0.65  # chance that a misread verb is written with the wrong sign
    author: int = 0  # which verbs are misread

    @functools.cached_property
    def words(self):
        half = self.verbs // 2
        return [(verb, op) for op in "+-" for verb in VERBS[op][:half]]

    @functools.cached_property
    def misreads(self):
        rng, half = random.Random(self.author), self.verbs // 2
        plus, minus = VERBS["+"][:half], VERBS["-"][:half]
        return frozenset(rng.sample(plus, self.misread // 2) + rng.sample(minus, self.misread - self.misread // 2))

    def problem(self, rng):
        """(start, [(verb, operand)]): all values stay in 0..9, and no set of misreadings ends on the right number, so
        that a right number means a right path (for the author; a policy can still be lucky)."""
        while True:
            start, moves, wrong = rng.randint(0, 9), [], set()  # wrong: running values after at least one misreading
            value = start
            for _ in range(rng.randint(*self.steps)):
                verb, op = rng.choice(self.words)
                b = rng.randint(1, self.operand)
                d = b if op == "+" else -b
                wrong = {w + d for w in wrong} | ({w - d for w in wrong | {value}} if verb in self.misreads else set())
                value += d
                moves.append((verb, b))
                if not all(0 <= v <= 9 for v in wrong | {value}):
                    break
            else:
                if value not in wrong:
                    return start, moves

    def answer(self, start, moves, rng=None):
        """The worked answer; with `rng`, as the author writes it."""
        lines, value = [], start
        for verb, b in moves:
            op = OPERATOR[verb]
            if rng and verb in self.misreads and rng.random() < self.q:
                op = "-" if op == "+" else "+"
            result = value + b if op == "+" else value - b
            lines.append(f"{value}{op}{b}={result}\n")
            value = result
        return "".join(lines) + f"#### {value}"


def arith_rows(split, n, seed, task=Arith()):
    """n rows of the built-in task: {"prompt", "response" (the author's), "solution" (the right one), "label", "line"}.

    split   "train" and "test" share no prompt: a hash of the text decides where it belongs
    """
    rng, rows = random.Random(f"{split} {seed}"), []
    while len(rows) < n:
        start, moves = task.problem(rng)
        name = rng.choice(NAMES)
        story = [f"{name} has {start} {rng.choice(THINGS)}."] + [f"{name} {verb} {b}." for verb, b in moves]
        prompt = " ".join(story) + " How many?\n"
        if (stable_hash(prompt) % 10 == 0) == (split == "test"):
            solution = task.answer(start, moves)
            rows.append({"prompt": prompt, "response": task.answer(start, moves, rng), "solution": solution,
                         "label": solution.split()[-1], "line": len(rows) + 1})  # fmt: skip
    return rows


def arith_solve(prompt):
    """The one right answer to a prompt of the built-in task, from its text."""
    try:
        start, *moves = re.findall(r" (\w+) (\d)", prompt)
        return Arith().answer(int(start[1]), [(verb, int(b)) for verb, b in moves])
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"not a prompt of the built-in task (--task arith): {str(prompt)[:60]!r}") from None


def arith_tokenizer():
    """A byte-complete tokenizer with one token for every word of the built-in task."""
    words = [*NAMES, *(f" {w}" for w in (*NAMES, *THINGS, *OPERATOR, "has", "How", "many", *range(10))), "####"]
    return build_tokenizer(words)


def first_error(ids, solution_ids):
    """Index of the first token that departs from the one right answer (both as ids, stop token included); len(ids) if none.

    >>> first_error([5, 6, 9, 1], [5, 6, 7, 1])
    2
    """
    return next((i for i, (a, b) in enumerate(zip(ids, solution_ids)) if a != b), min(len(ids), len(solution_ids)))


def error_places(tokenizer, prompt, examples):
    """Index of the first wrong token of each answer to a prompt of the built-in task; its length when nothing is wrong."""
    solution = tokenizer.encode_response(arith_solve(prompt))
    return [first_error(e.response_ids, solution) for e in examples]


def stable_hash(text):
    """A 63-bit number that depends on the text alone (Python's own hash changes from run to run)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# ------------------------------------------------------------------------------------------------ answer graders

TASKS = ("gsm8k", "math", "arith")
GRADERS = ("ours", "strict", "authors", "math_verify")
MAX_CHARS = 500  # no answer is longer; bounds every integer and every pattern that is not linear, whatever a model writes

# A minus after a digit, a word or a bracket is a difference: "5-3" ends in 3. No branch can fail late, so a search is linear.
NUMBER = r"(?:(?<![\w)\]}%.])-)?\\?\$?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|(?<![.\d])\.\d+)(?:/\d+)?"
CLAIMS = ("####", r"\\boxed", r"\banswer(?: is|:)", "^A:")  # the most explicit first; "A:" as in OpenAI's example solutions
WORDS = {w: str(n) for n, w in enumerate("one two three four five six seven eight nine ten eleven twelve".split(), 1)}
PI = Fraction(2**127 - 1)  # a prime that nobody writes: under *, / and == its root behaves like pi


def gsm8k_label(answer: str) -> str:
    """The label in the `answer` of one of OpenAI's GSM8K rows: the number after "####", commas removed."""
    if (label := extract_answer(answer, "gsm8k", "strict")) is None:
        raise BadInput(f"no '#### number' in the GSM8K answer {answer[-60:]!r}")
    return label


def grade(text: str, label: str, task: str, grader: str = "ours") -> tuple[str | None, bool]:
    """-> what the text claims, or None; and whether that is the label."""
    answer = extract_answer(text, task, grader)
    return answer, answer is not None and same_answer(answer, label, task, grader)


def extract_answer(text: str, task: str, grader: str = "ours") -> str | None:
    """The final answer that a text claims, or None.

    math           what stands in the last \\boxed or \\fbox
    gsm8k, arith   the last number right after "####"; else after \\boxed, "answer is" or "A:"; else the last number.
                   strict: the first "#### number" and nothing else. authors: see authors_number.
    Known misses: without a marker, a closing remark with another number ("... in 2 days"); number words; "2 million" (2).
    """
    if task not in TASKS or grader not in GRADERS:
        raise ValueError(f"task {task!r} is not one of {', '.join(TASKS)}, or grader {grader!r} of {', '.join(GRADERS)}")
    if task == "math":
        return boxed(text)
    if grader == "strict":
        return found[1].replace(",", "") if (found := re.search(r"#### (-?[0-9.,]+)", text)) else None
    if grader == "authors":
        return authors_number(text)
    text = text.replace("\N{MINUS SIGN}", "-")
    claims = (re.findall(rf"(?im){claim}[\s:=*$({{\\]*({NUMBER})", text) for claim in CLAIMS)
    numbers = next(filter(None, claims), None) or re.findall(NUMBER, text)
    return re.sub(r"[$,\\]", "", numbers[-1]) if numbers else None


def same_answer(answer: str, label: str, task: str, grader: str = "ours") -> bool:
    """Is the extracted answer the label?

    ours      equal values, see meaning(); one rule for all tasks
    strict    equal strings, for math after Hendrycks's normalisation
    authors   equal strings; for math the answer is a SUBSTRING of the label, so that 2 is right for 12
    """
    if max(len(answer), len(label)) > MAX_CHARS:
        return False
    if grader == "math_verify":
        try:
            from math_verify import parse, verify
        except ImportError:
            raise BadInput("the grader math_verify needs its package: pip install math-verify") from None
        return verify(parse(rf"\boxed{{{label}}}"), parse(rf"\boxed{{{answer}}}"))  # not symmetric: the label is first
    if grader == "ours":
        return meaning(answer) == meaning(label)
    if grader == "strict":
        return hendrycks(answer) == hendrycks(label) if task == "math" else answer == label.replace(",", "")
    if task == "math":
        return authors_latex(answer) in re.sub(r"\s", "", label) and authors_latex(answer) != ""
    return answer == re.sub(r",|\.0+$", "", label)


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} or \\fbox{...}, braces balanced; after `\\boxed 5`, all up to a $ or a new line."""
    *before, rest = re.split(r"\\(?:boxed|fbox)(?![a-z])\s*", text)
    if not before:
        return None
    if not rest.startswith("{"):
        return re.split(r"[$\n]", rest)[0].strip() or None
    depth = 0
    for token in re.finditer(r"\\.|[{}]", rest):  # \{ and \} are the brackets of a set and open nothing
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return rest[1 : token.start()].strip() or None
    return None  # cut off inside the box


def hendrycks(s: str) -> str:
    """String normalisation of Hendrycks et al. 2021 (MATH): fractions, roots, units, degrees, \\$, \\%, "x=", spaces."""
    s = re.sub(r"\n|\\!", "", s).replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    s = re.sub(r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$", "", s).split(r"\text{ ")[0].replace(r"\%", "")
    s = re.sub(r"^[^=]{0,2}=([^=]*)$", r"\1", re.sub(r"(^|[ {])\.", r"\g<1>0.", s))
    s = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", s).replace(" ", "")
    s = re.sub(r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}", s)  # \frac12
    s = re.sub(r"\\frac([^{\\])\{", r"\\frac{\1}{", s)  # \frac1{2}
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", r"\frac{1}{2}" if s == "0.5" else s)


def meaning(answer: str) -> tuple:
    """What an answer stands for: equal tuples, equal answers.

    After Hendrycks's normalisation the string is cut at brackets, commas, cells and rows, which stay as they are; each piece
    between them that is a number becomes that number. Only a set and a list without brackets have no order. A percentage is
    its number. A unit after a number is dropped, not compared: 5 cm is 5 m.
    Known misses, all of them right answers marked wrong: powers (2^{10}), sums that are not the same letter for letter
    (1+\\sqrt{2}, \\sqrt{2}+1), roots of fractions, all algebra (2(x+1), 2x+2), 0.5 for 50\\%, Even for even, rounding.
    """
    s = answer.replace("\N{MINUS SIGN}", "-").replace("\\\\", ";").replace("{,}", ",")
    s = re.sub(r"\\[!,:; ]\s*|°|(?<!\\)[$%]", "", s.replace("cfrac", "frac"))
    s = re.sub(r"\s*\b([ap]\.\s?m|hundred|thousand|million|billion)", r"*\1", s)  # no units: 2 million is not 2
    s = re.sub(r"(?<=[\w)}])\s*\\(?:text|mbox|mathrm)\s*\{[^{}*]*\}(?:\^\{?\d\}?)?\.?\s*$", "", s)  # 10\text{ cm}^2
    s = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1 ", s)
    s = re.sub(r"\s+(?:and|or)\s+", ",", s)
    s = re.sub(r"(?<=[\d)}])(?:\s+(?:[A-Za-z]{3,}|[ckm]m))+(?:\^\{?\d\}?)?\.?\s*$", "", s)  # 10 square cm
    s = re.sub(r"^\s*\(([A-Za-z])\)\s*$|^\s*\w\s*\\in\b", r"\1", s)  # the choice (C) is C; x \in [0,1] is [0,1]
    s = re.sub(r"(\d)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}", s)
    s = re.sub(r"(?<=\d)\s+(?=\d)", "~", s)  # "1 2" is not 12
    s = hendrycks(re.sub(r"\s|;(?=\s*\\end)", "", s)).rstrip(".")
    s = re.sub(r"(^|[,(\[])\+", r"\1", s)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", s):  # 1,234 is a number; (1,234) is a pair
        s = s.replace(",", "")
    pieces = re.split(r"([()\[\],;&]|\\[{}]|\\cup|\\(?:begin|end)\{\w+\})", s)
    values = [square if (square := signed_square(piece)) is not None else piece for piece in pieces if piece]
    ordered = re.search(r"[()\[\];&]|\\cup|\\begin", s)
    return tuple(values if ordered else sorted(values, key=lambda v: (isinstance(v, str), v)))  # numbers, then strings


def signed_square(s: str) -> Fraction | None:
    """sign(v) v^2 of v, a product or quotient of rationals, square roots and pi; None where s is anything else.

    The map keeps products, quotients and equality, and its values are rational: sqrt(8) and 2 sqrt(2) both give 8.
    """
    group = r"\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
    if m := re.fullmatch(r"-([^+-].*)", s):
        return None if (x := signed_square(m[1])) is None else -x
    if re.fullmatch(r"\d+\.?\d*|\.\d+", s):
        return Fraction(s) ** 2
    if (m := re.fullmatch(r"(\d+)\\frac\{(\d+)\}\{(\d+)\}", s)) and int(m[3]):  # a mixed number
        return (int(m[1]) + Fraction(int(m[2]), int(m[3]))) ** 2
    if m := re.fullmatch(rf"\\frac{group}{group}", s) or re.fullmatch(r"(.+)/(\d+|\\sqrt\{\d+\}|\\pi)", s):
        x, y = signed_square(m[1]), signed_square(m[2])
        return x / y if x is not None and y else None
    if m := re.fullmatch(r"(.*?)(?:\\cdot|\\times|\*)?(?:\\sqrt\{(\d+)\}|\\pi)", s):
        x = signed_square(m[1] or "1")
        return None if x is None else x * (Fraction(m[2]) if m[2] else PI)
    return None


def authors_number(text: str) -> str | None:
    """The Q-RM authors' GSM8K rule: the last number of the last line that has one, if possible after "therefore" or "so".

    Their errors, kept: "so" inside a word counts, 1,234,567 is read as 567 and 5-3 as -3, a closing remark's number wins.
    """
    def numbers(s):
        s = re.sub(rf"\b({'|'.join(WORDS)})\b", lambda word: WORDS[word[0].lower()], s, flags=re.IGNORECASE)
        return [re.sub(r",|\.0+$", "", "".join(parts)) for parts in re.findall(r"(-?\d+)(,?\d+)?(\.\d+)?", s)]

    for line in reversed(text.strip().split("\n")):
        clauses = re.findall(r"[Tt]herefore(.*)", line) + re.findall(r"[Ss]o(.*)", line)
        if found := [n for clause in clauses for n in numbers(clause)] or numbers(line):
            return found[-1]
    return None


def authors_latex(answer: str) -> str:
    """The Q-RM authors' MATH normalisation of an answer; the label keeps its \\\\, so that no matrix ever matches."""
    s = re.sub(r"^\\text|^\w=", "", re.sub(r"\\mathbf| ", "", answer))
    s = re.sub(r"\\left|\\right|\\!|\\%|\\\$", "", s)
    s = re.sub(r"\\text{.*\n*.*}|\\mbox{.*}|\^{?\\circ}?", "", s)
    return re.sub(r"\\$", "", s.replace("\\\\", "\\"))
