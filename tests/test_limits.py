"""classroom/limits.py against autograd and plain loops over all answers."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))
from limits import (  # noqa: E402
    Task,
    at_kl,
    gradient_moments,
    heights,
    learned_scores,
    speeds,
    tasks,
    token_scores_of,
    verifier_pairs_loss,
)
from theory import centred, expected_gradient, minimum_norm  # noqa: E402

from qrm import qrm_loss  # noqa: E402


@pytest.fixture(scope="module")
def task():
    return Task(2, T=4)


def test_q_is_the_success_rate_through_an_action(task):
    p = task.log_p.exp()
    assert task.solvable() and p.sum().item() == pytest.approx(1)
    found = task.q(p).flatten()
    for place in range(0, task.n * task.A, 7):
        through = (task.places == place).any(1)
        expected = (p * task.right)[through].sum() / p[through].sum()
        assert found[place].item() == pytest.approx(expected.item(), abs=1e-12)


def test_the_qrm_scores_are_those_of_the_fitted_minimiser(task):
    """By the theorem; here against least squares on the sums of all answers."""
    mask = torch.ones_like(task.places, dtype=torch.bool)
    z = minimum_norm(task.right, task.places, mask, task.n * task.A, beta=1.0) / task.T
    expected = centred(token_scores_of(task)["Q-RM"])
    torch.testing.assert_close(centred(z.view(task.n, task.A)), expected, rtol=0, atol=1e-10)


def test_moments_against_autograd_one_answer_at_a_time(task):
    weights = torch.randn(task.places.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, second = gradient_moments(task, weights)
    expected_mean, expected_second = torch.zeros(task.n, task.A, dtype=torch.float64), 0.0
    for i, places in enumerate(task.places):
        logits = task.log_sft.clone().requires_grad_()
        (logits.log_softmax(1).flatten()[places] * weights[i]).sum().backward()
        expected_mean += task.log_p[i].exp() * logits.grad
        expected_second += task.log_p[i].exp().item() * logits.grad.square().sum().item()
    torch.testing.assert_close(mean, expected_mean)
    assert second == pytest.approx(expected_second)
    mask = torch.ones_like(task.places, dtype=torch.bool)
    torch.testing.assert_close(mean, expected_gradient(task.log_sft, weights, task.places, mask))


def test_speeds(task):
    found = speeds(task)
    for name in (
        "outcome",
        "outcome - mean (RLOO, GRPO)",
        "outcome - perfect critic",
        "exact Q of sft, tokens",
    ):
        assert found[name][0] == pytest.approx(1)  # unbiased
    assert found["Q-RM, tokens"][0] < 0.99 and found["verifier, tokens"][0] < 0.99
    assert (
        found["outcome"][1] < found["outcome - mean (RLOO, GRPO)"][1] < found["outcome - perfect critic"][1]
    )
    assert found["outcome - perfect critic"][1] < found["exact Q of sft, tokens"][1]


def test_no_policy_within_the_kl_is_better_than_the_outcomes_optimum(task):
    """Gibbs: the tilt by the outcome is best at its KL, so no reading of a token reward can end above it."""
    budgets = (0.1, 0.5, 2.0)
    found = heights(task, budgets)
    start = (task.log_p.exp() @ task.right).item()
    for name, rates in found.items():
        assert start < rates[0] < rates[1] < rates[2], name
        for rate, best in zip(rates, found["outcome, whole answer"]):
            assert rate <= best + 1e-9
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        direction = torch.randn(task.log_p.shape, generator=generator, dtype=torch.float64) + 2 * task.right
        rate = at_kl(task, lambda c, d=direction: (task.log_p + d / c).log_softmax(0), 0.5)
        assert rate < found["outcome, whole answer"][1]


def test_the_kl_is_the_budget(task):
    logs = []

    def policy_at(c):
        logs.append((task.log_p + task.right / c).log_softmax(0))
        return logs[-1]

    at_kl(task, policy_at, 0.3)
    kl = (logs[-1].exp() * (logs[-1] - task.log_p)).sum().item()
    assert kl == pytest.approx(0.3, abs=1e-6)


def test_the_first_step_of_both_losses_is_the_policys_own_q(task):
    """From Z = 0 either loss has the gradient -P(s,a) (Q^sft(s,a) - Q0), times a constant."""
    p, n = task.log_p.exp(), len(task.right)
    right, wrong = (x.nonzero()[:, 0] for x in (task.right == 1, task.right == 0))
    gradients = []
    for loss in (qrm_loss, verifier_pairs_loss):
        z = torch.zeros(task.n * task.A, dtype=torch.float64, requires_grad=True)
        total = 0.0
        for i in right:
            for j in wrong:
                places = task.places[torch.stack([i, j])]
                total = total + p[i] * p[j] * loss(z[places], torch.ones_like(places, dtype=torch.bool))[0]
        gradients.append(torch.autograd.grad(total, z)[0])
    visits = torch.zeros(task.n * task.A, dtype=torch.float64)
    visits.index_add_(0, task.places.flatten(), p[:, None].expand(n, task.T).flatten())
    expected = -visits * (task.q(p).flatten() - p @ task.right)
    for gradient in gradients:
        torch.testing.assert_close(gradient / gradient.norm(), expected / expected.norm(), rtol=0, atol=1e-7)


def test_the_verifiers_minimum_is_the_log_odds_relative_to_the_prompts():
    """Two tokens, two actions, a policy of counts; every right answer is paired with every wrong one."""
    counts = {(0, 0): 4, (0, 1): 1, (1, 0): 2, (1, 1): 5}
    right = {(0, 0), (1, 1)}
    good = [a for a, n in counts.items() if a in right for _ in range(n)]
    bad = [a for a, n in counts.items() if a not in right for _ in range(n)]

    def log_odds(prefix):
        agree = {a: n for a, n in counts.items() if a[: len(prefix)] == prefix}
        wins = sum(n for a, n in agree.items() if a in right)
        return math.log(wins / (sum(agree.values()) - wins))

    first = {a: log_odds((a,)) - log_odds(()) for a in (0, 1)}
    z = torch.tensor([first[0], first[1]], dtype=torch.float64, requires_grad=True)
    last = torch.zeros(
        (), dtype=torch.float64
    )  # last tokens have no finite minimum, and no share in the first's
    rows = []
    for pair in itertools.product(good, bad):
        rows += [torch.stack([z[answer[0]], last]) for answer in pair]
    scores = torch.stack(rows)
    loss, _ = verifier_pairs_loss(scores, torch.ones(scores.shape, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.abs().max() < 1e-7 and abs(first[0] - first[1]) > 0.1


def test_learned_scores_rank_their_pairs_and_are_no_better_than_the_outcome_at_the_end(task):
    for loss in (qrm_loss, verifier_pairs_loss):
        found = learned_scores(task, loss, (5, 50), pairs=300)
        assert list(found) == [5, 50]
        sums = found[50].flatten()[task.places].mean(1)
        p = task.log_p.exp()
        right, wrong = p * task.right, p * (1 - task.right)
        ordered = (sums[:, None] > sums[None]).double()
        accuracy = right @ ordered @ wrong / (right.sum() * wrong.sum())
        assert accuracy > 0.9
        ends = heights(task, (0.5,), found)
        assert ends["50, tokens"][0] < ends["outcome, whole answer"][0]
        cosine, gain = speeds(task, found)["50, tokens"]
        assert 0.6 < cosine < 1 and gain > speeds(task)["outcome - mean (RLOO, GRPO)"][1]


def test_what_the_chapter_says():
    """Six tokens: the verifier needs fewer trajectories than the outcome and ends below; Q-RM ends lowest."""
    several = tasks(6, 8)
    faster = [speeds(t)["verifier, tokens"][1] > speeds(t)["outcome - mean (RLOO, GRPO)"][1] for t in several]
    assert sum(faster) >= 7
    ends = [heights(t, (1.0,)) for t in several]
    means = {name: sum(f[name][0] for f in ends) / 8 for name in ends[0]}
    assert means["Q-RM, tokens"] < means["verifier, tokens"] - 0.02 < means["outcome, whole answer"] - 0.03
