"""Models against one another in seconds: the Pareto front, speed-ups, crossovers, differences.

Everything is by throughput conversion, and every interval and share from one set of bootstrap
resamples of the problems, in which both accuracies and lengths are drawn again.

Shape suffixes: P problems, K numbers of completions, R bootstrap resamples, C candidates, T times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan

import numpy as np

from retort.report.budget import completions_to_reach, pareto_front
from retort.report.metrics import Estimate, Floats, bootstrap, intervals


@dataclass(frozen=True)
class Candidate:
    """A model, a number of completions and a number of slots, by what they take and reach.

    on_front: none of the others is at least as fast and as accurate, and better in one of the two.
    kept: the share of bootstrap resamples of the problems in which that is so.
    """

    rule: str
    name: str
    k: int
    slots: int
    seconds: float
    accuracy: Estimate
    on_front: bool
    kept: float


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster than the reference a model reaches what that does with `reference_k`.

    k: the completions that takes, between the curve's points on a logarithmic scale; None where the
    model does not reach it, and `times` is None too. reached: the share of bootstrap resamples in
    which it does, over which the interval of `times` is.
    """

    rule: str
    name: str
    reference_k: int
    accuracy: float
    k: float | None
    times: Estimate | None
    reached: float


@dataclass(frozen=True)
class Crossover:
    """The time per problem from which on a model is ahead of the reference, up to the last time
    that both have samples for.

    seconds: None where it is not ahead at the end; at `first`, the first time compared, it is ahead
    throughout. ahead: the share of bootstrap resamples in which it is ahead at the end, over which
    the interval of `seconds` is.
    """

    rule: str
    name: str
    first: float
    last: float
    seconds: Estimate | None
    ahead: float


@dataclass(frozen=True)
class Difference:
    """By how much a model's accuracy with k completions exceeds the reference's, paired over
    problems.
    """

    rule: str
    name: str
    k: int
    by: Estimate


@dataclass(frozen=True)
class Comparisons:
    """All models against the reference, by rule: `coverage`, `majority`, or the name of a choice.

    Seconds are by throughput conversion, per problem.
    """

    reference: str
    candidates: tuple[Candidate, ...]
    speed_ups: tuple[SpeedUp, ...]
    crossovers: tuple[Crossover, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Measured:
    """A model as it is compared: by rule the chance of each problem to be answered rightly with k
    completions, (P, K), and the decode seconds of a completion of each problem, by slots.

    slots: those that were sampled with. All models have the same problems in the same order.
    """

    name: str
    k_K: Floats
    chance_PK: Mapping[str, Floats]
    slots: int
    seconds_P: Mapping[int, Floats]


@dataclass(frozen=True)
class _Curve:
    """Accuracy over k and seconds of a completion by resample; the first is the data's own."""

    name: str
    k_K: Floats
    accuracy_RK: Floats
    second_R: Floats

    def at(self, time_T: Floats) -> Floats:
        """Accuracy within these seconds, (R, T): between the points of the curve on a logarithmic
        scale, below one completion as many problems as there is time for. The last point holds on.
        """
        log_K = np.log(self.k_K)
        rows = zip(self.second_R, self.accuracy_RK, strict=True)
        return np.stack([_accuracy(time_T / second, log_K, curve_K) for second, curve_K in rows])


def _accuracy(k_T: Floats, log_K: Floats, accuracy_K: Floats) -> Floats:
    whole_T = np.interp(np.log(np.maximum(k_T, 1)), log_K, accuracy_K)
    return whole_T * np.minimum(k_T, 1)


TIMES = 200
"""Times that two curves are compared at, evenly spaced on a logarithmic scale."""


def compare(models: Sequence[Measured], reference: str, counts_RP: Floats) -> Comparisons:
    """All comparisons, by the rules that every model has."""
    # the data's own problems stand in front of the resamples
    counts_RP = np.vstack([np.ones(counts_RP.shape[1]), counts_RP])
    rules = [rule for rule in models[0].chance_PK if all(rule in m.chance_PK for m in models)]
    found = [_against(models, reference, rule, counts_RP) for rule in rules]
    return Comparisons(
        reference,
        tuple(each for rule in rules for each in _candidates(models, rule, counts_RP)),
        tuple(each for ups, _, _ in found for each in ups),
        tuple(each for _, crossings, _ in found for each in crossings),
        tuple(each for _, _, differences in found for each in differences),
    )


def _against(
    models: Sequence[Measured], reference: str, rule: str, counts_RP: Floats
) -> tuple[list[SpeedUp], list[Crossover], list[Difference]]:
    """Every other model against the reference by one rule."""
    (first,) = (model for model in models if model.name == reference)
    others = [model for model in models if model is not first]
    curve = _curve(first, rule, counts_RP)
    curves = [_curve(other, rule, counts_RP) for other in others]
    return (
        [up for other in curves for up in _speed_ups(rule, other, curve)],
        [_crossover(rule, other, curve) for other in curves],
        [each for other in others for each in _differences(rule, other, first, counts_RP)],
    )


def _curve(model: Measured, rule: str, counts_RP: Floats) -> _Curve:
    problems = counts_RP.shape[1]
    accuracy_RK = counts_RP @ model.chance_PK[rule] / problems
    second_R = counts_RP @ model.seconds_P[model.slots] / problems
    return _Curve(model.name, model.k_K, accuracy_RK, second_R)


# Speed-up at equal accuracy


def _speed_ups(rule: str, model: _Curve, reference: _Curve) -> Iterator[SpeedUp]:
    """At what the reference reaches with 1, 8 and 32 completions, as far as it has them, and with
    all."""
    last = reference.k_K[-1]
    for k in sorted({1.0, last} | {k for k in (8.0, 32.0) if k in reference.k_K}):
        yield _speed_up(rule, model, reference, int(np.flatnonzero(reference.k_K == k)[0]))


def _speed_up(rule: str, model: _Curve, reference: _Curve, at: int) -> SpeedUp:
    target_R = reference.accuracy_RK[:, at]
    # a vote may have been as accurate with fewer
    needed_R = completions_to_reach(reference.k_K, reference.accuracy_RK, target_R)
    k_R = completions_to_reach(model.k_K, model.accuracy_RK, target_R)
    times_R = needed_R * reference.second_R / (k_R * model.second_R)
    reached = not isnan(k_R[0])
    return SpeedUp(
        rule,
        model.name,
        int(reference.k_K[at]),
        float(target_R[0]),
        float(k_R[0]) if reached else None,
        _estimate(times_R) if reached else None,
        _share(~np.isnan(k_R)),
    )


def _estimate(value_R: Floats) -> Estimate:
    """The data's own value, and the interval over the resamples that have one."""
    drawn_R = value_R[1:][~np.isnan(value_R[1:])]
    # a value that no resample repeats has no interval but itself
    low, high = np.quantile(drawn_R, [0.025, 0.975]) if len(drawn_R) else (value_R[0], value_R[0])
    return Estimate(float(value_R[0]), float(low), float(high))


def _share(found_R: Floats) -> float:
    return float(found_R[1:].mean())


# Crossover


def _crossover(rule: str, model: _Curve, reference: _Curve) -> Crossover:
    first = min(curve.second_R[0] * curve.k_K[0] for curve in (model, reference))
    last = min(curve.second_R[0] * curve.k_K[-1] for curve in (model, reference))
    time_T = np.geomspace(first, last, TIMES)
    lead_RT = model.at(time_T) - reference.at(time_T)
    at_R = _ahead_from(time_T, lead_RT)
    seconds = None if isnan(at_R[0]) else _estimate(at_R)
    return Crossover(rule, model.name, float(first), float(last), seconds, _share(~np.isnan(at_R)))


def _ahead_from(time_T: Floats, lead_RT: Floats) -> Floats:
    """From which time on each lead stays above zero, (R,): NaN where it is not at the end, and
    between two times by a line.
    """
    behind_RT = lead_RT <= 0
    # one after the last time without a lead
    from_R = np.where(behind_RT.any(1), lead_RT.shape[1] - behind_RT[:, ::-1].argmax(1), 0)
    inside_R = np.clip(from_R, 1, lead_RT.shape[1] - 1)
    row_R = np.arange(len(lead_RT))
    low_R, high_R = lead_RT[row_R, inside_R - 1], lead_RT[row_R, inside_R]
    with np.errstate(invalid="ignore", divide="ignore"):
        share_R = np.clip(np.nan_to_num(-low_R / (high_R - low_R)), 0, 1)
    crossed_R = time_T[inside_R - 1] * (time_T[inside_R] / time_T[inside_R - 1]) ** share_R
    found_R = np.where(from_R == 0, time_T[0], crossed_R)
    return np.where(from_R == lead_RT.shape[1], np.nan, found_R)


# Differences, and the front


def _differences(
    rule: str, model: Measured, reference: Measured, counts_RP: Floats
) -> Iterator[Difference]:
    """With 1, 8 and 32 completions as far as both have them, and with the most that both have."""
    shared = sorted(set(model.k_K.tolist()) & set(reference.k_K.tolist()))
    for k in [each for each in shared if each in (1, 8, 32) or each == shared[-1]]:
        mine_P, other_P = (
            each.chance_PK[rule][:, each.k_K.tolist().index(k)] for each in (model, reference)
        )
        (by,) = bootstrap((mine_P - other_P)[:, None], counts_RP[1:])
        yield Difference(rule, model.name, int(k), by)


def _candidates(models: Sequence[Measured], rule: str, counts_RP: Floats) -> list[Candidate]:
    """Every model with every number of completions and of slots, by one rule."""
    problems = counts_RP.shape[1]
    found, seconds, accuracy = [], [], []
    for model in models:
        estimates = intervals(model.chance_PK[rule], counts_RP[1:])
        accuracy_RK = counts_RP @ model.chance_PK[rule] / problems
        for slots, seconds_P in model.seconds_P.items():
            second_R = counts_RP @ seconds_P / problems
            for at, (k, estimate) in enumerate(zip(model.k_K.tolist(), estimates, strict=True)):
                seconds.append(k * second_R)
                accuracy.append(accuracy_RK[:, at])
                time = float(seconds[-1][0])
                found.append(Candidate(rule, model.name, int(k), slots, time, estimate, False, 0.0))
    front_RC = pareto_front(np.stack(seconds, axis=1), np.stack(accuracy, axis=1))
    kept_C = front_RC[1:].mean(axis=0)
    marks = zip(found, front_RC[0].tolist(), kept_C.tolist(), strict=True)
    return [replace(each, on_front=on, kept=kept) for each, on, kept in marks]
