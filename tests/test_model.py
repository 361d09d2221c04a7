"""The decoder, its heads and sampling, against torch's own ops, slow loops and numbers by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import near, random_ids, random_model, same_parameters, small_config

from data import Example, collate
from model import (
    LanguageModel,
    RMSNorm,
    RopeScaling,
    ScalarModel,
    apply_rope,
    build_model,
    generate_plainly,
    init_weights,
    response_log_softmax,
    rope_frequencies,
    rope_table,
    sample_tokens,
    sampling_uniforms,
    token_logprobs,
)
from parallel import Grid
from support.sampling import KVCache, generate

# With E = 8 and theta = 10000: one frequency blended, the others divided.
SCALING = RopeScaling(8.0, 1.0, 2.0, 16)


def chi_square(counts, probs):
    """Distance of counts from their expectation; about its degrees of freedom if the draws are from probs."""
    expected = probs.double() * counts.sum()
    return ((counts - expected).square() / expected).sum().item()


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
