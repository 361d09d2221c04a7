"""REINFORCE with token rewards: sample, score every token, standardise, and push log-probabilities up or down.

    prompts ─ generate(ids only) ─ collate ─ token_logprobs(old, reference) ─ reward_fn ─► Rollout
    Rollout ─ standardize ─ advantages ─ for each minibatch: token_logprobs ─ reinforce_loss ─ step

A reward model is any `reward_fn(ids (B, T+1), response_mask (B, T)) -> (B, T)`: ids go in, never text.
Source: Chen et al. 2025, section 3.4, Algorithm 2; Williams 1992. PPO (ppo.py) is this plus ratio, clip and critic.

B trajectories of this process · T positions · N response tokens · V vocabulary
"""

from dataclasses import dataclass

import torch

from data import Example, collate, spans
from model import exact_kl, token_logprobs
from parallel import Update, all_sum, shard_range
from support.files import BadInput
from support.sampling import generate

# -------------------------------------------------------------------------------- the rollout


@dataclass
class Rollout:
    """What was sampled, and what was known about it then. All (B, T) in the place of targets, 0 outside the mask."""

    ids: (
        torch.Tensor
    )  # (B, T+1) int64: prompt, sampled response (its stop token included, if it has one), pad
    response_mask: torch.Tensor  # (B, T) bool
    truncated: torch.Tensor  # (B,) bool: no stop token within max_new_tokens
    old_logprobs: torch.Tensor  # (B, T) nats, by the training forward
    entropy: torch.Tensor  # (B, T) nats
    kl_k1: torch.Tensor  # (B, T) nats: log pi - log ref; unbiased, of either sign
    kl_k3: torch.Tensor  # (B, T) nats: ref/pi - 1 + log pi - log ref; unbiased, never negative
    kl_exact: torch.Tensor  # (B, T) nats: sum over the vocabulary; zeros unless asked for
    scores: torch.Tensor  # (B, T) raw rewards of the reward model
    reward_mask: (
        torch.Tensor
    )  # (B, T) bool: where the reward model speaks (all tokens, step ends, or the last token)

    def lengths(self):
        """Tokens of prompt and response, row by row: list of int"""
        places = torch.arange(self.response_mask.shape[1], device=self.ids.device)
        return ((self.response_mask * places).amax(1) + 2).tolist()

    def rows(self, start, stop):
        """Rows [start, stop) of all fields, without the columns that only longer rows need."""
        used = int(self.response_mask[start:stop].any(0).nonzero().max()) + 1
        cut = {
            k: v[start:stop, : used + (k == "ids")] if v.dim() == 2 else v[start:stop]
            for k, v in vars(self).items()
        }
        return Rollout(**cut)


# exercise 5.1 (2 lines): KL from one sampled token
def kl_estimates(logprobs, ref_logprobs):
    """Per-token estimates of KL(pi || ref) from one sampled token (Schulman 2020): k1 = log pi - log ref, and
    k3 = exp(-k1) - 1 + k1. Both have the KL as their expectation under pi. (...) nats -> two (...)"""
    k1 = logprobs - ref_logprobs
    return k1, torch.expm1(-k1) + k1


@torch.no_grad()
def _score_chunk(policy, reference, chunk, cfg):
    """Fills a chunk's old_logprobs, entropy and KL in place; its forward is the one that training will run."""
    what = chunk.ids, chunk.response_mask, cfg.temperature
    chunk.old_logprobs[:], chunk.entropy[:] = token_logprobs(policy, *what)
    chunk.kl_k1[:], chunk.kl_k3[:] = kl_estimates(chunk.old_logprobs, token_logprobs(reference, *what)[0])
    if cfg.kl == "exact":
        chunk.kl_exact[:] = exact_kl(policy, reference, *what)


def minibatches(lengths, cfg):
    """How this process's rows are cut: [[(start, stop) of each micro-batch] of each minibatch], the same number of minibatches
    on every process. Old and new log-probabilities use the same cut, so the first ratio is exactly 1. lengths: tokens a row"""
    n = -(-cfg.batch_size // cfg.minibatch) if cfg.minibatch else 1
    cuts = [shard_range(len(lengths), i, n) for i in range(n)]
    return [
        [(a + start, b + start) for a, b in spans(lengths[start:stop], cfg.micro_tokens)]
        for start, stop in cuts
    ]


@torch.no_grad()
def collect_rollout(policy, reference, reward_fn, prompts, stop_ids, cfg, seed, reward_mask_fn=None):
    """Samples cfg.group_size answers a prompt and scores every token.

    prompts          list of id lists: this dp rank's (all ranks of a tp group pass the same)
    reward_fn        (ids (B, T+1), response_mask (B, T)) -> (B, T) float
    reward_mask_fn   the same arguments -> (B, T) bool: where reward_fn speaks; None is every response token
    """
    device = policy.grid.device
    prompts = [p for p in prompts for _ in range(cfg.group_size)]
    responses, truncated = generate(
        policy, prompts, cfg.max_new_tokens, stop_ids, cfg.temperature, seed, graphs=cfg.graphs
    )
    ids, mask = collate([Example(p, r) for p, r in zip(prompts, responses)], device)
    blank = [torch.zeros(mask.shape, device=device) for _ in range(6)]
    rollout = Rollout(ids, mask, torch.tensor(truncated, device=device), *blank, mask)
    for span in (span for minibatch in minibatches(rollout.lengths(), cfg) for span in minibatch):
        chunk = rollout.rows(*span)
        _score_chunk(policy, reference, chunk, cfg)
        chunk.scores[:] = reward_fn(chunk.ids, chunk.response_mask).masked_fill(~chunk.response_mask, 0.0)
    if reward_mask_fn:
        rollout.reward_mask = reward_mask_fn(ids, mask)
    return rollout


# -------------------------------------------------------------------------------- rewards to advantages


# exercise 5.2 (9 lines): standardised rewards
def standardize(rewards, reward_mask, how, grid):
    """Z_std = (Z - mu) / sigma with the moments over all rewards of the rollout, on all ranks (section 3.4).

    rewards (B, T) float, reward_mask (B, T) bool -> (B, T), 0 outside the mask
    how   "mean_std": the paper. "std": only divided by sigma, as in the authors' code; a non-zero mean then rewards
          length as such. "none": raw. Equal rewards everywhere give 0 (or stay as they are), never NaN.
    """
    if how == "none":
        return rewards.masked_fill(~reward_mask, 0.0)
    picked = rewards[reward_mask].double()
    sums = all_sum({"n": picked.numel(), "total": picked.sum().item()}, grid)
    mean = sums["total"] / sums["n"]
    squares = all_sum({"squares": (picked - mean).square().sum().item()}, grid)["squares"]
    sigma = (squares / sums["n"]) ** 0.5
    sigma = sigma if sigma > 1e-6 else 1.0  # equal rewards: nothing to scale
    return ((rewards - (mean if how == "mean_std" else 0.0)) / sigma).masked_fill(~reward_mask, 0.0)


def eos_to_mean(rewards, response_mask):
    """The authors' REINFORCE variant: the last token's reward becomes the mean over its sequence, itself included."""
    means = rewards.masked_fill(~response_mask, 0.0).sum(1) / response_mask.sum(1)  # (B,)
    last = response_mask & ~torch.nn.functional.pad(response_mask, (0, 1))[:, 1:]
    return torch.where(last, means[:, None], rewards)


# exercise 5.3 (5 lines): rewards to go
def returns_to_go(rewards, response_mask, gamma):
    """G_t = r_t + gamma G_(t+1): what an outcome or step reward needs to become a token's weight. (B, T) -> (B, T)"""
    out, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = torch.where(response_mask[:, t], rewards[:, t] + gamma * running, running)
        out[:, t] = running
    return out.masked_fill(~response_mask, 0.0)


# exercise 5.4 (7 lines): RLOO and GRPO
def group_advantages(sequence_rewards, group_size, how):
    """One advantage a trajectory from its group of samples of one prompt: (B,) -> (B,), groups are neighbours.

    "rloo"   R_i - mean of the others (Ahmadian et al. 2024)      "grpo"   (R_i - mean) / (std + 1e-6) (Shao et al. 2024)
    The std is the sample's, over group_size - 1. Raises BadInput for a group of one.
    """
    if group_size < 2:
        raise BadInput(
            f"--advantage {how} compares the samples of one prompt: expected --group_size 2 or more"
        )
    groups = sequence_rewards.view(-1, group_size)  # (prompts, group)
    centred = groups - groups.mean(1, keepdim=True)
    if how == "rloo":
        return (centred * group_size / (group_size - 1)).flatten()
    return (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten()


def kl_penalty(rollout, kl):
    """The per-token penalty (B, T), nats, that a config's `kl` names.

    "exact", as Algorithm 1 has it, depends on the state alone: where rewards are not accumulated over time it is a mere
    baseline, and the expected policy gradient does not feel it. "k1" does depend on the action, and its gradient is that
    of the KL at each state: it is the default. "abs" is the authors' |k1|, which punishes both directions.
    """
    return {"k1": rollout.kl_k1, "k3": rollout.kl_k3, "exact": rollout.kl_exact, "abs": rollout.kl_k1.abs()}[
        kl
    ]


def advantages(rollout, cfg, grid):
    """A (B, T), without critic, 0 outside the mask.

    token         Z_std - kl_coef * KL                         the reward model's score already is a Q (the paper)
    return        reward-to-go of (reward_std - kl_coef * KL)  for outcome and step rewards
    rloo, grpo    the trajectory's mean reward against its group's, on every token, - kl_coef * KL
    """
    if cfg.advantage == "gae":
        raise BadInput("--advantage gae needs a critic: expected --stage ppo, or token, return, rloo or grpo")
    mask, penalty = rollout.response_mask, cfg.kl_coef * kl_penalty(rollout, cfg.kl)
    if cfg.advantage in ("rloo", "grpo"):
        means = rollout.scores.masked_fill(~rollout.reward_mask, 0.0).sum(1) / rollout.reward_mask.sum(
            1
        ).clamp(min=1)  # (B,)
        weights = group_advantages(means, cfg.group_size, cfg.advantage)[:, None].expand(mask.shape)
        return (weights - penalty).masked_fill(~mask, 0.0)
    rewards = standardize(rollout.scores, rollout.reward_mask, cfg.standardize, grid)
    if cfg.eos_to_mean:
        rewards = eos_to_mean(rewards, mask)
    rewards = (rewards - penalty).masked_fill(~mask, 0.0)
    return returns_to_go(rewards, mask, cfg.gamma) if cfg.advantage == "return" else rewards


# -------------------------------------------------------------------------------- the update


# exercise 5.5 (1 line): the policy gradient
def reinforce_loss(logprobs, advantages, response_mask):
    """loss = -mean over response tokens of A_t log pi(a_t | s_t); its gradient is the policy gradient (Williams 1992).

    All (B, T); A carries no gradient; what stands outside the mask changes nothing. -> loss (scalar), {}
    """
    return -(advantages.detach()[response_mask] * logprobs[response_mask]).mean(), {}


def reinforce_step(policy, optimizer, rollout, cfg, lr):
    """The updates of one rollout: one a minibatch. -> {"loss", "grad_norm"}: means over the minibatches"""
    weights, steps = advantages(rollout, cfg, policy.grid), []

    for minibatch in minibatches(rollout.lengths(), cfg):
        update = Update(optimizer, micro_batches(rollout, weights, minibatch))
        for chunk, weight in update:
            logprobs, _ = token_logprobs(policy, chunk.ids, chunk.response_mask, cfg.temperature)
            update.backward(*reinforce_loss(logprobs, weight, chunk.response_mask))
        steps.append(update.step(lr))
    return mean_stats(steps)


def micro_batches(rollout, weights, spans):
    """[(response tokens, (chunk of the rollout, its weights))] for parallel.update: the loss is a mean over tokens."""
    chunks = [rollout.rows(*span) for span in spans]
    return [
        (int(c.response_mask.sum()), (c, weights[a:b, : c.response_mask.shape[1]]))
        for c, (a, b) in zip(chunks, spans)
    ]


def mean_stats(steps):
    """The mean of each figure over the updates of a rollout."""
    return {k: sum(s[k] for s in steps) / len(steps) for k in steps[0]}


def rollout_stats(rollout, grid):
    """What every RL log line reports about a rollout, over all ranks: raw reward, KL, entropy, length, truncation."""
    sums = all_sum(
        {
            "tokens": rollout.response_mask.sum().item(),
            "rows": len(rollout.response_mask),
            "rewards": rollout.reward_mask.sum().item(),
            "reward": rollout.scores[rollout.reward_mask].sum().item(),
            "kl_k1": rollout.kl_k1.sum().item(),
            "kl_k3": rollout.kl_k3.sum().item(),
            "entropy": rollout.entropy.sum().item(),
            "truncated": rollout.truncated.sum().item(),
        },
        grid,
    )
    return {
        "reward": sums["reward"] / sums["rewards"],
        "kl_k1": sums["kl_k1"] / sums["tokens"],
        "kl_k3": sums["kl_k3"] / sums["tokens"],
        "entropy": sums["entropy"] / sums["tokens"],
        "response_length": sums["tokens"] / sums["rows"],
        "truncated": sums["truncated"] / sums["rows"],
    }
