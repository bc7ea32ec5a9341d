"""Root-mean-square norms (arXiv 1910.07467) and gates, with gradients made in one pass.

Plain torch reads and writes memory several times for each; on a CPU that is most of what they cost.

Shapes: S rows, D width, G groups of channels, R blocks of rows, BT rows and tokens. `inverse` is
1 / RMS.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from retort.ops.arrays import in_training, own, rows, team, whole


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / RMS(x) over the last dimension, times a weight; in the dtype of x."""
    if in_training(x_BTD) and in_training(weight_D):
        normed_BTD: Tensor = _Norm.apply(x_BTD, weight_D, eps)
        return normed_BTD
    return plain_rms_norm(x_BTD, weight_D, eps)


def plain_rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm` in torch."""
    normed = torch.nn.functional.rms_norm(x_BTD.float(), x_BTD.shape[-1:], eps=eps)
    return weight_D * normed.to(x_BTD.dtype)


class _Norm(torch.autograd.Function):
    """`rms_norm` by kernels."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        from retort.ops.cpu import training

        y_BTD = x_BTD.new_empty(x_BTD.shape)
        inverse_S = x_BTD.new_empty(x_BTD.shape[:-1].numel())
        arrays = *rows(x_BTD), own(weight_D)
        training.norm(*arrays, eps, whole(y_BTD).reshape(-1), inverse_S.numpy(), team())
        ctx.save_for_backward(x_BTD, weight_D, inverse_S)
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor, None]:
        from retort.ops.cpu import training

        x_BTD, weight_D, inverse_S = ctx.saved_tensors
        of_x_BTD = x_BTD.new_empty(x_BTD.shape)
        of_weight_RD = x_BTD.new_empty(training.blocks(inverse_S.shape[0]), weight_D.shape[0])
        arrays = *rows(grad_BTD), *rows(x_BTD), own(weight_D), inverse_S.numpy()
        found = of_x_BTD.view(-1).numpy(), of_weight_RD.numpy()
        training.norm_backward(*arrays, *found, team())
        return of_x_BTD, of_weight_RD[0], None


def gated(gate_BTD: Tensor, x_BTD: Tensor) -> Tensor:
    """silu(gate) * x, of the same shape and dtype."""
    if in_training(gate_BTD) and in_training(x_BTD):
        found_BTD: Tensor = _Gate.apply(gate_BTD, x_BTD)
        return found_BTD
    return silu(gate_BTD) * x_BTD


class _Gate(torch.autograd.Function):
    """`gated` by kernels."""

    @staticmethod
    def forward(ctx: Any, gate_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        from retort.ops.cpu import training

        y_BTD = x_BTD.new_empty(x_BTD.shape)
        width = x_BTD.shape[-1]
        training.gate(*rows(gate_BTD), *rows(x_BTD), width, y_BTD.view(-1).numpy(), team())
        ctx.save_for_backward(gate_BTD, x_BTD)
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor]:
        from retort.ops.cpu import training

        gate_BTD, x_BTD = ctx.saved_tensors
        found = gate_BTD.new_empty(gate_BTD.shape), x_BTD.new_empty(x_BTD.shape)
        arrays = *rows(grad_BTD), *rows(gate_BTD), *rows(x_BTD)
        results = [each.view(-1).numpy() for each in found]
        training.gate_backward(*arrays, x_BTD.shape[-1], *results, team())
        return found


def gated_norm(
    y_BTD: Tensor,
    x_BTD: Tensor,
    skip_D: Tensor,
    gate_BTD: Tensor,
    weight_D: Tensor,
    groups: int,
    eps: float,
) -> Tensor:
    """(y + skip x) silu(gate), normalised over each group's channels and weighted; in the dtype of
    the gate.
    """
    tensors = (y_BTD, x_BTD, skip_D, gate_BTD, weight_D)
    if all(in_training(each) for each in tensors):
        normed_BTD: Tensor = _GatedNorm.apply(*tensors, groups, eps)
        return normed_BTD
    return plain_gated_norm(*tensors, groups, eps)


def plain_gated_norm(
    y_BTD: Tensor,
    x_BTD: Tensor,
    skip_D: Tensor,
    gate_BTD: Tensor,
    weight_D: Tensor,
    groups: int,
    eps: float,
) -> Tensor:
    """`gated_norm` in torch."""
    y_BTD = y_BTD.float() + skip_D.float() * x_BTD.float()
    gated_BTGC = (y_BTD * silu(gate_BTD.float())).unflatten(-1, (groups, -1))
    normed_BTGC = torch.nn.functional.rms_norm(gated_BTGC, gated_BTGC.shape[-1:], eps=eps)
    return weight_D * normed_BTGC.flatten(-2).to(gate_BTD.dtype)


class _GatedNorm(torch.autograd.Function):
    """`gated_norm` by kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        y_BTD: Tensor,
        x_BTD: Tensor,
        skip_D: Tensor,
        gate_BTD: Tensor,
        weight_D: Tensor,
        groups: int,
        eps: float,
    ) -> Tensor:
        from retort.ops.cpu import training

        normed_BTD = y_BTD.new_empty(y_BTD.shape)
        inverse_SG = y_BTD.new_empty(y_BTD.shape[:-1].numel(), groups)
        arrays = *rows(y_BTD), *rows(x_BTD), *rows(gate_BTD), own(skip_D), own(weight_D)
        found = normed_BTD.view(-1).numpy(), inverse_SG.numpy()
        training.gated_norm(*arrays, eps, *found, team())
        ctx.save_for_backward(y_BTD, x_BTD, skip_D, gate_BTD, weight_D, inverse_SG)
        return normed_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        from retort.ops.cpu import training

        y_BTD, x_BTD, skip_D, gate_BTD, weight_D, inverse_SG = ctx.saved_tensors
        of_y, of_x, of_gate = (y_BTD.new_empty(y_BTD.shape) for _ in range(3))
        of_vectors_R2D = y_BTD.new_empty(training.blocks(len(inverse_SG)), 2, y_BTD.shape[-1])
        arrays = *rows(y_BTD), *rows(x_BTD), *rows(gate_BTD), own(skip_D), own(weight_D)
        found = [each.view(-1).numpy() for each in (of_y, of_x, of_gate)]
        training.gated_norm_backward(
            *rows(grad_BTD), *arrays, inverse_SG.numpy(), *found, of_vectors_R2D.numpy(), team()
        )
        of_skip_D, of_weight_D = of_vectors_R2D[0]
        return of_y, of_x, of_skip_D, of_gate, of_weight_D, None, None
