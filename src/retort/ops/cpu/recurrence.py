"""What the state-space kernels share: the convolution's step, and the state's.

The convolution's past inputs lie in a ring: the input of position t in place t mod W, so that
nothing is shifted. States are kept as [N, P], so that the channels of a head, which all do the
same, lie side by side.

Shapes: E channels, W past inputs (taps less one), K taps, P head channels, N state.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retort.ops.cpu.jit import inner
from retort.ops.cpu.maths import silu
from retort.ops.cpu.storage import fetch_ahead

F = np.float32
Floats = NDArray[np.float32]

AHEAD = 16
"""Rows of a state."""


@inner
def convolve(
    x_E: Floats,
    weight_KE: Floats,
    bias_E: Floats,
    past_WE: Floats,
    position: int,
    first: int,
    last: int,
) -> None:
    """Overwrites some of the inputs with the outputs, and puts the inputs into the ring."""
    past = past_WE.shape[0]
    part_E, bias_E = x_E[first:last], bias_E[first:last]
    now_E = weight_KE[past, first:last]
    if past == 0:
        for e in range(part_E.size):
            part_E[e] = bias_E[e] + now_E[e] * part_E[e]
        return
    place = position % past
    oldest_E, then_E = past_WE[place, first:last], weight_KE[0, first:last]
    for e in range(part_E.size):
        x = part_E[e]
        part_E[e] = bias_E[e] + now_E[e] * x + then_E[e] * oldest_E[e]
        oldest_E[e] = x
    for k in range(1, past):
        before_E = past_WE[(place + k) % past, first:last]
        then_E = weight_KE[k, first:last]
        for e in range(part_E.size):
            part_E[e] += then_E[e] * before_E[e]


@inner
def activate(x_E: Floats, first: int, last: int) -> None:
    """silu, in place."""
    part_E = x_E[first:last]
    for e in range(part_E.size):
        part_E[e] = silu(part_E[e])


@inner
def update(
    state_NP: Floats,
    x_P: Floats,
    b_N: Floats,
    c_N: Floats,
    decay: float,
    scale: float,
    skip: float,
    y_P: Floats,
) -> None:
    """S = decay S + scale b x^T, in place, and y = S^T c + skip x."""
    for p in range(x_P.size):
        y_P[p] = skip * x_P[p]
    # One state at a time: for several the compiler cannot tell that none overlaps another.
    for n in range(b_N.size):
        state_P, b, c = state_NP[n], scale * b_N[n], c_N[n]
        fetch_ahead(state_P, AHEAD)
        for p in range(x_P.size):
            s = decay * state_P[p] + b * x_P[p]
            state_P[p] = s
            y_P[p] += c * s
