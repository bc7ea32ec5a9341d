"""The kernels of `attention`.

Shapes: D head channels; M queries, L positions of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(
    ptr: tl.tensor,
    norm_ptr: tl.tensor,
    d: tl.tensor,
    mask: tl.tensor,
    EPS: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
) -> tl.tensor:
    """Both halves of a head's channels, normed if that is asked for."""
    first = tl.load(ptr + d, mask=mask, other=0.0)
    second = tl.load(ptr + D // 2 + d, mask=mask, other=0.0)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / D + EPS)
        first_weight = tl.load(norm_ptr + d, mask=mask, other=0.0).to(tl.float32)
        second_weight = tl.load(norm_ptr + D // 2 + d, mask=mask, other=0.0).to(tl.float32)
        first = first_weight * (first * scale).to(dtype).to(tl.float32)
        second = second_weight * (second * scale).to(dtype).to(tl.float32)
    return first, second


@triton.jit
def rotate_kernel(
    qkv_ptr: tl.tensor,
    row_stride: tl.tensor,
    length_ptr: tl.tensor,
    start_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    positions: tl.tensor,
    room: tl.tensor,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A program has one head of one row, of the queries or of the keys and values."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < D // 2
    length = tl.load(length_ptr + row)
    # Rows that nobody waits for may go on past the end.
    turn = tl.minimum(length, positions - 1) * (D // 2) + d
    cos = tl.load(cos_ptr + turn, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + turn, mask=mask, other=0.0)
    from_ptr = qkv_ptr + row * row_stride + head * D
    if head < HEADS:
        first, second = _halves(from_ptr, q_norm_ptr, d, mask, EPS, D, NORM)
        to_ptr = q_ptr + (row * HEADS + head) * D
        tl.store(to_ptr + d, first * cos - second * sin, mask=mask)
        tl.store(to_ptr + D // 2 + d, second * cos + first * sin, mask=mask)
    else:
        place = length - tl.load(start_ptr + row)
        if place < room:
            at = ((row * KV_HEADS + (head - HEADS)) * room + place) * D
            first, second = _halves(from_ptr, k_norm_ptr, d, mask, EPS, D, NORM)
            tl.store(k_ptr + at + d, first * cos - second * sin, mask=mask)
            tl.store(k_ptr + at + D // 2 + d, second * cos + first * sin, mask=mask)
            v_from_ptr = from_ptr + KV_HEADS * D
            for half in tl.static_range(2):
                v = tl.load(v_from_ptr + half * (D // 2) + d, mask=mask, other=0.0)
                tl.store(v_ptr + at + half * (D // 2) + d, v, mask=mask)


@triton.jit
def _part(
    count: tl.tensor, split: tl.tensor, splits: tl.tensor, SHORTEST: tl.constexpr
) -> tl.tensor:
    """Which of `count` positions a part has: the first, and the one behind the last."""
    span = tl.cdiv(tl.cdiv(count, splits), SHORTEST) * SHORTEST
    begin = split * span
    return begin, tl.minimum(begin + span, count)


@triton.jit
def _attend(
    q: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> tl.tensor:
    """The queries' outputs from some positions of one head's cache, the largest score, and what the
    weights sum to: no positions, no weights.
    """
    d = tl.arange(0, BLOCK_D)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in range(begin, end, BLOCK_L):
        place = at + tl.arange(0, BLOCK_L)
        mask = (place < end)[:, None] & (d < D)[None, :]
        offset = place[:, None] * D + d[None, :]
        k = tl.load(k_ptr + offset, mask=mask, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="tf32x3") * SCALE
        score = tl.where((place < end)[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        v = tl.load(v_ptr + offset, mask=mask, other=0.0)
        y = y * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="tf32x3")
        top = new_top
    return y, top, total


@triton.jit
def _put(
    y: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    y_ptr: tl.tensor,
    log_ptr: tl.tensor,
    place: tl.tensor,
    mask: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Writes a part of some queries; one of no positions counts for nothing."""
    d = tl.arange(0, BLOCK_D)
    some = total > 0
    y = y / tl.where(some, total, 1.0)[:, None]
    tl.store(y_ptr + place[:, None] * D + d[None, :], y, mask=mask[:, None] & (d < D)[None, :])
    log = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(log_ptr + place, log, mask=mask)


# Numbers of parts change with those of rows and prompts: no reason to compile anew.
@triton.jit(do_not_specialize=["splits", "parts"])
def shared_kernel(
    q_ptr: tl.tensor,
    start_ptr: tl.tensor,
    room_ptr: tl.tensor,
    address_ptr: tl.tensor,
    address_stride: tl.tensor,
    tile_ptr: tl.tensor,
    y_ptr: tl.tensor,
    log_ptr: tl.tensor,
    splits: tl.tensor,
    parts: tl.tensor,
    ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    SHORTEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> None:
    """A program has a part of a prompt, for one key head and a tile of rows."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv, split = tl.program_id(0), tl.program_id(1)
    tile_ptr += tl.program_id(2) * ROWS
    one = tl.load(tile_ptr).to(tl.int64)
    if one >= 0:
        m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        row = tl.load(tile_ptr + m // GROUP, mask=m < ROWS * GROUP, other=-1).to(tl.int64)
        mask = row >= 0
        head = kv * GROUP + m % GROUP
        q = tl.load(
            q_ptr + (row * HEADS + head)[:, None] * D + d[None, :],
            mask=mask[:, None] & (d < D)[None, :],
            other=0.0,
        )
        # All rows of a tile have the first one's prompt.
        address_ptr += one * address_stride
        kind = tl.pointer_type(q_ptr.dtype.element_ty)
        k_ptr = tl.multiple_of(tl.load(address_ptr).to(kind), 16)
        v_ptr = tl.multiple_of(tl.load(address_ptr + 1).to(kind), 16)
        first = kv * tl.load(room_ptr + one).to(tl.int64) * D
        begin, end = _part(tl.load(start_ptr + one), split, splits, SHORTEST)
        y, top, total = _attend(
            q, k_ptr + first, v_ptr + first, begin, end, SCALE, D, BLOCK_M, BLOCK_D, BLOCK_L
        )
        place = (row * HEADS + head) * parts + split
        _put(y, top, total, y_ptr, log_ptr, place, mask, D, BLOCK_D)


@triton.jit(do_not_specialize=["shared", "splits", "parts"])
def own_kernel(
    q_ptr: tl.tensor,
    length_ptr: tl.tensor,
    start_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    room: tl.tensor,
    y_ptr: tl.tensor,
    log_ptr: tl.tensor,
    shared: tl.tensor,
    splits: tl.tensor,
    parts: tl.tensor,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    SHORTEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> None:
    """A program has a part of a row's own tokens, for one key head."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv, split = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = m < GROUP
    head = row * HEADS + kv * GROUP + m
    q = tl.load(
        q_ptr + head[:, None] * D + d[None, :], mask=mask[:, None] & (d < D)[None, :], other=0.0
    )
    count = tl.minimum(tl.load(length_ptr + row) + 1 - tl.load(start_ptr + row), room)
    begin, end = _part(count, split, splits, SHORTEST)
    first = (row * KV_HEADS + kv) * room * D
    y, top, total = _attend(
        q, k_ptr + first, v_ptr + first, begin, end, SCALE, D, BLOCK_M, BLOCK_D, BLOCK_L
    )
    _put(y, top, total, y_ptr, log_ptr, head * parts + shared + split, mask, D, BLOCK_D)


@triton.jit(do_not_specialize=["parts"])
def merge_kernel(
    part_ptr: tl.tensor,
    log_ptr: tl.tensor,
    y_ptr: tl.tensor,
    parts: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """A program has one head of one row: the mean of its parts, weighed by their sums."""
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.program_id(0)
    i, d = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D)
    log = tl.load(log_ptr + head * parts + i, mask=i < parts, other=float("-inf"))
    weight = tl.exp2(log - tl.max(log, 0))
    mask = (log > float("-inf"))[:, None] & (d < D)[None, :]
    part = tl.load(part_ptr + (head * parts + i)[:, None] * D + d[None, :], mask=mask, other=0.0)
    y = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(y_ptr + head * D + d, y, mask=d < D)
