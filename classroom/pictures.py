"""Draws the two figures of README.md: the walk-through's two answers, and the results over seeds.

    python classroom/pictures.py              runs the walk-through (about 18 CPU seconds)
    python classroom/pictures.py LOG          reads what `python classroom/walkthrough.py` printed

credit.png is read from the printed scores, results.png from README.md's own table: figures and text show the
same numbers.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from support.files import BadInput, require

BLUE, ORANGE, GREY = "#2166ac", "#c8590a", "#57606a"
SHOWN = {"\n": "↵", "<|end_of_text|>": "stop"}
ROW = re.compile(r"^ +('[^']*') +([+-]\d+\.\d+) +('[^']*') +([+-]\d+\.\d+) +('[^']*')$", re.M)
RESULT = re.compile(
    r"^\| (\w+) \| ([^|]+) \| ([^|]*) \| (1?\.\d+) \((1?\.\d+) to (1?\.\d+)\) \| \d+ \|$", re.M
)
PROMPT = re.compile(r"^'<\|begin_of_text\|>(.*)\\n'$", re.M)


def read_scores(text):
    """The walk-through's output -> prompt, [(token, Z)] of the right answer, of the wrong one, error.

    error   index of the first wrong token, marked `<-` in the table
    Raises BadInput if the table is not in the text.
    """
    start = text.find("What it has learned")
    prompt = PROMPT.search(text, max(start, 0))
    rows = ROW.findall(text, max(start, 0))
    marked = [i for i, row in enumerate(rows) if "<-" in row[4]]
    require(start >= 0 and prompt and len(marked) == 1, "no table of token scores; expected walkthrough.py's")
    right = [(ast.literal_eval(token), float(z)) for token, z, *_ in rows]
    wrong = [(ast.literal_eval(token), float(z)) for _, _, token, z, _ in rows]
    return prompt[1], right, wrong, marked[0]


def draw_answer(axis, answer, title, error=None):
    """One answer as bars: token t at x = t, its score Z as the height, written at the bar's end."""
    scores = [z for _, z in answer]
    colours = [BLUE if z > 0 else ORANGE for z in scores]
    axis.bar(range(len(scores)), scores, width=0.72, color=colours)
    axis.axhline(0, color=GREY, linewidth=0.8)
    for t, z in enumerate(scores):
        place = "bottom" if z > 0 else "top"
        axis.text(t, z + (0.3 if z > 0 else -0.5), f"{z:+.1f}", ha="center", va=place, color=colours[t])
    axis.set_title(title, loc="left", fontsize=12.5)
    axis.set_xticks(range(len(answer)), [SHOWN.get(token, token.strip()) for token, _ in answer])
    axis.tick_params(axis="x", labelsize=13, length=0, pad=6)
    axis.set_yticks([])
    axis.set_ylim(-8.2, 8.2)
    axis.spines[:].set_visible(False)
    if error is not None:
        label = axis.get_xticklabels()[error]
        label.set_bbox({"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": ORANGE})
        axis.annotate(
            "first wrong token", (error, 0.3), (error + 0.7, 4.5), fontsize=12, color=ORANGE, va="center",
            arrowprops={"arrowstyle": "->", "color": ORANGE},
        )  # fmt: skip


def draw_credit(text, path):
    """The two answers of the walk-through's output, as a PNG at `path`."""
    prompt, right, wrong, error = read_scores(text)
    figure, (above, below) = plt.subplots(2, 1, figsize=(9.6, 5.4))
    figure.suptitle(f"“{prompt}”", x=0.02, ha="left", fontsize=13.5)
    draw_answer(above, right, "a right answer: score Z of each token")
    draw_answer(below, wrong, "a wrong answer: the same up to its first mistake", error)
    figure.tight_layout(rect=(0, 0, 1, 0.99), h_pad=1.6)
    figure.savefig(path, dpi=150)


def draw_results(text, path):
    """The table of results in README.md as ranges with their means, one panel a task, as a PNG at `path`."""
    rows = RESULT.findall(text)
    require(
        rows,
        "README.md: no table of results; expected rows like | demo | PPO | Q-RM | .63 (.48 to .86) | 5 |",
    )
    tasks = list(dict.fromkeys(row[0] for row in rows))
    counts = [sum(row[0] == task for row in rows) for task in tasks]
    figure, axes = plt.subplots(
        len(tasks), 1, figsize=(9.6, 0.42 * len(rows) + 1.1), sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": counts},
    )  # fmt: skip
    for axis, task in zip(axes[:, 0], tasks):
        draw_ranges(axis, [row for row in rows if row[0] == task])
        axis.set_title(f"{task} task", loc="left", fontsize=12.5)
    axes[-1, 0].set_xlabel("problems solved greedily: mean and range over the seeds", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def draw_ranges(axis, rows):
    """Rows of RESULT, the first on top: a line from lowest to highest, a dot and its number at the mean."""
    for place, (_, _, reward, *numbers) in enumerate(rows):
        mean, low, high = (float(x) for x in numbers)
        colour = BLUE if "Q-RM" in reward else ORANGE if "outcome" in reward else GREY
        axis.plot(
            [low, high], [place, place], color=colour, linewidth=2.5, alpha=0.45, solid_capstyle="round"
        )
        axis.plot(mean, place, marker="o", markersize=8, color=colour)
        axis.text(mean, place - 0.2, numbers[0], ha="center", va="bottom", fontsize=10.5, color=colour)
    names = [" + ".join(filter(None, (row[1], row[2].strip("* ").split(",")[0]))) for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=12)
    axis.set_ylim(len(rows) - 0.5, -0.8)
    axis.set_xlim(0, 1)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color="#d0d7de", linewidth=0.6)
    axis.set_axisbelow(True)


def main(argv):
    try:
        if argv:
            text = Path(argv[0]).read_text(encoding="utf-8")
        else:
            command = [sys.executable, str(HERE / "walkthrough.py")]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        draw_credit(text, HERE / "credit.png")
        draw_results((HERE.parent / "README.md").read_text(encoding="utf-8"), HERE / "results.png")
    except (BadInput, OSError) as error:
        print(f"pictures.py: {error}", file=sys.stderr)
        return 2
    print(f"{HERE}: credit.png, results.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
