"""Stop strings: a completion ends at the first token with which its text holds one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from retort.sample.slots import Slots
from retort.sample.tokens import SamplingParams


@dataclass(frozen=True)
class StopStrings:
    """What ends a completion, and what turns tokens into text."""

    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]
    overlap: int

    @classmethod
    def of(cls, params: SamplingParams, decode: Callable[[Sequence[int]], str] | None) -> Self:
        """Those of the parameters, which are none where nothing can be decoded."""
        assert decode is not None or not params.stop
        # A token has at least one byte, so a string of b bytes reaches over at most b tokens.
        longest = max((len(string.encode()) for string in params.stop), default=0)
        return cls(params.stop, decode or _nothing, longest)

    def apply(self, slots: Slots, rows: int, new: int) -> None:
        """Ends those of the first rows whose last `new` tokens, or fewer, complete a string."""
        if not self.strings:
            return
        # No more than matters comes to the host, which may look after every step.
        width, count_S = self.overlap + new, slots.count_S[:rows]
        place_W = torch.arange(-width, 0, device=count_S.device)
        place_SW = (count_S[:, None] + place_W).clamp(min=0)
        last_SW = slots.written_SM[:rows].gather(1, place_SW)
        told = zip(count_S.tolist(), last_SW.tolist(), strict=True)
        for row, (count, last) in enumerate(told):
            tokens = last[max(0, width - count) :]
            end = self.end(tokens, max(0, len(tokens) - new))
            if end is not None:
                slots.cut(row, count - len(tokens) + end)

    def end(self, tokens: Sequence[int], known: int = 0) -> int | None:
        """How many tokens first hold a string, where `known` do not; None if none do."""
        first = max(0, known - self.overlap)
        if not self._holds(tokens[first:]):
            return None
        ends = range(known + 1, len(tokens) + 1)
        return next(end for end in ends if self._holds(tokens[first:end]))

    def _holds(self, tokens: Sequence[int]) -> bool:
        text = self.decode(tokens)
        return any(string in text for string in self.strings)


def until(text: str, strings: Sequence[str]) -> str:
    """The text before the first of the strings in it."""
    return text[: min((text.index(string) for string in strings if string in text), default=None)]


def _nothing(tokens: Sequence[int]) -> str:
    raise AssertionError("nothing is decoded where there are no stop strings")
