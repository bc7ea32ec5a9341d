"""The state's step against the formula, for widths of whole vectors and others."""

import numpy as np
import pytest

from retort.ops.cpu.jit import kernel
from retort.ops.cpu.recurrence import Floats, update


@kernel
def updated(
    state_NP: Floats, x_P: Floats, b_N: Floats, c_N: Floats, numbers_3: Floats, y_P: Floats
) -> None:
    update(state_NP, x_P, b_N, c_N, numbers_3[0], numbers_3[1], numbers_3[2], y_P)


@pytest.mark.parametrize("states", [1, 7, 64])
@pytest.mark.parametrize("width", [1, 8, 16, 24, 64, 72, 80, 144])
def test_the_step_is_the_formula(states: int, width: int) -> None:
    draw = np.random.default_rng(width)
    state_NP = draw.standard_normal((states, width), np.float32)
    x_P, b_N, c_N = (draw.standard_normal(n, np.float32) for n in (width, states, states))
    numbers_3 = np.array([0.75, 0.5, -2], np.float32)
    # what is around it stays as it is
    room_3NP = np.stack([np.full_like(state_NP, 3), state_NP, np.full_like(state_NP, 3)])
    y_P = np.full(width + 2, 5, np.float32)
    updated(room_3NP[1], x_P, b_N, c_N, numbers_3, y_P[1:-1])
    wanted_NP = 0.75 * state_NP + 0.5 * b_N[:, None] * x_P
    np.testing.assert_allclose(room_3NP[1], wanted_NP, atol=1e-5)
    np.testing.assert_allclose(y_P[1:-1], c_N @ wanted_NP - 2 * x_P, atol=2e-4)
    assert (y_P[[0, -1]] == 5).all()
    assert (room_3NP[[0, 2]] == 3).all()
