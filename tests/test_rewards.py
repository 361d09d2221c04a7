"""Rewards of real models on three tokens: each stands at its token, whatever pads follow; losses against torch and loops."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import near, random_model, small_config
from test_reinforce import a_policy, a_rollout, config, gradient, grow, poisoned, ragged, tensor

from data import Example, collate
from model import LanguageModel, ScalarModel
from parallel import Grid
from qrm import (
    POLICY_LIKE,
    REWARD_MODELS,
    dpo_loss,
    dpo_reward,
    last_token_mask,
    logit_reward,
    orm_loss,
    outcome_loss,
    outcome_reward,
    pairwise_loss,
    plackett_luce_loss,
    qrm_loss,
    reward_function,
    reward_model_loss,
    sequence_score,
    step_end_mask,
    step_loss,
    step_reward,
    token_reward,
)
from reinforce import advantages

STOP, LINE, OTHER_LINE = 2, 7, 9  # two tokens end a line
PROMPT = [3, LINE, 11]  # its line end is none of the answer's steps
ANSWERS = [[5, LINE, STOP], [5, 20, 13], [OTHER_LINE, 4, 6, LINE, 8, STOP], [STOP]]  # the second is cut off
PADS = [0, STOP, LINE]  # a pad is known by its place, not by its id


def scorer():
    return random_model(ScalarModel, small_config(), seed=8)


def z_alone(model, answer):
    """Z of each token: what the model says when the answer ends there, without pads and without what comes later"""
    return [
        model.scalars(model.model(torch.tensor([PROMPT + answer[: t + 1]])))[0, -1].item()
        for t in range(len(answer))
    ]


def log_ratios(policy, reference, answer):
    """log pi(a_t | s_t) - log ref(a_t | s_t), each state read alone"""
    out = []
    for t, token in enumerate(answer):
        state = torch.tensor([PROMPT + answer[:t]])
        log_pi, log_ref = (
            m.logits(m.model(state))[0, -1].log_softmax(-1)[token].item() for m in (policy, reference)
        )
        out.append(log_pi - log_ref)
    return out


def check(reward_fn, expected, pad_id):
    """`expected`: one list of rewards an answer; in the batch of all answers they begin at the last prompt token's column."""
    ids, mask = collate([Example(PROMPT, a) for a in ANSWERS], pad_id=pad_id)
    rewards = reward_fn(ids, mask).detach()
    wanted = torch.zeros(mask.shape)
    for row, numbers in zip(wanted, expected):
        row[len(PROMPT) - 1 : len(PROMPT) - 1 + len(numbers)] = torch.tensor(numbers)
    assert rewards.shape == mask.shape == (4, 8) and (rewards[~mask] == 0).all()
    near(rewards, wanted, 3e-5)


# ------------------------------------------------------------------------------------------------ where rewards stand


@pytest.mark.parametrize("pad_id", PADS)
def test_token_reward(pad_id):
    model = scorer()
    check(token_reward(model), [z_alone(model, a) for a in ANSWERS], pad_id)


@pytest.mark.parametrize("pad_id", PADS)
def test_outcome_reward_is_at_the_last_real_token(pad_id):
    model = (
        scorer()
    )  # an answer that was cut off is given no stop token: it is scored at the token that it ends with
    check(outcome_reward(model), [[0.0] * (len(a) - 1) + z_alone(model, a)[-1:] for a in ANSWERS], pad_id)
    check(outcome_reward(model, every_token=True), [z_alone(model, a)[-1:] * len(a) for a in ANSWERS], pad_id)


@pytest.mark.parametrize("pad_id", PADS)
def test_step_reward_is_at_the_ends_of_lines_and_of_the_answer(pad_id):
    model = scorer()
    ends = [[0, 1, 1], [0, 0, 1], [1, 0, 0, 1, 0, 1], [1]]
    expected = [[math.tanh(z) * end for z, end in zip(z_alone(model, a), e)] for a, e in zip(ANSWERS, ends)]
    check(step_reward(model, [LINE, OTHER_LINE]), expected, pad_id)
    check(lambda ids, mask: step_end_mask(ids, mask, [LINE, OTHER_LINE]).float(), ends, pad_id)
    check(
        lambda ids, mask: last_token_mask(mask).float(),
        [[0, 0, 1], [0, 0, 1], [0, 0, 0, 0, 0, 1], [1]],
        pad_id,
    )


@pytest.mark.parametrize("pad_id", PADS)
def test_dpo_reward_is_at_its_own_token(pad_id):
    policy, reference = (random_model(LanguageModel, small_config(), seed) for seed in (0, 1))
    expected = [[0.3 * r for r in log_ratios(policy, reference, a)] for a in ANSWERS]
    check(dpo_reward(policy, reference, beta=0.3), expected, pad_id)
    late = [numbers[1:] + [0.0] for numbers in expected]  # the authors' shift by one is far from it
    with pytest.raises(AssertionError):
        check(dpo_reward(policy, reference, beta=0.3), late, pad_id)
    check(dpo_reward(policy, policy), [[0.0] * len(a) for a in ANSWERS], pad_id)


def test_a_rollout_is_rewarded_where_the_reward_model_speaks():
    policy = a_policy(vocab=29)
    model, cfg = random_model(ScalarModel, policy.cfg, seed=51), config(max_new_tokens=8)
    speaks = lambda ids, mask: step_end_mask(ids, mask, list(range(0, 29, 4)))
    rollout = a_rollout(
        policy, cfg, reward_fn=step_reward(model, list(range(0, 29, 4))), reward_mask_fn=speaks
    )
    assert torch.equal(rollout.reward_mask, rollout.scores != 0) and rollout.reward_mask.sum(1).max() > 1
    assert (rollout.reward_mask & ~last_token_mask(rollout.response_mask)).any() and not (
        rollout.reward_mask & ~rollout.response_mask
    ).any()
    spoken = rollout.scores[rollout.reward_mask].double()
    z = (spoken - spoken.mean()) / spoken.std(correction=0)
    found = advantages(rollout, cfg, Grid())
    near(found[rollout.reward_mask], z, 1e-5)
    assert (found[~rollout.reward_mask] == 0).all()  # silence is not the reward 0, standardised


# ------------------------------------------------------------------------------------------------ losses


PAIRS = ragged((1, 4), (1, 6), (0, 2), (0, 1), (2, 5), (2, 6), width=6)  # chosen and rejected of three pairs


def grads_agree(loss_fn, reference_fn, scores, outside=True):
    """Value and gradient, the gradient of what stands outside the mask included: zero, though the score there is nan"""
    mine, plain = (
        (poisoned(scores, PAIRS) if outside else scores.clone()).requires_grad_(),
        scores.clone().requires_grad_(),
    )
    loss, reference = loss_fn(mine)[0], reference_fn(plain)
    near(loss, reference, 1e-6)
    loss.backward()
    reference.backward()
    near(mine.grad, plain.grad, 1e-6)


def rows_of(x):
    """The response's numbers of each row"""
    return [x[i][PAIRS[i]] for i in range(6)]


def test_qrm_loss_with_a_margin_per_pair():
    margins = tensor(0.5, -1.0, 3.0)

    def reference(scores):
        means = [row.mean() for row in rows_of(scores)]
        return sum(F.softplus(margins[p] - 0.7 * (means[2 * p] - means[2 * p + 1])) for p in range(3)) / 3

    grads_agree(lambda scores: qrm_loss(scores, PAIRS, beta=0.7, margin=margins), reference, 3 * grow(6, 6))
    single = [
        qrm_loss(3 * grow(6, 6)[2 * p : 2 * p + 2], PAIRS[2 * p : 2 * p + 2], 0.7, margins[p].item())[0]
        for p in range(3)
    ]
    near(qrm_loss(3 * grow(6, 6), PAIRS, 0.7, margins)[0], sum(single) / 3, 1e-6)


def test_orm_loss_is_torchs_cross_entropy_of_the_gap():
    def reference(scores):
        last = torch.stack([row[-1] for row in rows_of(scores)])
        return F.binary_cross_entropy_with_logits(last[0::2] - last[1::2], torch.ones(3))

    grads_agree(lambda scores: orm_loss(scores, PAIRS), reference, 3 * grow(6, 6))


def test_outcome_loss_is_torchs_cross_entropy():
    correct, scores = torch.tensor([True, False, False, True, True, False]), 3 * grow(6, 6)

    def reference(scores):
        p = torch.stack([row[-1] for row in rows_of(scores)]).sigmoid()
        return F.binary_cross_entropy(p, correct.float())

    grads_agree(lambda x: outcome_loss(x, PAIRS, correct), reference, scores)
    right = sum((row[-1] > 0).item() == y for row, y in zip(rows_of(scores), correct.tolist()))
    assert outcome_loss(scores, PAIRS, correct)[1]["accuracy"] == pytest.approx(right / 6) and 0 < right < 6


def test_step_loss_is_torchs_squared_error():
    ends = PAIRS & (grow(6, 6, seed=3) > 0)
    labels = grow(6, 6, seed=4).sign()
    labels[2] = 0.0
    reference = lambda scores: F.mse_loss(scores[ends].tanh(), labels[ends])
    assert 5 < ends.sum() < PAIRS.sum()
    grads_agree(lambda scores: step_loss(scores, ends, poisoned(labels, ends)), reference, grow(6, 6))


def test_dpo_loss_is_its_equation():
    ref = grow(6, 6, seed=2)

    def reference(logprobs):
        sums = [(row - r).sum() for row, r in zip(rows_of(logprobs), rows_of(ref))]
        return -sum((0.4 * (sums[2 * p] - sums[2 * p + 1])).sigmoid().log() for p in range(3)) / 3

    grads_agree(
        lambda logprobs: dpo_loss(logprobs, poisoned(ref, PAIRS), PAIRS, beta=0.4), reference, grow(6, 6)
    )


def test_plackett_luce_is_a_distribution_over_rankings():
    scores = 2 * grow(4)
    chances = {
        order: (-3 * plackett_luce_loss(scores[None, list(order)])[0]).exp().item()
        for order in itertools.permutations(range(4))
    }
    assert sum(chances.values()) == pytest.approx(
        1, rel=1e-5
    )  # -loss * 3 ranks = log of the chance of this ranking
    assert max(chances, key=chances.get) == tuple(scores.argsort(descending=True).tolist())
    for (
        order,
        chance,
    ) in chances.items():  # drawn one by one, in proportion to exp(score), without putting back
        left, drawn = list(range(4)), 1.0
        for k in order:
            drawn *= math.exp(scores[k]) / sum(math.exp(scores[j]) for j in left)
            left.remove(k)
        assert chance == pytest.approx(drawn, rel=1e-5)


def test_plackett_luce_of_two_is_bradley_terry():
    grads_agree(plackett_luce_loss, lambda x: pairwise_loss(x[:, 0], x[:, 1])[0], grow(5, 2), outside=False)
    grads_agree(plackett_luce_loss, lambda x: F.softplus(x[:, 1] - x[:, 0]).mean(), grow(5, 2), outside=False)


def test_every_prompt_weighs_the_same_in_plackett_luce():
    ranked = grow(3, 5)
    near(plackett_luce_loss(ranked)[0], sum(plackett_luce_loss(row[None])[0] for row in ranked) / 3, 1e-6)
    assert plackett_luce_loss(tensor([1000, 0, -1000]))[0].item() == 0  # far apart, in the right order
    assert plackett_luce_loss(tensor([-1000, 0, 1000]))[0].item() == pytest.approx((2000 + 1000) / 2)


# ------------------------------------------------------------------------------------------------ by name


def test_reward_functions_by_name():
    model, (policy, reference) = (
        scorer(),
        (random_model(LanguageModel, small_config(), seed) for seed in (0, 1)),
    )
    ids, mask = collate([Example(PROMPT, a) for a in ANSWERS])
    lines = [LINE, OTHER_LINE]
    for kind, fn, speaks, is_q in (
        ("qrm", token_reward(model), mask, True),
        ("orm", outcome_reward(model), last_token_mask(mask), False),
        ("prm", step_reward(model, lines), step_end_mask(ids, mask, lines), False),
        ("dpo", dpo_reward(policy, reference), mask, True),
        ("logit", logit_reward(policy), mask, True),
    ):
        reward_fn, reward_mask_fn, q = reward_function(
            kind, policy if kind in POLICY_LIKE else model, reference, lines
        )
        assert torch.equal(reward_fn(ids, mask), fn(ids, mask)) and q == is_q
        assert torch.equal(reward_mask_fn(ids, mask) if reward_mask_fn else mask, speaks)


@pytest.mark.parametrize("kind", REWARD_MODELS)
def test_the_training_loss_of_each_reward_model(kind):
    """Against each answer read alone, at its own length; answers 0 and 2 are the chosen ones."""
    Kind = LanguageModel if kind in POLICY_LIKE else ScalarModel
    model, reference = random_model(Kind, small_config(), 8), random_model(Kind, small_config(), 9)
    ids, mask = collate([Example(PROMPT, a) for a in ANSWERS], pad_id=LINE)
    errors, lines = torch.tensor([3, 1, 2, 0]), [LINE, OTHER_LINE]  # the first wrong token; answer 0 has none
    cfg = config(reward=kind, beta=0.7, margin=0.5)
    loss, stats = reward_model_loss(model, ids, mask, cfg, reference, lines, errors)

    def z(answer):
        return model.scalars(model.model(torch.tensor([PROMPT + answer])))[0, len(PROMPT) :]

    def logit(answer):
        row = torch.tensor([PROMPT + answer])
        return model.logits(model.model(row))[0, :-1].gather(-1, row[0, 1:, None])[len(PROMPT) - 1 :].mean()

    def log_ratio(answer):
        row = torch.tensor([PROMPT + answer])
        log_pi = [
            m.logits(m.model(row))[0, :-1]
            .log_softmax(-1)
            .gather(-1, row[0, 1:, None])[len(PROMPT) - 1 :]
            .sum()
            for m in (model, reference)
        ]
        return log_pi[0] - log_pi[1].detach()

    if kind == "prm":  # steps end at 1, 2 | 2 | 0, 3, 5 | 0
        errors = [
            z(ANSWERS[0])[1].tanh() - 1,
            z(ANSWERS[0])[2].tanh() - 1,
            z(ANSWERS[1])[2].tanh() + 1,
            z(ANSWERS[2])[0].tanh() - 1,
            z(ANSWERS[2])[3].tanh() + 1,
            z(ANSWERS[2])[5].tanh() + 1,
            z(ANSWERS[3])[0].tanh() + 1,
        ]
        expected = sum(e * e for e in errors) / 7
        assert stats["step_accuracy"] == pytest.approx(sum(abs(e.item()) < 1 for e in errors) / 7)
    else:
        one = {"orm": lambda a: z(a)[-1], "dpo": log_ratio, "logit": logit}.get(kind, lambda a: z(a).mean())
        beta, margin = {"orm": (1.0, 0.0), "dpo": (0.7, 0.0)}.get(kind, (0.7, 0.5))
        gaps = [one(ANSWERS[0]) - one(ANSWERS[1]), one(ANSWERS[2]) - one(ANSWERS[3])]
        expected = sum(F.softplus(margin - beta * gap) for gap in gaps) / 2
        assert stats["score_gap"] == pytest.approx(sum(g.item() for g in gaps) / 2, rel=1e-4)
        assert stats["pair_accuracy"] == sum(g.item() > 0 for g in gaps) / 2
    near(loss, expected, 3e-6)
    near(gradient(loss, model), gradient(expected, model), 3e-5)


def test_one_number_for_an_answer():
    assert sequence_score("qrm", torch.tensor([1.0, 0.0, 5.0])) == 2
    assert sequence_score("prm", torch.tensor([0.0, 0.5, 0.0, -0.25])) == 0.125  # only where a step ends
    assert sequence_score("orm", torch.tensor([0.0, 0.0, 5.0])) == 5
    assert sequence_score("dpo", torch.tensor([1.0, 0.0, 5.0])) == 6
