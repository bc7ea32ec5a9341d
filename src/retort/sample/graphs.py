"""Decode steps as CUDA graphs: the host starts a step with one call, however many kernels it has.

Shapes: S rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

FINE = 64
"""Up to so many rows a graph is for a power of two of them, and for a multiple of it beyond."""


class Preparable(Protocol):
    """A forward whose steps have a part that the host does (see `forward_cuda.Cuda`)."""

    slots: int
    device: torch.device

    def prepare(self, rows: int, reach: int) -> int:
        """Does it; returns what the rest of the step depends on besides the number of rows."""


class Replayed:
    """Steps of the first rows, one graph for each number of them that is rounded up to.

    What launches a step and all that belongs to it, such as sampling, is told with each step, and
    is the same each time: kept here, it would keep alive what keeps these graphs. It must read and
    write only tensors that stay where they are, and rows that nobody asked for must do no harm. The
    first step of a kind runs as it is, and compiles what is missing; the second one is captured.
    Without `capture` every step runs as it is: for devices that have no graphs.
    """

    def __init__(self, forward: Preparable, capture: bool = True) -> None:
        self.forward, self.capture = forward, capture
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        self.pool = torch.cuda.graph_pool_handle() if capture else None
        # Of the forward's own device, which need not be the current one.
        self.stream = torch.cuda.Stream(forward.device) if capture else None

    def step(self, rows: int, reach: int, launch: Callable[[int], None]) -> None:
        """One more token for each of the first rows, which then have read at most `reach`; `launch`
        is told for how many rows.
        """
        kind = self.forward.prepare(rows, reach)
        size = rounded(rows, self.forward.slots)
        if (size, kind) not in self.graphs:
            launch(size)
            self.graphs[size, kind] = None
            return
        if not self.capture:
            launch(size)
            return
        graph = self.graphs[size, kind]
        if graph is None:
            graph = self.graphs[size, kind] = self._captured(size, launch)
        graph.replay()

    def _captured(self, size: int, launch: Callable[[int], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # What other threads do, such as reading files into pinned memory, is no part of it.
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            launch(size)
        return graph


def rounded(rows: int, slots: int) -> int:
    """How many rows a graph for `rows` rows has: few different numbers, and at most `slots`."""
    size = 1 << (rows - 1).bit_length() if rows <= FINE else -(-rows // FINE) * FINE
    return min(size, slots)
