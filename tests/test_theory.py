"""What the pairwise loss identifies, on a tree small enough to enumerate (classroom/theory.py): one test a
statement."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))
from theory import (  # noqa: E402
    all_answers,
    backed_up,
    by_depth,
    centred,
    corr,
    depths,
    expected_gradient,
    expected_loss,
    kl_gradients,
    minimum_norm,
    path_weights,
    random_rewards,
    theory,
    token_weights,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_backup_is_the_maximum_entropy_policy():
    """exp(Q - V), multiplied along an answer, must be softmax of the returns over all answers, by brute
    force."""
    T, A = 3, 2
    rewards = normal(1 + 2 + 4, A)
    Q, log_policy = backed_up(rewards)
    returns, logs, q_sums = [], [], []
    for actions in itertools.product(range(A), repeat=T):
        s, total, log_p, q_sum = 0, 0.0, 0.0, 0.0
        for a in actions:
            total = total + rewards[s, a]
            log_p = log_p + log_policy[s, a]
            q_sum = q_sum + Q[s, a]
            s = s * A + 1 + a
        q_sums.append(q_sum)
        returns.append(total)
        logs.append(log_p)
    logs, returns, q_sums = torch.stack(logs), torch.stack(returns), torch.stack(q_sums)
    torch.testing.assert_close(logs, returns.log_softmax(0))  # so A* has the sums that the loss asks for
    assert (q_sums - returns).std() > 0.1  # and Q* has not


def test_answers_that_stop():
    """Against a loop over all sequences of three actions, cut after the first 0."""
    T, A = 3, 3
    cut = {a[: a.index(0) + 1] if 0 in a else a for a in itertools.product(range(A), repeat=T)}
    places, mask = all_answers(T, A, stops=True)
    found = set()
    for row, valid in zip(places, mask):
        found.add(tuple((row[valid] % A).tolist()))
        assert valid.int().diff().max() <= 0  # a prefix
    assert found == cut and len(places) == len(cut)


@pytest.mark.parametrize("seed", [0, 1])
def test_sums_are_identified_and_single_scores_are_not(seed):
    plain, margin = theory(seed, updates=500), theory(seed, margin=2.0, updates=500)
    assert plain["returns_error"] < 1e-3 and plain["advantage_error"] < 1e-3
    assert 0.4 < plain["q_corr"] < 0.75 < plain["advantage_corr"] < 0.95 < plain["within_state_corr"] < 0.99
    assert margin["returns_error"] > 3 and margin["returns_corr"] > 0.99  # stretched, in order
    assert abs(margin["within_state_corr"] - plain["within_state_corr"]) < 0.02


def test_r_and_the_advantage_and_their_shapings_minimise_the_loss_and_q_does_not():
    """A minimum of a convex function: its gradient is 0 there. The shaping is large and says nothing about
    r."""
    T, A = 4, 3
    places, mask = all_answers(T, A)
    rewards, n = random_rewards(0, T, A), len(depths(T, A))
    returns = rewards[places].sum(1)
    Q, advantage = backed_up(rewards.view(n, A))
    potential = 10 * normal(n * A + 1)
    potential[n:] = 3.0  # the same after every last token; with equal lengths it need not be 0
    shaping = potential[1:] - potential[:n].repeat_interleave(A)
    losses, slopes = {}, {}
    for name, z in {
        "r": rewards,
        "A": advantage.flatten(),
        "shaped": rewards + shaping,
        "Q": Q.flatten(),
    }.items():
        z = (T / 0.2 * z).requires_grad_()
        loss = expected_loss(z, returns, places, mask)
        (gradient,) = torch.autograd.grad(loss, z)
        losses[name], slopes[name] = loss.item(), gradient.abs().max().item()
    for name in ("r", "A", "shaped"):
        assert losses[name] == pytest.approx(losses["r"], rel=1e-12) and slopes[name] < 1e-12
    assert losses["Q"] > losses["r"] + 0.01 and slopes["Q"] > 1e-5


def test_prop_34_holds_for_the_expectation_and_not_for_the_soft_value():
    """Q* - E_phi Q* = Z* - E_phi Z* (beta 1) for every Z* with softmax(Z*) = phi*; Q* - V* is off by the
    entropy."""
    n, A = len(depths(4, 3)), 3
    Q, log_phi = backed_up(random_rewards(0, 4, A).view(n, A))
    phi = log_phi.exp()
    Z = log_phi + 7 * normal(n, 1)  # any number that depends on the state alone
    left, right = Q - (phi * Q).sum(1, keepdim=True), Z - (phi * Z).sum(1, keepdim=True)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
    entropy = -(phi * log_phi).sum(1, keepdim=True)
    torch.testing.assert_close(log_phi - right, -entropy.expand(n, A), rtol=0, atol=1e-12)
    assert 1.0 < entropy.max() < 1.0986123  # log 3


# ----------------------------------------------------------------------------------------------- minimum norm


@pytest.mark.parametrize("kind", ["iid", "terminal"])
@pytest.mark.parametrize("T, A, seed", [(4, 3, 0), (4, 3, 1), (3, 4, 2), (6, 2, 3)])
def test_minimum_norm_is_q_of_uniform_continuation(kind, T, A, seed):
    """Z(s,a) - Z(s,b) = (T / beta) (Q^unif(s,a) - Q^unif(s,b)) / c_d; Q^unif is a plain mean over the answers
    here."""
    beta = 0.2
    places, mask = all_answers(T, A)
    rewards, n = random_rewards(seed, T, A, kind), len(depths(T, A))
    returns = rewards[places].sum(1)
    Z = minimum_norm(returns, places, mask, len(rewards), beta).view(n, A)
    through = torch.zeros(n * A, dtype=torch.float64)  # mean return of the answers through (s, a)
    for i in range(n * A):
        through[i] = returns[(places == i).any(1)].mean()
    expected = T / beta * centred(through.view(n, A)) / path_weights(T, A)[depths(T, A), None]
    torch.testing.assert_close(centred(Z), expected, rtol=0, atol=1e-11)
    means = beta * Z.flatten()[places].mean(1)
    torch.testing.assert_close(centred(means), centred(returns), rtol=0, atol=1e-11)
    inner = Z.flatten()[: (n - 1)]  # the score that leads to state i + 1
    torch.testing.assert_close(inner, Z[1:].sum(1))  # a score is the sum of its children's
    assert abs(Z[0].sum()) < 1e-10  # and the root's are 0 in sum: the free constant is chosen as well


def test_minimum_norm_on_any_set_of_answers_is_q_of_a_random_walk():
    """Some answers only: c(s,a) Z(s,a) = Q^walk(s,a) + a number of the state, c and the walk those of unit
    resistors.

    c(s,a) = 1 + 1 / sum_b 1 / c(s',b), and the walk takes b in s' with probability proportional to 1 /
    c(s',b).
    """
    T, A = 4, 3
    chosen = torch.randperm(A**T, generator=torch.Generator().manual_seed(0))[:20]
    places = all_answers(T, A)[0][chosen]
    mask, returns = torch.ones_like(places, dtype=torch.bool), normal(20)
    z = minimum_norm(returns, places, mask, A * len(depths(T, A)), beta=1.0) / T

    def walk(rows, t):
        """{score: (c, mean return of the walk that starts with it)} of the answers `rows`, which agree before
        t"""
        out = {}
        for place in {int(places[i, t]) for i in rows}:
            below = [i for i in rows if places[i, t] == place]
            if t + 1 == T:
                out[place] = (1.0, returns[below[0]].item())
                continue
            children = list(walk(below, t + 1).values())
            conductance = sum(1 / c for c, _ in children)
            out[place] = (1 + 1 / conductance, sum(q / c for c, q in children) / conductance)
        check(out)
        return out

    compared = []

    def check(siblings):
        shifts = [c * z[place].item() - q for place, (c, q) in siblings.items()]
        compared.append(len(shifts))
        assert max(shifts) - min(shifts) < 1e-11

    walk(range(20), 0)
    assert sum(n > 1 for n in compared) > 10


def test_gradient_descent_from_zero_ends_there_and_adam_near_it():
    """Plain gradient descent stays in the span of the answers; Adam's scaling by coordinate leaves it, but
    not far."""
    T, A = 3, 2
    places, mask = all_answers(T, A)
    rewards = random_rewards(0, T, A)
    returns = rewards[places].sum(1)
    z = torch.zeros(len(rewards), dtype=torch.float64, requires_grad=True)
    for _ in range(3000):
        (gradient,) = torch.autograd.grad(expected_loss(z, returns, places, mask, beta=1.0), z)
        z = (z - 20 * gradient).detach().requires_grad_()
    smallest = minimum_norm(returns, places, mask, len(z), beta=1.0)
    torch.testing.assert_close(z.detach(), smallest, rtol=0, atol=1e-8)
    for kind in ("iid", "terminal"):
        assert 0.98 < theory(0, updates=500, kind=kind)["minimum_norm_corr"] < 0.9999


def test_by_depth_the_fit_is_worst_where_credit_matters_most():
    """Last-token states agree always; early ones do not, the less the more deterministic phi* is (Assumption
    3.3)."""
    for kind in ("iid", "terminal"):
        soft, hard = by_depth(kind, 1.0, tables=30), by_depth(kind, 10.0, tables=30)
        assert soft["uniform_error"] < 1e-12 and hard["uniform_error"] < 1e-12
        assert soft["within_state_corr"][-1] == pytest.approx(1) and soft["best_action"][-1] == 1
        assert hard["entropy"] < 0.25 < soft["entropy"]
        for d in range(3):
            assert hard["within_state_corr"][d] < soft["within_state_corr"][d] < 0.99
    assert hard["within_state_corr"][0] < 0.6 and hard["best_action"][0] < 0.65  # terminal rewards


# ------------------------------------------------------------------------------------------------ lengths


def test_with_different_lengths_a_constant_is_free_and_the_advantage_is_not_identified():
    T, A = 4, 3
    places, mask = all_answers(T, A, stops=True)
    rewards = random_rewards(0, T, A)
    returns = (rewards[places] * mask).sum(1) / mask.sum(1)
    losses = [expected_loss(z, returns, places, mask, beta=1.0) for z in (rewards, rewards + 1)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    exact, shifted = (backed_up(z.view(-1, A), stops=True)[1] for z in (rewards, rewards + 1))
    assert (exact - shifted)[0].abs().max() > 0.5  # at the prompt, where every length is still possible
    equal, moved = (backed_up(z.view(-1, A))[1] for z in (rewards, rewards + 1))
    torch.testing.assert_close(equal, moved)  # with equal lengths the constant is nothing


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("stops", [False, True])
def test_what_the_expected_policy_gradient_feels(stops):
    """A number of the state, constants among them, no; shaping, yes. Summed to the end it is the other way
    round."""
    T, A = 4, 3
    places, mask = all_answers(T, A, stops)
    n = len(depths(T, A))
    logits, z, potential = normal(n, A), normal(n * A, seed=1), normal(n * A + 1, seed=2)
    potential[n:] = 0.0
    if stops:
        potential[1::A] = 0.0
    state = potential[:n].repeat_interleave(A)
    shaping = potential[1:] - state

    def change(dz, summed):
        before, after = (
            expected_gradient(logits, token_weights(x, places, mask, summed), places, mask)
            for x in (z, z + dz)
        )
        return ((after - before).abs().max() / before.abs().max()).item()

    one = torch.ones(n * A, dtype=torch.float64)
    assert change(one, summed=False) < 1e-14 and change(state, summed=False) < 1e-14
    assert change(shaping, summed=False) > 0.1 and change(shaping, summed=True) < 1e-14
    assert change(state, summed=True) > 0.1
    assert (change(one, summed=True) > 0.1) == stops  # summed rewards pay for length as such


def test_expected_gradient_is_the_derivative_of_the_expected_return():
    places, mask = all_answers(3, 2, stops=True)
    rewards, logits = normal(14), normal(7, 2, seed=1).requires_grad_()
    probabilities = (logits.log_softmax(1).flatten()[places] * mask).sum(1).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    (expected,) = torch.autograd.grad((probabilities * (rewards[places] * mask).sum(1)).sum(), logits)
    found = expected_gradient(logits, token_weights(rewards, places, mask, True), places, mask)
    torch.testing.assert_close(found, expected)


def test_k3_in_the_reward_is_nearly_inert_and_k1_in_the_loss_is_entirely():
    """By enumeration of one state's actions, at three distances from the reference."""
    ref, direction = normal(5), normal(5, seed=1)
    ratios = []
    for distance in (1.0, 0.1, 0.01):
        found = kl_gradients(ref + distance * direction, ref)
        torch.testing.assert_close(found["k1 in the reward"], found["kl"])
        torch.testing.assert_close(found["k3 in the reward"], found["kl"] - found["reverse kl"])
        torch.testing.assert_close(found["k3 in the loss"], found["reverse kl"])
        assert found["k1 in the loss"].abs().max() < 1e-15
        ratios.append((found["k3 in the reward"].norm() / found["kl"].norm()).item())
    assert ratios[0] < 0.5 and ratios[1] < 0.06 and ratios[2] < 0.006  # 10 times nearer, 10 times less


def test_correlation_by_hand():
    assert corr(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 5.0, 7.0])) == pytest.approx(1)
