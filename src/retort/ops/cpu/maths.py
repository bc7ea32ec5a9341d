"""Functions of numbers that compile to vector instructions.

The C library's exponential takes one number at a time; these are sums and products, for as many as
a register holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from retort.ops.cpu.jit import exact, generated, inner

# Of constants: Python's own numbers would turn float32 into float64.
F: Any = np.float32
INT: Any = np.int32

ROUND = F(1.5 * 2**23)  # a sum with it has no room for a fraction
LOG2_E = F(1.4426950408889634)
LN2_HIGH = F(355 / 512)  # its product with an exponent is exact
LN2_LOW = F(0.6931471805599453 - 355 / 512)
SMALLEST, LARGEST = F(-86.5), F(88.722839)
INFINITY = F(np.inf)


@exact
def exp(x: float) -> float:
    """e^x to 4e-7 relative; 0 below -86.5, near the end of float32's normal numbers.

    2^n e^r with n whole and |r| <= ln(2) / 2, and the first terms of the series of e^r.
    """
    rounded = x * LOG2_E + ROUND
    n = rounded - ROUND
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    y = F(1 / 720)
    y = y * r + F(1 / 120)
    y = y * r + F(1 / 24)
    y = y * r + F(1 / 6)
    y = y * r + F(0.5)
    y = y * r + F(1)
    y = y * r + F(1)
    # The last bits of `rounded` are n. It belongs in the exponent, less 1: 2^128 is too much.
    half = from_bits(INT((to_bits(rounded) << 23) + (126 << 23)))
    y = y * half * F(2)
    y = F(0) if x < SMALLEST else y
    return INFINITY if x > LARGEST else y


@inner
def silu(x: float) -> float:
    """x * sigmoid(x)."""
    return x / (F(1) + exp(-x))


@inner
def softplus(x: float) -> float:
    """log(1 + e^x) = max(x, 0) + log(1 + u), u = e^-|x|; the logarithm is 2 artanh(u / (2 + u))."""
    u = exp(-abs(x))
    s = u / (F(2) + u)
    s2 = s * s
    y = F(2 / 13)
    y = y * s2 + F(2 / 11)
    y = y * s2 + F(2 / 9)
    y = y * s2 + F(2 / 7)
    y = y * s2 + F(2 / 5)
    y = y * s2 + F(2 / 3)
    y = y * s2 + F(2)
    return (x if x > F(0) else F(0)) + y * s


@inner
def largest_of(x_V: Any) -> float:
    """The maximum, by integers of the same order: there is a vector instruction for these."""
    largest = INT(-(2**31))
    for v in range(x_V.size):
        largest = max(largest, _ordered(to_bits(x_V[v])))
    return from_bits(_ordered(largest))


@inner
def _ordered(bits: int) -> int:
    """From a float's bits to an integer of the same order, and back."""
    return INT(bits ^ ((bits >> 31) & 0x7FFFFFFF))


@generated
def to_bits(typing: Any, x: types.Type) -> tuple[Any, Callable[..., Any]]:
    """The bits of a float32, as an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@generated
def from_bits(typing: Any, bits: types.Type) -> tuple[Any, Callable[..., Any]]:
    """The float32 of some bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate
