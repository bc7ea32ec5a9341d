"""Mamba-1's selective scan: a decay for each channel and state (Gu and Dao 2023, arXiv 2312.00752).

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t b_t^T        y_t = h_t c_t

`scan_chunked` runs it a chunk of tokens at a time, `step` one token at a time, and
`scan_sequential` is the recurrence as written, the reference of both. Every channel and state has a
decay of its own, so there is no T x T matrix for a head, as there is in `ssd`.

Shapes: B batch, T time, H heads, P head channels, N state; Q chunk. dt >= 0 and A <= 0.
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
    state_BHPN = decay_BHPN * state_BHPN + (dt_BHP * x_BHP)[..., None] * b_BHN[:, :, None, :]
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
    """Outputs y_BTHP and the final state, in memory that does not grow with T x N.

    Chunks follow each other; only the state between two of them is kept for the backward pass,
    which runs each chunk again. With `document_BT` the state restarts wherever the id changes; the
    starting state belongs to the first document of each row.
    """
    starts_BT = None if document_BT is None else _starts(document_BT)
    outputs = []
    for first in range(0, x_BTHP.shape[1], chunk):
        part = slice(first, first + chunk)
        arguments = (
            x_BTHP[:, part],
            dt_BTHP[:, part],
            a_HPN,
            b_BTHN[:, part],
            c_BTHN[:, part],
            state_BHPN,
            None if starts_BT is None else starts_BT[:, part],
        )
        if torch.is_grad_enabled():
            y_BQHP, state_BHPN = checkpoint(
                _chunk, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y_BQHP, state_BHPN = _chunk(*arguments)
        outputs.append(y_BQHP)
    return torch.cat(outputs, dim=1), state_BHPN


def _chunk(
    x_BQHP: Tensor,
    dt_BQHP: Tensor,
    a_HPN: Tensor,
    b_BQHN: Tensor,
    c_BQHN: Tensor,
    state_BHPN: Tensor,
    starts_BQ: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All tokens of a chunk at once, by doubling: after step i every token knows the 2^i before."""
    decay_BQHPN = (dt_BQHP[..., None] * a_HPN).exp()
    if starts_BQ is not None:
        decay_BQHPN = decay_BQHPN * ~starts_BQ[:, :, None, None, None]
    state_BQHPN = (dt_BQHP * x_BQHP)[..., None] * b_BQHN[:, :, :, None, :]
    reach, length = 1, x_BQHP.shape[1]
    while reach < length:
        later = state_BQHPN[:, reach:] + decay_BQHPN[:, reach:] * state_BQHPN[:, :-reach]
        state_BQHPN = torch.cat([state_BQHPN[:, :reach], later], dim=1)
        both = decay_BQHPN[:, reach:] * decay_BQHPN[:, :-reach]
        decay_BQHPN = torch.cat([decay_BQHPN[:, :reach], both], dim=1)
        reach *= 2
    state_BQHPN = state_BQHPN + decay_BQHPN * state_BHPN[:, None]
    return (state_BQHPN @ c_BQHN[..., None]).squeeze(-1), state_BQHPN[:, -1]


def _starts(document_BT: Tensor) -> Tensor:
    """True at the first token of every document but the first of its row."""
    return torch.cat(
        [torch.zeros_like(document_BT[:, :1]), document_BT[:, 1:] - document_BT[:, :-1]], dim=1
    ).bool()
