"""classroom/probes.py: shaping by slow loops, the tables by hand, and every part once with tiny settings."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from data import arith_rows
from qrm import qrm_loss

sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))
import granularity  # noqa: E402
import probes  # noqa: E402

TINY = {
    "sft": dict(steps=2, lr=4e-3, batch_size=4, warmup=1),
    "rm": dict(steps=2, lr=2e-3, batch_size=4, task="arith"),
    "ppo": dict(
        steps=2,
        batch_size=8,
        minibatch=4,
        ppo_epochs=1,
        limit=4,
        max_new_tokens=12,
        eval_every=1,
        task="arith",
    ),
    "eval": dict(limit=4, k=2, max_new_tokens=12, task="arith"),
}


def answers(lengths, vocabulary=7):
    """ids (B, T+1) and response_mask (B, T) of random answers to prompts of two tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (len(lengths), 2 + max(lengths)), generator=generator)
    place = torch.arange(1 + max(lengths))
    return ids, (place >= 1) & (place <= torch.tensor(lengths)[:, None])


def test_shaping_is_the_difference_of_two_potentials():
    ids, mask = answers([4, 2, 1])
    potential = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    found = probes.shaping(ids, mask, potential)
    for row, row_ids, n in zip(found, ids, [4, 2, 1]):
        phi = [0.0] + [potential[k, row_ids[1 + k]].item() for k in range(1, n)] + [0.0]  # of n + 1 states
        expected = [0.0] + [phi[k + 1] - phi[k] for k in range(n)]
        assert row.tolist() == pytest.approx(expected + [0.0] * (4 - n), abs=1e-6)
    assert found.abs().sum() > 1  # and it does something


@pytest.mark.parametrize("lengths", [[4, 4, 4, 4], [4, 2, 3, 1]])
def test_shaping_leaves_the_loss_and_changes_the_order_of_actions(lengths):
    ids, mask = answers(lengths)
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(mask.shape, generator=generator)
    change = probes.shaping(ids, mask, 10 * torch.randn(5, 7, generator=generator))
    before, after = (qrm_loss(x, mask, 0.2, 2.0)[0].item() for x in (z, z + change))
    assert after == pytest.approx(before, rel=1e-5)
    assert qrm_loss(z + change.abs(), mask, 0.2, 2.0)[0].item() != pytest.approx(before, rel=1e-3)


def test_a_table_of_curves_by_hand():
    base = [[[0, 0.2], [100, 0.4], [200, 0.8]], [[0, 0.2], [100, 0.2], [200, 0.4]]]
    curves = [[[0, 0.2], [100, 0.6], [200, 0.7]], [[0, 0.2], [100, 0.2], [200, 0.6]]]
    assert probes.curve_cells(curves, base) == [
        ".65 (.60 to .70)",
        ".42 (.33 to .50)",
        ".05 (-0.10 to .20)",
        "125 (75 to 175), 2/2",
        "200 (200 to 200), 1/2",
    ]
    assert probes.curve_cells(base, base)[2:] == ["", "162 (125 to 200), 1/2", "188 (175 to 200), 1/2"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A demo of a few seconds; its pairs are made up, since a hardly trained policy has no right answers."""
    monkeypatch.setattr(granularity, "ARITH", TINY)
    monkeypatch.setattr(probes, "K", 2)
    monkeypatch.setattr(probes, "PROMPTS", 4)
    home = tmp_path / "seed0"
    (home / "data").mkdir(parents=True)
    rows = [{key: row[key] for key in ("prompt", "response", "label")} for row in arith_rows("train", 24, 0)]
    write(home / "data" / "rows.jsonl", rows[4:])
    write(home / "data" / "heldout.jsonl", rows[:4])
    pairs = []
    for row in rows:
        wrong = row["response"][:-1] + str((int(row["label"]) + 1) % 10)
        pairs.append({"prompt": row["prompt"], "chosen": row["response"], "rejected": wrong})
    write(home / "pairs.jsonl", pairs)
    write(home / "pairs-heldout.jsonl", pairs[:4])
    given = {"run_dir": home, "data": home / "data" / "rows.jsonl", "seed": 0}
    granularity.call("sft", **given)
    granularity.call("rm", **given | {"data": home / "pairs.jsonl", "model": home / "sft"})
    models = {"model": home / "sft", "reward_model": home / "rm"}
    granularity.call("ppo", **given, **models, heldout=home / "data" / "heldout.jsonl")
    for copy in ("ppo-orm", "ppo-outcome"):
        shutil.copytree(home / "ppo", home / copy)
    return home


def test_every_part(run, tmp_path, capsys):
    out = tmp_path / "probes"
    arguments = [str(run), "--out", str(out)]
    probes.main(arguments)
    first = capsys.readouterr().out
    probes.main(arguments)
    again = capsys.readouterr().out
    assert again == "".join(line for line in first.splitlines(True) if " s  " not in line)  # nothing is made
    widths = [line.split("|")[1].strip() for line in again.splitlines() if line.startswith("| ")]
    assert {"32", "64", "128", "tokens", "summed", "PPO, graded, minus SFT"} <= set(widths)
    unshaped = probes.ppo_curve(run, out / "again", probes.shaped(run, 0))
    recorded = [row["pass@1"] for row in probes.read_rows(run / "ppo" / "metrics.jsonl")]
    assert [passed for _, passed in unshaped] == recorded
    losses = [probes.read_rows(p / "metrics.jsonl")[-1]["loss"] for p in (run / "ppo", out / "again")]
    shaped_loss = probes.read_rows(out / "seed0" / "shaped-tokens-1" / "metrics.jsonl")[-1]["loss"]
    assert losses[0] == losses[1] != shaped_loss
