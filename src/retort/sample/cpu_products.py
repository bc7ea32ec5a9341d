"""Products with weights as a decode step needs them: of layers that share an input, side by side.

`Panels` is our own, with a copy of the weights, where that is faster than torch's; the copy is in
bfloat16 where that holds them exactly. A `Matrix` is torch's, with weights as [in, out]: a product
with few rows is up to twice as fast so than with torch's [out, in]. MKL, with which torch
multiplies on x86, lays the weights out anew in every product; for a number of rows that is known
beforehand it can do so once, which saves another tenth of the time and takes a copy.

Shapes: I inputs of a layer, O outputs of several, C panels of L columns, S slots or fewer rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from retort.model.decoder import Decoder
from retort.ops.cpu import products, storage
from retort.ops.cpu.team import Team, of_threads

Floats = NDArray[np.float32]

ALIASED = 256
"""Rows that start a multiple of so many numbers apart compete for the same places of a cache."""
PADDING = 16


class Product(Protocol):
    """The outputs of some layers, side by side, for rows that lie in the same place each time."""

    def __call__(self, rows: int) -> Floats:
        """Their outputs y_SO, which the next call overwrites; there may be more rows of them."""


class Panels:
    """Our own product, with a copy of the weights."""

    def __init__(
        self, layers: Sequence[nn.Linear], x_SI: Tensor, y_SO: Tensor | None, team: Team
    ) -> None:
        self.team = team
        panel_CIL = products.panels([layer.weight.detach() for layer in layers])
        self.arrays = x_SI.numpy(), storage.array(panel_CIL), _room(layers, x_SI, y_SO).numpy()

    def __call__(self, rows: int) -> Floats:
        """The outputs of the first rows, in y_SO."""
        products.multiply(*self.arrays, rows, self.team)
        return self.arrays[2]


class Matrix:
    """torch's product, with `weight_IO`.

    `packed` keeps a copy as MKL reads it, for products with all rows.
    """

    def __init__(
        self,
        layers: Sequence[nn.Linear],
        x_SI: Tensor,
        y_SO: Tensor | None,
        copied: bool,
        packed: bool,
    ) -> None:
        self.weight_IO, self.slots = fused(layers, copied), len(x_SI)
        self.weight_OI = self.weight_IO.t()
        self.x_SI, self.y_SO = x_SI, _room(layers, x_SI, y_SO)
        self.y_array_SO = self.y_SO.numpy()
        self.packed = _packed(self.weight_IO, self.slots) if packed else None

    def __call__(self, rows: int) -> Floats:
        """The outputs of the first rows: in y_SO, or where MKL puts them."""
        if self.packed is None or rows != self.slots:
            torch.mm(self.x_SI[:rows], self.weight_IO, out=self.y_SO[:rows])
            return self.y_array_SO
        multiply = torch.ops.mkl._mkl_linear
        found_SO: Tensor = multiply(self.x_SI, self.packed, self.weight_OI, None, rows)
        found_array_SO: Floats = found_SO.numpy()
        return found_array_SO


FEW = 256
"""Rows up to which our products are faster than torch's wherever they are of use."""


def with_panels(decoder: Decoder, threads: int) -> Decoder:
    """The decoder with our own products of few rows, for what reads several tokens a row: its
    modules are copied, its parameters are not, but for the panels. Where kernels cannot have so
    many threads it is the decoder itself.
    """
    team = of_threads(threads)
    if team[0] != threads:
        return decoder
    opened = deepcopy(decoder, {id(parameter): parameter for parameter in decoder.parameters()})
    for module in opened.modules():
        if isinstance(module, nn.Linear):
            panel_CIL = storage.array(products.panels([module.weight.detach()]))
            multiply = partial(_multiplied, module.weight, module.bias, panel_CIL, team)
            module.forward = multiply  # type: ignore[method-assign]
    return opened


def _multiplied(
    weight_OI: Tensor, bias_O: Tensor | None, panel_CIL: NDArray[Any], team: Team, x_XI: Tensor
) -> Tensor:
    """What the layer gives, for inputs with any dimensions in front."""
    x_SI = x_XI.reshape(-1, x_XI.shape[-1]).contiguous()
    if len(x_SI) > FEW:
        return linear(x_XI, weight_OI, bias_O)
    y_SO = torch.empty(len(x_SI), len(weight_OI))
    products.multiply(x_SI.numpy(), panel_CIL, y_SO.numpy(), len(x_SI), team)
    y_SO = y_SO if bias_O is None else y_SO.add_(bias_O)
    return y_SO.view(*x_XI.shape[:-1], -1)


def _room(layers: Sequence[nn.Linear], x_SI: Tensor, y_SO: Tensor | None) -> Tensor:
    """Where outputs go: what is given, or room of their own."""
    outputs = sum(layer.out_features for layer in layers)
    return torch.empty(len(x_SI), outputs) if y_SO is None else y_SO


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
