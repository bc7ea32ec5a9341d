"""The page's tables of how one answer is chosen, what scores are worth, and of stopping early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from retort.report.choices import Choice, Stopping
from retort.report.curves import ModelCurve
from retort.report.frame import cell, row, table
from retort.report.metrics import Estimate
from retort.report.wording import THIN, interval, percent, seconds

RULES = {
    "beta": "the leader stays ahead, 95 %",
    "unanimous": "a window gives one answer",
}


def choosing(models: Sequence[ModelCurve], ks: Sequence[int]) -> str:
    """Accuracy of every way of choosing, beside coverage, at a few k."""
    numbers = "".join(f"<th>k = {k}</th>" for k in ks)
    rows = (row(model.name, cells) for model in models for cells in _ways(model, ks))
    return table(f"<tr><th>Model</th><th>Choice</th>{numbers}</tr>", rows)


def _ways(model: ModelCurve, ks: Sequence[int]) -> Iterator[list[str]]:
    points = {point.k: point for point in model.points}
    yield _way("majority vote", ks, [points[k].majority for k in ks])
    for choice in model.choices:
        yield _way(_name(choice, ks), ks, _at(choice, ks))
    yield _way("an oracle (coverage)", ks, [points[k].coverage for k in ks])


def _way(name: str, ks: Sequence[int], values: Sequence[Estimate]) -> list[str]:
    shares = zip(ks, map(interval, values), strict=True)
    return [cell("Choice", name), *(cell(f"k = {k}", share) for k, share in shares)]


def _at(choice: Choice, ks: Sequence[int]) -> list[Estimate]:
    points = {point.k: point.accuracy for point in choice.points}
    return [points[k] for k in ks]


def _name(choice: Choice, ks: Sequence[int]) -> str:
    """The choice, and its Monte Carlo error where that would show."""
    error = max(point.error for point in choice.points if point.k in ks)
    return choice.name if error < 0.0005 else f"{choice.name} (±{100 * error:.1f})"


def stopping(models: Sequence[ModelCurve]) -> str:
    """What stopping early spares, by rule and window."""
    headings = ("Model", *_stopping_values(models[0].stopping[0]))
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    rows = (
        row(model.name, [cell(*each) for each in _stopping_values(stop).items()])
        for model in models
        for stop in model.stopping
    )
    return table(f"<tr>{head}</tr>", rows)


def _stopping_values(stop: Stopping) -> dict[str, str]:
    return {
        "Stops when": RULES[stop.rule],
        "Window": str(stop.window),
        "Samples": f"{stop.samples:.1f}",
        "Time": seconds(stop.seconds),
        "Accuracy": interval(stop.accuracy),
        "By confidence": f"{percent(stop.weighted.value)}{THIN}%",
        "As accurate": "no fixed k" if stop.equal_k is None else f"k = {stop.equal_k:.3g}",
        "Spared": "–" if stop.saved is None else f"{100 * stop.saved:.0f}{THIN}%",
    }


def judged(models: Sequence[ModelCurve]) -> str:
    """How far each scorer's scores can be believed, by model."""
    head = "".join(
        f"<th>{name}</th>"
        for name in ("Model", "Scorer", "Completions", "Calibration error", "Ranking")
    )
    rows = (
        row(
            model.name,
            [
                cell("Scorer", each.scorer),
                cell("Completions", f"{each.completions:,}"),
                cell("Calibration error", f"{each.error:.3f}"),
                cell("Ranking", "–" if each.ranking is None else f"{each.ranking:.3f}"),
            ],
        )
        for model in models
        for each in model.judged
    )
    return table(f"<tr>{head}</tr>", rows)
