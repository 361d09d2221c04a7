"""PPO: the clip by cases, GAE by its definition, the critic's place, the update against plain autograd."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import near, random_ids, random_model, small_config
from test_reinforce import (
    MASK,
    NAN,
    STOP,
    Recorder,
    a_policy,
    a_rollout,
    config,
    gradient,
    grow,
    hand_made,
    poisoned,
    ragged,
    says_token_3,
    tensor,
)

from model import ScalarModel, token_logprobs
from parallel import Grid, Optimizer
from ppo import explained_variance, gae, ppo_advantages, ppo_loss, ppo_step, state_values, value_loss
from qrm import Reward
from reinforce import (
    collect_rollout,
    eos_to_mean,
    minibatches,
    reinforce_advantages,
    reinforce_loss,
    standardize,
)


def a_critic(seed=60, vocab=7):
    return random_model(ScalarModel, small_config(vocab_size=vocab, num_hidden_layers=1), seed)


# -------------------------------------------------------------------------------- the critic's place


EVERY = torch.ones(1, 4, dtype=torch.bool)  # all but the first token count as the response


@pytest.mark.parametrize("changed", range(5))
def test_a_value_is_read_before_its_action(changed):
    critic, ids = random_model(ScalarModel, small_config()), random_ids(1, 5)
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % 29
    before, after = state_values(critic, ids, EVERY)[0], state_values(critic, other, EVERY)[0]
    assert before.shape == (4,)
    for t in range(4):  # s_t = ids[:t+1]; the action a_t is ids[t+1]
        assert (before[t] != after[t]) == (changed <= t)


def test_a_value_is_what_the_critic_says_of_the_state():
    critic, ids = random_model(ScalarModel, small_config()), random_ids(3, 6)
    mask = torch.arange(5) >= torch.tensor([[0], [2], [4]])
    values = state_values(critic, ids, mask)
    for t in range(5):
        near(values[:, t], critic.scalars(critic.model(ids[:, : t + 1]))[:, -1] * mask[:, t])


# -------------------------------------------------------------------------------- GAE


@pytest.mark.parametrize(
    "gamma, lam", [(0.9, 0.8), (1.0, 1.0), (0.5, 1.0), (1.0, 0.95), (0.9, 0.0), (0.0, 0.7)]
)
def test_gae_is_its_definition(gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_(t+l), in O(T^2)"""
    rewards, values = grow(3, 6, seed=1), grow(3, 6, seed=2)
    found, returns = gae(poisoned(rewards, MASK), poisoned(values, MASK), MASK, gamma, lam)
    for i in range(3):
        places = [t for t in range(6) if MASK[i, t]]
        r, v = rewards[i, places].tolist(), values[i, places].tolist() + [0.0]
        for t in range(6):
            if t not in places:
                assert found[i, t] == 0 and returns[i, t] == 0
                continue
            k = places.index(t)
            delta = [r[j] + gamma * v[j + 1] - v[j] for j in range(len(r))]
            expected = sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(r)))
            assert found[i, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert returns[i, t].item() == pytest.approx(expected + v[k], rel=1e-5, abs=1e-6)
            if lam == 1.0:  # what follows, minus the value: the values in between cancel
                monte_carlo = sum(gamma ** (j - k) * r[j] for j in range(k, len(r)))
                assert returns[i, t].item() == pytest.approx(monte_carlo, rel=1e-5, abs=2e-6)
            if lam == 0.0:  # the error of one step
                assert found[i, t].item() == pytest.approx(delta[k], rel=1e-5, abs=1e-6)


def test_gae_by_hand():
    advantages, returns = gae(
        tensor([9, 1, 0, 2, 9]), tensor([9, 4, 2, 6, 9]), ragged((1, 4), width=5), 0.5, 0.5
    )
    # deltas 1 + 1 - 4 = -2, 0 + 3 - 2 = 1, 2 - 6 = -4; advantages -4, 1 - 1 = 0, -2 + 0 = -2
    assert advantages.tolist() == [[0, -2, 0, -4, 0]] and returns.tolist() == [[0, 2, 2, 2, 0]]


# -------------------------------------------------------------------------------- advantages and targets


def test_ppo_advantages_of_token_rewards():
    scores, values = 5 + 2 * grow(3, 6), grow(3, 6, seed=2)
    picked = scores[MASK].double()
    z = (scores.double() - picked.mean()) / picked.std(correction=0) * MASK
    rollout = hand_made(poisoned(scores, MASK), kl=0.5)
    for weight in (1.0, 0.01):
        found, targets = ppo_advantages(
            rollout, poisoned(values, MASK), config(kl_coef=0.3, baseline_weight=weight), Grid()
        )
        near(found, (z - 0.15 - weight * values) * MASK, 1e-5)
        near(targets, z, 1e-5)  # the target knows nothing of the KL
    found, targets = ppo_advantages(rollout, values, config(standardize="none", eos_to_mean=True), Grid())
    near(targets, eos_to_mean(scores, MASK) * MASK, 1e-6)
    near(found, (eos_to_mean(scores, MASK) - values) * MASK, 1e-6)


def test_ppo_advantages_of_rewards_at_the_ends():
    last, values = ragged((3, 4), (5, 6), (2, 3), width=6), grow(3, 6, seed=2)
    scores = tensor([0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 3], [0, 0, 5, 0, 0, 0])
    rollout = hand_made(scores, last, kl=0.5)
    found, returns = ppo_advantages(
        rollout, values, config(advantage="gae", kl_coef=0.2, gamma=0.9, lam=0.5), Grid()
    )
    rewards = (
        1.5**0.5 * tensor([0, 0, 0, -1, 0, 0], [0] * 6, [0, 0, 1, 0, 0, 0]) - 0.1
    )  # the ends are -1, 0, 1; the penalty is on all
    expected = gae(rewards, values, MASK, 0.9, 0.5)
    near(found, expected[0], 1e-6)
    near(returns, expected[1], 1e-6)
    assert found[0, 1] != 0 and not torch.allclose(
        found, reinforce_advantages(rollout, config(advantage="return", kl_coef=0.2), Grid())
    )
    for changes in (dict(advantage="return"), dict(advantage="rloo", group_size=3)):
        cfg = config(kl_coef=0.2, **changes)
        found, targets = ppo_advantages(rollout, values, cfg, Grid())
        assert torch.equal(found, reinforce_advantages(rollout, cfg, Grid()))
        assert torch.equal(targets, standardize(scores, last, "mean_std", Grid()))


@pytest.mark.parametrize("how", ["token", "gae", "rloo"])
def test_what_stands_outside_the_mask_changes_nothing(how):
    scores, values, cfg = grow(3, 6), grow(3, 6, seed=2), config(advantage=how, kl_coef=0.3, group_size=3)
    clean, dirty = hand_made(scores * MASK, kl=0.5), hand_made(poisoned(scores, MASK), kl=0.5)
    dirty.kl_k1 = poisoned(dirty.kl_k1, MASK)
    for x, y in zip(
        ppo_advantages(clean, values * MASK, cfg, Grid()),
        ppo_advantages(dirty, poisoned(values, MASK), cfg, Grid()),
    ):
        assert torch.equal(x, y) and x[MASK].all() and not x[~MASK].any()


# -------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize(
    "ratio, A, objective, slope, clipped",
    [
        (
            1.5,
            2.0,
            2.4,
            0.0,
            1,
        ),  # good and already likelier than before by more than 20 %: nothing left to gain
        (0.5, 2.0, 1.0, 1.0, 0),  # good but made less likely: pulled back
        (1.5, -2.0, -3.0, -3.0, 0),  # bad but made likelier: pushed down
        (0.5, -2.0, -1.6, 0.0, 1),  # bad and already pushed down
        (1.1, 2.0, 2.2, 2.2, 0),
        (0.9, -2.0, -1.8, -1.8, 0),
        (1.5, 0.0, 0.0, 0.0, 0),
        (0.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_the_cases_of_the_clip(ratio, A, objective, slope, clipped):
    old = tensor([-1.3])
    logprobs = (old + math.log(ratio)).requires_grad_()
    loss, stats = ppo_loss(logprobs, old, tensor([A]), torch.tensor([[True]]), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-objective, rel=1e-6, abs=1e-9)
    assert logprobs.grad.item() == pytest.approx(-slope, rel=1e-6, abs=1e-9)  # d ratio / d log pi = ratio
    assert stats == {"clip_frac": clipped, "ratio_max": pytest.approx(ratio, rel=1e-6)}


def test_ppo_loss_is_a_mean_over_response_tokens():
    mask = ragged((1, 4), (0, 2), width=4)
    old = -2 - grow(2, 4).abs()
    logprobs = old + tensor([9, math.log(1.5), math.log(0.5), 0], [math.log(1.5), math.log(0.5), 9, 9])
    A, old = tensor([7, 2, 2, 3], [-2, -2, 7, 7]).requires_grad_(), old.requires_grad_()
    given = poisoned(logprobs.detach(), mask).requires_grad_()
    loss, stats = ppo_loss(given, old.masked_fill(~mask, NAN), A.masked_fill(~mask, NAN), mask, 0.2)
    assert loss.item() == pytest.approx(-(2.4 + 1 + 3 - 3 - 1.6) / 5, rel=1e-5)
    assert stats["clip_frac"] == pytest.approx(2 / 5) and stats["ratio_max"] == pytest.approx(1.5, rel=1e-5)
    loss.backward()
    near(given.grad, -tensor([0, 0, 1, 3], [-3, 0, 0, 0]) / 5)
    assert old.grad is None and A.grad is None


@pytest.mark.parametrize("clip", [0.1, 0.3])
def test_ppo_gradient_is_a_finite_difference(clip):
    old, A = grow(3, 6, seed=1).double(), grow(3, 6, seed=2).double()
    logprobs = (old + 0.3 * grow(3, 6, seed=3).double()).requires_grad_()
    assert 0.1 < ppo_loss(logprobs, old, A, MASK, clip)[1]["clip_frac"] < 0.9
    assert torch.autograd.gradcheck(lambda x: ppo_loss(x, old, A, MASK, clip)[0], logprobs)


def test_at_ratio_1_the_gradient_is_reinforces():
    policy = a_policy()
    rollout = a_rollout(policy, config())
    mask = rollout.response_mask
    weights = grow(*mask.shape, seed=5)
    logprobs, _ = token_logprobs(policy, rollout.ids, mask)
    loss, stats = ppo_loss(logprobs, rollout.old_logprobs, weights, mask, 0.2)
    assert stats == {"clip_frac": 0.0, "ratio_max": 1.0}
    near(gradient(loss, policy), gradient(reinforce_loss(logprobs, weights, mask)[0], policy), 1e-6)
    assert loss.item() == pytest.approx(-weights[mask].mean().item(), rel=1e-5)


def test_far_ratios_stay_finite():
    logprobs = tensor([-200, -0.1]).requires_grad_()
    loss, stats = ppo_loss(
        logprobs, tensor([-0.1, -200]), tensor([1, -1]), torch.ones(1, 2, dtype=torch.bool), 0.2
    )
    loss.backward()
    assert (
        math.isfinite(loss.item())
        and math.isfinite(stats["ratio_max"])
        and torch.isfinite(logprobs.grad).all()
    )


def test_value_loss_by_hand():
    values = tensor([NAN, 1, 2, NAN], [3, NAN, NAN, NAN]).requires_grad_()
    targets, mask = (
        tensor([NAN, 3, 2, NAN], [0, NAN, NAN, NAN]).requires_grad_(),
        ragged((1, 3), (0, 1), width=4),
    )
    loss, stats = value_loss(values, targets, mask)
    assert loss.item() == pytest.approx((4 + 0 + 9) / 3) and stats == {}
    loss.backward()
    near(values.grad, tensor([0, -4, 0, 0], [6, 0, 0, 0]) / 3, 1e-6)
    assert targets.grad is None


def test_explained_variance_is_numpys():
    returns = 50 + 3 * grow(3, 6, seed=1)
    for values in (0.5 * returns + grow(3, 6, seed=2), 10 * grow(3, 6, seed=3)):
        r, v = returns[MASK].double().numpy(), values[MASK].double().numpy()
        expected = 1 - np.var(r - v) / np.var(r)
        for x, y in ((values, returns), (poisoned(values, MASK), poisoned(returns, MASK))):
            assert explained_variance(x, y, MASK, Grid()) == pytest.approx(expected, rel=1e-9)
    assert explained_variance(returns, returns, MASK, Grid()) == 1
    assert explained_variance(torch.full((3, 6), 7.0), returns, MASK, Grid()) == pytest.approx(0, abs=1e-9)
    assert math.isfinite(explained_variance(returns, torch.ones(3, 6), MASK, Grid()))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shift", [0.0, 1.0, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explained_variance_at_every_scale_and_offset(scale, shift, dtype):
    """Two passes: the squares of large numbers would not leave enough digits to their difference."""
    returns, values = (scale * (shift + grow(3, 6, seed=seed)).to(dtype) for seed in (1, 2))
    r, v = returns[MASK].double().numpy(), values[MASK].double().numpy()
    found = explained_variance(values, returns, MASK, Grid())
    if np.var(r) ** 0.5 > 1e-5 * abs(r.mean()):
        assert found == pytest.approx(1 - np.var(r - v) / np.var(r), rel=1e-9)
        assert explained_variance(returns, returns, MASK, Grid()) == 1
    else:
        assert found == 0 and (shift == 1e6 or dtype == torch.bfloat16)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 45.1, 1e3])
def test_returns_that_are_equal_up_to_rounding_are_constant(scale):
    noise = torch.randint(-4, 5, (3, 6), generator=torch.Generator().manual_seed(1))
    returns = scale * (1 + noise * 2**-24)
    assert returns.std() > 0 and explained_variance(grow(3, 6), returns, MASK, Grid()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratios_are_bounded_to_e_20(dtype):
    """Within the bound to the digit; beyond, the loss is finite and the token has no gradient."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    old = torch.zeros(1, 4, dtype=dtype)
    logprobs = torch.tensor([[-1e3, -19.0, 19.0, 1e3]], dtype=dtype, requires_grad=True)
    loss, stats = ppo_loss(logprobs, old, -torch.ones_like(old), mask, 0.2)
    loss.backward()
    assert stats["ratio_max"] == pytest.approx(math.exp(20), rel=1e-2)
    assert loss.item() == pytest.approx((0.8 + 0.8 + math.exp(19) + math.exp(20)) / 4, rel=1e-2)
    assert logprobs.grad[0, [0, 1, 3]].tolist() == [0, 0, 0]
    assert logprobs.grad[0, 2].item() == pytest.approx(math.exp(19) / 4, rel=1e-2)


# -------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("kl", ["k1", "exact"])
def test_the_first_ratio_is_exactly_1(kl):
    policy, critic = a_policy(), a_critic()
    cfg = config(
        temperature=0.7, kl=kl, kl_coef=0.1, batch_size=11, micro_tokens=25, max_new_tokens=12
    )  # a few rows of different lengths each
    rollout = a_rollout(policy, cfg, n=11)
    assert len({rollout.rows(a, b).ids.shape for a, b in minibatches(rollout.lengths(), cfg)[0]}) > 2
    optimizers = [Optimizer(m, Grid(), lr=0.01) for m in (policy, critic)]
    stats = ppo_step(policy, critic, *optimizers, rollout, cfg, lr=0.01, critic_lr=0.01)
    assert stats["ratio_max"] == 1.0 and stats["clip_frac"] == 0.0
    stats = ppo_step(
        policy, critic, *optimizers, rollout, cfg, lr=0.01, critic_lr=0.01
    )  # now the policy has moved
    assert stats["ratio_max"] > 1.01


@pytest.mark.parametrize("minibatch, advantage", [(0, "token"), (4, "token"), (0, "gae")])
def test_both_gradients_do_not_depend_on_micro_batches(minibatch, advantage):
    policy, critic = a_policy(), a_critic()
    cfg = config(temperature=0.7, kl_coef=0.1, minibatch=minibatch, advantage=advantage, gamma=0.9)
    rollout, grid = a_rollout(policy, cfg), Grid()
    mask = rollout.response_mask
    rollout.old_logprobs += (
        0.2 * grow(*mask.shape, seed=5) * mask
    )  # some ratios are outside the clip, some inside
    values = critic.scalars(critic.model(rollout.ids[:, :-1]))  # no cut, no trimming
    weights, returns = ppo_advantages(rollout, values.detach(), cfg, grid)
    expected, value_expected, clipped, losses, value_losses = [], [], 0, [], []
    cuts = (slice(0, 8),) if not minibatch else (slice(0, 4), slice(4, 8))
    for rows in cuts:
        log_pi = (policy.logits(policy.model(rollout.ids[rows, :-1])) / 0.7).log_softmax(-1)
        ratio = (log_pi.gather(-1, rollout.ids[rows, 1:, None])[..., 0] - rollout.old_logprobs[rows]).exp()
        A, on = weights[rows], mask[rows]
        objective = torch.where(
            A > 0, A * ratio.clamp(max=1.2), A * ratio.clamp(min=0.8)
        )  # the clip, said differently
        losses.append(-objective[on].mean())
        expected.append(gradient(losses[-1], policy))
        value_losses.append(torch.nn.functional.mse_loss(values[rows][on], returns[rows][on]))
        value_expected.append(gradient(value_losses[-1], critic))
        clipped += torch.where(A > 0, ratio > 1.2, ratio < 0.8)[on].float().mean().item() / len(cuts)
    assert 0.1 < clipped < 0.5
    for micro_tokens in (1, 12, 30, 1000):
        optimizers = Recorder(policy), Recorder(critic)
        stats = ppo_step(
            policy,
            critic,
            *optimizers,
            rollout,
            dataclasses.replace(cfg, micro_tokens=micro_tokens),
            lr=0.0,
            critic_lr=0.0,
        )
        for optimizer, wanted in zip(optimizers, (expected, value_expected)):
            assert len(optimizer.seen) == len(wanted)
            for found, g in zip(optimizer.seen, wanted):
                assert (found - g).norm() <= 1e-6 * g.norm()
        mean = lambda xs: sum(x.item() for x in xs) / len(xs)
        known = {
            "loss": mean(losses),
            "value_loss": mean(value_losses),
            "clip_frac": clipped,
            "explained_variance": explained_variance(values.detach(), returns, mask, grid),
        }
        assert {k: stats[k] for k in known} == pytest.approx(known, rel=1e-5, abs=1e-7)
        if not minibatch:
            assert stats["ratio_max"] == pytest.approx(ratio[mask].max().item(), rel=1e-5)
        assert stats["grad_norm"] == pytest.approx(mean([g.norm() for g in expected]), rel=1e-5)


def test_epochs_and_minibatches_are_updates():
    policy, critic = a_policy(), a_critic()
    cfg = config(minibatch=3, ppo_epochs=2, micro_tokens=12)
    optimizers = Recorder(policy), Recorder(critic)
    ppo_step(policy, critic, *optimizers, a_rollout(policy, cfg), cfg, lr=0.0, critic_lr=0.0)
    for optimizer in optimizers:  # 8 rows in 3 minibatches, twice
        assert len(optimizer.seen) == 6 and torch.equal(optimizer.seen[0], optimizer.seen[3])
        assert not torch.equal(optimizer.seen[0], optimizer.seen[1])


def test_the_critic_learns_its_targets():
    policy, critic = a_policy(), a_critic()
    cfg = config(ppo_epochs=10, batch_size=16)
    rollout = a_rollout(policy, cfg, n=16)
    optimizers = [Optimizer(m, Grid(), lr=0.01) for m in (policy, critic)]
    stats = [ppo_step(policy, critic, *optimizers, rollout, cfg, lr=0.0, critic_lr=0.01) for _ in range(3)]
    assert stats[0]["value_loss"] > 1.5 * stats[2]["value_loss"]
    assert stats[2]["explained_variance"] > max(0.3, stats[0]["explained_variance"])


def test_ppo_learns_to_say_a_token():
    """One state and action, reward 1 for token 3; the critic learns the standardised reward's mean, 0."""
    policy, critic = a_policy(), a_critic()
    cfg, chances = config(batch_size=64, group_size=64, max_new_tokens=1, ppo_epochs=2), []
    optimizers = [Optimizer(m, Grid(), lr=0.01) for m in (policy, critic)]
    for step in range(12):
        rollout = collect_rollout(policy, policy, Reward(says_token_3), [[1, 2]], [STOP], cfg, seed=step)
        chances.append(rollout.scores.sum().item() / 64)
        ppo_step(policy, critic, *optimizers, rollout, cfg, lr=0.01, critic_lr=0.02)
    assert 0 < chances[0] < 0.5 and chances[-1] > 0.95, chances
