"""classroom/partition.py: the terms of Prop. 3.2 by hand, its bound, and the scores of every action."""

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import random_model, small_config

from data import Example
from model import LanguageModel, ScalarModel
from qrm import token_scores
from support.settings import Config

sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))
import partition  # noqa: E402
from partition import compare, model_terms, partition_terms, tree_table, tree_terms  # noqa: E402


def test_terms_by_hand():
    """Z = 0, log 3: phi = 1/4, 3/4; the partition function relative to the largest is 4/3."""
    Z = torch.tensor([[0.0, math.log(3)], [5.0, 5.0]], dtype=torch.float64)
    terms = partition_terms(Z, torch.tensor([0, 1]))
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert terms == pytest.approx(
        {
            "mean Z": 2.5,
            "max Z": (math.log(3) + 5) / 2,
            "Vbar": (math.log(4 / 3) + math.log(2)) / 2,
            "entropy": (entropy + math.log(2)) / 2,
        }
    )
    one_action = partition_terms(torch.tensor([[2.0, -torch.inf]]), torch.tensor([0]))
    assert one_action == {"mean Z": 2.0, "max Z": 2.0, "Vbar": 0.0, "entropy": 0.0}


@pytest.mark.parametrize("kind", ["iid", "terminal"])
def test_prop_32(kind):
    """0 <= Vbar <= entropy of phi, for any Z."""
    for seed in range(5):
        for _, terms in tree_terms(seed, kind):
            assert 0 <= terms["Vbar"] <= terms["entropy"] <= math.log(3)


def test_differences_are_of_the_better_from_the_worse():
    values = (3.0, 0.2), (1.0, 0.5), (2.0, 0.1), (4.0, 0.4)
    terms = [{"mean Z": z, "max Z": z + 1, "Vbar": v} for z, v in values]
    found = compare([(terms[0], terms[1]), (terms[2], terms[3])])
    assert found["mean Z"] == 2.5 and found["mean Z, better minus worse"] == 0
    assert found["mean Z, size of the difference"] == 2
    assert found["Vbar, better minus worse"] == pytest.approx(-0.3)
    assert tree_table("terminal", tables=2)["mean Z, better minus worse"] > 0


@torch.no_grad()
def test_every_action_is_scored_in_its_state(monkeypatch):
    """Against the whole answer scored at once with one token replaced; unlikely actions do not count."""
    cfg = small_config(vocab_size=7)
    reward_model, policy = random_model(ScalarModel, cfg), random_model(LanguageModel, cfg, seed=1)
    example = Example([1, 2], [3, 4])
    scores_of = partial(partition.response_scores, reward_model)
    monkeypatch.setattr(partition, "LIKELY", 0.2)
    found = model_terms(example, scores_of, policy, Config(device="cpu"))
    rows, likely = [], []
    for t in range(2):
        ids = torch.tensor([[1, 2, *example.response_ids[:t], a] for a in range(7)])
        rows.append(token_scores(reward_model, ids)[:, -1])
        logits = policy.logits(policy.model(ids[:1, : 2 + t]))[0, -1]
        likely.append(logits.softmax(-1) >= 0.2)
    Z, likely = torch.stack(rows).double(), torch.stack(likely)
    actions = torch.tensor(example.response_ids)
    assert found["all actions"] == pytest.approx(partition_terms(Z, actions), rel=1e-5)
    likely[range(2), actions] = True
    assert 2 < likely.sum() < 14  # the threshold matters
    few = partition_terms(Z.masked_fill(~likely, -torch.inf), actions)
    assert found["likely actions"] == pytest.approx(few, rel=1e-5)
