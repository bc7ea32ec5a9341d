"""The parallel scan of a device: flash-linear-attention's on a GPU that has it, in 16 bits; our
kernels on a CPU that trains in 32; plain torch elsewhere.

All have the signature of `ssd.scan_chunked`.

Shapes: B batch, T time, H heads, P head channels, G groups of b/c, N state.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling

from retort.ops import chunked, ssd

FORGOTTEN = -100.0
"""A log-decay whose exponential is 0 in float32 on a GPU, yet so small that the sums over a chunk,
which kernels compute in float32, lose nothing that would show."""


class Scan(Protocol):
    """`ssd.scan_chunked`, or what computes the same."""

    def __call__(
        self,
        v_BTHP: Tensor,
        log_decay_BTH: Tensor,
        b_BTGN: Tensor,
        c_BTGN: Tensor,
        state_BHPN: Tensor,
        document_BT: Tensor | None = None,
        chunk: int = 64,
    ) -> tuple[Tensor, Tensor]:
        """Outputs y_BTHP and the final state."""


def open_scan(device: torch.device, dtype: torch.dtype) -> Scan:
    """The scan for models on a device, in a dtype; ours where products have to be exact. A compiler
    takes what torch alone can do: a block that calls anything else, and is computed again in the
    backward pass, it would leave as it is, without a word.
    """
    if is_compiling():
        return ssd.scan_chunked
    if torch.is_grad_enabled() and device.type == "cpu" and dtype == torch.float32:
        return chunked.scan
    fast = device.type == "cuda" and dtype != torch.float32 and has_fla()
    return scan_simple_gla if fast else ssd.scan_chunked


@cache
def has_fla() -> bool:
    """Whether flash-linear-attention is installed (the extra `gpu`)."""
    return importlib.util.find_spec("fla") is not None


def scan_simple_gla(
    v_BTHP: Tensor,
    log_decay_BTH: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    state_BHPN: Tensor,
    document_BT: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """`ssd.scan_chunked` by flash-linear-attention's `chunk_simple_gla`, for CUDA tensors.

    It is linear attention with a decay for each head: c is the query, b the key, v the value, and
    the scale 1. Products are in bfloat16 where the inputs are, and in TF32 for float32. It chooses
    its own chunks (64 tokens), so `chunk` is not looked at.
    """
    from fla.ops.simple_gla import chunk_simple_gla

    heads = v_BTHP.shape[2]
    y_BTHP, last_BHNP = chunk_simple_gla(
        q=ssd.per_head(c_BTGN, heads, dim=2).contiguous(),
        k=ssd.per_head(b_BTGN, heads, dim=2).contiguous(),
        v=v_BTHP.contiguous(),
        g=_separated(log_decay_BTH, document_BT).contiguous(),
        scale=1.0,
        initial_state=state_BHPN.transpose(-1, -2).contiguous(),
        output_final_state=True,
    )
    return y_BTHP, last_BHNP.transpose(-1, -2)


def _separated(log_decay_BTH: Tensor, document_BT: Tensor | None) -> Tensor:
    """Log-decays that forget everything at the first token of each document but a row's first.

    The kernels know documents as rows of one long sequence, whose bounds the host has to learn from
    the device; a decay keeps the shape, and waits for nothing.
    """
    bounded_BTH = log_decay_BTH.clamp(min=FORGOTTEN)
    if document_BT is None:
        return bounded_BTH
    before_BT = torch.cat([document_BT[:, :1], document_BT[:, :-1]], dim=1)
    return bounded_BTH.masked_fill((document_BT != before_BT)[..., None], FORGOTTEN)
