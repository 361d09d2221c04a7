"""classroom/real.py on made data with numbers worked out by hand; one test needs the real weights."""

import dataclasses
import doctest
import json
import os
import shlex
import string
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import near, random_model, small_config

from model import LanguageModel, at_actions, load_model, token_logprobs
from parallel import Grid

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "classroom"))
import adapters  # noqa: E402
import heads  # noqa: E402
import notes  # noqa: E402
import problems  # noqa: E402
import real  # noqa: E402
import real_rl  # noqa: E402
import solutions  # noqa: E402

from support.files import BadInput  # noqa: E402
from support.graders import grade, gsm8k_label  # noqa: E402
from support.settings import parse  # noqa: E402
from support.tokenizers import Tokenizer  # noqa: E402
from support.unread import unread_flags  # noqa: E402


def test_folds_go_by_question_whatever_its_spelling():
    questions = [f"How many apples are {i} apples?" for i in range(500)]
    folds = [solutions.fold_of(q) for q in questions]
    assert folds == [solutions.fold_of(q.upper().replace("?", " ?!")) for q in questions]
    assert set(folds) == set(range(solutions.FOLDS))
    assert max(np.bincount(folds)) < 140  # 100 expected, standard deviation 9


def test_mixed_pairs_stay_within_a_question():
    questions = np.array([7, 7, 7, 3, 3, 5])
    correct = np.array([True, False, True, False, False, True])
    assert solutions.mixed_pairs(questions, correct).tolist() == [[0, 1], [2, 1]]
    assert solutions.mixed_pairs(questions, ~correct).tolist() == [[1, 0], [1, 2]]
    assert solutions.mixed_pairs(questions[3:], correct[3:]).shape == (0, 2)


def test_clustered_interval_widens_with_equal_values_in_a_cluster():
    values = np.repeat([0.0, 1.0], 50)
    single = solutions.clustered_interval(values, np.arange(100))
    clustered = solutions.clustered_interval(values, np.repeat(np.arange(10), 10))
    # binomial standard errors: .5 / sqrt(100) = .05 and .5 / sqrt(10) = .158
    assert abs(single[1] - single[0] - 2 * 1.96 * 0.05) < 0.03
    assert abs(clustered[1] - clustered[0] - 2 * 1.96 * 0.158) < 0.09
    assert solutions.clustered_interval(np.ones(6), [0, 0, 1, 1, 2, 2]) == (1.0, 1.0)


def test_clustered_interval_weighs_clusters_by_size():
    """With two clusters a draw holds either, or both: the mean is one of 0, 3/4 and 1."""
    values, clusters = [0, 1, 1, 1], ["a", "b", "b", "b"]
    assert solutions.clustered_interval(values, clusters) == (0.0, 1.0)


def test_balanced_weights_make_the_author_useless():
    winners, losers = np.array([0, 0, 0, 1, 0, 2, 2]), np.array([1, 1, 1, 0, 2, 0, 1])
    weights = solutions.balanced_weights(winners, losers)
    assert weights.tolist() == [1 / 12] * 3 + [1 / 4] * 3 + [0]  # author 1 never wins against 2
    authors_score = np.array([3.0, 2.0, 1.0])
    right = solutions.wins(authors_score[winners], authors_score[losers])
    assert np.average(right) == 4 / 7 and abs(np.average(right, weights=weights) - 0.5) < 1e-12
    low, high = solutions.clustered_interval(right, np.arange(7), weights)
    assert low < 0.5 < high


def test_best_of_and_votes():
    correct = np.array([[True, False, False, True], [False, True, False, False]])
    scores = np.array([[2.0, 2.0, 1.0, 2.0], [0.0, 1.0, 3.0, -1.0]])
    assert solutions.best_of(scores, correct).tolist() == [2 / 3, 0.0]
    assert solutions.best_of(np.zeros((2, 4)), correct).tolist() == [0.5, 0.25]
    claims = [[5, 6, 5, None], [None, None, 1, 2]]
    assert solutions.votes(claims).tolist() == [[2, 1, 2, 0], [0, 0, 1, 1]]
    weights = np.array([[0.5, 2.0, 0.25, 9.0], [9.0, 9.0, 1.0, 3.0]])
    assert solutions.votes(claims, weights).tolist() == [[0.75, 2.0, 0.75, 0], [0, 0, 1, 3]]


def test_numbers():
    assert notes.numbers_in("$20,000 and 1.50, or .5 of 3.") == {20000, Fraction(3, 2), Fraction(1, 2), 3}
    assert notes.as_number("12.0") == 12 and notes.as_number("x") is None and notes.as_number("1/0") is None
    assert notes.evaluate_note("2*(3+4)/7-.5") == Fraction(3, 2)
    for text in ("2**9", "9//2", "1/0", "2(3)", "x+1", "", "__import__('os')"):
        assert notes.evaluate_note(text) is None, text


def test_first_wrong_note():
    right = "3+4 = <<3+4=7>>7 apples.\n7*2 = <<7*2=14>>14\nA: 14"
    wrong = "3+4 = <<3+4=7.0>>7 apples.\n7+2 = <<7+2=9>>9\n9+5=<<9+5=14>>14\nA: 14"
    number, note = notes.first_wrong_note(wrong, [right])
    assert (number, note[1], note[2], wrong[note.start(2) : note.end(2)]) == (1, "7+2", "9", "9")
    assert notes.first_wrong_note(wrong, [right, "another way: 9"]) is None
    assert notes.first_wrong_note("<<3+4=seven>>7 <<1+1=2>>2", [right]) is None
    assert notes.first_wrong_note("no note, 99", [right]) is None


def test_plant_error_with_and_without_consequences():
    solution = "3+4 = $<<3+4=7>>7 a day.\n7 days: 7*10 = <<7*10=70>>70\nHalf is 70/2 = <<70/2=35>>35\nA: 35"
    without, follows = notes.plant_error(solution, 0, 9)
    assert without == solution.replace("=7>>7 a", "=9>>9 a")
    assert (
        follows
        == "3+4 = $<<3+4=9>>9 a day.\n9 days: 9*10 = <<9*10=90>>90\nHalf is 90/2 = <<90/2=45>>45\nA: 45"
    )
    without, follows = notes.plant_error(solution, 2, 30)
    assert without.endswith("<<70/2=30>>30\nA: 35") and follows.endswith("<<70/2=30>>30\nA: 30")


def test_plant_error_refuses_what_it_cannot_follow():
    assert notes.plant_error("<<1+1=2>> two\nA: 2", 0, 3) is None  # the result is not repeated
    assert notes.plant_error("<<1+1=2>>20\nA: 20", 0, 3) is None  # 20 does not repeat 2
    assert notes.plant_error("<<1+1=2>>2\n<<2x=4>>4\nA: 4", 0, 3) is None  # cannot be calculated
    assert notes.plant_error("<<1+1=2>>2\n<<5-3=2>>2\nA: 2", 0, 3) is None  # which 2 is meant later?


def test_plant_somewhere_leaves_the_question_alone():
    solution = "5+4=<<5+4=9>>9\n9*3=<<9*3=27>>27\nA: 27"
    for seed in range(20):
        without, follows = notes.plant_somewhere("5 and 4, 9 each", solution, seed)
        assert without.startswith("5+4=<<5+4=9>>9\n9*3=<<9*3=")  # 9 occurs in the question
        assert without != solution and len(without) == len(solution)
        assert notes.numbers_in(without) - notes.numbers_in(solution)  # the number is new
    assert notes.plant_somewhere("9 and 27", solution, 0) is None


def test_token_at_counts_bytes():
    text = "2€ = <<2=2>>"
    pieces = [b"2", "€".encode()[:1], "€".encode()[1:], b" =", b" <<", b"2=", b"2>>"]
    assert [notes.token_at(pieces, text, i) for i in (0, 1, 2, 3, 5, 7, 9, 11)] == [0, 1, 3, 3, 4, 5, 6, 6]
    with pytest.raises(BadInput):
        notes.token_at(pieces, text + "x", len(text))


def test_mean_before():
    assert heads.mean_before(torch.tensor([4.0, 2.0, 9.0])).tolist() == [4.0, 4.0, 3.0]


def test_wins_and_pair_accuracy():
    scores = np.array([1.0, 2.0, 2.0])
    assert heads.pair_accuracy(scores, np.array([[0, 1], [1, 0], [1, 2]])).tolist() == [0.0, 1.0, 0.5]


def made_answers(lengths, rows, width=3, seed=0):
    n = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    hidden = {layer: torch.randn(n, width, generator=generator).half() for layer in heads.LAYERS}
    starts = np.concatenate([[0], np.cumsum(lengths)])
    slots = np.array([list(rows[:i]).count(row) for i, row in enumerate(rows)])
    return heads.Answers(
        np.array(rows), slots, starts, hidden, torch.zeros(n), torch.zeros(n, dtype=torch.int64)
    )


def test_answers_means_and_last():
    answers = made_answers([2, 1, 3], [0, 0, 1])
    x = torch.tensor([1.0, 3.0, 5.0, 1.0, 2.0, 6.0])
    assert answers.means(x).tolist() == [2.0, 5.0, 3.0] and answers.last(x).tolist() == [3.0, 5.0, 6.0]
    assert answers.means(x[:, None] * torch.ones(2))[2].tolist() == [3.0, 3.0]


def test_unscaled_head_gives_the_same_scores():
    answers = made_answers([2, 3], [0, 0])
    layer = heads.Layer(answers, heads.LAYERS[0])
    weight, bias = torch.tensor([0.5, -2.0, 1.0]), torch.tensor(0.3)
    raw, shift = layer.unscaled(weight, bias)
    near(answers.hidden[heads.LAYERS[0]].float() @ raw + shift, layer.x @ weight + bias)


def test_heads_are_fitted_to_the_minimum():
    """There the gradient of the loss, written out, is minus l2 times the weight."""
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5]])
    for name, beta, margin in (("Q-RM", 0.2, 2.0), ("ORM", 1.0, 0.0)):
        shares = torch.tensor([0.5, 0.3, 0.2])
        weight, bias = heads.fit_pairs(heads.KINDS[name], x, pairs, shares, 0.1)
        gap = beta * (x[pairs[:, 0]] - x[pairs[:, 1]])  # (3, 2)
        gradient = -(gap * (shares * torch.sigmoid(margin - gap @ weight))[:, None]).sum(0)
        torch.testing.assert_close(gradient, -0.1 * weight, atol=1e-4, rtol=1e-3)
        assert bias == 0
    correct, weights = torch.tensor([1.0, 0, 0, 1, 1, 0]), torch.tensor([1.0, 2, 1, 1, 3, 2])
    weight, bias = heads.fit_outcome(x, correct, weights, 0.1)
    residual = (torch.sigmoid(x @ weight + bias) - correct) * weights / 10
    torch.testing.assert_close(x.T @ residual, -0.1 * weight, atol=1e-4, rtol=1e-3)
    assert abs(residual.sum()) < 1e-4  # the bias is not shrunk


def test_train_head_weighs_answers_by_their_pairs(monkeypatch):
    """Question 0 has one right and two wrong answers, question 1 only right ones: no pair, so no weight."""
    answers = made_answers([2, 1, 3, 2], [0, 0, 0, 1])
    correct = np.array([True, False, False, True])
    pairs = solutions.mixed_pairs(answers.rows, correct)
    labels = heads.Labels(answers.rows, answers.slots, correct, np.zeros(4), pairs)
    seen = []
    monkeypatch.setattr(heads, "fit_outcome", lambda x, *rest: seen.append((len(x), *rest)))
    layer = heads.Layer(answers, heads.LAYERS[0])
    for reads in ("last", "tokens"):
        kind = heads.Kind("outcome", reads, "mean", balanced=False)
        heads.train_head(kind, layer, answers, labels, [0], 0.5)
    found = [(n, right.tolist(), weights.tolist(), l2) for n, right, weights, l2 in seen]
    assert found[0] == (3, [1, 0, 0], [1, 0.5, 0.5], 0.5)
    assert found[1] == (6, [1, 1, 0, 0, 0, 0], [1, 1, 0.5, 0.5, 0.5, 0.5], 0.5)


def test_pairs_in_folds_are_balanced_among_themselves():
    questions, authors = np.arange(8) // 2, np.array([0, 1] * 4)
    correct = np.array([True, False, True, False, True, False, False, True])
    pairs = solutions.mixed_pairs(questions, correct)
    labels = heads.Labels(questions, authors, correct, np.array([0, 0, 1, 1, 1, 1, 1, 1]), pairs)
    found, weights = labels.pairs_in([1], balanced=True)
    assert found.tolist() == [[2, 3], [4, 5], [7, 6]] and weights.tolist() == [0.25, 0.25, 0.5]
    assert labels.pairs_in([0, 1], balanced=False)[1].tolist() == [0.25] * 4


def test_held_out_scores_come_from_the_other_folds():
    """In fold 3 the labels are the opposite of what the first dimension says, in the others they follow it:
    only a head that has not seen fold 3 is wrong on it."""
    rows = [q for q in range(60) for _ in range(2)]
    answers = made_answers([2] * 120, rows)
    right = np.array([i % 2 == 0 for i in range(120)])
    folds = np.array(rows) % solutions.FOLDS
    for layer in heads.LAYERS:
        sign = np.where(right, 1.0, -1.0) * np.where(folds == 3, -1.0, 1.0)
        answers.hidden[layer][:, 0] = torch.from_numpy(np.repeat(sign, 2)).half()
    authors = np.array([i % 2 ^ i // 2 % 2 for i in range(120)])  # either author is right every other time
    labels = heads.Labels(np.array(rows), authors, right, folds, solutions.mixed_pairs(np.array(rows), right))
    best = {(name, fold): (heads.LAYERS[0], 1e-2) for name in heads.KINDS for fold in range(solutions.FOLDS)}
    trained, scores = heads.train_folds(answers, labels, best)
    for name, values in heads.answer_scores(answers, scores).items():
        if name in heads.KINDS:
            accuracy = heads.pair_accuracy(values, labels.pairs)
            turned = labels.folds[labels.pairs[:, 0]] == 3
            assert accuracy[turned].mean() < 0.1 and accuracy[~turned].mean() > 0.9, name
    again = heads.score_hidden(answers, trained, "ORM", folds)
    torch.testing.assert_close(again, scores["ORM"], atol=2e-3, rtol=1e-3)


def test_choose_settings_finds_the_layer_that_knows():
    """Only layer 20 tells right from wrong; in the other layers there is noise."""
    rows = np.repeat(np.arange(40), 2)
    answers = made_answers([3] * 80, rows, width=2)
    authors = np.array([i % 2 for i in range(80)])
    correct = np.array([(i % 2 == 0) ^ (i // 2 % 2 == 0) for i in range(80)])
    answers.hidden[20][:, 0] = torch.from_numpy(np.repeat(correct * 2.0 - 1, 3)).half()
    labels = heads.Labels(rows, authors, correct, rows // 2 % 5, solutions.mixed_pairs(rows, correct))
    best, table = heads.choose_settings(answers, labels)
    assert set(best) == {(name, fold) for name in heads.KINDS for fold in range(solutions.FOLDS)}
    for name in heads.KINDS:
        assert table[name, 20] == 1.0 and max(table[name, 12], table[name, 30]) < 0.85
        assert all(best[name, fold][0] == 20 for fold in range(solutions.FOLDS))


def test_doctests():
    assert doctest.testmod(notes) == (0, 1)  # failed, attempted


def test_error_measures_by_hand():
    """Question 0 has a right answer (0) and a wrong one (1), question 1 a right one (2)."""
    answers = made_answers([5, 5, 4], [0, 0, 1])
    correct, pairs = np.array([True, False, True]), np.array([[0, 1]])
    labels = heads.Labels(np.array([0, 0, 1]), np.array([0, 0, 0]), correct, np.zeros(3), pairs)
    notes = heads.Notes(
        np.array([0, 0, 1, 1, 2]),
        np.array([0, 1, 0, 1, 0]),
        np.array([1, 3, 1, 3, 2]),
        np.array([False, False, False, True, False]),
    )
    scores = torch.tensor([0.0, 1, 1, 3, 1] + [2.0, 2, 0, 1, 0] + [1.0, 1, 1, 1])
    found = heads.error_measures(scores, answers, notes, labels)
    assert found["within"] == [(2 / 3, 0)]  # 2, 2 and 0 before a score of 1
    assert found["same index"] == [(0.75, 0)]  # 3 and 1 at index 3 of the right answers
    assert found["same kind"] == [(2 / 3, 0)]  # notes at 1, 3 and 2 of right answers: 1, 3, 1 against 1
    assert found["paired"] == [(1.0, 0)] and found["paired before"] == [(0.0, 0)]
    assert found["same kind before"] == [(1 / 3, 0)]  # 2 against 1, 3 and 1
    # falls: answer 0 at 1: 1 - 0, at 3: 3 - 2/3; answer 2 at 2: 0; the error: 1 - 4/3
    assert found["fall"] == [(1.0, 0)]
    labels.authors[1] = 1  # nobody else writes like that
    found = heads.error_measures(scores, answers, notes, labels)
    assert not found["same index"] and not found["same kind"] and found["paired"] == [(1.0, 0)]


def test_planted_measures_by_hand():
    right = np.array([1.0, 2.0, 4.0])
    without = np.array([1.0, 5.0, 1.0])
    follows = np.array([1.0, 2.0, 3.0])
    found = heads.planted_measures(right, without, follows)
    assert found["at the token"] == 0.5 and found["next 10, without"] == 0.5  # means 3 and 3
    assert found["next 10, with"] == 1.0 and found["rest, without"] == 0.5 and found["rest, with"] == 1.0
    assert found["last token, without"] == 1.0 and found["last token, with"] == 1.0


@pytest.mark.parametrize("steps", [1, 2])
def test_made_problems_have_right_answers(steps):
    rows = problems.made_problems(200, steps, seed=1)
    assert rows == problems.made_problems(200, steps, seed=1) != problems.made_problems(200, steps, seed=2)
    for row in rows:
        found = list(notes.NOTE.finditer(row["answer"]))
        assert len(found) == steps
        assert all(notes.evaluate_note(note[1]) == int(note[2]) for note in found)
        assert grade(row["answer"], gsm8k_label(row["answer"]), "gsm8k")[1]
        numbers = [int(n) for n in notes.numbers_in(row["question"])]
        assert all(
            int(n) in numbers or n == found[0][2] for note in found for n in notes.NUMBER.findall(note[1])
        )


def test_rl_problems_are_different_and_solved_right(tmp_path):
    problems.write_problems(tmp_path)
    questions = []
    for name, n in problems.FILES.items():
        rows = solutions.read_lines(tmp_path / f"{name}.jsonl")
        assert len(rows) == n
        for row in rows:
            equation, claim = row["answer"].split("\n")
            expression, _, value = equation.partition("=")
            assert notes.evaluate_note(expression) == int(value) and claim == f"#### {value}"
        questions += [row["question"] for row in rows]
    assert len(set(questions)) == sum(problems.FILES.values())


@pytest.mark.parametrize("name", real_rl.RL_STAGES)
def test_rl_commands_are_read_in_full(name):
    """Every flag is one of the stage's, and every file it reads is made before it."""
    flags = shlex.split(f"{real_rl.RL_STAGES[name]} {real_rl.CHAT} --out {name}")
    cfg = parse(flags)
    assert unread_flags(flags) == [] and cfg.system == solutions.SYSTEM
    earlier = list(real_rl.RL_STAGES)[: list(real_rl.RL_STAGES).index(name)]
    made = {"", "{model}", "answers.jsonl", *(f"{file}.jsonl" for file in problems.FILES), *earlier}
    assert {cfg.model, cfg.data, cfg.heldout, cfg.reward_model} <= made


def test_the_laptop_recipe_is_part_rl():
    """recipes.md spells the commands of RL_STAGES, whose results the chapter reports."""
    text = (ROOT / "classroom" / "recipes.md").read_text(encoding="utf-8")
    block = text.partition("in an hour\n")[2].split("```")[1].replace("\\\n", " ")
    names = {"rm": "qrm", "reinforce": "reinforce-outcome-0", "ppo": "ppo-qrm-0"}
    no_paths = dict.fromkeys(("model", "data", "heldout", "out", "reward_model"), "") | {"save_every": 0}
    variables, found = {}, []
    for line in block.strip().splitlines():
        line = string.Template(line).substitute(variables)
        if not line.startswith("python"):
            variables |= dict(word.split("=", 1) for word in shlex.split(line))
        elif "--out" in line:
            cfg = parse(shlex.split(line)[2:])
            name = Path(cfg.out).name
            stage = parse(shlex.split(f"{real_rl.RL_STAGES[names.get(name, name)]} {real_rl.CHAT}"))
            no_paths["system"] = ""  # the model's own either way
            assert dataclasses.replace(cfg, **no_paths) == dataclasses.replace(stage, **no_paths)
            found.append(name)
    assert found == ["sft", "pairs.jsonl", "rm", "reinforce", "ppo"]


def test_run_stage_runs_once_and_again_after_a_failure(tmp_path):
    flags = "--stage grade --data answers.jsonl --out graded.jsonl"
    with pytest.raises(BadInput, match="stage one ended with status 2"):
        real_rl.run_stage("one", flags, tmp_path, 1)  # there is no answers.jsonl
    row = {"question": "1+1?", "response": "#### 2", "label": "2"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row))
    failed = json.loads((tmp_path / "runs.json").read_text())["one"]
    real_rl.run_stage("one", flags, tmp_path, 1)
    run = json.loads((tmp_path / "runs.json").read_text())["one"]
    assert not failed["done"] and run["done"] and run["cpu_seconds"] > failed["cpu_seconds"] > 0.1
    assert 0.05 < run["peak_gb"] < 8
    (tmp_path / "graded.jsonl").unlink()
    real_rl.run_stage("one", flags, tmp_path, 1)
    assert not (tmp_path / "graded.jsonl").exists()


def test_first_difference_by_hand(tmp_path):
    pair = {"prompt": "2+5?", "chosen": "7", "rejected": "8!"}
    (tmp_path / "pairs-heldout.jsonl").write_text(json.dumps(pair))
    real_rl.write_answers(tmp_path)
    rows = solutions.read_lines(tmp_path / "answers.jsonl")
    assert [(row["prompt"], row["response"]) for row in rows] == [("2+5?", "7"), ("2+5?", "8!")]
    right = {"ids": [2, 9, 7], "tokens": ["2", "=", "7"], "scores": [1.0, 0.5, 2.0]}
    wrong = {"ids": [2, 9, 8, 1], "tokens": ["2", "=", "8", "!"], "scores": [1.0, 0.5, -3.0, 9.0]}
    found = real_rl.first_difference(right, wrong)
    assert found == ("result", {"at the token": 1.0, "from there on": 0.0})  # 2 against -3 and 9
    other = wrong | {"ids": [3, 9, 8, 1]}
    assert real_rl.first_difference(right, other)[0] == "equation"
    assert real_rl.first_difference(right, other)[1]["at the token"] == 0.5


def test_sign_of():
    answers = ("17-3=14\n#### 14", "#### 14", "- 17*3=51", "a+b")
    assert [real_rl.sign_of(answer) for answer in answers] == ["-", "none", "*", "none"]


def test_print_rl_by_hand(tmp_path, capsys):
    runs = {
        name: {"cpu_seconds": 5.0, "seconds": 20.0, "peak_gb": 1.5, "done": name == "ppo"}
        for name in ("ppo", "eval sft")
    }
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    (tmp_path / "ppo").mkdir()
    rows = [{"tokens": 60, "reward": 0.5}, {"tokens": 40, "reward": 0.75, "pass@1": 0.2}]
    (tmp_path / "ppo" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    same = {"prompt": "Tom buys", "tokens": ["=", "2"]}
    scored = [same | {"ids": [2, i], "scores": [1.0, -i]} for i in (8, 9)]
    (tmp_path / "scores.jsonl").write_text("\n".join(map(json.dumps, scored)))
    real_rl.print_rl(tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ppo", "5", "20", "1.50", "20"] in lines
    assert ["eval", "sft", "5", "20", "1.50", "not", "finished"] in lines
    found = "result differs, 1 pairs, at the token 1.000 (1.000 to 1.000)"
    assert found.split(" ") in lines
    assert ["ppo", "0.200", "+-", "0.028", "0.500", "0.750"] in lines  # sqrt(.2 x .8 / 200) = .0283


def test_the_gap_of_two_means_and_its_interval():
    """Of one cluster alone nothing varies; a cluster that is drawn brings its values of both lists."""
    ours = [(1.0, 7), (0.0, 7)]
    assert solutions.clustered_gap(ours, [(0.25, 7)]) == "0.250 (0.250 to 0.250)"
    paired = [(value + 0.5, name) for name, value in enumerate([0.0, 3.0, 8.0])]
    assert solutions.clustered_gap(paired, [(value - 0.5, name) for value, name in paired]) == (
        "0.500 (0.500 to 0.500)"
    )
    apart = solutions.clustered_gap([(0.0, 1), (1.0, 2)], [(0.5, name) for name in (1, 2)])
    assert apart == "0.000 (-0.500 to 0.500)"


def test_balanced_pairs_by_hand():
    """Author 0 beats 1 three times and loses once; 2 beats 0 once and never loses."""
    authors = np.array([0, 1, 0, 1, 0, 1, 1, 0, 2, 0])
    pairs = np.array([[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]])
    assert adapters.balanced_pairs(pairs, authors).tolist() == [[0, 1], [6, 7]]


def made_solutions(n=60):
    """n questions with answers "<<q+1=..>>" of four authors, of whom two are right, by turns."""
    out = []
    for q in range(n):
        correct = [(q + slot // (1 + q % 2)) % 2 == 0 for slot in range(4)]
        texts = [
            f"<<{q}+1={q + 1 + 50 * (not right)}>>\n#### {q + 1 + 50 * (not right)}" for right in correct
        ]
        question = f"What is {q} and 1?"
        out.append({"question": question, "truth": texts[0], "answers": texts, "correct": correct})
    return out


@pytest.mark.parametrize("fold", [0, 1])
def test_adapters_train_on_other_folds_than_they_are_read_on(tmp_path, fold):
    made = made_solutions()
    adapters.write_pairs(made, fold, tmp_path / "pairs.jsonl")
    adapters.write_answers(made, fold, tmp_path / "answers.jsonl")
    pairs = solutions.read_lines(tmp_path / "pairs.jsonl")
    answers = solutions.read_lines(tmp_path / "answers.jsonl")
    assert {solutions.fold_of(row["prompt"]) for row in pairs} == {0, 1, 2, 3, 4} - {fold}
    assert {solutions.fold_of(row["prompt"]) for row in answers} == {fold}
    authors = Counter()
    for pair in pairs:
        row = next(row for row in made if row["question"] == pair["prompt"])
        right, wrong = row["answers"].index(pair["chosen"]), row["answers"].index(pair["rejected"])
        assert row["correct"][right] and not row["correct"][wrong]
    for row in answers:
        group, number, last = row["id"].split()
        if group == "answer":
            assert made[int(number)]["answers"][int(last)] == row["response"]
            authors[last] += 1
    assert len(set(authors.values())) == 1 and len(authors) == 4


def test_transfer_of_adapters_is_counted_apart_for_questions_of_the_training(tmp_path, capsys):
    pairs = [(f"What is {q} and 1?", [f"chosen {q}", f"rejected {q}"]) for q in range(40)]
    met = np.array([q % 3 == 0 for q in range(40)])
    adapters.write_transfer(pairs, tmp_path / "transfer.jsonl")
    rows = solutions.read_lines(tmp_path / "transfer.jsonl")
    for row in rows:
        _, number, kind = row["id"].split()
        assert row["prompt"] == pairs[int(number)][0] and row["response"].split() == [kind, number]
        better = (kind == "chosen") == met[int(number)]  # right on questions that were met, wrong elsewhere
        row["scores"] = [9.0, 1.0 + better] if better else [0.0, 1.0]
    adapters.write_rows(tmp_path / "scores.jsonl", rows)
    adapters.print_transfer("verifier", "verifier", tmp_path / "scores.jsonl", pairs, met)
    lines = capsys.readouterr().out.splitlines()
    n = sum(met)
    assert [line.split(",")[1].split()[0] for line in lines] == ["mean", "last"]
    for line in lines:
        assert f"of 40   1.000 (1.000 to 1.000) of {n}   0.000 (0.000 to 0.000) of {40 - n}" in line
        assert f"{n / 40:.3f} (" in line


def test_scores_of_adapters_go_to_their_answers(tmp_path):
    made = made_solutions(3)
    rows = [
        {"id": f"answer {row} {slot}", "ids": [row, slot], "scores": [10.0 * row, float(slot)]}
        for row in (2, 0)
        for slot in range(4)
    ]
    planted = {"right": ([1, 2, 3, 4], [0.0, 5.0, 1.0, 1.0]), "with": ([1, 9, 3, 4], [0.0, 6.0, 0.0, 0.0])}
    planted["without"] = ([1, 9, 3, 4], [0.0, 4.0, 1.0, 1.0])
    for kind, (ids, scores) in planted.items():
        rows.append({"id": f"planted 0 {kind}", "ids": ids, "scores": scores})
    (tmp_path / "scores.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answers, labels, scores, planted = adapters.read_scores(tmp_path / "scores.jsonl", made)
    assert answers.rows.tolist() == [2] * 4 + [0] * 4 and answers.slots.tolist() == [0, 1, 2, 3] * 2
    assert scores[answers.tokens(1)].tolist() == [20.0, 1.0]
    assert labels.correct.tolist() == made[2]["correct"] + made[0]["correct"]
    assert adapters.read_answers("orm", scores, answers)["last"].tolist() == [0.0, 1.0, 2.0, 3.0] * 2
    assert adapters.read_answers("qrm", scores, answers)["mean"].tolist()[:2] == [10.0, 10.5]
    found = adapters.planted_table(planted)
    assert found["at the token"] == [1.0]  # 5 against 4
    assert found["next 10, with"] == [1.0] and found["next 10, without"] == [0.5]


@pytest.mark.parametrize("kind, rate", adapters.RUNS.values())
def test_commands_of_adapters_are_read_in_full(kind, rate):
    flags = shlex.split(f"{adapters.TRAIN} --reward {kind} --lr {rate} {real_rl.CHAT} --out {kind}")
    assert unread_flags(flags) == [] and parse(flags).lora_rank == 16


def test_residuals_are_those_of_the_model(monkeypatch):
    """Against the model's own at_actions and token_logprobs on padded rows."""
    monkeypatch.setattr(heads, "LAYERS", (1, 2))
    policy = random_model(LanguageModel, small_config())
    groups = [([1, 2, 3], [[4, 5], [6, 7, 8]]), ([9, 10], [[11]])]
    kept, logprobs, actions = heads.residuals(policy, groups)
    assert actions.tolist() == [4, 5, 6, 7, 8, 11]
    ids = torch.tensor([[1, 2, 3, 4, 5, 0], [1, 2, 3, 6, 7, 8], [9, 10, 11, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]).bool()
    with torch.no_grad():
        x = at_actions(policy, ids, mask)
        expected = token_logprobs(policy, ids, mask)[0][mask]
    near(logprobs, expected, 1e-4)
    near(kept[2].float(), x / x.square().mean(-1, keepdim=True).sqrt(), 2e-3)
    assert kept[1].shape == kept[2].shape and not torch.equal(kept[1], kept[2])


def test_hidden_states_resume_and_load(tmp_path, monkeypatch):
    """Files are made in order, an interrupted run goes on, and load_hidden puts answers where they belong."""
    calls = []

    def made_residuals(policy, groups):
        calls.append(groups)
        ids = torch.tensor([i for _, answers in groups for answer in answers for i in answer])
        return {n: ids[:, None].half() * torch.ones(2).half() for n in heads.LAYERS}, -ids.float(), ids

    tokenizer = SimpleNamespace(
        encode_prompt=lambda messages: [0, len(messages[-1]["content"])],
        encode_response=lambda text: [ord(c) for c in text],
    )
    monkeypatch.setattr(heads, "residuals", made_residuals)
    monkeypatch.setattr(Tokenizer, "load", lambda *args: tokenizer)
    monkeypatch.setattr(heads, "load_model", lambda *args: None)
    questions = [("q", ["ab", "c"]), ("qq", ["def", "g"]), ("qqq", ["h", "ij"])]
    heads.make_hidden("", questions[:1], tmp_path, size=1)
    heads.make_hidden("", questions, tmp_path, size=1)
    assert [group[0][0] for group in calls] == [[0, 1], [0, 2], [0, 3]]  # nothing twice
    answers = heads.load_hidden(tmp_path)
    assert answers.rows.tolist() == [0, 0, 1, 1, 2, 2] and answers.slots.tolist() == [0, 1] * 3
    assert "".join(map(chr, answers.ids[answers.tokens(2)].tolist())) == "def"
    assert answers.last(answers.logprobs).tolist() == [-ord(c) for c in "bcfghj"]


def test_picture_is_svg_with_every_token():
    rows = [(["3", "<", "\n", "x" * 99], [0.0, -5.0, 5.0, 1.0], {1})]
    root = ElementTree.fromstring(heads.picture("a & b", [("Q-RM", rows)]))
    boxes = list(root.iter("{http://www.w3.org/2000/svg}rect"))[1:]
    assert [box.get("fill") for box in boxes] == ["#ffffff", "#e8833a", "#4a90d9", "#a4c8ec"]
    heights = [float(box.get("y")) for box in boxes]
    assert heights[0] == heights[1] == heights[2] < heights[3]  # the line ends at the newline
    assert sum("underline" in str(e.attrib) for e in root.iter("{http://www.w3.org/2000/svg}text")) == 1


def test_part_that_lacks_its_input_says_so(tmp_path):
    with pytest.raises(SystemExit, match="no such file"):
        real.main(["--model", "x", "--data", str(tmp_path), "--work", str(tmp_path / "w"), "heads"])


MODEL = Path(os.environ.get("SMOLLM2", ROOT / "runs" / "SmolLM2-135M-Instruct"))


@pytest.mark.skipif(
    not (MODEL / "model.safetensors").exists(), reason="needs SmolLM2-135M-Instruct (see real.md)"
)
def test_real_weights_know_some_arithmetic():
    """The real model prefers the right sum to a wrong one: log pi of the digit after "7+5=1"."""
    tokenizer = Tokenizer.load(MODEL, "chatml")
    policy = load_model(LanguageModel, MODEL, Grid(), torch.float32)
    prompt = solutions.prompt_ids(tokenizer, "What is 7+5?")
    answers = [tokenizer.encode_response(f"7+5=1{digit}") for digit in "2379"]
    _, logprobs, actions = heads.residuals(policy, [(prompt, answers)])
    values = logprobs.view(4, -1)[:, -2]  # the last digit; after it comes the stop token
    assert actions.view(4, -1)[:, -2].unique().numel() == 4 and values.argmax() == 0
