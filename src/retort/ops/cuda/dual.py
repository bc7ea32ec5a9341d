"""One decode step of a Mamba-2 mixer between its projections, stock or discrete, in one kernel:
convolution, step size and decay, state update, skip, gate, and the norm where a head is a group.

A program has one head of one row: its state is read once and written once. B and C are read by
group; no head has a copy of its own.

With a ring of R inputs the state is written only every R tokens. In between it stays as it was, and
what the tokens since then add to the output is computed from their x, B and decays, which take far
less memory than the state:

    y_t = exp(a_1 + .. + a_t) S_0 C_t + sum over j <= t of exp(a_{j+1} + .. + a_t) s_j x_j (B_j C_t)

Shapes: S rows, H heads, P head channels, N state, G groups, M = G N, E = H P, F = E + 2 M channels
of the convolution, K taps, R tokens of the ring, C columns of the projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retort.ops.cuda import norms
from retort.ops.cuda.dual_kernels import replay_kernel, step_kernel
from retort.ops.cuda.maths import block, check_rows


@dataclass(frozen=True)
class Geometry:
    """Sizes of a mixer. `norm_eps` is that of the stock one; the discrete one has None."""

    heads: int
    head_dim: int
    state: int
    groups: int
    taps: int
    norm_eps: float | None

    @property
    def discrete(self) -> bool:
        """Whether it is Llamba's discrete mixer."""
        return self.norm_eps is None

    @property
    def inner(self) -> int:
        """E, the inner width."""
        return self.heads * self.head_dim

    @property
    def shared(self) -> int:
        """M, the width of B and of C."""
        return self.groups * self.state

    @property
    def channels(self) -> int:
        """F, the channels of the convolution."""
        return self.inner + 2 * self.shared

    @property
    def norm_fits(self) -> bool:
        """Whether a program has all that is normed together."""
        return not self.discrete and self.groups == self.heads

    @property
    def norm_apart(self) -> bool:
        """Whether the norm needs a kernel of its own."""
        return not self.discrete and self.groups != self.heads


@dataclass(frozen=True)
class Weights:
    """Parameters of a mixer; only the discrete one has a bias of the gate, and none of dt."""

    conv_KF: Tensor
    conv_bias_F: Tensor
    d_H: Tensor
    dt_bias_H: Tensor | None = None
    a_log_H: Tensor | None = None
    norm_E: Tensor | None = None
    gate_bias_E: Tensor | None = None


@dataclass(frozen=True)
class Ring:
    """The inputs of the recurrence since the state was written, and how many of them there are.

    All layers share `held_S`, in int32; whoever runs them moves it on: (held + 1) % R.
    """

    held_S: Tensor
    x_SRE: Tensor
    b_SRM: Tensor
    log_decay_SHR: Tensor
    scale_SHR: Tensor


@dataclass(frozen=True)
class State:
    """What rows remember: their states, past inputs, and what is not yet in the state."""

    ssm_SHPN: Tensor
    conv_SKF: Tensor
    ring: Ring | None = None


def step(
    geometry: Geometry, weights: Weights, projected_SC: Tensor, length_S: Tensor, state: State
) -> Tensor:
    """What out_proj reads, y_SE, of the first S rows after a token each; their states go on.

    `length_S` counts the tokens that each row has read without this one, in int32.
    """
    check_rows(projected_SC, state.ssm_SHPN, state.conv_SKF)
    rows = projected_SC.shape[0]
    dtype = torch.float32 if geometry.norm_apart else projected_SC.dtype
    y_SE = torch.empty(rows, geometry.inner, dtype=dtype, device=projected_SC.device)
    arguments = _arguments(geometry, weights, projected_SC, length_S, state, y_SE)
    if state.ring is None:
        tile = block(geometry.head_dim), block(geometry.state)
        step_kernel[geometry.heads, rows](
            **arguments, BLOCK_P=tile[0], BLOCK_N=tile[1], num_warps=_warps(*tile)
        )
    else:
        _launch_replay(geometry, arguments, state.ring, rows)
    if not geometry.norm_apart:
        return y_SE
    assert weights.norm_E is not None and geometry.norm_eps is not None
    return norms.group_norm(y_SE, weights.norm_E, geometry.norm_eps, geometry.groups)


def _arguments(
    geometry: Geometry,
    weights: Weights,
    projected_SC: Tensor,
    length_S: Tensor,
    state: State,
    y_SE: Tensor,
) -> dict[str, object]:
    return {
        "projected_ptr": projected_SC,
        "row_stride": projected_SC.stride(0),
        "length_ptr": length_S,
        "ssm_ptr": state.ssm_SHPN,
        "conv_ptr": state.conv_SKF,
        "y_ptr": y_SE,
        "weight_ptr": weights.conv_KF,
        "bias_ptr": weights.conv_bias_F,
        "d_ptr": weights.d_H,
        "dt_bias_ptr": weights.dt_bias_H,
        "a_log_ptr": weights.a_log_H,
        "norm_ptr": weights.norm_E,
        "gate_bias_ptr": weights.gate_bias_E,
        "EPS": geometry.norm_eps or 0.0,
        "HEADS": geometry.heads,
        "P": geometry.head_dim,
        "N": geometry.state,
        "GROUPS": geometry.groups,
        "TAPS": geometry.taps,
        "BLOCK_K": block(geometry.taps),
        "DISCRETE": geometry.discrete,
        "NORM": geometry.norm_fits,
    }


def _launch_replay(geometry: Geometry, arguments: dict[str, object], ring: Ring, rows: int) -> None:
    check_rows(ring.x_SRE, ring.b_SRM, ring.log_decay_SHR, ring.scale_SHR)
    tokens = ring.x_SRE.shape[1]
    tile = block(geometry.head_dim), block(geometry.state)
    replay_kernel[geometry.heads, rows](
        **arguments,
        held_ptr=ring.held_S,
        ring_x_ptr=ring.x_SRE,
        ring_b_ptr=ring.b_SRM,
        ring_log_ptr=ring.log_decay_SHR,
        ring_scale_ptr=ring.scale_SHR,
        tokens=tokens,
        R=tokens,
        BLOCK_P=tile[0],
        BLOCK_N=tile[1],
        num_warps=_warps(*tile),
    )


def _warps(tile_p: int, tile_n: int) -> int:
    """So many that a thread has at most 64 numbers of the state in its registers."""
    return min(16, max(2, tile_p * tile_n // 1024))
