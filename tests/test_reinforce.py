"""REINFORCE: the gradient against every answer enumerated, the rollout token by token, advantages by hand."""

import dataclasses
import math
import types

import numpy as np
import pytest
import torch
from conftest import near, random_ids, random_model, small_config

import reinforce
from data import Example, collate
from model import LanguageModel, ScalarModel, token_logprobs
from parallel import Grid, Optimizer
from qrm import Reward, bind_reward, token_scores
from reinforce import (
    Rollout,
    collect_rollout,
    cut_rows,
    eos_to_mean,
    group_advantages,
    join_rows,
    kl_estimates,
    kl_loss,
    kl_penalty,
    minibatches,
    reinforce_advantages,
    reinforce_loss,
    reinforce_step,
    returns_to_go,
    rollout_stats,
    shape_rewards,
    standardize,
)
from support.settings import Config

NAN = math.nan
STOP = 0


def config(**changes):
    return dataclasses.replace(
        Config(), **{"advantage": "token", "batch_size": 8, "max_new_tokens": 6, **changes}
    )


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def grow(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ragged(*spans, width):
    """(start, stop) of each row's response -> mask (B, width)"""
    return torch.tensor([[start <= t < stop for t in range(width)] for start, stop in spans])


def poisoned(x, mask):
    return x.masked_fill(~mask, NAN)


def gradient(loss, model):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)]
    )


def a_rollout(policy, cfg, n=8, reward=None, seed=0):
    """Answers of many lengths to prompts of 1 to 3 tokens; STOP ends them."""
    prompts = [random_ids(1 + i % 3, vocab=policy.cfg.vocab_size, seed=i).tolist() for i in range(n)]
    reference = random_model(LanguageModel, policy.cfg, seed=50)
    reward = reward or bind_reward("qrm", random_model(ScalarModel, policy.cfg, seed=51))
    return collect_rollout(policy, reference, reward, prompts, [STOP], cfg, seed)


CONSTANT = Reward(lambda ids, mask: mask.float())


def says_token_3(ids, mask):
    return (ids[:, 1:] == 3).float()


def a_policy(seed=1, vocab=7):
    return random_model(LanguageModel, small_config(vocab_size=vocab, num_hidden_layers=1), seed)


class Recorder(Optimizer):
    """Notes the gradient of every step."""

    def __init__(self, model):
        super().__init__(model, Grid(), lr=0.0)
        self.seen = []

    def step(self, lr, *loss):
        self.seen.append(torch.cat([g.flatten() for g in self.sum_over_dp()]).clone())
        return super().step(lr, *loss)


# -------------------------------------------------------------------------------- the exact policy gradient


PROMPT, VOCAB, LONGEST = [2, 1], 4, 3


def every_answer():
    """All 40 answers of a policy: those that STOP ends after 1, 2 or 3 tokens, and those cut off at 3."""
    going, done = [[]], []
    for _ in range(LONGEST):
        longer = [answer + [token] for answer in going for token in range(VOCAB)]
        done += [answer for answer in longer if answer[-1] == STOP]
        going = [answer for answer in longer if answer[-1] != STOP]
    return done + going


class Enumerated:
    """Every answer as one rollout: weighted by probability, a sum over its rows is an exact expectation."""

    def __init__(self, monkeypatch, kl="k1"):
        cfg, self.answers = small_config(vocab_size=VOCAB, num_hidden_layers=1), every_answer()
        self.policy, self.reference = random_model(LanguageModel, cfg, 3), random_model(LanguageModel, cfg, 4)
        self.scorer = random_model(ScalarModel, cfg, 5)
        monkeypatch.setattr(
            reinforce,
            "generate",
            lambda policy, prompts, *_, **__: (self.answers, [a[-1] != STOP for a in self.answers]),
        )
        prompts = [PROMPT] * len(self.answers)
        self.rollout = collect_rollout(
            self.policy, self.reference, bind_reward("qrm", self.scorer), prompts, [STOP], config(kl=kl), 0
        )
        self.mask = self.rollout.response_mask
        # the reference: no token_logprobs, no rollout, only a softmax at every state
        self.pi, self.ref = {}, {}
        for prefix in [[]] + [a for a in self.answers if a[-1] != STOP] + [a[:-1] for a in self.answers]:
            if len(prefix) < LONGEST and tuple(prefix) not in self.pi:
                for dist, model in ((self.pi, self.policy), (self.ref, self.reference)):
                    dist[tuple(prefix)] = model.logits(model.model(torch.tensor([PROMPT + prefix])))[
                        0, -1
                    ].log_softmax(-1)
        self.probability = [self.chance(a) for a in self.answers]
        assert (
            len(self.answers) == 40
            and len(self.pi) == 13
            and sum(self.probability).item() == pytest.approx(1, rel=1e-5)
        )

    def chance(self, answer):
        return math.prod(
            (self.pi[tuple(answer[:t])][a].exp() for t, a in enumerate(answer)), start=torch.ones(())
        )

    def score(self, prefix):
        """r of the last token of a prefix"""
        return self.scorer.scalars(self.scorer.model(torch.tensor([PROMPT + list(prefix)])))[0, -1].detach()

    def expected_gradient(self, weights):
        """E[sum_t A_t grad log pi(a_t | s_t)] by reinforce_loss, a mean of tokens: rows count p * tokens."""
        logprobs, _ = token_logprobs(self.policy, self.rollout.ids, self.mask)
        share = torch.stack(self.probability).detach()[:, None] * self.mask.sum()
        return -gradient(reinforce_loss(logprobs, weights * share, self.mask)[0], self.policy)

    def per_state(self, f):
        """sum_s d(s) f(s), d fixed: what a policy gradient without reward accumulation climbs"""
        return sum(self.chance(list(s)).detach() * f(s) for s in self.pi)

    def q_value(self, s):
        return sum(self.pi[s][a].exp() * self.score(s + (a,)) for a in range(VOCAB))

    def kl(self, s):
        return (self.pi[s].exp() * (self.pi[s] - self.ref[s])).sum()


def test_returns_give_the_gradient_of_the_expected_reward(monkeypatch):
    world = Enumerated(monkeypatch)
    weights = reinforce_advantages(world.rollout, config(advantage="return", standardize="none"), Grid())
    rewards = [sum(world.score(a[: t + 1]) for t in range(len(a))) for a in world.answers]
    exact = gradient(sum(p * r for p, r in zip(world.probability, rewards)), world.policy)
    near(world.expected_gradient(weights), exact)
    # reward-to-go leaves out only what has expectation 0: the whole return on every token has the same mean
    whole = torch.stack(rewards)[:, None] * world.mask
    assert not torch.allclose(whole, weights)
    near(world.expected_gradient(whole), exact, 3e-5)


def test_token_rewards_give_the_gradient_at_each_state(monkeypatch):
    world = Enumerated(monkeypatch)
    weights = reinforce_advantages(world.rollout, config(standardize="none"), Grid())
    near(world.expected_gradient(weights), gradient(world.per_state(world.q_value), world.policy))


def test_a_baseline_leaves_the_gradient_unchanged(monkeypatch):
    world = Enumerated(monkeypatch, kl="exact")
    weights = reinforce_advantages(world.rollout, config(standardize="none"), Grid())
    plain = world.expected_gradient(weights)
    near(world.expected_gradient(weights + 3.0), plain, 3e-5)
    values = world.scorer.scalars(
        world.scorer.model(world.rollout.ids[:, :-1])
    ).detach()  # any function of the state
    assert values[world.mask].std() > 0.3
    near(world.expected_gradient(weights - values), plain, 3e-5)
    acting = world.scorer.scalars(world.scorer.model(world.rollout.ids))[
        :, 1:
    ].detach()  # a function of the action is none
    assert (world.expected_gradient(weights - acting) - plain).norm() > 0.3 * plain.norm()
    # so, without accumulation, the penalty by the exact KL of the state is not felt, whatever its weight
    penalised = reinforce_advantages(
        world.rollout, config(standardize="none", kl="exact", kl_coef=5.0), Grid()
    )
    assert (penalised - weights).abs().max() > 1
    near(world.expected_gradient(penalised), plain, 3e-5)


def one_state(scale):
    """A softmax policy over 6 actions, and a reference whose logits are `scale` away (fp64)."""
    generator = torch.Generator().manual_seed(4)
    logits, direction = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_(True)
    return logits, logits.log_softmax(0), (logits.detach() + scale * direction).log_softmax(0)


def test_k3_in_the_loss_has_the_gradient_of_the_forward_kl():
    """All six actions as answers of one token, weighted by probability: the expectation, enumerated."""
    logits, log_pi, log_ref = one_state(0.7)
    weights = log_pi.detach().exp()
    chunk = types.SimpleNamespace(
        old_logprobs=log_pi.detach()[:, None],
        kl_k1=(log_pi.detach() - log_ref)[:, None],
        response_mask=torch.ones(6, 1, dtype=torch.bool),
    )
    rows = [{name: value[i : i + 1] for name, value in vars(chunk).items()} for i in range(6)]
    k3 = [kl_loss(log_pi[i : i + 1, None], types.SimpleNamespace(**row)) for i, row in enumerate(rows)]
    k3 = torch.stack(k3)
    (found,) = torch.autograd.grad((weights * k3).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((log_ref.exp() * (log_ref - log_pi)).sum(), logits)  # KL(ref || pi)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert kl_loss(log_pi[:, None], chunk).item() == pytest.approx(k3.mean().item())


def test_k3_as_a_reward_is_of_second_order():
    """Ten times nearer to the reference, k1's expected gradient is a tenth, and k3's a hundredth."""
    norms = {"k1": [], "k3": []}
    for scale in (1e-3, 1e-4):
        logits, log_pi, log_ref = one_state(scale)
        for name, penalty in zip(("k1", "k3"), kl_estimates(log_pi.detach(), log_ref)):
            expected = (log_pi.detach().exp() * penalty * log_pi).sum()
            norms[name].append(torch.autograd.grad(expected, logits, retain_graph=True)[0].norm().item())
    assert norms["k1"][0] / norms["k1"][1] == pytest.approx(10, rel=0.05)
    assert norms["k3"][0] / norms["k3"][1] == pytest.approx(100, rel=0.05)


def test_k1_has_the_gradient_of_the_kl(monkeypatch):
    world = Enumerated(monkeypatch)
    zeros = {"standardize": "none", "kl_coef": 1.0}
    world.rollout.scores.zero_()
    near(
        world.expected_gradient(reinforce_advantages(world.rollout, config(**zeros), Grid())),
        -gradient(world.per_state(world.kl), world.policy),
    )
    # accumulated, it is that of the KL between the distributions over whole answers
    log_ref = [
        sum(world.ref[tuple(a[:t])][token].detach() for t, token in enumerate(a)) for a in world.answers
    ]
    whole = sum(p * (p.log() - q) for p, q in zip(world.probability, log_ref))
    near(
        world.expected_gradient(
            reinforce_advantages(world.rollout, config(advantage="return", **zeros), Grid())
        ),
        -gradient(whole, world.policy),
    )
    # k3 has the KL as its mean, but not its gradient
    k3 = world.expected_gradient(reinforce_advantages(world.rollout, config(kl="k3", **zeros), Grid()))
    kl = gradient(world.per_state(world.kl), world.policy)
    assert (k3 + kl).norm() > 0.1 * kl.norm()


# -------------------------------------------------------------------------------- the rollout


@pytest.mark.parametrize("kl", ["k1", "exact"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_rollout_token_by_token(temperature, kl):
    policy, given = a_policy(), []
    scorer = random_model(ScalarModel, policy.cfg, seed=51)

    def reward_fn(ids, mask):  # what a reward model says about prompts and pads is nobody's business
        given.append((ids, mask))
        return poisoned(token_scores(scorer, ids).detach(), mask)

    cfg = config(temperature=temperature, kl=kl, batch_size=12, micro_tokens=30, group_size=2)
    rollout = a_rollout(policy, cfg, n=6, reward=Reward(reward_fn), seed=1)
    reference = random_model(LanguageModel, policy.cfg, seed=50)
    lengths = rollout.response_mask.sum(1).tolist()
    assert len(set(lengths)) > 2 and rollout.truncated.any() and not rollout.truncated.all()
    assert [len(ids) for ids, _ in given] == [
        b - a for a, b in minibatches(rollout.lengths(), cfg)[0]
    ] and len(given) > 2
    assert torch.equal(rollout.reward_mask, rollout.response_mask)
    for i in range(12):
        prompt = random_ids(
            1 + i // 2 % 3, vocab=7, seed=i // 2
        ).tolist()  # neighbours answer the same prompt
        row, n = rollout.ids[i].tolist(), lengths[i]
        answer = row[len(prompt) : len(prompt) + n]
        assert row[: len(prompt)] == prompt
        assert rollout.response_mask[i].tolist() == [
            len(prompt) - 1 <= t < len(prompt) - 1 + n for t in range(len(row) - 1)
        ]
        assert STOP not in answer[:-1] and rollout.truncated[i].item() == (answer[-1] != STOP)
        assert n == 6 if rollout.truncated[i] else n <= 6
        for t in range(len(row) - 1):
            found = {
                k: v[i, t].item()
                for k, v in vars(rollout).items()
                if k in ("old_logprobs", "entropy", "kl_k1", "kl_k3", "kl_exact", "scores")
            }
            if not rollout.response_mask[i, t]:
                assert set(found.values()) == {0.0}
                continue
            state, action = torch.tensor([row[: t + 1]]), row[t + 1]
            log_pi, log_ref = [
                (m.logits(m.model(state))[0, -1].double() / temperature).log_softmax(-1)
                for m in (policy, reference)
            ]
            k1 = (log_pi - log_ref)[action].item()
            expected = {
                "old_logprobs": log_pi[action].item(),
                "entropy": -(log_pi.exp() * log_pi).sum().item(),
                "kl_k1": k1,
                "kl_k3": math.exp(-k1) - 1 + k1,
                "kl_exact": (log_pi.exp() * (log_pi - log_ref)).sum().item() if kl == "exact" else 0.0,
                "scores": scorer.scalars(scorer.model(torch.tensor([row[: t + 2]])))[
                    0, -1
                ].item(),  # the stop token has one too
            }
            assert found == pytest.approx(expected, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("kl", ["k1", "exact"])
def test_training_starts_from_the_very_bits_of_the_rollout(kl):
    policy = a_policy()
    cfg = config(temperature=0.7, kl=kl, batch_size=11, micro_tokens=12, minibatch=4)
    rollout = a_rollout(policy, cfg, n=11, seed=1)
    cuts = minibatches(rollout.lengths(), cfg)
    assert (
        len(cuts) == 3
        and any(len(spans) > 1 for spans in cuts)
        and any(b - a > 1 for spans in cuts for a, b in spans)
    )
    for a, b in (span for spans in cuts for span in spans):
        chunk = rollout.rows(a, b)
        logprobs, _ = token_logprobs(policy, chunk.ids, chunk.response_mask, cfg.temperature)
        assert logprobs.requires_grad and torch.equal(logprobs, chunk.old_logprobs)


def test_rows_are_cut_without_pads_and_joined_again():
    """In order, without columns that only longer rows need; the results are (B, T) fp32, else 0."""
    examples = [Example([5, 6], [7] * n) for n in (3, 1, 4, 2, 6, 1)]
    ids, mask = collate(examples)
    parts = list(cut_rows(ids, mask, [[(0, 2), (2, 3)], [(3, 6)]]))
    longest = (3, 4, 6)  # answers of each part; prompts have 2 tokens
    rows = (2, 1, 3)
    assert [part_ids.shape for part_ids, _ in parts] == [(b, 2 + n) for b, n in zip(rows, longest)]
    assert [part_mask.shape for _, part_mask in parts] == [(b, 1 + n) for b, n in zip(rows, longest)]
    targets = join_rows([part_ids[:, 1:].double() + 1 for part_ids, _ in parts], 7)
    masks = join_rows([part_mask for _, part_mask in parts], 7)
    for x in (targets, masks):
        assert x.shape == mask.shape and x.dtype == torch.float32
    assert torch.equal(masks, mask.float())
    widths = torch.tensor([4, 4, 5, 7, 7, 7])[:, None]
    assert torch.equal(targets, (ids[:, 1:] + 1.0) * (torch.arange(7) < widths))


def test_rows_keep_their_content():
    rollout = a_rollout(a_policy(), config(), n=8)
    widths = set()
    for a, b in [(0, 8), *((i, i + 1) for i in range(8)), (2, 5)]:
        part = rollout.rows(a, b)
        used = max(t for row in rollout.response_mask[a:b].tolist() for t, on in enumerate(row) if on) + 1
        widths.add(used)
        for name, x in vars(part).items():
            whole = getattr(rollout, name)[a:b]
            if name == "truncated":
                assert torch.equal(x, whole)
            else:
                width = used + 1 if name == "ids" else used
                assert (
                    x.shape == (b - a, width)
                    and torch.equal(x, whole[:, :width])
                    and not whole[:, width:].any()
                )
    assert len(widths) > 2


@pytest.mark.parametrize(
    "rows, batch_size, minibatch, micro_rows, sizes",
    [
        (8, 8, 0, 8, [[8]]),
        (8, 8, 0, 3, [[3, 3, 2]]),
        (8, 8, 4, 4, [[4], [4]]),
        (8, 8, 4, 3, [[3, 1], [3, 1]]),
        (7, 8, 4, 2, [[2, 1], [2, 2]]),
        (4, 8, 4, 4, [[2], [2]]),
        (2, 2, 64, 16, [[2]]),
    ],
)
def test_minibatches_by_hand(rows, batch_size, minibatch, micro_rows, sizes):
    cuts = minibatches(
        [7] * rows, config(batch_size=batch_size, minibatch=minibatch, micro_tokens=7 * micro_rows + 6)
    )
    assert [[b - a for a, b in spans] for spans in cuts] == sizes
    assert [i for spans in cuts for a, b in spans for i in range(a, b)] == list(range(rows))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_answers_are_as_frequent_as_their_old_logprobs_say(temperature):
    n, answers = 6000, every_answer()
    policy = random_model(LanguageModel, small_config(vocab_size=VOCAB, num_hidden_layers=1), seed=3)
    cfg = config(temperature=temperature, group_size=n, batch_size=n, max_new_tokens=LONGEST)
    rollout = collect_rollout(policy, policy, CONSTANT, [PROMPT], [STOP], cfg, seed=1)
    counts, claimed = dict.fromkeys(map(tuple, answers), 0), {}
    for ids, length, logprob in zip(
        rollout.ids.tolist(), rollout.response_mask.sum(1).tolist(), rollout.old_logprobs.sum(1).tolist()
    ):
        answer = tuple(ids[len(PROMPT) : len(PROMPT) + length])
        counts[answer] += 1
        claimed[answer] = math.exp(logprob)

    def chi_square(at):
        """Over answers expected five times or more, the rest in one bin. -> statistic, degrees of freedom"""
        ids, mask = collate([Example(PROMPT, a) for a in answers])
        expected = {
            tuple(a): n * p
            for a, p in zip(answers, token_logprobs(policy, ids, mask, at)[0].sum(1).exp().tolist())
        }
        if at == temperature:
            assert all(claimed[a] == pytest.approx(expected[a] / n, rel=1e-4) for a in claimed)
        bins = [(counts[a], e) for a, e in expected.items() if e >= 5]
        rest = n - sum(c for c, _ in bins), n - sum(e for _, e in bins)
        bins += [rest] if rest[1] > 1 else []
        return sum((c - e) ** 2 / e for c, e in bins), len(bins) - 1

    statistic, freedom = chi_square(temperature)
    assert freedom > 15 and statistic < freedom + 4 * (2 * freedom) ** 0.5  # mean + 4 deviations
    assert chi_square(1.7 - temperature)[0] > 10 * freedom  # the other temperature: 0.7 for 1 and 1 for 0.7


def test_rollout_stats_by_hand():
    mask = ragged((1, 3), (0, 1), width=3)
    spoken = ragged((2, 3), (0, 1), width=3)
    x = {
        k: tensor([0, a, b], [c, 0, 0])
        for k, (a, b, c) in {
            "entropy": (1, 2, 6),
            "kl_k1": (-1, 2, 2),
            "kl_k3": (0, 1, 5),
            "scores": (100, 4, 2),
        }.items()
    }
    rollout = Rollout(
        ids=torch.zeros(2, 4),
        response_mask=mask,
        truncated=torch.tensor([True, False]),
        old_logprobs=mask * 1.0,
        kl_exact=mask * 9.0,
        reward_mask=spoken,
        **x,
    )
    assert rollout_stats(rollout, Grid()) == {
        "reward": 3,
        "kl_k1": 1,
        "kl_k3": 2,
        "entropy": 3,
        "response_length": 1.5,
        "truncated": 0.5,
    }


# -------------------------------------------------------------------------------- KL


def test_k1_and_k3_have_the_kl_as_their_mean():
    log_pi, log_ref = ((2 * grow(20, 5, seed=seed).double()).log_softmax(-1) for seed in (0, 1))
    k1, k3 = kl_estimates(log_pi, log_ref)
    exact = torch.nn.functional.kl_div(log_ref, log_pi, log_target=True, reduction="none").sum(
        -1
    )  # torch's KL(pi || ref)
    near((log_pi.exp() * k1).sum(-1), exact, 1e-12)
    near((log_pi.exp() * k3).sum(-1), exact, 1e-12)
    assert (k1 < 0).any() and (k3 >= 0).all() and k3.max() > 1
    assert kl_estimates(tensor([-1.0]), tensor([-1.0 + 2**-12]))[1].item() == pytest.approx(
        2**-25, rel=1e-2
    )  # x^2 / 2: no cancellation


@pytest.mark.parametrize("kl", ["k1", "exact"])
def test_a_policy_is_at_distance_0_from_itself(kl):
    policy = a_policy()
    rollout = collect_rollout(
        policy,
        policy,
        CONSTANT,
        [[1, 2], [3]],
        [STOP],
        config(kl=kl, batch_size=2),
        seed=0,
    )
    for x in (rollout.kl_k1, rollout.kl_k3, rollout.kl_exact):
        assert (x == 0).all()


def test_kl_penalty_is_the_one_that_is_named():
    rollout = a_rollout(a_policy(), config(kl="exact"))
    for name, x in {
        "k1": rollout.kl_k1,
        "k3": rollout.kl_k3,
        "exact": rollout.kl_exact,
        "abs": rollout.kl_k1.abs(),
    }.items():
        assert torch.equal(kl_penalty(rollout, name), x)
    assert (rollout.kl_k1 < 0).any() and (rollout.kl_k3 >= 0).all() and (rollout.kl_exact >= 0).all()


# -------------------------------------------------------------------------------- rewards to advantages


MASK = ragged((1, 4), (0, 6), (2, 3), width=6)


@pytest.mark.parametrize("how", ["mean_std", "std", "none"])
def test_standardize_is_numpys_mean_and_std(how):
    rewards = 5 + 3 * grow(3, 6)
    rewards[0, 0] = 1e6  # a prompt's score
    picked = rewards[MASK].double().numpy()
    assert len(picked) == 10
    mean, std = {"mean_std": (picked.mean(), picked.std()), "std": (0, picked.std()), "none": (0, 1)}[
        how
    ]  # np.std: the population's
    out = standardize(rewards, MASK, how, Grid())
    near(out[MASK], torch.tensor((picked - mean) / std), 1e-6)
    assert (out[~MASK] == 0).all() and torch.equal(
        out, standardize(poisoned(rewards, MASK), MASK, how, Grid())
    )
    if how == "mean_std":
        assert abs(out[MASK].mean()) < 1e-6 and out[MASK].std(correction=0).item() == pytest.approx(
            1, rel=1e-6
        )


@pytest.mark.parametrize("value", [0.0, 0.1, 7.0, -1e4])
def test_equal_rewards(value):
    rewards = torch.full((3, 6), value)
    assert (standardize(rewards, MASK, "mean_std", Grid()) == 0).all()
    for how in ("std", "none"):
        assert torch.equal(standardize(rewards, MASK, how, Grid()), rewards * MASK)


def test_moments_are_of_the_places_where_the_reward_model_speaks():
    rewards = tensor([9, 0, 0, 1, 9, 9], [0, 0, 0, 0, 0, 3], [9, 9, 5, 9, 9, 9])  # 1, 3, 5 at the last tokens
    last = ragged((3, 4), (5, 6), (2, 3), width=6)
    expected = torch.zeros(3, 6)
    expected[last] = tensor(-1, 0, 1) * 1.5**0.5  # variance 8/3
    near(standardize(rewards, last, "mean_std", Grid()), expected, 1e-6)


def test_eos_to_mean_by_hand():
    rewards = tensor([9, 1, 2, 6, 9, 9], [1, 2, 3, 4, 5, 9], [9, 9, 7, 9, 9, 9])
    assert eos_to_mean(rewards, MASK).tolist() == [[9, 1, 2, 3, 9, 9], [1, 2, 3, 4, 5, 4], [9, 9, 7, 9, 9, 9]]
    out = eos_to_mean(poisoned(rewards, MASK), MASK)
    assert out[MASK].tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 4, 7] and rewards[0, 3] == 6  # a new tensor


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_to_go_are_a_double_loop(gamma):
    rewards = grow(3, 6)
    out = returns_to_go(poisoned(rewards, MASK), MASK, gamma)
    for i in range(3):
        for t in range(6):
            later = range(t, 6) if MASK[i, t] else ()
            expected = sum(gamma ** (u - t) * rewards[i, u].item() for u in later if MASK[i, u])
            assert out[i, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_group_advantages_by_hand():
    rewards = tensor(1, 0, 0, 3, 2, 2, 2, 2)
    near(
        group_advantages(rewards, 4, "rloo"), tensor(0, -4 / 3, -4 / 3, 8 / 3, 0, 0, 0, 0), 1e-6
    )  # 3 - mean(1, 0, 0) = 8/3
    std = 2**0.5  # squares 0, 1, 1, 4 over 3
    near(group_advantages(rewards, 4, "grpo"), tensor(0, -1 / std, -1 / std, 2 / std, 0, 0, 0, 0), 1e-5)
    assert group_advantages(tensor(1, 0, 5, 5), 2, "rloo").tolist() == [1, -1, 0, 0]
    for how in ("rloo", "grpo"):
        with pytest.raises(ValueError, match="--group_size 2"):
            group_advantages(rewards, 1, how)


SCALES = [1e-3, 1.0, 45.0, 1e3]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [2, 3, 7, 8, 16])
def test_groups_that_say_nothing_get_exactly_0(dtype, scale, size):
    """Equal rewards, and rewards that differ by some units in the last place, as forward passes give them."""
    values = (2 * torch.rand(500, generator=torch.Generator().manual_seed(0)) - 1) * scale
    equal = values.to(dtype).repeat_interleave(size)
    noise = torch.randint(-4, 5, equal.shape, generator=torch.Generator().manual_seed(1))
    nearly = equal * (1 + noise * 2**-24) if dtype == torch.float32 else equal
    for how in ("rloo", "grpo"):
        for rewards in (equal, nearly):
            found = group_advantages(rewards, size, how)
            assert found.dtype == dtype and not found.any()
    real = (grow(500, size).clamp(-2, 2) + 6 * torch.arange(size)).to(
        dtype
    ) * scale  # and these do say something
    assert (group_advantages(real.flatten(), size, "grpo").view(500, size).abs().amax(1) > 0.5).all()


@pytest.mark.parametrize("how", ["rloo", "grpo"])
def test_the_size_of_what_was_summed_decides_what_is_rounding(how):
    """A mean near 0 of large scores has their rounding error, which only its size tells from a difference."""
    rewards = tensor([1e-3, 1.02e-3, 1e-3, 0.98e-3])[0]
    assert group_advantages(rewards, 4, how).abs().max() > 1e-5
    assert group_advantages(rewards, 4, how, torch.full((4,), 0.1)).abs().max() > 1e-5
    assert not group_advantages(rewards, 4, how, torch.full((4,), -30.0)).any()
    mask = torch.ones(2, 4, dtype=torch.bool)
    scores = tensor([30, -30, 0.001, 0], [30, -30, 0.0012, 0])
    cfg = config(advantage=how, group_size=2)
    assert not reinforce_advantages(hand_made(scores, mask, 0.0, mask), cfg, Grid()).any()
    scores[:, :2] /= 1e4
    assert reinforce_advantages(hand_made(scores, mask, 0.0, mask), cfg, Grid()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_advantages_under_permutations_shifts_and_scales(dtype):
    groups = grow(20, 8).to(dtype)
    advantages = {how: group_advantages(groups.flatten(), 8, how).view(20, 8) for how in ("rloo", "grpo")}
    order, prompts = torch.randperm(8), torch.randperm(20)
    for how, expected in advantages.items():
        found = group_advantages(groups[prompts][:, order].flatten(), 8, how).view(20, 8)
        near(found, expected[prompts][:, order], 1e-6 if dtype == torch.float32 else 1e-2)
        for scale in (2.0**-10, 2.0**10):  # powers of two: exact, however small or large
            found = group_advantages((groups * scale).flatten(), 8, how).view(20, 8)
            assert torch.equal(found, expected * (scale if how == "rloo" else 1))
        near(group_advantages(-groups.flatten(), 8, how), -expected.flatten(), 1e-6)
    if dtype == torch.float32:
        for shift in (1.0, -300.0, 1e3):
            found = group_advantages((groups + shift).flatten(), 8, "grpo")
            near(found, advantages["grpo"].flatten(), 1e-3)  # what is left of the digits of fp32


@pytest.mark.parametrize("how", ["mean_std", "std"])
@pytest.mark.parametrize("scale", SCALES)
def test_standardize_under_permutations_shifts_and_scales(how, scale):
    rewards = grow(3, 6)
    expected = standardize(rewards, MASK, how, Grid())
    near(standardize(rewards * scale, MASK, how, Grid()), expected, 1e-6)
    order = torch.tensor([2, 0, 1])
    near(standardize(rewards[order], MASK[order], how, Grid()), expected[order], 1e-6)
    near(standardize((scale * rewards).bfloat16(), MASK, how, Grid()).float(), expected, 2e-2)
    if how == "mean_std":
        near(standardize(scale * (rewards + 300), MASK, how, Grid()), expected, 2e-4)
        near(standardize(-rewards, MASK, how, Grid()), -expected, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_up_to_rounding_are_not_blown_up(dtype, scale):
    equal = torch.full((3, 6), 0.4507 * scale, dtype=dtype)
    assert not standardize(equal, MASK, "mean_std", Grid()).any()
    assert torch.equal(standardize(equal, MASK, "std", Grid()), equal * MASK)
    noise = torch.randint(-4, 5, (3, 6), generator=torch.Generator().manual_seed(1))
    nearly = 0.4507 * scale * (1 + noise * 2**-24)
    assert standardize(nearly, MASK, "mean_std", Grid()).abs().max() <= 1e-6 * scale
    near(standardize(nearly, MASK, "std", Grid()), nearly * MASK, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_estimates_at_every_scale(dtype):
    """Against the definition in fp64; a ratio beyond fp32 is bounded, and no estimate is below 0 but k1."""
    for scale in (1e-3, 1.0, 50.0, 1e3):
        k1 = (scale * grow(200)).to(dtype)
        found, k3 = kl_estimates(k1, torch.zeros_like(k1))
        assert torch.equal(found, k1) and torch.isfinite(k3).all() and (k3 >= 0).all()
        exact = torch.expm1(-k1.double()) + k1.double()
        usual = k1 > -59
        accuracy = 2e-7 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(
            k3.double()[usual], exact[usual], rtol=20 * accuracy, atol=accuracy * min(scale, 1)
        )
        assert torch.isfinite(k3.float().sum())


@pytest.mark.parametrize("drift", [1e-3, 1.0, 50.0, 59.0, 61.0, 1e3])
def test_k3_never_pulls_away_from_the_reference(drift):
    """Its gradient is 1 - ref / pi; where the ratio is bounded, k1 alone would push pi further down."""
    logprobs = torch.tensor([-1.0 - drift, -1.0 + drift], requires_grad=True)
    kl_estimates(logprobs, torch.tensor([-1.0, -1.0]))[1].sum().backward()
    below, above = logprobs.grad.double()
    assert below <= 0 < above and torch.isfinite(below)
    if drift < 60:
        assert below.item() == pytest.approx(1 - math.exp(drift), rel=1e-3)


def hand_made(scores, reward_mask=MASK, kl=0.0, response_mask=MASK):
    zeros = torch.zeros(response_mask.shape)
    return Rollout(
        ids=torch.zeros(len(zeros), zeros.shape[1] + 1, dtype=torch.int64),
        response_mask=response_mask,
        truncated=zeros[:, 0] > 0,
        old_logprobs=zeros,
        entropy=zeros,
        kl_k1=zeros + kl,
        kl_k3=zeros,
        kl_exact=zeros,
        scores=scores,
        reward_mask=reward_mask,
    )


def test_advantages_by_hand():
    last = ragged((3, 4), (5, 6), (2, 3), width=6)
    scores = tensor([0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 3], [0, 0, 5, 0, 0, 0])
    outcome, z = hand_made(scores, last, kl=0.5), 1.5**0.5
    returns = reinforce_advantages(outcome, config(advantage="return", kl_coef=0.2), Grid())
    near(
        returns,
        tensor(
            [0, -z - 0.3, -z - 0.2, -z - 0.1, 0, 0],
            [-0.6, -0.5, -0.4, -0.3, -0.2, -0.1],
            [0, 0, z - 0.1, 0, 0, 0],
        ),
        1e-6,
    )
    halved = reinforce_advantages(outcome, config(advantage="return", standardize="none", gamma=0.5), Grid())
    near(
        halved,
        tensor([0, 0.25, 0.5, 1, 0, 0], [3 / 32, 3 / 16, 3 / 8, 0.75, 1.5, 3], [0, 0, 5, 0, 0, 0]),
        1e-6,
    )
    token = hand_made(tensor([9, 1, 2, 6, 9, 9], [1, 2, 3, 4, 5, 9], [9, 9, 7, 9, 9, 9]), kl=0.5)
    eos = reinforce_advantages(
        token, config(standardize="none", eos_to_mean=True, kl_coef=2.0), Grid()
    )  # the penalty comes after the mean
    assert eos.tolist() == [[0, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 3], [0, 0, 6, 0, 0, 0]]
    with pytest.raises(ValueError, match="gae"):
        reinforce_advantages(token, config(advantage="gae"), Grid())


@pytest.mark.parametrize("eos", [False, True])
def test_shaped_rewards_are_the_three_steps_one_by_one(eos):
    scores = 5 + 2 * grow(3, 6)
    z_std, rewards = shape_rewards(hand_made(scores, kl=0.5), config(kl_coef=0.3, eos_to_mean=eos), Grid())
    for i in range(3):
        picked = scores[MASK].double()
        row = ((scores[i][MASK[i]].double() - picked.mean()) / picked.std(correction=0)).tolist()
        row = row[:-1] + [sum(row) / len(row)] if eos else row
        near(z_std[i][MASK[i]], torch.tensor(row), 1e-6)
        near(rewards[i][MASK[i]], torch.tensor(row) - 0.15, 1e-6)
    assert not z_std[~MASK].any() and not rewards[~MASK].any()


@pytest.mark.parametrize("how", ["rloo", "grpo"])
def test_group_advantages_stand_on_every_token(how):
    mask = ragged((1, 4), (0, 6), (2, 3), (0, 2), width=6)
    scores = 2 * grow(4, 6)
    last = ragged((3, 4), (5, 6), (2, 3), (1, 2), width=6)
    for reward_mask in (mask, last):
        rollout = hand_made(scores, reward_mask, 3, mask)
        out = reinforce_advantages(rollout, config(advantage=how, group_size=2, kl_coef=0.1), Grid())
        means = [np.mean([scores[i, t].item() for t in range(6) if reward_mask[i, t]]) for i in range(4)]
        for i in range(4):
            other = means[i ^ 1]
            a = (
                means[i] - other if how == "rloo" else math.copysign(0.5**0.5, means[i] - other)
            )  # two numbers are 1/sqrt(2) deviations off
            near(out[i], (a - 0.3) * mask[i].double(), 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(standardize="std"),
        dict(standardize="none", eos_to_mean=True),
        dict(advantage="return", gamma=0.9),
        dict(advantage="rloo", group_size=3),
        dict(advantage="grpo", group_size=3),
    ],
    ids=str,
)
def test_what_stands_outside_the_mask_changes_no_advantage(changes):
    cfg, clean = config(kl_coef=0.3, **changes), hand_made(grow(3, 6) * MASK, kl=0.5)
    dirty = hand_made(poisoned(clean.scores, MASK))
    dirty.kl_k1 = poisoned(clean.kl_k1, MASK)
    expected = reinforce_advantages(clean, cfg, Grid())
    assert (
        torch.equal(reinforce_advantages(dirty, cfg, Grid()), expected)
        and expected[MASK].all()
        and not expected[~MASK].any()
    )


# -------------------------------------------------------------------------------- the update


def test_reinforce_loss_and_its_gradient_by_hand():
    logprobs, weights = grow(3, 6, seed=1), grow(3, 6, seed=2).requires_grad_()
    total = sum(
        -weights[i, t].item() * logprobs[i, t].item() for i in range(3) for t in range(6) if MASK[i, t]
    )
    given = poisoned(logprobs, MASK).requires_grad_()
    loss, stats = reinforce_loss(given, poisoned(weights, MASK), MASK)
    assert loss.item() == pytest.approx(total / 10, rel=1e-6) and stats == {}
    loss.backward()
    near(given.grad, -weights * MASK / 10, 1e-6)
    assert weights.grad is None


@pytest.mark.parametrize("minibatch", [0, 4])
def test_the_gradient_does_not_depend_on_micro_batches(minibatch):
    policy = a_policy()
    cfg = config(temperature=0.7, kl_coef=0.1, minibatch=minibatch)
    rollout = a_rollout(policy, cfg)
    weights = reinforce_advantages(rollout, cfg, Grid())
    expected, losses = [], []
    for rows in (
        (slice(0, 8),) if not minibatch else (slice(0, 4), slice(4, 8))
    ):  # no cut, no trimming, a dense softmax
        log_pi = (policy.logits(policy.model(rollout.ids[rows, :-1])) / 0.7).log_softmax(-1)
        picked = log_pi.gather(-1, rollout.ids[rows, 1:, None])[..., 0]
        losses.append(-(picked * weights[rows]).sum() / rollout.response_mask[rows].sum())
        expected.append(gradient(losses[-1], policy))
    for micro_tokens in (1, 12, 30, 1000):
        optimizer = Recorder(policy)
        stats = reinforce_step(
            policy, optimizer, rollout, dataclasses.replace(cfg, micro_tokens=micro_tokens), lr=0.0
        )
        assert len(optimizer.seen) == len(expected)
        for found, wanted in zip(optimizer.seen, expected):
            assert (found - wanted).norm() <= 1e-6 * wanted.norm()
        assert stats["loss"] == pytest.approx(sum(x.item() for x in losses) / len(losses), rel=1e-5, abs=1e-7)
        assert stats["grad_norm"] == pytest.approx(
            sum(x.norm().item() for x in expected) / len(expected), rel=1e-5
        )


def test_reinforce_learns_to_say_a_token():
    """One state, one action, reward 1 for token 3."""
    policy, cfg = a_policy(), config(batch_size=64, group_size=64, max_new_tokens=1)
    optimizer, chances = Optimizer(policy, Grid(), lr=0.01), []
    for step in range(8):
        rollout = collect_rollout(policy, policy, Reward(says_token_3), [[1, 2]], [STOP], cfg, seed=step)
        chances.append(rollout.scores.sum().item() / 64)
        reinforce_step(policy, optimizer, rollout, cfg, lr=0.01)
    assert 0 < chances[0] < 0.5 and chances[-1] > 0.95, chances
