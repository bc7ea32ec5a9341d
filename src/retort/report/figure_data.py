"""What the figures show, as CSV: a table beside every picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from retort.report.curves import Curves
from retort.report.rules import Rule, accuracies

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""With these a spreadsheet begins a formula, were it somebody's name for a model."""


def curve(curves: Curves, rule: Rule) -> str:
    """Accuracy by a rule against seconds and against k."""
    return table(
        ("model", "k", "seconds_per_problem", "accuracy", "low", "high"),
        (
            (model.name, point.k, point.seconds, each.value, each.low, each.high)
            for model in curves.models
            for point, each in zip(model.points, accuracies(model, rule.name), strict=False)
        ),
    )


def reliability(curves: Curves) -> str:
    """The bins of the reliability diagrams."""
    return table(
        ("scorer", "model", "from_score", "to_score", "completions", "mean_score", "share_right"),
        (
            (each.scorer, model.name, bin.low, bin.high, bin.count, bin.score, bin.right)
            for model in curves.models
            for each in model.judged
            for bin in each.bins
        ),
    )


def pareto(curves: Curves) -> str:
    """The candidates of the Pareto fronts, those on them and the others."""
    return table(
        ("rule", "model", "k", "slots", "seconds_per_problem", "accuracy", "low", "high",
         "on_front", "kept"),
        (
            (each.rule, each.name, each.k, each.slots, each.seconds, each.accuracy.value,
             each.accuracy.low, each.accuracy.high, each.on_front, each.kept)
            for each in curves.comparisons.candidates
        ),
    )  # fmt: skip


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV as spreadsheets read it; text that they would run as a formula has a ' in front."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_plain(value) for value in row] for row in rows)
    return out.getvalue()


def _plain(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
