"""What is between the products of a block in training: norms, gates, rotations, and their
gradients.

One pass over the memory each. Rows may be further apart than they are wide: parts of a projection
are read where they are. A sum over rows is of blocks of rows, each summed by itself, so that it is
the same for any number of threads.

Shapes: S rows, D width, G groups of channels, R blocks of rows, T tokens, H heads. Numbers of rows
with a pitch are one vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from retort.ops.cpu.jit import inner, kernel
from retort.ops.cpu.maths import exp
from retort.ops.cpu.team import Team, share

F: Any = np.float32
D: Any = np.float64
U: Any = np.uintp  # of an index that cannot be negative: without a look whether it is
Floats = NDArray[np.float32]

BLOCK = 64
"""Rows that one sum is over."""


def blocks(rows: int) -> int:
    """Blocks that rows are in."""
    return -(-rows // BLOCK)


# ---------------------------------------------------------------- norms


@kernel
def norm(
    x: Floats, pitch: int, weight_D: Floats, eps: float, y: Floats, inverse_S: Floats, team: Team
) -> None:
    """Writes x / RMS(x) times the weight, and 1 / RMS(x)."""
    arguments = (x, pitch, weight_D, F(eps), y, inverse_S)
    share(_norm, arguments, inverse_S.size, 3 * weight_D.size, team)


@inner
def _norm(
    first: int,
    last: int,
    worker: int,
    x: Floats,
    pitch: int,
    weight_D: Floats,
    eps: float,
    y: Floats,
    inverse_S: Floats,
) -> None:
    width = weight_D.size
    for s in range(first, last):
        start, square = s * pitch, D(0)
        for d in range(width):
            square += D(x[U(start + d)]) * D(x[U(start + d)])
        scale = F(D(1) / np.sqrt(square / D(width) + D(eps)))
        inverse_S[U(s)] = scale
        for d in range(width):
            y[U(s * width + d)] = weight_D[U(d)] * (x[U(start + d)] * scale)


@kernel
def norm_backward(
    grad: Floats,
    grad_pitch: int,
    x: Floats,
    pitch: int,
    weight_D: Floats,
    inverse_S: Floats,
    of_x: Floats,
    of_weight_RD: Floats,
    team: Team,
) -> None:
    """Writes the gradient of x, and that of the weight to the first row of `of_weight_RD`."""
    arguments = (grad, grad_pitch, x, pitch, weight_D, inverse_S, of_x, of_weight_RD)
    share(_norm_backward, arguments, len(of_weight_RD), 5 * BLOCK * weight_D.size, team)
    _sum_blocks(of_weight_RD)


@inner
def _norm_backward(
    first: int,
    last: int,
    worker: int,
    grad: Floats,
    grad_pitch: int,
    x: Floats,
    pitch: int,
    weight_D: Floats,
    inverse_S: Floats,
    of_x: Floats,
    of_weight_RD: Floats,
) -> None:
    width = weight_D.size
    for r in range(first, last):
        for d in range(width):
            of_weight_RD[U(r), U(d)] = F(0)
        for s in range(r * BLOCK, min((r + 1) * BLOCK, inverse_S.size)):
            start, of_y, scale = s * pitch, s * grad_pitch, inverse_S[U(s)]
            shared = F(0)
            for d in range(width):
                shared += grad[U(of_y + d)] * weight_D[U(d)] * x[U(start + d)]
            shared = shared * scale * scale / F(width)
            for d in range(width):
                normed = grad[U(of_y + d)] * weight_D[U(d)]
                of_x[U(s * width + d)] = scale * (normed - x[U(start + d)] * shared)
            for d in range(width):
                of_weight_RD[U(r), U(d)] += grad[U(of_y + d)] * (x[U(start + d)] * scale)


@inner
def _sum_blocks(x_RD: Floats) -> None:
    """Adds all rows to the first, in order."""
    for r in range(1, len(x_RD)):
        for d in range(x_RD.shape[1]):
            x_RD[0, d] += x_RD[r, d]


# ---------------------------------------------------------------- gates


@kernel
def gate(
    gate: Floats, gate_pitch: int, x: Floats, pitch: int, width: int, y: Floats, team: Team
) -> None:
    """Writes silu(gate) * x."""
    share(_gate, (gate, gate_pitch, x, pitch, width, y), y.size // width, 4 * width, team)


@inner
def _gate(
    first: int,
    last: int,
    worker: int,
    gate: Floats,
    gate_pitch: int,
    x: Floats,
    pitch: int,
    width: int,
    y: Floats,
) -> None:
    for s in range(first, last):
        for d in range(width):
            z = gate[U(s * gate_pitch + d)]
            y[U(s * width + d)] = z / (F(1) + exp(-z)) * x[U(s * pitch + d)]


@kernel
def gate_backward(
    grad: Floats,
    grad_pitch: int,
    gate: Floats,
    gate_pitch: int,
    x: Floats,
    pitch: int,
    width: int,
    of_gate: Floats,
    of_x: Floats,
    team: Team,
) -> None:
    """Writes the gradients of the gate and of x."""
    arguments = (grad, grad_pitch, gate, gate_pitch, x, pitch, width, of_gate, of_x)
    share(_gate_backward, arguments, of_x.size // width, 6 * width, team)


@inner
def _gate_backward(
    first: int,
    last: int,
    worker: int,
    grad: Floats,
    grad_pitch: int,
    gate: Floats,
    gate_pitch: int,
    x: Floats,
    pitch: int,
    width: int,
    of_gate: Floats,
    of_x: Floats,
) -> None:
    for s in range(first, last):
        for d in range(width):
            z, of_y = gate[U(s * gate_pitch + d)], grad[U(s * grad_pitch + d)]
            part = F(1) / (F(1) + exp(-z))
            slope = part + z * part * (F(1) - part)
            of_gate[U(s * width + d)] = of_y * x[U(s * pitch + d)] * slope
            of_x[U(s * width + d)] = of_y * (z * part)


# ---------------------------------------------------------------- gates with a norm


@kernel
def gated_norm(
    y: Floats,
    y_pitch: int,
    x: Floats,
    x_pitch: int,
    gate: Floats,
    gate_pitch: int,
    skip_D: Floats,
    weight_D: Floats,
    eps: float,
    normed: Floats,
    inverse_SG: Floats,
    team: Team,
) -> None:
    """Writes (y + skip x) silu(gate), normalised over each group and weighted, and 1 / RMS."""
    arguments = (y, y_pitch, x, x_pitch, gate, gate_pitch, skip_D, weight_D, F(eps))
    items, width = len(inverse_SG), skip_D.size
    share(_gated_norm, (*arguments, normed, inverse_SG), items, 6 * width, team)


@inner
def _gated_norm(
    first: int,
    last: int,
    worker: int,
    y: Floats,
    y_pitch: int,
    x: Floats,
    x_pitch: int,
    gate: Floats,
    gate_pitch: int,
    skip_D: Floats,
    weight_D: Floats,
    eps: float,
    normed: Floats,
    inverse_SG: Floats,
) -> None:
    width, groups = skip_D.size, inverse_SG.shape[1]
    part = width // groups
    for s in range(first, last):
        for d in range(width):
            z = gate[U(s * gate_pitch + d)]
            sum_ = y[U(s * y_pitch + d)] + skip_D[U(d)] * x[U(s * x_pitch + d)]
            normed[U(s * width + d)] = sum_ * (z / (F(1) + exp(-z)))
        for g in range(groups):
            start = s * width + g * part
            square = _dot(normed, normed, start, part)
            scale = F(1) / np.sqrt(square / F(part) + eps)
            inverse_SG[U(s), U(g)] = scale
            for d in range(part):
                normed[U(start + d)] *= weight_D[U(g * part + d)] * scale


@inner
def _dot(x: Floats, y: Floats, start: int, count: int) -> float:
    """The sum of products, in eight sums: a group may be too short for the compiler's own."""
    a, b, c, d, e, f, g, h = F(0), F(0), F(0), F(0), F(0), F(0), F(0), F(0)
    whole = count // 8 * 8
    for i in range(start, start + whole, 8):
        a += x[U(i)] * y[U(i)]
        b += x[U(i + 1)] * y[U(i + 1)]
        c += x[U(i + 2)] * y[U(i + 2)]
        d += x[U(i + 3)] * y[U(i + 3)]
        e += x[U(i + 4)] * y[U(i + 4)]
        f += x[U(i + 5)] * y[U(i + 5)]
        g += x[U(i + 6)] * y[U(i + 6)]
        h += x[U(i + 7)] * y[U(i + 7)]
    for i in range(start + whole, start + count):
        a += x[U(i)] * y[U(i)]
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@kernel
def gated_norm_backward(
    grad: Floats,
    grad_pitch: int,
    y: Floats,
    y_pitch: int,
    x: Floats,
    x_pitch: int,
    gate: Floats,
    gate_pitch: int,
    skip_D: Floats,
    weight_D: Floats,
    inverse_SG: Floats,
    of_y: Floats,
    of_x: Floats,
    of_gate: Floats,
    of_vectors_R2D: Floats,
    team: Team,
) -> None:
    """Writes the gradients of y, x and the gate, and those of the skip and of the weight, one
    behind the other, to the first of `of_vectors_R2D`.
    """
    rows = (grad, grad_pitch, y, y_pitch, x, x_pitch, gate, gate_pitch)
    arguments = (*rows, skip_D, weight_D, inverse_SG, of_y, of_x, of_gate, of_vectors_R2D)
    items, width = len(of_vectors_R2D), skip_D.size
    share(_gated_norm_backward, arguments, items, 12 * BLOCK * width, team)
    _sum_blocks(of_vectors_R2D.reshape(items, 2 * width))


@inner
def _gated_norm_backward(
    first: int,
    last: int,
    worker: int,
    grad: Floats,
    grad_pitch: int,
    y: Floats,
    y_pitch: int,
    x: Floats,
    x_pitch: int,
    gate: Floats,
    gate_pitch: int,
    skip_D: Floats,
    weight_D: Floats,
    inverse_SG: Floats,
    of_y: Floats,
    of_x: Floats,
    of_gate: Floats,
    of_vectors_R2D: Floats,
) -> None:
    width, groups = skip_D.size, inverse_SG.shape[1]
    part = width // groups
    sum_D, open_D, slope_D = np.empty(width, F), np.empty(width, F), np.empty(width, F)
    normed_D, of_normed_D = np.empty(width, F), np.empty(width, F)
    for r in range(first, last):
        of_vectors_R2D[r] = F(0)
        for s in range(r * BLOCK, min((r + 1) * BLOCK, len(inverse_SG))):
            for d in range(width):
                z = gate[U(s * gate_pitch + d)]
                share_ = F(1) / (F(1) + exp(-z))
                open_D[U(d)] = z * share_
                slope_D[U(d)] = share_ + z * share_ * (F(1) - share_)
            for d in range(width):
                sum_D[U(d)] = y[U(s * y_pitch + d)] + skip_D[U(d)] * x[U(s * x_pitch + d)]
            for d in range(width):
                of_normed_D[U(d)] = grad[U(s * grad_pitch + d)] * weight_D[U(d)]
            for g in range(groups):
                scale = inverse_SG[U(s), U(g)]
                for d in range(g * part, (g + 1) * part):
                    normed_D[U(d)] = sum_D[U(d)] * open_D[U(d)] * scale
                shared = _dot(of_normed_D, normed_D, g * part, part) / F(part)
                for d in range(g * part, (g + 1) * part):
                    of_normed_D[U(d)] = scale * (of_normed_D[U(d)] - normed_D[U(d)] * shared)
            for d in range(width):
                of_vectors_R2D[U(r), U(1), U(d)] += grad[U(s * grad_pitch + d)] * normed_D[U(d)]
            for d in range(width):
                of_gate[U(s * width + d)] = of_normed_D[U(d)] * sum_D[U(d)] * slope_D[U(d)]
            for d in range(width):
                sum_D[U(d)] = of_normed_D[U(d)] * open_D[U(d)]
            for d in range(width):
                of_y[U(s * width + d)] = sum_D[U(d)]
                of_x[U(s * width + d)] = sum_D[U(d)] * skip_D[U(d)]
            for d in range(width):
                of_vectors_R2D[U(r), U(0), U(d)] += sum_D[U(d)] * x[U(s * x_pitch + d)]


# ---------------------------------------------------------------- rotations


@kernel
def rotate(
    x: Floats, pitch: int, cos_TD: Floats, sin_TD: Floats, sign: float, y_SHD: Floats, team: Team
) -> None:
    """Writes x with each pair of a head's channels, d and d + D/2, turned by the angle of its
    token, times `sign`; the rows of cosines and sines are gone through again and again.
    """
    heads, width = y_SHD.shape[1], y_SHD.shape[2]
    share(_rotate, (x, pitch, cos_TD, sin_TD, F(sign), y_SHD), len(y_SHD), 2 * heads * width, team)


@inner
def _rotate(
    first: int,
    last: int,
    worker: int,
    x: Floats,
    pitch: int,
    cos_TD: Floats,
    sin_TD: Floats,
    sign: float,
    y_SHD: Floats,
) -> None:
    heads, width = y_SHD.shape[1:]
    half = width // 2
    for s in range(first, last):
        t = s % len(cos_TD)
        for h in range(heads):
            start = s * pitch + h * width
            for d in range(half):
                one, two = x[U(start + d)], x[U(start + half + d)]
                cos, sin = cos_TD[U(t), U(d)], sin_TD[U(t), U(d)] * sign
                y_SHD[U(s), U(h), U(d)] = one * cos - two * sin
                y_SHD[U(s), U(h), U(half + d)] = two * cos + one * sin
