import json
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest

from retort.report.completions import FEWEST_SAMPLES, completions, spaced
from retort.report.completions_page import content, data
from retort.report.tally import Tally, tally
from retort.store import Run

from .conftest import GRADER, RIGHT
from .test_choices import scored

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def two(make_run: MakeRun) -> list[Tally]:
    outcomes = {f"p{i:02}": [RIGHT, "7", None, RIGHT] * 4 for i in range(20)}
    texts = "One.\n\n Two. \n \nThree {} {}".format
    runs = [make_run(name, outcomes, text=texts) for name in ("a", "b")]
    scored(runs[0], "steps", lambda i: [0.5, 0.25, i / 100], "probability")
    scored(runs[0], "whole", lambda i: [0.0], "logit")
    return [tally(run, GRADER) for run in runs]


def test_a_small_run_is_shown_whole(two: list[Tally]) -> None:
    shown = completions(two)
    assert (len(shown.problems), shown.samples) == (20, 16)
    assert len(shown.completions) == 2 * 20 * 16
    first = shown.completions[0]
    assert (first.model, first.problem, first.sample, first.tokens) == ("a", 0, 0, 10)
    assert first.steps == ("One.", "Two.", "Three p00 0")
    assert first.scores == {"steps": (0.5, 0.25, 0.0), "whole": (0.5,)}
    assert shown.completions[-1].scores == {}
    assert [each.verdict for each in shown.completions[:3]] == ["right", "wrong", "no answer"]
    assert replace(shown.completions[1], cut=True).verdict == "cut off"
    assert replace(first, cut=True).verdict == "right"


def test_fewer_samples_make_room_for_problems(two: list[Tally]) -> None:
    whole = completions(two)
    size = len(json.dumps([asdict(each) for each in whole.completions]))
    less = completions(two, size * 3 // 4)
    assert FEWEST_SAMPLES <= less.samples < 16
    assert len(less.problems) == 20
    least = completions(two, size // 8)
    assert least.samples == FEWEST_SAMPLES
    assert 1 < len(least.problems) < 8
    assert [each.id for each in least.problems][:: len(least.problems) - 1] == ["p00", "p19"]
    assert {least.problems[each.problem].id for each in least.completions} == {
        problem.id for problem in least.problems
    }
    texts = {each.steps[-1].split()[1] for each in least.completions if each.problem == 1}
    assert texts == {least.problems[1].id}
    assert len(json.dumps([asdict(each) for each in least.completions])) < size // 8


def test_what_is_shown_is_said(two: list[Tally]) -> None:
    told = content(completions(two, 20_000))
    assert "of 20 problems, 8 of 16 completions of each model on each: evenly spaced" in told
    assert "All 20 problems, all 16 completions of each model on each." in content(completions(two))


def test_the_page_has_columns_of_one_length(two: list[Tally]) -> None:
    found = data(completions(two))
    columns = {
        name: len(found[name]) for name in found if name not in ("models", "problems", "scores")
    }
    assert set(columns.values()) == {640}
    assert found["models"] == ["a", "b"]
    assert found["scores"]["steps"][0] == (0.5, 0.25, 0.0)
    assert found["scores"]["steps"][-1] is None


def test_long_completions_are_shortened(make_run: MakeRun) -> None:
    run = make_run("m", {"p": [RIGHT]}, text=lambda *key: "x" * 10_000)
    (one,) = completions([tally(run, GRADER)]).completions
    assert one.steps == ("x" * 8000 + " […2000 more characters]",)


@pytest.mark.parametrize(
    ("total", "count", "places"),
    [(5, 1, [0]), (5, 2, [0, 4]), (5, 5, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8])],
)
def test_problems_are_evenly_spaced(total: int, count: int, places: list[int]) -> None:
    assert spaced(total, count) == places
