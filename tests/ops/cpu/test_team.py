"""Work that is shared among threads: all of it is done, and once."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from retort.ops.cpu.jit import inner, kernel
from retort.ops.cpu.norms import _gate
from retort.ops.cpu.team import ALONE, WORTHWHILE, Team, of_threads, share

Whole = NDArray[np.int64]


@kernel
def visit(times_I: Whole, worker_I: Whole, cost: int, team: Team) -> None:
    share(_visit, (times_I, worker_I), times_I.size, cost, team)


@inner
def _visit(first: int, last: int, worker: int, times_I: Whole, worker_I: Whole) -> None:
    for i in range(first, last):
        times_I[i] += 1
        worker_I[i] = worker


@kernel
def gate_each(
    both_SI: NDArray[np.float32], gated_SI: NDArray[np.float32], worker_I: Whole, team: Team
) -> None:
    share(_gate_each, (both_SI, gated_SI, worker_I), len(both_SI), WORTHWHILE, team)


@inner
def _gate_each(
    first: int,
    last: int,
    worker: int,
    both_SI: NDArray[np.float32],
    gated_SI: NDArray[np.float32],
    worker_I: Whole,
) -> None:
    for i in range(first, last):
        worker_I[i] = worker
    _gate(first, last, worker, both_SI, gated_SI)


def visited(items: int, cost: int, team: Team) -> tuple[Whole, Whole]:
    times_I, worker_I = np.zeros(items, np.int64), np.zeros(items, np.int64)
    visit(times_I, worker_I, cost, team)
    return times_I, worker_I


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("items", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("cost", [1, WORTHWHILE])
def test_every_item_is_visited_once(threads: int, items: int, cost: int) -> None:
    times_I, worker_I = visited(items, cost, of_threads(threads))
    assert (times_I == 1).all()
    assert ((worker_I >= 0) & (worker_I < threads)).all()


def test_little_work_is_done_by_the_caller() -> None:
    _, worker_I = visited(WORTHWHILE - 1, 1, of_threads(2))
    assert (worker_I == 0).all()


@pytest.fixture
def two() -> Team:
    team = of_threads(2)
    if team == ALONE:
        pytest.skip("torch's OpenMP library has no GOMP_parallel here: kernels run on one thread")
    return team


def test_much_work_is_shared(two: Team) -> None:
    """Each thread begins with its own half, the same one in every call."""
    both_SI, gated_SI = np.ones((200, 20_000), np.float32), np.empty((200, 10_000), np.float32)
    worker_I = np.zeros(200, np.int64)
    for _ in range(20):  # a busy machine may be late to start the other
        gate_each(both_SI, gated_SI, worker_I, two)
        if worker_I[0] == 0 and worker_I[100] == 1:
            return
    raise AssertionError("the second thread never got any work")


@kernel
def begin(worker_I: Whole, late: int, team: Team) -> None:
    share(_begin, (worker_I, late), worker_I.size, WORTHWHILE, team)


@inner
def _begin(first: int, last: int, worker: int, worker_I: Whole, late: int) -> None:
    for i in range(first, last):
        worker_I[i] = worker
    if worker == late:  # it waits until the other one has done all the rest
        while (worker_I == -1).any():
            pass


@pytest.mark.parametrize("late", [0, 1])
def test_a_thread_that_is_kept_busy_is_helped_with_its_part(two: Team, late: int) -> None:
    worker_I = np.full(100, -1, np.int64)
    begin(worker_I, late, two)
    assert (worker_I >= 0).all()
    assert (worker_I == 1 - late).sum() > 50


def test_one_thread_is_the_caller() -> None:
    assert of_threads(1) == of_threads(0) == ALONE


def test_calls_from_several_threads_at_once() -> None:
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: visited(500, WORTHWHILE, of_threads(2))[0], range(40))
    assert all((times_I == 1).all() for times_I in found)
