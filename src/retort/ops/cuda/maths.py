"""What the kernels have in common. Everything is computed in float32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def block(size: int, least: int = 1) -> int:
    """The power of two that holds `size` entries: tiles have no other sizes."""
    return int(max(least, triton.next_power_of_2(size)))


def check_rows(*tensors: Tensor) -> None:
    """Kernels find an entry by its row: rows must follow each other without gaps within them."""
    for tensor in tensors:
        assert tensor.stride(-1) == 1 and tensor[0].is_contiguous(), tensor.stride()


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + exp(x)), to float32's precision also where it is small.

    log(1 + t) is 2 artanh(t / (2 + t)), whose series is short for t in (0, 1].
    """
    t = tl.exp(-tl.abs(x))
    s = t / (2.0 + t)
    q = s * s
    series = 1 / 11 + q * (1 / 13 + q * (1 / 15))
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * series))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    """x / (1 + exp(-x))."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def convolve(
    now_ptr: tl.tensor,
    ring_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    source: tl.tensor,
    channel: tl.tensor,
    mask: tl.tensor,
    length: tl.tensor,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """A causal convolution's output at some channels, and the input that must go into the ring.

    The token at position t has its inputs in slot t % TAPS of its row's ring (TAPS, INPUTS), so
    nothing is ever shifted, and the slot to write is one that nobody reads. `channel` is of the
    weights (TAPS, OUTPUTS), `source` of the inputs: several channels may share one.
    """
    k = tl.arange(0, BLOCK_K)
    now = tl.load(now_ptr + source, mask=mask, other=0.0)
    slot = (length + 1 + k) % TAPS
    past = tl.load(
        ring_ptr + slot[:, None] * INPUTS + source[None, :],
        mask=(k < TAPS - 1)[:, None] & mask[None, :],
        other=0.0,
    )
    weight = tl.load(
        weight_ptr + k[:, None] * OUTPUTS + channel[None, :],
        mask=(k < TAPS)[:, None] & mask[None, :],
        other=0.0,
    )
    # Taps times channels at once: loads of single vectors would be made anew for every tile that
    # what comes of them is used in.
    window = tl.where((k == TAPS - 1)[:, None], now[None, :], past).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(window * weight.to(tl.float32), 0) + bias, now
