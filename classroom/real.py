"""Real weights, real answers: what SmolLM2-135M-Instruct's hidden states say about graded GSM8K solutions.

    python classroom/real.py --model SmolLM2-135M-Instruct --data gsm8k hidden heads planted credit

    hidden     residual stream and log pi of every token of OpenAI's 5,276 graded answers, computed once
    heads      linear reward models on it, five folds by question: pair accuracy and best of four
    planted    the same hidden states for errors planted in right answers
    credit     does a score fall where an answer goes wrong? errors in calculator notes, and planted ones
    pairs      hidden states of the Q-RM authors' test pairs
    transfer   the heads of part `heads` on these pairs, untouched
    sample     pass@1 and pass@8 of the model itself on GSM8K and on simpler made problems
    rl         train.py from sft to PPO and REINFORCE, on made problems of one step
    adapters   four kinds of reward models with LoRA, by train.py, and what they say of held-out questions
    picture    two real answers under each head, token by token, as an SVG file
    check      prints 50 flagged errors for reading, from which the precision in real.md was counted

Every part resumes where it stopped and prints what it found. `heads` and `transfer` use the files that
`hidden` and `pairs` have finished so far. --model is a Hugging Face directory of SmolLM2-135M-Instruct;
--data holds example_model_solutions.jsonl and test.jsonl (OpenAI's grade-school-math, MIT) and
pairs_test.jsonl of the Q-RM authors. The results, and how to get the files, are in real.md.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adapters
import heads
import real_rl
from notes import first_wrong_note
from solutions import read_solutions, right_solutions

from support.files import BadInput


def run_check(args):
    """Part `check`: 50 flagged errors, drawn at random, to be read by a human."""
    flagged = []
    for row in sorted(read_solutions(args.data), key=lambda row: row["line"]):
        for answer, right in zip(row["answers"], row["correct"]):
            error = None if right else first_wrong_note(answer, right_solutions(row))
            if error:
                flagged.append((row, answer, error[1]))
    print(f"{len(flagged)} wrong answers with a flagged note")
    for i, (row, answer, note) in enumerate(random.Random(0).sample(flagged, 50), 1):
        print(f"\n{i}. {row['question']}\n   right: {' | '.join(row['truth'].splitlines())}")
        marked = f"{answer[: note.start()]} >>>>{note[0]}<<<< {answer[note.end() :]}"
        print(f"   wrong: {' | '.join(marked.splitlines())}")


PARTS = {
    "hidden": heads.run_hidden,
    "heads": heads.run_heads,
    "planted": heads.run_planted,
    "credit": heads.run_credit,
    "pairs": heads.run_pairs,
    "transfer": heads.run_transfer,
    "sample": real_rl.run_sample,
    "rl": real_rl.run_rl,
    "adapters": adapters.run_adapters,
    "picture": heads.run_picture,
    "check": run_check,
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="directory with the three data files")
    parser.add_argument("--work", type=Path, default=Path("runs/real"), help="what is kept between parts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        for part in args.parts:
            began = time.process_time()
            print(f"== {part}", flush=True)
            PARTS[part](args)
            print(f"== {part}: {time.process_time() - began:.0f} CPU seconds", flush=True)
    except BadInput as error:
        sys.exit(f"real.py: {error}")


if __name__ == "__main__":
    main()
