"""What becomes of k completions when one answer has to be given: other ways than a majority.

Shape suffixes: P problems, K numbers of completions, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from retort.report.adaptive import ORDERS, UNANIMOUS_WINDOW, Replay, Rule, replay
from retort.report.budget import completions_to_reach
from retort.report.metrics import Estimate, Floats, intervals
from retort.report.samples import Samples
from retort.report.selection import Weighted, best_of_k, enough_orders, weighted_vote

CONFIDENCE_VOTE = "confidence-weighted vote"

WINDOWS = (1, 4, 16, 64)
"""Samples between two looks of the beta rule: as many as a batch has of one problem."""


PROBLEM_ORDERS, FEWEST_ORDERS = 8_000, 2
"""Random orders that replays go through in all, and for a problem at least."""


@dataclass(frozen=True)
class Chosen:
    """Accuracy with k completions, and the Monte Carlo standard error of its value; 0 if exact."""

    k: int
    accuracy: Estimate
    error: float


@dataclass(frozen=True)
class Choice:
    """One way of choosing, by votes or by the best score; `scorer` is the reward model that it
    needs, if any.
    """

    name: str
    scorer: str | None
    votes: bool
    points: tuple[Chosen, ...]


@dataclass(frozen=True)
class Stopping:
    """Voting that stops early, over all samples of a run.

    samples: drawn for a problem, in the mean; seconds: decoding them, as for a fixed k.
    equal_k: the fixed number of samples whose majority is as accurate, and saved: the share of
    those that stopping early did not need. None where no fixed number is as accurate.
    """

    rule: Rule
    window: int
    accuracy: Estimate
    weighted: Estimate
    samples: float
    seconds: float
    equal_k: float | None
    saved: float | None


@dataclass(frozen=True)
class Way:
    """A way of choosing, before intervals: the chance of each problem that k completions give the
    right answer, (P, K), and the standard error of its mean over the problems.
    """

    name: str
    scorer: str | None
    votes: bool
    chance_PK: Floats
    error_K: Floats


def ways(samples_P: Sequence[Samples], ks: Sequence[int]) -> list[Way]:
    """Votes weighted by confidence, and for each scorer the best of k and votes weighted by it."""

    orders = enough_orders(len(samples_P))

    def confident(each: Samples) -> Weighted:
        return weighted_vote(each.groups, each.confidence_N, each.correct_N, ks, orders=orders)

    found = [_way(CONFIDENCE_VOTE, None, True, samples_P, confident)]
    for scorer in samples_P[0].scores:
        best, weighted = _by_scorer(scorer, ks, orders)
        found.append(_way(f"best of k by {scorer}", scorer, False, samples_P, best))
        found.append(_way(f"vote weighted by {scorer}", scorer, True, samples_P, weighted))
    return found


def _by_scorer(
    scorer: str, ks: Sequence[int], orders: int
) -> tuple[Callable[[Samples], Weighted], ...]:
    def best(each: Samples) -> Weighted:
        score_N = each.of_voters(each.scores[scorer])
        return Weighted(best_of_k(score_N, each.correct_N, np.array(ks)), np.zeros(len(ks)))

    def weighted(each: Samples) -> Weighted:
        weights_N = each.scores[scorer]
        return weighted_vote(each.groups, weights_N, each.correct_N, ks, orders=orders)

    return best, weighted


def _way(
    name: str,
    scorer: str | None,
    votes: bool,
    samples_P: Sequence[Samples],
    chance: Callable[[Samples], Weighted],
) -> Way:
    found = [chance(each) for each in samples_P]
    error_K = np.sqrt(np.sum([each.error_K**2 for each in found], axis=0)) / len(found)
    return Way(name, scorer, votes, np.stack([each.value_K for each in found]), error_K)


def choice(way: Way, ks: Sequence[int], counts_RP: Floats) -> Choice:
    """A way of choosing with its intervals."""
    columns = zip(ks, intervals(way.chance_PK, counts_RP), way.error_K.tolist(), strict=True)
    return Choice(way.name, way.scorer, way.votes, tuple(Chosen(*column) for column in columns))


def stopping(
    samples_P: Sequence[Samples],
    majority: Sequence[tuple[int, float]],
    seconds: Callable[[float], float],
    counts_RP: Floats,
) -> list[Stopping]:
    """Early stopping by every rule, with windows that leave something to stop.

    majority: accuracy of the vote over a fixed number of samples, fewest first. seconds: decoding
    time of a number of completions.
    """
    n = len(samples_P[0].group_N)
    asked: list[tuple[Rule, int]] = [("beta", window) for window in WINDOWS]
    asked.append(("unanimous", UNANIMOUS_WINDOW))
    return [
        _stopping(rule, window, samples_P, majority, seconds, counts_RP)
        for rule, window in asked
        if 2 * window <= n
    ]


def _stopping(
    rule: Rule,
    window: int,
    samples_P: Sequence[Samples],
    majority: Sequence[tuple[int, float]],
    seconds: Callable[[float], float],
    counts_RP: Floats,
) -> Stopping:
    orders = min(ORDERS, max(FEWEST_ORDERS, PROBLEM_ORDERS // len(samples_P)))
    runs = [_replayed(each, rule, window, orders) for each in samples_P]
    value_PK = np.array([[run.accuracy, run.weighted] for run in runs])
    accuracy, weighted = intervals(value_PK, counts_RP)
    drawn = float(np.mean([run.samples for run in runs]))
    equal_k = equal(majority, accuracy.value)
    saved = None if equal_k is None else 1 - drawn / equal_k
    return Stopping(rule, window, accuracy, weighted, drawn, seconds(drawn), equal_k, saved)


def _replayed(each: Samples, rule: Rule, window: int, orders: int) -> Replay:
    weights = each.confidence_N.tolist()
    return replay(each.groups, weights, each.correct_N.tolist(), rule, window, orders=orders)


def equal(curve: Sequence[tuple[int, float]], accuracy: float) -> float | None:
    """The k from which a curve reaches an accuracy; None where it does not."""
    k_K, value_K = np.array(curve, np.float64).T
    (k,) = completions_to_reach(k_K, value_K[None], np.array([accuracy])).tolist()
    return None if np.isnan(k) else k
