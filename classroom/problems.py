"""Word problems of one step in GSM8K's language, for a small model that GSM8K is too hard for.

    python classroom/problems.py runs/laptop

writes sft.jsonl, prompts.jsonl, heldout.jsonl, rl.jsonl and test.jsonl, of as many rows as FILES says; no
question is in two of them. The answers are written as GSM8K's, without its calculator notes:

    {"question": "Tom has 22 apples and buys 8 more. How many apples does Tom have now?",
     "answer": "22+8=30\\n#### 30"}
"""

import argparse
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from notes import NOTE

from support.files import write_atomically

FILES = {"sft": 192, "prompts": 768, "heldout": 192, "rl": 256, "test": 200}  # file: problems in it
NAMES = ("Tom", "Ann", "Ben", "Eva", "Sam", "Mia")
THINGS = ("apples", "pens", "books", "stickers", "marbles", "cookies")
FIRST_STEPS = (
    ("{name} has {a} {things} and buys {b} more.", "+"),
    ("{name} has {a} {things} and gives {b} of them to a friend.", "-"),
    ("{name} has {b} boxes with {a} {things} in each box.", "*"),
)
SECOND_STEPS = (
    ("Then {name} finds {c} more {things}.", "+"),
    ("Then {name} loses {c} of the {things}.", "-"),
    ("{friend} has {c} times as many {things} as {name}.", "*"),
)


def made_problems(n, steps, seed):
    """n word problems of one or two steps, as GSM8K writes them: list of {"question", "answer"}"""
    rng = random.Random(f"{steps} {seed}")
    calculate = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    rows = []
    while len(rows) < n:
        (name, friend), things = rng.sample(NAMES, 2), rng.choice(THINGS)
        (first, op), (second, op2) = rng.choice(FIRST_STEPS), rng.choice(SECOND_STEPS)
        a, b, c = rng.randint(3, 30), rng.randint(2, 9), rng.randint(2, 9)
        middle = calculate[op](a, b)
        result = calculate[op2](middle, c) if steps == 2 else middle
        if min(middle, result) < 1:
            continue
        words = {"name": name, "friend": friend, "things": things, "a": a, "b": b, "c": c}
        story, owner = first.format(**words), name
        answer = f"{a}{op}{b}=<<{a}{op}{b}={middle}>>{middle}\n"
        if steps == 2:
            story += " " + second.format(**words)
            owner = friend if op2 == "*" else name
            answer += f"{middle}{op2}{c}=<<{middle}{op2}{c}={result}>>{result}\n"
        question = f"{story} How many {things} does {owner} have now?"
        rows.append({"question": question, "answer": f"{answer}#### {result}"})
    return rows


def write_problems(folder):
    """The files of FILES, all problems of one step and different."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {row["question"]: row for row in made_problems(2 * sum(FILES.values()), 1, seed=1)}
    rows = iter(rows.values())
    for name, n in FILES.items():
        lines = []
        for _ in range(n):
            row = next(rows)
            lines.append(json.dumps(row | {"answer": NOTE.sub("", row["answer"])}) + "\n")
        write_atomically(folder / f"{name}.jsonl", "".join(lines))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="where the files go")
    write_problems(parser.parse_args(argv).folder)


if __name__ == "__main__":
    main()
