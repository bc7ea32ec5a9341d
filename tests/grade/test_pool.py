"""Workers that are killed, hang, run out of memory or outlive their parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from retort.grade import pool as pools
from retort.grade.pool import Pool, Request

HANGS = Request("same", ("10^{10^{10^{10}}}", "x"))
EASY = [Request("same", (f"x+{i}", f"{i}+x")) for i in range(8)]
SECONDS = 1.0

# Runs for ever, whatever the parent does, and says so.
PARENT = """
import time
from retort.grade.pool import Pool, Request
pool = Pool(1, seconds={seconds})
pool.ask([Request("same", ("x+1", "1+x"))])
print(*pool.pids, flush=True)
{then}
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(2, SECONDS)
    yield pool
    pool.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_workers_start_with_the_first_request() -> None:
    pool = Pool(2)
    assert pool.pids == []
    assert pool.ask([]) == []
    assert pool.pids == []


def test_replies_are_in_order(pool: Pool) -> None:
    asked = [Request("same", (f"x+{i}", f"{i % 3}+x")) for i in range(6)]
    assert pool.ask(asked) == [True, True, True, False, False, False]
    assert pool.ask([Request("fingerprint", ("8!",))]) == ["4.032E+4+i0"]
    assert len(pool.pids) == 2


def test_what_takes_too_long_costs_its_limit_and_nothing_else(pool: Pool) -> None:
    pool.ask(EASY)
    begun = time.monotonic()
    assert pool.ask([*EASY, HANGS, *EASY]) == [*[True] * 8, None, *[True] * 8]
    assert SECONDS <= time.monotonic() - begun < SECONDS + 20
    assert pool.ask(EASY) == [True] * 8


def test_memory_is_limited(pool: Pool) -> None:
    pool.ask(EASY)
    before = pool.pids
    assert pool.ask([Request("same", (r"\lfloor 2^{10^{10}}\rfloor", "1")), EASY[0]]) == [
        None,
        True,
    ]
    assert pool.pids == before


def test_worker_killed_from_outside_is_replaced_and_costs_nothing(pool: Pool) -> None:
    pool.ask(EASY)
    before = pool.pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert pool.ask(EASY) == [True] * 8
    assert set(pool.pids).isdisjoint(before)


def test_worker_killed_at_work_is_asked_again() -> None:
    pool = Pool(1)
    pool.ask(EASY)
    (first,) = pool.pids
    os.kill(first, signal.SIGSTOP)  # it has the request, and does not answer
    killer = threading.Timer(0.3, os.kill, (first, signal.SIGKILL))
    killer.start()
    assert pool.ask(EASY) == [True] * 8
    assert pool.pids != [first]
    pool.close()


def test_what_kills_workers_is_asked_twice(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(worker: Any, request: Request) -> None:
        worker.process.kill()

    pool.ask(EASY)
    monkeypatch.setattr(pools, "_send", end)
    assert pool.ask(EASY[:2]) == [None, None]


def test_threads_take_turns(pool: Pool) -> None:
    replies: list[list[bool]] = []
    threads = [threading.Thread(target=lambda: replies.append(pool.ask(EASY))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [[True] * 8] * 4


def test_signals_are_left_alone(pool: Pool) -> None:
    before = [signal.getsignal(each) for each in signal.valid_signals()]
    signal.alarm(600)
    assert pool.ask([HANGS]) == [None]
    assert signal.alarm(0) > 500
    assert [signal.getsignal(each) for each in signal.valid_signals()] == before


def test_interrupted_caller_gets_no_stale_reply(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Pool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pool, "_hear", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.ask([Request("same", ("x", "y+1"))])
    monkeypatch.undo()
    assert pool.pids == []
    assert pool.ask(EASY[:1]) == [True]


def test_closing_ends_the_workers() -> None:
    pool = Pool(1)
    pool.ask(EASY[:1])
    (pid,) = pool.pids
    pool.close()
    wait_until_gone(pid, 5)


def started(then: str) -> tuple["subprocess.Popen[str]", int]:
    """A process with a pool of its own, from a script without a main guard, and its worker."""
    code = PARENT.format(seconds=0.4, then=then)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


@pytest.mark.parametrize(
    "then",
    ["time.sleep(600)", "pool.ask([Request('same', ('10^{10^{10^{10}}}', 'x'))] * 600)"],
    ids=["idle", "busy"],
)
def test_workers_end_with_a_parent_that_is_killed(then: str) -> None:
    parent, worker = started(then)
    with parent:
        parent.kill()
    wait_until_gone(worker, 2 * SECONDS + 20)


def test_parent_that_ends_leaves_no_worker() -> None:
    parent, worker = started("")
    with parent:
        assert parent.wait(30) == 0
    wait_until_gone(worker, 5)


def test_fork_has_workers_of_its_own(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.ask(EASY)
    before = pool.pids
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)  # as a fork would see it
        forked = Pool(1)
    forked._workers.extend(pool._workers)
    assert forked.ask(EASY) == [True] * 8
    assert set(forked.pids).isdisjoint(before)
    forked.close()
    assert all(map(alive, before))


def test_workers_that_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"do not start; `/bin/false .*` says why"):
        Pool(1).ask(EASY)


@pytest.mark.parametrize(("workers", "seconds"), [(0, 1.0), (1, 0.0)])
def test_limits_that_are_none(workers: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="need at least 1 and more than 0"):
        Pool(workers, seconds)


def test_default_limits() -> None:
    assert (pools.SECONDS, pools.MEMORY) == (5, 1 << 30)
