"""A LLaMA-style decoder with Hugging Face's parameter names, its two heads, sampling, and safetensors in and out.

    residual stream x (B, T, D) ─► [RMSNorm ─ attention ─ +] ─► [RMSNorm ─ SwiGLU ─ +] ... ─► RMSNorm ─┬► lm_head: logits
                                                                                                      └► score:   Z

B batch · T positions · D model width · H query heads · K key/value heads · E head width · F hidden · V vocabulary
L layers · S cache columns · N response tokens; a size that is cut over tp is written as a fraction: H/tp
"""

import copy
import json
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from parallel import (
    ColumnLinear,
    KeyValueLinear,
    LoRALinear,
    RowLinear,
    VocabEmbedding,
    all_reduce,
    check_divisible,
    copy_to_tp,
    gather_shards,
    linear,
    reduce_from_tp,
    shard_dim,
    shard_range,
    vocab_log_softmax,
    vocab_pick,
    vocab_sum,
)
from support.files import BadInput, write_atomically

# ------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rule for longer contexts; the names are those of config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """The architecture; fields are named as in Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # E
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048
    model_type: str = "llama"  # or "qwen2": the same block with biases on q, k and v

    @classmethod
    def from_dict(cls, raw):
        """From config.json as transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) writes it.

        Raises BadInput with one line for anything that this code would get wrong silently.
        """
        kind = raw.get("model_type")
        if kind not in ("llama", "qwen2"):
            raise BadInput(f"model_type {kind!r} is not supported; expected 'llama' or 'qwen2'")
        if raw.get("quantization_config"):
            raise BadInput("the weights are quantised; expected bf16, fp16 or fp32 weights")
        if raw.get("hidden_act", "silu") != "silu":
            raise BadInput(f"hidden_act {raw['hidden_act']!r} is not supported; expected 'silu'")
        biased = raw.get("mlp_bias") or (kind == "llama" and raw.get("attention_bias"))
        if biased or raw.get("use_sliding_window"):
            raise BadInput(
                "mlp_bias, attention_bias and use_sliding_window are not supported; expected false"
            )
        rope = {
            "rope_theta": raw.get("rope_theta", 10000.0),
            **(raw.get("rope_parameters") or raw.get("rope_scaling") or {}),
        }
        rule = rope.get("rope_type", rope.get("type", "default"))
        if rule not in ("default", "llama3"):
            raise BadInput(f"RoPE type {rule!r} is not supported; expected 'default' or 'llama3'")
        try:
            heads = int(raw["num_attention_heads"])
            scaling = (
                RopeScaling(**{k: number(rope[k]) for k, number in RopeScaling.__annotations__.items()})
                if rule == "llama3"
                else None
            )
            cfg = cls(
                int(raw["vocab_size"]),
                int(raw["hidden_size"]),
                int(raw["intermediate_size"]),
                int(raw["num_hidden_layers"]),
                heads,
                int(raw.get("num_key_value_heads") or heads),
                int(raw.get("head_dim") or raw["hidden_size"] // heads),
                float(raw.get("rms_norm_eps", 1e-6)),
                float(rope["rope_theta"]),
                scaling,
                bool(raw.get("tie_word_embeddings", False)),
                int(raw.get("max_position_embeddings", 2048)),
                kind,
            )
        except (KeyError, TypeError, ValueError, ArithmeticError) as e:
            raise BadInput(f"a field is missing or not a number: {e}") from None
        sizes = (
            cfg.vocab_size,
            cfg.hidden_size,
            cfg.intermediate_size,
            cfg.num_hidden_layers,
            heads,
            cfg.num_key_value_heads,
            cfg.head_dim,
        )
        if not all(0 < size < 2**24 for size in sizes):
            raise BadInput(f"found sizes {sizes}, expected them to be positive and below 2^24")
        if not all(
            0 < x < float("inf")
            for x in (cfg.rms_norm_eps, cfg.rope_theta, *(asdict(scaling).values() if scaling else ()))
        ):
            raise BadInput("rms_norm_eps and the numbers of RoPE must be positive and finite")
        if scaling and scaling.low_freq_factor >= scaling.high_freq_factor:
            raise BadInput("low_freq_factor must be below high_freq_factor")
        if heads % cfg.num_key_value_heads or cfg.head_dim % 2:
            raise BadInput(
                f"{heads} heads with {cfg.num_key_value_heads} key/value heads of width {cfg.head_dim}: expected "
                "query heads in equal groups, and an even width"
            )
        return cfg

    def to_dict(self, head):
        """config.json for a model with head "lm" or "score", readable by transformers 4 and 5."""
        family = {"llama": "Llama", "qwen2": "Qwen2"}[self.model_type]
        out = {
            "architectures": [f"{family}{'ForCausalLM' if head == 'lm' else 'ForTokenClassification'}"],
            "hidden_act": "silu",
        }
        out |= {k: v for k, v in asdict(self).items() if k != "rope_scaling"}
        if self.rope_scaling:
            out["rope_scaling"] = {"rope_type": "llama3", **asdict(self.rope_scaling)}
        if (
            head == "score"
        ):  # transformers counts labels by id2label, and would drop out 10 % without the last entry
            out |= {"num_labels": 1, "id2label": {"0": "Z"}, "label2id": {"Z": 0}, "classifier_dropout": 0.0}
            out["tie_word_embeddings"] = False
        return out


# ------------------------------------------------------------------------------------------------ the block, bottom up


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    # exercise 1.1 (3 lines): RMSNorm
    def forward(self, x):
        x32 = x.float()
        y = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)  # (..., D)
        return self.weight * y.to(x.dtype)


# exercise 1.2 (8 lines): the angles of RoPE, with Llama 3.1's scaling
@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept must be fit for training, whoever asks first
def rope_frequencies(cfg, device=torch.device("cpu")):
    """Angles per position (radians), (E/2,) fp32: theta^(-2i/E), after Llama 3.1's scaling where the config asks for it.

    With wavelength w = 2 pi / f, old length C and factors low, high: w < C/high keeps f, w > C/low divides it by
    `factor`, and between them the two are blended linearly in C/w. Wrong values are invisible on short texts.
    """
    i = torch.arange(0, cfg.head_dim, 2, dtype=torch.float64)
    freqs = cfg.rope_theta ** (-i / cfg.head_dim)  # (E/2,)
    if cfg.rope_scaling:
        s = cfg.rope_scaling
        turns = (
            s.original_max_position_embeddings * freqs / (2 * torch.pi)
        )  # C/w, turns within the old length
        keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / s.factor
    return freqs.float().to(device)


def rope_table(positions, cfg):
    """positions (B or 1, T) int64 -> cos, sin, each (B or 1, T, 1, E/2) fp32"""
    angles = positions.unsqueeze(-1) * rope_frequencies(cfg, positions.device)  # (B, T, E/2)
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


# exercise 1.3 (2 lines): RoPE turns queries and keys
def apply_rope(x, cos, sin):
    """Rotates pair (i, i + E/2) of each head by its angle: Hugging Face's "rotate half" layout. x (B, T, H, E)"""
    a, b = x.chunk(2, dim=-1)  # (B, T, H, E/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# Who attends to whom is not the block's business: an `attend(layer, q, k, v) -> y` is handed down to it. There are three:
# causal_attention (padded rows, the plain one), Packed.attend (training) and KVCache.attend (sampling).
# exercise 1.4 (2 lines): causal attention with grouped heads
def causal_attention(layer, q, k, v):
    """Every row of its own, each token to itself and those before it; H/K neighbouring query heads share a kv head.
    q (B, T, H/tp, E), k, v (B, T, K/tp, E) -> as q"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)


@lru_cache
def compiled_flex():
    """torch's FlexAttention as one kernel, compiled once for rows of any length."""
    return torch.compile(flex_attention, dynamic=True)


class Packed:
    """Real tokens only, each once: prompts and their responses one behind another in a single row, without pads.

        ids         p0 p1 p2 | w3 w4 w5 | l3 l4 | q0 q1 | w2 ...     a prompt, its responses, the next prompt ...
        positions   0  1  2  | 3  4  5  | 3  4  | 0  1  | 2 ...      each response goes on from the prompt's end,
                                                                     and sees the prompt and itself, not its siblings
    ids, positions    (1, N) int64
    states, actions   (n,) int64: where in N the tokens stand that end s_t and that are a_t, for all n response tokens in
                      reading order, i.e. in the order of x[response_mask]
    """

    flex = False  # use torch's FlexAttention, one kernel for the whole row (CUDA; elsewhere it is slow and has no backward)

    def __init__(self, groups, device):
        """groups: list of (prompt ids, [response ids, ...]), all lists of int"""
        ids, positions, states, actions, self.lengths, self.buckets = [], [], [], [], [], {}
        for prompt, responses in groups:
            p, before = (
                len(self.lengths),
                len(ids) + len(prompt) - 1,
            )  # `before` ends the first state of each response
            ids += prompt
            positions += range(len(prompt))
            self.lengths.append(len(prompt))
            for response in responses:
                places = range(len(ids), len(ids) + len(response))
                actions += places
                states += [before, *places][: len(response)]
                self.buckets.setdefault((len(prompt), len(response)), []).append(
                    (p, len(self.lengths))
                )  # pieces of a sequence
                ids += response
                positions += range(len(prompt), len(prompt) + len(response))
                self.lengths.append(len(response))
        self.ids, self.positions = (
            torch.tensor([x], dtype=torch.int64, device=device) for x in (ids, positions)
        )
        self.states, self.actions = (
            torch.tensor(x, dtype=torch.int64, device=device) for x in (states, actions)
        )

    @classmethod
    def of(cls, ids, response_mask):
        """From padded rows, ids (B, T+1), response_mask (B, T); neighbouring rows with the same prompt share it."""
        groups = []
        for row, mask in zip(ids.tolist(), response_mask.tolist()):
            n = sum(mask)
            start = mask.index(True) + 1 if n else 1
            if not groups or groups[-1][0] != row[:start]:
                groups.append((row[:start], []))
            groups[-1][1].append(row[start : start + n])
        return cls(groups, ids.device)

    @cached_property
    def block_mask(self):
        """For FlexAttention: token i sees token j of its own piece (a prompt or a response) and of its prompt, up to i."""
        piece = (
            torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths)).to(self.ids.device)
        )
        prompt = torch.arange(len(self.lengths))
        for p, r in (place for places in self.buckets.values() for place in places):
            prompt[r] = p
        prompt = prompt.to(self.ids.device)

        def sees(batch, head, i, j):
            return (j <= i) & ((piece[j] == piece[i]) | (piece[j] == prompt[piece[i]]))

        return create_block_mask(sees, None, None, len(piece), len(piece), device=self.ids.device)

    def attend(self, layer, q, k, v):
        """One causal call for all sequences (prompt + response) of equal lengths: no mask, so nothing is computed twice but
        the prompt's part of a second response. q (1, N, H/tp, E), k, v (1, N, K/tp, E) -> as q"""
        if self.flex:
            kernel = compiled_flex() if q.is_cuda else flex_attention
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return kernel(q, k, v, block_mask=self.block_mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(
                1, 2
            )
        q, k, v = (x[0].split(self.lengths) for x in (q, k, v))
        out = [None] * len(self.lengths)
        for lengths, places in self.buckets.items():
            rows = (
                torch.cat([x[i] for place in places for i in place]).view(
                    len(places), sum(lengths), *x[0].shape[1:]
                )
                for x in (q, k, v)
            )
            y = causal_attention(layer, *rows)  # (sequences, P + R, H/tp, E)
            for (p, r), *parts in zip(places, *y.split(lengths, 1)):
                out[p], out[r] = parts
        return torch.cat(out)[None]


class Attention(nn.Module):
    """Grouped-query attention; heads are cut over tp."""

    def __init__(self, cfg, grid):
        super().__init__()
        self.grid, self.head_dim, bias = grid, cfg.head_dim, cfg.model_type == "qwen2"
        self.q_proj = ColumnLinear(cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim, grid, bias)
        self.k_proj = KeyValueLinear(cfg.hidden_size, cfg.num_key_value_heads, cfg.head_dim, grid, bias)
        self.v_proj = KeyValueLinear(cfg.hidden_size, cfg.num_key_value_heads, cfg.head_dim, grid, bias)
        self.o_proj = RowLinear(cfg.num_attention_heads * cfg.head_dim, cfg.hidden_size, grid)

    # exercise 1.5 (4 lines): the attention sub-layer, cut over tp
    def forward(self, x, rope, layer, attend):
        """q, k and v of each head, q and k rotated, handed to `attend(layer, q, k, v)`, and its answer to o_proj.

        x (B, T, D), rope (cos, sin) of rope_table; attend takes q (B, T, H/tp, E), k, v (B, T, K/tp, E) -> (B, T, D)
        """
        x = copy_to_tp(x, self.grid)  # f, once for q, k and v
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = attend(
            layer, apply_rope(q, *rope), apply_rope(k, *rope), v
        )  # (B, T, H/tp, E); k, v (B, T, K/tp, E)
        return reduce_from_tp(self.o_proj(y.flatten(2)), self.grid)  # g


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)); the hidden units are cut over tp."""

    def __init__(self, cfg, grid):
        super().__init__()
        self.grid = grid
        self.gate_proj = ColumnLinear(cfg.hidden_size, cfg.intermediate_size, grid)
        self.up_proj = ColumnLinear(cfg.hidden_size, cfg.intermediate_size, grid)
        self.down_proj = RowLinear(cfg.intermediate_size, cfg.hidden_size, grid)

    # exercise 1.6 (3 lines): SwiGLU, cut over tp
    def forward(self, x):
        x = copy_to_tp(x, self.grid)  # f, once for gate and up
        y = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, F/tp)
        return reduce_from_tp(self.down_proj(y), self.grid)  # g


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): two all-reduces forward and two backward under tp."""

    def __init__(self, cfg, grid):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, grid)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg, grid)

    def forward(self, x, *context):
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm. `forward` returns the residual stream BEFORE the final norm: the heads apply it,
    because the fused Q-RM head wants the norm, the head and the loss in one piece."""

    remat = False  # trade time for memory: see forward

    def __init__(self, cfg, grid):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = VocabEmbedding(cfg.vocab_size, cfg.hidden_size, grid)
        self.layers = nn.ModuleList(Block(cfg, grid) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, ids, positions=None, attend=causal_attention):
        """ids (B, T) int64, positions (B or 1, T) int64 (from 0, if none are given) -> (B, T, D)"""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rope = rope_table(positions, self.cfg)
        x = self.embed_tokens(ids)  # (B, T, D)
        for i, layer in enumerate(self.layers):
            if (
                self.remat and torch.is_grad_enabled()
            ):  # keeps x alone, and computes the block again in backward
                x = checkpoint(layer, x, rope, i, attend, use_reentrant=False)
            else:
                x = layer(x, rope, i, attend)
        return x


# ------------------------------------------------------------------------------------------------ two heads


class _Model(nn.Module):
    """A decoder and a head; knows how its parameters are cut (parallel.shard_dim)."""

    head = None

    def __init__(self, cfg, grid):
        super().__init__()
        check_divisible(grid.tp_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.intermediate_size)
        self.cfg, self.grid, self.model = cfg, grid, Decoder(cfg, grid)

    def shard_dim(self, name):
        return shard_dim(name, self.cfg.num_key_value_heads, self.grid.tp_size)

    def full_size(self, name):
        """Extent of a parameter along its sharded dimension in the whole model."""
        c, layer = self.cfg, name.split(".")[-2]
        return {
            "q_proj": c.num_attention_heads * c.head_dim,
            "o_proj": c.num_attention_heads * c.head_dim,
            "k_proj": c.num_key_value_heads * c.head_dim,
            "v_proj": c.num_key_value_heads * c.head_dim,
            "embed_tokens": c.vocab_size,
            "lm_head": c.vocab_size,
        }.get(layer, c.intermediate_size)

    def my_slice(self, name, full):
        """This rank's part of the whole tensor (or of a safetensors slice, which then reads only that part)."""
        dim = self.shard_dim(name)
        if dim is None:
            return full[:]
        start, stop = shard_range(self.full_size(name), self.grid.tp_rank, self.grid.tp_size)
        return full[start:stop] if dim == 0 else full[:, start:stop]

    def gather(self, name, mine):
        """The inverse of `my_slice`, on the main rank's CPU; the others, which must call it too, get an empty tensor."""
        whole = gather_shards(mine, self.shard_dim(name), self.full_size(name), self.grid)
        return whole.cpu().contiguous() if self.grid.is_main else whole.new_empty(0)

    def full_shape(self, name, shape):
        dim = self.shard_dim(name)
        return (
            tuple(shape)
            if dim is None
            else tuple(self.full_size(name) if d == dim else s for d, s in enumerate(shape))
        )


class LanguageModel(_Model):
    """A policy: LlamaForCausalLM."""

    head = "lm"

    def __init__(self, cfg, grid):
        super().__init__(cfg, grid)
        if not cfg.tie_word_embeddings:
            self.lm_head = ColumnLinear(cfg.hidden_size, cfg.vocab_size, grid)

    @property
    def head_weight(self):
        """This rank's rows of the output matrix, (V/tp, D)."""
        return self.model.embed_tokens.weight if self.cfg.tie_word_embeddings else self.lm_head.weight

    def logits(self, x):
        """Residual stream (..., D) -> this rank's logits (..., V/tp)."""
        return linear(copy_to_tp(self.model.norm(x), self.grid), self.head_weight)  # f


class ScalarModel(_Model):
    """A reward model or a critic: one number a position. LlamaForTokenClassification with one label and a zero bias."""

    head = "score"

    def __init__(self, cfg, grid):
        super().__init__(cfg, grid)
        self.score = nn.Linear(cfg.hidden_size, 1, bias=False)

    def scalars(self, x):
        """Residual stream (..., D) -> (...) fp32: head and norm are the same on every tp rank."""
        return F.linear(self.model.norm(x).float(), self.score.weight.float()).squeeze(-1)


def at_states(model, ids, response_mask):
    """Residual stream (n, D) where s_t has been read and a_t has not, for every response token in reading order."""
    packed = Packed.of(ids, response_mask)
    return model.model(packed.ids, packed.positions, packed.attend)[0, packed.states]


def at_actions(model, ids, response_mask):
    """Residual stream (n, D) where a_t has been read, for every response token in reading order."""
    packed = Packed.of(ids, response_mask)
    return model.model(packed.ids, packed.positions, packed.attend)[0, packed.actions]


def in_place(response_mask, values):
    """(n,) numbers of the response tokens in reading order -> (B, T) in the place of targets, 0 outside the mask"""
    return torch.zeros(response_mask.shape, device=values.device, dtype=values.dtype).masked_scatter(
        response_mask, values
    )


LOGITS = 3 * 2**22  # in memory at a time, of a rank


def rows_at_a_time(policy):
    """Tokens whose logits are made together: the same number on every rank, though their slices of the vocabulary may differ."""
    return max(1, LOGITS // -(-policy.cfg.vocab_size // policy.grid.tp_size))


def _product(x, weight, out):
    """x weight^T in fp32, into `out`."""
    return torch.mm(x, weight.T, out=out) if x.dtype == out.dtype else out.copy_(x @ weight.T)


class _TokenLogprobs(torch.autograd.Function):
    """See token_logprobs. Logits are made for `rows` tokens at a time, and again in backward: only their log-sum is kept."""

    @staticmethod
    def forward(ctx, x, weight, targets, temperature, vocab_size, grid, rows):
        start, stop = shard_range(vocab_size, grid.tp_rank, grid.tp_size)
        mine, places = (targets >= start) & (targets < stop), (targets - start).clamp(0, stop - start - 1)
        logits, probs = (
            x.new_empty(min(rows, len(x)), len(weight), dtype=torch.float32) for _ in range(2)
        )  # once: fresh memory is slow

        def some(x, place, own):
            l = _product(x, weight, logits[: len(x)]).div_(temperature)  # (rows, V/tp)
            top = all_reduce(l.amax(-1), grid.tp_group, dist.ReduceOp.MAX)
            l -= top[:, None]
            picked, p = l.gather(-1, place[:, None])[:, 0] * own, torch.exp(l, out=probs[: len(x)])
            total, weighted, picked = all_reduce(
                torch.stack([p.sum(-1), l.mul_(p).sum(-1), picked]), grid.tp_group
            )
            return torch.stack([picked - total.log(), total.log() - weighted / total, top + total.log()])

        logprobs, entropy, log_sum = torch.cat(
            list(map(some, x.split(rows), places.split(rows), mine.split(rows))), 1
        )  # (n,) each
        ctx.save_for_backward(x, weight, places, mine, log_sum)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        x, weight, places, mine, log_sum = ctx.saved_tensors
        dx, dw = (
            torch.empty_like(x),
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None,
        )
        logits = x.new_empty(min(ctx.rows, len(x)), len(weight), dtype=torch.float32)
        for i in range(0, len(x), ctx.rows):  # d logprob / d l_v = [v is the target] - softmax(l)_v
            part = slice(i, i + ctx.rows)
            g = (
                _product(x[part], weight, logits[: len(x[part])])
                .div_(ctx.temperature)
                .sub_(log_sum[part, None])
                .exp_()
            )
            scale = grad[part, None] / ctx.temperature
            g = g.mul_(-scale).scatter_add_(1, places[part, None], scale * mine[part, None]).to(x.dtype)
            torch.mm(g, weight, out=dx[part])
            if dw is not None:
                dw.addmm_(g.T, x[part]) if g.dtype == dw.dtype else dw.add_(g.T @ x[part])
        return dx, None if dw is None else dw.to(weight.dtype), None, None, None, None, None


def token_logprobs(policy, ids, response_mask, temperature=1.0, rows=0):
    """log pi(targets[:, t] | inputs[:, :t+1]) and the entropy of pi there, in nats.

    ids (B, T+1) int64, response_mask (B, T) bool -> logprobs, entropy: (B, T) fp32, 0 outside the mask.
    The entropy carries no gradient. Scores are taken at the temperature that the tokens were sampled at.
    `rows` tokens at a time are compared with the vocabulary; 0 takes as many as make 12 M logits. The plain way is
    response_log_softmax(...).gather(targets): with 128,256 words and 2,048 tokens 2 GB more.
    """
    x, targets = (
        copy_to_tp(policy.model.norm(at_states(policy, ids, response_mask)), policy.grid),
        ids[:, 1:][response_mask],
    )
    weight = policy.head_weight
    rows = rows or rows_at_a_time(policy)
    logprobs, entropy = _TokenLogprobs.apply(
        x, weight, targets, temperature, policy.cfg.vocab_size, policy.grid, rows
    )
    return in_place(response_mask, logprobs), in_place(response_mask, entropy)


def response_log_softmax(policy, ids, response_mask, temperature=1.0):
    """log pi(. | s_t) over the vocabulary at the response positions, the plain way: what token_logprobs is tested against.

    ids (B, T+1), response_mask (B, T) -> (N, V/tp) fp32 nats; N = response_mask.sum(), rows in reading order
    """
    x = policy.model(ids[:, :-1])[response_mask]  # (N, D): position t has read s_t
    return vocab_log_softmax(policy.logits(x).float() / temperature, policy.grid)


@torch.no_grad()
def exact_kl(policy, reference, ids, response_mask, temperature=1.0):
    """KL(pi || ref) at every state, summed over the vocabulary: (B, T+1), (B, T) -> (B, T) nats, 0 outside the mask"""
    states = [
        at_states(model, ids, response_mask).split(rows_at_a_time(policy)) for model in (policy, reference)
    ]
    out = []
    for xs in zip(*states):
        log_pi, log_ref = (
            vocab_log_softmax(m.logits(x).float() / temperature, m.grid)
            for m, x in zip((policy, reference), xs)
        )
        out.append(vocab_sum(log_pi.exp() * (log_pi - log_ref), policy.grid))  # (rows,)
    return in_place(response_mask, torch.cat(out))


def token_logits(policy, ids, response_mask):
    """The logit of targets[:, t] after inputs[:, :t+1]: (B, T+1) int64, (B, T) bool -> (B, T) fp32, 0 outside the mask"""
    logits = policy.logits(at_states(policy, ids, response_mask)).float()  # (n, V/tp)
    return in_place(
        response_mask, vocab_pick(logits, ids[:, 1:][response_mask], policy.cfg.vocab_size, policy.grid)
    )


# ------------------------------------------------------------------------------------------------ sampling


# exercise 1.7 (4 lines): sampling by the inverse CDF
def sample_tokens(probs, uniforms):
    """Inverse CDF with one uniform a row: exact, one pass, and the same on every rank that is handed the same numbers.

    probs (B, V) fp32, which need not sum to 1, uniforms (B,) in [0, 1) -> (B,) int64; a token of probability 0 is never drawn
    """
    cdf = probs.cumsum(-1)  # (B, V)
    height = uniforms[:, None] * cdf[:, -1:]
    height = torch.minimum(
        height, torch.nextafter(cdf[:, -1:], cdf.new_zeros(()))
    )  # rounding must not step past the end
    return (
        torch.searchsorted(cdf, height, right=True).squeeze(-1).clamp(max=cdf.shape[1] - 1)
    )  # a row of nan, too, gets an id


# ------------------------------------------------------------------------------------------------ weights


@torch.no_grad()
def init_weights(model, seed, only=""):
    """Normal weights of variance 1/fan_in; norms 1; biases, lora_B and the scalar head 0, so that a new one is neutral.

    Every matrix is drawn whole from (seed, its name) and then sliced: each tp size holds the same model.
    only   part of a name: all other parameters are left alone
    """
    for name, param in model.named_parameters():
        if only not in name:
            continue
        if "norm" in name:
            param.fill_(1.0)
        elif name.endswith(("bias", "lora_B")) or name.startswith("score"):
            param.zero_()
        else:
            shape = model.full_shape(name, param.shape)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))  # it reads 32 bits
            full = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            param.copy_(model.my_slice(name, full))
    return model


def add_lora(model, rank, seed, alpha=0):
    """A model to train that shares the weights of `model`, and has adapters on the seven linear layers of each block.

    Only the adapters and the scalar head learn; the first forward is that of `model`, which stays as it is: a frozen reference.
    alpha   the update is alpha/rank B A; 0 is the rank, so that the factor is 1 (the paper)
    """
    adapted = copy.deepcopy(
        model.requires_grad_(False), {id(x): x for x in (model.grid, *model.parameters())}
    )
    for layer in adapted.model.layers.modules():
        if isinstance(layer, LoRALinear):
            layer.add_lora(rank, alpha or rank)
    if adapted.head == "score":
        adapted.score.requires_grad_(True)
    return init_weights(adapted, seed, only="lora_")


def build_model(kind, cfg, grid, dtype=torch.float32):
    """An uninitialised LanguageModel or ScalarModel on the grid's device: made on the meta device, so nothing is filled twice."""
    with torch.device("meta"):
        model = kind(cfg, grid)
    return model.to(dtype).to_empty(device=grid.device)


def read_config(directory):
    """config.json of a model directory -> (ModelConfig, the raw dict); BadInput with one line if it cannot be used."""
    path = Path(directory) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise BadInput("expected a JSON object")
        return ModelConfig.from_dict(raw), raw
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        reason = (
            "no such file; expected a Hugging Face model directory" if isinstance(e, FileNotFoundError) else e
        )
        raise BadInput(f"{path}: {reason}") from None


def _weight_files(directory):
    """{tensor name: safetensors file}, from model.safetensors or the index of its shards; never outside the directory."""
    directory, index = Path(directory), Path(directory) / "model.safetensors.index.json"
    try:
        if index.exists():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if any(
                not isinstance(f, str) or Path(f).name != f or not f.isprintable() for f in names.values()
            ):
                raise BadInput("a shard lies outside the directory, or its name cannot be printed")
            return {name: directory / file for name, file in names.items()}
        index = directory / "model.safetensors"
        with safe_open(index, "pt") as f:
            return dict.fromkeys(f.keys(), index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as e:
        raise BadInput(f"{index}: not a readable safetensors file or index: {e}") from None


@torch.no_grad()
def load_model(kind, directory, grid, dtype=torch.float32):
    """A LanguageModel or ScalarModel from a Hugging Face directory; each rank reads only its slices.

    Strict: a missing, unexpected or misshapen tensor is a BadInput that names it. One exception, by design: a
    ScalarModel made from a language model drops `lm_head` and gets a new zero head (a reward model's start).
    """
    cfg, raw = read_config(directory)
    classes = str(raw.get("architectures"))
    from_lm = "ForCausalLM" in classes
    if not from_lm and (kind is LanguageModel or "ForTokenClassification" not in classes):
        raise BadInput(
            f"{directory}: config.json says {classes}; expected {'a language model' if kind is LanguageModel else 'a reward model'}"
        )
    files = _weight_files(directory)
    if cfg.num_hidden_layers > len(files):  # before so many are built
        raise BadInput(
            f"{directory}: config.json says {cfg.num_hidden_layers} layers, but there are {len(files)} tensors"
        )
    try:
        model = build_model(kind, cfg, grid, dtype)
    except RuntimeError as e:
        raise BadInput(f"{directory}: no memory for a model of the sizes in config.json: {e}") from None
    params = dict(model.named_parameters())
    optional = (
        {"lm_head.weight"}
        if from_lm and (kind is ScalarModel or cfg.tie_word_embeddings)
        else {"score.bias"} - params.keys()
    )
    new_head = {"score.weight"} if from_lm and kind is ScalarModel else set()
    missing, extra = params.keys() - files.keys() - new_head, files.keys() - params.keys() - optional
    if missing or extra:
        raise BadInput(
            f"{directory}: weights do not fit config.json; missing: {sorted(missing)[:3]}, unexpected: {sorted(extra)[:3]}"
        )
    for name in [n for n in (*params, "score.bias") if n in files]:
        try:  # opened anew for each tensor, for what was read of an open file counts as this process's memory
            with safe_open(files[name], "pt") as file:
                view = file.get_slice(name)
                if name == "score.bias":
                    if view[:].any():
                        raise BadInput(f"{files[name]}: score.bias is not zero; expected a head without bias")
                    continue
                expected = model.full_shape(name, params[name].shape)
                if tuple(view.get_shape()) != expected or view.get_dtype() not in (
                    "F32",
                    "F16",
                    "BF16",
                    "F64",
                ):
                    raise BadInput(
                        f"{files[name]}: {name} is {view.get_dtype()} {view.get_shape()}, expected floats {list(expected)}"
                    )
                params[name].copy_(model.my_slice(name, view))
                if not params[name].sum().isfinite():  # one pass, no copy
                    raise BadInput(f"{files[name]}: {name} has numbers that are not finite")
        except (OSError, SafetensorError) as e:
            raise BadInput(f"{files[name]}: cannot read {name}: {e}") from None
    if new_head:
        model.score.weight.zero_()
    return model


def _merged(model, name, param):
    layer, _, leaf = name.rpartition(".")
    layer = model.get_submodule(layer)
    return layer.merged() if leaf == "weight" and isinstance(layer, LoRALinear) else param


@torch.no_grad()
def save_model(model, directory, max_shard_bytes=5 * 10**9):
    """Writes config.json and safetensors shards in Hugging Face's layout: all ranks call it, the main one writes.

    The layout does not depend on tp: tensors are gathered one by one, and a shard is written as soon as it is full.
    Adapters are merged into their weights (and rounded to their dtype).
    """
    directory, grid = Path(directory), model.grid
    params = {n: p for n, p in model.named_parameters() if ".lora_" not in n}
    names = list(params)
    width = {
        n: torch.Size(model.full_shape(n, p.shape)).numel() * p.element_size() for n, p in params.items()
    }
    plan = [[]]  # names per shard
    for n in names:
        if plan[-1] and sum(width[m] for m in plan[-1]) + width[n] > max_shard_bytes:
            plan.append([])
        plan[-1].append(n)
    weight_map = {}
    for i, shard in enumerate(plan):
        file = "model.safetensors" if len(plan) == 1 else f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors"
        tensors = {n: model.gather(n, _merged(model, n, params[n])) for n in shard}
        if "score.weight" in tensors:
            tensors["score.bias"] = torch.zeros(1, dtype=tensors["score.weight"].dtype)
        weight_map |= dict.fromkeys(tensors, file)
        if grid.is_main:
            write_atomically(directory / file, tensors)
    if grid.is_main:
        index = directory / "model.safetensors.index.json"
        index.unlink(missing_ok=True)  # an older one would go before the new file
        if len(plan) > 1:
            write_atomically(
                index,
                json.dumps(
                    {"metadata": {"total_size": sum(width.values())}, "weight_map": weight_map}, indent=1
                ),
            )
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        write_atomically(
            directory / "config.json",
            json.dumps({**model.cfg.to_dict(model.head), "torch_dtype": dtype}, indent=1),
        )


@torch.no_grad()
def save_adapter(model, directory, base):
    """Writes the adapters, and the scalar head if there is one, as a PEFT directory: all ranks call it, the main one writes.

    base   the model directory that they were trained on, for adapter_config.json; the adapters belong on top of that one
    """
    tensors = {
        f"base_model.model.{n}{'.weight' * ('.lora_' in n)}": model.gather(n, p)
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    layers = {
        n.split(".")[-1]: layer
        for n, layer in model.model.layers.named_modules()
        if isinstance(layer, LoRALinear)
    }
    rank, scale, is_score = len(layers["q_proj"].lora_A), layers["q_proj"].lora_scale, model.head == "score"
    config = {
        "peft_type": "LORA",
        "task_type": "TOKEN_CLS" if is_score else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": round(scale * rank),
        "target_modules": sorted(layers),
        "modules_to_save": ["score"] if is_score else None,
    }
    if is_score:
        tensors["base_model.model.score.bias"] = torch.zeros(1, dtype=model.score.weight.dtype)
    if model.grid.is_main:
        write_atomically(directory / "adapter_model.safetensors", tensors)
        write_atomically(directory / "adapter_config.json", json.dumps(config, indent=1))
