"""What an answer stands for (numbers, expressions, sets, intervals, relations, text); when two are equal."""

import collections
import re
from fractions import Fraction
from typing import NamedTuple

from support.expressions import ARITHMETIC, CLOSING, OPENING, TIMES, tokens_of, value_of

# No answer is longer; bounds every integer and every pattern that is not linear, whatever a model writes.
MAX_CHARS = 500
MAX_BRACKETS = 60  # of an answer that is more than text: they may be nested
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
        "gram g gm",
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
        "student",
        "teacher",
        "meal",
        "way",
        "digit",
        "integer",
    )
    for name in names.split()
    for word in (name, name + "s")
}


def is_value(answer: str) -> bool:
    """Whether an answer is a number or formula, without words and anything else that is only compared as
    text."""
    wordless = all(token.kind != "word" or token.text in UNITS for token in tokens_of(answer))
    return wordless and all(piece.value[0] != "text" for piece in pieces_of(answer))


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
    several, the order. An inequality of a name is an interval, and several of one name are their union; an
    equation is one with its multiples. In a list with \in or a relation other than =, "and" is not "or", and
    a comma is "or". A percentage is its number, where % ends a value. A unit (UNITS) may be left out; if both
    have one, it must be the same.

    An answer must be worked out: 9+1, 100/5, 2^{10}, \sqrt{25} and 5! are not 10, 20, 1024, 5 and 120, or a
    policy would learn to repeat the question; for the same reason 2(x+1) is not 2x+2, and x+x not 2x. Sums
    and products of numbers are compared as they are written, since 10-15 may be a range and 2*3 a size; so is
    whatever has a word or a command that expressions.py does not list. Known misses, right answers marked
    wrong: 0.5 for 50\%, m+n = 5 for 5 (it may stand in the question), 2516 for 2516_8, 1:03 for 1:03 PM, 12th
    for 12, a unit of one letter, "sq" and "cu" outside \text (5 m for 5), names in other capitals (BA for AB,
    NO for No), rounding, decimal commas, identities of functions, i^2 = -1, |x|, sums of matrices, conversion
    of units, \sqrt{4x} for 2\sqrt{x} (no root of variables is worked out, since that of x^2 is not x), (1,2)
    for "x>1 and x<2".
    Known hits: "x=1 and y=2" is "x=1 or y=2"; a list in another order, even where the order was asked for; 0x
    is 0 and 1x is x; small letters are factors (iv is vi); 2 = 7 says 7; products, quotients and powers of
    variables, fractions and roots that are left ((4a)^2 for 16a^2, \frac{84}{144} for \frac{7}{12}, \sqrt{8}
    for 2\sqrt{2}), which may be the question itself.
    """
    ours, theirs = pieces_of(answer), pieces_of(label)
    if len(ours) == len(theirs):
        if same_equations(ours, theirs):
            return True
        named, other = [piece.name for piece in ours], [piece.name for piece in theirs]
        if all(named) and all(other):
            return same_named(ours, theirs) and same_units(answer, ours, label, theirs)
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
    r'^[^"]*\d"$': "inch",
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
    if len(ours) != len(theirs):  # 5 cm, -5 cm and \pm 5 m
        return set(named[0]) == set(named[1])
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
    sequence = any(token.text in ("\\ldots", "\\dots", "\\cdots") for token in tokens)  # its order counts
    if sequence or sum(token.text in OPENING for token in tokens) > MAX_BRACKETS:
        return [Piece(text_of(tokens))]
    parts, found = split(tokens, (",", ";", "and", "or"))
    if not all(parts) or "and" in found and "or" in found:
        return [Piece(text_of(tokens))]
    pieces = [piece_of(part) for part in parts]
    for i in range(1, len(pieces)):  # x = 1, 2 is x = 1, x = 2
        if pieces[i - 1].name and not pieces[i].name and found[i - 1] != ";":
            pieces[i] = pieces[i]._replace(name=pieces[i - 1].name)
    if "and" in found and any(token.text in (*RELATIONS[1:], "\\in") for token in tokens):
        return [Piece(("and", *sorted(((piece.name, piece.value) for piece in pieces), key=repr)))]
    names = {piece.name for piece in pieces}
    of_one_name = len(pieces) > 1 and len(names) == 1 and "" not in names
    are_intervals = all(piece.value[0] in ("(", "[") for piece in pieces)
    if of_one_name and are_intervals and all(map(is_inequality, parts)):  # x < -1 or x > 1
        values = sorted((piece.value for piece in pieces), key=repr)
        return [Piece(("union", *values), pieces[0].name)]
    return pieces


def is_inequality(tokens):
    """Whether tokens have a relation with a direction, as x < 5."""
    return any(token.text in ("<", ">", "\\le", "\\ge") for token in tokens)


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
    members, found = split(tokens, ("\\in",))
    if found:
        if len(found) > 1 or not is_name(members[0]):  # x \in A \cup x \in B
            return Piece(text_of(tokens))
        inside = piece_of(members[1])
        return inside if inside.name else inside._replace(name=spelled(members[0]))
    sides, roughly = split(tokens, ("\\approx",))
    if roughly:  # x = 1/3 \approx 0.33 says 1/3
        tokens = sides[1] if is_name(sides[0]) or not sides[0] else sides[0]
    sides, relations = split(tokens, RELATIONS)
    if not all(sides):
        return Piece(text_of(tokens))
    if not relations:
        tokens, unit = without_unit(tokens)
        return Piece(value_of_part(tokens), unit=unit)
    if set(relations) != {"="}:
        return relation_of(sides, relations)
    last, unit = without_unit(sides[-1])
    worked = [value_of(side) for side in (*sides[1:-1], last)]
    if len(sides) > 2 and (None in worked or len({read[0] for read in worked}) > 1):
        return Piece(text_of(tokens))  # x=5 x=2 is no chain
    solved = is_name(sides[0]) and not any(token.kind == "letter" for token in last)
    equation = equation_of(sides) if len(sides) == 2 and not solved else ()  # 3x = 9 is not x = 3
    if is_name(sides[0]):
        return Piece(value_of_part(last), spelled(sides[0]), unit, equation)
    named = any(
        token.kind in ("letter", "word") or token.kind == "command" and token.text not in ARITHMETIC
        for side in sides[:-1]
        for token in side
    )
    if not named and not any(token.kind == "letter" for token in sides[-1]):
        return Piece(value_of_part(last), unit=unit)  # 5 + 5 = 10 says 10
    return Piece(equation or text_of(tokens), equation=equation)


def spelled(tokens):
    """The texts of tokens, joined."""
    return "".join(token.text for token in tokens)


def is_name(tokens):
    r"""Whether tokens name a value: x, x_1, f(2), (p,q), |AB|, V_1:V_2, \frac{NO}{BO}."""
    text = re.sub(r"_(\{[^{}]*\}|.)|(?<=[A-Zd-hp-w])\([^()]*\)", "", spelled(tokens))  # x(2) is a product
    text = re.sub(r"\\(angle|triangle|overline|frac)(?![a-z])", "", text)
    text = re.sub(r"\\(alpha|beta|theta|lambda)(?![a-z])", "a", text)
    if re.fullmatch(r"[a-z]{2,}|\|[a-z]+\|", text) or text.count("|") % 2:  # |x| = 5 says x = -5, too
        return False
    return re.fullmatch(r"[A-Za-z{}()|:,']*[A-Za-z][A-Za-z{}()|:,']*", text) is not None


def difference(sides):
    """Left minus right at two points: two relations say the same if their quotient is the same."""
    if any(token.text in ("\\pm", "\\mp") for side in sides for token in side):
        return None
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
    return at if at[0] != at[1] else None


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
    return Piece((opening, low, high, closing), spelled(name))


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
        if any(re.match(r"0\d", token.text) for token in tokens):
            return text_of(tokens)  # a time
        return ("ratio", *(value_of_part(part) for part in ratio))
    return bracketed_value(tokens) or matrix_value(tokens) or number_value(tokens)


def bracketed_value(tokens):
    """The value of a tuple, interval or set, or of the contents of brackets that only group; or None."""
    opening, closing = (tokens[0].text, tokens[-1].text) if tokens else ("", "")
    if opening not in OPENING or closing not in CLOSING or not closes(tokens):
        return None
    parts, commas = split(tokens[1:-1], (",", ";"))
    values = [value_with_unit(part) for part in parts]
    if opening == "\\{":
        return joined(values) if commas else ("set", *values)  # {5} is not 5
    if opening == "{" or not commas and (opening, closing) == ("(", ")"):
        return joined(values)
    if not commas and values[0][0] == "matrix":
        return values[0]
    return (opening, *values, closing)


def value_with_unit(tokens):
    """The value of one part within brackets, and its unit, if it has one."""
    tokens, unit = without_unit(tokens)
    value = value_of_part(tokens)
    return ("of unit", value, unit) if unit else value


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
    signs = [token.text for token in tokens if token.text in ("\\pm", "\\mp")]
    if signs.count("\\pm") > 1:  # of two or of four values
        return text_of(tokens)
    if signs:
        two = [value_of(tokens, sign) for sign in (1, -1)]
        if None in two or two[0][1] == "numbers":
            return text_of(tokens)
        return ("pm", *(("number", *value) for value in two))
    read = value_of(tokens)
    if read is None or read[1] == "numbers":  # 10-15 is a range, 2*3 a size: not the same as 20-25, 3*2
        return text_of(tokens)
    return ("number", *read)


def is_unit(token):
    """Whether a token is a unit's name; a letter outside \\text is a variable: 4s is not 4."""
    return token.kind == "word" and token.text in UNITS


POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}


def without_unit(tokens):
    """-> tokens before % or a unit such as "cm" or "km/h", and the unit's words, abbreviations written out"""
    if len(tokens) > 1 and tokens[-1].text in ("%", "\\%"):
        return tokens[:-1], ()  # same_units finds the sign
    end = len(tokens)
    exponent = "".join(token.text for token in tokens[-5:]).replace("{", "").replace("}", "")
    if re.search(r"[a-z]\^[23]$", exponent):
        end -= 4 if tokens[-1].text == "}" else 2
    power = tokens[end:]
    unit = []
    joins = ("/", "per", *POWERS)
    while end > 1 and (is_unit(tokens[end - 1]) or unit and tokens[end - 1].text in joins):
        end -= 1
        word = tokens[end].text
        if word in POWERS:  # before feet, which are in `unit` already: from its end to its beginning
            unit.insert(-1, POWERS[word])
        else:
            unit.append(UNITS.get(word, word))
    if not unit or tokens[end - 1].text in ("_", "^", "+", "-", "*", "/", "="):
        return tokens, ()
    return tokens[:end], (*unit[::-1], *(token.text for token in power if token.kind == "number"))
