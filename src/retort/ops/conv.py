"""Causal depthwise convolution: parallel over T, and one token at a time.

Shapes: B batch, T time, E channels, K taps. Tap K-1 meets the current input, tap 0 the oldest.
The state is the last K-1 inputs, oldest first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retort.ops.arrays import has_kernel, in_training, own, rows, team, whole

BLOCK = 64
"""Tokens at a time in the backward pass: what is made of them stays in the processor's cache."""


def step(
    x_BE: Tensor, weight_EK: Tensor, bias_E: Tensor, state_BKE: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: the outputs y_BE and the state with `x_BE` in it."""
    window_BKE = torch.cat([state_BKE, x_BE[:, None]], dim=1)
    return (window_BKE * weight_EK.T).sum(1) + bias_E, window_BKE[:, 1:]


def scan(
    x_BTE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor,
    state_BKE: Tensor | None = None,
    document_BT: Tensor | None = None,
    activated: bool = False,
) -> Tensor:
    """All outputs y_BTE, or silu of them. Taps that would reach into another document read zeros.

    A starting state belongs to the first document of its row.
    """
    fast = has_kernel(x_BTE)
    # Kernels do without zeros in front.
    padded_BTE = x_BTE if fast and state_BKE is None else pad(x_BTE, weight_EK.shape[1], state_BKE)
    weight_KE = weight_EK.T.clone(memory_format=torch.contiguous_format)
    inputs = (padded_BTE, weight_KE, bias_E, document_BT)
    fused = fast and activated and in_training(x_BTE)
    if fast:
        y_BTE: Tensor = _FastScan.apply(*inputs, padded_BTE.shape[1] - x_BTE.shape[1], fused)
    else:
        y_BTE = _Scan.apply(*inputs)
    return torch.nn.functional.silu(y_BTE) if activated and not fused else y_BTE


class _Scan(torch.autograd.Function):
    """The sum over taps, in place, with its gradients: memory, not arithmetic, is what it costs."""

    @staticmethod
    def forward(
        ctx: Any,
        padded_BTE: Tensor,
        weight_KE: Tensor,
        bias_E: Tensor,
        document_BT: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(padded_BTE, weight_KE, document_BT)
        return plain_outputs(padded_BTE, weight_KE, bias_E, document_BT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        padded_BTE, weight_KE, document_BT = ctx.saved_tensors
        found = plain_gradients(grad_BTE, padded_BTE, weight_KE, document_BT)
        return *found, grad_BTE.sum((0, 1)), None


def plain_outputs(
    padded_BTE: Tensor, weight_KE: Tensor, bias_E: Tensor, document_BT: Tensor | None
) -> Tensor:
    """The outputs y_BTE of padded inputs, in torch."""
    last = weight_KE.shape[0] - 1
    length = padded_BTE.shape[1] - last
    same_KBT1 = _same(document_BT, last + 1, padded_BTE.dtype)
    y_BTE = torch.addcmul(bias_E, padded_BTE[:, last:], weight_KE[last])
    for k in range(last):
        shifted_BTE = padded_BTE[:, k : k + length]
        if same_KBT1 is not None:
            shifted_BTE = shifted_BTE * same_KBT1[k]
        y_BTE.addcmul_(shifted_BTE, weight_KE[k])
    return y_BTE


def plain_gradients(
    grad_BTE: Tensor, padded_BTE: Tensor, weight_KE: Tensor, document_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the padded inputs and of the weights, in torch."""
    same_KBT1 = _same(document_BT, weight_KE.shape[0], padded_BTE.dtype)
    padded_grad_BTE = torch.zeros_like(padded_BTE)
    precise = torch.promote_types(weight_KE.dtype, torch.float32)
    weight_grad_KE = torch.zeros_like(weight_KE, dtype=precise)
    block = BLOCK if grad_BTE.device.type == "cpu" else grad_BTE.shape[1]
    for start in range(0, grad_BTE.shape[1], block):
        part_BTE = grad_BTE[:, start : start + block]
        for k in range(weight_KE.shape[0]):
            reach = slice(start + k, start + k + part_BTE.shape[1])
            masked_BTE = part_BTE
            if same_KBT1 is not None and k < weight_KE.shape[0] - 1:
                masked_BTE = part_BTE * same_KBT1[k, :, start : start + block]
            padded_grad_BTE[:, reach].addcmul_(masked_BTE, weight_KE[k])
            weight_grad_KE[k] += (masked_BTE * padded_BTE[:, reach]).sum((0, 1))
    return padded_grad_BTE, weight_grad_KE.to(weight_KE.dtype)


class _FastScan(torch.autograd.Function):
    """The same, and silu, by kernels. `before` inputs are in front of those of the tokens; there
    are zeros in front of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BTE: Tensor,
        weight_KE: Tensor,
        bias_E: Tensor,
        document_BT: Tensor | None,
        before: int,
        activated: bool,
    ) -> Tensor:
        from retort.ops.cpu import convolution

        batch, length, channels = x_BTE.shape
        y_BTE = torch.empty(batch, length - before, channels)
        document_BT = _documents(y_BTE, document_BT)
        vectors = whole(weight_KE).reshape(-1), own(bias_E), document_BT.numpy()
        convolution.scan(*rows(x_BTE), before, *vectors, activated, y_BTE.view(-1).numpy(), team())
        ctx.save_for_backward(x_BTE, weight_KE, bias_E, document_BT)
        ctx.settings = before, activated
        return y_BTE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTE: Tensor) -> tuple[Tensor | None, ...]:
        from retort.ops.cpu import convolution

        x_BTE, weight_KE, bias_E, document_BT = ctx.saved_tensors
        before, activated = ctx.settings
        taps, channels = weight_KE.shape
        of_x_BTE, of_vectors_KE = torch.empty(x_BTE.shape), torch.empty(taps + 1, channels)
        vectors = whole(weight_KE).reshape(-1), own(bias_E), document_BT.numpy()
        arrays = *rows(grad_BTE), *rows(x_BTE), before, *vectors
        found = of_x_BTE.view(-1).numpy(), of_vectors_KE.numpy()
        convolution.scan_backward(*arrays, activated, *found, team())
        return of_x_BTE, of_vectors_KE[:taps], of_vectors_KE[taps], None, None, None


def _documents(y_BTE: Tensor, document_BT: Tensor | None) -> Tensor:
    """The documents, one for each row where none are told."""
    shape = y_BTE.shape[:2]
    if document_BT is None:
        return torch.zeros(shape, dtype=torch.long)
    return document_BT.expand(shape).contiguous()


def last_inputs(
    x_BTE: Tensor, taps: int, length_B: Tensor, state_BKE: Tensor | None = None
) -> Tensor:
    """The state after the first `length_B` inputs of each row: its last K-1 inputs."""
    padded_BTE = pad(x_BTE, taps, state_BKE)
    index_BK = length_B[:, None] + torch.arange(taps - 1, device=x_BTE.device)
    return padded_BTE.gather(1, index_BK[..., None].expand(-1, -1, x_BTE.shape[-1]))


def pad(x_BTE: Tensor, taps: int, state_BKE: Tensor | None) -> Tensor:
    """The inputs with the K-1 before them in front: the state's, or zeros."""
    if state_BKE is None:
        return torch.nn.functional.pad(x_BTE, (0, 0, taps - 1, 0))
    return torch.cat([state_BKE.to(x_BTE.dtype), x_BTE], dim=1)


def _same(document_BT: Tensor | None, taps: int, dtype: torch.dtype) -> Tensor | None:
    """1 where the token that each tap but the last reads is of the same document; what is in
    front of a row counts as its first document.
    """
    if document_BT is None:
        return None
    first_BT = document_BT[:, :1].expand(-1, taps - 1)
    owner_BT = torch.cat([first_BT, document_BT], dim=1)
    owner_BKT = owner_BT.unfold(1, document_BT.shape[1], 1)[:, :-1]
    same_KBT = (owner_BKT == document_BT[:, None]).transpose(0, 1)
    return same_KBT[..., None].to(dtype)
