"""Worker processes for algebra: each request has its time and memory, and none ends the caller.

A worker that takes too long is killed, one that died is replaced. Nothing here touches signals,
forks, or needs `if __name__ == "__main__"`: it works in threads, notebooks and servers alike.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

SECONDS = 5.0
"""Time for one request, by default."""
MEMORY = 1 << 30
"""Bytes that a request may take beyond what a worker has from the start."""
_START_SECONDS = 120.0  # to import sympy; a busy machine or a slow disk takes long
_STARTS_MOST = 3  # in a row without success


@dataclass(frozen=True)
class Request:
    """What a worker is asked: "same" of two answers, or the "fingerprint" of one."""

    do: str
    texts: tuple[str, ...]


@dataclass
class _Worker:
    process: "subprocess.Popen[bytes]"
    deadline: float
    ready: bool = False
    index: int | None = None  # of the request it has
    received: bytearray = field(default_factory=bytearray)


class _Errand:
    """What one call asks: what has been answered, and what waits for a worker."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.replies: list[Any] = [None] * len(requests)
        self.waiting = deque(range(len(requests)))
        self._retried: set[int] = set()

    def retry(self, index: int) -> None:
        """Once more for a request whose worker died: somebody may have killed it for no reason."""
        if index not in self._retried:
            self._retried.add(index)
            self.waiting.appendleft(index)


class Pool:
    """Up to `workers` processes, started when there is first something for them to do.

    May be used by several threads, which take turns. Raises ValueError for limits that are none.
    """

    def __init__(self, workers: int, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        if workers < 1 or seconds <= 0:
            raise ValueError(
                f"workers={workers}, timeout={seconds}: need at least 1 and more than 0"
            )
        self._most, self._seconds, self._memory = workers, seconds, memory
        self._workers: list[_Worker] = []
        self._owner = os.getpid()
        self._turn = threading.Lock()
        self._failed_starts = 0
        self._finalizer = weakref.finalize(self, _end_all, self._workers)

    def ask(self, requests: Sequence[Request]) -> list[Any]:
        """The replies in order; None for a request that took too much time or memory, or whose
        worker died twice.

        Raises RuntimeError when workers cannot be started.
        """
        if not requests:
            return []
        with self._turn:
            self._leave_parents()
            try:
                return self._answers(requests)
            except BaseException:
                self._end()  # a request in progress would answer the next caller
                raise

    def close(self) -> None:
        """End the workers; the next request starts others."""
        with self._turn:
            self._leave_parents()
            self._end()

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [worker.process.pid for worker in self._workers]

    def _leave_parents(self) -> None:
        if self._owner != os.getpid():  # this is a fork; the workers are still its parent's
            self._workers.clear()
            self._owner = os.getpid()

    def _end(self) -> None:
        _end_all(self._workers)

    def _answers(self, requests: Sequence[Request]) -> list[Any]:
        self._bury()
        errand = _Errand(requests)
        while errand.waiting or any(worker.index is not None for worker in self._workers):
            self._employ(errand)
            for worker, line in self._hear():
                self._take(errand, worker, line)
        return errand.replies

    def _take(self, errand: "_Errand", worker: _Worker, line: bytes | None) -> None:
        index, worker.index = worker.index, None
        if line:
            worker.ready, self._failed_starts = True, 0
            if index is not None:
                errand.replies[index] = json.loads(line)["is"]
            return
        self._drop(worker)
        if not worker.ready:
            self._count_failed_start()
        elif line is not None and index is not None:
            errand.retry(index)

    def _bury(self) -> None:
        for worker in [each for each in self._workers if each.process.poll() is not None]:
            self._drop(worker)

    def _employ(self, errand: "_Errand") -> None:
        busy = sum(worker.index is not None for worker in self._workers)
        while len(self._workers) < min(self._most, busy + len(errand.waiting)):
            self._start()
        for worker in self._workers:
            if errand.waiting and worker.ready and worker.index is None:
                worker.index = errand.waiting.popleft()
                worker.deadline = time.monotonic() + self._seconds
                _send(worker, errand.requests[worker.index])

    def _start(self) -> None:
        command = [sys.executable, "-P", "-m", "retort.grade.worker"]
        process = subprocess.Popen(
            [*command, str(self._memory), str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            # Ctrl-C in a terminal is for the caller, who ends the workers.
            start_new_session=True,
        )
        self._workers.append(_Worker(process, time.monotonic() + _START_SECONDS))

    def _hear(self) -> Iterable[tuple[_Worker, bytes | None]]:
        """Workers with news: a line, b"" of one that has died, None of one that is too late."""
        waited = [w for w in self._workers if w.index is not None or not w.ready]
        with selectors.DefaultSelector() as selector:
            for worker in waited:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            left = min(worker.deadline for worker in waited) - time.monotonic()
            heard = [key.data for key, _ in selector.select(max(left, 0.0))]
        news: list[tuple[_Worker, bytes | None]] = []
        for worker in heard:
            line = _receive(worker)
            if line is not None:
                news.append((worker, line))
        now = time.monotonic()
        told = [worker for worker, _ in news]
        return news + [(w, None) for w in waited if w not in told and now >= w.deadline]

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        _end_all([worker])

    def _count_failed_start(self) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _STARTS_MOST:
            self._failed_starts = 0
            command = f"{sys.executable} -P -m retort.grade.worker {self._memory} {self._seconds}"
            raise RuntimeError(f"workers that do algebra do not start; `{command}` says why")


def _send(worker: _Worker, request: Request) -> None:
    assert worker.process.stdin is not None
    line = json.dumps({"do": request.do, "texts": request.texts}).encode() + b"\n"
    with contextlib.suppress(BrokenPipeError):  # its death is heard next
        worker.process.stdin.write(line)  # less than a pipe holds, so it does not block


def _receive(worker: _Worker) -> bytes | None:
    """What a worker has said: a whole line, b"" if it has died, None if there is more to come."""
    assert worker.process.stdout is not None
    piece = worker.process.stdout.read(1 << 16)
    if not piece:
        return b""
    worker.received += piece
    if not worker.received.endswith(b"\n"):
        return None
    line = bytes(worker.received)
    worker.received.clear()
    return line


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.wait()
        for pipe in (worker.process.stdin, worker.process.stdout):
            assert pipe is not None
            pipe.close()
    workers.clear()
