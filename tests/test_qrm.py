"""The Q-RM objective: the place of a score, losses computed by hand, and the fused head against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import near, random_ids, random_model, small_config

from data import Example, collate
from model import LanguageModel, ScalarModel, at_actions, build_model, init_weights
from parallel import Grid, Optimizer
from qrm import (
    credit_counts,
    dpo_loss,
    dpo_rewards,
    fused_qrm_loss,
    last_token_mask,
    masked_mean,
    orm_loss,
    outcome_loss,
    outcome_rewards,
    pairwise_loss,
    plackett_luce_loss,
    qrm_loss,
    response_scores,
    step_end_mask,
    step_loss,
    step_rewards,
    token_scores,
    token_shares,
)

FIRST_LOSS = math.log(1 + math.exp(2))  # 2.1269: beta * 0 - margin = -2
EXAMPLES = [
    Example([1, 2, 3], [4, 5, 6, 7]),
    Example([1, 2, 3], [8, 9]),
    Example([10], [11, 12, 13]),
    Example([10], [14, 15, 16, 17, 18, 19]),
]  # two pairs


class Echo:
    """A reward model whose score of a token is its id: the position that a score is read at can be seen."""

    flex = False

    def model(self, ids, positions=None, attend=None):
        return ids.double()

    def scalars(self, x):
        return x


def tensor(*rows, dtype=torch.float32):
    return torch.tensor(rows, dtype=dtype)


def grow(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -------------------------------------------------------------------------------- where a score stands


def test_a_score_stands_in_the_place_of_its_target():
    ids, mask = collate([Example([7, 8, 9], [1, 2, 6]), Example([5], [4, 10])])
    scores = token_scores(Echo(), ids)
    assert scores.tolist() == [[8, 9, 1, 2, 6], [4, 10, 0, 0, 0]]  # targets: id t + 1 in column t
    loss, stats = qrm_loss(
        scores, mask
    )  # the means 3 and 7 are those of the response ids, the last one included
    assert stats == {"pair_accuracy": 0.0, "score_gap": -4.0}
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.2 * 4 + 2)), rel=1e-6)


@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_a_score_depends_on_its_own_token_and_those_before_it(changed):
    model = random_model(ScalarModel, small_config())
    ids = torch.tensor([[3, 11, 5, 20]])  # a prompt of one token and three answers to it: targets 11, 5, 20
    other = ids.clone()
    other[0, changed] = 28
    before, after = token_scores(model, ids)[0], token_scores(model, other)[0]
    assert before.shape == (3,)
    for t in range(3):  # the target of column t is ids[t + 1]
        assert (before[t] != after[t]) == (t + 1 >= changed)


def test_a_score_is_what_the_model_says_after_reading_the_token():
    model = random_model(ScalarModel, small_config())
    ids = random_ids(2, 6)
    scores = token_scores(model, ids)
    for t in range(5):
        near(scores[:, t], model.scalars(model.model(ids[:, : t + 2]))[:, -1])


def test_masked_mean():
    nan, inf = math.nan, math.inf
    x = tensor([1, 2, 6, nan], [nan, 5, inf, -inf], [nan, nan, nan, nan]).requires_grad_()
    mask = tensor([1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], dtype=torch.bool)
    mean = masked_mean(x, mask)
    assert mean.tolist() == [3, 5, 0]
    mean.sum().backward()
    near(x.grad, tensor([1 / 3, 1 / 3, 1 / 3, 0], [0, 1, 0, 0], [0, 0, 0, 0]), 1e-6)


# -------------------------------------------------------------------------------- the loss by hand


def test_the_first_loss_and_its_gradient():
    chosen, rejected = torch.tensor([0.7], requires_grad=True), torch.tensor([0.7], requires_grad=True)
    loss, stats = pairwise_loss(chosen, rejected, beta=0.2, margin=2.0)
    loss.backward()
    assert f"{loss.item():.4f}" == "2.1269" and stats == {"pair_accuracy": 0.0, "score_gap": 0.0}
    assert chosen.grad.item() == pytest.approx(-0.2 * 0.8807971, rel=1e-6)  # sigmoid(2) = 0.8807971
    assert rejected.grad.item() == pytest.approx(0.2 * 0.8807971, rel=1e-6)


@pytest.mark.parametrize(
    "gap, beta, margin, by_hand",
    [
        (10.0, 0.2, 2.0, math.log(2)),  # margin / beta: the gap at which the pair is as likely as not
        (0.0, 1.0, 0.0, math.log(2)),
        (1.0, 1.0, 0.0, 0.3132617),
        (-1.0, 1.0, 0.0, 1.3132617),
        (3.0, 1.0, 2.0, 0.3132617),
        (5.0, 0.2, 2.0, 1.3132617),
        (20.0, 0.2, 2.0, 0.1269280),
    ],
)
def test_pairwise_loss_by_hand(gap, beta, margin, by_hand):
    loss, stats = pairwise_loss(torch.tensor([gap + 4.0]), torch.tensor([4.0]), beta, margin)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    assert stats == {"pair_accuracy": float(gap > 0), "score_gap": gap}


def test_a_margin_per_pair_and_the_mean_over_pairs():
    chosen, rejected = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([0.0, 1.0, 4.0])
    margins = torch.tensor([0.0, 3.0, -1.0])  # beta * gap - margin = 1, 1, -1
    loss, stats = pairwise_loss(chosen, rejected, 1.0, margins)
    assert loss.item() == pytest.approx((2 * 0.3132617 + 1.3132617) / 3, rel=1e-6)
    assert stats["pair_accuracy"] == pytest.approx(2 / 3) and stats["score_gap"] == pytest.approx(1.0)


def test_swapping_chosen_and_rejected():
    _, mask = collate(EXAMPLES[:2])
    scores = grow(mask.shape, dtype=torch.float32)
    loss, stats = qrm_loss(scores, mask)
    swapped, other = qrm_loss(scores[[1, 0]], mask[[1, 0]])
    gap = stats["score_gap"]
    assert abs(gap) > 0.3 and other["score_gap"] == pytest.approx(-gap, rel=1e-6)
    assert stats["pair_accuracy"] + other["pair_accuracy"] == 1
    assert loss.item() == pytest.approx(math.log1p(math.exp(2 - 0.2 * gap)), rel=1e-6)
    assert swapped.item() == pytest.approx(math.log1p(math.exp(2 + 0.2 * gap)), rel=1e-6)


def test_the_loss_does_not_depend_on_length():
    ids, mask = collate(EXAMPLES)  # responses of 4 and 2, 3 and 6 tokens
    scores = 5 * grow(mask.shape, dtype=torch.float32)
    loss, stats = qrm_loss(scores, mask)
    twice, stats2 = qrm_loss(scores.repeat(1, 2), mask.repeat(1, 2))
    near(twice, loss, 1e-6)
    assert stats2["score_gap"] == pytest.approx(stats["score_gap"], rel=1e-5)
    by_hand = 0.0
    for chosen, rejected in ((0, 1), (2, 3)):
        good, bad = (
            [scores[row, t].item() for t in range(mask.shape[1]) if mask[row, t]]
            for row in (chosen, rejected)
        )
        by_hand += math.log1p(math.exp(2 - 0.2 * (sum(good) / len(good) - sum(bad) / len(bad)))) / 2
    assert len(good) == 3 and len(bad) == 6 and loss.item() == pytest.approx(by_hand, rel=1e-6)


# -------------------------------------------------------------------------------- the fused head


def plain_qrm_loss(x, norm_weight, head_weight, mask, beta=0.2, margin=2.0, eps=1e-5):
    scores = F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, eps), head_weight.view(1, -1)).squeeze(-1)
    gaps = [
        scores[i][mask[i]].sum() / max(1, mask[i].sum())
        - scores[i + 1][mask[i + 1]].sum() / max(1, mask[i + 1].sum())
        for i in range(0, len(x), 2)
    ]
    return sum(F.softplus(margin - beta * gap) for gap in gaps) / len(gaps), scores


def fused(x, norm_weight, head_weight, mask, beta=0.2, margin=2.0, eps=1e-5):
    """fused_qrm_loss of a padded batch (2P, T, D): every position is a row, with share 0 outside the mask."""
    shares = (
        torch.tensor([1.0, -1.0]).repeat(len(x) // 2)[:, None] * mask / mask.sum(1, keepdim=True).clamp(min=1)
    )
    pairs = torch.arange(len(x) // 2).repeat_interleave(2 * x.shape[1])
    return fused_qrm_loss(
        x.flatten(0, 1), norm_weight, head_weight, shares.flatten(), pairs, len(x) // 2, beta, margin, eps
    )


def mean_gaps(scores, mask):
    means = masked_mean(scores, mask)
    return means[0::2] - means[1::2]


def fused_inputs(shape, seed=0, dtype=torch.float64, scale=1.0):
    x, norm_weight, head_weight = (
        grow(shape, seed),
        1 + 0.3 * grow(shape[-1:], seed + 1),
        scale * grow((1, shape[-1]), seed + 2),
    )
    mask = torch.zeros(shape[:2], dtype=torch.bool)
    for i, row in enumerate(mask):
        row[i % 2 : 2 + (3 * i + 1) % (shape[1] - 2)] = True
    return [a.to(dtype).requires_grad_() for a in (x, norm_weight, head_weight)], mask


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 7, 5), (2, 3000, 3)])  # 6000 tokens are more than one chunk
@pytest.mark.parametrize("beta, margin, eps", [(0.2, 2.0, 1e-5), (3.0, -1.0, 0.1)])
def test_fused_is_the_plain_loss(shape, beta, margin, eps):
    inputs, mask = fused_inputs(shape)
    loss, gaps = fused(*inputs, mask, beta, margin, eps)
    expected, scores = plain_qrm_loss(*inputs, mask, beta, margin, eps)
    near(loss, expected, 1e-7)  # shares are fp32
    near(gaps, mean_gaps(scores, mask), 1e-6)
    near(loss, qrm_loss(scores, mask, beta, margin)[0], 1e-5)
    for ours, plain in zip(
        torch.autograd.grad(-3.7 * loss, inputs), torch.autograd.grad(-3.7 * expected, inputs)
    ):
        assert ours.shape == plain.shape and plain.abs().max() > 0
        near(ours, plain, 1e-6)


def test_fused_gradients_are_finite_differences():
    inputs, mask = fused_inputs((4, 5, 3), seed=4)
    assert torch.autograd.gradcheck(lambda *a: fused(*a, mask, 0.9, 1.0)[0], inputs, rtol=1e-6)


def test_fused_takes_a_flat_head_and_a_view_of_x():
    (x, norm_weight, head_weight), mask = fused_inputs((4, 6, 5))
    longer = torch.cat([grow((4, 1, 5), 9), x.detach()], dim=1).requires_grad_()
    flat = head_weight.detach().flatten().requires_grad_()
    loss, _ = fused(longer[:, 1:], norm_weight, flat, mask)
    expected, _ = plain_qrm_loss(x, norm_weight, head_weight, mask)
    near(loss, expected, 1e-7)
    grads, (gx, gw) = (
        torch.autograd.grad(loss, (longer, flat)),
        torch.autograd.grad(expected, (x, head_weight)),
    )
    assert (grads[0][:, 0] == 0).all() and grads[1].shape == (5,)
    near(grads[0][:, 1:], gx, 1e-6)
    near(grads[1], gw[0], 1e-6)


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_fused_in_lower_precision(dtype, rtol):
    inputs, mask = fused_inputs((6, 40, 64), dtype=dtype, scale=3.0)
    exact = [a.detach().double().requires_grad_() for a in inputs]  # the same rounded numbers
    loss, gaps = fused(*inputs, mask)
    expected, scores = plain_qrm_loss(*exact, mask)
    assert loss.dtype == gaps.dtype == torch.float32 and not gaps.requires_grad
    near(loss, expected, 1e-5)  # fp32 inside, whatever comes in
    near(gaps, mean_gaps(scores, mask), 1e-5)
    for a, ours, plain in zip(
        inputs, torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, exact)
    ):
        assert ours.dtype == a.dtype
        near(ours, plain, rtol)


def test_fused_on_a_model_is_token_scores_and_qrm_loss():
    model = random_model(ScalarModel, small_config())
    ids, mask = collate(EXAMPLES)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    norm = model.model.norm
    expected, stats = qrm_loss(token_scores(model, ids), mask)
    plain = gradients(expected)
    shares, pairs = token_shares(mask)
    for x in (model.model(ids)[:, 1:][mask], at_actions(model, ids, mask)):  # padded, packed
        loss, gaps = fused_qrm_loss(
            x, norm.weight, model.score.weight, shares, pairs, len(ids) // 2, eps=norm.eps
        )
        near(loss, expected)
        assert gaps.mean().item() == pytest.approx(stats["score_gap"], rel=1e-4)
        for ours, theirs in zip(gradients(loss), plain):
            near(ours, theirs, 2e-5)


def test_pads_change_neither_loss_nor_gradients():
    model = random_model(ScalarModel, small_config())
    norm, runs = model.model.norm, []
    ids, mask = collate(EXAMPLES)
    pads = torch.arange(ids.shape[1]) >= torch.tensor([len(p) + len(r) for p, r in EXAMPLES])[:, None]
    assert pads.sum() == 5
    for seed in (0, 1):
        filled = torch.where(pads, random_ids(*ids.shape, seed=seed), ids)
        scores = token_scores(model, filled)
        for loss in (
            qrm_loss(scores, mask)[0],
            fused(model.model(filled)[:, 1:], norm.weight, model.score.weight, mask, eps=norm.eps)[0],
        ):
            model.zero_grad()
            loss.backward()
            runs.append([scores[~pads[:, 1:]].detach(), loss, *(p.grad.clone() for p in model.parameters())])
    for first, second in ((runs[0], runs[2]), (runs[1], runs[3])):
        assert all(torch.equal(a, b) for a, b in zip(first, second))


# -------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_gaps_are_finite(size):
    mean = torch.tensor([size], requires_grad=True)
    loss, _ = pairwise_loss(mean, torch.zeros(1), beta=1.0, margin=2.0)
    loss.backward()
    assert loss.item() == (0.0 if size > 0 else 10002.0) and mean.grad.item() == (0.0 if size > 0 else -1.0)
    (x, norm_weight, head), mask = fused_inputs((2, 5, 4), dtype=torch.float32)
    mask[1] = False  # an empty rejected response: the gap is the chosen one's mean
    head = (
        head.detach() * size / plain_qrm_loss(x, norm_weight, head, mask)[1][0][mask[0]].mean().detach()
    ).requires_grad_()
    loss, _ = fused(x, norm_weight, head, mask, beta=1.0)
    assert loss.item() == pytest.approx(0.0 if size > 0 else 10002.0, rel=1e-5)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (x, norm_weight, head)))


def test_extreme_margins_are_finite():
    inputs, mask = fused_inputs((2, 5, 4), dtype=torch.float32)
    for margin, expected in ((1e4, 1e4), (-1e4, 0.0)):
        for loss in (
            fused(*inputs, mask, margin=margin)[0],
            qrm_loss(plain_qrm_loss(*inputs, mask)[1], mask, margin=margin)[0],
        ):
            assert loss.item() == pytest.approx(expected, rel=1e-3)
            assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, inputs, retain_graph=True))


def test_responses_of_one_token_and_of_none():
    inputs, _ = fused_inputs((4, 3, 5))
    mask = tensor([0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1], dtype=torch.bool)
    loss, found = fused(*inputs, mask)
    scores = plain_qrm_loss(*inputs, mask)[1]
    gaps = [(scores[0, 1] - scores[1, 0]).item(), -scores[3, 2].item()]
    assert found.tolist() == pytest.approx(gaps) and loss.item() == pytest.approx(
        sum(math.log1p(math.exp(2 - 0.2 * g)) for g in gaps) / 2, rel=1e-6
    )
    near(qrm_loss(scores, mask)[0], loss, 1e-6)
    grads = torch.autograd.grad(loss, inputs)
    assert all(torch.isfinite(g).all() for g in grads)
    assert torch.equal(grads[0].abs().sum(-1) > 0, mask)  # tokens outside the mask learn nothing
    empty, _ = fused(*inputs, torch.zeros_like(mask))
    assert empty.item() == pytest.approx(FIRST_LOSS, rel=1e-6)
    assert all((g == 0).all() for g in torch.autograd.grad(empty, inputs))


def test_a_new_reward_model_is_neutral():
    model = init_weights(build_model(ScalarModel, small_config(), Grid()), seed=3)
    ids, mask = collate(EXAMPLES)
    scores = token_scores(model, ids)
    assert (scores == 0).all()
    for loss in (
        qrm_loss(scores, mask)[0],
        fused(model.model(ids)[:, 1:], model.model.norm.weight, model.score.weight, mask)[0],
    ):
        assert loss.item() == pytest.approx(FIRST_LOSS, rel=2e-7)  # one unit in the last place of fp32


# -------------------------------------------------------------------------------- does it learn


def test_a_small_model_learns_twenty_random_pairs_by_heart():
    pairs = [
        Example(random_ids(3, seed=i // 2).tolist(), random_ids(3 + i % 4, seed=100 + i).tolist())
        for i in range(40)
    ]
    ids, mask = collate(pairs)
    model = init_weights(build_model(ScalarModel, small_config(), Grid()), seed=0)
    optimizer, norm, losses = Optimizer(model, Grid(), lr=0.01), model.model.norm, []
    for _ in range(60):
        loss, _ = fused(
            model.model(ids)[:, 1:], norm.weight, model.score.weight, mask, beta=1.0, eps=norm.eps
        )
        loss.backward()
        optimizer.step(0.01)
        losses.append(loss.item())
    _, stats = qrm_loss(token_scores(model, ids), mask)
    assert losses[0] == pytest.approx(FIRST_LOSS, rel=1e-6) and losses[-1] < 0.05
    assert stats["pair_accuracy"] == 1.0 and stats["score_gap"] > 2


# -------------------------------------------------------------------------------- the other reward models


def test_masks_of_the_last_token_and_of_step_ends():
    ids = torch.tensor([[9, 9, 1, 5, 9, 2, 0], [3, 4, 9, 4, 9, 9, 9]])
    mask = tensor([0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], dtype=torch.bool)
    assert last_token_mask(mask).int().tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]
    assert not last_token_mask(torch.zeros(2, 3, dtype=torch.bool)).any()
    # targets 9 1 5 9 2 0 and 4 9 4 9 9 9: a 9 ends a step, and so does the last token, but no 9 of a prompt
    assert step_end_mask(ids, mask, [9]).int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 1, 0, 1, 1, 1]]


def test_outcome_losses_read_the_last_token_only():
    mask = tensor([1, 1, 1, 0], [0, 1, 0, 0], dtype=torch.bool)
    scores = tensor([7, -7, 2, 9], [9, 3, 7, 7]).requires_grad_()  # 2 and 3
    loss, stats = orm_loss(scores, mask)
    assert loss.item() == pytest.approx(1.3132617, rel=1e-6) and stats == {
        "pair_accuracy": 0.0,
        "score_gap": -1.0,
    }
    loss.backward()
    assert torch.equal(scores.grad != 0, tensor([0, 0, 1, 0], [0, 1, 0, 0], dtype=torch.bool))
    loss, stats = outcome_loss(scores, mask, torch.tensor([True, False]))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(3))) / 2, rel=1e-6)
    assert stats == {"accuracy": 0.5}


def test_an_empty_response_does_not_shift_the_pairs_behind_it():
    mask = tensor([1, 0], [0, 0], [1, 1], [1, 0], dtype=torch.bool)
    loss, stats = orm_loss(tensor([1, 9], [9, 9], [9, 6], [4, 9]), mask)  # 1 against 0, 6 against 4
    assert (
        loss.item() == pytest.approx((0.3132617 + math.log1p(math.exp(-2))) / 2, rel=1e-6)
        and stats["score_gap"] == 1.5
    )


def test_step_loss_by_hand():
    scores, ends = tensor([9, 0.5, -1], [2, 9, 9]), tensor([0, 1, 1], [1, 0, 0], dtype=torch.bool)
    labels = tensor([-1, 1, 1], [0, -1, -1])
    loss, stats = step_loss(scores, ends, labels)
    errors = [math.tanh(0.5) - 1, math.tanh(-1) - 1, math.tanh(2)]
    assert loss.item() == pytest.approx(sum(e * e for e in errors) / 3, rel=1e-6)
    assert stats["step_accuracy"] == pytest.approx(2 / 3)


def test_dpo_loss_by_hand():
    mask = tensor([1, 1, 0], [0, 1, 1], dtype=torch.bool)
    logprobs, ref = tensor([-1, -2, math.nan], [0, -4, -1]), tensor([-2, -4, 0], [-9, -3, -1])
    loss, stats = dpo_loss(logprobs, ref, mask, beta=0.5)  # sums 3 and -1: a gap of 4
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)), rel=1e-6) and stats["score_gap"] == 4


def test_plackett_luce_by_hand():
    ranked = tensor([3, 1, 2], [0, 0, 0])
    a, b, c = math.exp(3), math.exp(1), math.exp(2)
    by_hand = (-math.log(a / (a + b + c)) - math.log(b / (b + c)) + math.log(3) + math.log(2)) / 4
    assert plackett_luce_loss(ranked)[0].item() == pytest.approx(by_hand, rel=1e-6)
    two = grow((5, 2), dtype=torch.float32)
    near(plackett_luce_loss(two)[0], pairwise_loss(two[:, 0], two[:, 1])[0], 1e-6)


def test_rewards_stand_where_they_are_earned():
    ids, mask = collate([Example([7, 8], [1, 9, 6]), Example([5], [4, 3])])  # targets 8 1 9 6 and 4 3 . .
    assert response_scores(Echo(), ids, mask).tolist() == [[0, 1, 9, 6], [4, 3, 0, 0]]
    assert outcome_rewards(Echo(), ids, mask).tolist() == [[0, 0, 0, 6], [0, 3, 0, 0]]
    assert outcome_rewards(Echo(), ids, mask, every_token=True).tolist() == [[0, 6, 6, 6], [3, 3, 0, 0]]
    steps = [[0, 0, math.tanh(9), math.tanh(6)], [0, math.tanh(3), 0, 0]]
    near(step_rewards(Echo(), ids, mask, [9]), torch.tensor(steps), 1e-6)


def test_dpo_reward_is_the_log_ratio_at_its_token():
    policy, reference = (
        random_model(LanguageModel, small_config(), 0),
        random_model(LanguageModel, small_config(), 1),
    )
    ids, mask = collate(EXAMPLES)
    rewards = dpo_rewards(policy, reference, ids, mask, beta=0.3)
    for b in range(4):
        for t in range(mask.shape[1]):
            log_pi = [
                m.logits(m.model(ids[b : b + 1, : t + 1]))[0, -1].log_softmax(-1)[ids[b, t + 1]]
                for m in (policy, reference)
            ]
            expected = 0.3 * (log_pi[0] - log_pi[1]).item() if mask[b, t] else 0.0
            assert rewards[b, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


# -------------------------------------------------------------------------------- how good is it


def test_credit_counts_by_hand():
    def count(scores, error, repaired=None):
        c = credit_counts([torch.tensor(scores)], [error], repaired and [torch.tensor(repaired)])
        return [c[k] for k in ("wins", "comparisons", "hits", "choices", "n_errors")]

    assert count([3.0, 2.0, -1.0, 0.0], 2) == [2, 2, 1, 0, 1]  # steps -1 -3 +1
    assert count([1.0, 0.0, 1.0, -5.0], 2) == [0.5, 2, 0, 0, 1]  # one tie, one below
    assert count([0.0, 1.0, 2.0, 1.5], 3) == [1, 3, 1, 0, 1]  # a drop, not a low
    assert count([2.0, 1.0], 1) == [1, 1, 1, 0, 1]
    assert count([2.0, 1.0], 0) == count([1.0], 0) == [0, 0, 0, 0, 0]
    for right, choices in (
        (1.5, 1),
        (1.0, 0.5),
        (0.5, 0),
    ):  # the right token at the state where 1.0 was scored
        assert count([2.0, 1.0, 9.0], 1, [2.0, right]) == [1, 1, 1, choices, 1]
    both = credit_counts(
        [torch.tensor([3.0, 2.0, -1.0, 0.0]), torch.tensor([1.0, 5.0, 0.0]), torch.tensor([9.0, 1.0])],
        [2, 1, 0],
    )
    assert both == {"wins": 2, "comparisons": 3, "hits": 1, "choices": 0, "n_errors": 2}
