"""Root-mean-square norms, and the residual additions and gates in front of them.

Shapes: S rows, D model width, E inner width, F feed-forward width, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retort.ops.cuda.maths import block, check_rows, silu

ELEMENTS = 1024
"""Of one program where each is computed by itself."""


def rms_norm(h_SD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """h / RMS(h) * weight."""
    u_SD = torch.empty_like(h_SD)
    _launch_norm(h_SD, h_SD, u_SD, weight_D, eps, add=False)
    return u_SD


def add_norm(h_SD: Tensor, y_SD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Adds `y_SD` to the residual stream `h_SD`, in place; returns the norm of the sum."""
    u_SD = torch.empty_like(h_SD)
    _launch_norm(h_SD, y_SD, u_SD, weight_D, eps, add=True)
    return u_SD


def group_norm(y_SE: Tensor, weight_E: Tensor, eps: float, groups: int) -> Tensor:
    """Each group's channels over their own RMS, in the weight's dtype."""
    rows, width = y_SE.shape
    out_SE = torch.empty(rows, width, dtype=weight_E.dtype, device=y_SE.device)
    check_rows(y_SE)
    size = width // groups
    tile = block(size)
    _group_norm_kernel[groups, rows](
        y_SE, out_SE, weight_E, EPS=eps, WIDTH=width, SIZE=size, BLOCK=tile, num_warps=_warps(tile)
    )
    return out_SE


def silu_times(gate_SF: Tensor, up_SF: Tensor) -> Tensor:
    """silu(gate) * up."""
    out_SF = torch.empty_like(gate_SF)
    assert gate_SF.is_contiguous() and up_SF.is_contiguous()
    rows, width = gate_SF.shape
    grid = (triton.cdiv(width, ELEMENTS), rows)
    _silu_times_kernel[grid](gate_SF, up_SF, out_SF, WIDTH=width, BLOCK=ELEMENTS, num_warps=4)
    return out_SF


def _launch_norm(
    h_SD: Tensor, y_SD: Tensor, u_SD: Tensor, weight_D: Tensor, eps: float, add: bool
) -> None:
    assert h_SD.is_contiguous() and y_SD.is_contiguous()
    rows, width = h_SD.shape
    tile = block(width)
    _norm_kernel[rows,](
        h_SD, y_SD, u_SD, weight_D, EPS=eps, WIDTH=width, ADD=add, BLOCK=tile,
        num_warps=_warps(tile),
    )  # fmt: skip


def _warps(tile: int) -> int:
    return min(16, max(1, tile // 256))


@triton.jit
def _norm_kernel(
    h_ptr: tl.tensor,
    y_ptr: tl.tensor,
    u_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * WIDTH
    d = tl.arange(0, BLOCK)
    mask = d < WIDTH
    h = tl.load(h_ptr + at + d, mask=mask, other=0.0)
    if ADD:
        total = h.to(tl.float32) + tl.load(y_ptr + at + d, mask=mask, other=0.0).to(tl.float32)
        h = total.to(h.dtype)
        tl.store(h_ptr + at + d, h, mask=mask)
    x = h.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + EPS)
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(u_ptr + at + d, weight * normed.to(h.dtype).to(tl.float32), mask=mask)


@triton.jit
def _group_norm_kernel(
    y_ptr: tl.tensor,
    out_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    first = tl.program_id(0) * SIZE
    at = tl.program_id(1).to(tl.int64) * WIDTH + first
    e = tl.arange(0, BLOCK)
    mask = e < SIZE
    y = tl.load(y_ptr + at + e, mask=mask, other=0.0).to(tl.float32)
    normed = y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + EPS)
    weight = tl.load(weight_ptr + first + e, mask=mask, other=0.0)
    scaled = weight.to(tl.float32) * normed.to(weight.dtype).to(tl.float32)
    tl.store(out_ptr + at + e, scaled, mask=mask)


@triton.jit
def _silu_times_kernel(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(1).to(tl.int64) * WIDTH + f
    mask = f < WIDTH
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, silu(gate) * up, mask=mask)
