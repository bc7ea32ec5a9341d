"""Keeping evaluation problems out of training: rows that repeat one are dropped and reported.

Texts are compared as words, so case, white space and punctuation make no difference.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from retort.data.problems import Problem

N = 13
"""Words in a row that two texts do not share by chance (as in arXiv 2005.14165, appendix C)."""

WORD = re.compile(r"[^\W\d_]+|\d+")

QUESTION = "question"
QUESTION_PART = f"{N} words of the question"
SOLUTION_PART = f"{N} words of the solution"


class Match(NamedTuple):
    """The problem that a text repeats, in which way, and the words they share."""

    problem_id: str
    kind: str
    text: str


def words_of(text: str) -> list[str]:
    """Letters and digits in lower case, as words."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return WORD.findall(text.casefold())


class Known:
    """The questions of evaluation problems and their solutions, to be found in other texts.

    A question of fewer than 13 words counts where it occurs whole; a longer one, and a solution,
    where 13 of their words do.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self._numbers: dict[str, int] = {}
        self._phrases: dict[tuple[int, ...], tuple[str, str]] = {}
        self._short: dict[int, set[int]] = defaultdict(set)  # the lengths of those that start so
        for problem in problems:
            self._learn_question(problem)
            self._learn_parts(problem.id, SOLUTION_PART, self._numbered(problem.solution or ""))

    def match(self, text: str) -> Match | None:
        """The first problem that a text repeats, if any."""
        words = words_of(text)
        for first, numbers in _stretches([self._numbers.get(word) for word in words]):
            for i, number in enumerate(numbers):
                for length in (N, *self._short.get(number, ())):
                    phrase = tuple(numbers[i : i + length])
                    found = self._phrases.get(phrase)
                    if found is not None:
                        start = first + i
                        return Match(*found, " ".join(words[start : start + len(phrase)]))
        return None

    def _numbered(self, text: str) -> list[int]:
        return [self._numbers.setdefault(word, len(self._numbers)) for word in words_of(text)]

    def _learn_question(self, problem: Problem) -> None:
        numbers = self._numbered(problem.question)
        self._learn_parts(problem.id, QUESTION_PART, numbers)
        if 0 < len(numbers) < N:
            self._phrases.setdefault(tuple(numbers), (problem.id, QUESTION))
            self._short[numbers[0]].add(len(numbers))

    def _learn_parts(self, id: str, kind: str, numbers: list[int]) -> None:
        for start in range(len(numbers) - N + 1):
            self._phrases.setdefault(tuple(numbers[start : start + N]), (id, kind))


def _stretches(numbers: Sequence[int | None]) -> Iterator[tuple[int, list[int]]]:
    """The longest runs of words that occur in some problem, each with its start."""
    run: list[int] = []
    for i, number in enumerate(numbers):
        if number is not None:
            run.append(number)
            continue
        if run:
            yield i - len(run), run
        run = []
    if run:
        yield len(numbers) - len(run), run
