"""Voting that stops drawing completions once the answer seems settled, replayed from stored ones.

A problem's samples come in random orders, a window at a time: what a batch has in flight is
finished before anyone looks. After each window a rule decides whether to go on; the answer is the
vote over all that was drawn.

Shape suffixes: N samples, R random orders, G vote groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import comb, exp, lgamma, log
from typing import Literal

import numpy as np

from retort.report.orders import Ints, stopped_early
from retort.report.samples import SILENT

Rule = Literal["beta", "unanimous"]

RULES: tuple[Rule, ...] = ("beta", "unanimous")

CONFIDENCE = 0.95
"""Where the beta rule stops: the threshold of Adaptive-Consistency."""

UNANIMOUS_WINDOW = 5
"""Samples that the unanimous rule looks at together, as published."""

ORDERS = 40


@dataclass(frozen=True)
class Replay:
    """One problem under a rule, in the mean over orders: the chance that the answer is right, by
    votes that count alike and by weighted ones, and the samples drawn.
    """

    accuracy: float
    weighted: float
    samples: float


@cache
def leads(first: int, second: int) -> float:
    """P(p > 1/2) for p ~ Beta(first + 1, second + 1): that the leading answer would stay ahead of
    the next one (Aggarwal et al. 2023, arXiv 2305.11860), with a uniform prior.

    With whole numbers it is a sum of binomials: P(Binomial(first + second + 1, 1/2) <= first).
    """
    trials = first + second + 1
    return sum(comb(trials, i) for i in range(first + 1)) / 2**trials


@cache
def enough(second: int) -> list[int]:
    """The fewest votes with which a leading answer settles it by the beta rule, against a next one
    of 0, 1, ... and at last `second` votes.

    With a vote more for either, `leads` changes by one binomial probability.
    """
    needed: list[int] = []
    first, lead = 0, 0.5
    for votes in range(second + 1):
        while lead < CONFIDENCE:
            first += 1
            lead += half_binomial(first + votes, first) / 2
        needed.append(first)
        lead -= half_binomial(first + votes + 1, votes + 1) / 2
    return needed


def half_binomial(trials: int, successes: int) -> float:
    """P(Binomial(trials, 1/2) = successes)."""
    ways = lgamma(trials + 1) - lgamma(successes + 1) - lgamma(trials - successes + 1)
    return exp(ways - trials * log(2))


def replay(
    groups: Sequence[int | None],
    weights: Sequence[float],
    correct: Sequence[bool],
    rule: Rule,
    window: int,
    seed: int = 0,
    orders: int = ORDERS,
) -> Replay:
    """A problem's samples under a rule, averaged over so many random orders of them.

    groups: the vote group of each sample, numbered from 0; None never votes.
    weights: what each vote weighs in the weighted answer, not negative. The rules count votes.
    window: samples drawn between two looks.

    `beta` stops when `leads` of the two largest groups reaches `CONFIDENCE`. `unanimous` stops when
    all samples of the last window give one answer (early-stopping self-consistency, Li et al. 2024,
    arXiv 2401.10480).

    Raises ValueError if the lengths differ or window < 1.
    """
    if not len(groups) == len(weights) == len(correct):
        raise ValueError(
            f"adaptive voting: {len(groups)} groups, {len(weights)} weights and {len(correct)} "
            "verdicts; need one of each for every sample"
        )
    if window < 1:
        raise ValueError(f"adaptive voting: a window of {window} samples; at least 1 is drawn")
    rng = np.random.default_rng(seed)
    order_RN = rng.permuted(np.tile(np.arange(len(groups)), (orders, 1)), axis=1)
    return along(order_RN, groups, weights, correct, rule, window)


def along(
    order_RN: Ints,
    groups: Sequence[int | None],
    weights: Sequence[float],
    correct: Sequence[bool],
    rule: Rule,
    window: int,
) -> Replay:
    """`replay` in given orders of the samples."""
    group_N = np.array([SILENT if group is None else group for group in groups], np.int64)
    size_G = np.bincount(group_N + 1)[1:]
    right_G = np.bincount(group_N + 1, np.asarray(correct))[1:] > 0
    next_largest = int(np.sort(np.append(size_G, [0, 0]))[-2])
    found = stopped_early(
        order_RN,
        group_N,
        np.asarray(weights, np.float64),
        right_G,
        window,
        rule == "unanimous",
        np.array(enough(next_largest)),
    )
    return Replay(*(float(each_R.mean()) for each_R in found))
