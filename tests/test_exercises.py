"""The grader is graded: solutions pass, and so do others; blanks, zeros and at least four plausible mistakes
per exercise fail; nothing in a student's file takes the grader down. `blank` leaves this file out: it quotes
solutions.
"""

import ast
import json
import linecache
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "classroom"))
import checks  # noqa: E402
from course import CHAPTERS, HINTS  # noqa: E402
from exercises import (  # noqa: E402
    FIND_PROJECT,
    as_module,
    blanked,
    bodies,
    cell,
    cut_out,
    functions,
    ladder,
    with_function,
    write_notebook,
)

from support.settings import FIELDS  # noqa: E402

EXERCISES = {e.id: e for e in ladder()}
SOURCES = {e.file: (ROOT / e.file).read_text(encoding="utf-8") for e in EXERCISES.values()}
GIVEN = {  # as handed out, without any solution
    file: blanked(source, [e for e in EXERCISES.values() if e.file == file])
    for file, source in SOURCES.items()
}

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
        ("torch.expm1(log_ratio) - log_ratio", "torch.expm1(k1) - k1"),
        ("expm1(log_ratio) - log_ratio", "expm1(log_ratio) + log_ratio"),
        ("torch.expm1(log_ratio) - log_ratio", "k1.square() / 2"),
        ("torch.expm1(log_ratio)", "torch.exp(log_ratio)"),
        ("torch.expm1(log_ratio) - log_ratio", "torch.exp(-k1) - 1 + k1"),
        ("torch.expm1(log_ratio) - log_ratio", "k1.abs()"),
    ],
    "5.2": [
        ('squares / sums["n"]', 'squares / (sums["n"] - 1)'),
        ("picked = rewards[reward_mask]", "picked = rewards.flatten()"),
        ('mean if how == "mean_std" else 0.0', "mean"),
        (" ** 0.5", ""),
        ("if sigma > rounding else 1.0", "+ rounding"),
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
        (".double().view(-1, group_size)", ".double().view(group_size, -1).T"),
        ("groups.mean(1, keepdim=True)", "groups.mean(0, keepdim=True)"),
        (" * group_size / (group_size - 1)", ""),
        ("* group_size / (group_size - 1)", "* (group_size - 1) / group_size"),
        ('how == "rloo"', 'how == "grpo"'),
        ("groups.std(1, keepdim=True)", "groups.std()"),
        ("groups.std(1, keepdim=True)", "groups.std(1, keepdim=True, unbiased=False)"),
        ("groups - groups", "groups + groups"),
        ("group_size < 2", "group_size < 1"),
        ("groups.std(", "groups.var("),
        (
            "    out = out.masked_fill(std <= rounding.clamp(min=1e-6), 0.0)",
            "    out = out.nan_to_num()",
        ),
        ("centred / std", "centred / (std + 1e-2)"),
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

# Right answers that are written differently: bodies, indented as in a function; of a class the methods
OTHERS = {
    "1.1": """
        squares = (x.double() ** 2).sum(dim=-1, keepdim=True) / x.shape[-1]
        return (self.weight.double() * x.double() / (squares + self.eps).sqrt()).to(x.dtype)""",
    "1.2": """
    E, s, out = cfg.head_dim, cfg.rope_scaling, []
    for i in range(E // 2):
        f = 1.0 / cfg.rope_theta ** (2 * i / E)
        wavelength = 2 * 3.141592653589793 / f
        if s and wavelength > s.original_max_position_embeddings / s.low_freq_factor:
            f = f / s.factor
        elif s and wavelength > s.original_max_position_embeddings / s.high_freq_factor:
            turns = s.original_max_position_embeddings / wavelength
            smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            f = (1 - smooth) * f / s.factor + smooth * f
        out.append(f)
    return torch.tensor(out, dtype=torch.float32, device=device)""",
    "1.3": """
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    return (x * cos + turned * sin).type_as(x)""",
    "1.4": """
    B, T, H, E = q.shape
    k, v = (z.repeat_interleave(H // z.shape[2], 2) for z in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k) / E**0.5
    future = torch.ones(T, T).triu(1).bool()
    return torch.einsum("bhts,bshe->bthe", scores.masked_fill(future, float("-inf")).softmax(-1), v)""",
    "1.5": """
        B, T, _ = x.shape
        cos, sin = rope
        heads = []
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            heads.append(proj(copy_to_tp(x, self.grid)).reshape(B, T, -1, self.head_dim))
        y = attend(layer, apply_rope(heads[0], cos, sin), apply_rope(heads[1], cos, sin), heads[2])
        return reduce_from_tp(self.o_proj(y.reshape(B, T, -1)), self.grid)""",
    "1.6": """
        gate, up = self.gate_proj(copy_to_tp(x, self.grid)), self.up_proj(copy_to_tp(x, self.grid))
        return reduce_from_tp(self.down_proj(gate * torch.sigmoid(gate) * up), self.grid)""",
    "1.7": """
    cdf = probs.cumsum(-1)
    return ((uniforms * cdf[:, -1])[:, None] < cdf).float().argmax(-1)""",
    "2.1": """
    @staticmethod
    def forward(ctx, x, group):
        ctx.ranks = group
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total, group=ctx.ranks)
        return total, None""",
    "2.2": """
    @staticmethod
    def forward(ctx, x, group):
        total = x.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(), None""",
    "2.3": """
        first = d_out * grid.tp_rank // grid.tp_size
        mine = d_out * (grid.tp_rank + 1) // grid.tp_size - first
        ParallelLinear.__init__(self, d_in, mine, grid, bias=bias, full=d_out)""",
    "2.4": """
        mine = range(*shard_range(d_in, grid.tp_rank, grid.tp_size))
        ParallelLinear.__init__(self, len(mine), d_out, grid, bias=False, full=d_in)""",
    "2.5": """
        rows = torch.zeros(*ids.shape, self.weight.shape[1], dtype=self.weight.dtype)
        mine = (ids >= self.start).logical_and(ids < self.stop)
        rows = rows.masked_scatter(mine[..., None], self.weight[ids[mine] - self.start])
        return reduce_from_tp(rows, self.grid)""",
    "2.6": """
    logits = logits.float()
    if grid.tp_size > 1:
        top = all_reduce(logits.detach().max(-1, keepdim=True).values, grid.tp_group, dist.ReduceOp.MAX)
        total = copy_to_tp(reduce_from_tp(torch.exp(logits - top).sum(-1, True), grid), grid)
        return logits - (top + torch.log(total))
    return logits - torch.logsumexp(logits, -1, keepdim=True)""",
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
    "4.1": """
    x = reward_model.model(ids)
    return reward_model.scalars(x[:, 1:])""",
    "4.2": """
    out = []
    for row, inside in zip(x, mask):
        out.append(row[inside].mean() if inside.any() else row[inside].sum())
    return torch.stack(out)""",
    "4.3": """
    gap = chosen - rejected
    loss = F.softplus(margin - beta * gap).mean()
    right = sum(int(g > 0) for g in gap.tolist()) / len(gap)
    return loss, {"pair_accuracy": right, "score_gap": float(gap.mean())}""",
    "4.4": """
    means = masked_mean(scores, response_mask).view(-1, 2)
    return pairwise_loss(means[:, 0], means[:, 1], margin=margin, beta=beta)""",
    "4.5": """
        x, norm_weight, head_weight, r, dot, shares, pairs, m = ctx.saved_tensors
        g, w, x64 = norm_weight.to(r), head_weight.to(r).view(-1), x.to(r)
        each = torch.sigmoid(m) - 1
        dz = (grad_loss * ctx.beta / m.numel()) * each.index_select(0, pairs) * shares
        u = (g * w)[None]
        dx = dz[:, None] * (r[:, None] * u - (r**3 * dot / x.shape[1])[:, None] * x64)
        s = ((dz * r)[:, None] * x64).sum(0)
        grads = dx.to(x), (s * w).to(norm_weight), (s * g).view_as(head_weight).to(head_weight)
        return (*grads, None, None, None, None, None, None)""",
    "4.6": """
    later = response_mask.flip(1).cumsum(1).flip(1)
    return response_mask & (later == 1)""",
    "4.7": """
    z = scores.float()[last_token_mask(response_mask)]
    y = correct.float()
    loss = (F.softplus(z) - y * z).mean()
    return loss, {"accuracy": ((z > 0).float() == y).float().mean().item()}""",
    "4.8": """
    gap = torch.where(response_mask, logprobs - ref_logprobs, torch.zeros(()))
    chosen, rejected = gap.sum(1).view(-1, 2).unbind(1)
    return pairwise_loss(chosen, rejected, beta=beta, margin=0.0)""",
    "4.9": """
    K, total = ranked.shape[1], 0.0
    for k in range(K - 1):
        total = total + (ranked[:, k:].logsumexp(1) - ranked[:, k]).mean()
    return total / (K - 1), {}""",
    "4.10": """
    last = torch.where(last_token_mask(response_mask), token_scores(reward_model, ids), 0.0)
    return torch.where(response_mask, last.sum(1, keepdim=True), 0.0) if every_token else last""",
    "4.11": """
    now, before = (token_logprobs(net, ids, response_mask)[0] for net in (policy, reference))
    return torch.where(response_mask, beta * now - beta * before, 0.0)""",
    "4.12": """
    def beats(a, b):
        return 1.0 if a > b else 0.5 if a == b else 0.0

    out = {"wins": 0.0, "comparisons": 0, "hits": 0, "choices": 0.0, "n_errors": 0}
    for j, (z, e) in enumerate(zip(scores, first_errors)):
        z = z.tolist()
        if e > 0:
            drops = [z[t - 1] - z[t] for t in range(1, len(z))]
            out["n_errors"] += 1
            out["comparisons"] += e
            out["wins"] += sum(beats(z[t], z[e]) for t in range(e))
            out["hits"] += int(drops.index(max(drops)) == e - 1)
            if repaired is not None:
                out["choices"] += beats(repaired[j][e].item(), z[e])
    return out""",
    "5.1": """
    log_ratio = (ref_logprobs - logprobs).double()
    k3 = torch.special.expm1(log_ratio) - log_ratio
    return -log_ratio.to(logprobs.dtype), k3.to(logprobs.dtype)""",
    "5.2": """
    x = rewards[reward_mask].double()
    sums = all_sum({"n": x.numel(), "total": x.sum().item(), "squares": x.square().sum().item()}, grid)
    n, total, squares = sums.values()
    mean, std = (total / n, max(squares / n - (total / n) ** 2, 0.0) ** 0.5) if how != "none" else (0.0, 1.0)
    out = torch.zeros_like(rewards)
    centre = mean if how == "mean_std" else 0.0
    out[reward_mask] = ((x - centre) / (std if std > 1e-6 else 1.0)).to(out.dtype)
    return out""",
    "5.3": """
    r = rewards.masked_fill(~response_mask, 0.0)
    T = r.shape[1]
    powers = torch.tensor([[gamma ** (k - t) if k >= t else 0.0 for k in range(T)] for t in range(T)])
    return torch.where(response_mask, r @ powers.T, 0.0)""",
    "5.4": """
    if group_size == 1:
        raise ValueError("one is no group")
    out = []
    for i in range(0, len(sequence_rewards), group_size):
        group = sequence_rewards[i : i + group_size].double()
        largest = group.abs().max() if sizes is None else sizes[i : i + group_size].abs().max()
        others = (group.sum() - group) / (group_size - 1)
        if group.std() <= max(1e-6, ROUNDING * largest):
            out.append(torch.zeros_like(group))
        else:
            out.append((group - group.mean()) / group.std() if how == "grpo" else group - others)
    return torch.cat(out).to(sequence_rewards.dtype)""",
    "5.5": """
    weights = torch.where(response_mask, advantages.detach(), 0.0)
    return -(weights * logprobs).sum() / response_mask.sum(), {}""",
    "6.1": """
    return critic.scalars(critic.model(ids[:, :-1])) * response_mask""",
    "6.2": """
    advantages = torch.zeros_like(rewards)
    for i, row in enumerate(response_mask.tolist()):
        places = [t for t, inside in enumerate(row) if inside]
        later = 0.0
        for t, following in reversed(list(zip(places, [*places[1:], None]))):
            v = 0.0 if following is None else values[i, following]
            later = rewards[i, t] + gamma * v - values[i, t] + gamma * lam * later
            advantages[i, t] = later
    return advantages, torch.where(response_mask, advantages + values, 0.0)""",
    "6.3": """
    z_std, shaped = shape_rewards(rollout, cfg, grid)
    inside = rollout.response_mask
    if cfg.advantage == "token":
        return torch.where(inside, shaped - cfg.baseline_weight * values, 0.0), z_std
    if cfg.advantage != "gae":
        return reinforce_advantages(rollout, cfg, grid), z_std
    return gae(torch.where(inside, shaped, 0.0), values, inside, gamma=cfg.gamma, lam=cfg.lam)""",
    "6.4": """
    ratio, A = (logprobs - old_logprobs.detach()).exp()[response_mask], advantages.detach()[response_mask]
    clipped = ratio.clamp(1 - clip, 1 + clip)
    stats = {"clip_frac": (clipped * A < ratio * A).float().mean(), "ratio_max": ratio.max()}
    return -torch.min(ratio * A, clipped * A).mean(), stats""",
}


def source_of(exercise):
    """-> signature and docstring, body"""
    source = SOURCES[exercise.file]
    lines = source.split("\n")
    first, node = functions(source)[exercise.function]
    start = first if isinstance(node, ast.ClassDef) else bodies(node)[0][0]
    head = "".join(line + "\n" for line in lines[first - 1 : start - 1])
    return head, "\n".join(lines[start - 1 : node.end_lineno])


def in_given(exercise, text):
    """The module without any solution, with this text in the function's place."""
    return as_module(exercise.file, with_function(GIVEN[exercise.file], exercise.function, text))


def verdict(exercise, text):
    """How the checks end with this text in the function's place: None for a pass, or the exception"""
    try:
        checks.CHECKS[exercise.id](in_given(exercise, text))
    except Exception as error:
        return error


def written_differently(exercise):
    if "." in exercise.function or not isinstance(
        functions(SOURCES[exercise.file])[exercise.function][1], ast.ClassDef
    ):
        return source_of(exercise)[0] + OTHERS[exercise.id]
    return f"class {exercise.function}(torch.autograd.Function):{OTHERS[exercise.id]}"


def zeros_like(value):
    """The same shape, all zero: tensors, numbers, containers; a function becomes one that returns zeros."""
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
    module = in_given(exercise, "".join(source_of(exercise)))
    *owner, name = exercise.function.split(".")
    owner = getattr(module, owner[0]) if owner else module
    if isinstance(getattr(owner, name), type):
        owner, names = getattr(owner, name), ("forward", "backward")
    else:
        names = (name,)

    def one_zero(self, *_, **__):
        torch.nn.Linear.__init__(self, 1, 1, bias=False)

    for name in names:
        static = isinstance(vars(owner)[name], staticmethod)
        zeros = one_zero if name == "__init__" else zeros_like(getattr(owner, name))
        setattr(owner, name, staticmethod(zeros) if static else zeros)
    return module


# -------------------------------------------------------------------------------- the ladder


def test_the_ladder_and_its_course():
    ids = list(EXERCISES)
    assert ids == list(checks.CHECKS) == list(MUTANTS) == list(OTHERS) == list(HINTS)
    assert list(dict.fromkeys(e.chapter for e in EXERCISES.values())) == list(CHAPTERS)
    for chapter in CHAPTERS.values():
        assert 30 <= chapter.minutes <= 240 and 2 <= len(chapter.goals) <= 5 and chapter.needs
        assert chapter.run.startswith(("python ", "torchrun ")) and chapter.shows
    for e in EXERCISES.values():
        nudge, idea = HINTS[e.id]
        assert 20 < len(nudge) < 160 and 40 < len(idea) < 320, e.id
        assert nudge not in idea
    assert {e.points for e in EXERCISES.values()} == {1, 2, 3, 4, 5}  # by difficulty
    positions = [SOURCES[e.file].index(f"# exercise {e.id} ") for e in EXERCISES.values()]
    in_order = list(zip(EXERCISES.values(), positions))
    for (a, p), (b, q) in zip(in_order, in_order[1:]):
        assert a.file != b.file or p < q, f"{a.id} stands below {b.id}"


def test_hints_hold_no_code_of_the_solution():
    """No line of a solution, nor an expression of more than a call, can be read off a hint."""
    for e in EXERCISES.values():
        hints = " ".join(HINTS[e.id])
        for line in source_of(e)[1].split("\n"):
            code = line.split("#")[0].strip().removeprefix("return ")
            assert len(code) < 12 or code not in hints, (e.id, code)


@pytest.mark.parametrize("id", EXERCISES)
def test_solution_passes_blank_and_zeros_fail(id):
    e = EXERCISES[id]
    assert verdict(e, "".join(source_of(e))) is None
    empty = verdict(e, cut_out(GIVEN[e.file], e.function, e.file))
    assert isinstance(empty, NotImplementedError) and id in str(empty)
    with pytest.raises(AssertionError):
        checks.CHECKS[id](with_zeros(e))


@pytest.mark.parametrize("id", OTHERS)
def test_another_right_answer_passes(id):
    error = verdict(EXERCISES[id], written_differently(EXERCISES[id]))
    assert error is None, error
    assert OTHERS[id].strip() != source_of(EXERCISES[id])[1].strip()


@pytest.mark.parametrize("id", checks.STAND_INS)
def test_no_stand_in_is_a_solution(id):
    """What the checks put in the place of an exercise's function would not pass as an answer to it."""
    e = EXERCISES[id]
    module = in_given(e, "".join(source_of(e)))
    checks.CHECKS[id](module)
    setattr(module, e.function, checks.STAND_INS[id])
    with pytest.raises(AssertionError):
        checks.CHECKS[id](module)


def says_enough(error):
    """One line, and more than a number: the input or the rule, and what was found or expected."""
    text = str(error)
    return len(text) >= 30 and "\n" not in text and ("expected" in text or "found" in text)


def test_mutants_die(capsys):
    """By a failure that tells a student what was expected on which input."""
    survivors, killed, curt = [], 0, []
    for id, mutants in MUTANTS.items():
        head, body = source_of(EXERCISES[id])
        assert len(set(mutants)) == len(mutants) >= 4
        for old, new in mutants:
            assert body.count(old) == 1, f"exercise {id}: {old!r} stands {body.count(old)} times in the body"
            error = verdict(EXERCISES[id], head + body.replace(old, new))
            if isinstance(error, AssertionError):  # a wrong number; a crash would prove nothing
                killed += 1
                if not says_enough(error):
                    curt.append((id, old, new, error))
            else:
                survivors.append((id, old, new, error))
    total = sum(map(len, MUTANTS.values()))
    with capsys.disabled():
        print(f"\n{killed} of {total} mutants of {len(MUTANTS)} exercises killed: {killed / total:.0%}")
    assert not survivors, "\n".join(map(str, survivors))
    assert not curt, "\n".join(map(str, curt))


# -------------------------------------------------------------------------------- the command


def exercises_py(*arguments, root=ROOT):
    """-> exit status, stdout, stderr"""
    command = [sys.executable, root / "classroom" / "exercises.py", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=root)
    return ran.returncode, ran.stdout, ran.stderr


def put(directory, id, text):
    """Writes text in the place of an exercise's function in a student's file."""
    path = directory / EXERCISES[id].file
    source = path.read_text(encoding="utf-8")
    path.write_text(with_function(source, EXERCISES[id].function, text), encoding="utf-8")


def solve(directory, ids):
    for id in ids:
        put(directory, id, "".join(source_of(EXERCISES[id])))


def verdicts(stdout):
    """{id: (PASS or FAIL, reason)}"""
    pattern = r"^(PASS|FAIL)  (\S+) +\d+/\d+ +[\d.]+ s  \S+ [^:\n]+(?:: )?(.*)$"
    return {m[2]: (m[1], m[3]) for m in re.finditer(pattern, stdout, re.M)}


def passed(stdout):
    return {id for id, (word, _) in verdicts(stdout).items() if word == "PASS"}


def test_a_solved_exercise_turns_its_line_green_and_no_other(tmp_path):
    """The teacher's grading, from the original project."""
    student, book, solved = tmp_path / "student", tmp_path / "grades.json", {"1.1", "2.1", "4.5", "6.2"}
    status, out, _ = exercises_py("blank", student)
    assert status == 0 and f"{len(EXERCISES)} exercises" in out
    names = {path.relative_to(student).as_posix() for path in student.rglob("*")}
    wanted = "train.py tests/test_model.py support/files.py classroom/exercises.py classroom/given/qrm.py"
    assert {*wanted.split(), "README.md", "Makefile", "requirements.txt"} <= names
    left_out = (".git/", "runs", ".venv", "__pycache__", "test_exercises", "answers")
    assert not any(part in name for name in names for part in left_out)
    status, _, err = exercises_py("blank", student)
    assert status == 2 and "not empty" in err and err.count("\n") == 1
    solve(student, solved)
    status, out, err = exercises_py("grade", student, "--json", book)
    points = sum(EXERCISES[id].points for id in solved)
    total = sum(e.points for e in EXERCISES.values())
    found = verdicts(out)
    assert status == 1 and not err and passed(out) == solved and len(found) == len(EXERCISES)
    assert f"4 of {len(EXERCISES)} exercises, {points} of {total} points" in out
    assert found["4.3"] == ("FAIL", "blank")
    rows = json.loads(book.read_text())["exercises"]
    assert {row["id"] for row in rows if row["passed"]} == solved
    assert sum(row["points"] for row in rows) == points == json.loads(book.read_text())["total"]["points"]
    assert all(row["reason"] == found[row["id"]][1] and row["seconds"] > 0 for row in rows)
    status, _, err = exercises_py("blank", student / "classroom" / "exercises.py")
    assert status == 2 and err.count("\n") == 1


def test_a_students_copy_holds_no_solution_and_grades_itself(tmp_path):
    """All exercises in one copy: the handout stays, no body is in it; with answers all lines turn green."""
    student = tmp_path / "student"
    exercises_py("blank", student)
    everything = "\n".join(path.read_text(encoding="utf-8") for path in student.rglob("*.py"))
    for e in EXERCISES.values():
        head, body = source_of(e)
        text = (student / e.file).read_text(encoding="utf-8")
        assert head in text and f'NotImplementedError("exercise {e.id}: {e.title}")' in text
        assert body not in everything and textwrap.dedent(body) not in everything, e.id
    status, out, err = exercises_py("grade", ".", root=student)
    assert status == 1 and not err and not passed(out) and len(verdicts(out)) == len(EXERCISES)
    for id in EXERCISES:
        put(student, id, written_differently(EXERCISES[id]))
    status, out, err = exercises_py("grade", ".", root=student)
    assert status == 0 and not err and passed(out) == set(EXERCISES), out
    for number, chapter in CHAPTERS.items():
        assert f"chapter {number}: now run it with your code: {chapter.run}" in out
    status, _, err = exercises_py("blank", tmp_path / "copy", root=student)
    assert status == 2 and "student's copy" in err and err.count("\n") == 1


def test_chosen_chapters_are_taken_out_and_the_rest_works(tmp_path):
    student = tmp_path / "student"
    status, out, _ = exercises_py("blank", student, "4", "5.2")
    chosen = [e.id for e in EXERCISES.values() if e.chapter == "4" or e.id == "5.2"]
    assert status == 0 and f"{len(chosen)} exercises" in out
    for e in EXERCISES.values():
        text = (student / e.file).read_text(encoding="utf-8")
        assert (source_of(e)[1] in text) == (e.id not in chosen), e.id
        assert (f"# exercise {e.id} " in text) == (e.id in chosen), e.id
        assert source_of(e)[1] not in (student / "classroom" / "given" / e.file).read_text(encoding="utf-8")
    for name in ("model", "parallel", "data"):  # nothing is taken out of them, so they are as they were
        lines = (student / f"{name}.py").read_text(encoding="utf-8").split("\n")
        original = SOURCES[f"{name}.py"].split("\n")
        assert lines == [line for line in original if not re.match(r" *# exercise \d", line)]
    solve(student, ["4.2", "5.2"])
    (student / "model.py").write_text("a student broke this file: (")  # which no exercise of the copy is in
    status, out, err = exercises_py("grade", ".", root=student)
    assert list(verdicts(out)) == chosen and passed(out) == {"4.2", "5.2"}, out + err
    status, out, _ = exercises_py("grade", student)  # the teacher's project knows what was taken out
    assert list(verdicts(out)) == chosen and passed(out) == {"4.2", "5.2"}
    status, out, _ = exercises_py("list", root=student)
    assert "1. A decoder" not in out and "4. Reward models" in out


def test_a_solved_chapter_trains(tmp_path):
    """A student who has written chapter 4 can train the reward model with it; chapter 5 is still blank."""
    student = tmp_path / "student"
    exercises_py("blank", student, "4", "5")
    solve(student, [e.id for e in EXERCISES.values() if e.chapter == "4"])
    script = """
import torch, model, qrm, data
from parallel import Grid
cfg = model.ModelConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=1, head_dim=8)
net = model.init_weights(model.build_model(model.ScalarModel, cfg, Grid()), 0)
ids, mask = data.collate([data.Example([1, 2], [3, 4]), data.Example([1, 2], [5, 6, 7])])
print(qrm.qrm_loss(qrm.token_scores(net, ids), mask)[0].item())
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=student)
    assert ran.stdout.startswith("2.1269"), ran.stderr


def test_nothing_takes_the_grader_down(tmp_path):
    for name, source in SOURCES.items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    for id, body in {
        "4.2": "while True: pass",
        "4.3": "__import__('os')._exit(0)",
        "4.4": "__import__('os').kill(__import__('os').getpid(), 11)",
        "4.6": "raise SystemExit('PASS')",
        "4.8": "return helper(logprobs)",
        "5.5": "pass",
    }.items():
        put(tmp_path, id, f"{source_of(EXERCISES[id])[0]}    {body}\n")
    head, body = source_of(EXERCISES["4.7"])
    put(tmp_path, "4.7", f"{head}    print('FAIL  4.7')\n{body}")
    path = tmp_path / "qrm.py"
    path.write_text(path.read_text().replace("def dpo_rewards(", "def dpo_rewardss("))
    path = tmp_path / "ppo.py"  # does not parse
    loop = "for t in reversed(range(rewards.shape[1])):"
    path.write_text(path.read_text().replace(loop, loop.replace("])):", "]):")))
    path = tmp_path / "model.py"
    path.write_text(path.read_text().replace("x32 = x.float()", "x32 = x.float(") + '\n"""')
    (tmp_path / "data.py").unlink()
    (tmp_path / "parallel.py").write_bytes(b"\xff\xfe")
    ids = ("1.1", "1.3", "1.6", "2.1", "3.1", *(f"4.{i}" for i in range(2, 9)), "4.11", "5.5", "6")
    status, out, err = exercises_py("grade", tmp_path, *ids, "--timeout", 4)
    found = verdicts(out)
    assert status == 1 and not err, err
    assert passed(out) == {"1.3", "1.6", "4.5", "4.7", "6.1", "6.3", "6.4"}, out
    reasons = {
        "1.1": "SyntaxError: '(' was never closed (model.py, line ",
        "2.1": "UnicodeDecodeError: ",
        "3.1": "FileNotFoundError: ",
        "4.2": "no result after 4 s: an endless loop?",
        "4.3": "the process ended by itself (exit code 0)",
        "4.4": "the process ended by itself (exit code -11)",
        "4.6": "SystemExit: PASS",
        "4.8": "NameError: name 'helper' is not defined (helpers of your own must be inside the function)",
        "4.11": "qrm.py has no dpo_rewards",
        "6.2": "SyntaxError: ",
    }
    assert all(found[id][1].startswith(reason) for id, reason in reasons.items()), out
    line = 1 + SOURCES["model.py"].split("\n").index("        x32 = x.float()")
    assert f"line {line})" in found["1.1"][1]  # of the student's file


def test_the_solution_cannot_be_imported_and_an_error_of_torch_is_no_blank(tmp_path):
    source = SOURCES["qrm.py"]
    head = source_of(EXERCISES["4.2"])[0]
    for body, says in (
        ("    import qrm\n    return qrm.masked_mean(x, mask)", "RecursionError"),
        ("    import reinforce\n    return reinforce.standardize(x, mask, 'none', None)", "blank"),
        ("    torch.eye(2).bool() @ torch.eye(2).bool()", "not implemented for"),
    ):
        (tmp_path / "qrm.py").write_text(with_function(source, "masked_mean", head + body), encoding="utf-8")
        status, out, _ = exercises_py("grade", tmp_path, "4.2")
        assert status == 1 and says in out, out


def test_blank_beside_the_project(monkeypatch, capsys):
    """`blank ../student`, as the README has it: a path that goes through the project and out of it again."""
    seen = []
    monkeypatch.setattr("exercises.copy_project", lambda directory, ids: seen.append(ids) or [])
    sys.modules["exercises"].blank(ROOT / ".." / "not-there" / "student", ["4"])
    assert seen == [["4"]] and "0 exercises" in capsys.readouterr().out


def test_gradescope(tmp_path):
    """The uploaded folder grades without solutions, in Gradescope's form."""
    box, submission, results = tmp_path / "box", tmp_path / "submission", tmp_path / "results.json"
    status, out, _ = exercises_py("autograder", box, "4.2", "4.3", "4.6")
    assert status == 0 and (tmp_path / "box.zip").exists()
    assert "requirements.txt" in (box / "setup.sh").read_text()
    line = (box / "run_autograder").read_text().split("\n")[2]
    expected = "python3 classroom/exercises.py grade /autograder/submission 4.2 4.3 4.6 --gradescope --json "
    assert line.startswith(expected + "/autograder/results/results.json")
    submission.mkdir()
    (submission / "qrm.py").write_text((box / "qrm.py").read_text())
    solve(submission, ["4.2"])
    head = source_of(EXERCISES["4.3"])[0]
    put(submission, "4.3", f"{head}    return chosen.mean() - rejected.mean(), {{}}\n")
    exercises_py("grade", submission, "4.2", "4.3", "4.6", "--gradescope", "--json", results, root=box)
    tests = json.loads(results.read_text())["tests"]
    assert [test["number"] for test in tests] == ["4.2", "4.3", "4.6"]
    assert [test["status"] for test in tests] == ["passed", "failed", "failed"]
    assert [test["score"] for test in tests] == [EXERCISES["4.2"].points, 0, 0]
    assert all(test["max_score"] == EXERCISES[test["number"]].points for test in tests)
    assert "equal scores" in tests[1]["output"] and tests[2]["output"] == "blank"


def test_list_hint_and_bad_input(tmp_path):
    status, out, _ = exercises_py("list")
    assert status == 0 and all(f"{number}. {c.title}: " in out for number, c in CHAPTERS.items())
    assert all(f" {e.id} " in out and e.title in out for e in EXERCISES.values())
    status, out, _ = exercises_py("list", "4")
    assert "qrm.py        _FusedQRM.backward" in out and "3. The data" not in out
    status, out, _ = exercises_py("hint", "4.3")
    assert status == 0 and out.startswith("Try log(sigmoid(-900))") and "logsigmoid" not in out
    for more in ("--more", "2"):
        assert exercises_py("hint", "4.3", more)[1].startswith("F.logsigmoid stays finite")
    for arguments, word in (
        (("hint", "9.9"), "9.9"),
        (("grade", tmp_path, "9"), "9"),
        (("grade", tmp_path / "none"), "none"),
        (("blank", tmp_path / "new", "7"), "7"),
        (("blank", ROOT / "classroom" / "ann"), "inside the project"),
        (("blank", ROOT / ".." / ROOT.name / "ann"), "inside the project"),
        (("mark",), "mark"),
        ((), "expected list"),
    ):
        status, out, err = exercises_py(*arguments)
        assert status == 2 and word in err and err.count("\n") == 1 and not out, err
    assert not (tmp_path / "new").exists()


# -------------------------------------------------------------------------------- questions, experiments


def test_questions_have_answers_that_students_do_not_get():
    texts = [
        (ROOT / "classroom" / name).read_text(encoding="utf-8") for name in ("questions.md", "answers.md")
    ]
    for kind, n in (("Question", 5), ("Experiment", 5)):
        titles = [re.findall(rf"^## ({kind} \d: .+)$", text, re.M) for text in texts]
        assert titles[0] == titles[1] and len(titles[0]) == n
    for command in re.findall(r"^(?:python|torchrun) .+$", texts[0], re.M):
        words = command.split()
        assert (ROOT / next(word for word in words if word.endswith(".py"))).exists(), command
        if "train.py" in words:
            assert set(re.findall(r"--(\w+)", command)) <= FIELDS.keys(), command


# -------------------------------------------------------------------------------- notebooks


def run_notebook(path, replace=lambda code: code):
    """Executes all code cells in one namespace, their text where inspect looks for it, as Jupyter does."""
    names = {"__name__": "__main__"}
    for one in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if one["cell_type"] == "code":
            code = replace("".join(one["source"]))
            file = f"<{path.name} {one['id']}>"
            linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
            exec(compile(code, file, "exec"), names)


def test_chapter_notebooks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status, out, _ = exercises_py("notebooks", tmp_path)
    assert status == 0 and out.count("chapter-") == len(CHAPTERS) and "walkthrough.ipynb" in out
    for number in CHAPTERS:
        book = json.loads((tmp_path / f"chapter-{number}.ipynb").read_text())
        assert book["nbformat"] == 4 and len({one["id"] for one in book["cells"]}) == len(book["cells"])
        mine = [e for e in EXERCISES.values() if e.chapter == number]
        code = ["".join(one["source"]) for one in book["cells"] if one["cell_type"] == "code"]
        assert [line for line in code if line.startswith("check(")] == [
            f'check("{e.id}", {e.function.split(".")[-1]})' for e in mine
        ]
        assert all(source_of(e)[1] not in "\n".join(code) for e in mine)
        for text in code:
            compile(text, number, "exec")
    run_notebook(tmp_path / "chapter-3.ipynb")
    assert re.findall(r"^(\S+)  (\S+)", capsys.readouterr().out, re.M) == [("FAIL", "3.1"), ("FAIL", "3.2")]


@pytest.mark.slow
@pytest.mark.parametrize("number", CHAPTERS)
def test_every_chapter_notebook_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exercises_py("notebooks", tmp_path)
    run_notebook(tmp_path / f"chapter-{number}.ipynb")
    mine = [e.id for e in EXERCISES.values() if e.chapter == number]
    assert re.findall(r"^FAIL  (\S+) .*: blank$", capsys.readouterr().out, re.M) == mine


@pytest.mark.parametrize("id", ["1.1", "1.2", "2.1", "2.3", "4.2"])
def test_a_cell_with_the_answer_passes(id, tmp_path, monkeypatch, capsys):
    """A method, a function with decorators, a class, a constructor that calls super, a function."""
    monkeypatch.chdir(ROOT)
    e = EXERCISES[id]
    answer = textwrap.dedent("".join(source_of(e)))
    code = re.sub(r"\A(?:@.*\n)+", "", answer)
    name = e.function.split(".")[-1]
    cells = [cell("code", f"import torch\n{FIND_PROJECT}\nfrom exercises import check")]
    cells += [cell("code", code), cell("code", f'check("{id}", {name})')]
    write_notebook(tmp_path / "one.ipynb", cells)
    run_notebook(tmp_path / "one.ipynb")
    assert capsys.readouterr().out.startswith(f"PASS  {id}")


def test_walkthrough_notebook(tmp_path, monkeypatch, capsys):
    """The first four sections run (all of the script runs in test_walkthrough.py)."""
    monkeypatch.chdir(ROOT)
    exercises_py("notebooks", tmp_path)
    book = json.loads((tmp_path / "walkthrough.ipynb").read_text())
    cells = book["cells"]
    source = (ROOT / "classroom" / "walkthrough.py").read_text(encoding="utf-8")
    sections = re.findall(r'^section\("(.+)"\)', source, re.M)
    titles = [one["source"][0][3:].strip() for one in cells if one["source"][0].startswith("## ")]
    assert titles == sections
    last = next(i for i, one in enumerate(cells) if one["source"][0].startswith("## 5."))
    write_notebook(
        tmp_path / "part.ipynb", [{k: v for k, v in one.items() if k != "id"} for one in cells[:last]]
    )
    run_notebook(tmp_path / "part.ipynb")
    assert "parameters in 20 tensors" in capsys.readouterr().out
