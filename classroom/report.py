"""Draws <run>/report.html: what a run of the built-in task learned, on one page that needs no network.

    python classroom/report.py runs/arith

Reads the files of the stages: metrics.jsonl, eval.json and run.json of each, pairs-heldout.jsonl, the models.
Missing parts are left out with one line that says so, so a run that stopped half-way gives a page too.

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
from reinforce import Rollout, collect_rollout, minibatches, reinforce_advantages, reinforce_step, standardize
from support import evaluate, files, graders, settings, tokenizers

EXAMPLES = 3  # prompts shown token by token
PAIRS = 400  # held-out pairs in the averages
SAMPLED = 128  # answers sampled from each policy
FULL_COLOUR = 2.5  # standard deviations at which a token reaches its full colour
POLICIES = ("sft", "reinforce", "ppo")
JUDGES = {"rm": "Q-RM", "rm-dpo": "DPO", "rm-orm": "outcome", "rm-prm": "step"}  # token rewards to compare
# What a section may meet: files not there yet, cut off, of a diverged run, or not of the built-in task.
UNUSABLE = (OSError, ValueError, LookupError, TypeError, RuntimeError)

# -------------------------------------------------------------------------------- what a run left


class Stage(NamedTuple):
    rows: list  # metrics.jsonl
    run: dict  # run.json; for an unfinished stage the config in its checkpoint, if it wrote one
    eval: dict  # eval.json
    unfinished: bool  # only <stage>.partial is there


def read_json(path):
    """The object in a JSON file; {} if there is none or it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def read_stage(directory):
    partial = directory.with_name(directory.name + ".partial")
    unfinished = partial.exists() and not directory.exists()
    home = partial if unfinished else directory
    metrics = home / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8", errors="replace").split("\n") if metrics.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # the end of the file, or a line that a crash cut off
            continue
    run = read_json(home / "run.json") or read_json(home / "state" / "state.json")
    return Stage(rows, run, read_json(home / "eval.json"), unfinished)


def is_model(directory):
    return (directory / "config.json").exists()


def is_number(value):
    """False for the NaN and infinity of a diverged run, too."""
    return isinstance(value, (int, float)) and abs(value) < 1e15


def points(rows, x, y):
    return [(row[x], row[y]) for row in rows if is_number(row.get(x)) and is_number(row.get(y))]


# -------------------------------------------------------------------------------- pieces of a page


def missing(text):
    return f"<p class='missing'>Left out: {escape(text)}</p>"


def attempt(what, draw):
    """The result of draw(), or a line that says why there is none."""
    try:
        return draw()
    except UNUSABLE as e:
        return missing(f"{what} ({e}).")


def share(value, n=None):
    """0.512, with one binomial standard error if it is a share of n independent prompts."""
    if not is_number(value):
        return "–"
    if not is_number(n) or n <= 0:
        return f"{value:.3f}"
    error = math.sqrt(max(value * (1 - value), 0) / n)
    return f"{value:.3f} <small>± {error:.3f}</small>"


def table(caption, head, rows):
    """caption, head: texts; rows: lists of HTML, the first cell of each names its row."""
    titles = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    body = ""
    for name, *cells in rows:
        body += f"<tr><th scope='row'>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return (
        f"<div class='wide' tabindex='0' role='region' aria-label='{escape(caption)}'>"
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def ticks(low, high):
    """Up to six numbers within [low, high], 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= (high - low) / 5.001)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def smooth(line, n=25):
    """Mean of the last n values, starting at the n-th."""
    return [(line[i][0], sum(y for _, y in line[i - n + 1 : i + 1]) / n) for i in range(n - 1, len(line))]


# The shapes that mark the points of the first, second and third line, around a point at (x, y).
MARKERS = (
    "M{:.1f} {:.1f}m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
    "M{:.1f} {:.1f}m-3.5 -3.5h7v7h-7z",
    "M{:.1f} {:.1f}m0 -5l5 5l-5 5l-5 -5z",
)


def chart_scales(series, y_range):
    """-> X, Y (functions from data to SVG units), the x range, the y range shown"""
    xs, ys = zip(*(point for line in series.values() for point in line))
    left, right = min(0, *xs), max(1, *xs)
    low, high = y_range or (min(ys), max(ys))
    pad = 0 if y_range else 0.06 * (high - low) or 0.1 * max(abs(high), 1)

    def X(x):
        return 48 + 300 * (x - left) / (right - left)

    def Y(y):
        return 190 - 146 * (y - low + pad) / (high - low + 2 * pad)

    return X, Y, (left, right), (low - pad, high + pad)


def legend(keys):
    """keys: [(class of a line, its marker, name)]"""
    out = []
    at = 48
    for line_class, marker, name in keys:
        line = f"<path class='{line_class}' d='M0 0H24'/>{marker}<text x='29' y='4'>{escape(name)}</text>"
        out.append(f"<g transform='translate({at:.0f} 30)'>{line}</g>")
        at += 42 + 6.8 * len(name)
    return out


def spoken(series):
    """The first and the last point of each line, for those who cannot see the chart."""
    told = []
    for name, line in series.items():
        (x0, y0), (x1, y1) = line[0], line[-1]
        told.append(f"{name}: {y0:.4g} at {x0:g}, {y1:.4g} at {x1:g}")
    return "; ".join(told)


def line_chart(y_label, x_label, series, y_range=None, level=None, mark=None, bars=False):
    """An SVG line chart, 360 units wide so that its letters keep their size on a phone.

    series   {name: [(x, y)]}; a line of more than 100 points is drawn faint, with its running mean on top
    level    (name, y) of a horizontal line to compare with
    mark     x of a vertical line
    bars     the lines are outlines, to be filled
    """
    series = {name: line for name, line in series.items() if line}
    if not series:
        return missing(f"{y_label}: nothing was logged.")
    X, Y, x_range, y_shown = chart_scales(series, y_range)

    def path(line):
        return " ".join(f"{X(x):.1f},{Y(y):.1f}" for x, y in line)

    out = [f"<text class='title' x='4' y='15'>{escape(y_label)}</text>"]
    out.append(f"<text x='198' y='226' text-anchor='middle'>{escape(x_label)}</text>")
    for y in ticks(*y_shown):
        out.append(f"<path class='grid' d='M48 {Y(y):.1f}H348'/>")
        out.append(f"<text x='42' y='{Y(y) + 4:.1f}' text-anchor='end'>{y:.4g}</text>")
    for x in ticks(*x_range):
        out.append(f"<text x='{X(x):.1f}' y='208' text-anchor='middle'>{x:.6g}</text>")
    if mark is not None:
        out.append(f"<path class='level' d='M{X(mark):.1f} 44V190'/>")
    keys = []
    for i, (name, line) in enumerate(series.items()):
        shape = " faint" if len(line) > 100 else " bar" * bars
        out.append(f"<polyline class='line{i}{shape}' points='{path(line)}'/>")
        if len(line) > 100:
            out.append(f"<polyline class='line{i}' points='{path(smooth(line))}'/>")
        elif len(line) <= 40:
            for x, y in line:
                told = f"<title>{escape(name)}: {x:g}, {y:.4g}</title>"
                out.append(f"<path class='dot{i}' d='{MARKERS[i].format(X(x), Y(y))}'>{told}</path>")
        keys.append((f"line{i}", f"<path class='dot{i}' d='{MARKERS[i].format(12, 0)}'/>", name))
    if level:
        out.append(f"<path class='level' d='M48 {Y(level[1]):.1f}H348'/>")
        keys.append(("level", "", level[0]))
    if len(keys) > 1:
        out += legend(keys)
    told = escape(f"{y_label} against {x_label}. {spoken(series)}")
    return f"<svg viewBox='0 0 360 234' role='img' aria-label='{told}'>{''.join(out)}</svg>"


# -------------------------------------------------------------------------------- 1. before and after


MEASURES = {  # of a reward model, in its eval.json
    "pair_accuracy": "held-out pairs whose right answer scores higher; chance 0.5",
    "length_baseline": "the same when the shorter answer is preferred",
    "error_auc": "chance that the first wrong token scores below a token before it; blind 0.5",
    "first_error_choice": "at the first wrong token, the right one scores higher; chance 0.5",
    "first_error_hit": "wrong answers whose largest drop is at the first wrong token",
}


def policies_table(policies):
    """policies: {name: its eval.json}"""
    results = list(policies.values())
    prompts = [r.get("n_prompts") for r in results]
    rows = [["pass@1, greedy", *(share(r.get("pass@1"), n) for r, n in zip(results, prompts))]]
    counts = sorted({k for r in results for k in r.get("pass@k", {})}, key=int)
    for k in counts[-1:]:
        rows.append([f"pass@{escape(k)}", *(share(r.get("pass@k", {}).get(k)) for r in results)])
        rows.append(
            [f"best of {escape(k)}", *(share(r.get("best_of_k"), n) for r, n in zip(results, prompts))]
        )
    rows.append(["held-out prompts", *(escape(str(r.get("n_prompts", "–"))) for r in results)])
    note = (
        "<p class='note'>sft is the policy before reinforcement learning. pass@k: at least one of k samples "
        "is right. Best of k: the sample with the highest mean Z is right. ± is one standard error over the "
        "prompts of this one run; another seed can move a figure by more.</p>"
    )
    return table("Policies on held-out prompts", ["policy", *policies], rows) + note


def judges_table(judged):
    """judged: {name of a reward model: its eval.json}"""
    results = list(judged.values())
    rows = []
    for key, text in MEASURES.items():
        rows.append([f"{key}<br><small>{text}</small>", *(share(r.get(key)) for r in results)])
    rows.append(["held-out pairs", *(escape(str(r.get("n_pairs", "–"))) for r in results)])
    return table("Reward models on held-out pairs", ["reward model", *judged], rows)


def headline(stages, judges):
    policies = {name: stages[name].eval for name in POLICIES}
    judged = {name: stage.eval for name, stage in judges.items()}
    absent = [name for name, result in (policies | judged).items() if not result]
    policies = {name: result for name, result in policies.items() if result}
    judged = {name: result for name, result in judged.items() if result}
    out = []
    if absent:
        out.append(missing(f"{', '.join(absent)}: no eval.json (python train.py --stage eval writes it)."))
    if policies:
        out.append(policies_table(policies))
    if judged:
        out.append(judges_table(judged))
    return "".join(out)


# -------------------------------------------------------------------------------- 2. token credit


class Answer(NamedTuple):
    ids: list  # response tokens, stop token included
    error: int  # index of the first token that departs from the one right answer; len(ids) if none
    z: dict  # {reward model: raw reward of each token, None where it gives none}
    z_std: dict  # the same, standardised over all rewards that this model gave to these pairs


class ScoredPair(NamedTuple):
    prompt: str
    right: Answer
    wrong: Answer


def where_spoken(numbers, spoken):
    return [x if said else None for x, said in zip(numbers.tolist(), spoken.tolist())]


@torch.no_grad()
def score_pairs(run):
    """Scores the first PAIRS of pairs-heldout.jsonl with each reward model.

    -> tokenizer, {directory: label} of the models that are there, [ScoredPair]
    """
    tokenizer = tokenizers.Tokenizer.load(run / "rm")
    judges = {name: label for name, label in JUDGES.items() if is_model(run / name)}
    rows = data.load_rows(run / "pairs-heldout.jsonl", ("prompt", "chosen", "rejected"), PAIRS)
    pairs, rows = data.encode(rows, tokenizer, 1024, ("chosen", "rejected"), log=lambda text: None)
    examples = [example for pair in pairs for example in pair]
    ids, mask = data.collate(examples)  # (2P, T+1), (2P, T)
    answers = []
    for j, example in enumerate(examples):
        error = data.error_places(tokenizer, rows[j // 2]["prompt"], [example])[0]
        answers.append(Answer(example.response_ids, error, {}, {}))
    for name in judges:
        reward = evaluate.load_reward(
            evaluate.reward_name(run / name), run / name, tokenizer, settings.Config(), Grid()
        )
        scores = torch.cat([reward.rewards(*part) for part in zip(ids.split(64), mask.split(64))])  # (2P, T)
        spoken = reward.speaks(ids, mask)
        scaled = standardize(scores, spoken, "mean_std", Grid())  # (2P, T), as REINFORCE does with a rollout
        for answer, raw, std, said, m in zip(answers, scores, scaled, spoken, mask):
            answer.z[name] = where_spoken(raw[m], said[m])
            answer.z_std[name] = where_spoken(std[m], said[m])
    scored = [ScoredPair(row["prompt"], *two) for row, *two in zip(rows, answers[0::2], answers[1::2])]
    return tokenizer, judges, scored


HOW = "Point at a token, touch it, or use Tab and the arrow keys, for all its numbers."
KEY = (
    "<p class='key'><small class='pos' style='--a:.8'>+2.0 blue</small> above the mean "
    "<small class='neg' style='--a:.8'>-2.0 orange</small> below it "
    "<span class='wrong'><b>✗7</b></span> first wrong token <small>·</small> no reward</p>"
)


def cell(number):
    """A standardised number on its colour; a dot where there is none."""
    if number is None:
        return "<small>·</small>"
    sign = "pos" if number >= 0 else "neg"
    strength = min(abs(number) / FULL_COLOUR, 1)
    return f"<small class='{sign}' style='--a:{strength:.2f}'>{number:+.1f}</small>"


def answer_html(title, tokens, rows, told, error):
    """An answer, one row of columns per line of it: the token, and below it one number from each of `rows`.

    tokens   texts
    rows     {name: [standardised number of each token, or None]}
    told     what a column says when it is pointed at, focused or touched
    error    index of the first wrong token
    """
    labels = "".join(f"<small>{escape(name)}</small>" for name in rows)
    names = f"<span class='names' aria-hidden='true'><b></b>{labels}</span>"
    lines = [""]
    for i, text in enumerate(tokens):
        shown = text.replace("\n", "↵")
        classes, label = "token", f"{text!r}: {told[i]}"
        if i == error:
            shown, classes, label = f"✗{shown}", "token wrong", f"{text!r}, the first wrong token: {told[i]}"
        numbers = "".join(cell(row[i]) for row in rows.values())
        lines[-1] += (
            f"<span class='{classes}' tabindex='0' role='img' aria-label='{escape(label)}'>"
            f"<b>{escape(shown)}</b>{numbers}</span>"
        )
        if "\n" in text:
            lines.append("")
    body = "".join(f"<div class='line'>{names}{line}</div>" for line in lines if line)
    return f"<div class='answer' role='group' aria-label='{escape(title)}'><p>{escape(title)}</p>{body}</div>"


def texts(tokenizer, ids):
    return ["stop" if id in tokenizer.stop_ids else text for id, text in zip(ids, tokenizer.token_texts(ids))]


def mean_cell(values, show):
    """show(mean of the values) with their number; a dash if there are none"""
    return f"{show(statistics.fmean(values))}<br><small>n {len(values)}</small>" if values else "–"


def signed(mean):
    return f"{mean:+.2f}"


def percent(share):
    return f"{100 * share:.0f} %"


def right_above_wrong(twins, name):
    """[whether a reward model scores the right token above the first wrong one in the same state]"""
    votes = []
    for right, wrong in twins:
        a, b = right.z_std[name][wrong.error], wrong.z_std[name][wrong.error]
        if a is not None and b is not None:
            votes.append(a > b)
    return votes


def around_the_error(twins):
    """{"right answer", "wrong answer": [(tokens from the first wrong token, mean standardised Z of Q-RM)]}"""
    around = {"right answer": {}, "wrong answer": {}}
    for right, wrong in twins:
        for places, answer in zip(around.values(), (right, wrong)):
            for t in range(max(0, wrong.error - 8), min(len(answer.ids), wrong.error + 9)):
                places.setdefault(t - wrong.error, []).append(answer.z_std["rm"][t])
    series = {}
    for name, places in around.items():
        common = {t: z for t, z in sorted(places.items()) if len(z) >= len(twins) / 5}
        series[name] = [(t, statistics.fmean(z)) for t, z in common.items()]
    return series


def profile(scored, judges):
    """Mean standardised reward before, at and after the first error, and Q-RM's token by token around it."""
    right = [pair.right for pair in scored]
    wrong = [pair.wrong for pair in scored if pair.wrong.error < len(pair.wrong.ids)]
    twins = []  # the same tokens up to wrong.error, and the right answer still right there
    for pair in scored:
        if pair.wrong.error < min(len(pair.wrong.ids), pair.right.error):
            twins.append((pair.right, pair.wrong))
    places = {
        "right answers": (right, lambda a: slice(None)),
        "wrong ones, before the first error": (wrong, lambda a: slice(a.error)),
        "at the first wrong token": (wrong, lambda a: slice(a.error, a.error + 1)),
        "after it": (wrong, lambda a: slice(a.error + 1, None)),
    }
    rows = []
    for place, (answers, where) in places.items():
        row = [place]
        for name in judges:
            said = [z for a in answers for z in a.z_std[name][where(a)] if z is not None]
            row.append(mean_cell(said, signed))
        rows.append(row)
    same_state = "same state: right token above the wrong one<br><small>blind: 50 %</small>"
    rows.append([same_state, *(mean_cell(right_above_wrong(twins, name), percent) for name in judges)])
    chart = line_chart(
        "Q-RM: mean Z (standard deviations)",
        "tokens from the first wrong token",
        around_the_error(twins),
        mark=0,
    )
    head = ["response tokens", *judges.values()]
    return f"<div class='pair'>{table('Mean standardised reward', head, rows)}{chart}</div>"


def told_of_token(answer, judges, i):
    """What all reward models say about token i."""
    parts = []
    for name, label in judges.items():
        z, z_std = answer.z[name][i], answer.z_std[name][i]
        parts.append(f"{label} " + ("silent" if z is None else f"{z:.2f}, standardised {z_std:+.2f}"))
    return " · ".join(parts)


def credit(run):
    out = []
    for name, label in JUDGES.items():
        if name != "rm" and not is_model(run / name):
            make = f"python train.py --stage rm --run_dir {shlex.quote(str(run))} --reward {name[3:]}"
            make += " --beta 0.1" if label == "DPO" else ""
            out.append(missing(f"{label}. It is made by: {make}"))
    tokenizer, judges, scored = score_pairs(run)
    shown = {}
    for pair in scored:
        shown.setdefault(pair.prompt, pair)
    out.append(
        "<p>Every response token of held-out answers, and below it the reward that each model gives RL for "
        "it: Q-RM and DPO reward every token, the step model the end of a line, the outcome model the last "
        f"token. Each is standardised over all its rewards for {len(scored)} pairs. These are the first "
        f"{min(EXAMPLES, len(shown))} prompts of the file, not a selection. {HOW}</p>{KEY}<p>For Q-RM, "
        "theory predicts a step down at the first wrong token, not one low token: all that follows "
        "continues a wrong answer.</p>"
    )
    for prompt, pair in list(shown.items())[:EXAMPLES]:
        out.append(f"<h3 class='prompt'>{escape(prompt)}</h3><div class='pair'>")
        for title, answer in (("right answer", pair.right), ("wrong answer", pair.wrong)):
            told = [told_of_token(answer, judges, i) for i in range(len(answer.ids))]
            rows = {label: answer.z_std[name] for name, label in judges.items()}
            out.append(answer_html(title, texts(tokenizer, answer.ids), rows, told, answer.error))
        out.append("</div>")
    return "".join(out) + f"<h3>Averages over {len(scored)} held-out pairs</h3>{profile(scored, judges)}"


# -------------------------------------------------------------------------------- 3. before and after RL


class Sampled(NamedTuple):
    cfg: settings.Config  # of the run, with a rollout of SAMPLED trajectories
    policy: LanguageModel
    rollout: Rollout
    answers: list  # response ids of each row
    correct: list  # of bool


def config_of(name, stage):
    """The run's own RL settings, with one rollout of SAMPLED trajectories cut into as many minibatches."""
    known = settings.FIELDS
    own = {}
    if name != "sft":
        own = {key: value for key, value in stage.run.get("config", {}).items() if key in known}
    cfg = settings.Config(**{**settings.ARITH["ppo"], **own, "stage": name, "group_size": 1, "data": ""})
    if name != "sft" and (cfg.reward != "qrm" or cfg.advantage not in ("", "token") or cfg.reward_model):
        raise ValueError(f"{name} was trained on another reward")
    n_minibatches = len(minibatches([], cfg))
    return dataclasses.replace(cfg, batch_size=SAMPLED, minibatch=max(SAMPLED // n_minibatches, 1))


def sample(run, stages):
    """One rollout of each policy on the same held-out prompts, scored by <run>/rm.

    -> tokenizer, rows, {policy: Sampled}
    """
    tokenizer = tokenizers.Tokenizer.load(run / "sft")
    reference = load_model(LanguageModel, run / "sft", Grid())
    reward = evaluate.load_reward(
        evaluate.reward_name(run / "rm"), run / "rm", tokenizer, settings.Config(), Grid()
    )
    rows = data.arith_rows("test", SAMPLED, 1)
    found = {}
    for name in POLICIES:
        if not is_model(run / name):
            continue
        cfg = config_of(name, stages[name])
        policy = load_model(LanguageModel, run / name, Grid())
        seed = evaluate.hash_seed("report", name)
        prompts = encode_prompts(rows, tokenizer, "built-in task")
        rollout = collect_rollout(policy, reference, reward, prompts, tokenizer.stop_ids, cfg, seed)
        answers = [ids[1:][mask].tolist() for ids, mask in zip(rollout.ids, rollout.response_mask)]
        correct = []
        for ids, row in zip(answers, rows):
            text = tokenizer.decode([t for t in ids if t not in tokenizer.stop_ids])
            correct.append(graders.grade(text, row["label"], "arith")[1])
        found[name] = Sampled(cfg, policy, rollout, answers, correct)
    if len(found) < 2:
        raise ValueError("neither reinforce nor ppo is there")
    return tokenizer, rows, found


def histogram(values, low, high, place, places, bins=12):
    """The outline of a histogram as [(x, share of the values)]: one bar per bin, the `place`-th of `places`
    in it.
    """
    shares = (torch.histc(values, bins, low, high) / len(values)).tolist()
    width = (high - low) / bins
    outline = []
    for i, share in enumerate(shares):
        left = low + width * (i + 0.1 + 0.8 * place / places)
        right = low + width * (i + 0.1 + 0.8 * (place + 1) / places)
        outline += [(left, 0), (left, share), (right, share), (right, 0)]
    return outline


def distributions(tokenizer, rows, found):
    z = {name: s.rollout.scores[s.rollout.reward_mask] for name, s in found.items()}
    low, high = (x.item() for x in torch.cat([*z.values()]).aminmax())
    if high <= low:
        low, high = low - 1, low + 1
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
    bars = {name: histogram(x, low, high, i, len(z)) for i, (name, x) in enumerate(z.items())}
    chart = line_chart("share of the response tokens", "raw Z of a token", bars, bars=True)
    question = (
        f"<p>{SAMPLED} held-out prompts, one sampled answer of each policy, every response token scored by "
        "the same Q-RM: where does its reward lie before RL (sft) and after it?</p>"
    )
    note = (
        "<p class='note'>Better answers move the mass to the right. Mass that moves while the share of right "
        "answers does not is a reward model being exploited; a rising mean Z of wrong answers can be that, "
        "or errors that come later in the answer.</p>"
    )
    rows = [[name, *cells] for name, cells in lines.items()]
    figures = table("Rewards of sampled tokens", ["policy", *found], rows)
    return f"{question}<div class='pair'>{figures}{chart}</div>{note}"


class UpdateSeen(NamedTuple):
    z_std: torch.Tensor  # (B, T), like the others
    values: torch.Tensor | None  # V(s_t); None for reinforce, which has no critic
    advantages: torch.Tensor
    ratio: torch.Tensor  # of each token's probability, new over old


def one_update(run, name, sampled):
    """What train.py would do next with these answers, with a fresh optimizer."""
    cfg, policy, rollout = sampled.cfg, sampled.policy, sampled.rollout
    values = None
    optimizer = Optimizer(policy, policy.grid, cfg.lr, max_grad_norm=cfg.max_grad_norm)
    if name == "ppo":
        critic = load_model(ScalarModel, run / "ppo" / "critic", policy.grid)
        critic_optimizer = Optimizer(critic, policy.grid, cfg.critic_lr)
        with torch.no_grad():
            values = state_values(critic, rollout.ids, rollout.response_mask)
        weights, _ = ppo_advantages(rollout, values, cfg, policy.grid)
        ppo_step(policy, critic, optimizer, critic_optimizer, rollout, cfg, cfg.lr, cfg.critic_lr)
    else:
        weights = reinforce_advantages(rollout, cfg, policy.grid)
        reinforce_step(policy, optimizer, rollout, cfg, cfg.lr)
    with torch.no_grad():
        logprobs = token_logprobs(policy, rollout.ids, rollout.response_mask, cfg.temperature)[0]
    z_std = standardize(rollout.scores, rollout.reward_mask, cfg.standardize, policy.grid)
    return UpdateSeen(z_std, values, weights, (logprobs - rollout.old_logprobs).exp())


def first_of_each(correct):
    """Indices of the first EXAMPLES right and wrong answers, in order."""
    right = [i for i, is_right in enumerate(correct) if is_right][:EXAMPLES]
    wrong = [i for i, is_right in enumerate(correct) if not is_right][:EXAMPLES]
    return sorted(right + wrong)


def told_of_update(name, sampled, seen, i):
    """-> [what the update makes of each response token of answer i], {"reward", "adv.": [numbers]}"""

    def pick(x):
        return x[i][sampled.rollout.response_mask[i]].tolist()

    scores, kl = pick(sampled.rollout.scores), pick(sampled.rollout.kl_k1)
    z_std, advantage, ratio = pick(seen.z_std), pick(seen.advantages), pick(seen.ratio)
    values = pick(seen.values) if seen.values is not None else None
    clip = sampled.cfg.clip
    told = []
    for t in range(len(scores)):
        text = f"reward Z {scores[t]:.2f}, standardised {z_std[t]:+.2f} · KL to sft {kl[t]:+.3f} nats (k1)"
        if values is not None:
            text += f" · baseline V {values[t]:+.2f}"
        text += f" · advantage {advantage[t]:+.2f} · ratio {ratio[t]:.3f}"
        if name == "ppo" and (ratio[t] - 1) * advantage[t] > clip * abs(advantage[t]):
            text += ", clipped"
        told.append(text)
    return told, {"reward": z_std, "adv.": advantage}


def inspector(run, tokenizer, rows, found):
    """The answers of the last policy, token by token: reward, KL, V, advantage, and what the update makes of
    them.
    """
    name = [*found][-1]
    sampled = found[name]
    seen = one_update(run, name, sampled)
    out = [
        f"<p>What one more update of {name} does with {SAMPLED} answers that it sampled: the first "
        f"{EXAMPLES} right and wrong ones. Below each token: its standardised reward and its advantage. "
        f"{HOW} The ratio is the token's new probability over the old one after all updates of this rollout, "
        f"with a fresh optimizer; a ratio that ran out of 1 ± {sampled.cfg.clip:g} in the direction of its "
        f"advantage is clipped by PPO.</p>{KEY}<div class='pair'>"
    ]
    for i in first_of_each(sampled.correct):
        told, numbers = told_of_update(name, sampled, seen, i)
        answer = data.Example([], sampled.answers[i])
        error = data.error_places(tokenizer, rows[i]["prompt"], [answer])[0]
        title = f"{'right' if sampled.correct[i] else 'wrong'} answer"
        out.append(f"<div><h3 class='prompt'>{escape(rows[i]['prompt'])}</h3>")
        out.append(answer_html(title, texts(tokenizer, sampled.answers[i]), numbers, told, error) + "</div>")
    return "".join(out) + "</div>"


# -------------------------------------------------------------------------------- 4. learning curves


# stages that share the quantity, x axis, key in metrics.jsonl, label with its unit, range if it is a share
CHARTS = (
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
    charts = []
    start = stages["sft"].eval.get("pass@1")
    for names, x, key, label, y_range in CHARTS:
        series = {name: points(stages[name].rows, x, key) for name in names if stages[name].rows}
        level = ("sft", start) if key == "pass@1" and is_number(start) else None
        x_label = "step (updates)" if x == "step" else "trajectories sampled"
        if series:
            charts.append(line_chart(label, x_label, series, y_range, level))
    if charts:
        out.append(
            f"<div class='charts'>{''.join(charts)}</div><p class='note'>Faint: every step; bold over it: "
            "mean of the last 25 steps. The dotted sft line is the pass@1 of its eval.json. A reward that "
            "rises while pass@1 falls is a reward model being exploited.</p>"
        )
    return "".join(out)


# -------------------------------------------------------------------------------- 6. how it was made


def command(config):
    """The command of a resolved config: every field is a flag; "" and False mean that it is left out."""
    words = ["python train.py"]
    for name, value in config.items():
        if value is not False and value != "":
            words.append(f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}")
    return " ".join(words)


def making(run, stages):
    rows, details = [], []
    for name, stage in stages.items():
        config = {"stage": name} | (stage.run.get("config") or {})
        resolved = (escape(str(config.get(key, "–"))) for key in ("seed", "steps", "lr", "batch_size"))
        rows.append([name, *resolved, f"{len(stage.rows)}{', unfinished' * stage.unfinished}"])
        if len(config) > 1:
            summary = f"{name}, torch {escape(str(stage.run.get('torch', '?')))}"
            code = escape(command(config))
            details.append(f"<details><summary>{summary}</summary><code>{code}</code></details>")
        else:
            details.append(missing(f"the config of {name}: no run.json."))
    home = shlex.quote(str(run))
    again = f"python train.py --stage eval --run_dir {home}\npython classroom/report.py {home}"
    commands = (
        "<p>Curves are the lines of each stage's metrics.jsonl, made by these commands, in which every "
        f"setting is resolved:</p>{''.join(details)}"
    )
    computed = (
        "<p>The tables of section 1 are the eval.json files; sections 2, 3 and 5 were computed for this page "
        f"from the models and pairs-heldout.jsonl in {escape(run.name)}:</p><code>{escape(again)}</code>"
    )
    head = ["stage", "seed", "steps", "lr", "batch", "logged"]
    return table("Settings of each stage", head, rows) + commands + computed


# -------------------------------------------------------------------------------- the page


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #5b6470; --rule: #d5dae0;
  --blue: #0b62a8; --orange: #b45309; --pos: 90 165 235; --neg: 245 160 70 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebef; --paper: #14171b; --soft: #a3adb8;
  --rule: #3a424c;
  --blue: #6cb6ff; --orange: #ffa657; --pos: 30 105 185; --neg: 160 84 10 } }
* { box-sizing: border-box } html { scroll-padding-bottom: 7rem }
body { max-width: 1120px; margin: 0 auto; padding: 1rem 1rem 7rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--rule) }
a { color: var(--blue) }
nav ul { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem }
nav a { display: block; padding: .2rem 0 }
.note, .missing, .answer > p { color: var(--soft); font-size: .9rem }
.answer > p { flex-basis: 100%; margin: 0 }
.missing { border-left: 4px solid var(--rule); padding-left: .6rem }
.wide { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; overflow-wrap: normal }
caption { text-align: left; font-weight: 600; font-size: .9rem } th { font-size: .95rem }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule) }
@media (max-width: 480px) { th, td { padding-right: .35rem; font-size: .85rem } .line { --token: 2.4rem } }
td { font-variant-numeric: tabular-nums } th small { font-weight: 400 }
th small, td small { color: var(--soft) } small { font-size: .8rem } td small { white-space: nowrap }
.charts, .pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
  gap: 1.2rem }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) } .pair > * { min-width: 0 }
svg { width: 100%; max-width: 480px; font: 12px system-ui, sans-serif; fill: currentColor }
.title { font-weight: 600; font-size: 13px }
polyline, .line0, .line1, .line2 { fill: none; stroke-width: 2 } .line0 { stroke: var(--blue) }
.line1 { stroke: var(--orange); stroke-dasharray: 6 3 }
.line2 { stroke: var(--ink); stroke-dasharray: 2 2 } .dot0 { fill: var(--blue) } .dot1 { fill: var(--orange) }
.dot2 { fill: var(--ink) }
.bar.bar { fill-opacity: .75; stroke: none } .bar.line0 { fill: var(--blue) }
.bar.line1 { fill: var(--orange) } .bar.line2 { fill: var(--ink) }
.grid { stroke: var(--rule) } .level { stroke: var(--soft); stroke-dasharray: 2 3 }
.faint { opacity: .35; stroke-width: 1 }
.prompt { margin: 1.2rem 0 .4rem; padding-top: .6rem; border-top: 1px solid var(--rule); font-size: 1rem;
  unicode-bidi: isolate }
.answer { display: flex; flex-wrap: wrap; gap: .5rem .9rem; align-content: start }
.line { display: flex; flex-wrap: wrap; gap: 2px }
.names, .token { display: inline-flex; flex-direction: column; min-width: var(--token, 2rem);
  text-align: center; border-radius: 4px }
.names { text-align: right; margin-right: 3px }
.token b, .names b { min-height: 1.3rem; padding: 0 2px; font: 1rem/1.3 ui-monospace, monospace;
  white-space: pre; unicode-bidi: isolate }
.token small, .names small { font-size: .72rem; line-height: 1.15rem; font-variant-numeric: tabular-nums }
.names small { color: var(--soft) }
.pos { background: rgb(var(--pos) / var(--a)) } .neg { background: rgb(var(--neg) / var(--a)) }
.wrong { outline: 2px solid var(--ink) } .wrong > b { text-decoration: underline 2px; font-weight: 700 }
.token:focus-visible { outline: 3px dashed var(--ink) }
.token:is(:hover, :focus)::after { content: attr(aria-label); position: fixed; inset: auto 0 0 0;
  z-index: 1; padding: .6rem 1rem;
  background: var(--ink); color: var(--paper); text-align: left; white-space: pre-wrap }
.token:hover::after { z-index: 2 }
.key { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center }
.key small { padding: 0 .4rem; border-radius: 3px } .key .wrong { padding: 0 .3rem }
code { display: block; white-space: pre-wrap; font-size: .85rem; margin: .4rem 0 }
summary { cursor: pointer; padding: .3rem 0 }
"""

# One Tab stop an answer; the arrow keys go from token to token, Escape leaves it.
SCRIPT = """
for (const answer of document.querySelectorAll('.answer')) {
  const tokens = [...answer.querySelectorAll('.token')];
  const focus = i => tokens.forEach((token, j) => token.tabIndex = i == j ? 0 : -1);
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
        raise files.BadInput(f"{run}: no such directory; expected the --run_dir of train.py")
    stages = {name: read_stage(run / name) for name in ("sft", "rm", "reinforce", "ppo")}
    others = sorted(path for path in run.glob("rm-*") if path.suffix == "")
    judges = {"rm": stages["rm"]} | {path.name: read_stage(path) for path in others}
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
    body = ""
    for i, (title, html) in enumerate(sections.items(), 1):
        body += f"<section aria-labelledby='s{i}'><h2 id='s{i}'>{i}. {title}</h2>{html}</section>"
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>Q-RM report: {escape(run.name)}</title><style>{STYLE}</style></head>"
        "<body><header><h1>Q-RM: token rewards learned from pairs of answers</h1>"
        "<p>A small policy answers word problems, a reward model learns from pairs of its right and wrong "
        "answers what each token is worth (Z), and REINFORCE and PPO train the policy on that alone.</p>"
        f"<nav aria-label='Contents'><ul>{links}</ul></nav></header><main>{body}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )
    path = run / "report.html"
    temporary = run / "report.html.partial"
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
