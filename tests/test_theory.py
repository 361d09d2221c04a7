"""What the pairwise loss identifies, on a tree small enough to enumerate (classroom/theory.py)."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "classroom"))
from theory import backed_up, theory  # noqa: E402


def test_backup_is_the_maximum_entropy_policy():
    """exp(Q - V), multiplied along an answer, must be softmax of the returns over all answers, computed by
    brute force."""
    T, A = 3, 2
    rewards = torch.randn(1 + 2 + 4, A, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q, log_policy = backed_up(rewards)
    returns, logs, q_sums = [], [], []
    for actions in itertools.product(range(A), repeat=T):
        s, total, log_p, q_sum = 0, 0.0, 0.0, 0.0
        for a in actions:
            total, log_p, q_sum, s = (
                total + rewards[s, a],
                log_p + log_policy[s, a],
                q_sum + Q[s, a],
                s * A + 1 + a,
            )
        q_sums.append(q_sum)
        returns.append(total)
        logs.append(log_p)
    torch.testing.assert_close(
        torch.stack(logs), torch.stack(returns).log_softmax(0)
    )  # so A* has the sums that the loss asks for
    assert (torch.stack(q_sums) - torch.stack(returns)).std() > 0.1  # and Q* has not


@pytest.mark.parametrize("seed", [0, 1])
def test_sums_are_identified_and_single_scores_are_not(seed):
    plain, margin = theory(seed, updates=500), theory(seed, margin=2.0, updates=500)
    assert plain["returns_error"] < 1e-3 and plain["advantage_error"] < 1e-3
    assert 0.4 < plain["q_corr"] < 0.75 < plain["advantage_corr"] < 0.95 < plain["within_state_corr"] < 0.99
    assert margin["returns_error"] > 3 and margin["returns_corr"] > 0.99  # stretched, in order
    assert abs(margin["within_state_corr"] - plain["within_state_corr"]) < 0.02
