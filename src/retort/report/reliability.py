"""How far scores can be taken at their word: the reliability diagram, calibration, discrimination.

Shapes: N judged texts, L different scores, P problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from retort.report.metrics import Floats
from retort.report.samples import Samples

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Scores between two bounds: how many, their mean, and the share of them that were right."""

    low: float
    high: float
    count: float
    score: float
    right: float


@dataclass(frozen=True)
class Judged:
    """A scorer on the completions of a run: how many it could judge, its reliability diagram, and
    the expected calibration error.

    ranking: the probability that something right scores above something wrong; None where all of
    them are of one kind.
    """

    scorer: str
    completions: int
    bins: tuple[Bin, ...]
    error: float
    ranking: float | None


def judged(samples_P: Sequence[Samples]) -> tuple[Judged, ...]:
    """Every scorer of a run that could judge any of its completions."""
    right_N = np.concatenate([each.correct_N for each in samples_P]).astype(np.float64)
    found = []
    for scorer in samples_P[0].scores:
        score_N = np.concatenate([each.scores[scorer] for each in samples_P])
        some_N = ~np.isnan(score_N)
        if some_N.any():
            found.append(_judged(scorer, score_N[some_N], right_N[some_N]))
    return tuple(found)


def _judged(scorer: str, score_N: Floats, right_N: Floats) -> Judged:
    alike_N = np.ones_like(score_N)
    bins = reliability(score_N, right_N, alike_N)
    better = ranking(score_N, right_N, alike_N)
    error = calibration_error(bins)
    return Judged(scorer, len(score_N), tuple(bins), error, None if np.isnan(better) else better)


def reliability(score_N: Floats, right_N: Floats, weight_N: Floats) -> list[Bin]:
    """Ten bins of equal width over [0, 1], the empty ones left out: the reliability diagram.

    right_N may be shares. A text that was sampled several times has that weight.
    """
    which_N = np.minimum((score_N * BINS).astype(np.int64), BINS - 1)
    sums = (np.bincount(which_N, weight_N * each, BINS) for each in (1.0, score_N, right_N))
    bins = []
    for i, (count, score, right) in enumerate(zip(*(x.tolist() for x in sums), strict=True)):
        if count:
            bins.append(Bin(i / BINS, (i + 1) / BINS, count, score / count, right / count))
    return bins


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: the mean distance of score and share right, over the bins."""
    total = sum(each.count for each in bins)
    return sum(each.count * abs(each.score - each.right) for each in bins) / total


def ranking(score_N: Floats, right_N: Floats, weight_N: Floats) -> float:
    """The probability that something right scores above something wrong, ties counting half: the
    area under the ROC curve. NaN where all is right or all is wrong.
    """
    levels, which_N = np.unique(score_N, return_inverse=True)
    right_L, wrong_L = (
        np.bincount(which_N, weight_N * each, len(levels)) for each in (right_N, 1 - right_N)
    )
    pairs = right_L.sum() * wrong_L.sum()
    if not pairs:
        return nan
    below_L = wrong_L.cumsum() - wrong_L / 2
    return float((right_L * below_L).sum() / pairs)
