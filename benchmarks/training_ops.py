"""What training saves by working in chunks: time and peak memory beside the plain forms.

    python benchmarks/training_ops.py benchmarks/results/training-ops.json

One thread, float32, forward and backward. The scans alternate, so that a busy machine slows both;
peak memory is what torch allocates beyond the inputs, gradients of the inputs included.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import retort
from retort.ops import ssd
from retort.train.divergence import divergence_sum

REPEATS = 7

Step = Callable[[], None]


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


def seconds(step: Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def peak_bytes(step: Step) -> int:
    """The most that is allocated at once while `step` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    results = trace.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def compare(ours: Step, plain: Step) -> dict[str, float]:
    ours(), plain()  # the first run of an operator is a slow one
    times = [(seconds(ours), seconds(plain)) for _ in range(REPEATS)]
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    memory = peak_bytes(ours), peak_bytes(plain)
    return {
        "seconds": mine,
        "plain_seconds": theirs,
        "speedup": statistics.median(theirs / mine for mine, theirs in times),
        "peak_bytes": memory[0],
        "plain_peak_bytes": memory[1],
        "memory_ratio": memory[0] / memory[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file for the numbers")
    out = parser.parse_args().out
    torch.manual_seed(0)
    torch.set_num_threads(1)
    result: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "retort": retort.__version__,
        "scan, T 512, chunk 32": compare(*scans(512, 32)),
        "KL, 512 tokens, vocabulary 65536": compare(*divergences(512, 64, 65536)),
    }
    for name, value in result.items():
        print(name, value)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
