"""classroom/credit.py: Monte-Carlo Q, the correlations, and the scores that know nothing."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model

from data import Example, arith_rows, arith_tokenizer
from model import LanguageModel, ModelConfig, ScalarModel, save_model

sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))
import credit  # noqa: E402


def test_q_is_the_share_of_right_continuations(monkeypatch):
    """A sampler that goes on as the solution does, but from three tokens on every other answer ends wrong.

    A finished answer is graded without sampling."""
    tokenizer = arith_tokenizer()
    rows = [row | {"prompt_ids": tokenizer.encode_prompt(row["prompt"])} for row in arith_rows("test", 2, 0)]
    wrong_end = tokenizer.encode_response(" 0")[0]
    solutions = [tokenizer.encode_response(row["solution"]) for row in rows]
    prompts = {tuple(row["prompt_ids"]): solution for row, solution in zip(rows, solutions)}

    def fake_generate(policy, prefixes, max_new_tokens, stop_ids, temperature, seed):
        out = []
        for j, ids in enumerate(prefixes):
            n = next(n for n in range(len(ids)) if tuple(ids[:n]) in prompts)
            solution = prompts[tuple(ids[:n])]
            end = [wrong_end, solution[-1]] if len(ids) - n == 3 and j % 2 else solution[-2:]
            out.append((solution[:-2] + end)[len(ids) - n :])
        return out, None

    monkeypatch.setattr(credit, "generate", fake_generate)
    prefixes = []
    for i, (row, solution) in enumerate(zip(rows, solutions)):
        for t in range(len(solution)):
            prefixes.append(credit.Prefix(i, t, row["prompt_ids"] + solution[: t + 1]))
    wrong = [*solutions[0][:-2], wrong_end, solutions[0][-1]]
    prefixes.append(credit.Prefix(0, len(wrong) - 1, rows[0]["prompt_ids"] + wrong))
    results = credit.rollouts_right(None, tokenizer, rows, prefixes, 4, 64, 0, chunk=8)
    for prefix, right in zip(prefixes[:-1], results):
        assert right == ([1, 0, 1, 0] if prefix.place == 2 else [1, 1, 1, 1])
    assert "0" not in (rows[0]["label"], rows[1]["label"]) and results[-1] == [0, 0, 0, 0]


def test_an_answer_that_was_cut_off_is_wrong():
    tokenizer = arith_tokenizer()
    row = arith_rows("test", 1, 0)[0]
    ids = tokenizer.encode_response(row["solution"])
    assert credit.is_right(tokenizer, row, ids) and not credit.is_right(tokenizer, row, ids[:-1])


def test_correlations_against_torch():
    rng = torch.Generator().manual_seed(0)
    z, q = torch.randn(2, 50, generator=rng, dtype=torch.float64)
    assert credit.corr(z.tolist(), q.tolist()) == pytest.approx(
        torch.corrcoef(torch.stack([z, q]))[0, 1].item()
    )
    assert credit.corr([1.0, 1.0], [0.0, 1.0]) == 0.0
    both = list(zip(z.tolist(), q.tolist()))
    turned = [(-a, -b) if i % 2 else (a, b) for i, (a, b) in enumerate(both)]
    assert credit.cosine(both) == pytest.approx(
        credit.cosine(turned)
    )  # the order of two actions is arbitrary
    assert credit.cosine(both) == pytest.approx(torch.cosine_similarity(z, q, dim=0).item())
    shifted = [(a + 5, b - 7) for a, b in both]
    assert credit.paired_corr(credit.centred_points(shifted)) == pytest.approx(credit.paired_corr(both))


def test_the_ceiling_is_the_correlation_of_the_truth_with_its_estimate():
    rng = random.Random(0)
    truth = [rng.random() for _ in range(4000)]
    results = [[int(rng.random() < p) for _ in range(10)] for p in truth]
    real = credit.corr(truth, [sum(r) / 10 for r in results])
    assert credit.ceiling(results) == pytest.approx(real, abs=0.01) and real < 0.95


def test_the_interval_resamples_prompts_not_tokens():
    """Ten equal tokens a prompt carry the information of one: the interval is that of the prompts."""
    rng = random.Random(0)
    points = [(rng.gauss(0, 1), rng.gauss(0, 1)) for _ in range(40)]
    one = credit.cluster_interval([[p] for p in points], credit.paired_corr)
    ten = credit.cluster_interval([[p] * 10 for p in points], credit.paired_corr)
    naive = credit.cluster_interval([[p] for p in points for _ in range(10)], credit.paired_corr)
    assert one == pytest.approx(ten) and naive[1] - naive[0] < 0.6 * (one[1] - one[0])


def test_same_index_auc_by_hand():
    """Only operators of right answers at the same index are compared; ties count half."""
    plus, minus, digit = 1, 2, 9
    pairs = [
        {"chosen": Example([0], [digit, plus]), "rejected": Example([0], [digit, minus]), "error": 1},
        {"chosen": Example([0], [digit, minus]), "rejected": Example([0], [digit, digit]), "error": 1},
    ]
    scored = {
        "chosen": [torch.tensor([5.0, 3.0]), torch.tensor([5.0, 1.0])],
        "rejected": [torch.tensor([0.0, 1.0]), torch.tensor([0.0, -9.0])],
    }
    assert (
        credit.same_index_auc(scored, pairs, {plus, minus}) == 0.75
    )  # 1 < 3 and 1 = 1; the digit is left out


def test_command(tmp_path, capsys, monkeypatch):
    """From a run directory to the tables and credit.json; the two that know nothing are what they say."""
    tokenizer = arith_tokenizer()
    sizes = ModelConfig(tokenizer.vocab_size, 16, 32, 1, 2, 1, 8)
    for name, kind, reward in (
        ("sft", LanguageModel, None),
        ("rm", ScalarModel, "qrm"),
        ("rm-orm", ScalarModel, "orm"),
    ):
        (tmp_path / name).mkdir()
        save_model(random_model(kind, sizes), tmp_path / name)
        tokenizer.save(tmp_path / name)
        (tmp_path / name / "run.json").write_text(json.dumps({"reward": reward} if reward else {}))
    rows = [row for row in arith_rows("test", 60, 0) if row["response"] != row["solution"]]
    with open(tmp_path / "pairs-heldout.jsonl", "w") as f:
        for row in rows:
            pair = {"prompt": row["prompt"], "chosen": row["solution"], "rejected": row["response"]}
            f.write(json.dumps(pair) + "\n")
    monkeypatch.setattr(credit, "LIKELY", 0.003)  # random weights: every state is open
    credit.main([str(tmp_path), "--answers", "2", "--rollouts", "2"])
    if importlib.util.find_spec("matplotlib"):
        calibration = json.loads((tmp_path / "credit.json").read_text())["monte_carlo"]
        credit.draw_calibration(calibration, 0.5, tmp_path / "calibration.png")
        assert (tmp_path / "calibration.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "credit.json").read_text())
    assert report["sampled"]["open states"] > 0 and report["sampled"]["right"] == 0
    assert set(report["monte_carlo"]) == {"qrm", "orm", "log pi of sft"}
    assert set(report["first_error"]) == {"qrm", "orm", "log pi of sft", "minus the index", "not an operator"}
    index = report["first_error"]["minus the index"]
    assert index["auc"] == 1 and index["same-index auc"] == 0.5 and index["choice"] == 0.5
    assert (
        0.8 < report["first_error"]["not an operator"]["auc"] < 0.95
    )  # every first error is an operator here
    assert "minus the index" in capsys.readouterr().out
