"""Loops over vectors, written as instructions where the compiler does not find them: it cannot know
that arrays do not overlap, nor what is worth a register.

A vector holds `LANES` float32 numbers, in one register or in several, as the processor has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

LANES = 16

NUMBER = ir.FloatType()
VECTOR = ir.VectorType(NUMBER, LANES)
WORD = ir.IntType(64)
INT = ir.IntType(32)
FAST = ("contract", "reassoc", "nsz")
"""Flags of sums and products, as in `jit.LOOSE`."""

Body = Callable[[Any, list[Any]], list[Any]]


def start_of(context: Any, builder: Any, array: types.Array, value: Any) -> Any:
    """Where an array's numbers lie: one after the other, as the kernels make them."""
    return context.make_array(array)(context, builder, value).data


def lengths_of(context: Any, builder: Any, array: types.Array, value: Any) -> list[Any]:
    """The shape of an array."""
    return cgutils.unpack_tuple(builder, context.make_array(array)(context, builder, value).shape)


def loop(builder: Any, count: Any, values: Sequence[Any], body: Body) -> list[Any]:
    """Runs `body` for 0 .. count - 1: told the number and the values so far, it gives the next
    ones. Returns the last.
    """
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(WORD)
    i.add_incoming(WORD(0), before)
    carried = [builder.phi(value.type) for value in values]
    for each, value in zip(carried, values, strict=True):
        each.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", i, count), inside, after)
    builder.position_at_end(inside)
    following = body(i, carried)
    i.add_incoming(builder.add(i, WORD(1)), builder.block)
    for each, value in zip(carried, following, strict=True):
        each.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return carried


def splat(builder: Any, number: Any) -> Any:
    """A vector of one number, of whatever type."""
    nothing = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    first = builder.insert_element(nothing, number, INT(0))
    lanes = ir.Constant(ir.VectorType(INT, LANES), [0] * LANES)
    return builder.shuffle_vector(first, nothing, lanes)


def load(builder: Any, start: Any, offset: Any) -> Any:
    """The vector behind so many numbers: float32, or bfloat16 as its bits, which are widened."""
    place = builder.gep(start, [offset])
    kind = ir.VectorType(place.type.pointee, LANES)
    found = builder.load(builder.bitcast(place, kind.as_pointer()))
    found.align = 2 if kind != VECTOR else 4
    if kind == VECTOR:
        return found
    whole = ir.VectorType(INT, LANES)
    shift = ir.Constant(whole, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(found, whole), shift), VECTOR)


def store(builder: Any, vector: Any, start: Any, offset: Any) -> None:
    """Writes a vector behind so many float32 numbers."""
    place = builder.bitcast(builder.gep(start, [offset]), VECTOR.as_pointer())
    builder.store(vector, place).align = 4


def store_first(builder: Any, vector: Any, start: Any, offset: Any, count: Any) -> None:
    """Writes the first `count` numbers of a vector, or all of them where it has fewer."""
    whole = builder.icmp_signed(">=", count, WORD(LANES))
    with builder.if_else(whole) as (all_of_it, a_part):
        with all_of_it:
            store(builder, vector, start, offset)
        with a_part:
            place = builder.bitcast(builder.gep(start, [offset]), VECTOR.as_pointer())
            numbers = ir.Constant(ir.VectorType(WORD, LANES), list(range(LANES)))
            inside = builder.icmp_signed("<", numbers, splat(builder, count))
            kind = ir.FunctionType(ir.VoidType(), [VECTOR, place.type, INT, inside.type])
            name = f"llvm.masked.store.v{LANES}f32.p0v{LANES}f32"
            write = cgutils.get_or_insert_function(builder.module, kind, name)
            builder.call(write, [vector, place, INT(4), inside])


def fused(builder: Any, one: Any, two: Any, more: Any) -> Any:
    """one * two + more."""
    return builder.fadd(builder.fmul(one, two, flags=FAST), more, flags=FAST)


def total(builder: Any, vector: Any) -> Any:
    """The sum of a vector's numbers."""
    kind = ir.FunctionType(NUMBER, [NUMBER, VECTOR])
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    add = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(add, [NUMBER(0.0), vector], fastmath=FAST)


def fetch(builder: Any, start: Any, offset: Any) -> None:
    """Has what lies behind so many numbers brought near, be it outside of the array."""
    place = builder.bitcast(builder.gep(start, [offset]), cgutils.voidptr_t)
    kind = ir.FunctionType(ir.VoidType(), [place.type, INT, INT, INT])
    bring = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(bring, [place, INT(0), INT(3), INT(1)])
