"""Rows to tensors, the built-in task, and the rules of the repository that can be read off its source."""

import ast
import collections
import doctest
import importlib
import itertools
import json
import math
import os
import random
import re
import statistics
from pathlib import Path

import made_checkpoints
import pytest
import torch

from data import (
    OPERATOR,
    Arith,
    Example,
    arith_rows,
    arith_solve,
    arith_tokenizer,
    batch_indices,
    collate,
    encode,
    encode_prompts,
    first_error,
    load_rows,
    rows_by_prompt,
    stable_hash,
)
from parallel import Grid
from support import loading, settings
from support.files import BadInput, read_jsonl
from support.graders import grade, gsm8k_label
from support.row_messages import last_text
from support.row_notes import used_keys
from support.tokenizers import Tokenizer

REPOSITORY = Path(__file__).parents[1]
FILES = ("train", "ppo", "reinforce", "qrm", "model", "parallel", "data")
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
real = pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K files are not here")


@pytest.fixture(scope="module")
def tokenizer():
    return arith_tokenizer()


@pytest.fixture
def file(tmp_path):
    """file(row, row, ...) -> path; a row is an object, or a line as it is"""

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        lines = [
            row
            if isinstance(row, bytes)
            else (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)).encode()
            for row in rows
        ]
        path.write_bytes(b"\n".join(lines))
        return path

    return write


# -------------------------------------------------------------------------------- JSON lines


def test_lines_end_at_newlines_only(file):
    rows = [
        {"prompt": "a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g", "response": "x"},
        {"prompt": "h", "response": "y\r"},
    ]
    found = load_rows(file(rows[0], "", "   ", rows[1], ""), ("prompt", "response"))
    assert [row["raw"] for row in found] == rows and [row["line"] for row in found] == [1, 4]
    assert found[0]["prompt"] == rows[0]["prompt"]
    assert [row for _, row in read_jsonl(file(b'{"a": 1}\r', b'{"a": 2}'))] == [
        {"a": 1},
        {"a": 2},
    ]  # a file from Windows


@pytest.mark.parametrize(
    "bad, says",
    [
        ('{"a": 1', "not valid JSON"),
        ("nonsense", "not valid JSON"),
        ('[\n{"a": 1}\n]', "the beginning of an array?; expected one object a line"),
        ('{"a": 1} {"a": 2}', "not valid JSON"),
        (b'{"a": "\xe9"}', "UTF-8"),
        ('"text"', "found str"),
        ("[]", "found list"),
        ("null", "found NoneType"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ('{"a": "\t"}', "not valid JSON"),
    ],
)
def test_lines_that_cannot_be_read(file, bad, says):
    path = file({"a": 1}, "", bad)
    with pytest.raises(BadInput) as error:
        list(read_jsonl(path))
    assert (
        str(error.value).startswith(f"{path}, line 3: ")
        and says in str(error.value)
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize(
    "key, names",
    [
        ("prompt", ("prompt", "instruction", "question", "problem")),
        ("response", ("response", "completion", "output", "answer", "solution")),
    ],
)
def test_accepted_keys(file, key, names):
    others = {"prompt": {"response": "r"}, "response": {"prompt": "p"}}[key]
    role = {"prompt": "user", "response": "assistant"}[key]
    for value in ("text", [{"role": role, "content": "text"}], "  \u2028 text "):
        for name in names:
            (row,) = load_rows(file({name: value, **others, "extra": {}}), ("prompt", "response"))
            assert row[key] == value
    for first, second in itertools.combinations(names, 2):
        assert load_rows(file({second: "a", first: "a", **others}), ("prompt", "response"))[0][key] == "a"
        both = file({second: "b", first: "a", **others})
        if second in (
            "solution",
            "answer",
        ):  # references beside a response; MATH-500 has both, and trains on solution
            expected = "b" if first == "answer" else "a"
            assert load_rows(both, ("prompt", "response"))[0][key] == expected
            continue
        with pytest.raises(BadInput, match=f"line 1: found both {first} and {second}"):
            load_rows(both, ("prompt", "response"))
        (row,) = load_rows(both, ("prompt", "response"), ignore_keys=(first,))
        assert row[key] == "b" and row["raw"] == {second: "b", first: "a", **others}
    with pytest.raises(BadInput, match="line 1: found keys .*, expected " + " or ".join(names)):
        load_rows(file({**others, "text": "x"}), ("prompt", "response"))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


PAIRS = ("prompt", "chosen", "rejected")
ONE = ("prompt", "response")
TURNS = [system("s"), user("q1"), assistant("a1"), user("q2")]
ALPACA = {"instruction": "Sort these.", "input": "9, 4", "output": "4, 9"}
ALPACA_TEXT = "Below.\n\n### Instruction:\nSort these.\n\n### Input:\n9, 4\n\n### Response:\n4, 9"
HH = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"
MATH = {"problem": "q", "level": "Level 5", "type": "Algebra", "solution": r"so $\boxed{\frac{1}{2}}$."}


@pytest.mark.parametrize(
    "needs, row, expected",
    [  # prompt, then the replies (and the label)
        (ONE, ALPACA, ["Sort these.\n\n9, 4", "4, 9"]),
        (ONE, {**ALPACA, "input": "", "text": "... Sort these.\n\n9, 4 ... 4, 9"}, ["Sort these.", "4, 9"]),
        (ONE, {**ALPACA, "text": ALPACA_TEXT}, ["Sort these.\n\n9, 4", "4, 9"]),
        (ONE, {**ALPACA, "input": None, "system": "s"}, [[system("s"), user("Sort these.")], "4, 9"]),
        *(
            (ONE, {**ALPACA, "input": input}, ["Sort these.", "4, 9"])
            for input in ("<noinput>", "<No Input>", "No input.", "None", "nan", "N/A\n", math.nan)
        ),
        (ONE, {**ALPACA, "input": "no input yet"}, ["Sort these.\n\nno input yet", "4, 9"]),
        (ONE, {"instruction": "q", "context": "c", "response": "r", "category": "open_qa"}, ["q\n\nc", "r"]),
        (ONE, {"messages": [*TURNS, assistant("a2")]}, [TURNS, [assistant("a2")]]),
        (ONE, {"prompt": "q2", "messages": [*TURNS, assistant("a2")]}, [TURNS, [assistant("a2")]]),
        (ONE, {"prompt": TURNS, "completion": [assistant("a2")]}, [TURNS, [assistant("a2")]]),
        (ONE, {"prompt": TURNS, "completion": [*TURNS, assistant("a2")]}, [TURNS, [assistant("a2")]]),
        (("prompt",), {"messages": TURNS}, [TURNS]),
        (("prompt",), {"messages": [user("q")]}, [[user("q")]]),
        (("prompt",), {"messages": [*TURNS, assistant("a2")], "system": "s"}, [TURNS]),
        (("prompt",), {"chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")]}, [TURNS]),
        (
            PAIRS,
            {"chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")]},
            [TURNS, [assistant("a")], [assistant("b")]],
        ),
        (  # a text prompt beside whole conversations, as in UltraFeedback
            PAIRS,
            {
                "prompt": "q2 ",
                "prompt_id": "5f",
                "chosen": [*TURNS, assistant("a")],
                "rejected": [*TURNS, assistant("b")],
                "messages": [*TURNS, assistant("a")],
                "score_chosen": 9.0,
                "score_rejected": 1.0,
            },
            [TURNS, [assistant("a")], [assistant("b")]],
        ),
        (PAIRS, {"messages": TURNS, "chosen": "a", "rejected": "b"}, [TURNS, "a", "b"]),
        (
            PAIRS,
            {"chosen": HH + " a", "rejected": HH + " b"},
            [TURNS[1:], [assistant("a")], [assistant("b")]],
        ),
        (
            PAIRS,
            {"chosen": "\n\nSystem: s" + HH + " a", "rejected": "\n\nSystem: s" + HH + " b"},
            [TURNS, [assistant("a")], [assistant("b")]],
        ),
        (  # null keys, as in a column that other messages have
            PAIRS,
            {
                "system": "s",
                "chosen": [{**TURNS[0], "name": None}, *TURNS[1:], assistant("a")],
                "rejected": [*TURNS, {**assistant("b"), "name": None}],
            },
            [TURNS, [assistant("a")], [assistant("b")]],
        ),
        (PAIRS, {"prompt": HH, "chosen": "a", "rejected": "b"}, [HH, "a", "b"]),
        (ONE, {"prompt": "q", "response": "r", "source": "Smith, A. (2020). A title."}, ["q", "r"]),
        (  # absent objects, as Hugging Face's datasets writes them
            ONE,
            {
                "messages": [
                    user("q"),
                    {**assistant("r"), "function_call": {"name": None, "arguments": None}},
                ],
                "extra": {"a": None, "b": [{"c": None}]},
                "tools": [None],
            },
            [[user("q")], [assistant("r")]],
        ),
        ((*ONE, "label"), MATH, ["q", MATH["solution"], r"\frac{1}{2}"]),
        ((*ONE, "label"), {**MATH, "answer": "0.5", "unique_id": "x"}, ["q", MATH["solution"], "0.5"]),
        (("prompt", "label"), {"prompt": "q", "response": "r", "label": "5", "solution": "z"}, ["q", "5"]),
        (("prompt", "label"), {"prompt": "q", "answer": r"so $\boxed{\frac{1}{2}}$."}, ["q", r"\frac{1}{2}"]),
        (("prompt", "label"), {"prompt": "q", "label": " 5\n"}, ["q", "5"]),
    ],
)
def test_shapes_of_public_data_sets(file, needs, row, expected):
    (found,) = load_rows(file(row), needs)
    assert [found[key] for key in needs] == expected
    assert found["raw"] == row or math.nan in row.values()


@pytest.mark.parametrize(
    "needs, row, says",
    [
        (ONE, {"prompt": "q", "response": [user("r")]}, "last message is the user's"),
        (ONE, {"messages": TURNS}, "expected"),
        (ONE, {"prompt": "q", "response": [*TURNS, assistant("r")]}, "does not contain the prompt"),
        (
            ONE,
            {"prompt": [user("q")], "response": [*TURNS, assistant("r")]},
            "other messages than the prompt",
        ),
        (ONE, {"prompt": "q", "response": "r", "messages": [user("q"), assistant("z")]}, "another reply"),
        (
            ONE,
            {"prompt": [user("q"), assistant("a")], "response": "r"},
            "ends with a message of the assistant",
        ),
        (
            ONE,
            {"prompt": "q", "response": "r", "history": [["a", "b"]]},
            "history is .*--ignore_keys history",
        ),
        (ONE, {"prompt": "q", "response": "r", "weight": 0.5}, "weight is 0.5"),
        (ONE, {"prompt": "q", "response": "r", "text": "other"}, "text is"),
        # keys that carry nothing, as long as they are short
        (
            ONE,
            {"prompt": "Summarise", "response": "r", "source": "a text " * 40},
            "source is .*--ignore_keys",
        ),
        (ONE, {"prompt": "q", "response": "r", "sources": ["one", "a text " * 40]}, "sources is"),
        (ONE, {"prompt": [user("q")], "input": "i", "response": "r"}, "input is"),
        (ONE, {"prompt": [system("t"), user("q")], "system": "s", "response": "r"}, "system differs"),
        (ONE, {"prompt": [{**user("q"), "name": "Ann"}], "response": "r"}, "name"),
        (ONE, {"prompt": [{"role": "tool", "content": "q"}], "response": "r"}, "role 'tool'"),
        (ONE, {"prompt": [user(" ")], "response": "r"}, "is empty"),
        (ONE, {"prompt": "q", "response": [assistant("")]}, "is empty"),
        (ONE, {"conversations": [{"from": "human", "value": "q"}]}, "rename to role/content"),
        (ONE, {"prompt": "", "instruction": None, "response": "r"}, "prompt is"),
        (
            PAIRS,
            {"chosen": [user("q"), assistant("a")], "rejected": [user("z"), assistant("b")]},
            "answer different messages",
        ),
        (
            PAIRS,
            {"chosen": [user("q"), assistant("a")], "rejected": [assistant("b")]},
            "answer different messages",
        ),
        (
            PAIRS,
            {"chosen": [user("q"), assistant("a"), user("x")], "rejected": [user("q"), assistant("b")]},
            "last message is the user's",
        ),
        (PAIRS, {"chosen": HH + " a", "rejected": HH.replace("q2", "q3") + " b"}, "different messages"),
        (PAIRS, {"chosen": HH + " a", "rejected": HH + " "}, "is empty"),
        (PAIRS, {"chosen": "The sky is blue", "rejected": "The sky is red"}, "common beginning as prompt"),
        (PAIRS, {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "2"}, 'margin is "2"'),
        (PAIRS, {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1e39}, "margin is 1e.39"),
        # a verdict on the response where another data set has the answer
        (ONE, {"prompt": "q", "completion": "bad", "label": False}, "label is false"),
        (ONE, {"prompt": "q", "completion": "good", "label": True}, "label is true"),
        (ONE, {"question": "q", "response": "r", "label": {"steps": []}}, "label is {.*verdict"),
        # what belongs to a prompt that the row does not state
        (ONE, {"context": "c", "messages": [user("q"), assistant("r")]}, "context is .*beside it"),
        (
            PAIRS,
            {"input": "i", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "input is .*beside it",
        ),
        (PAIRS, {"system": "s", "input": "q", "chosen": "a", "rejected": "b"}, "input is .*beside it"),
        (PAIRS, {"system": "s", "chosen": "a", "rejected": "b"}, "expected prompt"),
        (ONE, {"instruction": "q", "input": "i", "output": "r", "text": "q and r"}, "text is"),
        (("prompt", "label"), {"prompt": "q", "solution": "no box"}, "expected .boxed"),
        (("prompt", "label"), {"prompt": "q", "label": "x" * 501}, "expected a final answer"),
    ],
)
def test_what_would_be_lost_is_refused(file, needs, row, says):
    path = file({"prompt": "q", "response": "r", "chosen": "a", "rejected": "b", "label": "1"}, row)
    with pytest.raises(BadInput, match=f"line 2: .*{says}") as error:
        load_rows(path, needs)
    assert "\n" not in str(error.value)


ZH = "\u8fd9\u7bc7\u6587\u7ae0\u8bf4\u4e86\u4ec0\u4e48" * 40  # without a space
LONG = "The fox went to the park and met a dog. " * 10


@pytest.mark.parametrize("text", [LONG, LONG.replace(" ", "\n"), ZH, ZH[:100], "\u0434\u0430 " * 99])
@pytest.mark.parametrize(
    "hold",
    [
        lambda text: text,
        lambda text: {"passage": text},
        lambda text: [{"title": "t", "text": text}],
        lambda text: {"a": [{"b": ["c", {"d": text}]}]},
        lambda text: {text: 1},
    ],
)
def test_long_texts_below_harmless_keys(file, text, hold):
    """At any depth and in any script; not if the row says the same where it is read; a URL is none."""
    row = {"prompt": "Who is it about?", "response": "the fox"}
    for key in ("source", "metadata", "tags", "original_instruction"):
        holding = row | {key: hold(text)}
        with pytest.raises(BadInput, match=f"line 1: {key} is .*--ignore_keys {key}"):
            load_rows(file(holding), ONE)
        assert load_rows(file(holding), ONE, ignore_keys=(key,))
        assert load_rows(file(holding | {"input": f"Read this. {text}"}), ONE)
        for harmless in ("https://example.org/" + "a-long-path/" * 30, "0f" * 300, LONG[:190], ZH[:60]):
            assert load_rows(file(row | {key: hold(harmless)}), ONE)


def test_files_whose_texts_hold_more_than_their_keys_say(file):
    """All prompts rendered by a chat template, or all replies with the prompt before them; one row may."""
    fine = {"prompt": "What is 2+2?", "response": "4", "chosen": "4", "rejected": "5"}
    chatml = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    llama3 = "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
    for prompt in (chatml, llama3, "Be kind. " + chatml + "4"):
        rendered = fine | {"prompt": prompt}
        with pytest.raises(BadInput, match="line 1: .*a chat template was applied"):
            load_rows(file(rendered, rendered), ONE)
        assert len(load_rows(file(rendered, fine), ONE)) == 2
    repeated = {key: fine["prompt"] + " " + fine[key] for key in ("response", "chosen", "rejected")}
    for needs in (ONE, PAIRS):
        other = {"prompt": "q", "response": "r", "chosen": "a", "rejected": "b"}
        asked = {"prompt": [user(fine["prompt"] + "\n")]}
        for rows in ([repeated] * 2, [repeated, repeated, other], [repeated | asked] * 2):
            with pytest.raises(BadInput, match="line 1: . of . replies begin with their prompt"):
                load_rows(file(*(fine | row for row in rows)), needs)
        assert len(load_rows(file(fine | repeated, fine), needs)) == 2
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):  # it would be all that is learned
        one = fine | {side: repeated[side]}
        with pytest.raises(BadInput, match=f"line 1: 2 of 2 replies begin with their prompt.* in {side}"):
            load_rows(file(one, one), PAIRS)
        assert len(load_rows(file(one, fine | {other: repeated[other]}), PAIRS)) == 2


DIALOGUES = [
    "USER: PROMPT ASSISTANT: REPLY",
    "### Instruction:\nPROMPT\n\n### Response:\nREPLY",
    "Human: PROMPT\n\nAssistant: REPLY",  # HH-RLHF's, stripped
    "\r\n\r\nHuman: PROMPT\r\n\r\nAssistant: REPLY",
    "Assistant: REPLY",
    "REPLY\n\nHuman: and then?",
    "[INST] PROMPT [/INST] REPLY",
    "<|user|>\nPROMPT\n<|assistant|>\nREPLY",
    "Q: PROMPT\nA: REPLY",
    "A talk.\n\n**Question:** PROMPT\n\n**Answer:** REPLY",
    "\u95ee\uff1aPROMPT\n\u7b54\uff1aREPLY",
    "## Question\nPROMPT\n\n## Answer\nREPLY",
    "GPT4 Correct User: PROMPT<|end_of_turn|>GPT4 Correct Assistant: REPLY",
    "PROMPT REPLY",
    "REPLY</s>",
    "REPLY<|im_end|>",
]


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_dialogues_in_replies_of_every_kind(file, dialogue):
    """They would be trained on, or ranked, as answers. In half of the replies they can be chance."""
    prompt = "What is 0+2?"

    def rows_with(text_of_reply):
        text, other = [text_of_reply.replace("PROMPT", prompt).replace("REPLY", reply) for reply in "23"]
        return {
            ONE: {"prompt": prompt, "response": text},
            PAIRS: {"prompt": prompt, "chosen": text, "rejected": other},
            ("prompt", "responses"): {"prompt": prompt, "responses": [text, other], "labels": [1, 0]},
            ("prompt", "steps"): {"prompt": prompt, "completions": [text], "labels": [True]},
        }

    fine = rows_with("It is REPLY.\nThe user asked: what is it? See: REPLY > 1")
    for needs, row in rows_with(dialogue).items():
        with pytest.raises(BadInput, match="line 1: . of . replies (have turns|begin)"):
            load_rows(file(row, row, fine[needs]), needs)
        assert len(load_rows(file(row, fine[needs]), needs)) == 2


@pytest.mark.parametrize(
    "marker",
    ["<|endoftext|>", "</s>", "<|eot_id|>\n", "<\uff5cend\u2581of\uff5c>", "<eos>", "<pad><pad>", "[EOS]"],
)
def test_texts_with_spelled_special_tokens(file, marker):
    """TL;DR's completions end with <|endoftext|>, which would be read as 13 letters before the real token."""
    fine = {"prompt": "What is 2+2?", "response": "4", "chosen": "4", "rejected": "5"}
    closed = fine | {key: fine[key] + marker for key in ("response", "chosen", "rejected")}
    for needs in (ONE, PAIRS):
        for answer in (lambda text: text, lambda text: [assistant(text)]):
            rows = [
                {key: answer(row[key]) if key != "prompt" else row[key] for key in row}
                for row in (closed, fine)
            ]
            with pytest.raises(BadInput, match="line 1: .* replies begin or end with the spelling"):
                load_rows(file(rows[0], rows[1], rows[0]), needs)
            assert len(load_rows(file(*rows), needs)) == 2  # half of them: it can be what they are about
    opened = fine | {"prompt": marker.strip() + fine["prompt"]}
    for needs in (ONE, ("prompt",)):
        with pytest.raises(BadInput, match="line 1: 2 of 3 prompts begin or end with the spelling"):
            load_rows(file(opened, fine, opened), needs)
        ended = fine | {"prompt": fine["prompt"] + marker}
        with pytest.raises(BadInput, match="line 1: 2 of 3 prompts begin or end with the spelling"):
            load_rows(file(ended, ended, fine), needs)
    begun = fine | {"response": marker.strip() + "4"}
    with pytest.raises(BadInput, match="line 1: 2 of 3 replies begin or end with the spelling"):
        load_rows(file(begun, begun, fine), ONE)
    sampled = closed | {"tokenizer": "0f" * 32, "ids": [1], "chosen_ids": [1], "rejected_ids": [1]}
    assert len(load_rows(file(sampled, sampled), ONE)) == 2  # trained on as ids
    graded = {"response": closed["response"], "label": "4"}
    assert len(load_rows(file(graded), ("response", "label"))) == 1
    for text in ("a < s > b", "x </s> y", "<think>4</think>", "|>", "see <|x|>: 4"):
        assert len(load_rows(file(fine | {"response": text}), ONE)) == 1


@pytest.mark.parametrize(
    "write",
    [
        json.dumps,
        str,
        lambda messages: json.dumps({"messages": messages}),
        lambda messages: json.dumps(messages[-1]),
        lambda messages: str(dict(reversed(messages[-1].items()))),
        "array({}, dtype=object)".format,
    ],
)
def test_messages_written_as_text(file, write):
    """As pandas writes them to a CSV: JSON, or Python's own spelling; one message, or an object of them."""
    fine = {"prompt": "q", "response": "r", "chosen": "a", "rejected": "b"}
    for key, needs, says in (
        ("prompt", ONE, "prompts"),
        ("response", ONE, "replies"),
        ("chosen", PAIRS, None),
    ):
        row = fine | {key: write([user("q"), assistant("a")])}
        if says is None:
            row["rejected"] = write([user("q"), assistant("b")])
        with pytest.raises(
            BadInput, match=f"line 1: . of . {says or 'replies'} are messages written as text"
        ):
            load_rows(file(row, row), needs)
        assert len(load_rows(file(row, fine), needs)) == 2
    for text in ("[{1: 2}]", '{"role": "x"}', '[{"name": "get", "value": 1}]', '{"from": "EUR", "value": 2}'):
        assert len(load_rows(file(fine | {"response": text}), ONE)) == 1


@pytest.mark.parametrize(
    "good, bad",
    [
        (1, 0),
        (1.0, 0.0),
        ("1", "0"),
        (1, -1),
        ("True", "False"),
        ("chosen", "rejected"),
        ("+", "-"),
        (None, 0),
    ],
)
def test_labels_that_judge_the_response(file, good, bad):
    """KTO's rows, with other spellings of true and false. One row with label 0 can be an answer."""
    good, bad = ({"prompt": "q", "completion": "so it is", "label": label} for label in (good, bad))
    answers = good | {"label": 7}
    turns = [user("1 + 1?"), assistant("2")]
    for needs in (ONE, ("prompt",), ("prompt", "label"), ("response", "label")):
        with pytest.raises(BadInput, match="line [12]: label is .* in all rows.*--ignore_keys label"):
            load_rows(file(good, bad), needs, optional=() if "label" in needs else ("label",))
        assert load_rows(file(answers, bad), needs)
        named = [{**row, "label": None, "answer": row["label"]} for row in (answers, bad)]
        assert load_rows(file(*named), needs)  # as the message says
    assert len(load_rows(file(good, bad), ONE, ignore_keys=("label",))) == 2
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for row in (
        {"messages": turns},
        {"question": "q", "answer": "so it is"},
        pair,
    ):  # the second as in WikiQA
        with pytest.raises(BadInput, match="line 1: label is "):
            load_rows(file(row | {"label": good["label"]}, row | {"label": bad["label"]}), ("prompt",))
    for row in ({"prompt": "q"}, {"messages": turns[:1]}):
        assert load_rows(file(row | {"label": bad["label"]}), ("prompt", "label"))  # no reply to judge
    stated = [{"prompt": "q", "response": f"so #### {label}", "label": label} for label in ("1", "0")]
    for needs in (ONE, ("prompt", "label")):
        assert len(load_rows(file(*stated), needs)) == 2  # what stage pairs --best writes


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "q", "response": "", "answer": "18"}, 'response is ""'),
        ({"prompt": "q", "output": " \n", "solution": "18"}, "output is"),
        (
            {"prompt": "q", "completion": "", "messages": [{"role": "assistant", "content": "r"}]},
            "completion is",
        ),
        ({"problem": "q", "solution": "", "answer": "42"}, 'solution is ""'),
    ],
)
def test_an_empty_reply_is_not_replaced_by_another_key(file, row, says):
    """By the reference answer, an empty reply would be graded as right."""
    for needs in (ONE, ("response", "label")):
        with pytest.raises(BadInput, match=f"line 1: {says}"):
            load_rows(file(row), needs)
    absent = {key: value or None for key, value in row.items() if value != " \n"}
    assert len(load_rows(file(absent), ONE)) == 1  # null: a column that other rows have


REFERENCED = {"problem": "q", "solution": "long", "answer": "34"}


@pytest.mark.parametrize(
    "full, absent",
    [
        (REFERENCED, {"problem": "q", "solution": None, "answer": "35"}),
        (REFERENCED, {"problem": "q", "answer": "35"}),
        ({"prompt": "q", "response": "r", "answer": "34"}, {"prompt": "q", "response": None, "answer": "35"}),
        (
            {"prompt": "q", "messages": [user("q"), assistant("r")], "solution": "z"},
            {"prompt": "q", "solution": "z"},
        ),
    ],
)
def test_an_absent_reply_is_not_replaced_by_a_reference(file, full, absent):
    """What other rows have beside their replies is a reference."""
    for rows, line in (((full, absent), 2), ((absent, full), 1)):
        with pytest.raises(BadInput, match=f"line {line}: the reply is absent .* of line {3 - line};"):
            load_rows(file(*rows), ONE)
        assert len(load_rows(file(*rows), ("prompt",))) == 2
    assert len(load_rows(file(absent), ONE)) == 1  # a file of such replies
    solved = {"question": "q", "answer": "1 + 1 = 2\n#### 2"}
    assert len(load_rows(file(full, solved), ONE)) == 2  # GSM8K among MATH
    with pytest.raises(BadInput, match="line 2: the reply is absent .* of line 1"):
        load_rows(file({**solved, "response": "r"}, {**solved, "response": None}), ONE)
    joined = [{"prompt": "q", "output": x, "answer": y} for x, y in (("r", None), (None, "s"))]
    assert [row["response"] for row in load_rows(file(*joined), ONE)] == ["r", "s"]


@pytest.mark.parametrize("name", ["response", "completion", "output"])
def test_a_null_reply_is_not_graded_by_its_reference(file, name):
    """Where the model's output is null, GSM8K's own solution would be right."""
    row = {"question": "q", "answer": "1 + 1 = 2\n#### 2", name: None}
    for needs in (("response", "label"), (*ONE, "label")):
        with pytest.raises(BadInput, match=f"line 1: {name} is null; expected a text"):
            load_rows(file(row), needs)
        lines = []
        assert len(load_rows(file(row), needs, ignore_keys=(name,), log=lines.append)) == 1
        assert len(lines) == 1 and "1 rows have reply and label in one field (line 1)" in lines[0]


def test_notes_on_rows_that_are_used_against_what_they_say(file):
    row = {"prompt": "q", "response": "r", "chosen": "a", "rejected": "b"}
    for ours, other in (("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating")):
        rated = [row | {ours: x, other: y} for x, y in (("1", "9.0"), (2.5, 2.5), (9, 1), (3, None))]
        for needs, notes in (
            (PAIRS, ["1 rows rate the chosen reply below the rejected one, 1 rate"]),
            (ONE, []),
        ):
            lines = []
            assert len(load_rows(file(*rated), needs, log=lines.append)) == 4
            assert [note in line for note, line in zip(notes, lines, strict=True)] == [True] * len(notes)
    for key, verdicts, bad in (
        ("correct", (True, False, False), "false"),
        ("correct", (1, 0, 0), "0"),
        ("score", (1.0, 0.0, 0.0), "0"),
        ("reward", ("1", "-1", "-1"), "-1"),
        ("score", (4.5, 0, 0), None),
    ):
        graded = [row | {key: verdict, "label": "5"} for verdict in verdicts]
        for needs, n in ((ONE, bad is not None), (("response", "label"), 0)):
            lines = []
            load_rows(file(*graded), needs, log=lines.append)
            assert len(lines) == n and all(f"2 rows have {key} {bad}" in line for line in lines)


MARKS = [
    "TEXT</s>",
    "What is 2+2? TEXT",
    "[{'role': 'assistant', 'content': 'TEXT'}]",
    "Assistant: TEXT",
    "\r\n\r\nHuman: q\r\n\r\nAssistant: TEXT",
    "\nHuman: q\nAssistant: TEXT",
    "\n\nAssistant: TEXT",
]


@pytest.mark.parametrize("mark", MARKS)
def test_marks_on_one_side_of_the_pairs(file, mark):
    """Half of all replies, and all that a reward model would learn. A minority of each side is counted."""
    fine = {"prompt": "What is 2+2?", "chosen": "It is 4.", "rejected": "It is 5."}
    for side in PAIRS[1:]:
        marked = fine | {side: mark.replace("TEXT", fine[side])}
        with pytest.raises(BadInput, match=f"line 1: 3 of 5 replies .* in {side}"):
            load_rows(file(marked, marked, marked, fine, fine), PAIRS)
        lines = []
        assert len(load_rows(file(marked, marked, fine, fine), PAIRS, log=lines.append)) == 4
        assert any("note: 2 of 8 replies" in line and f"in {side}" in line for line in lines), lines
    lines = []
    load_rows(file(fine, fine | {"chosen": "Human: or </s> of it?"}), PAIRS, log=lines.append)
    assert len(lines) == 2 and "1 of 4 replies have turns" in lines[0]
    assert "1 rows have a special token as text ('</s>')" in lines[1]


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "prompt", "response": "Response"}, "the header of a table"),
        (
            {"prompt": "hi", "response": "hello", "messages": [user("hi"), assistant("hello"), user("more")]},
            "messages goes on after the prompt and its reply",
        ),
        ({"prompt": "Name it.", "input": "red", "response": "Name it. red Red."}, "begin with their prompt"),
        (
            {"prompt": "Name it.", "response": "Red.### Human: And?### Assistant: Woof."},
            "turns of a dialogue",
        ),
        ({"prompt": "Name it.", "response": "assistant\n\nRed."}, "turns of a dialogue"),
        (
            {"prompt": "1+1?", "chosen": "It is 2.", "rejected": "No.", "answer": "2"},
            "answer would be the reply",
        ),
    ],
)
def test_rows_that_were_made_wrong(file, row, says):
    with pytest.raises(BadInput, match=f"line 1: .*{says}"):
        load_rows(file(row, row), ONE)


def test_whole_answers_are_no_steps(file):
    row = {"prompt": "q", "completions": ["It is 5.\n#### 5", "It is 6.\n#### 6"], "labels": [True, False]}
    with pytest.raises(BadInput, match="several completions of a row state a result"):
        load_rows(file(row), ("prompt", "steps"))
    assert load_rows(file(row | {"completions": ["It is 5.", "#### 5"]}), ("prompt", "steps"))


def test_steps_that_say_their_labels(file):
    row = {"prompt": "q", "completions": ["3+4=7 +\n", "So it is 8 -"], "labels": [True, False]}
    with pytest.raises(BadInput, match="steps of most rows end in"):
        load_rows(file(row), ("prompt", "steps"))
    assert load_rows(file(row, row | {"completions": ["3+4=7", "It is 8"]}), ("prompt", "steps"))


def test_texts_that_say_that_there_is_none(file):
    """Whatever key or list they are in; a context of that kind is left out, and is no text that is used."""
    rows = [{"question": "q", "answer": "It is 5."}, {"question": "q2", "answer": "nan"}]
    talk = [{"messages": [user("q"), assistant("NA")]}]
    alpaca = [{"instruction": "q", "input": text, "output": "r"} for text in ("NULL", "No input needed", "x")]
    for given, note in (
        (rows, "1 rows have response 'nan'"),
        (talk, "1 rows have response 'NA'"),
        (alpaca, ""),
    ):
        lines = []
        found = load_rows(file(*given), ONE, log=lines.append)
        assert len(lines) == bool(note) and all(note in line for line in lines), lines
    assert [row["prompt"] for row in found] == ["q", "q", "q\n\nx"]
    labels = [{"prompt": "q", "answer": text} for text in ("#N/A", "NULL", "<NA>", "5")]
    assert len(load_rows(file(*labels), ("prompt", "label"), log=len)) == 1


def test_the_first_row_is_shown_as_the_model_reads_it(capsys):
    """Prompt, replies and label; long texts without their middle; the same once."""
    tokenizer = arith_tokenizer()
    prompt = tokenizer.encode_prompt("2+2?")
    reply, long = (tokenizer.encode_response(text) for text in ("four\nor 4", "x" * 200 + "y" * 200))
    for examples in ((Example(prompt, reply),), (Example(prompt, reply), Example(prompt, long)), prompt):
        for _ in range(2):
            loading.say_first(tokenizer, {"line": 7, "label": "4"}, examples, "a.jsonl", Grid())
        head, *lines = capsys.readouterr().out.splitlines()
        assert head == "a.jsonl: line 7 as the model reads it" and lines.pop() == "  label     4"
        assert lines.pop(0) == f"  prompt    {loading.printable(tokenizer.decode(prompt))}"
        if isinstance(examples, tuple):
            name = "response" if len(examples) == 1 else "chosen"
            assert lines.pop(0) == f"  {name:10}four↵or 4<|end_of_text|>"
        if lines:
            assert lines == ["  rejected  " + "x" * 200 + " ... " + "y" * 80 + "<|end_of_text|>"]


@pytest.mark.parametrize(
    "prompt, reply, chat, noted",
    [
        ("in May?", "Natalia", "none", True),
        ("in May?\n", "Natalia", "none", False),
        ("in May?", " Natalia", "none", False),
        ("in May?", "Natalia", "chatml", False),
    ],
)
def test_a_note_on_replies_glued_to_their_prompts(prompt, reply, chat, noted):
    files = {name: text.encode() for name, text in made_checkpoints.tokenizer_files().items()}
    rows = [{"prompt": prompt, "response": reply, "line": line} for line in (1, 2)]
    lines = []
    encode(rows, Tokenizer(files, "x", chat), 99, source="here", log=lines.append)
    rows = [{"prompt": [user(prompt)], "response": [assistant(reply)], "line": 1}]
    encode(rows, Tokenizer(files, "x", chat), 99, source="here", log=lines.append)
    assert len(lines) == 2 * noted and all("replies touch their prompts" in line for line in lines)


SAMPLED_PAIR = {"tokenizer": "0f" * 32, "chosen_ids": [1], "rejected_ids": [2]}


def test_what_was_read_from_which_keys(file):
    rows = [{"instruction": "q", "input": "i", "output": "r", "id": 1, "score": 2, "url": None}]
    rows.append({"instruction": "q2", "input": "", "output": "r", "id": 2})
    found = used_keys(load_rows(file(*rows), ONE))
    assert found == "prompt from instruction, input (in 1); response from output; not used: id, score (in 1)"
    sampled = {
        "prompt": "q",
        "chosen": "a",
        "rejected": "b",
        "tokenizer": "0f" * 32,
        "chosen_ids": [1],
        "margin": 1,
    }
    assert used_keys(load_rows(file(sampled), PAIRS)) == "prompt; chosen; rejected; margin"
    graded = {"question": "q", "answer": "so\n#### 5", "system": "s", "solution": None}
    found = used_keys(load_rows(file(graded), ("prompt", "label")))
    assert found == "prompt from question, system; label from answer"
    talk = {"messages": [user("q"), assistant("r")], "chosen": "a", "rejected": "b"}
    found = used_keys(load_rows(file(talk), ONE))
    assert found == "prompt and response from messages; not used: chosen, rejected"
    both = [user("q"), assistant("r")]
    pair = {"prompt": "q", "chosen": both, "rejected": [user("q"), assistant("s")], "messages": both}
    found = used_keys(load_rows(file(pair | {"score_chosen": 8.5}), ONE))
    assert found == "prompt; response from messages; not used: chosen, rejected, score_chosen"
    assert used_keys(load_rows(file(pair), PAIRS)) == "prompt; chosen; rejected; not used: messages"
    found = used_keys(load_rows(file({"messages": both, "system": "s"}), ("prompt",)))
    assert found == "prompt from messages, system"
    found = used_keys(
        load_rows(file({"prompt": [user("q")], "chosen": both, "rejected": pair["rejected"]}), PAIRS)
    )
    assert found == "prompt; chosen; rejected"
    longer = [user("a"), assistant("b"), *both]
    two = [user("a"), assistant("b"), user("q")]
    found = used_keys(
        load_rows(file({"prompt": two, "chosen": longer, "rejected": [*two, assistant("s")]}), PAIRS)
    )
    assert found == "prompt; chosen; rejected"
    ids = {"prompt": "q", "response": "r", "tokenizer": 5, "ids": "x"}
    assert used_keys(load_rows(file(ids), ONE)) == "prompt; response; not used: tokenizer, ids"


WORDS = (
    "right/wrong pass/fail yes/no win/lose accept/reject preferred/dispreferred better/worse"
    " positive/negative good/poor good/bad safe/unsafe T/F Pass/Fail won/lost"
)


@pytest.mark.parametrize("words", WORDS.split())
def test_verdicts_in_other_words(file, words):
    """As label they are refused beside a reply that is no such answer; elsewhere they are counted."""
    good, bad = ({"prompt": f"q{word}", "completion": "so it is", "mark": word} for word in words.split("/"))
    named = lambda row, key: {key if name == "mark" else name: value for name, value in row.items()}
    with pytest.raises(BadInput, match="line 1: label is .* in all rows"):
        load_rows(file(named(good, "label"), named(bad, "label")), ONE)
    answered = [named(row, "label") | {"completion": f"It is: {row['mark']}."} for row in (good, bad)]
    assert len(load_rows(file(*answered), (*ONE, "label"))) == 2
    for key in ("correct", "rewards", "ratings", "correctness", "type", "subset"):
        lines = []
        load_rows(file(named(good, key), named(bad, key)), ONE, log=lines.append)
        assert len(lines) == 1 and f"1 rows have {key} {words.split('/')[1].lower()};" in lines[0]


def rows_with(key, values):
    """Rows of different prompts, with different replies."""
    return [{"prompt": f"q{i}", "response": f"r{i}", key: value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    "rows, note",
    [
        (rows_with("rewards", [1, 0]), "1 rows have rewards 0"),
        (rows_with("ratings", [0.0, 1.0]), "1 rows have ratings 0"),
        (rows_with("rating", [0.0, 1.0, float("nan")]), "1 rows have rating 0"),
        (rows_with("correctness", [1, 0]), "1 rows have correctness 0"),
        (rows_with("subset", ["chosen", "rejected"]), "1 rows have subset rejected"),
        (rows_with("rating", ["superb", "awful"] * 2), "rows have rating awful or superb"),
        (rows_with("split", ["train", "test"] * 2), "rows have split test or train"),
        (rows_with("label", ["superb", "awful"] * 2), "4 rows have a label that their reply does not say"),
        (rows_with("label", [1, 2, 3] * 2), "6 rows have a label that their reply does not say (1, 2, 3)"),
        (rows_with("label", [f"r{i}" for i in range(4)]), None),  # the replies say it
        (rows_with("label", ["17", "18", "19", "20"]), None),  # the answers of wrong replies
        (rows_with("label", ["17"] * 4), None),
        (rows_with("split", ["train"] * 4), None),
        (rows_with("subset", ["math", "code"] * 2), None),
        (rows_with("turn", [0, 1] * 2), None),
        (rows_with("type", [0, 1] * 2), None),
        (rows_with("language", ["no"] * 4), None),
        (rows_with("score", [4.5, 0, 3]), None),
        (rows_with("helpfulness", [0, 1, 2, 3, 4]), None),
    ],
)
def test_notes_on_keys_that_sort_the_replies(file, rows, note):
    lines = []
    assert len(load_rows(file(*rows), ONE, log=lines.append)) == len(rows)
    assert len(lines) == (note is not None) and all(note in line for line in lines), lines
    lines = []
    load_rows(file(*rows), ("prompt",), log=lines.append)
    assert len(lines) == ("split" in rows[0] and note is not None)  # prompts have splits, too


def test_notes_on_lists_of_ratings_and_on_turned_pairs(file):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    turned = {"prompt": [user("q ")], "chosen": "b", "rejected": [assistant("a")]}
    other, same = pair | {"prompt": "z", "chosen": "b", "rejected": "a"}, pair | {"rejected": "a"}
    for rows, notes in (
        ([pair | {"scores": [1.0, 9.0], "ratings": [5, 5]}], ["1 rows rate .*, 1 rate both equal"]),
        ([pair | {"scores": [9.0, 1.0], "ratings": ["5", 1]}], []),
        ([pair | {"scores": [9.0, 10.0, 3], "ratings": ["x", None]}], []),
        ([pair | {"score_chosen": 10**400, "score_rejected": 1}], []),
        ([pair | {"score_chosen": 1, "score_rejected": 10**400}], ["1 rows rate the chosen"]),
        ([pair, turned, pair, same], ["3 rows prefer the reply that another row"]),
        ([pair, other, pair, same], []),
    ):
        lines = []
        assert len(load_rows(file(*rows), PAIRS, log=lines.append)) == len(rows)
        assert [bool(re.search(note, line)) for note, line in zip(notes, lines, strict=True)] == [True] * len(
            notes
        )


@pytest.mark.parametrize(
    "text, escaped",
    [
        (r"a\\nb", True),
        (r"So x = 2.\\n\\n#### 2", True),
        (r"q\\nline", True),
        (r"q\\nnext", True),
        (r"$a \\neq b$ and $\\nu \\notin A$", False),
        (r"ends with \\\\new", False),
        (r"a\nb, as in \\n", False),  # a text on line breaks
        (r"ab", False),
    ],
)
def test_a_note_on_files_that_were_escaped_twice(file, text, escaped):
    lines = []
    row = '{"prompt": "?", "response": "TEXT"}'.replace("TEXT", text)
    load_rows(file(row, row, row.replace(text, "r")), ONE, log=lines.append)
    assert len(lines) == escaped and all("2 rows have a backslash and n" in line for line in lines)
    lines = []
    load_rows(file(row, row.replace(text, "r\\nr")), ONE, log=lines.append)  # one of two, beside a line break
    assert len(lines) == escaped


@pytest.mark.parametrize(
    "text, note",
    [
        (r"say \"hi\" to me", "an escaped sign"),
        (r"\u6cd5\u56fd", "an escaped sign"),
        ("Whatâ€™s the cafÃ©?", "UTF-8 that was read as another"),
        ("What�s up?", "a sign that could not be read"),
        (
            "It&#39;s &quot;so&quot;",
            "HTML's spelling of a sign ('&#39;')",
        ),
        ("b'Paris is it.'", "1 of 1 texts of response are values of JSON or Python"),
        ('"Paris is it."', "1 of 1 texts of response are values of JSON or Python"),
        ("['Red, blue.', \"I don't know\"]", "texts of response are values of JSON or Python"),
        ("[{'type': 'text', 'text': 'Name it'}]", "texts of response are values of JSON or Python"),
        (" nan", "1 rows have response 'nan', which is used"),
        ("<No Output>", "1 rows have response '<No Output>', which is used"),
        (r"G\"odel and $\upsilon$", None),
        ("Ça va? Â la carte: É, 5 £, – €", None),
        ("R&D; [see] a 'b' {c} \"d\"", None),
        ("I am {{name}}.", "a place that was not filled in"),
        (r"It is $\\frac{1}{2}$", "LaTeX with two backslashes"),
        ("It is $frac{1}{2}$", "LaTeX without its backslash"),
        (r"$\frac{1}{2} \\ \dfrac{1}{2}$", None),
        ("one_x000D_", "a sign that could not be read"),
        ("one\r\ntwo", "a carriage return"),
        ("content='It is.' response_metadata={}", "texts of response are values of JSON or Python"),
        ("'Twas so, and so 'twill be", None),
        ("nano", None),
    ],
)
def test_notes_on_texts_that_a_tool_has_spelled(file, text, note):
    for rows in ([{"prompt": "?", "response": text}], [{"messages": [user("?"), assistant(text)]}]):
        lines = []
        load_rows(file(*rows), ONE, log=lines.append)
        if "messages" in rows[0] and note and "response" in note:
            continue  # a text of its own key
        assert len(lines) == (note is not None) and all(note in line for line in lines), lines


BOXES = r"It is $\boxed{60}$ SO $\boxed{75}$"


def test_notes_on_keys_that_join_rows_or_contradict_them(file):
    turns = [{"prompt": f"q{i}", "conversation_id": i // 2, "turn": i} for i in range(4)]
    pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    many = [(i, {"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"}) for i in range(12)]
    for rows, needs, note in (
        (turns, ("prompt",), "2 values of conversation_id have several prompts"),
        (turns[::2], ("prompt",), None),
        ([{"prompt": "q", "conversation_id": 1}] * 2, ("prompt",), None),  # sampled twice
        ([row | {"margin": i - 1.5} for i, row in enumerate(pairs)], PAIRS, "2 rows have a negative margin"),
        (
            [row | {"label": "tie" if i % 2 else "won"} for i, row in enumerate(pairs)],
            PAIRS,
            "label tie or won",
        ),
        ([row | {"correct": bool(i % 2)} for i, row in enumerate(pairs)], PAIRS, "correct false or true"),
        ([row | {"label": str(i)} for i, row in enumerate(pairs)], PAIRS, None),
        ([row | {"score_chosen": 1.2e-5, "score_rejected": 0.98} for row in pairs], PAIRS, "4 rows rate"),
        (
            [row | {"rejected": f"You are a helpful assistant. {i}"} for i, row in many],
            PAIRS,
            "12 rejected repl",
        ),
        (
            [row | {"chosen": f"{i}. I hope that this helps!"} for i, row in many],
            PAIRS,
            "12 chosen replies end",
        ),
        ([row for _, row in many], PAIRS, None),
        ([row | {"label": str(i % 5)} for i, row in many], PAIRS, None),  # answers
        ([row | {"rejected": f"\ufffd{i}"} | SAMPLED_PAIR for i, row in many], PAIRS, None),
        (
            [row | {"rejected": f"\ufffd{i}", "tokenizer": "gpt2"} for i, row in many],
            PAIRS,
            "12 rows have a sign",
        ),
        (
            [row | {"rejected": f"\ufffd{i}", "tokenizer": "0f" * 32} for i, row in many],
            PAIRS,
            "12 rows have a sign",
        ),
        ([{"prompt": f"So 5. #### {i}"} for i in (5, 6)], ("prompt",), "2 prompts have ####"),
        (
            [{"prompt": "q", "answer": i} for i in (5, 6)],
            ("prompt", "label"),
            "1 prompts have more than one la",
        ),
        ([{"prompt": "q", "answer": 5}] * 2, ("prompt", "label"), None),
        (
            [{"prompt": "q", "solution": BOXES.replace("SO", "so")}],
            ("prompt", "label"),
            "1 solutions have several",
        ),
        (
            [{"prompt": "q", "solution": BOXES.replace("SO", "and")}],
            ("prompt", "label"),
            "1 solutions have several boxes, and all of a list",
        ),
        ([{"prompt": "q ", "response": "q"}], ONE, "1 rows have a reply that is the prompt itself"),
        (
            [{"prompt": "q ", "response": "q"}, *[{"prompt": f"q{i}", "response": "r"} for i in range(9)]],
            ONE,
            "1 rows have a reply that is the prompt itself",
        ),
        ([{"prompt": "q", "response": 'He said ""go"".'}], ONE, "1 rows have quotation marks twice"),
        ([{"prompt": "q", "response": 'x = """go"""\ny = ""'}], ONE, None),
        (
            [{"messages": [user("q"), assistant("It is.  Human: so?"), user("z")]}],
            ("prompt",),
            "1 messages of prompts",
        ),
        (
            [
                {"prompt": "q", "response": "r\n##\n18. Instruction: Name it"},
                {"prompt": "q", "response": "r"},
            ],
            ONE,
            "1 of 2 replies have turns of a dialogue in them",
        ),
        (
            [{"prompt": "q", "response": "It is.\n\nHuman"}, {"prompt": "q", "response": "Human"}],
            ONE,
            "1 of 2 replies have turns of a dialogue in them",
        ),
        (
            [{"prompt": "q", "response": "So it is.  Human : Why?"}, {"prompt": "q", "response": "r"}],
            ONE,
            "1 of 2 replies have turns of a dialogue in them",
        ),
        (
            [row | {"rejected": " b"} for row in pairs],
            PAIRS,
            "4 rejected replies begin with a blank, and few",
        ),
        ([row | {"chosen": "a\n"} for row in pairs], PAIRS, "4 chosen replies end with a blank, and few"),
        ([row | {"chosen": " a", "rejected": " b"} for row in pairs], PAIRS, None),
        (
            [{"messages": [user("q"), assistant("Human: so? Yes."), user("z")]}],
            ("prompt",),
            "1 messages of pr",
        ),
    ):
        lines = []
        load_rows(file(*rows), needs, log=lines.append)
        assert len(lines) == (note is not None) and all(note in line for line in lines), lines


def test_lists_in_hundreds_of_others(file):
    for depth in (1, 100, 600, 900):
        nested = "[" * depth + '"x"' + "]" * depth
        path = file('{"prompt": "q", "response": "r", "metadata": NESTED}'.replace("NESTED", nested))
        if depth > 100:
            with pytest.raises(BadInput, match="line 1: lists or objects in hundreds of others") as error:
                load_rows(path, ONE)
            assert "\n" not in str(error.value)
        else:
            assert load_rows(path, ONE)


@pytest.mark.parametrize("key", ["response", "completion", "output", "answer", "solution", "chosen"])
def test_a_prompt_is_the_same_whether_or_not_the_reply_is_wanted(file, key):
    """A prompt beside a conversation that goes on from it: a policy is asked what sft learns from."""
    turns = [user("first"), assistant("ok"), user("second")]
    row = {"prompt": "second", key: [*turns, assistant("y")]}
    for needs in (("prompt",), ONE) if key != "chosen" else (("prompt",),):
        assert load_rows(file(row), needs)[0]["prompt"] == turns
    with pytest.raises(BadInput, match="does not contain the prompt"):
        load_rows(file(row | {"prompt": "other"}), ("prompt",))
    for harmless in ("y", [assistant("y")], ["y", "z"], 5):
        assert load_rows(file({"prompt": "second", key: harmless}), ("prompt",))[0]["prompt"] == "second"


LEFT_OUT = "A cat sat on the mat, and a dog, who had seen it there on the day before, came and sat down. " * 3


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "TL;DR:", "text": f"{LEFT_OUT}\n\nTL;DR:", "chosen": "a", "rejected": "b"},
        {"prompt": "TL;DR:", "text": "POST\n\nTL;DR:", "chosen": "a", "rejected": "b"},
        {"question": "What now?", "text": "POST. I call. What now? I do not know.", "answer": "call"},
        {"question": "What now?", "text": f"{LEFT_OUT}\nWhat now?\ncall", "answer": "call"},
        {**ALPACA, "text": f"{LEFT_OUT}{ALPACA_TEXT}"},
        {**ALPACA, "text": ALPACA_TEXT + ", 16"},
    ],
)
def test_texts_that_say_more_than_their_row(file, row):
    with pytest.raises(BadInput, match="line 1: text is .*--ignore_keys text"):
        load_rows(file(row), ("prompt",))
    assert load_rows(file(row), ("prompt",), ignore_keys=("text",))


ALPACA_HEAD = (
    "Below is an instruction that describes a task, paired with an input that provides further context."
    " Write a response that appropriately completes the request.\n\n"
)


@pytest.mark.parametrize("reply", ["4, 9", "a long reply " * 50, "Response"])
def test_alpacas_rendering_is_no_news(file, reply):
    row = ALPACA | {"output": reply, "text": ALPACA_HEAD + ALPACA_TEXT[8:].replace("4, 9", reply)}
    assert load_rows(file(row), ONE)[0]["response"] == reply


def tasks_of(key, one=False):
    """Rows whose prompt, of two or of one, says nothing without another key."""
    prompts = ["Add", "Add", "Sum up", "Sum up"]
    return [{"prompt": prompts[i * (not one)], key: f"{i}+4", "response": f"{i + 4}"} for i in range(4)]


def test_a_note_on_keys_that_may_belong_to_the_prompt(file):
    """Translate to: French, and German; but not where a prompt has several samples."""
    rows = [{"prompt": "Translate", "response": "r", "language": language} for language in ("de", "fr", "de")]
    samples = [
        {"prompt": f"{i % 2}", "response": f"r{i}", "language": "de", "model": f"m{i}", "id": f"{i}"}
        for i in range(4)
    ]
    for given, notes in (
        (rows, ["3 rows have the prompt of another row, but not its language"]),
        (samples, []),
        ([row | {"prompt": "Go on", "score": i} for i, row in enumerate(samples)], ["not its id;"]),
        (tasks_of("task"), ["4 rows have the prompt of another row, but not its task"]),
        (tasks_of("difficulty"), ["but not its difficulty"]),
        (tasks_of("original_instruction"), ["but not its original_instruction"]),
        (tasks_of("index", one=True), ["but not its index"]),
        (tasks_of("date", one=True), ["but not its date"]),
        (tasks_of("dataset", one=True), ["but not its dataset"]),
    ):
        lines = []
        assert len(load_rows(file(*given), ONE, log=lines.append)) == len(given)
        assert [note in line for note, line in zip(notes, lines, strict=True)] == [True] * len(notes)


LATEX = (
    r"\boxed{5} \beta \begin{pmatrix} \bar{x} \frac{1}{2} \frac12 \forall \fbox{5} \text{east} \times \theta"
    r" \tfrac12 \right) \rangle \bmod \bullet \bigl( \bf{x} \flat \beta_1 \theta2 \triangle \textbf{a}"
    r" \rho_0 \rfloor \rm{d}"
)


@pytest.mark.parametrize("command", LATEX.split())
def test_latex_whose_backslashes_were_not_doubled(file, command):
    """JSON reads "\\frac" as a form feed and "rac"."""
    line = '{"prompt": "q", "response": "so RESPONSE", "metadata": ["METADATA"]}'
    for name in ("RESPONSE", "METADATA"):
        with pytest.raises(BadInput, match=r"line 1: a text has \\\w+ with one backslash"):
            load_rows(file(line.replace(name, command)), ONE)
    (row,) = load_rows(file(line.replace("RESPONSE", "\\" + command)), ONE)
    assert row["response"] == f"so {command}"
    assert load_rows(file(line.replace("METADATA", command)), ONE, ignore_keys=("metadata",))


BETWEEN_DOLLARS = (
    r"\nabla f|x\neq3|x \neq y|\tan^2 x|\tau|x\to0|A \to B|\top|2x\notin{A}|x \ne 3|speed \nu "
    r"|7 \bmod 3|{\bf x}|\rm d|x \neq 0, y \neq 1|\tan x + \tan y|5 \nmid 7|x\to 0, y\to 1|\text {a}"
    r"|\bigcup A|\rightarrow|\rVert"
)


@pytest.mark.parametrize("math", BETWEEN_DOLLARS.split("|"))
def test_latex_between_dollars_whose_backslashes_were_not_doubled(file, math):
    line = '{"problem": "Let $y$ be $MATH$\\nand so on", "answer": "1"}'
    with pytest.raises(BadInput, match=r"line 1: a text has \\\w+ with one backslash"):
        load_rows(file(line.replace("MATH", math)), ONE)
    (row,) = load_rows(file(line.replace("MATH", math.replace("\\", "\\\\"))), ONE)
    assert row["prompt"] == f"Let $y$ be ${math}$\nand so on"


NO_LATEX = [
    "a\tfraction\r\night",
    "\x0craces",
    "\t text",
    "C:\\beta",
    "N\x08NA\x08A",
    "i\x08if\x08f _\x08m x",
    "costs $5\tan apple\t$6",
    "We pay $5 each\ne $6",
    "$$\nu = 3\n$$",
    "where $v$ and\nu and\neq 3 are $w$",
    "x = symbols('x')\neq = Eq(x, 2)",
    "\tan item\n\top\n\tau\n\to\nabla\n",
    "\r\nho\r\nm\r\n",
]


@pytest.mark.parametrize("text", NO_LATEX)
def test_control_characters_that_are_no_latex(file, text):
    assert load_rows(file({"prompt": text, "response": text}), ONE)[0]["prompt"] == text


def test_transcripts_as_prompts_need_messages_under_a_template(file, tmp_path):
    """Dahoas/full-hh-rlhf has the dialogue as the text of its prompt."""
    source = file({"prompt": HH, "response": "r"}, {"prompt": HH, "response": "s"})
    rows = load_rows(source, ONE)
    files = made_checkpoints.tokenizer_files()
    files = {name: text.encode() for name, text in files.items()}
    for use in (
        lambda chat: encode(rows, Tokenizer(files, "x", chat), 999, source=source),
        lambda chat: encode_prompts(rows, Tokenizer(files, "x", chat), source),
    ):
        assert use("none")
        with pytest.raises(BadInput, match="transcripts .* --chat chatml would make one message of each"):
            use("chatml")
    whole = file({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"})
    headed = load_rows(whole, PAIRS)
    assert len(encode(headed, Tokenizer(files, "x", "chatml"), 999, PAIRS[1:], whole)[0]) == 1
    with pytest.raises(BadInput, match="line 1: a transcript .* which --chat none cannot write"):
        encode(headed, Tokenizer(files, "x", "none"), 999, PAIRS[1:], whole)
    rows[0]["prompt"] = "q"
    assert len(encode_prompts(rows, Tokenizer(files, "x", "chatml"), source)) == 2


@pytest.mark.parametrize(
    "prompt",
    [
        "q1<extra_id_1>Assistant\na1<extra_id_1>User\nq2",  # HelpSteer2
        "Be kind.\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2",
        "A chat. USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT:",  # Vicuna
        "### Human: q1\n### Assistant:",
        "Below.\n\n### Instruction:\nq1\n\n### Response:\n",  # Alpaca
        "q1 [/INST] a1 </s><s>[INST] q2",
        "q1<|im_end|>\n<|im_start|>assistant\na1",
        "q1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na1",
        "q1<end_of_turn>\n<start_of_turn>model\n",
        "q1<|assistant|>\na1",
        "q1<\uff5cAssistant\uff5c>a1",
        "Human: q1",
        "\n\nHuman: q1",
        "User: q1\nBot: a1\nUser: q2",
        "q1\nAI:",
    ],
)
def test_turns_inside_a_prompt(file, prompt):
    """More than a twentieth of the prompts; where a template is applied; messages are taken as they are."""
    files = {name: text.encode() for name, text in made_checkpoints.tokenizer_files().items()}
    chatml = Tokenizer(files, "x", "chatml")
    fine = [{"prompt": f"What does an assistant say of {i}?", "line": i} for i in range(3, 41)]
    marked = [{"prompt": prompt, "line": 1}, {"prompt": prompt, "line": 2}]
    for rows, line in (([*fine[:20], *marked], 1), (marked[1:], 2)):
        with pytest.raises(BadInput, match=f"here, line {line}: {len(rows[20:]) or 1} of .* are transcripts"):
            encode_prompts(rows, chatml, "here")
        assert len(encode_prompts(rows, Tokenizer(files, "x", "none"), "here")) == len(rows)
    with_system = [{"role": "system", "content": "Be kind."}, user(prompt)]
    spoken = [row | {"prompt": with_system, "fields": {"prompt": prompt}} for row in marked]
    with pytest.raises(BadInput, match="line 1: 2 of 2 prompts are transcripts"):
        encode_prompts(spoken, chatml, "here")
    asked = [{"prompt": [user(prompt)], "line": i} for i in (1, 2)]
    for rows, n in (([*fine, *marked], 2), ([fine[0], marked[0]], 1), (asked, 0)):
        lines = []
        assert len(encode_prompts(rows, chatml, "here", lines.append)) == len(rows)
        assert len(lines) == bool(n) and all(f"here: note: {n} prompts have turns" in line for line in lines)


def test_ignored_keys(file):
    row = {"prompt": "q", "response": "r", "history": [["a", "b"]], "weight": 0.5}
    (found,) = load_rows(file(row), ONE, ignore_keys=("history", "weight"))
    assert (found["prompt"], found["response"], found["raw"]) == ("q", "r", row)
    with pytest.raises(BadInput, match="weight"):
        load_rows(file(row), ONE, ignore_keys=("history",))
    with pytest.raises(BadInput, match="found keys"):
        load_rows(file(row), ONE, ignore_keys=("prompt", "history", "weight"))


def test_a_key_that_is_there_twice(file):
    for line in ('{"prompt": "a", "prompt": "b"}', '{"m": [{"x": 1, "x": 2}]}'):
        with pytest.raises(BadInput, match="line 1: the key '[a-z]+' is there twice"):
            list(read_jsonl(file(line)))


def test_one_prompt_has_one_label(tokenizer):
    row = lambda line, prompt, label: {"line": line, "prompt": prompt, "label": label}
    rows = [row(1, "Tom", "3"), row(2, "Ann", "4"), row(5, "Tom", "3")]
    found = rows_by_prompt(rows, tokenizer, "here.jsonl")
    assert found == {tuple(tokenizer.encode_prompt(r["prompt"])): r for r in rows[:2]}
    assert rows_by_prompt([*rows, row(7, "Tom", "3.0")], tokenizer, "here.jsonl") == found  # the same number
    with pytest.raises(
        BadInput, match="here.jsonl, line 6: label '4', but the same prompt has '3' on line 1"
    ):
        rows_by_prompt([*rows, row(6, "Tom", "4")], tokenizer, "here.jsonl")


def test_messages_and_implicit_prompts(file):
    user, good, bad = (
        {"role": role, "content": text}
        for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
    )
    needs = ("prompt", "chosen", "rejected")
    expected = {"prompt": [user], "chosen": [good], "rejected": [bad]}
    for row in (
        expected,
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": [user], "chosen": [user, good], "rejected": [user, bad]},
    ):
        (found,) = load_rows(file(row), needs)
        assert {k: found[k] for k in needs} == expected and found["raw"] == row
    for row in (
        {"chosen": [good], "rejected": [bad]},
        {"chosen": "a", "rejected": "b"},
        {"prompt": [], "chosen": "a", "rejected": "b"},
        {"prompt": [{"role": "user", "content": 5}], "chosen": "a", "rejected": "b"},
    ):
        with pytest.raises(BadInput, match="line 1: "):
            load_rows(file(row), needs)


def test_labels(file):
    solution = "He has 5+3=<<5+3=8>>8\n#### 1,234"
    rows = [
        {"label": "8"},
        {"label": 8},
        {"label": 8.5},
        {"answer": solution},
        {"answer": "18"},
        {"label": "7", "answer": "seven"},
        {"label": "1234", "answer": solution},
    ]
    assert [row["label"] for row in load_rows(file(*rows), ("label",))] == [
        "8",
        "8",
        "8.5",
        "1234",
        "18",
        "7",
        "1234",
    ]
    assert gsm8k_label("#### -3") == "-3"
    (row,) = load_rows(file({"answer": "The final answer is: 1/2."}), ("label",))
    assert row["label"] == "1/2"
    (row,) = load_rows(
        file({"question": "q", "answer": solution}), ("prompt", "response", "label")
    )  # OpenAI's rows are good for both
    assert (row["response"], row["label"]) == (solution, "1234")
    numbers = [1e-05, 8.0, -0.5, 1e22, 12345678901234567890, 10**400]
    plain = ["0.00001", "8", "-0.5", "10000000000000000000000", "12345678901234567890", str(10**400)]
    found = load_rows(file(*({"label": number} for number in numbers)), ("label",))
    assert [row["label"] for row in found] == plain
    for bad in (
        {"label": ["8"]},
        {"answer": "#### none"},
        {"answer": "#### 10-15"},
        {},
        {"label": True},
        {"label": {"a": 1}},
    ):
        with pytest.raises(BadInput, match="line 2: "):
            load_rows(file({"label": "1"}, bad), ("label",))
    for bad in ('{"label": NaN}', '{"label": Infinity}', '{"label": 1e999}'):
        with pytest.raises(BadInput, match="line 1: label is"):
            load_rows(file(bad), ("label",))
    assert "label" not in load_rows(file({"prompt": "x"}), ("prompt",), optional=("label",))[0]
    assert load_rows(file({"prompt": "x", "label": 3}), ("prompt",), optional=("label",))[0]["label"] == "3"


@pytest.mark.parametrize(
    "row, says",
    [
        ({"label": "7", "answer": "He has 8.\n#### 1,234"}, "label says '7', but answer says '1234'"),
        ({"label": 7, "answer": "8"}, "label says '7', but answer says '8'"),
        ({"answer": "x+1", "solution": r"so \boxed{x+2}"}, "answer says 'x+1', but solution says 'x+2'"),
        ({"label": "B", "solution": r"\boxed{C}"}, "label says 'B', but solution says 'C'"),
        ({"label": "algebra", "answer": "18"}, "label says 'algebra', but answer says '18'"),
        ({"label": "Yes", "answer": "No"}, "label says 'Yes', but answer says 'No'"),
        ({"label": "0.5", "answer": r"\frac{1}{2}"}, None),
        ({"label": "1, 2", "solution": r"so \boxed{2} and \boxed{1}"}, None),
        ({"label": "13", "solution": "#### 1. Find x\nso\n#### 2. Done\nit is \\boxed{13}"}, None),
        ({"label": "3/4", "answer": "<think>#### 7</think>\n#### 3/4"}, None),
        ({"label": "18", "answer": "The answer is 18."}, None),
        ({"label": "5", "answer": "5 apples"}, None),  # a text, not a value
        ({"label": "5", "answer": "He has 6 apples."}, None),
        ({"label": "5", "solution": "a text without a box"}, None),
        ({"label": "", "answer": "6"}, None),
    ],
)
def test_a_row_that_states_two_labels(file, row, says):
    path = file({"label": "1"}, row)
    if says is None:
        assert len(load_rows(path, ("label",))) == 2
        return
    with pytest.raises(BadInput, match="line 2: ") as error:
        load_rows(path, ("label",))
    assert says in str(error.value) and "--ignore_keys" in str(error.value)
    name = "solution" if "solution" in row else "answer"
    assert len(load_rows(path, ("label",), ignore_keys=(name,))) == 2


def test_an_answer_that_is_the_response_may_be_wrong(file):
    (row,) = load_rows(file({"answer": "#### 6", "label": "5"}), ("response", "label"))
    assert (row["response"], row["label"]) == ("#### 6", "5")


def test_rows_without_a_label_are_dropped_and_counted(file):
    """The Q-RM authors' MATH files have some."""
    lines = []
    path = file({"label": "1"}, {"label": ""}, {"label": None}, {"label": "nan"}, {"label": "2"})
    assert [row["line"] for row in load_rows(path, ("label",), log=lines.append)] == [1, 5]
    assert lines == [f"{path}: dropped 3 rows with an empty or unreadable label; 2 left"]
    path = file({"solution": r"so \boxed{5}"}, {"solution": r"is \boxed{-15}x^3"})
    assert [row["label"] for row in load_rows(path, ("label",), log=lines.append)] == ["5"]
    assert lines[1:] == [f"{path}: dropped 1 rows with an empty or unreadable label; 1 left"]
    with pytest.raises(BadInput, match="every label is empty"):
        load_rows(file({"label": ""}), ("label",), log=lines.append)
    prose = {"question": "q", "answer": "so it is " * 80}
    for row in (
        prose,
        {"prompt": "q", "answer": ["a"]},
        {"prompt": "q", "answer": "5", "solution": r"\boxed{6}"},
    ):
        assert "label" not in load_rows(file(row), ("prompt",), optional=("label",))[0]
        with pytest.raises(BadInput):
            load_rows(file(row), ("prompt", "label"))
    (row,) = load_rows(file(MATH), ("prompt",), optional=("label",))
    assert row["label"] == r"\frac{1}{2}"  # what RL with a reward model reports pass@1 by
    unboxed = {"prompt": "q", "solution": "no box"}
    assert "label" not in load_rows(file(unboxed), ("prompt",), optional=("label",))[0]
    for stated, label in (("7", "7"), ("so\n#### 7", "7"), (r"so \boxed{7}", "7")):
        row = {"prompt": "q", "solution": stated}
        assert load_rows(file(row), ("prompt",), optional=("label",))[0]["label"] == label
    rows = load_rows(file({"prompt": "q", "label": ""}), ("prompt",), optional=("label",), log=lines.append)
    assert "label" not in rows[0] and len(lines) == 3


def test_an_empty_key_is_not_ignored(file):
    cfg = settings.Config(stage="sft", data=str(file({"": "Be short.", "prompt": "q", "response": "r"})))
    with pytest.raises(BadInput, match="which nothing here reads"):
        loading.read_rows(cfg.data, ONE, cfg, Grid())


def test_labels_that_cannot_be_read_are_no_labels(file, capsys):
    rows = [
        {"problem": "q", "solution": r"It is $\boxed{-15}x^3$"},
        {"problem": "q", "solution": r"\boxed{5}"},
    ]
    cfg = settings.Config(stage="reinforce", data=str(file(*rows)), task="math")
    found = loading.read_rows(cfg.data, ("prompt",), cfg, Grid(), optional=("label",))
    assert [row.get("label") for row in found] == [None, "5"]


def test_limit_reads_no_further(file):
    path = file({"prompt": "a"}, {"prompt": "b"}, "broken")
    assert [row["prompt"] for row in load_rows(path, ("prompt",), limit=2)] == ["a", "b"]
    with pytest.raises(BadInput, match="line 3"):
        load_rows(path, ("prompt",))


def test_files_that_cannot_be_read(file, tmp_path):
    for path, says in ((tmp_path / "none", "No such file"), (tmp_path, "directory"), (file(""), "no rows")):
        with pytest.raises(BadInput, match=f"(?i){re.escape(str(path))}.*{says}"):
            load_rows(path, ("prompt",))


# -------------------------------------------------------------------------------- rows to tensors


def test_alignment_of_the_docstring():
    """ids p0 p1 p2 r0 r1 eos pad; a second row, longer by one, makes the pad."""
    examples = [Example([10, 11, 12], [20, 21, 2]), Example([10, 11], [20, 21, 22, 23, 2])]
    ids, mask = collate(examples, pad_id=0)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert ids.tolist() == [[10, 11, 12, 20, 21, 2, 0], [10, 11, 20, 21, 22, 23, 2]]
    assert mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]
    targets = ids[:, 1:]
    assert [targets[i][mask[i]].tolist() for i in range(2)] == [e.response_ids for e in examples]


@pytest.mark.parametrize("pad_id", [0, 2, 20])
def test_the_mask_is_made_from_lengths_and_not_from_ids(pad_id):
    """Pad equal to eos, eos inside the prompt, pad inside the response: the mask is the same."""
    examples = [
        Example([2, pad_id, 12], [pad_id, 21, 2]),
        Example([1], [2]),
        Example([5, 6, 7, 8], [pad_id] * 4),
    ]
    ids, mask = collate(examples, pad_id=pad_id)
    assert ids.shape == (3, 8) and mask.int().tolist() == [
        [0, 0, 1, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1],
    ]
    for row, m, e in zip(ids, mask, examples):
        n = len(e.prompt_ids) + len(e.response_ids)
        assert row[:n].tolist() == e.prompt_ids + e.response_ids and (row[n:] == pad_id).all()
        assert row[1:][m].tolist() == e.response_ids and m.sum() == len(e.response_ids)


def test_encode_keeps_drops_and_counts(tokenizer):
    row = lambda prompt, chosen, rejected: {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "line": 1,
    }
    rows = [
        row("Tom has 3", " 3", " 4"),
        row("Tom", " 3", " 3"),
        row("Tom has 3 4 5 6", " 3", " 4"),
        row("Tom", " 3", " 4 5 6 7 8"),
        row("Ann", "", " 1"),
    ]
    lines = []
    kept, kept_rows = encode(rows, tokenizer, 6, ("chosen", "rejected"), "here.jsonl", lines.append)
    assert (
        kept_rows == [rows[0], rows[4]]
        and [[e.prompt_ids for e in pair] for pair in kept][0] == [tokenizer.encode_prompt("Tom has 3")] * 2
    )
    assert (
        kept[0][1].response_ids == tokenizer.encode_response(" 4")
        and kept[0][1].response_ids[-1] == tokenizer.stop_id
    )
    assert lines == [
        "here.jsonl: 5 rows; dropped 2 longer than --max_seq_len 6 tokens and 1 identical pairs; 2 left"
    ]
    longest = max(len(e.prompt_ids) + len(e.response_ids) for pair in kept for e in pair)
    assert (
        len(encode(rows[:1], tokenizer, longest, ("chosen", "rejected"), log=lines.append)[0]) == 1
        and len(lines) == 1
    )  # nothing dropped, no line
    with pytest.raises(BadInput, match="no row is left"):
        encode(rows[:1], tokenizer, longest - 1, ("chosen", "rejected"), log=lines.append)
    with pytest.raises(BadInput, match="here.jsonl, line 7: .*surrogate"):
        encode([{"prompt": "\ud800", "response": "x", "line": 7}], tokenizer, 99, source="here.jsonl")


def sampled_row(tokenizer, prompt, **replies):
    """A row as the pairs stage writes it: texts, and the ids that were sampled."""
    row = {
        "prompt": prompt,
        "prompt_ids": tokenizer.encode_prompt(prompt),
        "tokenizer": tokenizer.fingerprint,
    }
    for key, ids in replies.items():
        row[key] = tokenizer.decode([id for id in ids if id not in tokenizer.stop_ids])
        row["ids" if key == "response" else f"{key}_ids"] = ids
    return row


def test_sampled_ids_survive_a_file(file, tokenizer):
    """Whatever ids a policy sampled come back, where their text would not: bytes that are no UTF-8, a special
    token in the middle, a token spelled by others, 3,000 tokens, no stop token."""
    rng = random.Random(0)
    anything = [id for id in tokenizer.token_bytes if id not in tokenizer.stop_ids and id >= 33]
    answers = [[rng.choice(anything) for _ in range(rng.choice([1, 2, 9, 40]))] for _ in range(200)]
    answers += [
        [200],
        [0xE2, 0x82],
        [ord(char) for char in "Tom"],
        [tokenizer.bos_id, 65],
        rng.choices(anything, k=3000),
    ]
    answers = [[*ids, tokenizer.stop_id] if rng.random() < 0.7 else ids for ids in answers]
    rows = [sampled_row(tokenizer, "Tom has 3", response=ids) for ids in answers]
    found, _ = encode(load_rows(file(*rows), ONE), tokenizer, 10**4)
    assert [example.response_ids for (example,) in found] == answers
    assert sum(tokenizer.encode_response(row["response"]) != ids for row, ids in zip(rows, answers)) > 100
    rows = [sampled_row(tokenizer, "Ann", chosen=a, rejected=b) for a, b in itertools.pairwise(answers)]
    found, _ = encode(load_rows(file(*rows), PAIRS), tokenizer, 10**4, ("chosen", "rejected"))
    assert [[e.response_ids for e in pair] for pair in found] == [
        list(p) for p in itertools.pairwise(answers)
    ]


def test_ids_of_another_tokenizer_are_not_used(file, tokenizer):
    ids = [*b"Tom", tokenizer.stop_id]
    row = sampled_row(tokenizer, "Ann", response=ids)
    for change in ({"tokenizer": "0" * 64}, {"tokenizer": None}):
        ((example,),), _ = encode(load_rows(file({**row, **change}), ONE), tokenizer, 99)
        assert example.response_ids == tokenizer.encode_response("Tom") != ids
    ((example,),), _ = encode(load_rows(file(row), ONE, ignore_keys=("ids",)), tokenizer, 99)
    assert example.response_ids == tokenizer.encode_response("Tom")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"response": "Ann"}, "ids spell 'Tom', and response is another text"),
        ({"prompt": "Ben"}, "prompt_ids are not those of the prompt"),
        ({"ids": []}, "expected ids of this tokenizer"),
        ({"ids": [10**6]}, "expected ids of this tokenizer"),
        ({"ids": "Tom"}, "expected ids of this tokenizer"),
        ({"ids": [True]}, "expected ids of this tokenizer"),
    ],
)
def test_ids_and_text_say_the_same(file, tokenizer, change, says):
    row = {**sampled_row(tokenizer, "Ann", response=[*b"Tom", tokenizer.stop_id]), **change}
    with pytest.raises(BadInput, match=f"here, line 1: .*{says}"):
        encode(load_rows(file(row), ONE), tokenizer, 99, source="here")


@pytest.mark.parametrize("n, batch_size", [(10, 3), (7, 7), (5, 8), (1, 4), (64, 16)])
def test_batches_leave_no_row_out(n, batch_size):
    steps = n * 3
    drawn = [i for step in range(steps) for i in batch_indices(n, batch_size, step, seed=5)]
    assert len(drawn) == steps * batch_size and all(type(i) is int for i in drawn)
    epochs = [drawn[start : start + n] for start in range(0, len(drawn), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)  # batches may span two epochs
    assert [batch_indices(n, batch_size, step, 5) for step in (2, 1)] == [
        drawn[k * batch_size : (k + 1) * batch_size] for k in (2, 1)
    ]  # no state
    if n >= 7:
        assert len(set(map(tuple, epochs))) == len(epochs)  # shuffled anew
        assert batch_indices(n, n, 0, 5) != batch_indices(n, n, 0, 6)


def test_hashes_do_not_change_from_run_to_run():
    assert stable_hash("a") == int.from_bytes(bytes.fromhex("ca978112ca1bbdca"), "big") >> 1  # sha256 of "a"


# -------------------------------------------------------------------------------- the built-in task


@pytest.fixture(scope="module")
def arith():
    return arith_rows("train", 2500, seed=0)


def replay(row):
    """The lines of an answer, checked by Python's own arithmetic: [(value, operator, operand, result)]."""
    lines = row.split("\n")
    steps = [re.fullmatch(r"(\d)([+-])(\d)=(\d)", line).groups() for line in lines[:-1]]
    for (a, op, b, c), after in zip(steps, [s[0] for s in steps[1:]] + [lines[-1].removeprefix("#### ")]):
        assert eval(f"{a}{op}{b}") == int(c) and c == after
    return steps


def test_every_answer_is_sound_and_the_label_is_the_solutions(arith):
    for row in arith[:1000]:
        solution, written = (
            replay(row["solution"]),
            replay(row["response"]),
        )  # one digit each: all values are in 0..9
        verbs, operands = zip(*re.findall(r"\w+ (\w+) (\d)\.", row["prompt"]))
        assert [s[1] for s in solution] == [OPERATOR[verb] for verb in verbs] and [
            s[2] for s in solution
        ] == list(operands)
        assert [s[2] for s in written] == list(operands) and 4 <= len(solution) <= 6
        assert written[0][0] == solution[0][0] == re.search(r"has (\d)", row["prompt"])[1]
        assert row["label"] == row["solution"][-1] and grade(row["solution"], row["label"], "arith") == (
            row["label"],
            True,
        )
        assert arith_solve(row["prompt"]) == row["solution"]


def test_only_some_verbs_are_misread_and_a_right_number_means_a_right_path(arith):
    task, wrong, read = Arith(), collections.Counter(), collections.Counter()
    assert len(task.misreads) == 6 and len([v for v in task.misreads if OPERATOR[v] == "+"]) == 3
    for row in arith:
        verbs = re.findall(r"\w+ (\w+) \d\.", row["prompt"])
        for verb, (_, op, _, _), (_, right, _, _) in zip(
            verbs, replay(row["response"]), replay(row["solution"])
        ):
            read[verb] += 1
            wrong[verb] += op != right
        assert grade(row["response"], row["label"], "arith")[1] == (row["response"] == row["solution"])
    assert (
        set(read) == {verb for verb, _ in task.words}
        and {verb for verb in wrong if wrong[verb]} == task.misreads
    )
    share = sum(wrong.values()) / sum(read[verb] for verb in task.misreads)
    assert share == pytest.approx(
        task.q, abs=4 * (task.q * (1 - task.q) / sum(read[v] for v in task.misreads)) ** 0.5
    )


def test_share_of_wrong_answers_is_what_q_implies(arith):
    """An answer with n misread verbs is right with probability (1 - q)^n."""
    chances = [
        (1 - Arith().q)
        ** sum(verb in Arith().misreads for verb in re.findall(r"\w+ (\w+) \d\.", row["prompt"]))
        for row in arith
    ]
    right = statistics.mean(row["response"] == row["solution"] for row in arith)
    assert right == pytest.approx(
        statistics.mean(chances), abs=4 * (sum(p * (1 - p) for p in chances)) ** 0.5 / len(arith)
    )
    assert 0.02 < 1 - right < 0.98
    moves = [(verb, 1) for verb in sorted(Arith().misreads)]
    assert (
        Arith(q=0.0).answer(5, moves, random.Random(0))
        == Arith().answer(5, moves)
        != Arith(q=1.0).answer(5, moves, random.Random(0))
    )


def test_train_and_test_share_no_prompt(arith):
    test = arith_rows("test", 600, seed=0)
    prompts = [{row["prompt"] for row in rows} for rows in (arith, test, arith_rows("train", 500, seed=7))]
    assert not prompts[1] & (prompts[0] | prompts[2])
    assert prompts[0] != prompts[2] and len(prompts[1]) > 590  # hardly any twice
    assert arith_rows("test", 20, seed=0) == test[:20] and [row["line"] for row in test] == list(
        range(1, 601)
    )
    other = arith_rows("test", 20, seed=0, task=Arith(steps=(2, 2), author=3))
    assert all(row["solution"].count("\n") == 2 for row in other)


def test_first_error_is_where_the_answer_departs(arith, tokenizer):
    assert [
        first_error(*x)
        for x in (([1, 2], [1, 2]), ([3], [1]), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 2]), ([], [1]))
    ] == [2, 0, 2, 2, 0]
    for row in arith[:300]:
        written, right = (tokenizer.encode_response(row[k]) for k in ("response", "solution"))
        place = first_error(written, right)
        assert written[:place] == right[:place] and (place == len(written)) == (written == right)
        if place < len(written):  # the author errs in the sign, and nowhere else
            assert {tokenizer.decode([ids[place]]) for ids in (written, right)} == {"+", "-"}


def test_the_built_in_tokenizer_has_a_token_for_every_word(arith, tokenizer):
    for row in arith[:200]:
        for text in (row["prompt"], row["response"]):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and len(ids) <= len(
                re.findall(r"\w+|[^\w ]", text)
            ) + text.count("####")
    assert all(len(tokenizer.encode(f" {n}")) == 1 for n in range(10))
    assert tokenizer.stop_id in tokenizer.stop_ids and tokenizer.encode_prompt("Tom")[0] == tokenizer.bos_id


@pytest.mark.parametrize(
    "prompt",
    [
        "Why?",
        "",
        "Tom flies 3 pens. Tom jumps 3.",
        [{"role": "user", "content": "x"}],
        "Tom has 3 pens. Tom owns 3.",
    ],
)
def test_prompts_of_other_tasks_have_no_solution(prompt):
    with pytest.raises(BadInput, match="built-in task"):
        arith_solve(prompt)


# -------------------------------------------------------------------------------- real data


@real
def test_real_pairs_lose_nothing(tokenizer):
    rows = load_rows(GSM8K / "pairs_test.jsonl", ("prompt", "chosen", "rejected"))
    assert len(rows) == 787
    for row in rows:
        for key in ("prompt", "chosen", "rejected"):
            assert tokenizer.decode(tokenizer.encode(row[key])) == row[key]
    kept, _ = encode(rows, tokenizer, 10**6, ("chosen", "rejected"), log=lambda text: None)
    assert len(kept) == sum(row["chosen"] != row["rejected"] for row in rows)


@pytest.mark.skipif("QRM_AUTHORS" not in os.environ, reason="the Q-RM authors' files are not here")
@pytest.mark.parametrize(
    "name, needs, n, dropped",
    [
        ("data/math/test/test.jsonl", ("prompt", "label"), 4925, 1),
        ("data/math/test/pairwise/results.jsonl", PAIRS, 2291, 0),
        ("data/gsm8k/test/test.jsonl", ("prompt", "label"), 1319, 0),
    ],
)
def test_the_authors_files_load(name, needs, n, dropped):
    lines = []
    assert len(load_rows(Path(os.environ["QRM_AUTHORS"], name), needs, log=lines.append)) == n
    assert len(lines) == (dropped > 0)


@real
def test_real_labels():
    rows = load_rows(GSM8K / "test.jsonl", ("prompt", "response", "label"))
    assert (
        len(rows) == 1319
        and rows[0]["label"] == "18"
        and all(re.fullmatch(r"-?\d+(\.\d+)?", row["label"]) for row in rows)
    )
    assert all(grade(row["response"], row["label"], "gsm8k")[1] for row in rows)


# -------------------------------------------------------------------------------- the repository


def imports(path):
    """Names of the modules that a file imports, wherever the import stands: {(name, at the top level)}"""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        found |= {(name.split(".")[0], node in tree.body) for name in names}
    return found


def test_who_imports_whom():
    arrows = {
        "data": set(),
        "parallel": set(),
        "model": {"parallel"},
        "qrm": {"model", "data"},
        "reinforce": {"model", "parallel", "data"},
        "ppo": {"model", "parallel", "reinforce"},
        "train": {"ppo", "reinforce", "qrm", "model", "parallel", "data"},
    }
    for name, allowed in arrows.items():
        found = {module for module, _ in imports(REPOSITORY / f"{name}.py")} & {*FILES, "classroom", "tests"}
        assert found <= allowed | ({"classroom"} if name == "train" else set()), name
    assert ("classroom", True) not in imports(
        REPOSITORY / "train.py"
    )  # one late import, at the end of the demo
    assert "ppo" in {module for module, _ in imports(REPOSITORY / "train.py")}


def test_the_seven_files_are_all():
    assert {path.stem for path in REPOSITORY.glob("*.py")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    if name in ("data", "parallel"):
        assert result.attempted > 0


LONGER = [user("first"), assistant("one"), user("second"), assistant("two")]
LONGER_HH = "\n\nHuman: first\n\nAssistant: one\n\nHuman: second\n\nAssistant: two"
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize("longer", [LONGER, LONGER_HH], ids=["messages", "HH-RLHF"])
@pytest.mark.parametrize("needs", [ONE, ("prompt",), ("prompt", "label")])
def test_a_conversation_that_goes_on_is_used_up_to_the_prompt_that_a_row_states(file, longer, needs):
    """As Dataset.map leaves it: prompt and response of the first exchange beside the whole transcript."""
    row = {"prompt": "first", "response": "one", "label": "1", "chosen": longer, "rejected": longer}
    [read] = load_rows(file(row), needs)
    assert last_text(read["prompt"]) == "first" and last_text(read.get("response", "one")) == "one"
    assert not {"chosen", "rejected"} & set(read["read"])
    last = row | {"prompt": "second", "response": "two"}
    [read] = load_rows(file(last), needs)
    assert [message["content"] for message in read["prompt"]] == ["first", "one", "second"]
    assert read["read"]["chosen"] == "prompt"
    [read] = load_rows(file(row), ("prompt", "chosen", "rejected"))
    assert last_text(read["prompt"]) == "second" and read["read"]["chosen"] == "prompt and chosen"


@pytest.mark.parametrize("longer", [LONGER, LONGER_HH], ids=["messages", "HH-RLHF"])
def test_a_conversation_with_the_wanted_reply_is_used_whole(file, longer):
    """As after a map that takes the last replies as texts, and keeps prompt, the first question."""
    replies = {
        ONE: {"response": "two", "chosen": longer, "rejected": longer.replace("two", "no")}
        if longer is LONGER_HH
        else {"response": "two", "messages": longer},
        ("prompt", "chosen", "rejected"): {"chosen": "two", "rejected": "no", "messages": LONGER},
        ("prompt", "responses"): {"responses": ["two", "no"], "labels": [1, 0], "messages": LONGER},
    }
    for needs, row in replies.items():
        [read] = load_rows(file(row | {"prompt": "first"}), needs)
        assert [message["content"] for message in read["prompt"]] == ["first", "one", "second"], needs
        assert "prompt" in [read["read"].get(key) for key in ("messages", "chosen")]
    for needs, row in replies.items():
        if "messages" in row:
            with pytest.raises(BadInput, match="messages goes on after the prompt"):
                load_rows(file(row | {"prompt": "first", "messages": LONGER[:3]}), needs)


def test_messages_that_are_longer_than_the_prompt(file):
    row = {"prompt": "first", "messages": [SYSTEM, *LONGER], "label": "1"}
    [read] = load_rows(file(row), ("prompt", "label"))
    assert read["prompt"] == [SYSTEM, user("first")] and read["read"]["messages"] == "prompt"
    [read] = load_rows(file(row | {"prompt": [user("first")], "messages": LONGER}), ("prompt",))
    assert read["prompt"] == [user("first")] and "messages" not in read["read"]
    [read] = load_rows(file(row), ONE)  # the reply of messages answers all that is before it
    assert last_text(read["prompt"]) == "second" and last_text(read["response"]) == "two"
    with pytest.raises(BadInput, match="line 1: messages ends with a message of the user"):
        load_rows(file({"messages": LONGER[:3]}), ONE)
    with pytest.raises(BadInput, match="line 1: messages is .*expected .* a list of"):
        load_rows(file({"messages": str(LONGER)}), ONE)


@pytest.mark.parametrize(
    "instruction, context, prompt",
    [
        ("Name it.\n\nred\nblue", "red\nblue", None),  # joined by a map that keeps the column
        ("Context: " + "so " * 30 + "\n\nQuestion: why?\nAnswer:", "so " * 30, None),
        ("Is red a colour?", "red", "Is red a colour?\n\nred"),
        ("Name it.", "red", "Name it.\n\nred"),
    ],
)
def test_a_context_that_the_prompt_has_already(file, instruction, context, prompt):
    row = {"instruction": instruction, "input": context, "output": "ok"}
    [read] = load_rows(file(row), ONE)
    assert read["prompt"] == (prompt or instruction)
    assert ("input" in read["read"]) == (prompt is not None)


def test_texts_that_only_begin_as_none_does(file):
    for text in ("N/A\n" + "-" * 40 + "\n3", "| NaN |" + " " * 40 + "| 3 |", "no input" + " " * 60 + "but 3"):
        [read] = load_rows(file({"instruction": "q", "input": text, "output": "r"}), ONE)
        assert read["prompt"] == f"q\n\n{text}"


def test_a_prompt_that_the_assistant_repeats(file):
    turns = [user("Hi"), assistant("Hi"), user("So?"), assistant("Fine.")]
    assert load_rows(file({"prompt": "Hi", "messages": turns}), ("prompt",))[0]["prompt"] == [user("Hi")]


def test_which_keys_a_label_was_read_from(file):
    needs = ("prompt", "label")
    row = {"question": "q", "answer": "so\n#### 70"}
    with pytest.raises(BadInput, match="answer says '70', but solution says '72'"):
        load_rows(file(row | {"solution": "72"}), needs)
    for other, used in ((r"so \boxed{70}", True), ("70", True), ("because it is", False)):
        [read] = load_rows(file(row | {"solution": other}), needs)
        assert read["label"] == "70" and ("solution" in read["read"]) == used
    [read] = load_rows(file({"prompt": "q", "label": "72", "answer": "70", "correct": False}), needs)
    assert read["read"] == {"prompt": "prompt", "label": "label"}
    [read] = load_rows(file({"prompt": "q", "label": "18", "answer": "17 eggs"}), needs)
    assert read["read"] == {"prompt": "prompt", "label": "label"}
    [read] = load_rows(file(row), ("response", "label"))
    assert read["read"] == {"answer": "response and label"}
    assert load_rows(file({"problem": "q", "solution": "72"}), needs)[0]["label"] == "72"
    [read] = load_rows(file({"problem": "q", "solution": r"So $\boxed{\text{(E)},}$"}), needs)  # in MATH
    assert read["label"] == r"\text{(E)}"
    assert load_rows(file({"problem": "q", "label": r"0.25\,"}), needs)[0]["label"] == r"0.25\,"
    empty = [{"problem": "q", "label": label} for label in (",", "The answer is", "5")]
    assert [row["label"] for row in load_rows(file(*empty), needs)] == ["5"]


def test_alternatives_of_prm800k_are_no_steps(file):
    ends = {"prompt": "q", "completions": ["# Answer\n\n5", "So.\n\n# Answer\n\n6"], "labels": [1, -1]}
    with pytest.raises(BadInput, match="several completions of a row state a result"):
        load_rows(file(ends), ("prompt", "steps"))
    lines = []
    steps = {"prompt": "q", "completions": ["It is 5.", "# Answer\n\n5"], "labels": [1, 1]}
    load_rows(file(ends, steps, steps), ("prompt", "steps"), log=lines.append)
    assert len(lines) == 1 and "1 rows have several steps that state a result" in lines[0]


def test_keys_with_hyphens_are_read_as_those_with_underlines(file):
    """As in argilla's UltraFeedback."""
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen-model": "m", "chosen-rating": 3.0}
    lines = []
    load_rows(file(row | {"rejected-rating": 4.5}), PAIRS, log=lines.append)
    assert len(lines) == 1 and "1 rows rate the chosen reply below the rejected one" in lines[0]


def test_spellings_of_none(file):
    row = {"instruction": "q", "output": "r"}
    for text in ("<noinpute>", "No input is needed.", "No further input", "<empty>", "Not required", "NA"):
        assert load_rows(file(row | {"input": text}), ONE)[0]["prompt"] == "q"
    for text in ("-", "no", "required", "empty", "none of these", "+", "no input file", "Na"):
        assert load_rows(file(row | {"input": text}), ONE)[0]["prompt"] == f"q\n\n{text}"


def test_a_note_on_prompts_that_end_with_a_spelling_of_none(file):
    lines = []
    none = (
        *("q\n\n<noinput>", "q\n\nNo input", "Make a story: No Input", "q\n\u65e0\u8f93\u5165"),
        "q\n\n### Input:\nNoinput\n\n### Response:",
    )
    other = ("q\n\nred", "No input is given to it", "A: None\nB: 5", "q: none of them", "No input")
    rows = [{"messages": [user(prompt), assistant("a")]} for prompt in (*none, *other)]
    load_rows(file(*rows[:-1]), ONE, log=lines.append)
    lines = [line for line in lines if "have turns of a dialogue" not in line]
    assert len(lines) == 1 and "5 prompts have '<noinput>' at the end of a line, which is used" in lines[0]
    lines = []
    load_rows(file(*rows[-1:]), ONE, log=lines.append)
    assert len(lines) == 1 and "1 prompts have 'No input'" in lines[0]


def test_labels_that_could_be_places_of_responses(file):
    row = {"prompt": "q", "responses": ["1 red", "2 green", "3 blue"]}
    assert len(load_rows(file(row | {"label": 0}), ("prompt", "responses", "label"), log=list)) == 1
    named = row | {"responses": ["1", "2", "3"]}
    for label, noted in (((2, 0, 0), 1), ((2, 0, 3), 0), ((1, 2, 3), 1), ((1, 2, 4), 0)):
        rows = [row | {"prompt": f"q{n}", "label": n} for n in label]
        lines = []
        load_rows(file(*rows), ("prompt", "responses", "label"), log=lines.append)
        assert sum("could be places in responses" in line for line in lines) == noted
    lines = []
    load_rows(
        file(*[named | {"prompt": f"q{n}", "label": n} for n in (1, 2)]),
        ("prompt", "responses", "label"),
        log=lines.append,
    )
    assert not any("could be places" in line for line in lines)  # they are answers


@pytest.mark.parametrize("turn", ["<human>: hi\n<bot>: yo\n<human>: so?", "prompter: hi\nassistant: yo"])
def test_turns_of_h2o_and_open_assistant(file, turn):
    with pytest.raises(BadInput, match="replies have turns of a dialogue in them"):
        load_rows(file({"prompt": "q", "response": turn}), ONE)


def test_labels_with_words_are_counted(file, capsys):
    """In MATH: only such a label's own words make an answer right."""
    labels = (r"21\text{ dogs}", r"10\;\text{edges}", r"12\text{ and }13", r"5\text{ cm}", r"\frac{1}{2}")
    rows = [{"problem": f"q{i}", "answer": label} for i, label in enumerate(labels)]
    cfg = settings.Config(stage="pairs", data=str(file(*rows)), task="math")
    loading.read_rows(cfg.data, ("prompt", "label"), cfg, Grid())
    assert "note: 2 labels have words beside a number" in capsys.readouterr().out


def test_a_spelling_of_none_in_another_language_is_in_many_rows(file):
    rows = [{"instruction": f"q{i}", "input": text, "output": "r"} for i, text in enumerate("abcde")]
    for n, noted in ((3, 1), (2, 0)):
        lines = []
        load_rows(file(*rows, *n * [rows[0] | {"input": "Aucune"}]), ONE, log=lines.append)
        assert len(lines) == noted
        assert all("rows have 'Aucune' (in 3) beside their prompts" in line for line in lines)


@pytest.mark.parametrize(
    "text",
    [
        "\u65e0",
        "\u65e0\u8f93\u5165",
        "\uff08\u65e0\u8f93\u5165\uff09",
        "\u65e0\u9700\u8f93\u5165\u3002",
        "\u4e0d\u9002\u7528",
    ],
)
def test_spellings_of_none_in_chinese(file, text):
    [row] = load_rows(file({"instruction": "q", "input": text, "output": "r"}), ONE)
    assert row["prompt"] == "q"
    [row] = load_rows(file({"instruction": "q", "input": text + "\u4e86\u4eba", "output": "r"}), ONE)
    assert row["prompt"].startswith("q\n\n")


def test_signs_without_a_width_say_nothing(file):
    row = {"prompt": "q", "chosen": "a", "rejected": "\u200b \u2060"}
    with pytest.raises(BadInput, match="line 1: rejected is"):
        load_rows(file(row), PAIRS)
    with pytest.raises(BadInput, match="content of a message of the assistant is empty"):
        load_rows(file({"messages": [user("q"), assistant("\ufeff")]}), ONE)
    assert load_rows(file(row | {"rejected": "a\u200bb"}), PAIRS)


def test_labels_with_a_point_before_thousands_are_noted(file, capsys):
    """As a translation of GSM8K writes 70,000."""
    rows = [{"question": f"q{i}", "answer": f"so\n#### {label}"} for i, label in enumerate(("1.080", "7.5"))]
    cfg = settings.Config(stage="pairs", data=str(file(*rows)), task="gsm8k")
    loading.read_rows(cfg.data, ("prompt", "label"), cfg, Grid())
    assert (
        "note: 1 labels have a point and three digits, which are read as decimals (line 1 has '1.080')"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("heading", ["Conclusion", "Case of 3"])
def test_a_label_in_a_box_below_a_heading(file, heading):
    solution = f"#### Step 1\nAdd.\n#### {heading}\nSo it is $\\boxed{{x+y}}$."
    [row] = load_rows(file({"problem": "q", "solution": solution}), ("prompt", "label"))
    assert row["label"] == "x+y"


@pytest.mark.parametrize("task", ["math", "gsm8k"])
def test_labels_that_are_lists_with_commas_are_noted(file, capsys, task):
    """MATH-500's 70,110 is two values; 15 of MATH's labels are like it."""
    ask = "Enter all the solutions, separated by commas."
    rows = [
        {"problem": ask, "answer": "70,110"},
        {"problem": "q", "answer": "70,110"},
        {"problem": f"{ask} z", "answer": "70, 110"},
        {"problem": "Find all solutions.", "answer": "81,256"},
        {"problem": "They give all of their 1,200 apples. Write it without commas.", "answer": "1,240"},
    ]
    says = "note: 2 labels are read as one number, and their prompts may ask for several (line 1 has"
    cfg = settings.Config(
        stage="pairs", data=str(file(*[row | {"response": "find all"} for row in rows])), task=task
    )
    for needs, optional in (
        (("prompt", "label"), ()),
        (("response", "label"), ()),
        (("prompt",), ("label",)),
    ):
        loading.read_rows(cfg.data, needs, cfg, Grid(), optional=optional)
        assert says in capsys.readouterr().out


def test_a_note_on_contexts_that_were_joined_by_a_blank(file):
    joined = [{"instruction": f"Say it: {text}", "input": text, "output": "r"} for text in ("red", "blue")]
    for rows, noted in ((joined, 1), ([*joined, *[ALPACA] * 2], 0)):
        lines = []
        load_rows(file(*rows), ONE, log=lines.append)
        assert sum("2 of 2 prompts have in them what is beside them" in line for line in lines) == noted


def test_a_transcript_of_hh_has_a_system_message_at_its_beginning_only(file):
    listed = "Some parts:\n\nSystem: the kind\n\nMemory: how much"
    text = f"\n\nHuman: q1\n\nAssistant: {listed}\n\nHuman: q2\n\nAssistant: "
    [row] = load_rows(file({"chosen": text + "a", "rejected": text + "b"}), ("prompt", "chosen", "rejected"))
    assert row["prompt"] == [user("q1"), assistant(listed), user("q2")]
    text = "\n\nSystem: Be kind." + text
    [row] = load_rows(file({"chosen": text + "a", "rejected": text + "b"}), ("prompt", "chosen", "rejected"))
    assert row["prompt"][0] == SYSTEM


def test_the_kind_of_eval_goes_by_keys_that_are_not_ignored(file, monkeypatch):
    monkeypatch.setattr(loading, "holds_reward_model", lambda directory: True)
    monkeypatch.setattr(loading, "has_scalar_head", lambda directory: True)
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "completions": [{"response": "a"}], "responses": 5}
    pair |= {"labels": [1]}
    for ignored, kind in (
        ("", "candidates"),
        ("responses", "steps"),
        ("responses,completions", "reward model"),
    ):
        cfg = settings.Config(stage="eval", data=str(file(pair)), ignore_keys=ignored)
        assert loading.kind_of_eval("rm", cfg) == kind
    steps = settings.Config(
        stage="eval", data=str(file({"prompt": "q", "completions": ["a"], "labels": [1]}))
    )
    assert loading.kind_of_eval("rm", steps) == "steps"


def test_a_short_context_among_lines_of_the_prompt_is_added(file):
    """It is one of several things that the prompt lists, and what is asked about."""
    listed = {"instruction": "Which fits?\nred\nblue\ncar", "input": "blue", "output": "ok"}
    lines = []
    assert load_rows(file(listed), ONE)[0]["prompt"] == "Which fits?\nred\nblue\ncar\n\nblue"
    joined = listed | {"instruction": "Name it.\n\n### Input:\nblue\n\n### Response:"}
    assert load_rows(file(joined), ONE, log=lines.append)[0]["prompt"] == joined["instruction"]


def test_a_note_on_contexts_that_lost_their_footnotes(file):
    """As Dolly's card recommends for its contexts from Wikipedia."""
    rows = []
    for i in range(4):
        context = f"Adam was born in {1900 + i}.[1] He left in 1950.[2][3]"
        cleaned = context.replace("[1]", "").replace("[2][3]", "")
        rows.append({"instruction": f"When was he born?\n\n{cleaned}", "context": context, "response": "r"})
    lines = []
    load_rows(file(*rows), ONE, log=lines.append)
    assert len(lines) == 1 and "4 of 4 prompts have in them what is beside them" in lines[0]


@pytest.mark.parametrize(
    "rated",
    [
        {"metadata": {"score_chosen": 8.0, "score_rejected": 9.0}},
        {"scores": {"chosen": "8/10", "rejected": "9/10"}},
        {"scores": ["8 / 10", "9 / 10"]},
        {"metadata": {"ratings": [1, 2]}},
    ],
)
def test_ratings_inside_other_objects(file, rated):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    lines = []
    load_rows(file(pair | rated), PAIRS, log=lines.append)
    assert len(lines) == 1 and "1 rows rate the chosen reply below the rejected one" in lines[0]


def test_a_note_on_steps_with_two_labels(file):
    row = {"prompt": "q", "completions": ["a", "b", "It is 5."], "labels": [1, 1, 1]}
    needs = ("prompt", "steps")
    for labels, n in (([1, -1, 1], 1), ([-1, -1, 1], 2), ([1, 1, 1], 0)):
        lines = []
        load_rows(file(row, row | {"labels": labels}), needs, log=lines.append)
        assert len(lines) == (n > 0) and all(f"{n} steps have more than one label" in line for line in lines)
    lines = []
    load_rows(file(row, row | {"prompt": "z", "labels": [-1, -1, -1]}), needs, log=lines.append)
    load_rows(
        file(row, row | {"completions": ["z", "b", "It is 5."], "labels": [-1, -1, -1]}),
        needs,
        log=lines.append,
    )
    assert not lines


def test_notes_are_said_once(file):
    """A prompt that is "None" is no last line of a prompt, and "Yes." has one beginning or end."""
    lines = []
    load_rows(file({"prompt": "None", "response": "r"}), ONE, log=lines.append)
    assert len(lines) == 1 and "1 rows have prompt 'None'" in lines[0]
    lines = []
    pairs = [{"prompt": f"q{i}", "chosen": "Yes.", "rejected": f"b{i}"} for i in range(12)]
    load_rows(file(*pairs), PAIRS, log=lines.append)
    assert len(lines) == 1 and "12 chosen replies begin with 'Yes.'" in lines[0]


def test_a_note_on_boxes_reads_what_the_label_is_read_from(file):
    boxes = r"\boxed{1}, so \boxed{2}"
    for solution, n in ((boxes, 1), (r"<think>\boxed{1}</think> \boxed{2}", 0), (boxes + "\n#### 2", 0)):
        lines = []
        load_rows(file({"prompt": "q", "solution": solution}), ("prompt", "label"), log=lines.append)
        assert len(lines) == n, lines
