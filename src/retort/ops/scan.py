"""Mamba-1's selective scan (Gu and Dao 2023, arXiv 2312.00752): a decay per channel and state.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t b_t^T        y_t = h_t c_t

`scan_chunked` runs it over T in bounded memory, `step` one token at a time; `scan_sequential` is
the recurrence as written, the reference of both.

Shapes: B batch, T time, H heads, P head channels, N state; Q chunk. Steps dt are >= 0 and A <= 0:
decays lie in [0, 1], and nothing is ever divided by one. A token with dt = 0 leaves the state as it
is, bit by bit. Every result is in the dtype of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def step(
    x_BHP: Tensor, dt_BHP: Tensor, a_HPN: Tensor, b_BHN: Tensor, c_BHN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token from a state: the outputs y_BHP and the next state."""
    decay_BHPN = (dt_BHP[..., None] * a_HPN).exp()
    added_BHPN = (dt_BHP * x_BHP)[..., None] * b_BHN[:, :, None]
    state_BHPN = torch.addcmul(added_BHPN, decay_BHPN, state_BHPN)
    return (state_BHPN @ c_BHN[..., None]).squeeze(-1), state_BHPN


def scan_sequential(
    x_BTHP: Tensor,
    dt_BTHP: Tensor,
    a_HPN: Tensor,
    b_BTHN: Tensor,
    c_BTHN: Tensor,
    state_BHPN: Tensor,
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token: the reference for `scan_chunked`, slow and plain."""
    outputs = []
    for t in range(x_BTHP.shape[1]):
        y_BHP, state_BHPN = step(
            x_BTHP[:, t], dt_BTHP[:, t], a_HPN, b_BTHN[:, t], c_BTHN[:, t], state_BHPN
        )
        outputs.append(y_BHP)
    return torch.stack(outputs, dim=1), state_BHPN


def scan_chunked(
    x_BTHP: Tensor,
    dt_BTHP: Tensor,
    a_HPN: Tensor,
    b_BTHN: Tensor,
    c_BTHN: Tensor,
    state_BHPN: Tensor,
    document_BT: Tensor | None = None,
    chunk: int = 16,
) -> tuple[Tensor, Tensor]:
    """The recurrence chunk by chunk: outputs y_BTHP and the final state.

    What grows with T is one state per chunk: where gradients are wanted, the backward pass computes
    the states within a chunk anew. With `document_BT` the state restarts wherever the id changes;
    the starting state belongs to the first document of each row.
    """
    keep_BT = None if document_BT is None else _continues(document_BT)
    outputs = []
    for start in range(0, x_BTHP.shape[1], chunk):
        tokens = slice(start, start + chunk)
        inputs = (
            x_BTHP[:, tokens],
            dt_BTHP[:, tokens],
            a_HPN,
            b_BTHN[:, tokens],
            c_BTHN[:, tokens],
            state_BHPN,
            None if keep_BT is None else keep_BT[:, tokens],
        )
        if torch.is_grad_enabled():
            y_BQHP, state_BHPN = checkpoint(
                _scan_chunk, *inputs, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y_BQHP, state_BHPN = _scan_chunk(*inputs)
        outputs.append(y_BQHP)
    return torch.cat(outputs, dim=1), state_BHPN


def _scan_chunk(
    x_BQHP: Tensor,
    dt_BQHP: Tensor,
    a_HPN: Tensor,
    b_BQHN: Tensor,
    c_BQHN: Tensor,
    state_BHPN: Tensor,
    keep_BQ: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One chunk: all but one multiply-add per token is done for the whole chunk at once.

    In chunks as short as memory wants them, a scan of logarithmic depth starts as many kernels and
    takes 2.5 times as long on a CPU: every level of it is a pass over all states of the chunk.
    """
    decay_BQHPN = (dt_BQHP[..., None] * a_HPN).exp()
    if keep_BQ is not None:
        decay_BQHPN = decay_BQHPN * keep_BQ[..., None, None, None]
    added_BQHPN = (dt_BQHP * x_BQHP)[..., None] * b_BQHN[..., None, :]
    states = []
    for decay_BHPN, added_BHPN in zip(decay_BQHPN.unbind(1), added_BQHPN.unbind(1), strict=True):
        state_BHPN = torch.addcmul(added_BHPN, decay_BHPN, state_BHPN)
        states.append(state_BHPN)
    # The sum, not a matrix product: N is small, and the product's gradient is slow to batch.
    y_BQHP = (torch.stack(states, dim=1) * c_BQHN[..., None, :]).sum(-1)
    return y_BQHP, state_BHPN


def _continues(document_BT: Tensor) -> Tensor:
    """Whether a token belongs to the document of the one before it, or is the first of its row."""
    before_BT = torch.cat([document_BT[:, :1], document_BT[:, :-1]], dim=1)
    return document_BT == before_BT
