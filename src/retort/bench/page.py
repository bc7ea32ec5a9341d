"""One self-contained HTML page of a result; names of models are escaped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from html import escape

from retort.bench.head import Head
from retort.bench.plots import panel
from retort.bench.view import Grid, View
from retort.report import plots
from retort.report.frame import cell, charts, foldable, page, row, section, spec, table


def render(view: View, head: Head) -> str:
    """The page as HTML text."""
    specs = {chart.id: spec(panel(chart).properties(title=chart.title)) for chart in view.charts}
    names = [point.contender for chart in view.charts for point in chart.points]
    return page(f"Retort: {view.title}", _body(view, head), specs, plots.name_width(names or [""]))


def _body(view: View, head: Head) -> Iterator[str]:
    yield f'<header><p class="eyebrow">Retort bench</p><h1>{escape(view.title)}</h1></header>'
    if view.charts:
        yield section("Charts", charts(chart.id for chart in view.charts))
    for grid in view.grids:
        yield section(grid.title, _table(grid))
    if view.notes:
        yield section("Notes", "".join(f"<p>{escape(note)}</p>" for note in view.notes))
    yield section("How it was measured", _facts(head))
    yield f"<footer>{escape(head.made)}</footer>"


def _table(grid: Grid) -> str:
    headings = "".join(f"<th>{escape(column.heading)}</th>" for column in grid.columns)
    rows = zip(*(column.cells for column in grid.columns), strict=True)
    shown = table(f"<tr>{headings}</tr>", (_row(grid, cells) for cells in rows))
    return shown + (f"<p>{escape(grid.caption)}</p>" if grid.caption else "")


def _row(grid: Grid, cells: tuple[str, ...]) -> str:
    headings = [column.heading for column in grid.columns[1:]]
    return row(cells[0], (cell(*each) for each in zip(headings, cells[1:], strict=True)))


def _facts(head: Head) -> str:
    summary = f"<b>{escape(head.command)}</b> on {escape(head.machine.device)}"
    return foldable(summary, json.dumps(asdict(head), indent=2, ensure_ascii=False))
