"""The product of some rows with weights, as a decode step needs it: few rows, and the same weights
again and again.

Weights are laid out once, in panels of as many columns as a vector holds, so that a product reads
them in the order in which they lie. A tile of it, some rows times one panel, stays in registers.
Panels are in bfloat16 where that holds the weights exactly, as it does those of most published
models: with few rows a product takes as long as the weights take to be read, and these are half as
many bytes. The sums are the same, in float32, to the last bit.
The sums of a row do not depend on how many rows there are. torch.mm is the plain version.

Shapes: S rows, I inputs, O outputs, C panels, L = LANES columns of a panel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core.typing.templates import Signature
from numpy.typing import NDArray
from torch import Tensor

from retort.ops.cpu import vectors as vector
from retort.ops.cpu.jit import generated, inner, kernel
from retort.ops.cpu.team import Team, share
from retort.ops.cpu.vectors import LANES, WORD

Floats = NDArray[np.float32]
Panel = NDArray[Any]
"""float32, or bfloat16 as its bits."""

ROWS = 6
"""Of a tile: with AVX2 its sums take 12 of the 16 registers, and a product's parts the others."""

CHECKED = 1 << 20
"""Weights at a time, so that what is made of them stays in a cache."""

AHEAD = 256
"""Rows of a panel, which a tile would otherwise wait for; at its end, those of the next one."""


def suited() -> bool:
    """Whether this processor multiplies faster so than with the library that torch brings.

    Measured with AVX2. With AVX-512 tiles would have to be larger, and other processors have units
    for matrices.
    """
    features = binding.get_host_cpu_features()
    wide = features.get("avx2", False) and features.get("fma", False)
    return sys.platform.startswith("linux") and wide and not features.get("avx512f", False)


def itemsize(weight: Tensor) -> int:
    """Bytes of each of some float32 weights in panels: 2 where bfloat16, which is the upper half of
    a float32, holds all of them exactly.
    """
    rows = max(1, CHECKED * len(weight) // weight.numel())
    parts = weight.detach().view(torch.int32).split(rows)
    return 4 if any(bool((part & 0xFFFF).any()) for part in parts) else 2


def panels(weights: Sequence[Tensor]) -> Tensor:
    """Weights_OI of some layers, side by side, as panel_CIL; the last panel is filled up with 0."""
    weight_OI = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    outputs, inputs = weight_OI.shape
    whole, rest = divmod(outputs, LANES)
    dtype = torch.bfloat16 if itemsize(weight_OI) == 2 else torch.float32
    panel_CIL = torch.zeros(whole + (rest > 0), inputs, LANES, dtype=dtype)
    panel_CIL[:whole] = weight_OI[: whole * LANES].unflatten(0, (whole, LANES)).mT
    if rest > 0:
        panel_CIL[-1, :, :rest] = weight_OI[whole * LANES :].t()
    return panel_CIL


@kernel
def multiply(x_SI: Floats, panel_CIL: Panel, y_SO: Floats, rows: int, team: Team) -> None:
    """Writes the products y_SO of the first rows."""
    tiles = (rows + ROWS - 1) // ROWS * len(panel_CIL)
    share(_multiply, (x_SI, panel_CIL, y_SO, rows), tiles, x_SI.shape[1] * LANES // 2, team)


@inner
def _multiply(
    first: int,
    last: int,
    worker: int,
    x_SI: Floats,
    panel_CIL: Panel,
    y_SO: Floats,
    rows: int,
) -> None:
    """An item is a tile. Those of a panel follow each other, so that it is read from far once."""
    down = (rows + ROWS - 1) // ROWS
    for item in range(first, last):
        panel, row = item // down, item % down * ROWS
        panel_IL, column, height = panel_CIL[panel], panel * LANES, min(ROWS, rows - row)
        if height == 6:
            _tile_6(x_SI, panel_IL, y_SO, row, column)
        elif height == 5:
            _tile_5(x_SI, panel_IL, y_SO, row, column)
        elif height == 4:
            _tile_4(x_SI, panel_IL, y_SO, row, column)
        elif height == 3:
            _tile_3(x_SI, panel_IL, y_SO, row, column)
        elif height == 2:
            _tile_2(x_SI, panel_IL, y_SO, row, column)
        else:
            _tile_1(x_SI, panel_IL, y_SO, row, column)


def _tile_of(height: int) -> Any:
    """A tile of so many rows."""

    def tile(
        typing: Any, x_SI: Any, panel_IL: Any, y_SO: Any, row: Any, column: Any
    ) -> tuple[Signature, Callable[..., Any]]:
        signature = types.void(x_SI, panel_IL, y_SO, types.int64, types.int64)

        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            kinds = signature.args
            x, panel, y = (vector.start_of(context, builder, kinds[i], args[i]) for i in range(3))
            inputs = vector.lengths_of(context, builder, kinds[0], args[0])[1]
            outputs = vector.lengths_of(context, builder, kinds[2], args[2])[1]
            rows = [builder.add(args[3], WORD(i)) for i in range(height)]
            x_R = [builder.gep(x, [builder.mul(row, inputs)]) for row in rows]

            def step(i: Any, sums: list[Any]) -> list[Any]:
                ahead = builder.mul(builder.add(i, WORD(AHEAD)), WORD(LANES))
                vector.fetch(builder, panel, ahead)
                weight_L = vector.load(builder, panel, builder.mul(i, WORD(LANES)))
                numbers = [builder.load(builder.gep(start, [i])) for start in x_R]
                return [
                    vector.fused(builder, vector.splat(builder, number), weight_L, sum_L)
                    for number, sum_L in zip(numbers, sums, strict=True)
                ]

            nothing = ir.Constant(vector.VECTOR, None)
            sums = vector.loop(builder, inputs, [nothing] * height, step)
            here = builder.sub(outputs, args[4])
            for row, sum_L in zip(rows, sums, strict=True):
                place = builder.add(builder.mul(row, outputs), args[4])
                vector.store_first(builder, sum_L, y, place, here)
            return context.get_dummy_value()

        return signature, generate

    return generated(tile)


_tile_1, _tile_2, _tile_3, _tile_4, _tile_5, _tile_6 = (_tile_of(i) for i in range(1, ROWS + 1))
