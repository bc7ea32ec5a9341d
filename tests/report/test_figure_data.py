import csv
import io
from collections.abc import Callable

import pytest

from retort.report import figure_data
from retort.report.build import build
from retort.report.curves import Curves
from retort.report.rules import BASIC
from retort.report.tally import tally
from retort.store import Run

from .conftest import GRADER, RIGHT
from .filled import filled
from .test_choices import scored

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def curves(make_run: MakeRun) -> Curves:
    runs = [make_run(name, {"p": [RIGHT, "7"], "q": ["7", "7"]}, 1000) for name in ("=1+1", "b")]
    scored(runs[1], "judge", lambda i: [0.9 - 0.8 * i], "probability")
    return filled(build([tally(run, GRADER) for run in runs]))


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_curve_as_a_table(curves: Curves) -> None:
    found = rows(figure_data.curve(curves, BASIC[0]))
    assert [(row["model"], row["k"], row["accuracy"]) for row in found] == [
        ("'=1+1", "1", "0.25"), ("'=1+1", "2", "0.5"), ("b", "1", "0.25"), ("b", "2", "0.5"),
    ]  # fmt: skip
    assert float(found[1]["seconds_per_problem"]) == curves.models[0].points[1].seconds
    assert float(found[0]["low"]) < 0.25 < float(found[0]["high"])


def test_the_other_tables(curves: Curves) -> None:
    judged = rows(figure_data.reliability(curves))
    assert [(row["model"], row["scorer"], row["completions"]) for row in judged] == [
        ("b", "judge", "2.0"), ("b", "judge", "2.0"),
    ]  # fmt: skip
    front = rows(figure_data.pareto(curves))
    assert len(front) == len(curves.comparisons.candidates)
    assert {row["on_front"] for row in front} == {"True", "False"}


@pytest.mark.parametrize("name", ["=1", "+1", "-1", "@x", "\tx"])
def test_no_cell_is_a_formula(name: str) -> None:
    text = figure_data.table(("a", "b"), [(name, -0.5)])
    assert rows(text) == [{"a": f"'{name}", "b": "-0.5"}]
