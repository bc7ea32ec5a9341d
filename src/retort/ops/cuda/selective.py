"""One decode step of a Mamba-1 mixer between its projections, in one kernel: convolution, step
size, state update, skip and gate.

x and B of the key/value heads are read where they are, once for all heads that share them: the
convolution's past inputs are kept once, too.

There is no ring of inputs as for Mamba-2. Each number of this state has a decay of its own, so
reading it anew costs an exponential for every token of the ring, which takes longer than the memory
that it saves.

Shapes: S rows, E inner width, X width of x and B before they are repeated, N state, K taps,
C columns of the projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from retort.ops.cuda.maths import block, check_rows, convolve, silu, softplus

CHANNELS = 128
"""Of one program."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a mixer. x and B are repeated `repeats` times, in pieces of `piece` channels."""

    inner: int
    kv_inner: int
    state: int
    taps: int
    piece: int

    @property
    def repeats(self) -> int:
        """Channels that share an input."""
        return self.inner // self.kv_inner


@dataclass(frozen=True)
class Weights:
    """Parameters of a mixer; the rates A_EN are below 0 and in float32, as is the bias of dt."""

    conv_KE: Tensor
    conv_bias_E: Tensor
    dt_bias_E: Tensor
    rate_EN: Tensor
    d_E: Tensor


@dataclass(frozen=True)
class State:
    """What rows remember: their states, and their convolution's inputs."""

    ssm_SEN: Tensor
    conv_SKX: Tensor


def step(
    geometry: Geometry,
    weights: Weights,
    projected_SC: Tensor,
    dt_SE: Tensor,
    length_S: Tensor,
    state: State,
) -> Tensor:
    """What out_proj reads, y_SE, of the first S rows after a token each; their states go on.

    `dt_SE` is the projected step without its bias; `length_S` counts the tokens that each row has
    read without this one, in int32.
    """
    check_rows(projected_SC, dt_SE, state.ssm_SEN, state.conv_SKX, weights.rate_EN)
    rows, inner = dt_SE.shape
    y_SE = torch.empty(rows, inner, dtype=projected_SC.dtype, device=projected_SC.device)
    tile = min(CHANNELS, block(inner))
    _step_kernel[triton.cdiv(inner, tile), rows](
        projected_SC,
        projected_SC.stride(0),
        dt_SE,
        length_S,
        state.ssm_SEN,
        state.conv_SKX,
        y_SE,
        weights.conv_KE,
        weights.conv_bias_E,
        weights.dt_bias_E,
        weights.rate_EN,
        weights.d_E,
        E=inner,
        X=geometry.kv_inner,
        N=geometry.state,
        TAPS=geometry.taps,
        BLOCK_K=block(geometry.taps),
        PIECE=geometry.piece,
        REPEATS=geometry.repeats,
        BLOCK_E=tile,
        BLOCK_N=block(geometry.state),
        num_warps=4,
    )
    return y_SE


@triton.jit
def _source(channel: tl.tensor, PIECE: tl.constexpr, REPEATS: tl.constexpr) -> tl.tensor:
    """Where a channel of x or B is before it is repeated."""
    return channel // PIECE // REPEATS * PIECE + channel % PIECE


@triton.jit
def _step_kernel(
    projected_ptr: tl.tensor,
    row_stride: tl.tensor,
    dt_ptr: tl.tensor,
    length_ptr: tl.tensor,
    ssm_ptr: tl.tensor,
    conv_ptr: tl.tensor,
    y_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    dt_bias_ptr: tl.tensor,
    rate_ptr: tl.tensor,
    d_ptr: tl.tensor,
    E: tl.constexpr,
    X: tl.constexpr,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
    REPEATS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    row = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    in_e = e < E
    mask = in_e[:, None] & (n < N)[None, :]
    tile = e[:, None] * N + n[None, :]
    tile_ptr = ssm_ptr + row * (E * N) + tile
    state = tl.load(tile_ptr, mask=mask, other=0.0).to(tl.float32)
    rate = tl.load(rate_ptr + tile, mask=mask, other=0.0)

    # Columns of the projection: z | x | B | C | dt
    row_ptr = projected_ptr + row * row_stride
    dtype = row_ptr.dtype.element_ty
    source = _source(e, PIECE, REPEATS)
    ring_ptr = conv_ptr + row * (TAPS * X)
    length = tl.load(length_ptr + row)
    x, x_now = convolve(
        row_ptr + E, ring_ptr, weight_ptr, bias_ptr, source, e, in_e, length, X, E, TAPS, BLOCK_K
    )
    x = silu(x).to(dtype).to(tl.float32)
    keeps = in_e & (e // PIECE % REPEATS == 0)  # the first of those that share an input
    tl.store(ring_ptr + (length % TAPS) * X + source, x_now, mask=keeps)

    dt = tl.load(dt_ptr + row * E + e, mask=in_e, other=0.0).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias_ptr + e, mask=in_e, other=0.0))
    # Heads of N channels share a B and a C of N numbers.
    of_head = (e // N * N)[:, None] + n[None, :]
    b = tl.load(row_ptr + (E + X) + _source(of_head, PIECE, REPEATS), mask=mask, other=0.0)
    c = tl.load(row_ptr + (E + 2 * X) + of_head, mask=mask, other=0.0).to(tl.float32)

    state = tl.exp(dt[:, None] * rate) * state + (dt * x)[:, None] * b.to(tl.float32)
    tl.store(tile_ptr, state, mask=mask)
    y = tl.sum(state * c, 1) + tl.load(d_ptr + e, mask=in_e, other=0.0).to(tl.float32) * x
    gate = tl.load(row_ptr + e, mask=in_e, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * E + e, y * silu(gate), mask=in_e)
