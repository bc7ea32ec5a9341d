"""English around numbers: number words become digits, the unit after a number is dropped."""

import re
from fractions import Fraction

# fmt: off
_SMALL = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
    "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14,
    "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19,
}
_TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50,
    "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}
# fmt: on
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_NUMBER_WORD = "|".join([*_SMALL, *_TENS, *_SCALES, "hundred"])
_NUMERAL = re.compile(
    rf"\b(?:(minus|negative)\s)?((?:{_NUMBER_WORD})(?:(?:-|\sand\s|\s)(?:{_NUMBER_WORD}))*)\b", re.I
)
_SCALED = re.compile(rf"\b(\d{{1,30}}(?:\.\d{{1,30}})?)\s({'|'.join(_SCALES)}|hundred)\b", re.I)

# What an answer's unit may stand behind: a decimal, a (mixed) fraction, a clock time.
_HEAD = re.compile(
    r"-?(?=[\d.\\])(?:\d[\d,]*)?(?:\.\d+)?(?:[eE][+-]?\d+)?(?:\s?\\frac\{-?[\d.]+\}\{-?[\d.]+\})?(?::\d\d)?"
)
_EXPONENT = re.compile(r"\^\{?[23]\}?")
_UNIT_TEXT = re.compile(r"[A-Za-z\s./'-]*")
_CLOCK_HALF = re.compile(r"\s?[ap]\.?\s?m\.?", re.I)

# fmt: off
# Two letters, or letters that touch the number, may as well be variables: only these are units.
_SHORT_UNITS = frozenset({
    "cm", "mm", "km", "kg", "mg", "ml", "ft", "in", "oz", "lb", "lbs", "hr", "hrs", "yd", "yds",
    "mi", "min", "mins", "sec", "secs", "mph", "kph", "sq", "usd", "percent", "degree", "degrees",
    "dollars", "cents", "hours", "minutes", "seconds", "days", "miles", "meters", "inches", "feet",
    "pounds",
})
# Words that change the value, leave it open, or name a function: what they follow is not a unit.
_NOT_UNITS = frozenset({
    "or", "and", "to", "but", "not", "if", "when", "unless", "depending", "either", "neither",
    "than", "between", "through", "about", "approximately", "roughly", "almost", "is",
    "plus", "minus", "over", "divided", "mod", "modulo", "squared", "cubed", "factorial", "root",
    "half", "halves", "third", "thirds", "quarter", "quarters", "fourth", "fourths", "fifth",
    "fifths", "sixth", "sixths", "seventh", "sevenths", "eighth", "eighths", "ninth", "ninths",
    "tenth", "tenths", "hundredth", "hundredths", "thousandth", "thousandths", "dozen", "dozens",
    "pi", "sin", "cos", "tan", "cot", "csc", "log", "exp", "sqrt", "infinity",
    "hundred", *_SMALL, *_TENS, *_SCALES,
})
# fmt: on


def number_words(text: str) -> str:
    """Write every well-formed number word or scaled number in digits: "one hundred" -> "100".

    Runs that are no number ("one two three") stay as they are.
    """
    return _SCALED.sub(_scaled_digits, _NUMERAL.sub(_numeral_digits, text))


def drop_unit(text: str) -> str:
    """A text that starts with a number and goes on with a unit, without the unit.

    "18 per day" -> "18", "5 cm^2" -> "5", "24 hours = 1 day" -> "24" (the first value is the
    answer); "2k", "3 or 4", "5 plus tax" stay as they are.
    """
    head = _HEAD.match(text)
    if not head or not head.group():
        return text
    tail = text[head.end() :].partition("=")[0]
    return head.group() if _CLOCK_HALF.fullmatch(tail) or is_unit(tail) else text


def is_unit(tail: str) -> bool:
    """Whether the text behind a number names a unit and nothing that changes the number."""
    plain = _EXPONENT.sub("", tail)
    words = re.findall(r"[a-z]+", plain.lower())
    if not words or not _UNIT_TEXT.fullmatch(plain) or not _NOT_UNITS.isdisjoint(words):
        return False
    return words[0] in _SHORT_UNITS or (plain[0].isspace() and len(words[0]) > 2)


def _numeral_digits(match: re.Match[str]) -> str:
    value = _value(re.split(r"[-\s]+", match.group(2).lower()))
    if value is None:
        return match.group()
    return f"-{value}" if match.group(1) else str(value)


def _scaled_digits(match: re.Match[str]) -> str:
    scale = match.group(2).lower()
    value = Fraction(match.group(1)) * _SCALES.get(scale, 100)
    return str(value) if value.denominator == 1 else match.group()


def _value(words: list[str]) -> int | None:
    total, group, last_scale = 0, 0, 10**15
    for word in words:
        if word in _SCALES:
            if not group or _SCALES[word] >= last_scale:
                return None
            total, group, last_scale = total + group * _SCALES[word], 0, _SCALES[word]
        elif word == "hundred":
            if not 0 < group < 100:
                return None
            group *= 100
        elif word != "and":
            room = 10 if word in _SMALL and _SMALL[word] < 10 and group % 100 >= 20 else 100
            if group % room:
                return None
            group += _SMALL[word] if word in _SMALL else _TENS[word]
    return total + group
