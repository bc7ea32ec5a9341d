"""Mamba-1's selective scan (Gu and Dao 2023, arXiv 2312.00752): a decay per channel and state.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t b_t^T        y_t = h_t c_t

`scan_chunked` runs it over T in bounded memory, `step` one token at a time; `scan_sequential` is
the recurrence as written, the reference of both.

Shapes: B batch, T time, H heads, P head channels, N state; Q chunk. Steps dt are >= 0 and A <= 0:
decays lie in [0, 1], and nothing is ever divided by one. A token with dt = 0 leaves the state as it
is, bit by bit. Every result is in the dtype of the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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

    What grows with T is one state per chunk: the backward pass computes those within a chunk anew.
    With `document_BT` the state restarts wherever the id changes; the starting state belongs to the
    first document of each row. Gradients cannot be differentiated once more.
    """
    keep_BT = None if document_BT is None else _continues(document_BT)
    inputs = (x_BTHP, dt_BTHP, a_HPN, b_BTHN, c_BTHN, state_BHPN)
    return _ChunkedScan.apply(*inputs, keep_BT, chunk)


class _ChunkedScan(torch.autograd.Function):
    """`scan_chunked` and its gradient. That of the loss by h_t, g_t, is a scan backwards in time:

        g_t = dy_t c_t^T + decay_{t+1} g_{t+1}

    Autograd over checkpointed chunks gives the same, but takes twice as long, and leaves the memory
    of a CPU so fragmented that it holds ten times what is in use.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BTHP: Tensor,
        dt_BTHP: Tensor,
        a_HPN: Tensor,
        b_BTHN: Tensor,
        c_BTHN: Tensor,
        state_BHPN: Tensor,
        keep_BT: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        y_BTHP, starts = torch.empty_like(x_BTHP), []
        for tokens in _chunks(x_BTHP.shape[1], chunk):
            starts.append(state_BHPN)
            decay_BQHPN = _decays(dt_BTHP, a_HPN, keep_BT, tokens)
            states_BQHPN = _states(x_BTHP, dt_BTHP, b_BTHN, decay_BQHPN, state_BHPN, tokens)
            y_BTHP[:, tokens] = (states_BQHPN * c_BTHN[:, tokens, :, None]).sum(-1)
            state_BHPN = states_BQHPN[:, -1].clone()  # a view would keep all states of the chunk
        ctx.save_for_backward(x_BTHP, dt_BTHP, a_HPN, b_BTHN, c_BTHN, keep_BT, *starts)
        ctx.chunk = chunk
        return y_BTHP, state_BHPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHP: Tensor, g_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        x_BTHP, dt_BTHP, a_HPN, b_BTHN, c_BTHN, keep_BT, *starts = ctx.saved_tensors
        dx_BTHP, ddt_BTHP = torch.empty_like(x_BTHP), torch.empty_like(dt_BTHP)
        db_BTHN, dc_BTHN = torch.empty_like(b_BTHN), torch.empty_like(c_BTHN)
        da_HPN = torch.zeros_like(a_HPN)
        chunks = _chunks(x_BTHP.shape[1], ctx.chunk)
        for tokens, start_BHPN in zip(reversed(chunks), reversed(starts), strict=True):
            x_BQHP1, dt_BQHP1 = x_BTHP[:, tokens, ..., None], dt_BTHP[:, tokens, ..., None]
            dy_BQHP1 = dy_BTHP[:, tokens, ..., None]
            b_BQH1N, c_BQH1N = b_BTHN[:, tokens, :, None], c_BTHN[:, tokens, :, None]

            decay_BQHPN = _decays(dt_BTHP, a_HPN, keep_BT, tokens)
            states_BQHPN = _states(x_BTHP, dt_BTHP, b_BTHN, decay_BQHPN, start_BHPN, tokens)
            g_BQHPN = _gradients_of_states(dy_BQHP1 * c_BQH1N, decay_BQHPN, g_BHPN)
            g_BHPN = decay_BQHPN[:, 0] * g_BQHPN[:, 0]

            dc_BTHN[:, tokens] = (dy_BQHP1 * states_BQHPN).sum(-2)
            db_BTHN[:, tokens] = (dt_BQHP1 * x_BQHP1 * g_BQHPN).sum(-2)
            added_BQHP = (b_BQH1N * g_BQHPN).sum(-1)  # the gradient of dt x
            dx_BTHP[:, tokens] = dt_BTHP[:, tokens] * added_BQHP
            # The gradient of dt A, which has the decay for its exponential.
            log_BQHPN = g_BQHPN.mul_(decay_BQHPN)
            log_BQHPN[:, 0] *= start_BHPN
            log_BQHPN[:, 1:] *= states_BQHPN[:, :-1]
            ddt_BTHP[:, tokens] = x_BTHP[:, tokens] * added_BQHP + (log_BQHPN * a_HPN).sum(-1)
            da_HPN += (log_BQHPN * dt_BQHP1).sum((0, 1))
        return dx_BTHP, ddt_BTHP, da_HPN, db_BTHN, dc_BTHN, g_BHPN, None, None


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]


def _decays(dt_BTHP: Tensor, a_HPN: Tensor, keep_BT: Tensor | None, tokens: slice) -> Tensor:
    """decay_BQHPN of the tokens of a chunk."""
    decay_BQHPN = (dt_BTHP[:, tokens, ..., None] * a_HPN).exp_()
    if keep_BT is not None:
        decay_BQHPN *= keep_BT[:, tokens, None, None, None]
    return decay_BQHPN


def _states(
    x_BTHP: Tensor,
    dt_BTHP: Tensor,
    b_BTHN: Tensor,
    decay_BQHPN: Tensor,
    state_BHPN: Tensor,
    tokens: slice,
) -> Tensor:
    """States_BQHPN after the tokens of a chunk, from the state before it.

    In chunks as short as memory wants them, a scan of logarithmic depth starts as many kernels and
    takes twice as long on a CPU, if not longer: each level of it is a pass over all these states.
    """
    added_BQHP = dt_BTHP[:, tokens] * x_BTHP[:, tokens]
    states_BQHPN = added_BQHP[..., None] * b_BTHN[:, tokens, :, None]
    for t in range(states_BQHPN.shape[1]):
        state_BHPN = states_BQHPN[:, t].addcmul_(decay_BQHPN[:, t], state_BHPN)
    return states_BQHPN


def _gradients_of_states(g_BQHPN: Tensor, decay_BQHPN: Tensor, after_BHPN: Tensor) -> Tensor:
    """All g_t of a chunk, in place of what its outputs alone make of them.

    `after_BHPN` is what reaches the last state from behind the chunk.
    """
    g_BQHPN[:, -1] += after_BHPN
    for t in reversed(range(g_BQHPN.shape[1] - 1)):
        g_BQHPN[:, t].addcmul_(decay_BQHPN[:, t + 1], g_BQHPN[:, t + 1])
    return g_BQHPN


def _continues(document_BT: Tensor) -> Tensor:
    """Whether a token belongs to the document of the one before it, or is the first of its row."""
    before_BT = torch.cat([document_BT[:, :1], document_BT[:, :-1]], dim=1)
    return document_BT == before_BT
