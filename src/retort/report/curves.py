"""The report as data: what the figures and the page show, and all they read.

Shape suffixes: P problems, M models, R bootstrap resamples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from retort._version import __version__
from retort.report.choices import Choice, Stopping, choices, stopping
from retort.report.metrics import (
    Estimate,
    Floats,
    bootstrap,
    bootstrap_counts,
    intervals,
    pass_at_k,
    vote_at_k,
)
from retort.report.reliability import Judged, judged
from retort.report.selection import enough_orders, weighted_vote
from retort.report.tally import Tally

FORMAT = 3  # of curves.json
EXACT_VOTES = 200_000


@dataclass(frozen=True)
class Point:
    """One model with k completions per problem. Seconds are decode seconds per problem."""

    k: int
    seconds: float
    coverage: Estimate
    majority: Estimate


@dataclass(frozen=True)
class ModelCurve:
    """One model: the facts of its run, and its points, fewest completions first.

    truncated, unanswered, duplicates and timeouts are shares of completions, as in `Tally`.
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
class Shown:
    """One completion as an example, with its verdict."""

    name: str
    text: str
    token_count: int
    finish_reason: str
    answer: str | None
    correct: bool


@dataclass(frozen=True)
class Example:
    """One problem and the first completion of each model on it."""

    problem_id: str
    question: str
    answer: str
    completions: tuple[Shown, ...]


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
    examples: tuple[Example, ...]

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


def build(
    tallies: Sequence[Tally], examples: Sequence[Example], ks: Sequence[int] | None = None
) -> Curves:
    """Estimate every curve.

    ks: the numbers of completions asked for, by default `default_ks` of each run.
    Raises ValueError for a k that a run has no samples for.
    """
    # one matrix for all models: their intervals, and those of their differences, are paired
    counts_RP = bootstrap_counts(len(tallies[0].problem_ids))
    return Curves(
        format=FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        retort=__version__,
        grader=tallies[0].verdicts,
        models=tuple(_model(tally, _asked(tally, ks), counts_RP) for tally in tallies),
        comparison=_compare(tallies, counts_RP),
        examples=tuple(examples),
    )


def default_ks(samples: int) -> list[int]:
    """1, 2, 4, ... up to the number of samples, and that number itself."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def _asked(tally: Tally, ks: Sequence[int] | None) -> list[int]:
    if ks is None:
        return default_ks(tally.samples)
    for k in ks:
        if k < 1:
            raise ValueError(f"k = {k} asked; k counts completions and is at least 1")
        if k > tally.samples:
            raise ValueError(
                f"k = {k} asked, but run {tally.run.folder} holds {tally.samples} completions "
                f"for problem {tally.problem_ids[0]} (sample more: sampling.n={k})"
            )
    return sorted(set(ks))


def _model(tally: Tally, ks: list[int], counts_RP: Floats) -> ModelCurve:
    manifest = tally.run.manifest
    points = _points(tally, ks, counts_RP)
    majority = [(point.k, point.majority.value) for point in points]
    return ModelCurve(
        name=tally.run.name,
        parameters=manifest["model"]["parameters"],
        problems=len(tally.problem_ids),
        samples=tally.samples,
        tokens_per_second=tally.pace.tokens_per_second,
        slots=tally.slots,
        mean_tokens=tally.pace.mean_tokens,
        truncated=tally.truncated,
        unanswered=tally.unanswered,
        duplicates=tally.duplicates,
        timeouts=tally.timeouts,
        device=manifest["device"],
        versions=manifest["versions"],
        recipe=manifest["recipe"],
        points=points,
        choices=tuple(choices(tally.samples_P, ks, counts_RP)),
        stopping=tuple(stopping(tally.samples_P, majority, tally.pace.seconds, counts_RP)),
        judged=judged(tally.samples_P),
    )


def _points(tally: Tally, ks: list[int], counts_RP: Floats) -> tuple[Point, ...]:
    coverage = intervals(np.stack([coverage_at(tally, k) for k in ks], axis=1), counts_RP)
    majority = intervals(votes_over(tally, ks), counts_RP)
    return tuple(
        Point(k, tally.pace.seconds(k), covered, voted)
        for k, covered, voted in zip(ks, coverage, majority, strict=True)
    )


def coverage_at(tally: Tally, k: int) -> Floats:
    """pass@k of each problem, shape (P,); 0 at k = 0."""
    return pass_at_k(tally.samples, tally.correct_P, k) if k else np.zeros(len(tally.problem_ids))


def votes_at(tally: Tally, k: int) -> Floats:
    """majority@k of each problem, shape (P,); 0 at k = 0."""
    return votes_over(tally, [k])[:, 0] if k else np.zeros(len(tally.problem_ids))


def votes_over(tally: Tally, ks: Sequence[int]) -> Floats:
    """majority@k of each problem for several k, shape (P, K).

    Exact up to `EXACT_VOTES` samples in all. Beyond, from random orders, as many as make the mean
    over the problems right to 0.0011 (one standard error): the exact sum would take minutes.
    """
    n, problems = tally.samples, len(tally.problem_ids)
    if n * problems <= EXACT_VOTES:
        return np.array([[vote_at_k(groups, n, k) for k in ks] for groups in tally.groups_P])
    orders, alike_N = enough_orders(problems), np.ones(n)
    return np.array(
        [
            weighted_vote(each.groups, alike_N, each.correct_N, ks, orders=orders).value_K
            for each in tally.samples_P
        ]
    )


# One time budget


def _compare(tallies: Sequence[Tally], counts_RP: Floats) -> Comparison:
    """At the largest budget that every model's samples fill: no extrapolation, no free choice."""
    seconds = min(tally.pace.seconds(tally.samples) for tally in tallies)
    ks = [min(tally.pace.completions(seconds), tally.samples) for tally in tallies]
    runs = list(zip(tallies, ks, strict=True))
    coverage_PM = np.stack([_between(coverage_at, *run) for run in runs], axis=1)
    majority_PM = np.stack([_between(votes_at, *run) for run in runs], axis=1)
    leader_P1 = coverage_PM[:, [coverage_PM.mean(axis=0).argmax()]]
    columns = zip(
        (tally.run.name for tally in tallies),
        ks,
        intervals(coverage_PM, counts_RP),
        intervals(majority_PM, counts_RP),
        bootstrap(leader_P1 - coverage_PM, counts_RP),
        strict=True,
    )
    standings = [Standing(*column) for column in columns]
    return Comparison(seconds, tuple(sorted(standings, key=lambda each: -each.coverage.value)))


def _between(chances_at: Callable[[Tally, int], Floats], tally: Tally, k: float) -> Floats:
    """Chances for a k that is not whole: k = 2.3 is 3 completions on 30 % of problems, else 2.

    So the budget is spent to the last second, and a model that is too slow for one completion on
    every problem still gets as many as it can make.
    """
    whole, part = floor(k), k - floor(k)
    chances_P = chances_at(tally, whole)
    return chances_P if part == 0 else (1 - part) * chances_P + part * chances_at(tally, whole + 1)
