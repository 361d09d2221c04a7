"""classroom/granularity.py: each kind of job once with tiny settings; an arm, tuning and tables by hand."""

import json
import sys
from pathlib import Path

import pytest
import torch

import train
from qrm import Reward, at_every_token

sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))
import granularity as g  # noqa: E402

RL = dict(steps=1, batch_size=8, minibatch=4, kl_coef=0.2, limit=4, max_new_tokens=12, task="arith")
TINY = {
    "sft": dict(steps=2, lr=4e-3, batch_size=4, warmup=1),
    "pairs": dict(limit=3000, k=4, max_new_tokens=40, task="arith"),
    "rm": dict(steps=2, lr=2e-3, batch_size=4, task="arith"),
    "ppo": RL | dict(critic_lr=5e-4, ppo_epochs=1),
    "eval": dict(limit=4, k=2, max_new_tokens=12, task="arith"),
}


@pytest.fixture
def tiny(monkeypatch):
    """Settings of a few seconds; the pairs are made up: a hardly trained policy has no right answers."""
    rows = g.arith_rows
    few = {16_000: 20, 3000: 6, 600: 6, 8192: 24, 300: 4}
    monkeypatch.setattr(g, "arith_rows", lambda split, n, seed, task: rows(split, few[n], seed, task))
    monkeypatch.setattr(g, "ARITH", TINY)
    monkeypatch.setattr(g, "HELD_OUT", 300)
    call = g.call

    def call_without_pairs(stage, **flags):
        if stage != "pairs":
            return call(stage, **flags | ({"limit": 4} if stage == "ppo" else {}))
        lines = []
        for row in map(json.loads, Path(flags["data"]).read_text().splitlines()):
            wrong = row["response"][:-1] + str((int(row["label"]) + 1) % 10)
            lines.append(
                json.dumps({"prompt": row["prompt"], "chosen": row["response"], "rejected": wrong}) + "\n"
            )
        Path(flags["out"]).write_text("".join(lines))

    monkeypatch.setattr(g, "call", call_without_pairs)


@pytest.mark.slow
def test_every_kind_of_job(tiny, tmp_path):
    start, seconds = g.perform(tmp_path, g.start_job(0))
    assert 0 <= start["pass@1"] <= 1 and seconds > 0
    for reward in g.REWARD_MODELS:
        found, _ = g.perform(tmp_path, g.rm_job(0, reward, 1e-3))
        assert {"pair_accuracy", "first_error_choice", "first_error_hit"} <= found.keys()
    for arm, (scorer, _) in g.ARMS.items():
        rm_lr = 1e-3 if scorer in g.REWARD_MODELS else None
        curve, _ = g.perform(tmp_path, g.arm_job(0, arm, rm_lr, 1e-4, 0.3, 2))
        assert [point[0] for point in curve] == [8, 16] and all(0 <= point[1] <= 1 for point in curve)
        assert not list(tmp_path.glob("seed0/rl-*"))


def test_one_number_an_answer():
    """mean Z at the last token and 0 elsewhere; every other reading is the reward as it was."""
    scores = torch.tensor([[9.0, 1.0, 2.0, 6.0, 9.0], [9.0, 4.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    reward = Reward(lambda ids, mask: scores * mask, at_every_token, is_q=True)
    found = g.read_as("mean", lambda *_: reward)(None, None, None, None)
    assert found.rewards(None, mask).tolist() == [[0, 0, 0, 3, 0], [0, 4, 0, 0, 0]]
    assert found.speaks(None, mask).tolist() == [
        [False, False, False, True, False],
        [False, True, False, False, False],
    ]
    assert not found.is_q
    for reading in ("tokens", "last", "group"):
        assert g.read_as(reading, lambda *_: reward)(None, None, None, None) is reward
    assert callable(train.reward_of_run)


def test_reach_and_bootstrap():
    curve = [[0, 0.2], [512, 0.4], [1024, 0.3]]
    assert (
        g.reach(curve, 0.3) == pytest.approx(256) and g.reach(curve, 0.2) == 0 and g.reach(curve, 0.5) is None
    )
    low, high = g.bootstrap([1.0, 1.0, 1.0])
    assert low == high == 1
    values = [0.0, 0.1, 0.5, 0.9, 0.4, 0.3, 0.7, 0.2]
    low, high = g.bootstrap(values)
    error = torch.tensor(values).std(correction=0).item() / 8**0.5
    mean = sum(values) / 8
    assert low == pytest.approx(mean - 1.96 * error, abs=0.03) and high == pytest.approx(
        mean + 1.96 * error, abs=0.03
    )


class Pretended(g.Runs):
    """Results from a function of the job, nothing is run."""

    def __init__(self, f):
        self.f, self.asked = f, []

    def run(self, jobs):
        self.asked += jobs

    def result(self, job):
        return self.f(job)


def test_tuning_takes_the_best_rate_and_then_the_best_coefficient():
    def curve(job):
        if job["kind"] == "rm":
            return {"pair_accuracy": 0.9 - abs(job["lr"] - 2e-3)}
        height = 0.5 - 100 * abs(job["lr"] - 3e-4) - 0.1 * abs(job["kl_coef"] - 1.0)
        return [[256, 1.0, 0.0], [512, height, 0.0]]  # the first half of a run does not count

    runs = Pretended(curve)
    rm_lrs = g.tuned_rms(runs)
    assert rm_lrs == dict.fromkeys(g.REWARD_MODELS, 2e-3)
    chosen = g.tuned_arms(runs, rm_lrs)
    assert chosen == dict.fromkeys(g.ARMS, (3e-4, 1.0))
    arms = [json.dumps(job) for job in runs.asked if job["kind"] == "arm"]
    assert len(set(arms)) == len(g.ARMS) * 5 * len(g.TUNING_SEEDS)  # the same care for every arm
    assert not {job["seed"] for job in runs.asked} & set(range(8))  # test seeds are not looked at


def test_tables_pair_the_seeds_and_report_only_complete_ones(tmp_path):
    chosen = dict.fromkeys(g.ARMS, (3e-4, 0.3))
    rm_lrs = dict.fromkeys(g.REWARD_MODELS, 2e-3)

    def result(job):
        if job["kind"] == "start":
            return {"pass@1": 0.1}
        if job["kind"] == "rm" or (job["arm"] == "qrm answer" and job["seed"] == 2):
            return None
        end = 0.6 + 0.1 * job["seed"] + (0.2 if job["arm"] == "verifier tokens" else 0.0)
        return [[3072, end, 0.0]]

    curves = g.test_curves(Pretended(result), rm_lrs, chosen, range(3))
    assert all(list(by_seed) == [0, 1] for by_seed in curves.values())
    rows = {row[0]: row for row in g.paired_rows(curves, 6144)}
    assert rows["verifier tokens"][1] == "0.20 [0.20, 0.20]" and rows["qrm answer"][1] == "0.00 [0.00, 0.00]"
    table = {row[0]: row for row in g.arm_rows(curves, chosen, 6144)}
    assert table["qrm tokens"][4] == "0.65 [0.60, 0.70]" and table["qrm tokens"][-1].endswith("0/2")
    assert table["qrm tokens"][-3] == "2253 [2048, 2458], 2/2"  # .5: (.5 - .1) / (.6 - .1) of 3,072 and / .6
    rows = g.readme_rows(curves)
    assert rows[0] == "| long | SFT, before RL |  | .10 (.10 to .10) | 2 |"
    assert "| long | PPO | **Q-RM, every token** | .65 (.60 to .70) | 2 |" in rows
    assert "| long | PPO | exact token rewards | .65 (.60 to .70) | 2 |" in rows
    g.draw(tmp_path / "granularity.png", curves)
    assert (tmp_path / "granularity.png").stat().st_size > 10_000


def test_a_cut_off_line_is_dropped_and_nothing_runs_twice(tmp_path):
    job = g.start_job(0)
    (tmp_path / "runs.jsonl").write_text(
        json.dumps({"job": job, "result": 1, "seconds": 2}) + '\n{"job": {"ki'
    )
    runs = g.Runs(tmp_path)
    assert runs.result(job) == 1 and runs.result(g.start_job(1)) is None
    runs.run([job, g.start_job(1)])  # no minutes: nothing starts
    assert (tmp_path / "runs.jsonl").read_text().count("\n") == 1
