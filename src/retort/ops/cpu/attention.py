"""One query a row over the row's cached keys and values.

Shapes: S rows, H query heads, K key/value heads, G = H/K, D head channels, C = (H + 2K) D, L cached
positions, T threads. The cache is float32, or bfloat16 as uint16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retort.ops.cpu.jit import inner, kernel
from retort.ops.cpu.maths import exp, largest_of
from retort.ops.cpu.storage import fetch_ahead, stored, widened
from retort.ops.cpu.team import Team, share

F = np.float32
Floats = NDArray[np.float32]
Stored = NDArray[np.float32] | NDArray[np.uint16]

AHEAD = 16
"""Positions of the cache."""


@kernel
def attend(
    qkv_SC: Floats,
    bias_C: Floats,
    q_norm_D: Floats,
    k_norm_D: Floats,
    eps: float,
    cos_LD: Floats,
    sin_LD: Floats,
    length_S: NDArray[np.int64],
    k_SKLD: Stored,
    v_SKLD: Stored,
    score_TGL: Floats,
    y_SHD: Floats,
    rows: int,
    team: Team,
) -> None:
    """Writes the outputs y_SHD of the first rows, and their new keys and values to the cache.

    A row has read `length_S` tokens before this one. Empty biases and norms are left out. The
    projection is overwritten.
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
        k_SKLD,
        v_SKLD,
        score_TGL,
        y_SHD,
    )
    heads, width = k_SKLD.shape[1], y_SHD.shape[2]
    longest = 1
    for row in range(rows):
        longest = max(longest, length_S[row] + 1)
    share(_attend, arguments, rows * heads, 2 * longest * width, team)


@inner
def _attend(
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
    length_S: NDArray[np.int64],
    k_SKLD: Stored,
    v_SKLD: Stored,
    score_TGL: Floats,
    y_SHD: Floats,
) -> None:
    """An item is a key/value head of a row, with the query heads that share it."""
    heads, width = y_SHD.shape[1], y_SHD.shape[2]
    kv_heads = k_SKLD.shape[1]
    group = heads // kv_heads
    for item in range(first, last):
        row, head = item // kv_heads, item % kv_heads
        position = length_S[row]
        for i in range(group + 2):  # the queries, the key, the value
            h = head * group + i if i < group else heads + (i - group) * kv_heads + head
            x_D = _part(qkv_SC[row], bias_C, h, width)
            if i <= group:
                norm_D = q_norm_D if i < group else k_norm_D
                _turn(x_D, norm_D, eps, cos_LD[position], sin_LD[position])
            if i >= group:
                cache_SKLD = k_SKLD if i == group else v_SKLD
                _store(x_D, cache_SKLD[row, head, position])
        q_GD = qkv_SC[row, head * group * width : (head + 1) * group * width]
        _scores(q_GD, k_SKLD[row, head], position + 1, score_TGL[worker])
        for g in range(group):
            _softmax(score_TGL[worker, g, : position + 1])
        y_GD = y_SHD[row, head * group : (head + 1) * group]
        _average(score_TGL[worker], v_SKLD[row, head], position + 1, y_GD)


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
    """The products of the queries, one behind the other, with the first `length` keys."""
    width = k_LD.shape[1]
    scale = F(1) / np.sqrt(F(width))
    for position in range(length):
        k_D = k_LD[position]
        fetch_ahead(k_D, AHEAD)
        for g in range(q_GD.size // width):
            q_D = q_GD[g * width : (g + 1) * width]
            score = F(0)
            for d in range(width):
                score += q_D[d] * widened(k_D[d])
            score_GL[g, position] = score * scale


@inner
def _softmax(score_L: Floats) -> None:
    largest = largest_of(score_L)
    total = F(0)
    for i in range(score_L.size):
        score_L[i] = exp(score_L[i] - largest)
        total += score_L[i]
    scale = F(1) / total
    for i in range(score_L.size):
        score_L[i] *= scale


@inner
def _average(weight_GL: Floats, v_LD: Stored, length: int, y_GD: Floats) -> None:
    """The sums of the values by their weights, four values at a time."""
    group, width = y_GD.shape
    for g in range(group):
        for i in range(width):
            y_GD[g, i] = F(0)
    whole = length - length % 4
    for start in range(0, whole, 4):
        a_D, b_D, c_D, d_D = v_LD[start], v_LD[start + 1], v_LD[start + 2], v_LD[start + 3]
        for v_D in (a_D, b_D, c_D, d_D):
            fetch_ahead(v_D, AHEAD)
        for g in range(group):
            y_D, weight_4 = y_GD[g], weight_GL[g, start : start + 4]
            a, b, c, d = weight_4[0], weight_4[1], weight_4[2], weight_4[3]
            for i in range(width):
                y_D[i] += (a * widened(a_D[i]) + b * widened(b_D[i])) + (
                    c * widened(c_D[i]) + d * widened(d_D[i])
                )
    for position in range(whole, length):
        v_D = v_LD[position]
        for g in range(group):
            y_D, weight = y_GD[g], weight_GL[g, position]
            for i in range(width):
                y_D[i] += weight * widened(v_D[i])
