"""The fast paths against the plain ones: packed rows, chunked log-probabilities, recomputed blocks,
refilled slots."""

import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import near, random_ids, random_model, small_config

from classroom import bench
from data import Example, collate, spans
from model import (
    LanguageModel,
    Packed,
    ScalarModel,
    add_lora,
    at_actions,
    at_states,
    build_model,
    causal_attention,
    init_weights,
    response_log_softmax,
    rope_frequencies,
    sample_tokens,
    sampling_uniforms,
    token_logprobs,
)
from parallel import Grid, linear
from qrm import masked_mean, qrm_loss, response_scores, reward_model_loss, token_scores
from support import tokenizers
from support.sampling import REORDERED, KVCache, _ReorderedProduct, generate, reordered_weights
from support.settings import Loss

# Two answers to one prompt, three to another, one alone; lengths that coincide (3 + 4 twice) and lengths
# that do not.
GROUPS = [([5, 6, 7], [[1, 2, 3, 4], [9]]), ([8], [[1, 2], [3], [4, 5, 6]]), ([9, 8, 7], [[4, 4, 1, 2]])]
EXAMPLES = [Example(prompt, response) for prompt, responses in GROUPS for response in responses]


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# -------------------------------------------------------------------------------- the layout


def test_the_layout_by_hand():
    packed = Packed.of(*collate(EXAMPLES[:3]))
    assert packed.ids.tolist() == [[5, 6, 7, 1, 2, 3, 4, 9, 8, 1, 2]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 3, 0, 1, 2]]
    assert packed.states.tolist() == [
        2,
        3,
        4,
        5,
        2,
        8,
        9,
    ]  # the first token of both answers is said after the 7
    assert packed.actions.tolist() == [3, 4, 5, 6, 7, 9, 10]


def test_only_neighbours_with_the_same_prompt_share_it():
    rows = [Example([1, 2], [3]), Example([1, 2], [4]), Example([1], [2, 3]), Example([1, 2], [3])]
    assert Packed.of(*collate(rows)).ids.tolist() == [[1, 2, 3, 4, 1, 2, 3, 1, 2, 3]]


def test_a_row_without_a_response_is_harmless():
    ids, mask = collate(EXAMPLES[:2])
    mask[1] = False
    packed = Packed.of(ids, mask)
    assert packed.actions.tolist() == [3, 4, 5, 6] and packed.ids.shape[1] == 8


def test_spans_by_hand():
    assert spans([], 5) == [] and spans([9], 5) == [(0, 1)] and spans([1] * 5, 2) == [(0, 2), (2, 4), (4, 5)]
    assert spans([3, 3, 3, 9, 1], 6) == [(0, 2), (2, 3), (3, 4), (4, 5)]


# -------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_packed_is_each_row_alone(kind):
    model = random_model(ScalarModel, small_config(model_type=kind))
    ids, mask = collate(EXAMPLES)
    weights = torch.randn(
        ids.shape[0], ids.shape[1] - 1, model.cfg.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    for fast, shift in ((at_states, 0), (at_actions, 1)):
        x = fast(model, ids, mask)
        found = gradients((x * weights[mask]).sum(), model)
        alone, loss = [], 0.0
        for i, (prompt, response) in enumerate(EXAMPLES):
            rows = model.model(torch.tensor([prompt + response]))[
                0, len(prompt) - 1 + shift : len(prompt) - 1 + shift + len(response)
            ]
            alone.append(rows)
            loss = loss + (rows * weights[i][mask[i]]).sum()
        near(x, torch.cat(alone))
        near(found, gradients(loss, model))


def test_the_loss_of_packed_pairs_is_the_plain_one():
    model = random_model(ScalarModel, small_config())
    ids, mask = collate([*EXAMPLES[:2], *EXAMPLES[2:4], EXAMPLES[5], EXAMPLES[0]])
    plain, stats = qrm_loss(token_scores(model, ids), mask)
    loss, found = reward_model_loss(model, ids, mask, Loss())
    near(loss, plain)
    assert found == pytest.approx(stats, rel=1e-4)
    near(gradients(loss, model), gradients(plain, model))
    near(response_scores(model, ids, mask), token_scores(model, ids) * mask)


def test_a_neighbour_changes_nothing():
    model, policy = random_model(ScalarModel, small_config()), random_model(LanguageModel, small_config())
    other = [*EXAMPLES[:2], Example([28], [27, 26]), Example([28], [25]), *EXAMPLES[4:]]
    found = [
        (response_scores(model, *collate(rows)), token_logprobs(policy, *collate(rows))[0])
        for rows in (EXAMPLES, other)
    ]
    for before, after in zip(*found):
        for i in (0, 1, 5):
            assert torch.equal(before[i], after[i])
        assert not torch.equal(before[2], after[2])


def test_pads_and_ids_behind_the_answer_are_not_read():
    model = random_model(ScalarModel, small_config())
    (ids, mask), (other, _) = collate(EXAMPLES, pad_id=0), collate(EXAMPLES, pad_id=28)
    assert torch.equal(response_scores(model, ids, mask), response_scores(model, other, mask))


def test_flex_attention_has_the_same_numbers():
    """Its mask, forward: on the CPU it has no backward."""
    model, (ids, mask) = random_model(ScalarModel, small_config()), collate(EXAMPLES)
    flex = build_model(ScalarModel, model.cfg, Grid(), flex=True)
    flex.load_state_dict(model.state_dict())
    assert Packed.of(ids, mask, flex=True).flex and not Packed.of(ids, mask).flex
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        plain = [at_states(model, ids, mask), at_actions(model, ids, mask)]
        patch.setattr("model.causal_attention", None)  # not used any more
        near(at_states(flex, ids, mask), plain[0])
        near(at_actions(flex, ids, mask), plain[1])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_log_probabilities_in_chunks(rows, tied):
    policy = random_model(LanguageModel, small_config(tie_word_embeddings=tied))
    ids, mask = collate(EXAMPLES)
    logprobs, entropy = token_logprobs(policy, ids, mask, 0.7, rows)
    log_pi = response_log_softmax(policy, ids, mask, 0.7)
    plain = log_pi.gather(-1, ids[:, 1:][mask][:, None])[:, 0]
    weights = torch.linspace(-1, 2, len(plain))
    near(logprobs[mask], plain)
    near(entropy[mask], -(log_pi.exp() * log_pi).sum(-1))
    assert not entropy.requires_grad and not logprobs[~mask].any()
    near(gradients((logprobs[mask] * weights).sum(), policy), gradients((plain * weights).sum(), policy))


def test_logits_out_of_range_are_finite():
    policy, (ids, mask) = (
        random_model(LanguageModel, small_config(tie_word_embeddings=False)),
        collate(EXAMPLES),
    )
    policy.lm_head.weight.data *= 1e4
    logprobs, entropy = token_logprobs(policy, ids, mask)
    assert torch.isfinite(logprobs).all() and (logprobs <= 0).all() and (entropy.abs() < 1e-3).all()
    assert torch.isfinite(gradients(logprobs.sum(), policy)).all()


def test_a_frozen_head_gets_no_gradient():
    policy, (ids, mask) = (
        random_model(LanguageModel, small_config(tie_word_embeddings=False)),
        collate(EXAMPLES),
    )
    policy.lm_head.weight.requires_grad_(False)
    token_logprobs(policy, ids, mask)[0].sum().backward()
    assert policy.lm_head.weight.grad is None and policy.model.norm.weight.grad.abs().max() > 0


# -------------------------------------------------------------------------------- less work, less memory


def kept_bytes(work, model):
    """What autograd keeps from the forward for the backward, weights apart."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), (x.untyped_storage().nbytes(), x))[1],
        lambda x: x,
    ):
        loss = work()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return loss, sum(n for place, (n, _) in kept.items() if place not in weights)


def test_remat_trades_memory_for_time():
    start, (ids, mask) = random_model(ScalarModel, small_config(num_hidden_layers=6)), collate(EXAMPLES * 4)
    found = []
    for remat in (False, True):
        model = build_model(ScalarModel, start.cfg, Grid(), remat=remat)
        model.load_state_dict(start.state_dict())
        calls = []
        handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        loss, size = kept_bytes(lambda: reward_model_loss(model, ids, mask, Loss())[0], model)
        found.append((gradients(loss, model), size, len(calls)))
        handle.remove()
    (plain, much, once), (again, little, twice) = found
    assert torch.equal(plain, again) and (once, twice) == (1, 2) and little < much / 3


def test_adapters_keep_how_the_model_computes():
    """And nothing is set for other models: flex and remat belong to the one that they were given to."""
    for flex, remat in ((True, False), (False, True)):
        base = init_weights(
            build_model(LanguageModel, small_config(), Grid(), flex=flex, remat=remat), seed=0
        )
        for model in (base, add_lora(base, rank=2, seed=1)):
            assert (model.flex, model.model.remat) == (flex, remat)
    other = random_model(ScalarModel, small_config())
    assert not other.flex and not other.model.remat


def test_what_is_kept_for_backward_does_not_grow_with_the_vocabulary():
    sizes = []
    for vocab in (29, 2900):
        policy, (ids, mask) = (
            random_model(LanguageModel, small_config(vocab_size=vocab, tie_word_embeddings=False)),
            collate(EXAMPLES),
        )
        sizes.append(kept_bytes(lambda: token_logprobs(policy, ids, mask)[0].sum(), policy)[1])
    assert sizes[0] == sizes[1]


def test_a_pair_reads_its_prompt_once():
    prompt = list(range(20))
    assert bench.share_of_tokens([(Example(prompt, [1] * 15), Example(prompt, [2] * 5))]) == 40 / 60


GSM8K = next(
    (
        p / "data" / "gsm8k"
        for p in (Path(__file__).parents[1], Path(__file__).parents[2] / "shared")
        if (p / "data" / "gsm8k").exists()
    ),
    None,
)


@pytest.mark.skipif(GSM8K is None, reason="needs data/gsm8k/pairs_test.jsonl")
def test_a_pair_of_gsm8k_costs_at_most_083_of_its_tokens():
    """With the recipe's chat template, whose 35 tokens belong to the prompt, and a token for each of the
    frequent words."""
    rows = [
        json.loads(line)
        for line in (GSM8K / "pairs_test.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    ]
    tokenizer = tokenizers.build_tokenizer(
        common_words(" ".join(row[k] for row in rows for k in ("instruction", "chosen", "rejected")))
    )
    chat = [0] * 35
    pairs = [
        tuple(
            Example(chat + tokenizer.encode_prompt(row["instruction"]), tokenizer.encode_response(row[k]))
            for k in ("chosen", "rejected")
        )
        for row in rows
    ]
    assert 0.75 < bench.share_of_tokens(pairs) <= 0.83


def common_words(text):
    import collections
    import re

    return [
        word
        for word, _ in collections.Counter(re.findall(r" ?[^\W\d_]+|[^\s\w]+", text)).most_common(3800)
        if len(word.encode()) > 1
    ]


# -------------------------------------------------------------------------------- sampling


def watch(policy, monkeypatch):
    """-> (tokens read as prompts in each prefill, slots of each step)"""
    prefills, steps, prefill, step = [], [], KVCache.prefill, KVCache.step
    monkeypatch.setattr(
        KVCache,
        "prefill",
        lambda self, prompts, slots: (prefills.append(len(prompts)), prefill(self, prompts, slots))[1],
    )
    monkeypatch.setattr(
        KVCache, "step", lambda self, tokens: (steps.append(len(tokens)), step(self, tokens))[1]
    )
    return prefills, steps


def narrow_caches(monkeypatch):
    """generate's caches grow by 8 columns, so that a short test sees them grow."""
    monkeypatch.setattr(
        "support.sampling.KVCache",
        lambda policy, slots, graphs, spare: KVCache(policy, slots, graphs, spare=8),
    )


def test_recorded_steps_sample_the_same_tokens(monkeypatch):
    """What a CUDA graph does to a step, on the CPU: one static input, one static output, and everything
    else where it was."""
    made, played = [], []

    def record(f, x):
        x, cache = x.clone(), f.func.__self__
        y, there = f(x), [t.data_ptr() for t in (*cache.keys, *cache.values, cache.lengths)]
        made.append((len(x), f.args[0]))

        def replay(new):
            assert there == [t.data_ptr() for t in (*cache.keys, *cache.values, cache.lengths)]
            played.append(len(new))
            return y.copy_(f(x.copy_(new)))

        return replay

    policy = random_model(LanguageModel, small_config())
    prompts = [random_ids(2 + i % 5, seed=i).tolist() for i in range(20)]
    expected = [
        generate(policy, prompts, 20, [0, 4, 9], temperature, seed=3, batch_size=8)
        for temperature in (1.0, 0.0)
    ]
    monkeypatch.setattr("support.sampling.record", record)
    narrow_caches(monkeypatch)
    assert expected == [
        generate(policy, prompts, 20, [0, 4, 9], temperature, seed=3, batch_size=8, graphs=True)
        for temperature in (1.0, 0.0)
    ]
    assert (
        len(made) < len(played) / 2
        and {width for _, width in made} == {8, 16, 24, 32}
        and len({slots for slots, _ in made}) > 1
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_sample_the_same_tokens():
    policy = random_model(LanguageModel, small_config()).cuda()
    policy.grid = Grid(torch.device("cuda"))
    prompts = [random_ids(2 + i % 5, seed=i).tolist() for i in range(20)]
    expected = generate(policy, prompts, 20, [0, 4, 9], 0.0, batch_size=8)
    assert generate(policy, prompts, 20, [0, 4, 9], 0.0, batch_size=8, graphs=True) == expected


def test_attention_may_answer_in_any_memory_layout(monkeypatch):
    """On CUDA, scaled_dot_product_attention returns (B, H, T, E) that lies in memory as (B, T, H, E)."""
    policy, prompts = (
        random_model(LanguageModel, small_config()),
        [random_ids(5, seed=1).tolist(), random_ids(3, seed=2).tolist()],
    )
    expected, plain = generate(policy, prompts, 6, [], 0.0), torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **more: plain(*args, **more).transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert generate(policy, prompts, 6, [], 0.0) == expected


def test_where_weights_cannot_be_reordered_nothing_happens(monkeypatch):
    policy = random_model(LanguageModel, small_config())
    monkeypatch.setattr("support.sampling.reordered_weights", partial(reordered_weights, at_least=1))
    expected = generate(policy, [[3, 1, 4]], 5, [], 0.0)
    monkeypatch.setattr("support.sampling.REORDERED", ())
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None, raising=False)
    assert generate(policy, [[3, 1, 4]], 5, [], 0.0) == expected


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        generate(random_model(LanguageModel, small_config()), [[3, 1], []], 5, [], 0.0)


def test_what_sampling_leaves_behind_can_be_trained_with():
    """generate may be the first to ask for the angles of RoPE, which are kept."""
    rope_frequencies.cache_clear()
    policy = random_model(LanguageModel, small_config())
    generate(policy, [[3, 1]], 2, [], 0.0)
    assert (
        not rope_frequencies(policy.cfg, torch.device("cpu")).is_inference()
        and rope_frequencies.cache_info().currsize == 1
    )
    token_logprobs(policy, torch.tensor([[3, 1, 4]]), torch.ones(1, 2, dtype=torch.bool))[0].sum().backward()


def test_a_row_of_nan_gets_an_id():
    """The run then ends by its losses that are not finite, not by an index error."""
    assert sample_tokens(torch.full((2, 7), torch.nan), torch.tensor([0.0, 0.9])).max() < 7


def test_the_samples_of_a_prompt_read_it_once():
    policy, read = random_model(LanguageModel, small_config()), []
    policy.model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    prompts = [random_ids(6, seed=1).tolist()] * 5 + [random_ids(4, seed=2).tolist()] * 3
    responses, _ = generate(policy, prompts, 4, [], 1.0, seed=0)
    assert read == [10, 8, 8, 8] and len({tuple(r) for r in responses[:5]}) > 1
    alone = [generate(policy, [prompt], 4, [], 0)[0][0] for prompt in (prompts[0], prompts[5])]
    assert generate(policy, prompts, 4, [], 0)[0] == [alone[0]] * 5 + [alone[1]] * 3


def test_what_all_prompts_begin_with_is_read_once():
    """A chat template; and a prompt that is the beginning of another one."""
    policy, read = random_model(LanguageModel, small_config()), []
    policy.model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    template = random_ids(7, seed=1).tolist()
    prompts = [template + rest for rest in ([3, 1], [4], [4], [], [4, 1, 5, 9], [2, 6])]
    responses = generate(policy, prompts, 5, [], 0.0)[0]
    assert read == [6 + 1 + 2 + 3 + 3 + 5] + 4 * [
        6
    ]  # the template but its last token, then what is left of five different prompts
    assert (
        responses == [generate(policy, [prompt], 5, [], 0.0)[0][0] for prompt in prompts]
        and len(set(map(tuple, responses))) > 2
    )


def test_the_cache_grows_with_its_longest_answer(monkeypatch):
    """Not with what answers might need."""
    policy, seen, step = random_model(LanguageModel, small_config()), [], KVCache.step

    def spy(self, tokens):
        x = step(self, tokens)
        seen.append((int(self.lengths.max()) + 1, self.keys[0].shape[2], self.values[-1].shape[2]))
        return x

    monkeypatch.setattr(KVCache, "step", spy)
    narrow_caches(monkeypatch)
    prompts = [random_ids(2 + i % 5, seed=i).tolist() for i in range(6)]
    responses, _ = generate(policy, prompts, 2_000, [0], 1.0, seed=3, batch_size=3)
    assert 40 < max(map(len, responses)) < 1_000 and all(
        used <= keys == values < used + 8 for used, keys, values in seen[:5]
    )
    assert max(keys for _, keys, _ in seen) <= max(map(len, responses)) + 6 + 8


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_step_attends_to_all_that_its_slot_has_read(dtype, error):
    """Against softmax in fp64 over lists of keys and values, while the cache grows and loses a slot."""
    if dtype == torch.bfloat16 and dtype not in REORDERED:
        pytest.skip("oneDNN has no bf16 products here")
    policy = random_model(LanguageModel, small_config(num_hidden_layers=1)).to(dtype)
    cfg, generator = policy.cfg, torch.Generator().manual_seed(0)
    H, K, E = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    cache = KVCache(policy, 3, spare=8)
    assert cache.by_products == (dtype == torch.bfloat16) and H > K > 1
    keys, values = [[] for _ in range(3)], [[] for _ in range(3)]  # of each slot
    for step in range(20):
        if step == 5:
            cache.keep_slots(torch.tensor([0, 2]))
            del keys[1], values[1]
        q, k, v = (
            2 * torch.randn(1, len(keys), heads, E, generator=generator).to(dtype) for heads in (H, K, K)
        )
        cache.model = lambda ids, positions, attend: attend(0, q, k, v)
        found = cache.step(torch.zeros(len(keys), dtype=torch.int64)).double()  # (B, H, E)
        cache.lengths.add_(1)
        for slot in range(len(keys)):
            keys[slot].append(k[0, slot].double().repeat_interleave(H // K, 0))  # (H, E)
            values[slot].append(v[0, slot].double().repeat_interleave(H // K, 0))
            scores = torch.einsum("he,the->ht", q[0, slot].double(), torch.stack(keys[slot])) / E**0.5
            exact = torch.einsum("ht,the->he", scores.softmax(-1), torch.stack(values[slot]))
            assert (found[slot] - exact).abs().max() < error * torch.stack(values[slot]).abs().max()
    assert cache.keys[0].shape == cache.values[0].shape == (2, K, 24, E)


@pytest.mark.skipif(not REORDERED, reason="oneDNN lays out no weights here")
@pytest.mark.parametrize(
    "changes", [{}, {"model_type": "qwen2", "tie_word_embeddings": True}, {"lora": 2}, {"bf16": True}]
)
def test_reordered_weights_sample_the_same_tokens(changes, monkeypatch):
    config = small_config(**{k: v for k, v in changes.items() if k not in ("lora", "bf16")})
    policy = random_model(LanguageModel, config)
    if "bf16" in changes:
        if torch.bfloat16 not in REORDERED:
            pytest.skip("oneDNN has no bf16 products here")
        policy = policy.bfloat16()
    if "lora" in changes:
        policy = add_lora(policy, changes["lora"], seed=1)
        for name, param in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(param, 0.3)
    prompts, used, read = [random_ids(2 + i % 5, seed=i).tolist() for i in range(20)], [], set()
    expected = [
        generate(policy, prompts, 20, [0, 4, 9], temperature, seed=3, batch_size=8)
        for temperature in (1.0, 0.0)
    ]

    def spy(x, weight, bias=None):
        used.append(hasattr(weight, "fast_product"))
        read.add(weight)
        return linear(x, weight, bias)

    monkeypatch.setattr("parallel.linear", spy)
    monkeypatch.setattr("model.linear", spy)
    monkeypatch.setattr("support.sampling.reordered_weights", partial(reordered_weights, at_least=1))
    assert expected == [
        generate(policy, prompts, 20, [0, 4, 9], temperature, seed=3, batch_size=8)
        for temperature in (1.0, 0.0)
    ]
    assert (
        all(used)
        and len(read) == 7 * policy.cfg.num_hidden_layers + 1
        and not any(hasattr(p, "fast_product") for p in policy.parameters())
    )


@pytest.mark.skipif(not REORDERED, reason="oneDNN lays out no weights here")
def test_reordered_weights_are_left_behind_and_never_differentiated():
    weight, small, double = (
        torch.nn.Parameter(torch.randn(shape, dtype=dtype))
        for shape, dtype in (((300, 256), None), ((8, 8), None), ((300, 256), torch.float64))
    )
    x, bias = torch.randn(3, 5, 256, requires_grad=True), torch.randn(300)
    expected = torch.nn.functional.linear(x, weight, bias)
    with pytest.raises(KeyError), reordered_weights([[weight], [small], [double]]):
        assert (
            hasattr(weight, "fast_product")
            and not hasattr(small, "fast_product")
            and not hasattr(double, "fast_product")
        )
        with torch.no_grad():
            near(linear(x, weight, bias), expected)
            near(linear(x, weight), expected - bias)
        assert torch.equal(linear(x, weight, bias), expected) and linear(x, weight, bias).requires_grad
        raise KeyError
    with torch.no_grad():
        weight.mul_(2)  # what a copy would not see
        near(linear(x, weight, bias), 2 * expected - bias)


@pytest.mark.skipif(torch.bfloat16 not in REORDERED, reason="oneDNN has no bf16 products here")
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_reordered_bf16_weights_round_as_those_of_f_linear(rows):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(rows + 301, 256, generator=generator, dtype=torch.float64)
    x, weight, bias = (z.bfloat16() for z in (numbers[:rows], numbers[rows:-1], numbers[-1].repeat(2)[:300]))
    exact = x.double() @ weight.double().T + bias.double()
    with torch.no_grad(), reordered_weights([[weight]]):
        assert hasattr(weight, "fast_product")
        found = linear(x, weight, bias).double()
    assert torch.equal(found, torch.nn.functional.linear(x, weight, bias).double())
    assert ((found - exact).abs() <= exact.abs() / 2**8 + 1e-4).all()


@pytest.mark.skipif(not REORDERED, reason="oneDNN lays out no weights here")
def test_weights_that_multiply_the_same_x_are_one_product(monkeypatch):
    """And a second x gets its own, whichever matrices the first one was multiplied by."""
    weights = [torch.nn.Parameter(torch.randn(n, 256)) for n in (300, 280, 290)]
    xs, counted, plain = torch.randn(2, 1, 5, 256), [], _ReorderedProduct.product
    monkeypatch.setattr(
        _ReorderedProduct, "product", lambda self, x, bias: (counted.append(1), plain(self, x, bias))[1]
    )
    with torch.no_grad(), reordered_weights([weights]):
        for x in (xs[0], xs[1]):
            for weight in weights:
                near(linear(x, weight), torch.nn.functional.linear(x, weight))
        assert len(counted) == 2
        linear(xs[0], weights[0])
        near(linear(xs[1], weights[1]), torch.nn.functional.linear(xs[1], weights[1]))
        near(linear(xs[1], weights[2], torch.ones(290)), torch.nn.functional.linear(xs[1], weights[2]) + 1)
    policy = random_model(LanguageModel, small_config())
    layers = policy.cfg.num_hidden_layers
    monkeypatch.setattr("support.sampling.reordered_weights", partial(reordered_weights, at_least=1))
    counted.clear()
    generate(policy, [[3, 1, 4]], 1, [], 0.0)
    assert len(counted) == 4 * layers + 1  # qkv, o, gate and up, down; the output matrix


def test_a_finished_slot_is_refilled(monkeypatch):
    policy = random_model(LanguageModel, small_config())
    prompts = [random_ids(2 + i % 5, seed=i).tolist() for i in range(40)]
    everything = generate(policy, prompts, 30, [0, 4, 9], 1.0, seed=3)
    lengths = [len(r) for r in everything[0]]
    prefills, steps = watch(policy, monkeypatch)
    assert generate(policy, prompts, 30, [0, 4, 9], 1.0, seed=3, batch_size=8) == everything
    assert sum(prefills) == 40 and len(prefills) > 5
    by_length = sorted(range(40), key=lambda i: (len(prompts[i]), prompts[i]))
    waiting = sum(
        max(lengths[i] for i in by_length[a : a + 8]) for a in range(0, 40, 8)
    )  # a batch waits for its longest answer
    assert len(steps) < 0.8 * waiting and max(steps) == 8


def test_sampled_and_scored_log_probabilities_agree():
    """What RL calls old_logprobs is the probability that the token was drawn with."""
    policy, drawn = random_model(LanguageModel, small_config()), {}
    import model

    sample = model.sample_tokens

    def spy(probs, uniforms):
        new = sample(probs, uniforms)
        for u, token, row in zip(uniforms.tolist(), new.tolist(), probs.log()):
            drawn[u] = row[token].item()
        return new

    prompts, n = [random_ids(2 + i % 3, seed=i).tolist() for i in range(12)], 9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.sampling.sample_tokens", spy)
        responses, _ = generate(policy, prompts, n, [0], 1.3, seed=5, batch_size=5)
    ids, mask = collate([Example(p, r) for p, r in zip(prompts, responses)])
    scored = token_logprobs(policy, ids, mask, 1.3)[0]
    uniforms = sampling_uniforms(5, range(12), n)
    sampled = torch.tensor(
        list(
            itertools.chain.from_iterable(
                [drawn[u] for u in row[: len(r)].tolist()] for row, r in zip(uniforms, responses)
            )
        )
    )
    ratio = (sampled - scored[mask]).abs().exp()
    assert ratio.mean() < 1 + 1e-5 and ratio.max() < 1 + 1e-4


def test_a_plain_row_attends_as_before():
    """causal_attention is torch's, and what it says of one row does not depend on how many there are."""
    q, k, v = (
        torch.randn(3, 5, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2)
    )
    whole = causal_attention(0, q, k, v)
    for i in range(3):
        near(causal_attention(0, q[i : i + 1], k[i : i + 1], v[i : i + 1])[0], whole[i])
    scores = torch.einsum("ihe,jhe->hij", q[0], k[0].repeat_interleave(2, 1)) / 8**0.5
    weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    near(whole[0], torch.einsum("hij,jhe->ihe", weights, v[0].repeat_interleave(2, 1)))


def test_masked_means_of_packed_scores():
    model, (ids, mask) = random_model(ScalarModel, small_config()), collate(EXAMPLES)
    near(masked_mean(response_scores(model, ids, mask), mask), masked_mean(token_scores(model, ids), mask))
