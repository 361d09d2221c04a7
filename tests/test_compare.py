"""Given answers reranked: every way to choose by hand, the rows it reads, and the scores of --stage score."""

import json
import re
from pathlib import Path

import made_checkpoints
import numpy as np
import pytest
import torch
from conftest import random_model, small_config

import train
from data import arith_tokenizer
from model import LanguageModel, ScalarModel, save_model
from support import settings
from support.compare import Candidates, encode_candidates, share_right, shares_right, votes
from support.files import BadInput
from support.rows import load_rows
from support.tokenizers import Tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -------------------------------------------------------------------------------- by hand


def test_votes_are_summed_over_equal_claims():
    assert votes(["5", "6", "5", None, "6", "5"], [1, 4, 2, 9, 0.5, 3]) == [6, 4.5, 6, 0, 4.5, 6]


def test_equal_answers_share_the_choice():
    assert share_right([1, 3, 2], [True, False, True]) == 0
    assert share_right([3, 3, 1, 3], [True, False, True, True]) == pytest.approx(2 / 3)
    assert share_right([0, 0, 0, 0], [True, False, False, False]) == 0.25


def test_every_way_to_choose_by_hand():
    rows = [
        Candidates("p", "x", [False, True, True], ["1", "2", "2"], [3, 4, 5], [2.0, -1.0, 0.5]),
        Candidates("q", "y", [True, False, False], ["7", "8", "8"], [4, 4, 9], [3.0, 1.0, 1.0]),
        Candidates("q", "y", [False, False], [None, "3"], [1, 2], [-2.0, -4.0]),
    ]
    found = shares_right(rows)
    totals = np.array([2.0, -1.0, 0.5, 3.0, 1.0, 1.0, -2.0, -4.0])
    weights = 1 / (1 + np.exp(-(totals - totals.mean()) / totals.std()))
    assert weights[1] + weights[2] > weights[0]  # the vote is for 2
    assert weights[4] + weights[5] > weights[3]  # and for 8
    expected = {
        "best_of_n": [0, 1, 0],
        "weighted_vote": [1, 0, 0],
        "majority": [1, 0, 0],
        "shortest": [0, 0.5, 0],
        "random": [2 / 3, 1 / 3, 0],
        "oracle": [1, 1, 0],
    }
    assert found["n_prompts"] == 3 and found["n_answers"] == 8
    for way, shares in expected.items():
        assert found[way] == pytest.approx(sum(shares) / 3), way
        assert found["by_subset"][way] == pytest.approx({"x": shares[0], "y": (shares[1] + shares[2]) / 2})
        # two prompts: one draw in four is p twice, and one in four q twice, so these are the ends
        ends = sorted([shares[0], (shares[1] + shares[2]) / 2])
        assert found[f"{way}_95"] == pytest.approx(ends), way


# -------------------------------------------------------------------------------- rows


def test_rows_of_candidates(tmp_path):
    rows = [
        {"question": "a", "responses": ["1", "", "2"], "labels": [True, 0, 1], "subset": "s"},
        {"prompt": "b", "responses": ["1"], "answer": "so it is\n#### 5"},
    ]
    read = load_rows(write_jsonl(tmp_path / "c.jsonl", rows), ("prompt", "responses"), optional=("label",))
    assert [row["responses"] for row in read] == [["1", "", "2"], ["1"]]
    assert read[0]["labels"] == [True, False, True] and "label" not in read[0]
    assert "labels" not in read[1] and read[1]["label"] == "5"


@pytest.mark.parametrize(
    "row, says",
    [
        ({"responses": []}, "responses is \\[\\]; expected"),
        ({"responses": "one"}, "expected a list of texts"),
        ({"responses": ["a", 5]}, "expected a list of texts"),
        ({"responses": ["a", "b"], "labels": [1]}, "each of the 2 responses"),
        ({"responses": ["a", "b"], "labels": [1, -1]}, "each of the 2 responses"),
        ({"responses": ["a", "b"], "labels": [1, [1]]}, "each of the 2 responses"),
        ({"responses": ["a"], "extra": 5}, "extra is 5"),
    ],
)
def test_bad_rows_of_candidates(tmp_path, row, says):
    path = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "p"} | row])
    with pytest.raises(BadInput, match=f"line 1: .*{says}"):
        load_rows(path, ("prompt", "responses"), optional=("label",))


def test_candidates_are_refused_where_they_would_be_lost(tmp_path):
    row = {"prompt": "p", "response": "a", "responses": ["a", "b"]}
    with pytest.raises(BadInput, match="responses is .* which nothing here reads"):
        load_rows(write_jsonl(tmp_path / "c.jsonl", [row]), ("prompt", "response"))


# -------------------------------------------------------------------------------- from the command line


PROMPTS = [f"Tom has {n} pens. Tom buys 2. How many?\n" for n in range(4)]
ROWS = [
    {"prompt": p, "responses": [f"{n}+2={n + 2}\n#### {n + 2}", f"#### {n}", f"#### {n + 2}"][: 3 - n % 2]}
    for n, p in enumerate(PROMPTS)
]


@pytest.fixture
def home(tmp_path):
    tokenizer = arith_tokenizer()
    cfg = small_config(vocab_size=tokenizer.vocab_size)
    for name, kind in (("rm", ScalarModel), ("lm", LanguageModel)):
        tokenizer.save(tmp_path / name)
        save_model(random_model(kind, cfg, 3), tmp_path / name)
    return tmp_path


def call(*words):
    return train.main([*map(str, words), "--device", "cpu"])


def evaluate(home, rows, *words):
    path = write_jsonl(home / "c.jsonl", rows)
    assert call("--stage", "eval", "--data", path, "--out", home / "e", *words) == 0
    found = json.loads((home / "e/eval.json").read_text())
    assert found.pop("made_from")["data"]["path"] == str(path)
    return found


def test_best_of_n_goes_by_the_scores_of_the_reward_model(home, capsys):
    """--stage score writes each answer's scores; labels given and labels graded are the same."""
    flat = [{"prompt": row["prompt"], "response": text} for row in ROWS for text in row["responses"]]
    path = write_jsonl(home / "r.jsonl", flat)
    assert call("--stage", "score", "--model", home / "rm", "--data", path, "--out", home / "s.jsonl") == 0
    means = {}
    for line in (home / "s.jsonl").read_text().splitlines():
        row = json.loads(line)
        means[row["prompt"], row["response"]] = sum(row["scores"]) / len(row["scores"])
    best = [max(row["responses"], key=lambda text: means[row["prompt"], text]) for row in ROWS]
    right = [text.endswith(f"#### {n + 2}") for n, text in enumerate(best)]
    assert 0 < sum(right) < 4
    graded = evaluate(
        home, [row | {"label": str(n + 2)} for n, row in enumerate(ROWS)], "--model", home / "rm"
    )
    assert graded["best_of_n"] == sum(right) / 4 and graded["oracle"] == 1 and graded["n_answers"] == 10
    assert graded["n_claims"] == 10
    assert graded["random"] == pytest.approx((2 / 3 + 1 / 2) / 2) and "by_subset" not in graded
    assert graded["shortest"] == pytest.approx(
        1 / 4
    )  # two prompts of three answers, two of them equally short
    labels = [[text.endswith(f"#### {n + 2}") for text in row["responses"]] for n, row in enumerate(ROWS)]
    given = [row | {"labels": of_row} for row, of_row in zip(ROWS, labels)]
    assert evaluate(home, given, "--model", home / "rm") == graded
    assert "  labels    right wrong right\n" in capsys.readouterr().out
    assert evaluate(home, given, "--model", home / "lm", "--reward_model", home / "rm") == graded
    longer = [{"prompt": "p" * 90, "responses": ["a", "b"], "labels": [0, 0]}, *given]
    capsys.readouterr()
    assert evaluate(home, longer, "--model", home / "rm", "--max_seq_len", 90) == graded
    assert "5 rows; dropped 1 with an answer longer than" in capsys.readouterr().out


def test_what_cannot_be_reranked(home, capsys):
    path = write_jsonl(home / "c.jsonl", ROWS)
    for model, says in (
        ("rm", "expected label or answer or solution, or labels: right or wrong"),
        ("lm", "is no reward model"),
    ):
        capsys.readouterr()
        assert call("--stage", "eval", "--data", path, "--model", home / model) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    labelled = write_jsonl(home / "l.jsonl", [row | {"label": "5"} for row in ROWS])
    words = ["--stage", "eval", "--data", labelled, "--model", home / "rm", "--max_seq_len", 5]
    assert call(*words) == 2 and "none is left" in capsys.readouterr().err


@pytest.mark.parametrize("given", [5, "a", {"a": 1}, [1]])
def test_given_answers_that_are_no_texts(home, capsys, given):
    path = write_jsonl(home / "n.jsonl", [ROWS[0] | {"responses": given, "label": "2"}])
    assert call("--stage", "eval", "--data", path, "--model", home / "rm") == 2
    assert "expected a list of texts" in capsys.readouterr().err


def test_given_answers_without_a_readable_label_are_dropped(home, capsys):
    """As MATH's solutions whose box cannot be read whole; labels that are given are needed in every row."""
    rows = [row | {"solution": rf"\\boxed{{{n + 2}}}"} for n, row in enumerate(ROWS)]
    found = evaluate(home, [*rows, ROWS[0] | {"solution": r"\boxed{-15}x^3"}], "--model", home / "rm")
    assert found == evaluate(home, rows, "--model", home / "rm")
    assert "dropped 1 rows with an empty or unreadable label; 4 left" in capsys.readouterr().out
    mixed = [row | {"labels": [1] * len(row["responses"])} for row in ROWS[:3]] + ROWS[3:]
    path = write_jsonl(home / "m.jsonl", mixed)
    assert call("--stage", "eval", "--data", path, "--model", home / "rm") == 2
    assert "line 4: has no labels, and the first row has" in capsys.readouterr().err


def test_prompts_that_are_dialogues_as_text():
    """As sft, rm and score, eval of given answers refuses what a template would make one message of."""
    files = {name: text.encode() for name, text in made_checkpoints.tokenizer_files().items()}
    dialogue = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"
    rows = [{"prompt": dialogue, "responses": ["a", "b"], "line": line} for line in (3, 4)]
    cfg = settings.Config(data="c.jsonl")
    with pytest.raises(BadInput, match="c.jsonl, line 3: 2 of 2 prompts are transcripts"):
        encode_candidates(rows, Tokenizer(files, "x", "chatml"), cfg, print)
    tokenizer = Tokenizer(files, "x", "none")
    _, examples = encode_candidates(rows, tokenizer, cfg, print)
    assert examples[1][1].prompt_ids == tokenizer.encode_prompt(dialogue)
    assert examples[1][1].response_ids == tokenizer.encode_response("b")


def test_a_judge_reranks(home):
    (home / "q.txt").write_text("{prompt} {response}")
    rows = [row | {"label": "5"} for row in ROWS]
    found = evaluate(
        home, rows, "--model", home / "lm", "--reward", "judge", "--judge_prompt", home / "q.txt"
    )
    assert found["n_prompts"] == 4 and 0 <= found["best_of_n"] <= 1


def test_openais_solutions_become_candidates(home, monkeypatch):
    """The lines of Python in recipes.md, run on a file in that form."""
    page = (ROOT / "classroom" / "recipes.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "is_correct" in block]
    row = {"question": "1+1?", "ground_truth": "A: 2"}
    for i, name in enumerate(("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")):
        row[name] = {"is_correct": i == 2, "solution": f"It is {i}\nA: {i}"}
    monkeypatch.chdir(home)
    write_jsonl(home / "example_model_solutions.jsonl", [row] * 2)
    exec(code, {})
    made = [json.loads(line) for line in Path("candidates.jsonl").read_text().splitlines()]
    assert made == 2 * [
        {
            "prompt": "1+1?",
            "responses": [f"It is {i}\nA: {i}" for i in range(4)],
            "labels": [False, False, True, False],
        }
    ]
    found = evaluate(home, made, "--model", home / "rm")
    assert found["random"] == 0.25 and found["majority"] == 0.25
