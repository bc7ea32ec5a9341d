"""From logits to tokens without a sort: temperature alone, one random stream per row.

A row is read twice: for its maximum, then for the sums of exponentials, at the temperature and at
1, block by block. Only the block in which the inverted distribution ends is read once more.

Shapes: S rows, V vocabulary, J blocks of `BLOCK` tokens, T threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retort.ops.cpu.jit import exact, inner, kernel
from retort.ops.cpu.maths import exp, largest_of
from retort.ops.cpu.team import Team, share

F: Any = np.float32
U = np.uint64
Floats = NDArray[np.float32]
Whole = NDArray[np.int64]

BLOCK = 256


@kernel
def sample(
    logits_SV: Floats,
    seed_S: Whole,
    count_S: Whole,
    temperature: float,
    part_SJ: NDArray[np.float64],
    token_S: Whole,
    logprob_S: Floats,
    team: Team,
) -> None:
    """Draws a token for each row, and writes its log-probability under the model itself.

    The uniform number is number `count_S` of the stream of `seed_S`. Temperature 0 takes the
    likeliest token, and of several the first. A row with a NaN or an infinity among its logits
    gets token 0 and NaN. `part_SJ` is room for the sums of blocks.
    """
    arguments = (logits_SV, seed_S, count_S, F(temperature), part_SJ, token_S, logprob_S)
    share(_sample, arguments, logits_SV.shape[0], 8 * logits_SV.shape[1], team)


@kernel
def uniforms(seed_S: Whole, count_S: Whole, uniform_S: NDArray[np.float64]) -> None:
    """Writes the uniform numbers in [0, 1) that `sample` draws with."""
    for row in range(seed_S.size):
        uniform_S[row] = _uniform(seed_S[row], count_S[row])


@inner
def _sample(
    first: int,
    last: int,
    worker: int,
    logits_SV: Floats,
    seed_S: Whole,
    count_S: Whole,
    temperature: float,
    part_SJ: NDArray[np.float64],
    token_S: Whole,
    logprob_S: Floats,
) -> None:
    for row in range(first, last):
        logits_V, part_J = logits_SV[row], part_SJ[row]
        largest = largest_of(logits_V)
        if temperature == F(0):
            total = _sums(logits_V, largest, F(1), part_J)
            token = _first(logits_V, largest)
        else:
            total = _sums(logits_V, largest, F(1) / temperature, part_J)
            uniform = _uniform(seed_S[row], count_S[row])
            token = _invert(logits_V, largest, F(1) / temperature, part_J, uniform)
        if total != total:
            token = 0
        token_S[row] = token
        logprob_S[row] = (logits_V[token] - largest) - math.log(total)


@exact
def _uniform(seed: int, count: int) -> float:
    """SplitMix64 (Steele et al. 2014) of the seed advanced by the count."""
    z = U(seed) + (U(count) + U(1)) * U(0x9E3779B97F4A7C15)
    z = (z ^ (z >> U(30))) * U(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U(27))) * U(0x94D049BB133111EB)
    return float((z ^ (z >> U(31))) >> U(11)) * 2.0**-53


@inner
def _first(logits_V: Floats, largest: float) -> int:
    for v in range(logits_V.size):
        if logits_V[v] == largest:
            return v
    return 0


@inner
def _sums(logits_V: Floats, largest: float, inverse: float, part_J: NDArray[np.float64]) -> float:
    """Writes the sums of the blocks at a temperature; returns that of all tokens at 1."""
    total = 0.0
    for j in range(part_J.size):
        block_V = logits_V[j * BLOCK : (j + 1) * BLOCK]
        warm, plain = F(0), F(0)
        if inverse == F(1):
            for v in range(block_V.size):
                plain += exp(block_V[v] - largest)
            warm = plain
        else:
            for v in range(block_V.size):
                below = block_V[v] - largest
                plain += exp(below)
                warm += exp(below * inverse)
        part_J[j] = warm
        total += plain
    return total


@inner
def _invert(
    logits_V: Floats, largest: float, inverse: float, part_J: NDArray[np.float64], uniform: float
) -> int:
    """The token at which the share of the sum exceeds the uniform number."""
    threshold = uniform * part_J.sum()
    before, reached, block = 0.0, 0.0, 0
    for j in range(part_J.size):
        if part_J[j] > 0.0:
            before, block = reached, j
            reached += part_J[j]
            if reached > threshold:
                break
    start, token = block * BLOCK, block * BLOCK
    for v in range(start, min(start + BLOCK, logits_V.size)):
        weight = exp((logits_V[v] - largest) * inverse)
        if weight > F(0):
            token = v
            before += weight
            if before > threshold:
                break
    return token
