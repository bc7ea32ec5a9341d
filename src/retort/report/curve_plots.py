"""Accuracy of each model against what it costs: one description gives the pictures, filled in here,
and the page's live figure, filled in there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import altair as alt

from retort.report import plots
from retort.report.comparisons import Crossover
from retort.report.curves import Curves, Point
from retort.report.plots import Records, model_color, model_shape
from retort.report.rules import Rule, accuracies
from retort.report.wording import THIN, ahead_from, seconds

Axis = Literal["seconds", "k"]

AXES: dict[Axis, str] = {
    "seconds": "decode seconds per problem (log scale)",
    "k": "completions per problem, k (log scale)",
}
LABEL_NAME = 18  # letters
LABEL_STEP = 17  # pixels between the labels of crossovers, which stand above the plot


def figure(curves: Curves, rule: Rule) -> dict[str, Any]:
    """One rule against seconds and against k, side by side with a title, for publishing."""
    names = [model.name for model in curves.models]
    panels = [
        panel(names, f"by-{axis}", rule.title)
        .encode(_x(curves, axis))
        .properties(width=380, height=330)
        for axis in AXES
    ]
    title = alt.TitleParams(f"{rule.title}: {rule.meaning}", subtitle=_subtitle(curves))
    spec = plots.published(alt.hconcat(*panels, spacing=36).properties(title=title), names)
    data: dict[str, Records] = {"by-k-crossings": [], "by-k-stops": [], "by-seconds-stops": []}
    data |= {f"by-{axis}-points": records(curves, rule, axis) for axis in AXES}
    return spec | {"datasets": data | {"by-seconds-crossings": crossings(curves, rule)}}


def panel(
    names: Sequence[str],
    source: str,
    title: str,
    legend: bool = True,
    more: Sequence[alt.Chart] = (),
) -> alt.LayerChart:
    """Lines, points and 95 % bands of the models, hollow points where voting stopped early, and
    rules where one model overtakes another; the x encoding is still to be given.

    source: begins the names of its data sets: SOURCE-points, SOURCE-stops and SOURCE-crossings.
    more: layers over the points.
    """
    color, shape = model_color(names, legend), model_shape(names, legend)
    base = alt.Chart(alt.NamedData(f"{source}-points")).encode(color=color)
    band = base.mark_area(fillOpacity=min(0.13, 0.4 / len(names))).encode(_y("low"), y2="high:Q")
    line = base.mark_line(strokeWidth=2.5).encode(_y("value"))
    points = base.mark_point(filled=True, opacity=1, size=70).encode(_y("value"), shape=shape)
    points = points.encode(tooltip=_tooltip(title))
    rules, stops = _rules(source, color), _stops(source, color, shape, title)
    chart: alt.LayerChart = alt.LayerChart(layer=[band, line, points, *more, *rules, stops])
    return chart.properties(description=f"{title} of {', '.join(names)}")


def live(names: Sequence[str], title: str) -> dict[str, Any]:
    """The panel for the page: without a legend, which the page has itself, and with marks that
    answer to the pointer; `hovered` is the `key` of the point whose interval is drawn out.
    """
    base = alt.Chart(alt.NamedData("live-points"))
    hovered = alt.param(name="hovered", value="")
    shown = alt.when(alt.datum.key == hovered).then(alt.value(1)).otherwise(alt.value(0))
    span = base.mark_rule(strokeWidth=2, aria=False).encode(
        _y("low"), y2="high:Q", color=model_color(names, legend=False), opacity=shown
    )
    # wider than the points, which so need not be hit exactly
    targets = base.mark_point(filled=True, size=160, aria=False).encode(
        _y("value"), opacity=alt.value(0), tooltip=_tooltip(title)
    )
    more = [span.add_params(hovered), targets]
    chart = panel(names, "live", title, legend=False, more=more)
    sized = chart.properties(width="container", height=330)
    return {key: value for key, value in sized.to_dict().items() if key != "config"}


def records(curves: Curves, rule: Rule, axis: Axis) -> Records:
    """The points of the models that have a rule."""
    return [
        {
            "model": model.name,
            "k": point.k,
            "x": _value(point, axis),
            "value": accuracy.value,
            "low": accuracy.low,
            "high": accuracy.high,
            "interval": f"{100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}{THIN}%",
            "takes": seconds(point.seconds),
        }
        for model in curves.models
        for point, accuracy in zip(model.points, accuracies(model, rule.name), strict=False)
    ]


def crossings(curves: Curves, rule: Rule) -> Records:
    """Where models overtake the reference by a rule, with labels one above the other."""
    found = [each for each in curves.comparisons.crossovers if each.rule == rule.name]
    times = [point.seconds for model in curves.models for point in model.points]
    middle = (min(times) * max(times)) ** 0.5
    return [
        _crossing(each, crossed, row, middle)
        for row, (each, crossed) in enumerate(
            (each, each.seconds.value)
            for each in found
            if each.seconds is not None and each.seconds.value > each.first
        )
    ]


def _crossing(each: Crossover, crossed: float, row: int, middle: float) -> dict[str, Any]:
    assert each.seconds is not None
    low, high = seconds(each.seconds.low), seconds(each.seconds.high)
    return {
        "model": each.name,
        "x": crossed,
        "label": ahead_from(_short(each.name), crossed),
        "brief": f"from {seconds(crossed)}",  # where there is no room for the label
        "interval": f"{low} to {high}",
        "row": -10 - LABEL_STEP * row,
        "side": "right" if crossed > middle else "left",
    }


def _short(name: str) -> str:
    """A name in a label, which must not be wider than half of a plot."""
    return name if len(name) <= LABEL_NAME else f"{name[: LABEL_NAME - 1]}…"


def _rules(source: str, color: alt.Color) -> list[alt.Chart]:
    base = alt.Chart(alt.NamedData(f"{source}-crossings")).encode(color=color)
    tooltip = [
        alt.Tooltip("label:N", title="crossover"),
        alt.Tooltip("interval:N", title=f"95{THIN}% interval"),
    ]
    rule = base.mark_rule(strokeDash=[5, 4], strokeWidth=1.5).encode(tooltip=tooltip)
    # `side` is of the text that lies to the left of its rule, hence ends there, or begins there
    label = base.mark_text(
        baseline="middle", fontSize=13, align=alt.ExprRef("datum.side"), aria=False
    )
    place = alt.Y("row:Q").scale(None).axis(None)
    return [rule, label.encode(place, text="label:N", tooltip=tooltip)]


def _stops(source: str, color: alt.Color, shape: alt.Shape, title: str) -> alt.Chart:
    base: alt.Chart = alt.Chart(alt.NamedData(f"{source}-stops"))
    tooltip = [alt.Tooltip("stop:N", title="stops when"), *_tooltip(title)]
    return base.mark_point(filled=False, size=60, strokeWidth=1.8).encode(
        _y("value"), color=color, shape=shape, tooltip=tooltip
    )


def _value(point: Point, axis: Axis) -> float:
    return point.seconds if axis == "seconds" else point.k


def _x(curves: Curves, axis: Axis) -> alt.X:
    values = sorted({_value(point, axis) for model in curves.models for point in model.points})
    base, form = (10, ".3~r") if axis == "seconds" else (2, "d")
    shown = plots.ticks(values) if axis == "seconds" else values
    scale = alt.Scale(type="log", base=base, nice=False, padding=12)
    return alt.X("x:Q").scale(scale).axis(values=shown, format=form).title(AXES[axis])


def _y(field: str) -> alt.Y:
    return (
        alt.Y(f"{field}:Q")
        .scale(zero=False)
        .axis(format="~%", tickCount=6)
        .title("share of problems")
    )


def _tooltip(title: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("model:N", title="model"),
        alt.Tooltip("k:Q", title="completions k", format=".4~r"),
        alt.Tooltip("takes:N", title="takes"),
        alt.Tooltip("value:Q", title=title.lower(), format=".1%"),
        alt.Tooltip("interval:N", title=f"95{THIN}% interval"),
    ]


def _subtitle(curves: Curves) -> str:
    devices = sorted({model.device for model in curves.models})
    problems = f"{curves.models[0].problems} problems"
    return f"{problems}, bands are 95{THIN}% intervals, measured on {', '.join(devices)}"
