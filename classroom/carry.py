"""A task of one's own as plain JSON lines: two-digit addition by an author who forgets carries.

    python classroom/carry.py DIR [--seed N]        writes DIR/sft.jsonl, DIR/prompts.jsonl, DIR/heldout.jsonl

    prompt  47+38=?        right  7+8=15         forgotten  7+8=15
                                  4+3+1=8                   4+3+0=7
                                  #### 85                   #### 75

carry.md works through the task. The three files share no prompt.
"""

import argparse
import json
import random
from pathlib import Path

FORGETS = 0.65  # probability that the author writes 0 in the place of a carried 1


def answer(a, b, forgets=False):
    """The worked answer to a + b, units first."""
    units = a % 10 + b % 10
    carry = 0 if forgets else units // 10
    tens = a // 10 + b // 10 + carry
    return f"{a % 10}+{b % 10}={units}\n{a // 10}+{b // 10}+{carry}={tens}\n#### {tens}{units % 10}"


def carry_rows(seed=0):
    """{file name: rows}: every pair of two-digit numbers in one file; sft.jsonl has each of its own twice."""
    rng = random.Random(seed)
    sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(sums)
    rows = {"heldout.jsonl": [], "prompts.jsonl": [], "sft.jsonl": []}
    for i, (a, b) in enumerate(sums):
        row = {"prompt": f"{a}+{b}=?\n", "label": str(a + b)}
        if i < 5100:
            rows["heldout.jsonl" if i < 500 else "prompts.jsonl"].append(row)
        else:
            answers = [answer(a, b, forgets=rng.random() < FORGETS) for _ in range(2)]
            rows["sft.jsonl"] += [{"prompt": row["prompt"], "response": text} for text in answers]
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.directory.mkdir(parents=True, exist_ok=True)
    for name, rows in carry_rows(args.seed).items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (args.directory / name).write_text("".join(lines), encoding="utf-8")
        print(f"{args.directory / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
