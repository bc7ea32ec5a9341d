"""What the page and its figures are made from, and how it puts comparisons in words."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from retort.report import comparisons_page, curve_plots, explorer, front_plots, page
from retort.report.build import build
from retort.report.comparisons import Comparisons, Crossover, SpeedUp
from retort.report.completions import Completions
from retort.report.curves import Curves
from retort.report.metrics import Estimate
from retort.report.rules import BASIC, accuracies, rules
from retort.report.tally import tally
from retort.report.wording import advantages, points, times
from retort.store import Run

from .conftest import GRADER, RIGHT
from .filled import filled
from .pages import Page
from .test_choices import scored

MakeRun = Callable[..., Run]
COVERAGE = BASIC[0]
NONE_SHOWN = Completions((), 2, 0, 4, ())


@pytest.fixture(scope="module")
def plain(make_run: MakeRun) -> Curves:
    outcomes = {"p": [RIGHT, "7", "7", "7"], "q": [RIGHT, RIGHT, "7", None]}
    runs = [
        make_run(name, outcomes, speed) for name, speed in (("a", 500), ("b", 1000), ("c", 999))
    ]
    scored(runs[1], "judge", lambda i: [0.9 - i / 5], "probability")
    return build([tally(run, GRADER) for run in runs])


@pytest.fixture(scope="module")
def curves(plain: Curves) -> Curves:
    return filled(plain, ["judge"])


def words(html: str) -> str:
    return Page(html).text.replace("\N{NARROW NO-BREAK SPACE}", " ")


# The explorer


def test_axes_are_offered_where_every_model_has_them(plain: Curves, curves: Curves) -> None:
    def names(found: Curves) -> list[str]:
        return [axis.name for axis in explorer.offered(found.models)]

    every = [axis.name for axis in explorer.AXES]
    assert names(curves) == every
    first, *others = curves.models
    unpriced = replace(curves, models=(replace(first, price=None), *others))
    assert names(unpriced) == [name for name in every if name != "money"]
    point = replace(first.points[0], cost=replace(first.points[0].cost, flops=None, alone=None))
    lacking = replace(first, points=(point, *first.points[1:]))
    assert set(every) - set(names(replace(curves, models=(lacking, *others)))) == {"flops", "alone"}


def test_models_come_with_what_they_cost(curves: Curves) -> None:
    told = explorer.data(curves)["models"][0]
    model = curves.models[0]
    assert told["costs"]["seconds"] == [point.seconds for point in model.points]
    assert told["costs"]["bytes"] == [point.cost.bytes for point in model.points]
    assert told["prefill"] == model.prefill_seconds
    assert told["rules"]["majority"][1][0] == model.points[1].majority.value
    for told_stop, stop in zip(told["stops"]["majority"], model.stopping, strict=True):
        assert told_stop["costs"]["seconds"] == stop.seconds
        assert told_stop["costs"]["tokens"] == pytest.approx(stop.samples * model.mean_tokens)


def test_rules_of_some_models_only(curves: Curves) -> None:
    names = [rule.name for rule in rules(curves.models)]
    assert names[:2] == ["coverage", "majority"]
    assert names[-2:] == ["best of k by judge", "vote weighted by judge"]
    assert accuracies(curves.models[0], "best of k by judge") == []
    assert "best of k by judge" not in explorer.data(curves)["models"][0]["rules"]
    assert len(explorer.data(curves)["models"][1]["rules"]["best of k by judge"]) == 3


def test_crossovers_are_drawn_where_there_are_any(curves: Curves) -> None:
    (crossing,) = curve_plots.crossings(curves, COVERAGE)
    crossover = curves.comparisons.crossovers[0]
    assert crossover.seconds is not None
    assert (crossing["model"], crossing["x"]) == ("b", crossover.seconds.value)
    assert crossing["label"].startswith("b ahead from ")
    figure = curve_plots.figure(curves, COVERAGE)
    assert figure["datasets"]["by-seconds-crossings"] == [crossing]
    assert figure["datasets"]["by-k-crossings"] == []
    throughout = replace(crossover, seconds=Estimate(*[crossover.first] * 3))
    compared = replace(curves.comparisons, crossovers=(throughout,))
    assert curve_plots.crossings(replace(curves, comparisons=compared), COVERAGE) == []


def test_the_front_is_ordered_and_drawn_apart(curves: Curves) -> None:
    front = front_plots.front(curves, COVERAGE)
    assert all(each.on_front for each in front)
    assert [each.seconds for each in front] == sorted(each.seconds for each in front)
    found = [each for each in curves.comparisons.candidates if each.rule == "coverage"]
    line, small, large = front_plots.panel(curves, COVERAGE).to_dict()["layer"]
    assert len(small["data"]["values"]) == len(found) - len(front)
    assert len(line["data"]["values"]) == len(large["data"]["values"]) == len(front)


# Comparisons


def speed_up(name: str, k: int, value: float | None) -> SpeedUp:
    estimate = None if value is None else Estimate(value, value - 0.5, value + 0.5)
    return SpeedUp("coverage", name, k, 0.8, None if value is None else 3.0, estimate, 0.9)


def crossover(name: str, seconds: float | None) -> Crossover:
    estimate = None if seconds is None else Estimate(seconds, seconds / 2, 2 * seconds)
    return Crossover("coverage", name, 1.0, 60.0, estimate, 0.9)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, ""),
        (
            {"speed_ups": (speed_up("b", 8, 2.0), speed_up("b", 32, None), speed_up("c", 8, None))},
            "To cover the 80 % that a does with 8 completions, b is 2.0× as fast (1.5× to 2.5×) "
            "and c does not reach that.",
        ),
        (
            {"speed_ups": (speed_up("b", 8, None), speed_up("b", 32, None))},
            "To cover the 80 % that a does with 32 completions, b does not reach that.",
        ),
        (
            {"crossovers": (crossover("b", 4.0), crossover("c", 1.0))},
            "b is ahead of a from 4.0 s (2.0 s to 8.0 s) on. c is ahead of a throughout.",
        ),
        (
            {"crossovers": (crossover("b", None), crossover("c", None))},
            "b (to 1 min 00 s) and c (to 1 min 00 s) do not overtake a.",
        ),
    ],
)
def test_advantages_in_a_sentence(curves: Curves, changes: dict[str, Any], sentence: str) -> None:
    compared = replace(Comparisons("a", (), (), (), ()), **changes)
    found = advantages(replace(curves, comparisons=compared))
    assert found.replace("\N{NARROW NO-BREAK SPACE}", " ") == sentence


def test_numbers_in_words() -> None:
    assert [times(x) for x in (0.54, 1.0, 9.94, 9.96)] == ["0.5×", "1.0×", "9.9×", "10×"]
    assert [points(x) for x in (0.042, -0.1, 0.0001)] == ["+4.2", "−10.0", "0.0"]


def test_comparisons_as_tables(curves: Curves) -> None:
    faster = words(comparisons_page.speed_ups(curves))
    for fact in ("k of a", "1.4×", "1.1×–1.9×, reached in 96 %", "not reached", "reached in 12 %"):
        assert fact in faster
    crossed = words(comparisons_page.crossovers(curves))
    for fact in ("not ahead", "in 97 % of resamples", "in 20 % of resamples"):
        assert fact in crossed
    beyond = words(comparisons_page.differences(curves, [1]))
    assert "−4.0−11.0 to +3.0" in beyond
    assert "k = 2" not in beyond
    on_front = words(comparisons_page.front(curves))
    assert on_front.count("80 %") >= len(front_plots.front(curves, COVERAGE))


def test_what_is_not_there_is_left_out(plain: Curves, curves: Curves) -> None:
    empty = replace(plain, comparisons=Comparisons("a", (), (), (), ()))
    titles = (
        "Pareto front",
        "Speed at equal accuracy",
        "Crossovers",
        "Differences to a",
        "Training",
    )
    full = words(page.render(curves, NONE_SHOWN, training=True))
    bare = words(page.render(empty, NONE_SHOWN))
    for title in titles:
        assert title in full
        assert title not in bare
    for fact in ("Scoring by judge", "Price of an hour", "Replay against clock"):
        assert fact in full
    assert "Price of an hour" not in bare
    links = [attrs.get("href") for _, attrs in Page(page.render(curves, NONE_SHOWN, True)).tags]
    assert "training.html" in links
