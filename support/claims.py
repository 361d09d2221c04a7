"""What a text claims: its final number, or what it boxes; whole, or not at all."""

import re
from decimal import Decimal
from fractions import Fraction

from support.expressions import INVISIBLE
from support.meanings import MAX_CHARS, UNITS, meaning

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
# What stands around a number must be known to leave it as it is, or the number is not claimed.
LATIN = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
PICTURES = "✓✔✅\ufe0f\U0001f300-\U0001faff"
NUMBER_WORD = rf"(?:{'|'.join(TWELVE)}|[a-z]+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)"
PARTS = "(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]*teen|[a-z]*tie|hundred|thousand)ths"
SCALES = (
    "doz|dozens?|gross|pairs?|couples?|hundreds?|thousands?|lakhs?|crores?|[a-z]*illion[a-z]*"
    "|mil|mille|millones|tausend|half|halves|thirds?|quarters?|squared|cubed|factorial|point|plus|minus"
    "|bn|mn|tens|divided|multiplied|x?or|nor|vs|versus|negative|below|base|remainder|mod|modulo|[ap]\\.?m"
)
# Words among the next three that make a number another one, alone or before a hyphen.
ANOTHER = re.compile(rf"(?:{SCALES}|{PARTS}|{NUMBER_WORD})(?:-|$)")
CORRECTION = re.compile(
    r"[^\n]*\b(?:(?:wait|actually|sorry|correction|or\s+rather|but|i\s+meant?|hmm|oops"
    r"|(?:scratch|make)\s+that|wrong|incorrect|is\s+not|isn't)\b|no\s*(?:[,.;:]|\$?\d))",
    re.IGNORECASE,
)
# What may touch a number: percent, degrees, an ordinal's ending, a unit; no other letter, no operator.
TOUCHES = re.compile(
    r"(?:\s?\\?%|\s?°[CF]?|\^\{?\\circ\}?|(?:st|nd|rd|th|cm|mm|km|m|kg|mg|g|ft|in|mph|lbs?|oz|ml|L|hrs?|mins?)\b)?"
    rf"(?:\s\({NUMBER_WORD}\))?(?![^\W_]|\s?[!?]|[-+^]|\*\*\d|/(?![a-z]))"
)
FOLLOWS = re.compile(
    # the sentence ends, or a clause begins that does not change the value
    r"(?P<end>\n|<[|/]|(?<!\s)[.!?](?=[\s*_$)\\\"'”’]*(?:\s|$))"
    r"|\b(?:in|for|after|from|because|since|where|when|which|not)\b(?!\s+(?:every|base)\b)"
    rf"|\b(?:to|by)\s+(?!{NUMBER_WORD}\b)[a-z])"
    rf"|(?P<word>[ap]\.m\b|[{LATIN}]+(?:['’-][{LATIN}]+)*)"
    rf"|(?P<mark>[{PICTURES}]"
    r"|[\s,;:.()\[\]{}*_$€£\"'`“”‘’…—&~]|/(?=[a-z])|(?<=[a-z])\^\{?[23]\}?"
    r"|\\(?:[%$()\[\],;:! \\]|n\b|q?quad\b))"
    r"|(?P<other>.)"
)
# What may stand between a number and what is before it.
LEADS_TO = "approx|equiv|implies|to|in|[lg]eq?|therefore|[A-Za-z]*[rR]ightarrow"
OPENING = re.compile(
    rf"(?:[{PICTURES}]|[\s*_$€£(\[{{\"'`“‘&~]|\\[$(\[,;:! ]|\\(?:q?quad|left|displaystyle)\b)*\Z"
)
PRECEDES = re.compile(
    rf"(?:[=≈≡→⇒∴]|[-=>]>|\.\.+|…|[{LATIN})]:|\\(?:{LEADS_TO})"
    rf"|(?:[{LATIN}][%°)”’\"',;.!?*_$]*|\d[\d,]*[%°)”’\"'$]*[,;.]|^\$*[,;.]*|\\\\)(?P<spaced>))\Z"
)
ITEM = re.compile(r"(?:^|\n)[ >]*(?:[-+*•]|#+|\d+[.)])\Z")  # "- 18", "3. 18"
# What before a number makes it another one: words, a single letter, a command of LaTeX ...
NOT_THIS = re.compile(
    r"(?:\b(?:not|isn't|negative|minus|plus|times|over|half|twice|double)"
    r"|\b(?:less|more|fewer|greater)\s+than|\b(?:divided|multiplied)\s+by|(?<!['’])\b[^\W\d_a])(?:\s+of)?\Z"
    rf"|\\(?!{LEADS_TO})[A-Za-z]+\Z",
    re.IGNORECASE,
)
# ... or one of several: an alternative, the end of a range, the last of a pair.
ONE_OF = re.compile(
    r"(?:(?<!,)\s(?:or|nor|vs|versus)|between\s.*and|\d\s+(?:to|a)|[(\[][^()\[\]]*,)\Z", re.IGNORECASE
)


# As DeepSeek-R1 and Qwen3, Magistral, Kimi, and Sky-T1 spell it.
THOUGHTS_BEGIN = re.compile(r"<think(?:ing)?>|<reasoning>|\[THINK\]|◁think▷|<\|begin_of_thought\|>")
THOUGHTS_END = re.compile(r"</think(?:ing)?>|</reasoning>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>")


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
    """What stands in the last box, or None; "" if that is empty, cut off or a part of a formula."""
    return (last_boxes(text) or "").replace("\n", " ") if boxes_of(text) else None


FILLERS = "therefore|thus|then|simply|just|equal to|exactly|only|about|approximately|a total of|US(?=\\$)"
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
            return re.sub(rf"(?i)^\W*(?:{FILLERS})\b,?", "", found[-1])
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
    """A match of NUMBER as plain digits or a fraction; None if what is around it may make it another one."""
    before = match.string[max(match.start() - 40, 0) : match.start()]
    rest = re.sub(r"\s{3,}", shorter, match.string[match.end() : match.end() + 300])
    if not is_preceded_well(before) or not is_followed_well(rest):
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


def is_preceded_well(before, alone=True):
    """Whether what is before a number leaves it as it is: a line's start, "=", ":", or a word and a space.

    If it must stand `alone`, no alternative may be before it.
    """
    before = without_text(before)
    opening = OPENING.search(before)
    rest = before[: opening.start()]
    if not rest or "\n" in opening[0] or opening[0][:1].isspace() and ITEM.search(rest):
        return True
    found = PRECEDES.search(rest)
    if not found or NOT_THIS.search(rest) or alone and ONE_OF.search(rest):
        return False
    return found["spaced"] is None or opening[0] != ""


def is_followed_well(rest):
    """Whether what follows a number leaves it as it is: words for what is counted, up to a clause's end."""
    rest = without_text(rest)
    touches = TOUCHES.match(rest)
    if not touches or CORRECTION.match(rest):
        return False
    words = []
    for token in FOLLOWS.finditer(rest, touches.end()):
        if token["end"]:
            return True
        if token["other"]:
            return False
        if token["word"]:
            word = token["word"]
            words.append(word)
            if len(word) == 1 and word not in ("a", "L", *UNITS) and (word.islower() or len(words) == 1):
                return False  # 5 x, 5 less than x, 5 M
            if len(words) <= 3 and ANOTHER.match(word.lower()):
                return False
    return True


def without_text(latex):
    r"""Words in \text{...} as plain words."""
    return re.sub(r"\\(?:text\w*|mbox|mathrm|mathbf)\s*\{([^{}]*)(?:\}|$)", r" \1 ", latex)


def shorter(run):
    """A run of white space as two: the patterns above are slow on long ones."""
    return "\n\n" if "\n" in run[0] else "  "


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


# Between the boxes of one list; "," and ";", "and" and "or" are its separators.
LISTED = re.compile(r"(?P<sign>[,;]?)(?P<word>(?:and|\(?or)?)(?:[A-Za-z](?:_\{?\d\}?)?=)?")


def last_boxes(text: str) -> str | None:
    r"""The last \boxed, and those before it that it is listed with: "\boxed{1} and \boxed{2}" says 1, 2.

    "\boxed{1/2} or \boxed{0.5}" says the second of them, since both are the same.
    """
    *others, last = boxes_of(text) or [(None, "")]
    found = [last[0]]
    for content, between in reversed(others):
        between = re.sub(r"\\text\s*\{([^{}]*)\}|\\q?quad|\\[()\[\]]|[\s$*]", r"\1", between[:80])
        listed = LISTED.fullmatch(between.replace(" ", ""))
        if not content or not found[0] or not listed or not listed["sign"] + listed["word"]:
            break
        if "or" not in listed["word"] or meaning(content[:MAX_CHARS]) != meaning(found[0][:MAX_CHARS]):
            found.insert(0, content)
    return ", ".join(found) if found[0] else None


# What may follow a box; what is counted is outside its value, so "\\boxed{5} pairs" says 5.
BOX_FOLLOWS = re.compile(
    r"(?![!?])(?:\^\{?\\circ\}?|\\?%|°|[$\s)\]}*_\"'”’`|~]|\\(?:[)\],;:! \\%]|q?quad\b|right))*"
    rf"(?:$|[{PICTURES}]|[,;.:…<](?!\d)|[=≈(&!?]|\\(?:text|mbox|mathrm|\(|\[|end\b|approx\b|equiv\b|p?mod(?![a-z]))|(?:\n|[-–—]\s)"
    r"|(?!(?:dozens?|hundreds?|thousands?|lakhs?|crores?|[a-z]*illion[a-z]*"
    rf"|is\s+(?:wrong|incorrect|not\s+(?:right|correct|the\s+(?:right|correct|answer)))|(?:to|or)\s+\$?\d)\b)(?:[{LATIN}]{{2,}}|[{LATIN}][’'&][{LATIN}]|a(?=\s)))",
    re.IGNORECASE,
)


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
        is_part = not parts and not (
            is_preceded_well(before[-60:], False) and BOX_FOLLOWS.match(between[:80])
        )
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
