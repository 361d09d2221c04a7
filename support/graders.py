"""Answer graders: what a text claims, and whether that is the label."""

import collections
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from support.expressions import CLOSING, INVISIBLE, OPENING, TIMES, tokens_of, value_of
from support.files import BadInput

TASKS = ("gsm8k", "math", "arith")
GRADERS = ("ours", "strict", "authors", "math_verify")
# No answer is longer; bounds every integer and every pattern that is not linear, whatever a model writes.
MAX_CHARS = 500

# A number in running text, whole: currency, sign, digits with or without thousands, a fraction or a mixed
# number, a power. A minus after a digit, a word or a bracket is a difference: "5-3" ends in 3. No part can
# fail late, so a search is linear.
SIGN = r"(?P<sign>(?:(?<![\w)\]}%.])-)?)(?:\\?[$€£](?P<minus>-?))?"
DIGITS = r"\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|(?<![.\d])\.\d+"
FRACTION = r"\\[dtc]?frac\s?(?:\{\d+\}|\d)\s?(?:\{\d+\}|\d)"
MIXED = rf"(?P<whole>\d{{1,20}})(?P<mixed>\s\d{{1,20}}/\d+|\s?{FRACTION})"
SCIENTIFIC = r"e(?P<exp>[+-]?\d{1,3})(?!\w)"
TIMES_TEN_TO = r"\s?(?:\*|×|\\times|\\cdot)\s?10\s?\^\s?\{?(?P<ten>-?\d{1,3})\}?"
TO_THE_POWER = r"\^\{?(?P<power>\d{1,3})\}?"
NUMBER = re.compile(
    rf"{SIGN}(?:{MIXED}|(?P<frac>{FRACTION})|(?P<digits>{DIGITS})(?P<over>/\d+)?)"
    rf"(?:{SCIENTIFIC}|{TIMES_TEN_TO}|{TO_THE_POWER})?"
)
TWELVE = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WORDS = {word: str(number) for number, word in enumerate(TWELVE, 1)}
# Words that a number may be followed by without being another number. Plurals in s are added.
UNITS = {
    word: names.split()[0]
    for names in (
        "centimeter cm centimetre",
        "millimeter mm millimetre",
        "meter m metre",
        "kilometer km kilometre",
        "inch in inches",
        "foot ft feet",
        "yard yd",
        "mile mi",
        "gram g",
        "kilogram kg",
        "pound lb lbs",
        "ounce oz",
        "liter l litre",
        "milliliter ml millilitre",
        "gallon",
        "second s sec",
        "minute min",
        "hour h hr",
        "day",
        "week",
        "month",
        "year",
        "mph",
        "degree",
        "radian",
        "percent pct percentage",
        "dollar",
        "cent",
        "euro",
        "unit",
        "point",
        "people person",
    )
    for name in names.split()
    for word in (name, name + "s")
}
DASHES = (
    "[\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\N{EN DASH}\N{MINUS SIGN}\N{SMALL HYPHEN-MINUS}"
    "\N{FULLWIDTH HYPHEN-MINUS}]"
)
# What may not follow a number, or it is another one.
SCALES = (
    "(?:doz(?:en)?|gross|pairs?|couples?|(?:hundred|thousand|lakh|crore)s?|[a-z]*illion[a-z]*"
    r"|millones|mil|mille|tausend|тыс\w*|млн|млрд|[百千万萬亿億])"
)
PARTS = (
    "half|halves|thirds?|quarters?"
    "|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]*teen|[a-z]*tie|hundred|thousand|[a-z]*illion)ths"
)
NUMBER_WORD = rf"(?:{'|'.join(TWELVE)}|[a-z]+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)"
COMPOUND = "|".join(sorted(UNITS.keys() - {"in", "ins"}))  # "5 in 6 days" says 5, "5 feet 6" does not
TEXT_OPENS = r"\s*\\?(?:text\w*\{)?\s*"
CORRECTION = (
    r"[^\n]*\b(?:(?:wait|actually|sorry|correction|or\s+rather|but|i\s+meant?|hmm|oops|(?:scratch|make)\s+that"
    r"|wrong|incorrect|is\s+not|isn't)\b|no\s*(?:[,.;:]|\$?\d))"
)
FOLLOWING = (
    # an operator, relation or arrow with another operand
    r"\s*(?:[-+*/×÷·^=<>~±≈≠≤≥→]|[!=<>]=|[-=]>|\\(?:times|cdot|div|le|ge|leq|geq|ne|neq|approx|to))"
    r"\s*-?[\d.$({\\]",
    r"\s*[-+*×÷^]\s*[a-z]|[-+/^](?:\s|$)|\*\*\d",
    r"[)\]}]\s*[-+*×÷^=/]?\s*[\d(]|\s*[%@\\]\s*\d|\s(?:r|rem|e)\s?\d|(?:\s+[a-z]+){1,3}\s*[-+*×÷=<>]\s*\$?\d",
    # a LaTeX command that is no space, bracket, text or degree
    r"\s*\\(?![%$)\],;! \\]|n\b|(?:text\w*|mbox|mathrm|q?quad|right|degrees?|circ)(?![a-z]))",
    # a factor, an index, a factorial, a question
    r"\s*(?:[√π½⅓⅔¼¾]|\\(?:frac|sqrt|pi|pm)(?![a-z]))|[\^_(]\w|\s?[!?]",
    # more digits, or another number of a list
    r"""\.\d|['’"]\s*\d|(?:\s|\\[,;:! ]|\\q?quad)+\\?\$?\d|\s*(?:[:,;&|\[…]|\.\.+)\s*\$?\d""",
    # letters of any script that are no ordinal and no unit; K, M and B
    r"(?!(?:st|nd|rd|th|cm|mm|km|m|kg|mg|g|ft|in|mph|lbs?|oz|ml|L|hrs?|mins?)\b)[^\W_]",
    r"(?-i:\s?[KMB]\b)|\s(?:k|bn|mn|tens)\b",
    # words that scale it, or offer an alternative, up to two words later
    rf"{TEXT_OPENS}[(,]?\s*(?:[a-z]+\s+){{0,2}}(?:{SCALES}|squared|cubed|x?or|nor|vs|versus"
    r"|and\s+\$?\d+|and\s+(?:a|one)[\s-](?:half|third|quarter|fourth|fifth))\b",
    # words that go on with the number
    rf"{TEXT_OPENS}(?:score|factorial|{PARTS}|point|plus|minus|divided|multiplied|negative|below|and\s+a"
    rf"|(?:{COMPOUND})\s+below|remainder|mod|modulo|choose|\(?(?:in\s+)?base"
    r"|[ap]\.?\s?m|x\s\d+|to\s+the\s+(?:power|\w+(?:th|rd|nd))"
    r"|(?:(?:out|per\s?cent)\s+of|for\s+every|(?:more|less|fewer)\s+than|[a-z]+\s+(?:plus|minus))\s+\$?\d+"
    rf"|(?:{COMPOUND}),?\s+(?:and\s+)?{NUMBER_WORD})\b",
    # one word and another number, but "5 in 6 days" says 5
    r"\s+(?!in\b)[^\W\d]+,?\s+\\?\$?\d",
    # a correction on the same line
    CORRECTION,
)
OTHER_NUMBER = re.compile("|".join(FOLLOWING), re.IGNORECASE)
# As DeepSeek-R1 and Qwen3, Magistral, Kimi, and Sky-T1 spell it.
THOUGHTS_BEGIN = re.compile(r"<think(?:ing)?>|<reasoning>|\[THINK\]|◁think▷|<\|begin_of_thought\|>")
THOUGHTS_END = re.compile(r"</think(?:ing)?>|</reasoning>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>")
# What before a number makes it another one, or one of several.
NOT_THIS = re.compile(
    r"[^\W\d_]$|[√≠≤≥±]\s*$"
    # digits before it: thousands or decimals in another spelling, a date, an operation, a pair
    r"|\d(?:[.,:'’ ]|\s*(?:[-+*/×÷^x]|\*\*|\\times|\\cdot|\\div)\s*\\?\$?\(?)$"
    r"|[)}][-+*/×÷^]$|[(\[][^()\[\]]*,\s*$"
    r"|\\(?:sqrt|[dt]?frac)(?:\{[^{}]*\})?\{?$"
    # a minus before a bracket, or after "=" and "is"
    r"|-\s*(?:[({]|\\[,({]|\\text\{)+\s*$|(?:=|\bis)\s*-\s+$"
    r"|(?:\b(?:not|isn't|negative|minus|half|twice|double|between\s.*and|(?:less|more|fewer|greater)\s+than)"
    r"|(?<!,)\s(?:or|nor|vs|versus)|\d\s+to)\s+(?:of\s+)?\\?\$?$",
    re.IGNORECASE,
)


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


def is_value(answer: str) -> bool:
    """Whether an answer is a number or formula, without words and anything else that is only compared as
    text."""
    wordless = all(token.kind != "word" or token.text in UNITS for token in tokens_of(answer))
    return wordless and all(piece.value[0] != "text" for piece in pieces_of(answer))


def extract_answer(text: str, task: str, grader: str = "ours") -> str | None:
    """The final answer that a text claims, or None.

    math           what stands in the last \boxed or \fbox
    gsm8k, arith   the last number marked by "####"; else by \boxed, "answer is" or "A:"; else the last
                   number. A number is claimed whole or not at all (FOLLOWING, NOT_THIS), and a marker without
                   one claims nothing.
                   strict: the first "#### number" and nothing else. authors: see authors_number.
    What a reasoning model thinks (THOUGHTS_BEGIN) is not read. Known misses: without a marker, a closing
    remark with another number ("... in 2 days"); number words; "2 million"; "5 pairs", which may mean 10;
    "The answer is 5!", which may be a factorial. Known hits that a reader might dispute: a correction on a
    later line is not read; "5 twins" claims 5, and "3 in 4" claims 3.
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
    text = re.sub(INVISIBLE, "", re.sub(DASHES, "-", text))
    text = re.sub(r"\{,\}|(?<=\d),?\\[!,]\s*(?=\d{3})", ",", text)
    for marked in (after_hashes, after_boxed, after_words):
        rest = marked(text)
        if rest is not None:
            return claimed(rest)
    numbers = list(NUMBER.finditer(text))
    return whole_number(numbers[-1]) if numbers else None


def without_thoughts(text):
    """What follows a reasoning model's thoughts; nothing of thoughts that are cut off is an answer."""
    return THOUGHTS_BEGIN.split(THOUGHTS_END.split(text)[-1])[0]


def after_hashes(text):
    """What follows the last "####" that is no heading (words, or "1. Words", with lines below); or None."""
    found = None
    end = len(text.rstrip())
    for match in re.finditer(r"####((?:(?!####)[^\n])*)", text):
        heading = re.match(r"[\s*_]*(?:\d+[.)]\s+)?[A-Za-z]", match[1]) and match.end() < end
        found = found if heading else match[1]
    return found


def after_boxed(text):
    """What stands in the last box, or None; an empty one, or one that is cut off or of millions, says
    nothing."""
    boxes = boxes_of(text)
    if not boxes:
        return None
    return (boxes[-1][0] or "").replace("\n", " ")


def after_words(text):
    """What follows the last "answer is", else the last "A:" at the start of a line, if a number is there in
    digits or words; or None."""
    for words in (r"\banswer(?: is|:)", "^A:"):
        found = re.findall(rf"(?im){words}([\s:=*_$({{\\\[]*[^\n]*)", text)
        if words == "^A:" and re.search("(?m)^B:", text):  # a list of options
            return None
        found = [rest for rest in found if re.search(rf"(?i)\d|\b(?:zero|{'|'.join(TWELVE)})\b", rest)]
        if found:
            return re.sub(r"(?i)^\W*(?:therefore|thus|then|simply|just|equal to)\b,?", "", found[-1])
    return None


def claimed(rest):
    """The number that the text after a marker begins with; None if it begins with anything else.

    Of "5 + 5 = 10" it is the last one, and "x = 5" is 5.
    """
    rest = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1", rest)
    rest = after_boxed(rest) if after_boxed(rest) is not None else rest
    rest = re.sub(r"""^(?:[\s:=*_$({`"']|\\[(\[!,])+""", "", rest).split("\n")[0]
    while chain := re.match(r"(?:[A-Za-z]\s*|[^=A-Za-z!<>~≈≠≤≥]*)=\s*(?=[^\s=])", rest):
        rest = rest[chain.end() :]
    number = NUMBER.match(re.sub(r"^\+(?=[\d.$])", "", rest.lstrip("$ ")))
    return whole_number(number) if number else None


def whole_number(match):
    """A match of NUMBER as plain digits or a fraction; None if what follows makes it another number."""
    rest = re.sub(r"^(?:\\?%|°)", "", match.string[match.end() :])
    before = match.string[max(match.start() - 20, 0) : match.start()]
    if OTHER_NUMBER.match(rest) or NOT_THIS.search(before) or is_touched(before, rest):
        return None
    if match["digits"] and re.match(r"\d{4,},", match["digits"]) or match["sign"] and match["minus"]:
        return None
    sign = "-" if match["sign"] or match["minus"] else ""
    fraction = match["frac"] or (match["mixed"] or "").strip()
    if fraction:
        braced = re.fullmatch(r"\\[dtc]?frac\s?(?:\{(\d+)\}|(\d))\s?(?:\{(\d+)\}|(\d))", fraction)
        top, bottom = [part for part in braced.groups() if part] if braced else fraction.split("/")
        return f"{sign}{match['whole'] + ' ' if match['whole'] else ''}{top}/{bottom}"
    digits = match["digits"].replace(",", "") + (match["over"] or "")
    power = match["exp"] or match["ten"]
    if match["power"] is None and power is None:
        return sign + digits
    if match["over"]:
        return None
    value = (
        Fraction(digits) ** int(match["power"])
        if match["power"]
        else Fraction(digits) * Fraction(10) ** int(power)
    )
    return sign + plain(value)


def is_touched(before, rest):
    """Whether a sign that is not ASCII makes the number between two texts another one: √, ⅝, ‰, ⇒.

    Letters, quotes and currency do not, nor does a dash or picture unless another number follows it.
    """
    rest = rest.lstrip(" ")
    place, after = before[-1:], rest[:1]
    if place > "\x7f":
        kind = unicodedata.category(place)
        if kind in ("Sm", "Sk", "Pd") or kind[0] in "NM" or kind == "Po" and before[-2:-1].isdigit():
            return True
    if after <= "\x7f":
        return False
    kind = unicodedata.category(after)
    if kind in ("So", "Pd") or after in "。、…，；：！":
        return re.match(r".\s*\d", rest) is not None
    return kind in ("Sm", "Sk", "Po") or kind[0] in "NM"


def plain(value):
    """A decimal fraction in plain digits."""
    return (
        str(value.numerator)
        if value.denominator == 1
        else format(Decimal(value.numerator) / value.denominator, "f")
    )


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
        return answer == label or same_meaning(answer, label)
    if grader == "strict":
        return hendrycks(answer) == hendrycks(label) if task == "math" else answer == label.replace(",", "")
    if task == "math":
        return authors_latex(answer) in authors_label(label) and authors_latex(answer) != ""
    return answer == re.sub(r",|\.0+$", "", label)


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} or \fbox{...}; after `\boxed 5`, all up to a $ or a new line."""
    boxes = boxes_of(text)
    return boxes[-1][0] if boxes else None


def last_boxes(text: str) -> str | None:
    r"""The last \boxed, and those before it that it is listed with: "\boxed{1} and \boxed{2}" says 1, 2."""
    *others, last = boxes_of(text) or [(None, "")]
    found = last[0]
    for content, between in reversed(others):
        between = re.sub(r"\\text\s*\{([^{}]*)\}|\\q?quad|\\[()\[\]]|[\s$]", r"\1", between).replace(" ", "")
        if not content or not found or between not in (",", "and", ",and"):
            break
        found = f"{content}, {found}"
    return found


def boxes_of(text):
    r"""[(content or None, the text up to the next box)] of every \boxed and \fbox, braces balanced.

    None, too, where what touches the box makes it a part of another value: -\boxed{5}, \boxed{5}x,
    \frac{\boxed{5}}{6}, \boxed{5} million.
    """
    found = []
    before, *others = re.split(r"\\(?:boxed|fbox)(?![a-z])\s*", text)
    for rest in others:
        end = closing_brace(rest) if rest.startswith("{") else re.search(r"[$\n]|$", rest).start()
        content = None if end is None else rest[rest.startswith("{") : end].strip()
        between = rest[(end or 0) + 1 :]
        is_part = PART_BEFORE.search(BULLET.sub("", before)) or PART_AFTER.match(between)
        found.append((None if is_part else content or None, between))
        before = between
    return found


# What at a box makes its content a part of another value.
PART_BEFORE = re.compile(
    r"(?:[-+±−\d./^_]|(?<!\*)\*|\\(?:times|cdot|pi|pm|[dt]?frac|sqrt(?:\[[^]]*\])?)|\b(?:not|isn't))"
    r"(?:\s|\$|\\,|\\left|[({]|\{[^{}]*\})*$|(?:^|[^\\A-Za-z])[A-Za-z]$"
)
PART_AFTER = re.compile(
    r"[$ ]*(?:[-+*/]\s*(?:[\d$({\\]|[A-Za-z]\b)|\s?[!?_]|:\s?\d|\^(?!\{?\\circ)"
    r"|\\(?:times|cdot|div|sqrt|[dt]?frac|pi|pm)(?![a-z]))"
    rf"|[\d(]|[A-Za-z](?![A-Za-z])|\.\d|(?i:[$\s]*(?:\\text\w*\{{)?\s*{SCALES}\b|{CORRECTION})"
)
BULLET = re.compile(r"(?:^|\n)\s*(?:[-+*]|\d+[.)])\s+\$*$")


def closing_brace(text):
    r"""Where the brace that text starts with is closed, or None; \{ and \} are the brackets of a set."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    return None


def hendrycks(s: str) -> str:
    """String normalisation of Hendrycks et al. 2021 (MATH): fractions, roots, units, signs, "x=", spaces."""
    s = re.sub(r"\n|\\!", "", s).replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    s = re.sub(r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$", "", s).split(r"\text{ ")[0].replace(r"\%", "")
    s = re.sub(r"^[^=]{0,2}=([^=]*)$", r"\1", re.sub(r"(^|[ {])\.", r"\g<1>0.", s))
    s = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", s).replace(" ", "")
    s = re.sub(r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}", s)  # \frac12
    s = re.sub(r"\\frac([^{\\])\{", r"\\frac{\1}{", s)  # \frac1{2}
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", r"\frac{1}{2}" if s == "0.5" else s)


class Piece(NamedTuple):
    """One of the values that an answer lists."""

    value: tuple  # hashable; equal tuples, equal values
    name: str = ""  # x, f(x) or (p,q) of "x = 5"
    unit: tuple = ()
    equation: tuple = ()  # of "y = 2x": both sides, whichever of its variables is the name


def meaning(answer: str) -> tuple:
    """What an answer stands for, hashable, names and units aside: equal tuples, equal answers."""
    return joined([piece.value for piece in pieces_of(answer)])


def same_meaning(answer: str, label: str) -> bool:
    r"""Do two answers say the same?

    An answer is a list of pieces (commas, "and", "or"), without order: each a number or expression
    (expressions.py), a set (no order), a tuple or interval (order, brackets), a union, a matrix, a ratio, a
    relation, or text. x = 5 is 5; where both answers name their values, the names count, and where one names
    several, the order. An inequality of a name is an interval; an equation is one with its multiples. In a
    list with \in or a relation other than =, "and" is not "or", and a comma is "or". A percentage is its
    number, where % ends a value. A unit (UNITS) may be left out; if both have one, it must be the same.

    An answer must be worked out: 9+1, 100/5, 2^{10} and 5! are not 10, 20, 1024 and 120, or a policy would
    learn to repeat the question; for the same reason 2(x+1) is not 2x+2. Sums and products of numbers are
    compared as they are written, since 10-15 may be a range and 2*3 a size; so is whatever has a word or a
    command that expressions.py does not list. Known misses, right answers marked wrong: 0.5 for 50\%, a unit
    of one letter outside \text (5 m for 5), names in other capitals (BA for AB, NO for No), rounding, decimal
    commas, identities of functions, i^2 = -1, |x|, sums of matrices, conversion of units, \sqrt{4x} for
    2\sqrt{x} (no root of variables is worked out, since that of x^2 is not x), (1,2) for "x>1 and x<2".
    Known hits: "x=1 and y=2" is "x=1 or y=2"; 0x is 0 and 1x is x.
    """
    ours, theirs = pieces_of(answer), pieces_of(label)
    if len(ours) == len(theirs):
        if same_equations(ours, theirs):
            return True
        named, other = [piece.name for piece in ours], [piece.name for piece in theirs]
        if all(named) and all(other):
            return same_named(ours, theirs)
        if in_order(named) and not any(other) or in_order(other) and not any(named):
            return [piece.value for piece in ours] == [piece.value for piece in theirs]
        if not same_units(answer, ours, label, theirs):
            return False
    return joined([piece.value for piece in ours]) == joined([piece.value for piece in theirs])


SYMBOLS = {
    r"\\\$|^\$(?!.*\$)": "dollar",
    "%": "percent",
    r"\\circ|\\degree|°": "degree",
    "€": "euro",
    "£": "sterling",
}


def same_units(answer, ours, label, theirs):
    """Whether the units of two lists of pieces agree; a list may leave them out."""
    named = [[piece.unit for piece in pieces] for pieces in (ours, theirs)]
    for units, text in zip(named, (answer, label)):
        symbols = [(unit,) for pattern, unit in SYMBOLS.items() if re.search(pattern, text)]
        if symbols and not any(units):
            units[:] = symbols[:1] * len(units)
    if not any(named[0]) or not any(named[1]):
        return True
    said = [
        collections.Counter((piece.value, unit) for piece, unit in zip(pieces, units))
        for pieces, units in zip((ours, theirs), named)
    ]
    return said[0] == said[1]


def in_order(names):
    """Whether a list says by several names which value is which."""
    return all(names) and len(set(names)) == len(names) > 1


def same_named(ours, theirs):
    """Whether two lists of named values give the same names the same values."""
    values = [collections.Counter((piece.name, piece.value) for piece in pieces) for pieces in (ours, theirs)]
    return values[0] == values[1]


def same_equations(ours, theirs):
    """Whether two lists are the same equations."""
    equations = [collections.Counter(piece.equation for piece in pieces) for pieces in (ours, theirs)]
    return equations[0] == equations[1] and () not in equations[0]


def joined(values):
    r"""One value of several: a list without order. The two values of a \pm are two of them."""
    flat = []
    for value in values:
        flat += value[1:] if value[0] == "pm" else [value]
    return flat[0] if len(flat) == 1 else ("set", *sorted(flat, key=repr))


def pieces_of(answer: str) -> list:
    """The pieces of an answer."""
    tokens = tokens_of(re.sub(r",(?=\s*(?:\\text\s*\{\s*)?(?:and|or)\b)", " ", answer))
    if tokens and tokens[-1].text == "." and (len(tokens) == 1 or tokens[-2].text != "."):
        tokens.pop()  # a full stop; 0.3... goes on
    if tokens and tokens[0].text == "{" and tokens[-1].text == "}" and closes(tokens):
        tokens = tokens[1:-1]  # braces that only group
    parts, found = split(tokens, (",", ";", "and", "or"))
    if not all(parts) or "and" in found and "or" in found:
        return [Piece(text_of(tokens))]
    pieces = [piece_of(part) for part in parts]
    for i in range(1, len(pieces)):  # x = 1, 2 is x = 1, x = 2
        if pieces[i - 1].name and not pieces[i].name and found[i - 1] != ";":
            pieces[i] = pieces[i]._replace(name=pieces[i - 1].name)
    if "and" in found and any(token.text in (*RELATIONS[1:], "\\in") for token in tokens):
        return [Piece(("and", *sorted((piece.value for piece in pieces), key=repr)))]
    return pieces


def split(tokens, separators):
    """-> the parts between separators outside all brackets, and these separators."""
    parts, found = [[]], []
    depth = 0
    for token in tokens:
        depth += (token.text in OPENING or token.text.startswith("\\begin")) - (
            token.text in CLOSING or token.text.startswith("\\end")
        )
        if depth == 0 and token.text in separators and token.text not in CLOSING:
            parts.append([])
            found.append(token.text)
        else:
            parts[-1].append(token)
    return parts, found


RELATIONS = ("=", "<", ">", "\\le", "\\ge", "\\ne")


def piece_of(tokens):
    """The Piece that tokens without a comma outside brackets say."""
    before, inside = split(tokens, ("\\in",))
    if inside and not is_name(before[0]):
        return Piece(text_of(tokens))
    tokens = before[-1]
    sides, roughly = split(tokens, ("\\approx",))
    if roughly:  # x = 1/3 \approx 0.33 says 1/3
        tokens = sides[1] if is_name(sides[0]) else sides[0]
    sides, relations = split(tokens, RELATIONS)
    if not all(sides):
        return Piece(text_of(tokens))
    if not relations:
        tokens, unit = without_unit(tokens)
        return Piece(value_of_part(tokens), unit=unit)
    if set(relations) != {"="}:
        return relation_of(sides, relations)
    last, unit = without_unit(sides[-1])
    equation = equation_of(sides) if len(sides) == 2 else ()
    if is_name(sides[0]):
        return Piece(value_of_part(last), "".join(token.text for token in sides[0]), unit, equation)
    named = any(token.kind in ("letter", "word", "command") for side in sides[:-1] for token in side)
    if not named and not any(token.kind == "letter" for token in sides[-1]):
        return Piece(value_of_part(last), unit=unit)  # 5 + 5 = 10 says 10
    return Piece(equation or text_of(tokens), equation=equation)


def is_name(tokens):
    r"""Whether tokens name a value: x, x_1, f(2), (p,q), |AB|, V_1:V_2, \frac{NO}{BO}."""
    spelled = "".join(token.text for token in tokens)
    spelled = re.sub(r"_(\{[^{}]*\}|.)|(?<=[A-Za-z])\([^()]*\)", "", spelled)
    spelled = re.sub(r"\\(angle|triangle|overline|frac|alpha|beta|theta|lambda)(?![a-z])", "", spelled)
    if re.fullmatch(r"[a-z]{2,}|\|[a-z]+\|", spelled):  # xy is a product, |x| = 5 says x = -5, too
        return False
    return re.fullmatch(r"[A-Za-z{}()|:,']*[A-Za-z][A-Za-z{}()|:,']*", spelled) is not None


def difference(sides):
    """Left minus right at two points: two relations say the same if their quotient is the same."""
    at = []
    for salt in (0, 1):
        read = [value_of(side, salt=salt) for side in sides]
        if None in read:
            return None
        left, right = read[0][0], read[1][0]
        known = isinstance(left, Fraction) and isinstance(right, Fraction) and left != right
        if not known or not any(token.kind == "letter" for side in sides for token in side):
            return None
        at.append(left - right)
    return at


def equation_of(sides):
    """What equations have in common that differ by a factor; () if it is not known."""
    at = difference(sides)
    return ("equation", at[0] / at[1]) if at else ()


def relation_of(sides, relations):
    """The Piece of a chain of relations, turned to ascend: x > 5 is (5, infinity); != has no direction."""
    if any(sign in (">", "\\ge") for sign in relations):
        sides, relations = (
            sides[::-1],
            [{">": "<", "\\ge": "\\le"}.get(sign, ">") for sign in relations[::-1]],
        )
    values = [value_of_part(side) for side in sides]
    if relations == ["\\ne"]:
        return Piece(("relation", "\\ne", *sorted(values, key=repr)))
    if set(relations) <= {"<", "\\le"}:
        ends = [token.kind == "letter" for side in (sides[0], sides[-1]) for token in side]
        if len(sides) == 3 and is_name(sides[1]) and not any(ends):
            return interval(values[0], relations, values[2], sides[1])
        if len(sides) == 2:
            return half_line(sides, relations, values)
    return Piece(("relation", *relations, *values))


def interval(low, relations, high, name):
    """The Piece of low < name <= high."""
    opening = "[" if relations[0] == "\\le" else "("
    closing = "]" if relations[-1] == "\\le" else ")"
    return Piece((opening, low, high, closing), "".join(token.text for token in name))


def half_line(sides, relations, values):
    """The Piece of an inequality: an interval if one side is a name, else up to a positive factor."""
    infinity = value_of_part(tokens_of(r"\infty")), value_of_part(tokens_of(r"-\infty"))
    for name, bound in ((0, 1), (1, 0)):
        if is_name(sides[name]) and not any(token.kind == "letter" for token in sides[bound]):
            if name == 0:
                return interval(infinity[1], ["<", *relations], values[1], sides[0])
            return interval(values[0], [*relations, "<"], infinity[0], sides[1])
    at = difference(sides)
    if at:
        return Piece(("relation", *relations, at[0] > 0, at[0] / at[1]))
    return Piece(("relation", *relations, *values))


def text_of(tokens):
    """The value of what is nothing else: its tokens. Braces around one and the sign of times do not count."""
    spelled = " ".join("*" if token.text in TIMES else token.text for token in tokens)
    return ("text", re.sub(r"\{ (\S+) \}", r"\1", spelled))


def value_of_part(tokens):
    """The value of one part of an answer; see same_meaning for what it may be."""
    unions, found = split(tokens, ("\\cup",))
    if found:
        return ("union", *sorted((value_of_part(part) for part in unions), key=repr))
    ratio, found = split(tokens, (":",))
    if found and all(ratio):
        return ("ratio", *(value_of_part(part) for part in ratio))
    return bracketed_value(tokens) or matrix_value(tokens) or number_value(tokens)


def bracketed_value(tokens):
    """The value of a tuple, interval or set, or of the contents of brackets that only group; or None."""
    opening, closing = (tokens[0].text, tokens[-1].text) if tokens else ("", "")
    if opening not in OPENING or closing not in CLOSING or not closes(tokens):
        return None
    parts, commas = split(tokens[1:-1], (",", ";"))
    values = [value_of_part(without_unit(part)[0]) for part in parts]
    if opening == "\\{":
        return joined(values) if commas else ("set", *values)  # {5} is not 5
    if opening == "{" or not commas and (opening, closing) == ("(", ")"):
        return joined(values)
    if not commas and values[0][0] == "matrix":
        return values[0]
    return (opening, *values, closing)


def closes(tokens):
    """Whether the bracket that the first token opens is closed by the last one; (0, 1] is an interval."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token.text in OPENING) - (token.text in CLOSING)
        if depth == 0:
            return i == len(tokens) - 1
    return False


def matrix_value(tokens):
    """The rows of a matrix, whatever its brackets; a determinant is none; or None."""
    if len(tokens) < 2:
        return None
    begin = re.match(r"\\begin\{([pbB]?matrix|array)\}", tokens[0].text)
    nested = sum(token.text.startswith("\\begin") for token in tokens) > 1
    if not begin or nested or tokens[-1].text != rf"\end{{{begin[1]}}}":
        return None
    rows = [row for row in split(tokens[1:-1], ("\\\\",))[0] if row]
    return ("matrix", *(tuple(value_of_part(cell) for cell in split(row, ("&",))[0]) for row in rows))


def number_value(tokens):
    r"""The value of an expression, the two of one with \pm, or text."""
    if any(token.text in ("\\pm", "\\mp") for token in tokens):
        two = [value_of(tokens, sign) for sign in (1, -1)]
        if None not in two and two[0][1] != "numbers":
            return ("pm", *(("number", *value) for value in two))
    read = value_of(tokens)
    if read is None or read[1] == "numbers":  # 10-15 is a range, 2*3 a size: not the same as 20-25, 3*2
        return text_of(tokens)
    return ("number", *read)


def is_unit(token):
    """Whether a token is a unit's name; a letter outside \\text is a variable: 4s is not 4."""
    return token.kind == "word" and token.text in UNITS


def without_unit(tokens):
    """-> tokens before % or a unit such as "cm" or "km/h", and the unit's words, abbreviations written out"""
    if len(tokens) > 1 and tokens[-1].text in ("%", "\\%"):
        return tokens[:-1], ()  # same_units finds the sign
    end = len(tokens)
    exponent = "".join(token.text for token in tokens[-4:]).replace("{", "").replace("}", "")
    if re.search(r"[a-z]\^[23]$", exponent):
        end -= 4 if tokens[-1].text == "}" else 2
    power = tokens[end:]
    unit = []
    joins = ("/", "per", "square", "cubic")
    while end > 1 and (is_unit(tokens[end - 1]) or unit and tokens[end - 1].text in joins):
        end -= 1
        unit.append(UNITS.get(tokens[end].text, tokens[end].text))
    if not unit or tokens[end - 1].text in ("_", "^", "+", "-", "*", "/", "="):
        return tokens, ()
    return tokens[:end], (*unit[::-1], *(token.text for token in power if token.kind == "number"))


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
