"""What k completions per problem are worth: estimators over n samples, and their intervals.

Every estimator is an expectation over all k-subsets of the n samples that exist, so it uses every
sample and does not depend on the order in which they were drawn.

Shape suffixes: P problems, K numbers of completions, R bootstrap resamples, D distinct group sizes,
Q quadrature nodes, J polynomial coefficients, F frequencies.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from math import comb, nan, sqrt
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# Up to here C(n, j) < 1e154, so C(n, j) p^j q^(n-j) underflows only where it is negligible.
EXACT_SAMPLES = 512
MONTE_CARLO_DRAWS = 20_000  # standard error of one problem: at most 0.5 / sqrt(draws) = 0.0035
# Percentile bootstrap intervals of so few problems are too narrow near 0 and 1.
WILSON_BELOW = 100
NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class VoteGroup:
    """Samples of one problem that gave the same answer: how many, and whether it is right."""

    size: int
    correct: bool


# Coverage


@overload
def pass_at_k(n: int, c: int, k: int) -> float: ...
@overload
def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> Floats: ...
def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> float | Floats:
    """Coverage: the chance that k of n samples, c of them correct, hold a correct one.

    `1 - C(n-c, k) / C(n, k)`, the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1),
    in integers and rounded once. Numbers and arrays broadcast against each other. NaN where k > n.

    Raises ValueError unless 0 <= c <= n and k >= 1.
    """
    chances: Floats = np.vectorize(_pass_at_k, otypes=[np.float64])(n, c, k)
    return chances if chances.ndim else float(chances)


def _pass_at_k(n: int, c: int, k: int) -> float:
    if not 0 <= c <= n or k < 1:
        raise ValueError(f"pass@k of n={n}, c={c}, k={k}: need 0 <= c <= n and k >= 1")
    if k > n:
        return nan
    subsets = comb(n, k)
    return (subsets - comb(n - c, k)) / subsets


# Majority


def majority_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """Chance that the most frequent answer among k of the n samples is right, over all k-subsets.

    `answers` holds one vote key per sample; None never votes, and a subset without a vote counts as
    wrong. Of g answers tied on top each counts 1/g. NaN for k > n. Exact up to `EXACT_SAMPLES`
    samples, see `vote_at_k`.

    Raises ValueError if the lengths differ, k < 1, or samples of one answer differ in correctness.
    """
    if len(answers) != len(correct):
        raise ValueError(
            f"majority@k: {len(answers)} answers but {len(correct)} verdicts; need one for each"
        )
    return vote_at_k(_vote_groups(answers, correct), len(answers), k)


def _vote_groups(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> list[VoteGroup]:
    pairs = zip(answers, map(bool, correct), strict=True)
    votes = Counter((answer, right) for answer, right in pairs if answer is not None)
    for answer, right in votes:
        if right and (answer, False) in votes:
            raise ValueError(
                f"majority@k: answer {answer!r} is judged both right and wrong; "
                "samples of one vote group need one verdict"
            )
    return [VoteGroup(size, right) for (_, right), size in votes.items()]


def vote_at_k(groups: Sequence[VoteGroup], n: int, k: int, seed: int = 0) -> float:
    """`majority_at_k` from the vote groups of one problem; of its n samples the others never vote.

    Up to `EXACT_SAMPLES` samples the expectation is exact (absolute error below 1e-11). Beyond, it
    is the mean over `MONTE_CARLO_DRAWS` random subsets drawn with `seed`.

    Raises ValueError if k < 1 or the groups hold more than n samples.
    """
    silent = n - sum(group.size for group in groups)
    if k < 1 or silent < 0:
        raise ValueError(f"majority@k of n={n}, {n - silent} votes, k={k}: need votes <= n, k >= 1")
    if k > n:
        return nan
    if n > EXACT_SAMPLES:
        return _vote_by_sampling(groups, silent, k, seed)
    chances = (
        _chance_on_top(group.size, [rival.size for j, rival in enumerate(groups) if j != i], n, k)
        for i, group in enumerate(groups)
        if group.correct
    )
    return min(1.0, sum(chances))


def _chance_on_top(size: int, rivals: list[int], n: int, k: int) -> float:
    """Chance that a group of `size` gets most of k votes, ties shared: a sum over its votes m."""
    total = 0.0
    for m in range(max(1, k - n + size), min(size, k) + 1):
        strong = Counter(rival for rival in rivals if rival >= m)
        if strong and 2 * m <= k:
            total += _top_with(m, size, strong, n, k)
        else:  # no rival can reach m votes: the group wins whatever the others do
            total += comb(size, m) * comb(n - size, k - m) / comb(n, k)
    return total


def _top_with(m: int, size: int, strong: Counter[int], n: int, k: int) -> float:
    """Chance that the group gets m votes and no rival more; with s rivals level it counts 1/(1+s).

    Draw each sample independently with probability p = k/n, and condition on k samples drawn: that
    is a uniform k-subset. The votes of a rival of size r have the generating function
    `sum_{j<m} b(j; r, p) x^j + t b(m; r, p) x^m`, where t counts the rivals that are level with the
    group. `integral_0^1 t^s dt = 1/(1+s)` shares the tie, and Gauss-Legendre takes that integral of
    a polynomial exactly. All coefficients are probabilities: nothing overflows or cancels, and the
    polynomials can be multiplied by FFT.

    strong: how many rivals there are of each size that could reach m votes.
    """
    p = k / n
    transform = 2 ** n.bit_length()  # more points than the product has coefficients: no wrapping
    weak = n - size - sum(rival * copies for rival, copies in strong.items())
    votes_DJ = np.array([_binomial(rival, p, m) for rival in strong])
    level_DJ = np.pad(votes_DJ[:, m:], ((0, 0), (m, 0)))
    below_DF, level_DF = np.fft.rfft(votes_DJ[:, :m], transform), np.fft.rfft(level_DJ, transform)
    nodes_Q, weights_Q = _unit_interval_rule(min(strong.total(), k // m - 1))
    product_QF = np.fft.rfft(_binomial(weak, p, weak), transform) * np.ones((len(nodes_Q), 1))
    for below_F, level_F, copies in zip(below_DF, level_DF, strong.values(), strict=True):
        product_QF *= (below_F + nodes_Q[:, None] * level_F) ** copies
    others_J = np.fft.irfft(weights_Q @ product_QF, transform)
    return float(_binomial(size, p, m)[m] * others_J[k - m] / _binomial(n, p, k)[k])


def _binomial(trials: int, p: float, up_to: int) -> Floats:
    """Probabilities of 0..up_to successes in `trials`."""
    return np.array([comb(trials, j) * p**j * (1 - p) ** (trials - j) for j in range(up_to + 1)])


@cache  # a report asks for the same few again and again
def _unit_interval_rule(degree: int) -> tuple[Floats, Floats]:
    """Gauss-Legendre nodes and weights on [0, 1], exact for polynomials up to `degree`."""
    nodes_Q, weights_Q = np.polynomial.legendre.leggauss(degree // 2 + 1)
    return (nodes_Q + 1) / 2, weights_Q / 2


def _vote_by_sampling(groups: Sequence[VoteGroup], silent: int, k: int, seed: int) -> float:
    sizes = [silent, *(group.size for group in groups)]
    right = [False, *(group.correct for group in groups)]
    votes = np.random.default_rng(seed).multivariate_hypergeometric(
        sizes, k, MONTE_CARLO_DRAWS, method="marginals"
    )
    votes[:, 0] = 0  # the silent samples are drawn and do not vote
    on_top = (votes == votes.max(axis=1, keepdims=True)) & (votes > 0)
    shares = on_top[:, right].sum(axis=1) / np.maximum(on_top.sum(axis=1), 1)
    return float(shares.mean())


# Intervals


def bootstrap_counts(problems: int, resamples: int = 2000, seed: int = 0) -> Floats:
    """How often each bootstrap resample draws each problem: (R, P), rows sum to P.

    Models that answered the same problems in the same order share one matrix; that pairs their
    intervals and makes those of differences between them valid.
    """
    even = np.full(problems, 1 / problems)
    return np.random.default_rng(seed).multinomial(problems, even, resamples).astype(np.float64)


def bootstrap(values_PK: Floats, counts_RP: Floats) -> list[Estimate]:
    """Mean over problems and its 95 % percentile bootstrap interval, for each column of values."""
    # counts are divided last: rounded weights would make a mean of ones a little less than one
    means_RK = counts_RP @ values_PK / len(values_PK)
    low_K, high_K = np.quantile(means_RK, [0.025, 0.975], axis=0)
    columns = zip(values_PK.mean(axis=0), low_K, high_K, strict=True)
    return [Estimate(float(value), float(low), float(high)) for value, low, high in columns]


def wilson(value: float, problems: int) -> Estimate:
    """95 % Wilson score interval of a mean of per-problem chances, taken as a share of `problems`.

    Chances vary no more between problems than zeros and ones of the same mean do, so treating
    their mean as a share can only widen the interval.
    """
    low, rest = _wilson_low(value, problems), _wilson_low(1 - value, problems)
    return Estimate(value, low, 1 - rest)


def _wilson_low(value: float, problems: int) -> float:
    """The smaller root, as the roots' product over the larger one: exactly 0 for a value of 0."""
    z2 = NORMAL_95**2
    spread = NORMAL_95 * sqrt(value * (1 - value) / problems + z2 / (4 * problems**2))
    return value**2 / (value + z2 / (2 * problems) + spread)


def intervals(values_PK: Floats, counts_RP: Floats) -> list[Estimate]:
    """Estimate for each column of chances: Wilson below `WILSON_BELOW` problems, else bootstrap."""
    problems = len(values_PK)
    if problems < WILSON_BELOW:
        return [wilson(float(value), problems) for value in values_PK.mean(axis=0)]
    return bootstrap(values_PK, counts_RP)
