"""The fast decoder: KV cache, slots, CUDA graphs, reordered weights. As model.generate_plainly, but fast.

B slots of the cache · S its columns · L layers · D model width · H query heads · K key/value heads
E head width · V vocabulary · n prompts; a sharded size is written as a fraction: H/tp
"""

import contextlib
import os
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F

from model import Packed, sample_tokens, sampling_uniforms
from parallel import gather_shards
from support.files import require

# -------------------------------------------------------------------------------- the cache


class KVCache:
    """Keys and values of all tokens read so far: L tensors (B, K/tp, S, E) each.

    Slot b has used its first lengths[b] columns; later ones are masked. S is what the longest slot ever
    needed, rounded up by less than `spare`.

    graphs   on CUDA: record a step once for each number of slots and width, then replay it without Python
    spare    columns to grow by, a multiple of 8; recorded steps have widths that are multiples of it

    In bf16 on the CPU (by_products), scores and weighted values are two batched products, over keys that lie
    in memory as (B, K/tp, E, S): torch's kernel makes two small products for each slot and head.
    """

    def __init__(self, policy, slots, graphs=False, spare=64):
        self.model, self.flex = policy.model, policy.flex
        self.graphs, self.spare = graphs, spare
        layers, k_proj = policy.model.layers, policy.model.layers[0].self_attn.k_proj
        empty = k_proj.weight.new_zeros(slots, k_proj.heads, 0, k_proj.head_dim)
        bf16_on_cpu = empty.device.type == "cpu" and empty.dtype == torch.bfloat16
        self.by_products = bf16_on_cpu and torch.bfloat16 in REORDERED
        self.keys = [empty.clone() for _ in layers]
        self.values = [empty.clone() for _ in layers]
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=empty.device)
        self.recorded = {}  # {width: step}

    def make_room(self, columns):
        """Grows the cache to at least `columns`."""
        missing = columns - self.keys[0].shape[2]
        if missing > 0:
            more = -(-missing // self.spare) * self.spare
            self.replace_tensors(lambda x: F.pad(x, (0, 0, 0, more)))

    def keep_slots(self, slots):
        """Drops all slots but these. slots (B',) int64"""
        self.lengths = self.lengths[slots]
        self.replace_tensors(lambda x: x[slots])

    def replace_tensors(self, f):
        """Replaces each tensor x by f(x), one at a time, to bound peak memory."""
        self.recorded = {}  # recorded steps read the old tensors
        for layer in range(len(self.keys)):
            keys = f(self.keys[layer])
            self.keys[layer] = keys.mT.contiguous().mT if self.by_products else keys
            self.values[layer] = f(self.values[layer])

    def prefill(self, prompts, slots):
        """Reads prompts[i] into slots[i] -> (B', D), the residual stream at their last tokens.

        The prefix that all prompts share (a chat template) is read once, and so are equal neighbours.
        """
        device = self.lengths.device
        lengths = [len(prompt) for prompt in prompts]
        shared = min(len(os.path.commonprefix(prompts)), min(lengths) - 1)
        distinct = [(prompt, len(list(copies))) for prompt, copies in groupby(prompts)]
        prefix, rests = prompts[0][:shared], [prompt[shared:] for prompt, _ in distinct]
        packed = Packed([(prefix, rests)], device, self.flex)
        places, end = [], shared  # for each prompt: where its tokens are in the packed row
        for prompt, copies in distinct:
            start, end = end, end + len(prompt) - shared
            places += copies * [[*range(shared), *range(start, end)]]
        tokens = _int64([place for tokens in places for place in tokens], device)
        columns = _int64([column for length in lengths for column in range(length)], device)
        rows = slots.repeat_interleave(_int64(lengths, device))
        self.make_room(max(lengths))

        def store_and_attend(layer, q, k, v):
            self.keys[layer][rows, :, columns] = k[0, tokens]
            self.values[layer][rows, :, columns] = v[0, tokens]
            return packed.attend(layer, q, k, v)

        self.lengths[slots] = _int64(lengths, device)
        x = self.model(packed.ids, packed.positions, store_and_attend)  # (1, N, D)
        return x[0, [tokens[-1] for tokens in places]]

    def step(self, tokens):
        """Reads one more token per slot. tokens (B,) int64 -> (B, D), which the next step may overwrite"""
        unit = self.spare if self.graphs else 8  # odd widths are slow
        width = -(-(int(self.lengths.max()) + 1) // unit) * unit
        self.make_room(width)
        if not self.graphs:
            return self._step(width, tokens)
        if width not in self.recorded:
            self.recorded[width] = record(partial(self._step, width), tokens)
        return self.recorded[width](tokens)

    def _step(self, width, tokens):
        self.slots = torch.arange(len(tokens), device=tokens.device)
        unseen = torch.arange(width, device=tokens.device) > self.lengths[:, None]  # (B, width)
        mask = torch.zeros(unseen.shape, device=tokens.device, dtype=self.keys[0].dtype)
        self.mask = mask.masked_fill_(unseen, -torch.inf)[:, None, None]  # (B, 1, 1, width)
        return self.model(tokens[None], self.lengths[None], self.attend)[0]

    def attend(self, layer, q, k, v):
        """Stores one new k and v per slot, and attends to the slot's own past.

        q (1, B, H/tp, E), k, v (1, B, K/tp, E) -> (1, B, H/tp, E)
        """
        self.keys[layer][self.slots, :, self.lengths] = k[0]
        self.values[layer][self.slots, :, self.lengths] = v[0]
        width = self.mask.shape[-1]
        keys, values = self.keys[layer][:, :, :width], self.values[layer][:, :, :width]  # (B, K/tp, width, E)
        grouped = q[0].unflatten(1, (k.shape[2], -1))  # (B, K/tp, H/K, E): queries of a kv head side by side
        if self.by_products:
            scores = (grouped * q.shape[-1] ** -0.5) @ keys.mT + self.mask  # (B, K/tp, H/K, width)
            y = scores.softmax(-1) @ values
        else:
            y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask)
        return y.reshape(q.shape)


def _int64(numbers, device):
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def record(f, x):
    """f(x) as a CUDA graph -> a function of a new x, whose answer the next call overwrites.

    Every other tensor that f reads must stay where it is.
    """
    x, graph = x.clone(), torch.cuda.CUDAGraph()
    f(x)  # a real call first: one-time initialisation must not be recorded
    with torch.cuda.graph(graph):
        y = f(x)

    def replay(new):
        x.copy_(new)
        graph.replay()
        return y

    return replay


# -------------------------------------------------------------------------------- decoding


class Slots:
    """Which prompt each slot of the cache answers, and how far it has got.

    prompt   (B,) int64: index of the prompt; n, one past the last, for a free slot
    step     (B,) int64: tokens sampled so far
    going    (B,) bool: False for a free slot
    x        (B, D) residual stream at the token that was read last
    """

    def __init__(self, policy, prompts, slots, graphs):
        device, n = policy.grid.device, len(prompts)
        self.prompts = prompts
        self.waiting = sorted(range(n), key=lambda i: (-len(prompts[i]), prompts[i]))  # the last one is next
        self.cache = KVCache(policy, slots, graphs, spare=256 if graphs else 64)  # each growth records anew
        dtype = policy.head_weight.dtype
        self.x = torch.zeros(slots, policy.cfg.hidden_size, device=device, dtype=dtype)
        self.prompt = torch.full((slots,), n, device=device)
        self.step = torch.zeros_like(self.prompt)
        self.going = torch.zeros_like(self.prompt, dtype=torch.bool)
        self.busy = False  # whether any slot is going

    def refill(self):
        """Gives free slots to waiting prompts, or drops them when no prompt waits; either for many at once.

        Prefill is cheaper in bulk, and dropping a slot copies the cache.
        """
        free = (~self.going).nonzero()[:, 0]
        if self.waiting and len(free) * 8 >= len(self.going):
            free = free[: len(self.waiting)]
            taken = [self.waiting.pop() for _ in free]
            self.x[free] = self.cache.prefill([self.prompts[i] for i in taken], free)
            self.prompt[free] = _int64(taken, free.device)
            self.step[free] = 0
            self.going[free] = True
        elif len(free) * (2 if self.cache.graphs else 4) >= len(self.going):
            kept = self.going.nonzero()[:, 0]
            self.cache.keep_slots(kept)
            self.x, self.prompt = self.x[kept], self.prompt[kept]
            self.step, self.going = self.step[kept], self.going[kept]

    def advance(self, tokens, ended):
        """Frees the slots whose answer has ended; the others read their new token. tokens, ended (B,)"""
        self.going = self.going & ~ended
        self.prompt = self.prompt.where(self.going, len(self.prompts))
        self.step = (self.step + 1).where(self.going, 0)
        self.busy = bool(self.going.any())
        if self.busy:
            self.x = self.cache.step(tokens)
            self.cache.lengths.add_(1).mul_(self.going)  # in place: a recorded step reads it there


@torch.inference_mode()
def generate(
    policy,
    prompts,
    max_new_tokens,
    stop_ids,
    temperature=1.0,
    seed=0,
    numbers=None,
    batch_size=256,
    graphs=False,
):
    """Samples one answer per prompt; ids in, ids out, so that exactly what was sampled is scored later.

    prompts       list of id lists
    stop_ids      ids that end an answer and belong to it
    temperature   0 is greedy
    numbers       list of int, one per prompt: an answer depends on its prompt, seed and number alone, and on
                  no rank (model.sampling_uniforms); default 0, 1, 2 ...
    batch_size    answers decoded concurrently; a finished one makes room for the next prompt
    graphs        replay CUDA graphs (CUDA only): helps when launch overhead dominates a decoding step
    -> responses (list of id lists), truncated (list of bool: no stop token within max_new_tokens)
    Raises BadInput for a prompt without tokens. The same answers as model.generate_plainly.
    """
    require(all(prompts), "a prompt has no tokens; expected at least one")
    device, n = policy.grid.device, len(prompts)
    numbers = range(n) if numbers is None else numbers
    uniforms = sampling_uniforms(seed, [*numbers, -1], max_new_tokens).to(device)  # the last row: free slots
    tokens = torch.zeros(n + 1, max_new_tokens, dtype=torch.int64, device=device)
    lengths = torch.zeros(n + 1, dtype=torch.int64, device=device)
    stops = torch.tensor(stop_ids, device=device)
    slots = Slots(policy, prompts, min(batch_size, n), graphs)
    with reordered_weights(weights_by_input(policy)):
        while slots.waiting or slots.busy:
            slots.refill()
            logits = policy.logits(slots.x).float()  # (B, V/tp)
            logits = gather_shards(logits, 1, policy.cfg.vocab_size, policy.grid)  # (B, V)
            if temperature:
                probs = logits.div_(temperature).softmax(-1)
                new = sample_tokens(probs, uniforms[slots.prompt, slots.step])  # (B,)
            else:
                new = logits.argmax(-1)
            tokens[slots.prompt, slots.step] = new
            lengths[slots.prompt] = slots.step + 1
            slots.advance(new, torch.isin(new, stops) | (slots.step + 1 == max_new_tokens))
    responses = [row[:length] for row, length in zip(tokens[:n].tolist(), lengths.tolist())]
    return responses, [response[-1] not in stop_ids for response in responses]


# -------------------------------------------------------------------------------- reordered weights


def _reordered_dtypes():
    """The dtypes that this processor and this torch multiply in oneDNN's own layout."""
    has_avx = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    mkldnn = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and has_avx and hasattr(mkldnn, "_reorder_linear_weight")):
        return ()
    return (torch.float32, torch.bfloat16) if mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)


REORDERED = _reordered_dtypes()


def weights_by_input(policy):
    """[[weights that multiply the same x]]: q, k and v together, gate and up, every other one alone."""
    groups = [[policy.head_weight]]
    for block in policy.model.layers:
        attention, mlp = block.self_attn, block.mlp
        q, k, v = (proj.weight for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
        # One rounding with a bias needs a product of its own, and so does a slice of a whole k (my_rows).
        apart = attention.q_proj.bias is not None or attention.k_proj.cut is None
        groups += [[q], [k], [v]] if apart else [[q, k, v]]
        groups += [
            [attention.o_proj.weight],
            [mlp.gate_proj.weight, mlp.up_proj.weight],
            [mlp.down_proj.weight],
        ]
    return groups


@contextlib.contextmanager
def reordered_weights(groups, at_least=2**16):
    """Inside, parallel.linear multiplies by a copy of these weights in the memory layout of oneDNN's kernels.

    F.linear reorders the matrix at each call, which for 2 to 16 rows of x can cost as much as the product.
    groups     lists of weights that multiply the same x, in this order: they become one product
    at_least   numbers that every weight of a group must have
    Only fp32 and bf16 matrices on the CPU are copied, which doubles their memory; they must not change
    inside. Elsewhere (CUDA, other processors, a torch without these operations) this does nothing.
    """
    marked = []
    try:
        for group in groups:
            if all(w.device.type == "cpu" and w.dtype in REORDERED and w.numel() >= at_least for w in group):
                product = _ReorderedProduct(group)
                for place, weight in enumerate(group):
                    weight.fast_product = partial(product, place)
                    marked.append(weight)
        yield
    finally:
        for weight in marked:
            del weight.fast_product


class _ReorderedProduct:
    """x times several matrices at once, when the first one is asked for; the others find theirs computed."""

    def __init__(self, weights):
        matrix = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(matrix)
        self.sizes = [len(w) for w in weights]
        self.x, self.parts = None, []

    def __call__(self, place, x, bias):
        if len(self.sizes) == 1:
            return self.product(x, bias)
        if x is not self.x:
            self.x, self.parts = x, self.product(x, None).split(self.sizes, -1)
        y = self.parts[place]
        if place == len(self.sizes) - 1:
            self.x, self.parts = None, []  # or a prompt's would stay in memory, layer by layer
        return y if bias is None else y + bias

    def product(self, x, bias):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")
