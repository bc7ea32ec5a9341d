"""Weights as a decode step reads them: those that share an input side by side.

`Panels` is a copy for our own product, where that is faster than torch's. Else it is a `Matrix`,
[in, out]: a product with few rows is up to twice as fast so than with torch's [out, in]. MKL, with
which torch multiplies on x86, lays the weights out anew in every product; for a number of rows that
is known beforehand it can do so once, which saves another tenth of the time and takes a copy.

Shapes: I inputs of a layer, O outputs of several, C panels of L columns, S rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from retort.ops.cpu import products
from retort.ops.cpu.team import Team

ALIASED = 256
"""Rows that start a multiple of so many numbers apart compete for the same places of a cache."""
PADDING = 16


class Weights(Protocol):
    """The weights of some layers as one."""

    outputs: int

    def times(self, x_SI: Tensor, room_SO: Tensor) -> Tensor:
        """The outputs of all layers, side by side: in `room_SO`, or somewhere else."""


class Panels:
    """The weights of some layers as one, in a copy for our own product with any number of rows."""

    def __init__(self, layers: Sequence[nn.Linear], team: Team) -> None:
        panel_CIL = products.panels([layer.weight.detach() for layer in layers])
        self.panel_CIL, self.team = panel_CIL.numpy(), team
        self.outputs = sum(layer.out_features for layer in layers)

    def times(self, x_SI: Tensor, room_SO: Tensor) -> Tensor:
        """x_SI times the weights, in `room_SO`."""
        arrays = x_SI.contiguous().numpy(), self.panel_CIL, room_SO.numpy()
        products.multiply(*arrays, len(x_SI), self.team)
        return room_SO


class Matrix:
    """The weights of some layers as one, to be multiplied with `slots` rows or fewer.

    `packed` keeps a copy as MKL reads it, for products with all rows.
    """

    def __init__(self, layers: Sequence[nn.Linear], slots: int, copied: bool, packed: bool) -> None:
        self.weight_IO, self.slots = fused(layers, copied), slots
        self.outputs = self.weight_IO.shape[1]
        self.packed = _packed(self.weight_IO, slots) if packed else None

    def times(self, x_SI: Tensor, room_SO: Tensor) -> Tensor:
        """x_SI @ weight_IO, side by side: in `room_SO`, or where MKL puts it."""
        if self.packed is None or len(x_SI) != self.slots:
            return torch.mm(x_SI, self.weight_IO, out=room_SO)
        weight_OI = self.weight_IO.t()
        found_SO: Tensor = torch.ops.mkl._mkl_linear(x_SI, self.packed, weight_OI, None, self.slots)
        return found_SO


def _packed(weight_IO: Tensor, rows: int) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        weight_OI = weight_IO.t().contiguous()
        packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight_OI, rows)
    return packed


def fused(layers: Sequence[nn.Linear], copied: bool) -> Tensor:
    """The weights of some layers as one matrix_IO.

    Unless `copied`, the layers' own parameters become views of it, so that it takes no memory
    besides; they keep shape, values and use. Layers that have been fused before are found so.
    """
    found = _found(layers)
    if found is not None:
        return found
    # Parameters made in inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        weights = [layer.weight.detach() for layer in layers]
        matrix_IO = _empty(weights[0].shape[1], sum(len(weight) for weight in weights))
        parts = matrix_IO.split([len(weight) for weight in weights], dim=1)
        for layer, weight, part in zip(layers, weights, parts, strict=True):
            part.copy_(weight.t())
            if not copied:
                layer.weight.data = part.t()
    return matrix_IO


def _empty(inputs: int, outputs: int) -> Tensor:
    """A matrix whose rows do not compete for a cache."""
    padding = PADDING if outputs % ALIASED == 0 else 0
    return torch.empty(inputs, outputs + padding)[:, :outputs]


def _found(layers: Sequence[nn.Linear]) -> Tensor | None:
    """The matrix of which these layers are the columns already, if they are."""
    weights = [layer.weight.detach() for layer in layers]
    first, offset = weights[0], weights[0].storage_offset()
    stride = first.stride(1)
    for weight in weights:
        together = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        beside = weight.storage_offset() == offset and weight.stride() == (1, stride)
        if not (together and beside):
            return None
        offset += len(weight)
    outputs = sum(len(weight) for weight in weights)
    if stride < outputs:
        return None
    return first.as_strided((first.shape[1], outputs), (stride, 1))
