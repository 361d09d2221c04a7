"""Where Q-RM's scores rise in the additions of carry.md, and where those of the outcome model do.

    python classroom/carry_credit.py RUN_DIR ...       runs of the commands of carry.md, or of `make results`

Every held-out problem with a carry is given the right answer and the one that only forgets it; they share
all tokens up to the digit in the place of the carry. Problems without a carry are given the right answer and
the one that invents it.
"""

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from carry import answer

from data import Example
from model import ScalarModel
from parallel import Grid
from qrm import response_scores
from support import evaluate, loading
from support.settings import Config

MEASURES = {
    "mean": "the right answer scores higher, by the mean of all tokens",
    "last": "the same, by the last token",
    "choice": "at the digit, the right one scores higher",
    "gap": "right digit minus wrong digit, in standard deviations of Z",
    "rise": "the largest rise of the right answer is at the digit",
    "invented": "no carry: the invented 1 scores higher than the right 0",
}


def both_answers(prompt):
    """-> the right answer to "47+38=?", the one with another digit in the carry's place; is there a carry?"""
    a, b = map(int, re.findall(r"\d+", prompt))
    has_carry = a % 10 + b % 10 > 9
    right = answer(a, b)
    if has_carry:
        return right, answer(a, b, forgets=True), True
    tens = a // 10 + b // 10 + 1
    lines = [right.split("\n")[0], f"{a // 10}+{b // 10}+1={tens}", f"#### {tens}{(a + b) % 10}"]
    return right, "\n".join(lines), False


def digit_place(right, wrong):
    """Index of the first token in which two answers differ; [ids] of both."""
    return next(t for t, (one, other) in enumerate(zip(right, wrong)) if one != other)


def measure(scored):
    """{name of MEASURES: number} from [(has a carry, Z of the right answer, Z of the wrong one, place)]"""
    std = torch.cat([z for _, right, wrong, _ in scored for z in (right, wrong)]).std().item()
    with_carry = [row[1:] for row in scored if row[0]]
    without = [row[1:] for row in scored if not row[0]]
    return {
        "mean": fmean(float(right.mean() > wrong.mean()) for right, wrong, _ in with_carry),
        "last": fmean(float(right[-1] > wrong[-1]) for right, wrong, _ in with_carry),
        "choice": fmean(float(right[t] > wrong[t]) for right, wrong, t in with_carry),
        "gap": fmean((right[t] - wrong[t]).item() / std for right, wrong, t in with_carry),
        "rise": fmean(float(right.diff().argmax().item() + 1 == t) for right, _, t in with_carry),
        "invented": fmean(float(wrong[t] > right[t]) for right, wrong, t in without),
    }


def credit_of(run, name):
    """`measure` of the reward model in run/name, its head read at every token."""
    cfg = Config(stage="score", device="cpu")
    tokenizer = loading.load_tokenizer(str(Path(run) / name), cfg)
    model = loading.load(ScalarModel, str(Path(run) / name), cfg, Grid())
    examples, kinds = [], []
    for line in (Path(run) / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)["prompt"]
        right, wrong, has_carry = both_answers(prompt)
        ids = [tokenizer.encode_response(text) for text in (right, wrong)]
        kinds.append((has_carry, digit_place(*ids)))
        examples += [Example(tokenizer.encode_prompt(prompt), response) for response in ids]
    scores = evaluate.score_examples(partial(response_scores, model), examples, cfg, Grid())
    pairs = zip(scores[::2], scores[1::2])
    return measure([(has_carry, *pair, place) for (has_carry, place), pair in zip(kinds, pairs)])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = [name for name in ("rm", "rm-orm") if all((Path(run) / name).exists() for run in args.runs)]
    found = {name: [credit_of(run, name) for run in args.runs] for name in names}
    print("| | " + " | ".join({"rm": "Q-RM", "rm-orm": "outcome model"}[name] for name in names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for key, title in MEASURES.items():
        cells = [", ".join(f"{row[key]:.2f}" for row in found[name]) for name in names]
        print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
