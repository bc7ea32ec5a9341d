r"""The shape of an answer: what is a list, a point, an interval, a set, a matrix, an equation.

Read from the notation of `normalise`, without algebra; the expressions inside stay text. What has
no shape is a value; whether a value means anything is for `symbolic` to find out.
"""

import re
from dataclasses import dataclass
from itertools import product

PARTS_MOST = 64  # of a list, set or matrix; comparing without order takes the square of it
_DEPTH_MOST = 8  # of brackets in brackets; answers of the public sets have 3

_TOKEN = re.compile(r"\\begin\{[a-z]+\}|\\end\{[a-z]+\}|\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENING = frozenset({"(", "[", "{", r"\{", r"\langle"})
_CLOSING = frozenset({")", "]", "}", r"\}", r"\rangle"})
_PAIRS = {"(": ")", "[": "]", r"\{": r"\}", r"\langle": r"\rangle"}
_LESS = {"<": "<", r"\lt": "<", r"\leq": "<=", r"\le": "<=", r"\leqslant": "<="}
_MORE = {">": "<", r"\gt": "<", r"\geq": "<=", r"\ge": "<=", r"\geqslant": "<="}
_RELATIONS = frozenset({*_LESS, *_MORE, "="})
_EMPTY = frozenset({r"\emptyset", r"\varnothing", r"\{\}"})

_NAME = re.compile(r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?(?:\((?:[A-Za-z](?:, )?)+\))?")
_SYMBOL = re.compile(r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|theta|lambda|mu|phi))(?:_\{?\w+\}?)?")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(.*)\\end\{\1\}", re.DOTALL)
_SIGNS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_COLUMNS = re.compile(r"^\{[lcr|]*\}")


@dataclass(frozen=True)
class Shape:
    """kind: value, list (also of intervals: a union), tuple, interval, set, matrix or relation.

    text: of a value the expression, of an interval its brackets, of a matrix rows x columns, of a
    relation its sign ("=", "<" or "<="), whose one part is right side minus left side. (1, 2) is a
    tuple, be it a point or an open interval: no answer may be both.
    """

    kind: str
    text: str = ""
    parts: tuple["Shape", ...] = ()


def shape(text: str) -> Shape:
    """The shape of a normalised answer. Raises ValueError where brackets nest too deep."""
    _check_depth(text)
    return _shape(text.strip())


def leaves(of: Shape) -> list[str]:
    """The expressions in a shape, in order."""
    return [of.text] if of.kind == "value" else [leaf for p in of.parts for leaf in leaves(p)]


def _check_depth(text: str) -> None:
    depth = 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth > _DEPTH_MOST:
            raise ValueError(f"brackets nest more than {_DEPTH_MOST} deep")


def _shape(text: str) -> Shape:
    text = _unwrapped(text)
    if text in _EMPTY:
        return Shape("set")
    for reading in (_list, _relation, _bracketed, _matrix, _both_signs):
        if found := reading(text):
            return found
    return Shape("value", text)


def _unwrapped(text: str) -> str:
    """Without the brackets around one expression: (x+1) is x+1, (1, 2) stays."""
    while text.startswith("(") and _closes_at(text) == len(text) - 1:
        if len(_split(text[1:-1], ",", ";")) > 1:
            break
        text = text[1:-1].strip()
    return text


def _closes_at(text: str) -> int:
    """Where the bracket that a text starts with is closed, -1 when it is not."""
    depth = 0
    for match in _TOKEN.finditer(text):
        depth += _step(match.group())
        if depth == 0:
            return match.start()
    return -1


def _step(token: str) -> int:
    opens = token in _OPENING or token.startswith(r"\begin")
    return opens - (token in _CLOSING or token.startswith(r"\end{"))


def _split(text: str, *separators: str) -> list[str]:
    """The pieces between separators that stand outside of all brackets."""
    return _split_kept(text, frozenset(separators))[::2]


def _split_kept(text: str, separators: frozenset[str]) -> list[str]:
    """The same, with the separators: piece, separator, piece, ..."""
    pieces, start, depth = [], 0, 0
    for match in _TOKEN.finditer(text):
        depth += _step(match.group())
        if depth == 0 and match.group() in separators:
            pieces += [text[start : match.start()].strip(), match.group()]
            start = match.end()
    return [*pieces, text[start:].strip()]


def _list(text: str) -> Shape | None:
    parts = _split(text, ",", ";", r"\cup")
    if len(parts) == 1:
        return None
    return _bounded(Shape("list", parts=_flat([part for part in parts if part])))


def _relation(text: str) -> Shape | None:
    pieces = _split_kept(text, _RELATIONS)
    sides, signs = pieces[::2], pieces[1::2]
    if not signs or not all(sides):
        return None
    if set(signs) == {"="}:
        return _equation(sides)
    if any(sign in _MORE for sign in signs):
        sides, signs = sides[::-1], signs[::-1]
        signs = [_MORE.get(sign, "") for sign in signs]
    else:
        signs = [_LESS.get(sign, "") for sign in signs]
    return _inequality(sides, signs) if all(signs) else None


def _equation(sides: list[str]) -> Shape:
    """x = 5 is 5, and x = 2 + 3 = 5 too; other equations stay equations."""
    if _NAME.fullmatch(sides[0]):
        return _shape(sides[-1])
    return Shape("relation", "=", (_difference(sides[0], sides[-1]),))


def _inequality(sides: list[str], signs: list[str]) -> Shape | None:
    brackets = {"<": "()", "<=": "[]"}
    if len(sides) == 3 and _SYMBOL.fullmatch(sides[1]):
        return _interval(brackets[signs[0]][0] + brackets[signs[1]][1], [sides[0], sides[2]])
    if len(sides) != 2:
        return None
    if _SYMBOL.fullmatch(sides[0]):
        return _interval("(" + brackets[signs[0]][1], [r"-\infty", sides[1]])
    if _SYMBOL.fullmatch(sides[1]):
        return _interval(brackets[signs[0]][0] + ")", [sides[0], r"\infty"])
    return Shape("relation", signs[0], (_difference(sides[0], sides[1]),))


def _interval(brackets: str, ends: list[str]) -> Shape:
    if brackets == "()":
        return Shape("tuple", parts=_all(ends))
    return Shape("interval", brackets, _all(ends))


def _difference(left: str, right: str) -> Shape:
    return Shape("value", f"({right})-({left})")


def _bracketed(text: str) -> Shape | None:
    opening = next((each for each in _PAIRS if text.startswith(each)), None)
    closing = next((each for each in _PAIRS.values() if text.endswith(each)), None)
    if opening is None or closing is None or _closes_at(text) != len(text) - len(closing):
        return None
    inner = [part for part in _split(text[len(opening) : -len(closing)], ",", ";") if part]
    if opening == r"\{":
        return _bounded(Shape("set", parts=_flat(inner))) if closing == r"\}" else None
    if len(inner) == 2 and opening + closing in ("[]", "(]", "[)"):
        return _interval(opening + closing, inner)
    if len(inner) < 2 or _PAIRS[opening] != closing:
        return None
    return _bounded(Shape("tuple", parts=_all(inner)))


def _matrix(text: str) -> Shape | None:
    if len(text) > 2 and text[0] + text[-1] in ("[]", "()") and _MATRIX.fullmatch(text[1:-1]):
        text = text[1:-1]
    match = _MATRIX.fullmatch(text)
    if not match:
        return None
    body = _COLUMNS.sub("", match.group(2)).strip()
    rows = [_split(row, "&") for row in _split(body, r"\\") if row]
    if len({len(row) for row in rows}) != 1:
        return None
    size = f"{len(rows)}x{len(rows[0])}"
    return _bounded(Shape("matrix", size, _all([cell for row in rows for cell in row])))


def _both_signs(text: str) -> Shape | None:
    r"""a \pm b is the list of its values; with \mp in it the signs go together."""
    marks = _SIGNS.findall(text)
    if not marks or len(marks) > 3:
        return None
    apart = [*product("+-", repeat=len(marks))]
    signs = [apart[0], apart[-1]] if r"\mp" in marks else apart
    return Shape("list", parts=tuple(Shape("value", _signed(text, each)) for each in signs))


def _signed(text: str, signs: tuple[str, ...]) -> str:
    queue = iter(signs)
    flipped = {"+": "-", "-": "+"}

    def sign(match: re.Match[str]) -> str:
        upper = next(queue)
        return upper if match.group() == r"\pm" else flipped[upper]

    return _SIGNS.sub(sign, text).removeprefix("+").strip()


def _flat(texts: list[str]) -> tuple[Shape, ...]:
    return tuple(
        each
        for part in map(_shape, texts)
        for each in (part.parts if part.kind == "list" else (part,))
    )


def _all(texts: list[str]) -> tuple[Shape, ...]:
    return tuple(map(_shape, texts))


def _bounded(found: Shape) -> Shape:
    if len(found.parts) > PARTS_MOST:
        raise ValueError(f"more than {PARTS_MOST} parts")
    return found
