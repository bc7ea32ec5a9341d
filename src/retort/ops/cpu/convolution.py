"""The causal depthwise convolution over whole rows, and its gradients.

One pass over the memory each, where torch needs several for every tap.

Shapes: B batch, T time, E channels, K taps; the inputs are padded by K-1 in front.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retort.ops.cpu.jit import kernel

BLOCK = 64
"""Tokens whose contributions to a weight's gradient are summed before they join the rest, so that
long rows lose no precision."""

Floats = NDArray[np.float32]


@kernel
def scan(
    padded_BTE: Floats,
    weight_KE: Floats,
    bias_E: Floats,
    document_BT: NDArray[np.int64],
    y_BTE: Floats,
) -> None:
    """Writes the outputs y_BTE; taps that would reach into another document read zeros."""
    batch, length, channels = y_BTE.shape
    last = weight_KE.shape[0] - 1
    for b in range(batch):
        for t in range(length):
            for e in range(channels):
                y_BTE[b, t, e] = bias_E[e] + padded_BTE[b, t + last, e] * weight_KE[last, e]
            for k in range(last):
                if document_BT[b, max(t + k - last, 0)] == document_BT[b, t]:
                    for e in range(channels):
                        y_BTE[b, t, e] += padded_BTE[b, t + k, e] * weight_KE[k, e]


@kernel
def scan_backward(
    grad_BTE: Floats,
    padded_BTE: Floats,
    weight_KE: Floats,
    document_BT: NDArray[np.int64],
    padded_grad_BTE: Floats,
    weight_grad_KE: Floats,
) -> None:
    """Adds to the gradients of the padded inputs and of the weights, which start as zeros."""
    batch, length, channels = grad_BTE.shape
    taps = weight_KE.shape[0]
    part_KE = np.zeros_like(weight_KE)
    for b in range(batch):
        for start in range(0, length, BLOCK):
            part_KE[:] = 0
            for t in range(start, min(start + BLOCK, length)):
                for k in range(taps):
                    if document_BT[b, max(t + k + 1 - taps, 0)] == document_BT[b, t]:
                        for e in range(channels):
                            grad = grad_BTE[b, t, e]
                            padded_grad_BTE[b, t + k, e] += grad * weight_KE[k, e]
                            part_KE[k, e] += grad * padded_BTE[b, t + k, e]
            for k in range(taps):
                for e in range(channels):
                    weight_grad_KE[k, e] += part_KE[k, e]
