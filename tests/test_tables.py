"""The demo's tables and README's figures: from the files of runs and from printed text, never typed in."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "classroom")]
import demo_table
import pictures
from granularity import BLOCKS

from support.files import BadInput

PRINTED = """
11. What it has learned: credit for tokens
'<|begin_of_text|>Ben has 7 books. How many?\\n'
              right  Z_right              wrong  Z_wrong  first_wrong
                '7'   +5.676                '7'   +5.676           ''
                '-'   +5.777                '+'   -5.770         '<-'
               '\\n'   +5.776               '\\n'   -5.761           ''
means +5.761 and -0.392
"""


def write_run(directory, greedy, accuracy):
    for name in ("sft", "ppo", "rm"):
        (directory / name).mkdir(parents=True)
    policy = {"pass@1": greedy, "pass@k": {"1": greedy / 2, "8": 1.0}, "best_of_k": 2 * greedy}
    for name in ("sft", "ppo"):
        (directory / name / "eval.json").write_text(json.dumps(policy))
    (directory / "rm" / "eval.json").write_text(json.dumps({"pair_accuracy": accuracy}))
    return str(directory)


def test_demo_table_by_hand(tmp_path):
    directories = [write_run(tmp_path / "a", 0.2, 0.9), write_run(tmp_path / "b", 0.5, 1.0)]
    runs = demo_table.load_evals(directories)
    assert demo_table.summary_rows(runs) == [
        "| demo | SFT, before RL |  | .35 (.20 to .50) | 2 |",
        "| demo | PPO | **Q-RM, every token** | .35 (.20 to .50) | 2 |",
    ]
    assert demo_table.policy_rows(runs)[2:] == [
        "| SFT, before RL |  | .35 (.20 to .50) | .17 (.10 to .25) | 1.00 (1.00 to 1.00) "
        "| .70 (.40 to 1.00) | 2 |",
        "| PPO | **Q-RM, every token** | .35 (.20 to .50) | .17 (.10 to .25) | 1.00 (1.00 to 1.00) "
        "| .70 (.40 to 1.00) | 2 |",
    ]
    assert demo_table.greedy_rows(directories, runs) == [
        "| policy | reward | a | b |",
        "|---|---|---|---|",
        "| SFT, before RL |  | .200 | .500 |",
        "| PPO | **Q-RM, every token** | .200 | .500 |",
    ]
    assert demo_table.judge_rows(runs)[2:] == ["| pair accuracy | .950 (.900 to 1.000) |"]
    with pytest.raises(BadInput, match="no eval.json"):
        demo_table.load_evals([tmp_path / "c"])


def test_the_tables_have_their_places():
    """--write finds them, and replaces nothing else."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    replaced = demo_table.replace_rows(readme, "demo", ["| demo | x |"])
    assert replaced.count("| demo |") == 1
    assert [line for line in replaced.split("\n") if "| demo |" not in line] == [
        line for line in readme.split("\n") if "| demo |" not in line
    ]
    blocks = {
        "results.md": ("policies", "greedy by seed", "reward model"),
        "carry.md": ("policies",),
        "science.md": BLOCKS,
    }
    for chapter, names in blocks.items():
        text = (ROOT / "classroom" / chapter).read_text(encoding="utf-8")
        for name in names:
            again = demo_table.replace_block(text, name, ["| new |"])
            assert again.count("| new |") == 1
            assert demo_table.replace_block(again, name, ["| new |"]) == again
    with pytest.raises(BadInput, match="no block"):
        demo_table.replace_block("", "policies", [])


def test_the_figure_of_two_answers_reads_the_printed_scores():
    prompt, right, wrong, error = pictures.read_scores(PRINTED)
    assert prompt == "Ben has 7 books. How many?" and error == 1
    assert right == [("7", 5.676), ("-", 5.777), ("\n", 5.776)]
    assert wrong == [("7", 5.676), ("+", -5.77), ("\n", -5.761)]
    with pytest.raises(BadInput):
        pictures.read_scores("something else")


def test_the_figure_of_results_reads_every_row_of_the_table(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = [line for line in text.split("\n") if line.startswith(("| demo |", "| long |"))]
    rows = pictures.RESULT.findall(text)
    assert len(rows) == len(table) >= 6
    assert any("outcome model" in row[2] for row in rows)  # the baseline stands beside Q-RM
    pictures.draw_results(text, tmp_path / "results.png")
    pictures.draw_credit(PRINTED, tmp_path / "credit.png")
    assert (tmp_path / "results.png").stat().st_size > 10_000 < (tmp_path / "credit.png").stat().st_size
