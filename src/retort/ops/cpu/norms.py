"""What is between the products of a block: norms, residual sums, and the gate of the MLP.

Shapes: S rows, D model width, I the MLP's width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retort.ops.cpu.jit import inner, kernel
from retort.ops.cpu.maths import silu
from retort.ops.cpu.team import Team, share

F = np.float32
Floats = NDArray[np.float32]


@kernel
def norm(
    h_SD: Floats, weight_D: Floats, eps: float, normed_SD: Floats, rows: int, team: Team
) -> None:
    """Writes h / RMS(h) times the weight, of the first rows."""
    share(_norm, (h_SD, weight_D, F(eps), normed_SD), rows, 2 * h_SD.shape[1], team)


@kernel
def add_norm(
    h_SD: Floats,
    y_SD: Floats,
    weight_D: Floats,
    eps: float,
    normed_SD: Floats,
    rows: int,
    team: Team,
) -> None:
    """Adds y to the residual h, in place, and writes the norm of the sum."""
    arguments = (h_SD, y_SD, weight_D, F(eps), normed_SD)
    share(_add_norm, arguments, rows, 3 * h_SD.shape[1], team)


@kernel
def gate(both_SI: Floats, gated_SI: Floats, rows: int, team: Team) -> None:
    """Writes silu(gate) * up; the two lie one behind the other in a row of `both_SI`."""
    share(_gate, (both_SI, gated_SI), rows, 4 * gated_SI.shape[1], team)


@inner
def _norm(
    first: int,
    last: int,
    worker: int,
    h_SD: Floats,
    weight_D: Floats,
    eps: float,
    normed_SD: Floats,
) -> None:
    for row in range(first, last):
        _norm_row(h_SD[row], weight_D, eps, normed_SD[row])


@inner
def _add_norm(
    first: int,
    last: int,
    worker: int,
    h_SD: Floats,
    y_SD: Floats,
    weight_D: Floats,
    eps: float,
    normed_SD: Floats,
) -> None:
    for row in range(first, last):
        h_D, y_D = h_SD[row], y_SD[row]
        for d in range(h_D.size):
            h_D[d] += y_D[d]
        _norm_row(h_D, weight_D, eps, normed_SD[row])


@inner
def _norm_row(h_D: Floats, weight_D: Floats, eps: float, normed_D: Floats) -> None:
    scale = inverse_rms(h_D, eps)
    for d in range(h_D.size):
        normed_D[d] = weight_D[d] * (h_D[d] * scale)


@inner
def inverse_rms(x_D: Floats, eps: float) -> float:
    """1 / sqrt(mean(x^2) + eps)."""
    square = F(0)
    for d in range(x_D.size):
        square += x_D[d] * x_D[d]
    return F(1) / np.sqrt(square / F(x_D.size) + eps)


@inner
def _gate(first: int, last: int, worker: int, both_SI: Floats, gated_SI: Floats) -> None:
    width = gated_SI.shape[1]
    for row in range(first, last):
        gate_I, up_I = both_SI[row, :width], both_SI[row, width:]
        gated_I = gated_SI[row]
        for i in range(width):
            gated_I[i] = silu(gate_I[i]) * up_I[i]
