"""Checks that need several processes.

    torchrun --nproc_per_node 2 (or 4; 8 is slow) tests/parallel_worker.py DIRECTORY

Starting processes takes seconds and a check takes milliseconds, so one start runs them all. A check gets a
grid and returns {what: (measured, most allowed)}; DIRECTORY/results.json keeps the worst over the ranks, and
test_parallel.py asserts each check by its name. Nearly all of them compare with the same model on `Grid()`:
one process, as if there were no others.

B rows · T positions · D width · V vocabulary; a size that is cut over tp is written as a fraction: V/tp
"""

import contextlib
import functools
import json
import random
import sys
import tempfile
import zlib
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import made_checkpoints
from conftest import one_update

import data
import train
from data import Example, batch_indices, collate
from model import (
    LanguageModel,
    ModelConfig,
    ScalarModel,
    add_lora,
    build_model,
    init_weights,
    load_model,
    save_adapter,
    save_model,
    token_logprobs,
)
from parallel import (
    ColumnLinear,
    Grid,
    Optimizer,
    RowLinear,
    VocabEmbedding,
    all_reduce,
    all_sum,
    copy_to_tp,
    gather_shards,
    make_grid,
    reduce_from_tp,
    shard_range,
    vocab_log_softmax,
    vocab_pick,
    vocab_sum,
)
from qrm import reward_model_loss
from support import checkpoints, evaluate, sampling, settings, steps, tokenizers
from support.sampling import generate
from support.settings import Loss

SHAPES = {
    2: [(2, 1), (1, 2)],
    4: [(4, 1), (2, 2), (1, 4)],
    8: [(8, 1), (4, 2), (2, 4)],
}  # processes: (tp, dp)
ROUNDING = 1e-5  # fp32, other order of operations; relative to the largest entry
CHECKS = {}  # name: (function of a grid, is about tp alone, is about dp, most processes)


def check(tp_alone, dp_alone=False, most=4):
    """A check of tensor parallelism alone, of data parallelism alone, or of grids up to `most` processes."""

    def keep(function):
        CHECKS[function.__name__.replace("_", " ")] = (function, tp_alone, dp_alone, most)
        return function

    return keep


def names(world):
    """{name of a check: (tp, dp, function)} of a start with `world` processes."""
    return {
        f"tp {tp} x dp {dp}: {name}": (tp, dp, function)
        for tp, dp in SHAPES[world]
        for name, (function, tp_alone, dp_alone, most) in CHECKS.items()
        if (not tp_alone or dp == 1) and (not dp_alone or dp > 1 and tp == 1) and world <= most
    }


# -------------------------------------------------------------------------------- measures


def unequal(a, b):
    """Most allowed: nothing, not one bit."""
    return float(not torch.equal(a, b) if torch.is_tensor(a) else a != b), 0


def far(a, b):
    """max |a - b| / max |b|; a (nan) never passes."""
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item(), ROUNDING


def furthest(a, b):
    """The parameter that is off the most, of two {name: tensor}."""
    assert a.keys() == b.keys()
    return max(far(a[n], b[n]) for n in b)


def spread(x, group):
    """0 where a group holds the same bits."""
    high, low = (all_reduce(x.detach(), group, op) for op in (dist.ReduceOp.MAX, dist.ReduceOp.MIN))
    return float((high != low).any()), 0


@contextlib.contextmanager
def collectives():
    """A list of the sizes of all all-reduces; anything that gathers is an error."""
    sizes, real = [], dist.all_reduce

    def spy(x, *args, **kwargs):
        sizes.append(x.numel())
        return real(x, *args, **kwargs)

    with (
        mock.patch.object(dist, "all_reduce", spy),
        mock.patch.object(dist, "all_gather", side_effect=AssertionError),
    ):
        yield sizes


# -------------------------------------------------------------------------------- small models, made-up data


def config(**changes):
    """37 tokens: no number of ranks divides it. 2 key/value heads: fewer than ranks at tp 4."""
    sizes = dict(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )
    return ModelConfig(**sizes | changes)


MODELS = {
    "llama tied": config(),
    "llama untied": config(tie_word_embeddings=False),
    "qwen2": config(model_type="qwen2", tie_word_embeddings=False),
    "qwen2, 4 kv heads": config(model_type="qwen2", num_key_value_heads=4),
    "qwen2, 1 kv head": config(model_type="qwen2", num_key_value_heads=1),
}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(model_class, cfg, grid, dtype=torch.float32):
    """init_weights leaves norms 1, biases and the scalar head 0; here these are drawn too, or errors in
    them would hide."""
    model = init_weights(build_model(model_class, cfg, grid, dtype), seed=0)
    for name, p in model.named_parameters():
        if p.dim() == 1 or name == "score.weight":
            x = model.my_slice(
                name, numbers(*model.full_shape(name, p.shape), seed=zlib.crc32(name.encode()))
            )
            p.data.copy_(1 + 0.2 * x if "norm" in name else 0.3 * x)
    return model


def with_adapters(model_class, cfg, grid, dtype=torch.float32):
    """LoRA as it is after some training: B is not zero."""
    model = add_lora(filled(model_class, cfg, grid, dtype), rank=3, seed=1, alpha=6)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(
                model.my_slice(
                    name, 0.1 * numbers(*model.full_shape(name, p.shape), seed=zlib.crc32(name.encode()))
                )
            )
    return model


def whole(model, tensors=None):
    """{name: whole tensor} of a model's parameters, or of slices that belong to them."""
    tensors = tensors or dict(model.named_parameters())
    return {name: gather_shards(x.detach(), *model.sharding(name), model.grid) for name, x in tensors.items()}


def gradients(model):
    return whole(model, {n: p.grad for n, p in model.named_parameters() if p.requires_grad})


def moments(optimizer, model):
    """(1 - beta1) * gradient after the first update: shows the gradient's scale, which AdamW's first step
    does not."""
    state = optimizer.state_tensors()
    return whole(model, {n: state[f"exp_avg.{n}"].clone() for n in optimizer.names})


def made_up_pairs(n, seed=0):
    """n (chosen, rejected), no two lengths alike in a batch, so that padding differs with the cut."""
    rng = random.Random(seed)
    ids = lambda low, high: [rng.randrange(37) for _ in range(rng.randint(low, high))]
    return [
        (Example(prompt, ids(1, 7)), Example(prompt, ids(1, 7))) for prompt in (ids(1, 4) for _ in range(n))
    ]


def pair_loss_fn(model):
    def loss_fn(pairs):
        ids, mask = collate([example for pair in pairs for example in pair])
        loss, stats = reward_model_loss(model, ids, mask, Loss())
        return loss, {"score_gap": stats["score_gap"]}

    return loss_fn


def token_loss_fn(model):
    def loss_fn(examples):
        ids, mask = collate(examples)
        logprobs, entropy = token_logprobs(model, ids, mask)
        return -logprobs.sum() / mask.sum(), {"entropy": (entropy.sum() / mask.sum()).item()}

    return loss_fn


def cut(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


# -------------------------------------------------------------------------------- the grid, f and g


@check(tp_alone=False)
def neighbouring_ranks_share_a_model(grid):
    rank, tp, dp = dist.get_rank(), grid.tp_size, grid.dp_size
    with contextlib.suppress(ValueError):
        make_grid(3, "cpu")
        raise AssertionError("3 divides neither 2 nor 4")
    return {
        "place": unequal((grid.tp_rank, grid.dp_rank), (rank % tp, rank // tp)),
        "tp group": unequal(
            all_reduce(torch.tensor(rank), grid.tp_group).item(),
            sum(range(rank // tp * tp, rank // tp * tp + tp)),
        ),
        "dp group": unequal(
            list(all_sum({"rank": rank, "big": 2**40}, grid).values()),
            [float(sum(range(rank % tp, tp * dp, tp))), float(dp * 2**40)],
        ),
        "main": unequal(grid.is_main, rank == 0),
    }


@check(tp_alone=True)
def all_reduce_leaves_its_argument_alone(grid):
    mine = numbers(3, 4, seed=grid.tp_rank).requires_grad_()
    all_ranks = torch.stack([numbers(3, 4, seed=r) for r in range(grid.tp_size)])  # (tp, 3, 4)
    y, turned = all_reduce(mine, grid.tp_group), all_reduce(mine.T, grid.tp_group)
    top = all_reduce(mine, grid.tp_group, dist.ReduceOp.MAX)
    return {
        "argument": unequal(mine, all_ranks[grid.tp_rank]),
        "sum": far(y, all_ranks.sum(0)),
        "not contiguous": far(turned, y.T),
        "max": unequal(top, all_ranks.amax(0)),
        "gradients": unequal(y.requires_grad, False),
    }


@check(tp_alone=True)
def f_is_identity_forward_and_sum_backward(grid):
    x, upstream = numbers(3, 4).requires_grad_(), numbers(3, 4, seed=grid.tp_rank)
    y = copy_to_tp(x, grid)
    y.backward(upstream)
    return {
        "forward": unequal(y, x),
        "backward": far(x.grad, sum(numbers(3, 4, seed=r) for r in range(grid.tp_size))),
        "upstream": unequal(upstream, numbers(3, 4, seed=grid.tp_rank)),
    }


@check(tp_alone=True)
def g_is_sum_forward_and_identity_backward(grid):
    x, upstream = numbers(3, 4, seed=grid.tp_rank).requires_grad_(), numbers(3, 4, seed=9)
    y = reduce_from_tp(x, grid)
    y.backward(upstream)
    return {
        "forward": far(y, sum(numbers(3, 4, seed=r) for r in range(grid.tp_size))),
        "backward": unequal(x.grad, upstream),
        "argument": unequal(x, numbers(3, 4, seed=grid.tp_rank)),
    }


@check(tp_alone=True)
def gather_shards_puts_slices_together(grid):
    full, out = numbers(5, 9, 7), {}
    for dim in range(3):  # sizes that tp does not divide
        start, stop = shard_range(full.shape[dim], grid.tp_rank, grid.tp_size)
        out[f"dim {dim}"] = unequal(
            gather_shards(full.narrow(dim, start, stop - start), dim, full.shape[dim], grid), full
        )
    return out | {"not cut": unequal(gather_shards(full, None, 0, grid), full)}


# -------------------------------------------------------------------------------- layers


@check(tp_alone=True)
def column_then_row_linear_is_the_nn_linear_pair(grid):
    hidden = 10  # tp 4 gives its ranks 2, 3, 2 and 3 of them
    first, second = torch.nn.Linear(6, hidden), torch.nn.Linear(hidden, 5, bias=False)
    column, row = ColumnLinear(6, hidden, grid, bias=True), RowLinear(hidden, 5, grid)
    start, stop = shard_range(hidden, grid.tp_rank, grid.tp_size)
    with torch.no_grad():
        for i, p in enumerate((first.weight, first.bias, second.weight)):
            p.copy_(numbers(*p.shape, seed=i))
        column.weight.copy_(first.weight[start:stop]), column.bias.copy_(first.bias[start:stop])
        row.weight.copy_(second.weight[:, start:stop])
    x, x1 = numbers(4, 6, seed=5).requires_grad_(), numbers(4, 6, seed=5).requires_grad_()
    y, y1 = reduce_from_tp(row(column(copy_to_tp(x, grid)).tanh()), grid), second(first(x1).tanh())
    y.backward(numbers(4, 5, seed=6)), y1.backward(numbers(4, 5, seed=6))
    return {
        "values": far(y, y1),
        "dx": far(x.grad, x1.grad),
        "column dw": far(column.weight.grad, first.weight.grad[start:stop]),
        "column db": far(column.bias.grad, first.bias.grad[start:stop]),
        "row dw": far(row.weight.grad, second.weight.grad[:, start:stop]),
    }


@check(tp_alone=True)
def vocab_embedding_is_an_embedding(grid):
    table, ids = (
        numbers(37, 6).requires_grad_(),
        torch.arange(37).repeat(2).view(2, 37),
    )  # each token twice, shard edges too
    layer, (start, stop) = VocabEmbedding(37, 6, grid), shard_range(37, grid.tp_rank, grid.tp_size)
    layer.weight.data.copy_(table[start:stop])
    y, y1 = layer(ids), F.embedding(ids, table)
    y.backward(numbers(2, 37, 6, seed=1)), y1.backward(numbers(2, 37, 6, seed=1))
    return {"values": unequal(y, y1), "gradient": far(layer.weight.grad, table.grad[start:stop])}


@check(tp_alone=True)
def vocab_parallel_log_softmax_pick_and_sum(grid):
    """Values and gradients are torch's, and what is sent is a few numbers a row, never logits."""
    full = numbers(5, 37) * 4 + 3000 * numbers(5, 1, seed=1)  # offsets that overflow exp
    start, stop = shard_range(37, grid.tp_rank, grid.tp_size)
    mine, full = full[:, start:stop].clone().requires_grad_(), full.double().requires_grad_()
    targets, a, b = torch.tensor([0, 9, 17, 18, 36]), numbers(5, seed=2), numbers(5, seed=3)

    with collectives() as sizes:
        logprobs = vocab_log_softmax(mine, grid)  # (5, 37/tp)
        picked, entropy = (
            vocab_pick(logprobs, targets, 37, grid),
            -vocab_sum(logprobs.exp() * logprobs, grid),
        )  # (5,)
        (picked * a + entropy * b).sum().backward()
    logprobs1 = full.log_softmax(-1)  # (5, 37)
    picked1, entropy1 = logprobs1[range(5), targets], torch.distributions.Categorical(logits=full).entropy()
    (picked1 * a + entropy1 * b).sum().backward()
    return {
        "log softmax": far(logprobs, logprobs1[:, start:stop]),
        "pick": far(picked, picked1),
        "entropy": far(entropy, entropy1),
        "gradient": far(mine.grad, full.grad[:, start:stop]),
        "numbers a row in one message": (max(sizes) / 5, 1),
        "bf16 in, fp32 out": unequal(vocab_log_softmax(mine.bfloat16(), grid).dtype, torch.float32),
    }


# -------------------------------------------------------------------------------- whole models


def same_as_one_process(grid, model_class, cfg, make=filled):
    """Weights from one seed are the same bits; outputs and every gradient are equal up to rounding, on
    every rank."""
    raw = [
        whole(add_lora(init_weights(build_model(model_class, cfg, g), seed=3), 3, 4)) for g in (grid, Grid())
    ]
    outputs, grads = [], []
    ids, mask = collate([example for pair in made_up_pairs(4) for example in pair])  # (8, T+1), (8, T)
    for g in (grid, Grid()):
        model = make(model_class, cfg, g)
        if model_class is LanguageModel:
            logits = gather_shards(model.logits(model.model(ids)), 2, 37, g)  # (8, T+1, V)
            x, entropy = token_logprobs(model, ids, mask, temperature=0.7)  # (8, T)
            with mock.patch(
                "model.LOGITS", 36
            ):  # 1 row at a time, though 36 logits of a slice of 18 words would be 2
                few = token_logprobs(model, ids, mask, temperature=0.7)[0]
            outputs.append({"logits": logits, "logprobs": x, "entropy": entropy, "a row at a time": few})
        else:
            x = model.scalars(model.model(ids))  # (8, T+1)
            outputs.append({"scores": x})
        (x * numbers(*x.shape)).sum().backward()
        grads.append(gradients(model))
    return {
        "weights": max(unequal(raw[0][n], raw[1][n]) for n in raw[1]),
        "gradients": furthest(*grads),
        **{k: far(outputs[0][k], outputs[1][k]) for k in outputs[1]},
    }


for label, cfg in MODELS.items():
    for model_class in (LanguageModel, ScalarModel):
        for make in (filled, with_adapters):
            same = functools.partial(same_as_one_process, model_class=model_class, cfg=cfg, make=make)
            CHECKS[f"{model_class.__name__}, {label}, {make.__name__}"] = (same, True, False, 4)


@check(tp_alone=True)
def two_all_reduces_forward_and_two_backward_per_block(grid):
    """Where there are fewer key/value heads than ranks, f on the weights of k and v adds two backward."""
    out, ids = {}, torch.arange(10).view(2, 5)
    for kv_heads in (4, 1):
        forward, backward = [], []
        for layers in (1, 3):
            model = filled(ScalarModel, config(num_hidden_layers=layers, num_key_value_heads=kv_heads), grid)
            with collectives() as sizes:
                scores = model.scalars(model.model(ids))
                forward.append(len(sizes))
                scores.sum().backward()
                backward.append(len(sizes) - forward[-1])
        out |= {
            f"forward, {kv_heads} kv heads": unequal((forward[1] - forward[0]) / 2, 2.0),
            f"backward, {kv_heads} kv heads": unequal(
                (backward[1] - backward[0]) / 2, 2.0 if kv_heads == 4 else 4.0
            ),
        }
    return out


@check(tp_alone=True)
def saved_models_do_not_depend_on_tp(grid):
    out = {}
    with tempfile.TemporaryDirectory() as directory:
        paths = [directory]
        dist.broadcast_object_list(paths)  # all ranks use the main one's
        for i, (model_class, label) in enumerate(
            [(LanguageModel, "llama tied"), (LanguageModel, "qwen2, 1 kv head"), (ScalarModel, "qwen2")]
        ):
            for max_shard_bytes in (10**9, 4000):  # one file, or several with an index
                by_one, by_all = (Path(paths[0], f"{by} {i} {max_shard_bytes}") for by in ("one", "all"))
                one, mine = (filled(model_class, MODELS[label], g) for g in (Grid(), grid))
                if dist.get_rank() == 0:
                    by_one.mkdir(), by_all.mkdir()
                    save_model(one, by_one, max_shard_bytes)
                dist.barrier()
                save_model(mine, by_all, max_shard_bytes)
                dist.barrier()
                files = [
                    {path.name: path.read_bytes() for path in here.iterdir()} for here in (by_one, by_all)
                ]
                split, joined = (
                    load_model(model_class, by_one, grid).state_dict(),
                    load_model(model_class, by_all, Grid()).state_dict(),
                )
                what = f"{model_class.__name__}, {label}, {max_shard_bytes} bytes"
                out |= {
                    f"{what}, files": max(
                        unequal(*files), unequal(len(files[0]) > 3, max_shard_bytes == 4000)
                    ),
                    f"{what}, read by all": max(unequal(split[n], x) for n, x in mine.state_dict().items()),
                    f"{what}, read by one": max(unequal(joined[n], x) for n, x in one.state_dict().items()),
                }
        dist.barrier()
    return out


@check(tp_alone=False)
def stage_score_gives_transformers_numbers(grid):
    """To 2e-4 nats a token, on the stored checkpoints and on those that test_parallel.py made, if it
    could."""
    out = {}
    with tempfile.TemporaryDirectory() as directory:
        paths = [directory]
        dist.broadcast_object_list(paths)
        for parent in (made_checkpoints.FIXTURES, Path(sys.argv[1], "made")):
            for model in sorted(path.parent for path in parent.glob("*/rows.jsonl")):
                scored = Path(paths[0], f"{model.name}.jsonl")
                train.stage_score(
                    settings.Config(
                        stage="score", model=str(model), data=str(model / "rows.jsonl"), out=str(scored)
                    ),
                    grid,
                )
                dist.barrier()
                out[f"{parent.name}/{model.name}"] = (
                    made_checkpoints.furthest_from_expected(scored, model),
                    2e-4,
                )
        dist.barrier()
    return out


@check(tp_alone=False)
def generate_gives_all_ranks_the_tokens_of_one_process(grid):
    """Each dp rank has prompts of its own, and so another number of steps."""
    rng, out = random.Random(grid.dp_rank), {}
    prompts = [[rng.randrange(37) for _ in range(rng.randint(1, 6))] for _ in range(5 + grid.dp_rank)]
    for label, temperature, cfg in (
        ("greedy", 0, MODELS["llama tied"]),
        ("sampled", 1.0, MODELS["qwen2"]),
        ("sampled, 1 kv head", 0.5, MODELS["qwen2, 1 kv head"]),
    ):
        policies = [filled(LanguageModel, cfg, g) for g in (grid, Grid())]
        answers = [generate(p, prompts, 8, (3, 4, 5), temperature, seed=7, batch_size=3) for p in policies]
        with mock.patch(
            "support.sampling.reordered_weights", functools.partial(sampling.reordered_weights, at_least=1)
        ):
            reordered = generate(policies[0], prompts, 8, (3, 4, 5), temperature, seed=7, batch_size=3)
        flat = torch.tensor([len(row) for row in answers[0][0]] + sum(answers[0][0], []))
        out |= {
            label: unequal(answers[0], answers[1]),
            f"{label}, tp ranks": spread(flat, grid.tp_group),
            f"{label}, reordered": unequal(reordered, answers[1]),
        }
    return out


# -------------------------------------------------------------------------------- optimizer, update, training


UNEVEN = {1: [0, 8], 2: [0, 3, 8], 4: [0, 1, 3, 7, 8]}  # dp_size: where the rows of the ranks begin


def my_rows(rows, grid):
    return rows[UNEVEN[grid.dp_size][grid.dp_rank] : UNEVEN[grid.dp_size][grid.dp_rank + 1]]


@check(tp_alone=False)
def update_does_not_depend_on_who_has_which_rows(grid):
    """Ranks with 1 to 5 rows in micro-batches of 2 make the update that one process makes from all 8 in one
    piece."""
    out, pairs = {}, made_up_pairs(8)
    for model_class, loss_fn_of, rows, weigh in (
        (ScalarModel, pair_loss_fn, pairs, lambda pair: 1),
        (LanguageModel, token_loss_fn, [p[0] for p in pairs], lambda e: len(e.response_ids)),
    ):
        stats, first, weights = [], [], []
        for g, parts in ((grid, cut(my_rows(rows, grid), 2)), (Grid(), [rows])):
            model = filled(model_class, MODELS["llama tied"], g)
            optimizer = Optimizer(model, g, 1e-2, max_grad_norm=0)
            parts = [(sum(map(weigh, part)), part) for part in parts]
            stats.append(one_update(optimizer, parts, loss_fn_of(model), 1e-2))
            first.append(moments(optimizer, model))
            one_update(optimizer, parts, loss_fn_of(model), 1e-2)
            weights.append(whole(model))
        values = torch.tensor(list(stats[0].values()), dtype=torch.float64)
        out |= {
            f"{model_class.__name__} names": unequal(list(stats[0]), list(stats[1])),
            f"{model_class.__name__} statistics": max(far(stats[0][k], stats[1][k]) for k in stats[1]),
            f"{model_class.__name__} gradients": furthest(*first),
            f"{model_class.__name__} weights after 2 updates": furthest(*weights),
            f"{model_class.__name__} statistics, ranks": max(
                spread(values, grid.tp_group), spread(values, grid.dp_group)
            ),
        }
    return out


@check(tp_alone=False)
def gradient_norm_and_clipping(grid):
    out = {}
    for label, cfg in MODELS.items():
        one = filled(LanguageModel, cfg, Grid())
        rows = [pair[1] for pair in made_up_pairs(8, seed=1)]
        weigh = lambda part: sum(len(e.response_ids) for e in part)
        token_loss_fn(one)(rows)[0].backward()
        right = torch.nn.utils.get_total_norm([p.grad for p in one.parameters()]).item()
        for share in (0.25, 4.0):  # of the norm: the second leaves the gradient alone
            model = filled(LanguageModel, cfg, grid)
            optimizer = Optimizer(model, grid, 1e-2, max_grad_norm=right * share)
            mine = my_rows(rows, grid)
            norm = one_update(optimizer, [(weigh(mine), mine)], token_loss_fn(model), 1e-2)["grad_norm"]
            expected = {n: 0.1 * min(share, 1.0) * p.grad for n, p in one.named_parameters()}
            out |= {
                f"{label}, norm": far(norm, right),
                f"{label}, clipped at {share}": furthest(moments(optimizer, model), expected),
                f"{label}, norm, ranks": max(
                    spread(torch.tensor(norm, dtype=torch.float64), g) for g in (grid.tp_group, grid.dp_group)
                ),
            }
    return out


@check(tp_alone=False)
def a_gradient_that_is_not_finite_stops_every_rank(grid):
    """On one rank, in a slice or in a parameter that all ranks hold whole: nobody moves, and later steps do
    not remember."""
    out = {}
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        for bad in (float("nan"), float("inf")):
            models = [filled(ScalarModel, config(), grid) for _ in range(2)]
            optimizers = [Optimizer(m, grid, 1e-2) for m in models]
            for step in range(3):
                for i, (model, optimizer) in enumerate(zip(models, optimizers)):
                    if step == 1 and i == 1:  # only the first of the two meets the bad gradient
                        continue
                    for (
                        n,
                        p,
                    ) in (
                        model.named_parameters()
                    ):  # a slice is that of the tp rank, a whole one the same on all
                        p.grad = model.my_slice(
                            n, numbers(*model.full_shape(n, p.shape), seed=step + 10 * grid.dp_rank)
                        ).clone()
                        if step == 1 and n == name and dist.get_rank() == dist.get_world_size() - 1:
                            p.grad.flatten()[0] = bad
                    before = [p.detach().clone() for p in model.parameters()]
                    norm = optimizer.step(1e-2)
                    moved = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before))
                    out[f"{name} {bad} step {step} run {i}"] = unequal(
                        (norm < float("inf"), moved), (step != 1,) * 2
                    )
            out[f"{name} {bad} after it"] = max(
                unequal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters())
            )
    return out


@check(tp_alone=False)
def a_loss_that_is_not_finite_stops_every_rank(grid):
    """The loss of the last dp rank is nan, its gradient is not: nobody moves, everyone counts and keeps its
    inputs; then all go on."""
    out, pairs = {}, made_up_pairs(8)
    model, mine = filled(ScalarModel, config(), grid), my_rows(pairs, grid)
    optimizer, loss_fn = Optimizer(model, grid, 1e-2), pair_loss_fn(model)
    for step, bad in enumerate((False, True, True, False)):
        before = [p.detach().clone() for p in model.parameters()]
        add = float("nan") if bad and grid.dp_rank == grid.dp_size - 1 else 0.0
        stats = one_update(optimizer, [(len(mine), mine)], lambda part: (loss_fn(part)[0] + add, {}), 1e-2)
        moved = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before))
        out[f"step {step}"] = unequal(
            (
                moved,
                stats["loss"] == stats["loss"],
                optimizer.skipped,
                optimizer.in_a_row,
                optimizer.bad_inputs,
            ),
            (not bad, not bad, (0, 1, 2, 2)[step], (0, 1, 2, 0)[step], [mine] if step else []),
        )
    return out


@check(tp_alone=False)
def ranks_without_rows_take_part_in_an_update(grid):
    """All rows on the first dp rank: the update of one process, and every rank reports the same figures."""
    pairs, found = made_up_pairs(8), []
    for g in (grid, Grid()):
        model = filled(ScalarModel, MODELS["qwen2"], g)
        parts = [(len(part), part) for part in cut(pairs, 4)] if g.dp_rank == 0 else []
        optimizer = Optimizer(model, g, 1e-2)
        found.append((one_update(optimizer, parts, pair_loss_fn(model), 1e-2), moments(optimizer, model)))
    return {
        "names": unequal(list(found[0][0]), list(found[1][0])),
        "figures": max(far(found[0][0][k], x) for k, x in found[1][0].items()),
        "gradients": furthest(found[0][1], found[1][1]),
    }


def shared_directory(directory):
    """The main rank's directory, on all ranks."""
    paths = [directory]
    dist.broadcast_object_list(paths)
    return Path(paths[0])


def untimed_rows(path):
    """The numbers of a metrics.jsonl, row by row."""
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows]


def built_in_files():
    """Directory, the same on all ranks: models, rows and pairs of the built-in task, made at the first call.

    The answers of its policy `sft` end.
    """
    base = Path(sys.argv[1]) / "built-in"
    if dist.get_rank() == 0 and not base.exists():
        tokenizer = data.arith_tokenizer()
        cfg = ModelConfig(tokenizer.vocab_size, 32, 48, 2, 8, 4, 8)
        for name, model_class in (("lm", LanguageModel), ("rm", ScalarModel)):
            (base / name).mkdir(parents=True)
            tokenizer.save(base / name)
            save_model(filled(model_class, cfg, Grid()), base / name)
        rows = data.arith_rows("train", 400, 0)
        for name, keys in (("sft", ("prompt", "response")), ("prompts", ("prompt", "label"))):
            kept = rows[:24] if name == "prompts" else rows
            write_lines(base / f"{name}.jsonl", [{key: row[key] for key in keys} for row in kept])
        write_lines(base / "pairs.jsonl", made_up_preferences(rows))
        (base / "question.txt").write_text("{prompt}{a}\n{b}\nHow many? ")
        (base / "about-one.txt").write_text("{prompt}{response}\nHow many? ")
        sft = dict(data=str(base / "sft.jsonl"), steps=40, lr=1e-2, batch_size=16)
        start = settings.Config(stage="sft", model=str(base / "lm"), out=str(base / "sft"), **sft)
        train.run_stage(start, Grid())
    dist.barrier()
    return base


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_up_preferences(rows):
    """19 pairs of 13 prompts in two subsets; every third has a margin of its own."""
    wrong = [row for row in rows if row["solution"] != row["response"]][:13]
    pairs = []
    for i, row in enumerate([*wrong, *wrong[::2]][:19]):
        rejected = row["response"] if i < 13 else row["response"][:-1] + "77"
        pair = {
            "prompt": row["prompt"],
            "chosen": row["solution"],
            "rejected": rejected,
            "subset": "ab"[i % 2],
        }
        pairs.append(pair | ({"margin": 0.5 * i} if i % 3 == 0 else {}))
    return pairs


@check(tp_alone=False, dp_alone=True)
def what_is_sampled_does_not_depend_on_the_grid(grid):
    """pairs, reinforce, ppo and eval: the same samples, the same files and metrics, as with one process."""
    base = built_in_files()
    with tempfile.TemporaryDirectory() as directory:
        homes = shared_directory(directory)
        common = dict(
            model=str(base / "sft"),
            data=str(base / "prompts.jsonl"),
            task="arith",
            max_new_tokens=40,
            k=4,
        )
        learning = dict(
            reward_model=str(base / "rm"),
            steps=2,
            lr=1e-3,
            critic_lr=1e-3,
            batch_size=16,
            minibatch=8,
            group_size=2,
            warmup=1,
            kl_coef=0.1,
            limit=4,
            eval_every=2,
        )
        stages = {"pairs": {}, "reinforce": learning, "ppo": learning, "eval": {}}

        def run(home, g):
            for stage, changes in stages.items():
                out = home / {"pairs": "pairs.jsonl"}.get(stage, stage)
                cfg = settings.Config(stage=stage, out=str(out), **common | changes)
                train.run_stage(cfg, g)

        with mock.patch.object(evaluate, "grade", lambda text, *_: (None, len(text) % 2 == 0)):
            if dist.get_rank() == 0:
                run(homes / "one", Grid())
            dist.barrier()
            run(homes / "all", grid)
        dist.barrier()
        one, all_ranks = homes / "one", homes / "all"
        found = {
            "pairs": unequal((one / "pairs.jsonl").read_text(), (all_ranks / "pairs.jsonl").read_text()),
        }
        for stage in ("reinforce", "ppo"):
            rows = [untimed_rows(home / stage / "metrics.jsonl") for home in (one, all_ranks)]
            for a, b in zip(*rows, strict=True):
                found |= {f"{stage}, {name}": far(a[name], b[name]) for name in b}
        results = [json.loads((home / "eval" / "eval.json").read_text()) for home in (one, all_ranks)]
        for name in ("pass@1", "maj@k", "n_prompts", "generated_tokens"):
            found[f"eval, {name}"] = unequal(results[0][name], results[1][name])
        found["eval, pass@k"] = far(*(list(result["pass@k"].values()) for result in results))
        dist.barrier()
    return found


# Commands whose results must not depend on the grid: {name of the result: flags that follow the common ones}.
# {base}: built_in_files(); {one}: results of one process.
COMMON = "--model {base}/sft --data {base}/prompts.jsonl --task arith --max_new_tokens 40"
ON_PAIRS = "--data {base}/pairs.jsonl --steps 3 --lr 3e-3 --batch_size 5"
IN_RL = (
    "--steps 2 --lr 1e-3 --batch_size 8 --minibatch 4 --group_size 2 --kl_coef .1 --limit 3 --eval_every 2"
)
JUDGED = "--reward judge --verdicts 3,4 --judge_prompt {base}"
EVERY_GRID = {
    "steps.jsonl": "--stage pairs --step_rollouts 2 --k 2 --limit 5",
    "best.jsonl": "--stage pairs --best --reward_model {base}/rm --k 4 --limit 9",
    "prm": f"--stage rm --reward prm --balance_prompts {ON_PAIRS} --data {{one}}/steps.jsonl",
    "simpo": f"--stage rm --reward simpo --balance_prompts {ON_PAIRS}",
    "orm": f"--stage rm --reward orm {ON_PAIRS}",
    "dpo": f"--stage rm --reward dpo {ON_PAIRS}",
    "of steps": "--stage eval --model {one}/prm --data {one}/steps.jsonl --step_threshold .51",
    "of pairs": "--stage eval --model {one}/prm --data {base}/pairs.jsonl --prm_aggregate min",
    "of given answers": "--stage eval --model {base}/rm --data {base}/given.jsonl",
    "of a judge": f"--stage eval --data {{base}}/pairs.jsonl {JUDGED}/question.txt",
    "by a judge": f"--stage eval --k 4 --limit 9 --reward_model {{base}}/sft {JUDGED}/about-one.txt",
    "score.jsonl": f"--stage score --data {{base}}/sft.jsonl --limit 9 {JUDGED}/about-one.txt",
    "process": f"--stage reinforce --reward prm --reward_model {{one}}/prm --advantage process {IN_RL}",
    "judge": f"--stage reinforce --reward_model {{base}}/sft {JUDGED}/about-one.txt {IN_RL}",
    "rto": "--stage ppo --reward dpo --reward_model {one}/dpo --outcome_model {one}/orm --kl_loss_coef .3"
    f" --critic_lr 1e-3 --ppo_epochs 2 {IN_RL}",
}


def run_commands(base, home, grid):
    """EVERY_GRID's commands, with results in `home`."""
    for name, flags in EVERY_GRID.items():
        words = f"{COMMON} {flags}".format(base=base, one=base / "one").split()
        train.run_stage(settings.parse([*words, "--out", str(home / name)]), grid)


def numbers_in(path):
    """{place: value} of every number and text in a result's rows, eval.json or metrics.jsonl, time apart."""
    found = {}

    def walk(value, place):
        if isinstance(value, (dict, list)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if key not in ("tokens_per_s", "made_from"):
                    walk(item, f"{place} {key}")
        else:
            found[place] = value

    files = [path] if path.is_file() else [path / name for name in ("eval.json", "metrics.jsonl")]
    text = next(file for file in files if file.exists()).read_text()
    walk([json.loads(line) for line in text.splitlines()] if "\n}" not in text else json.loads(text), "")
    return found


def furthest_apart(a, b):
    """Largest difference of floats in the same place, relative to 1 or more; inf if anything else differs."""
    if a.keys() != b.keys():
        return float("inf"), ROUNDING
    sizes = []
    for place, x in a.items():
        if isinstance(x, float) and isinstance(b[place], float):
            sizes.append(abs(x - b[place]) / max(1.0, abs(x)))
        else:
            sizes.append(0.0 if x == b[place] else float("inf"))
    return max(sizes), ROUNDING


def coin(text, *_):
    """Right or wrong by the text alone, for a policy that is never right."""
    return None, data.stable_hash(text) % 2 == 0


@check(tp_alone=False, most=2)
def no_result_depends_on_the_grid(grid):
    """Labels by rollouts, other reward models, given answers, judges, RTO: as with one process."""
    base = built_in_files()
    one, everywhere = base / "one", base / f"tp{grid.tp_size}"
    with mock.patch.object(evaluate, "grade", coin), mock.patch.object(steps, "grade", coin):
        if dist.get_rank() == 0 and not one.exists():
            pairs = [json.loads(line) for line in (base / "pairs.jsonl").read_text().splitlines()]
            given = [
                {"prompt": p["prompt"], "responses": [p["rejected"], p["chosen"]], "labels": [False, True]}
                for p in pairs
            ]
            write_lines(base / "given.jsonl", given)
            run_commands(base, one, Grid())
        dist.barrier()
        run_commands(base, everywhere, grid)
    dist.barrier()
    found = {}
    for name in EVERY_GRID:
        numbers = numbers_in(one / name)
        found[name] = furthest_apart(numbers_in(everywhere / name), numbers)
    return found


@check(tp_alone=False, most=8)
def twenty_steps_of_stage_rm(grid):
    """`--stage rm` from files: the validation loss is that of one process, even if one process makes the
    first 8 steps, is cut off, and all ranks go on. 15 pairs, 3 for validation: no number of ranks divides
    them. At tp 8 there are fewer key/value heads than ranks."""
    with tempfile.TemporaryDirectory() as directory:
        paths = [directory]
        dist.broadcast_object_list(paths)  # all ranks use the main one's
        base = Path(paths[0])
        rows = [
            {"prompt": r["prompt"], "chosen": r["solution"], "rejected": r["response"]}
            for r in data.arith_rows("train", 60, 0)
        ]
        rows = [row for row in rows if row["chosen"] != row["rejected"]][:18]
        if dist.get_rank() == 0:
            tokenizer = data.arith_tokenizer()
            cfg = ModelConfig(tokenizer.vocab_size, 32, 48, 2, 8, 4, 8)
            (
                tokenizer.save(base / "lm"),
                save_model(init_weights(build_model(LanguageModel, cfg, Grid()), 0), base / "lm"),
            )
            for name, part in (("train", rows[:15]), ("val", rows[15:])):
                (base / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        dist.barrier()

        def run(out, g, **changes):
            cfg = dict(
                stage="rm",
                model=str(base / "lm"),
                data=str(base / "train.jsonl"),
                out=str(base / out),
                steps=20,
                lr=5e-3,
                batch_size=8,
                save_every=8,
            )
            train.stage_rm(settings.Config(**cfg | changes), g)

        def validation(out, g):
            model, tokenizer = load_model(ScalarModel, base / out, g), tokenizers.Tokenizer.load(base / out)
            val = settings.Config(stage="eval", data=str(base / "val.jsonl"), task="arith")
            pairs, _ = data.encode(
                data.load_rows(val.data, ("prompt", "chosen", "rejected")),
                tokenizer,
                1024,
                ("chosen", "rejected"),
                log=str,
            )
            ids, mask = collate([example for pair in pairs for example in pair])
            with torch.no_grad():
                return reward_model_loss(model, ids, mask, val)[0].item(), evaluate.eval_reward_model(
                    base / out, val, g
                )

        class Killed(Exception):
            pass

        def log_or_die(self, row, log=checkpoints.Workdir.log):
            log(self, row)
            if row["step"] == 9:
                raise Killed

        if dist.get_rank() == 0:  # alone, as if there were no others
            run("one", Grid())
            with mock.patch.object(checkpoints.Workdir, "log", log_or_die), contextlib.suppress(Killed):
                run("cut", Grid())
        dist.barrier()
        run("all", grid)
        run("cut", grid, resume=True)
        one = validation("one", Grid())
        losses = [
            [json.loads(line)["loss"] for line in (base / out / "metrics.jsonl").read_text().split("\n")[:-1]]
            for out in ("one", "all", "cut")
        ]
        found = {
            f"{out}, {what}": same(a, b)
            for out in ("all", "cut")
            for what, same, a, b in zip(
                ("validation loss", "eval.json"), (far, unequal), validation(out, grid), one
            )
        }
        dist.barrier()
    return found | {
        "losses": max(far(x, losses[0]) for x in losses[1:]),
        "steps": unequal(list(map(len, losses)), [20, 20, 20]),
        "it learns": (losses[0][-1] / losses[0][0], 0.9),
    }


@check(tp_alone=False)
def five_steps_of_training(grid):
    """The losses are those of one process; what ranks hold in common stays the same to the bit."""
    pairs, losses, gathered = made_up_pairs(12), [], []
    for g in (grid, Grid()):
        model = filled(ScalarModel, MODELS["qwen2"], g)
        optimizer = Optimizer(model, g, 1e-2, weight_decay=0.1)
        losses.append([])
        for step in range(5):
            mine = [pairs[i] for i in batch_indices(12, 6, step, seed=0)][g.dp_rank :: g.dp_size]
            parts = [(len(part), part) for part in cut(mine, 2)]
            losses[-1].append(one_update(optimizer, parts, pair_loss_fn(model), 1e-2)["loss"])
        gathered.append(whole(model))
    params = gathered[0].values()
    return {
        "losses": max(far(a, b) for a, b in zip(*losses)),
        "it learns": (losses[0][-1] / losses[0][0], 0.9),
        "tp ranks": max(spread(x, grid.tp_group) for x in params),
        "dp ranks": max(spread(x, grid.dp_group) for x in params),
    }


@check(tp_alone=False)
def adapters_train_and_are_saved_as_by_one_process(grid):
    """Key/value heads that tp cuts, and fewer than ranks; clipped, so that the norm has to be right too."""
    pairs, out = made_up_pairs(6), {}
    for label in ("qwen2, 4 kv heads", "qwen2, 1 kv head"):
        stats, models, files = [], [], []
        for g in (Grid(), grid):
            model = add_lora(filled(ScalarModel, MODELS[label], g), rank=3, seed=1)
            optimizer, frozen = (
                Optimizer(model, g, 1e-2, max_grad_norm=0.1),
                {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad},
            )
            mine = pairs[g.dp_rank :: g.dp_size]
            stats.append(
                [one_update(optimizer, [(len(mine), mine)], pair_loss_fn(model), 3e-3) for _ in range(3)]
            )
            models.append(whole(model))
            out[f"{label}, frozen, {len(models)}"] = max(
                unequal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen
            )
            out[f"{label}, what learns, {len(models)}"] = unequal(
                ({n.split(".")[-1] for n in optimizer.names}, len(optimizer.names)),
                ({"lora_A", "lora_B", "weight"}, 2 * 7 * 2 + 1),
            )
            with tempfile.TemporaryDirectory() as directory:
                save_adapter(model, Path(directory, "adapter"), "base")
                save_model(model, directory)
                paths = [
                    Path(directory, name)
                    for name in ("model.safetensors", "adapter/adapter_model.safetensors")
                ]
                files.append([load_file(path) for path in paths] if g.is_main else files[0])
        out |= {
            f"{label}, losses": max(
                far(a[k], b[k]) for a, b in zip(*stats) for k in ("loss", "grad_norm", "score_gap")
            ),
            f"{label}, weights": (
                furthest(models[1], models[0])[0],
                1e-4,
            ),  # Adam's quotient blows rounding up
            f"{label}, files": (max(furthest(a, b)[0] for a, b in zip(files[1], files[0])), 1e-4),
            f"{label}, tp ranks": max(spread(x, grid.tp_group) for x in models[1].values()),
        }
    return out


@check(tp_alone=False)
def optimizer_state_moves_between_grids(grid):
    """State gathered after two updates here, cut for one process, goes on to the update made here (rounding
    apart)."""
    pairs = made_up_pairs(8)
    model, one = filled(ScalarModel, config(), grid), filled(ScalarModel, config(), Grid())
    optimizer, optimizer1 = Optimizer(model, grid, 1e-2), Optimizer(one, Grid(), 1e-2)
    mine = my_rows(pairs, grid)
    for _ in range(2):
        one_update(optimizer, [(len(mine), mine)], pair_loss_fn(model), 1e-2)
    state = {}
    for key in ("master", "exp_avg", "exp_avg_sq"):
        slices = {n: optimizer.state_tensors()[f"{key}.{n}"] for n in optimizer.names}
        state |= {f"{key}.{n}": x.clone() for n, x in whole(model, slices).items()}
    optimizer1.load_state_tensors(state, 2)
    same = max(unequal(a, b) for a, b in zip(whole(model).values(), whole(one).values()))
    one_update(optimizer, [(len(mine), mine)], pair_loss_fn(model), 1e-2)
    one_update(optimizer1, [(8, pairs)], pair_loss_fn(one), 1e-2)
    return {"loaded": same, "next update": furthest(whole(model), whole(one))}


# -------------------------------------------------------------------------------- run


def main():
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    results, shape, directory = {}, None, Path(sys.argv[1])
    for name, (tp, dp, function) in names(dist.get_world_size()).items():
        if shape != (tp, dp):
            with mock.patch.object(
                dist, "init_process_group"
            ):  # all but this may run again for the next shape
                shape, grid = (tp, dp), make_grid(tp, "cpu")
        measured = function(grid)
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, measured)
        worst = lambda what: max(
            (r[what] for r in ranks), key=lambda x: (not x[0] <= x[1], x[0])
        )  # a nan is the worst
        results[name] = {what: worst(what) for what in measured}
        if dist.get_rank() == 0:  # after each check, so that a crash shows where it happened
            (directory / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
