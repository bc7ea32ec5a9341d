"""What a run writes down as it goes: its own files, and trackers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.metrics import MetricsLog
from retort.recipe import DistillRecipe
from retort.trackers import Sink, open_trackers
from retort.train.folder import DROPPED, METRICS


@dataclass(frozen=True)
class Records:
    """Where records go: of steps and evaluations, and of rows that were left out."""

    metrics: MetricsLog
    dropped: MetricsLog
    trackers: Sink

    def write(self, record: dict[str, Any]) -> None:
        """Writes down a step or an evaluation, and tells the trackers."""
        self.metrics.write(record)
        self.trackers.write(record)


@contextmanager
def open_records(recipe: DistillRecipe, work: Path, step: int) -> Iterator[Records]:
    """The records as they were at the step that the run goes on from."""
    metrics, dropped = MetricsLog(work / METRICS), MetricsLog(work / DROPPED)
    for file in (metrics, dropped):
        file.truncate_after(step)
    config = recipe.model_dump(mode="json")
    with open_trackers(recipe.trackers, recipe.out.name, work, config, step) as sink:
        yield Records(metrics, dropped, sink)
