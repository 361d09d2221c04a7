"""bench.py at tiny sizes: it runs, and its figures are what they say."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import near

from classroom import bench

MIB = 2**20


def test_bench_prints_the_machine_a_table_and_one_json_line_a_figure(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    bench.main(["--rounds", "2", "--device", "cpu", "--sizes", "2x8x16,4x8x16", "--prompts", "8"])
    lines = capsys.readouterr().out.split("\n")
    assert f"torch {torch.__version__}" in lines[0] and "thread" in lines[0]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["figure"] for row in found] == ["head_and_loss"] * 4 + ["rm_step", "generate"]
    assert [(row["size"], row["dtype"]) for row in found[:4]] == [(size, t) for size in ([2, 8, 16], [4, 8, 16]) for t in ("fp32", "bf16")]
    for row in found:
        for value in (v for v in row.values() if isinstance(v, dict)):
            assert 0 < value["low"] <= value["median"] <= value["high"]
    assert any("fused ms" in line for line in lines) and sum("tokens/s" in line for line in lines) == 2


def test_both_ways_give_the_same_gradient():
    """What is timed is the same work: the same gradient of the same input."""
    grads = []
    for way in ("fused", "plain"):
        torch.manual_seed(0)  # of the head
        grads.append(bench.head_and_loss(way, (4, 6, 8), "fp32", torch.device("cpu"))())
    for fused, plain in zip(*grads, strict=True):
        assert plain.abs().max() > 0
        near(fused, plain)


def test_extra_memory_is_counted():
    cpu = torch.device("cpu")

    def two_at_once_of_three():
        x = torch.ones(MIB)  # 4 MiB
        y = x + 1
        del x
        return y * 2

    assert bench.extra_memory(two_at_once_of_three, cpu) / MIB == pytest.approx(8, abs=0.01)
    fused, plain = (bench.extra_memory(bench.head_and_loss(way, (8, 512, 256), "fp32", cpu), cpu) / MIB for way in ("fused", "plain"))
    assert fused == pytest.approx(4, abs=0.2) and plain > 3 * fused  # the gradient of x is 4 MiB, and little else is kept


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--sizes", "3x4x5"], ["--sizes", "2x4"], ["--device", "tpu"]])
def test_wrong_words(words, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(words)
    assert end.value.code == 2 and "expected" in capsys.readouterr().err or "tpu" in words


def test_it_runs_as_a_script():
    script = Path(__file__).parents[1] / "classroom" / "bench.py"
    result = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--rounds" in result.stdout
