"""The page's main figure: its controls, and the data that it is drawn from in the browser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Literal

from retort.report import curve_plots
from retort.report.choices import Stopping
from retort.report.curves import Curves, ModelCurve, Point
from retort.report.frame import charts, checkbox, select, symbol
from retort.report.rules import MAJORITY, accuracies, rules
from retort.report.wording import THIN, stopping_rule

Unit = Literal["time", "count", "money"]


@dataclass(frozen=True)
class Axis:
    """Something that completions cost: its name in the data, for the menu, and for the axis.

    Prefill and scoring can be added where its unit is time, or money, which is for time.
    """

    name: str
    title: str
    label: str
    unit: Unit


AXES = (
    Axis("seconds", "Decode time", "decode seconds per problem", "time"),
    Axis("replayed", "Decode time, replayed", "replayed decode seconds per problem", "time"),
    Axis("alone", "Decode time, a problem alone", "decode seconds of a problem alone", "time"),
    Axis("k", "Completions, k", "completions per problem, k", "count"),
    Axis("tokens", "Tokens", "tokens per problem", "count"),
    Axis("flops", "FLOPs", "decode FLOPs per problem", "count"),
    Axis("bytes", "Bytes moved", "bytes moved in decoding per problem", "count"),
    Axis("money", "Money", "money for 1,000 problems", "money"),
)

MEANING = (
    f"Bands are 95{THIN}% intervals over the problems. Pointing at a mark shows its numbers, and "
    "its interval on both sides. The address of the page keeps what is chosen."
)


def data(curves: Curves) -> dict[str, Any]:
    """What the figure is drawn from, for the page."""
    names = [model.name for model in curves.models]
    return {
        "models": [_model(model, curves) for model in curves.models],
        "rules": [asdict(rule) for rule in rules(curves.models)],
        "axes": [asdict(axis) for axis in offered(curves.models)],
        "crossings": {
            rule.name: curve_plots.crossings(curves, rule) for rule in rules(curves.models)
        },
        "reference": curves.comparisons.reference,
        "spec": curve_plots.live(names, "right"),
    }


def offered(models: Sequence[ModelCurve]) -> list[Axis]:
    """The axes that every model has values for."""
    return [axis for axis in AXES if all(_has(model, axis) for model in models)]


def content(curves: Curves) -> str:
    """The controls and the places of the two figures, as HTML."""
    return (
        f'<form id="explorer-controls" class="controls" aria-label="What the figure shows">'
        f"{_menus(curves)}{_switches(curves.models)}{_models(curves.models)}</form>"
        f"{charts(['explorer-cost', 'explorer-k'])}"
        '<p id="explorer-status" class="note" role="status" aria-live="polite"></p>'
        '<details id="explorer-table"><summary>The figure as a table</summary>'
        '<div class="scrolled" tabindex="0"></div></details>'
        f'<p class="note">{escape(MEANING)}</p>'
        '<noscript><p class="note">This figure needs JavaScript. coverage.svg and majority.svg '
        "beside this page need none, and curves.json holds every number.</p></noscript>"
    )


# Controls


def _menus(curves: Curves) -> str:
    ways = ((rule.name, rule.title) for rule in rules(curves.models))
    axes = ((axis.name, axis.title) for axis in offered(curves.models))
    return select("rule", "An answer counts by", ways) + select("axis", "Against", axes)


def _switches(models: Sequence[ModelCurve]) -> str:
    boxes = [checkbox("log", "Logarithmic", checked=True), checkbox("prefill", "Prefill")]
    if any(model.scoring_seconds for model in models):
        boxes.append(checkbox("scoring", "Scoring"))
    scale, *time = boxes
    return _group("Scale", [scale]) + _group("Time includes", time)


def _models(models: Sequence[ModelCurve]) -> str:
    boxes = (
        checkbox(f"model-{i}", model.name, checked=True, before=symbol(i))
        for i, model in enumerate(models)
    )
    return _group("Models", boxes)


def _group(legend: str, boxes: Iterable[str]) -> str:
    return f"<fieldset><legend>{escape(legend)}</legend>{''.join(boxes)}</fieldset>"


# Data


def _has(model: ModelCurve, axis: Axis) -> bool:
    if axis.name == "money":
        return model.price is not None
    return None not in _costs(model, axis.name)


def _costs(model: ModelCurve, axis: str) -> list[float | None]:
    return [_cost(point, axis) for point in model.points]


def _cost(point: Point, axis: str) -> float | None:
    """What a point costs; of money, the seconds that are to be paid."""
    match axis:
        case "seconds" | "money":
            return point.seconds
        case "k":
            return point.k
        case "tokens":
            return point.cost.tokens
        case "replayed":
            return point.cost.replayed
        case "alone":
            return point.cost.alone
        case "flops":
            return point.cost.flops
        case _:
            return point.cost.bytes


def _model(model: ModelCurve, curves: Curves) -> dict[str, Any]:
    found = {rule.name: accuracies(model, rule.name) for rule in rules(curves.models)}
    return {
        "name": model.name,
        "k": [point.k for point in model.points],
        "costs": {axis.name: _costs(model, axis.name) for axis in offered(curves.models)},
        "prefill": model.prefill_seconds,
        "scoring": model.scoring_seconds,
        "price": model.price,
        "rules": {
            rule: [[each.value, each.low, each.high] for each in estimates]
            for rule, estimates in found.items()
            if estimates
        },
        "stops": {MAJORITY: list(_stops(model))},
    }


def _stops(model: ModelCurve) -> Iterator[dict[str, Any]]:
    per_completion = model.points[0].cost.tokens / model.points[0].k
    for stop in model.stopping:
        yield {
            "k": stop.samples,
            "costs": {
                "seconds": stop.seconds,
                "money": stop.seconds,
                "k": stop.samples,
                "tokens": stop.samples * per_completion,
            },
            "accuracy": [stop.accuracy.value, stop.accuracy.low, stop.accuracy.high],
            "stop": _when(stop),
        }


def _when(stop: Stopping) -> str:
    return f"{stopping_rule(stop.rule)}; looks every {stop.window}"
