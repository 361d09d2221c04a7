"""classroom/guided.py: the tilted policy, by hand on three actions and against generate."""

import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model

from data import Example, collate
from model import LanguageModel, ModelConfig, token_logprobs
from support.sampling import generate
from support.settings import Config

sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))
from guided import guided_answers, moments, next_actions  # noqa: E402

CFG = Config(max_new_tokens=6)
PROMPTS = [[3, 4, 5], [7, 8], [3, 4, 5, 6]]


@pytest.fixture(scope="module")
def policy():
    return random_model(LanguageModel, ModelConfig(29, 16, 32, 1, 2, 1, 8))


def test_without_rewards_it_is_greedy_decoding(policy):
    expected, _ = generate(policy, PROMPTS, 6, [1, 2], 0.0)
    assert guided_answers(policy, None, PROMPTS, [1, 2], 0.0, 1.0, 1.0, CFG) == expected


def test_next_actions_are_those_of_each_rows_last_state(policy):
    states = [Example(PROMPTS[0], [9, 0]), Example(PROMPTS[1], [0])]
    logprobs, actions = next_actions(policy, states, 29)
    for i, state in enumerate(states):
        for logprob, action in zip(logprobs[i], actions[i].tolist()):
            row = Example(state.prompt_ids, [*state.response_ids[:-1], action])
            expected = token_logprobs(policy, *collate([row]))[0][0, -1]
            assert logprob.item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_tilt_is_z_std_over_the_coefficient(policy):
    """Z is a number of the token alone here, so the argmax of log sft + Z_std / c is known."""

    def reward_fn(ids, mask):
        return ids[:, 1:].float() * mask

    mean, std, coef = 10.0, 4.0, 0.7
    found = guided_answers(policy, reward_fn, PROMPTS, [1, 2], mean, std, coef, CFG, top=29)
    for prompt, answer in zip(PROMPTS, found):
        rows = [Example(prompt, [a]) for a in range(29)]
        logprobs = token_logprobs(policy, *collate(rows))[0][:, len(prompt) - 1]
        tilted = [logprobs[a].item() + (a - mean) / std / coef for a in range(29)]
        assert answer[0] == max(range(29), key=tilted.__getitem__)
    strong = guided_answers(policy, reward_fn, PROMPTS, [1, 2], mean, std, 1e-6, CFG, top=29)
    assert strong == [[28] * 6] * 3  # a coefficient near 0 follows the reward alone


def test_the_tilted_policy_is_the_optimum_of_the_regularised_reward():
    """sum_a pi (Z - c log pi/sft) is c log sum_a sft exp(Z / c) there and less anywhere else (Gibbs)."""
    generator = torch.Generator().manual_seed(0)
    sft, z, c = torch.randn(5, generator=generator).log_softmax(0), torch.randn(5, generator=generator), 0.3

    def value(log_pi):
        return (log_pi.exp() * (z - c * (log_pi - sft))).sum().item()

    best = (sft + z / c).log_softmax(0)
    assert value(best) == pytest.approx(c * (sft + z / c).logsumexp(0).item(), abs=1e-6)
    for _ in range(100):
        assert value((best + torch.randn(5, generator=generator)).log_softmax(0)) < value(best)


def test_moments_are_over_tokens():
    examples = [Example([1], [2, 4]), Example([1], [6])]
    mean, std = moments(lambda ids, mask: ids[:, 1:].float() * mask, examples, CFG)
    assert mean == 4 and std == pytest.approx(math.sqrt(4))  # 2, 4, 6, over n - 1
