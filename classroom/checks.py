"""The checks that grade the exercises (exercises.py), in its order: check_4_3 grades exercise 4.3.

A check gets the module `m` that holds one function of a student. It compares with hand-computed numbers, a
slow loop, autograd or the unsharded model, never with a solution. Functions of other exercises that the
student's one may call are replaced by stand-ins, so that no exercise is judged by another one, and a project
with all bodies taken out can grade. A stand-in fits the inputs of these checks and no others: none would pass
the check of its own exercise.

A failure says in one line what was expected on which input.
"""

import cmath
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

import reinforce
from parallel import Grid

PROMPT_LENGTHS, RESPONSE_LENGTHS = (3, 3, 1, 4), (2, 4, 5, 1)  # of the four rows that most checks use; T = 6
NAN = float("nan")


def expect(actual, expected, what, rtol=1e-5):
    """Every element, to rtol of the largest one; the message is one line. `what` names the input and the
    rule.
    """
    assert actual is not None, f"{what}: found None; is a return missing?"
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, (
        f"{what}: found shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).abs().nan_to_num(math.inf) if actual.numel() else torch.zeros(1)
    if error.max() > rtol * max(expected.abs().max().item(), 1e-12):
        at = tuple(i.item() for i in (error == error.max()).nonzero()[0])
        place = f" at {list(at)}" if at else ""
        raise AssertionError(
            f"{what}: found {actual[at].item():.6g}, expected {expected[at].item():.6g}{place}"
        )


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows():
    """ids (4, 7), response_mask (4, 6), made by loops: two pairs of unequal lengths; the pad is a real id."""
    ids, mask = torch.full((4, 7), 5), torch.zeros(4, 6, dtype=torch.bool)
    for i, (p, r) in enumerate(zip(PROMPT_LENGTHS, RESPONSE_LENGTHS)):
        for t in range(p + r):
            ids[i, t] = (7 * t * t + 3 * i + t) % 29
            if t >= p:
                mask[i, t - 1] = True
    return ids, mask


def response_places():
    """[(row, its response positions t)] of rows()"""
    spans = [range(p - 1, p + r - 1) for p, r in zip(PROMPT_LENGTHS, RESPONSE_LENGTHS)]
    return list(enumerate(spans))


def gradients(value, *inputs):
    """d value / d inputs, zeros where an input was not used"""
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)


def replaced(m, **stand_ins):
    """A context in which functions of module m are others; those that m does not have are not needed."""
    return mock.patch.multiple(m, **{name: f for name, f in stand_ins.items() if hasattr(m, name)})


# -------------------------------------------------------------------------------- ranks in one process


def on_ranks(size, work, group="tp"):
    """[work(grid) of each rank]: the ranks are threads, and an all-reduce waits until all have made the same
    call.
    """
    calls, finished, news, place = [[] for _ in range(size)], set(), threading.Condition(), threading.local()

    def all_reduce(x, op=dist.ReduceOp.SUM, group=None):
        with news:
            calls[place.rank].append(x.detach().clone())
            news.notify_all()
            n = len(calls[place.rank])
            news.wait_for(lambda: all(len(made) >= n or r in finished for r, made in enumerate(calls)))
            assert all(len(made) >= n for made in calls), (
                f"{size} ranks: one waits in all-reduce number {n}, which another one never makes"
            )
            parts = torch.stack([made[n - 1] for made in calls])
        x.copy_(parts.amax(0) if op == dist.ReduceOp.MAX else parts.sum(0))

    def run(rank):
        place.rank = rank
        try:
            everyone = SimpleNamespace(size=lambda: size)
            return work(Grid(**{f"{group}_rank": rank, f"{group}_size": size, f"{group}_group": everyone}))
        finally:
            with news:
                finished.add(rank)
                news.notify_all()

    with mock.patch.object(dist, "all_reduce", all_reduce), ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def summed(x, grid):
    total = x.detach().clone()
    dist.all_reduce(total, group=grid.tp_group)
    return total


def hooked_f(x, grid):
    """A stand-in for copy_to_tp (f): a hook on the gradient instead of an autograd.Function."""
    if grid.tp_size == 1 or not x.requires_grad:
        return x
    y = x.view_as(x)
    y.register_hook(lambda grad: summed(grad, grid))
    return y


def shifted_g(x, grid):
    """A stand-in for reduce_from_tp (g): adds the other ranks' part as a constant."""
    return x if grid.tp_size == 1 else x + (summed(x, grid) - x).detach()


# -------------------------------------------------------------------------------- other stand-ins


class PrefixModel:
    """In the place of a reward model or critic: what it says at a position depends on the ids up to there, in
    order.

    model(ids (B, T+1)) -> (B, T+1, 3); scalars((..., 3)) -> (...)
    """

    def __init__(self):
        self.table = draw(29, 3).requires_grad_()
        self.weight = draw(3, seed=1)

    def model(self, ids):
        places = torch.arange(1.0, ids.shape[1] + 1)[:, None]
        return (self.table[ids] * places).cumsum(1)

    def scalars(self, x):
        return x @ self.weight


def scaled_halves(x, cos, sin):
    """For apply_rope: the first half of each head times cos, the second times sin."""
    return x * torch.cat((cos, sin), -1)


def prefix_scores(reward_model, ids):
    """For token_scores: prefix by prefix, and without gradient."""
    ends = range(2, ids.shape[1] + 1)
    return torch.stack(
        [reward_model.scalars(reward_model.model(ids[:, :n]))[:, -1] for n in ends], 1
    ).detach()


def prefix_response_scores(reward_model, ids, response_mask):
    return prefix_scores(reward_model, ids).masked_fill(~response_mask, 0.0)


def states_of(critic, ids, response_mask):
    """For at_states: (n, 3), where each s_t ends."""
    return critic.model(ids)[:, :-1][response_mask]


def logprobs_of(policy, ids, response_mask, temperature=1.0):
    """For token_logprobs: the policy is a table."""
    return policy.logprobs * response_mask, policy.entropy * response_mask


def means_row_by_row(x, mask):
    """For masked_mean: no row may be empty."""
    return torch.stack([row[inside].mean() for row, inside in zip(x, mask)])


def overflowing_pairwise(chosen, rejected, beta=1.0, margin=0.0):
    """For pairwise_loss: infinite for large gaps, and no pair_accuracy."""
    gap = chosen - rejected
    return (1 + (margin - beta * gap).exp()).log().mean(), {
        "pair_accuracy": NAN,
        "score_gap": gap.mean().item(),
    }


def last_of_rows(response_mask):
    """For last_token_mask: of the mask of rows() alone."""
    assert response_mask.shape == (4, 6), (
        f"last_token_mask of shape {tuple(response_mask.shape)}, expected (4, 6)"
    )
    last = torch.zeros(4, 6, dtype=torch.bool)
    for i, places in response_places():
        last[i, places[-1]] = True
    return last


def plainly_standardized(rewards, reward_mask, how, grid):
    """For standardize: one process, rewards that differ."""
    if how == "none":
        return rewards * reward_mask
    inside = rewards[reward_mask]
    return torch.where(reward_mask, (rewards - inside.mean()) / inside.std(unbiased=False), 0.0)


def plainly_shaped(rollout, cfg, grid):
    """For shape_rewards: Z_std and Z_std - kl_coef * KL (k1)."""
    z_std = plainly_standardized(rollout.scores, rollout.reward_mask, cfg.standardize, grid)
    if cfg.eos_to_mean:
        z_std = with_mean_at_the_end(z_std)
    return z_std, z_std - cfg.kl_coef * rollout.kl_k1


def with_mean_at_the_end(rewards):
    out = rewards.clone()
    for i, places in response_places():
        out[i, places[-1]] = rewards[i, list(places)].mean()
    return out


def strange_gae(rewards, values, response_mask, gamma, lam):
    """For gae: tells which arguments it was given."""
    inside = response_mask.float()
    rewards, values = rewards * inside, values * inside
    return gamma * rewards - lam * values, rewards + lam * values


STAND_INS = {  # {exercise: what other checks put in its place}; 2.1 and 2.2 have hooked_f and shifted_g
    "1.3": scaled_halves,
    "4.1": prefix_scores,
    "4.2": means_row_by_row,
    "4.3": overflowing_pairwise,
    "4.6": last_of_rows,
    "5.2": plainly_standardized,
    "6.2": strange_gae,
}


# -------------------------------------------------------------------------------- 1: the model


def check_1_1(m):
    norm = m.RMSNorm(4, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expect(
        norm(torch.tensor([[3.0, 4.0, 0.0, 0.0]])),
        [[1.2, 3.2, 0.0, 0.0]],
        "x = 3 4 0 0 (root mean square 2.5), weight 1 2 3 4, eps 0",
    )
    x = draw(2, 3, 4)
    root = (sum(v * v for v in x[1, 2]) / 4) ** 0.5
    expect(
        norm(x)[1, 2],
        norm.weight * x[1, 2] / root,
        "random x (2, 3, 4): each position by itself, here [1, 2]",
    )
    norm.eps = 3.0
    expect(norm(torch.ones(1, 4)), [[0.5, 1.0, 1.5, 2.0]], "x = 1 1 1 1, eps 3: eps is added inside the root")
    big = norm.half()(torch.full((1, 4), 400.0).half())
    assert big.dtype == torch.float16, f"x in fp16: found {big.dtype}, expected the dtype of x"
    what = "x = 400 400 400 400 in fp16 (its square overflows unless computed in fp32), weight 1 2 3 4"
    expect(big, [[1.0, 2.0, 3.0, 4.0]], what, rtol=1e-3)


def llama31_frequency(i):
    """Llama 3.1's rule for frequency i of a head of width 128, as its authors wrote it."""
    f = 500000.0 ** (-2 * i / 128)
    wavelength = 2 * math.pi / f
    if wavelength > 8192 / 1.0:
        return f / 8
    if wavelength > 8192 / 4.0:
        share = (8192 / wavelength - 1) / (4 - 1)
        return (1 - share) * f / 8 + share * f
    return f


def check_1_2(m):
    cfg = dict(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    plain = m.rope_frequencies(m.ModelConfig(**cfg, head_dim=6, rope_theta=1000.0))
    assert plain.dtype == torch.float32, f"theta 1000, E = 6: found {plain.dtype}, expected torch.float32"
    expect(plain, [1.0, 0.1, 0.01], "theta 1000, E = 6, no scaling")
    scaling = m.RopeScaling(8.0, 1.0, 4.0, 8192)
    long = m.ModelConfig(**cfg, head_dim=128, rope_theta=500000.0, rope_scaling=scaling)
    scaled = m.rope_frequencies(long)
    expect(torch.tensor(scaled.shape), torch.tensor([64]), "theta 500000, E = 128: the shape")
    for i, found in enumerate(scaled.tolist()):
        what = f"theta 500000, E = 128, factor 8, low 1, high 4, C = 8192: frequency {i} of 64"
        expect(found, llama31_frequency(i), what)


def check_1_3(m):
    x = draw(1, 3, 2, 4)  # (B, T, H, E)
    angles = torch.tensor([[0.0, 0.0], [0.5, 1.0], [2.0, -0.7]])  # (T, E/2)
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    y = m.apply_rope(x, cos, sin)
    expect(y[:, 0], x[:, 0], "random x (1, 3, 2, 4): angle 0 changes nothing")
    for t in range(3):
        for i in range(2):
            turned = complex(x[0, t, 1, i], x[0, t, 1, i + 2]) * cmath.exp(1j * angles[t, i].item())
            what = f"the pair ({i}, {i} + E/2) turned by {angles[t, i]:g}, as a complex number"
            expect(y[0, t, 1, [i, i + 2]], [turned.real, turned.imag], what)
    half = m.apply_rope(x.bfloat16(), cos, sin)
    assert half.dtype == torch.bfloat16, (
        f"x in bf16, angles in fp32: found {half.dtype}, expected the dtype of x"
    )


def slow_attention(q, k, v):
    """Head by head and position by position."""
    B, T, H, E = q.shape
    out = torch.zeros(q.shape)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                kv = h * k.shape[2] // H
                weights = (k[b, : t + 1, kv] @ q[b, t, h] / E**0.5).softmax(0)
                out[b, t, h] = weights @ v[b, : t + 1, kv]
    return out


def check_1_4(m):
    q, k, v = draw(2, 5, 4, 6), draw(2, 5, 2, 6, seed=1), draw(2, 5, 2, 6, seed=2)
    expect(
        m.causal_attention(0, q, k, v),
        slow_attention(q, k, v),
        "four query heads, two key/value heads, T = 5",
    )
    what = "as many key/value heads as query heads, T = 5"
    expect(m.causal_attention(0, q, 2 * q, q + 1), slow_attention(q, 2 * q, q + 1), what)


def product(weight):
    """A linear layer without bias."""
    return lambda x: x @ weight.T


def expect_sublayer(m, run, whole, weights, x):
    """Output and gradient of a sub-layer on one process and on two ranks; whole(x) is the unsharded formula.

    run(x, grid) -> output; weights: of the sum whose gradient in x is compared
    """
    wanted = x.clone().requires_grad_()
    y = whole(wanted)
    (grad,) = gradients((y * weights).sum(), wanted)

    def on_one(grid):
        mine = x.clone().requires_grad_()
        with_marks = run(mine, grid)
        assert with_marks is not None, "the sub-layer returned None; is a return missing?"
        return with_marks, gradients((with_marks * weights).sum(), mine)[0]

    with replaced(m, copy_to_tp=hooked_f, reduce_from_tp=shifted_g):
        found, found_grad = on_one(Grid())
        expect(found, y, "random x (2, 5, 16), one process: output")
        expect(found_grad, grad, "random x (2, 5, 16), one process: gradient of x")
        for rank, (found, found_grad) in enumerate(on_ranks(2, on_one)):
            expect(
                found,
                y,
                f"random x (2, 5, 16), rank {rank} of 2: output (reduce_from_tp once, on the result?)",
            )
            what = f"random x (2, 5, 16), rank {rank} of 2: gradient of x (copy_to_tp once, first of all?)"
            expect(found_grad, grad, what)


def not_asked_for(layer, q, k, v):
    raise AssertionError("found a call of causal_attention, expected one of attend, whichever that is")


def check_1_5(m):
    x, weights = draw(2, 5, 16), draw(2, 5, 16, seed=1)
    q, k, v, o = (
        draw(24, 16, seed=2),
        draw(12, 16, seed=3),
        draw(12, 16, seed=4),
        draw(16, 24, seed=5),
    )  # H 4, K 2, E 6
    cos, sin = draw(1, 5, 1, 3, seed=6), draw(1, 5, 1, 3, seed=7)
    asked = []

    def attend(layer, q, k, v):
        asked.append(layer)
        return slow_attention(q, k, v)

    def run(x, grid):
        rank, size = grid.tp_rank, grid.tp_size
        layer = SimpleNamespace(grid=grid, head_dim=6)
        layer.q_proj = product(q.chunk(size)[rank])
        layer.k_proj, layer.v_proj = product(k.chunk(size)[rank]), product(v.chunk(size)[rank])
        layer.o_proj = product(o.chunk(size, 1)[rank])
        return m.Attention.forward(layer, x, (cos, sin), 3, attend)

    def whole(x):
        heads = [(x @ weight.T).view(2, 5, -1, 6) for weight in (q, k, v)]
        turned = [scaled_halves(heads[0], cos, sin), scaled_halves(heads[1], cos, sin), heads[2]]
        return slow_attention(*turned).flatten(2) @ o.T

    with replaced(m, apply_rope=scaled_halves, causal_attention=not_asked_for):
        expect_sublayer(m, run, whole, weights, x)
    assert set(asked) == {3}, f"layer 3: attend was called with the layers {sorted(set(asked))}, expected 3"


def check_1_6(m):
    x, weights = draw(2, 5, 16), draw(2, 5, 16, seed=1)
    gate, up, down = draw(20, 16, seed=2), draw(20, 16, seed=3), draw(16, 20, seed=4)

    def run(x, grid):
        rank, size = grid.tp_rank, grid.tp_size
        layer = SimpleNamespace(grid=grid, gate_proj=product(gate.chunk(size)[rank]))
        layer.up_proj, layer.down_proj = product(up.chunk(size)[rank]), product(down.chunk(size, 1)[rank])
        return m.MLP.forward(layer, x)

    def whole(x):
        z = x @ gate.T
        return (z / (1 + (-z).exp()) * (x @ up.T)) @ down.T

    expect_sublayer(m, run, whole, weights, x)


def check_1_7(m):
    def sample(probs, uniforms):
        found = m.sample_tokens(torch.tensor(probs).expand(len(uniforms), -1), torch.tensor(uniforms))
        expect(torch.tensor(found.shape), torch.tensor([len(uniforms)]), f"{len(uniforms)} rows: the shape")
        return found.tolist()

    last = 1 - 2**-24  # the largest fp32 below 1
    cases = (
        ([0.1, 0.2, 0.3, 0.4], [0.0, 0.05, 0.15, 0.35, 0.65, 0.99], [0, 0, 1, 2, 3, 3]),
        ([0.0, 0.5, 0.5, 0.0], [0.0, 0.5, last], [1, 2, 2]),
        ([0.25, 0.25], [0.3, 0.7], [0, 1]),
    )
    for probs, uniforms, expected in cases:
        found = sample(probs, uniforms)
        assert found == expected, f"probs {probs}, uniforms {uniforms}: found {found}, expected {expected}"
    spread = [(i + 0.5) / 1000 for i in range(1000)]
    counts = torch.bincount(torch.tensor(sample([0.1, 0.2, 0.3, 0.4], spread)), minlength=4)
    what = "probs .1 .2 .3 .4, 1000 evenly spread uniforms: draws of each token"
    expect(counts, [100.0, 200.0, 300.0, 400.0], what, rtol=0.003)


# -------------------------------------------------------------------------------- 2: tensor parallelism


def check_2_1(m):
    x, weights = draw(2, 3), [draw(2, 3, seed=1 + r) for r in range(3)]

    def run(grid):
        mine = x.clone().requires_grad_()
        y = m.copy_to_tp(mine, grid)
        return y, gradients((y * weights[grid.tp_rank]).sum(), mine)[0]

    for rank, (y, grad) in enumerate(on_ranks(3, run)):
        expect(y, x, f"the same x on 3 ranks: forward on rank {rank} is x itself")
        what = f"the same x on 3 ranks, another gradient on each: backward on rank {rank} is their sum"
        expect(grad, sum(weights), what)


def check_2_2(m):
    x, weights = [draw(2, 3, seed=r) for r in range(3)], draw(2, 3, seed=9)

    def run(grid):
        mine = x[grid.tp_rank].clone().requires_grad_()
        y = m.reduce_from_tp(mine, grid)
        return y, gradients((y * weights).sum(), mine)[0], mine

    for rank, (y, grad, mine) in enumerate(on_ranks(3, run)):
        expect(y, sum(x), f"another x on each of 3 ranks: forward on rank {rank} is their sum")
        expect(grad, weights, f"the same gradient on 3 ranks: backward on rank {rank} passes it on unchanged")
        expect(mine, x[rank], f"another x on each of 3 ranks: x itself must not change, rank {rank}")


def slices(m, size, parts):
    return [slice(*m.shard_range(size, r, parts)) for r in range(parts)]


def check_2_3(m):
    A, b, x = draw(10, 6), draw(10, seed=1), draw(2, 6, seed=2)
    parts = []
    for r, own in enumerate(slices(m, 10, 3)):  # 3, 3 and 4 features
        layer = m.ColumnLinear(6, 10, Grid(tp_rank=r, tp_size=3), bias=True)
        shapes = torch.tensor(layer.weight.shape), torch.tensor(A[own].shape)
        expect(*shapes, f"6 inputs, 10 outputs, rank {r} of 3: shape of the weight")
        assert layer.bias is not None, f"bias=True, rank {r} of 3: found no bias, expected one"
        layer.weight.data, layer.bias.data = A[own], b[own]
        parts.append(layer(x))
    expect(torch.cat(parts, -1), x @ A.T + b, "10 outputs on 3 ranks: the ranks' features side by side")
    assert m.ColumnLinear(6, 10, Grid()).bias is None, "bias not asked for: found one, expected None"
    shape = tuple(m.ColumnLinear(6, 10, Grid()).weight.shape)
    assert shape == (10, 6), f"6 inputs, 10 outputs, one process: found weight {shape}, expected (10, 6)"


def check_2_4(m):
    A, x = draw(6, 10), draw(2, 10, seed=2)
    total = 0
    for r, own in enumerate(slices(m, 10, 3)):
        layer = m.RowLinear(10, 6, Grid(tp_rank=r, tp_size=3))
        shapes = torch.tensor(layer.weight.shape), torch.tensor(A[:, own].shape)
        expect(*shapes, f"10 inputs, 6 outputs, rank {r} of 3: shape of the weight")
        assert layer.bias is None, "found a bias, expected None: the sum over the ranks would add it 3 times"
        layer.weight.data = A[:, own]
        total = total + layer(x[:, own])
    expect(total, x @ A.T, "10 inputs on 3 ranks: the sum of the ranks' outputs")
    shape = tuple(m.RowLinear(10, 6, Grid()).weight.shape)
    assert shape == (6, 10), f"10 inputs, 6 outputs, one process: found weight {shape}, expected (6, 10)"


def check_2_5(m):
    table, weights = draw(10, 4), draw(2, 4, 4, seed=1)
    ids = torch.tensor([[0, 2, 3, 9], [5, 6, 6, 1]])
    looked_up = torch.stack([torch.stack([table[i] for i in row]) for row in ids])
    expected_grad = torch.zeros(10, 4)
    for i in range(2):
        for t in range(4):
            expected_grad[ids[i, t]] += weights[i, t]

    def run(grid):
        layer = m.VocabEmbedding(10, 4, grid)
        layer.weight.data = table[layer.start : layer.stop].clone()
        y = layer(ids)
        return y, gradients((y * weights).sum(), layer.weight)[0]

    for size in (1, 3):
        with replaced(m, copy_to_tp=hooked_f, reduce_from_tp=shifted_g):
            found = [run(Grid())] if size == 1 else on_ranks(size, run)
        where = f"ids {ids.tolist()}, 10 words on {size} rank(s)"
        for rank, (y, _) in enumerate(found):
            expect(y, looked_up, f"{where}: the words' rows on rank {rank}")
        grads = torch.cat([grad for _, grad in found])
        expect(grads, expected_grad, f"{where}: the ranks' gradients of the table, one below the other")


def split_vocabulary(m, logits, weights, work):
    """Runs work(slice of logits, grid) on 3 ranks.

    -> outputs, the gradient of sum(output * weights) in all logits
    """

    def run(grid):
        own = slice(*m.shard_range(logits.shape[-1], grid.tp_rank, grid.tp_size))
        mine = logits[..., own].clone().requires_grad_()
        y = work(mine, grid)
        loss = (y * (weights[..., own] if y.dim() == logits.dim() else weights)).sum()
        return y, gradients(loss, mine)[0]

    with replaced(m, copy_to_tp=hooked_f, reduce_from_tp=shifted_g):
        found = on_ranks(3, run)
    return [y for y, _ in found], torch.cat([grad for _, grad in found], -1)


def check_2_6(m):
    logits, weights = draw(2, 10), draw(2, 10, seed=1)
    expected = torch.stack([row - sum(v.exp() for v in row).log() for row in logits])
    parts, grad = split_vocabulary(m, logits, weights, m.vocab_log_softmax)
    expect(torch.cat(parts, -1), expected, "logits (2, 10) on 3 ranks: their parts side by side")
    whole = logits.clone().requires_grad_()
    (whole_grad,) = gradients((whole.log_softmax(-1) * weights).sum(), whole)
    expect(grad, whole_grad, "logits (2, 10) on 3 ranks: the gradient (is copy_to_tp on the log-sum?)")
    far = logits + torch.arange(10.0) * 200
    parts, _ = split_vocabulary(m, far, weights, m.vocab_log_softmax)
    expect(
        torch.cat(parts, -1),
        far.double().log_softmax(-1),
        "logits up to 1800 on 3 ranks (exp overflows at 89)",
    )
    dtype = m.vocab_log_softmax(logits.bfloat16(), Grid()).dtype
    assert dtype == torch.float32, f"logits in bf16: found {dtype}, expected torch.float32"
    expect(m.vocab_log_softmax(logits, Grid()), expected, "logits (2, 10), one process")


def check_2_7(m):
    logprobs, weights = draw(2, 2, 10), draw(2, 2, seed=1)
    targets = torch.tensor([[0, 2], [3, 9]])

    def pick(mine, grid):
        return m.vocab_pick(mine, targets, 10, grid)

    parts, grad = split_vocabulary(m, logprobs, weights, pick)
    expected, expected_grad = torch.zeros(2, 2), torch.zeros(2, 2, 10)
    for i in range(2):
        for t in range(2):
            expected[i, t] = logprobs[i, t, targets[i, t]]
            expected_grad[i, t, targets[i, t]] = weights[i, t]
    where = f"targets {targets.tolist()}, 10 words on 3 ranks"
    for rank, found in enumerate(parts):
        expect(found, expected, f"{where}: log-probabilities on rank {rank}")
    expect(grad, expected_grad, f"{where}: the gradient reaches the targets alone, once")
    expect(m.vocab_pick(logprobs, targets, 10, Grid()), expected, "one process")


# -------------------------------------------------------------------------------- 3: the data


def check_3_1(m):
    short = m.Example([10, 11, 12], [20, 21, 1])
    long = m.Example([10], [20, 22, 23, 24, 25, 1])
    one = m.Example([13, 14], [26])
    three = "prompts of 3, 1 and 2 ids, responses of 3, 6 and 1"
    for pad in (0, 1, 20):  # a pad may be the stop token, or any other id
        ids, mask = m.collate([short, long, one], pad_id=pad)
        assert ids.dtype == torch.int64, f"{three}: found ids in {ids.dtype}, expected int64"
        assert mask.dtype == torch.bool, f"{three}: found a mask in {mask.dtype}, expected bool"
        expected = [
            [10, 11, 12, 20, 21, 1, pad],
            [10, 20, 22, 23, 24, 25, 1],
            [13, 14, 26, pad, pad, pad, pad],
        ]
        expect(ids, expected, f"{three}, pad {pad}: ids")
        expected = [[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]]
        expect(mask, expected, f"{three}, pad {pad}: mask")
        found = ids[:, 1:][mask].tolist()
        responses = [20, 21, 1, 20, 22, 23, 24, 25, 1, 26]
        assert found == responses, (
            f"{three}, pad {pad}: targets in the mask are {found}, expected {responses}"
        )


def check_3_2(m):
    def places(n, size, steps, seed):
        return [i for step in range(steps) for i in m.batch_indices(n, size, step, seed)]

    for step in range(7):
        size = len(m.batch_indices(7, 3, step, 0))
        assert size == 3, f"7 rows, batch {step} of 3: found {size} rows, expected 3"
    found = places(7, 3, 7, 0)  # three epochs of 7 rows in 7 batches of 3
    epochs = [found[:7], found[7:14], found[14:]]
    for i, epoch in enumerate(epochs):
        what = f"7 rows in batches of 3, epoch {i}"
        assert sorted(epoch) == list(range(7)), f"{what}: found rows {epoch}, expected each of 0..6 once"
    assert all(type(i) is int for i in found), f"7 rows: found {type(found[0])}, expected int"
    for i in (0, 1):
        what = f"7 rows, seed 0, epochs {i} and {i + 1}"
        assert epochs[i] != epochs[i + 1], f"{what}: found the same order, expected another one"
    first = places(50, 10, 5, 0)
    assert first != list(range(50)), "50 rows: found them in order, expected them shuffled"
    assert first != places(50, 10, 5, 1), "50 rows, seeds 0 and 1: found the same order, expected another one"
    what = "50 rows in batches of 10, and in batches of 25"
    assert first == places(50, 25, 2, 0), f"{what}: found two orders, expected the same one, cut differently"


# -------------------------------------------------------------------------------- 4: reward models


def check_4_1(m):
    net, (ids, _) = PrefixModel(), rows()
    scores = m.token_scores(net, ids)
    expect(torch.tensor(scores.shape), torch.tensor([4, 6]), "ids (4, 7): the shape")
    for t in range(6):
        alone = net.scalars(net.model(ids[:, : t + 2]))[:, -1]  # of the tokens up to targets[:, t] alone
        what = f"ids (4, 7): score of targets[:, {t}] = ids[:, {t + 1}], which has read ids[:, :{t + 2}]"
        expect(scores[:, t], alone, what)
    assert scores.requires_grad, "ids (4, 7): found scores without a gradient"


def check_4_2(m):
    x = torch.tensor([[1.0, 2.0, 6.0, 9.0], [5.0, 7.0, 8.0, 4.0], [3.0, 3.0, 3.0, 3.0]])
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1:3] = mask[1, 2] = True
    expect(m.masked_mean(x, mask), [4.0, 8.0, 0.0], "means of (2, 6), of (8) and of an empty row")
    x[~mask] = NAN
    x.requires_grad_()
    means = m.masked_mean(x, mask)
    expect(means, [4.0, 8.0, 0.0], "the same with NaN outside the mask: means")
    expected = [[0, 0.5, 0.5, 0], [0, 0, 1.0, 0], [0, 0, 0, 0]]
    expect(
        gradients(means.sum(), x)[0], expected, "the same with NaN outside the mask: gradient of their sum"
    )


def check_4_3(m):
    zeros = torch.zeros(3)
    chosen, rejected = torch.tensor([1.0, 5.0, -2.0, 3.0]), torch.tensor([0.0, 7.0, -4.0, 3.0])
    loss, _ = m.pairwise_loss(zeros, zeros, 0.2, 2.0)
    expect(loss, math.log(1 + math.exp(2)), "equal scores, beta .2, margin 2: log(1 + e^2)")
    loss, stats = m.pairwise_loss(chosen, rejected, 0.5, 0.7)
    terms = [math.log(1 + math.exp(-(0.5 * gap - 0.7))) for gap in (1, -2, 2, 0)]
    expect(loss, sum(terms) / 4, "gaps 1, -2, 2, 0, beta .5, margin .7: loss")
    expect(stats["pair_accuracy"], 0.5, "gaps 1, -2, 2, 0: pair_accuracy (a tie is not right)")
    expect(stats["score_gap"], 0.25, "gaps 1, -2, 2, 0: score_gap")
    expected = -(chosen - rejected).double().sigmoid().log().mean()
    expect(
        m.pairwise_loss(chosen, rejected)[0], expected, "gaps 1, -2, 2, 0, beta 1, no margin (the defaults)"
    )
    margins = torch.tensor([0.0, 1.0, 2.0, 3.0])
    expected = (1 + (margins - chosen + rejected).exp()).log().mean()
    what = "gaps 1, -2, 2, 0, beta 1, a margin for each pair: 0, 1, 2, 3"
    expect(m.pairwise_loss(chosen, rejected, 1.0, margins)[0], expected, what)
    loss, _ = m.pairwise_loss(zeros - 900, zeros, 1.0, 0.0)
    expect(loss, 900.0, "gaps of -900: the loss is 900, not infinite")


def check_4_4(m):
    scores, (_, mask) = draw(4, 6) * 5, rows()
    loss = 0
    for pair in (0, 1):
        means = []
        for i, places in response_places()[2 * pair : 2 * pair + 2]:
            means.append(sum(scores[i, t].item() for t in places) / len(places))
        loss += math.log(1 + math.exp(-(0.7 * (means[0] - means[1]) - 1.5))) / 2
    with replaced(m, masked_mean=means_row_by_row, pairwise_loss=overflowing_pairwise):
        found, stats = m.qrm_loss(scores, mask, 0.7, 1.5)
        expect(found, loss, "two pairs with responses of 2 and 4, 5 and 1 tokens, beta .7, margin 1.5")
        assert "pair_accuracy" in stats, f"found the figures {sorted(stats)}, expected those of pairwise_loss"
        found, _ = m.qrm_loss(torch.ones(4, 6), mask)
        expect(found, math.log(1 + math.exp(2)), "equal scores, default beta and margin: 2.1269")


def check_4_5(m):
    (_, mask), beta, margin, eps = rows(), 0.7, 1.5, 0.1
    sizes = [(sum(RESPONSE_LENGTHS), 8), (8,), (1, 8)]
    x, g, w = (draw(*size, seed=i).double() for i, size in enumerate(sizes))
    shares, pairs = m.token_shares(mask)

    def plain(x, g, w):
        z = ((x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * g) * w).sum(-1)
        means = [part.mean() for part in z.split(RESPONSE_LENGTHS)]
        return -sum((beta * (means[i] - means[i + 1]) - margin).sigmoid().log() for i in (0, 2)) / 2

    for scale in (1.0, 3.0):
        mine = [t.clone().requires_grad_() for t in (x, g, w)]
        theirs = [t.clone().requires_grad_() for t in (x, g, w)]
        loss, _ = m.fused_qrm_loss(*mine, shares.double(), pairs, 2, beta, margin, eps)
        found, expected = gradients(scale * loss, *mine), gradients(scale * plain(*theirs), *theirs)
        for name, a, b in zip(("dL/dx", "dL/dg (norm weight)", "dL/dw (head)"), found, expected):
            expect(
                a, b, f"two pairs, 12 tokens of width 8: {name} of {scale:g} * loss, by autograd", rtol=1e-6
            )


def check_4_6(m):
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    found = m.last_token_mask(mask)
    assert found.dtype == torch.bool, f"found {found.dtype}, expected torch.bool"
    expected = [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    expect(found, expected, "rows 0110, 1111, 0001, 1000 and 0000")


def check_4_7(m):
    scores, (_, mask), correct = 3 * draw(4, 6), rows(), torch.tensor([1, 0, 0, 1])
    scores[3, 3] = 0.2  # the last of row 3: right, but not by much
    last = [scores[i, places[-1]].item() for i, places in response_places()]
    terms = [math.log(1 + math.exp(-z if y else z)) for z, y in zip(last, correct)]
    right = [(z > 0) == bool(y) for z, y in zip(last, correct)]
    shown = f"last scores {', '.join(f'{z:.2f}' for z in last)}, correct 1, 0, 0, 1"
    with replaced(m, masked_mean=means_row_by_row, last_token_mask=last_of_rows):
        loss, stats = m.outcome_loss(scores, mask, correct)
        expect(loss, sum(terms) / 4, f"{shown}: cross-entropy")
        expect(stats["accuracy"], sum(right) / 4, f"{shown}: accuracy (positive means right)")
        loss, _ = m.outcome_loss(torch.full((4, 6), -200.0), mask, correct)
        expect(loss, 100.0, "scores of -200, half of the answers correct: cross-entropy")


def check_4_8(m):
    logprobs, ref, (_, mask) = draw(4, 6), draw(4, 6, seed=1), rows()
    logprobs[~mask] = NAN
    sums = [sum((logprobs[i, t] - ref[i, t]).item() for t in places) for i, places in response_places()]
    expected = sum(math.log(1 + math.exp(-0.3 * (sums[i] - sums[i + 1]))) for i in (0, 2)) / 2
    with replaced(m, pairwise_loss=overflowing_pairwise):
        loss, stats = m.dpo_loss(logprobs, ref, mask, 0.3)
        expect(
            loss,
            expected,
            "two pairs, responses of 2 and 4, 5 and 1 tokens, beta .3, NaN outside the mask: loss",
        )
        expect(stats["score_gap"], (sums[0] - sums[1] + sums[2] - sums[3]) / 2, "the same: score_gap")
        expect(m.dpo_loss(ref, ref, mask)[0], math.log(2), "policy = reference: log 2")


def check_4_9(m):
    ranked = 2 * draw(3, 4)
    terms = []
    for row in ranked.tolist():
        for k in range(3):
            terms.append(math.log(sum(math.exp(s) for s in row[k:])) - row[k])
    found, _ = m.plackett_luce_loss(ranked)
    expect(
        found,
        sum(terms) / len(terms),
        "three prompts with four answers each: mean over 3 prompts and 3 ranks",
    )
    pair = ranked[:, :2]
    expected = -(pair[:, 0] - pair[:, 1]).sigmoid().log().mean()
    expect(m.plackett_luce_loss(pair)[0], expected, "three prompts with two answers each: Bradley-Terry")
    expect(
        m.plackett_luce_loss(torch.tensor([[0.0, 500.0]]))[0], 500.0, "one prompt, scores 0 and 500: finite"
    )


def check_4_10(m):
    net, (ids, mask) = PrefixModel(), rows()
    last, every = torch.zeros(4, 6), torch.zeros(4, 6)
    for i, places in response_places():
        n = PROMPT_LENGTHS[i] + RESPONSE_LENGTHS[i]
        last[i, places[-1]] = net.scalars(net.model(ids[i : i + 1, :n]))[0, -1].detach()
        every[i, list(places)] = last[i, places[-1]]
    stand_ins = dict(
        response_scores=prefix_response_scores, token_scores=prefix_scores, last_token_mask=last_of_rows
    )
    with replaced(m, **stand_ins):
        what = "responses of 2, 4, 5 and 1 tokens"
        expect(m.outcome_rewards(net, ids, mask), last, f"{what}: the score at the last token, 0 elsewhere")
        found = m.outcome_rewards(net, ids, mask, every_token=True)
        expect(found, every, f"{what}, every_token: the last score at every response token, 0 elsewhere")


def check_4_11(m):
    policy = SimpleNamespace(logprobs=draw(4, 6), entropy=draw(4, 6, seed=1))
    reference = SimpleNamespace(logprobs=draw(4, 6, seed=2), entropy=draw(4, 6, seed=3))
    ids, mask = rows()
    expected = torch.zeros(4, 6)
    for i, places in response_places():
        for t in places:
            expected[i, t] = 0.3 * (policy.logprobs[i, t] - reference.logprobs[i, t])
    with replaced(m, token_logprobs=logprobs_of):
        found = m.dpo_rewards(policy, reference, ids, mask, 0.3)
    expect(
        found,
        expected,
        "random log-probabilities, beta .3: beta (log pi - log ref) at each token, 0 elsewhere",
    )


def check_4_12(m):
    z, fixed = torch.tensor([3.0, 1.0, 1.0, 2.0, -4.0]), torch.tensor([3.0, 1.0, 1.0, 5.0])
    lower = torch.tensor([3.0, 1.0, 1.0, 2.0, -5.0])
    tie = torch.tensor([3.0, 1.0, 1.0])
    cases = (  # Z at the error is 2: below 3, above 1 and 1; the largest drop is at 4
        ([z], [3], [fixed], (1.0, 3, 0, 1.0, 1), "scores 3 1 1 2 -4, error at 3, repaired 3 1 1 5"),
        ([z], [4], [lower], (4.0, 4, 1, 0.0, 1), "scores 3 1 1 2 -4, error at 4, repaired 3 1 1 2 -5"),
        (
            [z],
            [2],
            [tie],
            (1.5, 2, 0, 0.5, 1),
            "scores 3 1 1 2 -4, error at 2, repaired 3 1 1 (ties count 1/2)",
        ),
        (
            [z, z, z],
            [3, 0, 4],
            None,
            (5.0, 7, 1, 0.0, 2),
            "scores 3 1 1 2 -4, errors at 3, at 0 (left out), at 4",
        ),
    )
    for scores, errors, repaired, expected, what in cases:
        found = (
            m.credit_counts(scores, errors) if repaired is None else m.credit_counts(scores, errors, repaired)
        )
        expected = dict(zip(("wins", "comparisons", "hits", "choices", "n_errors"), expected))
        assert found == expected, f"{what}: found {found}, expected {expected}"


# -------------------------------------------------------------------------------- 5: REINFORCE


def check_5_1(m):
    log_pi, log_ref = draw(7).log_softmax(0), draw(7, seed=1).log_softmax(0)
    kl = sum(p.exp() * (p - q) for p, q in zip(log_pi, log_ref))
    k1, k3 = m.kl_estimates(log_pi, log_ref)
    where = "two distributions over 7 words"
    expect(k1, [p - q for p, q in zip(log_pi, log_ref)], f"{where}: k1 = log pi - log ref")
    expect((log_pi.exp() * k1).sum(), kl, f"{where}: the expectation of k1 under pi is the KL")
    expect((log_pi.exp() * k3).sum(), kl, f"{where}: the expectation of k3 under pi is the KL")
    assert (k3 >= 0).all(), f"{where}: found k3 = {k3.min():.6g}, expected no negative one"
    _, small = m.kl_estimates(torch.tensor(1e-3), torch.tensor(0.0))
    expect(small, 5e-7, "k1 = 0.001: k3 is about k1^2 / 2 (exp(x) - 1 has no digits left)", rtol=1e-2)


def check_5_2(m):
    rewards = torch.tensor([[99.0, 1.0, 3.0], [6.0, 10.0, 99.0]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()
    sigma = (((1 - 5) ** 2 + (3 - 5) ** 2 + (6 - 5) ** 2 + (10 - 5) ** 2) / 4) ** 0.5

    def run(how, grid=Grid()):
        return m.standardize(rewards, mask, how, grid)

    where = "rewards 1, 3 and 6, 10 in the mask, 99 outside"
    expected = torch.tensor([[0, -4, -2], [1, 5, 0]]) / sigma
    expect(run("mean_std"), expected, f"{where}, mean_std (mean 5, variance 46 / 4)")
    expect(run("std"), torch.tensor([[0, 1, 3], [6, 10, 0]]) / sigma, f"{where}, std: divided, not shifted")
    expect(run("none"), [[0, 1, 3], [6, 10, 0]], f"{where}, none: as they are, 0 outside")
    fives = torch.full((2, 3), 5.0)
    expect(m.standardize(fives, mask, "mean_std", Grid()), torch.zeros(2, 3), "all rewards 5, mean_std: 0")
    expect(m.standardize(fives, mask, "std", Grid()), 5.0 * mask, "all rewards 5, std: as they are")

    def on_my_row(grid):
        row = slice(grid.dp_rank, grid.dp_rank + 1)
        return m.standardize(rewards[row], mask[row], "mean_std", grid)

    what = "one row on each of two data-parallel ranks, mean_std: the moments are those of both"
    expect(torch.cat(on_ranks(2, on_my_row, "dp")), expected, what)


def check_5_3(m):
    rewards, (_, mask) = draw(4, 6), rows()
    rewards[~mask] = 50.0
    for gamma in (1.0, 0.8):
        expected = torch.zeros(4, 6)
        for i, places in response_places():
            for t in places:
                expected[i, t] = sum(gamma ** (k - t) * rewards[i, k] for k in places if k >= t)
        what = f"random rewards, 50 outside the mask, gamma {gamma}: the discounted sum from t on, 0 outside"
        expect(m.returns_to_go(rewards, mask, gamma), expected, what)


def check_5_4(m):
    rewards = torch.tensor([1.0, 0.0, 5.0, 2.0, 2.0, 2.0])  # two prompts, three samples each
    others = [1 - 5 / 2, 0 - 6 / 2, 5 - 1 / 2, 0, 0, 0]
    where = "rewards 1 0 5 | 2 2 2, groups of 3"
    expect(m.group_advantages(rewards, 3, "rloo"), others, f"{where}, rloo: R_i - mean of the others")
    std = ((1 - 2) ** 2 + (0 - 2) ** 2 + (5 - 2) ** 2) ** 0.5 / 2**0.5
    expected = [-1 / std, -2 / std, 3 / std, 0, 0, 0]
    expect(m.group_advantages(rewards, 3, "grpo"), expected, f"{where}, grpo: (R_i - mean) / sample std")
    equal = torch.full((14,), 45.1)
    equal[3] = 45.1 * (1 + 1e-6)
    for how in ("rloo", "grpo"):
        found = m.group_advantages(equal, 7, how)
        assert not found.any(), (
            f"rewards of 45.1 that differ by 1e-6 of that, {how}: expected 0, {found.tolist()}"
        )
    for how in ("rloo", "grpo"):
        try:
            found = m.group_advantages(rewards, 1, how)
        except ValueError:  # BadInput is one
            continue
        raise AssertionError(f"groups of 1, {how}: found {found.tolist()}, expected BadInput or a ValueError")


def check_5_5(m):
    logprobs, advantages = draw(4, 6).requires_grad_(), draw(4, 6, seed=1).requires_grad_()
    _, mask = rows()
    n = sum(RESPONSE_LENGTHS)
    with torch.no_grad():
        advantages[~mask] = 70.0
    loss, _ = m.reinforce_loss(logprobs, advantages, mask)
    terms = [advantages[i, t] * logprobs[i, t] for i, places in response_places() for t in places]
    where = "12 response tokens, A = 70 outside the mask"
    expect(loss, -sum(terms) / n, f"{where}: loss, a mean over tokens")
    by_logprobs, by_advantages = gradients(loss, logprobs, advantages)
    expected = torch.where(mask, -advantages / n, 0.0)
    expect(by_logprobs, expected, f"{where}: gradient of logprobs, -A / 12 in the mask, 0 outside")
    expect(by_advantages, torch.zeros(4, 6), f"{where}: no gradient goes into the advantages")


# -------------------------------------------------------------------------------- 6: PPO


def check_6_1(m):
    critic, (ids, mask) = PrefixModel(), rows()
    with replaced(m, at_states=states_of):
        values = m.state_values(critic, ids, mask)
    expect(torch.tensor(values.shape), torch.tensor([4, 6]), "ids (4, 7): the shape")
    for t in range(6):
        alone = critic.scalars(critic.model(ids[:, : t + 1]))[:, -1]  # of the tokens before a_t alone
        what = f"ids (4, 7): V(s_{t}), which has read ids[:, :{t + 1}] and not a_{t}; 0 outside the mask"
        expect(values[:, t], alone * mask[:, t], what)
    assert values.requires_grad, "ids (4, 7): found values without a gradient"


def slow_gae(rewards, values, gamma, lam):
    """A double sum over the later delta of a row."""
    out = torch.zeros(4, 6)
    for i, places in response_places():
        end = places[-1] + 1
        delta = {}
        for t in places:
            following = values[i, t + 1] if t + 1 < end else 0.0
            delta[t] = rewards[i, t] + gamma * following - values[i, t]
        for t in places:
            out[i, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in places if k >= t)
    return out


def check_6_2(m):
    rewards, values, (_, mask) = draw(4, 6), draw(4, 6, seed=1), rows()
    rewards[~mask], values[~mask] = 50.0, -70.0
    for gamma, lam in ((0.9, 0.8), (0.9, 0.0), (1.0, 1.0)):
        advantages, returns = m.gae(rewards, values, mask, gamma, lam)
        expected = slow_gae(rewards, values, gamma, lam)
        where = f"rewards 50 and values -70 outside the mask, gamma {gamma}, lambda {lam}"
        expect(advantages, expected, f"{where}: advantages, a sum over later delta, 0 outside")
        what = f"{where}: returns = advantages + values, 0 outside"
        expect(returns, torch.where(mask, expected + values, 0.0), what)


def check_6_3(m):
    (ids, mask), scores, k1, values = rows(), draw(4, 6), draw(4, 6, seed=1), draw(4, 6, seed=2)
    blank = torch.zeros(4, 6)
    rollout = reinforce.Rollout(
        ids=ids,
        response_mask=mask,
        truncated=blank[:, 0].bool(),
        old_logprobs=blank,
        entropy=blank,
        kl_k1=k1 * mask,
        kl_k3=k1.abs() * mask,
        kl_exact=blank,
        scores=scores * mask,
        reward_mask=mask,
    )
    cfg = dict(
        standardize="mean_std",
        eos_to_mean=False,
        kl="k1",
        kl_coef=0.3,
        baseline_weight=0.5,
        gamma=0.9,
        lam=0.8,
        group_size=2,
    )
    special = draw(4, 6, seed=3) * mask

    def without_critic(rollout, cfg, grid):
        return special

    def run(**changes):
        stand_ins = dict(standardize=plainly_standardized, shape_rewards=plainly_shaped, gae=strange_gae)
        stand_ins |= dict(policy_advantages=without_critic, reinforce_advantages=without_critic)
        with replaced(m, **stand_ins):
            return m.ppo_advantages(rollout, values, SimpleNamespace(**{**cfg, **changes}), Grid())

    z_std = torch.where(mask, (scores - scores[mask].mean()) / scores[mask].std(unbiased=False), 0.0)
    penalised = z_std - 0.3 * k1 * mask
    where = "kl k1, kl_coef .3, baseline_weight .5"
    A, target = run(advantage="token")
    expected = torch.where(mask, penalised - 0.5 * values, 0.0)
    expect(A, expected, f"token, {where}: A = Z_std - .3 KL - .5 V, 0 outside the mask")
    expect(target, z_std, f"token, {where}: the critic's target is Z_std, without KL")
    _, target = run(advantage="token", eos_to_mean=True)
    what = f"token, {where}, eos_to_mean: in the target the last token's reward is its sequence's mean"
    expect(target, with_mean_at_the_end(z_std), what)
    expected = strange_gae(penalised, values, mask, 0.9, 0.8)
    for found, wanted, name in zip(run(advantage="gae"), expected, ("advantages", "returns")):
        expect(
            found,
            wanted,
            f"gae, {where}, gamma .9, lam .8: the {name} of gae(Z_std - .3 KL, V, mask, .9, .8)",
        )
    A, target = run(advantage="rloo")
    expect(A, special, f"rloo, {where}: the advantages of reinforce.py, unchanged")
    expect(target, z_std, f"rloo, {where}: the critic still learns Z_std")


def check_6_4(m):
    (_, mask), old = rows(), draw(4, 6, seed=1)
    A, change = draw(4, 6, seed=2), 0.6 * draw(4, 6, seed=3)
    new = (old + change).requires_grad_()
    loss, stats = m.ppo_loss(new, old, A, mask, 0.2)
    terms, outside, ratios, grad = [], [], [], torch.zeros(4, 6)
    for i, places in response_places():
        for t in places:
            ratio, a = math.exp(change[i, t]), A[i, t].item()
            ratios.append(ratio)
            outside.append(ratio > 1.2 if a > 0 else ratio < 0.8)
            terms.append((1.2 if a > 0 else 0.8) * a if outside[-1] else ratio * a)
            grad[i, t] = 0.0 if outside[-1] else -ratio * a / sum(RESPONSE_LENGTHS)
    where = "12 tokens, random A and ratios, clip .2"
    expect(loss, -sum(terms) / len(terms), f"{where}: loss")
    expect(gradients(loss, new)[0], grad, f"{where}: gradient of logprobs, 0 for a clipped token")
    what = f"{where}: clip_frac, the share above 1.2 with A > 0 or below .8 with A < 0"
    expect(stats["clip_frac"], sum(outside) / len(outside), what)
    expect(stats["ratio_max"], max(ratios), f"{where}: ratio_max")
    same = old.clone().requires_grad_()
    (found,) = gradients(m.ppo_loss(same, old, A, mask, 0.2)[0], same)
    expect(
        found, torch.where(mask, -A / mask.sum(), 0.0), "all ratios 1: the gradient is REINFORCE's, -A / 12"
    )
    by_old, by_A = old.clone().requires_grad_(), A.clone().requires_grad_()
    grads = gradients(m.ppo_loss(new, by_old, by_A, mask, 0.2)[0], by_old, by_A)
    expect(torch.stack(grads), torch.zeros(2, 4, 6), f"{where}: only logprobs carries a gradient")


CHECKS = {
    f"{name[6]}.{name[8:]}": check
    for name, check in list(globals().items())
    if name.startswith("check_") and name[6].isdigit()
}
