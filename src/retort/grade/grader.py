"""Verdicts on many answers: what is plain at once, the rest by algebra in worker processes."""

import os
from collections.abc import Hashable, Iterable, Sequence
from functools import cache, lru_cache
from types import TracebackType
from typing import Self

from retort.grade.answers import NO_ANSWER, Form, Verdict, decide, extract, verdict
from retort.grade.pool import MEMORY, SECONDS, Pool, Request
from retort.grade.votes import grouped

_CACHED = 65_536  # pairs of a gold answer and another; most completions repeat an answer

Pair = tuple[Form, Form]


class Grader:
    """Judges completions and answers; safe to share between threads.

        with Grader(workers=2, timeout=5) as grader:
            verdicts = grader.grade([("40320", "The final answer is 8!")])

    Args:
        workers: processes for algebra, by default one for each processor. They start when first
            needed, end with `close` and do not outlive this process.
        timeout: seconds that a comparison may take; one that takes longer is a "timeout".
        memory: bytes that a comparison may take.

    Raises ValueError for limits that are none.
    """

    def __init__(
        self, workers: int | None = None, timeout: float = SECONDS, memory: int = MEMORY
    ) -> None:
        self.pool = Pool(os.cpu_count() or 1 if workers is None else workers, timeout, memory)
        self._methods: dict[Pair, str] = {}
        self._form = lru_cache(_CACHED)(Form.of)

    def grade(self, pairs: Iterable[tuple[str, str]]) -> list[Verdict]:
        """The verdicts on completions, each given as (gold answer, text)."""
        return self.judge([(gold, extract(text)) for gold, text in pairs])

    def judge(self, pairs: Sequence[tuple[str, str | None]]) -> list[Verdict]:
        """The verdicts on answers, each given as (gold answer, answer); None is no answer."""
        asked = [
            None if answer is None else (self._form(gold), self._form(answer))
            for gold, answer in pairs
        ]
        methods = self._decided({pair for pair in asked if pair})
        return [
            NO_ANSWER if answer is None or pair is None else verdict(answer, pair[1], methods[pair])
            for (_, answer), pair in zip(pairs, asked, strict=True)
        ]

    def equivalent(self, gold: str, answer: str) -> bool:
        """Whether the two answers are equal; an empty answer equals nothing."""
        return self.judge([(gold, answer)])[0].correct

    def vote_groups(self, answers: Sequence[str | None]) -> list[int | None]:
        """A number for each answer, the same for equal ones; None for those that do not vote.

        Each answer is compared with one of each group, so what equals two that differ (52 is both
        52_8 and 52_9) is in one of the groups.
        """
        keys = [None if answer is None else self._form(answer).key for answer in answers]
        (groups,) = grouped(self.pool, [{key for key in keys if key is not None}])
        return _numbered([None if key is None else groups[key] for key in keys])

    def remember(self, gold: str, answer: str, method: str) -> None:
        """Take a comparison by algebra as done."""
        self._methods[self._form(gold), self._form(answer)] = method

    def close(self) -> None:
        """End the workers; the next comparison by algebra starts others."""
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _decided(self, pairs: set[Pair]) -> dict[Pair, str]:
        found = {pair: self._methods.get(pair) or decide(*pair) for pair in pairs}
        open_ones = sorted(
            (pair for pair, method in found.items() if method is None),
            key=lambda pair: (pair[0].text, pair[1].text),
        )
        replies = self.pool.ask(
            [Request("same", (one.text, other.text)) for one, other in open_ones]
        )
        by_algebra = {pair: _METHODS[reply] for pair, reply in zip(open_ones, replies, strict=True)}
        self._store(by_algebra)
        return {pair: method or by_algebra[pair] for pair, method in found.items()}

    def _store(self, methods: dict[Pair, str]) -> None:
        self._methods |= methods
        while len(self._methods) > _CACHED:
            del self._methods[next(iter(self._methods))]


_METHODS = {True: "symbolic", False: "different", None: "timeout"}


def _numbered(groups: Sequence[Hashable | None]) -> list[int | None]:
    """0, 1, 2 ... in the order in which groups first occur."""
    numbers: dict[Hashable, int] = {}
    return [None if each is None else numbers.setdefault(each, len(numbers)) for each in groups]


@cache
def _shared() -> Grader:
    """For the functions below; one worker, as they ask one thing at a time."""
    return Grader(workers=1)


def equivalent(gold: str, answer: str) -> bool:
    """Whether the two answers are equal; an empty answer equals nothing. See `Grader` for many."""
    return _shared().equivalent(gold, answer)


def vote_groups(answers: Sequence[str | None]) -> list[int | None]:
    """A number for each answer, the same for equal ones; None for those that do not vote."""
    return _shared().vote_groups(answers)
