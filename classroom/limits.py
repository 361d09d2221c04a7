"""What token rewards can buy, exactly: speed at the start, and height at the end, where everything can be
enumerated.

    python classroom/limits.py

A random policy `sft` writes T tokens of A actions each; some (state, action) are wrong, and an answer is
right if it holds none: errors are local and final, as on the built-in task. Each reward is exact, at its
best: Q-RM is the minimiser of its loss that gradient descent finds (classroom/theory.md), the verifier the
minimiser of its own, the critic perfect.

    speed     gain (E g . G)^2 / E |g|^2 of a one-trajectory gradient estimate g, G being the gradient of the
    success rate:
              what a step of the best size gains in expectation, times a constant; so its ratio is one of
              trajectories
    height    success rate of the optimum of "reward - c KL to sft", c chosen such that the KL of whole
    answers is given

n states · N answers; tables are those of classroom/theory.py
"""

import math
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from theory import all_answers, depths, path_weights, show

from qrm import qrm_loss, verifier_loss

ODDS = 1e-3  # the verifier's Q is kept this far from 0 and 1, where its score would be infinite

# ------------------------------------------------------------------------------------------------ a task


class Task:
    """A random policy and random wrong actions; `share` of the answers to uniform play are right on
    average."""

    def __init__(self, seed, T=6, A=3, share=0.2, sharpness=1.5):
        generator = torch.Generator().manual_seed(seed)
        self.T, self.A, self.n = T, A, len(depths(T, A))
        self.places, _ = all_answers(T, A)  # (N, T)
        logits = sharpness * torch.randn(self.n, A, generator=generator, dtype=torch.float64)
        self.log_sft = logits.log_softmax(1)  # (n, A)
        wrong = torch.rand(self.n * A, generator=generator) > share ** (1 / T)
        self.right = (~wrong[self.places]).all(1).double()  # (N,)
        self.log_p = self.answer_logprobs(self.log_sft)  # (N,)

    def answer_logprobs(self, log_policy):
        return log_policy.flatten()[self.places].sum(1)

    def q(self, weights):
        """Mean outcome of the answers through each (s, a), weighed. (N,) -> (n, A)"""
        totals = torch.zeros(2, self.n * self.A, dtype=torch.float64)
        for t in range(self.T):
            totals[0].index_add_(0, self.places[:, t], weights * self.right)
            totals[1].index_add_(0, self.places[:, t], weights)
        return (totals[0] / totals[1]).view(self.n, self.A)

    def solvable(self):
        return 0 < self.right.sum() < len(self.right)


def token_scores_of(task):
    """{name: scores (n, A)} of the token rewards, each the exact minimiser of its loss, up to scale and state
    terms."""
    q_sft = task.q(task.log_p.exp())
    q_uniform = task.q(torch.ones(len(task.right), dtype=torch.float64))
    kept = q_sft.clamp(ODDS, 1 - ODDS)
    return {
        "Q-RM": q_uniform / path_weights(task.T, task.A)[depths(task.T, task.A), None],
        "verifier": (kept / (1 - kept)).log(),
        "exact Q of sft": q_sft,
    }


def verifier_pairs_loss(scores, response_mask):
    """verifier_loss of pairs: rows 2p are right, rows 2p+1 wrong. (2P, T) -> as verifier_loss"""
    return verifier_loss(scores, response_mask, torch.arange(len(scores)) % 2 == 0)


def learned_scores(task, loss, updates, pairs=1000, lr=0.1, seed=0):
    """A free table trained by Adam on sampled pairs, right and wrong. -> {updates so far: scores (n, A)}

    loss   qrm_loss or verifier_pairs_loss; updates: after which to look, each on all pairs
    """
    generator = torch.Generator().manual_seed(seed)
    p = task.log_p.exp()
    right = torch.multinomial(p * task.right, pairs, replacement=True, generator=generator)
    wrong = torch.multinomial(p * (1 - task.right), pairs, replacement=True, generator=generator)
    places = task.places[torch.stack([right, wrong], 1).flatten()]  # (2 pairs, T)
    mask = torch.ones_like(places, dtype=torch.bool)
    z = torch.zeros(task.n * task.A, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=lr)
    found = {}
    for update in range(1, max(updates) + 1):
        optimizer.zero_grad()
        loss(z[places], mask)[0].backward()
        optimizer.step()
        if update in updates:
            found[update] = z.detach().clone().view(task.n, task.A)
    return found


# ------------------------------------------------------------------------------------------------ speed


def gradient_moments(task, weights):
    """E g (n, A) and E |g|^2 of g = sum_t w_t grad log sft(a_t | s_t), in logits, over answers. weights (N,
    T)"""
    pi, states = task.log_sft.exp(), task.places // task.A
    shares = task.log_p.exp()[:, None] * weights  # (N, T)
    mean = torch.zeros(task.n * task.A, dtype=torch.float64).index_add_(
        0, task.places.flatten(), shares.flatten()
    )
    mass = torch.zeros(task.n, dtype=torch.float64).index_add_(0, states.flatten(), shares.flatten())
    squares = pi.square().sum(1)[states] - 2 * pi.flatten()[task.places] + 1  # |onehot - pi|^2: states differ
    return mean.view(task.n, task.A) - pi * mass[:, None], (shares * weights * squares).sum().item()


def speeds(task, scores_by_name=None):
    """{how the reward is read: (cosine of E g with the true gradient, gain)}, also of given token scores"""
    pi, states = task.log_sft.exp(), task.places // task.A
    q_sft = task.q(task.log_p.exp())
    value = (pi * q_sft).sum(1)  # (n,) success rate from each state
    outcome = task.right[:, None].expand(-1, task.T)
    ways = {
        "outcome": outcome,
        "outcome - mean (RLOO, GRPO)": outcome - value[0],
        "outcome - perfect critic": outcome - value[states],
    }
    for name, scores in (scores_by_name or token_scores_of(task)).items():
        advantage = scores - (pi * scores).sum(1, keepdim=True)
        ways[f"{name}, tokens"] = advantage.flatten()[task.places]
    true, _ = gradient_moments(task, outcome)
    out = {}
    for name, weights in ways.items():
        mean, second = gradient_moments(task, weights)
        along = (mean * true).sum().item()
        out[name] = (along / (mean.norm() * true.norm()).item(), along**2 / second)
    return out


# ------------------------------------------------------------------------------------------------ height


def at_kl(task, policy_at, nats):
    """Success rate of policy_at(c), log-probabilities (N,) of answers, at the c where its KL to sft is
    `nats`."""
    low, high = math.log(1e-5), math.log(1e5)
    for _ in range(60):
        middle = (low + high) / 2
        logs = policy_at(math.exp(middle))
        kl = (logs.exp() * (logs - task.log_p)).sum().item()
        low, high = (middle, high) if kl > nats else (low, middle)
    return (policy_at(math.exp(high)).exp() @ task.right).item()


def heights(task, budgets, scores_by_name=None):
    """{how the reward is read: success rate at each KL}, also of given token scores"""

    def whole(c):  # the optimum of E[outcome] - c KL over answers (Gibbs)
        return (task.log_p + task.right / c).log_softmax(0)

    def tokens(scores):  # the optimum at each state of Z - c KL: classroom/guided.py
        return lambda c: task.answer_logprobs((task.log_sft + scores / c).log_softmax(1))

    out = {"outcome, whole answer": [at_kl(task, whole, nats) for nats in budgets]}
    for name, scores in (scores_by_name or token_scores_of(task)).items():
        out[f"{name}, tokens"] = [at_kl(task, tokens(scores), nats) for nats in budgets]
    return out


# ------------------------------------------------------------------------------------------------ tables


def tasks(T, count=20, **changes):
    """The first `count` seeds whose task can be solved."""
    found, seed = [], 0
    while len(found) < count:
        task = Task(seed, T, **changes)
        found += [task] if task.solvable() else []
        seed += 1
    return found


def speed_table(lengths=(3, 6, 9)):
    """Rows of text: cosine, and gain over that of the outcome with a perfect critic; geometric means over 20
    tasks."""
    rows = [["reward", *(f"T={T}: cosine, trajectories" for T in lengths)]]
    columns = []
    for T in lengths:
        found = [speeds(task) for task in tasks(T)]
        column = {}
        for name in found[0]:
            cosine = statistics.fmean(f[name][0] for f in found)
            ratio = statistics.geometric_mean(f[name][1] / f["outcome - perfect critic"][1] for f in found)
            column[name] = f"{cosine:.2f}, x {1 / ratio:.2f}"
        columns.append(column)
    return rows + [[name, *(column[name] for column in columns)] for name in columns[0]]


def height_table(T=6, budgets=(0.25, 0.5, 1.0, 2.0, 4.0)):
    """Rows of text: mean success rate over 20 tasks at a given KL to sft."""
    chosen = tasks(T)
    found = [heights(task, budgets) for task in chosen]
    start = statistics.fmean((task.log_p.exp() @ task.right).item() for task in chosen)
    rows = [["reward", "sft", *(f"{nats:g} nats" for nats in budgets)]]
    for name in found[0]:
        means = [statistics.fmean(f[name][i] for f in found) for i in range(len(budgets))]
        rows.append([name, f"{start:.3f}", *(f"{x:.3f}" for x in means)])
    return rows


SETTINGS = {
    "as above": {},
    "harder: share .05": {"share": 0.05},
    "easier: share .5": {"share": 0.5},
    "softer sft: sharpness .5": {"sharpness": 0.5},
    "harder sft: sharpness 3": {"sharpness": 3.0},
    "2 actions, 9 tokens": {"A": 2, "T": 9},
    "6 actions, 4 tokens": {"A": 6, "T": 4},
}


def settings_table():
    """Rows of text, by kind of task: times fewer trajectories than RLOO, and success rate at 1 nat."""
    rows = [["setting", "times fewer: Q-RM", "verifier", "at 1 nat: outcome", "Q-RM", "verifier"]]
    for name, changes in SETTINGS.items():
        several = tasks(**{"T": 6} | changes)
        found = [speeds(task) for task in several]
        cells = [name]
        for way in ("Q-RM, tokens", "verifier, tokens"):
            ratios = [f[way][1] / f["outcome - mean (RLOO, GRPO)"][1] for f in found]
            cells.append(f"{statistics.geometric_mean(ratios):.1f}")
        ends = [heights(task, (1.0,)) for task in several]
        for way in ("outcome, whole answer", "Q-RM, tokens", "verifier, tokens"):
            cells.append(f"{statistics.fmean(end[way][0] for end in ends):.2f}")
        rows.append(cells)
    return rows


def learned_table(updates=(10, 100, 600), count=6):
    """Rows of text: Q-RM and verifier learned from 1,000 sampled pairs, beside the exact ones."""
    rows = [["scores", "times fewer than RLOO", "at 1 nat"]]
    cells = {}
    for task in tasks(6, count):
        scores = token_scores_of(task)
        for name, loss in (("Q-RM", qrm_loss), ("verifier", verifier_pairs_loss)):
            for update, z in learned_scores(task, loss, updates).items():
                scores[f"{name}, {update} updates"] = z
        fast, high = speeds(task, scores), heights(task, (1.0,), scores)
        for name in high:
            ratio = fast[name][1] / fast["outcome - mean (RLOO, GRPO)"][1] if name in fast else 1.0
            cells.setdefault(name, []).append((ratio, high[name][0]))
    for name, found in cells.items():
        ratio = statistics.geometric_mean(ratio for ratio, _ in found)
        rows.append([name, f"{ratio:.1f}", f"{statistics.fmean(rate for _, rate in found):.2f}"])
    return rows


if __name__ == "__main__":
    show("Speed: trajectories needed, relative to the outcome with a perfect critic", speed_table())
    show("Height: success rate at equal KL to sft, T = 6", height_table())
    show("Learned from 1,000 pairs, Adam at .1, 6 tasks", learned_table())
    show("Other tasks, T = 6 where nothing else is said", settings_table())
