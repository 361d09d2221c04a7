r"""The value of one LaTeX expression, exactly, at one point: equal values, equal expressions
(Schwartz-Zippel).

A variable, and everything else without a value of its own (pi, sin(x), f(2)), is replaced by a large integer,
a hash of its name. Expressions that are equal as polynomials have equal values there; any others differ, but
for a chance of about 1e-18. Numbers are Fractions; an irrational root is a Decimal of 300 digits. Words, and
commands that are not listed here, may do anything to what follows them: such a text is no expression.

    expression   [+-] term  (+|- term)*
    term         factor  ([*/] factor | factor)*              2x, \frac12 \sqrt3; 1\frac12 is 3/2
    factor       atom  [_ index]  [^ exponent]  [!]
    atom         number | letter | ( expression ) | \frac | \sqrt | \sin factors ... | \pi ... | f(2), P(x)
"""

import hashlib
import re
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import NamedTuple

DIGITS = 300  # of an irrational number
SAME_DIGITS = 270  # of these count in a comparison
LARGEST = 230  # digits before the point, so that the rest of a sum is not lost beside it
MAX_BITS = 14_000  # of a numerator or denominator; Python prints no number of more than 4,300 digits
MAX_POWER = 1_000
SHORT_WORDS = ("cm", "mm", "km", "dm", "kg", "mg", "ft", "in", "yd", "mi", "lb", "oz", "hr", "ml", "or", "no")
FUNCTIONS = (
    "\\sin",
    "\\cos",
    "\\tan",
    "\\cot",
    "\\sec",
    "\\csc",
    "\\arcsin",
    "\\arccos",
    "\\arctan",
    "\\log",
    "\\ln",
)
SPELLED_OUT = ("\\pi", "\\sqrt", *FUNCTIONS)  # also without their backslash
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho"
    " sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)
NAMES = ("\\infty", "\\ell", *("\\" + name for name in GREEK.split()))
APPLIED = ("f", "g", "h")  # f(x+1) is no product; a(x+1) is one
TIMES = ("*", "\\cdot", "\\times")
OVER = ("/", "\\div")
SIGNS = ("+", "-", "\\pm", "\\mp")
ARITHMETIC = ("\\frac", "\\sqrt", *TIMES, *OVER, *SIGNS)  # commands that name nothing


INVISIBLE = "[\N{ZERO WIDTH SPACE}-\N{RIGHT-TO-LEFT MARK}\N{ZERO WIDTH NO-BREAK SPACE}]"
# What other spellings are replaced by, in this order.
SPELLINGS = [
    (r"[\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\N{EN DASH}\N{MINUS SIGN}]", "-"),
    (INVISIBLE, ""),
    (r"(?<!\\)\\[][()]|^[\s*`'\"]*=?|[\s*`\"]*$", " "),  # marks around a whole answer
    ("\N{INFINITY}", r"\\infty "),
    ("\N{UNION}", r"\\cup "),
    ("\N{ELEMENT OF}", r"\\in "),
    ("\N{LESS-THAN OR EQUAL TO}|<=|\\\\leq?(?:slant|q)?(?![a-z])", r"\\le "),
    ("\N{GREATER-THAN OR EQUAL TO}|>=|\\\\geq?(?:slant|q)?(?![a-z])", r"\\ge "),
    ("\N{NOT EQUAL TO}|!=|\\\\neq?(?![a-z])", r"\\ne "),
    (r"\\not\s*\\in(?![a-z])", r"\\notin "),
    (r"\\not\s*=", r"\\ne "),
    (r"\\lt(?![a-z])", "<"),
    (r"\\gt(?![a-z])", ">"),
    ("\N{ALMOST EQUAL TO}", r"\\approx "),
    ("\N{PLUS-MINUS SIGN}", r"\\pm "),
    ("\N{MULTIPLICATION SIGN}", r"\\times "),
    ("\N{MIDDLE DOT}", r"\\cdot "),
    ("\N{GREEK SMALL LETTER PI}", r"\\pi "),
    (r"\N{SQUARE ROOT}\s*(\d+)", r"\\sqrt{\1}"),
    ("\N{SQUARE ROOT}", r"\\sqrt "),
    ("\N{SUPERSCRIPT TWO}", "^2"),
    ("\N{SUPERSCRIPT THREE}", "^3"),
    (r"(?<![\d.,])0\{,\}(?=\d)", "0,"),  # a decimal comma
    (r"(?<=\d)(?:\{,\}|\\[!,]|,\s*\\!\s*)(?=\d{3})", ""),  # 1{,}000 and 1,\! 000
    (r"\\(?=[\d-])(?<!\\\\)", r"\\\\"),  # the Q-RM authors' matrices end a row with one backslash
    (r"\\(?:left|right)(?![a-z])\.?|\\(?:[bB]igg?[lr]?|displaystyle|limits)(?![a-z])", ""),
    (r"(?<!\\)\\[!,:; ]|\\q?quad|~|\\?\$|\N{EURO SIGN}|\N{POUND SIGN}", " "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\N{DEGREE SIGN}|\\degree(?![a-z])", " "),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"(?<=\d)\s*\\(?:text|mbox|mathrm)\s*\{\s*([APap])\.?\s?[Mm]\.?\s*\}", "\x01\\1m\x02"),
    (r"(?i)(?<![a-z])([ap])\.\s?m\.?(?![a-z])", "\x01\\1m\x02"),
    (r"(?<=\d)(\s*)([APap])([Mm])(?![A-Za-z])", "\x01\\2m\x02"),
    (r"\\[hv]?phantom\s*(?:\{[^{}]*\}|\S)", " "),
    (r"(?<![A-Za-z])(sq|cu)\.\s*(?=[a-z])", r"\1 "),
    (r"(?<=\\\\)\[\d*\.?\d+\s?(?:pt|em|ex|mm|cm)\]", ""),  # how far below a matrix has its next row
]
TEXT = r"\\(?:text|mbox|mathrm|textrm|textnormal|textbf|mathbf|textit|mathit|operatorname)\s*\{([^{}]*)\}"
TOKEN = re.compile(
    r"\\begin\{\w+\*?\}(?:\{[clr|]*\})?|\\end\{\w+\*?\}|\\\\|\\[a-zA-Z]+|\\."
    r"|(?P<thousands>(?<!,)(?!0)\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d+)?)"
    r"|(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?![\w.]))?)"
    r"|(?P<letters>[A-Za-z]+)|\S",
    re.DOTALL,
)
OPENING = ("(", "[", "{", "\\{")
CLOSING = (")", "]", "}", "\\}")


class NoValue(ValueError):
    """The text is no expression of this grammar."""


class Token(NamedTuple):
    """kind: number, letter (or a name in capitals), word, command, symbol."""

    kind: str
    text: str


def tokens_of(text):
    """The tokens of a LaTeX or plain answer, without spaces, $, degree signs and the sizes of brackets."""
    if "\\begin" not in text:
        text = text.replace("\\\\", "\\")  # no rows to end: it was escaped twice
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    text = re.sub(TEXT, "\x01\\1\x02", text)
    tokens = []
    depth = 0
    in_text = False
    place = 0
    while match := TOKEN.search(text, place):
        found = match[0]
        if match["thousands"] and depth > 0:  # (1,234) is a pair
            found = found.split(",")[0]
        place = match.start() + len(found)
        in_text = found == "\x01" or in_text and found != "\x02"
        depth += (found in ("(", "[", "\\{")) - (found in (")", "]", "\\}"))
        tokens += tokens_in(match, found, in_text, tokens)
    return tokens


def tokens_in(match, found, in_text, before):
    """The tokens of one match of TOKEN, or of `found`, its beginning; none for the two ends of a text."""
    if match["thousands"] or match["number"]:
        return [Token("number", found.replace(",", ""))]
    if match["letters"]:
        return words_or_letters(found, in_text, before)
    if found in ("\x01", "\x02"):
        return []
    return [Token("command" if found[0] == "\\" and found[1:].isalpha() else "symbol", found)]


def words_or_letters(run, in_text, before):
    """The tokens of a run of letters.

    A function or pi; a name in capitals (AB, IV); a word if it is long, a unit or in \text; else a product.
    """
    if "\\" + run in SPELLED_OUT:
        return [Token("command", "\\" + run)]
    if run.isupper() and len(run) > 1:
        return [Token("letter", run)]
    is_unit = bool(before) and (before[-1].kind == "number" or before[-1].text == "/") and run not in "GHKM"
    if len(run) > 2 or in_text and (len(run) > 1 or is_unit) or run.lower() in SHORT_WORDS:
        return [Token("word", run.lower())]
    return [Token("letter", letter) for letter in run]


def hashed(*key):
    """The integer that stands for something without a value of its own."""
    return Fraction(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big"))


def bounded(value):
    """value, if it is not too long to compute with."""
    if isinstance(value, Fraction):
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        if bits > MAX_BITS:
            raise NoValue("too long")
    return value


def as_decimal(value):
    """A Decimal of DIGITS digits."""
    return value if isinstance(value, Decimal) else Decimal(value.numerator) / Decimal(value.denominator)


def snapped(value):
    """A Decimal that is a short fraction as that fraction: the root of 4 is 2."""
    if isinstance(value, Fraction) or abs(value.adjusted()) > LARGEST:
        return value
    near = Fraction(value).limit_denominator(10**6)
    close = near and abs(as_decimal(near) - value) <= abs(value).scaleb(-SAME_DIGITS)
    return near if close else value


def canonical(value):
    """A value that can be compared and hashed: a Fraction, or a Decimal of SAME_DIGITS."""
    value = snapped(value)
    if isinstance(value, Fraction):
        return value
    if value.adjusted() > LARGEST:
        raise NoValue("too large")
    with localcontext() as context:
        context.prec = SAME_DIGITS
        return +value


def both(a, b):
    """The two as numbers of one type."""
    if isinstance(a, Decimal) or isinstance(b, Decimal):
        return as_decimal(a), as_decimal(b)
    return a, b


def add(a, b):
    """The sum, exact or at the hashed point; NoValue where it grows too large."""
    a, b = both(a, b)
    return bounded(a + b)


def multiply(a, b):
    """The product; NoValue where it grows too large."""
    a, b = both(a, b)
    return bounded(a * b)


def divide(a, b):
    """The quotient; NoValue by zero."""
    if b == 0:
        raise NoValue("division by zero")
    a, b = both(a, b)
    return bounded(a / b)


def power(base, exponent):
    """base ** exponent: exact for a whole exponent, else by logarithms, of a positive base."""
    exponent = snapped(exponent)
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        n = int(exponent)
        if abs(n) <= MAX_POWER:
            size = (
                4 * abs(base.adjusted())
                if isinstance(base, Decimal)
                else max(base.numerator.bit_length(), base.denominator.bit_length())
            )
            if base == 0 and n <= 0 or size * abs(n) > MAX_BITS:
                raise NoValue("power")
            return base**n
    if base <= 0:
        raise NoValue("power of a number that is not positive")
    if exponent == Fraction(1, 2):
        return snapped(as_decimal(base).sqrt())
    logarithm = as_decimal(base).ln() * as_decimal(exponent)
    if abs(logarithm) > MAX_POWER:
        return hashed("power", canonical(base), canonical(exponent))
    return snapped(logarithm.exp())


POWER = Token("symbol", "^")


class Reader:
    """Reads one expression from tokens. sign: what \\pm stands for; salt: which point."""

    def __init__(self, tokens, sign=1, salt=0):
        self.tokens, self.sign, self.salt = tokens, sign, salt
        self.i = 0
        # What is left to compute: "", "power" (2^10, 5!, 100/5, the root of 25), "numbers" (9 + 1, 2 * 5, and
        # 10-15, too), or the number of terms of a sum
        self.left = ""

    def peek(self, ahead=0):
        """The text of the next token, or ""."""
        i = self.i + ahead
        return self.tokens[i].text if i < len(self.tokens) else ""

    def kind(self, ahead=0):
        i = self.i + ahead
        return self.tokens[i].kind if i < len(self.tokens) else ""

    def next(self):
        self.i += 1
        if self.i > len(self.tokens):
            raise NoValue("cut off")
        return self.tokens[self.i - 1]

    def expect(self, text):
        if self.next().text != text:
            raise NoValue(f"expected {text}")

    def whole(self):
        """The value of all tokens."""
        if any(token.text == "\\infty" for token in self.tokens) and len(self.tokens) > 2:
            raise NoValue("infinity is no number to compute with")
        value = self.expression()
        if self.i < len(self.tokens):
            raise NoValue("more follows")
        value = canonical(value)
        if any(token.text == "\\sqrt" for token in self.tokens) and self.is_plain(value, 0):
            self.left = self.left or "power"
        return value

    def expression(self):
        """A sum. One in brackets, with variables, is opaque: 2(x+1) is not 2x+2, which a task may ask for."""
        start = self.i
        total = Fraction(0)
        terms, plain = 0, 0
        sign = self.one_sign() if self.peek() in SIGNS else 1
        while True:
            before = self.i
            value = self.term()
            total = add(total, sign * value)
            terms += 1
            plain += self.is_plain(value, before)
            if self.peek() not in SIGNS:
                break
            sign = self.one_sign()
        self.left = "numbers" if plain > 1 else self.left
        if terms > 1 and start == 0 and self.is_symbolic(0):
            self.left = self.left or f"{terms} terms"  # x + x is not 2x
        if terms > 1 and start > 0 and self.is_symbolic(start) and self.tokens[start - 1].text in ("(", "{"):
            return hashed("sum", abs(canonical(total))) * (1 if total > 0 else -1)
        return total

    def is_symbolic(self, start, but=()):
        """Whether a name was read since token `start`."""
        return any(
            t.kind == "letter" or t.kind == "command" and t.text not in (*ARITHMETIC, *but)
            for t in self.tokens[start : self.i]
        )

    def is_plain(self, value, start):
        """Whether what was read since token `start` is a rational number."""
        return isinstance(value, Fraction) and not self.is_symbolic(start)

    def one_sign(self):
        text = self.next().text
        return {"+": 1, "-": -1, "\\pm": self.sign, "\\mp": -self.sign}[text]

    def term(self):
        """A product or quotient of factors."""
        start = self.i
        value = self.factor()
        while True:
            if self.peek() in TIMES or self.peek() in OVER:
                divides = self.next().text in OVER
                plain = self.is_plain(value, start)
                before = self.i
                negative = self.peek() == "-"  # 3 * -2
                if negative:
                    self.next()
                other = -self.factor() if negative else self.factor()
                scientific = self.tokens[before].text == "10" and self.tokens[before + 1 : before + 2] == [
                    POWER
                ]
                again = divides and any(token.text in OVER for token in self.tokens[start : before - 1])
                if plain and self.is_plain(other, before) and (again or not divides and not scientific):
                    self.left = "numbers"  # 2/3/2021 may be a date
                value = self.quotient(value, other, start) if divides else multiply(value, other)
            elif self.starts_factor():
                plain, before = self.is_plain(value, start), self.i
                value = multiply(value, self.factor())
                if plain and self.is_plain(value, before):
                    self.left = "numbers"  # 5(3)
            else:
                return value

    def quotient(self, top, bottom, start):
        """top / bottom, read since token `start`; 100/5 is left to be worked out, 4/6 is not."""
        value = divide(top, bottom)
        whole = self.is_plain(value, start) and value.denominator == 1 and bottom != 1
        self.left = self.left or "power" * whole
        return value

    def starts_factor(self):
        """Whether the next token multiplies without a sign; a number does not: "1 2" is not 2."""
        return (
            self.kind() == "letter"
            or self.peek() in ("(", "{")
            or self.kind() == "command"
            and (self.peek() not in (*SIGNS, *TIMES, *OVER))
        )

    def factor(self):
        """An atom with what is attached to it."""
        place = self.i
        start = self.tokens[place] if place < len(self.tokens) else Token("", "")
        value = self.atom()
        if self.peek() == "_":  # a number in another base, or another variable
            named = tuple(token.text for token in self.tokens[place : self.i])
            value = hashed("index", named, self.index(), self.salt * self.is_symbolic(place))
        if self.peek() == "^":
            is_inverse = self.peek(2 if self.peek(1) == "{" else 1) == "-"
            self.next()
            value = self.raised(value, self.group(), place)
            if start.text in APPLIED and (is_inverse or self.peek() == "(" and not self.has_sum(self.i)):
                raise NoValue("f^{-1}(x), f^2(x)")
            self.left = self.left or "power" * (start.text != "10" and self.is_plain(snapped(value), place))
        if self.peek() == "!":
            self.next()
            self.left = self.left or "power"
            value = factorial(value)
        return value

    def raised(self, base, exponent, start):
        """base ** exponent, read since token `start`; a root of variables is opaque: that of x^2 is |x|."""
        exponent = canonical(exponent)
        is_root = isinstance(exponent, Decimal) or exponent.denominator > 1
        if is_root and self.is_symbolic(start, but=("\\pi",)):
            return hashed("root", canonical(base), exponent)
        return power(base, exponent)

    def index(self):
        """What a subscript says, as text."""
        self.next()
        token = self.next()
        if token.text != "{":
            return token.text
        inside = []
        while self.peek() != "}":
            inside.append(self.next().text)
        self.next()
        return "".join(inside)

    def group(self):
        """A {group}, a signed number or one factor, as the exponent of a power."""
        if self.peek() == "-":
            self.next()
            return -self.one()
        return self.one()

    def one(self):
        """A {group} or one token: \\sqrt2\\frac12 is no root of a mixed number."""
        return Fraction(self.next().text) if self.kind() == "number" else self.atom()

    def argument(self):
        """A {group} or one token, as LaTeX takes it: \\frac12 is 1/2."""
        text = self.peek()
        if self.kind() == "number" and len(text) > 1 and text.isdigit():
            self.tokens[self.i : self.i + 1] = [Token("number", text[0]), Token("number", text[1:])]
        return self.one()

    def bracketed(self, closing):
        value = self.expression()
        self.expect(closing)
        return value

    def atom(self):
        kind, text = self.next()
        if re.fullmatch("00+", text):
            raise NoValue("the 000 of (1,000)")
        if kind == "number":
            return self.mixed(Fraction(text))
        if self.peek() == "(" and (text in APPLIED or self.is_applied(kind, text)):
            self.next()
            return hashed("apply", text, canonical(self.bracketed(")")))
        if kind == "letter":
            return hashed("letter", text, self.salt)
        if text in ("(", "{"):
            return self.bracketed({"(": ")", "{": "}"}[text])
        if kind == "command" and text not in (*SIGNS, *TIMES, *OVER):
            return self.command(text)
        raise NoValue(text)

    def is_applied(self, kind, text):
        """Whether P(2) may be a function's value: no sum is in the brackets, as in the product x(x+1)."""
        is_name = kind == "letter" or text in NAMES and text != "\\pi"
        return is_name and not self.has_sum(self.i + 1)

    def has_sum(self, start):
        """Whether a sum is in the brackets that open at a token."""
        texts = [token.text for token in self.tokens[start + 1 :]]
        inside = texts[: texts.index(")")] if ")" in texts else texts
        return any(sign in inside for sign in SIGNS)

    def mixed(self, whole):
        """1\\frac12 and 1 1/2: the sum of a whole number and a fraction of two whole numbers."""
        shape = "".join(token.text for token in self.tokens[self.i : self.i + 7])
        if whole.denominator == 1 and re.match(r"\\frac(\{\d+\}|\d)(\{\d+\}|\d)", shape):
            return add(whole, self.factor())
        if [self.kind(), self.peek(1), self.kind(2)] == ["number", "/", "number"]:
            top, _, bottom = Fraction(self.next().text), self.next(), Fraction(self.next().text)
            return add(whole, divide(top, bottom))
        return whole

    def command(self, name):
        if name == "\\frac":
            start = self.i
            top = self.argument()
            return self.quotient(top, self.argument(), start)
        if name == "\\sqrt":
            root = Fraction(2)
            if self.peek() == "[":
                self.next()
                root = self.bracketed("]")
            place = self.i
            return self.raised(self.argument(), divide(Fraction(1), root), place)
        if name in FUNCTIONS:
            return self.function(name)
        if name in NAMES:
            return hashed("command", name)
        raise NoValue(name)

    def function(self, name):
        """\\sin 2x, \\log_2 8, \\sin^2 x: opaque, but its argument is read. That of \\sin(2)x is 2."""
        index = self.index() if self.peek() == "_" else ""
        exponent = Fraction(1)
        if self.peek() == "^":
            self.next()
            exponent = self.group()
            if exponent < 0:
                raise NoValue("the inverse of a function, or its reciprocal")
        in_brackets = self.peek() in ("(", "{")
        value = self.atom() if in_brackets else self.factor()
        if in_brackets and self.peek() in ("^", "_", "!"):
            raise NoValue("the power of the sine or of its argument")
        while not in_brackets and self.starts_factor() and self.peek() not in FUNCTIONS:
            value = multiply(value, self.factor())
        return power(hashed("function", name, index, canonical(value)), exponent)


def factorial(value):
    """n! of a small whole number."""
    if value not in range(0, 200):
        raise NoValue("factorial")
    product = Fraction(1)
    for n in range(2, int(value) + 1):
        product *= n
    return product


def value_of(tokens, sign=1, salt=0):
    """-> (canonical value of tokens, what is left to compute: see Reader), or None for no expression"""
    with localcontext() as context:
        context.prec = DIGITS
        try:
            reader = Reader(list(tokens), sign, salt)
            return reader.whole(), reader.left
        except (NoValue, ArithmeticError, RecursionError):
            return None
