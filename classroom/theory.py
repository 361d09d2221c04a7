"""The theory in tables: what the pairwise loss identifies where everything can be enumerated.

    python classroom/theory.py

Chen et al. 2025, sections 3.1 to 3.4 and Prop. 3.4: is a Z that minimises the loss a Q*, an advantage, or
neither? classroom/theory.md states what is proved and what is measured; its numbers are printed here.

A actions · T tokens of the longest answer · n states · N answers
State s has the children s*A + 1 ... s*A + A; the score of action a in state s has the index s*A + a.
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qrm import pairwise_loss
from reinforce import kl_estimates

# ------------------------------------------------------------------------------------------------ the tree


def all_answers(T, A, stops=False):
    """Every answer as the indices of its scores: places (N, T) int64, mask (N, T) bool (False after its end).

    stops   action 0 ends an answer, so that lengths differ: 1 to T tokens. Otherwise all A^T have T tokens.
    """
    actions = torch.cartesian_prod(*[torch.arange(A)] * T).view(-1, T)  # (A^T, T)
    mask = torch.ones_like(actions, dtype=torch.bool)
    if stops:
        ended = (actions == 0).cumsum(1)
        mask = (ended == 0) | ((ended == 1) & (actions == 0))
        kept = ((actions == 0) | mask).all(1)  # of those that differ only after their end, one
        actions, mask = actions[kept], mask[kept]
    states, places = torch.zeros(len(actions), dtype=torch.long), []
    for action in actions.T:
        places.append(states * A + action)
        states = states * A + 1 + action
    return torch.stack(places, 1), mask


def depths(T, A):
    """Depth of each state: (n,) int64, 0 for the prompt alone."""
    return torch.tensor([d for d in range(T) for _ in range(A**d)])


def backed_up(rewards, stops=False, uniform=False):
    """Bellman backup on the tree: Q(s, a) = r(s, a) + V(s').

    V(s) = log sum_a exp Q(s, a) is the soft value of the maximum-entropy policy at temperature 1; with
    `uniform` it is the mean over the actions, the value of uniform continuation. V is 0 after the last token,
    and with `stops` after action 0. rewards (n, A) -> Q (n, A), Q - V (n, A)
    """
    n, A = rewards.shape
    Q = rewards.clone()
    V = torch.zeros(n * A + 1, dtype=rewards.dtype)  # 0 after the last token
    for s in reversed(range(n)):
        children = V[s * A + 1 : s * A + A + 1].clone()
        if stops:
            children[0] = 0.0
        Q[s] += children
        V[s] = Q[s].mean() if uniform else Q[s].logsumexp(0)
    return Q, Q - V[:n, None]


def random_rewards(seed, T, A, kind="iid"):
    """Standard normal token rewards (n*A,); "terminal": on last tokens only, as a graded answer has them."""
    n = len(depths(T, A))
    rewards = torch.randn(n * A, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "terminal":
        last = depths(T, A).repeat_interleave(A) == T - 1
        rewards = rewards.masked_fill(~last, 0.0)
    return rewards


# ------------------------------------------------------------------------------------------------ minimisers


def expected_loss(z, returns, places, mask, beta=0.2, margin=0.0):
    """The Q-RM loss over all ordered pairs, weighed by Bradley-Terry: P(i over j) = sigmoid(R_i - R_j).

    z (n*A,), returns (N,), places, mask (N, T) -> scalar
    """
    i, j = (~torch.eye(len(returns), dtype=torch.bool)).nonzero().T  # every pair, both ways round
    means = (z[places] * mask).sum(1) / mask.sum(1)  # (N,)
    losses = torch.nn.functional.softplus(margin - beta * (means[i] - means[j]))
    return (torch.sigmoid(returns[i] - returns[j]) * losses).mean()


def fit(returns, places, size, beta, margin, updates):
    """The free table Z (size,) that minimises the expected loss over all pairs, by Adam from 0.

    returns (N,); places (N, T): an answer's indices in Z, all of T tokens. The gradient is that of
    qrm.pairwise_loss, each pair weighed by its probability.
    """
    i, j = (~torch.eye(len(returns), dtype=torch.bool)).nonzero().T
    preferred = torch.sigmoid(returns[i] - returns[j])
    z = torch.zeros(size, dtype=returns.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=2.0)
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = 2.0 * (1 - step / updates)
        means = z[places].mean(1)  # (N,)
        chosen, rejected = means[i], means[j]
        for x in (chosen, rejected):
            x.register_hook(lambda grad: grad * preferred)
        optimizer.zero_grad()
        pairwise_loss(chosen, rejected, beta, margin)[0].backward()
        optimizer.step()
    return z.detach()


def minimum_norm(returns, places, mask, size, beta=0.2):
    """The minimiser of the expected loss (margin 0) with the smallest sum of squares, in closed form.

    The minimisers are the Z with beta * mean Z = R + constant. Gradient descent from 0 never leaves the span
    of the answers' rows, so it ends here. returns (N,), places, mask (N, T) -> (size,)
    """
    rows = torch.zeros(len(places), size, dtype=returns.dtype)
    shares = mask.to(returns.dtype) / mask.sum(1, keepdim=True)
    rows.scatter_add_(1, places, shares)  # (N, size): rows @ z are the means
    return torch.linalg.lstsq(centred(rows.T).T, (returns - returns.mean()) / beta, driver="gelsd").solution


def path_weights(T, A):
    """c_d = sum_{k=0}^{T-1-d} A^-k at each depth d: what the minimum-norm Z divides Q^unif by. (T,)"""
    return torch.tensor([sum(A**-k for k in range(T - d)) for d in range(T)], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ gradients


def expected_gradient(logits, weights, places, mask):
    """The exact policy gradient E[sum_t w_t grad log pi(a_t | s_t)], by enumerating all answers.

    logits (n, A) of a tabular policy, weights (N, T) without gradient -> (n, A)
    """
    logits = logits.detach().requires_grad_()
    logprobs = logits.log_softmax(1).flatten()[places] * mask  # (N, T)
    probabilities = logprobs.sum(1).exp().detach()  # (N,)
    (gradient,) = torch.autograd.grad((probabilities[:, None] * weights * logprobs).sum(), logits)
    return gradient


def kl_gradients(logits, ref_logits):
    """Gradients of one state's KL terms, by enumeration: {name: (A,)}.

    "kl" and "reverse kl" are the gradients of KL(pi || ref) and KL(ref || pi). "k1 in the reward" is
    E[k1 grad log pi] and "k1 in the loss" E[grad k1], both under pi, which has sampled; the same for k3.
    """
    logits, ref = logits.detach().requires_grad_(), ref_logits.log_softmax(0)
    log_pi = logits.log_softmax(0)
    pi = log_pi.detach().exp()
    k1, k3 = kl_estimates(log_pi, ref)
    terms = {
        "kl": (log_pi.exp() * k1).sum(),
        "reverse kl": (ref.exp() * (ref - log_pi)).sum(),
        "k1 in the reward": (pi * k1.detach() * log_pi).sum(),
        "k3 in the reward": (pi * k3.detach() * log_pi).sum(),
        "k1 in the loss": (pi * k1).sum(),
        "k3 in the loss": (pi * k3).sum(),
    }
    return {name: torch.autograd.grad(term, logits, retain_graph=True)[0] for name, term in terms.items()}


# ------------------------------------------------------------------------------------------------ tables


def corr(x, y):
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()


def centred(x):
    return x - x.mean(-1, keepdim=True)


def theory(seed, margin=0.0, beta=0.2, T=4, A=3, updates=800, kind="iid"):
    """Z fitted by Adam to Bradley-Terry preferences on the returns of all A^T answers, random token rewards.

    Temperature 1, no discount: the maximum-entropy policy then has log phi*(answer) = return + constant.
    -> largest errors in nats of the returns (up to a constant) and of A* when beta/T Z is taken as a token
    reward and backed up; correlations of the returns; of Z with Q* and with A* = Q* - V*; within a state, of
    Z with A* and with the minimum-norm minimiser
    """
    places, mask = all_answers(T, A)
    rewards = random_rewards(seed, T, A, kind)
    returns = rewards[places].sum(1)  # (A^T,)
    z = fit(returns, places, len(rewards), beta, margin, updates)
    sums, Z = beta * z[places].mean(1), z.view(-1, A)
    Q, advantage = backed_up(rewards.view(-1, A))
    _, from_z = backed_up(beta / T * Z)
    smallest = minimum_norm(returns, places, mask, len(z), beta)
    return {
        "returns_error": (centred(sums) - centred(returns)).abs().max().item(),
        "advantage_error": (from_z - advantage).abs().max().item(),
        "returns_corr": corr(sums, returns),
        "q_corr": corr(Z, Q),
        "advantage_corr": corr(Z, advantage),
        "within_state_corr": corr(centred(Z), centred(advantage)),
        "minimum_norm_corr": corr(centred(Z), centred(smallest.view(-1, A))),
    }


def theory_table(seeds=3):
    """{"title", "text", "rows"}: mean (lowest to highest) over random reward tables, by margin."""
    names = "margin|error of returns|error of backed-up A|corr(returns)|corr(Z, Q*)|corr(Z, A*)"
    rows = [[*names.split("|"), "within a state", "within a state, minimum norm"]]
    for margin in (0.0, 2.0):
        found = [theory(seed, margin) for seed in range(seeds)]
        columns = [[f[key] for f in found] for key in found[0]]
        cells = [f"{statistics.fmean(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in columns]
        rows.append([f"{margin:g}", *cells])
    text = (
        "4 tokens, 3 actions, all 81 answers, exact preferences; Z a free table, beta 0.2, fitted from 0; "
        f"{seeds} random reward tables. Without margin the loss recovers every return up to one constant, "
        "and Z, taken as a token reward and backed up, gives the exact advantage: all answers have the same "
        "length. Single scores are not identified: the reward r itself, A*, and all that differs from them "
        "by potential-based shaping fit equally well (Q* does not). Adam from 0 finds almost the minimiser "
        "of smallest norm, whose differences within a state are those of Q under uniform continuation, not "
        "of Q*. Two of three states are last-token states, where the two agree, so correlations over all "
        "states flatter the fit: see the table by depth. The margin stretches the returns and hardly "
        "changes the order of the actions."
    )
    return {"title": "4. The theory, checked", "text": text, "rows": rows}


def by_depth(kind, scale=1.0, T=4, A=3, tables=100):
    """The minimum-norm Z against A*, depth by depth, over all states of `tables` random reward tables.

    -> {"within_state_corr": one a depth, "best_action": share of states where both rank the same action
    first, "uniform_error": largest deviation from the theorem, as a share of `scale`, "entropy": of phi*,
    mean nats}
    """
    places, mask = all_answers(T, A)
    depth, weights = depths(T, A), path_weights(T, A)
    parts = [[] for _ in range(T)]
    errors, entropies = [], []
    for seed in range(tables):
        rewards = scale * random_rewards(seed, T, A, kind)
        z = minimum_norm(rewards[places].sum(1), places, mask, len(rewards))
        Z = centred(0.2 / T * z.view(-1, A))  # in nats of a return
        Q_uniform, _ = backed_up(rewards.view(-1, A), uniform=True)
        errors.append((Z * weights[depth, None] - centred(Q_uniform)).abs().max().item() / scale)
        _, advantage = backed_up(rewards.view(-1, A))
        entropies.append(-(advantage.exp() * advantage).sum(1).mean().item())
        for d in range(T):
            parts[d].append((Z[depth == d], centred(advantage)[depth == d]))
    correlations, agreements = [], []
    for part in parts:
        Z, advantage = (torch.cat(x) for x in zip(*part))
        correlations.append(corr(Z, advantage))
        agreements.append((Z.argmax(1) == advantage.argmax(1)).double().mean().item())
    return {
        "within_state_corr": correlations,
        "best_action": agreements,
        "uniform_error": max(errors),
        "entropy": statistics.fmean(entropies),
    }


def depth_table(tables=100):
    """Rows of text: by depth, both kinds of reward, and rewards that make phi* ever more deterministic."""
    names = "rewards|scale|entropy of phi*|corr with A*, depth 0 to 3|same best action|theorem's error"
    rows = [names.split("|")]
    for kind in ("iid", "terminal"):
        for scale in (1.0, 3.0, 10.0):
            found = by_depth(kind, scale, tables=tables)
            correlations = " ".join(f"{x:.2f}" for x in found["within_state_corr"])
            agreements = " ".join(f"{x:.2f}" for x in found["best_action"])
            cells = [kind, f"{scale:g}", f"{found['entropy']:.2f}", correlations, agreements]
            rows.append([*cells, f"{found['uniform_error']:.0e}"])
    return rows


def minimisers_table(seed=0, T=4, A=3):
    """Rows of text: the loss of several Z on equal lengths, and their correlation with A* within a state."""
    places, mask = all_answers(T, A)
    rewards = random_rewards(seed, T, A)
    returns = rewards[places].sum(1)
    Q, advantage = (x.flatten() for x in backed_up(rewards.view(-1, A)))
    n = len(depths(T, A))
    against = torch.zeros(n * A + 1, dtype=torch.float64)  # a potential of each state
    against[1:n] = (
        -20.0 * advantage[: n - 1]
    )  # the child that a* leads to lies lowest; 0 after every last token
    shaping = against[1:] - against[:n].repeat_interleave(A)
    smallest = minimum_norm(returns, places, mask, len(rewards), beta=1.0) / T
    tables = {
        "r": rewards,
        "A*": advantage,
        "minimum norm": smallest,
        "r + shaping": rewards + shaping,
        "Q*": Q,
    }
    losses = {}
    for name, z in tables.items():
        losses[name] = expected_loss(T * z, returns, places, mask, beta=1.0).item()
    rows = [["T Z", "loss above the smallest", "corr with A* within a state"]]
    losses = {
        name: expected_loss(T * z, returns, places, mask, beta=1.0).item() for name, z in tables.items()
    }
    for name, z in tables.items():
        within = corr(centred(z.view(-1, A)), centred(advantage.view(-1, A)))
        rows.append([name, f"{losses[name] - losses['r']:.1e}", f"{within:.2f}"])
    return rows


def lengths_table(seed=0, T=4, A=3):
    """Rows of text: 1 to T tokens, preferences by mean reward; error of the backed-up A*, nats."""
    places, mask = all_answers(T, A, stops=True)
    rewards = random_rewards(seed, T, A)
    returns = (rewards[places] * mask).sum(1) / mask.sum(1)
    _, advantage = backed_up(rewards.view(-1, A), stops=True)
    smallest = minimum_norm(returns, places, mask, len(rewards), beta=1.0)
    reached = advantage.new_zeros(advantage.numel())
    reached[places[mask]] = 1.0  # scores that some answer has
    rows = [["Z", "loss above the smallest", "largest error of the backed-up A*"]]
    base = expected_loss(rewards, returns, places, mask, beta=1.0).item()
    for name, z in {
        "r": rewards,
        "r + 1": rewards + 1,
        "r - 1": rewards - 1,
        "minimum norm": smallest,
    }.items():
        _, found = backed_up(z.view(-1, A), stops=True)
        error = ((found - advantage).flatten() * reached).abs().max().item()
        loss = expected_loss(z, returns, places, mask, beta=1.0).item()
        rows.append([name, f"{loss - base:.1e}", f"{error:.2f}"])
    return rows


def gradient_table(seed=0, T=4, A=3):
    """Rows of text: largest change of the expected policy gradient when token rewards change, relative."""
    rows = [["change", "lengths", "Z at its own token", "summed to the end"]]
    for stops in (False, True):
        places, mask = all_answers(T, A, stops)
        n = len(depths(T, A))
        generator = torch.Generator().manual_seed(seed)
        logits, z = (torch.randn(n, A, generator=generator, dtype=torch.float64) for _ in range(2))
        potential = torch.randn(n * A + 1, generator=generator, dtype=torch.float64)
        potential[n:] = 0.0
        if stops:
            potential[1::A] = 0.0  # nothing after a stop
        state = potential[:n, None].expand(n, A)
        following = potential[1:].view(n, A)
        changes = {
            "+ 1 on every token": torch.ones(n, A, dtype=torch.float64),
            "+ Phi(s)": state,
            "+ Phi(s') - Phi(s)": following - state,
        }
        for name, change in changes.items():
            cells = []
            for summed in (False, True):
                before, after = (
                    expected_gradient(logits, token_weights(x.flatten(), places, mask, summed), places, mask)
                    for x in (z, z + change)
                )
                cells.append(f"{(after - before).abs().max().item() / before.abs().max().item():.1e}")
            rows.append([name, "differ" if stops else "equal", *cells])
    return rows


def token_weights(z, places, mask, summed):
    """Z of each token of each answer, or its sum from there to the end. (n*A,) -> (N, T)"""
    weights = z[places] * mask
    return weights.flip(1).cumsum(1).flip(1) if summed else weights


def kl_table(seed=0, A=5):
    """Rows of text: norm of each penalty's gradient over that of KL(pi || ref), far from ref and near it."""
    generator = torch.Generator().manual_seed(seed)
    ref, direction = (torch.randn(A, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = [["distance in logits", *kl_gradients(ref, ref)]]
    for distance in (1.0, 0.1, 0.01):
        found = kl_gradients(ref + distance * direction, ref)
        size = found["kl"].norm()
        rows.append([f"{distance:g}", *(f"{(g.norm() / size).item():.4f}" for g in found.values())])
    return rows


def show(title, rows):
    print(f"\n{title}")
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
    for row in rows:
        print("".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


if __name__ == "__main__":
    table = theory_table()
    print(table["text"])
    show("Adam from 0, 3 reward tables", table["rows"])
    show("Minimisers of the loss, equal lengths", minimisers_table())
    show("Minimisers of the loss, lengths 1 to 4", lengths_table())
    show("The minimum-norm Z against A* within a state, by depth, 100 reward tables", depth_table())
    show("Change of the expected policy gradient, relative", gradient_table())
    show("Size of a KL penalty's gradient, relative to that of KL(pi || ref)", kl_table())
