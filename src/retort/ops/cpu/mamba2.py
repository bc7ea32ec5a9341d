"""A token of the two Mamba-2 mixers, from behind their first projection to before their last.

Shapes: S rows, E inner width, F conv channels (x, B and C), G groups, H heads, P head channels,
N state, W past inputs of the convolution, K = W + 1 taps, C channels of the projection.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retort.ops.cpu.jit import inner, kernel
from retort.ops.cpu.maths import exp, silu, softplus
from retort.ops.cpu.norms import inverse_rms
from retort.ops.cpu.recurrence import activate, convolve, update
from retort.ops.cpu.team import Team, share

F = np.float32
Floats = NDArray[np.float32]


@kernel
def stock(
    projected_SC: Floats,
    weight_KF: Floats,
    bias_F: Floats,
    dt_bias_H: Floats,
    rate_H: Floats,
    skip_H: Floats,
    norm_E: Floats,
    eps: float,
    length_S: NDArray[np.int64],
    past_SWF: Floats,
    state_SHNP: Floats,
    groups: int,
    y_SE: Floats,
    rows: int,
    team: Team,
) -> None:
    """Writes the normed, gated outputs y_SE of the first rows, whose states go on.

    A row has read `length_S` tokens before this one; `rate_H` is A. The projection, z | x B C | dt,
    is overwritten.
    """
    arguments = (
        projected_SC,
        weight_KF,
        bias_F,
        dt_bias_H,
        rate_H,
        skip_H,
        norm_E,
        F(eps),
        length_S,
        past_SWF,
        state_SHNP,
        groups,
        y_SE,
    )
    share(_stock, arguments, rows * groups, state_SHNP[0].size // groups, team)


@kernel
def discrete(
    projected_SC: Floats,
    weight_KF: Floats,
    bias_F: Floats,
    gate_bias_E: Floats,
    skip_H: Floats,
    length_S: NDArray[np.int64],
    past_SWF: Floats,
    state_SHNP: Floats,
    groups: int,
    y_SE: Floats,
    rows: int,
    team: Team,
) -> None:
    """Writes the gated outputs y_SE of the first rows, whose states go on.

    The projection, x B C | z | a, is overwritten.
    """
    arguments = (
        projected_SC,
        weight_KF,
        bias_F,
        gate_bias_E,
        skip_H,
        length_S,
        past_SWF,
        state_SHNP,
        groups,
        y_SE,
    )
    share(_discrete, arguments, rows * groups, state_SHNP[0].size // groups, team)


@inner
def _stock(
    first: int,
    last: int,
    worker: int,
    projected_SC: Floats,
    weight_KF: Floats,
    bias_F: Floats,
    dt_bias_H: Floats,
    rate_H: Floats,
    skip_H: Floats,
    norm_E: Floats,
    eps: float,
    length_S: NDArray[np.int64],
    past_SWF: Floats,
    state_SHNP: Floats,
    groups: int,
    y_SE: Floats,
) -> None:
    """An item is a group of a row: its heads share B, C and the norm."""
    inner_width, conv_width = y_SE.shape[1], bias_F.size
    _, heads, states, width = state_SHNP.shape
    each, wide = heads // groups, inner_width // groups
    for item in range(first, last):
        row, group = item // groups, item % groups
        xbc_F = projected_SC[row, inner_width : inner_width + conv_width]
        dt_H = projected_SC[row, inner_width + conv_width :]
        position, past_WF = length_S[row], past_SWF[row]
        for low, high in _parts(group, wide, states, groups):
            convolve(xbc_F, weight_KF, bias_F, past_WF, position, low, high)
            activate(xbc_F, low, high)
        b_N, c_N = _shared(xbc_F, group, inner_width, states, groups)
        for h in range(group * each, (group + 1) * each):
            dt = softplus(dt_H[h] + dt_bias_H[h])
            x_P = xbc_F[h * width : (h + 1) * width]
            y_P = y_SE[row, h * width : (h + 1) * width]
            update(state_SHNP[row, h], x_P, b_N, c_N, exp(dt * rate_H[h]), dt, skip_H[h], y_P)
        z_E = projected_SC[row, group * wide : (group + 1) * wide]
        y_E = y_SE[row, group * wide : (group + 1) * wide]
        for e in range(wide):
            y_E[e] *= silu(z_E[e])
        scale, weight_E = inverse_rms(y_E, eps), norm_E[group * wide : (group + 1) * wide]
        for e in range(wide):
            y_E[e] = weight_E[e] * (y_E[e] * scale)


@inner
def _discrete(
    first: int,
    last: int,
    worker: int,
    projected_SC: Floats,
    weight_KF: Floats,
    bias_F: Floats,
    gate_bias_E: Floats,
    skip_H: Floats,
    length_S: NDArray[np.int64],
    past_SWF: Floats,
    state_SHNP: Floats,
    groups: int,
    y_SE: Floats,
) -> None:
    """An item is a group of a row: its heads share B and C."""
    inner_width, conv_width = y_SE.shape[1], bias_F.size
    _, heads, states, width = state_SHNP.shape
    each, wide = heads // groups, inner_width // groups
    for item in range(first, last):
        row, group = item // groups, item % groups
        xbc_F = projected_SC[row, :conv_width]
        z_E = projected_SC[row, conv_width : conv_width + inner_width]
        a_H = projected_SC[row, conv_width + inner_width :]
        for low, high in _parts(group, wide, states, groups):
            convolve(xbc_F, weight_KF, bias_F, past_SWF[row], length_S[row], low, high)
        b_N, c_N = _shared(xbc_F, group, inner_width, states, groups)
        for h in range(group * each, (group + 1) * each):
            decay = F(1) / (F(1) + exp(a_H[h]))  # exp(-softplus(a))
            x_P = xbc_F[h * width : (h + 1) * width]
            y_P = y_SE[row, h * width : (h + 1) * width]
            update(state_SHNP[row, h], x_P, b_N, c_N, decay, F(1), skip_H[h], y_P)
        low, high = group * wide, (group + 1) * wide
        y_E, gate_E, open_E = y_SE[row, low:high], z_E[low:high], gate_bias_E[low:high]
        for e in range(wide):
            y_E[e] *= silu(gate_E[e] + open_E[e])


@inner
def _parts(
    group: int, wide: int, states: int, groups: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Where a group's x, B and C lie among the channels of the convolution."""
    b = (groups * wide) + group * states
    c = b + groups * states
    return (group * wide, (group + 1) * wide), (b, b + states), (c, c + states)


@inner
def _shared(
    xbc_F: Floats, group: int, inner_width: int, states: int, groups: int
) -> tuple[Floats, Floats]:
    """B and C of a group."""
    b = inner_width + group * states
    c = b + groups * states
    return xbc_F[b : b + states], xbc_F[c : c + states]
