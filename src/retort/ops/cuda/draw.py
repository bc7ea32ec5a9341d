"""From logits to tokens and their log-probabilities, reading the logits once, and of the block that
the token is in, twice; nothing is sorted.

Each block of a row leaves behind its largest logit and what its exponentials sum to. A second
kernel finds the block at which the row's cumulative distribution reaches a uniform number, and the
token within it. Filters (top-k, top-p, min-p) are all of one kind: tokens below some logit are left
out. It is found by bisection over the bits of a logit, with as many passes as it has bits.

Shapes: S rows, V vocabulary, I blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from retort.ops.cuda.maths import block

BLOCK = 4096
"""Logits of a block."""


@dataclass(frozen=True)
class Filters:
    """Which tokens may be drawn; top_k 0, top_p 1 and min_p 0 are off."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def draw(
    logits_SV: Tensor, seed_S: Tensor, count_S: Tensor, temperature: float, filters: Filters
) -> tuple[Tensor, Tensor]:
    """A token for each row, token_S in int64, and its log-probability under the model, logprob_S in
    float32: before temperature and filters.

    The uniform number behind a token is that of SplitMix64 at `count_S` of the stream `seed_S`,
    both int64. Temperature 0 takes the largest logit, the first of equals.
    """
    assert logits_SV.stride(1) == 1 and seed_S.dtype == count_S.dtype == torch.int64
    rows, vocabulary = logits_SV.shape
    floor_S = floors(logits_SV, temperature, filters)
    size = min(BLOCK, block(vocabulary, 16))
    blocks = triton.cdiv(vocabulary, size)
    found = torch.empty(4, rows, blocks, dtype=torch.float32, device=logits_SV.device)
    # A temperature of 0 is never divided by, but has to be a number.
    inverse = 1.0 / temperature if temperature else 1.0
    greedy = temperature == 0
    _block_kernel[blocks, rows](
        logits_SV, logits_SV.stride(0), floor_S, inverse, *found,
        V=vocabulary, GREEDY=greedy, FILTERED=floor_S is not None, BLOCK=size, num_warps=8,
    )  # fmt: skip
    token_S = torch.empty(rows, dtype=torch.int64, device=logits_SV.device)
    logprob_S = torch.empty(rows, dtype=torch.float32, device=logits_SV.device)
    _pick_kernel[rows,](
        logits_SV, logits_SV.stride(0), floor_S, inverse, *found, seed_S, count_S, token_S,
        logprob_S, blocks, V=vocabulary, GREEDY=greedy, FILTERED=floor_S is not None, BLOCK=size,
        BLOCK_I=block(blocks), num_warps=8,
    )  # fmt: skip
    return token_S, logprob_S


def uniforms(seed_S: Tensor, count_S: Tensor) -> Tensor:
    """The uniform numbers in [0, 1) that `draw` draws with, in float64."""
    uniform_S = torch.empty(seed_S.shape, dtype=torch.float64, device=seed_S.device)
    size = seed_S.numel()
    _uniform_kernel[triton.cdiv(size, 128),](seed_S, count_S, uniform_S, size, BLOCK=128)
    return uniform_S


def floors(logits_SV: Tensor, temperature: float, filters: Filters) -> Tensor | None:
    """The smallest logit of each row that may be drawn, in float32; None where any may."""
    rows, vocabulary = logits_SV.shape
    top_k = filters.top_k if filters.top_k < vocabulary else 0
    filtered = top_k > 0 or filters.top_p < 1 or filters.min_p > 0
    if temperature == 0 or not filtered:
        return None
    # Of a bfloat16 the lower half of its float32 is 0.
    bits = 16 if logits_SV.dtype == torch.bfloat16 else 32
    floor_S = torch.empty(rows, dtype=torch.float32, device=logits_SV.device)
    _floor_kernel[rows,](
        logits_SV, logits_SV.stride(0), floor_S, 1.0 / temperature, top_k, filters.top_p,
        filters.min_p, V=vocabulary, BITS=bits, BY_COUNT=top_k > 0, BY_MASS=filters.top_p < 1,
        BY_SHARE=filters.min_p > 0, BLOCK=min(BLOCK, block(vocabulary)), num_warps=16,
    )  # fmt: skip
    return floor_S


@triton.jit
def _mix(z: tl.tensor) -> tl.tensor:
    """SplitMix64's output for a state (Steele et al. 2014), as a float64 in [0, 1)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    # Below 2^53: as a signed number it converts exactly, and in one instruction.
    return (z >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _uniform(seed: tl.tensor, count: tl.tensor) -> tl.tensor:
    """The uniform number at a position of a stream."""
    position = count.to(tl.uint64, bitcast=True) + 1
    return _mix(seed.to(tl.uint64, bitcast=True) + position * 0x9E3779B97F4A7C15)


@triton.jit
def _uniform_kernel(
    seed_ptr: tl.tensor,
    count_ptr: tl.tensor,
    uniform_ptr: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr + s, mask=s < size, other=0)
    count = tl.load(count_ptr + s, mask=s < size, other=0)
    tl.store(uniform_ptr + s, _uniform(seed, count), mask=s < size)


@triton.jit
def _weights(
    logit: tl.tensor, top: tl.tensor, inverse: tl.tensor, floor: tl.tensor, FILTERED: tl.constexpr
) -> tl.tensor:
    """What tokens are drawn in proportion to; 1 for the largest logit, 0 for what is left out."""
    weight = tl.exp((logit - top) * inverse)
    return tl.where(logit >= floor, weight, 0.0) if FILTERED else weight


@triton.jit
def _block_kernel(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    floor_ptr: tl.tensor,
    inverse: tl.tensor,
    top_ptr: tl.tensor,
    best_ptr: tl.tensor,
    model_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    V: tl.constexpr,
    GREEDY: tl.constexpr,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    v = tl.program_id(0) * BLOCK + i
    logit = tl.load(logits_ptr + row * row_stride + v, mask=v < V, other=float("-inf"))
    logit = logit.to(tl.float32)
    top = tl.max(logit, 0)
    safe = tl.maximum(top, -3.0e38)  # a block may have nothing but -inf
    at = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(top_ptr + at, top)
    tl.store(model_ptr + at, tl.sum(tl.exp(logit - safe), 0))
    if GREEDY:
        tl.store(best_ptr + at, tl.min(tl.where(logit == top, i, BLOCK - 1), 0).to(tl.float32))
    else:
        floor = tl.load(floor_ptr + row) if FILTERED else 0.0
        tl.store(weight_ptr + at, tl.sum(_weights(logit, safe, inverse, floor, FILTERED), 0))


@triton.jit
def _invert(weight: tl.tensor, target: tl.tensor, i: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """The first entry with any weight at which the running total exceeds `target`, or else the last
    one with any; and the total before it.

    Only entries with weight are asked: a parallel sum need not grow in every step.
    """
    total = tl.cumsum(weight, 0)
    some = weight > 0
    first = tl.min(tl.where(some & (total > target), i, BLOCK), 0)
    last = tl.max(tl.where(some, i, 0), 0)
    chosen = tl.minimum(first, last)
    return chosen, tl.sum(tl.where(i < chosen, weight, 0.0), 0)


@triton.jit
def _pick_kernel(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    floor_ptr: tl.tensor,
    inverse: tl.tensor,
    top_ptr: tl.tensor,
    best_ptr: tl.tensor,
    model_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    count_ptr: tl.tensor,
    token_ptr: tl.tensor,
    logprob_ptr: tl.tensor,
    blocks: tl.tensor,
    V: tl.constexpr,
    GREEDY: tl.constexpr,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    at = row * blocks + i
    inside = i < blocks
    tops = tl.load(top_ptr + at, mask=inside, other=float("-inf"))
    top = tl.max(tops, 0)
    model = tl.load(model_ptr + at, mask=inside, other=0.0) * tl.exp(tops - top)
    logits_ptr += row * row_stride
    if GREEDY:
        chosen = tl.min(tl.where(tops == top, i, blocks - 1), 0)
        token = chosen * BLOCK + tl.load(best_ptr + row * blocks + chosen).to(tl.int32)
    else:
        uniform = _uniform(tl.load(seed_ptr + row), tl.load(count_ptr + row)).to(tl.float32)
        floor = tl.load(floor_ptr + row) if FILTERED else 0.0
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
        weight *= tl.exp((tops - top) * inverse)
        target = uniform * tl.sum(weight, 0)
        chosen, before = _invert(weight, target, i, BLOCK_I)
        j = tl.arange(0, BLOCK)
        v = chosen * BLOCK + j
        logit = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        within = _weights(logit, top, inverse, floor, FILTERED)
        place, _ = _invert(within, target - before, j, BLOCK)
        token = chosen * BLOCK + place
    token = tl.minimum(token, V - 1)  # logits that are not numbers must not lead out of the row
    tl.store(token_ptr + row, token.to(tl.int64))
    logit = tl.load(logits_ptr + token).to(tl.float32)
    tl.store(logprob_ptr + row, logit - top - tl.log(tl.sum(model, 0)))


@triton.jit
def _keys(logit: tl.tensor) -> tl.tensor:
    """Integers in the order of the numbers, and its own inverse but for the types."""
    return tl.where(logit < 0, logit ^ 0x7FFFFFFF, logit)


@triton.jit
def _above(
    logits_ptr: tl.tensor,
    top: tl.tensor,
    inverse: tl.tensor,
    least: tl.tensor,
    V: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """How many tokens have at least this key, or what their weights sum to."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        weight = 1.0 if COUNT else tl.exp((logit - top) * inverse)
        key = _keys(logit.to(tl.int32, bitcast=True))
        total += tl.where((key >= least) & (v < V), weight, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _largest_key(
    logits_ptr: tl.tensor,
    top: tl.tensor,
    inverse: tl.tensor,
    wanted: tl.tensor,
    V: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The largest key such that tokens of at least it are, or weigh, at least `wanted`."""
    key = tl.full((), -(2**31), tl.int64)
    for bit in range(BITS):
        higher = key + (tl.full((), 1, tl.int64) << (31 - bit))
        least = higher.to(tl.int32)
        enough = _above(logits_ptr, top, inverse, least, V, COUNT, BLOCK) >= wanted
        key = tl.where(enough, higher, key)
    return key.to(tl.int32)


@triton.jit
def _floor_kernel(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    floor_ptr: tl.tensor,
    inverse: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    V: tl.constexpr,
    BITS: tl.constexpr,
    BY_COUNT: tl.constexpr,
    BY_MASS: tl.constexpr,
    BY_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(highest, logit)
    top = tl.max(highest, 0)
    key = tl.full((), -(2**31), tl.int32)
    if BY_COUNT:
        key = _largest_key(logits_ptr, top, inverse, top_k, V, BITS, True, BLOCK)
    if BY_MASS:
        wanted = top_p * _above(logits_ptr, top, inverse, key, V, False, BLOCK)
        key = tl.maximum(key, _largest_key(logits_ptr, top, inverse, wanted, V, BITS, False, BLOCK))
    floor = tl.full((), float("-inf"), tl.float32)
    if BY_COUNT or BY_MASS:
        floor = tl.minimum(_keys(key).to(tl.float32, bitcast=True), top)
    if BY_SHARE:
        floor = tl.maximum(floor, top + tl.log(min_p) / inverse)
    tl.store(floor_ptr + row, floor)
