"""`retort bench train`: a forward and a backward pass, and its memory beside the plan's.

A model learns random tokens by cross-entropy on one process, as `retort distill` has it there: with
weights in float32 and products in what suits the device. The optimiser's step is not part of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from retort import console
from retort.bench.head import Head
from retort.bench.machine import peak_flops, timed
from retort.bench.models import Model
from retort.bench.operators import peak_bytes
from retort.bench.rounds import Work, measure, noise, spread
from retort.data.packing import Batch
from retort.model import cost
from retort.recipe import Arithmetic, Optim, Parallel, Stage, Supervised, Worked
from retort.train import memory
from retort.train.divergence import CHUNK_ELEMENTS, CHUNK_ELEMENTS_CUDA
from retort.train.parallel import Trained, spread_student
from retort.train.world import World, compute_dtype, open_world

LENGTHS = (512,)
_OBJECTIVE = Supervised(kind="supervised")


@dataclass(frozen=True)
class Row:
    """A model learning from `rows` rows of `length` tokens. Times are medians over repeats.

    `flops_per_second` is the arithmetic of the model alone, forward and backward; `utilisation` its
    share of what the GPU can do at most, None where that is not known. `peak_bytes` are allocated
    beyond the weights, gradients included, and `planned_bytes` what a plan says of the same.
    """

    contender: str
    rows: int
    length: int
    tokens_per_second: float
    spread: float
    flops_per_second: float
    utilisation: float | None
    peak_bytes: int
    planned_bytes: int
    seconds: list[float]


@dataclass(frozen=True)
class Training:
    """The rows so far, and what they were measured with."""

    head: Head
    repeats: int
    rows: tuple[Row, ...] = ()
    complete: bool = False

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers should know."""
        spreads = {f"{row.contender} at {row.length} tokens": row.spread for row in self.rows}
        return [*self.head.notes, *noise(spreads)]


@dataclass(frozen=True)
class Settings:
    """How many rows to learn from at once, and of which lengths."""

    rows: int = 8
    lengths: tuple[int, ...] = LENGTHS
    repeats: int = 3


def train(models: Sequence[Model], settings: Settings, head: Head) -> Iterator[Training]:
    """The result as it grows, once for each length; the last one is complete."""
    result = Training(head, settings.repeats)
    device = str(models[0].decoder.device)
    total = len(settings.lengths) * len(models) * (settings.repeats + 1)
    with open_world(device, Parallel()) as world, console.progress("train", total) as advance:
        students = {each.name: _student(each, world) for each in models}
        for length in settings.lengths:
            batches = {each.name: _batch(each, settings.rows, length, world) for each in models}
            works = {name: _pass(students[name], batches[name]) for name in students}
            found = measure(works, settings.repeats, advance, f"{{}}, {length} tokens".format)
            rows = [
                _row(each, found[each.name], settings.rows, length, works[each.name], world)
                for each in models
                if each.name in found
            ]
            result = replace(result, rows=(*result.rows, *rows))
            yield result
    yield replace(result, complete=True)


def _student(model: Model, world: World) -> Trained:
    model.decoder.requires_grad_(True)
    return spread_student(model.decoder, world, Parallel())


def _batch(model: Model, rows: int, length: int, world: World) -> Batch:
    """Random tokens, all of one document a row, all learnt but the last, which nothing follows."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
    learn_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    learn_BT[:, -1] = False
    return Batch(ids_BT, torch.zeros_like(ids_BT), learn_BT).to(world.device)


def _pass(student: Trained, batch: Batch) -> Work[float]:
    """Seconds of a forward and a backward pass."""

    def both() -> None:
        student(None, batch, _OBJECTIVE).sum.backward()

    def run() -> float:
        try:
            return timed(both, batch.ids_BT.device)
        finally:
            student.zero_grad(set_to_none=True)

    return Work(run, run)


def _row(
    model: Model, runs: Sequence[float], rows: int, length: int, work: Work[float], world: World
) -> Row:
    seconds, tokens = statistics.median(runs), rows * length
    rate = cost.train_flops(model.config, length) * tokens / seconds
    peak = peak_flops(world.device)
    return Row(
        contender=model.name,
        rows=rows,
        length=length,
        tokens_per_second=tokens / seconds,
        spread=spread([1 / each for each in runs]),
        flops_per_second=rate,
        utilisation=None if peak is None else rate / peak,
        peak_bytes=_peak(work, world),
        planned_bytes=_planned(model, rows, length, world),
        seconds=list(runs),
    )


def _peak(work: Work[float], world: World) -> int:
    """Bytes allocated beyond what is there before, counted in a pass that is not timed."""
    if world.device.type != "cuda":
        return peak_bytes(work.run)
    before = torch.cuda.memory_allocated(world.device)
    torch.cuda.reset_peak_memory_stats(world.device)
    work.run()
    return torch.cuda.max_memory_allocated(world.device) - before


def _planned(model: Model, rows: int, length: int, world: World) -> int:
    """What a plan says of such a pass, less the weights and the optimiser's moments."""
    stage = Stage(
        name="bench",
        objective=_OBJECTIVE,
        data=Worked(kind="worked", problems=Arithmetic(kind="arithmetic")),
        tokens=rows * length,
        rows=rows,
        length=length,
        optim=Optim(lr=1e-3),
    )
    on_cpu, size = world.device.type == "cpu", compute_dtype(world.device, Parallel()).itemsize
    chunk = CHUNK_ELEMENTS if on_cpu else CHUNK_ELEMENTS_CUDA
    setup = memory.Setup(1, world.mesh is not None, size, "none", chunk)
    whole = memory.sizes(model.decoder)
    found = memory.memory(stage, rows, 1, model.decoder, whole, None, setup)
    return found.total - found.weights - found.moments
