"""Rotations by a kernel, against plain torch in float64."""

import pytest
import torch
from tests.ops.by_kernels import check, check_threads
from torch import Tensor

from retort.ops.rotary import plain_rotate, rotate


def angles(batch: int, length: int, half: int) -> tuple[Tensor, Tensor]:
    angle_BTC = 6 * torch.rand(batch, length, half)
    return angle_BTC.cos(), angle_BTC.sin()


@pytest.mark.parametrize("width", [2, 6, 32])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("own_angles", [False, True])
def test_kernel_equals_torch(batch: int, width: int, own_angles: bool) -> None:
    x_BTHD = torch.randn(batch, 9, 3 * width + 4)[..., : 3 * width].unflatten(-1, (3, -1))
    x_BHTD = x_BTHD.transpose(1, 2)
    cos, sin = angles(batch if own_angles else 1, 9, width // 2)
    check(
        lambda x: rotate(x, cos, sin),
        lambda x: plain_rotate(x, cos.double(), sin.double()),
        [x_BHTD],
        1e-6,
    )


def test_any_number_of_threads_gives_the_same() -> None:
    cos, sin = angles(1, 300, 16)
    check_threads(lambda x: rotate(x, cos, sin), [torch.randn(2, 4, 300, 32)])
