"""The fast decoder: KV cache, slots, CUDA graphs, reordered weights."""

import contextlib
import os
from functools import partial
from itertools import accumulate, groupby, pairwise

import torch
import torch.nn.functional as F

from model import Packed, sample_tokens
from parallel import LoRALinear, gather_shards
from support.files import BadInput


class KVCache:
    """Keys and values of what was read so far: L tensors (B, K/tp, S, E) each. Slot b has used its first lengths[b] columns, and
    what lies behind them is never seen. There are as many columns as the longest slot ever needed, and less than `spare` more."""

    graphs = False  # on CUDA: a step is recorded once for a number of slots and a width, and then replayed without Python
    spare = 64  # a multiple of 8; recorded steps are as wide as a multiple of it

    def __init__(self, policy, slots):
        cfg, kv = policy.cfg, policy.model.layers[0].self_attn.k_proj
        shape = (slots, 1 if kv.whole else kv.out_features // cfg.head_dim, 0, cfg.head_dim)
        self.keys, self.values = ([kv.weight.new_zeros(shape) for _ in policy.model.layers] for _ in range(2))
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=kv.weight.device)
        self.recorded = {}  # {width: step}

    def make_room(self, columns):
        """At least so many columns from now on."""
        if (missing := columns - self.keys[0].shape[2]) > 0:
            more = -(-missing // self.spare) * self.spare
            self.change(lambda x: F.pad(x, (0, 0, 0, more)))

    def keep(self, slots):
        """Drops all slots but these. slots (B',) int64"""
        self.lengths = self.lengths[slots]
        self.change(lambda x: x[slots])

    def change(self, f):
        """Puts f(x) in the place of each tensor, one by one: there is never more than one of them twice."""
        self.recorded = {}
        for tensors in (self.keys, self.values):
            for layer in range(len(tensors)):
                tensors[layer] = f(tensors[layer])

    def prefill(self, model, prompts, slots):
        """Reads prompts[i] into slots[i] -> (B', D) residual stream at their last tokens. What all prompts begin with (a chat
        template) is read once, and so are equal neighbours."""
        groups = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
        shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        packed = Packed(
            [(prompts[0][:shared], [prompt[shared:] for prompt, _ in groups])], self.lengths.device
        )
        ends = list(accumulate((len(prompt) - shared for prompt, _ in groups), initial=shared))
        spans = [
            [*range(shared), *range(a, b)] for (_, n), (a, b) in zip(groups, pairwise(ends)) for _ in range(n)
        ]  # where each slot's tokens are
        token, column, slot = (
            torch.tensor(x, dtype=torch.int64, device=self.lengths.device)
            for x in (
                [t for span in spans for t in span],
                [c for span in spans for c in range(len(span))],
                [s for span, s in zip(spans, slots.tolist()) for _ in span],
            )
        )
        self.make_room(max(map(len, prompts)))

        def attend(layer, q, k, v):
            self.keys[layer][slot, :, column], self.values[layer][slot, :, column] = k[0, token], v[0, token]
            return packed.attend(layer, q, k, v)

        self.lengths[slots] = torch.tensor([len(prompt) for prompt in prompts], device=self.lengths.device)
        return model(packed.ids, packed.positions, attend)[0, [span[-1] for span in spans]]

    def attend(self, layer, q, k, v):
        """One new token a slot: stores its k, v and attends to the slot's own past. q (1, B, H/tp, E), k, v (1, B, K/tp, E)"""
        keys, values = self.keys[layer], self.values[layer]  # (B, K/tp, S, E)
        keys.view(-1, keys.shape[-1])[self.places], values.view(-1, keys.shape[-1])[self.places] = (
            k[0].flatten(0, 1),
            v[0].flatten(0, 1),
        )
        grouped, n = (
            q[0].unflatten(1, (k.shape[2], -1)),
            self.seen.shape[-1],
        )  # (B, K/tp, H/K, E): a kv head's queries side by side
        return F.scaled_dot_product_attention(
            grouped, keys[:, :, :n], values[:, :, :n], attn_mask=self.seen
        ).reshape(q.shape)

    def step(self, model, tokens):
        """Reads one more token a slot. tokens (B,) int64 -> (B, D) residual stream, which the next step may overwrite"""
        unit = self.spare if self.graphs else 8  # odd widths are slow
        width = -(-(int(self.lengths.max()) + 1) // unit) * unit
        self.make_room(width)
        if not self.graphs:
            return self._step(model, width, tokens)
        if width not in self.recorded:
            self.recorded[width] = record(partial(self._step, model, width), tokens)
        return self.recorded[width](tokens)

    def _step(self, model, width, tokens):
        _, heads, columns, _ = self.keys[0].shape
        self.places = (
            (torch.arange(len(tokens) * heads, device=tokens.device).view(-1, heads) * columns)
            + self.lengths[:, None]
        ).flatten()
        unseen = torch.arange(width, device=tokens.device) > self.lengths[:, None]  # (B, width)
        self.seen = torch.zeros(unseen.shape, device=tokens.device, dtype=self.keys[0].dtype).masked_fill_(
            unseen, -torch.inf
        )[:, None, None]
        return model(tokens[None], self.lengths[None], self.attend)[0]


def record(f, x):
    """f(x) as a CUDA graph -> a function of a new x. What f reads besides must stay where it is; its answer is overwritten by the next call."""
    x, graph = x.clone(), torch.cuda.CUDAGraph()
    f(x)  # once for real: what is made at the first call must not be recorded
    with torch.cuda.graph(graph):
        y = f(x)

    def replay(new):
        x.copy_(new)
        graph.replay()
        return y

    return replay


@torch.inference_mode()
def generate(policy, prompts, max_new_tokens, stop_ids, temperature=1.0, seed=0, batch_size=256):
    """Samples one answer a prompt; ids in, ids out, so that what is scored later is exactly what was sampled.

    prompts       list of id lists          stop_ids    ends an answer and belongs to it
    temperature   0 is greedy               seed        prompt i, step t always get the same uniform number
    batch_size    answers in the making at a time; a finished one makes room for the next prompt
    -> responses (list of id lists), truncated (list of bool: no stop token within max_new_tokens)
    Raises BadInput for a prompt without tokens.
    """
    if not all(prompts):
        raise BadInput("a prompt has no tokens; expected at least one")
    device, n = policy.grid.device, len(prompts)
    uniforms = torch.rand(n + 1, max_new_tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    waiting, slots = (
        sorted(range(n), key=lambda i: (-len(prompts[i]), prompts[i])),
        min(batch_size, n),
    )  # taken from the end
    cache = KVCache(policy, slots)
    stops, tokens = (
        torch.tensor(stop_ids, device=device),
        torch.zeros(n + 1, max_new_tokens, dtype=torch.int64, device=device),
    )
    x = torch.zeros(
        slots, policy.cfg.hidden_size, device=device, dtype=policy.head_weight.dtype
    )  # what each slot has read last
    row = torch.full(
        (slots,), n, device=device
    )  # the prompt that a slot answers; n is none (tokens and uniforms have such a row)
    step, lengths, going = (
        torch.zeros_like(row),
        torch.zeros(n + 1, dtype=torch.int64, device=device),
        torch.zeros_like(row, dtype=torch.bool),
    )
    busy = False
    with reordered_weights(
        [policy.head_weight, *(layer.weight for layer in policy.modules() if isinstance(layer, LoRALinear))]
    ):
        while waiting or busy:
            free = (~going).nonzero()[:, 0]
            if waiting and len(free) * 8 >= slots:  # many at a time: reading prompts pays in bulk
                free, taken = free[: len(waiting)], [waiting.pop() for _ in free[: len(waiting)]]
                x[free] = cache.prefill(policy.model, [prompts[i] for i in taken], free)
                row[free], step[free], going[free] = torch.tensor(taken, device=device), 0, True
            elif len(free) * (2 if cache.graphs else 4) >= len(
                row
            ):  # nobody waits: finished slots are dropped, again many at a time, for that copies the cache
                rows = going.nonzero()[:, 0]
                cache.keep(rows)
                x, row, step, going = x[rows], row[rows], step[rows], going[rows]
            logits = gather_shards(policy.logits(x).float(), 1, policy.cfg.vocab_size, policy.grid)  # (B, V)
            new = (
                sample_tokens(logits.div_(temperature).softmax(-1), uniforms[row, step])
                if temperature
                else logits.argmax(-1)
            )  # (B,)
            tokens[row, step] = new
            step, lengths[row] = step + 1, step + 1
            going = going & ~torch.isin(new, stops) & (step < max_new_tokens)
            row, step = row.where(going, n), step.where(going, 0)
            if busy := bool(going.any()):
                x = cache.step(policy.model, new)
                cache.lengths.add_(1).mul_(going)  # in place: a recorded step reads it there
    responses = [row[:k] for row, k in zip(tokens[:n].tolist(), lengths.tolist())]
    return responses, [response[-1] not in stop_ids for response in responses]


REORDERS = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
)


@contextlib.contextmanager
def reordered_weights(weights, at_least=2**16):
    """For many small forwards, such as decoding on a CPU: fp32 matrices of `at_least` numbers get a copy in the layout of oneDNN's
    kernels (so they are there twice). F.linear arranges a matrix anew for each call, which for 2 to 16 rows can cost as much as
    the product. The weights must not change inside. Elsewhere (CUDA, other processors, a torch without these) nothing happens."""
    here = lambda w: w.device.type == "cpu" and w.dtype == torch.float32 and w.numel() >= at_least
    weights, done = {w for w in weights if REORDERS and here(w)}, []
    try:
        for w in weights:
            w.reordered = torch.ops.mkldnn._reorder_linear_weight(w.detach())
            done.append(w)
        yield
    finally:
        for w in done:
            del w.reordered
