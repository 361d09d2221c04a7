"""Answer graders: what a text claims, and whether that is the label."""

import re
from fractions import Fraction

from support.files import BadInput

TASKS = ("gsm8k", "math", "arith")
GRADERS = ("ours", "strict", "authors", "math_verify")
# No answer is longer; bounds every integer and every pattern that is not linear, whatever a model writes.
MAX_CHARS = 500

# A minus after a digit, a word or a bracket is a difference: "5-3" ends in 3. No branch can fail late, so a
# search is linear.
NUMBER = r"(?:(?<![\w)\]}%.])-)?\\?\$?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|(?<![.\d])\.\d+)(?:/\d+)?"
# The most explicit first; "A:" as in OpenAI's example solutions.
CLAIMS = ("####", r"\\boxed", r"\banswer(?: is|:)", "^A:")
TWELVE = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WORDS = {word: str(number) for number, word in enumerate(TWELVE, 1)}
PI = Fraction(2**127 - 1)  # a prime that nobody writes: under *, / and == its root behaves like pi


def gsm8k_label(answer: str) -> str:
    """The label in the `answer` of one of OpenAI's GSM8K rows: the number after "####", commas removed."""
    if (label := extract_answer(answer, "gsm8k", "strict")) is None:
        raise BadInput(f"no '#### number' in the GSM8K answer {answer[-60:]!r}")
    return label


def grade(text: str, label: str, task: str, grader: str = "ours") -> tuple[str | None, bool]:
    """-> what the text claims, or None; and whether that is the label."""
    answer = extract_answer(text, task, grader)
    return answer, answer is not None and same_answer(answer, label, task, grader)


def extract_answer(text: str, task: str, grader: str = "ours") -> str | None:
    """The final answer that a text claims, or None.

    math           what stands in the last \\boxed or \\fbox
    gsm8k, arith   the last number right after "####"; else after \\boxed, "answer is" or "A:"; else the last
                   number.
                   strict: the first "#### number" and nothing else. authors: see authors_number.
    Known misses: without a marker, a closing remark with another number ("... in 2 days"); number words; "2
    million" (2).
    """
    if task not in TASKS or grader not in GRADERS:
        raise BadInput(
            f"task {task!r} is not one of {', '.join(TASKS)}, or grader {grader!r} of {', '.join(GRADERS)}"
        )
    if task == "math":
        return boxed(text)
    if grader == "strict":
        return found[1].replace(",", "") if (found := re.search(r"#### (-?[0-9.,]+)", text)) else None
    if grader == "authors":
        return authors_number(text)
    text = text.replace("\N{MINUS SIGN}", "-")
    claims = (re.findall(rf"(?im){claim}[\s:=*$({{\\]*({NUMBER})", text) for claim in CLAIMS)
    numbers = next(filter(None, claims), None) or re.findall(NUMBER, text)
    return re.sub(r"[$,\\]", "", numbers[-1]) if numbers else None


def same_answer(answer: str, label: str, task: str, grader: str = "ours") -> bool:
    """Is the extracted answer the label?

    ours      equal values, see meaning(); one rule for all tasks
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
        return meaning(answer) == meaning(label)
    if grader == "strict":
        return hendrycks(answer) == hendrycks(label) if task == "math" else answer == label.replace(",", "")
    if task == "math":
        return authors_latex(answer) in re.sub(r"\s", "", label) and authors_latex(answer) != ""
    return answer == re.sub(r",|\.0+$", "", label)


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} or \\fbox{...}, braces balanced; after `\\boxed 5`, all up to a $
    or a new line."""
    *before, rest = re.split(r"\\(?:boxed|fbox)(?![a-z])\s*", text)
    if not before:
        return None
    if not rest.startswith("{"):
        return re.split(r"[$\n]", rest)[0].strip() or None
    depth = 0
    for token in re.finditer(r"\\.|[{}]", rest):  # \{ and \} are the brackets of a set and open nothing
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return rest[1 : token.start()].strip() or None
    return None  # cut off inside the box


def hendrycks(s: str) -> str:
    """String normalisation of Hendrycks et al. 2021 (MATH): fractions, roots, units, degrees, \\$, \\%, "x=",
    spaces."""
    s = re.sub(r"\n|\\!", "", s).replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    s = re.sub(r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$", "", s).split(r"\text{ ")[0].replace(r"\%", "")
    s = re.sub(r"^[^=]{0,2}=([^=]*)$", r"\1", re.sub(r"(^|[ {])\.", r"\g<1>0.", s))
    s = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", s).replace(" ", "")
    s = re.sub(r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}", s)  # \frac12
    s = re.sub(r"\\frac([^{\\])\{", r"\\frac{\1}{", s)  # \frac1{2}
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", r"\frac{1}{2}" if s == "0.5" else s)


def meaning(answer: str) -> tuple:
    """What an answer stands for: equal tuples, equal answers.

    After Hendrycks's normalisation the string is cut at brackets, commas, cells and rows, which stay as they
    are; each piece between them that is a number becomes that number. Only a set and a list without brackets
    have no order. A percentage is its number. A unit after a number is dropped, not compared: 5 cm is 5 m.
    Known misses, all of them right answers marked wrong: powers (2^{10}), sums that are not the same letter
    for letter (1+\\sqrt{2}, \\sqrt{2}+1), roots of fractions, all algebra (2(x+1), 2x+2), 0.5 for 50\\%, Even
    for even, rounding.
    """
    s = answer.replace("\N{MINUS SIGN}", "-").replace("\\\\", ";").replace("{,}", ",")
    s = re.sub(r"\\[!,:; ]\s*|°|(?<!\\)[$%]", "", s.replace("cfrac", "frac"))
    s = re.sub(
        r"\s*\b([ap]\.\s?m|hundred|thousand|million|billion)", r"*\1", s
    )  # no units: 2 million is not 2
    s = re.sub(
        r"(?<=[\w)}])\s*\\(?:text|mbox|mathrm)\s*\{[^{}*]*\}(?:\^\{?\d\}?)?\.?\s*$", "", s
    )  # 10\text{ cm}^2
    s = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1 ", s)
    s = re.sub(r"\s+(?:and|or)\s+", ",", s)
    s = re.sub(r"(?<=[\d)}])(?:\s+(?:[A-Za-z]{3,}|[ckm]m))+(?:\^\{?\d\}?)?\.?\s*$", "", s)  # 10 square cm
    s = re.sub(
        r"^\s*\(([A-Za-z])\)\s*$|^\s*\w\s*\\in\b", r"\1", s
    )  # the choice (C) is C; x \in [0,1] is [0,1]
    s = re.sub(r"(\d)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}", s)
    s = re.sub(r"(?<=\d)\s+(?=\d)", "~", s)  # "1 2" is not 12
    s = hendrycks(re.sub(r"\s|;(?=\s*\\end)", "", s)).rstrip(".")
    s = re.sub(r"(^|[,(\[])\+", r"\1", s)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", s):  # 1,234 is a number; (1,234) is a pair
        s = s.replace(",", "")
    pieces = re.split(r"([()\[\],;&]|\\[{}]|\\cup|\\(?:begin|end)\{\w+\})", s)
    values = [square if (square := signed_square(piece)) is not None else piece for piece in pieces if piece]
    ordered = re.search(r"[()\[\];&]|\\cup|\\begin", s)
    return tuple(
        values if ordered else sorted(values, key=lambda v: (isinstance(v, str), v))
    )  # numbers, then strings


def signed_square(s: str) -> Fraction | None:
    """sign(v) v^2 of v, a product or quotient of rationals, square roots and pi; None where s is anything
    else.

    The map keeps products, quotients and equality, and its values are rational: sqrt(8) and 2 sqrt(2) both
    give 8.
    """
    group = r"\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
    if m := re.fullmatch(r"-([^+-].*)", s):
        return None if (x := signed_square(m[1])) is None else -x
    if re.fullmatch(r"\d+\.?\d*|\.\d+", s):
        return Fraction(s) ** 2
    if (m := re.fullmatch(r"(\d+)\\frac\{(\d+)\}\{(\d+)\}", s)) and int(m[3]):  # a mixed number
        return (int(m[1]) + Fraction(int(m[2]), int(m[3]))) ** 2
    if m := re.fullmatch(rf"\\frac{group}{group}", s) or re.fullmatch(r"(.+)/(\d+|\\sqrt\{\d+\}|\\pi)", s):
        x, y = signed_square(m[1]), signed_square(m[2])
        return x / y if x is not None and y else None
    if m := re.fullmatch(r"(.*?)(?:\\cdot|\\times|\*)?(?:\\sqrt\{(\d+)\}|\\pi)", s):
        x = signed_square(m[1] or "1")
        return None if x is None else x * (Fraction(m[2]) if m[2] else PI)
    return None


def authors_number(text: str) -> str | None:
    """The Q-RM authors' GSM8K rule: the last number of the last line that has one, if possible after
    "therefore" or "so".

    Their errors, kept: "so" inside a word counts, 1,234,567 is read as 567 and 5-3 as -3, a closing remark's
    number wins.
    """

    def numbers(s):
        s = re.sub(rf"\b({'|'.join(WORDS)})\b", lambda word: WORDS[word[0].lower()], s, flags=re.IGNORECASE)
        return [re.sub(r",|\.0+$", "", "".join(parts)) for parts in re.findall(r"(-?\d+)(,?\d+)?(\.\d+)?", s)]

    for line in reversed(text.strip().split("\n")):
        clauses = re.findall(r"[Tt]herefore(.*)", line) + re.findall(r"[Ss]o(.*)", line)
        if found := [n for clause in clauses for n in numbers(clause)] or numbers(line):
            return found[-1]
    return None


def authors_latex(answer: str) -> str:
    """The Q-RM authors' MATH normalisation of an answer; the label keeps its \\\\, so that no matrix ever
    matches."""
    s = re.sub(r"^\\text|^\w=", "", re.sub(r"\\mathbf| ", "", answer))
    s = re.sub(r"\\left|\\right|\\!|\\%|\\\$", "", s)
    s = re.sub(r"\\text{.*\n*.*}|\\mbox{.*}|\^{?\\circ}?", "", s)
    return re.sub(r"\\$", "", s.replace("\\\\", "\\"))
