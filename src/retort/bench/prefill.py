"""`retort bench prefill`: how fast prompts are read, and how often for n completions of one."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retort import console
from retort.bench.contenders import Contender
from retort.bench.head import Head
from retort.bench.machine import peak_flops, timed
from retort.bench.models import Model
from retort.bench.rounds import Work, measure, noise, spread
from retort.model import cost

LENGTHS = (128, 512, 2048)


@dataclass(frozen=True)
class Row:
    """A contender reading one prompt of `length` tokens. Times are medians over repeats.

    `flops_per_second` counts the head for the last token alone; `utilisation` is its share of what
    the GPU can do at most, None where that is not known.
    """

    contender: str
    model: str
    runtime: str
    length: int
    tokens_per_second: float
    spread: float
    flops_per_second: float
    utilisation: float | None
    seconds: list[float]


@dataclass(frozen=True)
class Shared:
    """Tokens that a contender reads, and seconds, before `n` completions of one prompt of `length`
    tokens have their first tokens.
    """

    contender: str
    length: int
    n: int
    tokens: int
    seconds: list[float]

    @property
    def prompts(self) -> float:
        """How often the prompt was read."""
        return self.tokens / self.length


@dataclass(frozen=True)
class Prefill:
    """The rows so far, and what they were measured with."""

    head: Head
    repeats: int
    rows: tuple[Row, ...] = ()
    shared: tuple[Shared, ...] = ()
    complete: bool = False

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers should know."""
        spreads = {f"{row.contender} at {row.length} tokens": row.spread for row in self.rows}
        return [*self.head.notes, *noise(spreads)]


@dataclass(frozen=True)
class Settings:
    """Prompts of which lengths to read, and how many completions to read one of them for."""

    lengths: tuple[int, ...] = LENGTHS
    n: int = 16
    repeats: int = 3


def prefill(
    contenders: Sequence[Contender[Any]], settings: Settings, head: Head
) -> Iterator[Prefill]:
    """The result as it grows, once for each length; the last one is complete."""
    result = Prefill(head, settings.repeats)
    total = (len(settings.lengths) + 1) * len(contenders) * (settings.repeats + 1)
    with console.progress("prefill", total) as advance:
        for length in settings.lengths:
            works = {each.name: reading(each, length) for each in contenders}
            found = measure(works, settings.repeats, advance, f"{{}}, {length} tokens".format)
            rows = [
                _row(each, length, found[each.name]) for each in contenders if each.name in found
            ]
            result = replace(result, rows=(*result.rows, *rows))
            yield result
        length = settings.lengths[0]
        forks = {each.name: completing(each, length, settings.n) for each in contenders}
        read = measure(forks, settings.repeats, advance, f"{{}}, {settings.n} completions".format)
        shared = [_shared(name, length, settings.n, runs) for name, runs in read.items()]
    yield replace(result, shared=tuple(shared), complete=True)


def reading(contender: Contender[Any], length: int) -> Work[float]:
    """Seconds of reading one prompt."""

    def run() -> float:
        return timed(lambda: contender.read(length), contender.model.decoder.device)

    return Work(run, run)


def completing(contender: Contender[Any], length: int, n: int) -> Work[tuple[int, float]]:
    """Tokens read, and seconds, for n completions of one prompt."""

    def run() -> tuple[int, float]:
        return contender.complete(length, n)

    return Work(run, run)


def prompt_flops(model: Model, length: int) -> float:
    """FLOPs of reading a prompt up to the logits of its last token."""
    flops = cost.prefill_flops(model.config, length)
    return length * (flops.total - flops.head) + flops.head


def _row(contender: Contender[Any], length: int, runs: list[float]) -> Row:
    seconds = statistics.median(runs)
    rate = prompt_flops(contender.model, length) / seconds
    peak = peak_flops(contender.model.decoder.device)
    return Row(
        contender=contender.name,
        model=contender.model.name,
        runtime=contender.runtime,
        length=length,
        tokens_per_second=length / seconds,
        spread=spread([length / each for each in runs]),
        flops_per_second=rate,
        utilisation=None if peak is None else rate / peak,
        seconds=runs,
    )


def _shared(name: str, length: int, n: int, runs: Sequence[tuple[int, float]]) -> Shared:
    (tokens,) = {tokens for tokens, _ in runs}
    return Shared(name, length, n, tokens, [seconds for _, seconds in runs])
