"""What is between the products of the state-space dual in chunks, and of its gradients.

Work is shared as whole chunks, or whole rows, so sums are the same for any number of threads.

Shapes: B batch, H heads, P head channels, N state; Q chunk, K chunks. X chunks of heads, BKH.
`total_XQ` are the sums of a chunk's log-decays up to each token, `left_XQ` what is left there of
the state at its start, and `until_XQ` the decays from each token up to the chunk's end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from retort.ops.cpu.jit import inner, kernel
from retort.ops.cpu.maths import exp
from retort.ops.cpu.team import Team, share

F: Any = np.float32
D: Any = np.float64
U: Any = np.uintp  # of an index that cannot be negative: without a look whether it is
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Whole = NDArray[np.int64]


@kernel
def decay(
    total_XQ: Doubles,
    document_BKQ: Whole,
    matrix_XQQ: Floats,
    left_XQ: Floats,
    until_XQ: Floats,
    team: Team,
) -> None:
    """Multiplies scores by the decays between tokens of a document, in place; writes `left`, which
    is 0 in documents that have begun in this chunk, and `until`.
    """
    arguments = (total_XQ, document_BKQ, matrix_XQQ, left_XQ, until_XQ)
    share(_decay, arguments, len(total_XQ), 4 * total_XQ.shape[1] ** 2, team)


@inner
def _decay(
    first: int,
    last: int,
    worker: int,
    total_XQ: Doubles,
    document_BKQ: Whole,
    matrix_XQQ: Floats,
    left_XQ: Floats,
    until_XQ: Floats,
) -> None:
    batch, chunks, chunk = document_BKQ.shape
    heads = len(total_XQ) // (batch * chunks)
    decay_Q = np.empty(chunk, F)
    for x in range(first, last):
        row, k = x // heads // chunks, x // heads % chunks
        before = document_BKQ[row, max(k - 1, 0), chunk - 1 if k > 0 else 0]
        for q in range(chunk):
            _decays(total_XQ, document_BKQ, x, row, k, q, decay_Q)
            for s in range(chunk):
                matrix_XQQ[U(x), U(q), U(s)] *= decay_Q[U(s)]
            here = document_BKQ[row, k, q] == before
            left_XQ[x, q] = exp(F(total_XQ[x, q])) if here else F(0)
        for s in range(chunk):
            until_XQ[U(x), U(s)] = decay_Q[U(s)]


@inner
def _decays(
    total_XQ: Doubles, document_BKQ: Whole, x: int, row: int, k: int, q: int, decay_Q: Floats
) -> None:
    """Writes the decays from every token up to q; 0 from those behind it and of other documents."""
    total, document = total_XQ[x, q], document_BKQ[row, k, q]
    size = decay_Q.size
    for s in range(size):
        # Behind q the difference is above 0: its exponential must not become infinite.
        decay_Q[U(s)] = F(min(total - total_XQ[U(x), U(s)], D(0)))
    for s in range(size):
        decay_Q[U(s)] = exp(decay_Q[U(s)])
    for s in range(size):
        same = document_BKQ[U(row), U(k), U(s)] == document
        decay_Q[U(s)] = decay_Q[U(s)] if same else F(0)
    for s in range(q + 1, size):
        decay_Q[U(s)] = F(0)


@kernel
def carry(left_XQ: Floats, added_XPN: Floats, state_BHPN: Floats, team: Team) -> None:
    """Writes the state at the start of each chunk over what the chunk adds, and the last state over
    the first.
    """
    items = state_BHPN.shape[0] * state_BHPN.shape[1]
    share(_carry, (left_XQ, added_XPN, state_BHPN), items, 3 * added_XPN.size // items, team)


@inner
def _carry(
    first: int, last: int, worker: int, left_XQ: Floats, added_XPN: Floats, state_BHPN: Floats
) -> None:
    batch, heads, channels, states = state_BHPN.shape
    chunks, end = len(left_XQ) // (batch * heads), left_XQ.shape[1] - 1
    size = channels * states
    state, added = state_BHPN.reshape(-1), added_XPN.reshape(-1)
    for item in range(first, last):
        for k in range(chunks):
            x = (item // heads * chunks + k) * heads + item % heads
            kept = left_XQ[x, end]
            for i in range(size):
                before = state[U(item * size + i)]
                state[U(item * size + i)] = before * kept + added[U(x * size + i)]
                added[U(x * size + i)] = before


@kernel
def decay_backward(
    total_XQ: Doubles,
    document_BKQ: Whole,
    matrix_XQQ: Floats,
    grad_XQQ: Floats,
    of_total_XQ: Doubles,
    team: Team,
) -> None:
    """Turns gradients of the matrix into those of the scores, in place; writes those of totals."""
    arguments = (total_XQ, document_BKQ, matrix_XQQ, grad_XQQ, of_total_XQ)
    share(_decay_backward, arguments, len(total_XQ), 6 * total_XQ.shape[1] ** 2, team)


@inner
def _decay_backward(
    first: int,
    last: int,
    worker: int,
    total_XQ: Doubles,
    document_BKQ: Whole,
    matrix_XQQ: Floats,
    grad_XQQ: Floats,
    of_total_XQ: Doubles,
) -> None:
    batch, chunks, chunk = document_BKQ.shape
    heads = len(total_XQ) // (batch * chunks)
    decay_Q = np.empty(chunk, F)
    for x in range(first, last):
        row, k = x // heads // chunks, x // heads % chunks
        for s in range(chunk):
            of_total_XQ[U(x), U(s)] = D(0)
        for q in range(chunk):
            # What is added to one total is taken from another, and in float64: sums of the two, of
            # which the log-decays' gradients are made, lose nothing.
            whole = D(0)
            for s in range(chunk):
                product = D(grad_XQQ[U(x), U(q), U(s)] * matrix_XQQ[U(x), U(q), U(s)])
                whole += product
                of_total_XQ[U(x), U(s)] -= product
            of_total_XQ[x, q] += whole
            _decays(total_XQ, document_BKQ, x, row, k, q, decay_Q)
            for s in range(chunk):
                grad_XQQ[U(x), U(q), U(s)] *= decay_Q[U(s)]


@kernel
def carry_backward(
    left_XQ: Floats,
    starts_XPN: Floats,
    grad_XPN: Floats,
    of_state_BHPN: Floats,
    of_total_XQ: Doubles,
    team: Team,
) -> None:
    """Writes the gradients of what each chunk adds over those that its outputs have for the state
    at its start, and the first state's over the last one's; adds to those of totals.
    """
    items = of_state_BHPN.shape[0] * of_state_BHPN.shape[1]
    arguments = (left_XQ, starts_XPN, grad_XPN, of_state_BHPN, of_total_XQ)
    share(_carry_backward, arguments, items, 5 * grad_XPN.size // items, team)


@inner
def _carry_backward(
    first: int,
    last: int,
    worker: int,
    left_XQ: Floats,
    starts_XPN: Floats,
    grad_XPN: Floats,
    of_state_BHPN: Floats,
    of_total_XQ: Doubles,
) -> None:
    batch, heads, channels, states = of_state_BHPN.shape
    chunks, end = len(left_XQ) // (batch * heads), left_XQ.shape[1] - 1
    size = channels * states
    of_state, starts, grad = of_state_BHPN.reshape(-1), starts_XPN.reshape(-1), grad_XPN.reshape(-1)
    for item in range(first, last):
        for back in range(chunks):
            x = (item // heads * chunks + chunks - 1 - back) * heads + item % heads
            kept, product = left_XQ[x, end], D(0)
            for i in range(size):
                product += D(of_state[U(item * size + i)] * starts[U(x * size + i)])
            of_total_XQ[x, end] += product * D(kept)
            for i in range(size):
                behind = of_state[U(item * size + i)]
                of_state[U(item * size + i)] = behind * kept + grad[U(x * size + i)]
                grad[U(x * size + i)] = behind


@kernel
def weigh_backward(
    c_XQN: Floats,
    b_XQN: Floats,
    left_XQ: Floats,
    until_XQ: Floats,
    of_c_XQN: Floats,
    of_b_XQN: Floats,
    of_total_XQ: Doubles,
    team: Team,
) -> None:
    """Turns gradients of `left` c and of `until` b into those of c and b, in place, and adds to
    those of totals.
    """
    arguments = (c_XQN, b_XQN, left_XQ, until_XQ, of_c_XQN, of_b_XQN, of_total_XQ)
    share(_weigh_backward, arguments, len(left_XQ), 4 * c_XQN.size // len(left_XQ), team)


@inner
def _weigh_backward(
    first: int,
    last: int,
    worker: int,
    c_XQN: Floats,
    b_XQN: Floats,
    left_XQ: Floats,
    until_XQ: Floats,
    of_c_XQN: Floats,
    of_b_XQN: Floats,
    of_total_XQ: Doubles,
) -> None:
    chunk, states = c_XQN.shape[1:]
    for x in range(first, last):
        for q in range(chunk):
            left, until = left_XQ[x, q], until_XQ[x, q]
            entered, sent = F(0), F(0)
            for n in range(states):
                of_c = of_c_XQN[U(x), U(q), U(n)] * left
                entered += of_c * c_XQN[U(x), U(q), U(n)]
                of_c_XQN[U(x), U(q), U(n)] = of_c
            for n in range(states):
                of_b = of_b_XQN[U(x), U(q), U(n)] * until
                sent += of_b * b_XQN[U(x), U(q), U(n)]
                of_b_XQN[U(x), U(q), U(n)] = of_b
            of_total_XQ[x, q] += D(entered) - D(sent)
            of_total_XQ[x, chunk - 1] += D(sent)
