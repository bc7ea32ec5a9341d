"""A token of MambaInLlama's Mamba-1 mixer, between its projections.

Shapes: S rows, E inner width, H heads of P = N channels with a state of N for each, W past inputs
of the convolution, K = W + 1 taps, C channels of the projection.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retort.ops.cpu.jit import inner, kernel
from retort.ops.cpu.maths import exp, silu, softplus
from retort.ops.cpu.recurrence import activate, convolve
from retort.ops.cpu.team import Team, share

F = np.float32
Floats = NDArray[np.float32]
Whole = NDArray[np.int64]


@kernel
def selective(
    projected_SC: Floats,
    dt_SE: Floats,
    source_E: Whole,
    shared: int,
    weight_KE: Floats,
    bias_E: Floats,
    dt_bias_E: Floats,
    rate_HNP: Floats,
    skip_E: Floats,
    length_S: Whole,
    past_SWE: Floats,
    state_SHNP: Floats,
    x_SE: Floats,
    y_SE: Floats,
    rows: int,
    team: Team,
) -> None:
    """Writes the gated outputs y_SE of the first rows, whose states go on.

    The projection is z | x | B | C | ..., with `shared` channels of x and of B, of which channel e
    reads `source_E`. `dt_SE` is dt before its bias, and is overwritten, and `rate_HNP` is A.
    """
    arguments = (
        projected_SC,
        dt_SE,
        source_E,
        shared,
        weight_KE,
        bias_E,
        dt_bias_E,
        rate_HNP,
        skip_E,
        length_S,
        past_SWE,
        state_SHNP,
        x_SE,
        y_SE,
    )
    share(_selective, arguments, rows, 4 * state_SHNP[0].size, team)


@inner
def _selective(
    first: int,
    last: int,
    worker: int,
    projected_SC: Floats,
    dt_SE: Floats,
    source_E: Whole,
    shared: int,
    weight_KE: Floats,
    bias_E: Floats,
    dt_bias_E: Floats,
    rate_HNP: Floats,
    skip_E: Floats,
    length_S: Whole,
    past_SWE: Floats,
    state_SHNP: Floats,
    x_SE: Floats,
    y_SE: Floats,
) -> None:
    """An item is a row."""
    width = y_SE.shape[1]
    heads, states, _ = rate_HNP.shape
    for row in range(first, last):
        z_E = projected_SC[row, :width]
        b_X = projected_SC[row, width + shared : width + 2 * shared]
        c_E = projected_SC[row, width + 2 * shared : 2 * width + 2 * shared]
        x_E, dt_E, y_E = x_SE[row], dt_SE[row], y_SE[row]
        for e in range(width):
            x_E[e] = projected_SC[row, width + source_E[e]]
            dt_E[e] = softplus(dt_E[e] + dt_bias_E[e])
        convolve(x_E, weight_KE, bias_E, past_SWE[row], length_S[row], 0, width)
        activate(x_E, 0, width)
        for e in range(width):
            y_E[e] = skip_E[e] * x_E[e]
        for h in range(heads):
            low, high = h * states, (h + 1) * states
            part = x_E[low:high], dt_E[low:high], y_E[low:high]
            _update(state_SHNP[row, h], rate_HNP[h], *part, b_X, source_E[low:high], c_E[low:high])
        for e in range(width):
            y_E[e] *= silu(z_E[e])


@inner
def _update(
    state_NP: Floats,
    rate_NP: Floats,
    x_P: Floats,
    dt_P: Floats,
    y_P: Floats,
    b_X: Floats,
    source_N: Whole,
    c_N: Floats,
) -> None:
    """S = exp(dt A) S + b (dt x)^T, in place, and y += S^T c."""
    for n in range(c_N.size):
        state_P, rate_P, b, c = state_NP[n], rate_NP[n], b_X[source_N[n]], c_N[n]
        for p in range(x_P.size):
            s = exp(dt_P[p] * rate_P[p]) * state_P[p] + b * (dt_P[p] * x_P[p])
            state_P[p] = s
            y_P[p] += c * s
