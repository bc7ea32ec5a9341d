"""Rows made ahead are the same rows, and know which of them have been handed out."""

import threading
from collections.abc import Iterator

import pytest
import torch

from retort.data.ahead import Ahead
from retort.data.chat import Document
from retort.data.decontamination import Match
from retort.data.packing import Batch, Rows
from retort.data.rows import Row


class Numbers:
    """Documents of seven tokens, every third of which repeats an evaluation problem."""

    rows, run, shares = None, 1, {"fake": 1.0}

    def __init__(self, last: int = 10**9) -> None:
        self.sources = {"fake": self}
        self.last = last

    def read(self, indices: range) -> list[Row]:
        return [Row(str(index), "") for index in indices]

    def document(self, row: Row) -> Document | Match:
        index = int(row.place)
        if index > self.last:
            raise ValueError("a damaged file")
        return Match("p", "question", "words") if index % 3 == 0 else Document([index] * 7)


def made(data: Numbers | None = None, state: dict[str, object] | None = None) -> Rows:
    return Rows(data or Numbers(), 2, 16, range(2), state)


@pytest.fixture
def ahead() -> Iterator[Ahead]:
    with Ahead(made()) as opened:
        yield opened


def test_the_same_batches_and_what_is_said_of_them(ahead: Ahead) -> None:
    rows = made()
    for _ in range(5):
        assert (ahead.state(), ahead.tokens, ahead.skipped) == (
            rows.state(),
            rows.tokens,
            rows.skipped,
        )
        assert equal(ahead.batch(), rows.batch())
        assert ahead.dropped() == rows.dropped()


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


def test_each_batch_is_finished_in_the_thread() -> None:
    names: list[str] = []

    def finish(batch: Batch) -> Batch:
        names.append(threading.current_thread().name)
        return batch._replace(ids_BT=-batch.ids_BT)

    rows = made()
    with Ahead(made(), finish) as ahead:
        for _ in range(3):
            batch = rows.batch()
            assert equal(ahead.batch(), batch._replace(ids_BT=-batch.ids_BT))
    assert all(name.startswith("rows") for name in names)


def test_what_is_not_handed_out_is_not_lost(ahead: Ahead) -> None:
    for _ in range(3):
        ahead.batch()
    again = made(state=ahead.state())
    assert torch.equal(ahead.batch().ids_BT, again.batch().ids_BT)


def test_mistakes_come_where_the_batch_is_asked_for() -> None:
    rows = made(Numbers(last=20))
    with Ahead(made(Numbers(last=20))) as ahead:
        for _ in range(3):
            rows.batch(), ahead.batch()
        for each in (rows, ahead):
            with pytest.raises(ValueError, match="a damaged file"):
                [each.batch() for _ in range(9)]


def test_the_thread_ends() -> None:
    with Ahead(made()) as ahead:
        ahead.batch()
        assert any(thread.name.startswith("rows") for thread in threading.enumerate())
    assert not any(thread.name.startswith("rows") for thread in threading.enumerate())
