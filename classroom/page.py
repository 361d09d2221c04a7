"""The pieces of a page that needs no network: tables, charts, answers token by token, and the page itself.

Everything returns HTML, with whatever came from data escaped. Charts are SVG, 360 units wide so that their
letters keep their size on a phone; no piece tells anything by colour alone.
"""

import math
from html import escape

FULL_COLOUR = 2.5  # standard deviations at which a token reaches its full colour
HOW = "Point at a token, touch it, or use Tab and the arrow keys, for all its numbers."
LINES = 4  # lines that a chart can tell apart

# -------------------------------------------------------------------------------- text and tables


def is_number(value):
    """False for the NaN and infinity of a diverged run, too."""
    return isinstance(value, (int, float)) and abs(value) < 1e15


def missing(text):
    """A line in the place of what cannot be shown."""
    return f"<p class='missing'>Left out: {escape(text)}</p>"


def details(summary, html):
    """A part that is folded away until it is asked for; summary: text."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def code(text):
    """Commands."""
    return f"<code>{escape(text)}</code>"


def note(*paragraphs):
    """HTML of a caption."""
    return "".join(f"<p class='note'>{text}</p>" for text in paragraphs if text)


def standard_error(value, n):
    """Of a share of n independent prompts (binomial)."""
    return math.sqrt(max(value * (1 - value), 0) / n)


def share(value, n=None):
    """0.512, with one binomial standard error if it is a share of n independent prompts."""
    if not is_number(value):
        return "–"
    if not is_number(n) or n <= 0:
        return f"{value:.3f}"
    return f"{value:.3f} <small>± {standard_error(value, n):.3f}</small>"


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


# -------------------------------------------------------------------------------- charts


def ticks(low, high):
    """Up to six numbers within [low, high], 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= (high - low) / 5.001)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def smooth(line, n=25):
    """Mean of the last n values, starting at the n-th."""
    return [(line[i][0], sum(y for _, y in line[i - n + 1 : i + 1]) / n) for i in range(n - 1, len(line))]


# The shapes that mark the points of the first to fourth line, around a point at (x, y).
MARKERS = (
    "M{:.1f} {:.1f}m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
    "M{:.1f} {:.1f}m-3.5 -3.5h7v7h-7z",
    "M{:.1f} {:.1f}m0 -5l5 5l-5 5l-5 -5z",
    "M{:.1f} {:.1f}m0 -5l4.5 8.5h-9z",
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


def legend(keys, at=48):
    """keys: [(class of a line, its marker, name)]; at: where it starts"""
    out = []
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

    series   {name: [(x, y)]}, of which the first LINES are drawn; a line of more than 100 points is drawn
             faint, with its running mean on top
    level    (name, y) of a horizontal line to compare with
    mark     x of a vertical line
    bars     the lines are outlines, to be filled
    """
    series = dict([(name, line) for name, line in series.items() if line][:LINES])
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
        keys.append((f"line{i}", marker(i, 12, 0), name))
    if level:
        out.append(f"<path class='level' d='M48 {Y(level[1]):.1f}H348'/>")
        keys.append(("level", "", level[0]))
    if len(keys) > 1:
        out += legend(keys)
    told = escape(f"{y_label} against {x_label}. {spoken(series)}")
    return f"<svg viewBox='0 0 360 234' role='img' aria-label='{told}'>{''.join(out)}</svg>"


def interval_chart(title, names, rows):
    """An SVG chart of shares with their error bars: a group of lines for each measure, one line a name.

    names   of what is compared, LINES at most
    rows    {measure: [(share, standard error), or None where it was not measured, for each name]}
    """
    names = names[:LINES]
    height = 15 * len(names) + 11  # of a group
    bottom = 44 + height * len(rows)
    out = [f"<text class='title' x='4' y='15'>{escape(title)}</text>"]
    out += legend([(f"line{i}", marker(i, 12, 0), name) for i, name in enumerate(names)], 4)
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x = share_place(tick)
        out.append(f"<path class='grid' d='M{x:.1f} 44V{bottom}'/>")
        out.append(f"<text x='{x:.1f}' y='{bottom + 16}' text-anchor='middle'>{tick:g}</text>")
    for group, (measure, values) in enumerate(rows.items()):
        top = 44 + height * group
        middle = top + height / 2
        out.append(f"<text x='100' y='{middle + 4:.1f}' text-anchor='end'>{escape(measure)}</text>")
        out.append(f"<path class='grid' d='M4 {top}H348'/>")
        for i, value in enumerate(values[: len(names)]):
            if value is not None:
                out.append(interval(i, *value, top + 13 + 15 * i, f"{names[i]}, {measure}"))
    told = [
        f"{measure}: " + ", ".join(f"{name} {x[0]:.3f}" for name, x in zip(names, values) if x)
        for measure, values in rows.items()
    ]
    label = escape(f"{title}. {'; '.join(told)}")
    return f"<svg viewBox='0 0 360 {bottom + 22}' role='img' aria-label='{label}'>{''.join(out)}</svg>"


def share_place(share):
    """Where a share from 0 to 1 lies in an interval_chart, in SVG units."""
    return 112 + 222 * share


def marker(i, x, y):
    """The shape of the i-th line at a point."""
    return f"<path class='dot{i}' d='{MARKERS[i].format(x, y)}'/>"


def interval(i, share, error, y, told):
    """A share as the marker of the i-th line, its 95 % interval to both sides, and its number."""
    low = share_place(max(share - 1.96 * error, 0))
    high = share_place(min(share + 1.96 * error, 1))
    number = f".{1000 * share:03.0f}" if share < 0.9995 else "1"
    beside = f"x='{high + 5:.1f}'" if share < 0.8 else f"x='{low - 5:.1f}' text-anchor='end'"
    caps = "".join(f"M{x:.1f} {y - 3}V{y + 3}" for x in (low, high))
    return (
        f"<g><title>{escape(told)}: {share:.3f} ± {error:.3f}</title>"
        f"<path class='bar{i}' d='M{low:.1f} {y}H{high:.1f}{caps}'/>{marker(i, share_place(share), y)}"
        f"<text class='small' {beside} y='{y + 4}'>{number}</text></g>"
    )


# -------------------------------------------------------------------------------- answers, token by token


def colour_key(mark):
    """What the colours and the outline mean. mark: what the outlined token is; "" where none is outlined"""
    outlined = f"<span class='wrong'><b>✗7</b></span> {escape(mark)} " if mark else ""
    return (
        "<p class='key'><small class='pos' style='--a:.8'>+2.0 blue</small> above the mean "
        "<small class='neg' style='--a:.8'>-2.0 orange</small> below it "
        f"{outlined}<small>·</small> no reward</p>"
    )


def cell(number):
    """A standardised number on its colour; a dot where there is none."""
    if number is None:
        return "<small>·</small>"
    sign = "pos" if number >= 0 else "neg"
    strength = min(abs(number) / FULL_COLOUR, 1)
    return f"<small class='{sign}' style='--a:{strength:.2f}'>{number:+.1f}</small>"


def answer_html(title, tokens, rows, told, error, mark="first wrong token"):
    """An answer, one row of columns per line of it: the token, and below it one number from each of `rows`.

    tokens   texts
    rows     {name: [standardised number of each token, or None]}
    told     what a column says when it is pointed at, focused or touched
    error    index of the token to outline; len(tokens) if there is none
    mark     what that token is
    """
    labels = "".join(f"<small>{escape(name)}</small>" for name in rows)
    names = f"<span class='names' aria-hidden='true'><b></b>{labels}</span>"
    lines = [""]
    for i, text in enumerate(tokens):
        shown = text.replace("\n", "↵")
        classes, label = "token", f"{text!r}: {told[i]}"
        if i == error:
            shown, classes, label = f"✗{shown}", "token wrong", f"{text!r}, the {mark}: {told[i]}"
        numbers = "".join(cell(row[i]) for row in rows.values())
        lines[-1] += (
            f"<span class='{classes}' tabindex='0' role='img' aria-label='{escape(label)}'>"
            f"<b>{escape(shown)}</b>{numbers}</span>"
        )
        if "\n" in text:
            lines.append("")
    body = "".join(f"<div class='line'>{names}{line}</div>" for line in lines if line)
    return f"<div class='answer' role='group' aria-label='{escape(title)}'><p>{escape(title)}</p>{body}</div>"


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
p, dl, li { max-width: 75ch } .note b { color: var(--ink) }
.answer > p { flex-basis: 100%; margin: 0 }
.stale { border-left: 4px solid var(--orange); padding: .1rem .8rem } .stale ul { padding-left: 1.2rem }
dt { font-weight: 600; margin-top: .5rem } dd { margin: 0 0 0 1rem }
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
.title { font-weight: 600; font-size: 13px } .small { font-size: 11px }
polyline, .line0, .line1, .line2, .line3 { fill: none; stroke-width: 2 } .line0 { stroke: var(--blue) }
.line1 { stroke: var(--orange); stroke-dasharray: 6 3 }
.line2 { stroke: var(--ink); stroke-dasharray: 2 2 } .line3 { stroke: var(--soft) }
.dot3 { fill: var(--soft) }
[class^='bar'] { stroke: currentColor; stroke-width: 1.5; fill: none }
.dot0 { fill: var(--blue) } .dot1 { fill: var(--orange) }
.dot2 { fill: var(--ink) }
.bar.bar { fill-opacity: .75; stroke: none } .bar.line0 { fill: var(--blue) }
.bar.line1 { fill: var(--orange) } .bar.line2 { fill: var(--ink) } .bar.line3 { fill: var(--soft) }
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


def document(title, header, sections, before=""):
    """The whole page. title: text; header: HTML; sections: {title: HTML}; before: HTML above the first one"""
    links = "".join(f"<li><a href='#s{i}'>{i}. {name}</a></li>" for i, name in enumerate(sections, 1))
    body = ""
    for i, (name, html) in enumerate(sections.items(), 1):
        body += f"<section aria-labelledby='s{i}'><h2 id='s{i}'>{i}. {name}</h2>{html}</section>"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><header>{header}<nav aria-label='Contents'><ul>{links}</ul></nav></header>"
        f"<main>{before}{body}</main><script>{SCRIPT}</script></body></html>\n"
    )
