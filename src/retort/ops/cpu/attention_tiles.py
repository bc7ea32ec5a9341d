"""The inner loops of attention over a row's cache: several queries at once, in registers.

A key or value is loaded once for two queries, and whole rows of the values are read at a time: the
memory gives a third more so than when it is asked for parts of them.

Shapes: G queries that share a key/value head, D head channels, L cached positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import Signature

from retort.ops.cpu import vectors as vector
from retort.ops.cpu.jit import generated
from retort.ops.cpu.vectors import LANES, WORD

AHEAD = 16
"""Positions of the cache."""

KEYS = 4
"""That a query is multiplied with at once."""


def _products_of(queries: int, keys: int) -> Any:
    """Writes the products of so many queries and keys, from the `g`th and the `start`th on.

    D must be a multiple of LANES.
    """

    def products(
        typing: Any, q_GD: Any, k_LD: Any, score_GL: Any, g: Any, start: Any
    ) -> tuple[Signature, Callable[..., Any]]:
        signature = types.void(q_GD, k_LD, score_GL, types.int64, types.int64)

        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            kinds = signature.args
            q, k, score = (vector.start_of(context, builder, kinds[i], args[i]) for i in range(3))
            width = vector.lengths_of(context, builder, kinds[0], args[0])[1]
            places = vector.lengths_of(context, builder, kinds[2], args[2])[1]
            several = [builder.add(args[3], WORD(i)) for i in range(queries)]
            positions = [builder.add(args[4], WORD(i)) for i in range(keys)]
            q_Q = [builder.mul(g, width) for g in several]
            k_K = [builder.mul(position, width) for position in positions]

            def step(i: Any, sums: list[Any]) -> list[Any]:
                d = builder.mul(i, WORD(LANES))
                q_QL = [vector.load(builder, q, builder.add(query, d)) for query in q_Q]
                result: list[Any] = []
                for key in k_K:
                    offset = builder.add(key, d)
                    vector.fetch(builder, k, builder.add(offset, builder.mul(width, WORD(AHEAD))))
                    key_L = vector.load(builder, k, offset)
                    for q_L in q_QL:
                        result.append(vector.fused(builder, q_L, key_L, sums[len(result)]))
                return result

            nothing = ir.Constant(vector.VECTOR, None)
            zeros = [nothing] * (keys * queries)
            sums = vector.loop(builder, builder.udiv(width, WORD(LANES)), zeros, step)
            for i, sum_L in enumerate(sums):
                row = builder.mul(several[i % queries], places)
                place = builder.gep(score, [builder.add(row, positions[i // queries])])
                builder.store(vector.total(builder, sum_L), place)
            return context.get_dummy_value()

        return signature, generate

    return generated(products)


products_1, products_2 = _products_of(1, KEYS), _products_of(2, KEYS // 2)


def _average_of(queries: int, vectors: int) -> Any:
    """Adds values by their weights, for so many queries from the `g`th on, and so many vectors'
    channels from the `first` on. The sums stay in registers meanwhile.
    """

    def channels(
        typing: Any,
        weight_GL: Any,
        v_LD: Any,
        y_GD: Any,
        g: Any,
        start: Any,
        stop: Any,
        first: Any,
    ) -> tuple[Signature, Callable[..., Any]]:
        signature = types.void(weight_GL, v_LD, y_GD, *[types.int64] * 4)

        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            kinds = signature.args
            weight, v, y = (vector.start_of(context, builder, kinds[i], args[i]) for i in range(3))
            places = vector.lengths_of(context, builder, kinds[0], args[0])[1]
            width = vector.lengths_of(context, builder, kinds[1], args[1])[1]
            g, start, stop, first = args[3:]
            several = [builder.add(g, WORD(i)) for i in range(queries)]
            rows = [builder.mul(g, places) for g in several]
            channels = [builder.add(first, WORD(i * LANES)) for i in range(vectors)]

            def step(i: Any, y_V: list[Any]) -> list[Any]:
                position = builder.add(start, i)
                value = builder.mul(position, width)
                places_Q = [builder.gep(weight, [builder.add(row, position)]) for row in rows]
                w_QL = [vector.splat(builder, builder.load(place)) for place in places_Q]
                result: list[Any] = []
                for channel in channels:
                    offset = builder.add(value, channel)
                    vector.fetch(builder, v, builder.add(offset, builder.mul(width, WORD(AHEAD))))
                    v_L = vector.load(builder, v, offset)
                    for w_L in w_QL:
                        result.append(vector.fused(builder, w_L, v_L, y_V[len(result)]))
                return result

            out = [
                builder.add(builder.mul(g, width), channel) for channel in channels for g in several
            ]
            y_V = [vector.load(builder, y, offset) for offset in out]
            y_V = vector.loop(builder, builder.sub(stop, start), y_V, step)
            for offset, y_L in zip(out, y_V, strict=True):
                vector.store(builder, y_L, y, offset)
            return context.get_dummy_value()

        return signature, generate

    return generated(channels)


average_1_1, average_1_4 = _average_of(1, 1), _average_of(1, 4)
average_2_1, average_2_4 = _average_of(2, 1), _average_of(2, 4)
