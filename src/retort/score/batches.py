"""Rows of like length together, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

FULLEST = 0.75
"""The shortest row of a batch has at least this share of the longest row's length."""

T = TypeVar("T")


def batches(items: Sequence[tuple[T, int]], tokens: int) -> Iterator[list[T]]:
    """All items in batches of at most `tokens` padded tokens, by their lengths, longest first: what
    does not fit into memory shows at once. An item that is longer has a batch of its own.
    """
    batch: list[T] = []
    longest = 0
    for item, length in sorted(items, key=lambda item: -item[1]):
        if batch and (longest * (len(batch) + 1) > tokens or length < FULLEST * longest):
            yield batch
            batch = []
        if not batch:
            longest = length
        batch.append(item)
    if batch:
        yield batch
