"""Charts of training runs against tokens, a colour for each run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from retort.report import plots
from retort.report.training import (
    KINDS,
    PARTS,
    StageCurves,
    Training,
    stage_names,
)

HEIGHT = 250
SKEWED = 20.0
"""Values of which the greatest is so many times the least are shown on a log scale."""


Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One chart: an id for its element, what it shows in words, the chart, and its data by name.

    Altair copies and checks data that is part of a chart many times over.
    """

    id: str
    title: str
    chart: alt.LayerChart
    data: dict[str, Records]

    def spec(self) -> dict[str, Any]:
        """The chart with its data, as wide as its element."""
        sized = self.chart.properties(width="container", height=HEIGHT, title=self.title)
        found = {key: value for key, value in sized.to_dict().items() if key != "config"}
        return found | {"datasets": self.data}


@dataclass(frozen=True)
class _Quantity:
    """Something that is shown: its name in words, the format of its axis where not the usual one,
    whether its axis begins at zero, and whether it may need a log scale.
    """

    title: str
    format: str | None = None
    zero: bool = False
    skews: bool = False


QUANTITIES = {
    "lr": _Quantity("learning rate", "~e", zero=True),
    "gradient_norm": _Quantity("gradient norm before clipping", skews=True),
    "tokens_per_second": _Quantity("tokens per second", "~s", zero=True),
    "mfu": _Quantity("share of the peak FLOPs reached (MFU)", "~%", zero=True),
    "memory_gib": _Quantity("peak memory, GiB", zero=True),
}
ANSWERS = {
    "coverage": _Quantity("problems with a right answer", "~%", zero=True),
    "accuracy": _Quantity("answers that are right", "~%", zero=True),
    "truncated": _Quantity("answers cut off", "~%", zero=True),
    "no_answer": _Quantity("texts with no answer found", "~%", zero=True),
}


def figure(trainings: Sequence[Training]) -> dict[str, Any]:
    """Answers, losses and gradients side by side, as Vega-Lite: for publishing."""
    panels = [*answers(trainings)[:2], *losses(trainings), *optimisation(trainings)]
    charts = [
        panel.chart.properties(width=400, height=HEIGHT, title=panel.title) for panel in panels
    ]
    columns = max(1, 800 // plots.name_width(each.name for each in trainings))
    config = plots.style(dark=False, background="#ffffff", legend_columns=columns)
    config["title"] |= {"fontSize": 15, "frame": "group"}
    chart = alt.concat(*charts, columns=2, spacing=36).configure(**config)
    return chart.to_dict() | {"datasets": {k: v for each in panels for k, v in each.data.items()}}


def answers(trainings: Sequence[Training]) -> list[Panel]:
    """What evaluations by generation found, against tokens."""
    found = {key: _evaluated(trainings, key) for key in ANSWERS}
    return [
        _panel(f"answers-{key}", ANSWERS[key], trainings, records, points=True)
        for key, records in found.items()
        if records
    ]


def losses(trainings: Sequence[Training]) -> list[Panel]:
    """The loss of each stage, and what it is made of where that is more than one thing."""
    found = []
    for i, name in enumerate(stage_names(trainings)):
        stages = _stages(trainings, name)
        parts = [key for key in PARTS if any(key in stage.curves for _, stage in stages)]
        for key in ["loss", *(parts if len(parts) > 1 else [])]:
            records = _binned(stages, key)
            if records:
                quantity = _Quantity(f"{name}: {key}", skews=True)
                marks = _marks(stages)
                found.append(_panel(f"loss-{i}-{key}", quantity, trainings, records, marks=marks))
    return found


def layers(trainings: Sequence[Training]) -> list[Panel]:
    """The loss of each layer, a chart for each stage of each run that has such."""
    stages = [each for name in stage_names(trainings) for each in _stages(trainings, name)]
    return [
        _layers(f"layers-{i}", f"{training.name}, {stage.name}", stage)
        for i, (training, stage) in enumerate(stages)
        if stage.layers
    ]


def optimisation(trainings: Sequence[Training]) -> list[Panel]:
    """Learning rate and gradient norm over the whole run."""
    return _over_stages(trainings, ("lr", "gradient_norm"))


def speed(trainings: Sequence[Training]) -> list[Panel]:
    """What the machine made of it."""
    return _over_stages(trainings, ("tokens_per_second", "mfu", "memory_gib"))


# Charts


def _over_stages(trainings: Sequence[Training], keys: Iterable[str]) -> list[Panel]:
    stages = [(each, stage) for each in trainings for stage in each.stages]
    found = {key: _binned(stages, key) for key in keys}
    return [
        _panel(f"run-{key}", QUANTITIES[key], trainings, records, starts=_starts(trainings))
        for key, records in found.items()
        if records
    ]


def _panel(
    id: str,
    quantity: _Quantity,
    trainings: Sequence[Training],
    records: Records,
    marks: Records | None = None,
    starts: Records | None = None,
    points: bool = False,
) -> Panel:
    """Means as lines and extremes as bands; marked steps at the foot, stages' starts as rules."""
    data = {f"{id}-lines": records, f"{id}-marks": marks or [], f"{id}-starts": starts or []}
    names = [each.name for each in trainings]
    color = alt.Color("run:N").scale(domain=names).title(None)
    base = alt.Chart(alt.NamedData(f"{id}-lines")).encode(_x(), color=color, detail="stage:N")
    drawn: list[alt.Chart] = _rules(f"{id}-starts") if starts else []
    if not points:
        drawn.append(
            base.mark_area(fillOpacity=0.16).encode(_y(quantity, "low", records), y2="high:Q")
        )
    line = base.mark_line(strokeWidth=2, point={"size": 40} if points else False)
    drawn.append(line.encode(_y(quantity, "value", records), tooltip=_tooltip(quantity)))
    if marks:
        drawn.append(_feet(f"{id}-marks", color))
    chart = _described(drawn, f"{quantity.title} of {', '.join(names)}, against tokens")
    return Panel(id, quantity.title, chart, data)


def _layers(id: str, of: str, stage: StageCurves) -> Panel:
    records = [
        {"layer": layer, "tokens": tokens, "value": value}
        for layer, curve in stage.layers.items()
        for tokens, value in zip(curve.tokens, curve.mean, strict=True)
    ]
    quantity = _Quantity(f"{of}: loss of each layer", skews=True)
    # The ends of the scheme would be lost on a dark page and on a light one.
    scheme = alt.SchemeParams(name="viridis", extent=[0.15, 0.9])
    color = alt.Color("layer:Q").scale(scheme=scheme).title("layer")
    tooltip = [alt.Tooltip("layer:Q"), *_tooltip(quantity)[1:]]
    base: alt.Chart = alt.Chart(alt.NamedData(f"{id}-lines"))
    line = base.mark_line(strokeWidth=1.5).encode(
        _x(), _y(quantity, "value", records), color=color, detail="layer:N", tooltip=tooltip
    )
    chart = _described([line], f"{quantity.title}, against tokens")
    return Panel(id, quantity.title, chart, {f"{id}-lines": records})


def _described(drawn: Sequence[alt.Chart], text: str) -> alt.LayerChart:
    chart: alt.LayerChart = alt.LayerChart(layer=list(drawn))
    return chart.properties(description=text)


def _feet(data: str, color: alt.Color) -> alt.Chart:
    """Steps that went wrong, at the foot of a chart; their shapes say how."""
    shape = alt.Shape("kind:N").scale(domain=list(KINDS), range=["cross", "triangle-up"])
    tooltip = [alt.Tooltip(f"{key}:N") for key in ("run", "kind", "step")]
    chart: alt.Chart = alt.Chart(alt.NamedData(data))
    return chart.mark_point(filled=True, size=60, opacity=1).encode(
        _x(), alt.YValue(HEIGHT - 6), color=color, shape=shape.legend(None), tooltip=tooltip
    )


def _rules(data: str) -> list[alt.Chart]:
    """Where stages begin, with their names."""
    base: alt.Chart = alt.Chart(alt.NamedData(data)).encode(_x())
    rule = base.mark_rule(strokeDash=[3, 3], opacity=0.5, color="#808080")
    name = base.mark_text(align="left", baseline="top", dx=4, fontSize=12, color="#808080")
    return [rule, name.encode(alt.YValue(2), text="stage:N")]


def _x() -> alt.X:
    # What is a giga elsewhere is a billion of tokens.
    label = "replace(format(datum.value, '~s'), 'G', 'B')"
    axis = alt.Axis(labelExpr=label, tickCount=6, grid=False)
    return alt.X("tokens:Q").scale(nice=False, padding=8).axis(axis).title("tokens")


def _y(quantity: _Quantity, field: str, records: Records) -> alt.Y:
    log = quantity.skews and _skewed(records)
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=quantity.zero)
    axis = alt.Axis(format=quantity.format or alt.Undefined, tickCount=6)
    return alt.Y(f"{field}:Q").scale(scale).axis(axis).title(None)


def _tooltip(quantity: _Quantity) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("run:N"),
        alt.Tooltip("tokens:Q", format=".4~s"),
        alt.Tooltip("value:Q", title=quantity.title, format=".4~g"),
    ]


# Records


def _stages(trainings: Sequence[Training], name: str) -> list[tuple[Training, StageCurves]]:
    return [(each, stage) for each in trainings for stage in each.stages if stage.name == name]


def _binned(stages: Iterable[tuple[Training, StageCurves]], key: str) -> Records:
    return [
        {"run": each.name, "stage": stage.name, "tokens": x, "value": y, "low": low, "high": high}
        for each, stage in stages
        if (curve := stage.curves.get(key))
        for x, y, low, high in zip(curve.tokens, curve.mean, curve.low, curve.high, strict=True)
    ]


def _evaluated(trainings: Sequence[Training], key: str) -> Records:
    return [
        {"run": each.name, "tokens": found.tokens, "value": found.values[key]}
        for each in trainings
        for found in each.evaluations
        if key in found.values
    ]


def _marks(stages: Iterable[tuple[Training, StageCurves]]) -> Records:
    return [
        {"run": each.name, "kind": mark.kind, "step": mark.step, "tokens": mark.tokens}
        for each, stage in stages
        for mark in stage.marks
    ]


def _starts(trainings: Sequence[Training]) -> Records:
    """The places where stages begin, each with the names of those that do."""
    names: dict[float, dict[str, None]] = {}
    for training in trainings:
        for stage in training.stages:
            names.setdefault(stage.start, {})[stage.name] = None
    return [{"tokens": tokens, "stage": ", ".join(found)} for tokens, found in names.items()]


def _skewed(records: Records) -> bool:
    """Whether values are all positive, and some so large that others would lie on the axis."""
    values = [record["value"] for record in records]
    lows = [record["low"] for record in records if "low" in record]
    return min(values + lows) > 0 and max(values) > SKEWED * min(values)
