"""REINFORCE with token rewards: sample, score every token, standardise, and push log-probabilities up or down.

    prompts ─ generate(ids only) ─ collate ─ token_logprobs(old, reference) ─ reward_fn ─► Rollout
    Rollout ─ standardize ─ advantages ─ for each minibatch: token_logprobs ─ reinforce_loss ─ step

A reward model is any `reward_fn(ids (B, T+1), response_mask (B, T)) -> (B, T)`: ids go in, never text.
Source: Chen et al. 2025, section 3.4, Algorithm 2; Williams 1992. PPO (ppo.py) is this plus ratio, clip and critic.

B trajectories of this process · T positions · N response tokens · V vocabulary
"""

import math
from dataclasses import dataclass

import torch

from data import MAX_CHARS, Example, at_line, collate, error_places, extract_answer, grade, meaning, spans
from model import exact_kl, generate, token_logprobs
from parallel import all_sum, shard_range, update


@dataclass(frozen=True)
class RL:
    """How rewards become advantages, and a rollout becomes updates."""

    advantage: str = ""  # [reinforce ppo] token (qrm, dpo, oracle) | return (orm, prm, outcome) | gae (the same, ppo) | rloo | grpo
    standardize: str = "mean_std"  # [reinforce ppo] mean_std (the paper) | std (the authors' code) | none
    kl: str = "k1"  # [reinforce ppo] penalty to the reference: k1 | k3 | exact (the paper; see kl_penalty) | abs (the authors' code)
    kl_coef: float = 0.0  # [reinforce ppo] weight of that penalty (the paper: ppo 0.01, reinforce none)
    eos_to_mean: bool = False  # [reinforce ppo] the last token's reward becomes its sequence's mean (the authors' code)
    group_size: int = 1  # [reinforce ppo] samples a prompt; batch_size counts trajectories, so prompts = batch / group
    minibatch: int = 0  # [reinforce ppo] trajectories per update; 0 is the whole rollout (strictly on-policy)
    gamma: float = 1.0  # [reinforce ppo] discount of advantage return and gae (the paper: gae 0.9)
    eval_every: int = 4  # [reinforce ppo] rollouts between two evaluations of greedy pass@1


# ------------------------------------------------------------------------------------------------ the rollout


@dataclass
class Rollout:
    """What was sampled, and what was known about it then. All (B, T) in the place of targets, 0 outside the mask."""

    ids: torch.Tensor  # (B, T+1) int64: prompt, sampled response (its stop token included, if it has one), pad
    response_mask: torch.Tensor  # (B, T) bool
    truncated: torch.Tensor  # (B,) bool: no stop token within max_new_tokens
    old_logprobs: torch.Tensor  # (B, T) nats, by the training forward
    entropy: torch.Tensor  # (B, T) nats
    kl_k1: torch.Tensor  # (B, T) nats: log pi - log ref; unbiased, of either sign
    kl_k3: torch.Tensor  # (B, T) nats: ref/pi - 1 + log pi - log ref; unbiased, never negative
    kl_exact: torch.Tensor  # (B, T) nats: sum over the vocabulary; zeros unless asked for
    scores: torch.Tensor  # (B, T) raw rewards of the reward model
    reward_mask: torch.Tensor  # (B, T) bool: where the reward model speaks (all tokens, step ends, or the last token)

    def lengths(self):
        """Tokens of prompt and response, row by row: list of int"""
        places = torch.arange(self.response_mask.shape[1], device=self.ids.device)
        return ((self.response_mask * places).amax(1) + 2).tolist()

    def rows(self, start, stop):
        """Rows [start, stop) of all fields, without the columns that only longer rows need."""
        used = int(self.response_mask[start:stop].any(0).nonzero().max()) + 1
        cut = {k: v[start:stop, : used + (k == "ids")] if v.dim() == 2 else v[start:stop] for k, v in vars(self).items()}
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
    return [[(a + start, b + start) for a, b in spans(lengths[start:stop], cfg.micro_tokens)] for start, stop in cuts]


@torch.no_grad()
def collect_rollout(policy, reference, reward_fn, prompts, stop_ids, cfg, seed, reward_mask_fn=None):
    """Samples cfg.group_size answers a prompt and scores every token.

    prompts          list of id lists: this dp rank's (all ranks of a tp group pass the same)
    reward_fn        (ids (B, T+1), response_mask (B, T)) -> (B, T) float
    reward_mask_fn   the same arguments -> (B, T) bool: where reward_fn speaks; None is every response token
    """
    device = policy.grid.device
    prompts = [p for p in prompts for _ in range(cfg.group_size)]
    responses, truncated = generate(policy, prompts, cfg.max_new_tokens, stop_ids, cfg.temperature, seed)
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


# ------------------------------------------------------------------------------------------------ rewards to advantages


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
    n, total = all_sum([picked.numel(), picked.sum().item()], grid)
    mean = total / n
    (squares,) = all_sum([(picked - mean).square().sum().item()], grid)
    sigma = (squares / n) ** 0.5
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
    The std is the sample's, over group_size - 1. Raises ValueError for a group of one.
    """
    if group_size < 2:
        raise ValueError(f"--advantage {how} compares the samples of one prompt: expected --group_size 2 or more")
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
    return {"k1": rollout.kl_k1, "k3": rollout.kl_k3, "exact": rollout.kl_exact, "abs": rollout.kl_k1.abs()}[kl]


def advantages(rollout, cfg, grid):
    """A (B, T), without critic, 0 outside the mask.

        token         Z_std - kl_coef * KL                         the reward model's score already is a Q (the paper)
        return        reward-to-go of (reward_std - kl_coef * KL)  for outcome and step rewards
        rloo, grpo    the trajectory's mean reward against its group's, on every token, - kl_coef * KL
    """
    if cfg.advantage == "gae":
        raise ValueError("--advantage gae needs a critic: expected --stage ppo, or token, return, rloo or grpo")
    mask, penalty = rollout.response_mask, cfg.kl_coef * kl_penalty(rollout, cfg.kl)
    if cfg.advantage in ("rloo", "grpo"):
        means = rollout.scores.masked_fill(~rollout.reward_mask, 0.0).sum(1) / rollout.reward_mask.sum(1).clamp(min=1)  # (B,)
        weights = group_advantages(means, cfg.group_size, cfg.advantage)[:, None].expand(mask.shape)
        return (weights - penalty).masked_fill(~mask, 0.0)
    rewards = standardize(rollout.scores, rollout.reward_mask, cfg.standardize, grid)
    if cfg.eos_to_mean:
        rewards = eos_to_mean(rewards, mask)
    rewards = (rewards - penalty).masked_fill(~mask, 0.0)
    return returns_to_go(rewards, mask, cfg.gamma) if cfg.advantage == "return" else rewards


# ------------------------------------------------------------------------------------------------ the update


# exercise 5.5 (1 line): the policy gradient
def reinforce_loss(logprobs, advantages, response_mask):
    """loss = -mean over response tokens of A_t log pi(a_t | s_t); its gradient is the policy gradient (Williams 1992).

    All (B, T); A carries no gradient; what stands outside the mask changes nothing. -> loss (scalar), {}
    """
    return -(advantages.detach()[response_mask] * logprobs[response_mask]).mean(), {}


def reinforce_step(policy, optimizer, rollout, cfg, lr):
    """The updates of one rollout: one a minibatch. -> {"loss", "grad_norm"}: means over the minibatches"""
    weights, steps = advantages(rollout, cfg, policy.grid), []

    def loss_fn(part):
        chunk, weight = part
        logprobs, _ = token_logprobs(policy, chunk.ids, chunk.response_mask, cfg.temperature)
        return reinforce_loss(logprobs, weight, chunk.response_mask)

    for minibatch in minibatches(rollout.lengths(), cfg):
        steps.append(update(optimizer, micro_batches(rollout, weights, minibatch), loss_fn, lr))
    return mean_stats(steps)


def micro_batches(rollout, weights, spans):
    """[(response tokens, (chunk of the rollout, its weights))] for parallel.update: the loss is a mean over tokens."""
    chunks = [rollout.rows(*span) for span in spans]
    return [(int(c.response_mask.sum()), (c, weights[a:b, : c.response_mask.shape[1]])) for c, (a, b) in zip(chunks, spans)]


def mean_stats(steps):
    """The mean of each figure over the updates of a rollout."""
    return {k: sum(s[k] for s in steps) / len(steps) for k in steps[0]}


def rollout_stats(rollout, grid):
    """What every RL log line reports about a rollout, over all ranks: raw reward, KL, entropy, length, truncation."""
    mask, n = rollout.response_mask, rollout.response_mask.sum().item()
    sums = [n, len(mask), rollout.reward_mask.sum().item(), rollout.scores[rollout.reward_mask].sum().item(),
            rollout.kl_k1.sum().item(), rollout.kl_k3.sum().item(), rollout.entropy.sum().item(), rollout.truncated.sum().item()]  # fmt: skip
    tokens, rows, spoken, reward, k1, k3, entropy, cut = all_sum(sums, grid)
    return {"reward": reward / spoken, "kl_k1": k1 / tokens, "kl_k3": k3 / tokens, "entropy": entropy / tokens,
            "response_length": tokens / rows, "truncated": cut / rows}  # fmt: skip

# ------------------------------------------------------------------------------------------------ graded answers


def encode_prompts(rows, tokenizer, cfg):
    """-> list of id lists; a prompt that cannot be encoded is named by its file and line"""
    prompts = []
    for row in rows:
        with at_line(cfg.data or "built-in task", row["line"]):
            prompts.append(tokenizer.encode_prompt(row["prompt"]))
    return prompts


def sample_graded(policy, tokenizer, rows, cfg, grid, seed, temperature, k):
    """k answers a row: -> [[(text, response ids, correct, truncated)] * k] for this dp rank's rows, and the token count."""
    prompts = [ids for ids in encode_prompts(rows, tokenizer, cfg) for _ in range(k)]
    responses, truncated = generate(policy, prompts, cfg.max_new_tokens, tokenizer.stop_ids, temperature, seed)
    texts = [tokenizer.decode([t for t in ids if t not in tokenizer.stop_ids]) for ids in responses]
    labels = [row["label"] for row in rows for _ in range(k)]
    graded = [(text, ids, grade(text, label, cfg.task, cfg.grader)[1], cut) for text, ids, label, cut in zip(texts, responses, labels, truncated)]
    return [graded[i : i + k] for i in range(0, len(graded), k)], sum(map(len, responses))


def make_pairs(row, answers, most):
    """Right answers paired with wrong ones of the same prompt; each pair once, the shorter list again from its start.
    Truncated answers are left out: written as text they would gain a stop token that they never had."""
    right = list(dict.fromkeys(text for text, _, correct, cut in answers if correct and not cut and text.strip()))
    wrong = list(dict.fromkeys(text for text, _, correct, cut in answers if not correct and not cut and text.strip()))
    n = min(max(len(right), len(wrong)), most) if right and wrong else 0
    return [{"prompt": row["prompt"], "chosen": right[i % len(right)], "rejected": wrong[i % len(wrong)], "label": row["label"]} for i in range(n)]


def pass_at_k(n, correct, k):
    """Chance that at least one of k answers drawn from these n is right: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_is_right(answers, cfg):
    """Whether the claim that most of k graded answers make is right (maj@k): equal values are one claim, of equally frequent
    ones the earliest counts, and an answer that claims nothing does not vote."""
    votes = {}
    for text, _, correct, _ in answers:
        if (claim := extract_answer(text, cfg.task, cfg.grader)) is not None:
            votes.setdefault(meaning(claim[:MAX_CHARS]), []).append(correct)
    return bool(votes) and max(votes.values(), key=len)[0]


def greedy_pass(policy, tokenizer, rows, cfg, grid):
    """Share of rows whose greedy answer is right, over all dp ranks."""
    answers, _ = sample_graded(policy, tokenizer, rows[grid.dp_rank :: grid.dp_size], cfg, grid, 0, 0.0, 1)
    return all_sum([sum(row[0][2] for row in answers)], grid)[0] / len(rows)


def graded_reward(kind, tokenizer, rows, cfg):
    """A reward_fn that knows the truth: it looks up the prompts of `rows` and grades the answers.

    outcome   1 or 0 at the last token; an answer without its stop token is wrong
    oracle    1 before the first wrong token and 0 from there on (the built-in task knows the one right answer)
    """
    known = {tuple(tokenizer.encode_prompt(row["prompt"])): row for row in rows}

    def reward_fn(ids, response_mask):
        out = torch.zeros(response_mask.shape, device=ids.device)
        for i, (row_ids, mask) in enumerate(zip(ids.tolist(), response_mask.tolist())):
            start, n = mask.index(True), sum(mask)  # targets[start] = ids[start + 1] is the first response token
            row, response = known[tuple(row_ids[: start + 1])], row_ids[start + 1 : start + 1 + n]
            text = tokenizer.decode([t for t in response if t not in tokenizer.stop_ids])
            correct = response[-1] in tokenizer.stop_ids and grade(text, row["label"], cfg.task, cfg.grader)[1]
            if kind == "outcome":
                out[i, start + n - 1] = float(correct)
            else:
                right = n if correct else error_places(tokenizer, row["prompt"], [Example([], response)])[0]
                out[i, start : start + right] = 1.0
        return out

    return reward_fn
