"""The report as data: what the figures and the page show, and all they read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from retort.report.choices import Choice, Stopping
from retort.report.comparisons import Comparisons
from retort.report.metrics import Estimate
from retort.report.reliability import Judged

FORMAT = 4  # of curves.json


@dataclass(frozen=True)
class Cost:
    """What k completions of a problem take beside seconds, in the mean over the problems.

    replayed: decode seconds by replay of the scheduler, all problems through the slots together.
    alone: likewise with each problem by itself in the slots. None where the run holds no times of
    its steps. flops, bytes: of decoding; None where the run does not say what a token takes.
    """

    tokens: float
    replayed: float | None
    alone: float | None
    flops: float | None
    bytes: float | None


@dataclass(frozen=True)
class Point:
    """One model with k completions per problem. Seconds are decode seconds per problem."""

    k: int
    seconds: float
    coverage: Estimate
    majority: Estimate
    cost: Cost


@dataclass(frozen=True)
class ModelCurve:
    """One model: the facts of its run, and its points, fewest completions first.

    truncated, unanswered, duplicates and timeouts are shares of completions, as in `Tally`.
    prefill_seconds: reading the prompt of a problem, once for all its completions.
    scoring_seconds: by scorer, judging one completion; without those that were not timed.
    price: of an hour of its machine, in whatever money was given; None where none was.
    replay_ratio: seconds that a replay of this very run foretells, over those it took.
    """

    name: str
    parameters: int
    problems: int
    samples: int  # per problem
    tokens_per_second: float
    slots: int
    mean_tokens: float
    truncated: float
    unanswered: float
    duplicates: float
    timeouts: float
    device: str
    versions: dict[str, str]
    recipe: dict[str, Any]
    points: tuple[Point, ...]
    choices: tuple[Choice, ...]
    stopping: tuple[Stopping, ...]
    judged: tuple[Judged, ...]
    prefill_seconds: float
    scoring_seconds: dict[str, float]
    price: float | None
    replay_ratio: float | None


@dataclass(frozen=True)
class Standing:
    """One model at the common time budget, into which `k` completions fit.

    behind: what the leader covers beyond it, paired over problems; 0 for the leader itself.
    """

    name: str
    k: float
    coverage: Estimate
    majority: Estimate
    behind: Estimate


@dataclass(frozen=True)
class Comparison:
    """All models at one number of decode seconds per problem, best coverage first."""

    seconds: float
    standings: tuple[Standing, ...]


@dataclass(frozen=True)
class Stamp:
    """What every curves.json holds, of whichever release."""

    format: int


@dataclass(frozen=True)
class Curves:
    """Everything a report says; `to_json` is the content of curves.json."""

    format: int
    created: str  # ISO 8601, UTC
    retort: str
    grader: str  # version of the verdicts
    models: tuple[ModelCurve, ...]
    comparison: Comparison
    comparisons: Comparisons

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False, ensure_ascii=False)

    @staticmethod
    def read(path: Path) -> Curves:
        """The curves of an earlier report. Raises ValueError when the file holds none."""
        text = path.read_bytes()
        try:
            found = TypeAdapter(Stamp).validate_json(text).format
            if found != FORMAT:
                raise ValueError(
                    f"{path}: format {found} of another release, and this one reads {FORMAT}; "
                    "make it again with `retort report`"
                )
            return TypeAdapter(Curves).validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            why = f"{place}: {first['msg']}" if place else first["msg"]
            raise ValueError(f"{path}: not the curves.json of a report ({why})") from None
