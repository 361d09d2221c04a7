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

EXAMPLES, PAIRS = 4, 1000  # prompts whose answers are shown token by token, held-out pairs that the averages use; at most
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
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # the end of the file, or a line that a crash cut off
            continue
    run = read_json(home / "run.json") or read_json(home / "state" / "state.json")
    return Stage(rows, run, read_json(home / "eval.json"), unfinished)


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
    """Up to six numbers within [low, high], 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= (high - low) / 5.001)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def smooth(line, n=25):
    """Mean of the last n values, from the n-th on."""
    return [(line[i][0], sum(y for _, y in line[i - n + 1 : i + 1]) / n) for i in range(n - 1, len(line))]


def line_chart(y_label, x_label, series, y_range=None, level=None, mark=None):
    """An SVG line chart, 360 units wide so that its letters keep their size on a phone.

    series   {name: [(x, y)]}; a line of more than 100 points is drawn faint, with the mean of its last 25 values on top
    level    (name, y) of a horizontal line to compare with; mark: x of a vertical one
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
    square, circle = "M{:.1f} {:.1f}m-3.5 -3.5h7v7h-7z", "M{:.1f} {:.1f}m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0"
    out = [f"<text class='title' x='4' y='15'>{escape(y_label)}</text><text x='198' y='226' text-anchor='middle'>{escape(x_label)}</text>"]
    for y in ticks(low - pad, high + pad):
        out.append(f"<path class='grid' d='M48 {Y(y):.1f}H348'/><text x='42' y='{Y(y) + 4:.1f}' text-anchor='end'>{y:.4g}</text>")
    out += [f"<text x='{X(x):.1f}' y='208' text-anchor='middle'>{x:.6g}</text>" for x in ticks(left, right)]
    out += [f"<path class='level' d='M{X(mark):.1f} 44V190'/>"] if mark is not None else []
    keys = []  # of the legend: (class of its line, marker, name)
    for i, (name, line) in enumerate(series.items()):
        out.append(f"<polyline class='line{i}{' faint' if len(line) > 100 else ''}' points='{path(line)}'/>")
        if len(line) > 100:
            out.append(f"<polyline class='line{i}' points='{path(smooth(line))}'/>")
        elif len(line) <= 40:
            dots = ((square if i else circle).format(X(x), Y(y)) + f"'><title>{escape(name)}: {x:g}, {y:.4g}" for x, y in line)
            out += [f"<path class='dot{i}' d='{dot}</title></path>" for dot in dots]
        keys.append((f"line{i}", f"<path class='dot{i}' d='{(square if i else circle).format(12, 0)}'/>", name))
    if level:
        out.append(f"<path class='level' d='M48 {Y(level[1]):.1f}H348'/>")
        keys.append(("level", "", level[0]))
    at = 48
    for line_class, dot, name in keys if len(keys) > 1 else ():
        out.append(f"<g transform='translate({at:.0f} 30)'><path class='{line_class}' d='M0 0H24'/>{dot}<text x='29' y='4'>{escape(name)}</text></g>")
        at += 42 + 6.8 * len(name)
    spoken = "; ".join(f"{name}: {line[0][1]:.4g} at {line[0][0]:g}, {line[-1][1]:.4g} at {line[-1][0]:g}" for name, line in series.items())
    return f"<svg viewBox='0 0 360 234' role='img' aria-label='{escape(f'{y_label} against {x_label}. {spoken}')}'>{''.join(out)}</svg>"


# ------------------------------------------------------------------------------------------------ 1. before and after


def headline(stages, judges):
    policies = {name: stages[name].eval for name in ("sft", "reinforce", "ppo")}
    judged = {name: stage.eval for name, stage in judges.items()}
    absent = [name for name, result in (policies | judged).items() if not result]
    out = [missing(f"{', '.join(absent)}: no eval.json (python train.py --stage eval writes it).")] if absent else []
    policies, judged = ({name: r for name, r in results.items() if r} for results in (policies, judged))
    if policies:
        rows = [["pass@1, greedy", *(share(r.get("pass@1"), r.get("n_prompts")) for r in policies.values())]]
        for k in sorted({k for r in policies.values() for k in r.get("pass@k", {})}, key=int)[-1:]:
            rows.append([f"pass@{escape(k)}", *(share(r.get("pass@k", {}).get(k)) for r in policies.values())])
            rows.append([f"best of {escape(k)}", *(share(r.get("best_of_k"), r.get("n_prompts")) for r in policies.values())])
        rows.append(["held-out prompts", *(escape(str(r.get("n_prompts", "–"))) for r in policies.values())])
        out.append(table(["policy", *policies], rows) + "<p class='note'>sft is the policy before reinforcement learning. pass@k: at least one of k "
                   "samples is right. Best of k: the sample with the highest mean Z is right. ± is one standard error over the prompts of this one "
                   "run; another seed can move a figure by more.</p>")  # fmt: skip
    if judged:
        measures = {"pair_accuracy": "held-out pairs whose right answer scores higher; chance 0.5",
                    "length_baseline": "the same when the shorter answer is preferred",
                    "error_auc": "chance that the first wrong token scores below a token before it; blind 0.5",
                    "first_error_hit": "wrong answers whose largest drop is at the first wrong token"}  # fmt: skip
        rows = [[f"{key}<br><small>{text}</small>", *(share(r.get(key)) for r in judged.values())] for key, text in measures.items()]
        out.append(table(["reward model", *judged], [*rows, ["held-out pairs", *(escape(str(r.get("n_pairs", "–"))) for r in judged.values())]]))
    return "".join(out)


# ------------------------------------------------------------------------------------------------ 2. token credit


class Answer(NamedTuple):
    ids: list  # response tokens, stop token included
    error: int  # index of the first token that departs from the one right answer; len(ids) if none
    z: list  # raw Z of each
    z_std: list  # standardised over the response tokens of all these pairs


@torch.no_grad()
def score_pairs(run):
    """The reward model's Z on the first PAIRS of pairs-heldout.jsonl: -> tokenizer, [(prompt, right Answer, wrong Answer)]"""
    tokenizer, reward_model = data.Tokenizer.load(run / "rm"), load_model(ScalarModel, run / "rm", Grid())
    rows = data.load_rows(run / "pairs-heldout.jsonl", ("prompt", "chosen", "rejected"), PAIRS)
    pairs, rows = data.encode(rows, tokenizer, 1024, ("chosen", "rejected"), log=lambda text: None)
    ids, mask = data.collate([example for pair in pairs for example in pair])  # (2P, T+1), (2P, T)
    scores = torch.cat([token_scores(reward_model, part) for part in ids.split(64)])  # (2P, T)
    scaled = standardize(scores, mask, "mean_std", Grid())  # (2P, T), as REINFORCE does with a rollout
    answers = []
    for j, example in enumerate(example for pair in pairs for example in pair):
        solution = tokenizer.encode_response(data.arith_solve(rows[j // 2]["prompt"]))
        error = data.first_error(example.response_ids, solution)
        answers.append(Answer(example.response_ids, error, scores[j][mask[j]].tolist(), scaled[j][mask[j]].tolist()))
    return tokenizer, [(row["prompt"], *answers[2 * i : 2 * i + 2]) for i, row in enumerate(rows)]


def token_html(text, z_std, label="", is_error=False):
    """One token: its colour is Z_std, its value stands below it, and the first wrong one has an outline and a mark."""
    kind = ("pos" if z_std >= 0 else "neg") + (" wrong" if is_error else "")
    told = f" tabindex='0' role='img' title='{escape(label)}' aria-label='{escape(label)}'" if label else ""
    return (f"<span class='token {kind}' style='--a:{min(abs(z_std) / FULL_COLOUR, 1):.2f}'{told}>"
            f"<span>{'<b>✗</b>' * is_error}{escape(text)}</span><small>{z_std:+.1f}</small></span>")  # fmt: skip


def answer_html(title, answer, tokenizer, is_wrong):
    """All tokens of an answer; a newline token is shown and ends its line."""
    lines = [""]
    for i, text in enumerate(tokenizer.token_texts(answer.ids)):
        is_error = is_wrong and i == answer.error
        label = f"{text!r}: Z {answer.z[i]:.2f}, standardised {answer.z_std[i]:+.2f}" + ", the first wrong token" * is_error
        shown = "stop" if answer.ids[i] in tokenizer.stop_ids else text.replace("\n", "↵")
        lines[-1] += token_html(shown, answer.z_std[i], label, is_error)
        lines += [""] * ("\n" in text)
    body = "".join(f"<div class='row'>{line}</div>" for line in lines if line)
    return f"<div class='answer' role='group' aria-label='{title}'><p>{title}, mean {sum(answer.z_std) / len(answer.ids):+.2f}</p>{body}</div>"


def profile(scored):
    """Mean Z_std before, at and after the first error, and step by step around it, with the right answers for comparison."""
    wrong = [a for _, _, a in scored if a.error < len(a.ids)]
    parts = {"right answers": [z for _, right, _ in scored for z in right.z_std],
             "wrong answers: before the first error": [z for a in wrong for z in a.z_std[: a.error]],
             "at the first wrong token": [a.z_std[a.error] for a in wrong],
             "after it": [z for a in wrong for z in a.z_std[a.error + 1 :]]}  # fmt: skip
    rows = [[name, f"{sum(values) / len(values):+.2f}" if values else "–", str(len(values))] for name, values in parts.items()]
    out = table(["response tokens", "mean Z (std)", "tokens"], rows)
    twins = [(right, a) for _, right, a in scored if a.error < min(len(a.ids), right.error)]  # equal up to a.error, right beyond it
    if not twins:
        return out
    around = {"right answer": {}, "wrong answer": {}}
    for right, a in twins:
        for name, z in (("right answer", right.z_std), ("wrong answer", a.z_std)):
            for t in range(max(0, a.error - 8), min(len(z), a.error + 9)):
                around[name].setdefault(t - a.error, []).append(z[t])
    series = {name: [(t, sum(z) / len(z)) for t, z in sorted(places.items()) if len(z) >= len(twins) / 5] for name, places in around.items()}
    better = sum(right.z_std[a.error] > a.z_std[a.error] for right, a in twins) / len(twins)
    return (f"<div class='pair'><div>{out}<p>In {len(twins)} pairs both answers are the same up to the first wrong token. There, in the same state, "
            f"the right token has the higher Z in <b>{100 * better:.0f} %</b> of them (blind: 50 %).</p></div>"
            + line_chart("mean Z, standardised (standard deviations)", "tokens from the first wrong token", series, mark=0) + "</div>")  # fmt: skip


def credit(run):
    try:
        tokenizer, scored = score_pairs(run)
    except (OSError, ValueError, LookupError, TypeError) as e:  # no reward model or pairs yet, or not the built-in task's
        return missing(f"token credit, which needs the reward model and pairs-heldout.jsonl of the built-in task ({e}).")
    shown = {}
    for prompt, right, wrong in scored:
        shown.setdefault(prompt, (right, wrong))
    out = ["<p>Every response token of held-out answers, with the reward model's Z below it, standardised over the response tokens of "
           f"{len(scored)} pairs. These are the first {min(EXAMPLES, len(shown))} prompts of the file, not a selection. Touch a token, or use Tab and the arrow "
           f"keys, for its raw Z.</p><p class='row key'>{token_html('blue', 2)} above the mean {token_html('orange', -2)} below it "
           f"{token_html('7', 0, is_error=True)} first wrong token</p><p>Theory predicts a step down at the first wrong token, not one low token: "
           "what follows it continues a wrong answer.</p>"]  # fmt: skip
    for prompt, (right, wrong) in list(shown.items())[:EXAMPLES]:
        out.append(f"<article><p class='prompt'>{escape(prompt)}</p><div class='pair'>{answer_html('right answer', right, tokenizer, False)}"
                   f"{answer_html('wrong answer', wrong, tokenizer, True)}</div></article>")  # fmt: skip
    return "".join(out) + f"<h3>Averages over {len(scored)} held-out pairs</h3>{profile(scored)}"


# ------------------------------------------------------------------------------------------------ 3. learning curves


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
        charts += [line_chart(label, {"step": "step (updates)"}.get(x, "trajectories sampled"), series, y_range, level)] if series else []
    if charts:
        out.append(f"<div class='charts'>{''.join(charts)}</div><p class='note'>Faint: every step; bold over it: mean of the last 25 steps. The dotted "
                   "sft line is the pass@1 of its eval.json. A reward that rises while pass@1 falls is a reward model being exploited.</p>")  # fmt: skip
    return "".join(out)


# ------------------------------------------------------------------------------------------------ 4. how it was made


def command(config):
    """The command that a resolved config stands for: every field is a flag; "" and False are said by leaving it out."""
    words = [f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}" for name, value in config.items() if value is not False and value != ""]
    return " ".join(["python train.py", *words])


def making(run, stages):
    rows, details = [], []
    for name, stage in stages.items():
        config = {"stage": name} | (stage.run.get("config") or {})
        logged = f"{len(stage.rows)}{', unfinished' * stage.unfinished}"
        rows.append([name, *(escape(str(config.get(key, "–"))) for key in ("seed", "steps", "lr", "batch_size")), logged])
        details.append(f"<details><summary>{name}, torch {escape(str(stage.run.get('torch', '?')))}</summary><code>{escape(command(config))}</code></details>"
                       if len(config) > 1 else missing(f"the config of {name}: no run.json."))  # fmt: skip
    again = f"python train.py --stage eval --run {shlex.quote(str(run))}\npython classroom/report.py {shlex.quote(str(run))}"
    return (table(["stage", "seed", "steps", "lr", "batch", "logged"], rows) + "<p>Curves are the lines of each stage's metrics.jsonl, made by these "
            f"commands, in which every setting is resolved:</p>{''.join(details)}<p>The tables of section 1 are the eval.json files, and section 2 was "
            f"computed for this page from {escape(run.name)}/rm and pairs-heldout.jsonl:</p><code>{escape(again)}</code>")  # fmt: skip


# ------------------------------------------------------------------------------------------------ the page

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #5b6470; --rule: #d5dae0;
  --blue: #0b62a8; --orange: #b45309; --pos: 90 165 235; --neg: 245 160 70 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebef; --paper: #14171b; --soft: #a3adb8; --rule: #3a424c;
  --blue: #6cb6ff; --orange: #ffa657; --pos: 30 105 185; --neg: 170 90 10 } }
* { box-sizing: border-box }
body { max-width: 1120px; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--rule) }
.note, .missing, .answer > p { color: var(--soft); font-size: .9rem } .answer > p { margin: 0 0 .3rem }
.missing { border-left: 4px solid var(--rule); padding-left: .6rem }
.wide { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; overflow-wrap: normal }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule) }
@media (max-width: 480px) { th, td { padding-right: .35rem } }
td { font-variant-numeric: tabular-nums } th small { font-weight: 400; color: var(--soft) } small { font-size: .8rem } td small { white-space: nowrap }
.charts, .pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1.2rem }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) }
svg { width: 100%; max-width: 480px; font: 12px system-ui, sans-serif; fill: currentColor } .title { font-weight: 600; font-size: 13px }
polyline, .line0, .line1 { fill: none; stroke-width: 2 } .line0 { stroke: var(--blue) } .line1 { stroke: var(--orange); stroke-dasharray: 6 3 }
.dot0 { fill: var(--blue) } .dot1 { fill: var(--orange) } .grid { stroke: var(--rule) } .level { stroke: var(--soft); stroke-dasharray: 2 3 }
.faint { opacity: .35; stroke-width: 1 } article { margin: 1.2rem 0; border-top: 1px solid var(--rule) } .prompt { font-weight: 600; unicode-bidi: isolate }
.row { display: flex; flex-wrap: wrap; gap: 3px; margin-bottom: 3px } .key { align-items: center; gap: .4rem }
.token { display: inline-flex; flex-direction: column; align-items: center; min-width: 2.5rem; padding: 1px 4px; border-radius: 4px;
  font: 1rem/1.3 ui-monospace, monospace; white-space: pre; unicode-bidi: isolate }
.token small { font: .75rem system-ui, sans-serif } .pos { background: rgb(var(--pos) / var(--a)) } .neg { background: rgb(var(--neg) / var(--a)) }
.wrong { outline: 3px solid var(--ink) } .wrong > span { text-decoration: underline 2px } .token:focus-visible { outline: 3px dashed var(--ink) }
.token:focus::after { content: attr(title); position: fixed; inset: auto 0 0 0; z-index: 1; padding: .6rem 1rem;
  background: var(--ink); color: var(--paper); white-space: pre-wrap }
code { display: block; white-space: pre-wrap; font-size: .85rem; margin: .4rem 0 } summary { cursor: pointer; padding: .3rem 0 }
"""

# One Tab stop an answer; the arrow keys go from token to token.
SCRIPT = """
for (const answer of document.querySelectorAll('.answer')) {
  const tokens = [...answer.querySelectorAll('.token')], focus = i => tokens.forEach((token, j) => token.tabIndex = i == j ? 0 : -1);
  focus(0);
  tokens.forEach((token, i) => token.onkeydown = event => {
    const next = i + ({ArrowRight: 1, ArrowLeft: -1}[event.key] || 0);
    if (next != i && tokens[next]) { event.preventDefault(); focus(next); tokens[next].focus(); }
  });
}
"""


def write_report(run_dir):
    """Draws <run_dir>/report.html and returns its path; BadInput if there is no such directory."""
    run = Path(run_dir)
    if not run.is_dir():
        raise data.BadInput(f"{run}: no such directory; expected what was --run of train.py")
    stages = {name: read_stage(run / name) for name in ("sft", "rm", "reinforce", "ppo")}
    judges = {"rm": stages["rm"]} | {path.name: read_stage(path) for path in sorted(run.glob("rm-*")) if path.suffix == ""}
    sections = (("1. Before and after", headline(stages, judges)), ("2. Token credit", credit(run)),
                ("3. Learning curves", curves(stages)), ("4. How each figure was made", making(run, stages)))  # fmt: skip
    page = ("<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
            "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
            f"<title>Q-RM report: {escape(run.name)}</title><style>{STYLE}</style></head><body><h1>Q-RM: token rewards learned from pairs of answers</h1>"
            "<p>A small policy answers word problems, a reward model learns from pairs of its right and wrong answers what each token is worth (Z), "
            f"and REINFORCE and PPO train the policy on that alone.</p>{''.join(f'<h2>{title}</h2>{html}' for title, html in sections)}"
            f"<script>{SCRIPT}</script></body></html>\n")  # fmt: skip
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
