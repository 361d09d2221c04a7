"""Answer graders: what a text claims, and whether that is the label."""

import re

from support.claims import (
    NUMBER,
    after_hashes,
    boxed,
    claimed_number,
    last_boxes,
    whole_number,
    without_thoughts,
)
from support.files import BadInput
from support.meanings import MAX_CHARS, same_meaning
from support.surroundings import NUMBERS

TASKS = ("gsm8k", "math", "arith")
GRADERS = ("ours", "strict", "authors", "math_verify")


def gsm8k_label(answer: str) -> str:
    """The label in the `answer` of one of OpenAI's GSM8K rows: the number after the last "####".

    It is read by the same rule as a policy's answer; BadInput if no number can be read whole.
    """
    label = extract_answer(answer, "gsm8k") if after_hashes(answer) is not None else None
    if label is None:
        raise BadInput(f"no '#### number' in the GSM8K answer {answer[-60:]!r}")
    return label


def grade(text: str, label: str, task: str, grader: str = "ours") -> tuple[str | None, bool]:
    """-> what the text claims, or None; and whether that is the label."""
    answer = extract_answer(text, task, grader)
    return answer, answer is not None and same_answer(answer, label, task, grader)


def can_match(label: str, task: str, grader: str = "ours") -> bool:
    """Whether any text is right for a label: the label itself, marked as an answer of the task, must be."""
    marked = rf"\boxed{{{label}}}" if task == "math" else f"#### {label}"
    answer = extract_answer(marked, task, grader)
    if grader == "math_verify":  # slow, and it takes what it cannot read as text
        return answer is not None
    if answer is not None and same_answer(answer, label, task, grader):
        return True
    claims = [whole_number(match) for match in NUMBER.finditer(label)] if grader == "ours" else []
    return any(claim and same_answer(claim, label, task) for claim in claims)


def extract_answer(text: str, task: str, grader: str = "ours") -> str | None:
    r"""The final answer that a text claims, or None.

    math           what stands in the last \boxed or \fbox, and in those that it is listed with
    gsm8k, arith   the last number marked by "####"; else by \boxed, "answer is" or "A:"; else the last
                   number. A marked text claims the number that it begins with, or the last one of its
                   line if that is its result ("... is 8", "... = 8"), or the only one.
                   A number is claimed whole or not at all (claims.py), and a marker without one claims
                   nothing.
                   strict: the first "#### number" and nothing else. authors: see authors_number.
    What a reasoning model thinks (claims.THOUGHTS_BEGIN) is not read. What stands around a number or a box
    must be known to leave it as it is: words of Latin letters, marks, units; no other value in its sentence.
    Known misses: without a marker, a closing remark with another number ("... in 2 days"); a marked sentence
    with other numbers ("He has 5 and gets 3 more."), without a result; number words; times ("2 pm"); "2
    million", "3 dozen", and "5 pairs", which may mean 10; "5 (3 + 2)"; "5!", which may be a factorial; a
    check after "####" on its line; other scripts. Known hits that a reader might dispute: a correction that
    is on a later line, or in words that CORRECTION lacks; the last of several values that are no list ("So
    x = 6, y = 12"); an explanation with numbers below a marked sentence; a marked sentence that begins with
    a number and goes on to its result ("60 miles in 2 hours is 30 mph" claims 60); "18 short" and other
    losses in words; a unit after a box, which is not compared with the label's; "5 twins" claims 5, and "3 in
    4" claims 3.
    """
    if task not in TASKS or grader not in GRADERS:
        raise BadInput(
            f"task {task!r} is not one of {', '.join(TASKS)}, or grader {grader!r} of {', '.join(GRADERS)}"
        )
    if grader in ("ours", "math_verify"):
        text = without_thoughts(text)
    if task == "math":
        return last_boxes(text) if grader in ("ours", "math_verify") else boxed(text)
    if grader == "strict":
        return found[1].replace(",", "") if (found := re.search(r"#### (-?[0-9.,]+)", text)) else None
    if grader == "authors":
        return authors_number(text)
    return claimed_number(text)


def same_answer(answer: str, label: str, task: str, grader: str = "ours") -> bool:
    """Is the extracted answer the label?

    ours      equal values, see meanings.same_meaning; one rule for all tasks
    strict    equal strings, for math after Hendrycks's normalisation
    authors   equal strings; for math the answer is a SUBSTRING of the label, so that 2 is right for 12
    """
    if max(len(answer), len(label)) > MAX_CHARS:
        return False
    if grader == "math_verify":
        try:
            from math_verify import parse, verify
        except ImportError:
            raise BadInput("the grader math_verify needs its package: pip install math-verify") from None
        return verify(
            parse(rf"\boxed{{{label}}}"), parse(rf"\boxed{{{answer}}}")
        )  # not symmetric: the label is first
    if grader == "ours":
        return answer == label or same_meaning(answer, label)
    if grader == "strict":
        return hendrycks(answer) == hendrycks(label) if task == "math" else answer == label.replace(",", "")
    if task == "math":
        return authors_latex(answer) in authors_label(label) and authors_latex(answer) != ""
    return answer == re.sub(r",|\.0+$", "", label)


def hendrycks(s: str) -> str:
    """String normalisation of Hendrycks et al. 2021 (MATH): fractions, roots, units, signs, "x=", spaces."""
    s = re.sub(r"\n|\\!", "", s).replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    s = re.sub(r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$", "", s).split(r"\text{ ")[0].replace(r"\%", "")
    s = re.sub(r"^[^=]{0,2}=([^=]*)$", r"\1", re.sub(r"(^|[ {])\.", r"\g<1>0.", s))
    s = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", s).replace(" ", "")
    s = re.sub(r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}", s)  # \frac12
    s = re.sub(r"\\frac([^{\\])\{", r"\\frac{\1}{", s)  # \frac1{2}
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", r"\frac{1}{2}" if s == "0.5" else s)


def authors_number(text: str) -> str | None:
    """The Q-RM authors' GSM8K rule: the last number of the last line that has one, if possible after
    "therefore" or "so".

    Their errors, kept: "so" inside a word counts, 1,234,567 is read as 567 and 5-3 as -3, a closing remark's
    number wins.
    """

    words = {word: str(number) for number, word in enumerate(NUMBERS.split(), 1)}

    def numbers(s):
        s = re.sub(rf"\b({'|'.join(words)})\b", lambda word: words[word[0].lower()], s, flags=re.IGNORECASE)
        return [re.sub(r",|\.0+$", "", "".join(parts)) for parts in re.findall(r"(-?\d+)(,?\d+)?(\.\d+)?", s)]

    for line in reversed(text.strip().split("\n")):
        clauses = re.findall(r"[Tt]herefore(.*)", line) + re.findall(r"[Ss]o(.*)", line)
        if found := [n for clause in clauses for n in numbers(clause)] or numbers(line):
            return found[-1]
    return None


def authors_latex(answer: str) -> str:
    """The Q-RM authors' MATH normalisation of an answer."""
    s = re.sub(r"^\\text|^\w=", "", re.sub(r"\\mathbf| ", "", answer))
    s = re.sub(r"\\left|\\right|\\!|\\%|\\\$", "", s)
    s = re.sub(r"\\text{.*\n*.*}|\\mbox{.*}|\^{?\\circ}?", "", s)
    s = re.sub(r"\\$", "", s.replace("\\\\", "\\"))
    return re.sub(r"dfrac|tfrac", "frac", s)


def authors_label(label: str) -> str:
    """The Q-RM authors' normalisation of a MATH label; in their files a matrix row ends in one backslash."""
    s = re.sub(r"dfrac|tfrac", "frac", re.sub(r"\s|\\!", "", label))
    return re.sub(r"\\mbox\{\w+}|\\left|\\right", "", s)
