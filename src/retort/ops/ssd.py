"""State-space dual: one linear recurrence, three views (Dao and Gu 2024, arXiv 2405.21060).

    S_t = exp(a_t) S_{t-1} + v_t b_t^T        y_t = S_t c_t

`scan_chunked` runs it in parallel over T, `step` one token at a time, and `mixing_matrix` is the
T x T matrix M with y = M v. `scan_sequential` is the recurrence as written, the reference of all.
`outputs_ahead` and `advance_` are the two halves of a scan over few tokens, of which it is known
only after the first half how many stay.

Shapes: B batch, T time, H heads, P head channels, G groups of b/c, N state; Q chunk, K chunks.
Head h reads group h // (H/G). Log-decays a are <= 0, down to -inf; every result is in the dtype of
the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORGOTTEN = -1000.0
"""A log-decay whose exponential is 0 in every dtype; what is below it counts as it."""


def step(
    v_BHP: Tensor, log_decay_BH: Tensor, b_BGN: Tensor, c_BGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token from a state: the outputs y_BHP and the next state."""
    heads = v_BHP.shape[1]
    b_BHN, c_BHN = per_head(b_BGN, heads), per_head(c_BGN, heads)
    decay_BH11 = log_decay_BH.exp()[:, :, None, None]
    state_BHPN = decay_BH11 * state_BHPN + v_BHP[..., None] * b_BHN[:, :, None, :]
    return (state_BHPN @ c_BHN[..., None]).squeeze(-1), state_BHPN


def scan_sequential(
    v_BTHP: Tensor, log_decay_BTH: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token: the reference for `scan_chunked`, slow and plain."""
    outputs = []
    for t in range(v_BTHP.shape[1]):
        y_BHP, state_BHPN = step(
            v_BTHP[:, t], log_decay_BTH[:, t], b_BTGN[:, t], c_BTGN[:, t], state_BHPN
        )
        outputs.append(y_BHP)
    return torch.stack(outputs, dim=1), state_BHPN


def mixing_matrix(
    log_decay_BTH: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, document_BT: Tensor | None = None
) -> Tensor:
    """M_BHTS with y = M v: M[t, s] = (c_t . b_s) exp(sum of a over s < j <= t), 0 where s > t."""
    heads = log_decay_BTH.shape[-1]
    decay_BHTS = decay_matrix(log_decay_BTH.transpose(1, 2), _spread(document_BT))
    scores_BGTS = torch.einsum("btgn,bsgn->bgts", c_BTGN, b_BTGN)
    return per_head(scores_BGTS, heads) * decay_BHTS


def scan_chunked(
    v_BTHP: Tensor,
    log_decay_BTH: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    state_BHPN: Tensor,
    document_BT: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The recurrence in parallel: outputs y_BTHP and the final state.

    Within a chunk the mixing matrix is applied directly; between chunks only states travel.
    With `document_BT` the state restarts wherever the id changes; the starting state belongs to
    the first document of each row.
    """
    length, heads = v_BTHP.shape[1], v_BTHP.shape[2]
    chunk = min(chunk, length)
    v_BKQHP, a_BKQH = chunks(v_BTHP, chunk), chunks(log_decay_BTH, chunk)
    b_BKQHN = per_head(chunks(b_BTGN, chunk), heads, dim=3)
    c_BKQHN = per_head(chunks(c_BTGN, chunk), heads, dim=3)
    # BKHQ*, contiguous: each is in two matrix products, which would copy it every time.
    v, b, c = (x.transpose(2, 3).contiguous() for x in (v_BKQHP, b_BKQHN, c_BKQHN))
    total_BKHQ = running_totals(a_BKQH.transpose(2, 3))
    document_BKQ = None if document_BT is None else chunk_documents(document_BT, chunk)

    decay_BKHQQ = _decays_between(total_BKHQ, v.dtype, _spread(document_BKQ))
    within_BKHQP = (c @ b.transpose(-1, -2) * decay_BKHQQ) @ v

    # What each chunk adds to the state at its end: its last row of decays, applied to v b^T.
    added_BKHPN = (v * decay_BKHQQ[..., -1, :, None]).transpose(-1, -2) @ b
    starts_BKHPN, last_BHPN = _carry(added_BKHPN, total_BKHQ[..., -1], state_BHPN, document_BKQ)

    entering_BKHQ = total_BKHQ.to(v.dtype).exp()
    if document_BKQ is not None:
        entering_BKHQ = entering_BKHQ * _continues(document_BKQ)[:, :, None]
    across_BKHQP = (c @ starts_BKHPN.transpose(-1, -2)) * entering_BKHQ[..., None]

    y_BKQHP = (within_BKHQP + across_BKHQP).transpose(2, 3)
    return y_BKQHP.flatten(1, 2)[:, :length], last_BHPN


def outputs_ahead(
    v_BTHP: Tensor, log_decay_BTH: Tensor, b_BTGN: Tensor, c_BTGN: Tensor, state_BHPN: Tensor
) -> Tensor:
    """The outputs y_BTHP of a few tokens alone: the state is read once, and none is made."""
    matrix_BHTT = mixing_matrix(log_decay_BTH, b_BTGN, c_BTGN)
    within_BHTP = matrix_BHTT @ v_BTHP.transpose(1, 2)
    c_BHTN = per_head(c_BTGN, v_BTHP.shape[2], dim=2).transpose(1, 2)
    entering_BHT = log_decay_BTH.transpose(1, 2).cumsum(-1).exp()
    across_BHTP = (c_BHTN @ state_BHPN.transpose(-1, -2)) * entering_BHT[..., None]
    return (within_BHTP + across_BHTP).transpose(1, 2)


def advance_(v_BTHP: Tensor, log_decay_BTH: Tensor, b_BTGN: Tensor, state_BHPN: Tensor) -> None:
    """Moves a contiguous state on by a few tokens, in place and without their outputs."""
    a_BHT = log_decay_BTH.transpose(1, 2)
    leaving_BHT = decay_matrix(a_BHT)[..., -1, :]
    weighted_BHTP = v_BTHP.transpose(1, 2) * leaving_BHT[..., None]
    b_BHTN = per_head(b_BTGN, v_BTHP.shape[2], dim=2).transpose(1, 2)
    state_BHPN *= a_BHT.sum(-1).exp()[..., None, None]
    state_XPN = state_BHPN.view(-1, *state_BHPN.shape[2:])
    state_XPN.baddbmm_(weighted_BHTP.flatten(0, 1).transpose(1, 2), b_BHTN.flatten(0, 1))


def decay_matrix(log_decay_T: Tensor, document_T: Tensor | None = None) -> Tensor:
    """exp of the sums of log-decays over s < j <= t along the last dimension: (..., T, T).

    Zero where s > t or where the documents of s and t differ.
    """
    return _decays_between(running_totals(log_decay_T), log_decay_T.dtype, document_T)


def per_head(x: Tensor, heads: int, dim: int = 1) -> Tensor:
    """Repeats each group's entry along `dim` so that there is one for every head."""
    groups = x.shape[dim]
    return x if groups == heads else x.repeat_interleave(heads // groups, dim)


def running_totals(log_decay_T: Tensor) -> Tensor:
    """Sums of the log-decays up to each token along the last dimension, in float64.

    Differences of them have to be right to 1e-6: in float32 one strong decay would drown the weak
    ones behind it, and in float64 one of -1e20, or of -inf, still would.
    """
    return log_decay_T.clamp(min=FORGOTTEN).double().cumsum(-1)


def _decays_between(total_T: Tensor, dtype: torch.dtype, document_T: Tensor | None) -> Tensor:
    """`decay_matrix` from running totals."""
    # The sum with the negative has a cheaper gradient than the difference: no negated T x T matrix.
    sums_TS = (total_T[..., :, None] + -total_T[..., None, :]).to(dtype)
    size = total_T.shape[-1]
    keep_TS = torch.ones(size, size, dtype=torch.bool, device=total_T.device).tril()
    if document_T is not None:
        keep_TS = keep_TS & (document_T[..., :, None] == document_T[..., None, :])
    return sums_TS.masked_fill(~keep_TS, float("-inf")).exp()


def _carry(
    added_BKHPN: Tensor, log_decay_BKH: Tensor, state_BHPN: Tensor, document_BKQ: Tensor | None
) -> tuple[Tensor, Tensor]:
    """States at the start of every chunk, and after the last: the same map one level up."""
    inputs_BKHPN = torch.cat([state_BHPN[:, None], added_BKHPN], dim=1)
    a_BHK = torch.nn.functional.pad(log_decay_BKH, (0, 0, 1, 0)).transpose(1, 2)
    document_BK = None
    if document_BKQ is not None:
        document_BK = torch.cat([document_BKQ[:, :1, 0], document_BKQ[:, :, -1]], dim=1)
    decay_BHKK = decay_matrix(a_BHK, _spread(document_BK)).to(added_BKHPN.dtype)
    states_BKHPN = torch.einsum("bhkj,bjhpn->bkhpn", decay_BHKK, inputs_BKHPN)
    return states_BKHPN[:, :-1], states_BKHPN[:, -1]


def _continues(document_BKQ: Tensor) -> Tensor:
    """1 where a token belongs to the document that the chunk before it ended in."""
    before_BK = torch.cat([document_BKQ[:, :1, 0], document_BKQ[:, :-1, -1]], dim=1)
    return document_BKQ == before_BK[..., None]


def chunks(x_BT: Tensor, chunk: int) -> Tensor:
    """Splits T into chunks, padding with zeros: no input and no decay, so states stay."""
    batch, length = x_BT.shape[:2]
    missing = -length % chunk
    if missing:
        x_BT = torch.cat([x_BT, x_BT.new_zeros(batch, missing, *x_BT.shape[2:])], dim=1)
    return x_BT.unflatten(1, (-1, chunk))


def chunk_documents(document_BT: Tensor, chunk: int) -> Tensor:
    """Document ids in chunks; the padding continues the last document, so its state survives."""
    missing = -document_BT.shape[1] % chunk
    tail_BT = document_BT[:, -1:].expand(-1, missing)
    return torch.cat([document_BT, tail_BT], dim=1).unflatten(1, (-1, chunk))


def _spread(document_T: Tensor | None) -> Tensor | None:
    """Document ids with a head dimension before the last one."""
    return None if document_T is None else document_T[..., None, :]
