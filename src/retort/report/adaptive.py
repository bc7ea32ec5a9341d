"""Voting that stops drawing completions once the answer seems settled, replayed from stored ones.

A problem's samples come in random orders, a window at a time: what a batch has in flight is
finished before anyone looks. After each window a rule decides whether to go on; the answer is the
vote over all that was drawn.

Shape suffixes: N samples, W windows, R random orders, G vote groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from retort.report.metrics import Floats

Rule = Literal["beta", "unanimous"]

RULES: tuple[Rule, ...] = ("beta", "unanimous")

CONFIDENCE = 0.95
"""Where the beta rule stops: the threshold of Adaptive-Consistency."""

UNANIMOUS_WINDOW = 5
"""Samples that the unanimous rule looks at together, as published."""

ORDERS = 40

Ints = NDArray[np.int64]


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
    silent = 1 + max((group for group in groups if group is not None), default=-1)
    group_N = np.array([silent if group is None else group for group in groups])
    right_G = np.bincount(group_N, np.asarray(correct), silent + 1)[:silent] > 0
    ends = [*range(window, len(groups), window), len(groups)]
    counts_WRG = _running(group_N[order_RN], np.ones(order_RN.shape), ends, silent)
    weights_WRG = _running(group_N[order_RN], np.asarray(weights)[order_RN], ends, silent)
    stop_R = _first(_settled(rule, counts_WRG, ends))
    rows_R = np.arange(len(order_RN))
    counts_RG, weights_RG = counts_WRG[stop_R, rows_R], weights_WRG[stop_R, rows_R]
    return Replay(
        accuracy=float(_won(counts_RG, counts_RG, right_G).mean()),
        weighted=float(_won(counts_RG, weights_RG, right_G).mean()),
        samples=float(np.array(ends)[stop_R].mean()),
    )


def _running(group_RN: Ints, weight_RN: Floats, ends: Sequence[int], groups: int) -> Floats:
    """Weight of each group's votes up to the end of each window, (W, R, G)."""
    orders = len(group_RN)
    window_N = np.searchsorted(ends, np.arange(group_RN.shape[1]), side="right")
    cell_RN = (window_N * orders + np.arange(orders)[:, None]) * (groups + 1) + group_RN
    size = len(ends) * orders * (groups + 1)
    added = np.bincount(cell_RN.ravel(), weight_RN.ravel(), size)
    return added.reshape(len(ends), orders, groups + 1)[..., :-1].cumsum(axis=0)


def _settled(rule: Rule, counts_WRG: Floats, ends: Sequence[int]) -> NDArray[np.bool_]:
    """Whether each order may stop after each window, (W, R)."""
    match rule:
        case "beta":
            return _beta(counts_WRG)
        case "unanimous":
            return _unanimous(counts_WRG, ends)


def _beta(counts_WRG: Floats) -> NDArray[np.bool_]:
    padded = np.pad(
        counts_WRG, ((0, 0), (0, 0), (2, 0))
    )  # two rivals of no votes, if none is there
    second_WR, first_WR = np.partition(padded, -2, axis=-1)[..., -2:].transpose(2, 0, 1)
    chances = np.vectorize(leads, otypes=[np.float64])
    return chances(first_WR.astype(int), second_WR.astype(int)) >= CONFIDENCE


def _unanimous(counts_WRG: Floats, ends: Sequence[int]) -> NDArray[np.bool_]:
    added_WRG = np.diff(counts_WRG, axis=0, prepend=0)
    sizes_W1 = np.diff(ends, prepend=0)[:, None]
    return added_WRG.max(axis=-1, initial=0) == sizes_W1


def _first(settled_WR: NDArray[np.bool_]) -> Ints:
    """The window after which each order stops: the first settled one, else the last."""
    settled_WR[-1] = True
    return settled_WR.argmax(axis=0)


def _won(counts_RG: Floats, weights_RG: Floats, right_G: NDArray[np.bool_]) -> Floats:
    """The share of the heaviest answers that are right; 0 where nothing voted."""
    if not len(right_G):
        return np.zeros(len(counts_RG))
    voted_RG = counts_RG > 0
    most_R1 = weights_RG.max(axis=1, keepdims=True)
    on_top_RG = (weights_RG >= most_R1 * (1 - 1e-12)) & voted_RG
    return on_top_RG[:, right_G].sum(axis=1) / np.maximum(on_top_RG.sum(axis=1), 1)
