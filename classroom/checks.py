"""The checks that grade the exercises (exercises.py), in its order: check_4_3 grades exercise 4.3.

A check gets the module `m` that holds the student's function; all else in it, and all other files, are the
given ones. It compares with hand-computed numbers, a slow loop, autograd or the unsharded model, never with
the solution. The docstring is the student's hint.
"""

import cmath
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

import model
import reinforce
from parallel import Grid

PROMPT_LENGTHS, RESPONSE_LENGTHS = (3, 3, 1, 4), (2, 4, 5, 1)  # of the four rows that most checks use; T = 6


def expect(actual, expected, what, rtol=1e-5):
    """Every element, to rtol of the largest one; the message is one line."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, (
        f"{what}: found shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).abs().nan_to_num(math.inf) if actual.numel() else torch.zeros(1)
    if error.max() > rtol * max(expected.abs().max().item(), 1e-12):
        at = tuple(i.item() for i in (error == error.max()).nonzero()[0])
        raise AssertionError(
            f"{what}: found {actual[at].item():.6g}, expected {expected[at].item():.6g}"
            + f" at {list(at)}" * bool(at)
        )


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows():
    """ids (4, 7) and response_mask (4, 6), made by loops: two pairs of unequal lengths, ids below 29, pads
    that are a real id.
    """
    ids, mask = torch.full((4, 7), 5), torch.zeros(4, 6, dtype=torch.bool)
    for i, (p, r) in enumerate(zip(PROMPT_LENGTHS, RESPONSE_LENGTHS)):
        for t in range(p + r):
            ids[i, t] = (7 * t * t + 3 * i + t) % 29
            if t >= p:
                mask[i, t - 1] = True
    return ids, mask


def small_model(m, kind, grid=Grid(), seed=0):
    """A LanguageModel or ScalarModel of module m with random weights, norms and head included."""
    cfg = model.ModelConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )
    net = m.init_weights(getattr(m, kind)(cfg, grid), seed)
    with torch.no_grad():
        for i, (name, param) in enumerate(net.named_parameters()):
            if "norm" in name or "score" in name:
                param.add_(0.5 * draw(*param.shape, seed=i))
    return net


def on_ranks(size, work, group="tp"):
    """[work(grid) of each rank]: the ranks are threads of this process, and all-reduce waits until all have
    made the same call.
    """
    calls, finished, news, place = [[] for _ in range(size)], set(), threading.Condition(), threading.local()

    def all_reduce(x, op=dist.ReduceOp.SUM, group=None):
        with news:
            calls[place.rank].append(x.detach().clone())
            news.notify_all()
            n = len(calls[place.rank])
            news.wait_for(lambda: all(len(made) >= n or r in finished for r, made in enumerate(calls)))
            assert all(len(made) >= n for made in calls), (
                "one rank waits in an all-reduce that another one never makes"
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


def gradients(value, *inputs):
    """d value / d inputs, zeros where an input was not used"""
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)


# -------------------------------------------------------------------------------- 1: the model


def check_1_1(m):
    """Square, mean over the last dimension with keepdim=True, add eps, torch.rsqrt. Do it in fp32
    (x.float()), go back to x's dtype, and multiply with the weight last.
    """
    norm = m.RMSNorm(4, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expect(
        norm(torch.tensor([[3.0, 4.0, 0.0, 0.0]])),
        [[1.2, 3.2, 0.0, 0.0]],
        "x = 3, 4, 0, 0 has root mean square 2.5, weight 1, 2, 3, 4",
    )
    x = draw(2, 3, 4)
    expect(
        norm(x)[1, 2],
        norm.weight * x[1, 2] / (sum(v * v for v in x[1, 2]) / 4) ** 0.5,
        "each position by itself",
    )
    norm.eps = 3.0
    expect(norm(torch.ones(1, 4)), [[0.5, 1.0, 1.5, 2.0]], "eps = 3 stands inside the root")
    big = norm.half()(torch.full((1, 4), 400.0).half())
    assert big.dtype == torch.float16, f"fp16 in, {big.dtype} out"
    expect(
        big,
        [[1.0, 2.0, 3.0, 4.0]],
        "400 in fp16: its square is infinite unless the work is done in fp32",
        rtol=1e-3,
    )


def check_1_2(m):
    """i runs 0, 2, 4, ... E - 2, so the powers are torch.arange(0, E, 2) / E. For the scaling: C/w = C f / (2
    pi) turns; the share to keep is (turns - low) / (high - low), clamped to 0..1.
    """
    cfg = dict(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    plain = m.rope_frequencies(m.ModelConfig(**cfg, head_dim=6, rope_theta=1000.0))
    assert plain.dtype == torch.float32, f"found {plain.dtype}, expected torch.float32"
    expect(plain, [1.0, 0.1, 0.01], "theta = 1000, E = 6")
    scaled = m.rope_frequencies(
        m.ModelConfig(
            **cfg, head_dim=128, rope_theta=500000.0, rope_scaling=m.RopeScaling(8.0, 1.0, 4.0, 8192)
        )
    )
    for i, found in enumerate(scaled.tolist()):  # Llama 3.1's rule, one frequency at a time
        f = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / f
        if wavelength > 8192 / 1.0:
            f = f / 8
        elif wavelength > 8192 / 4.0:
            share = (8192 / wavelength - 1) / (4 - 1)
            f = (1 - share) * f / 8 + share * f
        expect(found, f, f"Llama 3.1's frequency {i} of 64")


def check_1_3(m):
    """chunk(2, dim=-1) gives a and b, the two coordinates of each pair; a plane rotation by the angle is
    (a cos - b sin, b cos + a sin). torch.cat puts them back, .to(x.dtype) undoes what fp32 angles promote."""
    x, angles = (
        draw(1, 3, 2, 4),
        torch.tensor([[0.0, 0.0], [0.5, 1.0], [2.0, -0.7]]),
    )  # (B, T, H, E), (T, E/2)
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    y = m.apply_rope(x, cos, sin)
    expect(y[:, 0], x[:, 0], "angle 0 changes nothing")
    for t in range(3):
        for i in range(2):
            turned = complex(x[0, t, 1, i], x[0, t, 1, i + 2]) * cmath.exp(1j * angles[t, i].item())
            expect(
                y[0, t, 1, [i, i + 2]],
                [turned.real, turned.imag],
                f"the pair ({i}, {i} + E/2) at position {t}, as a complex number",
            )
    half = m.apply_rope(x.bfloat16(), cos, sin)
    assert half.dtype == torch.bfloat16, f"bf16 in, {half.dtype} out"


def slow_attention(q, k, v):
    """Head by head and position by position."""
    out = torch.zeros(q.shape)
    for b, t, h in (
        (b, t, h) for b in range(q.shape[0]) for t in range(q.shape[1]) for h in range(q.shape[2])
    ):
        kv = h * k.shape[2] // q.shape[2]
        weights = (k[b, : t + 1, kv] @ q[b, t, h] / q.shape[3] ** 0.5).softmax(0)
        out[b, t, h] = weights @ v[b, : t + 1, kv]
    return out


def check_1_4(m):
    """F.scaled_dot_product_attention wants (B, heads, T, E), so transpose(1, 2) in and out. is_causal=True is
    the mask, enable_gqa=True lets neighbouring query heads share a key/value head.
    """
    q, k, v = draw(2, 5, 4, 6), draw(2, 5, 2, 6, seed=1), draw(2, 5, 2, 6, seed=2)
    expect(m.causal_attention(0, q, k, v), slow_attention(q, k, v), "four query heads, two key/value heads")
    expect(
        m.causal_attention(0, q, 2 * q, q + 1),
        slow_attention(q, 2 * q, q + 1),
        "as many key/value heads as query heads",
    )


def check_sublayer(m, name, expected):
    """The sub-layer of layer 0 on one process and on two ranks, forward and backward."""
    x, weights = draw(2, 5, 16), draw(2, 5, 16, seed=1)

    def run(grid):
        net, mine = small_model(m, "LanguageModel", grid), x.clone().requires_grad_()
        rope = m.rope_table(torch.arange(5)[None], net.cfg)
        part = getattr(net.model.layers[0], name)
        y = part(mine, rope, 0, m.causal_attention) if name == "self_attn" else part(mine)
        return y, gradients((y * weights).sum(), mine)[0]

    net = small_model(model, "LanguageModel")
    whole = x.clone().requires_grad_()
    y = expected(net, getattr(net.model.layers[0], name), whole)
    (grad,) = gradients((y * weights).sum(), whole)
    one = run(Grid())
    expect(one[0], y, "output on one process")
    expect(one[1], grad, "gradient on one process")
    for rank, (found, found_grad) in enumerate(on_ranks(2, run)):
        expect(found, y, f"output on rank {rank} of 2 (is g there?)")
        expect(found_grad, grad, f"gradient of x on rank {rank} of 2 (is f there?)")


def check_1_5(m):
    """proj(x) is (B, T, heads * E): unflatten its last dimension into heads of width E, rotate q and k (not
    v), ask `attend`, and flatten the heads again. f comes once before the three projections, g after o_proj.
    """

    def expected(net, attention, x):
        split = lambda y: y.view(*y.shape[:2], -1, attention.head_dim)
        rope = model.rope_table(torch.arange(x.shape[1])[None], net.cfg)
        q, k = (model.apply_rope(split(proj(x)), *rope) for proj in (attention.q_proj, attention.k_proj))
        return slow_attention(q, k, split(attention.v_proj(x))).flatten(2) @ attention.o_proj.weight.T

    check_sublayer(m, "self_attn", expected)
    net, seen = small_model(m, "LanguageModel"), []
    net.model(torch.zeros(1, 3, dtype=torch.int64), attend=lambda layer, q, k, v: seen.append(layer) or q)
    assert seen == [0, 1], f"attend was called for the layers {seen}, expected 0 and 1"


def check_1_6(m):
    """F.silu on the gate, times up, then down. One f before both column-parallel layers, one g after the
    row-parallel one.
    """
    silu = lambda z: z / (1 + (-z).exp())
    check_sublayer(
        m,
        "mlp",
        lambda _, mlp, x: (
            (silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
        ),
    )


def check_1_7(m):
    """cumsum of the probabilities; the uniform times the last entry of that sum (it is not exactly 1) is a
    height, and torch.searchsorted(..., right=True) finds the first entry above it.
    """
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    sample = lambda p, u: m.sample_tokens(p.expand(len(u), -1), torch.tensor(u)).tolist()
    found, expected = sample(p, [0.0, 0.05, 0.15, 0.35, 0.65, 0.99]), [0, 0, 1, 2, 3, 3]
    assert found == expected, (
        f"probabilities .1 .2 .3 .4, uniforms 0 .05 .15 .35 .65 .99: found {found}, expected {expected}"
    )
    last = 1 - 2**-24  # the largest fp32 below 1
    found = sample(torch.tensor([0.0, 0.5, 0.5, 0.0]), [0.0, 0.5, last])
    assert found == [1, 2, 2], (
        f"probabilities 0 .5 .5 0, uniforms 0, .5 and almost 1: found {found}, expected [1, 2, 2]"
    )
    found = sample(torch.tensor([0.25, 0.25]), [0.3, 0.7])
    assert found == [0, 1], (
        f"probabilities that sum to .5, uniforms .3 and .7: found {found}, expected [0, 1]"
    )
    counts = torch.bincount(torch.tensor(sample(p, [(i + 0.5) / 1000 for i in range(1000)])), minlength=4)
    expect(
        counts,
        [100.0, 200.0, 300.0, 400.0],
        "draws of each token from 1000 evenly spread uniforms",
        rtol=0.003,
    )


# -------------------------------------------------------------------------------- 2: tensor parallelism


def check_2_1(m):
    """Forward keeps the group in ctx and hands x on; backward all-reduces the gradient. A backward returns
    one value per argument of forward: None for the group.
    """
    x, weights = draw(2, 3), [draw(2, 3, seed=1 + r) for r in range(3)]

    def run(grid):
        mine = x.clone().requires_grad_()
        y = m.copy_to_tp(mine, grid)
        return y, gradients((y * weights[grid.tp_rank]).sum(), mine)[0]

    for rank, (y, grad) in enumerate(on_ranks(3, run)):
        expect(y, x, f"forward on rank {rank}: x itself")
        expect(grad, sum(weights), f"backward on rank {rank}: the sum of all ranks' gradients")


def check_2_2(m):
    """Forward all-reduces x; backward hands the gradient on as it is, for dL/dx_i = dL/dy on every rank."""
    x, weights = [draw(2, 3, seed=r) for r in range(3)], draw(2, 3, seed=9)

    def run(grid):
        mine = x[grid.tp_rank].clone().requires_grad_()
        y = m.reduce_from_tp(mine, grid)
        return y, gradients((y * weights).sum(), mine)[0], mine

    for rank, (y, grad, mine) in enumerate(on_ranks(3, run)):
        expect(y, sum(x), f"forward on rank {rank}: the sum")
        expect(grad, weights, f"backward on rank {rank}: the gradient as it came")
        expect(mine, x[rank], f"the x of rank {rank} afterwards: unchanged")


def slices(m, size, parts):
    return [slice(*m.shard_range(size, r, parts)) for r in range(parts)]


def check_2_3(m):
    """shard_range(d_out, ...) says which output features are mine; nn.Linear's own constructor (super) makes
    a layer with that many of them.
    """
    A, b, x = draw(10, 6), draw(10, seed=1), draw(2, 6, seed=2)
    parts = []
    for r, own in enumerate(slices(m, 10, 3)):  # 3, 3 and 4 features
        layer = m.ColumnLinear(6, 10, Grid(tp_rank=r, tp_size=3), bias=True)
        expect(
            torch.tensor(layer.weight.shape), torch.tensor(A[own].shape), f"weight's shape on rank {r} of 3"
        )
        assert layer.bias is not None, "bias=True, and the layer has none"
        layer.weight.data, layer.bias.data = A[own], b[own]
        parts.append(layer(x))
    expect(torch.cat(parts, -1), x @ A.T + b, "the ranks' features side by side")
    assert m.ColumnLinear(6, 10, Grid()).bias is None, "there is a bias that nobody asked for"
    assert m.ColumnLinear(6, 10, Grid()).weight.shape == (10, 6), "one process holds all of it"


def check_2_4(m):
    """shard_range(d_in, ...) says which input features are mine. No bias: the sum over the ranks would add it
    tp times.
    """
    A, x = draw(6, 10), draw(2, 10, seed=2)
    total = 0
    for r, own in enumerate(slices(m, 10, 3)):
        layer = m.RowLinear(10, 6, Grid(tp_rank=r, tp_size=3))
        expect(
            torch.tensor(layer.weight.shape),
            torch.tensor(A[:, own].shape),
            f"weight's shape on rank {r} of 3",
        )
        assert layer.bias is None, "a bias would be added once a rank"
        layer.weight.data = A[:, own]
        total = total + layer(x[:, own])
    expect(total, x @ A.T, "the sum of the ranks' outputs")
    assert m.RowLinear(10, 6, Grid()).weight.shape == (6, 10), "one process holds all of it"


def check_2_5(m):
    """Which ids are mine? Look up id - start, with 0 in the place of the others so that the index is valid;
    set their rows to zero, and sum over the ranks with g. One process needs none of it.
    """
    table, ids, weights = draw(10, 4), torch.tensor([[0, 2, 3, 9], [5, 6, 6, 1]]), draw(2, 4, 4, seed=1)

    def run(grid):
        layer = m.VocabEmbedding(10, 4, grid)
        layer.weight.data = table[layer.start : layer.stop].clone()
        y = layer(ids)
        return y, gradients((y * weights).sum(), layer.weight)[0]

    expected = torch.zeros(10, 4)
    for place in ((i, t) for i in range(2) for t in range(4)):
        expected[ids[place]] += weights[place]
    for size in (1, 3):
        found = [run(Grid())] if size == 1 else on_ranks(size, run)
        for rank, (y, _) in enumerate(found):
            expect(
                y,
                torch.stack([torch.stack([table[i] for i in row]) for row in ids]),
                f"rows on rank {rank} of {size}",
            )
        expect(
            torch.cat([grad for _, grad in found]),
            expected,
            f"gradients of the ranks' parts, one below the other, {size} ranks",
        )


def split_vocabulary(m, logits, weights, work):
    """Runs work(slice of logits, its range, grid) on 3 ranks. -> outputs, the gradient of sum(output *
    weights) in all logits
    """

    def run(grid):
        own = slice(*m.shard_range(logits.shape[-1], grid.tp_rank, grid.tp_size))
        mine = logits[..., own].clone().requires_grad_()
        y = work(mine, grid)
        loss = (y * (weights[..., own] if y.dim() == logits.dim() else weights)).sum()
        return y, gradients(loss, mine)[0]

    found = on_ranks(3, run)
    return [y for y, _ in found], torch.cat([grad for _, grad in found], -1)


def check_2_6(m):
    """Three steps: the maximum over all ranks (all_reduce with ReduceOp.MAX), the sum of exponentials over
    all ranks (g), and its logarithm, through f, from each logit.
    """
    logits, weights = draw(2, 10), draw(2, 10, seed=1)
    expected = torch.stack([row - sum(v.exp() for v in row).log() for row in logits])
    parts, grad = split_vocabulary(m, logits, weights, m.vocab_log_softmax)
    expect(torch.cat(parts, -1), expected, "the ranks' parts side by side, 3 ranks")
    whole = logits.clone().requires_grad_()
    expect(
        grad,
        gradients((whole.log_softmax(-1) * weights).sum(), whole)[0],
        "gradient of the logits, 3 ranks (is f there?)",
    )
    far = logits + torch.arange(10.0) * 200
    parts, _ = split_vocabulary(m, far, weights, m.vocab_log_softmax)
    expect(torch.cat(parts, -1), far.double().log_softmax(-1), "logits up to 1800 (exp overflows at 89)")
    assert m.vocab_log_softmax(logits.bfloat16(), Grid()).dtype == torch.float32, "bf16 logits must give fp32"
    expect(m.vocab_log_softmax(logits, Grid()), expected, "one process")


def check_2_7(m):
    """As in the embedding: look up target - start where the target is mine, answer zero elsewhere, sum over
    the ranks (g).
    """
    logprobs, targets, weights = draw(2, 2, 10), torch.tensor([[0, 2], [3, 9]]), draw(2, 2, seed=1)
    parts, grad = split_vocabulary(
        m, logprobs, weights, lambda mine, grid: m.vocab_pick(mine, targets, 10, grid)
    )
    expected, expected_grad = torch.zeros(2, 2), torch.zeros(2, 2, 10)
    for place in ((i, t) for i in range(2) for t in range(2)):
        expected[place] = logprobs[place][targets[place]]
        expected_grad[place][targets[place]] = weights[place]
    for rank, found in enumerate(parts):
        expect(found, expected, f"the targets' log-probabilities on rank {rank} of 3")
    expect(grad, expected_grad, "gradient: it belongs to the targets alone, 3 ranks")
    expect(m.vocab_pick(logprobs, targets, 10, Grid()), expected, "one process")


# -------------------------------------------------------------------------------- 3: the data


def check_3_1(m):
    """Make ids full of pad_id and a mask of zeros, one column shorter, and fill them row by row. Response
    token r0 stands in ids at len(prompt), so in targets = ids[:, 1:] it stands one place earlier.
    """
    short, long, one = (
        m.Example([10, 11, 12], [20, 21, 1]),
        m.Example([10], [20, 22, 23, 24, 25, 1]),
        m.Example([13, 14], [26]),
    )
    for pad in (0, 1, 20):  # a pad may be the stop token, or any other id
        ids, mask = m.collate([short, long, one], pad_id=pad)
        assert ids.dtype == torch.int64 and mask.dtype == torch.bool, (
            f"found {ids.dtype} and {mask.dtype}, expected int64 and bool"
        )
        expect(
            ids,
            [[10, 11, 12, 20, 21, 1, pad], [10, 20, 22, 23, 24, 25, 1], [13, 14, 26, pad, pad, pad, pad]],
            f"ids with pad {pad}",
        )
        expect(mask, [[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]], f"mask with pad {pad}")
        assert ids[:, 1:][mask].tolist() == [20, 21, 1, 20, 22, 23, 24, 25, 1, 26], (
            "targets in the mask are not the responses"
        )


def check_3_2(m):
    """Number all rows that are ever read: batch `step` takes the places step * batch_size and on. Place p is
    in epoch p // n, at position p % n of that epoch's permutation.
    """
    places = lambda n, size, steps, seed: [
        i for step in range(steps) for i in m.batch_indices(n, size, step, seed)
    ]
    found = places(7, 3, 7, 0)  # three epochs of 7 rows in 7 batches of 3
    assert all(len(m.batch_indices(7, 3, step, 0)) == 3 for step in range(7)), (
        "a batch of 3 has another number of rows"
    )
    epochs = [found[i : i + 7] for i in (0, 7, 14)]
    for i, epoch in enumerate(epochs):
        assert sorted(epoch) == list(range(7)), f"epoch {i} reads rows {epoch}, expected each of 0..6 once"
    assert all(type(i) is int for i in found), f"found {type(found[0])}, expected int"
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2], "two epochs have the same order"
    assert places(50, 10, 5, 0) != list(range(50)), "the rows are not shuffled"
    assert places(50, 10, 5, 0) != places(50, 10, 5, 1), "another seed gives the same order"
    assert places(50, 10, 5, 0) == places(50, 25, 2, 0), (
        "the order must not depend on how it is cut into batches"
    )


# -------------------------------------------------------------------------------- 4: reward models


def check_4_1(m):
    """The model reads all T+1 ids; the scalar at position t+1, where targets[:, t] is the input, is that
    token's score. So one position is dropped: which end?
    """
    net, (ids, _) = small_model(model, "ScalarModel"), rows()
    scores = m.token_scores(net, ids)
    for t in range(6):
        alone = net.scalars(net.model(ids[:, : t + 2]))[
            :, -1
        ]  # of nothing but the tokens up to targets[:, t]
        expect(
            scores[:, t], alone, f"scores of targets[:, {t}], from the prefix that ends with it", rtol=1e-4
        )
    assert scores.shape == (4, 6) and scores.requires_grad, "expected (B, T) scores with a gradient"


def check_4_2(m):
    """masked_fill, not a product: NaN * 0 is NaN. Divide by the number of positions in the mask, but by at
    least 1.
    """
    x, mask = (
        torch.tensor([[1.0, 2.0, 6.0, 9.0], [5.0, 7.0, 8.0, 4.0], [3.0, 3.0, 3.0, 3.0]]),
        torch.zeros(3, 4, dtype=torch.bool),
    )
    mask[0, 1:3] = mask[1, 2] = True
    expect(m.masked_mean(x, mask), [4.0, 8.0, 0.0], "means of (2, 6), of (8) and of an empty row")
    x[~mask] = torch.tensor(float("nan"))
    x.requires_grad_()
    means = m.masked_mean(x, mask)
    expect(means, [4.0, 8.0, 0.0], "the same with NaN outside the mask")
    expect(gradients(means.sum(), x)[0], [[0, 0.5, 0.5, 0], [0, 0, 1.0, 0], [0, 0, 0, 0]], "gradient")


def check_4_3(m):
    """F.logsigmoid(z) stays finite where log(sigmoid(z)) does not. The margin is subtracted from the scaled
    gap: a pair costs something until beta * gap exceeds it.
    """
    zeros, chosen, rejected = (
        torch.zeros(3),
        torch.tensor([1.0, 5.0, -2.0, 3.0]),
        torch.tensor([0.0, 7.0, -4.0, 3.0]),
    )
    expect(
        m.pairwise_loss(zeros, zeros, 0.2, 2.0)[0],
        math.log(1 + math.exp(2)),
        "equal scores, beta .2, margin 2: log(1 + e^2)",
    )
    loss, stats = m.pairwise_loss(chosen, rejected, 0.5, 0.7)
    expect(
        loss,
        sum(math.log(1 + math.exp(-(0.5 * gap - 0.7))) for gap in (1, -2, 2, 0)) / 4,
        "gaps 1, -2, 2, 0, beta .5, margin .7",
    )
    expect(stats["pair_accuracy"], 0.5, "pair_accuracy of gaps 1, -2, 2, 0 (a tie is not right)")
    expect(stats["score_gap"], 0.25, "score_gap of gaps 1, -2, 2, 0")
    expect(
        m.pairwise_loss(chosen, rejected)[0],
        -(chosen - rejected).double().sigmoid().log().mean(),
        "defaults: beta 1, no margin",
    )
    margins = torch.tensor([0.0, 1.0, 2.0, 3.0])
    expect(
        m.pairwise_loss(chosen, rejected, 1.0, margins)[0],
        (1 + (margins - chosen + rejected).exp()).log().mean(),
        "a margin per pair",
    )
    expect(
        m.pairwise_loss(zeros - 900, zeros, 1.0, 0.0)[0],
        900.0,
        "a gap of -900: the loss is 900, not infinite",
    )


def check_4_4(m):
    """masked_mean row by row, then even rows against odd ones: means[0::2], means[1::2]. Hand beta and margin
    on.
    """
    scores, (_, mask) = draw(4, 6) * 5, rows()
    loss = 0
    for pair in (0, 1):
        mean = [
            sum(z.item() for z, inside in zip(scores[i], mask[i]) if inside) / RESPONSE_LENGTHS[i]
            for i in (2 * pair, 2 * pair + 1)
        ]
        loss += math.log(1 + math.exp(-(0.7 * (mean[0] - mean[1]) - 1.5))) / 2
    expect(m.qrm_loss(scores, mask, 0.7, 1.5)[0], loss, "two pairs of unequal lengths, beta .7, margin 1.5")
    expect(
        m.qrm_loss(torch.ones(4, 6), mask)[0],
        math.log(1 + math.exp(2)),
        "equal scores at the default beta and margin: 2.1269",
    )
    assert "pair_accuracy" in m.qrm_loss(scores, mask)[1], "the figures of pairwise_loss are missing"


def check_4_5(m):
    """The docstring of fused_qrm_loss derives every line. dm_p = -grad_loss sigmoid(-m_p) / P first, then
    dz_t = beta dm_p c_t, then dx_t = dz_t dZ_t/dx_t and s = sum_t dz_t r_t x_t.
    """
    (_, mask), beta, margin, eps = rows(), 0.7, 1.5, 0.1
    x, g, w = (
        draw(*shape, seed=i).double() for i, shape in enumerate([(sum(RESPONSE_LENGTHS), 8), (8,), (1, 8)])
    )
    shares, pairs = m.token_shares(mask)

    def plain(x, g, w):
        z = ((x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * g) * w).sum(-1)
        means = [part.mean() for part in z.split(RESPONSE_LENGTHS)]
        return -sum((beta * (means[i] - means[i + 1]) - margin).sigmoid().log() for i in (0, 2)) / 2

    for scale in (1.0, 3.0):
        found, expected = ([t.clone().requires_grad_() for t in (x, g, w)] for _ in range(2))
        loss = m.fused_qrm_loss(*found, shares.double(), pairs, 2, beta, margin, eps)[0]
        for name, ours, theirs in zip(
            ("dL/dx", "dL/dg (norm weight)", "dL/dw (head)"),
            gradients(scale * loss, *found),
            gradients(scale * plain(*expected), *expected),
        ):
            expect(ours, theirs, f"{name} of {scale:g} * loss against autograd", rtol=1e-6)


def check_4_6(m):
    """A position is the last one if it is in the mask and its right neighbour is not. F.pad puts a False
    behind the end.
    """
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    found = m.last_token_mask(mask)
    assert found.dtype == torch.bool, f"found {found.dtype}, expected torch.bool"
    expect(found, [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], "last tokens")


def check_4_7(m):
    """The masked_mean over last_token_mask picks the score at the last token;
    F.binary_cross_entropy_with_logits does the rest.
    """
    scores, (_, mask), correct = 3 * draw(4, 6), rows(), torch.tensor([1, 0, 0, 1])
    scores[3, 3] = 0.2  # the last of row 3: right, but not by much
    last = [scores[i, p + r - 2].item() for i, (p, r) in enumerate(zip(PROMPT_LENGTHS, RESPONSE_LENGTHS))]
    loss, stats = m.outcome_loss(scores, mask, correct)
    expect(
        loss,
        sum(math.log(1 + math.exp(-z if y else z)) for z, y in zip(last, correct)) / 4,
        "cross-entropy at the last tokens",
    )
    expect(stats["accuracy"], sum((z > 0) == bool(y) for z, y in zip(last, correct)) / 4, "accuracy")
    expect(
        m.outcome_loss(torch.full((4, 6), -200.0), mask, correct)[0],
        100.0,
        "scores of -200, half of them right",
    )


def check_4_8(m):
    """Sums over the response, not means; ref is subtracted from the policy. The result is a pairwise_loss
    without margin.
    """
    logprobs, ref, (_, mask) = draw(4, 6), draw(4, 6, seed=1), rows()
    logprobs[~mask] = float("nan")
    sums = [sum((logprobs[i, t] - ref[i, t]).item() for t in range(6) if mask[i, t]) for i in range(4)]
    expected = sum(math.log(1 + math.exp(-0.3 * (sums[i] - sums[i + 1]))) for i in (0, 2)) / 2
    loss, stats = m.dpo_loss(logprobs, ref, mask, 0.3)
    expect(loss, expected, "two pairs, beta .3, NaN outside the mask")
    expect(stats["score_gap"], (sums[0] - sums[1] + sums[2] - sums[3]) / 2, "score_gap")
    expect(m.dpo_loss(ref, ref, mask)[0], math.log(2), "policy = reference: log 2")


def check_4_9(m):
    """rest_k = log sum_(j >= k) exp(s_j) is a logcumsumexp from the right: flip, sum, flip. At the last rank
    nothing is left to choose, so its term is always 0: leave it out of the mean.
    """
    ranked = 2 * draw(3, 4)
    terms = [
        math.log(sum(math.exp(s) for s in row[k:])) - row[k] for row in ranked.tolist() for k in range(3)
    ]
    expect(m.plackett_luce_loss(ranked)[0], sum(terms) / len(terms), "three prompts with four answers each")
    pair = ranked[:, :2]
    expect(
        m.plackett_luce_loss(pair)[0],
        -(pair[:, 0] - pair[:, 1]).sigmoid().log().mean(),
        "K = 2 is Bradley-Terry",
    )
    expect(m.plackett_luce_loss(torch.tensor([[0.0, 500.0]]))[0], 500.0, "scores of 500")


def check_4_10(m):
    """response_scores, zero everywhere but at last_token_mask; for every_token the sum over its row, times
    the mask.
    """
    net, (ids, mask) = small_model(model, "ScalarModel"), rows()
    last, every = torch.zeros(4, 6), torch.zeros(4, 6)
    for i, (p, r) in enumerate(zip(PROMPT_LENGTHS, RESPONSE_LENGTHS)):
        last[i, p + r - 2] = net.scalars(net.model(ids[i : i + 1, : p + r]))[0, -1].detach()
        every[i, p - 1 : p + r - 1] = last[i, p + r - 2]
    expect(m.outcome_rewards(net, ids, mask), last, "the score at the last token, 0 elsewhere", rtol=1e-4)
    expect(
        m.outcome_rewards(net, ids, mask, every_token=True),
        every,
        "the same score on every response token",
        rtol=1e-4,
    )


def check_4_11(m):
    """token_logprobs gives (logprobs, entropy), already in the place of targets: no shift, and zeros outside
    the mask.
    """
    (policy, reference), (ids, mask) = (small_model(model, "LanguageModel", seed=s) for s in (0, 1)), rows()
    expected = torch.zeros(4, 6)
    for i, (p, r) in enumerate(zip(PROMPT_LENGTHS, RESPONSE_LENGTHS)):
        for t in range(p, p + r):  # the token at ids[t], after reading ids[:t]
            log_pi, log_ref = (
                net.logits(net.model(ids[i : i + 1, :t]))[0, -1].log_softmax(-1)[ids[i, t]]
                for net in (policy, reference)
            )
            expected[i, t - 1] = 0.3 * (log_pi - log_ref)
    expect(
        m.dpo_rewards(policy, reference, ids, mask, 0.3),
        expected,
        "beta (log pi - log ref), token by token",
        rtol=1e-4,
    )


def check_4_12(m):
    """Only answers with something before the error count. For the hits: z.diff()[i] is Z_(i+1) - Z_i, so the
    drop at the error is entry error - 1. Ties give a half.
    """
    z, fixed = torch.tensor([3.0, 1.0, 1.0, 2.0, -4.0]), torch.tensor([3.0, 1.0, 1.0, 5.0])
    count = lambda *arguments: m.credit_counts(*arguments)
    a = count([z], [3], [fixed])  # Z = 2 at the error; 3, 1, 1 before it; the largest drop is at 4
    assert a == {"wins": 1.0, "comparisons": 3, "hits": 0, "choices": 1.0, "n_errors": 1}, (
        f"scores 3 1 1 2 -4, error at 3, repaired 5: found {a}"
    )
    b = count([z], [4], [torch.tensor([3.0, 1.0, 1.0, 2.0, -5.0])])
    assert b == {"wins": 4.0, "comparisons": 4, "hits": 1, "choices": 0.0, "n_errors": 1}, (
        f"the same, error at 4, repaired -5: found {b}"
    )
    c = count([z], [2], [torch.tensor([3.0, 1.0, 1.0])])  # 3 > 1, and a tie
    assert c == {"wins": 1.5, "comparisons": 2, "hits": 0, "choices": 0.5, "n_errors": 1}, (
        f"the same, error at 2, repaired 1: found {c}"
    )
    both = count([z, z, z], [3, 0, 4])
    assert both == {"wins": 5.0, "comparisons": 7, "hits": 1, "choices": 0.0, "n_errors": 2}, (
        f"errors at 3, 0 (left out) and 4: found {both}"
    )


# -------------------------------------------------------------------------------- 5: REINFORCE


def check_5_1(m):
    """k3 = (ratio - 1) - log ratio with ratio = ref / pi = exp(-k1). torch.expm1 keeps the digits that exp(x)
    - 1 loses.
    """
    log_pi, log_ref = draw(7).log_softmax(0), draw(7, seed=1).log_softmax(0)
    kl = sum(p.exp() * (p - q) for p, q in zip(log_pi, log_ref))
    k1, k3 = m.kl_estimates(log_pi, log_ref)
    expect(k1, [p - q for p, q in zip(log_pi, log_ref)], "k1 = log pi - log ref")
    expect((log_pi.exp() * k1).sum(), kl, "the expectation of k1 under pi")
    expect((log_pi.exp() * k3).sum(), kl, "the expectation of k3 under pi")
    assert (k3 >= 0).all(), "k3 is never negative"
    expect(
        m.kl_estimates(torch.tensor(1e-3), torch.tensor(0.0))[1],
        5e-7,
        "k3 of k1 = 0.001 (about k1^2 / 2)",
        rtol=1e-2,
    )


def check_5_2(m):
    """The moments over the rewards in the mask alone, and with all_sum over all ranks: count and sum first,
    then the squares of what is left after the mean. The variance is divided by the count, not by one less.
    """
    rewards, mask = (
        torch.tensor([[99.0, 1.0, 3.0], [6.0, 10.0, 99.0]]),
        torch.tensor([[0, 1, 1], [1, 1, 0]]).bool(),
    )
    sigma = (((1 - 5) ** 2 + (3 - 5) ** 2 + (6 - 5) ** 2 + (10 - 5) ** 2) / 4) ** 0.5
    run = lambda how, grid=Grid(): m.standardize(rewards, mask, how, grid)
    expect(
        run("mean_std"),
        torch.tensor([[0, -4, -2], [1, 5, 0]]) / sigma,
        "mean_std of 1, 3, 6, 10 (99 is outside)",
    )
    expect(run("std"), torch.tensor([[0, 1, 3], [6, 10, 0]]) / sigma, "std: divided, not shifted")
    expect(run("none"), [[0, 1, 3], [6, 10, 0]], "none: as they are, 0 outside")
    expect(
        m.standardize(torch.full((2, 3), 5.0), mask, "mean_std", Grid()),
        torch.zeros(2, 3),
        "equal rewards: 0",
    )
    expect(
        m.standardize(torch.full((2, 3), 5.0), mask, "std", Grid()),
        5.0 * mask,
        "equal rewards with std: as they are",
    )
    parts = on_ranks(
        2,
        lambda grid: m.standardize(rewards[grid.dp_rank][None], mask[grid.dp_rank][None], "mean_std", grid),
        "dp",
    )
    expect(
        torch.cat(parts),
        run("mean_std"),
        "one row on each of two data-parallel ranks: the moments are those of both",
    )


def check_5_3(m):
    """From the last token to the first with one running number a row: r_t + gamma * running. The result is 0
    outside the mask.
    """
    rewards, (_, mask) = draw(4, 6), rows()
    rewards[~mask] = 50.0
    for gamma in (1.0, 0.8):
        expected = torch.zeros(4, 6)
        for i, (p, r) in enumerate(zip(PROMPT_LENGTHS, RESPONSE_LENGTHS)):
            for t in range(p - 1, p + r - 1):
                expected[i, t] = sum(gamma ** (k - t) * rewards[i, k] for k in range(t, p + r - 1))
        expect(m.returns_to_go(rewards, mask, gamma), expected, f"sum over later rewards, gamma {gamma}")


def check_5_4(m):
    """View the rewards as (prompts, group). R_i minus the mean of the OTHERS is (R_i - mean of all) * n / (n
    - 1).
    """
    rewards = torch.tensor([1.0, 0.0, 5.0, 2.0, 2.0, 2.0])  # two prompts, three samples each
    others = [1 - 5 / 2, 0 - 6 / 2, 5 - 1 / 2, 0, 0, 0]
    expect(m.group_advantages(rewards, 3, "rloo"), others, "rloo: R_i - mean of the others")
    std = ((1 - 2) ** 2 + (0 - 2) ** 2 + (5 - 2) ** 2) ** 0.5 / 2**0.5
    expect(
        m.group_advantages(rewards, 3, "grpo"),
        [-1 / std, -2 / std, 3 / std, 0, 0, 0],
        "grpo: (R_i - mean) / std of three samples",
    )
    try:
        m.group_advantages(rewards, 1, "rloo")
    except ValueError:
        return
    raise AssertionError("a group of one sample has nothing to compare with: expected a ValueError")


def check_5_5(m):
    """Pick the response tokens of both, with the advantages detached; the mean is over tokens, and the sign
    turns ascent into descent.
    """
    logprobs, advantages, (_, mask) = draw(4, 6).requires_grad_(), draw(4, 6, seed=1).requires_grad_(), rows()
    n = sum(RESPONSE_LENGTHS)
    with torch.no_grad():
        advantages[~mask] = 70.0
    loss = m.reinforce_loss(logprobs, advantages, mask)[0]
    expect(
        loss,
        -sum((advantages * logprobs)[i, t] for i in range(4) for t in range(6) if mask[i, t]) / n,
        "loss",
    )
    by_logprobs, by_advantages = gradients(loss, logprobs, advantages)
    expect(by_logprobs, torch.where(mask, -advantages / n, 0.0), "gradient of logprobs: -A / N in the mask")
    expect(by_advantages, torch.zeros(4, 6), "advantages carry no gradient")


# -------------------------------------------------------------------------------- 6: PPO


def check_6_1(m):
    """V(s_t) may not have seen a_t = targets[:, t]: at_states gives the residual stream where s_t ends,
    critic.scalars the numbers, and scatter_to_mask puts them at t.
    """
    critic, (ids, mask) = small_model(model, "ScalarModel"), rows()
    values = m.state_values(critic, ids, mask)
    for t in range(6):
        alone = critic.scalars(critic.model(ids[:, : t + 1]))[:, -1]  # of nothing but the tokens before a_t
        expect(
            values[:, t],
            alone * mask[:, t],
            f"V(s_{t}), from inputs[:, :{t + 1}] alone, 0 outside the mask",
            rtol=1e-4,
        )
    assert values.shape == (4, 6) and values.requires_grad, "expected (B, T) values with a gradient"


def check_6_2(m):
    """Set both inputs to 0 outside the mask, then go from the last token to the first with two running
    numbers a row: the advantage and the value to the right. Outside the mask both are 0.
    """
    rewards, values, (_, mask) = draw(4, 6), draw(4, 6, seed=1), rows()
    rewards[~mask], values[~mask] = 50.0, -70.0

    def slow(gamma, lam):
        out = torch.zeros(4, 6)
        for i, (p, r) in enumerate(zip(PROMPT_LENGTHS, RESPONSE_LENGTHS)):
            end = p + r - 1
            delta = [
                rewards[i, t] + gamma * (values[i, t + 1] if t + 1 < end else 0.0) - values[i, t]
                for t in range(end)
            ]
            for t in range(p - 1, end):
                out[i, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, end))
        return out

    for gamma, lam in ((0.9, 0.8), (0.9, 0.0), (1.0, 1.0)):
        advantages, returns = m.gae(rewards, values, mask, gamma, lam)
        expect(advantages, slow(gamma, lam), f"advantages as a double sum, gamma {gamma}, lambda {lam}")
        expect(
            returns,
            torch.where(mask, slow(gamma, lam) + values, 0.0),
            f"returns = advantages + values, gamma {gamma}, lambda {lam}",
        )


def check_6_3(m):
    """shape_rewards gives Z_std and the rewards, Z_std minus the penalty. For "token" it is one line, and the
    critic's target is Z_std without the penalty; "gae" hands the rewards to gae; everything else asks
    reinforce_advantages.
    """
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
    run = lambda **changes: m.ppo_advantages(rollout, values, SimpleNamespace(**{**cfg, **changes}), Grid())
    z_std = torch.where(mask, (scores - scores[mask].mean()) / scores[mask].std(unbiased=False), 0.0)
    A, target = run(advantage="token")
    expect(
        A,
        torch.where(mask, z_std - 0.3 * k1 - 0.5 * values, 0.0),
        "token: Z_std - .3 KL - .5 V, 0 outside the mask",
    )
    expect(target, z_std, "token: the critic's target is Z_std, without KL")
    means = torch.stack([z_std[i][mask[i]].mean() for i in range(4)])
    spoken = z_std.clone()
    for i, (p, r) in enumerate(zip(PROMPT_LENGTHS, RESPONSE_LENGTHS)):
        spoken[i, p + r - 2] = means[i]
    expect(
        run(advantage="token", eos_to_mean=True)[1],
        spoken,
        "eos_to_mean: the last token's reward is the sequence's mean",
    )
    for found, expected, what in zip(
        run(advantage="gae"),
        m.gae(z_std - 0.3 * k1 * mask, values, mask, 0.9, 0.8),
        ("advantages", "returns"),
    ):
        expect(found, expected, f"gae: {what} of Z_std - .3 KL")
    A, target = run(advantage="rloo")
    row = [scores[i][mask[i]].mean() for i in range(4)]
    rloo = torch.stack([row[0] - row[1], row[1] - row[0], row[2] - row[3], row[3] - row[2]])[:, None]
    expect(A, torch.where(mask, rloo - 0.3 * k1, 0.0), "rloo: as in reinforce.py, without the critic")
    expect(target, z_std, "rloo: the critic still learns Z_std")


def check_6_4(m):
    """ratio = exp(new - old). The minimum of the plain and the clipped product is pessimistic: gains are cut
    at 1 +- clip, losses are not. A token counts as clipped when its ratio is outside on the side that its
    advantage asks for.
    """
    (_, mask), old = rows(), draw(4, 6, seed=1)
    A, change = draw(4, 6, seed=2), 0.6 * draw(4, 6, seed=3)
    new = (old + change).requires_grad_()
    loss, stats = m.ppo_loss(new, old, A, mask, 0.2)
    terms, outside, grad = [], [], torch.zeros(4, 6)
    for i, t in mask.nonzero().tolist():
        ratio, a = math.exp(change[i, t]), A[i, t].item()
        outside.append(ratio > 1.2 if a > 0 else ratio < 0.8)
        terms.append((1.2 if a > 0 else 0.8) * a if outside[-1] else ratio * a)
        grad[i, t] = 0.0 if outside[-1] else -ratio * a / sum(RESPONSE_LENGTHS)
    expect(loss, -sum(terms) / len(terms), "loss, clip .2")
    expect(gradients(loss, new)[0], grad, "gradient: none where the clip holds the ratio")
    expect(stats["clip_frac"], sum(outside) / len(outside), "clip_frac")
    expect(stats["ratio_max"], max(math.exp(change[i, t]) for i, t in mask.nonzero().tolist()), "ratio_max")
    same = old.clone().requires_grad_()
    expect(
        gradients(m.ppo_loss(same, old, A, mask, 0.2)[0], same)[0],
        torch.where(mask, -A / mask.sum(), 0.0),
        "ratio 1: REINFORCE's gradient",
    )
    by_old, by_A = old.clone().requires_grad_(), A.clone().requires_grad_()
    grads = gradients(m.ppo_loss(new, by_old, by_A, mask, 0.2)[0], by_old, by_A)
    expect(torch.stack(grads), torch.zeros(2, 4, 6), "only logprobs carries a gradient")


CHECKS = {
    f"{name[6]}.{name[8:]}": check
    for name, check in list(globals().items())
    if name.startswith("check_") and name[6].isdigit()
}
