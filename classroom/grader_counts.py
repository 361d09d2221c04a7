"""How often the graders are right, counted on files that a user has: GSM8K, MATH, Math-Verify's own tests.

    python classroom/grader_counts.py --gsm8k test.jsonl --math test.jsonl --math_verify Math-Verify [--show]

    --gsm8k, --math   rows with labels, in any spelling that --data takes. Each label is changed by one random
                      character, 8 times, and graded as an answer to the label it came from: a change that
                      alters the value must not be judged equal. Of GSM8K's own rows the last sentence of
                      each solution is graded, too, behind "#### ", as models write it.
    --math_verify     a checkout of github.com/huggingface/Math-Verify: the (gold, prediction, expected)
                      triples of its tests are read from the source and judged, not run.
    --show            also lists what was judged otherwise than expected

Not counted are changes that leave the value of a number, or only a formula's spelling (spaces, leading zeros,
a sign, a final full stop or percent sign, pi without its backslash), or that unbalance its braces. Of other
formulas nothing here knows the value: such changes are counted, and --show lists those judged equal.
"""

import argparse
import ast
import random
import re
import sys
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.files import BadInput, require
from support.graders import extract_answer, grade, same_answer
from support.rows import load_rows

CHANGES = 8  # of each label
SENTENCES = {"right": "right", "none": "claim nothing", "other": "claim another number"}
MARKS = {"gsm8k": ("#### {}", r"\boxed{{{}}}", "The answer is {}"), "math": (r"\boxed{{{}}}",)}

# -------------------------------------------------------------------------------- changed labels


def one_character_changes(label, rng, n=CHANGES):
    """Yields n texts that differ from label in one character: one more, one other, or one less."""
    for _ in range(n):
        place = rng.randrange(len(label) + 1)
        new = rng.choice("0123456789-+.,/ xe%")
        yield rng.choice(
            [
                label[:place] + new + label[place:],
                label[:place] + new + label[place + 1 :],
                label[:place] + label[place + 1 :],
            ]
        )


def number_of(text):
    """The number that a text is, by rules that share nothing with the graders'; None if it is none."""
    text = text.strip().rstrip(".,").removesuffix("%").strip()  # punctuation, and a percentage is its number
    text = re.sub(r"^([+-]) | ?(/) ?", r"\1\2", text)
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    mixed = re.fullmatch(r"(-?)(\d+) (\d+)/(\d+)", text)
    try:
        if mixed:
            sign, whole, top, bottom = mixed.groups()
            return (-1 if sign else 1) * (int(whole) + Fraction(int(top), int(bottom)))
        return Fraction(text.lstrip("+"))
    except (ValueError, ZeroDivisionError):
        return None


def is_harmless(text, label):
    """Whether a changed label still says the same, or nothing: its braces are not balanced."""
    value = number_of(label)
    if value is not None:
        return number_of(text) == value
    return plainly(text) == plainly(label) or text.count("{") != text.count("}")


def plainly(formula):
    """A formula without what says nothing.

    Spaces, leading zeros, signs, a final full stop or percent sign, the backslash of pi, sqrt and functions.
    """
    spaceless = re.sub(r"\s|\\[, ]?(?=pi|sqrt|sin|cos|tan|log|ln)", "", formula)
    return re.sub(r"(?<![\d.])0+(?=\d)|(?<![\w)\]}])\+|[.%]$", "", spaceless)


def judged_equal(text, label, task):
    """Whether the grader takes a text for the label: bare, or as an answer after any mark of the task."""
    marked = [mark.format(text) for mark in MARKS[task]]
    return same_answer(text, label, task) or any(grade(answer, label, task)[1] for answer in marked)


def changed_labels(labels, task):
    """-> how many changes alter the value, and the (label, changed label) of those judged equal"""
    rng = random.Random(0)
    altered, equal = 0, []
    for label in labels:
        for text in one_character_changes(label, rng):
            if not is_harmless(text, label):
                altered += 1
                equal += [(label, text)] if judged_equal(text, label, task) else []
    return altered, equal


# -------------------------------------------------------------------------------- last sentences


def last_sentence(solution):
    """The last sentence of a solution without its "####" line and calculator notes; "" if it has none."""
    lines = [line for line in solution.split("\n") if line.strip() and "####" not in line]
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", lines[-1].strip()) if lines else [""]
    return re.sub(r"<<[^<>]*>>", "", sentences[-1])


def graded_sentences(rows):
    """{"right", "none" (nothing is claimed), "other" (another number): [(sentence, label)]}"""
    found = {"right": [], "none": [], "other": []}
    for row in rows:
        text = row["fields"].get("answer")
        if isinstance(text, str) and "####" in text:
            sentence = last_sentence(text)
            claim, right = grade(f"#### {sentence}", row["label"], "gsm8k")
            kind = "right" if right else "none" if claim is None else "other"
            found[kind].append((sentence, row["label"]))
    return found


# -------------------------------------------------------------------------------- Math-Verify's triples


def triples_of(source):
    """The (gold, prediction, expected) of the tests in a Python source that take these three and no more."""
    found = []
    for node in ast.walk(ast.parse(source)):
        is_call = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "parametrize"
        if not is_call or len(node.args) < 2:
            continue
        try:
            names, cases = ast.literal_eval(node.args[0]), ast.literal_eval(node.args[1])
        except ValueError:  # cases that are computed
            continue
        if re.fullmatch(r"gold, ?pred, ?(expected|result)", str(names)):
            found += cases
    return found


def claim_of(text):
    """What a prediction claims: its last boxes, else its last formula, else its last number, or None.

    Math-Verify's texts mark an answer by dollars alone; a grader of this project asks for a box.
    """
    boxes = extract_answer(text, "math")
    return boxes or last_formula(text) or extract_answer(text, "gsm8k")


def last_formula(text):
    """What stands in the last $...$, $$...$$, \\[...\\] or \\(...\\), or None."""
    formulas = re.findall(r"(?s)\$\$(.+?)\$\$|\$((?:\\.|[^$\\])+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", text)
    return "".join(formulas[-1]).strip() if formulas else None


def judge_triple(gold, prediction):
    """Whether the grader finds a prediction right."""
    label = extract_answer(gold, "math") or last_formula(gold) or gold.strip()
    claim = claim_of(prediction)
    return claim is not None and same_answer(claim, label, "math")


def judged_triples(directory):
    """-> all triples of a checkout, and those judged otherwise than expected"""
    paths = sorted(Path(directory).glob("tests/test_*.py"))
    triples = []
    for path in paths:
        triples += triples_of(path.read_text(encoding="utf-8"))
    require(
        triples,
        f"{directory}: no (gold, pred, expected) in tests/test_*.py; expected a checkout of Math-Verify",
    )
    return triples, [triple for triple in triples if judge_triple(*triple[:2]) != bool(triple[2])]


# -------------------------------------------------------------------------------- the command


def print_changes(path, task, show):
    """The line of a file of labels, with --show also what was judged equal."""
    rows = load_rows(path, ("label",))
    labels = [row["label"] for row in rows]
    altered, equal = changed_labels(labels, task)
    print(f"{task}: {len(equal)} of {altered} changes of {len(labels)} labels judged equal ({path})")
    for label, text in equal if show else ():
        print(f"  {text!r} for {label!r}")
    found = graded_sentences(rows) if task == "gsm8k" else {}
    if any(found.values()):
        counted = [f"{len(found[kind])} {says}" for kind, says in SENTENCES.items()]
        print(f"{task}: last sentences behind ####: {', '.join(counted)} ({path})")
        for sentence, label in found["other"] if show else ():
            print(f"  {sentence!r} for {label!r}")


def print_triples(directory, show):
    """The line of Math-Verify's triples, with --show also those judged otherwise than expected."""
    triples, other = judged_triples(directory)
    false = [triple for triple in other if not triple[2]]
    print(
        f"math_verify: {len(triples) - len(other)} of {len(triples)} triples as expected, "
        f"{len(false)} false positives ({directory})"
    )
    for gold, prediction, expected in other if show else ():
        kind = "missed" if expected else "FALSE POSITIVE"
        print(f"  {kind}: {prediction[-150:]!r} for {gold[-100:]!r}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gsm8k", metavar="FILE")
    parser.add_argument("--math", metavar="FILE")
    parser.add_argument("--math_verify", metavar="DIR")
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args(argv)
    if not (args.gsm8k or args.math or args.math_verify):
        parser.error("nothing to count: expected --gsm8k, --math or --math_verify")
    try:
        if args.gsm8k:
            print_changes(args.gsm8k, "gsm8k", args.show)
        if args.math:
            print_changes(args.math, "math", args.show)
        if args.math_verify:
            print_triples(args.math_verify, args.show)
    except (BadInput, OSError, SyntaxError) as error:
        print(f"grader_counts.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
