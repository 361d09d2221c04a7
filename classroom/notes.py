"""GSM8K's calculator notes, `<<16-3=13>>`: where an answer first goes wrong, and planting errors.

Text in, text out; classroom/real.py asks what a model's scores say at these places.
"""

import random
import re
from fractions import Fraction

from support.files import BadInput

NOTE = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")


def as_number(text):
    """'20,000' -> Fraction(20000); None for what is no plain number."""
    try:
        return Fraction(text.replace(",", "").replace("$", "").strip())
    except (ValueError, ZeroDivisionError):
        return None


def numbers_in(text):
    """All numbers of a text, as a set of Fractions."""
    return {as_number(found.rstrip(",")) for found in NUMBER.findall(text)}


def first_wrong_note(answer, rights):
    """The first calculator note of `answer` whose value occurs in none of the solutions `rights`.

    -> (number of the note, its re.Match), or None if there is no such note. A note whose value is not a
    number ends the search. Right values on an unusual path are flagged, too, and wrong steps whose value
    occurs elsewhere are missed: see part `check`.
    """
    known = set().union(*map(numbers_in, rights))
    for i, note in enumerate(NOTE.finditer(answer)):
        value = as_number(note[2])
        if value is None:
            return None
        if value not in known:
            return i, note
    return None


def evaluate_note(expression):
    """The value of + - * / and brackets over plain numbers as a Fraction, or None."""
    if not re.fullmatch(r"[\d.+\-*/() ]+", expression) or "**" in expression or "//" in expression:
        return None
    exact = re.sub(r"\d*\.?\d+", lambda number: f"Fraction('{number[0]}')", expression)
    try:
        return Fraction(
            eval(exact, {"__builtins__": {}}, {"Fraction": Fraction})
        )  # digits and operators only
    except (SyntaxError, ZeroDivisionError, TypeError, ValueError):
        return None


def spell(value):
    """A Fraction as GSM8K writes it: '12', '2.5'"""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"


def replace_numbers(text, changed):
    """Numbers of a text that are keys of {old: new} replaced, everything else as it is."""

    def replacement(found):
        new = changed.get(as_number(found[0].rstrip(",")))
        return found[0] if new is None else spell(new) + "," * found[0].endswith(",")

    return NUMBER.sub(replacement, text)


def plant_error(solution, note_number, new_value):
    """Changes the result of one calculator note -> two texts, without and with the consequences, or None.

    without   changes the result in the note and its copy right after the note; later lines use the old value
    with      also replaces the old value in what follows, recalculates later notes, and so on to the final
              answer
    None if the result is not repeated, or a later note cannot be calculated or has the old result by chance.

    >>> plant_error("2+3=<<2+3=5>>5\\n5*2=<<5*2=10>>10\\nA: 10", 0, 6)
    ('2+3=<<2+3=6>>6\\n5*2=<<5*2=10>>10\\nA: 10', '2+3=<<2+3=6>>6\\n6*2=<<6*2=12>>12\\nA: 12')
    """
    notes = list(NOTE.finditer(solution))
    note = notes[note_number]
    old = note[2]
    rest = solution[note.end() :]
    if not re.match(re.escape(old) + r"(?![\d.,]\d|\d)", rest):
        return None
    start = solution[: note.start(2)] + f"{new_value}>>{new_value}"
    without = start + rest[len(old) :]

    changed = {as_number(old): Fraction(new_value)}
    follows, done = start, note.end() + len(old)
    for later in notes[note_number + 1 :]:
        expression = replace_numbers(later[1], changed)
        value, old_value = evaluate_note(expression), as_number(later[2])
        if value is None or old_value is None or (expression == later[1] and old_value in changed):
            return None
        follows += replace_numbers(solution[done : later.start()], changed)
        if value != old_value and expression != later[1]:
            changed[old_value] = value
        else:
            value = old_value
        follows += f"<<{expression}={spell(value)}>>"
        done = later.end()
    return without, follows + replace_numbers(solution[done:], changed)


def plant_somewhere(question, solution, seed):
    """plant_error at a note and with a value drawn from `seed`; None if no note can be changed."""
    rng = random.Random(seed)
    notes = list(NOTE.finditer(solution))
    order = rng.sample(range(len(notes)), len(notes))
    known = numbers_in(solution) | numbers_in(question)
    for i in order:
        if not notes[i][2].isdigit() or as_number(notes[i][2]) in numbers_in(question):
            continue
        old = int(notes[i][2])
        near = [
            v for v in range(old - 9, old + 10) if v > 0 and len(str(v)) == len(str(old)) and v not in known
        ]
        planted = plant_error(solution, i, rng.choice(near)) if near else None
        if planted:
            return planted
    return None


def token_at(pieces, text, char):
    """Number of the token that holds character `char` of `text`; pieces: the tokens' bytes in order."""
    place, read = len(text[:char].encode()), 0
    for i, piece in enumerate(pieces):
        read += len(piece)
        if place < read:
            return i
    raise BadInput(f"character {char} lies beyond the tokens of {text[:40]!r}")
