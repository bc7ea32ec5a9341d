"""What a source of training documents is: an endless list of rows, in another order in each pass.

An index beyond a source's last row belongs to its next pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retort.data.chat import Conversation
from retort.data.faults import Fault

Content = str | Conversation | Fault


@dataclass(frozen=True)
class Row:
    """What a source holds at one place: a text, a conversation, or what is wrong there."""

    place: str
    content: Content


class Source(Protocol):
    """An endless list of rows; None stands for one that is to be passed over."""

    @property
    def rows(self) -> int | None:
        """The rows of one pass; None for a source that never repeats itself."""
        ...

    @property
    def run(self) -> int:
        """How many neighbouring rows are best read together."""
        ...

    def read(self, indices: range) -> Sequence[Row | None]:
        """The rows of these indices. Raises ValueError for a damaged file."""
        ...


@dataclass(frozen=True)
class ListedRows:
    """Rows that are in memory, shuffled anew for each pass."""

    listed: Sequence[Row]
    seed: int
    run: int = 1

    @property
    def rows(self) -> int:
        """The rows of one pass."""
        return len(self.listed)

    def read(self, indices: range) -> list[Row]:
        """Rows of an endless series of shuffled passes."""
        return [self.listed[shuffled(self.rows, self.seed, index)] for index in indices]


def shuffled(count: int, seed: int, index: int) -> int:
    """Position `index` of an endless series in which every pass is a new permutation."""
    return int(permutation(count, seed, index // count)[index % count])


@lru_cache(maxsize=8)
def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """The numbers below `count` in an order that the key decides, on every machine alike."""
    # RandomState's numbers are the ones that numpy promises never to change.
    words = [part % 2**32 for part in key]
    return np.random.RandomState(words).permutation(count)
