"""classroom/carry.py: labels, answers and the place of a forgotten carry, against addition by columns."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model

from data import arith_tokenizer, first_error, load_rows
from model import ModelConfig, ScalarModel, load_model, save_model
from parallel import Grid
from qrm import token_scores
from support.graders import grade

sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))
import carry_credit  # noqa: E402
from carry import FORGETS, answer, carry_rows, main  # noqa: E402

FILES = ("sft.jsonl", "prompts.jsonl", "heldout.jsonl")


@pytest.fixture(scope="module")
def rows():
    return carry_rows(seed=3)


def columns(prompt):
    """(tens of both numbers, units of both numbers), as digits read from a prompt's text."""
    a, b, c, d = map(int, re.fullmatch(r"(\d)(\d)\+(\d)(\d)=\?\n", prompt).groups())
    return (a, c), (b, d)


def test_an_answer_by_hand():
    assert answer(47, 38) == "7+8=15\n4+3+1=8\n#### 85"
    assert answer(47, 38, forgets=True) == "7+8=15\n4+3+0=7\n#### 75"
    assert answer(95, 67) == "5+7=12\n9+6+1=16\n#### 162"
    assert answer(20, 31) == answer(20, 31, forgets=True) == "0+1=1\n2+3+0=5\n#### 51"


def test_labels_are_the_sums(rows):
    for name in ("prompts.jsonl", "heldout.jsonl"):
        for row in rows[name]:
            one, other = row["prompt"].removesuffix("=?\n").split("+")
            assert int(row["label"]) == int(one) + int(other) and row.keys() == {"prompt", "label"}


def test_no_prompt_is_in_two_files_and_none_is_missing(rows):
    prompts = {name: {row["prompt"] for row in rows[name]} for name in FILES}
    assert {name: len(found) for name, found in prompts.items()} == dict(zip(FILES, (3000, 4600, 500)))
    assert len(set().union(*prompts.values())) == 90 * 90
    assert len(rows["sft.jsonl"]) == 6000 and len(rows["prompts.jsonl"]) == 4600


def test_every_response_adds_column_by_column(rows):
    """What is written follows from the digits and the carry that is written: no other mistake is made."""
    for row in rows["sft.jsonl"]:
        tens, units = columns(row["prompt"])
        lines = row["response"].split("\n")
        first = re.fullmatch(r"(\d)\+(\d)=(\d+)", lines[0])
        second = re.fullmatch(r"(\d)\+(\d)\+([01])=(\d+)", lines[1])
        assert tuple(map(int, first.group(1, 2))) == units and int(first[3]) == sum(units)
        assert tuple(map(int, second.group(1, 2))) == tens
        assert int(second[4]) == sum(tens) + int(second[3])
        assert lines[2:] == [f"#### {second[4]}{first[3][-1]}"]


def test_the_first_wrong_token_is_the_forgotten_carry(rows):
    """As many carries are forgotten as FORGETS says, and the grader calls exactly those answers wrong."""
    tokenizer = arith_tokenizer()
    carries = 0
    forgotten = 0
    for row in rows["sft.jsonl"][:2000]:
        tens, units = columns(row["prompt"])
        label = 10 * sum(tens) + sum(units)
        before = f"{units[0]}+{units[1]}={sum(units)}\n{tens[0]}+{tens[1]}+"
        solution = tokenizer.encode_response(f"{before}{sum(units) // 10}={label // 10}\n#### {label}")
        ids = tokenizer.encode_response(row["response"])
        place = first_error(ids, solution)
        wrong = place < len(solution)
        carries += sum(units) > 9
        forgotten += wrong
        assert grade(row["response"], str(label), "gsm8k")[1] == (not wrong)
        if wrong:
            assert tokenizer.decode(ids[:place]) == before and sum(units) > 9
            assert tokenizer.decode([ids[place], solution[place]]) == "01"
    assert carries > 800 and forgotten / carries == pytest.approx(FORGETS, abs=0.05)


def test_the_files_depend_on_the_seed_alone_and_can_be_read(tmp_path, capsys):
    for directory, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main([str(tmp_path / directory), "--seed", seed])
    assert "6000 rows" in capsys.readouterr().out
    for name in FILES:
        texts = [(tmp_path / directory / name).read_text(encoding="utf-8") for directory in "abc"]
        assert texts[0] == texts[1] != texts[2]
        needs = ("prompt", "response") if name == "sft.jsonl" else ("prompt", "label")
        written = [json.loads(line) for line in texts[0].splitlines()]
        read = load_rows(tmp_path / "a" / name, needs)
        assert [[row[key] for key in needs] for row in read] == [
            [row[key] for key in needs] for row in written
        ]


def test_the_answers_that_are_compared():
    assert carry_credit.both_answers("47+38=?\n") == (answer(47, 38), answer(47, 38, forgets=True), True)
    right, invented, has_carry = carry_credit.both_answers("52+91=?\n")
    assert right == "2+1=3\n5+9+0=14\n#### 143" and not has_carry
    assert invented == "2+1=3\n5+9+1=15\n#### 153"
    assert carry_credit.digit_place([4, 5, 6, 7], [4, 5, 9, 9]) == 2


def test_credit_at_the_digit_by_hand():
    """Two problems with a carry, one without; the digit is token 1. std over all 12 scores, 1 less."""
    z = torch.tensor
    scored = [
        (True, z([0.0, 2.0]), z([0.0, -2.0]), 1),  # right: higher by mean, last and choice; rises there
        (True, z([3.0, 0.0]), z([3.0, 1.0]), 1),  # wrong
        (False, z([0.0, 1.0]), z([0.0, 2.0]), 1),  # the invented digit scores higher
    ]
    std = statistics.stdev([0, 2, 0, -2, 3, 0, 3, 1, 0, 1, 0, 2])
    found = carry_credit.measure(scored)
    assert found == pytest.approx(
        {"mean": 0.5, "last": 0.5, "choice": 0.5, "gap": 1.5 / std, "rise": 1.0, "invented": 1.0}
    )


def test_the_command(tmp_path, capsys):
    """On two tiny reward models, of which one prefers the digit 1 to 0 wherever it reads it."""
    tokenizer = arith_tokenizer()
    (tmp_path / "data").mkdir()
    rows = [{"prompt": "47+38=?\n", "label": "85"}, {"prompt": "52+91=?\n", "label": "143"}]
    (tmp_path / "data" / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, seed in (("rm", 0), ("rm-orm", 1)):
        cfg = ModelConfig(tokenizer.vocab_size, 16, 24, 1, 4, 2, 4)
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        save_model(random_model(ScalarModel, cfg, seed), tmp_path / name)
    carry_credit.main([str(tmp_path)])
    lines = capsys.readouterr().out.strip().split("\n")
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "| | Q-RM | outcome model |" and len(table) == 2 + len(carry_credit.MEASURES)
    model = load_model(ScalarModel, tmp_path / "rm", Grid())
    right, wrong, _ = carry_credit.both_answers("47+38=?\n")
    z = []
    for text in (right, wrong):
        ids = [*tokenizer.encode_prompt("47+38=?\n"), *tokenizer.encode_response(text)]
        z.append(token_scores(model, torch.tensor([ids]))[0])
    place = len(tokenizer.encode_prompt("47+38=?\n")) + right.index("+1=") + 1  # characters are tokens here
    expected = f"{float(z[0][place - 1] > z[1][place - 1]):.2f}"
    assert f"| {carry_credit.MEASURES['choice']} | {expected} |" in table[4]
