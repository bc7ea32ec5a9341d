"""The functions that kernels compute with, over all of their range."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import silu, softplus

from retort.ops.cpu import maths, storage
from retort.ops.cpu.jit import kernel

Floats = NDArray[np.float32]
ODD = np.array([-np.inf, np.inf, np.nan, 0.0, -0.0, 1e30, -1e30, 1e-30], np.float32)


@kernel
def functions(x: Floats, exp: Floats, silu: Floats, softplus: Floats) -> None:
    for i in range(x.size):
        exp[i] = maths.exp(x[i])
        silu[i] = maths.silu(x[i])
        softplus[i] = maths.softplus(x[i])


@kernel
def largest(x: NDArray[np.float32], found: Floats) -> None:
    for row in range(len(x)):
        found[row] = maths.largest_of(x[row])


@kernel
def rounded(x: Floats, bits: NDArray[np.uint16], back: Floats) -> None:
    for i in range(x.size):
        bits[i] = storage.stored(x[i], bits[i])
        back[i] = storage.widened(bits[i])


def computed(x: Floats) -> list[Floats]:
    found = [np.empty_like(x) for _ in range(3)]
    functions(x, *found)
    return found


def relative(found: Floats, wanted: torch.Tensor) -> float:
    return float(np.max(np.abs(found - wanted.numpy()) / np.abs(wanted.numpy())))


def test_exponential_over_its_range() -> None:
    x = np.linspace(-86.5, 88.7228, 1_000_001).astype(np.float32)
    exp, _, _ = computed(x)
    assert relative(exp, torch.tensor(x).double().exp()) < 4e-7
    assert (computed(np.linspace(-200, -86.51, 1001).astype(np.float32))[0] == 0).all()


def test_silu_and_softplus_over_their_range() -> None:
    x = np.linspace(-80, 88, 1_000_001).astype(np.float32)
    x = x[x != 0]
    _, gate, soft = computed(x)
    assert relative(gate, silu(torch.tensor(x).double())) < 5e-7
    assert relative(soft, softplus(torch.tensor(x).double(), threshold=100)) < 8e-7


def test_infinities_and_nan_keep_their_meaning() -> None:
    exp, gate, soft = computed(ODD)
    inf, nan = np.inf, np.nan
    np.testing.assert_array_equal(exp, [0, inf, nan, 1, 1, inf, 0, 1])
    np.testing.assert_array_equal(gate[:7], [nan, inf, nan, 0, 0, np.float32(1e30), 0])
    np.testing.assert_array_equal(soft[[0, 1, 2, 5, 6]], [0, inf, nan, np.float32(1e30), 0])


@pytest.mark.parametrize("width", [1, 3, 64, 100])
def test_largest(width: int) -> None:
    x = np.random.randn(20, width).astype(np.float32)
    x[0], x[1, 0] = -np.inf, np.inf
    x[2], x[3, -1] = -np.abs(x[2]), np.nan
    found = np.empty(20, np.float32)
    largest(x, found)
    np.testing.assert_array_equal(found, x.max(1))


def test_bfloat16_is_rounded_as_torch_does() -> None:
    ties = torch.arange(2**12, dtype=torch.int32) * 2**15 + 0x3F000000
    x = np.concatenate([np.random.randn(100_000).astype(np.float32), ODD])
    x = np.concatenate([x, ties.view(torch.float32).numpy(), x * np.float32(1e-39)])
    bits, back = np.empty(x.size, np.uint16), np.empty_like(x)
    rounded(x, bits, back)
    np.testing.assert_array_equal(back, torch.tensor(x).bfloat16().float().numpy())
