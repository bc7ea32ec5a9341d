"""How things are measured side by side: in rounds, so that a slow minute touches all of them."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from retort.console import Advance
from retort.sample.memory import is_out_of_memory

T = TypeVar("T")
K = TypeVar("K")

NOISY = 0.1
"""The spread above which a measurement is worth a warning."""


@dataclass(frozen=True)
class Work(Generic[T]):
    """Something to be measured: what is measured, and what is done once before."""

    run: Callable[[], T]
    warm_up: Callable[[], object]


def measure(
    works: Mapping[K, Work[T]], repeats: int, advance: Advance, note: Callable[[K], str] = str
) -> dict[K, list[T]]:
    """What each work gives, `repeats` times; a round of all of them comes before the next one.

    One for which memory runs out is left alone from then on, and not among the results.
    """
    found: dict[K, list[T]] = {key: [] for key in works}
    for repeat in range(repeats + 1):
        for key in list(found):
            advance(1, note(key))
            try:
                if repeat == 0:
                    works[key].warm_up()
                else:
                    found[key].append(works[key].run())
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                del found[key]
            _free_gpu()
    return found


def spread(values: Sequence[float]) -> float:
    """The largest less the smallest, as a fraction of the median."""
    return (max(values) - min(values)) / statistics.median(values)


def noise(spreads: Mapping[str, float]) -> list[str]:
    """A warning about things whose measurements spread too far, if any do."""
    noisy = {name: each for name, each in spreads.items() if each > NOISY}
    if not noisy:
        return []
    worst = max(noisy, key=noisy.__getitem__)
    return [
        f"{len(noisy)} of {len(spreads)} rows spread by more than {NOISY:.0%}, most of all "
        f"{worst} ({noisy[worst]:.0%}): the machine was busy, or its clock changed"
    ]


def _free_gpu() -> None:
    """Gives memory back: the next one to be measured needs it in pieces of other sizes."""
    if torch.cuda.is_available():
        gc.collect()  # other libraries keep some in cycles
        torch.cuda.empty_cache()
