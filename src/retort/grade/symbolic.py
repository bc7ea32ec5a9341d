r"""Whether two answers are the same by algebra. Runs in worker processes only: it may never end.

math-verify's grammar reads the expressions. They are compared by what they are worth, since to call
two things equal because they look alike after rounding is how graders go wrong: expressions of
rational numbers exactly, others to `DIGITS` digits relative to their size, those with variables at
fixed points, where two different ones that agree by chance would be a wonder. What has no worth in
numbers, such as f(x), is left to math-verify's own comparison.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

from retort.grade.answers import rational
from retort.grade.shape import Shape, leaves, shape

DIGITS = 100
"""Two irrational values are equal when they agree to so many digits."""
POINTS = 3
"""At so many points do expressions with variables have to agree."""
_GUARD = 20  # digits beyond, which rounding may spoil
_SHOWN = 20  # digits of a fingerprint
_BITS_MOST = 200_000  # of an exact number; larger ones are compared by their digits
_FACTORIAL_MOST = 5_000

_DECIMALS = Context(prec=DIGITS + _GUARD, Emax=MAX_EMAX, Emin=MIN_EMIN)
_TOLERANCE = Decimal(10) ** -DIGITS
_GRAMMAR = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)

_PLAIN_NAMES = "arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|exp|pi|theta|alpha|beta|infty"
_PLAIN_NAME = re.compile(rf"(?<![A-Za-z\\])(?:{_PLAIN_NAMES})(?![A-Za-z])")
_PLAIN_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt(?=[({])|\\sqrt(?=\()")
_MIXED = re.compile(r"(?<![\d.}])(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])")
_BEFORE_BRACKET = re.compile(r"(?<=[\d)])(?=\()|(?<=\))(?=\d)")
# A colon is a time or a ratio, a prime a name, and a run of letters is a word; a numeral with a
# subscript has a base, which the grammar would overlook.
_NO_EXPRESSION = re.compile(r"[:'\"?#@&%$~`]|\d_|(?<![A-Za-z\\])[A-Za-z]{4}|\.\d*\.")


@dataclass(frozen=True)
class Number:
    """A complex number, known to `DIGITS` digits."""

    real: Decimal
    imaginary: Decimal

    @property
    def size(self) -> Decimal:
        # abs() would round to the thread's own precision and range
        return max(self.real.copy_abs(), self.imaginary.copy_abs())


Worth = Fraction | Number | str
"""What an expression is worth at a point: exact, rounded, or "oo" and "-oo"."""


def same(one: str, other: str) -> bool:
    """Whether two normalised answers are equal; symmetric. What cannot be read equals nothing.

    Raises whatever algebra comes to on hostile answers, MemoryError and RecursionError included,
    and may run for ever.
    """
    try:
        return _same(shape(one), shape(other))
    except ValueError:
        return False


def fingerprint(answer: str) -> str:
    """A text that answers which are the `same` share; different ones hardly ever do."""
    try:
        found = shape(answer)
    except ValueError:
        return answer
    if found.kind == "relation":
        return f"relation {found.text}"  # equations are the same up to a factor
    return ", ".join(sorted(map(_leaf_print, leaves(found))))


# Shapes


def _same(one: Shape, other: Shape) -> bool:
    if one.kind == other.kind == "value":
        return _same_value(one.text, other.text)
    one, other = _as_many(one, other), _as_many(other, one)
    if len(one.parts) != len(other.parts):
        return False
    kinds = {one.kind, other.kind}
    if kinds in ({"list"}, {"set"}, {"list", "set"}):
        return _same_unordered(list(one.parts), list(other.parts))
    if kinds == {"relation"}:
        return one.text == other.text and _same_relation(one, other)
    if kinds == {"list", "tuple"} or (one.kind, one.text) == (other.kind, other.text):
        return all(map(_same, one.parts, other.parts))
    return False


def _as_many(one: Shape, other: Shape) -> Shape:
    """{5} and 5 are the same set."""
    single = one.kind == "value" and other.kind == "set"
    return Shape("set", parts=(one,)) if single else one


def _same_unordered(ones: list[Shape], others: list[Shape]) -> bool:
    for one in ones:
        match = next((i for i, other in enumerate(others) if _same(one, other)), None)
        if match is None:
            return False
        del others[match]
    return True


def _same_relation(one: Shape, other: Shape) -> bool:
    """Equations may differ by a factor that is not 0, inequalities by one that is positive."""
    (left,), (right,) = leaves(one), leaves(other)
    left_expression, right_expression = _expression(left), _expression(right)
    if left_expression is None or right_expression is None:
        return left == right
    ratio = _worth(
        sympy.Mul(left_expression, sympy.Pow(right_expression, -1, evaluate=False), evaluate=False)
    )
    if ratio is None or isinstance(ratio[0], str) or not all(_close(ratio[0], r) for r in ratio):
        return False
    factor = _number(ratio[0])
    return factor.size != 0 if one.text == "=" else factor.real > 0


# Values


def _same_value(one: str, other: str) -> bool:
    if one == other:
        return bool(one)
    ones, others = _worths(one), _worths(other)
    if ones is not None and others is not None:
        # an expression without variables has one worth, at all points
        wide = max(len(ones), len(others))
        return all(map(_close, ones * (wide // len(ones)), others * (wide // len(others))))
    if ones is None and others is None:
        return _same_by_math_verify(_expression(one), _expression(other))
    return False


def _same_by_math_verify(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return False
    from math_verify.grader import verify

    return bool(
        verify(one, other, float_rounding=DIGITS, numeric_precision=DIGITS, timeout_seconds=None)
    )


def _close(one: Worth, other: Worth) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    a, b = _number(one), _number(other)
    apart = Number(_DECIMALS.subtract(a.real, b.real), _DECIMALS.subtract(a.imaginary, b.imaginary))
    return apart.size <= _DECIMALS.multiply(_TOLERANCE, max(a.size, b.size))


def _number(worth: Fraction | Number) -> Number:
    if isinstance(worth, Number):
        return worth
    return Number(_decimal(worth), Decimal(0))


def _decimal(value: Fraction) -> Decimal:
    return _DECIMALS.divide(Decimal(value.numerator), Decimal(value.denominator))


def _leaf_print(text: str) -> str:
    worths = _worths(text)
    if worths is not None:
        return " ".join(map(_print, worths))
    return text if _expression(text) is None else "expression"


def _print(worth: Worth) -> str:
    if isinstance(worth, str):
        return worth
    number, short = _number(worth), Context(prec=_SHOWN, Emax=MAX_EMAX, Emin=MIN_EMIN)
    # what rounding has left of a part that is 0 is no part of the value
    floor = _DECIMALS.multiply(number.size, _TOLERANCE)
    parts = [
        part if part.copy_abs() > floor else Decimal(0) for part in (number.real, number.imaginary)
    ]
    return "+i".join(str(short.plus(part).normalize(short)) for part in parts)


# Reading


@lru_cache(1024)
def _worths(text: str) -> tuple[Worth, ...] | None:
    """What an expression is worth at the points; one worth where it has no variables, None where it
    cannot be read or has none."""
    value = rational(text)
    if value is not None:
        return (value,)
    expression = _expression(text)
    return None if expression is None else _worth(expression)


@lru_cache(1024)
def _expression(text: str) -> Any | None:
    """The expression as math-verify reads it, None when it is none."""
    if not text or _NO_EXPRESSION.search(plain := _latex(text)):
        return None
    try:
        return latex2sympy(plain, normalization_config=None, conversion_config=_GRAMMAR)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the grammar raises Exception itself, and sympy what it likes
        return None


def _latex(text: str) -> str:
    """Names of functions as commands, decimals as exact fractions, products written out."""
    text = _PLAIN_NAME.sub(lambda match: f"\\{match.group()} ", text)
    text = _MIXED.sub(_mixed, _braced_roots(text))
    text = _DECIMAL.sub(_as_fraction, text)
    return _BEFORE_BRACKET.sub(r"\\cdot ", text)


def _braced_roots(text: str) -> str:
    r"""sqrt(2) and \sqrt(2) are \sqrt{2}."""
    while match := _PLAIN_ROOT.search(text):
        start = match.end()
        depth = 0
        for end in range(start, len(text)):
            depth += (text[end] in "({") - (text[end] in ")}")
            if depth == 0:
                break
        text = f"{text[: match.start()]}\\sqrt{{{text[start + 1 : end]}}}{text[end + 1 :]}"
    return text


def _mixed(match: re.Match[str]) -> str:
    whole, above, below = match.groups()
    fraction = f"\\frac{{{above}}}{{{below}}}"
    proper = 0 < int(above) < int(below)
    return f"({whole}+{fraction})" if proper else f"{whole}\\cdot{fraction}"


def _as_fraction(match: re.Match[str]) -> str:
    whole, places = match.groups()
    return f"\\frac{{{int(whole + places)}}}{{{10 ** len(places)}}}"


# Worth


def _worth(expression: Any) -> tuple[Worth, ...] | None:
    if not isinstance(expression, sympy.Expr):
        return None
    names = sorted(expression.free_symbols - {sympy.Symbol("i")}, key=str)
    points = [{name: _coordinate(str(name), i) for name in names} for i in range(POINTS)]
    worths = [_at(expression, point) for point in (points if names else points[:1])]
    known = tuple(worth for worth in worths if worth is not None)
    return known if len(known) == len(worths) else None


def _coordinate(name: str, point: int) -> Fraction:
    """A number that belongs to a name, the same in every expression: positive at the first point,
    where roots and logarithms are real, and negative at one of the others, as |x| is not x."""
    digest = hashlib.blake2b(f"{point}/{name}".encode(), digest_size=8).digest()
    value = Fraction(101 + digest[0] + 256 * (digest[1] % 4), 211)
    negative = 1 + sum(name.encode()) % (POINTS - 1)
    return -value if point == negative else value


def _at(expression: Any, point: dict[Any, Fraction]) -> Worth | None:
    try:
        return _exact(expression, point)
    except _Inexact:
        return _rounded(expression, point)
    except ZeroDivisionError:
        return None


class _Inexact(Exception):
    """The value is no rational number, or too long a one."""


def _exact(expression: Any, point: dict[Any, Fraction]) -> Fraction:
    if expression.is_Rational:
        return Fraction(int(expression.p), int(expression.q))
    if expression in point:
        return point[expression]
    parts = [_exact(each, point) for each in expression.args]
    if expression.is_Add:
        return sum(parts, Fraction(0))
    if expression.is_Mul:
        return math.prod(parts, start=Fraction(1))
    if expression.is_Pow:
        return _power(*parts)
    if isinstance(expression, sympy.Abs):
        return abs(parts[0])
    if isinstance(expression, sympy.factorial):
        return _factorial(parts[0])
    raise _Inexact


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or abs(exponent) * bits > _BITS_MOST:
        raise _Inexact
    return base**exponent.numerator


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or not 0 <= value <= _FACTORIAL_MOST:
        raise _Inexact
    return Fraction(math.factorial(value.numerator))


def _rounded(expression: Any, point: dict[Any, Fraction]) -> Worth | None:
    values: dict[Any, Any] = {
        name: sympy.Rational(*at.as_integer_ratio()) for name, at in point.items()
    }
    try:
        value = expression.evalf(DIGITS + _GUARD, subs=values | {sympy.Symbol("i"): sympy.I})
        if value in (sympy.oo, -sympy.oo):
            return str(value)
        real, imaginary = value.as_real_imag()
    except (MemoryError, RecursionError):
        raise
    except Exception:  # sympy raises what it likes where it knows no value
        return None
    if not (_is_finite(real) and _is_finite(imaginary)):
        return None
    return Number(_DECIMALS.create_decimal(str(real)), _DECIMALS.create_decimal(str(imaginary)))


def _is_finite(part: Any) -> bool:
    return bool(part.is_Float or part.is_Rational)
