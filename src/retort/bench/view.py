"""What a result looks like, whichever way it is shown: tables, charts, notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A heading and the cells under it. Where there is no room for all columns, those with the
    highest `rank` are left out; those of rank 0 never are.
    """

    heading: str
    cells: Sequence[str]
    rank: int = 0


@dataclass(frozen=True)
class Grid:
    """A table: the first column has the names of the rows. `caption` explains it."""

    title: str
    columns: Sequence[Column]
    caption: str = ""


@dataclass(frozen=True)
class Point:
    """A median, and how far its repeats reach."""

    contender: str
    style: str
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Chart:
    """Points joined to a line for each contender and style, against the same x; `format` is that of
    the vertical axis, in d3's words, and `log` says that its scale is logarithmic.
    """

    id: str
    title: str
    x: str
    y: str
    points: Sequence[Point]
    format: str = "~s"
    log: bool = False


@dataclass(frozen=True)
class View:
    """All there is to see of a result."""

    title: str
    grids: Sequence[Grid]
    charts: Sequence[Chart]
    notes: Sequence[str]
