"""How far scores can be believed, by hand and by pairs."""

import math

import numpy as np
import pytest

from retort.report.reliability import calibration_error, judged, ranking, reliability
from retort.report.samples import Samples


def test_reliability_by_hand() -> None:
    score_N = np.array([0.05, 0.05, 0.95, 1.0])
    bins = reliability(score_N, np.array([0.0, 1, 1, 1]), np.array([1.0, 3, 2, 2]))
    assert [(each.low, each.count, each.right) for each in bins] == [(0.0, 4, 0.75), (0.9, 4, 1.0)]
    assert [each.score for each in bins] == pytest.approx([0.05, 0.975])
    assert calibration_error(bins) == pytest.approx((0.7 + 0.025) / 2)


def test_ranking_by_pairs() -> None:
    draw = np.random.default_rng(0)
    score_N, right_N = draw.integers(0, 6, 40) / 5, draw.integers(0, 2, 40).astype(float)
    weight_N = draw.integers(1, 4, 40).astype(float)
    won = total = 0.0
    for i in range(40):
        for j in range(40):
            if right_N[i] > right_N[j]:
                pair = weight_N[i] * weight_N[j]
                won += pair * ((score_N[i] > score_N[j]) + 0.5 * (score_N[i] == score_N[j]))
                total += pair
    assert ranking(score_N, right_N, weight_N) == pytest.approx(won / total)
    assert math.isnan(ranking(score_N, np.ones(40), weight_N))


def problem(correct: list[bool], **scores: list[float]) -> Samples:
    arrays = {name: np.array(values) for name, values in scores.items()}
    return Samples(np.zeros(len(correct), np.int64), np.array(correct), np.ones(1), arrays)


def test_every_scorer_of_a_run_is_judged() -> None:
    nan = math.nan
    found = judged(
        [
            problem([True, False], good=[0.9, 0.1], mute=[nan, nan], glad=[1.0, nan]),
            problem([True, False], good=[0.8, 0.2], mute=[nan, nan], glad=[nan, nan]),
        ]
    )
    good, glad = found
    assert (good.scorer, good.completions, good.ranking) == ("good", 4, 1)
    assert good.error == pytest.approx(0.15)
    assert (glad.scorer, glad.completions, glad.ranking, glad.error) == ("glad", 1, None, 0)
    assert judged([problem([True])]) == ()
