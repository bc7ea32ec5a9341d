"""Choosing one answer of k by scores: the best one, or the one whose votes weigh most.

As in `metrics`, every value is an expectation over all k-subsets of the n samples of a problem.
Scores come from a reward model or from the model's own confidence; NaN marks a sample that cannot
be chosen and does not vote, as one without an answer.

Shape suffixes: N samples, K numbers of completions, G vote groups, R random orders, V different
scores, M numbers of given samples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations
from math import comb, isnan, nan
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike

from retort.report.metrics import Floats
from retort.report.orders import Bools, Ints, shares_right
from retort.report.samples import SILENT

ENUMERATED_SUBSETS = 2000  # up to so many the weighted vote is exact; n <= 8 has 70 at most
RANDOM_ORDERS = 400  # standard error of one problem: at most 0.5 / sqrt(orders) = 0.025
PROBLEM_ORDERS = 200_000  # in all: standard error of a mean over problems at most 0.0011
FEWEST_ORDERS = 16


class Weighted(NamedTuple):
    """Chances of a weighted vote, and their Monte Carlo standard errors; 0 where exact."""

    value_K: Floats
    error_K: Floats


@overload
def best_of_k(scores: ArrayLike, correct: ArrayLike, k: int) -> float: ...
@overload
def best_of_k(scores: ArrayLike, correct: ArrayLike, k: ArrayLike) -> Floats: ...
def best_of_k(scores: ArrayLike, correct: ArrayLike, k: ArrayLike) -> float | Floats:
    """Chance that the best scored of k of the n samples is right; of equal scores each may be it.

    The m samples above a score and the t that share it put it on top of
    `C(n-m, k) - C(n-m-t, k)` of the `C(n, k)` subsets. A subset without any score counts as wrong.
    k may be an array; NaN where k > n.

    Raises ValueError if the lengths differ or k < 1.
    """
    score_N, correct_N = _samples("best of k", scores, correct)
    voters = ~np.isnan(score_N)
    values, place_N = np.unique(-score_N[voters], return_inverse=True)
    tied_V = np.bincount(place_N, minlength=len(values))
    right_V = np.bincount(place_N, correct_N[voters], len(values))
    n, above_V = len(score_N), np.cumsum(tied_V) - tied_V

    def chance(k: int) -> float:
        if _beyond("best of k", k, n):
            return nan
        missed_M = _missed(n, k)
        on_top_V = missed_M[above_V] - missed_M[above_V + tied_V]
        return float((right_V / tied_V * on_top_V).sum())

    chances: Floats = np.vectorize(chance, otypes=[np.float64])(k)
    return chances if chances.ndim else float(chances)


@overload
def weighted_at_k(
    groups: Sequence[Hashable | None], scores: ArrayLike, correct: ArrayLike, k: int, seed: int = 0
) -> float: ...
@overload
def weighted_at_k(
    groups: Sequence[Hashable | None],
    scores: ArrayLike,
    correct: ArrayLike,
    k: ArrayLike,
    seed: int = 0,
) -> Floats: ...
def weighted_at_k(
    groups: Sequence[Hashable | None],
    scores: ArrayLike,
    correct: ArrayLike,
    k: ArrayLike,
    seed: int = 0,
) -> float | Floats:
    """Chance that the answer whose votes weigh most among k of the n samples is right.

    A vote weighs its score. None never votes; of g answers that weigh the same, each counts 1/g.
    k may be an array; NaN where k > n. See `weighted_vote` for how it is taken, and its error.

    Raises ValueError if the lengths differ, k < 1, a score is negative or infinite, or samples of
    one group differ in correctness.
    """
    ks = np.atleast_1d(np.asarray(k))
    value_K = weighted_vote(groups, scores, correct, ks.ravel().tolist(), seed).value_K
    return value_K.reshape(ks.shape) if np.ndim(k) else float(value_K[0])


def weighted_vote(
    groups: Sequence[Hashable | None],
    scores: ArrayLike,
    correct: ArrayLike,
    ks: Sequence[int],
    seed: int = 0,
    orders: int = RANDOM_ORDERS,
) -> Weighted:
    """`weighted_at_k` for several k at once, with the Monte Carlo error of each.

    Exact where k-subsets are few enough to go through all; else the mean over the first k of so
    many random orders, one set of orders for every k.
    """
    votes = _Votes.of(groups, scores, correct)
    values, errors = np.full(len(ks), nan), np.zeros(len(ks))
    sampled = []
    for i, k in enumerate(ks):
        if _beyond("weighted vote", k, votes.n):
            continue
        if comb(votes.n, k) <= ENUMERATED_SUBSETS:
            values[i] = votes.over_subsets(k)
        else:
            sampled.append(i)
    if sampled:
        asked = sorted({ks[i] for i in sampled})
        won_KR = dict(zip(asked, votes.in_orders(asked, seed, orders), strict=True))
        for i in sampled:
            won_R = won_KR[ks[i]]
            values[i] = won_R.mean()
            errors[i] = won_R.std(ddof=1) / np.sqrt(len(won_R))
    return Weighted(values, errors)


def _missed(n: int, k: int) -> Floats:
    """C(n-m, k) / C(n, k) for m = 0..n: the chance that k of n samples miss m given ones."""
    m_M = np.arange(n)
    return np.concatenate([[1.0], np.cumprod(np.maximum(n - k - m_M, 0) / (n - m_M))])


def enough_orders(problems: int) -> int:
    """Random orders of each problem's samples that a mean over so many problems needs."""
    return min(RANDOM_ORDERS, max(FEWEST_ORDERS, PROBLEM_ORDERS // problems))


class _Votes(NamedTuple):
    """The votes of a problem: group, or `SILENT`, and weight of each sample."""

    group_N: Ints
    weight_N: Floats
    correct_G: Bools

    @classmethod
    def of(cls, groups: Sequence[Hashable | None], scores: ArrayLike, correct: ArrayLike) -> _Votes:
        score_N, correct_N = _samples("weighted vote", scores, correct)
        if len(groups) != len(score_N):
            raise ValueError(f"weighted vote: {len(groups)} groups but {len(score_N)} scores")
        if (score_N < 0).any() or np.isinf(score_N).any():
            raise ValueError(
                f"weighted vote: score {score_N[(score_N < 0) | np.isinf(score_N)][0]:g}; weights "
                "are finite and not negative, map the scores first (a logit by the sigmoid)"
            )
        voting = [
            None if isnan(score) else group
            for group, score in zip(groups, score_N.tolist(), strict=True)
        ]
        named = (group for group in dict.fromkeys(voting) if group is not None)
        index = {group: i for i, group in enumerate(named)}
        group_N = np.array([SILENT if each is None else index[each] for each in voting], np.int64)
        return cls(group_N, np.nan_to_num(score_N), _agreed(group_N, correct_N, len(index)))

    @property
    def n(self) -> int:
        return len(self.group_N)

    def over_subsets(self, k: int) -> float:
        chosen_RK = np.array(list(combinations(range(self.n), k)))
        return float(self._shares(chosen_RK, [k]).mean())

    def in_orders(self, ks: Sequence[int], seed: int, orders: int) -> Floats:
        """The share won with each k, ascending, in each random order, (K, R)."""
        rng = np.random.default_rng(seed)
        order_RN = rng.permuted(np.tile(np.arange(self.n), (orders, 1)), axis=1)
        return self._shares(order_RN, ks)

    def _shares(self, order_RN: Ints, ks: Sequence[int]) -> Floats:
        shares: Floats = shares_right(
            order_RN, self.group_N, self.weight_N, self.correct_G, np.array(ks)
        )
        return shares


def _agreed(group_N: Ints, correct_N: Bools, groups: int) -> Bools:
    """Whether each group is right. Raises ValueError where its samples differ."""
    size_G = np.bincount(group_N + 1, minlength=groups + 1)[1:]
    right_G = np.bincount(group_N + 1, correct_N, groups + 1)[1:]
    if ((right_G > 0) & (right_G < size_G)).any():
        raise ValueError(
            "weighted vote: an answer is judged both right and wrong; samples of one vote group "
            "need one verdict"
        )
    return right_G > 0


def _samples(what: str, scores: ArrayLike, correct: ArrayLike) -> tuple[Floats, Bools]:
    score_N, correct_N = np.asarray(scores, dtype=np.float64), np.asarray(correct, dtype=np.bool_)
    if score_N.ndim != 1 or score_N.shape != correct_N.shape:
        raise ValueError(f"{what}: {score_N.size} scores but {correct_N.size} verdicts")
    return score_N, correct_N


def _beyond(what: str, k: int, n: int) -> bool:
    if k < 1:
        raise ValueError(f"{what}: k = {k}, which counts completions and is at least 1")
    return k > n
