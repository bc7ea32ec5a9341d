"""Decode attention: one query a row and head against keys and values in memory, each row its own
number of them.

A row's tokens are in two places. Those of its prompt are in a cache that rows of the same prompt
share, and are read once for a tile of such rows; those behind it are in the row's own cache. Both
parts are split, so that few rows still keep a whole GPU busy, and merged by what their scores sum
to, as in Flash-Decoding (https://pytorch.org/blog/flash-decoding) and Hydragen (arXiv 2402.05099).

Shapes: S rows, H query heads, K key/value heads, G = H/K, D head channels, L positions of a row's
own cache, T tiles of W rows, I parts (splits, the shared ones first), A attention layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retort.ops.cuda.attention_kernels import (
    merge_kernel,
    own_kernel,
    rotate_kernel,
    shared_kernel,
)
from retort.ops.cuda.maths import block, check_rows

QUERIES = 64
"""Queries of a tile: rows that share a prompt, times query heads that share a key."""
SHORTEST = 128
"""Positions that are worth a part of their own."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a layer; `norm_eps` is that of the norms of each head's q and k, None without."""

    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float | None = None

    @property
    def group(self) -> int:
        """Query heads that share a key."""
        return self.heads // self.kv_heads

    @property
    def tile_rows(self) -> int:
        """Rows of a tile."""
        return max(1, QUERIES // block(self.group))


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of RoPE by position, in float32, and the weights of q's and k's norms."""

    cos_LD: Tensor
    sin_LD: Tensor
    q_norm_D: Tensor | None = None
    k_norm_D: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Where each row's tokens are, on the device.

    Of the `length_S` tokens that a row has read, the first `start_S` are in its prompt's cache:
    keys and values (K, `room_S`, D) at `address_SA2`, which are shared and never written here.
    `tile_TW` lists rows of the same prompt together; -1 is none, at the end of a tile.
    """

    length_S: Tensor
    start_S: Tensor
    room_S: Tensor
    address_SA2: Tensor
    tile_TW: Tensor


@dataclass(frozen=True)
class Parts:
    """Unfinished outputs, and the logarithm (to the base of 2) of what their weights sum to."""

    y_SHID: Tensor
    log_SHI: Tensor
    shared: int
    own: int

    @classmethod
    def empty(cls, geometry: Geometry, rows: int, shared: int, own: int, like: Tensor) -> Parts:
        """Parts that count for nothing."""
        shape = rows, geometry.heads, shared + own
        y_SHID = torch.empty(*shape, geometry.head_dim, dtype=torch.float32, device=like.device)
        log_SHI = torch.full(shape, float("-inf"), dtype=torch.float32, device=like.device)
        return cls(y_SHID, log_SHI, shared, own)


def rotate_and_store(
    geometry: Geometry,
    rotation: Rotation,
    qkv_SC: Tensor,
    rows: Rows,
    k_SKLD: Tensor,
    v_SKLD: Tensor,
) -> Tensor:
    """The rotated queries q_SHD; rotated keys and the values go into the rows' own caches.

    `qkv_SC` is the projection, q | k | v. What has no room in a cache is not written.
    """
    check_rows(qkv_SC, k_SKLD, v_SKLD)
    count = qkv_SC.shape[0]
    shape = count, geometry.heads, geometry.head_dim
    q_SHD = torch.empty(shape, dtype=qkv_SC.dtype, device=qkv_SC.device)
    rotate_kernel[geometry.heads + geometry.kv_heads, count](
        qkv_SC,
        qkv_SC.stride(0),
        rows.length_S,
        rows.start_S,
        rotation.cos_LD,
        rotation.sin_LD,
        rotation.q_norm_D,
        rotation.k_norm_D,
        q_SHD,
        k_SKLD,
        v_SKLD,
        rotation.cos_LD.shape[0],
        k_SKLD.shape[2],
        EPS=geometry.norm_eps or 0.0,
        HEADS=geometry.heads,
        KV_HEADS=geometry.kv_heads,
        D=geometry.head_dim,
        NORM=geometry.norm_eps is not None,
        BLOCK_D=block(geometry.head_dim // 2),
        num_warps=1,
    )
    return q_SHD


def attend(
    geometry: Geometry,
    q_SHD: Tensor,
    rows: Rows,
    k_SKLD: Tensor,
    v_SKLD: Tensor,
    layer: int,
    tiles: int,
    parts: Parts,
) -> Tensor:
    """What o_proj reads, y_SE: attention to the prompt's tokens and to the row's own, this one's
    among them. `layer` counts attention layers; the first `tiles` tiles are gone through.

    `parts` may hold anything of earlier calls: what counts in it is written first, by calls for the
    same rows and tiles.
    """
    check_rows(q_SHD, k_SKLD, v_SKLD)
    if tiles:
        _launch_shared(geometry, q_SHD, rows, layer, tiles, parts)
    _launch_own(geometry, q_SHD, rows, k_SKLD, v_SKLD, parts)
    y_SE = torch.empty(q_SHD.shape[0], q_SHD[0].numel(), dtype=q_SHD.dtype, device=q_SHD.device)
    merged = parts.shared + parts.own
    merge_kernel[geometry.heads, q_SHD.shape[0]](
        parts.y_SHID,
        parts.log_SHI,
        y_SE,
        merged,
        HEADS=geometry.heads,
        D=geometry.head_dim,
        BLOCK_D=block(geometry.head_dim),
        BLOCK_I=block(merged),
        num_warps=1 if merged <= 8 else 4,
    )
    return y_SE


def _launch_shared(
    geometry: Geometry, q_SHD: Tensor, rows: Rows, layer: int, tiles: int, parts: Parts
) -> None:
    address_S2 = rows.address_SA2[:, layer]
    shared_kernel[geometry.kv_heads, parts.shared, tiles](
        q_SHD,
        rows.start_S,
        rows.room_S,
        address_S2,
        address_S2.stride(0),
        rows.tile_TW,
        parts.y_SHID,
        parts.log_SHI,
        parts.shared,
        parts.shared + parts.own,
        ROWS=geometry.tile_rows,
        **_sizes(geometry, q_SHD),
        BLOCK_M=block(geometry.tile_rows * geometry.group, 16),
        num_warps=4,
        num_stages=_stages(q_SHD),
    )


def _launch_own(
    geometry: Geometry, q_SHD: Tensor, rows: Rows, k_SKLD: Tensor, v_SKLD: Tensor, parts: Parts
) -> None:
    own_kernel[geometry.kv_heads, parts.own, q_SHD.shape[0]](
        q_SHD,
        rows.length_S,
        rows.start_S,
        k_SKLD,
        v_SKLD,
        k_SKLD.shape[2],
        parts.y_SHID,
        parts.log_SHI,
        parts.shared,
        parts.own,
        parts.shared + parts.own,
        **_sizes(geometry, q_SHD),
        BLOCK_M=block(geometry.group, 16),
        num_warps=4,
        num_stages=_stages(q_SHD),
    )


def _stages(q_SHD: Tensor) -> int:
    """Steps of the loop that are on their way at once; float32 takes the memory of two for one."""
    return 2 if q_SHD.element_size() == 2 else 1


def _sizes(geometry: Geometry, q_SHD: Tensor) -> dict[str, object]:
    tile_d = block(geometry.head_dim, 16)
    # Keys and values of a step of the loop take 16 KiB each: two steps of both fit anywhere.
    positions = max(16, min(128, 16384 // (tile_d * q_SHD.element_size())))
    return {
        "SCALE": geometry.head_dim**-0.5 * 1.4426950408889634,  # exponentials are to the base of 2
        "HEADS": geometry.heads,
        "KV_HEADS": geometry.kv_heads,
        "D": geometry.head_dim,
        "SHORTEST": max(SHORTEST, positions),
        "BLOCK_D": tile_d,
        "BLOCK_L": positions,
    }
