"""classroom/tabular.py: the advantages of each arm by enumeration, and what training does on one task."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))
import tabular  # noqa: E402
from limits import Task, gradient_moments, token_scores_of  # noqa: E402

from qrm import qrm_loss  # noqa: E402


@pytest.fixture(scope="module")
def task():
    return Task(2, T=4)


def enumerated(task, reading, scores, coef=0.0):
    """The advantages of every answer once."""
    answers = torch.arange(len(task.right))
    return tabular.weights_of(task, reading, scores, answers, task.log_sft, coef)


def test_token_advantages_are_centred_at_each_state(task):
    scores = token_scores_of(task)["verifier"]
    weights = enumerated(task, "tokens", scores)
    for s in (0, 1, 5):
        rows = (task.places // task.A == s).nonzero()
        by_action = {}
        for row, t in rows.tolist():
            by_action[int(task.places[row, t]) % task.A] = weights[row, t].item()
        mean = sum(task.log_sft[s, a].exp().item() * x for a, x in by_action.items())
        gap = scores[s, 0] - scores[s, 1]
        scale = scores.flatten()[task.places].std()
        assert abs(mean) < 1e-12 and by_action[0] - by_action[1] == pytest.approx((gap / scale).item())


def test_answer_and_critic_have_the_gradient_of_the_success_rate(task):
    true, _ = gradient_moments(task, task.right[:, None].expand(-1, task.T))
    for reading in ("answer", "critic"):
        found, _ = gradient_moments(task, enumerated(task, reading, None))
        assert torch.cosine_similarity(found.flatten(), true.flatten(), dim=0) > 1 - 1e-9, reading


def test_an_answers_number_is_the_mean_of_its_scores(task):
    """With the scores in place of the graded outcome nothing else changes."""
    scores = token_scores_of(task)["Q-RM"]
    means = scores.flatten()[task.places].mean(1)
    weights = enumerated(task, "answer", scores)
    expected = (means - means.mean()) / means.std()
    torch.testing.assert_close(weights, expected[:, None].expand(-1, task.T))


@pytest.mark.parametrize("reading", ["tokens", "answer", "critic"])
def test_the_penalty_is_k1(task, reading):
    """At the reference it is 0; away from it a token's own k1, or what is left of it to the end."""
    scores = token_scores_of(task)["verifier"]
    assert torch.equal(enumerated(task, reading, scores, 5.0), enumerated(task, reading, scores))
    moved = (task.log_sft + scores / 3).log_softmax(1)
    answers = torch.arange(len(task.right))
    parts = [tabular.weights_of(task, reading, scores, answers, moved, coef) for coef in (0.0, 1.0)]
    k1 = (moved - task.log_sft).flatten()[task.places]
    penalty = parts[0] - parts[1]
    if reading == "tokens":
        torch.testing.assert_close(penalty, k1)
    else:
        sums = torch.stack([k1[:, t:].sum(1) for t in range(task.T)], 1)
        sums = sums - sums.mean(0) if reading == "answer" else sums
        torch.testing.assert_close(penalty, sums)


def test_training(task):
    tables = tabular.reward_tables(task)
    assert tables["qrm"].shape == (task.n, task.A) and tabular.ARMS.keys() >= {"qrm tokens", "qrm answer"}
    for arm in tabular.ARMS:
        curve = tabular.train(task, tables, arm, 0.1, 0.03, 64, 40)
        assert len(curve) == 41 and curve[0] == pytest.approx((task.log_p.exp() @ task.right).item())
        assert curve[-1] > curve[0] + 0.1, arm
        held = tabular.train(task, tables, arm, 0.1, 100.0, 64, 40)
        assert abs(held[-1] - held[0]) < 0.1, arm
    twice = [tabular.train(task, tables, "qrm tokens", 0.1, 0.0, 8, 20) for _ in range(2)]
    assert twice[0] == twice[1]


def test_the_reward_model_is_learned_from_pairs(task):
    from limits import learned_scores

    found = tabular.reward_tables(task)["qrm"]
    assert torch.equal(found, learned_scores(task, qrm_loss, (tabular.UPDATES,))[tabular.UPDATES])


def test_differences_are_paired_by_task():
    curves = {"qrm tokens": [[0.1] * 101, [0.6] * 101], "other": [[0.2] * 101, [0.7] * 101]}
    results, paired = tabular.tables_of_text(curves, dict.fromkeys(curves, (0.1, 0.0)), 64)
    assert paired[2][1] == "0.10 [0.10, 0.10]" and paired[1][1] == "0.00 [0.00, 0.00]"
    assert results[1][4] == "3200 [0, 6400], median 3200, 1/2"  # to .5: never, and at once
