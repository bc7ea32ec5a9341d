"""Training runs as data: what the figures and the page of training curves show."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

METRICS, RECIPE = "metrics.jsonl", "recipe.json"

PARTS = ("kl", "ce")
"""What a loss may be made of, besides layers."""

KINDS = ("skipped", "spike")
"""What a step can be marked as: not finite and so not taken, or with a loss far above the others.
"""

LAYER = re.compile(r"layer_(\d{1,4})")


@dataclass(frozen=True)
class Curve:
    """One quantity against tokens: the mean, the least and the greatest value of each bin."""

    tokens: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Mark:
    """A step that went wrong, and how: one of `KINDS`."""

    step: int
    tokens: float
    kind: str


@dataclass(frozen=True)
class StageCurves:
    """One stage: where it lies in the run, its curves by field, and what went wrong in it.

    `data` are the tokens taken from each source of its data, and `unused` counts rows of them that
    were of no use, by reason.
    """

    name: str
    steps: int
    start: float  # tokens
    end: float
    curves: dict[str, Curve]
    marks: tuple[Mark, ...]
    skipped: int
    spikes: int
    data: dict[str, float]
    unused: dict[str, float]

    @property
    def layers(self) -> dict[int, Curve]:
        """The loss of each layer, where the objective has such."""
        found = {name: LAYER.fullmatch(name) for name in self.curves}
        return {int(m.group(1)): self.curves[name] for name, m in found.items() if m}


@dataclass(frozen=True)
class Evaluated:
    """One evaluation by generation, and how many tokens had been trained on before it."""

    step: int
    tokens: float
    stage: str
    values: dict[str, float]


@dataclass(frozen=True)
class Training:
    """One training run, as far as it has come."""

    name: str
    stages: tuple[StageCurves, ...]
    evaluations: tuple[Evaluated, ...]
    steps: int
    tokens: float
    seconds: float
    recipe: dict[str, Any]

    @property
    def best(self) -> Evaluated | None:
        """The evaluation with the highest coverage, the first of equals."""
        covered = [each for each in self.evaluations if "coverage" in each.values]
        return max(covered, key=lambda each: each.values["coverage"], default=None)


def is_training(folder: Path) -> bool:
    """Whether a folder is what a training leaves beside its student, were it only begun."""
    return (folder / RECIPE).is_file()


def to_json(trainings: Sequence[Training]) -> str:
    """The content of training.json."""
    return json.dumps([asdict(each) for each in trainings], allow_nan=False, ensure_ascii=False)


def stage_names(trainings: Sequence[Training]) -> list[str]:
    """Names of the stages of all runs, each as far down as in the run where it comes latest."""
    latest: dict[str, int] = {}
    for training in trainings:
        for i, stage in enumerate(training.stages):
            latest[stage.name] = max(i, latest.get(stage.name, 0))
    return sorted(latest, key=lambda name: latest[name])
