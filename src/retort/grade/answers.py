r"""Find the answer in a completion and decide whether it is the right one.

The paper asks for 'The final answer is [answer]', so that is looked for first, then \boxed{...},
then the "####" of GSM8K's own solutions. Two answers are equal when they are written the same after
normalising, or are the same rational number, exactly; what is left is a case for algebra, which
`grader` has done by others. Equality is strict: no rounding, no hedges.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from retort.grade.notation import boxed, normalise

GRADER_VERSION = "2"  # names the verdicts folder; a change of any verdict needs a new one

MAX_ANSWER = 400  # characters; a longer slot is a paragraph, not an answer
_MAX_SLOT = 4 * MAX_ANSWER  # bounds the patterns that are not linear; leaves room for markup
_MAX_EXPONENT = 400

_ANCHOR = re.compile(r"final\s+answer\s+is\b", re.I | re.ASCII)
_DISPLAY = re.compile(r"\s*(?:\\\[(.*?)\\\]|\$\$(.*?)\$\$)", re.DOTALL)
# The end of the sentence or line; what LaTeX groups is stepped over, it may span several lines.
_STOP = re.compile(r"(\\begin\{.*?\\end\{|\{[^{}]*\})|\n|\.(?=\s|$|[A-Z][a-z]*\s)", re.DOTALL)
_EDGE = re.compile(r"^(?:\s|[$*:`]|\\[()\[\]])+|(?:\s|[$*.,:;`]|\\[()\[\]])+$")

_DIGITS = r"\d+(?:\.\d+)?"
_PLAIN = re.compile(rf"(-?{_DIGITS})(?:[eE]([+-]?\d{{1,4}}))?")
_REPEATING = re.compile(r"(-?)(\d+)\.(\d*)\\(?:overline|bar)\{(\d+)\}")
_FRACTION = re.compile(rf"(-?)(\d*)\\frac\{{(-?{_DIGITS})\}}\{{(-?{_DIGITS})\}}")
_SCIENTIFIC = re.compile(rf"(-?{_DIGITS})\\(?:times|cdot)10\^\{{(-?\d{{1,4}})\}}")
_POWER = re.compile(r"(\d{1,9})\^\{(-?\d{1,4})\}")
_BASED = re.compile(r"(\w+)_\{\d+\}")
# Times and ratios, numerals with a base, words: these are equal where they are written the same.
_NO_ALGEBRA = re.compile(
    r":|\d_\{|(?<![A-Za-z\\{])(?!sqrt|arc(?:sin|cos|tan)|infty|theta|alpha|beta)[A-Za-z]{4}"
)
_LETTER = re.compile(r"[A-Za-z]")


@dataclass(frozen=True)
class Verdict:
    """One completion judged; group is the key its answer votes under, None when it does not vote.

    method says what decided: "string" (written the same), "rational" (the same exact number),
    "symbolic" (equal by algebra), "different", "timeout" (algebra took too much time or memory, so
    the answer does not count as correct) or "no answer".
    """

    answer: str | None
    group: str | None
    correct: bool
    method: str


def extract(text: str) -> str | None:
    r"""The final answer a text states, None when it states none; linear in the text's length.

    Behind the last "final answer is": the last \boxed{...} that follows, else the rest of the
    sentence or line. Without an answer there: the last \boxed{...} of the text, else the rest of
    the line behind the last "####".
    """
    for find in (_stated, boxed, _hashed):
        if answer := _tidy(find(text) or ""):
            return answer if len(answer) <= MAX_ANSWER else None
    return None


def rational(answer: str) -> Fraction | None:
    r"""The exact value of an answer that is one rational number, else None.

    Integers, decimals, repeating decimals, a/b, \frac, mixed numbers, 1.5e3, 1.5 \times 10^3,
    2^{10} and number words, with or without thousands separators, percent signs and units.
    """
    return _value(normalise(answer))


def vote_key(answer: str | None) -> str | None:
    """The key an answer votes under: equal keys are equal answers; None does not vote.

    The converse needs algebra: 8! and 40320, or 52_8 and 52, are equal answers with two keys.
    """
    return None if answer is None else Form.of(answer).key


def grade_text(gold: str, text: str) -> Verdict:
    """The verdict on a completion without algebra: what would need it counts as different."""
    answer = extract(text)
    if answer is None:
        return NO_ANSWER
    form = Form.of(answer)
    return verdict(answer, form, decide(Form.of(gold), form) or "different")


def verdict(answer: str, form: "Form", method: str) -> Verdict:
    """The verdict on an answer, given its form and what decided."""
    return NO_ANSWER if form.key is None else Verdict(answer, form.key, method in EQUAL, method)


NO_ANSWER = Verdict(None, None, False, "no answer")
EQUAL = frozenset({"string", "rational", "symbolic"})
"""The methods that find an answer correct."""


@dataclass(frozen=True)
class Form:
    """An answer as it is compared: its uniform notation and its value, if it is a number."""

    text: str
    value: Fraction | None

    @classmethod
    def of(cls, answer: str) -> "Form":
        text = normalise(answer)
        return cls(text, _value(text))

    @property
    def key(self) -> str | None:
        return str(self.value) if self.value is not None else self.text or None

    @property
    def algebraic(self) -> bool:
        """Whether algebra might find it equal to something that is written otherwise."""
        return 0 < len(self.text) <= MAX_ANSWER and not _NO_ALGEBRA.search(self.text)


def decide(gold: Form, answer: Form) -> str | None:
    """How the two compare, as the method of a verdict; None where that takes algebra."""
    if not gold.text or not answer.text:
        return "different"
    if gold.text == answer.text or _same_numeral(gold.text, answer.text):
        return "string"
    if gold.value is not None and answer.value is not None:
        return "rational" if gold.value == answer.value else "different"
    if _LETTER.fullmatch(gold.text) and _LETTER.fullmatch(answer.text):
        return "different"  # x is not X, and choice A is not B
    return None if gold.algebraic and answer.algebraic else "different"


def plain_numeral(text: str) -> str | None:
    """A numeral without its base: 52 of 52_8; None for what has none."""
    match = _BASED.fullmatch(text)
    return match.group(1) if match else None


def _same_numeral(first: str, second: str) -> bool:
    """52_8 and 52: who leaves the base out means the one the question asked for."""
    return plain_numeral(first) == second or plain_numeral(second) == first


def _stated(text: str) -> str | None:
    end = max((match.end() for match in _ANCHOR.finditer(text)), default=None)
    if end is None:
        return None
    tail = text[end:]
    box = boxed(tail)
    return _sentence(tail.lstrip(" \t\r\n:*")) if box is None else box


def _sentence(tail: str) -> str:
    head = tail[:_MAX_SLOT]
    if display := _DISPLAY.match(head):
        return display.group(1) or display.group(2) or ""
    for stop in _STOP.finditer(head):
        if not stop.group(1):
            return head[: stop.start()]
    return head


def _hashed(text: str) -> str | None:
    _, mark, after = text.rpartition("####")
    return after.partition("\n")[0] if mark else None


def _tidy(slot: str) -> str:
    bounded = slot.strip()[:_MAX_SLOT]
    return _EDGE.sub("", bounded.replace("\0", ""))


def _value(text: str) -> Fraction | None:
    if len(text) > MAX_ANSWER:
        return None
    if match := _PLAIN.fullmatch(text):
        return _scaled(match.group(1), int(match.group(2) or 0))
    if match := _FRACTION.fullmatch(text):
        return _fraction(*match.groups())
    if match := _REPEATING.fullmatch(text):
        return _repeating(*match.groups())
    if match := _SCIENTIFIC.fullmatch(text):
        return _scaled(match.group(1), int(match.group(2)))
    if match := _POWER.fullmatch(text):
        return _power(int(match.group(1)), int(match.group(2)))
    return None


def _scaled(digits: str, exponent: int) -> Fraction | None:
    scale = _power(10, exponent)
    return None if scale is None else Fraction(digits) * scale


def _power(base: int, exponent: int) -> Fraction | None:
    if abs(exponent) > _MAX_EXPONENT or (base == 0 and exponent <= 0):
        return None
    return Fraction(base) ** exponent


def _fraction(sign: str, whole: str, above: str, below: str) -> Fraction | None:
    denominator = Fraction(below)
    if not denominator:
        return None
    value = Fraction(above) / denominator
    if whole and not 0 < value < 1:
        return None  # not a mixed number, and whether a product was meant is anyone's guess
    value += int(whole or 0)
    return -value if sign else value


def _repeating(sign: str, whole: str, places: str, period: str) -> Fraction:
    nines = (10 ** len(period) - 1) * 10 ** len(places)
    value = Fraction(f"{whole}.{places}") + Fraction(int(period), nines)
    return -value if sign else value
