"""How numbers lie in memory: float32, or bfloat16 as uint16, its bits (the upper half of a
float32's); and memory fetched before it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import overload

from retort.ops.cpu.jit import generated, inner
from retort.ops.cpu.maths import from_bits, to_bits

INT: Any = np.int32

LINE = 64
"""Bytes that come from memory at once."""


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


@inner
def fetch_ahead(row: Any, rows: int) -> None:
    """Fetches what lies so many rows behind this one; the processor itself looks less far ahead."""
    size = row.size * row.itemsize
    for byte in range(0, size, LINE):
        _fetch(row, rows * size + byte)


@generated
def _fetch(typing: Any, array: Any, byte: Any) -> tuple[Any, Callable[..., Any]]:
    """Has memory brought near, so many bytes behind an array's start, be it outside of it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        place = builder.gep(builder.bitcast(data, cgutils.voidptr_t), [args[1]])
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(fetch, [place, number(0), number(3), number(1)])  # to read, soon, of data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate
