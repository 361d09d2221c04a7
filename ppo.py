"""PPO with token rewards: REINFORCE plus a critic, the ratio to the policy that sampled, and the clip.

    Rollout ─ values (critic) ─ advantages: Z_std - KL - V, or GAE ─ for epoch, minibatch: ppo_loss, value_loss ─ step

Source: Chen et al. 2025, Algorithm 1; Schulman et al. 2017 (clip), 2016 (GAE).

B trajectories of this process · T positions
"""

import torch
import torch.distributed as dist

from model import at_states, scatter_to_mask, token_logprobs
from parallel import Update, all_reduce, all_sum
from reinforce import advantages as policy_advantages
from reinforce import (
    eos_to_mean,
    kl_penalty,
    mean_stats,
    micro_batches,
    minibatches,
    standardize,
)

# -------------------------------------------------------------------------------- equations


# exercise 6.1 (1 line): the critic's position
def state_values(critic, ids, response_mask):
    """V(s_t), read where the state ends and before the action is seen: at inputs[:, t]; 0 outside the mask. -> (B, T) fp32"""
    return scatter_to_mask(response_mask, critic.scalars(at_states(critic, ids, response_mask)))


# exercise 6.2 (7 lines): generalised advantage estimation
def gae(rewards, values, response_mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, Eq. 16).

        delta_t = r_t + gamma * V_{t+1} - V_t        V after the last response token is 0
        A_t     = delta_t + gamma * lam * A_{t+1}

    rewards, values   (B, T) float, aligned with targets; anything outside response_mask is ignored
    response_mask     (B, T) bool
    -> advantages, returns   (B, T) float, 0 outside response_mask; returns = advantages + values
    """
    rewards, values = rewards.masked_fill(~response_mask, 0.0), values.masked_fill(~response_mask, 0.0)
    out, running, next_value = (
        torch.zeros_like(rewards),
        torch.zeros_like(rewards[:, 0]),
        torch.zeros_like(rewards[:, 0]),
    )
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(response_mask[:, t], delta + gamma * lam * running, 0.0)
        next_value, out[:, t] = values[:, t], running
    return out, (out + values).masked_fill(~response_mask, 0.0)


# exercise 6.3 (10 lines): Algorithm 1's advantage
def ppo_advantages(rollout, values, cfg, grid):
    """Advantages for the policy and targets for the critic, both (B, T).

        token         A = Z_std - kl_coef * KL - baseline_weight * V,  target Z_std (without KL): Algorithm 1. No discount,
                      no GAE: the score already is a Q, and V is its mean over actions, up to a constant (Prop. 3.4)
        gae           rewards at the ends that the reward model speaks at, minus kl_coef * KL on every token
        other         the critic-free advantages of reinforce.py; the critic learns Z_std but is not used
    Z_std is `standardize` of the rollout's scores (then `eos_to_mean`, where cfg.eos_to_mean says so), KL is `kl_penalty`.
    """
    mask = rollout.response_mask
    z_std = standardize(rollout.scores, rollout.reward_mask, cfg.standardize, grid)
    if cfg.eos_to_mean:
        z_std = eos_to_mean(z_std, mask)
    penalty = cfg.kl_coef * kl_penalty(rollout, cfg.kl)
    if cfg.advantage == "gae":
        return gae(z_std - penalty, values, mask, cfg.gamma, cfg.lam)
    if cfg.advantage == "token":
        return (z_std - penalty - cfg.baseline_weight * values).masked_fill(~mask, 0.0), z_std
    return policy_advantages(rollout, cfg, grid), z_std


# exercise 6.4 (5 lines): the clipped loss
def ppo_loss(logprobs, old_logprobs, advantages, response_mask, clip):
    """-mean over response tokens of min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = pi(a_t | s_t) / pi_old(a_t | s_t).

    All (B, T); only logprobs carries a gradient. At rho = 1 that gradient is REINFORCE's; a token whose ratio has left
    the interval in the direction that its advantage asks for gives none.
    -> loss (scalar), {"clip_frac": share of such tokens, "ratio_max"}
    """
    log_ratio = (logprobs - old_logprobs.detach())[response_mask]  # (N,)
    ratio, A = log_ratio.clamp(-20, 20).exp(), advantages.detach()[response_mask]
    loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A).mean()
    clipped = ((ratio > 1 + clip) & (A > 0)) | ((ratio < 1 - clip) & (A < 0))
    return loss, {"clip_frac": clipped.float().mean().item(), "ratio_max": ratio.max().item()}


def value_loss(values, returns, response_mask):
    """mean over response tokens of (V(s_t) - target_t)^2; (B, T) each -> loss (scalar), {}"""
    return (values - returns.detach())[response_mask].square().mean(), {}


def explained_variance(values, returns, response_mask, grid):
    """1 - Var(returns - V) / Var(returns) over all ranks: 1 is a perfect critic, 0 no better than a constant (or the targets are one)."""

    def variance(x):
        sums = all_sum({"n": x.numel(), "total": x.sum().item(), "squares": x.square().sum().item()}, grid)
        return sums["squares"] / sums["n"] - (sums["total"] / sums["n"]) ** 2

    values, returns = values[response_mask].double(), returns[response_mask].double()
    total = variance(returns)
    return 1.0 - variance(returns - values) / total if total > 1e-12 else 0.0


# -------------------------------------------------------------------------------- the update


def ppo_step(policy, critic, optimizer, critic_optimizer, rollout, cfg, lr, critic_lr):
    """The updates of one rollout: cfg.ppo_epochs passes, one update of policy and critic a minibatch.

    The critic is read and trained at the same place, with the one head it was given at the start.
    -> {"loss", "grad_norm", "clip_frac", "ratio_max", "value_loss", "explained_variance"}
    """
    grid, mask = policy.grid, rollout.response_mask
    cuts, values = minibatches(rollout.lengths(), cfg), torch.zeros(mask.shape, device=grid.device)
    with torch.no_grad():
        for a, b in (span for minibatch in cuts for span in minibatch):
            chunk = rollout.rows(a, b)
            values[a:b, : chunk.response_mask.shape[1]] = state_values(critic, chunk.ids, chunk.response_mask)
    weights, returns = ppo_advantages(rollout, values, cfg, grid)
    steps, value_steps, ratio_max = [], [], 0.0

    for _ in range(cfg.ppo_epochs):
        for minibatch in cuts:
            update = Update(optimizer, micro_batches(rollout, weights, minibatch))
            for chunk, weight in update:
                logprobs, _ = token_logprobs(policy, chunk.ids, chunk.response_mask, cfg.temperature)
                loss, stats = ppo_loss(logprobs, chunk.old_logprobs, weight, chunk.response_mask, cfg.clip)
                ratio_max = max(ratio_max, stats.pop("ratio_max"))  # a maximum, not a mean
                update.backward(loss, stats)
            steps.append(update.step(lr))
            update = Update(critic_optimizer, micro_batches(rollout, returns, minibatch))
            for chunk, target in update:
                values_now = state_values(critic, chunk.ids, chunk.response_mask)
                update.backward(*value_loss(values_now, target, chunk.response_mask))
            value_steps.append(update.step(critic_lr))
    ratio_max = all_reduce(
        torch.tensor([ratio_max], device=grid.device), grid.dp_group, dist.ReduceOp.MAX
    ).item()
    return mean_stats(steps) | {
        "ratio_max": ratio_max,
        "value_loss": mean_stats(value_steps)["loss"],
        "explained_variance": explained_variance(values, returns, mask, grid),
    }
