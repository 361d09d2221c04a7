"""A LLaMA-style decoder with Hugging Face's parameter names, its two heads, and safetensors in and out.

    stream x (B, T, D) ─► [RMSNorm ─ attention ─ +] ─► [RMSNorm ─ SwiGLU ─ +] ... ─► RMSNorm ─┬► lm_head
                                                                                             └► score: Z

B batch · T positions · D model width · H query heads · K key/value heads · E head width · F hidden
V vocabulary · L layers · N tokens of a packed row · n response tokens
x is the residual stream; a sharded size is written as a fraction: H/tp
"""

import copy
import json
import math
import zlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
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
    ParallelLinear,
    RowLinear,
    VocabEmbedding,
    add_lora_factors,
    all_reduce,
    check_divisible,
    copy_to_tp,
    gather_shards,
    linear,
    merged_weight,
    reduce_from_tp,
    shard_range,
    vocab_log_softmax,
    vocab_pick,
    vocab_sum,
)
from support.files import BadInput, read_json, require, write_atomically

# -------------------------------------------------------------------------------- configuration


DEFAULTS = {  # what transformers assumes where config.json lacks a key; None: as many as query heads
    "llama": {"kv_heads": None, "positions": 2048},
    "qwen2": {"kv_heads": 32, "positions": 32768},
}


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
        """From config.json as transformers 4 (`rope_scaling`) or 5 (`rope_parameters`) writes it.

        Raises BadInput for anything that this code would silently get wrong.
        """
        _require_supported(raw)
        rope = {"rope_theta": raw.get("rope_theta", 10000.0), **_rope_fields(raw)}
        rule = rope.get("rope_type", rope.get("type", "default"))
        require(
            rule in ("default", "llama3"),
            f"RoPE type {rule!r} is not supported; expected 'default' or 'llama3'",
        )
        absent = DEFAULTS[raw["model_type"]]
        try:
            heads = int(raw["num_attention_heads"])
            cfg = cls(
                vocab_size=int(raw["vocab_size"]),
                hidden_size=int(raw["hidden_size"]),
                intermediate_size=int(raw["intermediate_size"]),
                num_hidden_layers=int(raw["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(raw.get("num_key_value_heads", absent["kv_heads"]) or heads),
                head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope_theta=float(rope["rope_theta"]),
                rope_scaling=_rope_scaling(rope) if rule == "llama3" else None,
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                max_position_embeddings=int(raw.get("max_position_embeddings", absent["positions"])),
                model_type=raw["model_type"],
            )
        except (KeyError, TypeError, ValueError, ArithmeticError) as e:
            raise BadInput(f"a field is missing or not a number: {e}") from None
        cfg.require_sane()
        return cfg

    def require_sane(self):
        """BadInput unless the sizes are positive and fit each other."""
        sizes = (
            self.vocab_size,
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
        )
        require(
            all(0 < size < 2**24 for size in sizes),
            f"found sizes {sizes}, expected them to be positive and below 2^24",
        )
        scaling = self.rope_scaling
        numbers = [self.rms_norm_eps, self.rope_theta, *(asdict(scaling).values() if scaling else ())]
        require(
            all(0 < x < float("inf") for x in numbers),
            "rms_norm_eps and the numbers of RoPE must be positive and finite",
        )
        require(
            scaling is None or scaling.low_freq_factor < scaling.high_freq_factor,
            "low_freq_factor must be below high_freq_factor",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0 and self.head_dim % 2 == 0,
            f"{self.num_attention_heads} heads with {self.num_key_value_heads} key/value heads of width "
            f"{self.head_dim}: expected query heads in equal groups, and an even width",
        )

    def to_dict(self, head):
        """config.json for a model with head "lm" or "score", readable by transformers 4 and 5."""
        family = {"llama": "Llama", "qwen2": "Qwen2"}[self.model_type]
        task = "ForCausalLM" if head == "lm" else "ForTokenClassification"
        out = {"architectures": [family + task], "hidden_act": "silu", **asdict(self)}
        del out["rope_scaling"]
        if self.rope_scaling:
            out["rope_scaling"] = {"rope_type": "llama3", **asdict(self.rope_scaling)}
        if head == "score":
            # transformers counts the labels by id2label, and its default dropout is 10 %
            out |= {"num_labels": 1, "id2label": {"0": "Z"}, "label2id": {"Z": 0}, "classifier_dropout": 0.0}
            out["tie_word_embeddings"] = False
        return out


def _require_supported(raw):
    """BadInput for a config.json that describes another architecture."""
    model_type = raw.get("model_type")
    require(
        model_type in ("llama", "qwen2"),
        f"model_type {model_type!r} is not supported; expected 'llama' or 'qwen2'",
    )
    require(
        not raw.get("quantization_config"), "the weights are quantised; expected bf16, fp16 or fp32 weights"
    )
    activation = raw.get("hidden_act", "silu")
    same = ("silu", "swish")  # two names in transformers
    require(activation in same, f"hidden_act {activation!r} is not supported; expected 'silu'")
    biased = raw.get("mlp_bias") or (model_type == "llama" and raw.get("attention_bias"))
    require(
        not biased and not raw.get("use_sliding_window"),
        "mlp_bias, attention_bias and use_sliding_window are not supported; expected false",
    )
    require(raw.get("is_causal") in (None, True), "is_causal is false: not a language model; expected true")
    named = raw.get("transformers_weights")
    require(
        not named,
        f"transformers_weights names {str(named)[:60]!r}; rename that file to model.safetensors"
        " and delete the key",
    )


def _rope_fields(raw):
    """The object that describes RoPE, under its old or its new name; {} if there is none.

    If both exist, the old one wins; a length before scaling outside of it wins over the one inside, and
    without either it is max_position_embeddings: as in transformers.
    """
    fields = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    require(isinstance(fields, dict), f"rope_scaling is {str(fields)[:40]!r}; expected an object")
    part = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    require(part in (None, 1), f"partial_rotary_factor {part!r} is not supported; expected 1")
    length = "original_max_position_embeddings"
    outside = {length: raw[length]} if length in raw else {}
    return {length: raw.get("max_position_embeddings"), **fields, **outside}


def _rope_scaling(rope):
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


# -------------------------------------------------------------------------------- the block


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    # exercise 1.1 (1 point): RMSNorm
    def forward(self, x):
        """x (..., D) of any float dtype -> the same; mean over D and eps inside the root, in fp32."""
        x32 = x.float()
        y = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)  # (..., D)
        return self.weight * y.to(x.dtype)


# exercise 1.2 (3 points): the angles of RoPE, with Llama 3.1's scaling
@lru_cache(maxsize=16)
@torch.inference_mode(False)  # never cache an inference tensor, even if sampling asks first
def rope_frequencies(cfg, device=torch.device("cpu")):
    """Radians per position, (E/2,) fp32: theta^(-2i/E), with Llama 3.1's scaling if the config has it.

    With wavelength w = 2 pi / f, old length C and factors low, high: w < C/high keeps f, w > C/low divides it
    by `factor`, and in between the two are interpolated linearly in C/w. Short texts do not reveal a mistake.
    The result is fp32, whatever it is computed in.
    """
    i = torch.arange(0, cfg.head_dim, 2, dtype=torch.float64)
    freqs = cfg.rope_theta ** (-i / cfg.head_dim)  # (E/2,)
    if cfg.rope_scaling:
        s = cfg.rope_scaling
        turns = s.original_max_position_embeddings * freqs / (2 * torch.pi)  # C/w, within the old length
        kept = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        freqs = kept * freqs + (1 - kept) * freqs / s.factor
    return freqs.float().to(device)


def rope_table(positions, cfg):
    """positions (B or 1, T) int64 -> cos, sin, each (B or 1, T, 1, E/2) fp32"""
    angles = positions.unsqueeze(-1) * rope_frequencies(cfg, positions.device)  # (B, T, E/2)
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


# exercise 1.3 (2 points): RoPE turns queries and keys
def apply_rope(x, cos, sin):
    """Rotates pair (i, i + E/2) of each head: Hugging Face's "rotate half" layout. x (B, T, H, E)

    The result has the dtype of x, whatever that of cos and sin.
    """
    a, b = x.chunk(2, dim=-1)  # (B, T, H, E/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# The caller decides who attends to whom, and passes in `attend(layer, q, k, v) -> y`. There are three:
# causal_attention (padded rows, the plain one), Packed.attend (training) and KVCache.attend (sampling).
# exercise 1.4 (2 points): causal attention with grouped heads
def causal_attention(layer, q, k, v):
    """Each token of a row sees itself and the past; H/K neighbouring query heads share a key/value head.

    q (B, T, H/tp, E), k, v (B, T, K/tp, E) -> (B, T, H/tp, E)
    Scores are q . k / sqrt(E).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, E)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention; heads are cut over tp."""

    def __init__(self, cfg, grid):
        super().__init__()
        self.grid, self.head_dim = grid, cfg.head_dim
        bias = cfg.model_type == "qwen2"
        self.q_proj = ColumnLinear(cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim, grid, bias)
        self.k_proj = KeyValueLinear(cfg.hidden_size, cfg.num_key_value_heads, cfg.head_dim, grid, bias)
        self.v_proj = KeyValueLinear(cfg.hidden_size, cfg.num_key_value_heads, cfg.head_dim, grid, bias)
        self.o_proj = RowLinear(cfg.num_attention_heads * cfg.head_dim, cfg.hidden_size, grid)

    # exercise 1.5 (3 points): the attention sub-layer, cut over tp
    def forward(self, x, rope, layer, attend):
        """Projects x to q, k and v, rotates q and k, lets `attend(layer, q, k, v)` mix, and applies o_proj.

        x (B, T, D), rope (cos, sin) of rope_table -> (B, T, D)
        attend takes the number `layer`, q (B, T, H/tp, E), k, v (B, T, K/tp, E) and returns q's shape
        x goes through copy_to_tp once, before the projections, and the result through reduce_from_tp once.
        """
        x = copy_to_tp(x, self.grid)  # f, once for q, k and v
        features = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, heads * E)
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in features)  # (B, T, H/tp or K/tp, E)
        y = attend(layer, apply_rope(q, *rope), apply_rope(k, *rope), v)  # (B, T, H/tp, E)
        return reduce_from_tp(self.o_proj(y.flatten(2)), self.grid)  # g


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)); the hidden units are cut over tp."""

    def __init__(self, cfg, grid):
        super().__init__()
        self.grid = grid
        self.gate_proj = ColumnLinear(cfg.hidden_size, cfg.intermediate_size, grid)
        self.up_proj = ColumnLinear(cfg.hidden_size, cfg.intermediate_size, grid)
        self.down_proj = RowLinear(cfg.intermediate_size, cfg.hidden_size, grid)

    # exercise 1.6 (2 points): SwiGLU, cut over tp
    def forward(self, x):
        """x (B, T, D) -> (B, T, D)

        x goes through copy_to_tp once, before the projections, and the result through reduce_from_tp once.
        """
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

    def forward(self, x, rope, layer, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, layer, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm.

    `forward` returns the residual stream BEFORE the final norm: the heads apply it, because the fused Q-RM
    head wants the norm, the head and the loss in one piece.

    remat   keep only each block's input, and recompute the block in backward: less memory, more time
    """

    def __init__(self, cfg, grid, remat=False):
        super().__init__()
        self.cfg, self.remat = cfg, remat
        self.embed_tokens = VocabEmbedding(cfg.vocab_size, cfg.hidden_size, grid)
        self.layers = nn.ModuleList(Block(cfg, grid) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, ids, positions=None, attend=causal_attention):
        """ids (B, T) int64, positions (B or 1, T) int64 (None: 0, 1, 2, ...) -> (B, T, D)"""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rope = rope_table(positions, self.cfg)
        x = self.embed_tokens(ids)  # (B, T, D)
        for i, layer in enumerate(self.layers):
            if self.remat and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, i, attend, use_reentrant=False)
            else:
                x = layer(x, rope, i, attend)
        return x


# -------------------------------------------------------------------------------- two heads


class _Model(nn.Module):
    """A decoder and a head.

    flex    packed rows use torch's FlexAttention, one kernel for the whole row (CUDA; on the CPU it is
            slow and has no backward)
    remat   see Decoder
    """

    head = None

    def __init__(self, cfg, grid, flex=False, remat=False):
        super().__init__()
        check_divisible(grid.tp_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.intermediate_size)
        self.cfg, self.grid, self.flex = cfg, grid, flex
        self.model = Decoder(cfg, grid, remat)

    def sharding(self, name):
        """How a parameter is cut over tp, as its layer tells -> (dimension, its full extent there).

        (None, None) for a parameter of a layer that is not cut at all, such as a norm or the scalar head.
        """
        path, _, leaf = name.rpartition(".")
        layer = self.get_submodule(path)
        return layer.sharding(leaf) if hasattr(layer, "sharding") else (None, None)

    def my_slice(self, name, full):
        """This rank's part of a whole tensor (of a safetensors slice, of which only this part is read)."""
        dim, extent = self.sharding(name)
        if dim is None:
            return full[:]
        start, stop = shard_range(extent, self.grid.tp_rank, self.grid.tp_size)
        return full[start:stop] if dim == 0 else full[:, start:stop]

    def gather(self, name, mine):
        """The inverse of `my_slice`, on the main rank's CPU. All ranks call it; others get an empty one."""
        whole = gather_shards(mine, *self.sharding(name), self.grid)
        return whole.cpu().contiguous() if self.grid.is_main else whole.new_empty(0)

    def full_shape(self, name, shape):
        """Shape of the whole parameter, of which this rank holds a slice of `shape`."""
        dim, extent = self.sharding(name)
        shape = list(shape)
        if dim is not None:
            shape[dim] = extent
        return tuple(shape)


class LanguageModel(_Model):
    """A policy: LlamaForCausalLM."""

    head = "lm"

    def __init__(self, cfg, grid, flex=False, remat=False):
        super().__init__(cfg, grid, flex, remat)
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
    """A reward model or critic, one number per position: LlamaForTokenClassification with one label."""

    head = "score"

    def __init__(self, cfg, grid, flex=False, remat=False):
        super().__init__(cfg, grid, flex, remat)
        self.score = nn.Linear(cfg.hidden_size, 1, bias=False)

    def scalars(self, x):
        """Residual stream (..., D) -> (...) fp32; head and norm are the same on every tp rank."""
        return F.linear(self.model.norm(x).float(), self.score.weight.float()).squeeze(-1)


# -------------------------------------------------------------------------------- packed rows


@lru_cache
def compiled_flex():
    """torch's FlexAttention as one kernel, compiled once for rows of any length."""
    return torch.compile(flex_attention, dynamic=True)


class Packed:
    """Real tokens only, each once: prompts, each followed by its responses, in one row without pads.

        ids         p0 p1 p2 | w3 w4 w5 | l3 l4 | q0 q1 | w2 ...    a prompt, its responses, the next prompt
        positions   0  1  2  | 3  4  5  | 3  4  | 0  1  | 2 ...     a response continues from its prompt,
                                                                    sees it and itself, and no sibling
    ids, positions    (1, N) int64
    states, actions   (n,) int64: indices into N of the tokens that end s_t and that are a_t, for all n
                      response tokens in reading order, i.e. in the order of x[response_mask]
    """

    def __init__(self, groups, device, flex=False):
        """groups: list of (prompt ids, [response ids, ...]), all lists of int; flex: see LanguageModel"""
        self.flex = flex
        self.lengths = []  # tokens of each piece; a piece is a prompt or a response
        self.sequences = {}  # {(prompt length, response length): [(piece of the prompt, of the response)]}
        ids, positions, states, actions = [], [], [], []
        for prompt, responses in groups:
            prompt_piece = len(self.lengths)
            self.lengths.append(len(prompt))
            ids += prompt
            positions += range(len(prompt))
            prompt_end = len(ids) - 1  # the state in which each response's first token is chosen
            for response in responses:
                sequence = (prompt_piece, len(self.lengths))
                self.sequences.setdefault((len(prompt), len(response)), []).append(sequence)
                self.lengths.append(len(response))
                places = range(len(ids), len(ids) + len(response))
                actions += places
                states += [prompt_end, *places][: len(response)]
                ids += response
                positions += range(len(prompt), len(prompt) + len(response))
        self.ids = torch.tensor([ids], dtype=torch.int64, device=device)
        self.positions = torch.tensor([positions], dtype=torch.int64, device=device)
        self.states = torch.tensor(states, dtype=torch.int64, device=device)
        self.actions = torch.tensor(actions, dtype=torch.int64, device=device)

    @classmethod
    def of(cls, ids, response_mask, flex=False):
        """From padded ids (B, T+1), response_mask (B, T); neighbouring rows with the same prompt share it."""
        groups = []
        for row, mask in zip(ids.tolist(), response_mask.tolist()):
            n = sum(mask)
            start = mask.index(True) + 1 if n else 1  # of the response, in ids
            prompt, response = row[:start], row[start : start + n]
            if not groups or groups[-1][0] != prompt:
                groups.append((prompt, []))
            groups[-1][1].append(response)
        return cls(groups, ids.device, flex)

    def attend(self, layer, q, k, v):
        """One causal call for all sequences (prompt + response) of equal lengths.

        This needs no mask; only a shared prompt attends to itself once per response.
        q (1, N, H/tp, E), k, v (1, N, K/tp, E) -> (1, N, H/tp, E)
        """
        if self.flex:
            return self.attend_flex(q, k, v)
        dtype = q.dtype
        if q.device.type == "cpu":  # in bf16, torch's kernel takes up to twice as long backward
            q, k, v = q.float(), k.float(), v.float()
        pieces = [x[0].split(self.lengths) for x in (q, k, v)]  # (tokens, heads, E) each
        out = [None] * len(self.lengths)
        for lengths, sequences in self.sequences.items():
            order = list(chain.from_iterable(sequences))
            rows = [torch.cat([x[piece] for piece in order]) for x in pieces]
            rows = [x.view(len(sequences), sum(lengths), *x.shape[1:]) for x in rows]
            y = causal_attention(layer, *rows)  # (sequences, P + R, H/tp, E)
            prompts, responses = y.split(lengths, 1)
            for (prompt_piece, response_piece), prompt, response in zip(sequences, prompts, responses):
                out[prompt_piece], out[response_piece] = prompt, response
        return torch.cat(out)[None].to(dtype)

    def attend_flex(self, q, k, v):
        """`attend` as one kernel for the whole row."""
        kernel = compiled_flex() if q.is_cuda else flex_attention
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (1, heads, N, E)
        y = kernel(q, k, v, block_mask=self.block_mask, enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2)

    @cached_property
    def block_mask(self):
        """For FlexAttention: token i sees token j of its own piece and of its prompt, up to i."""
        pieces = torch.arange(len(self.lengths))
        prompt_of = pieces.clone()  # a prompt is its own
        for prompt_piece, response_piece in chain.from_iterable(self.sequences.values()):
            prompt_of[response_piece] = prompt_piece
        prompt_of = prompt_of.to(self.ids.device)
        piece = pieces.repeat_interleave(torch.tensor(self.lengths)).to(self.ids.device)  # (N,)

        def sees(batch, head, i, j):
            return (j <= i) & ((piece[j] == piece[i]) | (piece[j] == prompt_of[piece[i]]))

        return create_block_mask(sees, None, None, len(piece), len(piece), device=self.ids.device)


def at_states(model, ids, response_mask):
    """x (n, D) where s_t has been read and a_t has not, for every response token in reading order."""
    packed = Packed.of(ids, response_mask, model.flex)
    return model.model(packed.ids, packed.positions, packed.attend)[0, packed.states]


def at_actions(model, ids, response_mask):
    """x (n, D) where a_t has been read, for every response token in reading order."""
    packed = Packed.of(ids, response_mask, model.flex)
    return model.model(packed.ids, packed.positions, packed.attend)[0, packed.actions]


def scatter_to_mask(response_mask, values):
    """(n,) numbers of the response tokens in reading order -> (B, T) like targets, 0 outside the mask"""
    zeros = torch.zeros(response_mask.shape, device=values.device, dtype=values.dtype)
    return zeros.masked_scatter(response_mask, values)


# -------------------------------------------------------------------------------- log-probabilities


LOGITS = 3 * 2**22  # logits computed at a time on each rank, to bound memory


def rows_at_a_time(policy):
    """Tokens whose logits are computed at a time; equal on all ranks, even if their slices of V are not."""
    return max(1, LOGITS // -(-policy.cfg.vocab_size // policy.grid.tp_size))


def _product(x, weight, out):
    """x weight^T in fp32, into `out`."""
    return torch.mm(x, weight.T, out=out) if x.dtype == out.dtype else out.copy_(x @ weight.T)


def _chunk_logprobs(logits, probs, columns, mine, grid):
    """For one chunk of tokens -> (3, rows): log-probability of the target, entropy, log-sum-exp.

    logits    (rows, V/tp) fp32, overwritten       probs   buffer of the same shape
    columns   (rows,) of the target in my slice    mine    (rows,) bool: whether it lies there
    """
    top = all_reduce(logits.amax(-1), grid.tp_group, dist.ReduceOp.MAX)  # (rows,)
    logits -= top[:, None]
    picked = logits.gather(-1, columns[:, None])[:, 0] * mine
    torch.exp(logits, out=probs)
    sums = torch.stack([probs.sum(-1), logits.mul_(probs).sum(-1), picked])
    total, weighted, picked = all_reduce(sums, grid.tp_group)
    log_total = total.log()
    return torch.stack([picked - log_total, log_total - weighted / total, top + log_total])


class _TokenLogprobs(torch.autograd.Function):
    """See token_logprobs. Logits exist for `rows` tokens at a time, and backward computes them again."""

    @staticmethod
    def forward(ctx, x, weight, targets, temperature, vocab_size, grid, rows):
        start, stop = shard_range(vocab_size, grid.tp_rank, grid.tp_size)
        mine = (targets >= start) & (targets < stop)  # (n,)
        columns = (targets - start).clamp(0, stop - start - 1)  # (n,)
        shape = (min(rows, len(x)), len(weight))
        logits = x.new_empty(shape, dtype=torch.float32)  # one buffer for all chunks: fresh memory is slow
        probs = torch.empty_like(logits)
        chunks = []
        for x_part, columns_part, mine_part in zip(x.split(rows), columns.split(rows), mine.split(rows)):
            n = len(x_part)
            scaled = _product(x_part, weight, logits[:n]).div_(temperature)  # (n, V/tp)
            chunks.append(_chunk_logprobs(scaled, probs[:n], columns_part, mine_part, grid))
        logprobs, entropy, log_sum = torch.cat(chunks, 1)  # (n,) each
        ctx.save_for_backward(x, weight, columns, mine, log_sum)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        """d logprob / d l_v = [v is the target] - softmax(l)_v, then through l = x weight^T / temperature."""
        x, weight, columns, mine, log_sum = ctx.saved_tensors
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        logits = x.new_empty(min(ctx.rows, len(x)), len(weight), dtype=torch.float32)
        for start in range(0, len(x), ctx.rows):
            part = slice(start, start + ctx.rows)
            dlogits = _product(x[part], weight, logits[: len(x[part])])  # one buffer from here on
            dlogits.div_(ctx.temperature).sub_(log_sum[part, None]).exp_()  # softmax
            scale = grad[part, None] / ctx.temperature
            dlogits.mul_(-scale).scatter_add_(1, columns[part, None], scale * mine[part, None])
            dlogits = dlogits.to(x.dtype)
            torch.mm(dlogits, weight, out=dx[part])
            if dw is None:
                continue
            if dlogits.dtype == dw.dtype:
                dw.addmm_(dlogits.T, x[part])
            else:
                dw.add_(dlogits.T @ x[part])
        return dx, None if dw is None else dw.to(weight.dtype), None, None, None, None, None


def token_logprobs(policy, ids, response_mask, temperature=1.0, rows=0):
    """log pi(targets[:, t] | inputs[:, :t+1]) and the entropy of pi there, in nats.

    ids (B, T+1) int64, response_mask (B, T) bool
    temperature   the one that the tokens were sampled at
    rows          tokens whose logits are computed at a time; 0 is as many as make LOGITS logits
    -> logprobs, entropy   (B, T) fp32, 0 outside the mask; the entropy carries no gradient
    The plain way is response_log_softmax(...).gather(targets): with 128,256 words and 2,048 tokens it takes
    2 GB more.
    """
    x = copy_to_tp(policy.model.norm(at_states(policy, ids, response_mask)), policy.grid)  # (n, D)
    targets = ids[:, 1:][response_mask]
    logprobs, entropy = _TokenLogprobs.apply(
        x,
        policy.head_weight,
        targets,
        temperature,
        policy.cfg.vocab_size,
        policy.grid,
        rows or rows_at_a_time(policy),
    )
    return scatter_to_mask(response_mask, logprobs), scatter_to_mask(response_mask, entropy)


def log_softmax(policy, x, temperature):
    """Residual stream (n, D) -> log pi(. | s_t), this rank's (n, V/tp), fp32 nats"""
    return vocab_log_softmax(policy.logits(x).float() / temperature, policy.grid)


def response_log_softmax(policy, ids, response_mask, temperature=1.0):
    """log pi(. | s_t) over the vocabulary at the response positions: token_logprobs is tested against it.

    ids (B, T+1), response_mask (B, T) -> (n, V/tp) fp32 nats; n = response_mask.sum(), rows in reading order
    """
    x = policy.model(ids[:, :-1])[response_mask]  # (n, D): position t has read s_t
    return log_softmax(policy, x, temperature)


@torch.no_grad()
def exact_kl(policy, reference, ids, response_mask, temperature=1.0):
    """KL(pi || ref) at every state, a sum over the vocabulary.

    ids (B, T+1), response_mask (B, T) -> (B, T) nats, 0 outside the mask
    """
    rows = rows_at_a_time(policy)
    states = at_states(policy, ids, response_mask).split(rows)
    ref_states = at_states(reference, ids, response_mask).split(rows)
    kl = []
    for x, ref_x in zip(states, ref_states):
        log_pi = log_softmax(policy, x, temperature)  # (rows, V/tp)
        log_ref = log_softmax(reference, ref_x, temperature)
        kl.append(vocab_sum(log_pi.exp() * (log_pi - log_ref), policy.grid))  # (rows,)
    return scatter_to_mask(response_mask, torch.cat(kl))


def token_logits(policy, ids, response_mask):
    """The logit of targets[:, t] after inputs[:, :t+1].

    ids (B, T+1) int64, response_mask (B, T) bool -> (B, T) fp32, 0 outside the mask
    """
    logits = policy.logits(at_states(policy, ids, response_mask)).float()  # (n, V/tp)
    targets = ids[:, 1:][response_mask]
    picked = vocab_pick(logits, targets, policy.cfg.vocab_size, policy.grid)  # (n,)
    return scatter_to_mask(response_mask, picked)


# -------------------------------------------------------------------------------- sampling


# exercise 1.7 (3 points): sampling by the inverse CDF
def sample_tokens(probs, uniforms):
    """Inverse CDF with one uniform per row: exact, one pass, and equal on all ranks that get equal numbers.

    probs (B, V) fp32, which need not sum to 1, uniforms (B,) in [0, 1) -> (B,) int64
    A token of probability 0 is never drawn; a row of NaN yields some valid id.
    The token is the first whose cumulative probability is above uniform * total.
    """
    cdf = probs.cumsum(-1)  # (B, V)
    height = uniforms[:, None] * cdf[:, -1:]
    height = torch.minimum(height, torch.nextafter(cdf[:, -1:], cdf.new_zeros(())))  # below the total
    return torch.searchsorted(cdf, height, right=True).squeeze(-1).clamp(max=cdf.shape[1] - 1)


def sampling_uniforms(seed, numbers, steps):
    """The random numbers that answers are sampled with: functions of (seed, number of the answer, step).

    So an answer depends on no other prompt, on no rank, and not on the batch it is sampled in.
    numbers   list of n int, one per answer -> (n, steps) fp32 in [0, 1)
    """
    rows = []
    for number in numbers:
        own = zlib.crc32(f"{seed} {number}".encode())  # a generator reads 32 bits
        rows.append(torch.rand(steps, generator=torch.Generator().manual_seed(own)))
    return torch.stack(rows) if rows else torch.empty(0, steps)


@torch.no_grad()
def generate_plainly(policy, prompts, max_new_tokens, stop_ids, temperature=1.0, seed=0):
    """One answer per prompt, without cache or batch: what support.sampling.generate must match.

    -> responses (list of id lists), truncated (list of bool: no stop token within max_new_tokens)
    """
    device = policy.grid.device
    uniforms = sampling_uniforms(seed, range(len(prompts)), max_new_tokens).to(device)
    responses = []
    for prompt, row in zip(prompts, uniforms):
        response = []
        while len(response) < max_new_tokens and not (response and response[-1] in stop_ids):
            x = policy.model(torch.tensor([prompt + response], device=device))[:, -1]  # (1, D)
            logits = gather_shards(policy.logits(x).float(), 1, policy.cfg.vocab_size, policy.grid)
            if temperature:
                token = sample_tokens((logits / temperature).softmax(-1), row[len(response), None])
            else:
                token = logits.argmax(-1)
            response.append(token.item())
        responses.append(response)
    return responses, [response[-1] not in stop_ids for response in responses]


# -------------------------------------------------------------------------------- weights


@torch.no_grad()
def init_weights(model, seed, only=""):
    """Normal weights of variance 1/fan_in; norms 1; biases, lora_B and the scalar head 0 (neutral).

    Every matrix is drawn whole from (seed, its name) and then sliced, so all tp sizes get the same model.
    only   leave parameters alone whose name does not contain it
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
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))  # reads 32 bits
            full = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            param.copy_(model.my_slice(name, full))
    return model


def add_lora(model, rank, seed, alpha=0):
    """A model to train: the weights of `model`, shared, plus adapters on the linear layers of its blocks.

    Only the adapters and the scalar head are trained. The first forward is that of `model`, which is frozen
    and can serve as the reference.
    alpha   the update is alpha/rank B A; 0 is the rank, so that the factor is 1 (the paper)
    """
    model.requires_grad_(False)
    shared = {id(x): x for x in (model.grid, *model.parameters())}  # not copied
    adapted = copy.deepcopy(model, shared)
    for layer in adapted.model.layers.modules():
        if isinstance(layer, ParallelLinear):
            add_lora_factors(layer, rank, alpha or rank)
    if adapted.head == "score":
        adapted.score.requires_grad_(True)
    return init_weights(adapted, seed, only="lora_")


def build_model(model_class, cfg, grid, dtype=torch.float32, *, flex=False, remat=False):
    """An uninitialised LanguageModel or ScalarModel on the grid's device.

    Built on the meta device, so that no weight is filled twice.
    """
    with torch.device("meta"):
        model = model_class(cfg, grid, flex, remat)
    return model.to(dtype).to_empty(device=grid.device)


# -------------------------------------------------------------------------------- files


def read_config(directory):
    """config.json of a model directory -> (ModelConfig, the raw dict); BadInput if it is unusable."""
    _refuse_adapter(Path(directory))
    path = Path(directory) / "config.json"
    try:
        raw = read_json(path, path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; expected a Hugging Face model directory") from None
    except OSError as e:
        raise BadInput(f"{path}: {e}") from None
    try:
        return ModelConfig.from_dict(raw), raw
    except (ValueError, TypeError, AttributeError) as e:
        raise BadInput(f"{path}: {e}") from None


def _refuse_adapter(directory):
    """BadInput if PEFT adapters are there, even beside a model: transformers would load their base."""
    path = directory / "adapter_config.json"
    if path.exists():
        base = read_json(path, path.read_bytes()).get("base_model_name_or_path")
        raise BadInput(
            f"{directory}: holds PEFT adapters of {str(base)[:200]}, not a whole model;"
            " expected the directory of the merged weights (for <out>/adapter that is <out>); to write one:"
            " PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)"
        )


def stored_head(directory):
    """The head of a model directory: "lm" or "score"; BadInput for any other.

    Where config.json names no architecture, the names of the tensors decide.
    """
    _, raw = read_config(directory)
    architectures = raw.get("architectures")
    if not architectures:
        return "score" if "score.weight" in _weight_files(directory) else "lm"
    for name, head in (("ForCausalLM", "lm"), ("ForTokenClassification", "score")):
        if name in str(architectures):
            return head
    raise BadInput(
        f"{directory}: config.json says {architectures}; expected a language model (LlamaForCausalLM or"
        " Qwen2ForCausalLM) or a reward model (LlamaForTokenClassification or Qwen2ForTokenClassification)"
    )


def _weight_files(directory):
    """{tensor name: file}, found as transformers does; never outside `directory`.

    model.safetensors wins over an index beside it, which may belong to an older model. An index only names
    the files; which tensors each holds is read from the file.
    """
    directory = Path(directory)
    path = directory / "model.safetensors"
    if not path.is_file():
        path = directory / "model.safetensors.index.json"
    require(path.exists(), _no_weights(directory))
    try:
        shards = [path] if path.suffix == ".safetensors" else _shards(path)
        found = {}
        for path in shards:
            with safe_open(path, "pt") as file:
                names = file.keys()
            twice = next((name for name in names if name in found), None)
            if twice:
                where = f"{found[twice].name} and {path.name}"
                raise BadInput(f"{twice[:60]} is in {where}; expected each tensor in one shard")
            found |= dict.fromkeys(names, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as e:
        raise BadInput(f"{path}: cannot read it as a safetensors file or index: {e}") from None
    # The angles of RoPE, which older versions saved, follow from config.json.
    return {name: path for name, path in found.items() if "rotary_emb.inv_freq" not in name}


def _shards(index):
    """The files that an index names, each once."""
    names = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    require(
        all(isinstance(name, str) and Path(name).name == name and name.isprintable() for name in names),
        "a shard lies outside the directory, or its name cannot be printed",
    )
    return [index.parent / name for name in names]


OTHER_WEIGHTS = {  # file name: how to make a model.safetensors of it
    "pytorch_model*.bin*": "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
    "model.*.safetensors": "AutoModelForCausalLM.from_pretrained(..., variant=...).save_pretrained(...)",
    "*.gguf": "AutoModelForCausalLM.from_pretrained(..., gguf_file=...).save_pretrained(...)",
    "consolidated*": "transformers' convert_llama_weights_to_hf.py",
    "tf_model.h5": "AutoModelForCausalLM.from_pretrained(..., from_tf=True) of transformers 4",
    "flax_model.msgpack": "AutoModelForCausalLM.from_pretrained(..., from_flax=True) of transformers 4",
}


def _no_weights(directory):
    """The message for a directory without safetensors: which weights it has instead, and what to do."""
    missing = f"{directory / 'model.safetensors'}: no such file, nor an index of shards"
    for pattern, converter in OTHER_WEIGHTS.items():
        other = next(iter(sorted(directory.glob(pattern))), None)
        if other is not None:
            return f"{missing}; found {other.name}, which is not read; convert it with {converter}"
    return f"{missing}; expected the weights of a Hugging Face model"


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _tied_as_stored(cfg, files):
    """`cfg`, untied where the files hold two matrices that differ: transformers 5 ties equal ones only."""
    if not cfg.tie_word_embeddings or not {EMBEDDING, HEAD} <= files.keys():
        return cfg
    try:
        with safe_open(files[EMBEDDING], "pt") as embedding_file, safe_open(files[HEAD], "pt") as head_file:
            embedding = embedding_file.get_slice(EMBEDDING)
            head = head_file.get_slice(HEAD)
            equal = embedding.get_shape() == head.get_shape()
            n_rows = embedding.get_shape()[0] if equal else 0
            for start in range(0, n_rows, 4096):  # a part at a time, to bound memory
                rows = slice(start, start + 4096)
                equal = equal and torch.equal(embedding[rows].float(), head[rows].float())
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{files[HEAD]}: cannot read {HEAD}: {e}") from None
    return replace(cfg, tie_word_embeddings=equal)


@torch.no_grad()
def load_model(model_class, directory, grid, dtype=torch.float32, *, flex=False, remat=False):
    """A LanguageModel or ScalarModel from a Hugging Face directory; each rank reads only its slices.

    Strict: a missing, unexpected or misshapen tensor is a BadInput that names it. One exception, by design: a
    ScalarModel made from a language model drops `lm_head` and gets a new zero head (a reward model's start).
    flex, remat: see the constructor.
    """
    cfg, raw = read_config(directory)
    is_lm = stored_head(directory) == "lm"
    wants_lm = model_class is LanguageModel
    require(
        is_lm or not wants_lm,
        f"{directory}: config.json says {raw.get('architectures')}; expected a language model",
    )
    files = _weight_files(directory)
    require(  # before so many layers are built
        cfg.num_hidden_layers <= len(files),
        f"{directory}: config.json says {cfg.num_hidden_layers} layers, but there are {len(files)} tensors",
    )
    if wants_lm:
        cfg = _tied_as_stored(cfg, files)
    try:
        model = build_model(model_class, cfg, grid, dtype, flex=flex, remat=remat)
    except RuntimeError as e:
        raise BadInput(f"{directory}: no memory for a model of the sizes in config.json: {e}") from None
    stored_names = _stored_names(directory, model, files, is_lm)
    for name, param in model.named_parameters():
        if name in stored_names:
            _load_tensor(model, name, param, stored_names[name], files[stored_names[name]])
        else:
            param.zero_()  # the new head
    if "score.bias" in files:
        _require_zero(files["score.bias"], "score.bias")
    return model


def _stored_names(directory, model, files, is_lm):
    """{parameter of `model`: its name in the files}, less a new scalar head; BadInput if they do not fit."""
    names = {name: name for name, _ in model.named_parameters()}
    ignored = set()  # other tensors that the files may hold
    if is_lm and model.head == "score":
        del names["score.weight"]
        ignored = {HEAD}
    elif is_lm and model.cfg.tie_word_embeddings:
        ignored = {HEAD}
    elif not is_lm:
        ignored = {"score.bias"}
    if is_lm and model.cfg.tie_word_embeddings and EMBEDDING not in files and HEAD in files:
        names[EMBEDDING] = HEAD  # tied, and stored under its other name
    missing = set(names.values()) - files.keys()
    unexpected = files.keys() - set(names.values()) - ignored
    require(
        not missing and not unexpected,
        f"{directory}: weights do not fit config.json; "
        f"missing: {sorted(missing)[:3]}, unexpected: {sorted(unexpected)[:3]}",
    )
    return names


def _load_tensor(model, name, param, stored_name, path):
    """Copies this rank's slice of a stored tensor into `param`; BadInput for a wrong shape or number."""
    expected = model.full_shape(name, param.shape)
    try:
        # Reopened for each tensor: pages read from an open file count as memory of this process.
        with safe_open(path, "pt") as file:
            stored = file.get_slice(stored_name)
            shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
            require(
                shape == expected and dtype in ("F32", "F16", "BF16", "F64"),
                f"{path}: {stored_name} is {dtype} {list(shape)}, expected floats {list(expected)}",
            )
            param.copy_(model.my_slice(name, stored))
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{path}: cannot read {stored_name}: {e}") from None
    finite = param.sum().isfinite()  # one pass, no copy
    require(finite, f"{path}: {stored_name} has numbers that are not finite")


def _require_zero(path, name):
    try:
        with safe_open(path, "pt") as file:
            bias = file.get_tensor(name)
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{path}: cannot read {name}: {e}") from None
    require(not bias.any(), f"{path}: {name} is not zero; expected a head without bias")


@torch.no_grad()
def save_model(model, directory, max_shard_bytes=5 * 10**9):
    """Writes config.json and safetensors shards as Hugging Face does. All ranks call it; the main one writes.

    The files do not depend on tp: tensors are gathered one by one, and a shard is written as soon as it is
    full. Adapters are merged into their weights (and rounded to their dtype).
    """
    directory, is_main = Path(directory), model.grid.is_main
    params = {name: param for name, param in model.named_parameters() if ".lora_" not in name}
    sizes = {
        name: math.prod(model.full_shape(name, param.shape)) * param.element_size()
        for name, param in params.items()
    }
    shards = _shard_names(sizes, max_shard_bytes)
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: model.gather(name, _merged(model, name, params[name])) for name in names}
        if "score.weight" in tensors:
            tensors["score.bias"] = torch.zeros(1, dtype=tensors["score.weight"].dtype)
        weight_map |= dict.fromkeys(tensors, file)
        if is_main:
            write_atomically(directory / file, tensors)
    if not is_main:
        return
    index = directory / "model.safetensors.index.json"
    whole = directory / "model.safetensors"
    if len(shards) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_atomically(index, json.dumps(content, indent=1))
        whole.unlink(missing_ok=True)  # an old one would take precedence over the index
    else:
        index.unlink(missing_ok=True)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = {**model.cfg.to_dict(model.head), "torch_dtype": dtype}
    write_atomically(directory / "config.json", json.dumps(config, indent=1))


def _shard_names(sizes, max_bytes):
    """{name: bytes} -> [names in each shard], in order; a tensor above max_bytes gets its own shard."""
    shards, used = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _merged(model, name, param):
    """`param`, or, for a weight with an adapter, the sum of both."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    return merged_weight(layer) if leaf == "weight" and isinstance(layer, ParallelLinear) else param


@torch.no_grad()
def save_adapter(model, directory, base):
    """Writes the adapters, and the scalar head if any, as PEFT does. All ranks call it; the main one writes.

    base   the model directory that they were trained on, which adapter_config.json names
    """
    tensors = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            key = f"base_model.model.{name}" + (".weight" if ".lora_" in name else "")
            tensors[key] = model.gather(name, param)
    is_score = model.head == "score"
    if is_score:
        tensors["base_model.model.score.bias"] = torch.zeros(1, dtype=model.score.weight.dtype)
    modules = model.model.layers.named_modules()
    layers = {name.split(".")[-1]: layer for name, layer in modules if isinstance(layer, ParallelLinear)}
    rank = len(layers["q_proj"].lora_A)
    config = {
        "peft_type": "LORA",
        "task_type": "TOKEN_CLS" if is_score else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": round(layers["q_proj"].lora_scale * rank),
        "target_modules": sorted(layers),
        "modules_to_save": ["score"] if is_score else None,
    }
    if model.grid.is_main:
        write_atomically(directory / "adapter_model.safetensors", tensors)
        write_atomically(directory / "adapter_config.json", json.dumps(config, indent=1))
