"""`retort bench targets`: the ratios that Retort sets itself on a CPU, measured side by side.

Decoding is measured in windows: a few steps at contexts spread evenly over the new tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from retort import console
from retort.bench import llama_cpp, operators
from retort.bench.contenders import Contender, Ours
from retort.bench.decode import decoding
from retort.bench.head import Head
from retort.bench.huggingface import open_transformers
from retort.bench.models import Model
from retort.bench.prefill import completing
from retort.bench.rounds import measure
from retort.bench.spans import Protocol

SCAN = (512, 32)
"""Tokens and chunk of the scans that are compared."""


@dataclass(frozen=True)
class Target:
    """A ratio, and the least that it should be. `measured` is the median of `runs`, the ratios of
    each repeat; without one, `how` says why it was not measured, and else what was.
    """

    what: str
    at_least: float
    how: str
    measured: float | None = None
    runs: tuple[float, ...] = ()
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether it is reached, None where it was not measured."""
        return None if self.measured is None else self.measured >= self.at_least


@dataclass(frozen=True)
class Targets:
    """The targets so far, and what they were measured with."""

    head: Head
    settings: Settings
    targets: tuple[Target, ...] = ()
    complete: bool = False

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers should know."""
        return list(self.head.notes)


@dataclass(frozen=True)
class Settings:
    """Rows at once, decode steps that are measured of each protocol, completions of one prompt."""

    batch: int = 64
    steps: int = 128
    repeats: int = 3
    n: int = 64

    @property
    def work(self) -> int:
        """What is done, for progress: contenders, and rounds of each."""
        return len(TARGETS) * 2 * (self.repeats + 1)


def targets(teacher: Model, student: Model, settings: Settings, head: Head) -> Iterator[Targets]:
    """The result as it grows, target by target; the last one is complete.

    `teacher` has attention in every layer, `student` in none.
    """
    result = Targets(head, settings)
    with console.progress("targets", settings.work) as advance:
        for measure_ in TARGETS:
            found = measure_(teacher, student, settings, advance)
            result = replace(result, targets=(*result.targets, *found))
            yield result
    yield replace(result, complete=True)


Measurement = Callable[[Model, Model, Settings, console.Advance], list[Target]]


def _llama(teacher: Model, _: Model, settings: Settings, advance: console.Advance) -> list[Target]:
    short = Protocol(128, 512, settings.steps)
    asked = Target("Llama decode over transformers generate", 3.0, f"{short}")
    return [_decoded(asked, Ours(teacher), open_transformers(teacher), short, settings, advance)]


def _mamba(_: Model, student: Model, settings: Settings, advance: console.Advance) -> list[Target]:
    short = Protocol(128, 512, settings.steps)
    asked = Target("Mamba-2 decode over transformers generate, exported folder", 5.0, f"{short}")
    return [_decoded(asked, Ours(student), open_transformers(student), short, settings, advance)]


def _llama_cpp(
    teacher: Model, _: Model, settings: Settings, advance: console.Advance
) -> list[Target]:
    short = Protocol(128, 512, settings.steps)
    asked = Target("Llama decode over llama.cpp, F32", 2.0, f"{short}, it does not sample")
    if not llama_cpp.installed():
        advance(2 * (settings.repeats + 1))
        return [replace(asked, how=llama_cpp.HOW_TO_INSTALL)]
    theirs = llama_cpp.open_llama_cpp(teacher)
    return [_decoded(asked, Ours(teacher), theirs, short, settings, advance)]


def _student(
    teacher: Model, student: Model, settings: Settings, advance: console.Advance
) -> list[Target]:
    papers = Protocol(512, 512, settings.steps)
    asked = Target("pure student's decode over our own teacher's", 2.5, f"{papers}")
    return [_decoded(asked, Ours(student), Ours(teacher), papers, settings, advance)]


def _prefill(
    teacher: Model, _: Model, settings: Settings, advance: console.Advance
) -> list[Target]:
    n, length = settings.n, 128
    works = {count: completing(Ours(teacher), length, count) for count in (1, n)}
    found = measure(works, settings.repeats, advance, "prefill for {}".format)
    served = tuple(n * length / tokens for tokens, _ in found[n])
    seconds = {f"n = {count}": [[each for _, each in runs]] for count, runs in found.items()}
    how = f"n = {n}, a prompt of {length} tokens"
    asked = Target("n completions for each time their prompt is read", n, how)
    return [replace(asked, measured=statistics.median(served), runs=served, seconds=seconds)]


def _training(_: Model, __: Model, settings: Settings, advance: console.Advance) -> list[Target]:
    """The chunked scan beside the sequential one, forward and backward."""
    length, chunk = SCAN
    found = operators.compare(*operators.scans(length, chunk), repeats=settings.repeats)
    advance(2 * (settings.repeats + 1))
    how = f"T {length}, chunk {chunk}, B 2, H 4, P 32, N 32, forward and backward"
    runs = tuple(plain / ours for ours, plain in found.times)
    seconds = {"chunked": [[t] for t, _ in found.times], "plain": [[t] for _, t in found.times]}
    saved = 1 / found.memory_ratio
    return [
        Target("chunked SSD over the sequential scan", 5.0, how, found.speedup, runs, seconds),
        Target("peak memory of the sequential scan over chunked SSD's", 2.0, how, saved, (saved,)),
    ]


TARGETS: Sequence[Measurement] = (_llama, _mamba, _llama_cpp, _student, _prefill, _training)


def _decoded(
    asked: Target,
    ours: Contender[Any],
    theirs: Contender[Any],
    protocol: Protocol,
    settings: Settings,
    advance: console.Advance,
) -> Target:
    """How many times as long the other one takes for the same steps, repeat by repeat."""
    works = {each.name: decoding(each, settings.batch, protocol) for each in (ours, theirs)}
    found = measure(works, settings.repeats, advance)
    how = f"batch {settings.batch}, {asked.how}"
    if len(found) < 2:
        return replace(asked, how=f"not measured: out of memory at {how}")
    seconds = {
        name: [[span.seconds for span in run] for run in runs] for name, runs in found.items()
    }
    sums = [[sum(run) for run in seconds[each.name]] for each in (ours, theirs)]
    runs = tuple(theirs / ours for ours, theirs in zip(*sums, strict=True))
    return replace(asked, how=how, measured=statistics.median(runs), runs=runs, seconds=seconds)
