"""Q-RM: token scores from preference pairs, the loss, and the fused head; the other reward models to compare with.

    chosen   ids ─► decoder ─► Z(s_t, a_t) per token ─► mean over the response ─┐
                                                                                ├─► -log sigmoid(beta * difference - margin)
    rejected ids ─► decoder ─► Z(s_t, a_t) per token ─► mean over the response ─┘

Source: Chen et al. 2025, "Discriminative Policy Optimization for Token-Level Reward Models" (ICML), sections 3.1-3.3.

B sequences · P pairs (rows 2p and 2p+1 are the chosen and the rejected of pair p) · T positions · D model width
"""

import torch
import torch.nn.functional as F

from model import at_actions, scatter_to_mask, token_logits, token_logprobs

REWARD_MODELS = ("qrm", "plain", "logit", "orm", "prm", "dpo")  # what --stage rm can train
POLICY_LIKE = ("logit", "dpo")  # of these, what is a language model; the others have a scalar head


# -------------------------------------------------------------------------------- the method


# exercise 4.1 (1 line): where the score of a token is read
def token_scores(reward_model, ids):
    """Z(s_t, a_t) for every token: a scalar read at the position where a_t is the *input*, so it has seen s_t and a_t.

    ids (B, T+1) int64 -> scores (B, T) fp32, in the place of targets[:, t] (= ids[:, t+1]). A score depends on the
    tokens up to its own and on none behind it.
    """
    return reward_model.scalars(reward_model.model(ids))[:, 1:]  # (B, T+1) -> (B, T)


def response_scores(reward_model, ids, response_mask):
    """The same numbers for response tokens only, 0 elsewhere, without work on pads or a prompt twice. -> (B, T) fp32"""
    return scatter_to_mask(response_mask, reward_model.scalars(at_actions(reward_model, ids, response_mask)))


# exercise 4.2 (1 line): the mean over the response
def masked_mean(x, mask):
    """Mean over the positions in the mask, row by row: (B, T), (B, T) bool -> (B,). An empty row gives 0.

    What stands outside the mask, NaN included, changes nothing.
    """
    return x.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)


# exercise 4.3 (3 lines): Bradley-Terry with a margin
def pairwise_loss(chosen, rejected, beta=1.0, margin=0.0):
    """Bradley-Terry with a margin: mean over pairs of -log sigmoid(beta * (chosen - rejected) - margin).

    chosen, rejected (P,) float: one number a sequence. `margin` is a float, or a (P,) tensor for a margin per pair.
    -> loss (scalar), {"pair_accuracy", "score_gap"}: share of pairs in the right order, mean of chosen - rejected
    """
    gap = chosen.float() - rejected.float()  # (P,)
    loss = -F.logsigmoid(beta * gap - margin).mean()
    return loss, {"pair_accuracy": (gap > 0).float().mean().item(), "score_gap": gap.mean().item()}


# exercise 4.4 (2 lines): the loss of Q-RM
def qrm_loss(scores, response_mask, beta=0.2, margin=2.0):
    """The Q-RM objective (section 3.3), in the plain form that the fused one is checked against.

        loss = -log sigmoid( beta * (1/N sum_t Z(s_t^w, a_t^w) - 1/M sum_t Z(s_t^l, a_t^l)) - margin )

    scores, response_mask (2P, T); the means run over response tokens, the stop token included. The paper calls the
    margin gamma. With equal means the loss is log(1 + e^2) = 2.1269, and it reaches log 2 only at a gap of
    margin / beta = 10: trained scores span tens of units, and are standardised before they become rewards.
    """
    means = masked_mean(scores.float(), response_mask)  # (2P,)
    return pairwise_loss(means[0::2], means[1::2], beta, margin)


class _FusedQRM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, head_weight, shares, pairs, n_pairs, beta, margin, eps):
        acc = torch.promote_types(x.dtype, torch.float32)  # fp32 inside, fp64 in the test
        u = norm_weight.to(acc) * head_weight.to(acc).flatten()  # (D,)
        r = (torch.linalg.vector_norm(x, dim=-1, dtype=acc).square() / x.shape[-1] + eps).rsqrt()  # (N,)
        dot = torch.cat([chunk.to(acc) @ u for chunk in x.split(4096)])  # (N,) x_t . u; no copy of an fp32 x
        gaps = torch.zeros(n_pairs, device=x.device, dtype=acc).index_add_(0, pairs, r * dot * shares)  # (P,)
        m = beta * gaps - margin
        ctx.save_for_backward(x, norm_weight, head_weight, r, dot, shares, pairs, m)
        ctx.beta = beta
        ctx.mark_non_differentiable(gaps)
        return -F.logsigmoid(m).mean(), gaps

    # exercise 4.5 (8 lines): its gradient in closed form
    @staticmethod
    def backward(ctx, grad_loss, _):
        x, norm_weight, head_weight, r, dot, shares, pairs, m = ctx.saved_tensors
        g, w = norm_weight.to(r.dtype), head_weight.to(r.dtype).flatten()
        dm = -grad_loss * torch.sigmoid(-m) / len(m)  # (P,)
        dz = ctx.beta * dm[pairs] * shares  # (N,)
        a, b = dz * r, dz * r.pow(3) * dot / -x.shape[-1]  # dL/dx_t = a_t u + b_t x_t
        dx = torch.mul(x, b[:, None].to(x.dtype)).addr_(a.to(x.dtype), (g * w).to(x.dtype))  # (N, D)
        s = sum(chunk.to(r.dtype).T @ part for chunk, part in zip(x.split(4096), a.split(4096)))  # (D,)
        return dx, (s * w).to(norm_weight), (s * g).view_as(head_weight).to(head_weight), *[None] * 6


def fused_qrm_loss(x, norm_weight, head_weight, shares, pairs, n_pairs, beta=0.2, margin=2.0, eps=1e-5):
    """Final RMSNorm + scalar head + masked mean + pairwise loss as one function with a closed-form backward.

    The plain way keeps a normalised copy of the hidden states and reads them again; this one keeps two numbers a token.

        u = g * w (norm weight times head),  r_t = (mean_d x_td^2 + eps)^(-1/2):    Z_t = r_t (x_t . u)
        c_t = +1/N on a chosen response, -1/M on a rejected one, 0 elsewhere:       m = beta sum_t c_t Z_t - margin
        L = mean over pairs of log(1 + e^-m), so                                    dL/dZ_t = -sigmoid(-m) beta c_t / P
        dr_t/dx_t = -r_t^3 x_t / D, and the product rule on r_t (x_t . u) gives     dZ_t/dx_t = r_t u - r_t^3 (x_t . u) x_t / D
        dZ_t/du = r_t x_t; with s = sum_t dL/dZ_t r_t x_t the chain rule gives      dL/dg = s * w,  dL/dw = s * g

    x              (N, D) residual stream before the final norm, one row a token in any order, e.g. Packed
    norm_weight    (D,), head_weight (1, D) or (D,); fp32 inside whatever the dtypes
    shares, pairs  (N,) c_t (fp32), and the pair 0 .. n_pairs - 1 that a token belongs to: see token_shares
    -> loss (scalar, differentiable), gaps (P,) = sum_t c_t Z_t (not differentiable: for metrics)
    """
    return _FusedQRM.apply(x, norm_weight, head_weight, shares, pairs, n_pairs, beta, margin, eps)


def token_shares(response_mask):
    """c_t and pair of every response token in reading order: (2P, T) bool -> (n,) fp32, (n,) int64"""
    rows = torch.arange(len(response_mask), device=response_mask.device)
    shares = (1.0 - 2.0 * (rows % 2)) / response_mask.sum(1).clamp(min=1)  # (2P,)
    return shares[:, None].expand(response_mask.shape)[response_mask], (rows // 2)[:, None].expand(
        response_mask.shape
    )[response_mask]


# -------------------------------------------------------------------------------- the other reward models


# exercise 4.6 (1 line): where an outcome reward stands
def last_token_mask(response_mask):
    """(B, T) bool -> the same, true at the last response token only (the stop token, unless the answer was cut off)."""
    return response_mask & ~F.pad(response_mask, (0, 1))[:, 1:]


def step_end_mask(ids, response_mask, step_ids):
    """True at the last token of each step: tokens in step_ids (those that end a line), and the response's last token."""
    ends = torch.isin(ids[:, 1:], torch.tensor(step_ids, device=ids.device))
    return (ends & response_mask) | last_token_mask(response_mask)


def orm_loss(scores, response_mask):
    """Outcome reward model, pairwise: -log sigmoid(Z^w - Z^l) at the last tokens; every other token goes untrained."""
    last = masked_mean(scores.float(), last_token_mask(response_mask))  # (2P,)
    return pairwise_loss(last[0::2], last[1::2])


# exercise 4.7 (3 lines): an outcome reward model from right and wrong
def outcome_loss(scores, response_mask, correct):
    """Outcome reward model, pointwise: cross-entropy of sigmoid(Z at the last token) on right or wrong. correct (B,)
    -> loss (scalar), {"accuracy"}: share of answers whose Z has the right sign"""
    last = masked_mean(scores.float(), last_token_mask(response_mask))  # (B,)
    loss = F.binary_cross_entropy_with_logits(last, correct.float())
    return loss, {"accuracy": ((last > 0) == correct.bool()).float().mean().item()}


def step_loss(scores, ends, labels):
    """Step-level process reward model: mean over step ends of (tanh(Z) - y)^2, y = +1 right, -1 wrong, 0 neutral.

    scores, ends (bool), labels (float): (B, T), labels read at the ends only. As in the authors' PRM800K baseline.
    """
    error = torch.tanh(scores[ends].float()) - labels[ends]
    return error.square().mean(), {"step_accuracy": (error.abs() < 1).float().mean().item()}


# exercise 4.8 (2 lines): DPO
def dpo_loss(logprobs, ref_logprobs, response_mask, beta=0.1):
    """DPO (Rafailov et al. 2023): -log sigmoid(beta * (sum log pi/ref on the chosen - the same on the rejected)); (2P, T)
    -> what pairwise_loss returns"""
    sums = (logprobs - ref_logprobs).masked_fill(~response_mask, 0.0).sum(1)  # (2P,)
    return pairwise_loss(sums[0::2], sums[1::2], beta)


# exercise 4.9 (2 lines): more than two answers, ranked
def plackett_luce_loss(ranked):
    """K-wise ranking (Plackett 1975): -log prod_k exp(s_k) / sum_{j >= k} exp(s_j), mean over prompts and ranks.

    ranked (prompts, K): sequence scores from best to worst. Each prompt weighs the same, however many pairs its K
    answers make; K = 2 is Bradley-Terry. -> loss (scalar), {}
    """
    rest = (
        ranked.float().flip(1).logcumsumexp(1).flip(1)
    )  # (prompts, K): log sum over what is left to choose from
    return (rest - ranked.float())[:, :-1].mean(), {}


# A reward_fn maps (ids (B, T+1), response_mask (B, T)) to rewards (B, T), 0 outside the mask, in the place of targets.
def token_reward(reward_model):
    """Q-RM: the raw Z(s_t, a_t) of every response token."""
    return lambda ids, mask: response_scores(reward_model, ids, mask)


# exercise 4.10 (4 lines): one reward for the whole answer
def outcome_reward(reward_model, every_token=False):
    """ORM: the score at the last token, 0 elsewhere; or that score on every token, as the authors' REINFORCE has it."""

    def reward_fn(ids, mask):
        last = response_scores(reward_model, ids, mask).masked_fill(~last_token_mask(mask), 0.0)  # (B, T)
        return last.sum(1, keepdim=True) * mask if every_token else last

    return reward_fn


def step_reward(reward_model, step_ids):
    """Step-level PRM: tanh(Z) at the end of each step, 0 elsewhere."""
    return lambda ids, mask: torch.tanh(response_scores(reward_model, ids, mask)).masked_fill(
        ~step_end_mask(ids, mask, step_ids), 0.0
    )


# exercise 4.11 (1 line): DPO's token rewards
def dpo_reward(policy, reference, beta=0.1):
    """DPO as a token reward: beta (log pi(a_t | s_t) - log ref(a_t | s_t)), at the token it belongs to.

    (The authors' code reads it one token late: a_i gets the ratio of a_(i+1), and the stop token that of a pad.)
    """
    return lambda ids, mask: (
        beta * (token_logprobs(policy, ids, mask)[0] - token_logprobs(reference, ids, mask)[0])
    )


def logit_reward(policy):
    """Z as the logit that a language model gives a_t at s_t (Definition 3.1 with phi its own softmax), for comparison: the
    paper reads a scalar head after a_t instead, so that scoring and generating share no output."""
    return lambda ids, mask: token_logits(policy, ids, mask)


# -------------------------------------------------------------------------------- by name


def reward_model_loss(model, ids, response_mask, cfg, reference=None, step_ids=(), errors=None):
    """The training loss of cfg.reward on a batch of pairs; rows 2p and 2p+1 are the chosen and the rejected of pair p.

    ids (2P, T+1), response_mask (2P, T)      reference   the frozen start of a DPO policy
    step_ids   ids that end a step (prm)      errors      (2P,) int: index of the first wrong response token (prm)
    -> loss (scalar), {name: float}
    """
    if cfg.reward == "qrm":
        norm, n_pairs = model.model.norm, len(ids) // 2
        x, (shares, pairs) = (
            at_actions(model, ids, response_mask),
            token_shares(response_mask),
        )  # (n, D), (n,), (n,)
        loss, gaps = fused_qrm_loss(
            x, norm.weight, model.score.weight, shares, pairs, n_pairs, cfg.beta, cfg.margin, norm.eps
        )
        return loss, {"pair_accuracy": (gaps > 0).float().mean().item(), "score_gap": gaps.mean().item()}
    if cfg.reward == "dpo":
        with torch.no_grad():
            ref_logprobs = token_logprobs(reference, ids, response_mask)[0]
        return dpo_loss(token_logprobs(model, ids, response_mask)[0], ref_logprobs, response_mask, cfg.beta)
    if cfg.reward == "logit":
        return qrm_loss(token_logits(model, ids, response_mask), response_mask, cfg.beta, cfg.margin)
    scores = response_scores(model, ids, response_mask)
    if cfg.reward == "prm":
        place = response_mask.cumsum(1) - 1  # (2P, T): index within the response
        return step_loss(
            scores,
            step_end_mask(ids, response_mask, step_ids),
            torch.where(place < errors[:, None], 1.0, -1.0),
        )
    return (
        orm_loss(scores, response_mask)
        if cfg.reward == "orm"
        else qrm_loss(scores, response_mask, cfg.beta, cfg.margin)
    )


def reward_function(kind, model, reference=None, step_ids=()):
    """-> reward_fn, reward_mask_fn (where it speaks; None is every response token), whether it is a token's own Q."""
    return {
        "qrm": (token_reward(model), None, True),
        "dpo": (dpo_reward(model, reference), None, True),
        "logit": (logit_reward(model), None, True),
        "orm": (outcome_reward(model), lambda ids, mask: last_token_mask(mask), False),
        "prm": (step_reward(model, step_ids), lambda ids, mask: step_end_mask(ids, mask, step_ids), False),
    }[kind]


def sequence_score(kind, scores):
    """One number for a whole answer, from its rewards (n,): Q-RM and PRM by the mean, ORM by the last token, DPO by the sum."""
    spoken = {"qrm": len(scores), "logit": len(scores), "prm": max(int((scores != 0).sum()), 1)}.get(kind, 1)
    return scores.sum().item() / spoken


# -------------------------------------------------------------------------------- how good is it


# exercise 4.12 (10 lines): does a score know where the answer went wrong?
def credit_counts(scores, first_errors, repaired=None):
    """Does the reward model know *where* an answer goes wrong? Counts over answers whose first wrong token is known.

    scores         list of (n_i,) float: one score per response token of a wrong answer
    first_errors   list of int: index of the first wrong token. With nothing before it (0) the answer is left out
    repaired       list of (n_i,) float: scores of the same answers up to there, with the right token in its last place
    -> {"wins", "comparisons", "hits", "choices", "n_errors"}, to be added over ranks:
       wins / comparisons   AUC: P(Z at the first wrong token < Z at a token before it), ties 1/2, within one answer; .5
                            is blind. (Theory predicts a step down, so the lowest token of all is not the question.)
       hits / n_errors      share of answers whose largest drop Z_t - Z_(t-1) is at the first wrong token
       choices / n_errors   share in which the right token scores higher than the wrong one at the same state. (AUC compares
                            different states: to a policy all but a few tokens are near certain, and its own log pi gets .99)
    """
    counts = {"wins": 0.0, "comparisons": 0, "hits": 0, "choices": 0.0, "n_errors": 0}
    for z, error, right in zip(scores, first_errors, repaired or [None] * len(scores)):
        if error:
            before, at = z[:error], z[error]
            counts["wins"] += (before > at).sum().item() + 0.5 * (before == at).sum().item()
            counts["comparisons"] += error
            counts["choices"] += (
                0.0 if right is None else float(right[error] > at) + 0.5 * float(right[error] == at)
            )
            counts["hits"] += int(z.diff().argmin().item() + 1 == error)
            counts["n_errors"] += 1
    return counts
