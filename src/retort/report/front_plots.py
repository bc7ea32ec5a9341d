"""The Pareto front: which model with how many completions in how many slots nothing else beats."""

from __future__ import annotations

from typing import Any

import altair as alt

from retort.report import plots
from retort.report.comparisons import Candidate
from retort.report.curves import Curves
from retort.report.plots import Records, model_color, model_shape
from retort.report.rules import BASIC, Rule
from retort.report.wording import THIN, percent, seconds

FRONT_COLOR = "#8a8f96"  # of the line, which is nobody's


def figure(curves: Curves) -> dict[str, Any]:
    """The fronts of coverage and majority, two beside each other, with a title: for publishing."""
    panels = [
        panel(curves, rule).properties(width=380, height=330, title=rule.title)
        for rule in offered(curves)
    ]
    subtitle = "small: every model, k and number of slots; on the line: what no other beats"
    title = alt.TitleParams("Pareto front of time and accuracy", subtitle=subtitle)
    chart = alt.concat(*panels, columns=2, spacing=36).properties(title=title)
    return plots.published(chart, (model.name for model in curves.models))


def offered(curves: Curves) -> list[Rule]:
    """The rules whose fronts are drawn; the tables have those of the others."""
    named = {candidate.rule for candidate in curves.comparisons.candidates}
    return [rule for rule in BASIC if rule.name in named]


def panel(curves: Curves, rule: Rule) -> alt.LayerChart:
    """All candidates small; those on the front large and joined by steps."""
    names = [model.name for model in curves.models]
    found = [each for each in curves.comparisons.candidates if each.rule == rule.name]
    every = _chart([each for each in found if not each.on_front])
    front = _chart([each for each in found if each.on_front])
    x, y = _x(found), alt.Y("value:Q").scale(zero=False).axis(format="~%", tickCount=6)
    encoded = {
        "x": x,
        "y": y.title("share of problems"),
        "color": model_color(names),
        "shape": model_shape(names),
        "tooltip": _tooltip(rule.title),
    }
    small = every.mark_point(filled=True, size=28, opacity=0.45).encode(**encoded)
    large = front.mark_point(filled=True, opacity=1, size=110).encode(**encoded)
    steps = front.mark_line(interpolate="step-after", color=FRONT_COLOR, strokeWidth=1.5)
    chart: alt.LayerChart = alt.LayerChart(layer=[steps.encode(x=x, y=encoded["y"]), small, large])
    return chart.properties(description=f"Pareto front of decode time and {rule.title.lower()}")


def front(curves: Curves, rule: Rule) -> list[Candidate]:
    """The candidates on the front of a rule, fastest first."""
    found = [
        each for each in curves.comparisons.candidates if each.rule == rule.name and each.on_front
    ]
    return sorted(found, key=lambda each: each.seconds)


def _chart(candidates: list[Candidate]) -> alt.Chart:
    return alt.Chart(alt.Data(values=_records(candidates)))


def _records(candidates: list[Candidate]) -> Records:
    return [
        {
            "model": each.name,
            "k": each.k,
            "slots": each.slots,
            "seconds": each.seconds,
            "takes": seconds(each.seconds),
            "value": each.accuracy.value,
            "interval": f"{100 * each.accuracy.low:.1f} to {100 * each.accuracy.high:.1f}{THIN}%",
            "kept": f"{percent(each.kept)}{THIN}%",
        }
        for each in candidates
    ]


def _x(candidates: list[Candidate]) -> alt.X:
    shown = plots.ticks([each.seconds for each in candidates])
    scale = alt.Scale(type="log", nice=False, padding=12)
    axis = alt.Axis(values=shown, format=".3~r", labelOverlap=True)
    return (
        alt.X("seconds:Q").scale(scale).axis(axis).title("decode seconds per problem (log scale)")
    )


def _tooltip(title: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("model:N", title="model"),
        alt.Tooltip("k:Q", title="completions k"),
        alt.Tooltip("slots:Q", title="slots"),
        alt.Tooltip("takes:N", title="decode time per problem"),
        alt.Tooltip("value:Q", title=title.lower(), format=".1%"),
        alt.Tooltip("interval:N", title=f"95{THIN}% interval"),
        alt.Tooltip("kept:N", title="on the front in"),
    ]
