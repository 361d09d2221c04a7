"""Draws <run>/report.html: what a run of the built-in task learned, on one page that needs no network.

    python classroom/report.py runs/arith

Reads what the stages left there: metrics.jsonl, eval.json and run.json of each, pairs-heldout.jsonl, the models.
What is missing is left out with one line that says so, so a run that stopped half-way gives a page too.

B sequences · T positions
"""

import dataclasses
import functools
import json
import math
import shlex
import statistics
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from data import encode_prompts
from model import LanguageModel, ScalarModel, load_model, token_logprobs
from parallel import Grid, Optimizer
from ppo import ppo_advantages, ppo_step, state_values
from reinforce import (
    Rollout,
    collect_rollout,
    minibatches,
    reinforce_advantages,
    reinforce_step,
    standardize,
)
from support import evaluate, files, graders, settings, tokenizers

EXAMPLES, PAIRS, SAMPLED = (
    3,
    400,
    128,
)  # prompts shown token by token; held-out pairs for the averages; answers sampled of each policy
FULL_COLOUR = 2.5  # standard deviations from which a token has its full colour
POLICIES = ("sft", "reinforce", "ppo")
JUDGES = {
    "rm": "Q-RM",
    "rm-dpo": "DPO",
    "rm-orm": "outcome",
    "rm-prm": "step",
}  # the token rewards that are compared
UNUSABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
)  # not there yet, cut off, diverged, or not the built-in task's

# ------------------------------------------------------------------------------------------------ what a run left


class Stage(NamedTuple):
    rows: list  # metrics.jsonl
    run: dict  # run.json; of an unfinished stage the config in its checkpoint, if it wrote one
    eval: dict  # eval.json
    unfinished: bool  # only <stage>.partial is there


def read_json(path):
    """The object in a JSON file; {} when there is none, or none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def read_stage(directory):
    partial = directory.with_name(directory.name + ".partial")
    unfinished = partial.exists() and not directory.exists()
    home = partial if unfinished else directory
    rows, metrics = [], home / "metrics.jsonl"
    for line in metrics.read_text(encoding="utf-8", errors="replace").split("\n") if metrics.exists() else ():
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # the end of the file, or a line that a crash cut off
            continue
    run = read_json(home / "run.json") or read_json(home / "state" / "state.json")
    return Stage(rows, run, read_json(home / "eval.json"), unfinished)


def is_model(directory):
    return (directory / "config.json").exists()


def is_number(value):
    return (
        isinstance(value, (int, float)) and abs(value) < 1e15
    )  # also drops the NaN and infinity of a diverged run


def points(rows, x, y):
    return [(row[x], row[y]) for row in rows if is_number(row.get(x)) and is_number(row.get(y))]


# ------------------------------------------------------------------------------------------------ pieces of a page


def missing(text):
    return f"<p class='missing'>Left out: {escape(text)}</p>"


def attempt(what, draw):
    """What draw() returns, or a line that says why it could not."""
    try:
        return draw()
    except UNUSABLE as e:
        return missing(f"{what} ({e}).")


def share(value, n=None):
    """0.512, with one binomial standard error if it is a share of n independent prompts."""
    if not is_number(value):
        return "–"
    error = (
        f" <small>± {math.sqrt(max(value * (1 - value), 0) / n):.3f}</small>"
        if is_number(n) and n > 0
        else ""
    )
    return f"{value:.3f}{error}"


def table(caption, head, rows):
    """caption, head: texts; rows: lists of HTML, the first cell of each names its row."""
    cells = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th scope='row'>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<div class='wide' tabindex='0' role='region' aria-label='{escape(caption)}'><table><caption>{escape(caption)}</caption><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def ticks(low, high):
    """Up to six numbers within [low, high], 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= (high - low) / 5.001)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def smooth(line, n=25):
    """Mean of the last n values, from the n-th on."""
    return [(line[i][0], sum(y for _, y in line[i - n + 1 : i + 1]) / n) for i in range(n - 1, len(line))]


def line_chart(y_label, x_label, series, y_range=None, level=None, mark=None, bars=False):
    """An SVG line chart, 360 units wide so that its letters keep their size on a phone.

    series   {name: [(x, y)]}; a line of more than 100 points is drawn faint, with the mean of its last 25 values on top
    level    (name, y) of a horizontal line to compare with; mark: x of a vertical one; bars: lines are outlines, to be filled
    """
    series = {name: line for name, line in series.items() if line}
    if not series:
        return missing(f"{y_label}: nothing was logged.")
    xs, ys = zip(*(point for line in series.values() for point in line))
    left, right = min(0, *xs), max(1, *xs)
    low, high = y_range or (min(ys), max(ys))
    pad = 0 if y_range else 0.06 * (high - low) or 0.1 * max(abs(high), 1)
    X = lambda x: 48 + 300 * (x - left) / (right - left)
    Y = lambda y: 190 - 146 * (y - low + pad) / (high - low + 2 * pad)
    path = lambda line: " ".join(f"{X(x):.1f},{Y(y):.1f}" for x, y in line)
    markers = [
        f"M{{:.1f}} {{:.1f}}{shape}"
        for shape in ("m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "m-3.5 -3.5h7v7h-7z", "m0 -5l5 5l-5 5l-5 -5z")
    ]
    out = [
        f"<text class='title' x='4' y='15'>{escape(y_label)}</text><text x='198' y='226' text-anchor='middle'>{escape(x_label)}</text>"
    ]
    for y in ticks(low - pad, high + pad):
        out.append(
            f"<path class='grid' d='M48 {Y(y):.1f}H348'/><text x='42' y='{Y(y) + 4:.1f}' text-anchor='end'>{y:.4g}</text>"
        )
    out += [f"<text x='{X(x):.1f}' y='208' text-anchor='middle'>{x:.6g}</text>" for x in ticks(left, right)]
    out += [f"<path class='level' d='M{X(mark):.1f} 44V190'/>"] if mark is not None else []
    keys = []  # of the legend: (class of its line, marker, name)
    for i, (name, line) in enumerate(series.items()):
        out.append(
            f"<polyline class='line{i}{' faint' if len(line) > 100 else ' bar' * bars}' points='{path(line)}'/>"
        )
        if len(line) > 100:
            out.append(f"<polyline class='line{i}' points='{path(smooth(line))}'/>")
        elif len(line) <= 40:
            dots = (
                markers[i].format(X(x), Y(y)) + f"'><title>{escape(name)}: {x:g}, {y:.4g}" for x, y in line
            )
            out += [f"<path class='dot{i}' d='{dot}</title></path>" for dot in dots]
        keys.append((f"line{i}", f"<path class='dot{i}' d='{markers[i].format(12, 0)}'/>", name))
    if level:
        out.append(f"<path class='level' d='M48 {Y(level[1]):.1f}H348'/>")
        keys.append(("level", "", level[0]))
    at = 48
    for line_class, dot, name in keys if len(keys) > 1 else ():
        out.append(
            f"<g transform='translate({at:.0f} 30)'><path class='{line_class}' d='M0 0H24'/>{dot}<text x='29' y='4'>{escape(name)}</text></g>"
        )
        at += 42 + 6.8 * len(name)
    spoken = "; ".join(
        f"{name}: {line[0][1]:.4g} at {line[0][0]:g}, {line[-1][1]:.4g} at {line[-1][0]:g}"
        for name, line in series.items()
    )
    return f"<svg viewBox='0 0 360 234' role='img' aria-label='{escape(f'{y_label} against {x_label}. {spoken}')}'>{''.join(out)}</svg>"


# ------------------------------------------------------------------------------------------------ 1. before and after


def headline(stages, judges):
    policies = {name: stages[name].eval for name in POLICIES}
    judged = {name: stage.eval for name, stage in judges.items()}
    absent = [name for name, result in (policies | judged).items() if not result]
    out = (
        [missing(f"{', '.join(absent)}: no eval.json (python train.py --stage eval writes it).")]
        if absent
        else []
    )
    policies, judged = ({name: r for name, r in results.items() if r} for results in (policies, judged))
    if policies:
        rows = [["pass@1, greedy", *(share(r.get("pass@1"), r.get("n_prompts")) for r in policies.values())]]
        for k in sorted({k for r in policies.values() for k in r.get("pass@k", {})}, key=int)[-1:]:
            rows.append(
                [f"pass@{escape(k)}", *(share(r.get("pass@k", {}).get(k)) for r in policies.values())]
            )
            rows.append(
                [
                    f"best of {escape(k)}",
                    *(share(r.get("best_of_k"), r.get("n_prompts")) for r in policies.values()),
                ]
            )
        rows.append(["held-out prompts", *(escape(str(r.get("n_prompts", "–"))) for r in policies.values())])
        out.append(
            table("Policies on held-out prompts", ["policy", *policies], rows)
            + "<p class='note'>sft is the policy before reinforcement learning. pass@k: at least one of k "
            "samples is right. Best of k: the sample with the highest mean Z is right. ± is one standard error over the prompts of this one "
            "run; another seed can move a figure by more.</p>"
        )
    if judged:
        measures = {
            "pair_accuracy": "held-out pairs whose right answer scores higher; chance 0.5",
            "length_baseline": "the same when the shorter answer is preferred",
            "error_auc": "chance that the first wrong token scores below a token before it; blind 0.5",
            "first_error_choice": "at the first wrong token, the right one scores higher; chance 0.5",
            "first_error_hit": "wrong answers whose largest drop is at the first wrong token",
        }
        rows = [
            [f"{key}<br><small>{text}</small>", *(share(r.get(key)) for r in judged.values())]
            for key, text in measures.items()
        ]
        out.append(
            table(
                "Reward models on held-out pairs",
                ["reward model", *judged],
                [*rows, ["held-out pairs", *(escape(str(r.get("n_pairs", "–"))) for r in judged.values())]],
            )
        )
    return "".join(out)


# ------------------------------------------------------------------------------------------------ 2. token credit


class Answer(NamedTuple):
    ids: list  # response tokens, stop token included
    error: int  # index of the first token that departs from the one right answer; len(ids) if none
    z: dict  # {reward model: raw reward of each token, None where it says nothing}
    z_std: dict  # the same, standardised over all that this reward model said about these pairs


@torch.no_grad()
def score_pairs(run):
    """What each reward model says about the first PAIRS of pairs-heldout.jsonl
    -> tokenizer, {directory: label} of the models that are there, [(prompt, right Answer, wrong Answer)]"""
    tokenizer, judges = (
        tokenizers.Tokenizer.load(run / "rm"),
        {name: label for name, label in JUDGES.items() if is_model(run / name)},
    )
    rows = data.load_rows(run / "pairs-heldout.jsonl", ("prompt", "chosen", "rejected"), PAIRS)
    pairs, rows = data.encode(rows, tokenizer, 1024, ("chosen", "rejected"), log=lambda text: None)
    ids, mask = data.collate([example for pair in pairs for example in pair])  # (2P, T+1), (2P, T)
    answers = []
    for j, example in enumerate(example for pair in pairs for example in pair):
        error = data.error_places(tokenizer, rows[j // 2]["prompt"], [example])[0]
        answers.append(Answer(example.response_ids, error, {}, {}))
    for name in judges:
        reward = evaluate.load_reward(
            evaluate.reward_kind(run / name), run / name, tokenizer, settings.Config(), Grid()
        )
        scores = torch.cat([reward.rewards(*part) for part in zip(ids.split(64), mask.split(64))])  # (2P, T)
        spoken = reward.speaks(ids, mask)
        scaled = standardize(scores, spoken, "mean_std", Grid())  # (2P, T), as REINFORCE does with a rollout
        for j, answer in enumerate(answers):
            for out, numbers in ((answer.z, scores), (answer.z_std, scaled)):
                out[name] = [
                    x if said else None
                    for x, said in zip(numbers[j][mask[j]].tolist(), spoken[j][mask[j]].tolist())
                ]
    return tokenizer, judges, [(row["prompt"], *answers[2 * i : 2 * i + 2]) for i, row in enumerate(rows)]


HOW = "Point at a token, touch it, or use Tab and the arrow keys, for all its numbers."
KEY = (
    "<p class='key'><small class='pos' style='--a:.8'>+2.0 blue</small> above the mean <small class='neg' style='--a:.8'>-2.0 orange</small> below it "
    "<span class='wrong'><b>✗7</b></span> first wrong token <small>·</small> nothing said</p>"
)


def cell(number):
    """A standardised number on its colour; a dot where nothing is said."""
    if number is None:
        return "<small>·</small>"
    return f"<small class='{'pos' if number >= 0 else 'neg'}' style='--a:{min(abs(number) / FULL_COLOUR, 1):.2f}'>{number:+.1f}</small>"


def answer_html(title, tokens, rows, told, error):
    """An answer, a line of it a row of columns: the token, and below it one number of each of `rows`.

    tokens   texts; rows: {name: [standardised number of each token, or None]}; error: index of the first wrong one
    told     what a column says when it is pointed at, focused or touched
    """
    names = f"<span class='names' aria-hidden='true'><b></b>{''.join(f'<small>{escape(name)}</small>' for name in rows)}</span>"
    lines = [""]
    for i, text in enumerate(tokens):
        shown = "✗" * (i == error) + text.replace("\n", "↵")
        label = escape(f"{text!r}{', the first wrong token' * (i == error)}: {told[i]}")
        lines[-1] += (
            f"<span class='token{' wrong' * (i == error)}' tabindex='0' role='img' aria-label='{label}'><b>{escape(shown)}</b>"
            f"{''.join(cell(numbers[i]) for numbers in rows.values())}</span>"
        )
        lines += [""] * ("\n" in text)
    body = "".join(f"<div class='line'>{names}{line}</div>" for line in lines if line)
    return f"<div class='answer' role='group' aria-label='{escape(title)}'><p>{escape(title)}</p>{body}</div>"


def texts(tokenizer, ids):
    return ["stop" if id in tokenizer.stop_ids else text for id, text in zip(ids, tokenizer.token_texts(ids))]


def profile(scored, judges):
    """Mean standardised reward before, at and after the first error, and Q-RM's step by step around it."""
    right, wrong = [right for _, right, _ in scored], [a for _, _, a in scored if a.error < len(a.ids)]
    twins = [
        (right, a) for _, right, a in scored if a.error < min(len(a.ids), right.error)
    ]  # equal up to a.error, right beyond it
    places = {
        "right answers": (right, lambda a: slice(None)),
        "wrong ones, before the first error": (wrong, lambda a: slice(a.error)),
        "at the first wrong token": (wrong, lambda a: slice(a.error, a.error + 1)),
        "after it": (wrong, lambda a: slice(a.error + 1, None)),
    }
    rows = []
    for place, (answers, where) in places.items():
        said = [[z for a in answers for z in a.z_std[name][where(a)] if z is not None] for name in judges]
        rows.append(
            [place, *(f"{statistics.fmean(z):+.2f}<br><small>n {len(z)}</small>" if z else "–" for z in said)]
        )
    votes = [
        [
            b.z_std[name][a.error] > a.z_std[name][a.error]
            for b, a in twins
            if None not in (b.z_std[name][a.error], a.z_std[name][a.error])
        ]
        for name in judges
    ]
    rows.append(
        [
            "same state: right token above the wrong one<br><small>blind: 50 %</small>",
            *(f"{100 * statistics.fmean(v):.0f} %<br><small>n {len(v)}</small>" if v else "–" for v in votes),
        ]
    )
    around = {"right answer": {}, "wrong answer": {}}
    for pair in twins:
        for places, answer in zip(around.values(), pair):
            for t in range(max(0, pair[1].error - 8), min(len(answer.ids), pair[1].error + 9)):
                places.setdefault(t - pair[1].error, []).append(answer.z_std["rm"][t])
    series = {
        name: [(t, statistics.fmean(z)) for t, z in sorted(places.items()) if len(z) >= len(twins) / 5]
        for name, places in around.items()
    }
    return (
        f"<div class='pair'>{table('Mean standardised reward', ['response tokens', *judges.values()], rows)}"
        + line_chart(
            "Q-RM: mean Z (standard deviations)", "tokens from the first wrong token", series, mark=0
        )
        + "</div>"
    )


def credit(run):
    absent = [
        missing(
            f"{label}. It is made by: python train.py --stage rm --run {shlex.quote(str(run))} --reward {name[3:]}{' --beta 0.1' * (label == 'DPO')}"
        )
        for name, label in JUDGES.items()
        if name != "rm" and not is_model(run / name)
    ]
    tokenizer, judges, scored = score_pairs(run)
    shown = {}
    for prompt, *answers in scored:
        shown.setdefault(prompt, answers)
    out = [
        *absent,
        "<p>Every response token of held-out answers, and below it what each reward model gives RL for it: Q-RM and DPO speak at every token, "
        "the step model at the end of a line, the outcome model at the last token. Each is standardised over all that it said about "
        f"{len(scored)} pairs. These are the first {min(EXAMPLES, len(shown))} prompts of the file, not a selection. {HOW}</p>{KEY}<p>Theory predicts for Q-RM "
        "a step down at the first wrong token, not one low token: what follows it continues a wrong answer.</p>",
    ]
    for prompt, answers in list(shown.items())[:EXAMPLES]:
        out.append(f"<h3 class='prompt'>{escape(prompt)}</h3><div class='pair'>")
        for title, answer in zip(("right answer", "wrong answer"), answers):
            say = lambda z, z_std: "silent" if z is None else f"{z:.2f}, standardised {z_std:+.2f}"
            told = [
                " · ".join(
                    f"{label} {say(answer.z[name][i], answer.z_std[name][i])}"
                    for name, label in judges.items()
                )
                for i in range(len(answer.ids))
            ]
            rows = {label: answer.z_std[name] for name, label in judges.items()}
            out.append(answer_html(title, texts(tokenizer, answer.ids), rows, told, answer.error))
        out.append("</div>")
    return "".join(out) + f"<h3>Averages over {len(scored)} held-out pairs</h3>{profile(scored, judges)}"


# ------------------------------------------------------------------------------------------------ 3. before and after RL


class Sampled(NamedTuple):
    cfg: settings.Config  # of the run, with a rollout of SAMPLED trajectories
    policy: LanguageModel
    rollout: Rollout
    answers: list  # response ids of each row
    correct: list  # of bool


def sample(run, stages):
    """One rollout of each policy on the same held-out prompts, scored by <run>/rm -> tokenizer, rows, {policy: Sampled}"""
    tokenizer, reference = (
        tokenizers.Tokenizer.load(run / "sft"),
        load_model(LanguageModel, run / "sft", Grid()),
    )
    reward = evaluate.load_reward(
        evaluate.reward_kind(run / "rm"), run / "rm", tokenizer, settings.Config(), Grid()
    )
    rows, found = data.arith_rows("test", SAMPLED, 1), {}
    for name in (name for name in POLICIES if is_model(run / name)):
        own = {
            k: v
            for k, v in stages[name].run.get("config", {}).items()
            if k in settings.flags() and name != "sft"
        }
        cfg = settings.Config(**{**settings.ARITH["ppo"], **own, "stage": name, "group_size": 1, "data": ""})
        if name != "sft" and (cfg.reward != "qrm" or cfg.advantage not in ("", "token") or cfg.reward_model):
            raise ValueError(f"{name} was trained on another reward")
        cfg = dataclasses.replace(
            cfg, batch_size=SAMPLED, minibatch=max(SAMPLED // len(minibatches([], cfg)), 1)
        )
        policy = load_model(LanguageModel, run / name, Grid())
        seed = evaluate.hash_seed("report", name)
        rollout = collect_rollout(
            policy,
            reference,
            reward,
            encode_prompts(rows, tokenizer, cfg.data or "built-in task"),
            tokenizer.stop_ids,
            cfg,
            seed,
        )
        answers = [ids[1:][mask].tolist() for ids, mask in zip(rollout.ids, rollout.response_mask)]
        spoken = [tokenizer.decode([t for t in ids if t not in tokenizer.stop_ids]) for ids in answers]
        found[name] = Sampled(
            cfg,
            policy,
            rollout,
            answers,
            [graders.grade(text, row["label"], "arith")[1] for text, row in zip(spoken, rows)],
        )
    if len(found) < 2:
        raise ValueError("neither reinforce nor ppo is there")
    return tokenizer, rows, found


def histogram(values, low, high, place, places, bins=12):
    """The outline of a histogram as [(x, share of the values)]: in every bin a bar, the `place`-th of `places` that stand side by side."""
    shares, width = (torch.histc(values, bins, low, high) / len(values)).tolist(), (high - low) / bins
    bars = [
        (
            share,
            low + width * (i + (0.1 + 0.8 * place / places)),
            low + width * (i + (0.1 + 0.8 * (place + 1) / places)),
        )
        for i, share in enumerate(shares)
    ]
    return [
        point
        for share, left, right in bars
        for point in ((left, 0), (left, share), (right, share), (right, 0))
    ]


def distributions(tokenizer, rows, found):
    z = {name: s.rollout.scores[s.rollout.reward_mask] for name, s in found.items()}
    low, high = torch.cat([*z.values()]).aminmax()
    low, high = (low.item(), high.item()) if high > low else (low.item() - 1, low.item() + 1)
    lines = {
        "answers that are right": [f"{statistics.fmean(s.correct):.2f}" for s in found.values()],
        "response tokens": [str(len(x)) for x in z.values()],
        "mean Z": [f"{x.mean():.2f}" for x in z.values()],
        "standard deviation": [f"{x.std():.2f}" for x in z.values()],
    }
    for kind, wanted in (("right", True), ("wrong", False)):
        means = []
        for s in found.values():
            chosen = torch.tensor(s.correct) == wanted
            scores = s.rollout.scores[chosen][s.rollout.reward_mask[chosen]]
            means.append(f"{scores.mean():.2f}" if len(scores) else "–")
        lines[f"mean Z, {kind} answers"] = means
    chart = line_chart(
        "share of the response tokens",
        "raw Z of a token",
        {name: histogram(x, low, high, i, len(z)) for i, (name, x) in enumerate(z.items())},
        bars=True,
    )
    return (
        f"<p>{SAMPLED} held-out prompts, one sampled answer of each policy, every response token scored by the same Q-RM: where does its reward lie before RL "
        "(sft) and after it?</p><div class='pair'>"
        + table("Rewards of sampled tokens", ["policy", *found], [[k, *v] for k, v in lines.items()])
        + chart
        + "</div><p class='note'>Better answers move the mass to the right. Mass that moves while the share of right answers does not is a reward model "
        "being exploited; a rising mean Z of wrong answers can be that, or errors that come later in the answer.</p>"
    )


def one_update(run, name, sampled):
    """What train.py would do next with these answers, with a fresh optimizer -> Z_std, V (or None), advantages, ratio, each (B, T)"""
    cfg, policy, rollout, values = sampled.cfg, sampled.policy, sampled.rollout, None
    optimizer = Optimizer(policy, policy.grid, cfg.lr, max_grad_norm=cfg.max_grad_norm)
    if name == "ppo":
        critic = load_model(ScalarModel, run / "ppo" / "critic", policy.grid)
        with torch.no_grad():
            values = state_values(critic, rollout.ids, rollout.response_mask)
        weights, _ = ppo_advantages(rollout, values, cfg, policy.grid)
        ppo_step(
            policy,
            critic,
            optimizer,
            Optimizer(critic, policy.grid, cfg.critic_lr),
            rollout,
            cfg,
            cfg.lr,
            cfg.critic_lr,
        )
    else:
        weights = reinforce_advantages(rollout, cfg, policy.grid)
        reinforce_step(policy, optimizer, rollout, cfg, cfg.lr)
    with torch.no_grad():
        logprobs = token_logprobs(policy, rollout.ids, rollout.response_mask, cfg.temperature)[0]
    return (
        standardize(rollout.scores, rollout.reward_mask, cfg.standardize, policy.grid),
        values,
        weights,
        (logprobs - rollout.old_logprobs).exp(),
    )


def inspector(run, tokenizer, rows, found):
    """The answers of the last policy, token by token: reward, KL, V, advantage, and what the update makes of them."""
    name = [*found][-1]
    s, (z_std, values, weights, ratio) = found[name], one_update(run, name, found[name])
    out = [
        f"<p>What one more update of {name} does with {SAMPLED} answers that it sampled: the first {EXAMPLES} right and wrong ones. Below each token: its standardised reward and its advantage. {HOW} "
        "The ratio is the token's new probability over the old one after all updates of this rollout, with a fresh optimizer; a ratio that ran out of "
        f"1 ± {s.cfg.clip:g} in the direction of its advantage is clipped by PPO.</p>{KEY}<div class='pair'>"
    ]
    for i in sorted(
        i for kind in (True, False) for i in [i for i, c in enumerate(s.correct) if c == kind][:EXAMPLES]
    ):
        pick = lambda x: x[i][s.rollout.response_mask[i]].tolist()
        Z, Zs, A, R, KL = map(pick, (s.rollout.scores, z_std, weights, ratio, s.rollout.kl_k1))
        V = pick(values) if values is not None else [None] * len(Z)
        told = [
            f"reward Z {Z[t]:.2f}, standardised {Zs[t]:+.2f} · KL to sft {KL[t]:+.3f} nats (k1)"
            + f" · baseline V {V[t] or 0:+.2f}" * (V[t] is not None)
            + f" · advantage {A[t]:+.2f} · ratio {R[t]:.3f}"
            + ", clipped" * (name == "ppo" and (R[t] - 1) * A[t] > s.cfg.clip * abs(A[t]))
            for t in range(len(Z))
        ]
        error = data.error_places(tokenizer, rows[i]["prompt"], [data.Example([], s.answers[i])])[0]
        verdict = "right" if s.correct[i] else "wrong"
        out.append(
            f"<div><h3 class='prompt'>{escape(rows[i]['prompt'])}</h3>"
            + answer_html(
                f"{verdict} answer", texts(tokenizer, s.answers[i]), {"reward": Zs, "adv.": A}, told, error
            )
            + "</div>"
        )
    return "".join(out) + "</div>"


# ------------------------------------------------------------------------------------------------ 4. learning curves


CHARTS = (  # stages that share the quantity, x axis, key in metrics.jsonl, label with its unit, range where it is a share
    (("sft",), "step", "loss", "sft: loss (nats per token)", None),
    (("rm",), "step", "loss", "rm: loss (nats per pair)", None),
    (("rm",), "step", "pair_accuracy", "rm: pair accuracy of the batch (share)", (0, 1)),
    (("reinforce", "ppo"), "trajectories", "pass@1", "pass@1, greedy, held-out (share)", (0, 1)),
    (("reinforce", "ppo"), "trajectories", "reward", "reward: mean raw Z (per token)", None),
    (("reinforce", "ppo"), "trajectories", "kl_k1", "KL to sft, k1 (nats per token)", None),
    (("reinforce", "ppo"), "trajectories", "entropy", "entropy (nats per token)", None),
    (("reinforce", "ppo"), "trajectories", "response_length", "response length (tokens)", None),
)


def curves(stages):
    absent = [name for name, stage in stages.items() if not stage.rows]
    out = [missing(f"the curves of {', '.join(absent)}: no metrics.jsonl.")] if absent else []
    charts, start = [], stages["sft"].eval.get("pass@1")
    for names, x, key, label, y_range in CHARTS:
        series = {name: points(stages[name].rows, x, key) for name in names if stages[name].rows}
        level = ("sft", start) if key == "pass@1" and is_number(start) else None
        charts += (
            [
                line_chart(
                    label, {"step": "step (updates)"}.get(x, "trajectories sampled"), series, y_range, level
                )
            ]
            if series
            else []
        )
    if charts:
        out.append(
            f"<div class='charts'>{''.join(charts)}</div><p class='note'>Faint: every step; bold over it: mean of the last 25 steps. The dotted "
            "sft line is the pass@1 of its eval.json. A reward that rises while pass@1 falls is a reward model being exploited.</p>"
        )
    return "".join(out)


# ------------------------------------------------------------------------------------------------ 6. how it was made


def command(config):
    """The command that a resolved config stands for: every field is a flag; "" and False are said by leaving it out."""
    words = [
        f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}"
        for name, value in config.items()
        if value is not False and value != ""
    ]
    return " ".join(["python train.py", *words])


def making(run, stages):
    rows, details = [], []
    for name, stage in stages.items():
        config = {"stage": name} | (stage.run.get("config") or {})
        logged = f"{len(stage.rows)}{', unfinished' * stage.unfinished}"
        rows.append(
            [
                name,
                *(escape(str(config.get(key, "–"))) for key in ("seed", "steps", "lr", "batch_size")),
                logged,
            ]
        )
        details.append(
            f"<details><summary>{name}, torch {escape(str(stage.run.get('torch', '?')))}</summary><code>{escape(command(config))}</code></details>"
            if len(config) > 1
            else missing(f"the config of {name}: no run.json.")
        )
    again = f"python train.py --stage eval --run {shlex.quote(str(run))}\npython classroom/report.py {shlex.quote(str(run))}"
    return (
        table("Settings of each stage", ["stage", "seed", "steps", "lr", "batch", "logged"], rows)
        + "<p>Curves are the lines of each stage's metrics.jsonl, made by these "
        f"commands, in which every setting is resolved:</p>{''.join(details)}<p>The tables of section 1 are the eval.json files; sections 2, 3 and 5 "
        f"were computed for this page from the models and pairs-heldout.jsonl in {escape(run.name)}:</p><code>{escape(again)}</code>"
    )


# ------------------------------------------------------------------------------------------------ the page


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #5b6470; --rule: #d5dae0;
  --blue: #0b62a8; --orange: #b45309; --pos: 90 165 235; --neg: 245 160 70 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebef; --paper: #14171b; --soft: #a3adb8; --rule: #3a424c;
  --blue: #6cb6ff; --orange: #ffa657; --pos: 30 105 185; --neg: 160 84 10 } }
* { box-sizing: border-box } html { scroll-padding-bottom: 7rem }
body { max-width: 1120px; margin: 0 auto; padding: 1rem 1rem 7rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--rule) }
a { color: var(--blue) } nav ul { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem } nav a { display: block; padding: .2rem 0 }
.note, .missing, .answer > p { color: var(--soft); font-size: .9rem } .answer > p { flex-basis: 100%; margin: 0 }
.missing { border-left: 4px solid var(--rule); padding-left: .6rem }
.wide { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; overflow-wrap: normal }
caption { text-align: left; font-weight: 600; font-size: .9rem } th { font-size: .95rem }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule) }
@media (max-width: 480px) { th, td { padding-right: .35rem; font-size: .85rem } .line { --token: 2.4rem } }
td { font-variant-numeric: tabular-nums } th small { font-weight: 400 } th small, td small { color: var(--soft) } small { font-size: .8rem } td small { white-space: nowrap }
.charts, .pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1.2rem }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) } .pair > * { min-width: 0 }
svg { width: 100%; max-width: 480px; font: 12px system-ui, sans-serif; fill: currentColor } .title { font-weight: 600; font-size: 13px }
polyline, .line0, .line1, .line2 { fill: none; stroke-width: 2 } .line0 { stroke: var(--blue) } .line1 { stroke: var(--orange); stroke-dasharray: 6 3 }
.line2 { stroke: var(--ink); stroke-dasharray: 2 2 } .dot0 { fill: var(--blue) } .dot1 { fill: var(--orange) } .dot2 { fill: var(--ink) }
.bar.bar { fill-opacity: .75; stroke: none } .bar.line0 { fill: var(--blue) } .bar.line1 { fill: var(--orange) } .bar.line2 { fill: var(--ink) }
.grid { stroke: var(--rule) } .level { stroke: var(--soft); stroke-dasharray: 2 3 } .faint { opacity: .35; stroke-width: 1 }
.prompt { margin: 1.2rem 0 .4rem; padding-top: .6rem; border-top: 1px solid var(--rule); font-size: 1rem; unicode-bidi: isolate }
.answer { display: flex; flex-wrap: wrap; gap: .5rem .9rem; align-content: start } .line { display: flex; flex-wrap: wrap; gap: 2px }
.names, .token { display: inline-flex; flex-direction: column; min-width: var(--token, 2rem); text-align: center; border-radius: 4px } .names { text-align: right; margin-right: 3px }
.token b, .names b { min-height: 1.3rem; padding: 0 2px; font: 1rem/1.3 ui-monospace, monospace; white-space: pre; unicode-bidi: isolate }
.token small, .names small { font-size: .72rem; line-height: 1.15rem; font-variant-numeric: tabular-nums } .names small { color: var(--soft) }
.pos { background: rgb(var(--pos) / var(--a)) } .neg { background: rgb(var(--neg) / var(--a)) }
.wrong { outline: 2px solid var(--ink) } .wrong > b { text-decoration: underline 2px; font-weight: 700 } .token:focus-visible { outline: 3px dashed var(--ink) }
.token:is(:hover, :focus)::after { content: attr(aria-label); position: fixed; inset: auto 0 0 0; z-index: 1; padding: .6rem 1rem;
  background: var(--ink); color: var(--paper); text-align: left; white-space: pre-wrap } .token:hover::after { z-index: 2 }
.key { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center } .key small { padding: 0 .4rem; border-radius: 3px } .key .wrong { padding: 0 .3rem }
code { display: block; white-space: pre-wrap; font-size: .85rem; margin: .4rem 0 } summary { cursor: pointer; padding: .3rem 0 }
"""

# One Tab stop an answer; the arrow keys go from token to token, Escape leaves it.
SCRIPT = """
for (const answer of document.querySelectorAll('.answer')) {
  const tokens = [...answer.querySelectorAll('.token')], focus = i => tokens.forEach((token, j) => token.tabIndex = i == j ? 0 : -1);
  focus(0);
  tokens.forEach((token, i) => token.onkeydown = event => {
    const next = i + ({ArrowRight: 1, ArrowLeft: -1}[event.key] || 0);
    if (event.key == 'Escape') token.blur();
    if (next != i && tokens[next]) { event.preventDefault(); focus(next); tokens[next].focus(); }
  });
}
"""


def write_report(run_dir):
    """Draws <run_dir>/report.html and returns its path; BadInput if there is no such directory."""
    run = Path(run_dir)
    if not run.is_dir():
        raise files.BadInput(f"{run}: no such directory; expected what was --run of train.py")
    stages = {name: read_stage(run / name) for name in ("sft", "rm", "reinforce", "ppo")}
    judges = {"rm": stages["rm"]} | {
        path.name: read_stage(path) for path in sorted(run.glob("rm-*")) if path.suffix == ""
    }
    samples = functools.cache(lambda: sample(run, stages))
    sections = {
        "Before and after": headline(stages, judges),
        "Token credit": attempt(
            "token credit, which needs the reward model and pairs-heldout.jsonl of the built-in task",
            lambda: credit(run),
        ),
        "Rewards before and after RL": attempt(
            "the rewards of sampled tokens, which need sft, rm, and reinforce or ppo",
            lambda: distributions(*samples()),
        ),
        "Learning curves": curves(stages),
        "One update, token by token": attempt(
            "the update, which needs sft, rm, and reinforce or ppo", lambda: inspector(run, *samples())
        ),
        "How each figure was made": making(run, stages),
    }
    links = "".join(f"<li><a href='#s{i}'>{i}. {title}</a></li>" for i, title in enumerate(sections, 1))
    body = "".join(
        f"<section aria-labelledby='s{i}'><h2 id='s{i}'>{i}. {title}</h2>{html}</section>"
        for i, (title, html) in enumerate(sections.items(), 1)
    )
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>Q-RM report: {escape(run.name)}</title><style>{STYLE}</style></head><body><header><h1>Q-RM: token rewards learned from pairs of answers</h1>"
        "<p>A small policy answers word problems, a reward model learns from pairs of its right and wrong answers what each token is worth (Z), "
        f"and REINFORCE and PPO train the policy on that alone.</p><nav aria-label='Contents'><ul>{links}</ul></nav></header><main>{body}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )
    path, temporary = run / "report.html", run / "report.html.partial"
    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(path)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python classroom/report.py RUN_DIR")
    try:
        print(write_report(sys.argv[1]))
    except files.BadInput as e:
        print(e, file=sys.stderr)
        sys.exit(2)
