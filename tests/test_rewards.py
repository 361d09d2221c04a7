"""Rewards of models, graders and users' functions: each at its token, whatever pads follow; their losses."""

import itertools
import math
import textwrap
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import near, random_model, small_config
from test_reinforce import a_policy, a_rollout, config, gradient, grow, poisoned, ragged, tensor

import reinforce
from data import Example, arith_rows, arith_tokenizer, collate, rows_by_prompt
from model import LanguageModel, ScalarModel, token_logits, token_logprobs
from parallel import Grid, Optimizer, Update
from qrm import (
    REWARD_MODELS,
    bind_reward,
    dpo_loss,
    dpo_rewards,
    last_token_mask,
    orm_loss,
    outcome_loss,
    outcome_rewards,
    pairwise_loss,
    plackett_luce_loss,
    qrm_loss,
    response_scores,
    reward_model_loss,
    step_end_mask,
    step_loss,
    step_rewards,
    with_outcome,
)
from reinforce import collect_rollout, reinforce_advantages
from support.files import BadInput
from support.rewards import graded_reward, user_reward
from support.settings import Config
from support.steps import StepExample, collate_steps

STOP, LINE, OTHER_LINE = 2, 7, 9  # two tokens end a line
PROMPT = [3, LINE, 11]  # its line end is none of the answer's steps
ANSWERS = [[5, LINE, STOP], [5, 20, 13], [OTHER_LINE, 4, 6, LINE, 8, STOP], [STOP]]  # the second is cut off
PADS = [0, STOP, LINE]  # a pad is known by its place, not by its id


def scorer():
    return random_model(ScalarModel, small_config(), seed=8)


def z_alone(model, answer):
    """Z of each token: the model's last scalar when the answer ends there, without pads or later tokens."""
    return [
        model.scalars(model.model(torch.tensor([PROMPT + answer[: t + 1]])))[0, -1].item()
        for t in range(len(answer))
    ]


def log_ratios(policy, reference, answer):
    """log pi(a_t | s_t) - log ref(a_t | s_t), each state read alone"""
    out = []
    for t, token in enumerate(answer):
        state = torch.tensor([PROMPT + answer[:t]])
        log_pi, log_ref = (
            m.logits(m.model(state))[0, -1].log_softmax(-1)[token].item() for m in (policy, reference)
        )
        out.append(log_pi - log_ref)
    return out


def check(rewards_of, expected, pad_id):
    """`expected`: one list of rewards per answer; in a batch they begin at the last prompt token's column."""
    ids, mask = collate([Example(PROMPT, a) for a in ANSWERS], pad_id=pad_id)
    rewards = rewards_of(ids, mask).detach()
    wanted = torch.zeros(mask.shape)
    for row, numbers in zip(wanted, expected):
        row[len(PROMPT) - 1 : len(PROMPT) - 1 + len(numbers)] = torch.tensor(numbers)
    assert rewards.shape == mask.shape == (4, 8) and (rewards[~mask] == 0).all()
    near(rewards, wanted, 3e-5)


# -------------------------------------------------------------------------------- where rewards stand


@pytest.mark.parametrize("pad_id", PADS)
def test_token_reward(pad_id):
    model = scorer()
    check(partial(response_scores, model), [z_alone(model, a) for a in ANSWERS], pad_id)


@pytest.mark.parametrize("pad_id", PADS)
def test_outcome_reward_is_at_the_last_real_token(pad_id):
    model = (
        scorer()
    )  # an answer that was cut off is given no stop token: it is scored at the token that it ends with
    rewards_of = partial(outcome_rewards, model)
    check(rewards_of, [[0.0] * (len(a) - 1) + z_alone(model, a)[-1:] for a in ANSWERS], pad_id)
    rewards_of = partial(outcome_rewards, model, every_token=True)
    check(rewards_of, [z_alone(model, a)[-1:] * len(a) for a in ANSWERS], pad_id)


@pytest.mark.parametrize("pad_id", PADS)
def test_step_reward_is_at_the_ends_of_lines_and_of_the_answer(pad_id):
    model = scorer()
    ends = [[0, 1, 1], [0, 0, 1], [1, 0, 0, 1, 0, 1], [1]]
    expected = [[math.tanh(z) * end for z, end in zip(z_alone(model, a), e)] for a, e in zip(ANSWERS, ends)]
    check(partial(step_rewards, model, step_ids=[LINE, OTHER_LINE]), expected, pad_id)
    check(lambda ids, mask: step_end_mask(ids, mask, [LINE, OTHER_LINE]).float(), ends, pad_id)
    check(
        lambda ids, mask: last_token_mask(mask).float(),
        [[0, 0, 1], [0, 0, 1], [0, 0, 0, 0, 0, 1], [1]],
        pad_id,
    )


@pytest.mark.parametrize("pad_id", PADS)
def test_dpo_reward_is_at_its_own_token(pad_id):
    policy, reference = (random_model(LanguageModel, small_config(), seed) for seed in (0, 1))
    expected = [[0.3 * r for r in log_ratios(policy, reference, a)] for a in ANSWERS]
    check(partial(dpo_rewards, policy, reference, beta=0.3), expected, pad_id)
    late = [numbers[1:] + [0.0] for numbers in expected]  # the authors' shift by one is far from it
    with pytest.raises(AssertionError):
        check(partial(dpo_rewards, policy, reference, beta=0.3), late, pad_id)
    check(partial(dpo_rewards, policy, policy), [[0.0] * len(a) for a in ANSWERS], pad_id)


def test_a_rollout_is_rewarded_where_the_reward_model_speaks():
    policy = a_policy(vocab=29)
    model, cfg = random_model(ScalarModel, policy.cfg, seed=51), config(max_new_tokens=8)
    rollout = a_rollout(policy, cfg, reward=bind_reward("prm", model, step_ids=list(range(0, 29, 4))))
    assert torch.equal(rollout.reward_mask, rollout.scores != 0) and rollout.reward_mask.sum(1).max() > 1
    assert (rollout.reward_mask & ~last_token_mask(rollout.response_mask)).any() and not (
        rollout.reward_mask & ~rollout.response_mask
    ).any()
    spoken = rollout.scores[rollout.reward_mask].double()
    z = (spoken - spoken.mean()) / spoken.std(correction=0)
    found = reinforce_advantages(rollout, cfg, Grid())
    near(found[rollout.reward_mask], z, 1e-5)
    assert (found[~rollout.reward_mask] == 0).all()  # silence is not the reward 0, standardised


# -------------------------------------------------------------------------------- losses


PAIRS = ragged((1, 4), (1, 6), (0, 2), (0, 1), (2, 5), (2, 6), width=6)  # chosen and rejected of three pairs


def grads_agree(loss_fn, reference_fn, scores, outside=True):
    """Value and gradient; outside the mask, where the scores are nan, the gradient is 0."""
    mine, plain = (
        (poisoned(scores, PAIRS) if outside else scores.clone()).requires_grad_(),
        scores.clone().requires_grad_(),
    )
    loss, reference = loss_fn(mine)[0], reference_fn(plain)
    near(loss, reference, 1e-6)
    loss.backward()
    reference.backward()
    near(mine.grad, plain.grad, 1e-6)


def rows_of(x):
    """The response's numbers of each row"""
    return [x[i][PAIRS[i]] for i in range(6)]


def test_qrm_loss_with_a_margin_per_pair():
    margins = tensor(0.5, -1.0, 3.0)

    def reference(scores):
        means = [row.mean() for row in rows_of(scores)]
        return sum(F.softplus(margins[p] - 0.7 * (means[2 * p] - means[2 * p + 1])) for p in range(3)) / 3

    grads_agree(lambda scores: qrm_loss(scores, PAIRS, beta=0.7, margin=margins), reference, 3 * grow(6, 6))
    single = [
        qrm_loss(3 * grow(6, 6)[2 * p : 2 * p + 2], PAIRS[2 * p : 2 * p + 2], 0.7, margins[p].item())[0]
        for p in range(3)
    ]
    near(qrm_loss(3 * grow(6, 6), PAIRS, 0.7, margins)[0], sum(single) / 3, 1e-6)


def test_orm_loss_is_torchs_cross_entropy_of_the_gap():
    def reference(scores):
        last = torch.stack([row[-1] for row in rows_of(scores)])
        return F.binary_cross_entropy_with_logits(last[0::2] - last[1::2], torch.ones(3))

    grads_agree(lambda scores: orm_loss(scores, PAIRS), reference, 3 * grow(6, 6))


def test_outcome_loss_is_torchs_cross_entropy():
    correct, scores = torch.tensor([True, False, False, True, True, False]), 3 * grow(6, 6)

    def reference(scores):
        p = torch.stack([row[-1] for row in rows_of(scores)]).sigmoid()
        return F.binary_cross_entropy(p, correct.float())

    grads_agree(lambda x: outcome_loss(x, PAIRS, correct), reference, scores)
    right = sum((row[-1] > 0).item() == y for row, y in zip(rows_of(scores), correct.tolist()))
    assert outcome_loss(scores, PAIRS, correct)[1]["accuracy"] == pytest.approx(right / 6) and 0 < right < 6


def test_step_loss_is_torchs_squared_error():
    ends = PAIRS & (grow(6, 6, seed=3) > 0)
    labels = grow(6, 6, seed=4).sign()
    labels[2] = 0.0
    reference = lambda scores: F.mse_loss(scores[ends].tanh(), labels[ends])
    assert 5 < ends.sum() < PAIRS.sum()
    grads_agree(lambda scores: step_loss(scores, ends, poisoned(labels, ends)), reference, grow(6, 6))


def test_dpo_loss_is_its_equation():
    ref = grow(6, 6, seed=2)

    def reference(logprobs):
        sums = [(row - r).sum() for row, r in zip(rows_of(logprobs), rows_of(ref))]
        return -sum((0.4 * (sums[2 * p] - sums[2 * p + 1])).sigmoid().log() for p in range(3)) / 3

    grads_agree(
        lambda logprobs: dpo_loss(logprobs, poisoned(ref, PAIRS), PAIRS, beta=0.4), reference, grow(6, 6)
    )


def test_plackett_luce_is_a_distribution_over_rankings():
    scores = 2 * grow(4)
    chances = {
        order: (-3 * plackett_luce_loss(scores[None, list(order)])[0]).exp().item()
        for order in itertools.permutations(range(4))
    }
    assert sum(chances.values()) == pytest.approx(
        1, rel=1e-5
    )  # -loss * 3 ranks = log of the chance of this ranking
    assert max(chances, key=chances.get) == tuple(scores.argsort(descending=True).tolist())
    for (
        order,
        chance,
    ) in chances.items():  # drawn one by one, in proportion to exp(score), without putting back
        left, drawn = list(range(4)), 1.0
        for k in order:
            drawn *= math.exp(scores[k]) / sum(math.exp(scores[j]) for j in left)
            left.remove(k)
        assert chance == pytest.approx(drawn, rel=1e-5)


def test_plackett_luce_of_two_is_bradley_terry():
    grads_agree(plackett_luce_loss, lambda x: pairwise_loss(x[:, 0], x[:, 1])[0], grow(5, 2), outside=False)
    grads_agree(plackett_luce_loss, lambda x: F.softplus(x[:, 1] - x[:, 0]).mean(), grow(5, 2), outside=False)


def test_every_prompt_weighs_the_same_in_plackett_luce():
    ranked = grow(3, 5)
    near(plackett_luce_loss(ranked)[0], sum(plackett_luce_loss(row[None])[0] for row in ranked) / 3, 1e-6)
    assert plackett_luce_loss(tensor([1000, 0, -1000]))[0].item() == 0  # far apart, in the right order
    assert plackett_luce_loss(tensor([-1000, 0, 1000]))[0].item() == pytest.approx((2000 + 1000) / 2)


# -------------------------------------------------------------------------------- by name


def test_reward_functions_by_name():
    model, (policy, reference) = (
        scorer(),
        (random_model(LanguageModel, small_config(), seed) for seed in (0, 1)),
    )
    ids, mask = collate([Example(PROMPT, a) for a in ANSWERS])
    lines = [LINE, OTHER_LINE]
    expected = {
        "qrm": (response_scores(model, ids, mask), mask, True),
        "plain": (response_scores(model, ids, mask), mask, True),
        "orm": (outcome_rewards(model, ids, mask), last_token_mask(mask), False),
        "prm": (step_rewards(model, ids, mask, lines), step_end_mask(ids, mask, lines), False),
        "verifier": (response_scores(model, ids, mask), mask, True),
        "dpo": (dpo_rewards(policy, reference, ids, mask), mask, True),
        "logit": (token_logits(policy, ids, mask), mask, True),
        "simpo": (token_logprobs(policy, ids, mask)[0], mask, True),
    }
    assert expected.keys() == REWARD_MODELS.keys()
    for kind, (rewards, speaks, is_q) in expected.items():
        base = REWARD_MODELS[kind].base
        assert base is (LanguageModel if kind in ("dpo", "logit", "simpo") else ScalarModel)
        reward = bind_reward(kind, policy if base is LanguageModel else model, reference, lines)
        assert torch.equal(reward.rewards(ids, mask), rewards) and reward.is_q == is_q
        assert torch.equal(reward.speaks(ids, mask), speaks)


def test_rto_is_dpo_plus_an_outcome_at_the_end():
    policy, reference = (random_model(LanguageModel, small_config(), seed) for seed in (0, 1))
    model = scorer()
    reward = with_outcome(bind_reward("dpo", policy, reference), bind_reward("orm", model))
    expected = []
    for answer in ANSWERS:
        expected.append([0.1 * ratio for ratio in log_ratios(policy, reference, answer)])
        expected[-1][-1] += z_alone(model, answer)[-1]
    check(reward.rewards, expected, STOP)
    ids, mask = collate([Example(PROMPT, a) for a in ANSWERS])
    assert torch.equal(reward.speaks(ids, mask), mask) and not reward.is_q
    assert reward.total(torch.tensor([1.0, 0.5, 2.0])) == 3.5


STEPS = [((1, 1.0), (2, 1.0)), ((2, -1.0),), ((0, 1.0), (3, -1.0), (5, -1.0)), ((0, -1.0),)]  # of ANSWERS


def step_labels(mask):
    """STEPS as a tensor like the mask, NaN where no step ends."""
    labels = torch.full(mask.shape, math.nan)
    for row, answer_steps in zip(labels, STEPS):
        for place, label in answer_steps:
            row[len(PROMPT) - 1 + place] = label
    return labels


@pytest.mark.parametrize("kind", REWARD_MODELS)
def test_the_training_loss_of_each_reward_model(kind):
    """Against each answer read alone, at its own length; answers 0 and 2 are the chosen ones."""
    base = REWARD_MODELS[kind].base
    model, reference = random_model(base, small_config(), 8), random_model(base, small_config(), 9)
    ids, mask = collate([Example(PROMPT, a) for a in ANSWERS], pad_id=LINE)
    labels = step_labels(mask)
    cfg = config(reward=kind, beta=0.7, margin=0.5)
    loss, stats = reward_model_loss(model, ids, mask, cfg, reference, labels)

    def z(answer):
        return model.scalars(model.model(torch.tensor([PROMPT + answer])))[0, len(PROMPT) :]

    def logit(answer):
        row = torch.tensor([PROMPT + answer])
        return model.logits(model.model(row))[0, :-1].gather(-1, row[0, 1:, None])[len(PROMPT) - 1 :].mean()

    def logprobs(lm, answer):
        row = torch.tensor([PROMPT + answer])
        log_pi = lm.logits(lm.model(row))[0, :-1].log_softmax(-1)
        return log_pi.gather(-1, row[0, 1:, None])[len(PROMPT) - 1 :]

    def log_ratio(answer):
        return logprobs(model, answer).sum() - logprobs(reference, answer).sum().detach()

    def mean_logprob(answer):
        return logprobs(model, answer).mean()

    if kind == "prm":  # steps end at 1, 2 | 2 | 0, 3, 5 | 0
        errors = [
            z(ANSWERS[0])[1].tanh() - 1,
            z(ANSWERS[0])[2].tanh() - 1,
            z(ANSWERS[1])[2].tanh() + 1,
            z(ANSWERS[2])[0].tanh() - 1,
            z(ANSWERS[2])[3].tanh() + 1,
            z(ANSWERS[2])[5].tanh() + 1,
            z(ANSWERS[3])[0].tanh() + 1,
        ]
        expected = sum(e * e for e in errors) / 7
        assert stats["step_accuracy"] == pytest.approx(sum(abs(e.item()) < 1 for e in errors) / 7)
    elif kind == "verifier":  # every token of answers 0 and 2 is right, every one of 1 and 3 wrong
        rows = [z(answer) for answer in ANSWERS]
        signs = [1, -1, 1, -1]
        expected = sum(F.softplus(-sign * row).sum() for sign, row in zip(signs, rows)) / 13
        hits = sum((sign * row > 0).sum().item() for sign, row in zip(signs, rows))
        assert stats["token_accuracy"] == pytest.approx(hits / 13)
    else:
        ones = {"orm": lambda a: z(a)[-1], "dpo": log_ratio, "logit": logit, "simpo": mean_logprob}
        one = ones.get(kind, lambda a: z(a).mean())
        beta, margin = {"orm": (1.0, 0.0), "dpo": (0.7, 0.0)}.get(kind, (0.7, 0.5))
        gaps = [one(ANSWERS[0]) - one(ANSWERS[1]), one(ANSWERS[2]) - one(ANSWERS[3])]
        expected = sum(F.softplus(margin - beta * gap) for gap in gaps) / 2
        assert stats["score_gap"] == pytest.approx(sum(g.item() for g in gaps) / 2, rel=1e-4)
        assert stats["pair_accuracy"] == sum(g.item() > 0 for g in gaps) / 2
    near(loss, expected, 3e-6)
    near(gradient(loss, model), gradient(expected, model), 3e-5)


@pytest.mark.parametrize("kind", REWARD_MODELS)
def test_an_update_does_not_depend_on_how_pairs_are_cut(kind):
    """Loss and gradient of all pairs at once, and in parts of unequal tokens and steps, are equal."""
    reference = random_model(REWARD_MODELS[kind].base, small_config(), 9)
    examples = [StepExample(PROMPT, answer, steps) for answer, steps in zip(ANSWERS, STEPS)]
    pairs = [(examples[0], examples[1]), (examples[2], examples[3]), (examples[2], examples[1])]
    if REWARD_MODELS[kind].needs_steps:  # a row of one answer, too
        pairs += [(examples[0],)]
    cfg, found = config(reward=kind), []
    for cuts in ((pairs,), (pairs[:1], pairs[1:]), (pairs[:1], pairs[1:2], pairs[2:])):
        model = random_model(REWARD_MODELS[kind].base, small_config(), 8)
        parts = [[example for pair in part for example in pair] for part in cuts]
        parts = [(REWARD_MODELS[kind].weigh(part), part) for part in parts]
        update = Update(Optimizer(model, Grid(), 1e-3, max_grad_norm=0), parts)
        for answers in update:
            ids, mask = collate(answers)
            labels = collate_steps(answers, mask)
            update.backward(*reward_model_loss(model, ids, mask, cfg, reference, labels))
        found.append(update.step(1e-3))
    for row in found[1:]:
        assert row == pytest.approx(found[0], rel=1e-5)


def test_one_number_for_an_answer():
    total = {kind: entry.total for kind, entry in REWARD_MODELS.items()}
    assert total["qrm"](torch.tensor([1.0, 0.0, 5.0])) == 2
    assert total["logit"](torch.tensor([1.0, 0.0, 5.0])) == 2
    assert total["prm"](torch.tensor([0.0, 0.5, 0.0, -0.25])) == 0.125  # only where a step ends
    assert total["orm"](torch.tensor([0.0, 0.0, 5.0])) == 5
    assert total["dpo"](torch.tensor([1.0, 0.0, 5.0])) == 6
    assert total["simpo"](torch.tensor([-1.0, 0.0, -5.0])) == -2
    assert total["verifier"](torch.tensor([1.0, 0.0, 5.0])) == 5


# -------------------------------------------------------------------------------- a user's own function


class Letters:
    """A tokenizer of one id per character, as far as a reward needs one."""

    stop_ids = (STOP,)
    text = "<_$abcdefghijklmnopqrstuvwxyz"  # id 2, the dollar sign, is the stop token

    def encode_prompt(self, prompt):
        return [self.text.index(c) for c in prompt]

    def decode(self, ids):
        return "".join(self.text[i] for i in ids)


def reward_file(directory, source):
    path = directory / "mine.py"
    path.write_text(source, encoding="utf-8")
    return f"{path}:reward"


ROWS = [{"prompt": "one", "line": 3, "raw": {"id": "x"}}, {"prompt": "twice", "line": 7, "raw": {"id": "y"}}]
SAYS = {"one": [5, 20, STOP], "twice": [4, 6, 6, 6]}  # ids; the second answer is cut off


def user_rollout(monkeypatch, directory, source):
    """The Reward of `source`, and a rollout of the answers in SAYS with it."""
    tokenizer, policy = Letters(), random_model(LanguageModel, small_config(vocab_size=len(Letters.text)))
    answers = [SAYS[row["prompt"]] for row in ROWS]
    monkeypatch.setattr(reinforce, "generate", lambda *_, **__: (answers, [a[-1] != STOP for a in answers]))
    reward = user_reward(reward_file(directory, source), tokenizer, ROWS)
    prompts = [tokenizer.encode_prompt(row["prompt"]) for row in ROWS]
    cfg = config(batch_size=2, micro_tokens=4)  # a micro-batch per answer
    return reward, collect_rollout(policy, policy, reward, prompts, [STOP], cfg, 0)


def test_the_example_of_a_length_penalty(monkeypatch, tmp_path):
    """The text in user_reward's docstring, on the built-in task: a right, a wrong and an endless answer."""
    source = user_reward.__doc__.split("length_penalty.py:reward\n")[1].split("\n    rows ")[0]
    tokenizer, rows = arith_tokenizer(), arith_rows("train", 3, 0)
    right = tokenizer.encode_response(rows[0]["solution"])
    wrong = tokenizer.encode_response("9999")
    endless = tokenizer.encode_response("1")[:1] * 70
    answers = [right, wrong, endless]
    assert len(right) < 64
    policy = random_model(LanguageModel, small_config(vocab_size=tokenizer.vocab_size))
    monkeypatch.setattr(reinforce, "generate", lambda *_, **__: (answers, [False, False, True]))
    reward = user_reward(reward_file(tmp_path, textwrap.dedent(source)), tokenizer, rows)
    prompts = [tokenizer.encode_prompt(row["prompt"]) for row in rows]
    rollout = collect_rollout(policy, policy, reward, prompts, tokenizer.stop_ids, config(batch_size=3), 0)
    assert torch.equal(rollout.reward_mask, last_token_mask(rollout.response_mask))
    near(rollout.scores[rollout.reward_mask], torch.tensor([1.0, 0.0, -0.06]), 1e-6)  # 6 of 70 tokens cost
    assert not rollout.scores[~rollout.reward_mask].any() and not reward.is_q


def test_what_a_users_function_is_given(monkeypatch, tmp_path):
    """Prompt, text, ids, row and truncation of its answer; the ids and the row are copies."""
    source = """
def reward(prompt, response, ids, row, truncated):
    expected = {
        "one": ("cr", [5, 20, 2], {"id": "x"}, False),
        "twice": ("bddd", [4, 6, 6, 6], {"id": "y"}, True),
    }
    assert expected[prompt] == (response, ids, row, truncated)
    row.clear(), ids.clear()
    return len(prompt)
"""
    _, rollout = user_rollout(monkeypatch, tmp_path, source)
    assert rollout.scores[rollout.reward_mask].tolist() == [3.0, 5.0]
    assert ROWS[0]["raw"] == {"id": "x"} and SAYS["one"] == [5, 20, STOP]


@pytest.mark.parametrize("kind", ["list", "tuple", "torch.tensor", "numpy.array"])
def test_a_number_for_each_token(monkeypatch, tmp_path, kind):
    source = f"""
import numpy, torch
def reward(prompt, response, ids, row, truncated):
    return {kind}([i / 8 for i in ids])
"""
    reward, rollout = user_rollout(monkeypatch, tmp_path, source)
    for i, answer in enumerate(SAYS.values()):
        assert rollout.scores[i][rollout.response_mask[i]].tolist() == [x / 8 for x in answer]
    assert torch.equal(rollout.reward_mask, rollout.response_mask) and not reward.is_q
    assert reward.total(torch.tensor([1.0, 2.5])) == 3.5


@pytest.mark.parametrize("value, found", [("True", 1.0), ("7", 7.0), ("numpy.float32(0.5)", 0.5)])
def test_a_number_for_each_answer(monkeypatch, tmp_path, value, found):
    source = f"import numpy\ndef reward(prompt, response, ids, row, truncated):\n    return {value}\n"
    _, rollout = user_rollout(monkeypatch, tmp_path, source)
    assert rollout.scores[rollout.reward_mask].tolist() == [found, found]
    assert torch.equal(rollout.reward_mask, last_token_mask(rollout.response_mask))


@pytest.mark.parametrize(
    "body, message",
    [
        ("return 1 / 0", r"mine\.py, line 2: ZeroDivisionError: division by zero \(data line 3\)$"),
        ("return row['label']", r"mine\.py, line 2: KeyError: 'label' \(data line 3\)$"),
        ("raise ValueError('two\\nlines')", r"mine\.py, line 2: ValueError: two lines \(data line 3\)$"),
        ("return int('x')", r"mine\.py, line 2: ValueError: .*'x' \(data line 3\)$"),
        ("return 'good'", r"mine\.py:reward, data line 3: found 'good'; expected a number, or a list of 3,"),
        ("return None", r"data line 3: found None; expected a number"),
        (
            "return [1.0]",
            r"data line 3: found \[1\.0\]; expected a number, or a list of 3, one per response token$",
        ),
        ("return [1, 2, 'x']", r"data line 3: found \[1, 2, 'x'\]"),
        ("return [1, 2, [3]]", r"data line 3: found \[1, 2, \[3\]\]"),
        ("return float('nan')", r"data line 3: found nan; expected finite numbers$"),
        ("return [0, 0, -float('inf')]", r"data line 3: found \[0, 0, -inf\]; expected finite numbers$"),
        ("return 1e39", r"data line 3: found 1e\+39; expected finite numbers$"),  # infinite in fp32
        ("raise SystemExit", r"mine\.py, line 2: SystemExit: .*\(data line 3\)$"),  # a status of 0
        ("return exit(0)", r"mine\.py, line 2: SystemExit: 0 \(data line 3\)$"),
        ("return 10 ** 400", r"data line 3: found 1000.*; expected finite numbers$"),
        ("return 1j", r"data line 3: found 1j; expected a number"),
        (
            "return 0 if prompt == 'one' else [0] * len(ids)",
            r"a number for one answer and a list for another",
        ),
    ],
)
def test_a_users_mistake_is_one_line(monkeypatch, tmp_path, body, message):
    source = f"def reward(prompt, response, ids, row, truncated):\n    {body}\n"
    with pytest.raises(BadInput, match=message) as raised:
        user_rollout(monkeypatch, tmp_path, source)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "source, message",
    [
        ("x = 1", r"mine\.py has no function reward$"),
        ("reward = 1", r"mine\.py has no function reward$"),
        ("def reward(:", r"mine\.py, line 1: SyntaxError: "),
        ("import sys\n\nsys.exit(0)", r"mine\.py, line 3: SystemExit: 0$"),
        ("\nimport absent_module", r"mine\.py, line 2: ModuleNotFoundError: .*absent_module"),
        (
            "def reward(prompt, response): return 1",
            r"mine\.py: TypeError: reward\(\) takes 2 .* \(data line 3\)$",
        ),
    ],
)
def test_a_file_that_is_no_reward(monkeypatch, tmp_path, source, message):
    with pytest.raises(BadInput, match=message) as raised:
        user_rollout(monkeypatch, tmp_path, source)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("spec", ["mine.py", "mine.txt:reward", "mine.py:", "mine.py:a-b", ":reward"])
def test_what_names_no_function(spec):
    with pytest.raises(BadInput, match=f"^--reward {spec}: expected FILE.py:FUNCTION$"):
        user_reward(spec, Letters(), ROWS)


def test_a_file_beside_the_command(monkeypatch, tmp_path):
    """A relative path, as on the command line, finds the same file and the same line."""
    reward_file(tmp_path, "def reward(prompt, response, ids, row, truncated):\n    return 1 / 0")
    monkeypatch.chdir(tmp_path)
    ids, mask = collate([Example(Letters().encode_prompt("one"), [5, STOP])])
    with pytest.raises(BadInput, match=r"^mine\.py, line 2: ZeroDivisionError: .* \(data line 3\)$"):
        user_reward("mine.py:reward", Letters(), ROWS).rewards(ids, mask)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match=r"no file .*mine\.py; expected a Python file$"):
        user_reward(f"{tmp_path}/mine.py:reward", Letters(), ROWS)


def test_one_prompt_with_two_labels_is_refused():
    rows = [{"prompt": "one", "label": label, "line": line} for line, label in ((2, "5"), (5, "5"), (9, "6"))]
    assert len(rows_by_prompt(rows[:2], Letters(), "x.jsonl")) == 1
    with pytest.raises(BadInput, match="x.jsonl, line 9: label '6', but the same prompt has '5' on line 2"):
        rows_by_prompt(rows, Letters(), "x.jsonl")


@pytest.mark.parametrize("key", ["metadata", "tests", "solution"])
def test_one_prompt_with_two_rows_for_a_users_function(tmp_path, key):
    """The function is called with one of them; other samples, sources and scores make no difference."""
    path = tmp_path / "mine.py"
    path.write_text("def reward(prompt, response, ids, row, truncated):\n    return 0.0\n")
    raws = [{key: "5"}, {key: "5", "response": "r", "score": 1, "chosen": "c"}, {key: "6"}]
    rows = [{"prompt": "one", "line": line, "raw": raw} for line, raw in enumerate(raws, 2)]
    user_reward(f"{path}:reward", Letters(), rows[:2])
    with pytest.raises(BadInput, match=rf"--data, line 4: \['{key}'\] is not that of line 2"):
        user_reward(f"{path}:reward", Letters(), rows)
    assert len(rows_by_prompt(rows, Letters(), "x.jsonl")) == 1


# -------------------------------------------------------------------------------- rewards that grade


@pytest.mark.parametrize("kind", ["outcome", "oracle"])
def test_graded_rewards(monkeypatch, kind):
    """A right answer, one that is wrong from its third token on, and a right one without its stop token."""
    tokenizer, rows = arith_tokenizer(), arith_rows("train", 3, 0)
    texts = [row["solution"] for row in rows]
    assert texts[1][:3] == "0+2" and texts[1][-3:] == "# 1"
    texts[1] = "0+7" + texts[1][3:-1] + "9"
    answers = [tokenizer.encode_response(text) for text in texts]
    answers[2].pop()
    policy = random_model(LanguageModel, small_config(vocab_size=tokenizer.vocab_size))
    monkeypatch.setattr(reinforce, "generate", lambda *_, **__: (answers, [False, False, True]))
    reward = graded_reward(kind, tokenizer, rows, Config(task="arith"))
    prompts = [tokenizer.encode_prompt(row["prompt"]) for row in rows]
    rollout = collect_rollout(policy, policy, reward, prompts, tokenizer.stop_ids, config(batch_size=3), 0)
    found = [row[mask].tolist() for row, mask in zip(rollout.scores, rollout.response_mask)]
    n = [len(answer) for answer in answers]
    if kind == "outcome":
        assert found == [[0.0] * (n[0] - 1) + [1.0], [0.0] * n[1], [0.0] * n[2]]
        assert torch.equal(rollout.reward_mask, last_token_mask(rollout.response_mask))
        assert not reward.is_q and reward.total(torch.tensor([0.0, 0.0, 1.0])) == 1.0
    else:
        assert found == [[1.0] * n[0], [1.0, 1.0] + [0.0] * (n[1] - 2), [1.0] * n[2]]
        assert torch.equal(rollout.reward_mask, rollout.response_mask)
        assert reward.is_q and reward.total(torch.tensor([1.0, 0.0])) == 0.5
