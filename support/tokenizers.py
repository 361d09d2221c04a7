"""Tokenizer files to tiktoken, and chat templates: every id that a model reads is made here."""

import base64
import hashlib
import json
import re
import unicodedata
from pathlib import Path

import tiktoken

from support.files import BadInput, read_json

# Regular expressions that cut text into pieces; no token reaches from one piece into the next.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts out every digit first, then uses GPT2 on what lies between: before a digit a run of blanks stays whole.
GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BUILT_IN = (
    r" ?\p{L}+| ?\p{N}|\s| ?[^\s\p{L}\p{N}]+"  # a word or one digit with the blank before it; "\n" alone
)

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
CHATS = {
    "none": (),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}  # template: the special tokens it needs, its stop token last
LONGEST_RUN = (
    25_000  # characters without a change between blank and not blank, as in Meta's llama3/tokenizer.py
)

# GPT-2's alphabet (encoder.py, bytes_to_unicode): printable bytes stand for themselves, the others for U+0100 onwards.
HIDDEN = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
BYTE_TO_CHAR = {byte: chr(256 + HIDDEN.index(byte)) if byte in HIDDEN else chr(byte) for byte in range(256)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def last_merge(token, ranks):
    """The two parts that byte-pair encoding by lowest rank joins last to form token; None if it never gets there."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, float("inf")) for a, b in zip(parts, parts[1:])]
        i = joined.index(min(joined))  # the leftmost of equals, as tiktoken and tokenizers do
        if joined[i] == float("inf"):
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts) if len(parts) == 2 else None


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
        if (
            kinds == ["Split", "ByteLevel"]
            and not gpt2
            and first["behavior"] == "Isolated"
            and not first["invert"]
        ):
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
    for key, usual in {
        "type": "BPE",
        "byte_fallback": False,
        "dropout": 0,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
    }.items():
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
        raise BadInput(
            f"{path}: {error} is no letter of the byte-level alphabet (a SentencePiece model?)"
        ) from None

    for left, right in merges:
        if not {left, right, left + right} <= ranks.keys():
            raise BadInput(
                f"{path}: merge of {left} and {right}: these and their sum must be in the vocabulary"
            )
    previous = -1
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        pair = last_merge(token, ranks)
        if pair is None and model.get("ignore_merges"):
            continue
        if merges.get(pair, -1) <= previous:
            raise BadInput(
                f"{path}: token {token}: its merge {pair} is missing or out of the order of the ids"
            )
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
            raise BadInput(
                f"{path}, line {number}: expected 'base64 rank', found {line[:40]} "
                "(SentencePiece models are not supported)"
            ) from None
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise BadInput(f"{path}: expected tokens with the ranks 0, 1, 2 and so on, each once")
    spare = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *spare[:4],
        "<|start_header_id|>",
        "<|end_header_id|>",
        spare[4],
        "<|eot_id|>",
        *spare[5:],
    ]
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
            raise BadInput(
                f"expected chat {', '.join(CHATS)}, and a date only with llama3; found {chat!r}, {date!r}"
            )
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
                type(id) is int and 0 <= id < 2**31 and token for id, token in self.token_bytes.items()
            ):
                raise ValueError("expected tokens that are not empty, each with an id of its own from 0")
            self.vocab_size = max(self.token_bytes) + 1
            # A vocabulary may lack bytes (SmolLM2's does): these get ids without text, which encode() notices.
            every_byte = {bytes([byte]): self.vocab_size + byte for byte in range(256)} | ranks
            self.bpe = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=every_byte, special_tokens={})
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"{self.path / name}: not laid out as expected: {error!r}") from error

        config, generation, model = (
            read_json(self.path / name, files.get(name, "{}"))
            for name in ("tokenizer_config.json", "generation_config.json", "config.json")
        )
        bos, eos = (
            token.get("content") if isinstance(token, dict) else token
            for token in (config.get("bos_token"), config.get("eos_token"))
        )
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
            files = {
                path.name: path.read_bytes()
                for path in (Path(directory, name) for name in FILES)
                if path.exists()
            }
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
            ids = [
                id for start, end in zip(cuts, cuts[1:]) for id in self.bpe.encode_ordinary(text[start:end])
            ]
        except (
            BaseException
        ) as error:  # what Rust calls a panic is no Exception, and its class cannot be imported
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
        if (
            not value
            or not isinstance(value, list)
            or not all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in value
            )
        ):
            raise BadInput(
                f"expected text or a list of {{role, content}} messages, found {str(value)[:60]!r}"
            )
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
    first, text, other = (
        {"SpecialToken": {"id": bos, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    )
    split = {"type": "Split", "pattern": {"Regex": BUILT_IN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": len(ranks) + i, "content": name, **flags} for i, name in enumerate((bos, eos))
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, other],
            "special_tokens": {bos: {"id": bos, "ids": [len(ranks)], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {spell(token): id for token, id in ranks.items()},
            "merges": [list(map(spell, pair)) for token in ranks if (pair := last_merge(token, ranks))],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": spec, "tokenizer_config.json": config}
    tokenizer = Tokenizer(
        {name: json.dumps(value, indent=1).encode() for name, value in files.items()}, "built-in"
    )
    for word in words:
        if len(tokenizer.encode(word)) != 1:
            raise BadInput(f"word {word!r} is cut into several pieces and would never be a token")
    return tokenizer
