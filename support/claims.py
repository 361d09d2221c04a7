"""What a text claims: its final number, or what it boxes; whole, or not at all."""

import itertools
import re
from decimal import Decimal, localcontext
from fractions import Fraction

from support.expressions import INVISIBLE
from support.meanings import MAX_CHARS, meaning
from support.surroundings import MEASURE, NUMBER_WORD, is_box_whole, is_hedged, is_whole

# A number in running text, whole: currency, sign, digits with or without thousands, a fraction or a mixed
# number, a power. A minus after a digit, a word or a bracket is no sign: "5-3" is a difference, whose 3
# is not whole. No part can fail late, so a search is linear.
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
DASHES = (
    "[\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\N{EN DASH}\N{MINUS SIGN}\N{SMALL HYPHEN-MINUS}"
    "\N{FULLWIDTH HYPHEN-MINUS}]"
)
# As DeepSeek-R1 and Qwen3, Magistral, Kimi, and Sky-T1 spell it.
THOUGHTS_BEGIN = re.compile(r"<think(?:ing)?>|<reasoning>|\[THINK\]|◁think▷|<\|begin_of_thought\|>")
THOUGHTS_END = re.compile(r"</think(?:ing)?>|</reasoning>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>")


SECOND = re.compile(r"\d[^\n.!?;]{0,20}[.!?;][\s*_]+[^\n]*\d")  # "18. On second thought, 20."


def claimed_number(text: str) -> str | None:
    """The number after "####", else in the last box, else after "answer is" or "A:", else the last.

    The first marker that is there decides: if it marks no number that can be read whole, nothing is claimed.
    """
    text = re.sub(INVISIBLE, "", re.sub(DASHES, "-", text))
    text = re.sub(r"\{,\}|(?<=\d),?\\[!,]\s*(?=\d{3})", ",", text)
    text = re.sub(r"(?im)^[ *_]{0,5}confidence\b.*", "", text)  # "Confidence: 90%" below an answer
    text = re.sub(r"\b(Mr|Mrs|Ms|Dr|St)\.", r"\1", text)  # the end of no sentence
    text = before_next_question(text)
    for marked in (after_hashes, after_boxed, after_words):
        rest = marked(text)
        if rest is not None and marked is after_hashes and SECOND.search(rest[:300]):
            return None
        if rest is not None:
            claim = claimed(rest)
            return None if marked is after_hashes and is_overruled(text, claim) else claim
    line, _, below = text.rpartition("####")[2].partition("\n")
    if "####" in text and re.search(r"\d", line) and not re.search(r"\d", below):
        return claimed(line)  # it is no heading: "#### She makes $18 on 2 days.\nLet me know!"
    numbers = list(NUMBER.finditer(text))
    return whole_number(numbers[-1]) if numbers else None


QUESTION = re.compile(r"(?:\A|\n)[ \t*_#]*(?:Question|Q)\b[^\n:]{0,5}:")
END = re.compile(r"<\|(?:im_end|eot_id|endoftext)\|>")  # of a message


def before_next_question(text):
    """A text up to where a model that was not stopped goes on to another question, below a marked answer.

    If questions are numbered parts of the solution, one of them stands above its first answer.
    """
    for found in filter(None, (END.search(text), QUESTION.search(text))):
        above = text[: found.start()]
        rests = [marked(above) for marked in (after_hashes, after_words)]
        if any(rest is not None and claimed(rest) is not None for rest in rests):
            return above
    return text


def is_overruled(text, claim):
    """Whether a box, or "answer is", below the last "####" says another number: it was a heading."""
    below = text[text.rfind("####") :].partition("\n")[2]
    for marked in (after_boxed, after_words):
        rest = marked(below)
        if rest is not None:
            other = claimed(rest)
            return None not in (other, claim) and meaning(other) != meaning(claim)
    return False


def without_thoughts(text):
    """What follows a reasoning model's thoughts; nothing if they never end."""
    return THOUGHTS_BEGIN.split(THOUGHTS_END.split(text)[-1])[0]


# "Step 1", "1. Cost: 3", "2nd week", "(1) Eggs", "2 adults:"
HEADING = re.compile(r"[\s*_]*(?:\(?\d+(?:[.):]|st|nd|rd|th)\s+)?[^\W\d_]|.*:[\s*_]*\Z")


def after_hashes(text):
    """What follows the last "####" that is no heading (with lines below); or None."""
    found = None
    end = len(text.rstrip())
    for match in re.finditer(r"####((?:(?!####)[^\n])*)", text):
        heading = match.end() < end and HEADING.match(match[1])
        found = found if heading else match[1]
    return found


def after_boxed(text):
    """The last box with those it is listed with; None without a box, "" if it cannot be read."""
    return (last_boxes(text) or "").replace("\n", " ") if boxes_of(text) else None


FILLERS = "therefore|thus|then|simply|just|equal to|exactly|only|about|approximately|a total of|US(?=\\$)"
# "Each correct answer is", "half of the answer is"; not "half, so the answer is".
OTHERS = re.compile(
    r"(?i)\b(?:each|every|half|twice|wrong|incorrect|earlier|unrounded)"
    r"(?:[ \t]+(?!so\b)[\w'’]+){0,2}(?:[ \t]+|\n)[*_]*\Z"
)
NEGATED = r"(?:no|not|none|neither|nobody|never|cannot|undefined|unknown)"
# Before the only number of a marked sentence: what says that another value is meant, or none.
ELSEWHERE = re.compile(
    rf"(?i)\b(?:zero|{NUMBER_WORD}|{NEGATED})\b"
    r"|\b(?:half|thirds?|quarters?|percent)\b.*\bof\W*(?:the|all|his|her|its)?\W*\Z"
    r"|\b(?:rounded to|divide by|above|below|than|sin|cos|tan|ln|log"
    r"|step|question|part|problem|example|equation|option|page)\W*\Z"
)
# Before the last number of a marked sentence: what makes it the result, as in "The cost of 3 pens is $"; but
# not in another clause (CLAUSE), and not "4 less than" (NO_RESULT).
BEFORE_RESULT = re.compile(r"(?i)(?:\b(?:is|are|was|were|equals|(?:will|would|should|must) be)\s|=)[^\w.]*\Z")
CLAUSE = re.compile(
    rf"(?i)\b{NEGATED}\b|[.!?]\s|.\b(?:that|which|who|where|as|since|because|so|but|while|if)\b"
    r"|\d.*(?:\b(?:and|or|after|before|by|for|when|until|unless|once|although|though|whereas|given|assuming"
    r"|meaning|with)\b|[;(]|,\s|\s[-–—]\s+(?!\W*\d))"
)
# Before a last "=": another equation, another sentence, or words instead of a number.
OTHER_EQUATION = re.compile(
    rf"(?i)\b(?:{NEGATED}|because)\b|[.!?]\s|=.*(?:,\s|;|\b(?:and|or|so)\b)|\b{NUMBER_WORD}\W*\Z"
)
# "Since each tile is 1 inch, ..." says nothing of the result.
CONDITION = re.compile(r"(?i)(?:since|because|if|as|when|given|although|though)\b[^,]*\d[^,]*,\s")
NO_RESULT = re.compile(r"\W*(?:\w+\s+){0,2}(?:less|more|fewer|times|older|younger|as|than|of|done)\b")
LIST_MARK = re.compile(r"[-+*•]\s+|\d{1,2}[.)]\s+(?=[A-Za-z])")
STATES = re.compile(rf"(?i)\d|\b(?:zero|{NUMBER_WORD})\b")
# A number and at most two words.
ALONE = re.compile(r"[\s:=*_$({\\\[]*-?[\d.,/]+[^\w\n]*(?:[A-Za-z]+[^\w\n]*){0,2}")


def after_words(text):
    """What follows the last "answer is" or "answer:", else the last "A:" at the start of a line; or None.

    A number must be there, in digits or words. An "Answer:" with more than a number after it, and then lines
    or sentences with numbers, opens a solution and marks nothing.
    """
    for words in (r"(?<!wrong )\banswer[*_]*(?: is|:)", "^A:"):
        if words == "^A:" and re.search(r"(?m)^\W{0,6}[BC]\W{0,2}:", text):  # a list of options
            return None
        found, openings = [], []
        for match in [*re.finditer(rf"(?m)(?i:{words})" if words != "^A:" else "(?m)^A:", text)][-20:]:
            if OTHERS.search(text[: match.start()][-30:]):
                continue
            opening = re.match(r"(?:[\s:=*_$({\[]|\\[(\[$,;!\s])*", text[match.end() : match.end() + 200])[0]
            start = match.end() + len(opening)
            item = LIST_MARK.match(text[start : start + 9]) if "\n" in opening else None
            start += item.end() if item else 0
            rest = text[start : start + 2000].split("\n")[0]
            below = text[start + len(rest) :]
            goes_on = re.search(r"[.;]\s.*\d", rest[:300])
            opens = match[0].endswith(":") and (goes_on or below.strip())
            if not opens or ALONE.fullmatch(rest):  # "Answer: 16 - 3 = 13 are left." opens a solution
                found.append(rest)
            elif not goes_on and not re.search(r"\d", below):  # but none with numbers
                openings = [rest]
        found = [
            rest for rest in found or openings if STATES.search(re.split(r"(?<!\d)[.!?]\s", rest[:300])[0])
        ]
        if found:
            return re.sub(rf"(?i)^\W*(?:{FILLERS})\b,?", "", found[-1])
    return None


# The left side of an equation: a letter, or a calculation; "6. 6 * 3 = 18" and "6 6 = 18" are none.
CALCULATED = r"(?:[\d+*/×÷·^$\s{}-]|[.,](?=\d)|\\[dt]?frac)"
EQUATION = re.compile(rf"([A-Za-z]\s*|(?:{CALCULATED}*\))?(?:{CALCULATED}|\({CALCULATED}*\))*)=\s*(?=[^\s=])")
TWO_NUMBERS = re.compile(r"\d\s+\$?\d+(?![\d/])")


def claimed(rest):
    """The number that a text after a marker begins with, at the end of its chain of equations; else the last
    one of its line if that is its result (is_result); else the only one of the line; else None.

    "5 + 5 = 10" says 10, "x = 5" says 5, "The cost of 3 pens is $12." 12, and "She makes $18 a day." 18.
    """
    rest = re.sub(r"(?i)^\W*(?:the\s+)?(?:final\s+)?answer(?:\s+is\b|\s*:)", "", rest[:2000])
    rest = re.sub(r"\\(?:times|cdot)(?![a-z])", "*", re.sub(r"\\(?:left|right)(?![a-z])", "", rest))
    rest = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1", rest)
    rest = after_boxed(rest) if after_boxed(rest) is not None else rest
    rest = re.sub(r"""^(?:[\s:=*_$({`"']|\\[(\[!,])+""", "", rest).split("\n")[0]
    rest = re.sub(r"^-\s+(?=[\d.$])", "-", rest)
    while (chain := EQUATION.match(rest)) and not TWO_NUMBERS.search(chain[1]):
        rest = rest[chain.end() :]
    rest = re.sub(r"^\+(?=[\d.$])", "", rest.lstrip("$ "))
    numbers = [*itertools.islice(NUMBER.finditer(rest), MAX_NUMBERS + 1)]
    if not numbers:
        return None
    before = rest[: numbers[0].start()]
    if before != "" and len(numbers) <= MAX_NUMBERS and is_result(numbers, rest):
        return whole_number(numbers[-1])
    is_opened = rest.rstrip().endswith(":") or CONDITION.match(rest)  # "Dividing both sides by 2, we get:"
    is_sentence = len(numbers) == 1 and not is_opened and re.search(r"[A-Za-z]{2}", before)
    return whole_number(numbers[0]) if before == "" or is_sentence and not ELSEWHERE.search(before) else None


MAX_NUMBERS = 20  # of a sentence


def is_result(numbers, rest):
    """Whether the last number of a marked sentence is what the sentence says of its subject, or computes.

    "In 5 days, " only opens the sentence.
    """
    opening = re.match(r"(?i)(?:after|at|by|for|from|in|on|with)\b[^,]*,", rest)
    start = opening.end() if opening else 0
    *others, last = [rest[start : number.start()] for number in numbers]
    stated = BEFORE_RESULT.search(last[-20:])  # 20: room for "equals **$"
    if not stated or NO_RESULT.match(rest[numbers[-1].end() :][:40]):
        return False
    if stated[0].startswith("="):
        return not OTHER_EQUATION.search(last)
    if CLAUSE.search(last) or CONDITION.match(rest):
        return False
    return not any(BEFORE_RESULT.search(other[-20:]) for other in others)


def whole_number(match):
    """A match of NUMBER as plain digits or a fraction; None if what is around it may make it another one."""
    start, end = match.span()
    if not is_whole(match.string[max(start - 40, 0) : start], match.string[end : end + 300]):
        return None
    if re.fullmatch(r"\d{3}", match["digits"] or "") and re.search(r"\d,\s\Z", match.string[:start][-3:]):
        return None  # of 1, 200
    if match["digits"] and re.match(r"\d{4,},|0\d*,", match["digits"]) or match["sign"] and match["minus"]:
        return None
    sign = "-" if match["sign"] or match["minus"] else ""
    fraction = match["frac"] or (match["mixed"] or "").strip()
    power = match["exp"] or match["ten"] or match["power"]
    if power and (fraction or match["over"] or len(match["digits"]) * max(abs(int(power)), 1) > 4000):
        return None  # also where Python would refuse to print the value
    if fraction:
        braced = re.fullmatch(r"\\[dtc]?frac\s?(?:\{(\d+)\}|(\d))\s?(?:\{(\d+)\}|(\d))", fraction)
        top, bottom = [part for part in braced.groups() if part] if braced else fraction.split("/")
        return f"{sign}{match['whole'] + ' ' if match['whole'] else ''}{top}/{bottom}"
    digits = match["digits"].replace(",", "") + (match["over"] or "")
    if not power:
        return sign + digits
    value = (
        Fraction(digits) ** int(power) if match["power"] else Fraction(digits) * Fraction(10) ** int(power)
    )
    return sign + plain(value)


def plain(value):
    """A decimal fraction in plain digits, all of them."""
    if value.denominator == 1:
        return str(value.numerator)
    with localcontext() as context:
        context.prec = 10_000  # more than any value has that whole_number lets through
        return format(Decimal(value.numerator) / value.denominator, "f")


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} or \fbox{...}; after `\boxed 5`, all up to a $ or a new line.

    What stands around the box is not looked at, as in the published graders.
    """
    boxes = boxes_of(text, parts=True)
    return boxes[-1][0] if boxes else None


# Between the boxes of one list, without blanks: a unit, a separator, and the name of the next value.
LISTED = re.compile(
    rf"(?P<unit>\^\{{?\\circ\}}?|\\?%|m|{MEASURE}s?(?=\Z)|(?!and|or)[a-z]{{2,12}}?(?=,|and|or))?"
    r"(?P<sign>[,;]?)"
    r"(?P<word>(?:(?:and|\(?or|to),?(?:maybe|possibly|perhaps|alternatively|rather),?|and|\(?or|to)?)"
    r"(?:(?:[A-Z]{2,3}|[A-Z][a-z]+|\\[a-z]+|[A-Za-z](?:_\{?\d\}?|\(\d+\))?)[=:])?"
)


def last_boxes(text: str) -> str | None:
    r"""The last \boxed, and those before it that it is listed with: "\boxed{1} and \boxed{2}" says 1, 2.

    "\boxed{1/2} or \boxed{0.5}" says the second of them, since both are the same.
    """
    *others, last = boxes_of(text)[-20:] or [(None, "")]
    found = [last[0]]
    for content, between in reversed(others):
        between = re.sub(r"\\text\s*\{([^{}]*)\}|\\q?quad|\\[()\[\]]|[\s$*]", r"\1", between[:80])
        listed = LISTED.fullmatch(between.replace(" ", ""))
        if not listed or not (listed["unit"] or listed["sign"] or listed["word"]):
            break
        if not content or not found[0]:
            return None
        if "or" not in listed["word"] or meaning(content[:MAX_CHARS]) != meaning(found[0][:MAX_CHARS]):
            found.insert(0, content)
    return ", ".join(found) if found[0] else None


def boxes_of(text, parts=False):
    r"""[(content or None, the text up to the next box)] of every \boxed and \fbox, braces balanced.

    None, too, where what is around the box makes it a part of another value: -\boxed{5}, \boxed{5}x,
    \frac{\boxed{5}}{6}, \boxed{5} million. With `parts` such a content counts, too.
    """
    found = []
    before, *others = re.split(r"\\(?:boxed|fbox)(?![a-z])\s*", text)
    for rest in others:
        end = closing_brace(rest) if rest.startswith("{") else re.search(r"[$\n]|$", rest).start()
        content = None if end is None else rest[rest.startswith("{") : end].strip()
        between = rest[(end or 0) + 1 :]
        is_part = not parts and not is_box_whole("boxed" * bool(found) + before, between)
        is_part |= not parts and rest is others[-1] and is_hedged(between)
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
