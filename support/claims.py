"""What a text claims: its final number, or what it boxes; whole, or not at all."""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

from support.expressions import INVISIBLE
from support.meanings import UNITS

# A number in running text, whole: currency, sign, digits with or without thousands, a fraction or a mixed
# number, a power. A minus after a digit, a word or a bracket is no sign: "5-3" is a difference, and NOT_THIS
# refuses its 3. No part can fail late, so a search is linear.
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
    r"[^\n]*\b(?:(?:wait|actually|sorry|correction|or\s+rather|but|i\s+meant?|hmm|oops"
    r"|(?:scratch|make)\s+that|wrong|incorrect|is\s+not|isn't)\b|no\s*(?:[,.;:]|\$?\d))"
)
FOLLOWING = (
    # an operator, relation or arrow with another operand
    r"\s*(?:[-+*/×÷·^=<>~±≈≠≤≥→]|[!=<>]=|[-=]>|\\(?:times|cdot|div|le|ge|leq|geq|ne|neq|approx|to))"
    r"\s*-?[\d.$({\\]",
    r"\s*[-+*×÷^]\s*[a-z]|[-+/^](?:\s|$)|\*\*\d",
    r"[)\]}]\s*[-+*×÷^=/]?\s*[\d(]|\s*[%@\\]\s*\d|\s(?:r|rem|e)\s?\d|(?:\s+[a-z]+){1,3}\s*[-+*×÷=<>]\s*\$?\d",
    r"(?:\s+[a-z]+){0,3}\s+x\s+\\?\$?\d",
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
    r"\s+(?!(?:in|for|after|from)\b)[^\W\d]+,?\s+\\?\$?\d",
    # a correction on the same line
    CORRECTION,
)
OTHER_NUMBER = re.compile("|".join(FOLLOWING), re.IGNORECASE)
# As DeepSeek-R1 and Qwen3, Magistral, Kimi, and Sky-T1 spell it.
THOUGHTS_BEGIN = re.compile(r"<think(?:ing)?>|<reasoning>|\[THINK\]|◁think▷|<\|begin_of_thought\|>")
THOUGHTS_END = re.compile(r"</think(?:ing)?>|</reasoning>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>")
# What before a number makes it another one, or one of several.
NOT_THIS = re.compile(
    r"[^\W\d_]\Z|[√≠≤≥±]\s*\Z"
    # digits before it: thousands or decimals in another spelling, a date, an operation, a pair
    r"|\d(?:[.,:'’ ]| *(?:[-+*/×÷^x]|\*\*|\\times|\\cdot|\\div) *\\?\$?\(?)\Z"
    r"|[)}][-+*/×÷^]\Z|[(\[][^()\[\]]*,\s*\Z|[\^_]\{?\Z"
    r"|\\(?:sqrt|[dt]?frac)(?:\{[^{}]*\})?\{?\Z"
    # a minus before a bracket, or after "=" and "is"
    r"|-\s*(?:[({]|\\[,({]|\\text\{)+\s*\Z|(?:=|\bis)\s*-\s+\Z"
    r"|(?:\b(?:not|isn't|negative|minus|half|twice|double|between\s.*and|(?:less|more|fewer|greater)\s+than)"
    r"|(?<!,)\s(?:or|nor|vs|versus)|\d\s+to)\s+(?:of\s+)?\\?\$?\Z",
    re.IGNORECASE,
)


def claimed_number(text: str) -> str | None:
    """The number after "####", else in the last box, else after "answer is" or "A:", else the last."""
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
        heading = re.match(r"[\s*_]*(?:\d+(?:[.)]|st|nd|rd|th)\s+)?[A-Za-z]", match[1]) and match.end() < end
        found = found if heading else match[1]
    return found


def after_boxed(text):
    """What stands in the last box, or None; an empty one, or one that is cut off or of millions, says
    nothing."""
    boxes = boxes_of(text)
    if not boxes:
        return None
    return (boxes[-1][0] or "").replace("\n", " ")


# A number and at most two words.
ALONE = re.compile(r"[\s:=*_$({\\\[]*-?[\d.,/]+[^\w\n]*(?:[A-Za-z]+[^\w\n]*){0,2}")


def after_words(text):
    """What follows the last "answer is" or "answer:", else the last "A:" at the start of a line; or None.

    A number must be there, in digits or words. An "Answer:" with more than a number behind it and lines below
    opens a solution and marks nothing.
    """
    for words in (r"\banswer(?: is|:)", "^A:"):
        if words == "^A:" and re.search("(?m)^B:", text):  # a list of options
            return None
        found = []
        for match in re.finditer(rf"(?im){words}([\s:=*_$({{\\\[]*[^\n]*)", text):
            opens = match[0][:7].lower().startswith(("answer:", "a:")) and text[match.end() :].strip()
            if not opens or ALONE.fullmatch(match[1]):  # "Answer: 16 - 3 = 13 are left." opens a solution
                found.append(match[1])
        found = [rest for rest in found if re.search(rf"(?i)\d|\b(?:zero|{'|'.join(TWELVE)})\b", rest)]
        if found:
            return re.sub(r"(?i)^\W*(?:therefore|thus|then|simply|just|equal to)\b,?", "", found[-1])
    return None


def claimed(rest):
    """The number that the text after a marker begins with; None if it begins with anything else.

    Of "5 + 5 = 10" it is the last one, and "x = 5" is 5.
    """
    rest = re.sub(r"(?i)^\W*(?:the\s+)?(?:final\s+)?answer(?:\s+is\b|\s*:)", "", rest)
    rest = re.sub(r"\\(?:times|cdot)(?![a-z])", "*", rest)
    rest = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1", rest)
    rest = after_boxed(rest) if after_boxed(rest) is not None else rest
    rest = re.sub(r"""^(?:[\s:=*_$({`"']|\\[(\[!,])+""", "", rest).split("\n")[0]
    while chain := re.match(r"(?:[A-Za-z]\s*|[^=A-Za-z!<>~≈≠≤≥]*)=\s*(?=[^\s=])", rest):
        rest = rest[chain.end() :]
    number = NUMBER.match(re.sub(r"^\+(?=[\d.$])", "", rest.lstrip("$ ")))
    return whole_number(number) if number else None


def whole_number(match):
    """A match of NUMBER as plain digits or a fraction; None if what follows makes it another number."""
    rest = re.sub(r"\s{3,}", shorter, match.string[match.end() : match.end() + 300])
    rest = re.sub(r"^(?:\\?%|°)", "", rest)
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


def shorter(run):
    """A run of white space as two: the patterns above are slow on long ones."""
    return "\n\n" if "\n" in run[0] else "  "


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


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} or \fbox{...}; after `\boxed 5`, all up to a $ or a new line.

    What stands around the box is not looked at, as in the published graders.
    """
    boxes = boxes_of(text, parts=True)
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


# What at a box makes its content a part of another value.
PART_BEFORE = re.compile(
    r"(?:[-+±−]|\\(?:times|cdot|pi|pm|[dt]?frac|sqrt(?:\[[^]]*\])?)|\b(?:not|isn't))"
    r"(?: |\$|\\,|\\left|[({]|\{[^{}]*\})*\Z|(?:[\d./^_]|(?<!\*)\*|(?:^|[^\\A-Za-z])[A-Za-z])\Z"
)
PART_AFTER = re.compile(
    r"[$ ]*(?:[-+*/]\s*(?:[\d$({\\]|[A-Za-z]\b)|\s?[!?_]|:\s?\d|\^(?!\{?\\circ)"
    r"|\\(?:times|cdot|div|sqrt|[dt]?frac|pi|pm)(?![a-z]))|[\d(]|[A-Za-z](?![A-Za-z])|\.\d"
    r"|(?i:[$\s]*(?:\\text\w*\{)?\s*(?:dozen|hundred|thousand|[a-z]*illion)s?\b"
    r"|\s*is\s+(?:wrong|incorrect)\b)"
)
BULLET = re.compile(r"(?:^|\n)\s*(?:[-+*]|\d+[.)])\s+\$*$")


def boxes_of(text, parts=False):
    r"""[(content or None, the text up to the next box)] of every \boxed and \fbox, braces balanced.

    None, too, where what touches the box makes it a part of another value: -\boxed{5}, \boxed{5}x,
    \frac{\boxed{5}}{6}, \boxed{5} million. With `parts` such a content counts, too.
    """
    found = []
    before, *others = re.split(r"\\(?:boxed|fbox)(?![a-z])\s*", text)
    for rest in others:
        end = closing_brace(rest) if rest.startswith("{") else re.search(r"[$\n]|$", rest).start()
        content = None if end is None else rest[rest.startswith("{") : end].strip()
        between = rest[(end or 0) + 1 :]
        near = BULLET.sub("", before[-60:])
        is_part = not parts and (PART_BEFORE.search(near) or PART_AFTER.match(between[:80]))
        found.append((None if is_part else content or None, between))
        before = between
    return found


def closing_brace(text):
    r"""Where the brace that text starts with is closed, or None; \{ and \} are the brackets of a set."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    return None
