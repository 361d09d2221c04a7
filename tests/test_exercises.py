"""The grader is graded: solutions pass, and so do others; blanks, zeros and at least four plausible mistakes
per
exercise fail; nothing in a student's file takes the grader down. `blank` leaves this file out: it quotes
solutions.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "classroom"))
import checks  # noqa: E402
from exercises import as_module, blanked, bodies, cut_out, functions, ladder, with_function  # noqa: E402

EXERCISES = {e.id: e for e in ladder()}
SOURCES = {e.file: (ROOT / e.file).read_text(encoding="utf-8") for e in EXERCISES.values()}

# {exercise: [(text in the function, what a student might write instead)]}
MUTANTS = {
    "1.1": [
        ("x32.square().mean(-1, keepdim=True)", "x32.square().mean(0, keepdim=True)"),
        ("x32.square()", "x32.abs()"),
        (" + self.eps", ""),
        (
            "torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)",
            "(torch.rsqrt(x32.square().mean(-1, keepdim=True)) + self.eps)",
        ),
        ("torch.rsqrt", "torch.sqrt"),
        ("self.weight * ", ""),
        ("x.float()", "x"),
        (".mean(-1", ".sum(-1"),
        ("y.to(x.dtype)", "y"),
    ],
    "1.2": [
        ("(-i / cfg", "(i / cfg"),
        ("torch.arange(0, cfg.head_dim, 2,", "torch.arange(0, cfg.head_dim // 2,"),
        ("freqs / s.factor", "freqs * s.factor"),
        ("kept * freqs + (1 - kept)", "(1 - kept) * freqs + kept"),
        (".clamp(0, 1)", ""),
        (" / (2 * torch.pi)", ""),
        ("turns - s.low_freq_factor", "turns - s.high_freq_factor"),
        ("(s.high_freq_factor - s.low_freq_factor)", "s.high_freq_factor"),
        (".float()", ""),
    ],
    "1.3": [
        ("a * cos - b * sin", "a * cos + b * sin"),
        ("b * cos + a * sin", "b * cos - a * sin"),
        ("a * cos - b * sin", "a * sin - b * cos"),
        ("x.chunk(2, dim=-1)", "(x[..., ::2], x[..., 1::2])"),
        (".to(x.dtype)", ""),
        ("a * cos - b * sin, b * cos + a * sin", "b * cos + a * sin, a * cos - b * sin"),
    ],
    "1.4": [
        ("is_causal=True, ", ""),
        ("is_causal=True", "scale=1.0, is_causal=True"),
        ("y.transpose(1, 2)", "y"),
        ("(q, k, v, is", "(q, v, k, is"),
        (
            "(q, k, v, is",
            "(q, k.repeat(1, q.shape[1] // k.shape[1], 1, 1), "
            "v.repeat(1, q.shape[1] // v.shape[1], 1, 1), is",
        ),
        ("is_causal=True", "attn_mask=torch.ones(q.shape[2], q.shape[2]).tril(-1).bool()"),
    ],
    "1.5": [
        ("x = copy_to_tp(x, self.grid)", "x = x"),
        ("reduce_from_tp(self.o_proj(y.flatten(2)), self.grid)", "self.o_proj(y.flatten(2))"),
        ("apply_rope(k, *rope), v)", "k, v)"),
        ("apply_rope(k, *rope), v)", "apply_rope(k, *rope), apply_rope(v, *rope))"),
        ("self.q_proj, self.k_proj, self.v_proj", "self.q_proj, self.v_proj, self.k_proj"),
        ("y.flatten(2)", "y.flip(2).flatten(2)"),
        ("apply_rope(q, *rope)", "apply_rope(q, rope[0], -rope[1])"),
        ("attend(layer", "attend(layer + 1"),
        ("attend(layer", "causal_attention(layer"),
    ],
    "1.6": [
        ("F.silu", "F.relu"),
        ("F.silu", "torch.sigmoid"),
        ("F.silu(self.gate_proj(x)) * self.up_proj(x)", "self.gate_proj(x) * F.silu(self.up_proj(x))"),
        (")) * self", ")) + self"),
        ("x = copy_to_tp(x, self.grid)", "x = x"),
        ("reduce_from_tp(self.down_proj(y), self.grid)", "self.down_proj(y)"),
        ("y = F", "x = copy_to_tp(x, self.grid)\n        y = F"),
    ],
    "1.7": [
        ("right=True", "right=False"),
        (".cumsum(-1)", ".cumsum(0)"),
        ("uniforms[:, None] * cdf[:, -1:]", "uniforms[:, None].clone()"),
        ("uniforms[:, None] *", "(1 - uniforms[:, None]) *"),
        ("probs.cumsum", "probs.sort(descending=True)[0].cumsum"),
        (".squeeze(-1)", ""),
    ],
    "2.1": [
        ("return x.view_as(x)", "return all_reduce(x, group)"),
        ("return all_reduce(grad, ctx.group), None", "return grad, None"),
        ("all_reduce(grad, ctx.group)", "all_reduce(grad, ctx.group) / ctx.group.size()"),
        ("all_reduce(grad, ctx.group)", "all_reduce(grad, ctx.group, dist.ReduceOp.MAX)"),
        ("all_reduce(grad, ctx.group)", "-all_reduce(grad, ctx.group)"),
    ],
    "2.2": [
        ("return all_reduce(x, group)", "return x.view_as(x)"),
        ("return all_reduce(x, group)", "return all_reduce(x, group) / group.size()"),
        ("return all_reduce(x, group)", "return all_reduce(x, group, dist.ReduceOp.MAX)"),
        ("return grad, None", "return -grad, None"),
        (
            "return all_reduce(x, group)\n\n    @staticmethod\n"
            "    def backward(ctx, grad):\n        return grad, None",
            "ctx.group = group\n        return all_reduce(x, group)\n\n    @staticmethod\n"
            "    def backward(ctx, grad):\n        return all_reduce(grad, ctx.group), None",
        ),
        ("return all_reduce(x, group)", "dist.all_reduce(x, group=group)\n        return x.view_as(x)"),
    ],
    "2.3": [
        ("shard_range(d_out", "shard_range(d_in"),
        ("(d_in, stop - start", "(stop - start, d_out"),
        ("stop - start, grid", "d_out // grid.tp_size, grid"),
        ("stop - start, grid", "d_out, grid"),
        ("grid, bias", "grid, False"),
        ("grid, bias", "grid, True"),
        ("grid.tp_rank", "0"),
    ],
    "2.4": [
        ("shard_range(d_in", "shard_range(d_out"),
        ("(stop - start, d_out", "(d_in, stop - start"),
        ("(stop - start, d", "(d_in // grid.tp_size, d"),
        ("bias=False", "bias=True"),
        ("(stop - start, d", "(d_in, d"),
        ("grid.tp_rank", "0"),
    ],
    "2.5": [
        ("ids >= self.start", "ids > self.start"),
        ("ids < self.stop", "ids <= self.stop - 2"),
        (" * mine.unsqueeze(-1)", ""),
        ("reduce_from_tp(rows, self.grid)", "rows"),
        ("reduce_from_tp(rows, self.grid)", "copy_to_tp(rows, self.grid)"),
        ("reduce_from_tp(rows, self.grid)", "reduce_from_tp(rows, self.grid) / self.grid.tp_size"),
        ("reduce_from_tp(rows, self.grid)", "all_reduce(rows, self.grid.tp_group).requires_grad_()"),
    ],
    "2.6": [
        ("copy_to_tp(total.log(), grid)", "total.log()"),
        (
            "total = reduce_from_tp((logits - top).exp().sum(-1, keepdim=True), grid)",
            "total = (logits - top).exp().sum(-1, keepdim=True)",
        ),
        (
            "all_reduce(logits.amax(-1, keepdim=True), grid.tp_group, dist.ReduceOp.MAX)",
            "logits.amax(-1, keepdim=True)",
        ),
        ("dist.ReduceOp.MAX", "dist.ReduceOp.SUM"),
        ("total.log()", "total"),
        (".sum(-1", ".mean(-1"),
        ("logits - top - copy", "logits - copy"),
        ("logits = logits.float()", "logits = logits + 0"),
    ],
    "2.7": [
        ("targets >= start", "targets > start"),
        ("targets < stop", "targets < stop - 1"),
        ("masked_fill(~mine", "masked_fill(mine"),
        ("picked.masked_fill(~mine, 0.0)", "picked"),
        (
            "return reduce_from_tp(picked.masked_fill(~mine, 0.0), grid)",
            "return picked.masked_fill(~mine, 0.0)",
        ),
        (
            "return reduce_from_tp(picked.masked_fill(~mine, 0.0), grid)",
            "return copy_to_tp(reduce_from_tp(picked.masked_fill(~mine, 0.0), grid), grid)",
        ),
        ("(targets - start) * mine", "(stop - 1 - targets) * mine"),
    ],
    "3.1": [
        ("len(e.prompt_ids) - 1 :", "len(e.prompt_ids) :"),
        (": lengths[i] - 1] = True", ": lengths[i]] = True"),
        ("len(e.prompt_ids) - 1 : l", ": l"),
        ("ids[i, : lengths[i]]", "ids[i, -lengths[i] :]"),
        ("max(lengths) - 1, dtype", "max(lengths), dtype"),
        ("pad_id, dtype", "0, dtype"),
        ("return ids.to(device), mask", "return ids.to(device), mask & (ids[:, 1:] != pad_id)"),
        ("len(e.prompt_ids) - 1 : lengths[i] - 1", "len(e.prompt_ids) - 1 : lengths[i] - 2"),
    ],
    "3.2": [
        ("p // n)", "0)"),
        ("range(step * batch_size", "range(step"),
        ("seed, p", "0, p"),
        ("(step + 1) * batch_size", "(step + 1) * batch_size - 1"),
        ("int(_permutation(n, seed, p // n)[p % n])", "p % n"),
        ("p // n", "p // batch_size"),
        ("[p % n]", "[p % batch_size]"),
        ("int(_permutation(n, seed, p // n)[p % n])", "_permutation(n, seed, p // n)[p % n]"),
    ],
    "4.1": [
        ("[:, 1:]", "[:, :-1]"),
        ("reward_model.model(ids))[:, 1:]", "reward_model.model(ids[:, :-1]))"),
        ("reward_model.model(ids))[:, 1:]", "reward_model.model(ids[:, 1:]))"),
        ("[:, 1:]", ""),
        ("return reward", "return -reward"),
        ("[:, 1:]", "[:, 1:].detach()"),
        ("reward_model.model(ids)", "reward_model.model(ids.flip(1)).flip(1)"),
    ],
    "4.2": [
        ("x.masked_fill(~mask, 0.0)", "(x * mask)"),
        ("~mask", "mask"),
        (".clamp(min=1)", ""),
        (".sum(1) / mask.sum(1)", ".sum(1) / mask.sum()"),
        (" / mask.sum(1).clamp(min=1)", " / mask.shape[1]"),
        (" / mask.sum(1).clamp(min=1)", ""),
        ("x.masked_fill(~mask, 0.0)", "x"),
    ],
    "4.3": [
        ("- margin", "+ margin"),
        ("beta * gap - margin", "beta * (gap - margin)"),
        ("beta * gap", "gap"),
        ("-F.logsigmoid", "F.logsigmoid"),
        ("F.logsigmoid(beta * gap - margin)", "torch.sigmoid(beta * gap - margin).log()"),
        ("- margin).mean()", "- margin).sum()"),
        ("chosen.float() - rejected.float()", "rejected.float() - chosen.float()"),
        ("gap > 0", "gap >= 0"),
        ("gap.mean()", "(beta * gap - margin).mean()"),
        ("(gap > 0)", "(beta * gap > margin)"),
    ],
    "4.4": [
        ("means[0::2], means[1::2]", "means[: len(means) // 2], means[len(means) // 2 :]"),
        ("means[0::2], means[1::2]", "means[1::2], means[0::2]"),
        ("response_mask)  #", "response_mask) * response_mask.sum(1)  #"),
        ("masked_mean(scores.float(), response_mask)", "scores.float().mean(1)"),
        (", beta, margin)", ")"),
        (", beta, margin)", ", beta, -margin)"),
        (", beta, margin)", ", margin, beta)"),
    ],
    "4.5": [
        ("-grad_loss * ", "grad_loss * "),
        ("torch.sigmoid(-m)", "torch.sigmoid(m)"),
        (" / len(m)", ""),
        ("r.pow(3)", "r.pow(2)"),
        ("/ -x.shape[-1]", "/ x.shape[-1]"),
        ("ctx.beta * ", ""),
        (
            "d_norm = (s * w).to(norm_weight)\n        d_head = (s * g)",
            "d_norm = (s * g).to(norm_weight)\n        d_head = (s * w)",
        ),
        ("-grad_loss * ", "-"),
        ("a = dz * r", "a = dz"),
        ("dot / -x.shape[-1]", "-dot"),
        ("dm[pairs]", "dm.mean()"),
    ],
    "4.6": [
        ("F.pad(response_mask, (0, 1))[:, 1:]", "F.pad(response_mask, (1, 0))[:, :-1]"),
        ("response_mask & ~", "~"),
        ("F.pad(response_mask, (0, 1))[:, 1:]", "response_mask.roll(-1, 1)"),
        ("& ~F", "& F"),
        ("F.pad(response_mask, (0, 1))[:, 1:]", "F.pad(response_mask[:, 1:], (0, 1), value=True)"),
        ("F.pad(response_mask, (0, 1))[:, 1:]", "F.pad(response_mask, (0, 2))[:, 2:]"),
    ],
    "4.7": [
        ("last_token_mask(response_mask)", "response_mask"),
        ("(last, correct.float())", "(last, 1 - correct.float())"),
        ("F.binary_cross_entropy_with_logits(last,", "F.binary_cross_entropy(last.sigmoid(),"),
        ("(last, correct.float())", "(last, correct.float(), reduction='sum')"),
        ("last > 0", "last < 0"),
        ("last > 0", "last > 0.5"),
        ("(last, correct", "(last.sigmoid(), correct"),
    ],
    "4.8": [
        (".sum(1)", ".mean(1)"),
        ("logprobs - ref_logprobs", "logprobs"),
        ("logprobs - ref_logprobs", "ref_logprobs - logprobs"),
        (
            "(logprobs - ref_logprobs).masked_fill(~response_mask, 0.0)",
            "((logprobs - ref_logprobs) * response_mask)",
        ),
        (".masked_fill(~response_mask, 0.0)", ""),
        (", beta)", ")"),
        ("sums[0::2], sums[1::2]", "sums[1::2], sums[0::2]"),
        (".sum(1)", ".sum(1) / response_mask.sum(1)"),
        ("sums[0::2], sums[1::2]", "sums[:2], sums[2:]"),
    ],
    "4.9": [
        (".flip(1).logcumsumexp(1).flip(1)", ".logcumsumexp(1)"),
        (".logcumsumexp(1)", ".logcumsumexp(0)"),
        ("[:, :-1]", ""),
        (".mean()", ".sum()"),
        ("rest - ranked.float()", "ranked.float() - rest"),
        (".logcumsumexp(1)", ".exp().cumsum(1).log()"),
        (".flip(1).logcumsumexp(1).flip(1)", ".logsumexp(1, keepdim=True)"),
        ("[:, :-1]", "[:, 1:]"),
    ],
    "4.10": [
        ("last_token_mask(response_mask)", "response_mask"),
        ("* response_mask if", "* last_token_mask(response_mask) if"),
        ("last.sum(1, keepdim=True)", "last.mean(1, keepdim=True)"),
        ("if every_token else", "if not every_token else"),
        ("(reward_model, ids, response_mask)", "(reward_model, ids, response_mask).roll(1, 1)"),
        ("(reward_model, ids, response_mask)", "(reward_model, ids, response_mask).sigmoid()"),
        (" * response_mask if", " + 0 * response_mask if"),
    ],
    "4.11": [
        ("logprobs - ref_logprobs", "logprobs + ref_logprobs"),
        ("beta * (", "("),
        ("logprobs - ref_logprobs", "ref_logprobs - logprobs"),
        ("logprobs, _ = token_logprobs(policy", "_, logprobs = token_logprobs(policy"),
        ("(logprobs - ref_logprobs)", "(logprobs - ref_logprobs).roll(-1, 1)"),
        (" - ref_logprobs", ""),
        ("beta * (", "beta * torch.exp("),
    ],
    "4.12": [
        ("before > at", "before < at"),
        (" + 0.5 * (before == at).sum().item()", ""),
        (".item() + 1", ".item()"),
        ("argmin", "argmax"),
        ("z[:error]", "z[: error + 1]"),
        ("right[error] > at", "right[error] < at"),
        ('["comparisons"] += error', '["comparisons"] += 1'),
        ("if error == 0:", "if error is None:"),
        ('counts["n_errors"] += 1', 'counts["n_errors"] = 1'),
        ("float(right[error] > at) +", "float(right[error] >= at) +"),
    ],
    "5.1": [
        ("logprobs - ref_logprobs", "ref_logprobs - logprobs"),
        ("torch.expm1(-k1) + k1", "torch.expm1(k1) - k1"),
        ("(-k1) + k1", "(-k1) - k1"),
        ("torch.expm1(-k1) + k1", "k1.square() / 2"),
        ("torch.expm1(-k1) + k1", "torch.exp(-k1) + k1"),
        ("torch.expm1(-k1) + k1", "torch.exp(-k1) - 1 + k1"),
        ("torch.expm1(-k1) + k1", "k1.abs()"),
    ],
    "5.2": [
        ('squares / sums["n"]', 'squares / (sums["n"] - 1)'),
        ("picked = rewards[reward_mask]", "picked = rewards.flatten()"),
        ('mean if how == "mean_std" else 0.0', "mean"),
        (" ** 0.5", ""),
        ("if sigma > 1e-6 else 1.0", "+ 1e-6"),
        (
            'sums = all_sum({"n": picked.numel(), "total": picked.sum().item()}, grid)',
            'sums = {"n": picked.numel(), "total": picked.sum().item()}',
        ),
        (
            'squares = all_sum({"squares": (picked - mean).square().sum().item()}, grid)["squares"]',
            'squares = (picked - mean).square().sum().item() * sums["n"] / picked.numel()',
        ),
        ("/ sigma).masked_fill(~reward_mask, 0.0)", "/ sigma)"),
        ("(picked - mean).square()", "picked.square()"),
        ("return rewards.masked_fill(~reward_mask, 0.0)", "return rewards"),
    ],
    "5.3": [
        ("reversed(range(rewards.shape[1]))", "range(rewards.shape[1])"),
        ("gamma * running, running", "running, running"),
        ("rewards[:, t] + gamma * running,", "gamma * (rewards[:, t] + running),"),
        (
            "torch.where(response_mask[:, t], rewards[:, t] + gamma * running, running)",
            "rewards[:, t] + gamma * running",
        ),
        ("return out.masked_fill(~response_mask, 0.0)", "return out"),
        ("rewards[:, t] + gamma * running", "gamma * running"),
        ("        out[:, t] = running", "        out[:, t] = running - rewards[:, t]"),
    ],
    "5.4": [
        ("view(-1, group_size)", "view(group_size, -1).T"),
        ("groups.mean(1, keepdim=True)", "groups.mean(0, keepdim=True)"),
        (" * group_size / (group_size - 1)", ""),
        ("* group_size / (group_size - 1)", "* (group_size - 1) / group_size"),
        ('how == "rloo"', 'how == "grpo"'),
        ("groups.std(1, keepdim=True)", "groups.std()"),
        ("groups.std(1, keepdim=True)", "groups.std(1, keepdim=True, unbiased=False)"),
        ("groups - groups", "groups + groups"),
        ("group_size < 2", "group_size < 1"),
        ("groups.std(", "groups.var("),
    ],
    "5.5": [
        ("-(adv", "(adv"),
        (".detach()", ""),
        (").mean()", ").sum()"),
        (
            "(advantages.detach()[response_mask] * logprobs[response_mask]).mean()",
            "(advantages.detach() * logprobs).mean()",
        ),
        (
            "(advantages.detach()[response_mask] * logprobs[response_mask]).mean()",
            "(advantages.detach() * logprobs).masked_fill(~response_mask, 0.0).mean()",
        ),
        (
            "(advantages.detach()[response_mask] * logprobs[response_mask]).mean()",
            "((advantages.detach() * logprobs).masked_fill(~response_mask, 0.0).sum(1)"
            " / response_mask.sum(1)).mean()",
        ),
        ("logprobs[response_mask])", "logprobs[response_mask].exp())"),
    ],
    "6.1": [
        ("at_states(critic, ids, response_mask)", "critic.model(ids)[:, 1:][response_mask]"),
        ("at_states(critic, ids, response_mask)", "critic.model(ids[:, 1:])[response_mask]"),
        ("critic.scalars(at", "-critic.scalars(at"),
        (
            "scatter_to_mask(response_mask, critic.scalars(at_states(critic, ids, response_mask)))",
            "critic.scalars(critic.model(ids[:, :-1]))",
        ),
        ("scatter_to_mask(response_mask, c", "scatter_to_mask(response_mask.roll(1, 0), c"),
        ("response_mask)))", "response_mask))).detach()"),
    ],
    "6.2": [
        ("gamma * next_value - values", "gamma * next_value + values"),
        ("gamma * lam * running", "lam * running"),
        ("gamma * lam * running", "gamma * running"),
        ("+ gamma * next_value", "+ next_value"),
        ("reversed(range(rewards.shape[1]))", "range(rewards.shape[1])"),
        (
            "torch.where(response_mask[:, t], delta + gamma * lam * running, 0.0)",
            "delta + gamma * lam * running",
        ),
        ("values = values.masked_fill(~response_mask, 0.0)", "values = values"),
        ("(out + values)", "out"),
        ("(out + values)", "(rewards + values)"),
        ("out[:, t] = running", "out[:, t] = delta"),
    ],
    "6.3": [
        ("rewards - cfg.baseline_weight", "rewards + cfg.baseline_weight"),
        ("rewards - cfg.b", "2 * z_std - rewards - cfg.b"),  # the penalty with the wrong sign
        ("cfg.baseline_weight * values", "values"),
        ("masked_fill(~response_mask, 0.0), z_std", "masked_fill(~response_mask, 0.0), rewards"),
        (
            "shape_rewards(rollout, cfg, grid)",
            "shape_rewards(rollout, type(cfg)(**vars(cfg) | dict(kl_coef=1.0)), grid)",
        ),
        ("gae(rewards", "gae(z_std"),
        ("cfg.gamma, cfg.lam", "cfg.lam, cfg.gamma"),
        (".masked_fill(~response_mask, 0.0), z_std", ", z_std"),
        ("return reinforce_advantages(rollout, cfg, grid), z_std", "return rewards, z_std"),
        (
            "shape_rewards(rollout, cfg, grid)",
            "shape_rewards(rollout, type(cfg)(**vars(cfg) | dict(eos_to_mean=False)), grid)",
        ),
        (
            "shape_rewards(rollout, cfg, grid)",
            "shape_rewards(rollout, type(cfg)(**vars(cfg) | dict(standardize='none')), grid)",
        ),
    ],
    "6.4": [
        ("torch.minimum", "torch.maximum"),
        (
            "-torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)",
            "-(ratio.clamp(1 - clip, 1 + clip) * A)",
        ),
        ("-torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)", "-(ratio * A)"),
        ("= -torch", "= torch"),
        ("logprobs - old_logprobs.detach()", "old_logprobs.detach() - logprobs"),
        (".clamp(-20, 20).exp()", " + 1"),
        ("advantages.detach()", "advantages"),
        ("old_logprobs.detach()", "old_logprobs"),
        ("1 - clip, 1 + clip", "0, 1 + clip"),
        ("* A).mean()", "* A).sum()"),
        ("& (A > 0)) |", "& (A < 0)) |"),
        ("ratio.max()", "ratio.mean()"),
        ("(ratio < 1 - clip) & (A < 0)", "(ratio < 1 - clip)"),
    ],
}

# Right answers that are written differently: bodies, indented as in a function
OTHERS = {
    "1.4": """
    B, T, H, E = q.shape
    k, v = (z.repeat_interleave(H // z.shape[2], 2) for z in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k) / E**0.5
    future = torch.ones(T, T).triu(1).bool()
    return torch.einsum("bhts,bshe->bthe", scores.masked_fill(future, float("-inf")).softmax(-1), v)""",
    "1.7": """
    cdf = probs.cumsum(-1)
    return ((uniforms * cdf[:, -1])[:, None] < cdf).float().argmax(-1)""",
    "2.7": """
    start, stop = shard_range(vocab_size, grid.tp_rank, grid.tp_size)
    return reduce_from_tp((logprobs * (targets[..., None] == torch.arange(start, stop))).sum(-1), grid)""",
    "3.1": """
    rows = [e.prompt_ids + e.response_ids for e in examples]
    T = max(map(len, rows)) - 1
    prompts = torch.tensor([len(e.prompt_ids) for e in examples])[:, None]
    ends = torch.tensor([len(row) for row in rows])[:, None]
    places = torch.arange(1, T + 1)[None]
    ids = torch.tensor([row + [pad_id] * (T + 1 - len(row)) for row in rows])
    return ids.to(device), ((places >= prompts) & (places < ends)).to(device)""",
    "3.2": """
    out = []
    for p in range(step * batch_size, (step + 1) * batch_size):
        order = list(range(n))
        random.Random(f"{seed} {p // n}").shuffle(order)
        out.append(order[p % n])
    return out""",
    "4.10": """
    last = torch.where(last_token_mask(response_mask), token_scores(reward_model, ids), 0.0)
    return torch.where(response_mask, last.sum(1, keepdim=True), 0.0) if every_token else last""",
    "5.2": """
    x = rewards[reward_mask].double()
    sums = all_sum({"n": x.numel(), "total": x.sum().item(), "squares": x.square().sum().item()}, grid)
    n, total, squares = sums.values()
    mean, std = (total / n, max(squares / n - (total / n) ** 2, 0.0) ** 0.5) if how != "none" else (0.0, 1.0)
    out = torch.zeros_like(rewards)
    centre = mean if how == "mean_std" else 0.0
    out[reward_mask] = ((x - centre) / (std if std > 1e-6 else 1.0)).to(out.dtype)
    return out""",
    "5.4": """
    if group_size == 1:
        raise ValueError("one is no group")
    groups = sequence_rewards.reshape(-1, group_size)
    if how == "grpo":
        return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).reshape(-1)
    return (groups - (groups.sum(1, keepdim=True) - groups) / (group_size - 1)).reshape(-1)""",
    "6.1": """
    return critic.scalars(critic.model(ids[:, :-1])) * response_mask""",
    "6.4": """
    ratio, A = (logprobs - old_logprobs.detach()).exp()[response_mask], advantages.detach()[response_mask]
    clipped = ratio.clamp(1 - clip, 1 + clip)
    stats = {"clip_frac": (clipped * A < ratio * A).float().mean(), "ratio_max": ratio.max()}
    return -torch.min(ratio * A, clipped * A).mean(), stats""",
}


def source_of(exercise):
    """-> signature and docstring, body"""
    lines, (first, node) = (
        SOURCES[exercise.file].split("\n"),
        functions(SOURCES[exercise.file])[exercise.function],
    )
    start = first if isinstance(node, ast.ClassDef) else bodies(node)[0][0]
    return "".join(line + "\n" for line in lines[first - 1 : start - 1]), "\n".join(
        lines[start - 1 : node.end_lineno]
    )


def verdict(exercise, text):
    """How the checks end with this text in the function's place: None for a pass, or the exception"""
    try:
        checks.CHECKS[exercise.id](
            as_module(exercise.file, with_function(SOURCES[exercise.file], exercise.function, text))
        )
    except Exception as error:
        return error


def zeros_like(value):
    """The same shape, all zero: tensors, containers; a function becomes one that returns zeros."""
    if isinstance(value, torch.Tensor):
        return value * 0 if value.is_floating_point() else torch.zeros_like(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map(zeros_like, value))
    if isinstance(value, dict):
        return {k: zeros_like(v) for k, v in value.items()}
    if callable(value):
        return lambda *arguments, **more: zeros_like(value(*arguments, **more))
    return value if value is None else type(value)(0)


def with_zeros(exercise):
    """The given module with a function that returns zeros; a constructor makes a layer with one weight."""
    module = as_module(exercise.file, SOURCES[exercise.file])
    *owner, name = exercise.function.split(".")
    owner = getattr(module, owner[0]) if owner else module
    if isinstance(getattr(owner, name), type):
        owner, names = getattr(owner, name), ("forward", "backward")
    else:
        names = (name,)
    for name in names:
        static = isinstance(vars(owner)[name], staticmethod)
        zeros = (
            zeros_like(getattr(owner, name))
            if name != "__init__"
            else lambda self, *_, **__: torch.nn.Linear.__init__(self, 1, 1, bias=False)
        )
        setattr(owner, name, staticmethod(zeros) if static else zeros)
    return module


# -------------------------------------------------------------------------------- the ladder


def test_the_ladder_and_its_hints():
    assert list(EXERCISES) == list(checks.CHECKS) == list(MUTANTS)
    assert sum(3 <= e.points <= 10 for e in EXERCISES.values()) >= 20
    for e in EXERCISES.values():
        lines, (_, node) = SOURCES[e.file].split("\n"), functions(SOURCES[e.file])[e.function]
        assert e.points == sum(
            bool(line.strip()) for first, last, _ in bodies(node) for line in lines[first - 1 : last]
        ), e
        hint = " ".join(checks.CHECKS[e.id].__doc__.split())
        assert 30 < len(hint) < 400, e
    positions = [SOURCES[e.file].index(f"# exercise {e.id} ") for e in EXERCISES.values()]
    for (a, p), (b, q) in zip(
        zip(EXERCISES.values(), positions), list(zip(EXERCISES.values(), positions))[1:]
    ):
        assert a.file != b.file or p < q, f"{a.id} stands behind {b.id}"


@pytest.mark.parametrize("id", EXERCISES)
def test_solution_passes_blank_and_zeros_fail(id):
    e = EXERCISES[id]
    assert verdict(e, "".join(source_of(e))) is None
    empty = verdict(e, cut_out(blanked(SOURCES[e.file], [e]), e.function, e.file))
    assert isinstance(empty, NotImplementedError) and id in str(empty)
    with pytest.raises(AssertionError):
        checks.CHECKS[id](with_zeros(e))


@pytest.mark.parametrize("id", OTHERS)
def test_another_right_answer_passes(id):
    assert verdict(EXERCISES[id], source_of(EXERCISES[id])[0] + OTHERS[id]) is None


def test_mutants_die(capsys):
    survivors, killed = [], 0
    for id, mutants in MUTANTS.items():
        head, body = source_of(EXERCISES[id])
        assert len(set(mutants)) == len(mutants) >= 4
        for old, new in mutants:
            assert body.count(old) == 1, f"exercise {id}: {old!r} stands {body.count(old)} times in the body"
            error = verdict(EXERCISES[id], head + body.replace(old, new))
            if isinstance(error, AssertionError):  # a wrong number; a crash would prove nothing
                killed += 1
            else:
                survivors.append((id, old, new, error))
    total = sum(map(len, MUTANTS.values()))
    with capsys.disabled():
        print(f"\n{killed} of {total} mutants of {len(MUTANTS)} exercises killed: {killed / total:.0%}")
    assert not survivors, "\n".join(map(str, survivors))


# -------------------------------------------------------------------------------- the command


def exercises_py(*arguments):
    """-> exit status, stdout, stderr"""
    ran = subprocess.run(
        [sys.executable, ROOT / "classroom" / "exercises.py", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    return ran.returncode, ran.stdout, ran.stderr


def put(directory, id, text):
    """Writes text in the place of an exercise's function in a student's file."""
    path = directory / EXERCISES[id].file
    path.write_text(
        with_function(path.read_text(encoding="utf-8"), EXERCISES[id].function, text), encoding="utf-8"
    )


def verdicts(stdout):
    return {
        m[2]: (m[1], m[3])
        for m in re.finditer(r"^(PASS|FAIL)  (\S+) +\d+/\d+ +[\d.]+ s  \S+ [^:\n]+(?:: )?(.*)$", stdout, re.M)
    }


def test_a_solved_exercise_turns_its_line_green_and_no_other(tmp_path):
    student, gradebook, solved = tmp_path / "student", tmp_path / "grades.json", ("1.1", "2.1", "4.5", "6.2")
    status, out, _ = exercises_py("blank", student)
    assert status == 0 and f"{len(EXERCISES)} exercises" in out
    names = {path.relative_to(student).as_posix() for path in student.rglob("*")}
    assert {
        "train.py",
        "tests/test_model.py",
        "classroom/exercises.py",
        "README.md",
        "Makefile",
        "requirements.txt",
    } <= names
    assert not any(
        part in name for name in names for part in (".git/", "runs", ".venv", "__pycache__", "test_exercises")
    )
    for e in EXERCISES.values():
        text = (student / e.file).read_text(encoding="utf-8")
        head, body = source_of(e)
        assert (
            head in text and body not in text and f'NotImplementedError("exercise {e.id}: {e.title}")' in text
        )  # the handout stays
    status, _, err = exercises_py("blank", student)
    assert status == 2 and "not empty" in err and err.count("\n") == 1
    for id in solved:
        put(student, id, "".join(source_of(EXERCISES[id])))
    status, out, err = exercises_py("grade", student, "--json", gradebook)
    found, points = verdicts(out), sum(EXERCISES[id].points for id in solved)
    assert (
        status == 1
        and not err
        and {id for id, (word, _) in found.items() if word == "PASS"} == set(solved)
        and len(found) == len(EXERCISES)
    )
    assert (
        f"4 of {len(EXERCISES)} exercises, {points} of {sum(e.points for e in EXERCISES.values())} points"
        in out
    )
    assert found["4.3"] == ("FAIL", "blank")
    book = json.loads(gradebook.read_text())
    assert {row["id"] for row in book["exercises"] if row["passed"]} == set(solved) and book["total"][
        "points"
    ] == points
    assert all(row["reason"] == found[row["id"]][1] and row["seconds"] > 0 for row in book["exercises"])
    status, _, err = exercises_py("blank", tmp_path / "student" / "classroom" / "exercises.py")
    assert status == 2 and err.count("\n") == 1
    ran = subprocess.run(
        [sys.executable, student / "classroom" / "exercises.py", "grade", student],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2 and "is a student's" in ran.stderr  # its given files are not the given ones


def test_nothing_takes_the_grader_down(tmp_path):
    for name, source in SOURCES.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    for id, body in {
        "4.2": "while True: pass",
        "4.3": "__import__('os')._exit(0)",
        "4.4": "__import__('os').kill(__import__('os').getpid(), 11)",
        "4.6": "raise SystemExit('PASS')",
        "4.8": "return helper(logprobs)",
    }.items():
        put(tmp_path, id, f"{source_of(EXERCISES[id])[0]}    {body}\n")
    head, body = source_of(EXERCISES["4.7"])
    put(tmp_path, "4.7", f"{head}    print('FAIL  4.7')\n{body}")
    path = tmp_path / "qrm.py"
    path.write_text(path.read_text().replace("def dpo_rewards(", "def dpo_reward("))
    path = tmp_path / "ppo.py"  # does not parse
    path.write_text(
        path.read_text().replace(
            "for t in reversed(range(rewards.shape[1])):", "for t in reversed(range(rewards.shape[1]):"
        )
    )
    path = tmp_path / "model.py"
    path.write_text(path.read_text().replace("x32 = x.float()", "x32 = x.float(") + '\n"""')
    (tmp_path / "data.py").unlink()
    (tmp_path / "reinforce.py").write_bytes(b"\xff\xfe")
    ids = ("1.1", "1.3", "1.6", "3.1", "4.2", "4.3", "4.4", "4.5", "4.6", "4.7", "4.8", "4.11", "5.5", "6")
    status, out, err = exercises_py("grade", tmp_path, *ids, "--timeout", 4)
    found = verdicts(out)
    assert status == 1 and not err, err
    assert {id for id, (word, _) in found.items() if word == "PASS"} == {
        "1.3",
        "1.6",
        "4.5",
        "4.7",
        "6.1",
        "6.3",
        "6.4",
    }, out
    reasons = {
        "1.1": "SyntaxError: '(' was never closed (model.py, line ",
        "3.1": "FileNotFoundError: ",
        "4.2": "no result after 4 s: an endless loop?",
        "4.3": "the process ended by itself (exit code 0)",
        "4.4": "the process ended by itself (exit code -11)",
        "4.6": "SystemExit: PASS",
        "4.8": "NameError: name 'helper' is not defined",
        "4.11": "qrm.py has no dpo_rewards",
        "5.5": "UnicodeDecodeError: ",
        "6.2": "SyntaxError: ",
    }
    assert all(found[id][1].startswith(reason) for id, reason in reasons.items()), out
    line = 1 + SOURCES["model.py"].split("\n").index("        x32 = x.float()")
    assert f"line {line})" in found["1.1"][1]  # of the student's file


def test_the_solution_cannot_be_imported_and_an_error_of_torch_is_no_blank(tmp_path):
    source = (ROOT / "qrm.py").read_text(encoding="utf-8")
    body = source[source.index("def masked_mean(") :]
    body = body[: body.index("\n\n\n")]
    for line, says in (
        ("    import qrm\n    return qrm.masked_mean(x, mask)", "RecursionError"),
        ("    torch.eye(2).bool() @ torch.eye(2).bool()", "not implemented for"),
    ):
        head = body[: body.index(":\n") + 2]
        (tmp_path / "qrm.py").write_text(source.replace(body, head + line), encoding="utf-8")
        status, out, _ = exercises_py("grade", tmp_path, "4.2")
        assert status == 1 and says in out, out


def test_blank_beside_the_project(monkeypatch):
    """`blank ../student`, as the README has it: a path that goes through the project and out of it again."""
    seen = []
    monkeypatch.setattr("exercises.ladder", lambda: seen.append(1) or [])
    monkeypatch.setattr("exercises.COPIED", ())
    sys.modules["exercises"].blank(ROOT / ".." / "not-there" / "student")
    assert seen


def test_list_hint_and_bad_input(tmp_path):
    status, out, _ = exercises_py("list")
    assert (
        status == 0
        and len(out.split("\n")) == 1 + len(EXERCISES) + 1
        and "qrm.py         _FusedQRM.backward" in out
    )
    status, out, _ = exercises_py("hint", "4.3")
    assert status == 0 and out.startswith("F.logsigmoid(z) stays finite")
    for arguments, word in (
        (("hint", "9.9"), "9.9"),
        (("grade", tmp_path, "9"), "9"),
        (("grade", tmp_path / "none"), "none"),
        (("blank", ROOT / "classroom" / "ann"), "inside the project"),
        (("blank", ROOT / ".." / ROOT.name / "ann"), "inside the project"),
        (("mark",), "mark"),
        ((), "expected list"),
    ):
        status, out, err = exercises_py(*arguments)
        assert status == 2 and word in err and err.count("\n") == 1 and not out, err
