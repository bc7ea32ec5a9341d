"""What all figures share: colours, symbols, type, and how marks tell models apart."""

from collections.abc import Iterable, Sequence
from math import ceil, floor, log10
from typing import Any

import altair as alt

# After Okabe and Ito, whose colours stay apart under every common colour blindness, darkened or
# lightened to a contrast of 3:1 with the background. Shapes tell the models apart without colour.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#3a8fc7", "#8a6d00", "#444444")
DARK = ("#56b4e9", "#ff9248", "#2cc79c", "#e29ac6", "#f0e442", "#9fb4ff", "#cccccc")

SHAPES = {
    "circle": "M5 0A5 5 0 1 1-5 0A5 5 0 1 1 5 0Z",
    "square": "M-4.5-4.5H4.5V4.5H-4.5Z",
    "cross": "M-1.8-5.4H1.8V-1.8H5.4V1.8H1.8V5.4H-1.8V1.8H-5.4V-1.8H-1.8Z",
    "diamond": "M0-6.4L6.4 0L0 6.4L-6.4 0Z",
    "triangle-up": "M0-5.2L5.4 4.4H-5.4Z",
    "triangle-down": "M0 5.2L5.4-4.4H-5.4Z",
    "triangle-right": "M5.2 0L-4.4 5.4V-5.4Z",
    "triangle-left": "M-5.2 0L4.4 5.4V-5.4Z",
}
"""Symbols of the figures, and their outlines for a legend outside them."""

LONGEST_NAME = 34  # letters of a model's name that the legend shows

Records = list[dict[str, Any]]


def model_color(names: Sequence[str], legend: bool = True) -> alt.Color:
    """The colour of a model, the same whichever of them are shown."""
    color = alt.Color("model:N").scale(domain=names).title(None)
    return color if legend else color.legend(None)


def model_shape(names: Sequence[str], legend: bool = True) -> alt.Shape:
    """The symbol of a model, the same whichever of them are shown."""
    shape = alt.Shape("model:N").scale(domain=names).title(None)
    return shape if legend else shape.legend(None)


def ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 in every power of ten that `values` reach, or 1 alone where they reach many."""
    if min(values) == max(values):
        return [values[0]]  # the axis is that one value, and other ticks would pile up on it
    first, last = floor(log10(min(values))), ceil(log10(max(values)))
    steps = (1, 2, 5) if last - first <= 4 else (1,)
    return [float(f"{step}e{exponent}") for exponent in range(first, last + 1) for step in steps]


def name_width(names: Iterable[str]) -> int:
    """Pixels that the legend's longest entry takes, about: its letters, its symbol and a gap."""
    return 8 * min(max(map(len, names)), LONGEST_NAME) + 40


def published(chart: alt.TopLevelMixin, names: Iterable[str]) -> dict[str, Any]:
    """A figure as Vega-Lite in the light style on white, its legend in as many columns as fit."""
    columns = max(1, 800 // name_width(names))
    config = style(dark=False, background="#ffffff", legend_columns=columns)
    return chart.configure(**config).to_dict()


def style(dark: bool, background: str, legend_columns: int = 1) -> dict[str, Any]:
    """Vega-Lite's `config` for one colour scheme."""
    light = ("#1c1e21", "#5b6068", "#e6e7e9")
    ink, faint, grid = ("#e8e8e6", "#a9adb3", "#33373d") if dark else light
    return {
        "background": background,
        "font": "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif",
        "padding": 12,
        "range": {"category": list(DARK if dark else LIGHT), "symbol": list(SHAPES)},
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
            "symbolOpacity": 1,
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
