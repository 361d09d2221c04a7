"""Golden ids by hand, and where the tokenizers library is installed, the same ids as it gives."""

import base64
import json
import random
import unicodedata

import pytest

from support.chats import Chat
from support.files import BadInput
from support.tokenizers import BYTE_TO_CHAR, LLAMA3, Tokenizer, build_tokenizer, last_merge

QWEN = LLAMA3.replace("{1,3}", "")
MERGES = ["l o", "lo w", "e r", "Ġ low", "Ċ Ċ", "1 2", "a a", "Ġ Ġ"]  # make the ids 256 to 263
SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
]  # the ids 264 to 270, in llama3 one more
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]
MESSAGES = [{"role": "system", "content": " low\n"}, {"role": "user", "content": "\nlower <|eot_id|> 12 "}]
WORDS = [
    "Tom",
    " Tom",
    " has",
    " apples",
    " buys",
    " How",
    " many",
    "####",
    *(f" {digit}" for digit in range(10)),
]
QUESTION = "Tom has 3 apples. Tom buys 4. How many?\n3+4=7\n#### 7"


def split(regex):
    steps = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return [steps, {**BYTE_LEVEL, "use_regex": False}]


def tokenizer_json(steps, merges=MERGES, words=(), bos=False, **changes):
    """A tokenizer.json whose id i < 256 is the byte i, so that golden ids can be read."""
    vocab = {char: byte for byte, char in BYTE_TO_CHAR.items()}
    for word in [*("".join(merge.split()) for merge in merges), *words]:
        vocab.setdefault(word, len(vocab))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = [{"SpecialToken": {"id": SPECIALS[0], "type_id": 0}}] if bos else []
    single, pair = (
        [*first, {"Sequence": {"id": "A", "type_id": 0}}],
        [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
    )
    known = {SPECIALS[0]: {"id": SPECIALS[0], "ids": [len(vocab)], "tokens": [SPECIALS[0]]}}
    spec = {
        "version": "1.0",
        "normalizer": None,
        "decoder": BYTE_LEVEL,
        "added_tokens": [{"id": len(vocab) + i, "content": name, **flags} for i, name in enumerate(SPECIALS)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": known,
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": list(merges)},
    }
    for path, value in changes.items():
        *parents, key = path.split("__")
        at = spec
        for parent in parents:
            at = at[parent]
        at[key] = value
    return spec


def load(directory, spec, chat="none", date=None, system=None, **settings):
    directory.mkdir(exist_ok=True)
    raw = spec if isinstance(spec, bytes) else json.dumps(spec).encode()
    directory.joinpath("tokenizer.json").write_bytes(raw)
    settings.setdefault("tokenizer_config", {"eos_token": "<|end_of_text|>"})
    for name, value in settings.items():
        directory.joinpath(name + ".json").write_text(json.dumps(value))
    return Tokenizer.load(directory, chat, date, system)


FORMS = {
    "gpt2": tokenizer_json([BYTE_LEVEL]),
    "smollm2": tokenizer_json(DIGITS),
    "llama3": tokenizer_json(split(LLAMA3), bos=True, words=["owl"], model__ignore_merges=True),
    "qwen": tokenizer_json(
        split(QWEN), normalizer={"type": "NFC"}, model__merges=[merge.split() for merge in MERGES]
    ),
}


@pytest.mark.parametrize(
    "form, text, ids",
    [
        ("gpt2", "low lower\n\n", [257, 259, 258, 260]),
        ("gpt2", "a 12", [97, 32, 261]),
        ("gpt2", "aaaaa", [262, 262, 97]),
        ("gpt2", "", []),
        ("gpt2", "\u00e9", [195, 169]),
        ("gpt2", "\n\n\nx", [260, 10, 120]),
        ("gpt2", "  low", [32, 259]),
        ("smollm2", "  low12", [32, 259, 49, 50]),
        ("smollm2", "  12", [263, 49, 50]),
        ("gpt2", "  12", [32, 32, 261]),
        ("llama3", "owl owls", [264, 32, 111, 119, 108, 115]),
        ("llama3", "1212", [261, 49, 50]),
        ("llama3", "x\n\ny", [120, 260, 121]),
        ("qwen", "1212", [49, 50, 49, 50]),
        ("qwen", "e\u0301", [195, 169]),
    ],
)
def test_golden_ids(tmp_path, form, text, ids):
    tokenizer = load(tmp_path, FORMS[form])
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def random_texts(n, seed=0):
    rng = random.Random(seed)
    parts = [
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "'s",
        "'LL",
        "'ſ",
        "1",
        "12",
        "٣",
        "Ⅷ",
        "½",
        "é",
        "e\u0301",
        "中",
        "한글",
        "\u3000",
        "\u00a0",
        "\u2028",
        "\u0085",
        "🙂",
        "low",
        " lower",
        "owl",
        "aaa",
        "####",
        "<<3+4=7>>",
        "<|eot_id|>",
        "\x00",
        "\xad",
        *WORDS,
    ]
    anything = lambda: chr(
        rng.choice([rng.randrange(128), rng.randrange(0x3000), rng.randrange(0xE000, 0x1F000)])
    )
    return [
        "".join(rng.choice(parts) if rng.random() < 0.9 else anything() for _ in range(rng.randint(1, 12)))
        for _ in range(n)
    ]


def assert_agrees(tokenizer, directory, texts):
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(directory / "tokenizer.json"))
    theirs.encode_special_tokens = True  # text that spells a special token stays text
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, ascii(text)
        assert tokenizer.encode_prompt(text) == theirs.encode(text).ids, ascii(text)
        assert tokenizer.decode(ids) == (unicodedata.normalize("NFC", text) if tokenizer.nfc else text)


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_tokenizers(tmp_path, form):
    assert_agrees(load(tmp_path, FORMS[form]), tmp_path, random_texts(2000))


@pytest.mark.parametrize("form", ["gpt2", "smollm2", "llama3", "qwen"])
def test_agrees_on_a_trained_vocabulary(tmp_path, form):
    hf = pytest.importorskip("tokenizers")
    sequence, byte_level = hf.pre_tokenizers.Sequence, hf.pre_tokenizers.ByteLevel
    regex = lambda pattern: hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated")
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = {
        "gpt2": byte_level(add_prefix_space=False),
        "smollm2": sequence(
            [hf.pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
        ),
        "llama3": sequence([regex(LLAMA3), byte_level(add_prefix_space=False, use_regex=False)]),
        "qwen": sequence([regex(QWEN), byte_level(add_prefix_space=False, use_regex=False)]),
    }[form]
    theirs.train_from_iterator(
        random_texts(2000, seed=1),
        hf.trainers.BpeTrainer(
            vocab_size=1500,
            show_progress=False,
            special_tokens=["<|end_of_text|>"],
            initial_alphabet=byte_level.alphabet(),
        ),
    )
    spec = json.loads(theirs.to_str())
    if form == "llama3":  # as Llama 3's file was made: every split of every token is a merge
        vocab = spec["model"]["vocab"]
        spec["model"] |= {
            "ignore_merges": True,
            "merges": [
                [word[:i], word[i:]]
                for word in sorted(vocab, key=vocab.get)
                if word != "<|end_of_text|>"
                for i in range(1, len(word))
                if word[:i] in vocab and word[i:] in vocab
            ],
        }
    assert_agrees(load(tmp_path, spec), tmp_path, random_texts(2000))


def test_whatever_is_accepted_agrees(tmp_path):
    """Random lists of merges: those that tiktoken cannot follow are refused, the others give the same ids."""
    rng, refused = random.Random(0), 0
    for _ in range(150):
        tokens, merges = ["a", "b", "Ġ"], []
        for _ in range(rng.randint(2, 9)):
            merges.append(f"{rng.choice(tokens)} {rng.choice(tokens)}")
            tokens.append(merges[-1].replace(" ", ""))
        if rng.random() < 0.3:
            rng.shuffle(merges)
        spec = tokenizer_json(split(r"[ab ]+|[^ab ]+"), merges, model__ignore_merges=rng.random() < 0.5)
        try:
            tokenizer = load(tmp_path, spec)
        except BadInput:
            refused += 1
            continue
        assert_agrees(
            tokenizer, tmp_path, ["".join(rng.choices("ab ", k=rng.randint(1, 12))) for _ in range(100)]
        )
    assert 10 < refused < 140


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"model__type": "WordPiece"}, "byte-level BPE"),
        ({"model__type": "Unigram"}, "byte-level BPE"),
        ({"model__byte_fallback": True}, "byte_fallback"),
        ({"model__end_of_word_suffix": "</w>"}, "suffix"),
        ({"model__vocab": {"▁the": 0}}, "▁"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"normalizer": {"type": "NFKC"}}, "normalizer"),
        ({"pre_tokenizer": None}, "pre_tokenizer"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, "laid out"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, "pre_tokenizer"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": split("(")}}, "arenthesis"),
        ({"model__merges": ["lo w", "l o", *MERGES[2:]]}, "order"),
        ({"model__merges": MERGES[:-1]}, "missing"),
        ({"model__merges": [*MERGES, "q q"]}, "vocabulary"),
        ({"model__vocab": 3}, "laid out"),
        ({"model__vocab": {"a": "0"}, "model__merges": []}, "id"),
        ({"model__vocab": {"a": 0, "b": 0}, "model__merges": []}, "id"),
        ({"model__merges": ["a"]}, "laid out"),
        ({"added_tokens": None}, "laid out"),
        ({"model": []}, "laid out"),
        ({"post_processor": 1}, "laid out"),
    ],
)
def test_refused(tmp_path, change, reason):
    spec = tokenizer_json([BYTE_LEVEL], **change)
    with pytest.raises(BadInput, match=reason) as caught:
        load(tmp_path, spec)
    assert str(tmp_path / "tokenizer.json") in str(caught.value) and "\n" not in str(caught.value)


def test_unreachable_words_need_ignore_merges(tmp_path):
    with pytest.raises(BadInput, match="owl"):
        load(tmp_path, tokenizer_json([BYTE_LEVEL], words=["owl"]))


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff\xfe", b'{"model": ', b"[" * 100000, b"{}", b"null"])
def test_broken_json(tmp_path, raw):
    with pytest.raises(BadInput, match="tokenizer.json: .*"):
        load(tmp_path, raw)


def test_damaged_files_raise_nothing_else(tmp_path):
    rng, whole = random.Random(0), build_tokenizer([" 3"]).files["tokenizer.json"]
    values = [None, 1, -1, 2**40, 0.5, True, "", "x", [], [1], {}, {"a": 1}]
    nodes = lambda at: [
        at,
        *(
            n
            for v in (at.values() if isinstance(at, dict) else at)
            if isinstance(v, (dict, list)) and v
            for n in nodes(v)
        ),
    ]
    for _ in range(300):
        spec = json.loads(whole)
        at = rng.choice(nodes(spec))
        at[rng.choice(list(at) if isinstance(at, dict) else range(len(at)))] = rng.choice(values)
        settings = {
            rng.choice(["eos_token", "bos_token", "add_bos_token"]): rng.choice(values),
            "eos_token_id": rng.choice(values),
        }
        try:
            load(tmp_path, spec, tokenizer_config=settings, generation_config=settings).encode_prompt(
                QUESTION
            )
        except BadInput as error:
            assert "\n" not in str(error)


def test_missing_directory(tmp_path):
    with pytest.raises(BadInput, match="nowhere: neither"):
        Tokenizer.load(tmp_path / "nowhere")


def test_meta_file_equals_hugging_face_file(tmp_path):
    ours = load(tmp_path / "hf", FORMS["llama3"])
    ranks = sorted((id, token) for id, token in ours.token_bytes.items() if id < 265)
    lines = [f"{base64.b64encode(token).decode()} {id}\n" for id, token in ranks]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    meta = Tokenizer.load(tmp_path, "llama3")
    assert all(meta.encode(text) == ours.encode(text) for text in random_texts(500))
    assert (meta.vocab_size, meta.bos_id, meta.stop_ids) == (
        265 + 256,
        265,
        (266, 274),
    )  # 128000, 128001 and 128009 less 127735
    assert meta.token_texts([264, 271, 272, 520]) == [
        "owl",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_250|>",
    ]
    for number, line in [(3, "!!! 2\n"), (3, "AA== x\n"), (3, "AA==\n")]:
        (tmp_path / "tokenizer.model").write_text("".join([*lines[: number - 1], line, *lines[number:]]))
        with pytest.raises(BadInput, match=r"tokenizer.model, line 3: expected 'base64 rank'"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_text("".join(lines[1:]))
    with pytest.raises(BadInput, match="ranks"):
        Tokenizer.load(tmp_path)


CUTTING = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
HEADER = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
REPLY = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
# Meta-Llama-3-8B-Instruct; the part of Llama-3.1-8B-Instruct without tools;
# Qwen2.5 without its default system message
TEMPLATES = {
    "llama3": "{% for m in messages %}{% set content = "
    + HEADER
    + " + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}" + REPLY,
    "date": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}{{ '<|start_header_id|>system<|end_header_id|>\n\n"
    + CUTTING
    + "' + system + '<|eot_id|>' }}{% for m in messages %}{{ "
    + HEADER
    + " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    + REPLY,
    "chatml": "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "messages",
    [
        [{**MESSAGES[0]}, {"role": "user", "content": "\nlower 12 "}],
        [{"role": "user", "content": "owl"}],
        [
            {"role": "user", "content": ""},
            {"role": "assistant", "content": " 12"},
            {"role": "user", "content": "a"},
        ],
    ],
)
def test_chat_template_agrees_with_jinja(tmp_path, name, messages):
    jinja2, hf = pytest.importorskip("jinja2"), pytest.importorskip("tokenizers")
    chat, date = ("llama3", "26 Jul 2024") if name == "date" else (name, None)
    tokenizer = load(tmp_path, FORMS["qwen" if chat == "chatml" else "llama3"], chat, date)
    text = jinja2.Template(TEMPLATES[name], keep_trailing_newline=True).render(
        messages=messages, bos_token="<|begin_of_text|>"
    )
    theirs = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode_prompt(messages) == theirs.encode(text, add_special_tokens=False).ids


SYSTEM_BLOCK = """{{- bos_token }}
{%- if not date_string is defined %}
    DATE
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
FIXED = '{%- set date_string = "26 Jul 2024" %}'
TODAY = """{%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}"""
OF_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
OF_SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# The templates of these models' directories, less what they do with tools: form, BOS, template, what it is.
OWN = {
    "Llama 3": (
        "llama3",
        "<|begin_of_text|>",
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        Chat("llama3"),
    ),
    "Llama 3.1": (
        "llama3",
        "<|begin_of_text|>",
        SYSTEM_BLOCK.replace("DATE", FIXED),
        Chat("llama3", "26 Jul 2024"),
    ),
    "Llama 3.2": (
        "llama3",
        "<|begin_of_text|>",
        SYSTEM_BLOCK.replace("DATE", TODAY),
        Chat("llama3", "26 Jul 2024"),
    ),
    "Qwen2.5": (
        "qwen",
        None,
        """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != "system" or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
        Chat("chatml", system=OF_QWEN, bos=False),
    ),
    "SmolLM2": (
        "smollm2",
        "<|im_start|>",
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face' }}"
        "{{ '<|im_end|>\n' }}"
        "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        Chat("chatml", system=OF_SMOL, bos=False),
    ),
}
CONVERSATIONS = [
    [{"role": "user", "content": " low\n"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "owl"}],
    [
        {"role": "user", "content": "low"},
        {"role": "assistant", "content": " 12 "},
        {"role": "user", "content": "lower\n"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "low"},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "lower"},
    ],
]


def own(directory, name, chat="auto", as_file=False, **more):
    """A directory with a model's own chat template, in tokenizer_config.json or beside it."""
    form, bos, template, _ = OWN[name]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>", "bos_token": bos}
    directory.mkdir(exist_ok=True)
    if as_file:
        (directory / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    return load(directory, FORMS[form], chat, tokenizer_config=config, **more)


@pytest.mark.parametrize("name", OWN)
def test_auto_is_the_directorys_own_template(tmp_path, name):
    """Golden texts; the ids of special tokens and texts are golden elsewhere."""
    *_, expected = OWN[name]
    tokenizer = own(tmp_path / "a", name)
    assert tokenizer.chat == expected
    again = own(tmp_path / "b", name, as_file=True)
    assert again.chat == expected and again.fingerprint == tokenizer.fingerprint
    assert own(tmp_path / "c", name, expected.name).fingerprint == tokenizer.fingerprint
    tokenizer.save(tmp_path / "d")
    assert Tokenizer.load(tmp_path / "d", "auto").fingerprint == tokenizer.fingerprint
    text = tokenizer.decode(tokenizer.encode_prompt(CONVERSATIONS[0]))
    assert (
        text
        == {
            "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nlow<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "Llama 3.1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            + CUTTING
            + "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nlow<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "Qwen2.5": f"<|im_start|>system\n{OF_QWEN}<|im_end|>\n<|im_start|>user\n low\n<|im_end|>\n"
            "<|im_start|>assistant\n",
            "SmolLM2": f"<|im_start|>system\n{OF_SMOL}<|im_end|>\n<|im_start|>user\n low\n<|im_end|>\n"
            "<|im_start|>assistant\n",
        }[name.replace("3.2", "3.1")]
    )


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_ids_are_those_of_transformers(tmp_path, name, as_file):
    transformers = pytest.importorskip("transformers")
    tokenizer = own(tmp_path, name, as_file=as_file)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        found = theirs.apply_chat_template(
            messages, add_generation_prompt=True, date_string="26 Jul 2024", return_dict=False
        )
        assert tokenizer.encode_prompt(messages) == found, (name, messages)
        brief = load(
            tmp_path,
            FORMS[OWN[name][0]],
            "auto",
            None,
            "Be brief.",
            tokenizer_config=json.loads((tmp_path / "tokenizer_config.json").read_text()),
        )
        asked = (
            messages
            if messages[0]["role"] == "system"
            else [{"role": "system", "content": "Be brief."}, *messages]
        )
        assert brief.encode_prompt(messages) == theirs.apply_chat_template(
            asked, add_generation_prompt=True, date_string="26 Jul 2024", return_dict=False
        )


def test_system(tmp_path):
    qwen = own(tmp_path, "Qwen2.5")
    brief = own(tmp_path, "Qwen2.5", system="Be brief.")
    none = own(tmp_path, "Qwen2.5", system="")
    row = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}]
    assert brief.encode_prompt("a") == qwen.encode_prompt(
        [{"role": "system", "content": "Be brief."}, row[1]]
    )
    assert none.encode_prompt("a") == brief.encode_prompt("a")[len(brief.encode("system\nBe brief.\n")) + 2 :]
    assert (
        brief.encode_prompt(row) == none.encode_prompt(row) == qwen.encode_prompt(row)
    )  # a row's own counts
    assert len({t.fingerprint for t in (qwen, brief, none)}) == 3
    dated = own(tmp_path / "3.1", "Llama 3.1", system=" Be brief.\n")
    assert (CUTTING + "Be brief.<|eot_id|>") in dated.decode(dated.encode_prompt("a"))
    plain = load(tmp_path / "plain", FORMS["llama3"], "llama3", system="Be brief.")
    assert "system<|end_header_id|>\n\nBe brief.<|eot_id|>" in plain.decode(plain.encode_prompt("a"))
    with pytest.raises(BadInput, match="--system needs a chat template"):
        load(tmp_path / "plain", FORMS["llama3"], "none", system="Be brief.")
    for chat in ("chatml", "none"):  # named, and not the directory's own: nothing of it is used
        assert own(tmp_path / "3.1", "Llama 3.1", chat).chat == Chat(chat)
    assert own(tmp_path / "3.1", "Llama 3.1", date="1 May 2025").chat.date == "1 May 2025"


def test_auto_without_a_template_is_none_and_an_unknown_one_is_refused(tmp_path):
    assert load(tmp_path, FORMS["llama3"], "auto").chat == Chat("none")
    unknown = [
        "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
        OWN["Qwen2.5"][2].replace("message.content", "message.content | trim"),  # not chatml to the letter
        OWN["Qwen2.5"][2].replace("assistant\n", "assistant\n<think>\n"),
        "{{ broken",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ]
    for template in unknown:
        config = {"eos_token": "<|end_of_text|>", "chat_template": template}
        with pytest.raises(BadInput, match="its own chat template is none of none, llama3, chatml") as error:
            load(tmp_path, FORMS["qwen"], "auto", tokenizer_config=config)
        assert "\n" not in str(error.value)
        assert load(tmp_path, FORMS["qwen"], "chatml", tokenizer_config=config).chat == Chat("chatml")
    only = [{"name": "tool_use", "template": OWN["Qwen2.5"][2]}]
    with pytest.raises(BadInput, match="its own chat template is none of"):
        load(tmp_path, FORMS["qwen"], "auto", tokenizer_config={"chat_template": only})
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": OWN["Qwen2.5"][2]}]
    config = {"eos_token": "<|end_of_text|>", "chat_template": several}
    assert load(tmp_path, FORMS["qwen"], "auto", tokenizer_config=config).chat.system == OF_QWEN
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="cannot be read"):
        load(tmp_path, FORMS["qwen"], "auto")


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + CONTENT + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = CHATML.replace("CONTENT", "message['content']")


def chatml(directory, template, chat="auto", **more):
    """A directory of the form qwen, whose tokenizer puts no BOS first, with a template."""
    config = {"eos_token": "<|im_end|>", "bos_token": "<|begin_of_text|>", "chat_template": template, **more}
    return load(directory, FORMS["qwen"], chat, tokenizer_config=config)


@pytest.mark.parametrize(
    "template",
    [
        PLAIN.replace("'<|im_end|>\n'", "eos_token + '\n'"),
        PLAIN.replace("{{'<|im_start|>'", "{%- generation -%}{{'<|im_start|>'").replace(
            "'}}", "'}}{%- endgeneration %}", 1
        ),
        "{% if not messages %}{{ raise_exception('none') }}{% endif %}" + PLAIN,
    ],
)
def test_other_spellings_of_a_template(tmp_path, template):
    assert chatml(tmp_path, template).chat == Chat("chatml", bos=False)


def test_a_template_may_write_the_bos_itself(tmp_path):
    """Of a tokenizer that puts none before a text."""
    tokenizer = chatml(tmp_path, "{{ bos_token }}" + PLAIN)
    assert tokenizer.encode_prompt("low") == [264, 269, *tokenizer.encode("user\nlow"), 270, 10, 269] + (
        tokenizer.encode("assistant\n")
    )
    assert tokenizer.encode_prompt("low")[1:] == chatml(tmp_path, PLAIN).encode_prompt("low")
    assert chatml(tmp_path, "{{ bos_token }}" + PLAIN, "none").bos_id is None


THOUGHT = [("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c")]
EMPTY = [("system", ""), ("user", "a")]
TWO = [("system", "a"), ("system", "b"), ("user", "c")]


@pytest.mark.parametrize(
    "template, messages, says",
    [
        (
            CHATML.replace("CONTENT", "message.content.split('</think>')[-1].lstrip('\n')"),
            THOUGHT,
            "otherwise",
        ),
        (
            PLAIN.replace("{{'<|", "{% if message.content %}{{'<|").replace("'}}", "'}}{% endif %}", 1),
            EMPTY,
            "oth",
        ),
        (PLAIN, TWO, None),
        (
            PLAIN.replace("{{'<|", "{% if message.role != 'system' or loop.first %}{{'<|").replace(
                "'}}", "'}}{% endif %}", 1
            ),
            TWO,
            "otherwise",
        ),
        (
            "{% if messages[2:] and messages[1].role == 'system' %}{{ raise_exception('twice') }}{% endif %}"
            + PLAIN,
            TWO,
            "refuses the messages: twice",
        ),
    ],
)
def test_messages_that_the_directorys_template_writes_otherwise(tmp_path, template, messages, says):
    """Qwen3's template, which drops old thoughts, is chatml on most conversations."""
    tokenizer = chatml(tmp_path, template)
    assert tokenizer.chat == Chat("chatml", bos=False) and tokenizer.encode_prompt("a")
    named = [{"role": role, "content": content} for role, content in messages]
    by_name = chatml(tmp_path, template, "chatml").encode_prompt(named)
    if says is None:
        assert tokenizer.encode_prompt(named) == by_name
        return
    with pytest.raises(BadInput, match=says):
        tokenizer.encode_prompt(named)
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    assert tokenizer.decode(by_name) == text + "<|im_start|>assistant\n"


def with_added(*tokens, form="qwen", **flags):
    """FORMS[form] with added tokens that are not special."""
    spec = json.loads(json.dumps(FORMS[form]))
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    first = max(token["id"] for token in spec["added_tokens"]) + 1
    spec["added_tokens"] += [{"id": first + i, "content": t, **usual, **flags} for i, t in enumerate(tokens)]
    return spec, first


@pytest.mark.parametrize("form", FORMS)
def test_added_tokens_that_are_not_special(tmp_path, form):
    """<think> of the R1-distilled models, <tool_call> of Qwen2.5: text that spells one becomes its id."""
    spec, first = with_added("<think>", "</think>", "<thinking>", "  ", form=form)
    tokenizer = load(tmp_path, spec)
    assert tokenizer.encode("a<think>low</think>") == [97, first, 257, first + 1]
    assert tokenizer.encode("<thinking><think") == [
        first + 2,
        *load(tmp_path / "x", FORMS[form]).encode("<think"),
    ]
    assert tokenizer.encode("<|eot_id|>") == load(tmp_path / "x", FORMS[form]).encode("<|eot_id|>")
    assert tokenizer.fingerprint != load(tmp_path / "x", FORMS[form]).fingerprint
    texts = random_texts(800)
    rng = random.Random(3)
    assert_agrees(
        tokenizer,
        tmp_path,
        [text + rng.choice(["<think>", "<thinking>", "</think>", "   "]) + text for text in texts],
    )
    assert tokenizer.vocab_size == first + 4


def test_added_tokens_before_and_after_normalisation(tmp_path):
    """tokenizers looks first for tokens that are not `normalized`, in the text as it is."""
    spec, first = with_added("<caf\u00e9>", "<th", "x><", normalized=True)
    spec["added_tokens"] += with_added("<t", "<the>")[0]["added_tokens"][-2:]
    for i, token in enumerate(spec["added_tokens"][-2:], first + 3):
        token["id"] = i
    tokenizer = load(tmp_path, spec)
    assert tokenizer.encode("<cafe\u0301>") == tokenizer.encode("<caf\u00e9>") == [first]
    assert tokenizer.encode("x><t") == [120, 62, first + 3]  # not [first + 2, ord("t")]
    assert tokenizer.encode("<th") == [first + 3, 104] and tokenizer.encode("<the>") == [first + 4]
    rng = random.Random(5)
    parts = [
        "<cafe\u0301>",
        "<caf\u00e9>",
        "<t",
        "<th",
        "<the>",
        "x><",
        "e\u0301",
        " low",
        ">",
        "<",
    ]
    texts = ["".join(rng.choice(parts) for _ in range(6)) for _ in range(500)]
    assert_agrees(tokenizer, tmp_path, texts)
    raw, _ = with_added("<caf\u00e9>", "<th", "x><")
    raw["added_tokens"] += spec["added_tokens"][-2:]
    assert load(tmp_path, raw).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("special", [True, False])
def test_tokens_that_only_another_file_adds_are_refused(tmp_path, special):
    """transformers adds them to the tokenizer and finds them in texts."""
    known = {"266": {"content": "<|end_of_text|>", "special": True}}
    config = {"eos_token": "<|end_of_text|>", "added_tokens_decoder": known}
    assert load(tmp_path, FORMS["llama3"], tokenizer_config=config).stop_id == 266
    config["added_tokens_decoder"] = {**known, "300": {"content": "<think>", "special": special}}
    for more in ({"tokenizer_config": config}, {"added_tokens": {"<think>": 300}}):
        directory = tmp_path / str(len(more["tokenizer_config"]) if "tokenizer_config" in more else 0)
        with pytest.raises(BadInput, match="adds ..<think>.., which tokenizer.json lacks"):
            load(directory, FORMS["llama3"], **more)
        spec, _ = with_added("<think>", form="llama3")
        load(directory, spec, **more)


def test_special_tokens_that_only_another_file_names(tmp_path):
    """transformers 5.24 cuts them out of texts: a word of the vocabulary, or one that no file adds."""
    plain = {"eos_token": "<|end_of_text|>"}
    known = {"added_tokens_decoder": {"266": {"content": "<|end_of_text|>", "special": True}}}
    refused = [
        {"additional_special_tokens": ["<|end_of_text|>", "low"]},
        {"extra_special_tokens": {"image": "low"}},
        {"extra_special_tokens": ["<x>"]},
        {"additional_special_tokens": [{"content": "<x>"}]},
        {"additional_special_tokens": 5},
        {"unk_token": "low"},
        {"pad_token": {"content": "low"}},
    ]
    for i, more in enumerate(refused):
        for j, settings in enumerate(
            (
                {"tokenizer_config": plain | more},
                {"tokenizer_config": plain | known | more},
                {"special_tokens_map": more},
            )
        ):
            with pytest.raises(
                BadInput, match="another file adds .*(low|<x>|5).*, which tokenizer.json lacks or"
            ):
                load(tmp_path / f"{i}{j}", FORMS["llama3"], **settings)
        older = {"tokenizer_config": plain | known, "special_tokens_map": more}  # not read beside a decoder
        load(tmp_path / f"{i}", FORMS["llama3"], **older)
    fine = {"unk_token": None, "pad_token": "<pad>", "add_bos_token": True, "extra_special_tokens": {}}
    more = {"additional_special_tokens": ["<|end_of_text|>", {"content": "<|begin_of_text|>"}]}
    load(tmp_path / "fine", FORMS["llama3"], tokenizer_config=plain | fine | more)


def test_a_first_token_with_other_ids_is_refused(tmp_path):
    """tokenizers writes the ids that the post_processor gives, whatever the token's own id is."""
    spec = FORMS["llama3"]
    (name,) = spec["post_processor"]["special_tokens"]
    (own,) = spec["post_processor"]["special_tokens"][name]["ids"]
    assert load(tmp_path, spec).bos_id == own
    for ids in ([5], [own, own], []):
        changed = {"post_processor__special_tokens": {name: {"id": name, "ids": ids, "tokens": [name]}}}
        spec = tokenizer_json(split(LLAMA3), bos=True, words=["owl"], model__ignore_merges=True, **changed)
        with pytest.raises(BadInput, match="post_processor writes .*begin_of_text.* as .*, but it is"):
            load(tmp_path, spec)


def test_special_tokens_map(tmp_path):
    """transformers goes by special_tokens_map.json, but not beside an added_tokens_decoder."""
    named = {"eos_token": {"content": "<|eot_id|>"}, "bos_token": "<|im_start|>"}
    config = {
        "eos_token": "<|end_of_text|>",
        "bos_token": "<|begin_of_text|>",
        "chat_template": "{{ bos_token }}" + PLAIN,
    }
    found = load(tmp_path, FORMS["gpt2"], "auto", tokenizer_config=config, special_tokens_map=named)
    assert (found.bos_id, found.stop_ids) == (269, (268, 270))
    alone = load(tmp_path, FORMS["gpt2"], tokenizer_config={}, special_tokens_map=named)
    assert (alone.bos_id, alone.stop_id, alone.stop_ids) == (None, 268, (268,))
    decoder = {"265": {"content": "<|end_of_text|>"}}
    newer = load(
        tmp_path,
        FORMS["gpt2"],
        "auto",
        tokenizer_config={**config, "added_tokens_decoder": decoder},
        special_tokens_map=named,
    )
    assert (newer.bos_id, newer.stop_ids) == (264, (265, 270))


@pytest.mark.parametrize("form", FORMS)
def test_what_transformers_reads_beside_a_tokenizer_json(tmp_path, form):
    """Tried with transformers 5.24: add_bos_token adds nothing; the other two change ids."""
    plain = {"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>", "add_prefix_space": False}
    alone = load(tmp_path, FORMS[form], tokenizer_config=plain)
    same = (
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True},
    )
    for more in same:
        found = load(tmp_path, FORMS[form], tokenizer_config=plain | more)
        assert (found.bos_id, found.fingerprint) == (alone.bos_id, alone.fingerprint)
    for name in ("GPT2Tokenizer", "Qwen2TokenizerFast"):
        with pytest.raises(BadInput, match="add_prefix_space is true, which is not supported"):
            spaced = {"tokenizer_class": name, "add_prefix_space": True}
            load(tmp_path, FORMS[form], tokenizer_config=plain | spaced)
    spec, first = with_added("<think>", form=form)
    token = spec["added_tokens"][-1]
    load(tmp_path, spec, tokenizer_config=plain | {"added_tokens_decoder": {str(first): token}})
    for flag in ("lstrip", "rstrip", "single_word"):
        decoder = {str(first): {"content": "<think>", "special": True, flag: True}}
        with pytest.raises(BadInput, match=f"added token '<think>' has .*{flag}"):
            load(tmp_path, spec, tokenizer_config=plain | {"added_tokens_decoder": decoder})


def test_odd_added_tokens_and_processors_are_refused(tmp_path):
    for flag in ("lstrip", "rstrip", "single_word"):
        with pytest.raises(BadInput, match=f"tokenizer.json: added token '<think>' has .*{flag}"):
            load(tmp_path, with_added("<think>", **{flag: True})[0])
        with pytest.raises(BadInput, match=f"tokenizer.json: added token '<end>' has .*{flag}"):
            load(tmp_path, with_added("<end>", special=True, **{flag: True})[0])
    text, eos = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}},
    )
    for single in ([text, eos], [eos, eos, text]):
        processor = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
        with pytest.raises(BadInput, match="post_processor is not supported"):
            load(tmp_path, tokenizer_json([BYTE_LEVEL], post_processor=processor))
    with pytest.raises(BadInput, match="post_processor is not supported"):
        load(tmp_path, tokenizer_json([BYTE_LEVEL], post_processor={"type": "BertProcessing"}))


def test_sequences_of_one_or_none(tmp_path):
    nothing = {"type": "Sequence", "normalizers": []}
    for normalizer in (nothing, {"type": "Sequence", "normalizers": [nothing, {"type": "NFC"}]}):
        spec = tokenizer_json([BYTE_LEVEL], normalizer=normalizer)
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [spec["pre_tokenizer"]]}
        spec["post_processor"] = {
            "type": "Sequence",
            "processors": [BYTE_LEVEL, spec["post_processor"]],
        }
        tokenizer = load(tmp_path, spec)
        assert tokenizer.nfc == ("NFC" in str(normalizer))
        assert_agrees(tokenizer, tmp_path, random_texts(300))
    spec = tokenizer_json(
        [BYTE_LEVEL], normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
    )
    with pytest.raises(BadInput, match="normalizer is not supported"):
        load(tmp_path, spec)


def test_last_merge():
    assert last_merge(b"aaa", {b"aa": 256, b"aaa": 257}) == (b"aa", b"a")  # the leftmost of equals first
    assert last_merge(b"abc", {b"ab": 257, b"bc": 256, b"abc": 258}) == (b"a", b"bc")
    assert last_merge(b"owl", {b"owl": 256}) is last_merge(b"o", {}) is None


def test_golden_chat(tmp_path):
    low, lower, spelled = [257], [257, 258], [*b"<|eot_id|>"]
    llama3 = load(tmp_path, FORMS["llama3"], "llama3")  # one more word, so specials start at 265
    assert llama3.encode_prompt(MESSAGES) == [
        265,
        267,
        *b"system",
        268,
        260,
        *low,
        269,
        267,
        *b"us",
        258,
        268,
        260,
        *lower,
        32,
        *b"<|eot_id|>",
        32,
        261,
        269,
        267,
        *b"assistant",
        268,
        260,
    ]
    assert (
        llama3.encode_response(" low ")
        == llama3.encode_response({"role": "assistant", "content": "low"})
        == [257, 269]
    )
    dated = load(tmp_path, FORMS["llama3"], "llama3", "26 Jul 2024")
    system = [*dated.encode("system"), 268, *dated.encode("\n\n" + CUTTING + "low"), 269]
    assert dated.encode_prompt(MESSAGES) == [265, 267, *system, *llama3.encode_prompt(MESSAGES)[12:]]
    assert dated.encode_prompt("a") == [
        265,
        267,
        *dated.encode("system"),
        268,
        *dated.encode("\n\n" + CUTTING),
        269,
        *llama3.encode_prompt("a")[1:],
    ]
    chatml = load(tmp_path, FORMS["qwen"], "chatml")
    assert chatml.encode_prompt("low") == [269, *b"us", 258, 10, *low, 270, 10, 269, *b"assistant", 10]
    assert chatml.encode_response(" low") == [259, 270] and chatml.bos_id is None
    none = load(tmp_path, FORMS["llama3"])
    assert none.encode_prompt("low") == none.encode_prompt([MESSAGES[0] | {"content": "low"}]) == [265, *low]
    assert none.encode_response("low") == [*low, 266]
    assert spelled == none.encode("<|eot_id|>") and none.token_texts([269, 195, 259, 9999]) == [
        "<|eot_id|>",
        "\ufffd",
        " low",
        "\ufffd",
    ]


def test_stop_ids(tmp_path):
    assert load(tmp_path, FORMS["llama3"]).stop_ids == (266,)
    assert load(tmp_path, FORMS["llama3"], config={"eos_token_id": 269}).stop_ids == (266, 269)
    assert load(tmp_path, FORMS["llama3"], generation_config={"eos_token_id": [270, 266]}).stop_ids == (
        266,
        270,
    )
    assert load(tmp_path, FORMS["llama3"], "llama3").stop_ids == (266, 269, 270)
    with pytest.raises(BadInput, match="special tokens"):
        load(tmp_path, FORMS["llama3"], generation_config={"eos_token_id": 2})


def test_what_ends_a_reply_is_saved(tmp_path):
    """A saved directory's config.json is the model's and names no tokens; transformers' default is id 2."""
    settings = {"temperature": 0.6}
    for more, chat, stops in (
        ({"config": {"eos_token_id": [269, 268]}}, "none", (266, 268, 269)),
        ({"config": {"eos_token_id": 268}, "generation_config": settings}, "none", (266, 268)),
        ({"generation_config": {**settings, "eos_token_id": 266}}, "chatml", (266, 271)),
        ({}, "none", (266,)),
    ):
        source = tmp_path / f"source{len(list(tmp_path.iterdir()))}"
        tokenizer = load(source, FORMS["llama3"], chat, **more)
        assert tokenizer.stop_ids == stops
        tokenizer.save(source.with_suffix(".saved"))
        assert Tokenizer.load(source.with_suffix(".saved"), chat).stop_ids == stops
        saved = json.loads((source.with_suffix(".saved") / "generation_config.json").read_text())
        assert saved == {**more.get("generation_config", {}), "eos_token_id": list(stops)}
    raw = b'{"eos_token_id":   266}'  # says so already: the file stays as it is
    (source / "generation_config.json").write_bytes(raw)
    Tokenizer.load(source).save(tmp_path / "same")
    assert (tmp_path / "same" / "generation_config.json").read_bytes() == raw


def test_bad_messages_and_flags(tmp_path):
    tokenizer = load(tmp_path, FORMS["gpt2"])
    for prompt in (
        [],
        [1],
        [{"role": "user"}],
        3,
        None,
        {"content": "a"},
        [{"role": "user", "content": None}],
    ):
        with pytest.raises(BadInput, match="messages"):
            tokenizer.encode_prompt(prompt)
    with pytest.raises(BadInput, match="chat template"):
        tokenizer.encode_prompt(MESSAGES)
    with pytest.raises(BadInput, match="one message"):
        tokenizer.encode_response(MESSAGES)
    for chat, date in (("alpaca", None), ("none", "26 Jul 2024"), ("chatml", "26 Jul 2024")):
        with pytest.raises(BadInput, match="expected chat"):
            load(tmp_path, FORMS["gpt2"], chat, date)
    for chat, name in (("llama3", "start_header"), ("chatml", "im_start")):
        with pytest.raises(BadInput, match=name):
            Tokenizer(build_tokenizer([]).files, "built", chat)


def test_bytes_that_the_vocabulary_lacks_are_reported(tmp_path):
    spec = tokenizer_json([BYTE_LEVEL])
    del spec["model"]["vocab"][BYTE_TO_CHAR[0]]
    tokenizer = load(tmp_path, spec)
    assert tokenizer.vocab_size == 271 and tokenizer.encode("low") == [257]
    for text in ("a\0b", "\ud800"):  # json.loads makes lone surrogates from "\ud800"
        with pytest.raises(BadInput, match="no ids"):
            tokenizer.encode(text)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "1", "\u4e2d", "a b", "a" * 24_999 + " "])
def test_a_million_characters(tmp_path, unit):
    for tokenizer in (load(tmp_path, FORMS["llama3"]), build_tokenizer(WORDS)):
        text = unit * (1_000_000 // len(unit))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_fingerprint(tmp_path):
    prints = [
        load(tmp_path, spec, chat).fingerprint
        for spec in FORMS.values()
        for chat in ("none", "llama3", "chatml")
    ]
    prints += [load(tmp_path, FORMS["llama3"], "llama3", "26 Jul 2024").fingerprint]
    prints += [load(tmp_path, tokenizer_json(split(QWEN))).fingerprint]  # without NFC
    assert len(set(prints)) == 14 and prints[0] == load(tmp_path, FORMS["gpt2"]).fingerprint
    renamed = json.loads(
        json.dumps(FORMS["llama3"]).replace("<|end_header_id|>", "<|eom_id|>")
    )  # no id of plain text, but one of the template's, depends on it
    assert load(tmp_path, renamed).fingerprint == load(tmp_path, FORMS["llama3"]).fingerprint


def test_built_in(tmp_path):
    tokenizer = build_tokenizer(WORDS)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.stop_ids) == (276, 274, (275,))
    assert "|".join(tokenizer.token_texts(tokenizer.encode(QUESTION))) == (
        "Tom| has| 3| apples|.| Tom| buys| 4|.| How| many|?|\n|3|+|4|=|7|\n|####| 7"
    )
    assert tokenizer.encode_prompt("Tom 3") == [274, 256, 267] and tokenizer.encode_response(" 3") == [
        267,
        275,
    ]
    assert tokenizer.decode(range(256)) == bytes(range(256)).decode("utf-8", "replace")
    for text in random_texts(1000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for word in ("Tom has", "33", "\n\n"):
        with pytest.raises(BadInput, match="pieces"):
            build_tokenizer([word])

    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint and again.files == tokenizer.files
    assert_agrees(again, tmp_path, [QUESTION, *random_texts(2000)])


def test_built_in_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = build_tokenizer(WORDS)
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [QUESTION, *random_texts(300)]:
        assert theirs(text)["input_ids"] == tokenizer.encode_prompt(text) or any(
            name in text for name in theirs.all_special_tokens
        )
        assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (
        tokenizer.bos_id,
        tokenizer.stop_id,
        tokenizer.vocab_size,
    )
