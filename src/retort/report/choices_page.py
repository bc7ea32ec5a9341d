"""The page's tables of how one answer is chosen, what scores are worth, and of stopping early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from retort.report.choices import Choice, Stopping
from retort.report.curves import ModelCurve
from retort.report.frame import cell, head, row, table, words
from retort.report.metrics import Estimate
from retort.report.wording import THIN, interval, percent, seconds, stopping_rule, whole_percent


def choosing(models: Sequence[ModelCurve], ks: Sequence[int]) -> str:
    """Accuracy of every way of choosing, beside coverage, at a few k."""
    rows = (row(model.name, cells) for model in models for cells in _ways(model, ks))
    return table(head("Model", "Choice", *(f"k = {k}" for k in ks), worded=2), rows)


def _ways(model: ModelCurve, ks: Sequence[int]) -> Iterator[list[str]]:
    points = {point.k: point for point in model.points}
    yield _way("majority vote", ks, [points[k].majority for k in ks])
    for choice in model.choices:
        yield _way(_name(choice, ks), ks, _at(choice, ks))
    yield _way("an oracle (coverage)", ks, [points[k].coverage for k in ks])


def _way(name: str, ks: Sequence[int], values: Sequence[Estimate]) -> list[str]:
    shares = zip(ks, map(interval, values), strict=True)
    return [words("Choice", name), *(cell(f"k = {k}", share) for k, share in shares)]


def _at(choice: Choice, ks: Sequence[int]) -> list[Estimate]:
    points = {point.k: point.accuracy for point in choice.points}
    return [points[k] for k in ks]


def _name(choice: Choice, ks: Sequence[int]) -> str:
    """The choice, and its Monte Carlo error where that would show."""
    error = max(point.error for point in choice.points if point.k in ks)
    return choice.name if error < 0.0005 else f"{choice.name} (±{100 * error:.1f})"


def stopping(models: Sequence[ModelCurve]) -> str:
    """What stopping early spares, by rule and window."""
    titles = ("Model", "Stops when", *_stopping_values(models[0].stopping[0]))
    rows = (
        row(model.name, [words("Stops when", stopping_rule(stop.rule)), *_stopping_cells(stop)])
        for model in models
        for stop in model.stopping
    )
    return table(head(*titles, worded=2), rows)


def _stopping_cells(stop: Stopping) -> list[str]:
    return [cell(*each) for each in _stopping_values(stop).items()]


def _stopping_values(stop: Stopping) -> dict[str, str]:
    return {
        "Window": str(stop.window),
        "Samples": f"{stop.samples:.1f}",
        "Time": seconds(stop.seconds),
        "Accuracy": interval(stop.accuracy),
        "By confidence": f"{percent(stop.weighted.value)}{THIN}%",
        "As accurate": "no fixed k" if stop.equal_k is None else f"k = {stop.equal_k:.3g}",
        "Spared": "–" if stop.saved is None else whole_percent(stop.saved),
    }


def judged(models: Sequence[ModelCurve]) -> str:
    """How far each scorer's scores can be believed, by model."""
    titles = ("Model", "Scorer", "Completions", "Calibration error", "Ranking")
    rows = (
        row(
            model.name,
            [
                words("Scorer", each.scorer),
                cell("Completions", f"{each.completions:,}"),
                cell("Calibration error", f"{each.error:.3f}"),
                cell("Ranking", "–" if each.ranking is None else f"{each.ranking:.3f}"),
            ],
        )
        for model in models
        for each in model.judged
    )
    return table(head(*titles, worded=2), rows)
