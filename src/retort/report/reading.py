"""Metrics files of any length, read a record at a time and reduced to what a figure can show."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retort.metrics import iterate_metrics
from retort.report.training import (
    KINDS,
    LAYER,
    METRICS,
    PARTS,
    RECIPE,
    Curve,
    Evaluated,
    Mark,
    StageCurves,
    Training,
)

SUFFIX = ".training"
STEP_FIELDS = ("lr", "gradient_norm", "tokens_per_second", "mfu", "memory_gib")

POINTS = 240
"""The most points of a curve; a longer stage is summed up in as many bins."""

LAYER_POINTS = 80
MARKS = 100
"""The most steps of a stage that are marked as skipped or as spikes, the first ones."""

LARGEST = 1e300
"""Numbers beyond it, which JSON may hold, are not those of a training."""

Floats = NDArray[np.float64]


def read_trainings(folders: Sequence[Path]) -> tuple[Training, ...]:
    """The curves of training folders.

    Raises ValueError for a folder that is none or holds no step yet, for a damaged file, and for
    folders that cannot be told apart.
    """
    return tuple(_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True))


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names that differ: the folder's own, or its whole path where that is not enough."""
    short = [folder.resolve().name.removesuffix(SUFFIX) for folder in folders]
    times = Counter(short)
    names = [
        name if times[name] == 1 else str(folder)
        for folder, name in zip(folders, short, strict=True)
    ]
    if len(set(names)) < len(names):
        raise ValueError(f"{Counter(names).most_common(1)[0][0]}: given twice")
    return names


def _read(folder: Path, name: str) -> Training:
    for file in (METRICS, RECIPE):
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: no training folder ({file} is missing)")
    recipe = _recipe(folder / RECIPE)
    reading = _Reading(folder / METRICS)
    for record in iterate_metrics(reading.path):
        reading.take(record)
    if not reading.stages:
        raise ValueError(f"{reading.path}: no step in it yet")
    return Training(
        name=name,
        stages=tuple(stage.reduced() for stage in reading.stages),
        evaluations=tuple(reading.evaluations),
        steps=reading.step,
        tokens=reading.tokens,
        seconds=reading.seconds,
        recipe=recipe,
    )


def _recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: not the recipe of a training")
    return recipe


@dataclass
class _Reading:
    """A metrics file while it is read, a record at a time."""

    path: Path
    stages: list[_Stage] = field(default_factory=list)
    evaluations: list[Evaluated] = field(default_factory=list)
    step: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    def take(self, record: Mapping[str, Any]) -> None:
        """Adds a record: of a step, or of an evaluation; others are passed over."""
        if isinstance(found := record.get("evaluation"), Mapping):
            values = {str(key): self._number(found, key) for key in found}
            stage = str(record.get("stage", ""))
            self.evaluations.append(Evaluated(self.step, self.tokens, stage, _finite(values)))
        elif "loss" in record:
            self._take_step(record)

    def _take_step(self, record: Mapping[str, Any]) -> None:
        step, tokens = (self._number(record, key) for key in ("step", "tokens"))
        if not math.isfinite(step + tokens):
            raise ValueError(f"{self.path}: a record with a loss lacks its step or its tokens")
        name = str(record.get("stage", ""))
        if not self.stages or self.stages[-1].name != name:
            self.stages.append(_Stage(name, self.tokens))
        fields = ("loss", *PARTS, *STEP_FIELDS, *filter(LAYER.fullmatch, record))
        values = {key: self._number(record, key) for key in fields if key in record}
        kinds = [kind for kind in KINDS if self._number(record, kind) == 1]
        self.stages[-1].take(int(step), tokens, values, kinds)
        self.stages[-1].counts |= {
            key: {str(name): self._number(found, name) for name in found}
            for key in ("data", "unused")
            if isinstance(found := record.get(key), Mapping)
        }
        seconds = self._number(record, "seconds")
        self.step, self.tokens = int(step), tokens
        self.seconds = seconds if math.isfinite(seconds) else self.seconds

    def _number(self, record: Mapping[str, Any], key: str) -> float:
        """A field as a number; NaN where it is absent or null, as NaN is written."""
        value = record.get(key)
        if value is None:
            return math.nan
        if not isinstance(value, int | float) or abs(value) > LARGEST:
            raise ValueError(f"{self.path}: {key} is {str(value)[:40]!r}, which is no number")
        return float(value)


@dataclass
class _Stage:
    """The steps of a stage as columns; NaN where a step says nothing of a field."""

    name: str
    start: float
    tokens: array[float] = field(default_factory=lambda: array("d"))
    columns: dict[str, array[float]] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    counts: dict[str, dict[str, float]] = field(default_factory=dict)

    def take(
        self, step: int, tokens: float, values: Mapping[str, float], kinds: Sequence[str]
    ) -> None:
        """Adds a step, and what was wrong with it."""
        for key in values:
            if key not in self.columns:
                self.columns[key] = array("d", [math.nan]) * len(self.tokens)
        self.tokens.append(tokens)
        for key, column in self.columns.items():
            column.append(values.get(key, math.nan))
        self.marks += [Mark(step, tokens, kind) for kind in kinds]

    def reduced(self) -> StageCurves:
        """The stage as a figure shows it."""
        tokens = np.array(self.tokens)
        curves = {
            key: reduce(tokens, np.array(column), _points(key))
            for key, column in self.columns.items()
        }
        kinds = Counter(mark.kind for mark in self.marks)
        return StageCurves(
            name=self.name,
            steps=len(self.tokens),
            start=self.start,
            end=self.tokens[-1],
            curves={key: curve for key, curve in curves.items() if curve.tokens},
            marks=tuple(self.marks[:MARKS]),
            skipped=kinds["skipped"],
            spikes=kinds["spike"],
            data=_finite(self.counts.get("data", {})),
            unused=_finite(self.counts.get("unused", {})),
        )


def _points(key: str) -> int:
    return LAYER_POINTS if LAYER.fullmatch(key) else POINTS


def reduce(x: Floats, y: Floats, points: int) -> Curve:
    """At most `points` points of a curve, each summing up as many neighbours; NaN is left out."""
    bin_of = np.arange(len(x)) * points // len(x) if len(x) > points else np.arange(len(x))
    known = np.isfinite(y)
    x, y, bin_of = x[known], y[known], bin_of[known]
    if not len(y):
        return Curve((), (), (), ())
    starts = np.flatnonzero(np.r_[True, bin_of[1:] != bin_of[:-1]])
    sizes = np.diff(np.r_[starts, len(y)])
    columns = (
        np.add.reduceat(x, starts) / sizes,
        np.add.reduceat(y / sizes.repeat(sizes), starts),
        np.minimum.reduceat(y, starts),
        np.maximum.reduceat(y, starts),
    )
    return Curve(*(tuple(map(_short, column.tolist())) for column in columns))


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {key: _short(value) for key, value in values.items() if math.isfinite(value)}


def _short(value: float) -> float:
    """Six figures, which is more than a figure shows."""
    return float(f"{value:.6g}")
