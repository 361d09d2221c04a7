"""The study runs from nothing to its tables and figure, and starts nothing twice (tiny settings: no result is read)."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "classroom"))
from study import best_lr, reach, reached  # noqa: E402


def study(out, *flags):
    return subprocess.run([sys.executable, ROOT / "classroom" / "study.py", "--quick", "--out", out, *flags], cwd=ROOT, capture_output=True, text=True)


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
    assert reached(curves, 0.3) == "512; 256 (256 to >512), 1/2"


def test_best_learning_rate():
    assert best_lr({1e-4: 0.5, 3e-5: 0.5, 3e-4: 0.4}) == 3e-5 and best_lr({1e-4: 0.5, 3e-5: None}) is None
