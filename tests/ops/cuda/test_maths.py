"""Functions that kernels share."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels for GPUs need triton, which is for Linux")

import triton
import triton.language as tl

from retort.ops.cuda.maths import block, silu, softplus


@triton.jit
def _kernel(
    x_ptr: tl.tensor, softplus_ptr: tl.tensor, silu_ptr: tl.tensor, BLOCK: tl.constexpr
) -> None:
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(softplus_ptr + i, softplus(x))
    tl.store(silu_ptr + i, silu(x))


def test_precision(triton_device: str) -> None:
    x_N = torch.linspace(-60, 60, 1024, device=triton_device)
    softplus_N, silu_N = torch.empty(2, 1024, device=triton_device)
    _kernel[1,](x_N, softplus_N, silu_N, BLOCK=1024)
    wanted = torch.nn.functional.softplus(x_N.double(), threshold=100)
    torch.testing.assert_close(softplus_N.double(), wanted, rtol=1e-5, atol=0)
    near = x_N.abs() < 4
    torch.testing.assert_close(softplus_N.double()[near], wanted[near], rtol=1.5e-6, atol=0)
    wanted = torch.nn.functional.silu(x_N.double())
    torch.testing.assert_close(silu_N.double(), wanted, rtol=1e-5, atol=0)


def test_tiles_are_powers_of_two() -> None:
    assert [block(size) for size in (1, 2, 3, 96)] == [1, 2, 4, 128]
    assert block(6, 16) == 16
