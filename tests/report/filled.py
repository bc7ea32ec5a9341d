"""Curves with every field filled in: what runs that were timed and priced would give."""

from collections.abc import Sequence
from dataclasses import replace

from retort.report.comparisons import Candidate, Comparisons, Crossover, Difference, SpeedUp
from retort.report.curves import Cost, Curves, ModelCurve, Point
from retort.report.metrics import Estimate
from retort.report.rules import accuracies, rules


def filled(curves: Curves, scorers: Sequence[str] = ()) -> Curves:
    """With costs, scoring times by these scorers, prices, and comparisons with the first model."""
    models = tuple(_model(model, scorers) for model in curves.models)
    return replace(curves, models=models, comparisons=_comparisons(replace(curves, models=models)))


def _model(model: ModelCurve, scorers: Sequence[str]) -> ModelCurve:
    return replace(
        model,
        points=tuple(replace(point, cost=_cost(model, point)) for point in model.points),
        prefill_seconds=2 * model.points[0].seconds,
        scoring_seconds=dict.fromkeys(scorers, 0.3 * model.points[0].seconds),
        price=0.4,
        replay_ratio=1.04,
    )


def _cost(model: ModelCurve, point: Point) -> Cost:
    tokens = point.k * model.mean_tokens
    return Cost(
        tokens=tokens,
        replayed=1.2 * point.seconds,
        alone=3 * point.seconds,
        flops=tokens * 2 * model.parameters,
        bytes=tokens * model.parameters / 8,
    )


def _comparisons(curves: Curves) -> Comparisons:
    reference, *others = curves.models
    names = [rule.name for rule in rules(curves.models)][:2]
    first, last = reference.points[0].seconds, reference.points[-1].seconds
    crossed = Estimate((first * last) ** 0.5, 1.3 * first, last / 1.5)
    crossovers = [
        Crossover(
            rule, each.name, first, last, crossed if i == 0 else None, 0.97 if i == 0 else 0.2
        )
        for rule in names
        for i, each in enumerate(others)
    ]
    return Comparisons(
        reference=reference.name,
        candidates=tuple(each for rule in names for each in _candidates(curves, rule)),
        speed_ups=tuple(each for rule in names for each in _speed_ups(curves, rule)),
        crossovers=tuple(crossovers),
        differences=tuple(
            Difference(rule, each.name, point.k, Estimate(-0.04, -0.11, 0.03))
            for rule in names
            for each in others
            for point in each.points
        ),
    )


def _candidates(curves: Curves, rule: str) -> list[Candidate]:
    """Every model, k and 8 or 64 slots; the front is worked out here, for it must look like one."""
    every = [
        (model.name, point.k, slots, point.seconds * (64 / slots) ** 0.4, accuracy)
        for model in curves.models
        for point, accuracy in zip(model.points, accuracies(model, rule), strict=True)
        for slots in (8, 64)
    ]
    best, front = -1.0, set()
    for each in sorted(every, key=lambda each: (each[3], -each[4].value)):
        if each[4].value > best:
            best = each[4].value
            front.add(each[:3])
    return [
        Candidate(rule, *each, on_front=each[:3] in front, kept=0.8 if each[:3] in front else 0.1)
        for each in every
    ]


def _speed_ups(curves: Curves, rule: str) -> list[SpeedUp]:
    reference, *others = curves.models
    at = zip(reference.points, accuracies(reference, rule), strict=True)
    return [
        SpeedUp(
            rule, each.name, point.k, accuracy.value, 1.5 * point.k, Estimate(1.4, 1.1, 1.9), 0.96
        )
        if i == 0
        else SpeedUp(rule, each.name, point.k, accuracy.value, None, None, 0.12)
        for point, accuracy in at
        for i, each in enumerate(others)
    ]
