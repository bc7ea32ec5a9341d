"""Norms and gates by kernels, against plain torch in float64."""

import pytest
import torch
from tests.ops.by_kernels import check, check_threads
from torch import Tensor
from torch.nn.functional import silu

from retort.ops import norms

EPS = 1e-3
SIZES = pytest.mark.parametrize(
    ("batch", "length", "groups", "part"), [(1, 1, 1, 1), (2, 70, 3, 11), (1, 130, 4, 32)]
)


def inputs(batch: int, length: int, width: int) -> list[Tensor]:
    """Two that lie in wider rows, one that does not, and two vectors."""
    wide_BTX = torch.randn(2, batch, length, width + 5)
    x_BTD, gate_BTD = wide_BTX[0, ..., 2 : 2 + width], 4 * wide_BTX[1, ..., :width]
    return [torch.randn(batch, length, width), x_BTD, gate_BTD, *torch.randn(2, width)]


@SIZES
def test_rms_norm(batch: int, length: int, groups: int, part: int) -> None:
    _, x_BTD, _, weight_D, _ = inputs(batch, length, groups * part)
    leaves = (x_BTD, weight_D)
    check(
        lambda x, w: norms.rms_norm(x, w, EPS),
        lambda x, w: w * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt(),
        leaves,
        2e-5,
    )


@SIZES
def test_gate(batch: int, length: int, groups: int, part: int) -> None:
    y_BTD, x_BTD, gate_BTD, _, _ = inputs(batch, length, groups * part)
    for x in (x_BTD, y_BTD):
        check(norms.gated, lambda gate, x: silu(gate) * x, (gate_BTD, x), 1e-5)


@SIZES
def test_gated_norm(batch: int, length: int, groups: int, part: int) -> None:
    y, x, gate, skip, weight = inputs(batch, length, groups * part)

    def plain(y: Tensor, x: Tensor, skip: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        gated = ((y + skip * x) * silu(gate)).unflatten(-1, (groups, -1))
        normed = gated / (gated.square().mean(-1, keepdim=True) + EPS).sqrt()
        return weight * normed.flatten(-2)

    check(lambda *z: norms.gated_norm(*z, groups, EPS), plain, (y, x, skip, gate, weight), 2e-5)


def test_any_number_of_threads_gives_the_same() -> None:
    y, x, gate, skip, weight = inputs(2, 300, 128)
    check_threads(lambda x, w: norms.rms_norm(x, w, EPS), (x, weight))
    check_threads(norms.gated, (gate, x))
    check_threads(lambda *z: norms.gated_norm(*z, 4, EPS), (y, x, skip, gate, weight))


def test_strong_gates_are_open_or_shut() -> None:
    gate_D = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4]).requires_grad_()
    norms.gated(gate_D, torch.ones(5)).sum().backward()
    assert gate_D.grad is not None
    torch.testing.assert_close(gate_D.grad, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_kept(dtype: torch.dtype) -> None:
    y, x, gate, skip, weight = (each.to(dtype) for each in inputs(1, 3, 8))
    assert norms.rms_norm(x, weight, EPS).dtype == dtype
    assert norms.gated(gate, x).dtype == dtype
    assert norms.gated_norm(y, x, skip, gate, weight, 2, EPS).dtype == dtype
