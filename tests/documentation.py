"""The documentation as tests read it: the commands and Python blocks of its pages, and where links
and pointers lead.

A command line is one that begins with a known program, in an indented or fenced block. A comment
behind it that says what it needs or how long it takes (`MARK`) marks it: it is checked and not run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

MARK = re.compile(r"\b(needs (a GPU|GPUs|the network|Ray|llama\.cpp)|takes (minutes|hours))\b")
PROGRAMS = {
    "retort", "make", "python", "torchrun", "pip", "source", "vllm", "hf", "ray", "curl",
    "tensorboard", "git", "llama-cli", "pytest", "pre-commit",
}  # fmt: skip

# What stands for something else: words in capitals, [options], alternatives, and what is repeated.
_PLACEHOLDER = re.compile(r"(?<![\w-])[A-Z][A-Z_]{2,}(?![\w-])|(^|\s)\[|\||\s\.\.\.(\s|$)")
_SETTING = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Command:
    """A command line of a page, without its comment and the environment in front of it."""

    place: str
    text: str
    comment: str = ""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def marked(self) -> bool:
        return MARK.search(self.comment) is not None

    @property
    def synopsis(self) -> bool:
        """Whether it says how a command is written, and is none that could be run."""
        return _PLACEHOLDER.search(self.text) is not None

    @property
    def retort(self) -> list[str] | None:
        """The words behind `retort`, whatever starts it; None for other programs."""
        words = self.words
        if words[0] == "retort":
            return words[1:]
        modules = [i for i, pair in enumerate(pairwise(words)) if pair == ("-m", "retort")]
        return words[modules[0] + 2 :] if modules else None


@dataclass(frozen=True)
class Python:
    """A Python block of a page; its first line may mark it."""

    place: str
    text: str

    @property
    def marked(self) -> bool:
        return MARK.search(self.text.partition("\n")[0]) is not None


def steps(page: Path) -> list[Command | Python]:
    """What a page tells its reader to run, in order."""
    return list(steps_of(page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8")))


def steps_of(name: str, text: str) -> Iterator[Command | Python]:
    """The same of a page's text."""
    lines = _joined(text)
    for number, line in lines:
        if line.startswith("```"):
            block = list(takewhile(lambda inner: inner[1] != "```", lines))
            if line == "```python":
                yield Python(f"{name}:{number}", "".join(f"{each}\n" for _, each in block))
            else:
                yield from (found for at, each in block for found in _command(f"{name}:{at}", each))
        elif line.startswith("    "):
            yield from _command(f"{name}:{number}", line)


def _joined(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, those that go on, by a backslash or with further [options], in one."""
    text = re.sub(r"\n( {8,}\[)", r"\\\n\1", text)
    whole, first = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        whole, first = whole + line, first or number
        if line.endswith("\\"):
            whole = whole[:-1]
            continue
        yield first, whole
        whole, first = "", 0


def _command(place: str, line: str) -> Iterator[Command]:
    text, _, comment = line.strip().partition(" #")
    while setting := _SETTING.match(text):
        text = text[setting.end() :].lstrip()
    if text.split(" ", 1)[0] in PROGRAMS:
        yield Command(place, text.strip(), comment)


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    return {_slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def leads_nowhere(file: Path, anchor: str) -> bool:
    """Whether a link's file, or the heading in it (empty: none is named), is not there."""
    if not file.exists():
        return True
    return bool(anchor) and anchor not in anchors(file)
