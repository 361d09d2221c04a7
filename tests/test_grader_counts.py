"""classroom/grader_counts.py on small made files, with counts by hand."""

import json
import random

import pytest

from classroom import grader_counts
from classroom.grader_counts import is_harmless, number_of, one_character_changes, triples_of

TESTS = r"""
import pytest, math

@pytest.mark.parametrize("gold,pred,expected", [
    ("$5$", r"so $\boxed{5}$ of 6", 1),      # right
    ("$5$", "so 5", 1),                       # right, without a formula
    ("5", "$4 + 2$ is $6$", 0),               # right
    ("$10$", "$9+1$", 1),                     # missed: not worked out
    (r"$\frac{1}{2}$", "$0.5$", 0),          # a false positive, by this file's own doing
])
def test_one(gold, pred, expected): raise SystemExit("a test was run")

@pytest.mark.parametrize("gold, pred, result", [("$2$", "none", 0)])
def test_two(gold, pred, result): ...

@pytest.mark.parametrize("gold, pred, strict, expected", [("1", "1", True, 0)])
def test_of_four(gold, pred, strict, expected): ...

@pytest.mark.parametrize("gold, pred, expected", [("1", math.pi, 0)])
def test_computed(gold, pred, expected): ...
"""


def write_rows(path, labels):
    path.write_text("".join(json.dumps({"label": label}) + "\n" for label in labels))
    return str(path)


def test_a_change_is_of_one_character():
    rng = random.Random(0)
    lengths = set()
    for text in one_character_changes("1234", rng, 300):
        lengths.add(len(text))
        assert any(text[:i] + text[j:] == "1234"[:i] + "1234"[k:] for i in range(5) for j, k in ends(i))
    assert lengths == {3, 4, 5}


def ends(i):
    """Where two texts may agree again after place i: one more, one less, or one other character."""
    return (i + 1, i), (i, i + 1), (i + 1, i + 1)


@pytest.mark.parametrize(
    "text, label, harmless",
    [
        ("12.", "12", True),
        ("+12", "12", True),
        ("1,234", "1234", True),
        ("13", "12", False),
        ("1 2", "12", False),
        ("12e", "12", False),
        ("1/0", "1", False),
        (r"\frac{1}{02}", r"\frac{1}{2}", True),
        ("(1, +2)", "(1,2)", True),
        ("(1,20)", "(1,2)", False),
        ("x-2", "x+2", False),
        ("x2", "x+2", False),
        (r"\frac{1}2}", r"\frac{1}{2}", True),
    ],
)
def test_what_is_harmless(text, label, harmless):
    assert is_harmless(text, label) == harmless


def test_numbers_are_read_without_the_graders():
    assert [number_of(text) for text in ("1,234.50", "1 1/2", "-3/4", "5%", "1/0", "x")] == [
        1234.5,
        1.5,
        -0.75,
        5,
        None,
        None,
    ]


def test_only_triples_of_literals_are_read():
    golds = [gold for gold, _, _ in triples_of(TESTS)]
    assert golds == ["$5$", "$5$", "5", "$10$", r"$\frac{1}{2}$", "$2$"]


def test_the_command(tmp_path, capsys):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_all.py").write_text(TESTS)
    gsm8k = write_rows(tmp_path / "gsm8k.jsonl", ["5", "1,200", "-3"])
    math = write_rows(tmp_path / "math.jsonl", ["0", "x+1", r"\frac{1}{2}"] * 20)
    words = ["--gsm8k", gsm8k, "--math", math, "--math_verify", str(tmp_path)]
    assert grader_counts.main(words) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("gsm8k: 0 of ") and f"changes of 3 labels judged equal ({gsm8k})" in first
    assert second.startswith("math: ") and "changes of 60 labels" in second
    assert third.startswith("math_verify: 4 of 6 triples as expected, 1 false positives")
    assert grader_counts.main([*words, "--show"]) == 0
    shown = capsys.readouterr().out
    assert "missed: '$9+1$' for '$10$'" in shown and "FALSE POSITIVE: '$0.5$'" in shown
    assert "'0x' for '0'" in shown  # equal in value, but not by what this file knows


def test_last_sentences_are_graded_behind_a_mark(tmp_path, capsys):
    solutions = [
        "He has 2+3=<<2+3=5>>5 pens. So he has 5 pens.\n#### 5",
        "So it is seven.\n#### 7",
        "She has 8.\n#### 9",
    ]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps({"question": "q", "answer": text}) + "\n" for text in solutions))
    assert grader_counts.last_sentence(solutions[0]) == "So he has 5 pens."
    assert grader_counts.last_sentence("#### 5") == ""
    assert grader_counts.main(["--gsm8k", str(path), "--show"]) == 0
    counted = capsys.readouterr().out
    assert "last sentences behind ####: 1 right, 1 claim nothing, 1 claim another number" in counted
    assert "'She has 8.' for '9'" in counted


def test_the_command_refuses(tmp_path, capsys):
    assert grader_counts.main(["--math_verify", str(tmp_path)]) == 2
    assert "expected a checkout of Math-Verify" in capsys.readouterr().err
    assert grader_counts.main(["--gsm8k", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        grader_counts.main([])
