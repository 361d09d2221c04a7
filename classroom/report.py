"""Draws <run>/report.html: what a run of the built-in task learned, on one page that needs no network.

    python classroom/report.py runs/arith

Reads what the stages left there: metrics.jsonl, eval.json and run.json of each, pairs-heldout.jsonl, the reward model.
What is missing is left out with one line that says so, so a run that stopped half-way gives a page too.

B sequences · T positions
"""

import json
import math
import shlex
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from model import ScalarModel, load_model
from parallel import Grid
from qrm import token_scores
from reinforce import standardize

NAMES = {"sft": "fine-tuned (sft)", "reinforce": "REINFORCE", "ppo": "PPO"}  # policies, in the order of the tables
EXAMPLES = 4  # prompts whose answers are shown token by token
FULL_COLOUR = 2.5  # |Z_std| from which a token has its full colour

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
            rows.append(json.loads(line))
        except ValueError:  # the end of the file, or a line that a crash cut off
            continue
    run = read_json(home / "run.json") or read_json(home / "state" / "state.json")
    return Stage([row for row in rows if isinstance(row, dict)], run, read_json(home / "eval.json"), unfinished)


def is_number(value):
    return isinstance(value, (int, float)) and abs(value) < 1e15  # also drops the NaN and infinity of a diverged run


def points(rows, x, y):
    return [(row[x], row[y]) for row in rows if is_number(row.get(x)) and is_number(row.get(y))]


# ------------------------------------------------------------------------------------------------ pieces of a page


def missing(text):
    return f"<p class='missing'>Left out: {escape(text)}</p>"


def share(value, n=None):
    """0.512, with one binomial standard error if it is a share of n independent prompts."""
    if not is_number(value):
        return "–"
    error = f" <small>± {math.sqrt(max(value * (1 - value), 0) / n):.3f}</small>" if is_number(n) and n > 0 else ""
    return f"{value:.3f}{error}"


def table(head, rows):
    """head: texts; rows: lists of HTML, the first cell of each names its row."""
    cells = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr><th scope='row'>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def ticks(low, high):
    """Three to six round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= (high - low) / 5.001)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def smooth(line, n=25):
    """Mean of the last n values, from the n-th on."""
    return [(line[i][0], sum(y for _, y in line[i - n + 1 : i + 1]) / n) for i in range(n - 1, len(line))]


def line_chart(y_label, x_label, series, y_range=None, level=None, mark=None):
    """An SVG line chart, 360 units wide so that its letters keep their size on a phone.

    series   {name: [(x, y)]}; a line of more than 100 points is drawn faint, with the mean of its last 25 values on top
    level    (y, name) of a horizontal line to compare with; mark: x of a vertical one
    """
    series = {name: line for name, line in series.items() if line}
    if not series:
        return missing(f"{y_label}: nothing was logged.")
    xs, ys = zip(*(point for line in series.values() for point in line))
    (left, right), (low, high) = (min(xs), max(xs)), y_range or (min(*ys, *(level or ys)[:1]), max(*ys, *(level or ys)[:1]))
    if left == right:
        left, right = left - 1, right + 1
    pad = 0 if y_range else 0.06 * (high - low) or 0.1 * max(abs(high), 1)
    low, high = low - pad, high + pad
    X, Y = lambda x: 48 + 300 * (x - left) / (right - left), lambda y: 190 - 146 * (y - low) / (high - low)
    path = lambda line: " ".join(f"{X(x):.1f},{Y(y):.1f}" for x, y in line)
    out = [f"<text class='title' x='4' y='15'>{escape(y_label)}</text><text x='198' y='226' text-anchor='middle'>{escape(x_label)}</text>"]
    for y in ticks(low, high):
        out.append(f"<path class='grid' d='M48 {Y(y):.1f}H348'/><text x='42' y='{Y(y) + 4:.1f}' text-anchor='end'>{y:.4g}</text>")
    out += [f"<text x='{X(x):.1f}' y='208' text-anchor='middle'>{x:.6g}</text>" for x in ticks(left, right)]
    if level:
        out.append(f"<path class='level' d='M48 {Y(level[0]):.1f}H348'/><text x='346' y='{Y(level[0]) - 5:.1f}' text-anchor='end'>{escape(level[1])}</text>")
    if mark is not None:
        out.append(f"<path class='level' d='M{X(mark):.1f} 44V190'/>")
    key = 48
    for i, (name, line) in enumerate(series.items()):
        dot = lambda x, y: f"M{x - 3.5:.1f} {y - 3.5:.1f}h7v7h-7z" if i else f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0"
        long = len(line) > 100
        out.append(f"<polyline class='line{i}{' faint' if long else ''}' points='{path(line)}'/>")
        if long:
            out.append(f"<polyline class='line{i}' points='{path(smooth(line))}'/>")
        elif len(line) <= 40:
            out += [f"<path class='dot{i}' d='{dot(X(x), Y(y))}'><title>{escape(name)}: {x:g}, {y:.4g}</title></path>" for x, y in line]
        if len(series) > 1:
            out.append(f"<polyline class='line{i}' points='{key},30 {key + 24},30'/><path class='dot{i}' d='{dot(key + 12, 30)}'/>")
            out.append(f"<text x='{key + 29}' y='34'>{escape(name)}</text>")
            key += 42 + 6.6 * len(name)
    spoken = "; ".join(f"{name}: from {line[0][1]:.4g} at {line[0][0]:g} to {line[-1][1]:.4g} at {line[-1][0]:g}" for name, line in series.items())
    return f"<svg viewBox='0 0 360 234' role='img' aria-label='{escape(f'{y_label} against {x_label}. {spoken}')}'>{''.join(out)}</svg>"


# ------------------------------------------------------------------------------------------------ 1. before and after


def headline(stages, judges):
    baseline = stages["sft"].eval.get("pass@1")
    rows = []
    for name, title in NAMES.items():
        result = stages[name].eval
        if not result:
            rows.append([title, "not evaluated" if stages[name].run else "not there yet"])
            continue
        n, ks = result.get("n_prompts"), result.get("pass@k") or {}
        k = max(ks, key=int, default="k")
        gain = f"{100 * (result['pass@1'] - baseline):+.1f} points" if name != "sft" and is_number(baseline) and is_number(result.get("pass@1")) else ""
        rows.append([title, share(result.get("pass@1"), n), gain, f"{share(ks.get(k))} <small>k {escape(k)}</small>", share(result.get("best_of_k"), n), escape(str(n))])
    out = "<h3>Policies</h3>"
    if any(stages[name].eval for name in NAMES):
        out += table(["policy", "pass@1, greedy", "change", "pass@k", "best of k", "prompts"], [row + [""] * (6 - len(row)) for row in rows])
        out += ("<p class='note'>Held-out prompts. pass@k: at least one of k samples is right. Best of k: of k samples, the one with the highest mean "
                "Z is right. ± is one standard error over the prompts, for this one run; another seed may move a figure by more.</p>")  # fmt: skip
    else:
        out += missing("no policy has an eval.json; python train.py --stage eval writes it.")
    judged = {name: stage.eval for name, stage in judges.items() if stage.eval}
    out += "<h3>Reward model</h3>"
    if not judged:
        return out + missing("no reward model has an eval.json; python train.py --stage eval writes it.")
    measures = {"pair_accuracy": "held-out pairs whose right answer gets the higher score; chance 0.5",
                "length_baseline": "the same, always preferring the shorter answer",
                "error_auc": "chance that the first wrong token scores below a token before it; blind 0.5",
                "first_error_hit": "wrong answers whose largest drop is at the first wrong token",
                "n_pairs": "held-out pairs"}  # fmt: skip
    shown = lambda key, value: escape(str(value)) if key == "n_pairs" else share(value)
    return out + table(["measure", *judged, "meaning"], [[key, *(shown(key, r.get(key)) for r in judged.values()), text] for key, text in measures.items()])


# ------------------------------------------------------------------------------------------------ 2. token credit


class Answer(NamedTuple):
    ids: list  # response tokens, stop token included
    error: int  # index of the first token that departs from the one right answer; len(ids) if none
    z: list  # raw Z of each
    z_std: list  # standardised over all response tokens of the held-out pairs


@torch.no_grad()
def score_pairs(run):
    """The reward model's Z on every answer of pairs-heldout.jsonl: -> tokenizer, [(prompt, right Answer, wrong Answer)]"""
    tokenizer, reward_model = data.Tokenizer.load(run / "rm"), load_model(ScalarModel, run / "rm", Grid())
    rows = data.load_rows(run / "pairs-heldout.jsonl", ("prompt", "chosen", "rejected"))
    pairs, rows = data.encode(rows, tokenizer, 1024, ("chosen", "rejected"), log=lambda text: None)
    ids, mask = data.collate([example for pair in pairs for example in pair])  # (2P, T+1), (2P, T)
    scores = torch.cat([token_scores(reward_model, part) for part in ids.split(64)])  # (2P, T)
    scaled = standardize(scores, mask, "mean_std", Grid())  # (2P, T): what REINFORCE would get
    out = []
    for i, (pair, row) in enumerate(zip(pairs, rows)):
        solution = tokenizer.encode_response(data.arith_solve(row["prompt"]))
        answers = [Answer(e.response_ids, data.first_error(e.response_ids, solution), scores[j][mask[j]].tolist(), scaled[j][mask[j]].tolist())
                   for j, e in zip((2 * i, 2 * i + 1), pair)]  # fmt: skip
        out.append((row["prompt"], *answers))
    return tokenizer, out


def token_html(text, z, z_std, is_stop, is_error):
    """One token: its colour is Z_std, its value stands below it, and the first wrong one has an outline and a mark."""
    shown = "stop" if is_stop else text.replace("\n", "↵")
    label = f"{text!r}: Z {z:.2f}, standardised {z_std:+.2f}" + (", first wrong token" if is_error else "")
    kind = f"token {'pos' if z_std >= 0 else 'neg'}{' wrong' if is_error else ''}"
    style = f"--a:{min(abs(z_std) / FULL_COLOUR, 1):.2f}"
    mark = "<b aria-hidden='true'>✗</b>" if is_error else ""
    return (f"<span class='{kind}' style='{style}' tabindex='0' role='img' title='{escape(label)}' aria-label='{escape(label)}'>"
            f"<span>{mark}{escape(shown)}</span><small>{z_std:+.1f}</small></span>")  # fmt: skip


def answer_html(title, answer, tokenizer, is_wrong):
    lines, texts = [""], tokenizer.token_texts(answer.ids)
    for i, (text, id) in enumerate(zip(texts, answer.ids)):
        lines[-1] += token_html(text, answer.z[i], answer.z_std[i], id in tokenizer.stop_ids, is_wrong and i == answer.error)
        lines += [""] * ("\n" in text)
    body = "".join(f"<div class='row'>{line}</div>" for line in lines if line)
    mean = sum(answer.z_std) / len(answer.z_std)
    return f"<div class='answer' role='group' aria-label='{title}'><p>{title}, mean {mean:+.2f}</p>{body}</div>"


def profile(scored):
    """Mean Z_std before, at and after the first error, and around it; right answers of the same prompts beside it."""
    mean = lambda values: f"{sum(values) / len(values):+.2f}" if values else "–"
    wrong = [answer for _, _, answer in scored if answer.error < len(answer.ids)]
    parts = {"right answers": [z for _, right, _ in scored for z in right.z_std],
             "wrong answers, before the first error": [z for a in wrong for z in a.z_std[: a.error]],
             "at the first wrong token": [a.z_std[a.error] for a in wrong],
             "after it": [z for a in wrong for z in a.z_std[a.error + 1 :]]}  # fmt: skip
    out = table(["response tokens", "mean Z, standardised", "tokens"], [[name, mean(values), str(len(values))] for name, values in parts.items()])
    # Both answers of a pair share all tokens before the error only if the right one is right up to there, and at it.
    twins = [(right, a) for _, right, a in scored if a.error < min(len(a.ids), right.error)]
    if not twins:
        return out
    around = {"wrong answer": {}, "right answer": {}}
    for right, a in twins:
        for name, z in (("wrong answer", a.z_std), ("right answer", right.z_std)):
            for t in range(max(0, a.error - 8), min(len(z), a.error + 9)):
                around[name].setdefault(t - a.error, []).append(z[t])
    series = {name: [(t, sum(v) / len(v)) for t, v in sorted(places.items()) if len(v) >= len(twins) / 5] for name, places in around.items()}
    better = sum(right.z_std[a.error] > a.z_std[a.error] for right, a in twins) / len(twins)
    return (f"<div class='charts'><div>{out}<p>In {len(twins)} pairs the two answers are the same up to the first wrong token. There the right token has the "
            f"higher Z in <b>{100 * better:.0f} %</b> of them (blind: 50 %).</p></div>"
            + line_chart("mean Z, standardised", "tokens from the first wrong token", series, mark=0) + "</div>")  # fmt: skip


def credit(run):
    try:
        tokenizer, scored = score_pairs(run)
    except (OSError, ValueError, LookupError, TypeError) as e:  # no reward model or pairs yet, or not the built-in task's
        return missing(f"token credit needs {run.name}/rm and pairs-heldout.jsonl of the built-in task ({e}).")
    shown = {}
    for prompt, right, wrong in scored:
        shown.setdefault(prompt, (right, wrong))
    out = ["<p>Every response token with the reward model's Z below it, standardised over all response tokens of the held-out pairs. "
           "<span class='token pos' style='--a:.8'><span>blue</span><small>+2.0</small></span> is above the mean, "
           "<span class='token neg' style='--a:.8'><span>orange</span><small>-2.0</small></span> below; "
           "<span class='token wrong'><span><b>✗</b>7</span><small>-2.0</small></span> is the first wrong token. Theory predicts a step down there, "
           "not a single low token: whatever follows continues a wrong answer. "
           f"Shown are the first {min(EXAMPLES, len(shown))} prompts of the file, not a selection. Touch a token, or use Tab and the arrow keys, for its raw Z.</p>"]  # fmt: skip
    for prompt, (right, wrong) in list(shown.items())[:EXAMPLES]:
        out.append(f"<article><p class='prompt'>{escape(prompt)}</p><div class='pair'>{answer_html('right answer', right, tokenizer, False)}"
                   f"{answer_html('wrong answer', wrong, tokenizer, True)}</div></article>")  # fmt: skip
    return "".join(out) + f"<h3>Profile over all {len(scored)} pairs</h3>{profile(scored)}"


# ------------------------------------------------------------------------------------------------ 3. learning curves


def curves(stages):
    level = stages["sft"].eval.get("pass@1")
    rl = {"pass@1": ("pass@1, greedy, held-out (share)", (0, 1)), "reward": ("reward, mean raw Z per token", None),
          "kl_k1": ("KL to the start, k1 (nats per token)", None), "entropy": ("entropy (nats per token)", None),
          "response_length": ("response length (tokens)", None)}  # fmt: skip
    out, charts = [missing(f"{name} has no metrics.jsonl.") for name, stage in stages.items() if not stage.rows], []
    for name, key, label, y_range in (("sft", "loss", "sft loss (nats per token)", None), ("rm", "loss", "reward model loss (nats per pair)", None),
                                      ("rm", "pair_accuracy", "pair accuracy of a training batch (share)", (0, 1))):  # fmt: skip
        if stages[name].rows:
            charts.append(line_chart(label, "step (updates)", {name: points(stages[name].rows, "step", key)}, y_range))
    for key, (label, y_range) in rl.items():
        series = {NAMES[name]: points(stages[name].rows, "trajectories", key) for name in ("reinforce", "ppo") if stages[name].rows}
        if series:
            reference = (level, "sft") if key == "pass@1" and is_number(level) else None
            charts.append(line_chart(label, "trajectories sampled", series, y_range, reference))
    if charts:
        out.append(f"<div class='charts'>{''.join(charts)}</div><p class='note'>Faint: each step; bold: mean of the last 25 steps. Reward that rises while "
                   "pass@1 falls is a reward model being exploited. pass@1 here uses the prompts of the training run's own evaluation.</p>")  # fmt: skip
    return "".join(out)


# ------------------------------------------------------------------------------------------------ 4. how it was made


def command(config):
    """The command line that a resolved config stands for: every field is a flag, "" and False are the absence of one."""
    words = [f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}" for name, value in config.items() if value not in ("", False) or value == 0 and value is not False]
    return " ".join(["python train.py", *words])


def making(run, stages):
    rows, details = [], []
    for name, stage in stages.items():
        config = stage.run.get("config") or {}
        done = f"{len(stage.rows)} steps logged" + (", unfinished" if stage.unfinished else "")
        rows.append([name, *(escape(str(config.get(key, "–"))) for key in ("seed", "steps", "lr", "batch_size")), done])
        if config:
            ordered = {"stage": name, **config}
            details.append(f"<details><summary>{name}: the resolved command, torch {escape(str(stage.run.get('torch', '?')))}</summary>"
                           f"<code>{escape(command(ordered))}</code></details>")  # fmt: skip
        else:
            details.append(missing(f"{name} has no run.json, so its config is unknown."))
    where = shlex.quote(str(run))
    return (table(["stage", "seed", "steps", "lr", "batch", "log"], rows) + "".join(details)
            + "<p class='note'>Curves are each stage's metrics.jsonl; the tables of section 1 are eval.json; the Z values of section 2 were computed for this page:</p>"
            + f"<code>python train.py --stage eval --run {escape(where)}\npython classroom/report.py {escape(where)}</code>")  # fmt: skip


# ------------------------------------------------------------------------------------------------ the page

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #5b6470; --rule: #d5dae0; --blue: #0b62a8; --orange: #b45309; --pos: 90 165 235; --neg: 245 160 70 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebef; --paper: #14171b; --soft: #a3adb8; --rule: #3a424c; --blue: #6cb6ff; --orange: #ffa657; --pos: 30 105 185; --neg: 170 90 10 } }
* { box-sizing: border-box }
body { max-width: 1120px; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--rule) } h3 { margin: 1.5rem 0 .5rem }
.note, .missing { color: var(--soft); font-size: .9rem } .missing { border-left: 4px solid var(--rule); padding-left: .6rem }
.wide { overflow-x: auto } table { border-collapse: collapse; overflow-wrap: normal } th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule) }
tbody th { font-weight: 600 } td { font-variant-numeric: tabular-nums }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1.2rem }
svg { width: 100%; max-width: 480px; font: 12px system-ui, sans-serif; fill: currentColor } svg .title { font-weight: 600; font-size: 13px }
.grid { stroke: var(--rule) } .level { stroke: var(--soft); stroke-dasharray: 2 3 } polyline { fill: none; stroke-width: 2 }
.line0 { stroke: var(--blue) } .line1 { stroke: var(--orange); stroke-dasharray: 6 3 } .faint { opacity: .35; stroke-width: 1 } .dot0 { fill: var(--blue) } .dot1 { fill: var(--orange) }
article { margin: 1.2rem 0; padding-top: .6rem; border-top: 1px solid var(--rule) } .prompt { font-weight: 600; unicode-bidi: isolate }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 1rem } .answer > p { margin: .2rem 0; color: var(--soft) }
.row { display: flex; flex-wrap: wrap; gap: 3px; margin-bottom: 3px }
.token { display: inline-flex; flex-direction: column; align-items: center; min-width: 2.5rem; padding: 1px 4px; border-radius: 4px; font: 1rem/1.3 ui-monospace, monospace; white-space: pre; unicode-bidi: isolate }
.token small { font-size: .72rem; font-family: system-ui, sans-serif } .pos { background: rgb(var(--pos) / var(--a)) } .neg { background: rgb(var(--neg) / var(--a)) }
.wrong { outline: 3px solid var(--ink) } .wrong > span { text-decoration: underline 2px; text-underline-offset: 2px } .token:focus-visible { outline: 3px dashed var(--ink) }
.token:focus::after { content: attr(title); position: fixed; inset: auto 0 0 0; z-index: 1; padding: .6rem 1rem; background: var(--ink); color: var(--paper); white-space: pre-wrap }
code { display: block; white-space: pre-wrap; font-size: .85rem; margin: .4rem 0 } summary { cursor: pointer; padding: .3rem 0 }
"""

# One Tab stop an answer; the arrow keys go from token to token.
SCRIPT = """
for (const answer of document.querySelectorAll('.answer')) {
  const tokens = [...answer.querySelectorAll('.token')];
  tokens.forEach((token, i) => {
    token.tabIndex = i ? -1 : 0;
    token.onkeydown = event => {
      const next = tokens[i + {ArrowRight: 1, ArrowLeft: -1}[event.key]];
      if (next) { event.preventDefault(); token.tabIndex = -1; next.tabIndex = 0; next.focus(); }
    };
  });
}
"""


def write_report(run_dir):
    """Draws <run_dir>/report.html and returns its path. A run directory that does not exist is a BadInput."""
    run = Path(run_dir)
    if not run.is_dir():
        raise data.BadInput(f"{run}: no such directory; expected the --run directory of train.py")
    stages = {name: read_stage(run / name) for name in ("sft", "rm", "reinforce", "ppo")}
    judges = {"rm": stages["rm"], **{path.name: read_stage(path) for path in sorted(run.glob("rm-*")) if path.suffix == ""}}
    body = "".join(f"<h2>{title}</h2>{html}" for title, html in (
        ("1. Before and after", headline(stages, judges)), ("2. Token credit", credit(run)),
        ("3. Learning curves", curves(stages)), ("4. How each figure was made", making(run, stages))))  # fmt: skip
    page = (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
            f"<title>Q-RM report: {escape(run.name)}</title><style>{STYLE}</style></head><body><h1>Q-RM: token rewards learned from pairs of answers</h1>"
            "<p>A small policy answers word problems, a reward model learns from pairs of its right and wrong answers what each single token is "
            f"worth, and REINFORCE and PPO train the policy on that alone.</p>{body}<script>{SCRIPT}</script></body></html>\n")  # fmt: skip
    path, temporary = run / "report.html", run / "report.html.partial"
    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(path)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python classroom/report.py RUN_DIR")
    try:
        print(write_report(sys.argv[1]))
    except data.BadInput as e:
        print(e, file=sys.stderr)
        sys.exit(2)
