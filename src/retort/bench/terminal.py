"""A result's tables for a terminal, however narrow it is."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.table import Table

from retort import console
from retort.bench.view import Column, Grid, View

GAP = 2
NAME = 12
"""Cells that the names of rows may be folded to before a column is left out."""


def show(view: View, told: Sequence[str] = ()) -> None:
    """Prints tables on stdout, and on stderr the notes that were not told before."""
    out = console.stdout()
    for grid in view.grids:
        console.print_table(table(grid, out.width if out.is_terminal else None))
    for note in view.notes:
        if note not in told:
            console.warn(note)


def table(grid: Grid, width: int | None) -> Table:
    """A table that fits into `width` cells, by leaving out what matters least."""
    shown = Table(
        title=console.printable(grid.title),
        caption=grid.caption or None,
        box=None,
        pad_edge=False,
        padding=(0, GAP, 0, 0),
        header_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    columns = grid.columns if width is None else fitting(grid.columns, width)
    for column in columns:
        first = column is columns[0]
        shown.add_column(
            column.heading,
            justify="left" if first else "right",
            overflow="fold" if first else "ellipsis",
            no_wrap=not first,
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        shown.add_row(*map(console.printable, cells))
    return shown


def fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """The columns for which there is room, in their order."""
    kept = list(columns)
    while _needed(kept) > width:
        least = max(kept, key=lambda column: column.rank)
        if least.rank == 0:
            break
        kept.remove(least)
    return kept


def _needed(columns: Sequence[Column]) -> int:
    """Cells of the columns and of the gaps between them."""
    first, *others = (max(map(cell_len, [each.heading, *each.cells])) for each in columns)
    return min(first, NAME) + sum(others) + GAP * len(others)
