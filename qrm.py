"""Q-RM: token scores from preference pairs, the loss, the fused head, and reward models to compare with.

    chosen   ids ─► decoder ─► Z(s_t, a_t) ─► mean over the response ─┐
                                                                      ├─► -log sigmoid(beta * gap - margin)
    rejected ids ─► decoder ─► Z(s_t, a_t) ─► mean over the response ─┘    gap = chosen - rejected

Source: Chen et al. 2025, "Discriminative Policy Optimization for Token-Level Reward Models" (ICML),
sections 3.1-3.3.

B sequences · P pairs (rows 2p and 2p+1 are the chosen and the rejected of pair p) · T positions
D model width · n response tokens, in reading order
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from model import LanguageModel, ScalarModel, at_actions, scatter_to_mask, token_logits, token_logprobs

# -------------------------------------------------------------------------------- the method


# exercise 4.1 (2 points): where the score of a token is read
def token_scores(reward_model, ids):
    """Z(s_t, a_t) for every token: a scalar read where a_t is the *input*, so it has seen s_t and a_t.

    ids (B, T+1) int64 -> scores (B, T) fp32, in the place of targets[:, t] (= ids[:, t+1]).
    A score depends on its own token and those before it, and on no later one.
    reward_model.model(ids) is (B, T+1, D), and reward_model.scalars of it (B, T+1). Scores carry gradient.
    """
    return reward_model.scalars(reward_model.model(ids))[:, 1:]  # (B, T+1) -> (B, T)


def response_scores(reward_model, ids, response_mask):
    """token_scores of the response tokens only; spends no time on pads, nor on a shared prompt twice.

    ids (B, T+1) int64, response_mask (B, T) bool -> scores (B, T) fp32, 0 outside the mask
    """
    return scatter_to_mask(response_mask, reward_model.scalars(at_actions(reward_model, ids, response_mask)))


# exercise 4.2 (1 point): the mean over the response
def masked_mean(x, mask):
    """Mean over the positions in the mask, row by row: (B, T), (B, T) bool -> (B,). An empty row gives 0.

    Values outside the mask, NaN included, have no effect.
    The same goes for the gradient: it is 0 outside the mask and in an empty row, never NaN.
    """
    return x.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)


# exercise 4.3 (2 points): Bradley-Terry with a margin
def pairwise_loss(chosen, rejected, beta=1.0, margin=0.0):
    """Bradley-Terry with a margin: mean over pairs of -log sigmoid(beta * (chosen - rejected) - margin).

    chosen, rejected   (P,) float: one number per sequence
    margin             float, or (P,) float: one margin per pair
    -> loss (scalar), {"pair_accuracy": share of pairs in the right order, "score_gap": mean difference}
    A tie is not in the right order. The loss is finite for gaps of any size.
    """
    gap = chosen.float() - rejected.float()  # (P,)
    loss = -F.logsigmoid(beta * gap - margin).mean()
    return loss, {"pair_accuracy": (gap > 0).float().mean().item(), "score_gap": gap.mean().item()}


# exercise 4.4 (1 point): the loss of Q-RM
def qrm_loss(scores, response_mask, beta=0.2, margin=2.0):
    """The Q-RM objective (section 3.3) in its plain form, against which the fused one is checked.

        loss = -log sigmoid( beta * (1/N sum_t Z(s_t^w, a_t^w) - 1/M sum_t Z(s_t^l, a_t^l)) - margin )

    scores, response_mask (2P, T) -> what pairwise_loss returns
    The means run over response tokens, the stop token included. The paper calls the margin gamma. With equal
    means the loss is log(1 + e^2) = 2.1269, and it reaches log 2 only at a gap of margin / beta = 10: trained
    scores span tens of units, and are standardised before they become rewards.
    """
    means = masked_mean(scores.float(), response_mask)  # (2P,)
    return pairwise_loss(means[0::2], means[1::2], beta, margin)


CHUNK = 4096  # rows of x converted to fp32 at a time: a whole fp32 copy takes twice the memory of a bf16 x


class _FusedQRM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, head_weight, shares, pairs, n_pairs, beta, margin, eps):
        acc = torch.promote_types(x.dtype, torch.float32)  # accumulates in fp32; in fp64 when the test's x is
        u = norm_weight.to(acc) * head_weight.to(acc).flatten()  # (D,)
        mean_square = torch.linalg.vector_norm(x, dim=-1, dtype=acc).square() / x.shape[-1]  # (n,)
        r = (mean_square + eps).rsqrt()  # (n,)
        dot = torch.cat([chunk.to(acc) @ u for chunk in x.split(CHUNK)])  # (n,) x_t . u
        gaps = torch.zeros(n_pairs, device=x.device, dtype=acc)
        gaps.index_add_(0, pairs, r * dot * shares)  # (P,)
        m = beta * gaps - margin  # (P,)
        ctx.save_for_backward(x, norm_weight, head_weight, r, dot, shares, pairs, m)
        ctx.beta = beta
        ctx.mark_non_differentiable(gaps)
        return -F.logsigmoid(m).mean(), gaps

    # exercise 4.5 (5 points): its gradient in closed form
    @staticmethod
    def backward(ctx, grad_loss, _):
        """One value per argument of forward, in its order: dL/dx, dL/dg, dL/dw times grad_loss, then None."""
        x, norm_weight, head_weight, r, dot, shares, pairs, m = ctx.saved_tensors
        g = norm_weight.to(r.dtype)  # (D,)
        w = head_weight.to(r.dtype).flatten()  # (D,)
        dm = -grad_loss * torch.sigmoid(-m) / len(m)  # (P,)
        dz = ctx.beta * dm[pairs] * shares  # (n,)
        # dL/dx_t = a_t u + b_t x_t, with u = g * w
        a = dz * r  # (n,)
        b = dz * r.pow(3) * dot / -x.shape[-1]  # (n,)
        dx = torch.mul(x, b[:, None].to(x.dtype))  # (n, D)
        dx.addr_(a.to(x.dtype), (g * w).to(x.dtype))
        # s = sum_t a_t x_t
        chunks = zip(x.split(CHUNK), a.split(CHUNK))
        s = sum(chunk.to(r.dtype).T @ part for chunk, part in chunks)  # (D,)
        d_norm = (s * w).to(norm_weight)
        d_head = (s * g).view_as(head_weight).to(head_weight)
        return dx, d_norm, d_head, None, None, None, None, None, None


def fused_qrm_loss(x, norm_weight, head_weight, shares, pairs, n_pairs, beta=0.2, margin=2.0, eps=1e-5):
    """Final RMSNorm + scalar head + masked mean + pairwise loss as one function with a closed-form backward.

    The plain way keeps a normalised copy of x for backward; this one keeps two numbers per token.

    forward     u   = g * w                                norm weight times head
                r_t = (mean_d x_td^2 + eps)^(-1/2)
                Z_t = r_t (x_t . u)
                c_t = +1/N on a chosen response, -1/M on a rejected one
                m   = beta sum_t c_t Z_t - margin          one per pair; L = mean of log(1 + e^-m)

    backward    dL/dZ_t   = -sigmoid(-m) beta c_t / P
                dr_t/dx_t = -r_t^3 x_t / D
                dZ_t/dx_t = r_t u - r_t^3 (x_t . u) x_t / D
                dZ_t/du   = r_t x_t, so with s = sum_t dL/dZ_t r_t x_t:   dL/dg = s * w,   dL/dw = s * g

    x                         (n, D) residual stream before the final norm, one row per token in any order
    norm_weight, head_weight  (D,), and (1, D) or (D,); computed in fp32 whatever the dtypes
    shares, pairs             (n,) c_t (fp32), and the pair 0 .. n_pairs - 1 of each token: see token_shares
    -> loss (scalar, differentiable), gaps (P,) = sum_t c_t Z_t (not differentiable: for metrics)
    """
    return _FusedQRM.apply(x, norm_weight, head_weight, shares, pairs, n_pairs, beta, margin, eps)


def token_shares(response_mask):
    """c_t and pair of every response token in reading order: (2P, T) bool -> (n,) fp32, (n,) int64"""
    rows = torch.arange(len(response_mask), device=response_mask.device)  # (2P,)
    lengths = response_mask.sum(1)  # (2P,)
    sign = 1.0 - 2.0 * (rows % 2)  # (2P,): +1 chosen, -1 rejected
    shares = sign / lengths.clamp(min=1)  # (2P,)
    return shares.repeat_interleave(lengths), (rows // 2).repeat_interleave(lengths)  # (n,), (n,)


# -------------------------------------------------------------------------------- other reward models


# exercise 4.6 (1 point): the place of an outcome reward
def last_token_mask(response_mask):
    """(B, T) bool -> (B, T) bool: True at the last response token, which is the stop token unless truncated.

    A row without response tokens is False throughout.
    """
    return response_mask & ~F.pad(response_mask, (0, 1))[:, 1:]


def step_end_mask(ids, response_mask, step_ids):
    """True at the last token of each step: at tokens in step_ids (line ends), and at the last response token.

    ids (B, T+1) int64, response_mask (B, T) bool -> (B, T) bool
    """
    ends = torch.isin(ids[:, 1:], torch.tensor(step_ids, device=ids.device))  # (B, T)
    return (ends & response_mask) | last_token_mask(response_mask)


def orm_loss(scores, response_mask):
    """Outcome reward model, pairwise: -log sigmoid(Z^w - Z^l) at the last tokens; no other Z enters the loss.

    scores, response_mask (2P, T) -> what pairwise_loss returns
    """
    last = masked_mean(scores.float(), last_token_mask(response_mask))  # (2P,)
    return pairwise_loss(last[0::2], last[1::2])


# exercise 4.7 (2 points): an outcome reward model from right and wrong
def outcome_loss(scores, response_mask, correct):
    """Outcome reward model, pointwise: cross-entropy of sigmoid(Z at the last token) against right or wrong.

    scores, response_mask (B, T), correct (B,)
    -> loss (scalar), {"accuracy"}: share of answers whose Z has the right sign
    A positive Z says right. The loss is finite for scores of any size.
    """
    last = masked_mean(scores.float(), last_token_mask(response_mask))  # (B,)
    loss = F.binary_cross_entropy_with_logits(last, correct.float())
    return loss, {"accuracy": ((last > 0) == correct.bool()).float().mean().item()}


def step_loss(scores, ends, labels):
    """Step-level process reward model: mean of (tanh(Z) - y)^2 over step ends, as in the authors' code.

    scores, ends (bool), labels (float): (B, T); y = +1 right, -1 wrong, 0 neutral, read at the ends only
    -> loss (scalar), {"step_accuracy": share of steps whose tanh(Z) is less than 1 from the label}
    """
    error = torch.tanh(scores[ends].float()) - labels[ends]
    n = max(len(error), 1)  # no step end: a loss of 0
    return error.square().sum() / n, {"step_accuracy": (error.abs() < 1).sum().item() / n}


def verifier_loss(scores, response_mask, correct):
    """The outcome label on every token (Cobbe et al. 2021): mean cross-entropy over all response tokens.

    scores, response_mask (B, T), correct (B,)
    -> loss (scalar), {"token_accuracy": share of tokens whose Z has the sign of their answer's label}
    Z(s_t, a_t) becomes the log-odds that the sampling policy, going on from there, ends with a right answer,
    minus those of its prompt, since pairs hold as many right answers as wrong ones.
    """
    labels = correct.float()[:, None].expand(response_mask.shape)[response_mask]  # (n,)
    logits = scores[response_mask].float()
    loss = F.binary_cross_entropy_with_logits(logits, labels)
    return loss, {"token_accuracy": ((logits > 0) == labels.bool()).float().mean().item()}


# exercise 4.8 (2 points): DPO
def dpo_loss(logprobs, ref_logprobs, response_mask, beta=0.1):
    """DPO (Rafailov et al. 2023): -log sigmoid(beta * (sum log pi/ref of the chosen - that of the rejected)).

    logprobs, ref_logprobs, response_mask (2P, T) -> what pairwise_loss returns
    Values outside the mask, NaN included, have no effect.
    """
    sums = (logprobs - ref_logprobs).masked_fill(~response_mask, 0.0).sum(1)  # (2P,)
    return pairwise_loss(sums[0::2], sums[1::2], beta)


# exercise 4.9 (4 points): more than two answers, ranked
def plackett_luce_loss(ranked):
    """K-wise ranking (Plackett 1975): mean over prompts and ranks of -log exp(s_k) / sum_{j >= k} exp(s_j).

    ranked (prompts, K): sequence scores from best to worst -> loss (scalar), {}
    Each prompt weighs the same, however many pairs its K answers make; K = 2 is Bradley-Terry. The last rank
    leaves no choice, so the mean is over K - 1 ranks. The loss is finite for scores of any size.
    """
    rest = ranked.float().flip(1).logcumsumexp(1).flip(1)  # (prompts, K): log sum over the remaining choices
    return (rest - ranked.float())[:, :-1].mean(), {}


# Rewards: (model, ids (B, T+1), response_mask (B, T)) -> (B, T) aligned with targets, 0 outside the mask.
# Q-RM's rewards are response_scores above.


# exercise 4.10 (2 points): one reward for the whole answer
def outcome_rewards(reward_model, ids, response_mask, every_token=False):
    """ORM: the last token's score, there and 0 elsewhere, or at every token, as in the authors' REINFORCE."""
    scores = response_scores(reward_model, ids, response_mask)  # (B, T)
    last = scores.masked_fill(~last_token_mask(response_mask), 0.0)
    return last.sum(1, keepdim=True) * response_mask if every_token else last  # (B, T)


def step_rewards(reward_model, ids, response_mask, step_ids):
    """Step-level PRM: tanh(Z) at the end of each step, 0 elsewhere."""
    scores = response_scores(reward_model, ids, response_mask)  # (B, T)
    return torch.tanh(scores).masked_fill(~step_end_mask(ids, response_mask, step_ids), 0.0)


# exercise 4.11 (2 points): DPO's token rewards
def dpo_rewards(policy, reference, ids, response_mask, beta=0.1):
    """DPO as a token reward: beta (log pi(a_t | s_t) - log ref(a_t | s_t)), at the token a_t itself.

    0 outside the mask, as token_logprobs is. The authors' code reads the ratio one token late: a_i gets that
    of a_(i+1), and the stop token that of a pad.
    """
    logprobs, _ = token_logprobs(policy, ids, response_mask)  # (B, T)
    ref_logprobs, _ = token_logprobs(reference, ids, response_mask)
    return beta * (logprobs - ref_logprobs)


def logprob_rewards(policy, ids, response_mask):
    """SimPO's token rewards: log pi(a_t | s_t), of which its loss takes the mean."""
    return token_logprobs(policy, ids, response_mask)[0]


# -------------------------------------------------------------------------------- what --reward chooses from


def count_pairs(examples):
    """How many pairs the answers make."""
    return len(examples) // 2


def count_response_tokens(examples):
    """How many response tokens the answers have."""
    return sum(len(example.response_ids) for example in examples)


def count_steps(examples):
    """How many labelled steps the answers have."""
    return sum(len(example.steps) for example in examples)


def sum_of_rewards(rewards):
    """An answer's total as the sum of its rewards."""
    return rewards.sum().item()


def mean_of_rewards(rewards):
    """An answer's total as the mean of its rewards."""
    return rewards.sum().item() / len(rewards)


def last_reward(rewards):
    """An answer's total as its last reward."""
    return rewards[-1].item()


def mean_of_steps(rewards):
    """Mean over the step ends; the reward of any other token is 0."""
    return rewards.sum().item() / max(int((rewards != 0).sum()), 1)


def step_probabilities(rewards):
    """P(right) = (1 + tanh Z) / 2 of steps, since squared error learns the expected label, p - (1 - p)."""
    return (1 + rewards.double()) / 2


def least_of_steps(rewards):
    """An answer is as good as its worst step (Math-Shepherd, Wang et al. 2024)."""
    return min(step_probabilities(rewards[rewards != 0]).tolist(), default=1.0)


def product_of_steps(rewards):
    """The probability that all steps are right, were they independent (Lightman et al. 2023)."""
    return step_probabilities(rewards[rewards != 0]).prod().item()


STEP_TOTALS = {"mean": mean_of_steps, "min": least_of_steps, "product": product_of_steps}


@dataclass(frozen=True)
class RewardModel:
    """A kind of reward model; its loss is in reward_model_loss, and its rewards are in bind_reward.

    total(rewards (n,)) -> float    one number for an answer of n tokens
    weigh(examples) -> int          numbers that the loss is a mean over
    """

    base: type  # LanguageModel, or ScalarModel: a decoder with a scalar head
    is_q: bool  # a token's reward is a Q(s_t, a_t) already: later rewards are not added to it
    total: Callable
    weigh: Callable = count_pairs
    needs_reference: bool = False  # the frozen model that training started from
    needs_steps: bool = False  # labels of steps
    reads: tuple = ("beta", "margin")  # numbers of cfg that the loss has


REWARD_MODELS = {  # what --stage rm trains
    "qrm": RewardModel(ScalarModel, is_q=True, total=mean_of_rewards),
    "plain": RewardModel(ScalarModel, is_q=True, total=mean_of_rewards),  # qrm without the fused head
    "logit": RewardModel(LanguageModel, is_q=True, total=mean_of_rewards),
    "orm": RewardModel(ScalarModel, is_q=False, total=sum_of_rewards, reads=()),
    "prm": RewardModel(
        ScalarModel, is_q=False, total=mean_of_steps, weigh=count_steps, needs_steps=True, reads=()
    ),
    "verifier": RewardModel(ScalarModel, is_q=True, total=last_reward, weigh=count_response_tokens, reads=()),
    "dpo": RewardModel(LanguageModel, is_q=True, total=sum_of_rewards, needs_reference=True, reads=("beta",)),
    "simpo": RewardModel(LanguageModel, is_q=True, total=mean_of_rewards),
}


def reward_model_loss(model, ids, response_mask, cfg, reference=None, step_labels=None):
    """The training loss of cfg.reward on P pairs; rows 2p and 2p+1 are the chosen and the rejected of pair p.

    ids          (2P, T+1) int64; response_mask (2P, T) bool
    cfg          has reward (a key of REWARD_MODELS), beta and margin
    reference    dpo: the frozen model that the policy started from
    step_labels  prm: (2P, T) float, the label of a step at its last token, NaN elsewhere; rows need no pairs
    -> loss (scalar), {name: float}
    """
    if cfg.reward == "qrm":
        return fused_loss_on_pairs(model, ids, response_mask, cfg.beta, cfg.margin)
    if cfg.reward == "logit":
        return qrm_loss(token_logits(model, ids, response_mask), response_mask, cfg.beta, cfg.margin)
    if cfg.reward == "simpo":  # Meng et al. 2024, Eq. 6; its beta is 2 to 2.5, and the defaults are Q-RM's
        logprobs, _ = token_logprobs(model, ids, response_mask)  # (2P, T)
        return qrm_loss(logprobs, response_mask, cfg.beta, cfg.margin)
    if cfg.reward == "dpo":
        logprobs, _ = token_logprobs(model, ids, response_mask)  # (2P, T)
        with torch.no_grad():
            ref_logprobs, _ = token_logprobs(reference, ids, response_mask)
        return dpo_loss(logprobs, ref_logprobs, response_mask, cfg.beta)
    scores = response_scores(model, ids, response_mask)  # (2P, T)
    if cfg.reward == "orm":
        return orm_loss(scores, response_mask)
    if cfg.reward == "prm":
        return step_loss(scores, ~step_labels.isnan(), step_labels)
    if cfg.reward == "verifier":
        correct = torch.arange(len(ids), device=ids.device) % 2 == 0  # (2P,): the chosen ones
        return verifier_loss(scores, response_mask, correct)
    if cfg.reward == "plain":
        return qrm_loss(scores, response_mask, cfg.beta, cfg.margin)
    raise KeyError(cfg.reward)


def fused_loss_on_pairs(model, ids, response_mask, beta, margin):
    """qrm_loss(response_scores(...)) through fused_qrm_loss: the same numbers in less memory."""
    norm = model.model.norm
    x = at_actions(model, ids, response_mask)  # (n, D)
    shares, pairs = token_shares(response_mask)  # (n,), (n,)
    loss, gaps = fused_qrm_loss(
        x, norm.weight, model.score.weight, shares, pairs, len(ids) // 2, beta, margin, norm.eps
    )
    return loss, {"pair_accuracy": (gaps > 0).float().mean().item(), "score_gap": gaps.mean().item()}


# -------------------------------------------------------------------------------- rewards for RL


def at_every_token(ids, response_mask):
    """Where Q-RM speaks: at every response token."""
    return response_mask


def at_last_token(ids, response_mask):
    """Where an outcome model speaks: at the last response token."""
    return last_token_mask(response_mask)


@dataclass(frozen=True)
class Reward:
    """What a rollout is scored with: a reward model with its weights, a grader, or a user's function.

    rewards   (ids (B, T+1), response_mask (B, T)) -> (B, T) float; anything outside the mask is ignored
    speaks    (ids, response_mask) -> (B, T) bool: where the rewards are given; called after `rewards`
    is_q      whether a token's reward already is a Q(s_t, a_t)
    total     rewards (n,) of one answer -> float: what answers are compared by
    """

    rewards: Callable
    speaks: Callable = at_every_token
    is_q: bool = False
    total: Callable = sum_of_rewards


def bind_reward(name, model, reference=None, step_ids=()):
    """The Reward of a trained model; name is a key of REWARD_MODELS, reference as in reward_model_loss."""
    rewards_of = {
        "orm": partial(outcome_rewards, model),
        "prm": partial(step_rewards, model, step_ids=step_ids),
        "dpo": partial(dpo_rewards, model, reference),
        # Definition 3.1 with the language model's own softmax as phi. The paper reads a scalar head after a_t
        # instead, so that scoring and generating share no output.
        "logit": partial(token_logits, model),
        "simpo": partial(logprob_rewards, model),
    }
    speaks_at = {"orm": at_last_token, "prm": partial(step_end_mask, step_ids=step_ids)}
    rewards = rewards_of.get(name, partial(response_scores, model))  # the raw Z
    kind = REWARD_MODELS[name]
    return Reward(rewards, speaks_at.get(name, at_every_token), kind.is_q, kind.total)


def with_outcome(reward, outcome):
    """RTO (Zhong et al. 2024): token rewards plus an outcome model's score at the last token, accumulated."""

    def rewards(ids, response_mask):
        return reward.rewards(ids, response_mask) + outcome.rewards(ids, response_mask)

    return replace(reward, rewards=rewards, is_q=False, total=sum_of_rewards)


# -------------------------------------------------------------------------------- credit assignment


# exercise 4.12 (4 points): does a score know where the answer went wrong?
def credit_counts(scores, first_errors, repaired=None):
    """Does the reward model know *where* an answer goes wrong? Counts over answers with a known first error.

    scores         list of (n_i,) float: one score per response token of a wrong answer
    first_errors   list of int: index of the first wrong token; an answer that starts with it (0) is left out
    repaired       list of (n_i,) float: scores of the same answers up to there, the wrong token put right
    -> {"wins", "comparisons", "hits", "choices", "n_errors"}, to be added over ranks:
       choices / n_errors   share in which the right token scores higher than the wrong one at the same state:
                            read this one first, .5 is blind
       hits / n_errors      share of answers whose largest drop Z_t - Z_(t-1) is at the first wrong token
       wins / comparisons   AUC: P(Z at the first wrong token < Z at a token before it), ties 1/2, within one
                            answer. It compares different states, and scores that know nothing do well: minus
                            the index gets 1, "is it no operator" about .86 on the built-in task
    Ties count 1/2 in choices, too. Without `repaired`, choices is 0.
    """
    counts = {"wins": 0.0, "comparisons": 0, "hits": 0, "choices": 0.0, "n_errors": 0}
    for z, error, right in zip(scores, first_errors, repaired or [None] * len(scores)):
        if error == 0:
            continue
        before, at = z[:error], z[error]
        counts["n_errors"] += 1
        counts["comparisons"] += error
        counts["wins"] += (before > at).sum().item() + 0.5 * (before == at).sum().item()
        largest_drop = z.diff().argmin().item() + 1
        counts["hits"] += int(largest_drop == error)
        if right is not None:
            counts["choices"] += float(right[error] > at) + 0.5 * float(right[error] == at)
    return counts
