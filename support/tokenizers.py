"""Tokenizer files to tiktoken, and chat templates: every id that a model reads is made here."""

import base64
import hashlib
import json
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import tiktoken

from support.chats import CHATS, Chat, OwnTemplate, template_of
from support.files import BadInput, read_json, require

# Regular expressions that cut text into pieces; no token spans two pieces.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 splits off every digit first and applies GPT2 to the rest: a run of spaces before a digit stays
# whole.
GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# The built-in task's: a word or one digit with the space before it; "\n" alone.
BUILT_IN = r" ?\p{L}+| ?\p{N}|\s| ?[^\s\p{L}\p{N}]+"

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
ROLES = ("system", "user", "assistant")
# Characters without a change between whitespace and other text, as in Meta's llama3/tokenizer.py.
LONGEST_RUN = 25_000

# GPT-2's alphabet (encoder.py, bytes_to_unicode): printable bytes stand for themselves, the others for U+0100
# onwards.
HIDDEN = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
BYTE_TO_CHAR = {byte: chr(256 + HIDDEN.index(byte)) if byte in HIDDEN else chr(byte) for byte in range(256)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


class Vocabulary(NamedTuple):
    """What the files of a tokenizer say."""

    ranks: dict  # {bytes: id}, the lowest id merged first
    specials: dict  # {name: id}, never made from text
    added: dict  # {text: id}, found in a text before it is cut into pieces, such as "<think>"
    raw: frozenset  # those of `added` that are found before the text is normalised, and before the others
    pattern: str  # cuts text into pieces
    nfc: bool  # text is normalised to NFC first
    first: str | None  # name of the special token that opens every text


def last_merge(token, ranks):
    """The two parts that byte-pair encoding by lowest rank joins last to form token, or None."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, float("inf")) for a, b in zip(parts, parts[1:])]
        i = joined.index(min(joined))  # the leftmost of equals, as in tiktoken and tokenizers
        if joined[i] == float("inf"):
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts) if len(parts) == 2 else None


def flattened(step, key):
    """The steps of a normalizer, pre_tokenizer or post_processor, without the sequences around them."""
    if step is None:
        return []
    if step.get("type") != "Sequence":
        return [step]
    found = []
    for part in step[key]:
        found += flattened(part, key)
    return found


def split_pattern(pre_tokenizer, path):
    """One regular expression that cuts text as the pre_tokenizer of a tokenizer.json does."""
    require(pre_tokenizer is not None, f"{path}: pre_tokenizer is not supported: null")
    steps = flattened(pre_tokenizer, "pretokenizers")
    kinds = [step.get("type") for step in steps]
    first, last = steps[0], steps[-1]
    if kinds[-1] == "ByteLevel" and last.get("add_prefix_space") is False:
        gpt2 = last.get("use_regex", True)  # files older than this key always use GPT-2's expression
        if kinds == ["ByteLevel"] and gpt2:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and gpt2 and first["individual_digits"]:
            return GPT2_DIGITS
        isolated = kinds == ["Split", "ByteLevel"] and first["behavior"] == "Isolated" and not first["invert"]
        if isolated and not gpt2:
            return first["pattern"]["Regex"]
    raise BadInput(f"{path}: pre_tokenizer is not supported: {json.dumps(pre_tokenizer)[:200]}")


def to_bytes(word):
    """The bytes of a word spelled in GPT-2's alphabet; KeyError for a letter that is not in it."""
    return bytes(CHAR_TO_BYTE[char] for char in word)


def spell(token):
    """Inverse of to_bytes."""
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def check_merges(merges, ranks, ignore_merges, path):
    """BadInput unless tiktoken encodes every text as the merge list does.

    merges   {(left, right): place in the file's list}

    The file lists the pairs to merge; tiktoken merges any pair whose concatenation is a token, the lowest id
    first. The two agree on every text if, for each token, the pair that is merged last when it is encoded
    alone is in the list, and these pairs are listed in the order of the ids: until a merge crosses its edges,
    a token's inside merges as it does alone. A token that merges never reach (Llama 3 has some) is found by
    tiktoken when it is a whole piece, and so does Hugging Face with ignore_merges.
    """
    for left, right in merges:
        require(
            {left, right, left + right} <= ranks.keys(),
            f"{path}: merge of {left} and {right}: these and their sum must be in the vocabulary",
        )
    previous = -1
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        pair = last_merge(token, ranks)
        if pair is None and ignore_merges:
            continue
        require(
            merges.get(pair, -1) > previous,
            f"{path}: token {token}: its merge {pair} is missing or out of the order of the ids",
        )
        previous = merges[pair]


def read_tokenizer_json(path, raw):
    """The Vocabulary in Hugging Face's tokenizer.json, if it is byte-level BPE (see check_merges)."""
    spec = read_json(path, raw)
    model, normalizers = spec["model"], flattened(spec.get("normalizer"), "normalizers")
    usual = {
        "type": "BPE",
        "byte_fallback": False,
        "dropout": 0,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
    }
    for key, value in usual.items():
        require(
            model.get(key) in (None, value),
            f"{path}: model.{key} is {model.get(key)!r}, but only byte-level BPE is supported",
        )
    require(
        all(step == {"type": "NFC"} for step in normalizers),
        f"{path}: normalizer is not supported: {json.dumps(normalizers)[:200]}",
    )
    pattern = split_pattern(spec.get("pre_tokenizer"), path)
    specials = {token["content"]: token["id"] for token in spec["added_tokens"] if token.get("special", True)}
    added = added_tokens(spec["added_tokens"], path)
    raw = frozenset(token["content"] for token in spec["added_tokens"] if not token.get("normalized", True))
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    try:
        ranks = {to_bytes(word): id for word, id in model["vocab"].items() if word not in specials | added}
        merges = {(to_bytes(left), to_bytes(right)): i for i, (left, right) in enumerate(pairs)}
    except KeyError as error:
        raise BadInput(
            f"{path}: {error} is no letter of the byte-level alphabet (a SentencePiece model?)"
        ) from None
    check_merges(merges, ranks, model.get("ignore_merges"), path)
    first = first_special(spec, path)
    return Vocabulary(ranks, specials, added, raw & added.keys(), pattern, bool(normalizers), first)


def added_tokens(tokens, path):
    """{text: id} of the added tokens that are not special: wherever a text spells one, it becomes this id."""
    found = {}
    for token in tokens:
        odd = [key for key in ("single_word", "lstrip", "rstrip") if token.get(key)]
        require(not odd, f"{path}: added token {token['content']!r} has {odd}, which is not supported")
        if token.get("special", True):
            continue
        found[token["content"]] = token["id"]
    return found


def first_special(spec, path):
    """Name of the special token that a tokenizer.json puts before a text, or None."""
    steps = flattened(spec.get("post_processor"), "processors")
    kinds = [step for step in steps if step.get("type") not in ("ByteLevel", "TemplateProcessing")]
    require(not kinds, f"{path}: post_processor is not supported: {json.dumps(kinds)[:200]}")
    templates = [step["single"] for step in steps if step["type"] == "TemplateProcessing"]
    names = [[part.get("SpecialToken", {}).get("id") for part in template] for template in templates]
    usual = not names or len(names) == 1 and names[0][-1] is None and len(names[0]) <= 2
    require(
        usual,
        f"{path}: post_processor is not supported: tokens {names}; expected one before the text, at most",
    )
    first = names[0][0] if names else None
    if first is not None:
        written = [step["special_tokens"][first]["ids"] for step in steps if "special_tokens" in step][0]
        own = [token["id"] for token in spec["added_tokens"] if token["content"] == first]
        require(
            written == own or not own,  # a token that is not there is refused where it is needed
            f"{path}: post_processor writes {first} as {written}, but it is {own}; expected one id",
        )
    return first


def read_tokenizer_model(path, raw):
    """The Vocabulary in Meta's tokenizer.model, lines of base64 and rank, with Llama 3's specials."""
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
    require(
        ranks and sorted(ranks.values()) == list(range(len(ranks))),
        f"{path}: expected tokens with the ranks 0, 1, 2 and so on, each once",
    )
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
    specials = {name: len(ranks) + i for i, name in enumerate(names)}
    return Vocabulary(ranks, specials, {}, frozenset(), LLAMA3, False, names[0])


def is_message(value):
    """Whether value is a {"role", "content"} message with texts in both."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def is_conversation(value):
    """Whether value is a list of at least one message."""
    return isinstance(value, list) and len(value) > 0 and all(map(is_message, value))


def token_name(token):
    """The name of a token in tokenizer_config.json, which may be written out as an object."""
    return token.get("content") if isinstance(token, dict) else token


def listed(ids):
    """eos_token_id as a list: it may be one id."""
    return ids if isinstance(ids, list) else [ids]


def any_of(texts):
    """A pattern that finds any of the texts, the longest first; re.split puts what it found at odd places."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if texts else "(?!)")


class Tokenizer:
    """A model's tokenizer with its chat template: every id that a model reads is made here.

    chat            none: text as it is; llama3 and chatml: these templates; auto: the directory's own, which
                    must be one of these; none if it has none
    date            None, or such as "26 Jul 2024": llama3 then opens with the system block of Llama 3.1
    system          the system message of prompts without one; None: the default of the directory's own
                    template, if that is in use; "" for none
    bos_id          what the tokenizer itself puts first, or None (Qwen2.5, SmolLM2, GPT-2)
    stop_id         what encode_response appends: the template's stop token; for "none" tokenizer_config's
                    eos_token
    stop_ids        stop_id and eos_token_id of generation_config.json, else of config.json, else eos_token
    vocab_size      largest id + 1
    rows            vocab_size of config.json, if larger: a model may sample ids that have no text
    fingerprint     sha256 of everything that decides which ids a text becomes: equal fingerprints, equal ids
    """

    def __init__(self, files, path, chat="none", date=None, system=None):
        """files: {name: bytes} of a model directory; path: that directory, for messages."""
        require(
            chat in (*CHATS, "auto") and (not date or chat in ("llama3", "auto")),
            f"expected chat {', '.join(CHATS)} or auto, a date only with llama3; found {chat!r}, {date!r}",
        )
        self.files, self.path = files, Path(path)
        vocabulary = self.read_vocabulary()
        config = self.token_settings()
        bos, eos = token_name(config.get("bos_token")), token_name(config.get("eos_token"))
        self.strict = chat == "auto"
        self.chat, self.own = self.choose_chat(chat, date, system, self.own_template(bos, eos))
        first = vocabulary.first
        if self.chat.name == "llama3":
            first = "<|begin_of_text|>"  # its template says so itself
        elif first is None and self.own and self.own.chat.bos:
            first = bos
        stops = self.stops(eos)
        needed = [self.special(name) for name in CHATS[self.chat.name]]
        self.bos_id = None if first is None or not self.chat.bos else self.special(first)
        self.stop_id = needed[-1] if needed else self.special(eos) if eos else stops[0]
        self.stop_ids = tuple(sorted({*stops, self.stop_id}))
        rows = self.read_settings("config.json").get("vocab_size")
        self.rows = max(self.vocab_size, rows if type(rows) is int else 0)
        rules = self.rules(vocabulary, needed)
        self.fingerprint = hashlib.sha256(repr(rules).encode()).hexdigest()

    def own_template(self, bos, eos):
        """The OwnTemplate of the directory, or None."""
        try:
            source = template_of(self.files)
        except ValueError as error:
            raise BadInput(f"{self.path}: the chat template cannot be read: {error}") from None
        return None if source is None else OwnTemplate(source, bos or "", eos or "")

    def choose_chat(self, chat, date, system, own):
        """-> the Chat in use, with what the directory's own template adds to it; that template, if in use"""
        if chat == "auto":
            require(
                own is None or own.chat is not None,
                f"{self.path}: its own chat template is none of {', '.join(CHATS)}; name one of these with "
                "--chat (none: text as it is)",
            )
            chat = own.chat.name if own else "none"
        if own is not None and (own.chat is None or own.chat.name != chat):
            own = None
        chosen = own.chat if own else Chat(chat)
        require(
            not date or chat == "llama3", f"{self.path}: --date belongs to the template llama3, found {chat}"
        )
        require(
            not system or chat != "none", f"{self.path}: --system needs a chat template (--chat), found none"
        )
        if system is not None:
            chosen = chosen._replace(system=system or None)
        return chosen._replace(date=date or chosen.date), own

    def rules(self, vocabulary, needed):
        """Everything that decides which ids a text becomes."""
        chat = self.chat
        ranks = sorted(vocabulary.ranks.items())
        rules = ranks, vocabulary.pattern, self.nfc, chat.name, chat.date, self.bos_id, needed, self.stop_id
        more = chat.system, sorted(self.added.items())
        normalised = sorted(self.added.keys() - vocabulary.raw)
        rules = rules if more == (None, []) else (*rules, *more)
        return (*rules, normalised) if normalised else rules

    def read_vocabulary(self):
        """Sets specials, added, nfc, token_bytes {id: bytes}, vocab_size and bpe (tiktoken). -> Vocabulary"""
        name = "tokenizer.json" if "tokenizer.json" in self.files else "tokenizer.model"
        require(name in self.files, f"{self.path}: neither tokenizer.json nor tokenizer.model is there")
        read = read_tokenizer_json if name == "tokenizer.json" else read_tokenizer_model
        try:
            vocabulary = read(self.path / name, self.files[name])
            self.added, self.nfc = vocabulary.added, vocabulary.nfc
            self.specials = vocabulary.specials | vocabulary.added
            self.find_raw = any_of(vocabulary.raw)
            self.find_normalised = any_of(self.added.keys() - vocabulary.raw)
            named = [(special.encode(), id) for special, id in self.specials.items()]
            self.token_bytes = {id: token for token, id in [*vocabulary.ranks.items(), *named]}
            sound = all(
                type(id) is int and 0 <= id < 2**31 and token for id, token in self.token_bytes.items()
            )
            if len(self.token_bytes) < len(vocabulary.ranks) + len(named) or not sound:
                raise ValueError("expected tokens that are not empty, each with an id of its own from 0")
            self.vocab_size = max(self.token_bytes) + 1
            # A vocabulary may lack bytes (SmolLM2's does): these get ids without text, which encode()
            # notices.
            every_byte = {bytes([byte]): self.vocab_size + byte for byte in range(256)}
            self.bpe = tiktoken.Encoding(
                name,
                pat_str=vocabulary.pattern,
                mergeable_ranks=every_byte | vocabulary.ranks,
                special_tokens={},
            )
        except BadInput:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{self.path / name}: not laid out as expected: {error!r}") from error
        if name == "tokenizer.json":
            self.check_other_files()
        return vocabulary

    def check_other_files(self):
        """BadInput for what changes ids in transformers and is said beside tokenizer.json, not in it: tokens
        that are found in texts, the spaces that these take in, a space before every text."""
        config = self.token_settings()
        classes = ("GPT2", "Qwen2")  # those that follow the key
        spaced = config.get("add_prefix_space") and str(config.get("tokenizer_class")).startswith(classes)
        require(not spaced, f"{self.path}: add_prefix_space is true, which is not supported; expected false")
        by_id = config.get("added_tokens_decoder") or {}
        objects = [token for token in by_id.values() if isinstance(token, dict)]
        found = [token for token in objects if token_name(token) in self.added]
        added_tokens([{**token, "id": None, "special": False} for token in found], self.path)
        tokens = [*map(token_name, by_id.values()), *self.read_settings("added_tokens.json")]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = config.get(key) or []
            tokens += map(token_name, more.values() if isinstance(more, dict) else listed(more))
        # A pad_token or the like that no file adds is only missed where a text spells it; a word is common.
        named = [token_name(token) for key, token in config.items() if key.endswith("_token")]
        words = self.token_bytes.values()
        tokens += [
            name for name in named if isinstance(name, str) and name.encode("utf-8", "replace") in words
        ]
        unknown = [token for token in tokens if not isinstance(token, str) or token not in self.specials]
        require(
            not unknown,
            f"{self.path}: another file adds {str(unknown[:3])[:60]}, which tokenizer.json lacks or has as an"
            " ordinary word; write all files again:"
            " AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )

    def token_settings(self):
        """tokenizer_config.json, and where transformers reads it, special_tokens_map.json over it."""
        config = self.read_settings("tokenizer_config.json")
        if "added_tokens_decoder" in config:  # as in transformers: it is then the newer file
            return config
        return config | self.read_settings("special_tokens_map.json")

    def read_settings(self, name):
        """The JSON object in one of the directory's files; {} if the file is not there."""
        return read_json(self.path / name, self.files.get(name, "{}"))

    def stops(self, eos):
        """Ids that end a reply: eos_token_id of generation_config.json, else of config.json, else `eos`."""
        stops = self.read_settings("generation_config.json").get("eos_token_id")
        if stops is None:
            stops = self.read_settings("config.json").get("eos_token_id")
        if stops is None:  # without any settings these are Meta's files: its code stops at these two
            names = [eos] if eos else ["<|end_of_text|>", "<|eot_id|>"]
            stops = [self.special(name) for name in names]
        stops = listed(stops)
        known = stops and all(stop in self.specials.values() for stop in stops)
        require(known, f"{self.path}: eos_token_id {stops}: expected ids of special tokens")
        return stops

    @classmethod
    def load(cls, directory, chat="none", date=None, system=None):
        """The Tokenizer of a model directory; BadInput if a file cannot be read."""
        paths = [Path(directory, name) for name in FILES]
        try:
            files = {path.name: path.read_bytes() for path in paths if path.exists()}
        except OSError as error:
            raise BadInput(f"{error.filename}: {error.strerror}") from None
        return cls(files, directory, chat, date, system)

    def save(self, directory):
        """The files as they were read, without config.json, which is the model's.

        If they do not say what ends a reply (it may be config.json that does, or a template named by --chat),
        generation_config.json does so from here on, for transformers' generate and for load().
        """
        Path(directory).mkdir(parents=True, exist_ok=True)
        files = {name: raw for name, raw in self.files.items() if name != "config.json"}
        settings = self.read_settings("generation_config.json")
        if set(listed(settings.get("eos_token_id"))) != set(self.stop_ids):
            settings["eos_token_id"] = list(self.stop_ids)
            files["generation_config.json"] = json.dumps(settings, indent=1).encode()
        for name, raw in files.items():
            Path(directory, name).write_bytes(raw)

    def special(self, name):
        """The id of a special token."""
        known = isinstance(name, str) and name in self.specials
        require(known, f"{self.path}: the tokenizer has no special token {name!r} (chat {self.chat.name})")
        return self.specials[name]

    def encode(self, text):
        """Ids of ordinary text: no BOS; the spelling of a special token stays text. decode(encode(text)) ==
        text.

        Added tokens that are not special ("<think>") are found first, as in tokenizers: in the text as it is,
        then, in what is left, those that say so in the normalised text. No piece spans one.
        """
        ids = []
        for i, part in enumerate(self.find_raw.split(text)):
            if i % 2:  # odd places: what the pattern found
                ids.append(self.added[part])
                continue
            part = unicodedata.normalize("NFC", part) if self.nfc else part
            for j, piece in enumerate(self.find_normalised.split(part)):
                ids += [self.added[piece]] if j % 2 else self.encode_pieces(piece)
        return ids

    def encode_pieces(self, text):
        """Ids of normalised text without added tokens.

        Runs of more than LONGEST_RUN characters without a change between whitespace and other text are cut,
        because tiktoken overflows its stack on very long ones. Meta's llama3/tokenizer.py cuts them too,
        Hugging Face does not.
        """
        cuts = [0, len(text)]
        if len(text) > LONGEST_RUN:
            for run in re.finditer(r"\s+|\S+", text):
                cuts[-1:-1] = range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
        ids = []
        for start, end in zip(cuts, cuts[1:]):
            ids += self.encode_ordinary(text[start:end])
        if b"".join(self.token_bytes.get(id, b"") for id in ids) != text.encode("utf-8", "surrogatepass"):
            raise BadInput(f"the tokenizer has no ids for a character or lone surrogate in {text[:60]!r}")
        return ids

    def encode_ordinary(self, text):
        """tiktoken's encode_ordinary, with BadInput where its pattern gives up."""
        try:
            return self.bpe.encode_ordinary(text)
        except BaseException as error:  # a panic in Rust is no Exception, and its class cannot be imported
            if type(error).__name__ != "PanicException":
                raise
            raise BadInput(f"{self.path}: the tokenizer's pattern takes forever on {text[:60]!r}") from None

    def decode(self, ids):
        """The text of ids; bytes that are not UTF-8 and ids without a token become U+FFFD."""
        return b"".join(self.token_bytes.get(id, b"\xff") for id in ids).decode("utf-8", "replace")

    def ids_with(self, text):
        """Ids of all tokens whose text contains `text`, such as the ends of lines."""
        return [id for id, raw in self.token_bytes.items() if text.encode() in raw]

    def token_texts(self, ids):
        """decode() of each id on its own."""
        return [self.decode([id]) for id in ids]

    def messages(self, value, role):
        """[(role, content)] of a text, a message or a list of messages."""
        value = {"role": role, "content": value} if isinstance(value, str) else value
        value = [value] if isinstance(value, dict) else value
        require(
            is_conversation(value),
            f"expected text or a list of {{role, content}} messages, found {str(value)[:60]!r}",
        )
        return [(message["role"], message["content"]) for message in value]

    def encode_prompt(self, prompt):
        """Ids of a text or of messages in the chat template, up to the reply's header; at most one BOS."""
        messages = self.messages(prompt, "user")
        if self.chat.name == "none":
            if len(messages) > 1:
                raise BadInput(f"{len(messages)} messages need a chat template (--chat llama3 or chatml)")
            ids = self.encode(messages[0][1])
        else:
            self.check_template(messages)
            ids = []
            for is_special, text in self.chat.parts(messages):
                ids += [self.special(text)] if is_special else self.encode(text)
        return ids if self.bos_id is None else [self.bos_id, *ids]

    def check_template(self, messages):
        """BadInput if the directory's own template, recognised on a few messages, writes these otherwise."""
        if self.own is None or not self.strict:
            return
        try:
            agrees = self.own.agrees(self.own.chat, messages)
        except Exception as error:  # a template raises what it likes
            raise BadInput(f"the model's chat template refuses the messages: {error}") from None
        name = self.chat.name
        require(
            agrees,
            f"the model's own chat template is {name}, but writes these messages otherwise (without old"
            f" thoughts, or without an empty system message); --chat {name} writes them as they are",
        )

    def encode_response(self, response):
        """Ids of a reply (text or one message) and its stop token; they do not depend on the prompt."""
        messages = self.messages(response, "assistant")
        if len(messages) > 1:
            raise BadInput(f"expected one message as response, found {len(messages)}")
        return self.encode(self.chat.trimmed(messages[0][1])) + [self.stop_id]


def build_tokenizer(words):
    """A small tokenizer in Hugging Face's format: the 256 bytes, a token for each word, BOS and end of text.

    words       each one piece of BUILT_IN, such as "Tom", " Tom", " 3" or "####"; single bytes need no word
    A word is found as a whole (ignore_merges, as in Llama 3), so no tokens are spent on the steps towards it.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": tokenizer_spec(ranks, bos, eos),
        "tokenizer_config.json": config,
        "generation_config.json": {"eos_token_id": [len(ranks) + 1]},
    }
    files = {name: json.dumps(value, indent=1).encode() for name, value in files.items()}
    tokenizer = Tokenizer(files, "built-in")
    for word in words:
        if len(tokenizer.encode(word)) != 1:
            raise BadInput(f"word {word!r} is cut into several pieces and would never be a token")
    return tokenizer


def tokenizer_spec(ranks, bos, eos):
    """The content of a tokenizer.json with the ordinary tokens `ranks`, then bos and eos."""
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    split = {"type": "Split", "pattern": {"Regex": BUILT_IN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    merges = [pair for pair in (last_merge(token, ranks) for token in ranks) if pair]
    return {
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
            "merges": [list(map(spell, pair)) for pair in merges],
        },
    }
