"""Causal depthwise convolution: parallel over T, and one token at a time.

Shapes: B batch, T time, E channels, K taps. Tap K-1 meets the current input, tap 0 the oldest.
The state is the last K-1 inputs, oldest first.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    taps, length = weight_EK.shape[1], x_BTE.shape[1]
    padded_BTE = pad(x_BTE, taps, state_BKE)
    owner_BT = None if document_BT is None else _owners(document_BT, taps)
    y_BTE = bias_E.expand_as(x_BTE)
    for k in range(taps):
        shifted_BTE = padded_BTE[:, k : k + length]
        if owner_BT is not None and document_BT is not None and k < taps - 1:
            same_BT = owner_BT[:, k : k + length] == document_BT
            shifted_BTE = shifted_BTE * same_BT[..., None]
        y_BTE = torch.addcmul(y_BTE, shifted_BTE, weight_EK[:, k])
    return y_BTE


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


def _owners(document_BT: Tensor, taps: int) -> Tensor:
    first_BT = document_BT[:, :1].expand(-1, taps - 1)
    return torch.cat([first_BT, document_BT], dim=1)
