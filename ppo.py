"""PPO with token rewards: REINFORCE plus a critic, the ratio to the policy that sampled, and the clip.

    Rollout ─ values (critic) ─ ppo_advantages: Z_std - KL - V, or GAE
            ─ for epoch, minibatch: ppo_loss, value_loss ─ step

Source: Chen et al. 2025, Algorithm 1; Schulman et al. 2017 (clip), 2016 (GAE).

B trajectories of this process · T positions · N response tokens
"""

import torch
import torch.distributed as dist

from model import at_states, scatter_to_mask, token_logprobs
from parallel import Update, all_reduce, all_sum
from reinforce import (
    ROUNDING,
    cut_rows,
    join_rows,
    kl_loss,
    mean_stats,
    micro_batches,
    minibatches,
    reinforce_advantages,
    shape_rewards,
)

# -------------------------------------------------------------------------------- equations


# exercise 6.1 (2 points): the critic's position
def state_values(critic, ids, response_mask):
    """V(s_t), read at inputs[:, t], where the state ends and before the action is seen.

    ids (B, T+1) int64, response_mask (B, T) bool -> values (B, T) fp32, with gradient, 0 outside the mask
    """
    return scatter_to_mask(response_mask, critic.scalars(at_states(critic, ids, response_mask)))


# exercise 6.2 (4 points): generalised advantage estimation
def gae(rewards, values, response_mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, Eq. 16).

        delta_t = r_t + gamma * V_{t+1} - V_t        V after the last response token is 0
        A_t     = delta_t + gamma * lam * A_{t+1}

    rewards, values   (B, T) float, aligned with targets; anything outside response_mask is ignored
    response_mask     (B, T) bool
    -> advantages, returns   (B, T) float, 0 outside response_mask; returns = advantages + values
    """
    rewards = rewards.masked_fill(~response_mask, 0.0)
    values = values.masked_fill(~response_mask, 0.0)
    out = torch.zeros_like(rewards)
    running = next_value = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(response_mask[:, t], delta + gamma * lam * running, 0.0)
        out[:, t] = running
        next_value = values[:, t]
    return out, (out + values).masked_fill(~response_mask, 0.0)


# exercise 6.3 (3 points): Algorithm 1's advantage
def ppo_advantages(rollout, values, cfg, grid):
    """Advantages for the policy and targets for the critic, both (B, T), 0 outside the mask.

        token    A = Z_std - kl_coef * KL - baseline_weight * V, target Z_std (without KL): Algorithm 1. No
                 discount, no GAE: the reward already is a Q, and V is its mean over actions, up to a
                 constant (Prop. 3.4)
        gae      generalised advantages and returns of the rewards Z_std - kl_coef * KL
        other    the critic-free advantages of reinforce.py; the critic learns Z_std but is not used

    shape_rewards returns both Z_std (after eos_to_mean, if cfg has it) and Z_std - kl_coef * KL.
    """
    response_mask = rollout.response_mask
    z_std, rewards = shape_rewards(rollout, cfg, grid)
    if cfg.advantage == "gae":
        return gae(rewards, values, response_mask, cfg.gamma, cfg.lam)
    if cfg.advantage == "token":
        return (rewards - cfg.baseline_weight * values).masked_fill(~response_mask, 0.0), z_std
    return reinforce_advantages(rollout, cfg, grid), z_std


# exercise 6.4 (5 points): the clipped loss
def ppo_loss(logprobs, old_logprobs, advantages, response_mask, clip):
    """PPO's clipped objective (Schulman et al. 2017, Eq. 7), a mean over response tokens.

        rho = pi(a_t | s_t) / pi_old(a_t | s_t)        loss = -mean min(rho A, clip(rho, 1 - eps, 1 + eps) A)

    logprobs, old_logprobs, advantages (B, T); clip is eps
    -> loss (scalar), {"clip_frac", "ratio_max"}: share of clipped tokens, and the largest rho
    Only logprobs carries a gradient: REINFORCE's at rho = 1, and none at a clipped token, which is one with
    rho > 1 + eps and A > 0, or rho < 1 - eps and A < 0. Ratios are bounded to e^-20 .. e^20, which keeps the
    loss finite; beyond, a token has no gradient.
    """
    log_ratio = (logprobs - old_logprobs.detach())[response_mask]  # (N,)
    ratio = log_ratio.clamp(-20, 20).exp()
    A = advantages.detach()[response_mask]
    loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A).mean()
    clipped = ((ratio > 1 + clip) & (A > 0)) | ((ratio < 1 - clip) & (A < 0))
    return loss, {"clip_frac": clipped.float().mean().item(), "ratio_max": ratio.max().item()}


def value_loss(values, returns, response_mask):
    """mean over response tokens of (V(s_t) - target_t)^2; (B, T) each -> loss (scalar), {}"""
    return (values - returns.detach())[response_mask].square().mean(), {}


def moments(x, grid):
    """Mean and variance of x over all ranks. x (N,) float64; the variance is divided by the count"""
    sums = all_sum({"n": x.numel(), "total": x.sum().item()}, grid)
    mean = sums["total"] / sums["n"]
    return mean, all_sum({"squares": (x - mean).square().sum().item()}, grid)["squares"] / sums["n"]


def explained_variance(values, returns, response_mask, grid):
    """1 - Var(returns - V) / Var(returns) over all ranks; (B, T) each -> float

    1 is a perfect critic; 0 is no better than a constant, or the returns are constant themselves (standardize
    says when).
    """
    values, returns = values[response_mask].double(), returns[response_mask].double()  # (N,), (N,)
    mean, total = moments(returns, grid)
    _, unexplained = moments(returns - values, grid)
    constant = total**0.5 <= max(1e-6, ROUNDING * abs(mean))
    return 0.0 if constant else 1.0 - unexplained / total


# -------------------------------------------------------------------------------- the update


def ppo_step(policy, critic, optimizer, critic_optimizer, rollout, cfg, lr, critic_lr):
    """The updates of one rollout: cfg.ppo_epochs passes, one update of policy and critic per minibatch.

    -> {"loss", "grad_norm", "clip_frac", "ratio_max", "value_loss", "explained_variance"}
    """
    grid = policy.grid
    cuts = minibatches(rollout.lengths(), cfg)
    values = old_values(critic, rollout, cuts)  # (B, T)
    advantages, returns = ppo_advantages(rollout, values, cfg, grid)
    steps, value_steps = [], []
    ratio_max = 0.0

    for _ in range(cfg.ppo_epochs):
        for minibatch in cuts:
            update = Update(optimizer, micro_batches(rollout, advantages, minibatch))
            for part, part_advantages in update:
                logprobs, _ = token_logprobs(policy, part.ids, part.response_mask, cfg.temperature)
                loss, stats = ppo_loss(
                    logprobs, part.old_logprobs, part_advantages, part.response_mask, cfg.clip
                )
                ratio_max = max(ratio_max, stats.pop("ratio_max"))  # a maximum, not a mean
                if cfg.kl_loss_coef:
                    loss = loss + cfg.kl_loss_coef * kl_loss(logprobs, part)
                update.backward(loss, stats)
            steps.append(update.step(lr))

            update = Update(critic_optimizer, micro_batches(rollout, returns, minibatch))
            for part, part_returns in update:
                new_values = state_values(critic, part.ids, part.response_mask)
                loss, stats = value_loss(new_values, part_returns, part.response_mask)
                update.backward(loss, stats)
            value_steps.append(update.step(critic_lr))

    ratio_max = torch.tensor([ratio_max], device=grid.device)
    return mean_stats(steps) | {
        "ratio_max": all_reduce(ratio_max, grid.dp_group, dist.ReduceOp.MAX).item(),
        "value_loss": mean_stats(value_steps)["loss"],
        "explained_variance": explained_variance(values, returns, rollout.response_mask, grid),
    }


@torch.no_grad()
def old_values(critic, rollout, cuts):
    """V(s_t) before the first update, computed in the micro-batches of the updates: (B, T)"""

    parts = cut_rows(rollout.ids, rollout.response_mask, cuts)
    values = [state_values(critic, ids, response_mask) for ids, response_mask in parts]  # (b, t) each
    return join_rows(values, rollout.response_mask.shape[1])
