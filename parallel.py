"""Tensor and data parallelism by hand: the grid, f and g, sharded layers, LoRA, and the optimizer step.

    world = dp x tp         tp_rank 0   tp_rank 1        the tp ranks of one row hold slices of ONE model and
               dp_rank 0      p0          p1             see the same tokens; the dp ranks of one column hold
               dp_rank 1      p2          p3             the same slice and see different tokens

Everything runs with one process, without a launcher and without a process group; `Grid()` is that case.
Source of the scheme: Shoeybi et al. 2019, "Megatron-LM", section 3.

N tokens · D model width · V vocabulary · d_in, d_out features of a layer
A sharded size is written as a fraction: V/tp
"""

import datetime
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from support.files import BadInput, require

# -------------------------------------------------------------------------------- the grid


@dataclass(frozen=True)
class Grid:
    """A process's place among tp x dp processes. The default is one process, which needs no process group."""

    device: torch.device = torch.device("cpu")
    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    tp_group: object = None  # torch.distributed.ProcessGroup
    dp_group: object = None

    @property
    def is_main(self):
        return self.tp_rank == 0 and self.dp_rank == 0


def make_grid(tp_size=0, device="auto", timeout=1800):
    """The grid that torchrun's variables describe: NCCL between GPUs, gloo between CPUs.

    tp_size   processes that share one model; 0 means all of them. The rest is data parallel: world = tp x dp
    device    "auto" (CUDA if available), "cpu" or "cuda"
    timeout   seconds a rank waits for a peer before aborting
    -> Grid; neighbouring ranks form a tp group, so that tp stays within a machine
    Raises BadInput if tp_size does not divide the number of processes, if CUDA is requested and absent, or if
    the variables describe no group of processes that meet within `timeout`.
    """
    world = launch_number("WORLD_SIZE", 1)
    tp_size = tp_size or world
    require(world % tp_size == 0, f"--tp {tp_size} does not divide the {world} processes of this run")
    device = my_device(device)
    if "WORLD_SIZE" not in os.environ:
        require("RANK" not in os.environ, f"RANK is set, and WORLD_SIZE is not: {BY_TORCHRUN}")
        return Grid(device)
    timeout = datetime.timedelta(seconds=timeout)
    start_process_group("nccl" if device.type == "cuda" else "gloo", world, timeout)
    rows = [list(range(start, start + tp_size)) for start in range(0, world, tp_size)]  # as drawn above
    columns = [list(ranks) for ranks in zip(*rows)]
    tp_group, _ = dist.new_subgroups_by_enumeration(rows, timeout)
    dp_group, _ = dist.new_subgroups_by_enumeration(columns, timeout)
    return Grid(
        device=device,
        tp_rank=dist.get_rank() % tp_size,
        tp_size=tp_size,
        dp_rank=dist.get_rank() // tp_size,
        dp_size=world // tp_size,
        tp_group=tp_group,
        dp_group=dp_group,
    )


BY_TORCHRUN = "expected the variables as torchrun sets them, or none of them for one process"


def launch_number(name, default=None):
    """A variable of torchrun's as a number; BadInput if it is none, is missing, or counts no processes."""
    text = os.environ.get(name, "" if default is None else str(default))
    counts = name.endswith("WORLD_SIZE")
    require(text.isdecimal() and int(text) >= counts, f"{name} is {text[:40]!r}: {BY_TORCHRUN}")
    return int(text)


def start_process_group(backend, world, timeout):
    """dist.init_process_group for the processes that the variables describe; BadInput if they do not meet."""
    rank = launch_number("RANK")
    require(rank < world, f"RANK is {rank}, and WORLD_SIZE is {world}: {BY_TORCHRUN}")
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as e:  # a port in use, a host that is not there, a peer that never came
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(e).split("\n")[0][:300]
        raise BadInput(
            f"rank {rank} of {world} meets no others at {place} (MASTER_ADDR, MASTER_PORT): {reason};"
            " use another port (torchrun --master_port), or unset RANK and WORLD_SIZE to run one process"
        ) from None


def my_device(device):
    """This process's own device; on the CPU, torchrun's processes share the cores evenly."""
    require(
        device != "cuda" or torch.cuda.is_available(),
        "--device cuda: this torch sees no CUDA device; use --device cpu or auto",
    )
    if device != "cpu" and torch.cuda.is_available():
        local_rank, count = launch_number("LOCAL_RANK", 0), torch.cuda.device_count()
        require(local_rank < count, f"LOCAL_RANK is {local_rank}, but there are {count} CUDA devices")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)  # before the process group, or every rank would open GPU 0
        return device
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun sets one thread per process; undo that
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // launch_number("LOCAL_WORLD_SIZE")))
    return torch.device("cpu")


def all_reduce(x, group, op=dist.ReduceOp.SUM):
    """The sum (or `op`) of x over a group, as a new tensor: the caller's x is never written to."""
    if group is None or group.size() == 1:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, group=group)
    return x


def all_sum(sums, grid):
    """{name: number} -> the same names with sums over dp, in float64, so that token counts stay exact."""
    x = torch.tensor(list(sums.values()), dtype=torch.float64, device=grid.device)
    return dict(zip(sums, all_reduce(x, grid.dp_group).tolist()))


# -------------------------------------------------------------------------------- f and g


# exercise 2.1 (2 points): f, before work that differs between ranks
class _CopyToTP(torch.autograd.Function):
    """Forward: x, unchanged. Backward: the sum of the ranks' gradients; None for the group."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.group), None


# exercise 2.2 (1 point): g, the sum of what the ranks hold
class _ReduceFromTP(torch.autograd.Function):
    """Forward: the sum of the ranks' x, which stays as it is. Backward: the gradient; None for the group."""

    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def copy_to_tp(x, grid):
    """f (Megatron-LM, Fig. 3): identity forward, all-reduce backward.

    x is the same on every tp rank and enters a computation that differs between them: y_i = h_i(x) on rank i.
    dL/dx = sum_i (dh_i/dx)^T dL/dy_i: each rank computes one term of that sum, and backward adds them up.
    """
    return _CopyToTP.apply(x, grid.tp_group) if grid.tp_size > 1 else x


def reduce_from_tp(x, grid):
    """g, the conjugate of f: all-reduce forward, identity backward.

    y = sum_i x_i, so dL/dx_i = dL/dy for every i: each rank already holds the right gradient.
    """
    return _ReduceFromTP.apply(x, grid.tp_group) if grid.tp_size > 1 else x


# -------------------------------------------------------------------------------- shards


def shard_range(size, rank, parts):
    """[start, stop) of the `size` units that `rank` of `parts` holds; uneven shares differ by one.

    >>> [shard_range(10, r, 4) for r in range(4)]
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    return size * rank // parts, size * (rank + 1) // parts


def check_divisible(tp_size, heads, kv_heads, ffn):
    """BadInput that lists the tp sizes that work, unless `tp_size` divides heads and hidden units evenly."""
    works = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and ffn % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)
    ]
    require(
        tp_size in works,
        f"--tp {tp_size}: a model with {heads} attention heads, {kv_heads} key/value heads and "
        f"{ffn} hidden units can be shared by {', '.join(map(str, works))} processes",
    )


def gather_shards(x, dim, full, grid):
    """The whole tensor, of extent `full` along `dim`, from the slices of all tp ranks; no gradient.

    dim None: every rank holds x whole. The result is the same on all tp ranks.
    """
    if grid.tp_size == 1 or dim is None:
        return x
    x = x.detach().transpose(0, dim)  # (own, ...)
    widest = -(-full // grid.tp_size)
    padded = x.new_zeros(widest, *x.shape[1:])  # all_gather wants equal shapes
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(grid.tp_size)]
    dist.all_gather(parts, padded, group=grid.tp_group)
    for rank in range(grid.tp_size):
        start, stop = shard_range(full, rank, grid.tp_size)
        parts[rank] = parts[rank][: stop - start]
    return torch.cat(parts).transpose(0, dim)  # (full, ...), then back to x's order of dimensions


# -------------------------------------------------------------------------------- layers


def linear(x, weight, bias=None):
    """F.linear, or, without gradient, the faster product that the sampler has attached to this weight."""
    fast_product = None if torch.is_grad_enabled() else getattr(weight, "fast_product", None)
    return F.linear(x, weight, bias) if fast_product is None else fast_product(x, bias)


class ParallelLinear(nn.Linear):
    """nn.Linear with this rank's slice of the weight W (d_out, d_in); with one rank it is exactly nn.Linear.

    cut    dimension of W that is cut over tp: 0 its rows, 1 its columns, None when every rank holds all of W
    full   extent of the whole W along that dimension
    """

    cut = None

    def __init__(self, d_in, d_out, grid, bias, full):
        super().__init__(d_in, d_out, bias=bias)
        self.grid, self.full = grid, full
        self.lora_A = self.lora_B = None  # see "LoRA" below

    def sharding(self, leaf):
        """-> (dimension along which the parameter `leaf` is cut, None if it is whole; its full extent there).

        A bias has the rows of W, a LoRA factor A (rank, d_in) its columns and B (d_out, rank) its rows.
        """
        dims_of_W = {"weight": (0, 1), "bias": (0,), "lora_A": (1,), "lora_B": (0,)}[leaf]
        return (self.cut if self.cut in dims_of_W else None), self.full

    def my_rows(self, param):
        """The rows of a weight, bias or lora_B that this rank computes with: all that it holds."""
        return param

    def forward(self, x):
        y = linear(x, self.my_rows(self.weight), self.my_rows(self.bias))
        return y if self.lora_A is None else y + lora_update(self, x)


class ColumnLinear(ParallelLinear):
    """Y = X W^T with W's rows (the output features) cut over tp; each rank computes its own features.

    Put `copy_to_tp` before the first column-parallel layer that reads an x, once per x: that is f.
    """

    cut = 0

    # exercise 2.3 (1 point): the column-parallel layer
    def __init__(self, d_in, d_out, grid, bias=False):
        """weight (my share of d_out by shard_range, d_in); a bias of that share only if asked for."""
        start, stop = shard_range(d_out, grid.tp_rank, grid.tp_size)
        super().__init__(d_in, stop - start, grid, bias, full=d_out)


class RowLinear(ParallelLinear):
    """Y = sum_i X_i W_i^T with W's columns (the input features) cut over tp; `reduce_from_tp` is the sum.

    There is no bias: the sum over ranks would count it tp times.
    """

    cut = 1

    # exercise 2.4 (1 point): the row-parallel layer
    def __init__(self, d_in, d_out, grid):
        """weight (d_out, my share of d_in by shard_range); never a bias."""
        start, stop = shard_range(d_in, grid.tp_rank, grid.tp_size)
        super().__init__(stop - start, d_out, grid, bias=False, full=d_in)


class KeyValueLinear(ParallelLinear):
    """Column-parallel over key/value heads, as long as there are enough of them.

    With fewer heads than ranks, every rank holds the whole (small) matrix and uses the one head that its
    queries attend to. f on the *parameter* then adds up the gradients of all ranks that use it.

    heads   number of key/value heads that this rank computes
    """

    def __init__(self, d_in, kv_heads, head_dim, grid, bias=False):
        whole = kv_heads < grid.tp_size
        start, stop = (0, kv_heads) if whole else shard_range(kv_heads, grid.tp_rank, grid.tp_size)
        super().__init__(d_in, (stop - start) * head_dim, grid, bias, full=kv_heads * head_dim)
        self.cut = None if whole else 0
        self.heads = 1 if whole else stop - start
        self.head_dim = head_dim
        self.my_head = grid.tp_rank * kv_heads // grid.tp_size  # of the whole matrix

    def my_rows(self, param):
        if self.cut == 0 or param is None:
            return param
        return copy_to_tp(param, self.grid).narrow(0, self.my_head * self.head_dim, self.head_dim)


class VocabEmbedding(nn.Module):
    """Each tp rank holds the rows of its words and gives zeros for the other words; g adds them up."""

    def __init__(self, vocab_size, width, grid):
        super().__init__()
        self.grid, self.cut, self.full = grid, 0, vocab_size  # as in ParallelLinear
        self.start, self.stop = shard_range(vocab_size, grid.tp_rank, grid.tp_size)
        self.weight = nn.Parameter(torch.empty(self.stop - self.start, width))

    def sharding(self, leaf):
        return self.cut, self.full

    # exercise 2.5 (3 points): an embedding whose rows lie on several ranks
    def forward(self, ids):
        """ids (...) int64 -> (..., D), the same on every rank. Each weight gets its own words' gradient."""
        if self.grid.tp_size == 1:
            return F.embedding(ids, self.weight)
        mine = (ids >= self.start) & (ids < self.stop)
        rows = F.embedding((ids - self.start) * mine, self.weight) * mine.unsqueeze(-1)  # (..., D)
        return reduce_from_tp(rows, self.grid)


# -------------------------------------------------------------------------------- vocabulary-parallel


# exercise 2.6 (5 points): log softmax over a vocabulary that is cut
def vocab_log_softmax(logits, grid):
    """log softmax over a vocabulary that is cut over tp; ranks exchange two numbers per row, never logits.

        y_v = l_v - max - log sum_v' exp(l_v' - max)

    logits   (..., V/tp) any float dtype -> (..., V/tp) fp32: my slice of the log-probabilities (nats).
    Backward needs the f around the log-sum: every rank's y uses it, so its gradient is the sum over ranks.
    """
    logits = logits.float()
    if grid.tp_size == 1:
        return logits.log_softmax(-1)
    top = all_reduce(logits.amax(-1, keepdim=True), grid.tp_group, dist.ReduceOp.MAX)  # (..., 1), no gradient
    total = reduce_from_tp((logits - top).exp().sum(-1, keepdim=True), grid)  # (..., 1)
    return logits - top - copy_to_tp(total.log(), grid)


# exercise 2.7 (3 points): the target's log-probability, wherever it lies
def vocab_pick(logprobs, targets, vocab_size, grid):
    """logprobs[..., targets] when the last dimension is cut over tp: its owner picks it, the others add zero.

    logprobs (..., V/tp) fp32, targets (...) int64 -> (...) fp32, the same on every tp rank
    The gradient reaches logprobs at the targets alone, on the rank that holds them.
    """
    if grid.tp_size == 1:
        return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    start, stop = shard_range(vocab_size, grid.tp_rank, grid.tp_size)
    mine = (targets >= start) & (targets < stop)
    picked = logprobs.gather(-1, ((targets - start) * mine).unsqueeze(-1)).squeeze(-1)
    return reduce_from_tp(picked.masked_fill(~mine, 0.0), grid)


def vocab_sum(x, grid):
    """Sum over a vocabulary that is cut over tp, as in an exact KL: (..., V/tp) -> (...)"""
    return reduce_from_tp(x.sum(-1), grid)


# -------------------------------------------------------------------------------- LoRA


def add_lora_factors(layer, rank, alpha):
    """Gives a parallel layer two factors to train (Hu et al. 2022): Y = X W^T + bias + alpha/rank X A^T B^T.

    A (rank, d_in) is cut where W's columns are, and B (d_out, rank) where its rows are
    (ParallelLinear.sharding). Both are fp32, act in the dtype of X, and are zero until init_weights draws A.
    """
    device = layer.weight.device
    layer.lora_A = nn.Parameter(torch.zeros(rank, layer.in_features, device=device))
    layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
    layer.lora_scale = alpha / rank


def lora_update(layer, x):
    """alpha/rank X A^T B^T, the term that LoRA adds to the layer's Y. x (..., d_in) -> (..., d_out)

    One factor is whole on every rank and meets a slice of the other; f on it adds up its gradients.
    """
    A, B = layer.lora_A, layer.lora_B
    if layer.cut == 1:
        B = copy_to_tp(B, layer.grid)
    else:
        A = copy_to_tp(A, layer.grid)
    return F.linear(F.linear(x, (layer.lora_scale * A).to(x.dtype)), layer.my_rows(B).to(x.dtype))


def merged_weight(layer):
    """My slice of W + alpha/rank B A, in W's dtype. No communication: the slices of B and A fit that of W."""
    if layer.lora_A is None:
        return layer.weight
    return (layer.weight.float() + layer.lora_scale * layer.lora_B @ layer.lora_A).to(layer.weight.dtype)


# -------------------------------------------------------------------------------- optimizer


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) on fp32 masters; gradients are summed over dp and clipped by norm.

    A bf16 weight of 0.02 has neighbours 1.2e-4 away, so a step of 1e-6 rounds to nothing. Parameters of less
    than fp32 therefore get an fp32 master, which is stepped and copied back; fp32 parameters are their own
    masters. Losses are divided by the denominators of the whole step (all ranks), so gradients are summed,
    not averaged.

    updates      updates made, which Adam's bias correction needs
    skipped      updates skipped because a loss or gradient was not finite
    in_a_row     how many of those came since the last good update
    bad_inputs   the micro-batches of the first update in the latest run of skipped ones
    """

    def __init__(self, model, grid, lr, betas=(0.9, 0.999), weight_decay=0.0, max_grad_norm=1.0):
        self.grid, self.max_grad_norm = grid, max_grad_norm
        self.updates = self.skipped = self.in_a_row = 0
        self.bad_inputs = []
        trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self.names, self.params = list(trainable), list(trainable.values())
        self.sharded = [model.sharding(name)[0] is not None for name in self.names]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.params]
        self.adam = torch.optim.AdamW(self.masters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    def sum_over_dp(self):
        """The fp32 gradients, summed over dp by one all-reduce; a missing gradient counts as zero."""
        grads = [
            torch.zeros_like(master) if param.grad is None else param.grad.float()
            for param, master in zip(self.params, self.masters)
        ]
        if self.grid.dp_size == 1:
            return grads
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=self.grid.dp_group)
        parts = flat.split([grad.numel() for grad in grads])
        return [part.view_as(grad) for part, grad in zip(parts, grads)]

    def grad_norm(self, grads):
        """sqrt(sum g^2) over the whole model: a slice counts where it lies, a whole parameter 1/tp per rank.

        Thus all tp ranks scale by the same bits, and a NaN on one of them makes all of them skip the step.
        """
        squares = [
            grad.square().sum() / (1 if sharded else self.grid.tp_size)
            for grad, sharded in zip(grads, self.sharded)
        ]
        return all_reduce(sum(squares), self.grid.tp_group).sqrt()

    @torch.no_grad()
    def step(self, lr, loss=0.0):
        """One update at learning rate `lr`; clears the gradients. -> gradient norm before clipping (float).

        If the norm or `loss` (the same number on all ranks) is not finite, weights and moments stay as they
        are, and the update counts as skipped.
        """
        grads = self.sum_over_dp()
        norm = self.grad_norm(grads).item()
        if math.isfinite(norm + loss):
            self.in_a_row = 0
            self.apply_gradients(grads, norm, lr)
        else:
            self.in_a_row += 1
            self.skipped += 1
        for param, master in zip(self.params, self.masters):
            param.grad = master.grad = None
        return norm

    def apply_gradients(self, grads, norm, lr):
        """Clips the gradients, steps the masters, and copies them into their parameters.

        The 1e-6 is that of torch's clip_grad_norm_: a clipped norm is short by a share of 1e-6 / norm.
        """
        scale = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm else 1.0
        for master, grad in zip(self.masters, grads):
            master.grad = grad.mul_(scale)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.updates += 1
        for param, master in zip(self.params, self.masters):
            if param is not master:
                param.copy_(master)

    def state_tensors(self):
        """{name: slice}: masters and both moments by parameter name, for an exact resume."""
        out = {f"master.{name}": master.detach() for name, master in zip(self.names, self.masters)}
        for name, master in zip(self.names, self.masters):
            state = self.adam.state.get(master, {})  # nothing before the first update
            for moment in ("exp_avg", "exp_avg_sq"):
                out[f"{moment}.{name}"] = state[moment] if state else torch.zeros_like(master)
        return out

    @torch.no_grad()
    def load_state_tensors(self, tensors, updates):
        """The inverse of `state_tensors`. updates: how many were made when the state was saved"""
        self.updates = updates
        for name, param, master in zip(self.names, self.params, self.masters):
            master.copy_(tensors[f"master.{name}"])
            param.copy_(master)
            state = {"step": torch.tensor(float(updates), device=master.device)}
            for moment in ("exp_avg", "exp_avg_sq"):
                # In the master's memory layout, which fused AdamW relies on.
                state[moment] = torch.empty_like(master).copy_(tensors[f"{moment}.{name}"])
            self.adam.state[master] = state


class Update:
    """One optimizer step whose gradient depends neither on the cut into micro-batches nor on dp.

        update = Update(optimizer, parts)
        for batch in update:
            loss, stats = ...  # means over this micro-batch
            update.backward(loss, stats)
        row = update.step(lr)

    parts   this rank's micro-batches as (weight, batch); the weight is the number of pairs, rows or tokens
            that the loss is a mean over
    """

    def __init__(self, optimizer, parts):
        self.optimizer, self.parts = optimizer, parts
        self.sums = {}
        mine = {"weight": sum(weight for weight, _ in parts), "idle": not parts}
        everywhere = all_sum(mine, optimizer.grid)
        self.total, self.idle_ranks = everywhere["weight"], everywhere["idle"]

    def __iter__(self):
        for weight, batch in self.parts:
            self.weight = weight
            yield batch

    def backward(self, loss, stats):
        """Adds the gradient of this micro-batch's share of the loss. stats: {name: mean over the batch}"""
        (loss * (self.weight / self.total)).backward()
        for name, mean in {"loss": loss.item(), **stats}.items():
            self.sums[name] = self.sums.get(name, 0.0) + mean * self.weight / self.total

    def step(self, lr):
        """-> {"loss": ..., the stats ..., "grad_norm": ...}: means over the whole step, equal on all ranks"""
        grid, optimizer, sums = self.optimizer.grid, self.optimizer, self.sums
        if self.idle_ranks:  # a rank without rows has no names, and all ranks must sum the same ones
            names = [None] * grid.dp_size
            dist.all_gather_object(names, list(sums), group=grid.dp_group)
            sums = {name: sums.get(name, 0.0) for name in max(names, key=len)}
        sums = all_sum(sums, grid)
        norm = optimizer.step(lr, sums["loss"])
        if optimizer.in_a_row == 1:
            optimizer.bad_inputs = [batch for _, batch in self.parts]
        return {**sums, "grad_norm": norm}


# -------------------------------------------------------------------------------- printing and waiting


def say(grid, text):
    """Prints a line on the main rank, above a progress bar if there is one."""
    if grid.is_main:
        tqdm.write(text)


def barrier(grid):
    """Waits for all ranks of the grid; does nothing on the `Grid()` of a rank that works alone."""
    if grid.tp_group is not None:
        dist.barrier()
