"""Reliability diagrams: how often a scorer's scores came true."""

from __future__ import annotations

from typing import Any, Literal

import altair as alt

from retort.report import plots
from retort.report.curves import Curves
from retort.report.plots import Records, model_color, model_shape


def figure(curves: Curves) -> dict[str, Any]:
    """The diagrams of all scorers, side by side, with a title: for publishing."""
    panels = [
        panel(curves, scorer).properties(width=380, height=330, title=scorer)
        for scorer in scorers(curves)
    ]
    subtitle = "on the dashed line a score is the chance of being right; symbols grow with numbers"
    title = alt.TitleParams("Scores, and how often they were right", subtitle=subtitle)
    chart = alt.hconcat(*panels, spacing=36).properties(title=title)
    return plots.published(chart, (model.name for model in curves.models))


def panel(curves: Curves, scorer: str) -> alt.LayerChart:
    """The reliability diagram of a scorer: the share that was right at each score, by model, and
    the diagonal on which the two agree.
    """
    ends = alt.Chart(alt.Data(values=[{"score": 0, "right": 0}, {"score": 1, "right": 1}]))
    agreed = ends.mark_line(strokeDash=[4, 4], color="#8a8f96").encode(
        _share("x", "score"), _share("y", "right")
    )
    names = [model.name for model in curves.models]
    base = alt.Chart(alt.Data(values=bins(curves, scorer))).encode(
        _share("x", "score"), _share("y", "right"), color=model_color(names)
    )
    points = base.mark_point(filled=True).encode(
        size=alt.Size("count:Q").scale(range=[30, 300]).legend(None),
        shape=model_shape(names),
        tooltip=[
            alt.Tooltip("model:N", title="model"),
            alt.Tooltip("count:Q", title="completions", format=","),
            alt.Tooltip("score:Q", title="mean score", format=".3f"),
            alt.Tooltip("right:Q", title="right", format=".1%"),
        ],
    )
    chart: alt.LayerChart = alt.LayerChart(layer=[agreed, base.mark_line(strokeWidth=2), points])
    return chart.properties(description=f"Scores of {scorer} and how often they were right")


def scorers(curves: Curves) -> list[str]:
    """The scorers that have judged any of the models."""
    return list(dict.fromkeys(each.scorer for model in curves.models for each in model.judged))


def bins(curves: Curves, scorer: str) -> Records:
    """What a diagram shows."""
    return [
        {"model": model.name, "score": found.score, "right": found.right, "count": found.count}
        for model in curves.models
        for each in model.judged
        if each.scorer == scorer
        for found in each.bins
    ]


def _share(axis: Literal["x", "y"], field: Literal["score", "right"]) -> alt.X | alt.Y:
    title = "mean score" if field == "score" else "share that was right"
    channel = alt.X if axis == "x" else alt.Y
    return channel(f"{field}:Q").scale(domain=[0, 1]).axis(format="~%").title(title)
