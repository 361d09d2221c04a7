"""The study runs from nothing to its tables and figure and starts nothing twice (tiny settings)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import near, random_model

from data import arith_tokenizer
from model import LanguageModel, ModelConfig, ScalarModel, save_model
from qrm import token_scores

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "classroom"))
from study import METRICS, best_lr, draw_curves, reach, reached, scores_one_late  # noqa: E402


def study(out, *flags):
    return subprocess.run(
        [sys.executable, ROOT / "classroom" / "study.py", "--quick", "--out", out, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_quick_study_and_restart(tmp_path):
    first = study(tmp_path)
    assert first.returncode == 0 and "failed" not in first.stderr + first.stdout, first.stderr + first.stdout
    assert "not run" not in (tmp_path / "study.md").read_text().replace("; 0 not run", "")
    report = json.loads((tmp_path / "study.json").read_text())
    assert report["missing"] == [] and len(report["tables"]) == 5 and len(report["curves"]) == 4 + 2
    assert (tmp_path / "study.png").stat().st_size > 10_000
    runs = (tmp_path / "runs.jsonl").read_text()
    with open(tmp_path / "runs.jsonl", "a") as f:
        f.write('{"job": {"cut of')  # a crash in the middle of a line
    again = study(tmp_path, "--minutes", "0")  # no time: nothing may run
    assert again.returncode == 0 and (tmp_path / "runs.jsonl").read_text() == runs
    assert json.loads((tmp_path / "study.json").read_text()) == report


def test_trajectories_to_a_target():
    curve = [(0, 0.2), (512, 0.4), (1024, 0.3)]
    assert reach(curve, 0.2) == 0 and reach(curve, 0.3) == pytest.approx(256) and reach(curve, 0.41) is None
    curves = {0: [[0, 0.2], [512, 0.4]], 1: [[0, 0.2], [512, 0.2]]}  # mean: 0.2, 0.3
    assert reached(curves, 0.3) == "512; >512 (256 to >512), 1/2"


def test_best_learning_rate():
    assert best_lr({1e-4: 0.5, 3e-5: 0.5, 3e-4: 0.4}) == 3e-5 and best_lr({1e-4: 0.5, 3e-5: None}) is None


def test_curves_are_runs_with_the_mistake_in_them(tmp_path):
    """All start from one rollout, at the named rate and KL weight; late rewards are the neighbours'
    scores."""
    tokenizer, sizes = arith_tokenizer(), ModelConfig(arith_tokenizer().vocab_size, 16, 32, 1, 2, 1, 8)
    for name, kind in (("sft", LanguageModel), ("rm", ScalarModel)):
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        save_model(random_model(kind, sizes), tmp_path / name)
    flags = dict(steps=1, batch_size=8, minibatch=8, limit=4, max_new_tokens=8, eval_every=1)
    assert draw_curves(tmp_path / "out", tmp_path, **flags) == tmp_path / "out" / "curves.png"
    found = {
        path.name: (
            json.loads((path / "metrics.jsonl").read_text()),
            json.loads((path / "run.json").read_text())["config"],
        )
        for path in (tmp_path / "out").iterdir()
        if path.is_dir()
    }
    rows = {name: row for name, (row, _) in found.items()}
    assert {name: (row["lr"], config["kl_coef"]) for name, (row, config) in found.items()} == {
        "healthy": (1e-4, 0.5),
        "learning-rate-x-10": (1e-3, 0.5),
        "no-KL-penalty": (1e-4, 0.0),
        "rewards-one-token-late": (1e-4, 0.5),
    }
    assert (
        rows["healthy"]["reward"]
        == rows["learning-rate-x-10"]["reward"]
        == rows["no-KL-penalty"]["reward"]
        != rows["rewards-one-token-late"]["reward"]
    )
    assert (
        set(METRICS) <= rows["healthy"].keys() and (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    )
    model, ids, mask = (
        random_model(ScalarModel, sizes),
        torch.arange(12)[None],
        torch.tensor([[False] * 3 + [True] * 8]),
    )
    near(scores_one_late(model, ids, mask)[:, 3:], token_scores(model, ids)[:, 2:-1])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("metrics.jsonl")}
    draw_curves(tmp_path / "out", tmp_path, **flags)
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("metrics.jsonl")
    }  # what is there is kept
