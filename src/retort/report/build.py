"""From counted runs to the report's data: every curve, and how they compare.

Shape suffixes: P problems, M models, K numbers of completions, C completions, R bootstrap
resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import floor

import numpy as np

from retort._version import __version__
from retort.report import scheduler
from retort.report.choices import Way, choice, stopping, ways
from retort.report.comparisons import Measured, compare
from retort.report.curves import (
    FORMAT,
    Comparison,
    Cost,
    Curves,
    ModelCurve,
    Point,
    Standing,
)
from retort.report.metrics import (
    Floats,
    bootstrap,
    bootstrap_counts,
    intervals,
    pass_at_k,
    vote_at_k,
)
from retort.report.reliability import judged
from retort.report.selection import enough_orders, weighted_vote
from retort.report.steps import StepTimes
from retort.report.tally import Tally

EXACT_VOTES = 200_000


def build(
    tallies: Sequence[Tally],
    ks: Sequence[int] | None = None,
    reference: str | None = None,
    prices: Mapping[str, float] | None = None,
) -> Curves:
    """Estimate every curve, and compare them.

    ks: the numbers of completions asked for, by default `default_ks` of each run. reference: the
    model that others are compared with, by default the first. prices: of an hour of its machine by
    name, and under an empty name for those that are not named.
    Raises ValueError for a k that a run has no samples for, and a name that no run has.
    """
    names = [tally.run.name for tally in tallies]
    prices = prices or {}
    for name in {*prices, *([reference] if reference else [])} - {*names, ""}:
        raise ValueError(f"no run is named {name!r}; there are {', '.join(names)}")
    # one matrix for all models: their intervals, and those of their differences, are paired
    counts_RP = bootstrap_counts(len(tallies[0].problem_ids))
    drawn = [_drawn(tally, _asked(tally, ks)) for tally in tallies]
    return Curves(
        format=FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        retort=__version__,
        grader=tallies[0].verdicts,
        models=tuple(_model(each, counts_RP, prices) for each in drawn),
        comparison=_compare(tallies, counts_RP),
        comparisons=compare([_measured(each) for each in drawn], reference or names[0], counts_RP),
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
                f"for problem {tally.problem_ids[0]} (sample more: sampling.n={k}) "
                "(docs/report.md#estimators)"
            )
    return sorted(set(ks))


@dataclass(frozen=True)
class _Drawn:
    """A run, the numbers of completions to report, and by them the chances of each problem."""

    tally: Tally
    ks: list[int]
    coverage_PK: Floats
    majority_PK: Floats
    ways: list[Way]


def _drawn(tally: Tally, ks: list[int]) -> _Drawn:
    coverage_PK = np.stack([coverage_at(tally, k) for k in ks], axis=1)
    return _Drawn(tally, ks, coverage_PK, votes_over(tally, ks), ways(tally.samples_P, ks))


def _measured(drawn: _Drawn) -> Measured:
    """The run as comparisons take it: with the slots that it had, and with fewer."""
    tally = drawn.tally
    chances = {"coverage": drawn.coverage_PK, "majority": drawn.majority_PK}
    chances |= {way.name: way.chance_PK for way in drawn.ways}
    tokens_P = np.array([each.length_N.mean() for each in tally.lengths_P])
    seconds_P = {slots: tokens_P / rate for slots, rate in _throughputs(tally).items()}
    return Measured(tally.run.name, np.array(drawn.ks, float), chances, tally.slots, seconds_P)


def _throughputs(tally: Tally) -> dict[int, float]:
    """Tokens per second by slots: with those of the run as measured, with a quarter of them, a
    sixteenth and so on as its steps foretell.
    """
    found = {tally.slots: tally.pace.tokens_per_second}
    if tally.times is not None:
        length, times = tally.pace.mean_tokens, tally.times
        slots = min(tally.slots // 4, times.slots)
        while slots:
            found[slots] = times.throughput(slots, _context(tally, times, slots), length)
            slots //= 4
    return found


def _context(tally: Tally, times: StepTimes, slots: int) -> float:
    """Tokens that a step of so many slots reads, in the mean, where problems come one after another
    with all their samples.
    """
    length_C = np.concatenate([each.length_N for each in tally.lengths_P]).astype(np.float64)
    own = np.mean(length_C * (length_C + 1)) / 2 / length_C.mean()
    prompt = float(np.mean([each.prompt_tokens for each in tally.lengths_P]))
    each = min(slots, tally.samples)
    prompts = slots / each if times.shares(each, prompt) else slots
    return float(slots * own + prompts * prompt)


def _model(drawn: _Drawn, counts_RP: Floats, prices: Mapping[str, float]) -> ModelCurve:
    tally, manifest = drawn.tally, drawn.tally.run.manifest
    points = _points(drawn, counts_RP)
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
        choices=tuple(choice(way, drawn.ks, counts_RP) for way in drawn.ways),
        stopping=tuple(stopping(tally.samples_P, majority, tally.pace.seconds, counts_RP)),
        judged=judged(tally.samples_P),
        prefill_seconds=tally.prefill_seconds,
        scoring_seconds=tally.scoring_seconds,
        price=prices.get(tally.run.name, prices.get("")),
        replay_ratio=_replay_ratio(tally),
    )


def _points(drawn: _Drawn, counts_RP: Floats) -> tuple[Point, ...]:
    coverage = intervals(drawn.coverage_PK, counts_RP)
    majority = intervals(drawn.majority_PK, counts_RP)
    work = _work(drawn.tally)
    return tuple(
        Point(k, drawn.tally.pace.seconds(k), covered, voted, _cost(drawn.tally, k, work))
        for k, covered, voted in zip(drawn.ks, coverage, majority, strict=True)
    )


def _work(tally: Tally) -> tuple[float, float] | None:
    """FLOPs and bytes of a completion, where the run says what a token takes."""
    if tally.token is None:
        return None
    return tally.token.of_completion(tally.lengths_P, tally.rows)


def _cost(tally: Tally, k: int, work: tuple[float, float] | None) -> Cost:
    flops, moved = (None, None) if work is None else (k * work[0], k * work[1])
    tokens = k * tally.pace.mean_tokens
    if (times := tally.times) is None:
        return Cost(tokens, None, None, flops, moved)
    slots = min(tally.slots, times.slots)
    replayed = scheduler.together(tally.lengths_P, k, slots, times)
    alone = scheduler.alone(tally.lengths_P, k, slots, times)
    return Cost(tokens, replayed, alone, flops, moved)


def _replay_ratio(tally: Tally) -> float | None:
    """What a replay of the whole run foretells over what it took."""
    if tally.times is None:
        return None
    slots = min(tally.slots, tally.times.slots)
    seconds = scheduler.together(tally.lengths_P, tally.samples, slots, tally.times)
    return seconds * len(tally.lengths_P) / tally.decode_seconds


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
