"""`ssd.scan_chunked` by kernels, for a CPU: the same products, and one pass over the memory for all
that is between two of them. Gradients are written out: what they need of each chunk is one matrix.

Shapes: B batch, T time, H heads, P head channels, G groups of b/c, N state; Q chunk, K chunks.
X chunks of heads, BKH.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retort.ops import ssd
from retort.ops.arrays import team


def scan(
    v_BTHP: Tensor,
    log_decay_BTH: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    state_BHPN: Tensor,
    document_BT: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """`ssd.scan_chunked` of float32 tensors on a CPU. No document's id may come back in a row;
    gradients cannot be differentiated once more.
    """
    inputs = (v_BTHP, log_decay_BTH, b_BTGN, c_BTGN, state_BHPN)
    return _Scan.apply(*inputs, document_BT, chunk)


class _Scan(torch.autograd.Function):
    """The scan and its gradient. With S the state at the start of a chunk, M = (c b^T) decay,
    `left` the decays from there on, and `until` those up to its end:

        y = M v + (left c) S^T        S' = left_last S + v^T (until b)
    """

    @staticmethod
    def forward(
        ctx: Any,
        v_BTHP: Tensor,
        log_decay_BTH: Tensor,
        b_BTGN: Tensor,
        c_BTGN: Tensor,
        state_BHPN: Tensor,
        document_BT: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        from retort.ops.cpu import dual

        batch, length, heads = log_decay_BTH.shape
        chunk = min(chunk, length)
        v, b, c = (_by_head(x, heads, chunk) for x in (v_BTHP, b_BTGN, c_BTGN))
        total_XQ = _totals(log_decay_BTH, chunk)
        document_BKQ = _documents(document_BT, batch, length, chunk)
        arrays = total_XQ.numpy(), document_BKQ.numpy()

        matrix_XQQ = torch.bmm(c, b.transpose(1, 2))
        left, until = (v.new_empty(len(v), chunk) for _ in range(2))
        dual.decay(*arrays, matrix_XQQ.numpy(), left.numpy(), until.numpy(), team())
        added_XPN = torch.bmm(v.transpose(1, 2), b * until[..., None])
        last_BHPN = state_BHPN.detach().clone(memory_format=torch.contiguous_format)
        # Each chunk's state takes the place of what the chunk adds to it.
        dual.carry(left.numpy(), added_XPN.numpy(), last_BHPN.numpy(), team())
        y_XQP = torch.bmm(c * left[..., None], added_XPN.transpose(1, 2))
        y_XQP.baddbmm_(matrix_XQQ, v)
        kept = (v, b, c, total_XQ, document_BKQ, matrix_XQQ, left, until, added_XPN)
        ctx.save_for_backward(log_decay_BTH, *kept)
        ctx.groups = b_BTGN.shape[2]
        return _by_token(y_XQP, batch, heads, length), last_BHPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y_BTHP: Tensor, of_last_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        from retort.ops.cpu import dual

        log_decay_BTH, v, b, c, total_XQ, document_BKQ, matrix_XQQ, left, until, starts_XPN = (
            ctx.saved_tensors
        )
        batch, length, heads = log_decay_BTH.shape
        of_y_XQP = _by_head(of_y_BTHP, heads, v.shape[1])
        of_total_XQ = torch.empty_like(total_XQ)
        of_scores_XQQ = torch.bmm(of_y_XQP, v.transpose(1, 2))
        arrays = total_XQ.numpy(), document_BKQ.numpy(), matrix_XQQ.numpy()
        dual.decay_backward(*arrays, of_scores_XQQ.numpy(), of_total_XQ.numpy(), team())

        of_added_XPN = torch.bmm(of_y_XQP.transpose(1, 2), c * left[..., None])
        of_state_BHPN = of_last_BHPN.clone(memory_format=torch.contiguous_format)
        states = left.numpy(), starts_XPN.numpy()
        found = of_added_XPN.numpy(), of_state_BHPN.numpy(), of_total_XQ.numpy()
        dual.carry_backward(*states, *found, team())

        of_v_XQP = torch.bmm(matrix_XQQ.transpose(1, 2), of_y_XQP)
        of_v_XQP.baddbmm_(b * until[..., None], of_added_XPN.transpose(1, 2))
        of_c_XQN, of_b_XQN = torch.bmm(of_y_XQP, starts_XPN), torch.bmm(v, of_added_XPN)
        inputs = c.numpy(), b.numpy(), left.numpy(), until.numpy()
        found = of_c_XQN.numpy(), of_b_XQN.numpy(), of_total_XQ.numpy()
        dual.weigh_backward(*inputs, *found, team())
        of_c_XQN.baddbmm_(of_scores_XQQ, b)
        of_b_XQN.baddbmm_(of_scores_XQQ.transpose(1, 2), c)

        of_v, of_b, of_c = (
            _by_token(x, batch, heads, length) for x in (of_v_XQP, of_b_XQN, of_c_XQN)
        )
        of_b, of_c = (_by_group(x, ctx.groups) for x in (of_b, of_c))
        return of_v, _of_decays(of_total_XQ, log_decay_BTH), of_b, of_c, of_state_BHPN, None, None


def _by_head(x_BTGN: Tensor, heads: int, chunk: int) -> Tensor:
    """The tokens of each chunk of each head, x_XQN."""
    x_BKQHN = ssd.per_head(ssd.chunks(x_BTGN, chunk), heads, dim=3)
    return x_BKQHN.transpose(2, 3).contiguous().flatten(0, 2)


def _by_token(x_XQN: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """The other way round: x_BTHN."""
    x_BKHQN = x_XQN.unflatten(0, (batch, -1, heads))
    return x_BKHQN.transpose(2, 3).flatten(1, 2)[:, :length].contiguous()


def _by_group(x_BTHN: Tensor, groups: int) -> Tensor:
    """The sum over the heads of each group."""
    return x_BTHN if x_BTHN.shape[2] == groups else x_BTHN.unflatten(2, (groups, -1)).sum(3)


def _totals(log_decay_BTH: Tensor, chunk: int) -> Tensor:
    """Sums of a chunk's log-decays up to each token, in float64."""
    a_BKHQ = ssd.chunks(log_decay_BTH, chunk).transpose(2, 3)
    return ssd.running_totals(a_BKHQ).flatten(0, 2).contiguous()


def _of_decays(of_total_XQ: Tensor, log_decay_BTH: Tensor) -> Tensor:
    """The gradient of the log-decays, each of which is in the totals from its own token on."""
    batch, length, heads = log_decay_BTH.shape
    later_XQ = of_total_XQ.flip(-1).cumsum(-1).flip(-1)
    found_BTH = _by_token(later_XQ[..., None], batch, heads, length).squeeze(-1)
    return found_BTH.to(log_decay_BTH.dtype).where(log_decay_BTH >= ssd.FORGOTTEN, 0)


def _documents(document_BT: Tensor | None, batch: int, length: int, chunk: int) -> Tensor:
    """The documents by chunk, document_BKQ; one for each row where none are told."""
    if document_BT is None:
        return torch.zeros(batch, -(-length // chunk), chunk, dtype=torch.long)
    return ssd.chunk_documents(document_BT.expand(batch, length), chunk).contiguous()
