"""The decoder, its heads, sampling and files, against torch's own ops, slow loops and numbers by hand."""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import near, random_ids, random_model, small_config
from safetensors.torch import load_file, save_file

from data import Example, collate
from model import (
    LanguageModel,
    ModelConfig,
    RMSNorm,
    RopeScaling,
    ScalarModel,
    add_lora,
    apply_rope,
    build_model,
    generate_plainly,
    init_weights,
    load_model,
    response_log_softmax,
    rope_frequencies,
    rope_table,
    sample_tokens,
    sampling_uniforms,
    save_adapter,
    save_model,
    stored_head,
    token_logprobs,
)
from parallel import Grid
from support.files import BadInput
from support.sampling import KVCache, generate

SCALING = RopeScaling(
    8.0, 1.0, 2.0, 16
)  # with E = 8 and theta = 10000: one frequency blended, the others divided
RAW = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def chi_square(counts, probs):
    """Distance of counts from their expectation; about its degrees of freedom if the draws are from probs."""
    expected = probs.double() * counts.sum()
    return ((counts - expected).square() / expected).sum().item()


def same_parameters(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# -------------------------------------------------------------------------------- the block


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rmsnorm_is_torchs(eps):
    norm = RMSNorm(40, eps)
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1))
    near(norm(x), F.rms_norm(x, (40,), norm.weight, eps), 1e-6)


def test_rmsnorm_of_bf16_is_rounded_once():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = RMSNorm(256, 1e-5).bfloat16()(x)
    exact = F.rms_norm(x.double(), (256,), eps=1e-5).bfloat16()
    assert (
        y.dtype == torch.bfloat16 and (y == exact).float().mean() > 0.999
    )  # with bf16 inside a quarter of them differ


@pytest.mark.parametrize("cfg", [small_config(), small_config(rope_scaling=SCALING)])
def test_rope_is_a_complex_rotation(cfg):
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))  # (B, T, H, E)
    positions = torch.tensor([[0, 1, 2, 3, 4], [9, 40, 7, 1000, 5]])
    y = apply_rope(x, *rope_table(positions, cfg))
    freqs = rope_frequencies(cfg).double()
    for b in range(2):
        for t in range(5):
            for i in range(4):  # pair (i, i + E/2) is one complex number
                turned = torch.complex(x[b, t, :, i], x[b, t, :, i + 4]) * torch.exp(
                    1j * positions[b, t] * freqs[i]
                )
                near(
                    torch.complex(y[b, t, :, i], y[b, t, :, i + 4]),
                    turned,
                    1e-4 if positions[b, t] == 1000 else 1e-5,
                )


def test_rope_frequencies_by_hand():
    near(rope_frequencies(small_config()), torch.tensor([1.0, 0.1, 0.01, 0.001]), 1e-6)
    near(rope_frequencies(small_config(rope_theta=1e6, head_dim=6)), torch.tensor([1.0, 1e-2, 1e-4]), 1e-6)


def test_llama3_frequencies_by_hand():
    # 1000 f / (2 pi) = 159.15, 1.59155 and 0.0159 turns: more than 4 (kept), between, fewer than 1
    # (divided by 8).
    # Between: keep = (1.59155 - 1) / 3 = 0.197183, and 0.01 (0.197183 + 0.802817 / 8) = 0.00297535.
    cfg = small_config(rope_theta=1e6, head_dim=6, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 1000))
    for f, by_hand in zip(rope_frequencies(cfg).tolist(), [1.0, 0.00297535, 1.25e-5]):
        assert f == pytest.approx(by_hand, rel=2e-6)


def decode_slowly(model, ids):
    """The residual stream (T, D) of one row in fp64: head by head, query by query, complex rotations."""
    cfg, P = model.cfg, {n: p.detach().double() for n, p in model.named_parameters()}
    E, group = cfg.head_dim, cfg.num_attention_heads // cfg.num_key_value_heads

    def project(layer, name, head, h):
        rows = slice(head * E, (head + 1) * E)
        bias = P.get(f"{layer}.self_attn.{name}.bias", torch.zeros(10**4).double())
        return h @ P[f"{layer}.self_attn.{name}.weight"][rows].T + bias[rows]  # (T, E)

    def turn(v):
        z = torch.complex(v[:, : E // 2], v[:, E // 2 :])
        angles = [[t * cfg.rope_theta ** (-2 * i / E) for i in range(E // 2)] for t in range(len(v))]
        return z * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))  # (T, E/2)

    x = P["model.embed_tokens.weight"][ids]
    for i in range(cfg.num_hidden_layers):
        layer = f"model.layers.{i}"
        h = F.rms_norm(x, (cfg.hidden_size,), P[f"{layer}.input_layernorm.weight"], cfg.rms_norm_eps)
        heads = []
        for head in range(cfg.num_attention_heads):
            q, k = turn(project(layer, "q_proj", head, h)), turn(project(layer, "k_proj", head // group, h))
            v = project(layer, "v_proj", head // group, h)
            rows = []
            for t in range(len(ids)):
                match = torch.stack([(q[t] * k[s].conj()).real.sum() for s in range(t + 1)]) / math.sqrt(E)
                rows.append(match.softmax(0) @ v[: t + 1])
            heads.append(torch.stack(rows))
        x = x + torch.cat(heads, 1) @ P[f"{layer}.self_attn.o_proj.weight"].T
        h = F.rms_norm(x, (cfg.hidden_size,), P[f"{layer}.post_attention_layernorm.weight"], cfg.rms_norm_eps)
        gate, up, down = (P[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    return x


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_decoder_is_its_definition(kv_heads, kind):
    model = random_model(
        LanguageModel, small_config(num_key_value_heads=kv_heads, model_type=kind, rms_norm_eps=0.1)
    )
    assert any("k_proj.bias" in name for name, _ in model.named_parameters()) == (kind == "qwen2")
    ids = random_ids(2, 7)
    x = model.model(ids)
    for b in range(2):
        near(x[b], decode_slowly(model, ids[b]))


def test_the_two_heads_are_norm_and_a_product():
    cfg = small_config(tie_word_embeddings=False, rms_norm_eps=0.1)
    x = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    untied, tied = (
        random_model(LanguageModel, cfg),
        random_model(LanguageModel, small_config(rms_norm_eps=0.1)),
    )
    scalar = random_model(ScalarModel, cfg)
    normed = [F.rms_norm(x, (20,), m.model.norm.weight, cfg.rms_norm_eps) for m in (untied, tied, scalar)]
    near(untied.logits(x), normed[0] @ untied.lm_head.weight.T)
    near(tied.logits(x), normed[1] @ tied.model.embed_tokens.weight.T)
    near(scalar.scalars(x), (normed[2] * scalar.score.weight).sum(-1))


@pytest.mark.parametrize("t", [0, 3, 7])
def test_attention_is_causal(t):
    model = random_model(LanguageModel, small_config())
    ids = random_ids(2, 8)
    changed = ids.clone()
    changed[:, t] = (changed[:, t] + 1) % 29
    before, after = model.model(ids), model.model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).any(-1).all()


def test_grouped_queries_are_repeated_heads():
    grouped = random_model(LanguageModel, small_config(model_type="qwen2"))
    full = build_model(LanguageModel, small_config(model_type="qwen2", num_key_value_heads=4), Grid())
    weights = dict(grouped.named_parameters())
    for name, param in full.named_parameters():
        source = weights[name].detach()
        if "k_proj" in name or "v_proj" in name:  # heads 0 0 1 1
            source = source.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
        param.data.copy_(source)
    ids = random_ids(3, 9)
    near(full.model(ids), grouped.model(ids))
    prompts = [row.tolist() for row in ids]
    assert generate(full, prompts, 6, [3], 0)[0] == generate(grouped, prompts, 6, [3], 0)[0]


def test_a_sequence_alone_and_in_a_batch_is_the_same():
    model, policy = random_model(ScalarModel, small_config()), random_model(LanguageModel, small_config())
    examples = [
        Example(random_ids(3 + i, seed=i).tolist(), random_ids(9 - 2 * i, seed=9 + i).tolist())
        for i in range(4)
    ]
    ids, mask = collate(examples)
    scores = model.scalars(model.model(ids))
    logprobs, entropy = token_logprobs(policy, ids, mask)
    for b, example in enumerate(examples):
        one_ids, one_mask = collate([example])
        near(scores[b, : one_ids.shape[1]], model.scalars(model.model(one_ids))[0])
        for batch, alone in zip((logprobs, entropy), token_logprobs(policy, one_ids, one_mask)):
            near(batch[b, : one_mask.shape[1]], alone[0])


def test_what_stands_in_the_pad_slots_changes_nothing():
    policy = random_model(LanguageModel, small_config())
    examples = [Example([1, 2, 3], [4, 5]), Example([6], [7, 8, 9, 10, 11, 12]), Example([1, 2], [3])]
    ids, mask = collate(examples)
    pads = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in zip(pads, examples):
        row[len(example.prompt_ids) + len(example.response_ids) :] = True
    runs = []
    for seed in (None, 1, 2):
        filled = ids if seed is None else torch.where(pads, random_ids(*ids.shape, seed=seed), ids)
        policy.zero_grad()
        logprobs, entropy = token_logprobs(policy, filled, mask)
        loss = (logprobs * torch.linspace(-1, 1, mask.shape[1])).sum()
        loss.backward()
        runs.append([logprobs, entropy, loss, *(p.grad.clone() for p in policy.parameters())])
    assert pads.sum() == 6 and runs[0][-1].abs().max() > 0
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))


# -------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_are_log_softmax_and_gather(temperature):
    policy = random_model(LanguageModel, small_config(tie_word_embeddings=False))
    ids, mask = collate(
        [Example([1, 2, 3], [4, 5, 28]), Example([6], [7, 0, 9, 10, 11]), Example([8, 8], [8])]
    )
    logprobs, entropy = token_logprobs(policy, ids, mask, temperature)
    assert (
        logprobs.shape == entropy.shape == mask.shape and logprobs.requires_grad and not entropy.requires_grad
    )
    for b in range(3):
        for t in range(mask.shape[1]):
            if not mask[b, t]:
                assert logprobs[b, t] == 0 and entropy[b, t] == 0
                continue
            logits = policy.logits(policy.model(ids[b : b + 1, : t + 1]))[0, -1].detach() / temperature
            pi = torch.distributions.Categorical(logits=logits.double())
            assert logprobs[b, t].item() == pytest.approx(pi.log_prob(ids[b, t + 1]).item(), rel=1e-5)
            assert entropy[b, t].item() == pytest.approx(pi.entropy().item(), rel=1e-5)


def test_response_log_softmax_has_its_rows_in_reading_order():
    policy = random_model(LanguageModel, small_config())
    ids = random_ids(2, 6)
    mask = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 1, 0]], dtype=torch.bool)
    rows = response_log_softmax(policy, ids, mask)
    everything = policy.logits(policy.model(ids[:, :-1])).log_softmax(-1)
    near(rows, torch.stack([everything[0, 1], everything[0, 4], everything[1, 0], everything[1, 3]]))


def test_a_policy_without_opinion_has_the_entropy_of_a_fair_die():
    policy = random_model(LanguageModel, small_config(tie_word_embeddings=False))
    torch.nn.init.zeros_(policy.lm_head.weight)
    logprobs, entropy = token_logprobs(policy, random_ids(1, 4), torch.ones(1, 3, dtype=torch.bool))
    near(entropy, torch.full((1, 3), math.log(29)), 1e-6)
    near(logprobs, torch.full((1, 3), -math.log(29)), 1e-6)


# -------------------------------------------------------------------------------- sampling


def test_sample_tokens_draws_from_the_distribution():
    probs = torch.tensor([0.0, 0.3, 0.01, 0.0, 0.0, 0.2, 0.05, 0.4, 0.04, 0.0])
    n = 100_000
    even = (torch.arange(n) + 0.5) / n  # evenly spread: each count is its expectation, to one
    counts = sample_tokens(probs.expand(n, -1), even).bincount(minlength=10)
    assert ((counts - n * probs).abs() <= 1.5).all()
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(0))
    counts = sample_tokens(probs.expand(n, -1), uniforms).bincount(minlength=10)
    assert (counts[probs == 0] == 0).all()
    assert (
        chi_square(counts[probs > 0], probs[probs > 0]) < 20.5
    )  # 5 degrees of freedom: one seed in 1000 is above


def test_sample_tokens_at_the_ends_of_the_unit_interval():
    probs = torch.tensor([[0.0, 0.25, 0.5, 0.25, 0.0]])
    last = torch.tensor([1 - 2.0**-24])  # the largest fp32 below 1
    assert sample_tokens(probs, torch.tensor([0.0])) == 1
    assert sample_tokens(probs, last) == 3
    assert sample_tokens(probs, torch.tensor([0.25])) == 2  # [0.25, 0.75) is token 2's
    logits = torch.randn(20, 50_000, generator=torch.Generator().manual_seed(0))
    logits[:, :7], logits[:, -7:] = -torch.inf, -torch.inf
    assert (sample_tokens(logits.softmax(-1), torch.zeros(20)) == 7).all()
    ends = sample_tokens(logits.softmax(-1), last.expand(20))  # the sum of 50,000 numbers need not be 1
    assert (ends < 50_000 - 7).all() and (ends > 49_000).all()


@pytest.mark.parametrize("temperature", [0, 1.0, 1.6])
def test_the_plain_loop_draws_by_hand(temperature):
    """Token by token: the interval of the cumulated probabilities that holds the uniform number."""
    policy = random_model(LanguageModel, small_config())
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6]]
    responses, truncated = generate_plainly(policy, prompts, 6, [0, 4, 9], temperature, seed=5)
    uniforms = sampling_uniforms(5, range(3), 6)
    for prompt, row, response, cut in zip(prompts, uniforms, responses, truncated):
        for t, token in enumerate(response):
            logits = decode_slowly(policy, torch.tensor(prompt + response[:t]))[-1]  # (D,) fp64
            norm = F.rms_norm(logits, (20,), policy.model.norm.weight.double(), policy.cfg.rms_norm_eps)
            logits = policy.head_weight.double() @ norm  # (V,)
            if temperature:
                cdf = (logits / temperature).softmax(0).cumsum(0)
                assert (cdf[token - 1] if token else 0.0) <= row[t] < cdf[token]
            else:
                assert token == logits.argmax()
        stopped = [t for t, token in enumerate(response) if token in (0, 4, 9)]
        assert cut == (not stopped)
        assert len(response) == (6 if cut else stopped[0] + 1)


@pytest.mark.parametrize("temperature", [0, 1.0, 1.6])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_generate_with_its_cache_is_the_full_forward(temperature, kv_heads, monkeypatch):
    policy = random_model(LanguageModel, small_config(num_key_value_heads=kv_heads), seed=kv_heads)
    prompts = [random_ids(1 + (5 * i) % 11, seed=i).tolist() for i in range(14)]
    drops, keep_slots = [], KVCache.keep_slots
    monkeypatch.setattr(
        KVCache, "keep_slots", lambda self, slots: (drops.append(len(slots)), keep_slots(self, slots))
    )
    stop_ids = [0, 4, 9, 11, 17, 22]
    responses, truncated = generate(policy, prompts, 12, stop_ids, temperature, seed=5)
    assert (responses, truncated) == generate_plainly(policy, prompts, 12, stop_ids, temperature, seed=5)
    assert truncated == [r[-1] not in stop_ids for r in responses]
    if temperature:
        assert len(drops) >= 2 and len({len(r) for r in responses}) >= 4  # rows really left the cache
    assert generate(policy, prompts, 12, stop_ids, temperature, seed=5, batch_size=3) == (
        responses,
        truncated,
    )
    if temperature:
        assert generate(policy, prompts, 12, stop_ids, temperature, seed=6)[0] != responses


def counting_policy():
    """After token n it says n + 1 (mod 16): nothing in its blocks, one-hot embeddings, a head that turns
    them by one."""
    cfg = small_config(vocab_size=16, hidden_size=16, tie_word_embeddings=False)
    policy = random_model(LanguageModel, cfg)
    with torch.no_grad():
        for name, param in policy.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                param.zero_()
        policy.model.norm.weight.fill_(1.0)
        policy.model.embed_tokens.weight.copy_(torch.eye(16))
        policy.lm_head.weight.copy_(100 * torch.eye(16).roll(1, dims=0))
    return policy


@pytest.mark.parametrize("decode", [generate, generate_plainly])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_each_stop_id_ends_an_answer_and_belongs_to_it(temperature, decode):
    prompts = [[5], [3, 9, 10], [13, 0], [4], [9, 8], [1, 2, 3], [13]]  # a stop id in a prompt ends nothing
    responses, truncated = decode(counting_policy(), prompts, 5, [9, 13], temperature)
    assert responses == [
        [6, 7, 8, 9],
        [11, 12, 13],
        [1, 2, 3, 4, 5],
        [5, 6, 7, 8, 9],
        [9],
        [4, 5, 6, 7, 8],
        [14, 15, 0, 1, 2],
    ]
    assert truncated == [False, False, True, False, False, True, True]


@pytest.mark.parametrize("decode", [generate, generate_plainly])
def test_generate_without_stop_ids_or_prompts(decode):
    assert decode(counting_policy(), [[3], [1, 14]], 3, [], 0) == ([[4, 5, 6], [15, 0, 1]], [True, True])
    assert decode(counting_policy(), [], 3, [9], 0) == ([], [])


def test_generate_stops_reading_when_the_last_answer_is_done():
    policy, rows = counting_policy(), []
    policy.model.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    responses, _ = generate(policy, [[n] for n in range(1, 9)], 40, [9], 0)
    assert [len(r) for r in responses] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert len(rows) == 8  # the prompts, and seven tokens of the longest answer
    assert sum(rows) < 8 * 7  # rows that are done are dropped, though no two are done at once


def test_sampled_frequencies_are_those_of_token_logprobs():
    policy = random_model(LanguageModel, small_config(vocab_size=4, num_hidden_layers=1), seed=3)
    n = 8000
    responses, _ = generate(policy, [[2, 1]] * n, 2, [], temperature=0.7, seed=1, batch_size=n)
    counts = torch.tensor([4 * a + b for a, b in responses]).bincount(minlength=16)
    pairs = [Example([2, 1], [a, b]) for a in range(4) for b in range(4)]
    ids, mask = collate(pairs)
    at = {T: token_logprobs(policy, ids, mask, T)[0].sum(1).exp().detach() for T in (0.7, 1.0)}
    near(at[0.7].sum(), torch.ones(()))
    assert chi_square(counts, at[0.7]) < 37.7  # 15 degrees of freedom: one seed in 1000 is above
    assert chi_square(counts, at[1.0]) > 200


# -------------------------------------------------------------------------------- initial weights


def test_initial_weights_are_a_function_of_seed_and_name():
    cfg = small_config(model_type="qwen2", hidden_size=64, intermediate_size=160)
    model = init_weights(build_model(LanguageModel, cfg, Grid()), 7)
    torch.manual_seed(123)  # the global generator plays no part
    assert same_parameters(model, init_weights(build_model(LanguageModel, cfg, Grid()), 7))
    deeper = init_weights(
        build_model(
            ScalarModel,
            small_config(model_type="qwen2", hidden_size=64, intermediate_size=160, num_hidden_layers=3),
            Grid(),
        ),
        7,
    )
    other = dict(init_weights(build_model(LanguageModel, cfg, Grid()), 8).named_parameters())
    deeper = dict(deeper.named_parameters())
    seen = []
    for name, param in model.named_parameters():
        assert torch.equal(param, deeper[name])
        if "norm" in name:
            assert (param == 1).all()
        elif name.endswith("bias"):
            assert (param == 0).all()
        else:
            assert not torch.equal(param, other[name])
            assert param.std().item() == pytest.approx(param.shape[1] ** -0.5, rel=0.08)
            seen.append(param.flatten()[:8].tolist())
    assert len({tuple(s) for s in seen}) == len(seen)  # no two matrices alike
    assert (deeper["score.weight"] == 0).all()


# -------------------------------------------------------------------------------- files


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 3000])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("Model", [LanguageModel, ScalarModel])
def test_save_and_load_is_bit_equal(tmp_path, Model, tied, kind, max_shard_bytes):
    cfg = small_config(
        tie_word_embeddings=tied, model_type=kind, rope_scaling=SCALING if tied else None, rope_theta=5e5
    )
    model = random_model(Model, cfg)
    save_model(model, tmp_path, max_shard_bytes)
    loaded = load_model(Model, tmp_path, Grid())
    assert same_parameters(model, loaded)
    assert loaded.cfg == (
        cfg if Model is LanguageModel else small_config(**{**vars(cfg), "tie_word_embeddings": False})
    )
    ids = random_ids(2, 30)
    assert torch.equal(model.model(ids), loaded.model(ids))
    shards = sorted(tmp_path.glob("*.safetensors"))
    if max_shard_bytes == 3000:
        weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(shards) > 5 and {s.name for s in shards} == set(weight_map.values())
        for shard in shards:
            tensors = load_file(shard)
            assert all(weight_map[name] == shard.name for name in tensors)
            assert len(tensors) == 1 or sum(t.nbytes for n, t in tensors.items() if n != "score.bias") <= 3000
    else:
        assert [s.name for s in shards] == ["model.safetensors"]
        assert set(load_file(shards[0])) - {"score.bias"} == set(dict(model.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_exactly(tmp_path, dtype):
    model = random_model(LanguageModel, small_config()).to(dtype)
    save_model(model, tmp_path)
    assert same_parameters(load_model(LanguageModel, tmp_path, Grid(), dtype), model)
    assert same_parameters(load_model(LanguageModel, tmp_path, Grid()), copy.deepcopy(model).float())


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_starts_from_a_language_model_with_a_zero_head(tmp_path, tied):
    policy = random_model(LanguageModel, small_config(tie_word_embeddings=tied))
    save_model(policy, tmp_path)
    model = load_model(ScalarModel, tmp_path, Grid())
    assert same_parameters(model.model, policy.model)
    assert model.score.weight.shape == (1, 20) and (model.score.weight == 0).all()


def test_a_tied_language_model_may_bring_a_copy_of_its_head(tmp_path):
    policy = random_model(LanguageModel, small_config())
    save_model(policy, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    assert same_parameters(load_model(LanguageModel, tmp_path, Grid()), policy)


def put(name, change):
    def damage(tensors):
        tensors[name] = change(tensors.get(name))

    return damage


GATE = "model.layers.1.mlp.gate_proj.weight"
DAMAGES = {
    "missing": (LanguageModel, lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight"),
    "missing head": (ScalarModel, lambda tensors: tensors.pop("score.weight"), "score.weight"),
    "missing lm_head": (LanguageModel, lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight"),
    "extra": (LanguageModel, put("model.norm.bias", lambda _: torch.zeros(20)), "model.norm.bias"),
    "extra lm_head": (ScalarModel, put("lm_head.weight", lambda _: torch.zeros(29, 20)), "lm_head.weight"),
    "a layer too many": (
        LanguageModel,
        put("model.layers.2.mlp.up_proj.weight", lambda _: torch.zeros(28, 20)),
        "layers.2",
    ),
    "transposed": (LanguageModel, put(GATE, lambda t: t.T.contiguous()), GATE),
    "flat": (LanguageModel, put(GATE, lambda t: t.flatten()), GATE),
    "one row": (LanguageModel, put(GATE, lambda t: t[:1].clone()), GATE),  # copy_ would broadcast it
    "integers": (LanguageModel, put(GATE, lambda t: t.to(torch.int32)), GATE),
    "fp8": (LanguageModel, put(GATE, lambda t: t.to(torch.float8_e4m3fn)), GATE),
    "two labels": (ScalarModel, put("score.weight", lambda t: t.repeat(2, 1)), "score.weight"),
    "bias": (ScalarModel, put("score.bias", lambda t: t + 0.5), "score.bias"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_fit_are_refused(tmp_path, damage):
    Model, change, named = DAMAGES[damage]
    save_model(random_model(Model, small_config(tie_word_embeddings=False)), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        load_model(Model, tmp_path, Grid())
    assert named in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_an_index_may_not_point_outside_its_directory(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for directory in (inside, outside):
        directory.mkdir()
        save_model(random_model(LanguageModel, small_config()), directory, 3000)
    index = inside / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    for elsewhere in ("../outside/", f"{outside}/", "sub/", 7):
        weight_map = dict(written["weight_map"])
        name = next(iter(weight_map))
        weight_map[name] = elsewhere if elsewhere == 7 else elsewhere + weight_map[name]
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match="model.safetensors.index.json.*outside the directory"):
            load_model(LanguageModel, inside, Grid())


def test_files_that_cannot_be_read_are_named(tmp_path):
    model = random_model(LanguageModel, small_config())

    def refusal(Model=LanguageModel):
        with pytest.raises(ValueError) as error:
            load_model(Model, tmp_path, Grid())
        assert "\n" not in str(error.value)
        return str(error.value)

    assert str(tmp_path / "config.json") in refusal()
    save_model(model, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for broken in (b"", whole[:100], whole[:-4], b"\xff" * 64):
        (tmp_path / "model.safetensors").write_bytes(broken)
        assert str(tmp_path / "model.safetensors") in refusal()
    (tmp_path / "model.safetensors").unlink()
    assert str(tmp_path / "model.safetensors") in refusal()
    save_model(model, tmp_path, 3000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[2]
    shard.unlink()
    assert "model-0" in refusal()
    index = tmp_path / "model.safetensors.index.json"
    for broken in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}'):
        index.write_text(broken)
        assert str(index) in refusal()
    config = tmp_path / "config.json"
    for broken in (
        "",
        "[1]",
        '{"model_type": "llama"}',
        "[" * 100_000,
        '{"model_type": "llama", "rope_scaling": "linear"}',
        '{"model_type": "llama", "rope_parameters": [1]}',
    ):
        config.write_text(broken)
        assert str(config) in refusal()


def test_a_model_of_the_other_kind_is_refused(tmp_path):
    save_model(random_model(ScalarModel, small_config()), tmp_path)
    with pytest.raises(
        ValueError, match="config.json says .*LlamaForTokenClassification.*; expected a language model"
    ):
        load_model(LanguageModel, tmp_path, Grid())
    raw = json.loads((tmp_path / "config.json").read_text())
    for classes in (["LlamaForSequenceClassification"], ["LlamaModel"], "LlamaModel", 5, [None]):
        (tmp_path / "config.json").write_text(json.dumps({**raw, "architectures": classes}))
        for Model in (LanguageModel, ScalarModel):
            with pytest.raises(ValueError, match="config.json"):
                load_model(Model, tmp_path, Grid())


def change_config(directory, **changes):
    raw = json.loads((directory / "config.json").read_text()) | changes
    raw = {name: value for name, value in raw.items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("classes", [None, [], "absent"])
def test_without_architectures_the_tensors_tell_the_head(tmp_path, classes):
    for Model in (LanguageModel, ScalarModel):
        (tmp_path / Model.head).mkdir()
        model = random_model(Model, small_config())
        save_model(model, tmp_path / Model.head)
        change_config(tmp_path / Model.head, architectures=classes)
        assert stored_head(tmp_path / Model.head) == Model.head
        assert same_parameters(load_model(Model, tmp_path / Model.head, Grid()), model)
    assert not load_model(ScalarModel, tmp_path / "lm", Grid()).score.weight.any()  # a reward model's start
    with pytest.raises(BadInput, match="expected a language model"):
        load_model(LanguageModel, tmp_path / "score", Grid())


def test_the_single_file_comes_before_an_index_and_its_shards(tmp_path):
    """As transformers looks for them; a directory of shards that a single file was put into is no mixture."""
    old, new = (random_model(LanguageModel, small_config(), seed) for seed in (0, 1))
    save_model(old, tmp_path, 3000)
    stale = {path.name: path.read_bytes() for path in tmp_path.glob("model*")}
    assert same_parameters(load_model(LanguageModel, tmp_path, Grid()), old)
    save_model(new, tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    for name, content in stale.items():
        (tmp_path / name).write_bytes(content)
    assert same_parameters(load_model(LanguageModel, tmp_path, Grid()), new)
    save_model(old, tmp_path, 3000)  # now the index has to count, here and in transformers
    assert not (tmp_path / "model.safetensors").exists()
    assert same_parameters(load_model(LanguageModel, tmp_path, Grid()), old)


def test_shards_hold_what_they_hold_whatever_the_index_says(tmp_path):
    """transformers reads the names of the files from the index, and those of the tensors from the files."""
    model = random_model(LanguageModel, small_config())
    save_model(model, tmp_path, 3000)
    index = tmp_path / "model.safetensors.index.json"
    shards = list(dict.fromkeys(json.loads(index.read_text())["weight_map"].values()))
    index.write_text(
        json.dumps({"weight_map": {f"a name of old {i}": name for i, name in enumerate(shards)}})
    )
    assert same_parameters(load_model(LanguageModel, tmp_path, Grid()), model)


@pytest.mark.parametrize("order", [1, -1])
def test_a_tensor_in_two_shards_is_refused(tmp_path, order):
    """Which one transformers takes depends on the names of the files, and it says nothing."""
    save_model(random_model(LanguageModel, small_config()), tmp_path, 3000)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict(list(weight_map.items())[::order])}))
    first, *_, last = sorted(set(weight_map.values()))
    name = next(name for name, shard in weight_map.items() if shard == first)
    stale = {name: torch.zeros_like(load_file(tmp_path / first)[name])}
    save_file(load_file(tmp_path / last) | stale, tmp_path / last)
    with pytest.raises(BadInput, match=f"{name} is in model-0.* and model-0.*; expected each tensor in one"):
        load_model(LanguageModel, tmp_path, Grid())


def test_saved_rope_angles_are_ignored(tmp_path):
    model = random_model(LanguageModel, small_config())
    save_model(model, tmp_path)
    path = tmp_path / "model.safetensors"
    angles = {
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((4,), torch.nan),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(2, 9, dtype=torch.int64),
    }
    save_file(load_file(path) | angles, path)
    assert same_parameters(load_model(LanguageModel, tmp_path, Grid()), model)
    assert same_parameters(load_model(ScalarModel, tmp_path, Grid()).model, model.model)


@pytest.mark.parametrize("change", [lambda x: 2 * x, lambda x: x[:28].clone(), lambda x: x[:, :19].clone()])
def test_a_tied_head_that_differs_is_not_thrown_away(tmp_path, change):
    """Equal matrices are tied, different ones are both used (transformers 5); no shape is taken on trust."""
    save_model(random_model(LanguageModel, small_config()), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    head = change(tensors["model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": head}, path)
    if head.shape != tensors["model.embed_tokens.weight"].shape:
        with pytest.raises(BadInput, match="lm_head.weight is F32"):
            load_model(LanguageModel, tmp_path, Grid())
        return
    model = load_model(LanguageModel, tmp_path, Grid())
    assert not model.cfg.tie_word_embeddings and torch.equal(model.head_weight, head)
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    save_model(model, tmp_path / "again")
    assert same_parameters(load_model(LanguageModel, tmp_path / "again", Grid()), model)
    assert load_model(ScalarModel, tmp_path, Grid()).score.weight.shape == (1, 20)


def test_a_tied_matrix_may_be_stored_under_either_name(tmp_path):
    policy = random_model(LanguageModel, small_config())
    save_model(policy, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path)
    assert same_parameters(load_model(LanguageModel, tmp_path, Grid()), policy)
    assert same_parameters(load_model(ScalarModel, tmp_path, Grid()).model, policy.model)
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(BadInput, match="missing: .*embed_tokens"):
        load_model(LanguageModel, tmp_path, Grid())


@pytest.mark.parametrize(
    "name, says",
    [
        ("pytorch_model.bin", "AutoModelForCausalLM.from_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "AutoModelForCausalLM.from_pretrained"),
        ("model.fp16.safetensors", "variant"),
        ("smollm2-q4.gguf", "gguf_file"),
        ("consolidated.00.pth", "convert_llama_weights_to_hf"),
        ("tf_model.h5", "from_tf"),
        ("flax_model.msgpack", "from_flax"),
    ],
)
def test_other_weights_are_named_with_a_way_out(tmp_path, name, says):
    save_model(random_model(LanguageModel, small_config()), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(BadInput) as error:
        load_model(LanguageModel, tmp_path, Grid())
    assert f"found {name}, which is not read; convert it with" in str(error.value)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_adapters_are_no_model(tmp_path):
    """Alone, or beside a whole model: there transformers would read the base that they name, and add them."""
    base = random_model(LanguageModel, small_config())
    save_model(base, tmp_path / "base")
    adapted = with_adapters(load_model(LanguageModel, tmp_path / "base", Grid()))
    for directory in (tmp_path / "alone", tmp_path / "base"):
        save_adapter(adapted, directory, tmp_path / "base")
        for Model in (LanguageModel, ScalarModel):
            with pytest.raises(
                BadInput, match=f"holds PEFT adapters of {tmp_path / 'base'}, not a whole model"
            ):
                load_model(Model, directory, Grid())


LOADER = """import sys
sys.path.insert(0, sys.argv[1])
from model import LanguageModel, build_model, load_model, read_config
from parallel import Grid
build_model(LanguageModel, read_config(sys.argv[2])[0], Grid())  # torch's own modules for the meta device
kib = lambda key: int(open("/proc/self/status").read().split(key)[1].split()[0])
before = kib("VmRSS:")
load_model(LanguageModel, sys.argv[2], Grid(tp_rank=int(sys.argv[3]), tp_size=2))
print(1024 * before, 1024 * kib("VmHWM:"))"""


def memory_of_loading(directory, cfg, dtype, ranks):
    """-> [(bytes before, highest while loading)] of these ranks of tp 2, side by side; bytes of the model
    in fp32, as it is loaded."""
    model = build_model(LanguageModel, cfg, Grid(), dtype)
    for param in model.parameters():
        param.data.fill_(0.5)
    save_model(model, directory)
    size = 4 * sum(p.numel() for p in model.parameters())
    del model, param
    start = lambda rank: subprocess.Popen(
        [sys.executable, "-c", LOADER, Path(__file__).parents[1], directory, str(rank)],
        stdout=subprocess.PIPE,
        text=True,
    )
    return [tuple(map(int, process.communicate()[0].split())) for process in list(map(start, ranks))], size


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


@linux
def test_loading_takes_a_share_of_the_model_and_one_tensor(tmp_path):
    cfg = small_config(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, head_dim=64
    )
    found, size = memory_of_loading(tmp_path, cfg, torch.float32, [1])
    assert size > 90e6
    ((before, peak),) = found
    assert (
        0.45 * size < peak - before < 0.6 * size
    )  # a file that stays open while it is read would make it the whole size


@linux
@pytest.mark.slow
def test_loading_a_1b_model(tmp_path):
    cfg = ModelConfig(128256, 2048, 8192, 16, 32, 8, 64)  # Llama-3.2-1B
    found, size = memory_of_loading(tmp_path, cfg, torch.bfloat16, [0, 1])
    shutil.rmtree(tmp_path)
    print(f"{size / 1e9:.2f} GB in fp32; highest of each process: {[peak / 1e9 for _, peak in found]} GB")
    assert 4.9e9 < size < 5e9 and all(peak < 0.75 * size for _, peak in found)


# -------------------------------------------------------------------------------- adapters


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_adapters(base, rank=3, alpha=0):
    """As after some training: B, which starts as 0, and the scalar head are drawn."""
    model, generator = add_lora(base, rank, 0, alpha), torch.Generator().manual_seed(1)
    for name, param in model.named_parameters():
        if "lora_B" in name or "score" in name:
            param.data.copy_(0.3 * torch.randn(param.shape, generator=generator))
    return model


@pytest.mark.parametrize("Model", [LanguageModel, ScalarModel])
def test_adapters_start_as_the_base_and_leave_it_alone(Model):
    base = random_model(Model, small_config(model_type="qwen2", tie_word_embeddings=False)).bfloat16()
    ids, before = random_ids(2, 9), {n: p.clone() for n, p in base.named_parameters()}
    expected = base.model(ids)
    model = add_lora(base, 3, 0)
    assert torch.equal(model.model(ids), expected)
    model.model(ids).square().sum().backward()
    learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(learns) - {"score.weight"} == {
        f"model.layers.{i}.{'mlp' if j > 3 else 'self_attn'}.{name}.lora_{x}"
        for i in range(2)
        for j, name in enumerate(SEVEN)
        for x in "AB"
    }
    assert ("score.weight" in learns) == (Model is ScalarModel)
    for name, param in learns.items():
        if "lora" in name:
            assert param.dtype == param.grad.dtype == torch.float32
            assert (
                ("lora_B" in name) == (param == 0).all().item() == (param.grad != 0).any().item()
            )  # A learns once B is not 0
            param.data.normal_()
    assert not torch.equal(model.model(ids), expected) and torch.equal(base.model(ids), expected)
    assert all(
        p.data_ptr() == dict(model.named_parameters())[n].data_ptr() and torch.equal(p, before[n])
        for n, p in base.named_parameters()
    )


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_adapters_are_a_low_rank_change_of_the_weights(tmp_path, kv_heads):
    base = random_model(LanguageModel, small_config(model_type="qwen2", num_key_value_heads=kv_heads))
    model, by_hand, ids = with_adapters(base, alpha=6), copy.deepcopy(base), random_ids(2, 9)
    adapters, weights = dict(model.named_parameters()), dict(by_hand.named_parameters())
    for name in [n.removesuffix(".lora_A") for n in adapters if "lora_A" in n]:
        A, B = adapters[name + ".lora_A"], adapters[name + ".lora_B"]
        assert A.shape[0] == B.shape[1] == 3 and A.std().item() == pytest.approx(A.shape[1] ** -0.5, rel=0.3)
        weights[name + ".weight"].data += 6 / 3 * (B @ A).detach()
    near(model.model(ids), by_hand.model(ids))
    prompts = [row.tolist() for row in ids]
    assert generate(model, prompts, 6, [3], 0)[0] == generate(by_hand, prompts, 6, [3], 0)[0]
    save_model(model, tmp_path)
    merged = load_model(LanguageModel, tmp_path, Grid())
    assert merged.cfg == base.cfg
    for name, param in merged.named_parameters():
        near(param, weights[name], 1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("Model", [LanguageModel, ScalarModel])
def test_peft_reads_our_adapters(tmp_path, Model, kind):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    policy = random_model(LanguageModel, small_config(model_type=kind))
    (tmp_path / "base").mkdir()
    save_model(policy, tmp_path / "base")
    model = with_adapters(load_model(Model, tmp_path / "base", Grid()), alpha=6)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    Auto = (
        peft.AutoPeftModelForCausalLM if Model is LanguageModel else peft.AutoPeftModelForTokenClassification
    )
    more = {} if Model is LanguageModel else {"num_labels": 1}
    theirs, ids = Auto.from_pretrained(tmp_path / "adapter", **more).eval(), random_ids(2, 30)
    assert (
        isinstance(theirs.base_model.model, transformers.PreTrainedModel) and theirs.active_peft_config.r == 3
    )
    ours = (
        model.logits(model.model(ids))
        if Model is LanguageModel
        else model.scalars(model.model(ids)).unsqueeze(-1)
    )
    near(theirs(ids).logits.detach(), ours.detach(), 2e-4)


# -------------------------------------------------------------------------------- config.json


def test_config_in_the_old_form_and_with_rope_parameters():
    expected = ModelConfig(
        100, 64, 96, 3, 8, 2, 8, 1e-5, 5e5, RopeScaling(8.0, 1.0, 4.0, 8192), False, 2048, "llama"
    )
    assert ModelConfig.from_dict({**RAW, "rope_theta": 5e5, "rope_scaling": LLAMA3}) == expected
    assert ModelConfig.from_dict({**RAW, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}) == expected
    assert ModelConfig.from_dict({**RAW, "rope_theta": 5e5, "rope_parameters": LLAMA3}) == expected
    both = {**RAW, "rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}
    assert ModelConfig.from_dict(both) == expected  # transformers lets rope_scaling win
    # so it does with a length outside of it, and takes the model's own if there is none
    length = "original_max_position_embeddings"
    without = {key: value for key, value in LLAMA3.items() if key != length}
    raw = {**RAW, "rope_theta": 5e5, "hidden_act": "swish"}
    for scaling in (LLAMA3 | {length: 16}, without):
        assert ModelConfig.from_dict({**raw, "rope_scaling": scaling, length: 8192}) == expected
    taken = ModelConfig.from_dict({**raw, "rope_scaling": without, "max_position_embeddings": 4096})
    assert taken.rope_scaling.original_max_position_embeddings == 4096
    plain = ModelConfig(100, 64, 96, 3, 8, 2, 16, 1e-5, 5e5, None, True, 4096, "qwen2")
    shared = {
        **RAW,
        "model_type": "qwen2",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    }
    assert ModelConfig.from_dict({**shared, "rope_theta": 5e5, "rope_scaling": None}) == plain
    assert (
        ModelConfig.from_dict({**shared, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
        == plain
    )


def test_config_defaults_are_transformers_own():
    needed = {k: RAW[k] for k in RAW if k not in ("num_key_value_heads", "rms_norm_eps", "hidden_act")}
    cfg = ModelConfig.from_dict({**needed, "head_dim": None})
    assert cfg == ModelConfig(100, 64, 96, 3, 8, 8, 8, 1e-6, 10000.0, None, False, 2048, "llama")
    needed |= {"num_attention_heads": 64, "model_type": "qwen2"}
    cfg = ModelConfig.from_dict(needed | {"head_dim": 2})
    assert cfg == ModelConfig(100, 64, 96, 3, 64, 32, 2, 1e-6, 10000.0, None, False, 32768, "qwen2")
    assert (
        ModelConfig.from_dict(needed | {"head_dim": 2, "num_key_value_heads": None}).num_key_value_heads == 64
    )


@pytest.mark.parametrize(
    "cfg", [small_config(), small_config(rope_scaling=SCALING, tie_word_embeddings=False, model_type="qwen2")]
)
def test_config_round_trip(cfg):
    raw = json.loads(json.dumps(cfg.to_dict("lm")))
    assert ModelConfig.from_dict(raw) == cfg
    family = {"llama": "Llama", "qwen2": "Qwen2"}[cfg.model_type]
    assert raw["architectures"] == [f"{family}ForCausalLM"]
    score = cfg.to_dict("score")
    assert score["architectures"] == [f"{family}ForTokenClassification"]
    assert score["num_labels"] == 1 and not score["tie_word_embeddings"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"model_type": None}, "model_type"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
        ({"rope_scaling": {k: LLAMA3[k] for k in LLAMA3 if k != "factor"}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
        ({"is_causal": False}, "is_causal"),
        ({"transformers_weights": "other.safetensors"}, "'other.safetensors'; rename"),
        ({"vocab_size": None}, "number"),
        ({"hidden_size": "wide"}, "wide"),
        ({"num_hidden_layers": 0}, "positive"),
        ({"num_attention_heads": 0}, "zero"),
        ({"num_key_value_heads": 3}, "groups"),
        ({"head_dim": 7}, "even"),
        ({"intermediate_size": -96}, "positive"),
    ],
)
def test_configs_that_would_go_wrong_are_refused(change, reason):
    ModelConfig.from_dict(RAW)
    with pytest.raises(ValueError, match=reason):
        ModelConfig.from_dict({**RAW, **change})


def test_a_missing_size_is_named():
    with pytest.raises(ValueError, match="intermediate_size"):
        ModelConfig.from_dict({k: RAW[k] for k in RAW if k != "intermediate_size"})


# -------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize(
    "cfg",
    [
        small_config(),
        small_config(tie_word_embeddings=False, rope_theta=5e5),
        small_config(rope_scaling=SCALING),
        small_config(model_type="qwen2"),
        small_config(model_type="qwen2", tie_word_embeddings=False, rms_norm_eps=1e-3),
    ],
    ids=["tied", "untied", "llama3", "qwen2", "qwen2-untied"],
)
def test_transformers_gives_the_same_numbers(tmp_path, cfg):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**cfg.to_dict("lm"))
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            param.copy_(0.2 * torch.randn(param.shape, generator=generator) + ("norm" in name))
    theirs.save_pretrained(tmp_path)
    ours = load_model(LanguageModel, tmp_path, Grid())
    assert ours.cfg == cfg
    ids = random_ids(2, 60)  # longer than SCALING's original context
    with torch.no_grad():
        near(ours.logits(ours.model(ids)), theirs(ids).logits, 2e-4)

    back = tmp_path / "back"
    back.mkdir()
    save_model(ours, back, 3000)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again.float()(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_transformers_reads_our_reward_model_and_we_read_its(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    ours = random_model(ScalarModel, small_config(model_type=kind))
    save_model(ours, tmp_path)
    theirs, info = transformers.AutoModelForTokenClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = random_ids(2, 30)
    with torch.no_grad():
        expected = theirs.train().float()(ids).logits  # in training mode: a dropout would show
        assert expected.shape == (2, 30, 1)
        near(ours.scalars(ours.model(ids)), expected[..., 0], 2e-4)
    theirs.save_pretrained(tmp_path / "back")
    assert same_parameters(load_model(ScalarModel, tmp_path / "back", Grid()), ours)


def test_transformers_reads_the_same_numbers_from_odd_directories(tmp_path):
    """A stale index, saved angles, a tied head that differs, a tied matrix under its other name, no class."""
    transformers = pytest.importorskip("transformers")
    old, new = (random_model(LanguageModel, small_config(), seed) for seed in (0, 1))
    embedding, head, ids = "model.embed_tokens.weight", "lm_head.weight", random_ids(2, 30)

    def logits_of(what, change):
        directory = tmp_path / what
        save_model(new, directory)
        tensors = load_file(directory / "model.safetensors")
        save_file(change(tensors) or tensors, directory / "model.safetensors", metadata={"format": "pt"})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).float().eval()
        ours = load_model(LanguageModel, directory, Grid())
        with torch.no_grad():
            expected = theirs(ids).logits
            near(ours.logits(ours.model(ids)), expected, 2e-4)
        return expected

    def doubled_head(tensors):
        tensors[head] = 2 * tensors[embedding]

    usual = logits_of("usual", lambda tensors: None)
    save_model(old, tmp_path / "stale", 3000)
    index = tmp_path / "stale/model.safetensors.index.json"
    content = index.read_text()
    save_model(new, tmp_path / "stale")
    index.write_text(content)
    assert torch.equal(logits_of("stale", lambda tensors: None), usual)
    angle = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert torch.equal(logits_of("angles", lambda tensors: tensors | angle), usual)
    assert torch.equal(
        logits_of("renamed", lambda tensors: tensors.update({head: tensors.pop(embedding)})), usual
    )
    assert not torch.equal(logits_of("doubled", doubled_head), usual)
    change_config(tmp_path / "usual", architectures="absent")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "usual").float().eval()
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, usual)
    assert same_parameters(load_model(LanguageModel, tmp_path / "usual", Grid()), new)
