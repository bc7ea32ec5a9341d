"""The causal depthwise convolution over whole rows, and its gradients.

One pass over the memory each, where torch needs several for every tap.

Shapes: B batch, T time, E channels, K taps. Numbers of rows with a pitch are one vector; `before`
inputs of each row are in front of those of its tokens, and zeros in front of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.core.typing.templates import Signature
from numpy.typing import NDArray

from retort.ops.cpu import vectors as vector
from retort.ops.cpu.jit import generated, inner, kernel
from retort.ops.cpu.maths import exp
from retort.ops.cpu.team import Team, share
from retort.ops.cpu.vectors import LANES, WORD

BLOCK = 64
"""Tokens whose contributions to a weight's gradient are summed before they join the rest, so that
long rows lose no precision."""

TOGETHER = 256
"""Channels that one thread has in the backward pass."""

F: Any = np.float32
U: Any = np.uintp  # of an index that cannot be negative: without a look whether it is
Floats = NDArray[np.float32]
Whole = NDArray[np.int64]


@kernel
def scan(
    x: Floats,
    pitch: int,
    before: int,
    weight: Floats,
    bias_E: Floats,
    document_BT: Whole,
    activated: bool,
    y: Floats,
    team: Team,
) -> None:
    """Writes the outputs, or silu of them; taps that would reach into another document read
    zeros.
    """
    arguments = (x, pitch, before, weight, bias_E, document_BT, activated, y)
    share(_scan, arguments, document_BT.size, 2 * weight.size, team)


@inner
def _scan(
    first: int,
    last: int,
    worker: int,
    x: Floats,
    pitch: int,
    before: int,
    weight: Floats,
    bias_E: Floats,
    document_BT: Whole,
    activated: bool,
    y: Floats,
) -> None:
    length, channels = document_BT.shape[1], bias_E.size
    for token in range(first, last):
        b, t = token // length, token % length
        row = token + (b + 1) * before
        for e in range(channels):
            y[U(token * channels + e)] = bias_E[U(e)]
        place = row * pitch
        _add_taps(
            x, place, pitch, before, weight, 0, channels, document_BT, b, t, channels, y, token
        )
        if activated:
            for e in range(channels):
                sum_ = y[U(token * channels + e)]
                y[U(token * channels + e)] = sum_ / (F(1) + exp(-sum_))


@inner
def _add_taps(
    x: Floats,
    place: int,
    pitch: int,
    before: int,
    weight: Floats,
    channel: int,
    channels: int,
    document_BT: Whole,
    b: int,
    t: int,
    width: int,
    y: Floats,
    row: int,
) -> None:
    """Adds the taps of a token, whose inputs are at `place`, to a row of y: those of `width`
    channels from `channel` on.
    """
    taps = weight.size // channels
    for back in range(min(taps - 1, t + before) + 1):
        if document_BT[b, max(t - back, 0)] == document_BT[b, t]:
            tap = taps - 1 - back
            start = tap * channels + channel
            _add_products(x, place - back * pitch, weight, start, y, row * width, width)


@inner
def _add_products(
    x: Floats, x_start: int, y: Floats, y_start: int, sum_: Floats, sum_start: int, count: int
) -> None:
    """Adds products of so many numbers behind the starts of two arrays to a third."""
    _add_vectors(x, x_start, y, y_start, sum_, sum_start, count)
    for i in range(count // LANES * LANES, count):
        sum_[U(sum_start + i)] += x[U(x_start + i)] * y[U(y_start + i)]


@generated
def _add_vectors(
    typing: Any, x: Any, x_start: Any, y: Any, y_start: Any, sum_: Any, sum_start: Any, count: Any
) -> tuple[Signature, Callable[..., Any]]:
    """`_add_products` of whole vectors."""
    number = types.int64
    signature = types.void(x, number, y, number, sum_, number, number)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        kinds = signature.args
        x, y, total = (vector.start_of(context, builder, kinds[i], args[i]) for i in (0, 2, 4))

        def step(i: Any, _: list[Any]) -> list[Any]:
            skipped = builder.mul(i, WORD(LANES))
            x_L = vector.load(builder, x, builder.add(args[1], skipped))
            y_L = vector.load(builder, y, builder.add(args[3], skipped))
            place = builder.add(args[5], skipped)
            found_L = vector.fused(builder, x_L, y_L, vector.load(builder, total, place))
            vector.store(builder, found_L, total, place)
            return []

        vector.loop(builder, builder.udiv(args[6], WORD(LANES)), [], step)
        return context.get_dummy_value()

    return signature, generate


@kernel
def scan_backward(
    grad: Floats,
    grad_pitch: int,
    x: Floats,
    pitch: int,
    before: int,
    weight: Floats,
    bias_E: Floats,
    document_BT: Whole,
    activated: bool,
    of_x: Floats,
    of_vectors_KE: Floats,
    team: Team,
) -> None:
    """Writes the gradients of the inputs, of the weights, and behind these of the bias."""
    channels = bias_E.size
    taps = weight.size // channels
    arguments = (grad, grad_pitch, x, pitch, before, weight, bias_E, document_BT, activated)
    items, cost = -(-channels // TOGETHER), 4 * taps * document_BT.size * min(channels, TOGETHER)
    share(_scan_backward, (*arguments, of_x, of_vectors_KE), items, cost, team)


@inner
def _scan_backward(
    first: int,
    last: int,
    worker: int,
    grad: Floats,
    grad_pitch: int,
    x: Floats,
    pitch: int,
    before: int,
    weight: Floats,
    bias_E: Floats,
    document_BT: Whole,
    activated: bool,
    of_x: Floats,
    of_vectors_KE: Floats,
) -> None:
    batch, length = document_BT.shape
    channels = bias_E.size
    taps = weight.size // channels
    rows_ = length + before
    part, sum_E = np.empty((taps + 1) * TOGETHER, F), np.empty(TOGETHER, F)
    for item in range(first, last):
        channel = item * TOGETHER
        width = min(TOGETHER, channels - channel)
        of_vectors_KE[:, channel : channel + width] = F(0)
        part[:] = F(0)
        for b in range(batch):
            for row in range(b * rows_, (b + 1) * rows_):
                for e in range(width):
                    of_x[U(row * channels + channel + e)] = F(0)
            for t in range(length):
                place = (b * (length + before) + before + t) * pitch + channel
                of_y = (b * length + t) * grad_pitch + channel
                if activated:
                    for e in range(width):
                        sum_E[U(e)] = bias_E[U(channel + e)]
                    inputs = (x, place, pitch, before, weight, channel, channels)
                    _add_taps(*inputs, document_BT, b, t, width, sum_E, 0)
                    for e in range(width):
                        sum_ = sum_E[U(e)]
                        open_ = F(1) / (F(1) + exp(-sum_))
                        slope = open_ + sum_ * open_ * (F(1) - open_)
                        sum_E[U(e)] = grad[U(of_y + e)] * slope
                else:
                    for e in range(width):
                        sum_E[U(e)] = grad[U(of_y + e)]
                for e in range(width):
                    part[U(taps * TOGETHER + e)] += sum_E[U(e)]
                for back in range(min(taps - 1, t + before) + 1):
                    if document_BT[b, max(t - back, 0)] == document_BT[b, t]:
                        tap, row = taps - 1 - back, before + t - back
                        place_x, start = place - back * pitch, tap * channels + channel
                        found = (b * rows_ + row) * channels + channel
                        _add_products(sum_E, 0, x, place_x, part, tap * TOGETHER, width)
                        _add_products(sum_E, 0, weight, start, of_x, found, width)
                if t % BLOCK == BLOCK - 1 or t == length - 1:
                    for k in range(taps + 1):
                        for e in range(width):
                            of_vectors_KE[U(k), U(channel + e)] += part[U(k * TOGETHER + e)]
                            part[U(k * TOGETHER + e)] = F(0)
