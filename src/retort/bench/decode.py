"""`retort bench decode`: tokens a second at growing batches, beside what the memory allows.

The paper's protocol (arXiv 2502.20339, section 4): a prompt of 512 tokens, 512 new ones, prefill
not counted. Rows either have prompts of their own or share one, which a forward may know to read
once for all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retort import console
from retort.bench.contenders import WARM_STEPS, Case, Contender, P, Prompts, Timed
from retort.bench.head import Head
from retort.bench.machine import copy_bandwidth
from retort.bench.models import Model
from retort.bench.prefill import reading
from retort.bench.rounds import Work, measure, noise, spread
from retort.bench.spans import Protocol
from retort.model import cost
from retort.sample.memory import room

MOST = {"cpu": 64}
"""Rows that the sweep goes up to where nothing is said; on other devices to the memory's limit."""

Key = tuple[str, Prompts]


@dataclass(frozen=True)
class Row:
    """A contender at one batch size. Times are medians over repeats; `spread` is the largest less
    the smallest as a fraction of the median.

    `step_bytes` is what a step must move by the cost model, on average over the new tokens, and
    `of_limit` the share of the copy bandwidth of the same rounds that this comes to, which is also
    the share of the tokens a second that this bandwidth allows. It may pass 1 where a cache holds
    what is moved. `state_bytes` is of all rows, None where a runtime does not tell. `seconds` has
    those of each span, for each repeat.
    """

    contender: str
    model: str
    runtime: str
    prompts: Prompts
    batch: int
    steps: int
    ms_per_step: float
    tokens_per_second: float
    spread: float
    step_bytes: float
    bandwidth: float
    of_limit: float
    state_bytes: int | None
    seconds: list[list[float]]

    @property
    def gb_per_second(self) -> float:
        """What is moved in a second by the cost model, in 1e9 bytes."""
        return 1e-6 * self.step_bytes / self.ms_per_step


@dataclass(frozen=True)
class Prefill:
    """Seconds in which a contender reads one prompt: their median, and those of each repeat."""

    contender: str
    median: float
    seconds: list[float]


@dataclass(frozen=True)
class End:
    """A contender whose sweep ended at a batch size that it has not reached, and why."""

    contender: str
    prompts: Prompts
    batch: int
    reason: str


@dataclass(frozen=True)
class Decode:
    """The rows so far, and what they were measured with."""

    head: Head
    protocol: Protocol
    repeats: int
    prefills: tuple[Prefill, ...]
    rows: tuple[Row, ...] = ()
    ended: tuple[End, ...] = ()
    complete: bool = False

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers should know."""
        spreads = {
            f"{row.contender} at batch {row.batch}, {row.prompts} prompts": row.spread
            for row in self.rows
        }
        ends = [
            f"{end.contender}, {end.prompts} prompts: not at batch {end.batch}, {end.reason}"
            for end in self.ended
        ]
        return [*self.head.notes, *noise(spreads), *ends]


@dataclass(frozen=True)
class Settings:
    """What to measure: `batches` None is a sweep over powers of two, up to `most` rows or, without
    it, until memory is full.
    """

    protocol: Protocol
    prompts: tuple[Prompts, ...] = ("own", "shared")
    batches: tuple[int, ...] | None = None
    most: int | None = None
    repeats: int = 3


def decode(
    contenders: Sequence[Contender[Any]], settings: Settings, head: Head
) -> Iterator[Decode]:
    """The result as it grows, once for each batch size; the last one is complete."""
    protocol, rounds = settings.protocol, settings.repeats + 1
    live: dict[Key, Contender[Any]] = {
        (each.name, prompts): each
        for prompts in settings.prompts
        for each in contenders
        if prompts == "own" or each.runtime == "retort"
    }
    largest = {each.name: _largest(each, protocol) for each in contenders}
    batches = _batches(settings, largest, contenders[0])
    total = (len(contenders) + len(batches) * len(live)) * rounds
    with console.progress("decode", total) as advance:
        prefills = _prefills(contenders, settings, advance)
        result = Decode(head, protocol, settings.repeats, prefills)
        for batch in batches:
            fitting = {key: each for key, each in live.items() if batch <= largest[each.name]}
            rows = _rows(fitting, batch, settings, advance)
            ends = [_end(key, batch, largest) for key in live if key not in rows]
            live = {key: live[key] for key in rows}
            advance(len(ends) * rounds)
            result = replace(
                result, rows=(*result.rows, *rows.values()), ended=(*result.ended, *ends)
            )
            yield result
    yield replace(result, complete=True)


def _prefills(
    contenders: Sequence[Contender[Any]], settings: Settings, advance: console.Advance
) -> tuple[Prefill, ...]:
    """One prompt, read by each."""
    prompt = settings.protocol.prompt
    works = {each.name: reading(each, prompt) for each in contenders}
    found = measure(works, settings.repeats, advance, "{}, prefill".format)
    return tuple(Prefill(name, statistics.median(runs), runs) for name, runs in found.items())


def _batches(
    settings: Settings, largest: Mapping[str, int], contender: Contender[Any]
) -> list[int]:
    """The batch sizes of the sweep, smallest first."""
    if settings.batches is not None:
        return sorted(set(settings.batches))
    fits = max(largest.values())
    most = min(fits, settings.most or MOST.get(contender.model.decoder.device.type, fits))
    return [1 << power for power in range(most.bit_length())]


def _largest(contender: Contender[Any], protocol: Protocol) -> int:
    """Rows whose states fit beside the models, with some memory left for activations."""
    model = contender.model
    # `largest_batch` takes the weights off, and these are there already.
    budget = room(model.decoder) + model.decoder.size * model.itemsize
    length = protocol.prompt + protocol.new
    return cost.largest_batch(model.config, length, budget, model.itemsize, contender.cache)


def _end(key: Key, batch: int, largest: Mapping[str, int]) -> End:
    name, prompts = key
    fits = f"since memory holds {largest[name]} rows of the cost model"
    return End(name, prompts, batch, fits if batch > largest[name] else "out of memory")


def _rows(
    contenders: Mapping[Key, Contender[Any]],
    batch: int,
    settings: Settings,
    advance: console.Advance,
) -> dict[Key, Row]:
    """Those that did not run out of memory at a batch size."""
    if not contenders:
        return {}
    device = next(iter(contenders.values())).model.decoder.device
    copies = [copy_bandwidth(device) for _ in range(2)]
    works = {
        key: decoding(each, batch, _protocol(settings, key[1]), key[1])
        for key, each in contenders.items()
    }
    found = measure(works, settings.repeats, advance, lambda key: f"{key[0]}, batch {batch}")
    copies += [copy_bandwidth(device) for _ in range(2)]
    bandwidth = statistics.median(copies)
    return {
        key: _row(contenders[key], key[1], batch, _protocol(settings, key[1]), runs, bandwidth)
        for key, runs in found.items()
    }


def _protocol(settings: Settings, prompts: Prompts) -> Protocol:
    """A window begins at a prompt of its own context, which rows must not share behind theirs: with
    shared prompts every step is taken, and measured.
    """
    return settings.protocol if prompts == "own" else settings.protocol.whole


def decoding(
    contender: Contender[P], batch: int, protocol: Protocol, prompts: Prompts = "own"
) -> Work[list[Timed]]:
    """All spans of a protocol, one after another; a few steps of the first one to warm up."""
    cases = [Case(batch, span, prompts) for span in protocol.spans]
    few = replace(cases[0], span=replace(cases[0].span, steps=WARM_STEPS))
    read: list[P] = []

    def warm_up() -> None:
        read.extend(contender.read(case.lead) for case in cases)
        contender.decode(few, read[0])

    def run() -> list[Timed]:
        return [contender.decode(case, prompt) for case, prompt in zip(cases, read, strict=True)]

    return Work(run, warm_up)


def _row(
    contender: Contender[Any],
    prompts: Prompts,
    batch: int,
    protocol: Protocol,
    runs: Sequence[Sequence[Timed]],
    bandwidth: float,
) -> Row:
    steps = [sum(span.seconds for span in run) / protocol.measured for run in runs]
    step = statistics.median(steps)
    model, ours = contender.model, contender.runtime == "retort"
    itemsize = model.read_itemsize if ours else model.itemsize
    moved = step_bytes(model, batch, prompts, protocol, contender.cache, itemsize)
    return Row(
        contender=contender.name,
        model=model.name,
        runtime=contender.runtime,
        prompts=prompts,
        batch=batch,
        steps=protocol.measured,
        ms_per_step=1000 * step,
        tokens_per_second=batch / step,
        spread=spread([1 / each for each in steps]),
        step_bytes=moved,
        bandwidth=bandwidth,
        of_limit=moved / step / bandwidth,
        state_bytes=runs[-1][-1].state_bytes,
        seconds=[[span.seconds for span in run] for run in runs],
    )


def step_bytes(
    model: Model,
    batch: int,
    prompts: Prompts,
    protocol: Protocol,
    cache: cost.CacheBytes,
    itemsize: float,
) -> float:
    """Bytes that a step must move, on average over the protocol's spans, where a weight has
    `itemsize`; the keys and values of a shared prompt once for all rows.
    """
    middles = [span.middle for span in protocol.spans]
    context = sum(middles) / len(middles)
    moved = cost.decode_bytes(model.config, batch, round(context), model.itemsize, cache)
    weights = moved.weights / model.itemsize * itemsize
    total = moved.total - moved.weights + weights
    if prompts == "own":
        return total
    read = cost.kv_bytes_per_token(model.config, cache.kv) * protocol.prompt
    return total - (batch - 1) * read
