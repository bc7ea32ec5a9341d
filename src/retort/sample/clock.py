"""What an engine has done and how long it took, in all and by the size of its steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import add, sub


@dataclass(frozen=True)
class Timing:
    """What an engine has done so far; prefill and decoding are timed apart.

    starts and start_seconds: completions that were started from the state of their prompt, and the
    part of the decode seconds that this took. verifications and accepted: how often a draft's
    proposals for a row were verified, and how many of them were accepted in all; 0 without a draft.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    starts: int = 0
    start_seconds: float = 0.0
    verifications: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Accepted proposals in a verification, which gives one token more; 0 before the first."""
        return self.accepted / max(1, self.verifications)

    def __sub__(self, earlier: Timing) -> Timing:
        return Timing(*map(sub, _numbers(self), _numbers(earlier)))

    def __add__(self, more: Timing) -> Timing:
        return Timing(*map(add, _numbers(self), _numbers(more)))


def _numbers(timing: Timing) -> Iterable[float]:
    """In the order of the fields. Every step adds one up, and `astuple` would make deep copies."""
    return vars(timing).values()


@dataclass(frozen=True)
class Spent:
    """Decode steps of one size, the tokens that they read, and their seconds."""

    steps: int = 0
    context: int = 0
    seconds: float = 0.0

    def __add__(self, more: Spent) -> Spent:
        return Spent(
            self.steps + more.steps, self.context + more.context, self.seconds + more.seconds
        )


Size = tuple[int, int]
"""Rows of a step, and half octaves of the tokens that it reads for each of them."""

Steps = Mapping[Size, Spent]


class StepLog:
    """The steps of an engine, by their size, since somebody last took them out."""

    def __init__(self) -> None:
        self.spent: dict[Size, Spent] = {}

    def add(self, rows: int, context: int, steps: int, seconds: float) -> None:
        """Notes steps of so many rows, which read `context` tokens in all of them together."""
        size = rows, round(2 * math.log2(context / (rows * steps)))
        self.spent[size] = self.spent.get(size, Spent()) + Spent(steps, context, seconds)

    def take(self) -> dict[Size, Spent]:
        """What was noted, which is forgotten here."""
        taken, self.spent = self.spent, {}
        return taken


def together(logs: Iterable[Steps]) -> dict[Size, Spent]:
    """Several logs as one."""
    total: dict[Size, Spent] = {}
    for log in logs:
        for size, spent in log.items():
            total[size] = total.get(size, Spent()) + spent
    return total
