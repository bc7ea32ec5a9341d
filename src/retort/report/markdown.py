"""Markdown and YAML in which text from elsewhere stays text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import yaml

_MARKUP = re.compile(r"[\\`*_\[\]|~#$@]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def one_line(text: str) -> str:
    """`text` on one line, without characters that cannot be seen or that turn its direction."""
    return " ".join("".join(" " if _is_invisible(each) else each for each in text).split())


def inline(text: str) -> str:
    """`text` on one line, without a meaning in Markdown or HTML, for anywhere but a line's start.

    Links are not made of it either, whether the reader's Markdown looks for bare ones or not.
    """
    return _MARKUP.sub(r"\\\g<0>", escape(one_line(text), quote=False))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts; nothing when it has no rows."""
    lines = [[inline(cell) for cell in row] for row in rows]
    whole = [head, ["---"] * len(head), *lines] if lines else []
    return "\n".join(f"| {' | '.join(line)} |" for line in whole)


def fenced(text: str, language: str) -> str:
    """`text` as a block of code that nothing in it can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain data as YAML with neither `<` nor characters that cannot be seen; keys are ours."""
    text = _dump(values, allow_unicode=True)
    if any(_is_invisible(each) for each in text.replace("\n", "")):
        text = _dump(values, allow_unicode=False)
    return text.replace("<", "\\x3C")


class _Dumper(yaml.SafeDumper):
    """YAML with texts of several lines as blocks, and `<` in double quotes alone."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if "<" in text else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def _dump(values: Mapping[str, Any], allow_unicode: bool) -> str:
    dumped: str = yaml.dump(
        values,
        Dumper=_Dumper,
        sort_keys=False,
        width=100,
        default_flow_style=None,
        allow_unicode=allow_unicode,
    )
    return dumped


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
