"""A kernel's work shared among threads.

The threads are those that torch computes with: two groups of them on the same cores would wait for
each other, since the one that has nothing to do keeps its cores busy for a while. torch brings
GNU's OpenMP library along on Linux, and a function that any compiler calls to start a parallel
region is all that is needed of it; elsewhere kernels run on the calling thread alone.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import Signature

from retort.ops.cpu.jit import generated

Team = tuple[int, int, int]
"""How many threads, the address of the function that starts them, and of that which tells a thread
its number.
"""

ALONE: Team = (1, 0, 0)
"""The calling thread."""

WORTHWHILE = 1 << 16
"""Numbers that a kernel has to touch before it starts other threads: some ten microseconds."""

APART = 8
"""Words from one counter to the next, so that no two are in a line of a cache."""

WORD = ir.IntType(64)
BYTES = ir.IntType(8).as_pointer()


def of_threads(count: int) -> Team:
    """A team of `count` of torch's threads; where it has none of these, the calling thread alone.

    torch must have been imported: it brings the library that is looked for.
    """
    if count <= 1 or not sys.platform.startswith("linux"):
        return ALONE
    names = "GOMP_parallel", "omp_get_thread_num"
    start, number = (_address(getattr(ctypes.CDLL(None), name, None)) for name in names)
    return (count, start, number) if start and number else ALONE


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value if function else None


@generated
def share(
    typing: Any, work: Any, arguments: Any, items: Any, cost: Any, team: Any
) -> tuple[Signature, Callable[..., Any]]:
    """Calls work(first, last, worker, *arguments) over the ranges that make up 0 .. items.

    An item touches `cost` numbers; little work is done by the calling thread, all at once, as
    worker 0. More of it has a part for each thread, the same one in every call: items are rows, for
    the most part, and a row stays near to the core that had it before. A thread takes its part in
    ranges, and then what is left of the others', so that neither rows of different length nor a
    busy core keep the others waiting. `worker` is the thread's number. The work must not raise.
    """
    ends = (types.int64, types.int64, types.int64)
    signature = work.get_call_type(typing, ends + tuple(arguments), {})
    compiled = work.dispatcher.overloads[signature.args]

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        context.add_linking_libs([compiled.library])

        def call(builder: Any, first: Any, last: Any, worker: Any, packed: Any) -> None:
            unpacked = cgutils.unpack_tuple(builder, packed)
            every = [first, last, worker, *unpacked]
            context.call_internal_no_propagate(builder, compiled.fndesc, signature, every)

        _share(builder, args, call)
        return context.get_dummy_value()

    return types.void(work, arguments, types.int64, types.int64, team), generate


def _share(builder: Any, args: Any, call: Callable[..., None]) -> None:
    """The code that decides who does the work, and has it done."""
    _, packed, items, cost, team = args
    threads, start, number = cgutils.unpack_tuple(builder, team)
    several = builder.icmp_signed(">", threads, WORD(1))
    enough = builder.icmp_signed(">=", builder.mul(items, cost), WORD(WORTHWHILE))
    together = builder.and_(several, enough)
    parts = builder.select(together, threads, WORD(1))
    grain = builder.add(builder.sdiv(items, builder.mul(parts, WORD(4))), WORD(1))
    grain = builder.select(together, grain, items)
    nexts = builder.alloca(WORD, builder.mul(parts, WORD(APART)))
    with cgutils.for_range(builder, parts) as part:
        place = builder.gep(nexts, [builder.mul(part.index, WORD(APART))])
        builder.store(_start_of(builder, part.index, items, parts), place)
    job = _job(builder, [nexts, parts, items, grain, number], packed)
    worker = _worker(builder.module, job.type, call)
    with builder.if_else(together) as (then, otherwise):
        with then:
            _start(builder, start, worker, job, threads)
        with otherwise:
            builder.call(worker, [builder.bitcast(job, BYTES)])


def _start_of(builder: Any, part: Any, items: Any, parts: Any) -> Any:
    """The first item of a part."""
    return builder.sdiv(builder.mul(part, items), parts)


def _job(builder: Any, numbers: list[Any], packed: Any) -> Any:
    """What the workers share, on the stack: the next item of each part, parts, items, grain, who
    tells a thread its number, arguments.
    """
    layout = ir.LiteralStructType([*(number.type for number in numbers), packed.type])
    job = cgutils.alloca_once(builder, layout)
    for i, value in enumerate([*numbers, packed]):
        builder.store(value, cgutils.gep_inbounds(builder, job, 0, i))
    return job


def _worker(module: Any, job_type: Any, call: Callable[..., None]) -> Any:
    """What each thread runs: it takes ranges until none is left, of its own part at first."""
    name = module.get_unique_name("worker")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [BYTES]), name)
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    job = builder.bitcast(function.args[0], job_type)
    fields = [builder.load(cgutils.gep_inbounds(builder, job, 0, i)) for i in range(6)]
    nexts, parts, items, grain, number, packed = fields
    me = _number(builder, number, parts)
    with cgutils.for_range(builder, parts) as each:
        part = builder.srem(builder.add(me, each.index), parts)
        place = builder.gep(nexts, [builder.mul(part, WORD(APART))])
        end = _start_of(builder, builder.add(part, WORD(1)), items, parts)
        take, work, done = (function.append_basic_block(name) for name in ("take", "work", "done"))
        builder.branch(take)
        builder.position_at_end(take)
        first = builder.atomic_rmw("add", place, grain, "monotonic")
        builder.cbranch(builder.icmp_signed("<", first, end), work, done)
        builder.position_at_end(work)
        last = builder.add(first, grain)
        last = builder.select(builder.icmp_signed("<", last, end), last, end)
        call(builder, first, last, me, packed)
        builder.branch(take)
        builder.position_at_end(done)
    builder.ret_void()
    return function


def _number(builder: Any, number: Any, parts: Any) -> Any:
    """Which thread this is, omp_get_thread_num(); 0 where it is alone."""
    me = cgutils.alloca_once_value(builder, WORD(0))
    with builder.if_then(builder.icmp_signed(">", parts, WORD(1))):
        kind = ir.FunctionType(ir.IntType(32), [])
        told = builder.call(builder.inttoptr(number, kind.as_pointer()), [])
        builder.store(builder.zext(told, WORD), me)
    return builder.load(me)


def _start(builder: Any, address: Any, worker: Any, job: Any, threads: Any) -> None:
    """GOMP_parallel(worker, job, threads, flags), which returns when all of them have."""
    number, none = ir.IntType(32), ir.VoidType()
    kind = ir.FunctionType(none, [worker.type, BYTES, number, number])
    start = builder.inttoptr(address, kind.as_pointer())
    many = builder.trunc(threads, number)
    builder.call(start, [worker, builder.bitcast(job, BYTES), many, number(0)])
