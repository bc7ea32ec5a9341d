"""One query a row over the row's cached keys and values, in three kernels.

`rotate` turns a projection into queries, and writes keys and values to the cache; `attend` goes
over a row's cache. Rows that start from the same prompt may leave its keys and values to two matrix
products for all of them, with `weigh` in between; `attend` then joins the two.

Shapes: S rows, H query heads, K key/value heads, G = H/K, D head channels, C = (H + 2K) D, L cached
positions, T threads, R queries of rows that share a prompt of L tokens. A cache is float32, or
bfloat16 as uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from retort.ops.cpu.attention_tiles import (
    KEYS,
    average_1_1,
    average_1_4,
    average_2_1,
    average_2_4,
    products_1,
    products_2,
)
from retort.ops.cpu.jit import inner, kernel
from retort.ops.cpu.maths import exp, largest_of
from retort.ops.cpu.storage import stored, widened
from retort.ops.cpu.team import Team, share
from retort.ops.cpu.vectors import LANES

F: Any = np.float32
Floats = NDArray[np.float32]
Whole = NDArray[np.int64]
Stored = NDArray[np.float32] | NDArray[np.uint16]

NEAR = 64
"""Values that stay in the nearest cache while every query of their group reads them."""


@kernel
def rotate(
    qkv_SC: Floats,
    bias_C: Floats,
    q_norm_D: Floats,
    k_norm_D: Floats,
    eps: float,
    cos_LD: Floats,
    sin_LD: Floats,
    length_S: Whole,
    start_S: Whole,
    k_SKLD: Stored,
    v_SKLD: Stored,
    q_KSGD: Floats,
    rows: int,
    team: Team,
) -> None:
    """Writes the queries of the first rows, scaled, and their new keys and values to the cache.

    A row has read `length_S` tokens before this one, and its cache starts with token `start_S`.
    Empty biases and norms are left out. The projection is overwritten.
    """
    arguments = (
        qkv_SC,
        bias_C,
        q_norm_D,
        k_norm_D,
        F(eps),
        cos_LD,
        sin_LD,
        length_S,
        start_S,
        k_SKLD,
        v_SKLD,
        q_KSGD,
    )
    heads, _, group, width = q_KSGD.shape
    share(_rotate, arguments, rows * heads, 2 * (group + 2) * width, team)


@kernel
def attend(
    q_KSGD: Floats,
    length_S: Whole,
    start_S: Whole,
    k_SKLD: Stored,
    v_SKLD: Stored,
    prompt_KSGD: Floats,
    sums_2KSG: Floats,
    score_TGL: Floats,
    y_SHD: Floats,
    rows: int,
    team: Team,
) -> None:
    """Writes the outputs y_SHD of the first rows.

    For rows whose cache does not start with token 0, `prompt_KSGD` is what the tokens before add
    up to, and `sums_2KSG` its scale: the largest score, and the sum of the weights.
    """
    arguments = (
        q_KSGD,
        length_S,
        start_S,
        k_SKLD,
        v_SKLD,
        prompt_KSGD,
        sums_2KSG,
        score_TGL,
        y_SHD,
    )
    longest = 1
    for row in range(rows):
        longest = max(longest, length_S[row] - start_S[row] + 1)
    heads, width = k_SKLD.shape[1], k_SKLD.shape[3]
    share(_attend, arguments, rows * heads, 2 * longest * width, team)


@kernel
def weigh(score_KRL: Floats, sums_2KR: Floats, team: Team) -> None:
    """Turns scores into weights, in place: exp(score - largest). Writes the largest and the sum."""
    heads, queries, length = score_KRL.shape
    share(_weigh, (score_KRL, sums_2KR), heads * queries, 4 * length, team)


@inner
def _rotate(
    first: int,
    last: int,
    worker: int,
    qkv_SC: Floats,
    bias_C: Floats,
    q_norm_D: Floats,
    k_norm_D: Floats,
    eps: float,
    cos_LD: Floats,
    sin_LD: Floats,
    length_S: Whole,
    start_S: Whole,
    k_SKLD: Stored,
    v_SKLD: Stored,
    q_KSGD: Floats,
) -> None:
    """An item is a key/value head of a row, with the query heads that share it."""
    kv_heads, _, group, width = q_KSGD.shape
    scale = F(1) / np.sqrt(F(width))
    for item in range(first, last):
        row, head = item // kv_heads, item % kv_heads
        position, place = length_S[row], length_S[row] - start_S[row]
        for i in range(group + 2):  # the queries, the key, the value
            h = head * group + i if i < group else i * kv_heads + head
            x_D = _part(qkv_SC[row], bias_C, h, width)
            if i <= group:
                norm_D = q_norm_D if i < group else k_norm_D
                _turn(x_D, norm_D, eps, cos_LD[position], sin_LD[position])
            if i < group:
                q_D = q_KSGD[head, row, i]
                for d in range(width):
                    q_D[d] = x_D[d] * scale
            else:
                cache_SKLD = k_SKLD if i == group else v_SKLD
                _store(x_D, cache_SKLD[row, head, place])


@inner
def _attend(
    first: int,
    last: int,
    worker: int,
    q_KSGD: Floats,
    length_S: Whole,
    start_S: Whole,
    k_SKLD: Stored,
    v_SKLD: Stored,
    prompt_KSGD: Floats,
    sums_2KSG: Floats,
    score_TGL: Floats,
    y_SHD: Floats,
) -> None:
    """An item is a key/value head of a row, with the query heads that share it."""
    kv_heads, _, group, width = q_KSGD.shape
    for item in range(first, last):
        row, head = item // kv_heads, item % kv_heads
        length = length_S[row] - start_S[row] + 1
        score_GL, y_GD = score_TGL[worker], y_SHD[row, head * group : (head + 1) * group]
        _scores(q_KSGD[head, row], k_SKLD[row, head], length, score_GL)
        for g in range(group):
            score_L, y_D = score_GL[g, :length], y_GD[g]
            largest, total, part = largest_of(score_L), F(0), F(0)
            if start_S[row] > 0:
                before, weight = sums_2KSG[0, head, row, g], sums_2KSG[1, head, row, g]
                largest = max(largest, before)
                part = exp(before - largest)
                total = part * weight
            total += _exponentials(score_L, largest)
            scale = F(1) / total
            for i in range(length):
                score_L[i] *= scale
            prompt_D = prompt_KSGD[head, row, g]
            for d in range(width):
                y_D[d] = prompt_D[d] * (part * scale) if start_S[row] > 0 else F(0)
        _add_average(score_GL, v_SKLD[row, head], length, y_GD)


@inner
def _weigh(first: int, last: int, worker: int, score_KRL: Floats, sums_2KR: Floats) -> None:
    """An item is a query."""
    queries = score_KRL.shape[1]
    for item in range(first, last):
        head, query = item // queries, item % queries
        score_L = score_KRL[head, query]
        largest = largest_of(score_L)
        sums_2KR[0, head, query] = largest
        sums_2KR[1, head, query] = _exponentials(score_L, largest)


@inner
def _part(qkv_C: Floats, bias_C: Floats, head: int, width: int) -> Floats:
    """The channels of one head, with their bias."""
    x_D = qkv_C[head * width : (head + 1) * width]
    if bias_C.size:
        bias_D = bias_C[head * width : (head + 1) * width]
        for d in range(width):
            x_D[d] += bias_D[d]
    return x_D


@inner
def _turn(x_D: Floats, norm_D: Floats, eps: float, cos_D: Floats, sin_D: Floats) -> None:
    """The norm of a head, if there is one, and the rotation by its position."""
    if norm_D.size:
        square = F(0)
        for d in range(x_D.size):
            square += x_D[d] * x_D[d]
        scale = F(1) / np.sqrt(square / F(x_D.size) + eps)
        for d in range(x_D.size):
            x_D[d] = x_D[d] * scale * norm_D[d]
    half = cos_D.size
    one_D, two_D = x_D[:half], x_D[half:]
    for d in range(half):
        one, two = one_D[d], two_D[d]
        one_D[d] = one * cos_D[d] - two * sin_D[d]
        two_D[d] = two * cos_D[d] + one * sin_D[d]


@inner
def _store(x_D: Floats, cache_D: Stored) -> None:
    for d in range(x_D.size):
        cache_D[d] = stored(x_D[d], cache_D[d])


@inner
def _scores(q_GD: Floats, k_LD: Stored, length: int, score_GL: Floats) -> None:
    """The products of the queries with the first `length` keys."""
    group, width = q_GD.shape
    whole = length - length % KEYS if width % LANES == 0 else 0
    pairs = group - group % 2
    for start in range(0, whole, KEYS):
        for g in range(0, pairs, 2):
            products_2(q_GD, k_LD, score_GL, g, start)
            products_2(q_GD, k_LD, score_GL, g, start + KEYS // 2)
        if pairs < group:
            products_1(q_GD, k_LD, score_GL, pairs, start)
    for position in range(whole, length):
        k_D = k_LD[position]
        for g in range(group):
            q_D = q_GD[g]
            score = F(0)
            for d in range(width):
                score += q_D[d] * widened(k_D[d])
            score_GL[g, position] = score


@inner
def _exponentials(score_L: Floats, largest: float) -> float:
    """exp(score - largest), in place, and their sum."""
    total = F(0)
    for i in range(score_L.size):
        score_L[i] = exp(score_L[i] - largest)
        total += score_L[i]
    return total


@inner
def _add_average(weight_GL: Floats, v_LD: Stored, length: int, y_GD: Floats) -> None:
    """Adds the values by their weights."""
    group, width = y_GD.shape
    whole = width - width % LANES
    pairs = group - group % 2
    for start in range(0, length, NEAR):
        stop = min(start + NEAR, length)
        for g in range(0, pairs, 2):
            first = 0
            while whole - first >= 4 * LANES:
                average_2_4(weight_GL, v_LD, y_GD, g, start, stop, first)
                first += 4 * LANES
            while whole - first >= LANES:
                average_2_1(weight_GL, v_LD, y_GD, g, start, stop, first)
                first += LANES
        if pairs < group:
            first = 0
            while whole - first >= 4 * LANES:
                average_1_4(weight_GL, v_LD, y_GD, pairs, start, stop, first)
                first += 4 * LANES
            while whole - first >= LANES:
                average_1_1(weight_GL, v_LD, y_GD, pairs, start, stop, first)
                first += LANES
        for g in range(group):
            for position in range(start, stop):
                weight = weight_GL[g, position]
                for d in range(whole, width):
                    y_GD[g, d] += weight * widened(v_LD[position, d])
