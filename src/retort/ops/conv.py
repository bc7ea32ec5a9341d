"""Causal depthwise convolution: parallel over T, and one token at a time.

Shapes: B batch, T time, E channels, K taps. Tap K-1 meets the current input, tap 0 the oldest.
The state is the last K-1 inputs, oldest first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

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
) -> Tensor:
    """All outputs y_BTE. Taps that would reach into another document read zeros.

    A starting state belongs to the first document of its row.
    """
    padded_BTE = pad(x_BTE, weight_EK.shape[1], state_BKE)
    weight_KE = weight_EK.T.clone(memory_format=torch.contiguous_format)
    y_BTE: Tensor = _Scan.apply(padded_BTE, weight_KE, bias_E, document_BT)
    return y_BTE


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
        outputs = fast_outputs if has_kernel(padded_BTE) else plain_outputs
        return outputs(padded_BTE, weight_KE, bias_E, document_BT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        padded_BTE, weight_KE, document_BT = ctx.saved_tensors
        gradients = fast_gradients if has_kernel(padded_BTE) else plain_gradients
        padded_grad_BTE, weight_grad_KE = gradients(grad_BTE, padded_BTE, weight_KE, document_BT)
        return padded_grad_BTE, weight_grad_KE, grad_BTE.sum((0, 1)), None


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


def has_kernel(x: Tensor) -> bool:
    """Whether it is for the kernels in `ops.cpu`; a compiler takes what torch alone can do."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not is_compiling()


def fast_outputs(
    padded_BTE: Tensor, weight_KE: Tensor, bias_E: Tensor, document_BT: Tensor | None
) -> Tensor:
    """`plain_outputs` by a kernel."""
    from retort.ops.cpu import convolution

    batch, length, channels = padded_BTE.shape
    y_BTE = padded_BTE.new_empty(batch, length + 1 - weight_KE.shape[0], channels)
    document_BT = _documents(y_BTE, document_BT)
    # A copy of the parameter: sharding could not free memory that NumPy has seen.
    convolution.scan(*_arrays(padded_BTE, weight_KE, bias_E.clone(), document_BT, y_BTE))
    return y_BTE


def fast_gradients(
    grad_BTE: Tensor, padded_BTE: Tensor, weight_KE: Tensor, document_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`plain_gradients` by a kernel."""
    from retort.ops.cpu import convolution

    found = torch.zeros_like(padded_BTE), torch.zeros_like(weight_KE)
    document_BT = _documents(grad_BTE, document_BT)
    convolution.scan_backward(
        *_arrays(grad_BTE.contiguous(), padded_BTE, weight_KE, document_BT, *found)
    )
    return found


def _documents(y_BTE: Tensor, document_BT: Tensor | None) -> Tensor:
    """The documents, one for each row where none are told."""
    shape = y_BTE.shape[:2]
    if document_BT is None:
        return torch.zeros(shape, dtype=torch.long)
    return document_BT.expand(shape).contiguous()


def _arrays(*tensors: Tensor) -> list[Any]:
    """The same memory for NumPy."""
    return [tensor.detach().numpy() for tensor in tensors]


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
