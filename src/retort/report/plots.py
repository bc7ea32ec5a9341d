"""Charts of the curves in Altair: one description gives PNG, SVG and the page's live figures."""

from collections.abc import Iterable, Iterator
from math import ceil, floor, log10
from typing import Any, Literal

import altair as alt

from retort.report.curves import Curves
from retort.report.wording import THIN, seconds

Measure = Literal["coverage", "majority"]
Axis = Literal["seconds", "k"]

MEASURES: dict[Measure, str] = {"coverage": "Coverage", "majority": "Majority vote"}
MEANING: dict[Measure, str] = {
    "coverage": "share of problems with at least one right completion",
    "majority": "share of problems on which the most frequent answer is right",
}
AXES: dict[Axis, str] = {
    "seconds": "decode seconds per problem (log scale)",
    "k": "completions per problem, k (log scale)",
}

# After Okabe and Ito, whose colours stay apart under every common colour blindness, darkened or
# lightened to a contrast of 3:1 with the background. Shapes tell the models apart without colour.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#3a8fc7", "#8a6d00", "#444444")
DARK = ("#56b4e9", "#ff9248", "#2cc79c", "#e29ac6", "#f0e442", "#9fb4ff", "#cccccc")

LONGEST_NAME = 34  # letters of a model's name that the legend shows


def figure(curves: Curves, measure: Measure) -> alt.HConcatChart:
    """One measure against seconds and against k, side by side, with a title: for publishing."""
    panels = (panel(curves, measure, axis).properties(width=380, height=330) for axis in AXES)
    title = alt.TitleParams(f"{MEASURES[measure]}: {MEANING[measure]}", subtitle=_subtitle(curves))
    columns = max(1, 800 // name_width(model.name for model in curves.models))
    config = style(dark=False, background="#ffffff", legend_columns=columns)
    return alt.hconcat(*panels, spacing=36).properties(title=title).configure(**config)


def panel(curves: Curves, measure: Measure, axis: Axis) -> alt.LayerChart:
    """One measure against one axis: line, points and 95 % band of each model.

    Clicking names in the legend picks models.
    """
    names = [model.name for model in curves.models]
    picked = alt.selection_point(fields=["model"], bind="legend", name=f"pick_{measure}_{axis}")
    faded = alt.when(picked).then(alt.value(1)).otherwise(alt.value(0.1))
    base = alt.Chart(alt.Data(values=list(_records(curves, measure)))).encode(
        _x(curves, axis),
        color=alt.Color("model:N").scale(domain=names).title(None),
        opacity=faded,
    )
    band = base.mark_area(fillOpacity=0.16).encode(_y("low"), y2="high:Q")
    line = base.mark_line(strokeWidth=2.5).encode(_y("value"))
    shape = alt.Shape("model:N").scale(domain=names).title(None)
    points = base.mark_point(filled=True, size=70).encode(
        _y("value"), shape=shape, tooltip=_tooltip(measure)
    )
    chart: alt.LayerChart = alt.LayerChart(layer=[band, line, points.add_params(picked)])
    return chart.properties(description=f"{MEASURES[measure]} of {', '.join(names)}: {AXES[axis]}")


def _records(curves: Curves, measure: Measure) -> Iterator[dict[str, Any]]:
    for model in curves.models:
        for point in model.points:
            estimate = point.coverage if measure == "coverage" else point.majority
            yield {
                "model": model.name,
                "k": point.k,
                "seconds": point.seconds,
                "value": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "interval": f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}{THIN}%",
                "time": seconds(point.seconds),
            }


def _x(curves: Curves, axis: Axis) -> alt.X:
    points = [point for model in curves.models for point in model.points]
    if axis == "seconds":
        ticks = _ticks([point.seconds for point in points])
        scale = alt.Scale(type="log", nice=False, padding=12)
        return alt.X("seconds:Q").scale(scale).axis(values=ticks, format=".3~r").title(AXES[axis])
    ks = sorted({point.k for point in points})
    scale = alt.Scale(type="log", base=2, nice=False, padding=12)
    return alt.X("k:Q").scale(scale).axis(values=ks, format="d").title(AXES[axis])


def _ticks(values: list[float]) -> list[float]:
    """1, 2 and 5 in every power of ten that `values` reach, or 1 alone where they reach many."""
    if min(values) == max(values):
        return values[:1]  # the axis is that one value, and other ticks would pile up on it
    first, last = floor(log10(min(values))), ceil(log10(max(values)))
    steps = (1, 2, 5) if last - first <= 4 else (1,)
    return [float(f"{step}e{exponent}") for exponent in range(first, last + 1) for step in steps]


def _y(field: str) -> alt.Y:
    return alt.Y(f"{field}:Q").scale(zero=False).axis(format="~%").title("share of problems")


def _tooltip(measure: Measure) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("model:N", title="model"),
        alt.Tooltip("k:Q", title="completions k"),
        alt.Tooltip("time:N", title="decode time per problem"),
        alt.Tooltip("value:Q", title=MEASURES[measure].lower(), format=".1%"),
        alt.Tooltip("interval:N", title=f"95{THIN}% interval"),
    ]


def _subtitle(curves: Curves) -> str:
    devices = sorted({model.device for model in curves.models})
    problems = f"{curves.models[0].problems} problems"
    return f"{problems}, bands are 95{THIN}% intervals, measured on {', '.join(devices)}"


def reliable(curves: Curves, scorer: str) -> alt.LayerChart:
    """The reliability diagram of a scorer: the share that was right at each score, by model, and
    the diagonal on which the two agree.
    """
    ends = alt.Chart(alt.Data(values=[{"score": 0, "right": 0}, {"score": 1, "right": 1}]))
    agreed = ends.mark_line(strokeDash=[4, 4], color="#8a8f96").encode(
        _share("x", "score"), _share("y", "right")
    )
    names = [model.name for model in curves.models]
    base = alt.Chart(alt.Data(values=list(_bins(curves, scorer)))).encode(
        _share("x", "score"),
        _share("y", "right"),
        color=alt.Color("model:N").scale(domain=names).title(None),
    )
    points = base.mark_point(filled=True).encode(
        size=alt.Size("count:Q").scale(range=[30, 300]).legend(None),
        shape=alt.Shape("model:N").scale(domain=names).title(None),
        tooltip=[
            alt.Tooltip("model:N", title="model"),
            alt.Tooltip("count:Q", title="completions", format=","),
            alt.Tooltip("score:Q", title="mean score", format=".3f"),
            alt.Tooltip("right:Q", title="right", format=".1%"),
        ],
    )
    chart: alt.LayerChart = alt.LayerChart(layer=[agreed, base.mark_line(strokeWidth=2), points])
    return chart.properties(description=f"Scores of {scorer} and how often they were right")


def reliability_figure(curves: Curves) -> alt.HConcatChart:
    """The diagrams of all scorers, side by side, with a title: for publishing."""
    panels = [
        reliable(curves, scorer).properties(width=380, height=330, title=scorer)
        for scorer in scorers(curves)
    ]
    subtitle = "on the dashed line a score is the chance of being right; symbols grow with numbers"
    title = alt.TitleParams("Scores, and how often they were right", subtitle=subtitle)
    config = style(dark=False, background="#ffffff", legend_columns=4)
    return alt.hconcat(*panels, spacing=36).properties(title=title).configure(**config)


def scorers(curves: Curves) -> list[str]:
    """The scorers that have judged any of the models."""
    return list(dict.fromkeys(each.scorer for model in curves.models for each in model.judged))


def _bins(curves: Curves, scorer: str) -> Iterator[dict[str, Any]]:
    for model in curves.models:
        for each in model.judged:
            if each.scorer == scorer:
                for found in each.bins:
                    values = {"score": found.score, "right": found.right, "count": found.count}
                    yield {"model": model.name} | values


def _share(axis: Literal["x", "y"], field: Literal["score", "right"]) -> alt.X | alt.Y:
    title = "mean score" if field == "score" else "share that was right"
    channel = alt.X if axis == "x" else alt.Y
    return channel(f"{field}:Q").scale(domain=[0, 1]).axis(format="~%").title(title)


def name_width(names: Iterable[str]) -> int:
    """Pixels that the legend's longest entry takes, about: its letters, its symbol and a gap."""
    return 8 * min(max(map(len, names)), LONGEST_NAME) + 40


def style(dark: bool, background: str, legend_columns: int = 1) -> dict[str, Any]:
    """Vega-Lite's `config` for one colour scheme."""
    light = ("#1c1e21", "#5b6068", "#e6e7e9")
    ink, faint, grid = ("#e8e8e6", "#a9adb3", "#33373d") if dark else light
    return {
        "background": background,
        "font": "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif",
        "padding": 12,
        "range": {"category": list(DARK if dark else LIGHT)},
        "view": {"stroke": None},
        "axis": {
            "labelFontSize": 13,
            "titleFontSize": 13,
            "titleFontWeight": "normal",
            "titlePadding": 10,
            "labelColor": faint,
            "titleColor": faint,
            "domainColor": faint,
            "tickColor": faint,
            "gridColor": grid,
        },
        "legend": {
            "orient": "top",
            "columns": legend_columns,
            "labelFontSize": 14,
            "labelColor": ink,
            "titleColor": ink,
            "labelLimit": 8 * LONGEST_NAME,
            "symbolSize": 120,
        },
        "title": {
            "anchor": "start",
            "fontSize": 18,
            "subtitleFontSize": 13,
            "color": ink,
            "subtitleColor": faint,
            "subtitlePadding": 6,
            "offset": 16,
        },
    }
