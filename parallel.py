"""Tensor and data parallelism by hand: the grid of processes, f and g, sharded layers, and the optimizer step.

    world = dp x tp                 tp_rank 0   tp_rank 1        the tp ranks of one row hold slices of ONE model and
                       dp_rank 0      p0          p1             see the same tokens; the dp ranks of one column hold
                       dp_rank 1      p2          p3             the same slice and see different tokens

Everything runs with one process, without a launcher and without a process group; `Grid()` is that case.
Source of the scheme: Shoeybi et al. 2019, "Megatron-LM", section 3.

N tokens · D model width · V vocabulary; a sharded size is written as a fraction: V/tp
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

from support.files import BadInput

# ------------------------------------------------------------------------------------------------ the grid


@dataclass(frozen=True)
class Grid:
    """A process's place among tp x dp processes. The default is one process that needs no process group."""

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
    device    "auto" (CUDA when there is one), "cpu" or "cuda"
    timeout   seconds that a rank waits for another one before it gives up with an error
    -> Grid; neighbouring ranks form a tp group, so that tp stays inside a machine
    Raises BadInput when tp_size does not divide the number of processes, or when CUDA is asked for and absent.
    """
    world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    tp_size = tp_size or world
    if world % tp_size:
        raise BadInput(f"--tp {tp_size} does not divide the {world} processes of this run")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this torch sees no CUDA device; use --device cpu or auto")
    if device == "cpu" or not torch.cuda.is_available():
        device = torch.device("cpu")
        if (
            "LOCAL_WORLD_SIZE" in os.environ
        ):  # torchrun says one thread a process; a lone process keeps what torch or OMP_NUM_THREADS says
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    else:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)  # before the process group, or every rank would open GPU 0
    if "WORLD_SIZE" not in os.environ:
        return Grid(device)
    timeout = datetime.timedelta(seconds=timeout)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    rows = [
        list(range(start, start + tp_size)) for start in range(0, world, tp_size)
    ]  # dp x tp ranks, as drawn above
    tp_group, dp_group = (
        dist.new_subgroups_by_enumeration(ranks, timeout)[0]
        for ranks in (rows, [list(column) for column in zip(*rows)])
    )
    return Grid(
        device,
        dist.get_rank() % tp_size,
        tp_size,
        dist.get_rank() // tp_size,
        world // tp_size,
        tp_group,
        dp_group,
    )


def all_reduce(x, group, op=dist.ReduceOp.SUM):
    """The sum (or `op`) of x over a group, as a new tensor: the caller's x is never written into."""
    if group is None or group.size() == 1:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, group=group)
    return x


def all_sum(sums, grid, group="dp"):
    """{name: number} -> the same names with the sums over a group of the grid (float64, so token counts stay exact)."""
    x = torch.tensor(list(sums.values()), dtype=torch.float64, device=grid.device)
    return dict(zip(sums, all_reduce(x, getattr(grid, f"{group}_group")).tolist()))


# ------------------------------------------------------------------------------------------------ f and g


# exercise 2.1 (3 lines): f, before work that differs between ranks
class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.group), None


# exercise 2.2 (2 lines): g, the sum of what the ranks hold
class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def copy_to_tp(x, grid):
    """f (Megatron-LM, Fig. 3): identity forward, all-reduce backward.

    x is the same on every tp rank and enters work that differs between them. y_i = h_i(x) for rank i, so
    dL/dx = sum_i (dh_i/dx)^T dL/dy_i: each rank computes one term of that sum, and backward adds them up.
    """
    return _CopyToTP.apply(x, grid.tp_group) if grid.tp_size > 1 else x


def reduce_from_tp(x, grid):
    """g, the conjugate of f: all-reduce forward, identity backward.

    y = sum_i x_i, so dL/dx_i = dL/dy for every i: the gradient of the sum is already right on each rank.
    """
    return _ReduceFromTP.apply(x, grid.tp_group) if grid.tp_size > 1 else x


# ------------------------------------------------------------------------------------------------ who holds what


# Column-parallel layers cut their output (rows of the weight), row-parallel ones their input (columns).
_SHARD_DIM = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "gate_proj": 0,
    "up_proj": 0,
    "o_proj": 1,
    "down_proj": 1,
    "embed_tokens": 0,
    "lm_head": 0,
}


def shard_range(size, rank, parts):
    """[start, stop) of `size` units that `rank` of `parts` holds. Uneven sizes differ by one: no padding, ever.

    >>> [shard_range(10, r, 4) for r in range(4)]
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    return size * rank // parts, size * (rank + 1) // parts


def shard_dim(name, kv_heads, tp_size):
    """The one rule for how a parameter is cut: its sharded dimension, or None where every rank holds it whole.

    name       Hugging Face's, e.g. "model.layers.0.self_attn.q_proj.weight"
    kv_heads   key/value heads of the model: when there are fewer than ranks, k and v are kept whole (KeyValueLinear)
    """
    layer, leaf = name.split(".")[-2:]
    if tp_size == 1 or (layer in ("k_proj", "v_proj") and kv_heads < tp_size):
        return None
    dim = _SHARD_DIM.get(layer)
    return (
        None if dim == {"lora_A": 0, "lora_B": 1}.get(leaf) else dim
    )  # A has the columns of the weight, B its rows


def check_divisible(tp_size, heads, kv_heads, ffn):
    """BadInput that lists the sizes that work, when heads or the hidden layer cannot be shared out evenly."""
    works = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and ffn % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)
    ]
    if tp_size not in works:
        raise BadInput(
            f"--tp {tp_size}: a model with {heads} attention heads, {kv_heads} key/value heads and "
            f"{ffn} hidden units can be shared by {', '.join(map(str, works))} processes"
        )


def gather_shards(x, dim, size, grid):
    """The whole tensor from every rank's slice along `dim` (no gradient), the same on all tp ranks."""
    if grid.tp_size == 1 or dim is None:
        return x
    widest = -(-size // grid.tp_size)
    x = x.detach().transpose(0, dim)  # (own, ...)
    mine = x.new_zeros(widest, *x.shape[1:])
    mine[: x.shape[0]] = x
    parts = [torch.empty_like(mine) for _ in range(grid.tp_size)]
    dist.all_gather(parts, mine, group=grid.tp_group)
    ranges = [shard_range(size, r, grid.tp_size) for r in range(grid.tp_size)]
    return torch.cat([p[: b - a] for p, (a, b) in zip(parts, ranges)]).transpose(
        0, dim
    )  # (size, ...) turned back


# ------------------------------------------------------------------------------------------------ layers


def linear(x, weight, bias=None):
    """F.linear; inside `reordered_weights` and without gradient, by the copy of the weight that was made there."""
    ours = None if torch.is_grad_enabled() else getattr(weight, "reordered", None)
    return (
        F.linear(x, weight, bias)
        if ours is None
        else torch.ops.mkldnn._linear_pointwise(x, ours, bias, "none", [], "")
    )


class LoRALinear(nn.Linear):
    """nn.Linear, to which `add_lora` gives an adapter (Hu et al. 2022): Y = X W^T + bias + alpha/rank X A^T B^T.

    A (rank, d_in) is cut with W's columns and B (d_out, rank) with its rows. The factor that is not cut is whole on every
    rank, where it meets a slice of the other; f on it adds up their gradients. Both are fp32 and act in the dtype of X.
    """

    lora_cut = "lora_B"  # which factor each rank has a slice of

    def __init__(self, d_in, d_out, grid, bias=False):
        super().__init__(d_in, d_out, bias=bias)
        self.grid, self.lora_A, self.lora_B, self.lora_scale = grid, None, None, 1.0

    def add_lora(self, rank, alpha):
        zeros = lambda *shape: nn.Parameter(torch.zeros(shape, device=self.weight.device))
        self.lora_A, self.lora_B, self.lora_scale = (
            zeros(rank, self.in_features),
            zeros(self.out_features, rank),
            alpha / rank,
        )

    def merged(self):
        """My slice of W + alpha/rank B A, in W's dtype; no communication, for the slices fit."""
        return (
            self.weight
            if self.lora_A is None
            else (self.weight.float() + self.lora_scale * self.lora_B @ self.lora_A).to(self.weight.dtype)
        )

    def my_rows(self, p):
        return p

    def forward(self, x):
        y = linear(x, self.my_rows(self.weight), self.my_rows(self.bias))
        if self.lora_A is None:
            return y
        f = lambda p: copy_to_tp(p, self.grid)
        A, B = (f(self.lora_A), self.lora_B) if self.lora_cut == "lora_B" else (self.lora_A, f(self.lora_B))
        return y + F.linear(F.linear(x, (self.lora_scale * A).to(x.dtype)), self.my_rows(B).to(x.dtype))


class ColumnLinear(LoRALinear):
    """Y = X W^T with W's rows (the output features) cut over tp: each rank makes its own features, no communication.

    Put `copy_to_tp` before the first column-parallel layer that reads an x, once per x: that is f.
    """

    # exercise 2.3 (2 lines): the column-parallel layer
    def __init__(self, d_in, d_out, grid, bias=False):
        start, stop = shard_range(d_out, grid.tp_rank, grid.tp_size)
        super().__init__(d_in, stop - start, grid, bias)


class RowLinear(LoRALinear):
    """Y = sum_i X_i W_i^T with W's columns (the input features) cut over tp; `reduce_from_tp` after it is the sum."""

    lora_cut = "lora_A"

    # exercise 2.4 (2 lines): the row-parallel layer
    def __init__(self, d_in, d_out, grid):
        start, stop = shard_range(d_in, grid.tp_rank, grid.tp_size)
        super().__init__(stop - start, d_out, grid)


class KeyValueLinear(LoRALinear):
    """Column-parallel over key/value heads. With fewer heads than ranks, every rank keeps the whole small matrix and
    uses the one head that its queries attend with; f on the *weight* then adds up the gradients of all its users."""

    def __init__(self, d_in, kv_heads, head_dim, grid, bias=False):
        self.whole = kv_heads < grid.tp_size
        start, stop = (0, kv_heads) if self.whole else shard_range(kv_heads, grid.tp_rank, grid.tp_size)
        super().__init__(d_in, (stop - start) * head_dim, grid, bias)
        self.head, self.head_dim = grid.tp_rank * kv_heads // grid.tp_size, head_dim

    def my_rows(self, p):
        return (
            copy_to_tp(p, self.grid).narrow(0, self.head * self.head_dim, self.head_dim)
            if self.whole and p is not None
            else p
        )


class VocabEmbedding(nn.Module):
    """Each tp rank holds the rows of its part of the vocabulary and answers zeros for the rest; g adds them up."""

    def __init__(self, vocab_size, width, grid):
        super().__init__()
        self.grid = grid
        self.start, self.stop = shard_range(vocab_size, grid.tp_rank, grid.tp_size)
        self.weight = nn.Parameter(torch.empty(self.stop - self.start, width))

    # exercise 2.5 (5 lines): an embedding whose rows lie on several ranks
    def forward(self, ids):
        if self.grid.tp_size == 1:
            return F.embedding(ids, self.weight)
        mine = (ids >= self.start) & (ids < self.stop)
        rows = F.embedding((ids - self.start) * mine, self.weight) * mine.unsqueeze(
            -1
        )  # (..., D), zero where not mine
        return reduce_from_tp(rows, self.grid)


# ------------------------------------------------------------------------------------------------ vocabulary-parallel


# exercise 2.6 (6 lines): log softmax over a vocabulary that is cut
def vocab_log_softmax(logits, grid):
    """log softmax over a vocabulary that is cut over tp; only two numbers a row are exchanged, never logits.

        y_v = l_v - max - log sum_v' exp(l_v' - max)

    logits   (..., V/tp) any float dtype -> (..., V/tp) fp32: my slice of the log-probabilities (nats).
    The f around the log-sum is what backward needs: every rank's y uses it, so its gradient is the sum over ranks.
    """
    logits = logits.float()
    if grid.tp_size == 1:
        return logits.log_softmax(-1)
    top = all_reduce(
        logits.amax(-1, keepdim=True), grid.tp_group, dist.ReduceOp.MAX
    )  # (..., 1), no gradient needed
    total = reduce_from_tp((logits - top).exp().sum(-1, keepdim=True), grid)  # (..., 1)
    return logits - top - copy_to_tp(total.log(), grid)


# exercise 2.7 (6 lines): the target's log-probability, wherever it lies
def vocab_pick(logprobs, targets, vocab_size, grid):
    """logprobs[..., targets] when the last dimension is cut over tp: the owner answers, the others add zero.

    logprobs (..., V/tp) fp32, targets (...) int64 -> (...) fp32, the same on every tp rank
    """
    if grid.tp_size == 1:
        return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    start, stop = shard_range(vocab_size, grid.tp_rank, grid.tp_size)
    mine = (targets >= start) & (targets < stop)
    picked = logprobs.gather(-1, ((targets - start) * mine).unsqueeze(-1)).squeeze(-1)
    return reduce_from_tp(picked.masked_fill(~mine, 0.0), grid)


def vocab_sum(x, grid):
    """Sum over a vocabulary that is cut over tp: (..., V/tp) -> (...), such as an exact KL."""
    return reduce_from_tp(x.sum(-1), grid)


# ------------------------------------------------------------------------------------------------ optimizer


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) on fp32 masters, with dp-summed gradients clipped by their global norm.

    A bf16 weight of 0.02 has neighbours 1.2e-4 away, so a step of 1e-6 on it rounds to nothing; parameters of less
    than fp32 therefore get an fp32 master that is stepped and copied back. fp32 parameters are their own masters.
    Losses are divided by the denominators of the whole step (all ranks), so gradients are summed over dp, not averaged.
    """

    def __init__(self, model, grid, lr, betas=(0.9, 0.999), weight_decay=0.0, max_grad_norm=1.0):
        self.grid, self.max_grad_norm, self.updates = grid, max_grad_norm, 0
        self.skipped, self.in_a_row, self.bad_inputs = (
            0,
            0,
            [],
        )  # updates left out: all, the latest ones; what the first of those read
        self.names, self.params = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad])
        self.sharded = [model.shard_dim(n) is not None for n in self.names]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.params]
        self.adam = torch.optim.AdamW(self.masters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    def sum_over_dp(self):
        """One all-reduce of all gradients in one fp32 buffer; missing gradients count as zero."""
        grads = [
            torch.zeros_like(m) if p.grad is None else p.grad.float()
            for p, m in zip(self.params, self.masters)
        ]
        if self.grid.dp_size > 1:
            dist.all_reduce(flat := torch.cat([g.flatten() for g in grads]), group=self.grid.dp_group)
            grads = [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)]
        return grads

    def grad_norm(self, grads):
        """sqrt(sum g^2) of the whole model: a slice counts on the rank that holds it, a whole parameter 1/tp on each.

        So all tp ranks scale by the same bits, and a nan that one of them met makes all of them skip the step.
        """
        squares = [
            g.square().sum() / (1 if cut else self.grid.tp_size) for g, cut in zip(grads, self.sharded)
        ]
        return all_reduce(sum(squares), self.grid.tp_group).sqrt()

    @torch.no_grad()
    def step(self, lr, loss=0.0):
        """One update at learning rate `lr`; clears the gradients. -> gradient norm before clipping (float).

        A norm or a loss (the same number on all ranks) that is not finite leaves weights and moments alone, and is counted.
        """
        grads = self.sum_over_dp()
        norm = self.grad_norm(grads).item()
        good = math.isfinite(norm + loss)
        self.skipped, self.in_a_row = self.skipped + (not good), 0 if good else self.in_a_row + 1
        if good:
            scale = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm else 1.0
            for master, grad in zip(self.masters, grads):
                master.grad = grad.mul_(scale)
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            self.updates += 1
            for param, master in zip(self.params, self.masters):
                if param is not master:
                    param.copy_(master)
        for param, master in zip(self.params, self.masters):
            param.grad = master.grad = None
        return norm

    def state_tensors(self):
        """{name: slice}: masters and both moments by parameter name, for an exact resume."""
        out = {f"master.{n}": m.detach() for n, m in zip(self.names, self.masters)}
        for n, m in zip(self.names, self.masters):
            for key in ("exp_avg", "exp_avg_sq"):
                out[f"{key}.{n}"] = self.adam.state[m][key] if m in self.adam.state else torch.zeros_like(m)
        return out

    def load_state_tensors(self, tensors, updates):
        """The inverse of `state_tensors`; `updates` is the number made so far, which Adam's bias correction needs."""
        self.updates = updates
        with torch.no_grad():
            for n, p, m in zip(self.names, self.params, self.masters):
                m.copy_(tensors[f"master.{n}"])
                p.copy_(m)
                state = {
                    k: torch.empty_like(m).copy_(tensors[f"{k}.{n}"]) for k in ("exp_avg", "exp_avg_sq")
                }  # laid out as m: fused
                self.adam.state[m] = {"step": torch.tensor(float(updates), device=m.device), **state}


class Update:
    """One optimizer step whose gradient depends neither on how rows are cut into micro-batches nor on dp.

        update = Update(optimizer, parts)
        for batch in update:
            loss, stats = ...  # means over this micro-batch
            update.backward(loss, stats)
        row = update.step(lr)

    parts   this rank's micro-batches as (weight, batch); weight = what the loss is a mean over (pairs, tokens)
    """

    def __init__(self, optimizer, parts):
        self.optimizer, self.parts, self.sums = optimizer, parts, {}
        mine = {"weight": sum(weight for weight, _ in parts), "idle": not parts}
        everywhere = all_sum(mine, optimizer.grid)
        self.total, self.idle_ranks = everywhere["weight"], everywhere["idle"]

    def __iter__(self):
        for weight, batch in self.parts:
            self.weight = weight
            yield batch

    def backward(self, loss, stats):
        """Adds the gradient of this micro-batch's share of the loss. stats: {name: mean over the micro-batch}"""
        (loss * (self.weight / self.total)).backward()
        for name, x in {"loss": loss.item(), **stats}.items():
            self.sums[name] = self.sums.get(name, 0.0) + x * self.weight / self.total

    def step(self, lr):
        """-> {"loss": ..., names of stats ..., "grad_norm": ...}: means over the whole step, the same on every rank"""
        grid, optimizer = self.optimizer.grid, self.optimizer
        sums = self.sums
        if self.idle_ranks:  # ranks without rows learn the names from the others
            names = [None] * grid.dp_size
            dist.all_gather_object(names, list(sums), group=grid.dp_group)
            sums = {name: sums.get(name, 0.0) for name in max(names, key=len)}
        sums = all_sum(sums, grid)
        norm = optimizer.step(lr, sums["loss"])
        if optimizer.in_a_row == 1:
            optimizer.bad_inputs = [batch for _, batch in self.parts]
        return {**sums, "grad_norm": norm}


# ------------------------------------------------------------------------------------------------ results on disk


def say(grid, text):
    """One line on the main rank; a tqdm bar that is being drawn stays whole."""
    if grid.is_main:
        tqdm.write(text)


def barrier(grid):
    """Waits for all ranks of a grid that has any; on a `Grid()` made by one rank alone it does nothing."""
    if grid.tp_group is not None:
        dist.barrier()
