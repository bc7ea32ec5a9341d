"""Rows made while the step before them is computed: reading and tokenizing wait for no GPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from retort.data.packing import Batch, Dropped, Rows


@dataclass(frozen=True)
class _Made:
    """What rows said of themselves after a batch was made: the next one is under way by then."""

    state: dict[str, Any]
    tokens: dict[str, int]
    skipped: dict[str, int]
    dropped: list[Dropped]


def as_it_is(batch: Batch) -> Batch:
    """The batch, with which nothing else is done."""
    return batch


class Ahead:
    """The same batches as those of `rows`, each made in a thread while the one before it is used.

    What it says of itself is as of the batch that was handed out last, so it can be saved and
    resumed like the rows themselves. `finish` is what else the thread does to a batch. Used in a
    `with` statement, which ends the thread.
    """

    def __init__(self, rows: Rows, finish: Callable[[Batch], Batch] = as_it_is) -> None:
        self._rows, self._finish = rows, finish
        self._last = self._made()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._next = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batch(self) -> Batch:
        """The next batch. Raises ValueError as `Rows.batch` does."""
        batch, self._last = self._next.result()
        self._next = self._start()
        return batch

    def state(self) -> dict[str, Any]:
        """As `Rows.state`."""
        return self._last.state

    @property
    def tokens(self) -> dict[str, int]:
        """As `Rows.tokens`."""
        return self._last.tokens

    @property
    def skipped(self) -> dict[str, int]:
        """As `Rows.skipped`."""
        return self._last.skipped

    def dropped(self) -> list[Dropped]:
        """As `Rows.dropped`, of the batch that was handed out last."""
        return self._last.dropped

    def _start(self) -> Future[tuple[Batch, _Made]]:
        return self._pool.submit(lambda: (self._finish(self._rows.batch()), self._made()))

    def _made(self) -> _Made:
        rows = self._rows
        return _Made(rows.state(), rows.tokens, rows.skipped, rows.dropped())
