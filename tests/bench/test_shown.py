"""Tables fit a terminal, pages hold what was measured, and names are escaped."""

import json
import re
from dataclasses import replace

import pytest
from rich.cells import cell_len

from retort import console
from retort.bench import page, plots, terminal, views
from retort.bench.decode import Decode, End, Prefill, Row
from retort.bench.head import Head
from retort.bench.spans import Protocol
from retort.bench.view import Column, Grid, View

NASTY = "[bold]<script>"


def row(contender: str, batch: int, ms: float, prompts: str = "own") -> Row:
    runs = [[ms * 0.512 * factor] for factor in (0.9, 1.0, 1.2)]
    rate = 1000 * batch / ms
    return Row(
        contender,
        "m",
        "retort",
        prompts,
        batch,
        512,
        ms,
        rate,
        0.3,
        4e6,
        5e9,
        0.4,
        2_000_000,
        runs,  # type: ignore[arg-type]
    )


@pytest.fixture
def result(top: Head) -> Decode:
    rows = (
        row("teacher", 1, 5.0),
        row(NASTY, 1, 2.0),
        row("teacher", 64, 16.0),
        row(NASTY, 64, 5.0),
        row("teacher", 64, 8.0, "shared"),
    )
    prefills = (Prefill("teacher", 0.25, [0.25]),)
    return Decode(
        top, Protocol(), 3, prefills, rows, (End("teacher", "own", 128, "out of memory"),)
    )


@pytest.fixture
def view(result: Decode) -> View:
    return views.of_decode(result)


def cells(grid: Grid) -> list[dict[str, str]]:
    headings = [column.heading for column in grid.columns]
    return [
        dict(zip(headings, line, strict=True))
        for line in zip(*(column.cells for column in grid.columns), strict=True)
    ]


def test_rows_as_they_were_measured(view: View) -> None:
    models, prefills, own, shared = view.grids
    assert [each["model"] for each in cells(models)] == ["attention", "mamba", "hybrid"]
    assert cells(prefills) == [{"model": "teacher", "time": "250 ms", "tokens/s": "2,048"}]
    assert own.title == "decode, prompts of their own, 512 + 512 tokens"
    assert cells(own)[1] == {
        "model": NASTY,
        "batch": "1",
        "ms/step": "2",
        "tokens/s": "500",
        "spread": "30%",
        "GB/s": "2",
        "limit": "40%",
        "state": "2.0 MB",
        "ratio": "2.50x",
    }
    assert "5 GB/s" in own.caption
    assert shared.title == "decode, one prompt for all rows, 512 + 512 tokens"


def test_ratios_are_to_the_first_at_the_same_batch(view: View) -> None:
    *_, own, shared = view.grids
    assert [each["ratio"] for each in cells(own)] == ["1.00x", "2.50x", "1.00x", "3.20x"]
    assert [each["ratio"] for each in cells(shared)] == ["1.00x"]


def test_charts_reach_over_the_repeats(view: View) -> None:
    rate, step, limit = view.charts
    point = step.points[2]
    assert (point.contender, point.x) == ("teacher", 64)
    assert (point.low, point.y, point.high) == pytest.approx((14.4, 16.0, 19.2))
    assert rate.points[2].y == pytest.approx(4000)
    assert rate.points[2].high == pytest.approx(4000 / 0.9)
    assert limit.points[2].y == pytest.approx(0.4)


def test_what_ended_a_sweep_is_noted(view: View) -> None:
    assert "teacher, own prompts: not at batch 128, out of memory" in view.notes


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_tables_fit(view: View, width: int) -> None:
    for grid in view.grids:
        table = terminal.table(grid, width)
        with console._console(width=width).capture() as shown:
            console._console(width=width).print(table)
        assert all(cell_len(line) <= width for line in shown.get().splitlines())


def test_what_matters_least_is_left_out_first() -> None:
    # Cells of 5, and 2 between columns; names may be folded to 12.
    columns = [Column("a" * 30, [], 0), *(Column("12345", [], rank) for rank in (0, 2, 3, 1))]
    room = {12 + 7 * 4: [0, 0, 2, 3, 1], 12 + 7 * 3: [0, 0, 2, 1], 12 + 7 * 2: [0, 0, 1], 1: [0, 0]}
    for width, ranks in room.items():
        for spare in (0, 6):
            shown = terminal.fitting(columns, width + spare)
            assert [column.rank for column in shown] == ranks, width


def test_table_is_printed_without_markup(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show(view, told=["teacher, own prompts: not at batch 128, out of memory"])
    out, err = capsys.readouterr()
    line = next(each for each in out.splitlines() if each.startswith(NASTY))
    assert line.split() == [NASTY, "1", "2", "500", "30%", "2", "40%", "2.0", "MB", "2.50x"]
    assert "out of memory" not in err, "it was told before"


def test_page_holds_everything(view: View, result: Decode) -> None:
    html = page.render(view, replace(result.head, command="retort bench <decode>"))
    assert "<script>" not in re.sub(r"<script[ >].*?</script>", "", html, flags=re.DOTALL)
    assert "[bold]&lt;script&gt;" in html
    assert "retort bench &lt;decode&gt;" in html
    assert "3.20x" in html
    assert "http:" not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    for chart in view.charts:
        assert f'id="{chart.id}"' in html


def test_figure_has_every_point(view: View) -> None:
    figure = plots.figure(view)
    assert len(figure["concat"]) == 3
    assert json.dumps(figure).count('"teacher"') >= 3 * 3


def test_page_without_charts(top: Head) -> None:
    grid = Grid("targets", [Column("what", ["a"])])
    assert "Charts" not in page.render(View("targets", [grid], [], []), top)
