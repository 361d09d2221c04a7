"""Grid, layers, optimizer and update: alone in this process, then the checks of parallel_worker.py on 2 and
4 processes."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import made_checkpoints
import parallel_worker as worker
import pytest
import torch
import torch.distributed as dist
from conftest import one_update

from data import collate
from model import LanguageModel, ScalarModel
from parallel import (
    ColumnLinear,
    Grid,
    KeyValueLinear,
    Optimizer,
    ParallelLinear,
    RowLinear,
    VocabEmbedding,
    add_lora_factors,
    all_reduce,
    all_sum,
    check_divisible,
    copy_to_tp,
    make_grid,
    reduce_from_tp,
    shard_range,
)
from qrm import qrm_loss, token_scores

# -------------------------------------------------------------------------------- the grid


@pytest.fixture
def launcher(monkeypatch):
    """Sets the variables of torchrun, without starting anything; the number of threads stays this process's
    own."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


def test_one_process_needs_no_process_group(launcher):
    x = torch.ones(2)
    for tp_size in (0, 1):
        grid = make_grid(tp_size, "cpu")
        assert grid == Grid() and grid.is_main and not dist.is_initialized()
        assert all_reduce(x, grid.tp_group) is x and copy_to_tp(x, grid) is x and reduce_from_tp(x, grid) is x
        assert all_sum({"a": 3, "b": 2**53 - 1}, grid) == {"a": 3, "b": 2**53 - 1}


@pytest.mark.parametrize("world, tp_size", [(1, 2), (6, 4), (2, 3)])
def test_tp_must_divide_the_processes(launcher, world, tp_size):
    if world > 1:
        launcher("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=f"--tp {tp_size} does not divide the {world} processes"):
        make_grid(tp_size, "cpu")
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_that_is_not_there(launcher):
    with pytest.raises(ValueError, match="no CUDA device"):
        make_grid(0, "cuda")


# -------------------------------------------------------------------------------- who holds what


def test_shard_ranges_cover_in_order_and_differ_by_at_most_one():
    for size in range(60):
        for parts in range(1, 12):
            ranges = [shard_range(size, rank, parts) for rank in range(parts)]
            assert [i for start, stop in ranges for i in range(start, stop)] == list(range(size))
            sizes = [stop - start for start, stop in ranges]
            assert min(sizes) >= 0 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    "heads, kv_heads, ffn, works",
    [
        (9, 3, 1536, [1, 3]),  # SmolLM2-135M: 9 does not divide 1536
        (32, 8, 14336, [1, 2, 4, 8, 16, 32]),  # Llama-3.1-8B
        (14, 2, 4864, [1, 2]),  # Qwen2.5-0.5B: 7 and 14 do not divide 4864
        (12, 3, 24, [1, 3, 6, 12]),  # 2 and 4 would cut through a key/value head
        (4, 1, 30, [1, 2]),
    ],
)
def test_sizes_that_a_model_can_be_shared_by(heads, kv_heads, ffn, works):
    for tp_size in range(1, 40):
        if tp_size in works:
            check_divisible(tp_size, heads, kv_heads, ffn)
        else:
            with pytest.raises(ValueError) as error:
                check_divisible(tp_size, heads, kv_heads, ffn)
            assert str(error.value).endswith(f"can be shared by {', '.join(map(str, works))} processes")
            assert f"--tp {tp_size}:" in str(error.value)


def test_a_model_says_so_when_it_cannot_be_shared():
    with pytest.raises(ValueError, match="can be shared by 1, 2, 4 processes"):
        LanguageModel(worker.config(), Grid(tp_size=3))


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("label", worker.MODELS)
def test_slices_put_together_are_the_model(label, tp_size):
    """No communication: the slices of all ranks, joined along the cut, are the parameters of one process."""
    cfg = worker.MODELS[label]
    one = worker.filled(LanguageModel, cfg, Grid())
    ranks = [worker.filled(LanguageModel, cfg, Grid(tp_rank=r, tp_size=tp_size)) for r in range(tp_size)]
    cut = set()
    for name, p in one.named_parameters():
        slices = [dict(m.named_parameters())[name] for m in ranks]
        dim, full = ranks[0].sharding(name)
        assert one.full_shape(name, p.shape) == ranks[0].full_shape(name, slices[0].shape) == tuple(p.shape)
        assert torch.equal(one.my_slice(name, p), p)
        if dim is None:
            assert all(torch.equal(x, p) for x in slices)
        else:
            assert full == p.shape[dim] and torch.equal(torch.cat(slices, dim), p)
            cut.add(name.split(".")[-2])
    few = {"k_proj", "v_proj"} if cfg.num_key_value_heads < tp_size else set()
    matrices = {name.split(".")[-2] for name, p in one.named_parameters() if p.dim() == 2}
    assert cut == matrices - few


def test_a_layer_says_how_it_is_cut():
    """By hand: W (d_out, d_in), a bias with its rows, LoRA's A (rank, d_in) with its columns, B (d_out,
    rank) with its rows."""
    grid = Grid(tp_rank=1, tp_size=3)
    rows = {"weight": (0, 12), "bias": (0, 12), "lora_A": None, "lora_B": (0, 12)}
    columns = {"weight": (1, 12), "lora_A": (1, 12), "lora_B": None}
    for layer, expected in (
        (ColumnLinear(5, 12, grid, bias=True), rows),
        (RowLinear(12, 5, grid), columns),
        (KeyValueLinear(5, 3, 4, grid, bias=True), rows),
        (KeyValueLinear(5, 1, 12, grid, bias=True), dict.fromkeys(rows)),  # fewer heads than ranks
        (VocabEmbedding(12, 5, grid), {"weight": (0, 12)}),
    ):
        if isinstance(layer, ParallelLinear):
            add_lora_factors(layer, rank=2, alpha=2)
        assert {name for name, _ in layer.named_parameters()} == set(expected)
        for leaf, param in layer.named_parameters():
            dim, full = layer.sharding(leaf)
            assert (None if dim is None else (dim, full)) == expected[leaf]
            assert dim is None or param.shape[dim] == 4  # a third of 12


def test_layers_of_one_process_are_nn_linear():
    for layer in (ColumnLinear(6, 5, Grid(), bias=True), RowLinear(6, 5, Grid())):
        same = torch.nn.Linear(6, 5, bias=layer.bias is not None)
        same.load_state_dict(layer.state_dict())
        x = worker.numbers(3, 6)
        assert torch.equal(layer(x), same(x))


# -------------------------------------------------------------------------------- optimizer


def far(a, b):
    return worker.far(a, b)[0]


def tiny(dtype=torch.float32):
    return worker.filled(ScalarModel, worker.MODELS["qwen2"], Grid(), dtype)


def set_gradients(model, seed, scale=1.0):
    for i, p in enumerate(model.parameters()):
        p.grad = (worker.numbers(*p.shape, seed=100 * seed + i) * scale).to(p.dtype)


@pytest.mark.parametrize("max_grad_norm", [0, 1.0, 1e4])
def test_optimizer_is_adamw_with_clipping(max_grad_norm):
    ours, theirs = tiny(), tiny()
    optimizer = Optimizer(ours, Grid(), 1.0, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=max_grad_norm)
    adamw = torch.optim.AdamW(
        theirs.parameters(), betas=(0.9, 0.95), weight_decay=0.1, foreach=False, fused=False
    )
    for step, lr in enumerate((1e-2, 3e-3, 5e-2)):
        set_gradients(ours, step, scale=10.0**step), set_gradients(theirs, step, scale=10.0**step)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm or float("inf"))
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        assert optimizer.step(lr) == pytest.approx(norm.item(), rel=1e-6)
        assert all(p.grad is None for p in ours.parameters())
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert far(a, b) < 1e-6


def test_clipping_by_hand():
    """A gradient of (3, 4) has norm 5; clipped at 1 it is (0.6, 0.8); the first moment is a tenth of it."""
    for limit, expected in ((1.0, (0.06, 0.08)), (10.0, (0.3, 0.4)), (0, (0.3, 0.4))):
        model = tiny()
        optimizer = Optimizer(model, Grid(), 1e-2, max_grad_norm=limit)
        model.score.weight.grad = torch.zeros(1, 16)
        model.score.weight.grad[0, :2] = torch.tensor(
            [3.0, 4.0]
        )  # the other parameters have no gradient: it counts as zero
        before = model.model.norm.weight.detach().clone()
        assert optimizer.step(1e-2) == 5.0
        assert torch.allclose(
            optimizer.state_tensors()["exp_avg.score.weight"][0, :2], torch.tensor(expected), rtol=1e-5
        )
        assert torch.equal(model.model.norm.weight, before)


def test_fp32_masters_keep_steps_that_bf16_loses():
    ours, plain = tiny(torch.bfloat16), tiny(torch.bfloat16)
    optimizer = Optimizer(ours, Grid(), 1e-6)
    masters = [m.clone() for m in optimizer.masters]
    before = [p.detach().clone() for p in ours.parameters()]
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-6, weight_decay=0.0)
    set_gradients(ours, 0), set_gradients(plain, 0)
    optimizer.step(1e-6), adamw.step()
    moved = lambda new, old: (
        sum((a != b).sum().item() for a, b in zip(new, old)) / sum(b.numel() for b in old)
    )
    assert moved(optimizer.masters, masters) > 0.99
    assert moved(plain.parameters(), before) < 0.01
    for _ in range(1, 300):  # small steps add up to one that bf16 can hold
        set_gradients(ours, 0), set_gradients(plain, 0)
        optimizer.step(1e-6), adamw.step()
    assert moved(ours.parameters(), before) > 10 * moved(plain.parameters(), before)
    assert all(
        p.dtype == torch.bfloat16 and torch.equal(p, m.bfloat16())
        for p, m in zip(ours.parameters(), optimizer.masters)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    one, other = tiny(), tiny()
    optimizers = [Optimizer(m, Grid(), 1e-2) for m in (one, other)]
    for step in range(3):
        set_gradients(one, step), set_gradients(other, step)
        if step == 1:
            one.score.weight.grad[0, 0] = bad
            before = [p.detach().clone() for p in one.parameters()]
            assert not optimizers[0].step(1e-2) < float("inf")
            assert all(torch.equal(p, b) and p.grad is None for p, b in zip(one.parameters(), before))
        else:
            assert optimizers[0].step(1e-2) == optimizers[1].step(1e-2) < float("inf")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved_after", [0, 1, 3])
def test_a_resumed_optimizer_goes_on_to_the_bit(dtype, saved_after):
    straight, resumed = tiny(dtype), tiny(dtype)
    optimizer = Optimizer(straight, Grid(), 1e-2, weight_decay=0.1)
    for step in range(6):
        if step == saved_after:
            state = {name: x.clone() for name, x in optimizer.state_tensors().items()}
            for p in resumed.parameters():
                p.data.fill_(float("nan"))  # all of it must come from the state
            optimizer1 = Optimizer(resumed, Grid(), 1e-2, weight_decay=0.1)
            optimizer1.load_state_tensors(state, saved_after)
            assert all(torch.equal(x, state[name]) for name, x in optimizer1.state_tensors().items())
        set_gradients(straight, step)
        optimizer.step(1e-2)
        if step >= saved_after:
            set_gradients(resumed, step)
            optimizer1.step(1e-2)
    ours, theirs = optimizer.state_tensors(), optimizer1.state_tensors()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


def test_loaded_state_may_lie_in_memory_in_any_order():
    """The fused AdamW reads weights and moments as flat memory, so a transposed moment would step the wrong
    weights."""
    ours, theirs = tiny(), tiny()
    optimizers = [Optimizer(m, Grid(), 1e-2) for m in (ours, theirs)]
    set_gradients(ours, 0), optimizers[0].step(1e-2)
    state = {n: x.clone() for n, x in optimizers[0].state_tensors().items()}
    optimizers[1].load_state_tensors(
        {n: x.t().contiguous().t() if x.dim() == 2 else x for n, x in state.items()}, 1
    )
    set_gradients(ours, 1), set_gradients(theirs, 1)
    optimizers[0].step(1e-2), optimizers[1].step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


# -------------------------------------------------------------------------------- update


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_do_not_change_the_gradient(size):
    """Against all 8 pairs in one piece; other cuts pad to other lengths."""
    found, pairs = [], worker.made_up_pairs(8)
    for parts in (worker.cut(pairs, size), [pairs]):
        model = tiny()
        optimizer = Optimizer(model, Grid(), 1e-2, max_grad_norm=0)
        stats = one_update(optimizer, [(len(part), part) for part in parts], worker.pair_loss_fn(model), 1e-2)
        found.append((stats, worker.moments(optimizer, model)))
    (stats, gradients), (stats1, gradients1) = found
    assert list(stats) == ["loss", "score_gap", "grad_norm"]
    assert stats == pytest.approx(stats1, rel=1e-6)
    assert worker.furthest(gradients, gradients1)[0] < 1e-6


def test_update_is_one_step_on_the_mean_loss():
    """The plain loss on all pairs, torch's norm and torch's AdamW; micro-batches of 3, 3 and 2."""
    pairs, ours, theirs = worker.made_up_pairs(8), tiny(), tiny()
    stats = one_update(
        Optimizer(ours, Grid(), 1e-2),
        [(len(part), part) for part in worker.cut(pairs, 3)],
        worker.pair_loss_fn(ours),
        1e-2,
    )
    ids, mask = collate([example for pair in pairs for example in pair])
    loss, more = qrm_loss(token_scores(theirs, ids), mask)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0).step()
    assert stats == pytest.approx(
        {"loss": loss.item(), "score_gap": more["score_gap"], "grad_norm": norm.item()}, rel=1e-5
    )
    assert max(far(a, b) for a, b in zip(ours.parameters(), theirs.parameters())) < 1e-5


# -------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """world -> (results, what the processes wrote): each number of processes is started once, at its first
    test."""

    @functools.cache
    def launch(world):
        directory = tmp_path_factory.mktemp(f"world{world}")
        if importlib.util.find_spec("transformers"):
            made_checkpoints.make(directory / "made", seed=world)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={world}",
            worker.__file__,
            str(directory),
        ]
        env = {
            k: v
            for k, v in os.environ.items()
            if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        }
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            log, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its workers
            log = process.communicate()[0] + "\nstopped: ranks wait for each other"
        results = directory / "results.json"
        return json.loads(results.read_text()) if results.exists() else {}, log

    return launch


@pytest.mark.parametrize(
    "world, name",
    [
        pytest.param(world, name, marks=[pytest.mark.slow] * (world == 8))
        for world in worker.SHAPES
        for name in worker.names(world)
    ],
)
def test_on_several_processes(start, world, name):
    results, log = start(world)
    assert name in results, f"the processes did not get as far as this check:\n{log[-3000:]}"
    for what, (measured, most) in results[name].items():
        assert measured <= most, f"{what}: {measured:.3g}, allowed {most:.3g}"
