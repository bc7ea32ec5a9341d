"""Rotary positions (arXiv 2104.09864): channels d and d + D/2 of a head are turned as a pair.

Shapes: B rows, T tokens, H heads, D head channels, C half of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retort.ops.arrays import in_training, rows, team, whole


def rotate(x_BHTD: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> Tensor:
    """Every head's channels turned by the angles of their token, which may be the same in all rows;
    in the dtype of x.
    """
    if in_training(x_BHTD):
        turned_BHTD: Tensor = _Rotate.apply(x_BHTD, cos_BTC, sin_BTC)
        return turned_BHTD
    return plain_rotate(x_BHTD, cos_BTC, sin_BTC)


def plain_rotate(x_BHTD: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> Tensor:
    """`rotate` in torch."""
    cos = cos_BTC[:, None].to(x_BHTD.dtype)
    sin = sin_BTC[:, None].to(x_BHTD.dtype)
    first, second = x_BHTD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _Rotate(torch.autograd.Function):
    """`rotate` by a kernel; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTC, sin_BTC)
        return _turned(x_BHTD, cos_BTC, sin_BTC, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor, None, None]:
        cos_BTC, sin_BTC = ctx.saved_tensors
        return _turned(grad_BHTD, cos_BTC, sin_BTC, -1.0), None, None


def _turned(x_BHTD: Tensor, cos_BTC: Tensor, sin_BTC: Tensor, sign: float) -> Tensor:
    """A token's heads lie side by side, as a projection has them, and so do those turned."""
    from retort.ops.cpu import training

    x_BTHD = x_BHTD.transpose(1, 2)
    y_BTHD = torch.empty(x_BTHD.shape)
    angles = whole(cos_BTC.flatten(0, 1)), whole(sin_BTC.flatten(0, 1))
    training.rotate(*rows(x_BTHD, 2), *angles, sign, y_BTHD.flatten(0, 1).numpy(), team())
    return y_BTHD.transpose(1, 2)
