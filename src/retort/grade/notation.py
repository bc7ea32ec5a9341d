r"""One way of writing an answer: LaTeX, unicode, currency, spacing and units made uniform.

Answers that are written the same afterwards are equal. What is left alone: the value (1/3 is not
0.333333), the order of lists, the base of a numeral (52_8 is not 52_9) and anything that needs
algebra. Every pattern here is linear in the answer's length.
"""

import re
import unicodedata

from retort.grade.words import drop_unit, is_unit, number_words

_SYMBOLS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{HYPHEN}": "-",
        "\N{NON-BREAKING HYPHEN}": "-",
        "\N{FRACTION SLASH}": "/",
        "\N{DIVISION SLASH}": "/",
        "\N{DIVISION SIGN}": "/",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "\N{MIDDLE DOT}": r"\cdot ",
        "\N{DOT OPERATOR}": r"\cdot ",
        "\N{PLUS-MINUS SIGN}": r"\pm ",
        "\N{GREEK SMALL LETTER PI}": r"\pi ",
        "\N{INFINITY}": r"\infty ",
        "\N{SQUARE ROOT}": r"\sqrt ",
        "\N{LESS-THAN OR EQUAL TO}": r"\leq ",
        "\N{GREATER-THAN OR EQUAL TO}": r"\geq ",
        "\N{UNION}": r"\cup ",
        "\N{INTERSECTION}": r"\cap ",
        "\N{ELEMENT OF}": r"\in ",
        "\N{SUPERSCRIPT TWO}": "^2",
        "\N{SUPERSCRIPT THREE}": "^3",
        "\N{DEGREE SIGN}": "",
    }
)
_VULGAR = re.compile("[\N{VULGAR FRACTION ONE QUARTER}-\N{VULGAR FRACTION THREE QUARTERS}⅐-⅞]")
_CURRENCY = "$€£¥₹¢"

_BOX = re.compile(r"\\boxed\s*\{|\\[\\{}]|[{}]")
# A matrix row ends in \\, and that backslash must not be taken for the start of "\ " or "\[".
_SPACING = re.compile(
    r"(\\\\)|\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;: ]|~|"
    rf"\\!|\\[()\[\]]|\\?%|\\?[{_CURRENCY}]|\^\s?(?:\\circ|\{{\s?\\circ\s?\}})|\\degree"
)
_THOUSANDS_MARK = re.compile(r"(?<=\d)(?:,\\!\s?|\{,\})(?=\d)")
_LEAD = re.compile(
    r"(?:(?:the )?(?:final )?answer is:?\s?)?"
    r"(?:[A-Za-z](?:\([A-Za-z]\))?\s?(?:=|\\in(?![A-Za-z]))\s?)*",
    re.I,
)
_BECAUSE = re.compile(r",?\s(?:since|because)\b.*", re.DOTALL)
_UNIT_GROUP = re.compile(
    r"(?<=[\w})\]])\s?\\(?:text|mbox|textrm)\s?\{([A-Za-z\s./]+)\}(?:\^\{?[23]\}?)?$"
)
_LETTER_UNIT = re.compile(r"[mgsh](?:/[sh])?", re.I)
_WRAPPER = re.compile(
    r"\\(?:text|mbox|textrm|textbf|textit|mathrm|mathbf|operatorname)\s?\{([^{}]*)\}"
)
_TOKEN = r"\s?(\{[^{}]*\}|\d|[A-Za-z]|\\[A-Za-z]+)"
_FRAC = re.compile(rf"\\[dtc]?frac(?![A-Za-z]){_TOKEN}{_TOKEN}|\\[dtc]frac(?![A-Za-z])")
_SLASH = re.compile(r"(?<![\w.})^/])(\d+(?:\.\d+)?|\d*\\pi)\s?/\s?(-?\d+(?:\.\d+)?)(?![\w/^]|\.\d)")
_GROUPED = re.compile(r"(?<![\w.,])(?<!\d )\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\w,]|\s\d)")
_CONJUNCTION = re.compile(r",?\s?\b(?:and|or)\b\s?")
_SCRIPT = re.compile(r"([\^_])\s?(-?\d+|[A-Za-z])")
_ROOT = re.compile(r"\\sqrt\s?(\d+|[A-Za-z](?![A-Za-z]))")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z])\s|\s(?![A-Za-z])")
_UNARY_PLUS = re.compile(r"(?<=[(\[{,])\+")
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.]|\\overline|\\bar)")
_WORDS = re.compile(r"[A-Za-z]{2,}(?:[ '-][A-Za-z]+)*")
# The prompt says [answer], and some models copy the brackets; (C) is left for _CHOICE.
_ENCLOSED = re.compile(r"^(?:\[([^\[\](),]+)\]|\(([^\[\](),]{2,}|\d)\))$")
_CHOICE = re.compile(r"\(([A-Za-z])\)|([a-d])")


def normalise(answer: str) -> str:
    r"""The answer in the one notation used for comparing; "" when nothing is left of it.

    "$\$70{,}000$" -> "70000", "\dfrac12" -> "\frac{1}{2}", "18 dollars" -> "18", "x = 5" -> "5",
    "(3,4]" -> "(3, 4]", "Yes" -> "yes", "c" and "\text{(C)}" -> "C". Applying it twice changes
    nothing more.
    """
    text = _strip(" ".join(_ascii(_unboxed(answer)).split()))
    if text.isdecimal():
        return text
    text = _SPACING.sub(_despaced, _THOUSANDS_MARK.sub("", text))
    text = _BECAUSE.sub("", _LEAD.sub("", _strip(" ".join(text.split())), count=1))
    text = _ENCLOSED.sub(r"\1\2", _unwrapped(text))
    text = number_words(text) if any(map(str.isalpha, text)) else text
    text = _SLASH.sub(r"\\frac{\1}{\2}", _FRAC.sub(_braced, text))
    text = drop_unit(_ungrouped(text))
    return _case(_compact(text))


def boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} with balanced braces, None when there is none."""
    if "\\boxed" not in text:
        return None
    opened: list[int | None] = []
    found = (-1, 0)
    for token in _BOX.finditer(text):
        if token.group() == "{":
            opened.append(None)
        elif token.group().startswith("\\boxed"):
            opened.append(token.end())
        elif token.group() == "}" and opened and (start := opened.pop()) is not None:
            found = max(found, (start, token.start()))
    return text[slice(*found)] if found[0] >= 0 else None


def _unboxed(answer: str) -> str:
    if "\\boxed" not in answer:
        return answer
    # an answer cut off by the length limit has lost its closing brace, not its content
    content = boxed(answer)
    return re.split(r"\\boxed\s?\{?", answer)[-1] if content is None else content


def _ascii(text: str) -> str:
    if text.isascii():
        return text.replace("\0", "")
    spread = _VULGAR.sub(lambda m: f" {unicodedata.normalize('NFKC', m.group())}", text)
    return unicodedata.normalize("NFKC", spread.translate(_SYMBOLS)).translate(_SYMBOLS)


def _strip(text: str) -> str:
    return text.lstrip(' ,;:*=+"`').rstrip(' .,;:*"`\\')


def _despaced(match: re.Match[str]) -> str:
    if match.group(1):
        return match.group(1)
    return " " if re.fullmatch(r"\\[,;: ]|~", match.group()) else ""


def _unwrapped(text: str) -> str:
    unit = _UNIT_GROUP.search(text)
    if unit and not text.startswith(("\\text", "\\mbox")) and _names_unit(unit.group(1).strip()):
        text = text[: unit.start()]
    return " ".join(_WRAPPER.sub(r"\1", text).split())


def _names_unit(name: str) -> bool:
    # set in upright type, a single letter is metres or grams and no variable
    return bool(_LETTER_UNIT.fullmatch(name)) or is_unit(f" {name}")


def _braced(match: re.Match[str]) -> str:
    if match.group(1) is None:
        return "\\frac"
    above, below = (token.strip("{}").strip() for token in match.groups())
    return f"\\frac{{{above}}}{{{below}}}"


def _ungrouped(text: str) -> str:
    # inside brackets the comma of (1,234) separates two numbers
    if any(bracket in text for bracket in ("(", "[", "\\{")):
        return text
    return _GROUPED.sub(lambda m: re.sub(r"[ ,]", "", m.group()), text)


def _compact(text: str) -> str:
    if any(map(str.isdigit, text)):
        text = _CONJUNCTION.sub(", ", text)
    text = _ROOT.sub(r"\\sqrt{\1}", _SCRIPT.sub(r"\1{\2}", text))
    text = _UNARY_PLUS.sub("", _LOOSE_SPACE.sub("", text))
    text = _DECIMAL.sub(_shortest, text)
    return _strip(text.replace(",", ", "))


def _shortest(match: re.Match[str]) -> str:
    whole, places = match.group(1) or "0", match.group(2).rstrip("0")
    return f"{whole}.{places}" if places else whole


def _case(text: str) -> str:
    if choice := _CHOICE.fullmatch(text):
        return (choice.group(1) or choice.group(2)).upper()
    return text.lower() if _WORDS.fullmatch(text) else text
