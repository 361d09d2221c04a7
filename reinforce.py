"""REINFORCE with token rewards: sample, score every token, standardise, push log-probabilities up or down.

    prompts ─ generate(ids only) ─ collate ─ token_logprobs(old, reference) ─ reward ─► Rollout
    Rollout ─ reinforce_advantages ─ for each minibatch: token_logprobs ─ reinforce_loss ─ step

A reward is any object with `rewards` and `speaks`, both of (ids (B, T+1), response_mask (B, T)) -> (B, T):
ids go in, never text.
Source: Chen et al. 2025, section 3.4, Algorithm 2; Williams 1992. PPO (ppo.py) adds ratio, clip and critic.

B trajectories of this process · T positions · N response tokens · V vocabulary
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Example, collate, sequence_length, spans
from model import exact_kl, token_logprobs
from parallel import Update, all_sum, shard_range
from support.files import BadInput
from support.sampling import generate

# -------------------------------------------------------------------------------- the rollout


@dataclass(kw_only=True)
class Rollout:
    """Sampled answers and their numbers at that time; (B, T) is aligned with targets, 0 outside the mask."""

    ids: torch.Tensor  # (B, T+1) int64: prompt, sampled response with its stop token unless truncated, pad
    response_mask: torch.Tensor  # (B, T) bool
    truncated: torch.Tensor  # (B,) bool: no stop token within max_new_tokens
    old_logprobs: torch.Tensor  # (B, T) nats, by the training forward
    entropy: torch.Tensor  # (B, T) nats
    kl_k1: torch.Tensor  # (B, T) nats: log pi - log ref; unbiased, of either sign
    kl_k3: torch.Tensor  # (B, T) nats: ref/pi - 1 + log pi - log ref; unbiased, never negative
    kl_exact: torch.Tensor  # (B, T) nats: sum over the vocabulary; zeros unless asked for
    scores: torch.Tensor  # (B, T) raw rewards
    reward_mask: torch.Tensor  # (B, T) bool: where rewards are given (every token, step ends, or the last)

    def lengths(self):
        """Tokens of prompt and response, row by row: list of int"""
        places = torch.arange(self.response_mask.shape[1], device=self.ids.device)  # (T,)
        last_target = (self.response_mask * places).amax(1)  # (B,)
        return (last_target + 2).tolist()  # targets[t] is ids[t + 1], and ids count from 0

    def rows(self, start, stop):
        """Rows [start, stop) of every field, without the columns that only longer rows need."""
        T = used_columns(self.response_mask[start:stop])
        fields = {name: x[start:stop, :T] for name, x in vars(self).items() if name != "truncated"}
        fields["ids"] = self.ids[start:stop, : T + 1]
        return Rollout(truncated=self.truncated[start:stop], **fields)


def used_columns(response_mask):
    """Columns up to the last response token of any row: (B, T) bool -> int"""
    return int(response_mask.any(0).nonzero().max()) + 1


def count_minibatches(cfg):
    """Updates of one pass over a rollout, equal on all processes."""
    return -(-cfg.batch_size // cfg.minibatch) if cfg.minibatch else 1


def minibatches(lengths, cfg):
    """Cuts this process's rows into minibatches (updates), and these into micro-batches (forwards).

    lengths   tokens of each row
    cfg       has batch_size, minibatch, micro_tokens
    -> [[(start, stop) of each micro-batch] of each minibatch]; every process gets as many minibatches
    Old and new log-probabilities use the same cuts, so the first ratio is exactly 1.
    """
    n = count_minibatches(cfg)
    cuts = []
    for i in range(n):
        start, stop = shard_range(len(lengths), i, n)
        parts = spans(lengths[start:stop], cfg.micro_tokens)
        cuts.append([(start + a, start + b) for a, b in parts])
    return cuts


def cut_rows(ids, response_mask, cuts):
    """Yields the micro-batches in order: ids (b, t+1), response_mask (b, t), less the columns of pads alone.

    ids (B, T+1), response_mask (B, T); cuts: what minibatches returns
    """
    for start, stop in (span for minibatch in cuts for span in minibatch):
        t = used_columns(response_mask[start:stop])
        yield ids[start:stop, : t + 1], response_mask[start:stop, :t]


def join_rows(parts, T):
    """The inverse of cut_rows, for results: [(b, t)] -> (B, T) fp32, 0 in the columns that were left out"""
    return torch.cat([F.pad(part.float(), (0, T - part.shape[1])) for part in parts])


# exercise 5.1 (2 points): KL from one sampled token
def kl_estimates(logprobs, ref_logprobs):
    """Per-token estimates of KL(pi || ref) from one sampled token (Schulman 2020); both are unbiased.

        k1 = log pi - log ref        k3 = exp(-k1) - 1 + k1

    logprobs, ref_logprobs (...) nats -> k1, k3 (...) nats
    k3 keeps its digits where k1 is small, about k1^2 / 2. A ratio ref / pi above e^60 counts as e^60, without
    gradient: k3 stays finite in fp32, and k1 alone would pull pi further from ref.
    """
    k1 = logprobs - ref_logprobs
    log_ratio = (-k1).clamp(max=60.0)
    return k1, torch.expm1(log_ratio) - log_ratio


def score_part(policy, reference, reward, ids, response_mask, cfg):
    """The numbers of a Rollout for one micro-batch, by the forward that training will run: {name: (B, T)}"""
    old_logprobs, entropy = token_logprobs(policy, ids, response_mask, cfg.temperature)
    ref_logprobs, _ = token_logprobs(reference, ids, response_mask, cfg.temperature)
    kl_k1, kl_k3 = kl_estimates(old_logprobs, ref_logprobs)
    kl_exact = torch.zeros_like(kl_k1)
    if cfg.kl == "exact":
        kl_exact = exact_kl(policy, reference, ids, response_mask, cfg.temperature)
    return {
        "old_logprobs": old_logprobs,
        "entropy": entropy,
        "kl_k1": kl_k1,
        "kl_k3": kl_k3,
        "kl_exact": kl_exact,
        "scores": reward.rewards(ids, response_mask).masked_fill(~response_mask, 0.0),
    }


@torch.no_grad()
def collect_rollout(policy, reference, reward, prompts, stop_ids, cfg, seed, places=None):
    """Samples cfg.group_size answers per prompt and scores every token.

    reward     reward.rewards(ids (b, t+1), response_mask (b, t)) -> (b, t) float, called on micro-batches;
               then reward.speaks(ids (B, T+1), response_mask (B, T)) -> (B, T) bool: where rewards are given
    prompts    list of id lists: this dp rank's (all ranks of a tp group pass the same)
    stop_ids   ids that end an answer and belong to it
    places     list of int: each prompt's place in the batch of all dp ranks, which with the seed decides what
               is sampled; default 0, 1, 2 ...
    cfg        has group_size, batch_size, minibatch, micro_tokens, max_new_tokens, temperature, kl
    """
    device = policy.grid.device
    places = range(len(prompts)) if places is None else places
    numbers = [place * cfg.group_size + i for place in places for i in range(cfg.group_size)]
    prompts = [prompt for prompt in prompts for _ in range(cfg.group_size)]
    responses, truncated = generate(
        policy, prompts, cfg.max_new_tokens, stop_ids, cfg.temperature, seed, numbers, graphs=cfg.graphs
    )
    examples = [Example(prompt, response) for prompt, response in zip(prompts, responses)]
    ids, response_mask = collate(examples, device)  # (B, T+1), (B, T)
    cuts = minibatches([sequence_length(example) for example in examples], cfg)
    parts = [
        score_part(policy, reference, reward, part_ids, part_mask, cfg)
        for part_ids, part_mask in cut_rows(ids, response_mask, cuts)
    ]
    T = response_mask.shape[1]
    return Rollout(
        ids=ids,
        response_mask=response_mask,
        truncated=torch.tensor(truncated, device=device),
        reward_mask=reward.speaks(ids, response_mask) & response_mask,
        **{name: join_rows([part[name] for part in parts], T) for name in parts[0]},
    )


# -------------------------------------------------------------------------------- rewards to advantages

# Forward passes over the same tokens in fp32 agree to 1e-5 of their scores, mostly to 1e-7, and no further. A
# spread below this share of the rewards is rounding: divided by its own size, it would pass for a difference.
ROUNDING = 1e-5


# exercise 5.2 (4 points): standardised rewards
def standardize(rewards, reward_mask, how, grid):
    """Z_std = (Z - mu) / sigma with the moments over all rewards of the rollout, on all ranks (section 3.4).

    rewards (B, T) float, reward_mask (B, T) bool -> (B, T), 0 outside the mask
    how   "mean_std": the paper. "std": only divided by sigma, as in the authors' code; a non-zero mean then
          rewards length as such. "none": raw. Equal rewards give 0 (or remain as they are), never NaN.
    The variance is divided by the count, not by one less. A sigma below 1e-6, or below ROUNDING times |mu|,
    counts as 1. Rewards outside the mask are ignored.
    """
    if how == "none":
        return rewards.masked_fill(~reward_mask, 0.0)
    picked = rewards[reward_mask].double()
    sums = all_sum({"n": picked.numel(), "total": picked.sum().item()}, grid)
    mean = sums["total"] / sums["n"]
    squares = all_sum({"squares": (picked - mean).square().sum().item()}, grid)["squares"]
    sigma = (squares / sums["n"]) ** 0.5
    rounding = max(1e-6, ROUNDING * abs(mean))
    sigma = sigma if sigma > rounding else 1.0  # equal rewards: nothing to scale
    centre = mean if how == "mean_std" else 0.0
    return ((rewards - centre) / sigma).masked_fill(~reward_mask, 0.0)


def eos_to_mean(rewards, response_mask):
    """The authors' REINFORCE variant: the last token's reward becomes its sequence's mean, itself included.

    rewards, response_mask (B, T) -> (B, T)
    """
    means = rewards.masked_fill(~response_mask, 0.0).sum(1) / response_mask.sum(1)  # (B,)
    last = response_mask & ~F.pad(response_mask, (0, 1))[:, 1:]  # (B, T)
    return torch.where(last, means[:, None], rewards)


# exercise 5.3 (3 points): rewards to go
def returns_to_go(rewards, response_mask, gamma):
    """G_t = r_t + gamma G_(t+1): turns an outcome or step reward into a weight for each token.

    rewards (B, T) float, response_mask (B, T) bool -> (B, T), 0 outside the mask
    Rewards outside the mask are ignored.
    """
    out = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        running = torch.where(response_mask[:, t], rewards[:, t] + gamma * running, running)
        out[:, t] = running
    return out.masked_fill(~response_mask, 0.0)


# exercise 5.4 (3 points): RLOO and GRPO
def group_advantages(sequence_rewards, group_size, how, sizes=None):
    """One advantage per trajectory, relative to the other samples of the same prompt.

    "rloo"   R_i - mean of the others   (Ahmadian et al. 2024)
    "grpo"   (R_i - mean) / std         (Shao et al. 2024); the std divides by group_size - 1

    A group whose std is at most 1e-6, or ROUNDING times its largest size, says nothing: 0 for all of it. The
    moments are computed in fp64.

    sequence_rewards (B,) float: groups are group_size neighbours -> (B,) of its dtype
    sizes   (B,): the largest number that each reward is made of, to which its rounding error is relative;
            None: |R_i|
    Raises BadInput for a group of one.
    """
    if group_size < 2:
        raise BadInput(
            f"--advantage {how} compares the samples of one prompt: expected --group_size 2 or more"
        )
    groups = sequence_rewards.double().view(-1, group_size)  # (prompts, group)
    centred = groups - groups.mean(1, keepdim=True)
    std = groups.std(1, keepdim=True)  # (prompts, 1)
    sizes = sequence_rewards if sizes is None else sizes
    largest = sizes.double().abs().view(groups.shape).amax(1, keepdim=True)  # (prompts, 1)
    rounding = max(ROUNDING, torch.finfo(sequence_rewards.dtype).eps) * largest  # (prompts, 1)
    out = centred * group_size / (group_size - 1) if how == "rloo" else centred / std
    out = out.masked_fill(std <= rounding.clamp(min=1e-6), 0.0)
    return out.flatten().to(sequence_rewards.dtype)


def process_advantages(rewards, reward_mask, response_mask, group_size):
    """GRPO with process supervision (Shao et al. 2024, section 4.1.3): a step counts for the tokens up to it.

        r~ = (r - mean) / std over all step rewards of a prompt's answers        A_t = sum of r~ from t on

    rewards (B, T) float, reward_mask (B, T) bool: step ends; groups are group_size neighbours -> (B, T)
    With one reward per answer, at its end, it is group_advantages "grpo" at every token.
    """
    relative = torch.zeros_like(rewards)
    for start in range(0, len(rewards), group_size):
        group = slice(start, start + group_size)
        steps = rewards[group][reward_mask[group]]  # (steps of all answers,)
        relative[group][reward_mask[group]] = group_advantages(steps, len(steps), "grpo")
    return returns_to_go(relative, response_mask, gamma=1.0)


def kl_penalty(rollout, kl):
    """The per-token penalty (B, T), nats, that a config's `kl` names.

    exact   Algorithm 1. It depends on the state alone: unless rewards are accumulated over time it is only a
            baseline, and leaves the expected policy gradient unchanged.
    k1      the default. It depends on the action, and its gradient is that of KL(pi || ref) at each state.
    k3      nearly inert as a reward: its gradient is that of KL(pi || ref) less that of KL(ref || pi), of
            second order near the reference. GRPO has it in the loss instead (kl_loss).
    abs     the authors' |k1|, which punishes both directions.
    """
    if kl == "abs":
        return rollout.kl_k1.abs()
    return {"k1": rollout.kl_k1, "k3": rollout.kl_k3, "exact": rollout.kl_exact}[kl]


def shape_rewards(rollout, cfg, grid):
    """Turns a rollout's raw scores into rewards to learn from; the same for REINFORCE and PPO.

        z_std   = standardize(scores), then eos_to_mean if cfg.eos_to_mean
        rewards = z_std - kl_coef * KL

    -> z_std, rewards   (B, T) each, 0 outside the mask
    """
    response_mask = rollout.response_mask
    z_std = standardize(rollout.scores, rollout.reward_mask, cfg.standardize, grid)
    if cfg.eos_to_mean:
        z_std = eos_to_mean(z_std, response_mask)
    rewards = z_std - cfg.kl_coef * kl_penalty(rollout, cfg.kl)
    return z_std, rewards.masked_fill(~response_mask, 0.0)


def reinforce_advantages(rollout, cfg, grid):
    """A (B, T), without a critic, 0 outside the mask.

    token         Z_std - kl_coef * KL                         the reward already is a Q (the paper)
    return        reward-to-go of (Z_std - kl_coef * KL)       for outcome and step rewards
    rloo, grpo    the trajectory's mean score relative to its group, at every token, - kl_coef * KL
    process       each step's score relative to those of its group, the later ones summed, - kl_coef * KL
    Raises BadInput for gae.
    """
    response_mask = rollout.response_mask
    if cfg.advantage == "gae":
        raise BadInput(
            "--advantage gae needs a critic: expected --stage ppo, or token, return, rloo, grpo or process"
        )
    if cfg.advantage in ("token", "return"):
        _, rewards = shape_rewards(rollout, cfg, grid)
        return returns_to_go(rewards, response_mask, cfg.gamma) if cfg.advantage == "return" else rewards
    scores = rollout.scores.masked_fill(~rollout.reward_mask, 0.0)  # (B, T)
    if cfg.advantage == "process":
        relative = process_advantages(scores, rollout.reward_mask, response_mask, cfg.group_size)  # (B, T)
    else:
        means = scores.sum(1) / rollout.reward_mask.sum(1).clamp(min=1)  # (B,)
        relative = group_advantages(means, cfg.group_size, cfg.advantage, scores.abs().amax(1))[:, None]
    penalty = cfg.kl_coef * kl_penalty(rollout, cfg.kl)  # (B, T)
    return (relative - penalty).masked_fill(~response_mask, 0.0)


# -------------------------------------------------------------------------------- the update


# exercise 5.5 (2 points): the policy gradient
def reinforce_loss(logprobs, advantages, response_mask):
    """REINFORCE (Williams 1992): -mean over response tokens of A_t log pi(a_t | s_t).

    logprobs, advantages, response_mask (B, T) -> loss (scalar), {}
    No gradient flows into the advantages. Values outside the mask have no effect.
    """
    return -(advantages.detach()[response_mask] * logprobs[response_mask]).mean(), {}


def kl_loss(logprobs, part):
    """GRPO's penalty in the loss (Shao et al. 2024): mean of k3 = ref/pi - 1 - log(ref/pi).

    logprobs (B, T) nats carry the gradient; part: rows of a Rollout -> scalar, the mean over response tokens
    At the policy that sampled, the expected gradient is that of KL(ref || pi) at each state.
    """
    ref_logprobs = part.old_logprobs - part.kl_k1
    return kl_estimates(logprobs, ref_logprobs)[1][part.response_mask].mean()


def reinforce_step(policy, optimizer, rollout, cfg, lr):
    """The updates of one rollout, one per minibatch. -> {"loss", "grad_norm"}: means over the minibatches"""
    advantages = reinforce_advantages(rollout, cfg, policy.grid)  # (B, T)
    steps = []
    for minibatch in minibatches(rollout.lengths(), cfg):
        update = Update(optimizer, micro_batches(rollout, advantages, minibatch))
        for part, part_advantages in update:
            logprobs, _ = token_logprobs(policy, part.ids, part.response_mask, cfg.temperature)
            loss, stats = reinforce_loss(logprobs, part_advantages, part.response_mask)
            if cfg.kl_loss_coef:
                loss = loss + cfg.kl_loss_coef * kl_loss(logprobs, part)
            update.backward(loss, stats)
        steps.append(update.step(lr))
    return mean_stats(steps)


def micro_batches(rollout, per_token, minibatch):
    """The micro-batches of one minibatch for parallel.Update, weighted by tokens: losses are means over them.

    per_token   (B, T): advantages, or the critic's targets
    minibatch   [(start, stop)] of its micro-batches
    -> [(response tokens, (part of the rollout, part of per_token))]
    """
    parts = []
    for start, stop in minibatch:
        part = rollout.rows(start, stop)
        n_tokens = int(part.response_mask.sum())
        T = part.response_mask.shape[1]
        parts.append((n_tokens, (part, per_token[start:stop, :T])))
    return parts


def mean_stats(steps):
    """The mean of each number over the updates of a rollout: [{name: float}] -> {name: float}"""
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


def rollout_stats(rollout, grid):
    """What every RL log line says of the rollout, over all ranks: reward, KL, entropy, length, truncation."""
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
