"""How numbers lie in memory: float32, or bfloat16 as uint16, its bits (the upper half of a
float32's).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from retort.ops.cpu.jit import inner
from retort.ops.cpu.maths import from_bits, to_bits

INT: Any = np.int32


def array(tensor: Tensor) -> NDArray[Any]:
    """NumPy's view of a tensor as kernels take it."""
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).numpy()


def widened(x: Any) -> float:
    """A stored number, float32 or the bits of a bfloat16, as a float32. For kernels alone."""
    raise NotImplementedError


def stored(x: float, like: Any) -> Any:
    """A float32 in the storage of `like`, rounded to the nearest. For kernels alone."""
    raise NotImplementedError


@inner
def _from_bfloat16(x: int) -> float:
    return from_bits(INT(INT(x) << 16))


@inner
def _to_bfloat16(x: float) -> Any:
    """To the nearest, and to the even one of two as near."""
    bits = to_bits(x)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return np.uint16((rounded if x == x else bits | (1 << 22)) >> 16)


# Numba wants the same annotations here as on what is returned, where a lambda has none.
@overload(widened)
def _widened(x):  # type: ignore[no-untyped-def]
    if x == types.uint16:
        return lambda x: _from_bfloat16(x)
    return lambda x: x


@overload(stored)
def _stored(x, like):  # type: ignore[no-untyped-def]
    if like == types.uint16:
        return lambda x, like: _to_bfloat16(x)
    return lambda x, like: x
