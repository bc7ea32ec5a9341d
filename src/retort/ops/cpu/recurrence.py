"""What the state-space kernels share: the convolution's step, and the state's.

The convolution's past inputs lie in a ring: the input of position t in place t mod W, so that
nothing is shifted. States are kept as [N, P], so that the channels of a head, which all do the
same, lie side by side.

Shapes: E channels, W past inputs (taps less one), K taps, P head channels, N state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.core.typing.templates import Signature
from numpy.typing import NDArray

from retort.ops.cpu import vectors as vector
from retort.ops.cpu.jit import generated, inner
from retort.ops.cpu.maths import silu
from retort.ops.cpu.vectors import FAST, LANES, WORD

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
    width, first = x_P.size, 0
    while width - first >= 4 * LANES:
        _update_4(state_NP, x_P, b_N, c_N, decay, scale, skip, y_P, first)
        first += 4 * LANES
    while width - first >= LANES:
        _update_1(state_NP, x_P, b_N, c_N, decay, scale, skip, y_P, first)
        first += LANES
    for p in range(first, width):
        y_P[p] = skip * x_P[p]
    for n in range(b_N.size):
        b, c = scale * b_N[n], c_N[n]
        for p in range(first, width):
            s = decay * state_NP[n, p] + b * x_P[p]
            state_NP[n, p] = s
            y_P[p] += c * s


def _update_of(vectors: int) -> Any:
    """`update` of so many vectors' columns, whose x and y stay in registers meanwhile."""

    def columns(
        typing: Any,
        state_NP: Any,
        x_P: Any,
        b_N: Any,
        c_N: Any,
        decay: Any,
        scale: Any,
        skip: Any,
        y_P: Any,
        first: Any,
    ) -> tuple[Signature, Callable[..., Any]]:
        numbers = types.float32, types.float32, types.float32
        signature = types.void(state_NP, x_P, b_N, c_N, *numbers, y_P, types.int64)

        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            kinds = signature.args
            state, x, b, c, y = (
                vector.start_of(context, builder, kinds[i], args[i]) for i in (0, 1, 2, 3, 7)
            )
            states, width = vector.lengths_of(context, builder, kinds[0], args[0])
            decay, scale, skip, first = args[4], args[5], args[6], args[8]
            places = [builder.add(first, WORD(i * LANES)) for i in range(vectors)]
            x_V = [vector.load(builder, x, place) for place in places]
            decays, skips = vector.splat(builder, decay), vector.splat(builder, skip)

            def step(n: Any, y_V: list[Any]) -> list[Any]:
                added = builder.fmul(scale, builder.load(builder.gep(b, [n])))
                b_V, c_V = (
                    vector.splat(builder, each)
                    for each in (added, builder.load(builder.gep(c, [n])))
                )
                result = []
                for place, x_L, y_L in zip(places, x_V, y_V, strict=True):
                    offset = builder.add(builder.mul(n, width), place)
                    ahead = builder.add(offset, builder.mul(width, WORD(AHEAD)))
                    vector.fetch(builder, state, ahead)
                    kept = builder.fmul(decays, vector.load(builder, state, offset), flags=FAST)
                    s = vector.fused(builder, b_V, x_L, kept)
                    vector.store(builder, s, state, offset)
                    result.append(vector.fused(builder, c_V, s, y_L))
                return result

            skipped = [builder.fmul(skips, x_L, flags=FAST) for x_L in x_V]
            y_V = vector.loop(builder, states, skipped, step)
            for place, y_L in zip(places, y_V, strict=True):
                vector.store(builder, y_L, y, place)
            return context.get_dummy_value()

        return signature, generate

    return generated(columns)


_update_4, _update_1 = _update_of(4), _update_of(1)
