"""What may stand around a number, or around a box, if it is to be the whole value that a text claims.

A list of everything that makes 5 another number (5 dozen, 5 + 1, 5 or 6, 2 - 5) would never end. So this is
the other list: of what is known to leave it as it is. With anything else around it, nothing is claimed. Only
words are let through unknown, since they say what is counted; those that change a number are listed.
"""

import re

from support.meanings import UNITS


def one_of(words):
    """A pattern for any of some words."""
    return f"(?:{'|'.join(words.split())})"


LETTER = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"  # Latin; not the signs of times and of division
PICTURE = "✓✔✅\ufe0f\U0001f300-\U0001faff"
NUMBERS = "one two three four five six seven eight nine ten eleven twelve"
NUMBER_WORD = (
    rf"(?:{one_of(NUMBERS)}|[a-z]+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|[a-z]*illion[a-z]*)"
)
PART = "(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]*teen|[a-z]*tie|hundred|thousand)ths?"
MEASURE = one_of("hour hr minute min day week month year foot feet ft yard meter pound lb gallon dollar")
# Words that make the number before them another one, alone or before a hyphen.
SCALE = one_of(
    "doz dozen dozens gross score pair pairs couple couples tens hundred hundreds thousand thousands lakh"
    " lakhs crore crores mil mille millones tausend kilo bn mn half halves third thirds quarter quarters"
    " squared cubed doubled tripled halved twice thrice raised reduced increased decreased factorial point"
    " plus minus divided multiplied or xor nor vs versus negative below under base binary octal hexadecimal"
    " remainder mod modulo power zero am pm"
)
ANOTHER = re.compile(rf"(?:{SCALE}|{PART}|{NUMBER_WORD}|[ap]\.m)(?:-|$)|grand$")
# What takes a number back, later on its line.
CORRECTION = re.compile(
    r"""[^\n]*\b(?:
        (?: wait | actually | sorry | correction | or\s+rather | but | i\s+meant? | hmm | oops
          | (?:scratch|make)\s+that | second\s+thought | re(?:do|compute|calculate|check) | should\s+be
          | corrected | my\s+bad | hold\s+on
          | too\s+(?:high|low) | wrong | incorrect | false | mistake | cannot
          | (?:is|does|was)\s+not | \w+n['’]t | not\s+(?:the\s+)?(?:answer|right|correct)
        )\b
      | no\s*(?:[,.;:]|\$?\d)
    )""",
    re.IGNORECASE | re.VERBOSE,
)
# What may touch a number: percent, degrees, an ordinal's ending, a unit, its word; no letter, no operator.
ENDING = one_of("st nd rd th cm mm km m kg mg g ft in mph lb lbs oz ml L hr hrs min mins")
TOUCHES = re.compile(
    rf"""(?: \s?\\?% | \s?°[CF]? | \^\{{?\\circ\}}? | {ENDING}\b )?
         (?: \s\({NUMBER_WORD}\) )?
         (?! [^\W_] | \s?[!?] | [-+^] | \*\*\d | \s\*\s | \s?\.\.\s?\d | \sfrom\s[\d$] | /(?![a-z]) )""",
    re.VERBOSE,
)
# What follows a number, piece by piece, up to the end of the sentence, or a clause that leaves it as it is.
FOLLOWS = re.compile(
    rf"""(?P<end> \n | <[|/] | (?<!\s)[.!?](?=[\s*_$)\\"'”’]*(?:\s|$))
          | \b(?: in | for | after | from | because | since | not
                | (?:when|where|to|by)(?=\s+(?!the\b|{NUMBER_WORD}\b)[a-z])
              )\b(?!\s+(?:every|{SCALE}|[a-z]*illions?)\b)
         )
       | (?P<word> [ap]\.m\b | [{LETTER}]+(?:['’-][{LETTER}]+)* )
       | (?P<mark> [\s,;:.()\[\]{{}}*_$€£"'`“”‘’…—&~{PICTURE}] | /(?=[a-z]) | (?<=[a-z])\^\{{?[23]\}}?
          | \\(?:[%$()\[\],;:!\ \\] | n\b | q?quad\b)
         )
       | (?P<other> . )""",
    re.VERBOSE,
)
# A second number in the sentence, which may be the one that is meant.
ABBREVIATED = re.compile(rf"\b{ENDING}\.\s?\d")  # 5 ft. 2 in.
SUMMED = r"\b(?:total|altogether|overall|combined|in\s+all)\b"
TOTAL = re.compile(
    rf"[^.\n]*(?:(?:{SUMMED}|\b(?:or|and|plus|minus|times|so|making)\b|[+=×*/&;→]|\s-\s|->)[^.\n]*\d"
    rf"|\d[^.\n]*{SUMMED}|,\s\$?\d+\s(?:for|in|to|from)\b)",
    re.IGNORECASE,
)
# What may be between a number and the text before it: blanks, brackets, currency, marks for bold, and the two
# characters of a line break in JSON that was not read.
OPENING = re.compile(
    rf"""(?: [\s$€£"'`“‘&{PICTURE}] | (?<!~)~(?!~) | (?<![A-Za-z])[(\[{{] | (?<=\\left)[(\[]
           | (?<![\w)])(?:\*+|_+)(?![\s*])
           | \\[$(\[,;:!\ ] | \\n(?![a-z]) | \\(?=\Z)
           | \\(?:q?quad|left|displaystyle)\b
         )*\Z""",
    re.VERBOSE,
)
LEADS_TO = r"\\(?:approx|simeq|equiv|implies|to|in|[lg]eq?|therefore|[A-Za-z]*[rR]ightarrow)"
PRECEDES = re.compile(
    rf"""(?: (?<![<>/])(?<![A-Za-z\s]!)(?<!\\not)= | [≈≡→⇒∴…] | [-=>]> | \.\.+ | {LEADS_TO}
           | [{LETTER})][*_$]*:[*_]* | <\w+> | \\end\{{\w+\*?\}}
           | (?P<spaced> [{LETTER}][%°)”’"',;.!?*_$]* | \d[\d,]*[%°)”’"'$]*[,;.] | ^\$*[,;.]* | \\\\ )
         )\Z""",
    re.VERBOSE,
)
ITEM = re.compile(r"(?:^|\n)[ >]*(?:[-+*•>]|#+|\d+[.)])\Z")  # "- 18", "3. 18"
# What before a number makes it another one ...
NOT_THIS = re.compile(
    rf"""(?: \b(?: not | never | neither | no\s+longer | cannot\s+be | but | except | negative | minus | plus
               | \w+n['’]t(?:\s+(?:be|equal))? | times | over | half | twice | thrice | double | triple
               | choose | log | than | instead\s+of | opposed\s+to | in\s+place\s+of
               | (?:different|subtracted|taken|down|up)\s+from | (?:added|raised)\s+to
               | (?:divided|multiplied)\s+by
             )(?:\s+(?:the|just|even|exactly|about))?
           | (?<!['’])\b[^\W\d_a]         # x 5
           | (?!{LEADS_TO})\\[A-Za-z]+    # \sqrt 5
           | [(\[][^()\[\]A-Za-z]*,       # (4, 5
         )\Z""",
    re.IGNORECASE | re.VERBOSE,
)
# ... or part of another one, or one of several: a share, a power, a sum, an alternative, the end of a range.
NOT_ALONE = re.compile(
    rf"""(?: (?: [\d%] | \b(?: percent | half | halves | thirds? | quarters? | {PART} | root | square | cube
                            | power | factorial | log | sum | product | quotient | opposite | negative
                            | reciprocal | value )
             )\s+of
           | (?:\b{NUMBER_WORD}|hundred|thousand)(?:\s+(?:to|a|and))? | \d\s+(?:to|a|and) | between\s.*and
           | (?<!,\s)\b(?:or|nor|vs|versus)
           | \d\s?[a-z]+(?:,?\s+and)? | \d\s?{ENDING}\.    # 2 hours 5, 2 hours and 5, 2 hrs. 5
           | \b(?:an?|{NUMBER_WORD})\s{MEASURE}s?\s+and
           | (?: \b[a-z]\^\d+ | \b\d+[a-z] | -[a-z] | \| | [a-z]/\d+ | \d/[a-z] )\s*=    # 2x = 5
           | \b[a-z]\s?[-+*/]\s?\d+\s*=    # x + 2 = 5
           | \broot | \bsqrt | (?:%|\bpercent|\bdiscount|\breduction)\s(?:off|on)
         )\Z""",
    re.IGNORECASE | re.VERBOSE,
)
# Words after a box that make its value another one; what is counted does not: "\boxed{5} pairs" says 5.
NO_COUNT = (
    r"(?:grand|degrees?\s+below|below|bn|dozens?|hundreds?|thousands?|lakhs?|crores?|[a-z]*illion[a-z]*"
    r"|squared|cubed|plus|minus|base|sqrt|pi"
    rf"|cannot|factorial|out\s+of|to\s+the\s|(?:to|through|times)\s*\}}?\s*(?:\\?[($]*-?[\d,]+|{NUMBER_WORD})"
    r"|(?:is|was)\s+(?:(?:the|a)\s+)?(?:wrong|incorrect|false)"
    r"|(?:is|was)\s+not\s+(?:right|correct|the\s+(?:right|correct|answer)))\b"
)
# After the last box, what takes it back or adds another value.
SPACED = r"(?: [\s$*_)},;~(] | \\(?: q?quad | text\w*\s*\{ | [,;:!\ ()] ) )*"
HEDGED = re.compile(
    rf"""{SPACED}
         (?: n?or\b(?!\s+else)
           | (?:wait|actually|sorry|alternatively|maybe|possibly|perhaps|isn['’]t|wasn['’]t)\b
           | no\b[,\s]*(?:wait|\$?\d)
           | {MEASURE}s?\.?,?\s+(?:and\s+)?\d | (?:more|less|fewer)\s+than\s\$?\d
           | and\b {SPACED} (?: -?\\?\$?\d | a\s+(?:half|third|quarter)
                             | [a-z]\s*= | \\[dt]?frac | \\sqrt | {NUMBER_WORD}\b )
         )""",
    re.IGNORECASE | re.VERBOSE,
)
# Before a box, another value that it is listed with, or what makes an index of it.
LISTED_WITH = re.compile(
    r"(?:^|[\s$-])\d+(?:,\d{3})*(?:\.\d+)?[\s$%]*(?:,\$?|(?<!\d)(?:or|and|to|through)\s+[$\s]*)\Z|[_^]\{?\Z"
    r"|(?:^|[\s$(])([a-z])\s*=\s*-?\d+\$?\s+or\s+\$?\1\s*=[\s$]*\Z"
    rf"|\b(?:an?|\d+|{NUMBER_WORD})\s{MEASURE}s?,?\s+and[$\s]+\Z"
    rf"|(?<!in )\b{NUMBER_WORD}\s+(?:or|to|in|and)[$\s]+\Z"
)
# What follows a box: marks; then words, a relation, or a sentence's end.
BOX_FOLLOWS = re.compile(
    rf"""(?![!?(])
         (?: \^\{{?\\circ\}}? | \\?% | [°$€\s)\]}}*_"'”’`|~]
           | \\(?:[)\],;:!\ \\%] | (?:q?quad|right|checkmark|blacksquare|square)(?![a-z]))
         )*
         (?: $ | \n(?!\s*(?:&\s*)?[+*/^]) | [{PICTURE}。]
           | [,;.:…<](?!\s?(?:-?\d|\$-?\d+\$|\\\$\d|\$?[a-z]\s*=|\\(?:overline|dot|bar|infty)))
           | [=≈!?] | (?<=[\s$])\((?!\s*[a-z]\s*[-+*/^)])
           | \$[a-z]\$-(?!{NO_COUNT}|fold|times)[a-z]{{3}}    # y-intercepts
           | &(?!\s*(?:[-+*/^]|\\times)) | [-–—]\s(?![\d$\\({{])
           | \\(?: \( | \[ | (?:end|approx|equiv|p?mod)(?![a-z])
                | (?:text\w*|mbox|mathrm|operatorname)\s*\{{(?!\s*{NO_COUNT})
                  (?:[\s~]*(?:[{LETTER}]{{2}}|{ENDING}\b)|~[A-Z])
                | AA(?![a-z]) | mu\s*\\mathrm
              )
           | (?!{NO_COUNT})
             (?: (?<=[\s$*"'])[{LETTER}]{{2,}} | [{LETTER}][’'&][{LETTER}] | a(?=\s)
               | (?<=\s)(?-i:[CJNTVW])(?=[\s.,$]|$)    # units
               | \{{~?[{LETTER}]{{2}} | \{{~[A-Z]\}}
               | (?-i:{ENDING}|mod)(?![a-z])
             )
         )""",
    re.IGNORECASE | re.VERBOSE,
)


# A calculation that a box ends, whatever blanks and line breaks are between.
UNFINISHED = re.compile(
    r"(?:\w *[-+*/^]|[=(]\s*-|(?:\\\[|\$)\s*-|\\(?:sqrt|[dt]?frac)\s*\{|\\infty\s*,|[/^_])\s*\Z"
)


def is_whole(before: str, after: str) -> bool:
    """Whether a number between two texts is a value of its own."""
    return is_preceded_well(before[-40:]) and is_followed_well(after[:300])


def is_box_whole(before: str, after: str) -> bool:
    r"""Whether a \boxed{...} between two texts is a value of its own, or one of several.

    Words for a share or a power before it ("half of \boxed{10}") are not looked at.
    """
    if LISTED_WITH.search(before[-60:]) or UNFINISHED.search(before[-60:]):
        return False
    return is_preceded_well(before[-60:], alone=False) and BOX_FOLLOWS.match(after[:80]) is not None


def is_hedged(after: str) -> bool:
    """Whether what follows the last box of a text takes it back, or adds another value."""
    return HEDGED.match(after[:80]) is not None


def is_preceded_well(before, alone=True):
    """Whether a line's start, "=", ":", or a word and a space are before a number, so that it is whole.

    If it must stand `alone`, neither a share of it nor an alternative may be before it (NOT_ALONE).
    """
    before = without_text(before)
    opening = OPENING.search(before)[0]
    rest = before[: len(before) - len(opening)]
    if not rest or "\n" in opening or "\\n" in opening or opening[:1].isspace() and ITEM.search(rest):
        return True
    found = PRECEDES.search(rest)
    if not found or NOT_THIS.search(rest) or alone and NOT_ALONE.search(rest):
        return False
    return found["spaced"] is None or opening != "" or not alone and rest[-1] in ",;"


def is_followed_well(after):
    """Whether words for what is counted follow a number, up to the end of a clause, so that it is whole."""
    after = re.sub(r"\s{3,}", shorter, without_text(after))
    touches = TOUCHES.match(after)
    if not touches or CORRECTION.match(after):
        return False
    words = 0
    for token in FOLLOWS.finditer(after, touches.end()):
        if token["end"]:
            if token["end"] in ("because", "since"):
                return True
            if token["end"].isalpha():
                return not TOTAL.match(after, token.end())
            return not ABBREVIATED.search(after[: token.end() + 9], token.start() - 4)
        if token["other"]:
            return False
        word = token["word"]
        if word:
            words += 1
            if words == 1 and word == "pi":
                return False
            if len(word) == 1 and word not in ("a", "L", *UNITS) and (word.islower() or words == 1):
                return False  # 5 x, 5 less than x, 5 M
            if words <= 4 and ANOTHER.match(word.lower()):
                return False
    return True


def without_text(latex):
    r"""Words in \text{...} as plain words."""
    return re.sub(r"\\(?:text\w*|mbox|mathrm|mathbf)\s*\{([^{}]*)(?:\}|$)", r" \1 ", latex)


def shorter(run):
    """A run of white space as two characters: the patterns above are slow on long ones."""
    return "\n\n" if "\n" in run[0] else "  "
