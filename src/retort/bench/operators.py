"""What training saves by working in chunks: time and peak memory beside the plain forms.

Forward and backward, in float32, on a CPU. Peak memory is what torch allocates beyond the inputs,
gradients of the inputs included.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from retort.bench.machine import timed
from retort.ops import ssd
from retort.train.divergence import divergence_sum

Step = Callable[[], None]


@dataclass(frozen=True)
class Compared:
    """Seconds and peak bytes of an operator and of its plain form. `speedup` is the median over
    repeats of one time over the other, `memory_ratio` the operator's memory over the plain form's.
    """

    seconds: float
    plain_seconds: float
    speedup: float
    peak_bytes: int
    plain_peak_bytes: int
    memory_ratio: float
    times: list[tuple[float, float]]


def compare(ours: Step, plain: Step, repeats: int = 7) -> Compared:
    """The two take turns, so that a busy machine slows both."""
    cpu = torch.device("cpu")
    timed(ours, cpu), timed(plain, cpu)  # the first run of an operator is a slow one
    times = [(timed(ours, cpu), timed(plain, cpu)) for _ in range(repeats)]
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    memory = peak_bytes(ours), peak_bytes(plain)
    return Compared(
        seconds=mine,
        plain_seconds=theirs,
        speedup=statistics.median(theirs / mine for mine, theirs in times),
        peak_bytes=memory[0],
        plain_peak_bytes=memory[1],
        memory_ratio=memory[0] / memory[1],
        times=times,
    )


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that is allocated on the CPU at once while `step` runs."""
    # Without these the profiler writes to stderr, and in some releases warns.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        step()
    results = trace.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def scans(length: int, chunk: int) -> tuple[Step, Step]:
    """The chunked and the sequential scan on the same inputs: B 2, H 4, P 32, N 32."""
    shapes = (2, length, 4, 32), (2, length, 4), (2, length, 4, 32), (2, length, 4, 32)
    v, a, b, c = (torch.randn(shape) for shape in shapes)
    start = torch.zeros(2, 4, 32, 32)

    def run(scan: Callable[..., tuple[Tensor, Tensor]], *options: object) -> None:
        inputs = [x.detach().requires_grad_() for x in (v, -a.abs(), b, c)]
        y, _ = scan(*inputs, start, *options)
        y.sum().backward()

    return (lambda: run(ssd.scan_chunked, None, chunk), lambda: run(ssd.scan_sequential))


def divergences(tokens: int, width: int, vocabulary: int) -> tuple[Step, Step]:
    """KL from hidden states in chunks of the vocabulary's logits, and with all logits at once."""
    student, teacher = torch.randn(tokens, width), torch.randn(tokens, width)
    head = torch.randn(vocabulary, width) * width**-0.5

    def chunked() -> None:
        h, w = (x.detach().requires_grad_() for x in (student, head))
        divergence_sum(h, w, teacher, head).backward()

    def plain() -> None:
        h, w = (x.detach().requires_grad_() for x in (student, head))
        log_q = (h @ w.T).log_softmax(-1)
        log_p = (teacher @ head.T).log_softmax(-1)
        (log_p.exp() * (log_p - log_q)).sum().backward()

    return chunked, plain
