"""A result's charts in Altair, in the report's style."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import altair as alt
import vl_convert

from retort.bench.view import Chart, View
from retort.report import plots
from retort.report.frame import vega_lite_version
from retort.report.run import PIXELS_PER_POINT


def panel(chart: Chart) -> alt.LayerChart:
    """Medians as lines and points; bars reach over the repeats. A click in the legend picks."""
    names = list(dict.fromkeys(point.contender for point in chart.points))
    styles = list(dict.fromkeys(point.style for point in chart.points))
    picked = alt.selection_point(fields=["contender"], bind="legend", name=f"pick_{chart.id}")
    base = alt.Chart(alt.Data(values=[asdict(point) for point in chart.points])).encode(
        _x(chart),
        color=alt.Color("contender:N").scale(domain=names).title(None),
        opacity=alt.when(picked).then(alt.value(1)).otherwise(alt.value(0.1)),
    )
    dash = alt.StrokeDash("style:N").scale(domain=styles).title(None)
    if len(styles) < 2:
        dash = dash.legend(None)
    lines = base.mark_line(strokeWidth=2.5).encode(_y(chart, "y"), strokeDash=dash)
    bars = base.mark_rule(strokeWidth=1.5).encode(_y(chart, "low"), y2="high:Q")
    shape = alt.Shape("contender:N").scale(domain=names).title(None)
    points = base.mark_point(filled=True, size=60).encode(
        _y(chart, "y"), shape=shape, tooltip=_tooltip(chart)
    )
    layers: alt.LayerChart = alt.LayerChart(layer=[bars, lines, points.add_params(picked)])
    return layers.properties(description=f"{chart.title}, against {chart.x}")


def figure(view: View) -> dict[str, Any]:
    """All charts side by side, as Vega-Lite: for publishing."""
    panels = [
        panel(each).properties(width=380, height=300, title=each.title) for each in view.charts
    ]
    names = {point.contender for chart in view.charts for point in chart.points}
    config = plots.style(
        dark=False,
        background="#ffffff",
        legend_columns=max(1, 800 // plots.name_width(names)),
    )
    config["title"] |= {"fontSize": 15, "frame": "group"}
    chart = alt.concat(*panels, columns=2, spacing=36).properties(title=view.title)
    return chart.configure(**config).to_dict()


def pictures(view: View) -> Iterator[tuple[str, bytes]]:
    """The figure as SVG and as PNG, each with the ending of its file."""
    spec, version = figure(view), vega_lite_version()
    yield ".svg", vl_convert.vegalite_to_svg(spec, version).encode()
    yield ".png", vl_convert.vegalite_to_png(spec, version, scale=PIXELS_PER_POINT)


def _x(chart: Chart) -> alt.X:
    values = sorted({point.x for point in chart.points})
    scale = alt.Scale(type="log", base=2, nice=False, padding=12)
    return alt.X("x:Q").scale(scale).axis(values=values, format="d").title(chart.x)


def _y(chart: Chart, field: str) -> alt.Y:
    scale = alt.Scale(type="log", nice=False, padding=12) if chart.log else alt.Scale(zero=True)
    return alt.Y(f"{field}:Q").scale(scale).axis(format=chart.format).title(chart.y)


def _tooltip(chart: Chart) -> Sequence[alt.Tooltip]:
    return [
        alt.Tooltip("contender:N"),
        alt.Tooltip("style:N", title="rows"),
        alt.Tooltip("x:Q", title=chart.x),
        alt.Tooltip("y:Q", title=chart.y, format=".4~s"),
    ]
