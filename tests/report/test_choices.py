import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.report.conftest import GRADER, RIGHT

from retort.report.build import build
from retort.report.choices import CONFIDENCE_VOTE, Choice, choice, equal, stopping, ways
from retort.report.curves import Curves, ModelCurve
from retort.report.metrics import Floats, bootstrap_counts, majority_at_k, pass_at_k
from retort.report.samples import Samples
from retort.report.tally import tally
from retort.report.wording import warnings
from retort.store import SCORER, Run

MakeRun = Callable[..., Run]
KS = [1, 2, 4, 8]


def problem(rng: random.Random, n: int = 8) -> Samples:
    """Group 0 is right. The scorer knows it, the confidence is the same everywhere."""
    group_N = np.array(rng.choices([-1, 0, 1, 2], k=n))
    correct_N = group_N == 0
    scores = {"oracle": correct_N * 1.0, "liar": np.where(correct_N, 0.1, 0.9)}
    return Samples(group_N, correct_N, np.full(n, 0.7), scores)


def choices(samples: list[Samples], ks: list[int], counts_RP: Floats) -> list[Choice]:
    return [choice(way, ks, counts_RP) for way in ways(samples, ks)]


@pytest.fixture
def samples() -> list[Samples]:
    rng = random.Random(3)
    return [problem(rng) for _ in range(30)]


def test_an_oracle_reaches_coverage_and_even_confidence_a_majority(samples: list[Samples]) -> None:
    counts_RP = bootstrap_counts(len(samples))
    found = {choice.name: choice for choice in choices(samples, KS, counts_RP)}
    assert list(found) == [
        CONFIDENCE_VOTE,
        "best of k by oracle",
        "vote weighted by oracle",
        "best of k by liar",
        "vote weighted by liar",
    ]
    assert [choice.scorer for choice in found.values()] == [None, *["oracle"] * 2, *["liar"] * 2]
    assert [choice.votes for choice in found.values()] == [True, False, True, False, True]
    for i, k in enumerate(KS):
        covered = np.mean([pass_at_k(8, int(each.correct_N.sum()), k) for each in samples])
        voted = np.mean([majority_at_k(each.groups, each.correct_N, k) for each in samples])
        at = {name: choice.points[i] for name, choice in found.items()}
        assert {point.k for point in at.values()} == {k}
        assert at["best of k by oracle"].accuracy.value == pytest.approx(covered)
        assert at["vote weighted by oracle"].accuracy.value == pytest.approx(covered)
        assert at[CONFIDENCE_VOTE].accuracy.value == pytest.approx(voted)
        assert at["best of k by liar"].accuracy.value <= voted + 1e-12
        assert not any(point.error for point in at.values()), "so few subsets are enumerated"


def test_stopping_early_spares_samples_of_easy_problems() -> None:
    easy = Samples(np.zeros(32, int), np.full(32, True), np.ones(32))
    even = Samples(np.arange(32) % 2, np.arange(32) % 2 == 0, np.ones(32))
    found = stopping([easy] * 9 + [even], [(1, 0.9), (32, 0.95)], lambda k: k / 4, np.ones((3, 10)))
    by_rule = {(stop.rule, stop.window): stop for stop in found}
    assert [key for key in by_rule if key[0] == "beta"] == [("beta", w) for w in (1, 4, 16)]
    first = by_rule["beta", 1]
    assert 4 < first.samples < 8
    assert first.seconds == first.samples / 4
    assert 0.9 <= first.accuracy.value <= 1
    assert by_rule["unanimous", 5].samples > 5
    assert first.equal_k is None or first.saved == pytest.approx(1 - first.samples / first.equal_k)


@pytest.mark.parametrize(
    ("accuracy", "k"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.7, 4), (0.75, 8), (0.9, None)]
)
def test_the_fixed_k_of_the_same_accuracy(accuracy: float, k: float | None) -> None:
    found = equal([(1, 0.5), (4, 0.7), (16, 0.8)], accuracy)
    assert found == (None if k is None else pytest.approx(k))


def test_a_flat_curve_is_reached_at_once() -> None:
    assert equal([(1, 0.5), (8, 0.5)], 0.5) == 1


# In a report


def scored(run: Run, name: str, value: Callable[[int], list[float]], scale: str) -> None:
    rows = run.completions.read(["problem_id", "sample_idx"]).to_pylist()
    with run.lock():
        run.scores(name).append([row | {"scores": value(row["sample_idx"])} for row in rows])
        (run.folder / f"scores-{name}" / SCORER).write_text(f'{{"scale": "{scale}", "kind": "x"}}')


def built(run: Run, **settings: Any) -> tuple[Curves, ModelCurve]:
    curves = build([tally(run, GRADER, **settings)])
    return curves, curves.models[0]


def test_scores_are_part_of_the_curves_and_read_back(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("m", {"p": [RIGHT, "1", "2", None], "q": ["1", RIGHT, RIGHT, "3"]})
    scored(run, "rm", lambda i: [5.0, -3.0] if i == 0 else [0.0], "logit")
    curves, model = built(run)
    best = {choice.name: choice for choice in model.choices}["best of k by rm"]
    # sample 0 is the last choice by its last step, and by its least; by the mean it is the first
    assert best.points[-1].accuracy.value == pytest.approx((0 + 2 / 3) / 2)
    _, by_mean = built(run, aggregate="mean")
    assert by_mean.choices[1].points[-1].accuracy.value == pytest.approx((1 + 0) / 2)
    (tmp_path / "curves.json").write_text(curves.to_json())
    assert Curves.read(tmp_path / "curves.json") == curves


def test_scores_that_are_missing_are_named(make_run: MakeRun) -> None:
    run = make_run("m", {"p": [RIGHT, "1"]})
    scored(run, "rm", lambda i: [0.5], "probability")
    with run.lock():
        (part,) = run.scores("rm").part_files()
        part.unlink()
        run.scores("rm").append([{"problem_id": "p", "sample_idx": 0, "scores": [0.5]}])
    with pytest.raises(ValueError, match=r"1 completions have no score by rm; repeat"):
        built(run)


def test_a_damaged_description_of_a_scorer_is_named(make_run: MakeRun) -> None:
    run = make_run("m", {"p": [RIGHT, "1"]})
    scored(run, "rm", lambda i: [0.5], "probability")
    (run.folder / "scores-rm" / SCORER).write_text("{")
    with pytest.raises(ValueError, match=r"scorer\.json is damaged"):
        built(run)


def test_high_rates_are_warned_of(make_run: MakeRun) -> None:
    _, fine = built(make_run("fine", {"p": [RIGHT, "1"]}))
    assert warnings(fine) == []
    _, silent = built(make_run("silent", {"p": [None, "1"]}, text=lambda id, i: "same"))
    (line,) = warnings(silent)
    assert line.startswith("silent: 50")
    assert "no answer" in line
