"""The kernels of `dual`: a program has one head of one row.

Shapes: P head channels, N state, E inner width, M width of B and of C, F channels of the
convolution, R tokens of the ring.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retort.ops.cuda.maths import convolve, silu, softplus


@triton.jit
def _inputs(
    row_ptr: tl.tensor,
    conv_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    dt_bias_ptr: tl.tensor,
    a_log_ptr: tl.tensor,
    length: tl.tensor,
    head: tl.tensor,
    p: tl.tensor,
    n: tl.tensor,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DISCRETE: tl.constexpr,
) -> tl.tensor:
    """x, B, C, the logarithm of the decay and the scale of x; the convolution's ring is written.

    x, B and C are rounded to the model's dtype, as a ring keeps them.
    """
    E: tl.constexpr = HEADS * P
    M: tl.constexpr = GROUPS * N
    F: tl.constexpr = E + 2 * M
    now_ptr = row_ptr + (0 if DISCRETE else E)
    group = head // (HEADS // GROUPS)

    x_channel = head * P + p
    b_channel = E + group * N + n
    c_channel = b_channel + M
    in_p, in_n = p < P, n < N
    x, x_now = convolve(
        now_ptr,
        conv_ptr,
        weight_ptr,
        bias_ptr,
        x_channel,
        x_channel,
        in_p,
        length,
        F,
        F,
        TAPS,
        BLOCK_K,
    )
    b, b_now = convolve(
        now_ptr,
        conv_ptr,
        weight_ptr,
        bias_ptr,
        b_channel,
        b_channel,
        in_n,
        length,
        F,
        F,
        TAPS,
        BLOCK_K,
    )
    c, c_now = convolve(
        now_ptr,
        conv_ptr,
        weight_ptr,
        bias_ptr,
        c_channel,
        c_channel,
        in_n,
        length,
        F,
        F,
        TAPS,
        BLOCK_K,
    )
    slot_ptr = conv_ptr + (length % TAPS) * F
    tl.store(slot_ptr + x_channel, x_now, mask=in_p)
    if head % (HEADS // GROUPS) == 0:  # the group's first head keeps B and C
        tl.store(slot_ptr + b_channel, b_now, mask=in_n)
        tl.store(slot_ptr + c_channel, c_now, mask=in_n)

    raw = tl.load(row_ptr + (E + F) + head).to(tl.float32)
    if DISCRETE:
        scale = tl.full((), 1.0, tl.float32)
        log_decay = -softplus(raw)
    else:
        x, b, c = silu(x), silu(b), silu(c)
        scale = softplus(raw + tl.load(dt_bias_ptr + head).to(tl.float32))
        log_decay = -scale * tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    # Channels past the end have silu(0) = 0 everywhere, so they add nothing.
    dtype = row_ptr.dtype.element_ty
    x, b, c = x.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32), c.to(dtype).to(tl.float32)
    return x, b, c, log_decay, scale


@triton.jit
def _put(
    y: tl.tensor,
    x: tl.tensor,
    row_ptr: tl.tensor,
    y_ptr: tl.tensor,
    d_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    gate_bias_ptr: tl.tensor,
    head: tl.tensor,
    p: tl.tensor,
    EPS: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    P: tl.constexpr,
    DISCRETE: tl.constexpr,
    NORM: tl.constexpr,
) -> None:
    """Skip, gate and norm of what the state says; `y_ptr` is of this row."""
    channel = head * P + p
    mask = p < P
    y += tl.load(d_ptr + head).to(tl.float32) * x
    gate = tl.load(row_ptr + (F if DISCRETE else 0) + channel, mask=mask, other=0.0)
    dtype = gate.dtype
    gate = gate.to(tl.float32)
    if DISCRETE:
        bias = tl.load(gate_bias_ptr + channel, mask=mask, other=0.0)
        gate = (gate + bias.to(tl.float32)).to(dtype).to(tl.float32)
    y *= silu(gate)
    if NORM:
        y *= tl.rsqrt(tl.sum(y * y, 0) / P + EPS)
        weight = tl.load(norm_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        y = weight * y.to(dtype).to(tl.float32)
    tl.store(y_ptr + channel, y, mask=mask)


@triton.jit
def step_kernel(
    projected_ptr: tl.tensor,
    row_stride: tl.tensor,
    length_ptr: tl.tensor,
    ssm_ptr: tl.tensor,
    conv_ptr: tl.tensor,
    y_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    d_ptr: tl.tensor,
    dt_bias_ptr: tl.tensor,
    a_log_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    gate_bias_ptr: tl.tensor,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DISCRETE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """The state is read, goes on, and is written."""
    E: tl.constexpr = HEADS * P
    F: tl.constexpr = E + 2 * GROUPS * N
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    mask = (p < P)[:, None] & (n < N)[None, :]
    tile_ptr = ssm_ptr + (row * HEADS + head) * (P * N) + p[:, None] * N + n[None, :]
    state = tl.load(tile_ptr, mask=mask, other=0.0).to(tl.float32)

    row_ptr = projected_ptr + row * row_stride
    ring_ptr = conv_ptr + row * (TAPS * F)
    length = tl.load(length_ptr + row)
    x, b, c, log_decay, scale = _inputs(
        row_ptr, ring_ptr, weight_ptr, bias_ptr, dt_bias_ptr, a_log_ptr, length, head, p, n,
        HEADS, P, N, GROUPS, TAPS, BLOCK_K, DISCRETE,
    )  # fmt: skip
    state = tl.exp(log_decay) * state + (scale * x)[:, None] * b[None, :]
    tl.store(tile_ptr, state, mask=mask)
    y = tl.sum(state * c[None, :], 1)
    _put(
        y, x, row_ptr, y_ptr + row * E, d_ptr, norm_ptr, gate_bias_ptr, head, p,
        EPS, E, F, P, DISCRETE, NORM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def replay_kernel(
    projected_ptr: tl.tensor,
    row_stride: tl.tensor,
    length_ptr: tl.tensor,
    ssm_ptr: tl.tensor,
    conv_ptr: tl.tensor,
    y_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    d_ptr: tl.tensor,
    dt_bias_ptr: tl.tensor,
    a_log_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    gate_bias_ptr: tl.tensor,
    held_ptr: tl.tensor,
    ring_x_ptr: tl.tensor,
    ring_b_ptr: tl.tensor,
    ring_log_ptr: tl.tensor,
    ring_scale_ptr: tl.tensor,
    tokens: tl.tensor,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DISCRETE: tl.constexpr,
    NORM: tl.constexpr,
    R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """The state is read, and written only where this token is the last that the ring holds."""
    E: tl.constexpr = HEADS * P
    M: tl.constexpr = GROUPS * N
    F: tl.constexpr = E + 2 * M
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    p, n, r = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, R)
    in_p, in_n = p < P, n < N
    mask = in_p[:, None] & in_n[None, :]
    tile_ptr = ssm_ptr + (row * HEADS + head) * (P * N) + p[:, None] * N + n[None, :]
    state = tl.load(tile_ptr, mask=mask, other=0.0).to(tl.float32)

    row_ptr = projected_ptr + row * row_stride
    length = tl.load(length_ptr + row)
    held = tl.load(held_ptr + row)
    x, b, c, log_decay, scale = _inputs(
        row_ptr, conv_ptr + row * (TAPS * F), weight_ptr, bias_ptr, dt_bias_ptr, a_log_ptr,
        length, head, p, n, HEADS, P, N, GROUPS, TAPS, BLOCK_K, DISCRETE,
    )  # fmt: skip

    # The tokens that the ring holds, with this one behind them.
    group = head // (HEADS // GROUPS)
    x_ptr = ring_x_ptr + row * (R * E) + head * P
    b_ptr = ring_b_ptr + row * (R * M) + group * N
    log_ptr = ring_log_ptr + (row * HEADS + head) * R
    scale_ptr = ring_scale_ptr + (row * HEADS + head) * R
    old, new = r < held, r == held
    x_RP = tl.load(
        x_ptr + r[:, None] * E + p[None, :], mask=old[:, None] & in_p[None, :], other=0.0
    ).to(tl.float32)
    b_RN = tl.load(
        b_ptr + r[:, None] * M + n[None, :], mask=old[:, None] & in_n[None, :], other=0.0
    ).to(tl.float32)
    x_RP = tl.where(new[:, None], x[None, :], x_RP)
    b_RN = tl.where(new[:, None], b[None, :], b_RN)
    log_R = tl.where(new, log_decay, tl.load(log_ptr + r, mask=old, other=0.0))
    scale_R = tl.where(new, scale, tl.load(scale_ptr + r, mask=old, other=0.0))
    # Decays of the tokens behind each; sums of logarithms, not differences of them, which a strong
    # decay would make worthless.
    after_R = tl.sum(tl.where(r[None, :] > r[:, None], log_R[None, :], 0.0), 1)
    kept = tl.exp(tl.sum(log_R, 0))
    score_R = tl.exp(after_R) * scale_R * tl.sum(b_RN * c[None, :], 1)
    y = kept * tl.sum(state * c[None, :], 1) + tl.sum(score_R[:, None] * x_RP, 0)
    if held == R - 1:
        state = kept * state + (scale * x)[:, None] * b[None, :]
        after = log_decay
        # One by one and from memory: all at once they would take more registers than there are, so
        # the compiler must not know how many there are.
        for back in range(1, tokens):
            token = held - back
            weight = tl.exp(after) * tl.load(scale_ptr + token)
            x_old = tl.load(x_ptr + token * E + p, mask=in_p, other=0.0).to(tl.float32)
            b_old = tl.load(b_ptr + token * M + n, mask=in_n, other=0.0).to(tl.float32)
            state += (weight * x_old)[:, None] * b_old[None, :]
            after += tl.load(log_ptr + token)
        tl.store(tile_ptr, state, mask=mask)
    else:
        tl.store(x_ptr + held * E + p, x, mask=in_p)
        if head % (HEADS // GROUPS) == 0:
            tl.store(b_ptr + held * M + n, b, mask=in_n)
        tl.store(log_ptr + held, log_decay)
        tl.store(scale_ptr + held, scale)
    _put(
        y, x, row_ptr, y_ptr + row * E, d_ptr, norm_ptr, gate_bias_ptr, head, p,
        EPS, E, F, P, DISCRETE, NORM,
    )  # fmt: skip
