"""One query a row over the row's cached keys and values, in three kernels.

`rotate` turns a projection into queries, and writes keys and values to the cache; `attend` goes
over a row's cache. Rows that start from the same prompt may leave its keys and values to two matrix
products for all of them, with `weigh` in between; `attend` then joins the two.

Shapes: S rows, H query heads, K key/value heads, G = H/K, D head channels, C = (H + 2K) D, L cached
positions, T threads, R queries of rows that share a prompt of L tokens. A cache is float32, or
bfloat16 as uint16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import Signature
from numpy.typing import NDArray

from retort.ops.cpu import vectors as vector
from retort.ops.cpu.jit import generated, inner, kernel
from retort.ops.cpu.maths import exp, largest_of
from retort.ops.cpu.storage import stored, widened
from retort.ops.cpu.team import Team, share
from retort.ops.cpu.vectors import LANES, WORD

F: Any = np.float32
Floats = NDArray[np.float32]
Whole = NDArray[np.int64]
Stored = NDArray[np.float32] | NDArray[np.uint16]

AHEAD = 16
"""Positions of the cache."""

KEYS = 4
"""That a query is multiplied with at once."""

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
    for start in range(0, whole, KEYS):
        for g in range(group):
            _products(q_GD, k_LD, score_GL, g, start)
    for position in range(whole, length):
        k_D = k_LD[position]
        for g in range(group):
            q_D = q_GD[g]
            score = F(0)
            for d in range(width):
                score += q_D[d] * widened(k_D[d])
            score_GL[g, position] = score


@generated
def _products(
    typing: Any, q_GD: Any, k_LD: Any, score_GL: Any, g: Any, start: Any
) -> tuple[Signature, Callable[..., Any]]:
    """`_scores` of one query with `KEYS` keys."""
    signature = types.void(q_GD, k_LD, score_GL, types.int64, types.int64)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        kinds = signature.args
        q, k, score = (vector.start_of(context, builder, kinds[i], args[i]) for i in range(3))
        width = vector.lengths_of(context, builder, kinds[0], args[0])[1]
        places = vector.lengths_of(context, builder, kinds[2], args[2])[1]
        g, start = args[3], args[4]
        query = builder.mul(g, width)
        keys = [builder.mul(builder.add(start, WORD(i)), width) for i in range(KEYS)]

        def step(i: Any, sums: list[Any]) -> list[Any]:
            d = builder.mul(i, WORD(LANES))
            q_L = vector.load(builder, q, builder.add(query, d))
            result = []
            for key, sum_L in zip(keys, sums, strict=True):
                offset = builder.add(key, d)
                vector.fetch(builder, k, builder.add(offset, builder.mul(width, WORD(AHEAD))))
                result.append(vector.fused(builder, q_L, vector.load(builder, k, offset), sum_L))
            return result

        nothing = ir.Constant(vector.VECTOR, None)
        sums = vector.loop(builder, builder.udiv(width, WORD(LANES)), [nothing] * KEYS, step)
        row = builder.add(builder.mul(g, places), start)
        for i, sum_L in enumerate(sums):
            place = builder.gep(score, [builder.add(row, WORD(i))])
            builder.store(vector.total(builder, sum_L), place)
        return context.get_dummy_value()

    return signature, generate


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
    for start in range(0, length, NEAR):
        stop = min(start + NEAR, length)
        for g in range(group):
            first = 0
            while whole - first >= 4 * LANES:
                _average_4(weight_GL, v_LD, y_GD, g, start, stop, first)
                first += 4 * LANES
            while whole - first >= LANES:
                _average_1(weight_GL, v_LD, y_GD, g, start, stop, first)
                first += LANES
            for position in range(start, stop):
                weight = weight_GL[g, position]
                for d in range(whole, width):
                    y_GD[g, d] += weight * widened(v_LD[position, d])


def _average_of(vectors: int) -> Any:
    """`_add_average` of so many vectors' channels, which stay in registers meanwhile."""

    def channels(
        typing: Any,
        weight_GL: Any,
        v_LD: Any,
        y_GD: Any,
        g: Any,
        start: Any,
        stop: Any,
        first: Any,
    ) -> tuple[Signature, Callable[..., Any]]:
        signature = types.void(weight_GL, v_LD, y_GD, *[types.int64] * 4)

        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            kinds = signature.args
            weight, v, y = (vector.start_of(context, builder, kinds[i], args[i]) for i in range(3))
            places = vector.lengths_of(context, builder, kinds[0], args[0])[1]
            width = vector.lengths_of(context, builder, kinds[1], args[1])[1]
            g, start, stop, first = args[3:]
            row = builder.mul(g, places)
            channels = [builder.add(first, WORD(i * LANES)) for i in range(vectors)]

            def step(i: Any, y_V: list[Any]) -> list[Any]:
                position = builder.add(start, i)
                w = builder.load(builder.gep(weight, [builder.add(row, position)]))
                w_L, value = vector.splat(builder, w), builder.mul(position, width)
                result = []
                for channel, y_L in zip(channels, y_V, strict=True):
                    offset = builder.add(value, channel)
                    vector.fetch(builder, v, builder.add(offset, builder.mul(width, WORD(AHEAD))))
                    result.append(vector.fused(builder, w_L, vector.load(builder, v, offset), y_L))
                return result

            out = [builder.add(builder.mul(g, width), channel) for channel in channels]
            y_V = [vector.load(builder, y, offset) for offset in out]
            y_V = vector.loop(builder, builder.sub(stop, start), y_V, step)
            for offset, y_L in zip(out, y_V, strict=True):
                vector.store(builder, y_L, y, offset)
            return context.get_dummy_value()

        return signature, generate

    return generated(channels)


_average_4, _average_1 = _average_of(4), _average_of(1)
