"""The tables of the demo and of the carry task over several seeds, from the eval.json files of their runs.

    python classroom/demo_table.py runs/seed*                    prints the tables
    python classroom/demo_table.py runs/seed* --write            and puts them into README.md and results.md
    python classroom/demo_table.py runs/carry* --carry --write   the same for the carries, into carry.md

`make results` makes the runs. A policy or reward model that a run lacks is left out of that run's row.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support.files import BadInput, require, write_atomically

POLICIES = {  # directory in the run -> policy, reward
    "sft": ("SFT, before RL", ""),
    "reinforce": ("REINFORCE", "Q-RM, every token"),
    "ppo": ("PPO", "**Q-RM, every token**"),
    "ppo-orm": ("PPO, λ = 1", "outcome model, last token"),
    "ppo-outcome": ("PPO, λ = 1", "graded outcome"),
    "grpo": ("GRPO", "graded outcome"),
}
IN_README = ("sft", "reinforce", "ppo", "ppo-orm", "ppo-outcome")
JUDGES = {
    "pair_accuracy": "pair accuracy",
    "length_baseline": "always prefer the shorter answer",
    "first_error_choice": "at the first wrong token, the right one scores higher",
    "first_error_hit": "the largest drop of Z is at the first wrong token",
    "error_auc": "AUC: first wrong token against the tokens before it (see metrics.md)",
}
END = "\n<!-- end -->"


def load_evals(directories):
    """[{name of the model's directory: its eval.json}], one a run. Raises BadInput for a run without any."""
    runs = []
    for directory in directories:
        paths = sorted(Path(directory).glob("*/eval.json"))
        require(paths, f"{directory}: holds no eval.json; expected the --run_dir of a finished demo")
        runs.append({path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths})
    return runs


def mean_and_range(numbers, digits=2):
    """'.63 (.48 to .86)': mean, lowest and highest."""
    shown = [f"{x:.{digits}f}" for x in (statistics.fmean(numbers), min(numbers), max(numbers))]
    mean, low, high = (text.removeprefix("0") for text in shown)
    return f"{mean} ({low} to {high})"


def summary_rows(runs):
    """README's rows: greedy pass@1 of each policy, mean and range over the runs."""
    lines = []
    for name in IN_README:
        policy, reward = POLICIES[name]
        greedy = [run[name]["pass@1"] for run in runs if name in run]
        if greedy:
            seeds = len(greedy)
            lines.append(f"| demo | {policy} | {reward} | {mean_and_range(greedy)} | {seeds} |")
    return lines


def policy_rows(runs):
    """Lines of a table: accuracy of each policy, greedy, sampled and of eight samples, over the runs."""
    columns = "greedy | one sample | any of eight | ranked first of eight | seeds"
    lines = [f"| policy | reward | {columns} |", "|---|---|---|---|---|---|---|"]
    for name, (policy, reward) in POLICIES.items():
        evals = [run[name] for run in runs if name in run]
        if evals:
            shares = [
                [e["pass@1"] for e in evals],
                [e["pass@k"]["1"] for e in evals],
                [e["pass@k"]["8"] for e in evals],
                [e["best_of_k"] for e in evals],
            ]
            cells = " | ".join(map(mean_and_range, shares))
            lines.append(f"| {policy} | {reward} | {cells} | {len(evals)} |")
    return lines


def greedy_rows(directories, runs):
    """Lines of a table: greedy accuracy of each policy in each run."""
    names = [Path(directory).name for directory in directories]
    lines = ["| policy | reward | " + " | ".join(names) + " |", "|---|---" + "|---" * len(names) + "|"]
    for name, (policy, reward) in POLICIES.items():
        cells = [f"{run[name]['pass@1']:.3f}".removeprefix("0") if name in run else "" for run in runs]
        if any(cells):
            lines.append(f"| {policy} | {reward} | " + " | ".join(cells) + " |")
    return lines


def judge_rows(runs):
    """Lines of a table: accuracy and credit of the Q-RM on held-out pairs."""
    lines = ["| Q-RM on held-out pairs | mean (lowest to highest) |", "|---|---|"]
    for key, title in JUDGES.items():
        found = [run["rm"][key] for run in runs if key in run.get("rm", {})]
        if found:
            lines.append(f"| {title} | {mean_and_range(found, 3)} |")
    return lines


def write_readme(task, rows):
    """Puts a task's rows into README.md."""
    path = ROOT / "README.md"
    write_atomically(path, replace_rows(path.read_text(encoding="utf-8"), task, rows))


def replace_rows(text, task, rows):
    """README.md's text with the rows of a task in its table of results replaced."""
    old = re.search(rf"(^\| {task} \|.*\n)+", text, re.M)
    require(old, f"README.md: no rows that begin with '| {task} |'; expected them in its table of results")
    return text[: old.start()] + "\n".join(rows) + "\n" + text[old.end() :]


def replace_block(text, name, lines):
    """A chapter with the lines between its two comments, `<!-- name: command -->` and the end, replaced."""
    begin = re.search(rf"<!-- {re.escape(name)}: .* -->\n\n", text)
    stop = text.find(END, begin.end()) if begin else -1
    require(stop >= 0, f"no block '<!-- {name}: ... -->' that ends with {END.strip()!r}")
    return text[: begin.end()] + "\n".join(lines) + "\n" + text[stop:]


def write_blocks(chapter, blocks):
    """Puts {name of a block: its lines} into classroom/<chapter>."""
    path = ROOT / "classroom" / chapter
    text = path.read_text(encoding="utf-8")
    for name, lines in blocks.items():
        text = replace_block(text, name, lines)
    write_atomically(path, text)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--carry", action="store_true", help="runs of the carry task (carry.md)")
    parser.add_argument("--write", action="store_true", help="also into README.md and the chapter")
    args = parser.parse_args(argv)
    try:
        runs = load_evals(args.runs)
        judges = judge_rows(runs)
        policies = policy_rows(runs)
        greedy = greedy_rows(args.runs, runs)
        print("\n".join([*summary_rows(runs), "", *policies, "", *greedy, "", *judges]))
        if args.write and args.carry:
            write_blocks("carry.md", {"policies": policies})
        elif args.write:
            write_readme("demo", summary_rows(runs))
            blocks = {"policies": policies, "greedy by seed": greedy, "reward model": judges}
            write_blocks("results.md", blocks)
    except (BadInput, OSError) as error:
        print(f"demo_table.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
