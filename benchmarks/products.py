"""Products of a decode step on a CPU: ours, with weights in panels, beside torch's.

    python benchmarks/products.py benchmarks/results/products-avx2.json

Ours have panels of float32, and of bfloat16 for weights that it holds. A run goes over different
weights of one shape, 64 MB of them in float32, so that they come from memory or a far cache as in a
step of a model; torch's lie as [in, out], which is how it is fastest. Sums are in float32. The
three take turns. Figures are medians of seven, in GFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

from retort.bench.machine import machine, timed
from retort.ops.cpu import products
from retort.ops.cpu.team import of_threads
from retort.sample.cpu_products import Matrix, Panels

SHAPES = [(256, 256), (256, 1024), (256, 2048), (768, 256), (2048, 2048), (2048, 8192)]
"""Inputs and outputs: those of small models, and two of a model of 1B."""
ROWS = (1, 4, 16, 64, 256)
WEIGHTS = 64e6
"""Bytes, in float32."""
REPEATS = 7
CPU = torch.device("cpu")

Run = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    found = [
        compared(inputs, outputs, rows, threads)
        for threads in options.threads
        for inputs, outputs in SHAPES
        for rows in ROWS
    ]
    here = asdict(machine(CPU)) | {"suited": products.suited()}
    options.out.write_text(json.dumps({"machine": here, "products": found}, indent=2) + "\n")


def compared(inputs: int, outputs: int, rows: int, threads: int) -> dict[str, float]:
    """GFLOP/s of each, how many times as fast as torch's ours is, and as in float32 in bfloat16."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    count = max(1, round(WEIGHTS / (4 * inputs * outputs)))
    layers = [nn.Linear(inputs, outputs, bias=False).requires_grad_(False) for _ in range(count)]
    exact = [deepcopy(layer).bfloat16().float() for layer in layers]
    x_SI, y_SO = torch.randn(rows, inputs), torch.empty(rows, outputs)
    panels, halves = (
        [Panels([layer], x_SI, y_SO, of_threads(threads)) for layer in each]
        for each in (layers, exact)
    )
    # As a step has it: MKL packs the weights before for many rows, where there is room.
    packed = torch.backends.mkl.is_available() and rows >= 16
    matrices = [Matrix([layer], x_SI, y_SO, copied=False, packed=packed) for layer in layers]
    runs: list[Run] = [partial(each_of, each, rows) for each in (panels, halves, matrices)]
    for run in runs:
        run()
    seconds = [[timed(run, CPU) for run in runs] for _ in range(REPEATS)]
    work = 2e-9 * rows * inputs * outputs * count
    ours, half, torchs = (work / statistics.median(column) for column in zip(*seconds, strict=True))
    ratio = statistics.median(theirs / mine for mine, _, theirs in seconds)
    halved = statistics.median(whole / half for whole, half, _ in seconds)
    result = {
        "threads": threads,
        "inputs": inputs,
        "outputs": outputs,
        "rows": rows,
        "ours": round(ours, 1),
        "bfloat16": round(half, 1),
        "torch": round(torchs, 1),
        "times_as_fast": round(ratio, 2),
        "bfloat16_times_as_fast": round(halved, 2),
    }
    print("  ".join(f"{name} {value}" for name, value in result.items()), flush=True)
    return result


def each_of(several: list[Panels] | list[Matrix], rows: int) -> None:
    """A product with each of some weights."""
    for product in several:
        product(rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
