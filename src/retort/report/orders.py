"""Votes counted along orders of a problem's samples, in compiled loops: a run of a million
completions is gone through some hundred million times.

Shape suffixes: N samples, R orders of them, K numbers of samples, G vote groups, V numbers of
votes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retort.report.jit import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Sums of the same weights in another order differ by rounding, and are ties all the same.
TIE_TOLERANCE = 1e-12


@compiled
def share_right(count_G: Ints, weight_G: Floats, right_G: Bools) -> float:
    """The share of the heaviest answers that are right; 0 where nothing voted."""
    most = 0.0
    for group in range(len(right_G)):
        if count_G[group]:
            most = max(most, weight_G[group])
    heaviest = right = 0
    for group in range(len(right_G)):
        if count_G[group] and weight_G[group] >= most * (1 - TIE_TOLERANCE):
            heaviest += 1
            right += right_G[group]
    return right / max(heaviest, 1)


@compiled
def shares_right(
    order_RN: Ints, group_N: Ints, weight_N: Floats, right_G: Bools, k_K: Ints
) -> Floats:
    """`share_right` of the first k samples of each order, (K, R), for ascending k.

    A negative group never votes.
    """
    share_KR = np.zeros((len(k_K), len(order_RN)))
    for row in range(len(order_RN)):
        count_G, weight_G = np.zeros(len(right_G), np.int64), np.zeros(len(right_G))
        drawn = 0
        for i in range(len(k_K)):
            for sample in order_RN[row, drawn : k_K[i]]:
                group = group_N[sample]
                if group >= 0:
                    count_G[group] += 1
                    weight_G[group] += weight_N[sample]
            drawn = k_K[i]
            share_KR[i, row] = share_right(count_G, weight_G, right_G)
    return share_KR


@compiled
def stopped_early(
    order_RN: Ints,
    group_N: Ints,
    weight_N: Floats,
    right_G: Bools,
    window: int,
    unanimous: bool,
    needed_V: Ints,
) -> tuple[Floats, Floats, Ints]:
    """Each order, a window at a time, until it is settled: the share of its most frequent answers
    that are right, that of its heaviest, and the samples drawn, each (R,).

    Settled is a `unanimous` window, or else a leading answer with the votes that are needed against
    a next one of V. A negative group never votes.
    """
    orders, n = order_RN.shape
    alike_R, weighted_R, drawn_R = np.zeros(orders), np.zeros(orders), np.zeros(orders, np.int64)
    for row in range(orders):
        count_G, weight_G = np.zeros(len(right_G), np.int64), np.zeros(len(right_G))
        leader, first, second, drawn = -1, 0, 0, 0
        settled = False
        while drawn < n and not settled:
            window_group, same = group_N[order_RN[row, drawn]], True
            for sample in order_RN[row, drawn : drawn + window]:
                group = group_N[sample]
                same &= group == window_group and group >= 0
                if group < 0:
                    continue
                count_G[group] += 1
                weight_G[group] += weight_N[sample]
                votes = count_G[group]
                if group == leader:
                    first = votes
                elif votes > first:
                    leader, first, second = group, votes, first
                else:
                    second = max(second, votes)
            drawn = min(drawn + window, n)
            settled = same if unanimous else first >= needed_V[second]
        alike_R[row] = share_right(count_G, count_G.astype(np.float64), right_G)
        weighted_R[row] = share_right(count_G, weight_G, right_G)
        drawn_R[row] = drawn
    return alike_R, weighted_R, drawn_R
