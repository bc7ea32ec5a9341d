"""What kernels are given of tensors."""

import pytest
import torch
from torch import Tensor

from retort.ops import arrays

WHOLE_BTD = torch.arange(2 * 5 * 8, dtype=torch.float32).view(2, 5, 8)


@pytest.mark.parametrize(
    ("x", "pitch"),
    [
        (WHOLE_BTD, 8),
        (WHOLE_BTD[..., 2:5], 8),
        (WHOLE_BTD[:1, 1:3, 4:], 8),
        (WHOLE_BTD[0, :1].expand(5, 8), 0),
        (WHOLE_BTD[:, 1:3], 8),  # equally far apart within a row alone: a copy
        (WHOLE_BTD[:, ::2, :4], 4),
        (WHOLE_BTD.transpose(1, 2), 5),
        (WHOLE_BTD[..., :1], 8),
        (WHOLE_BTD[:, :1, 3:5], 40),
    ],
)
def test_rows_lie_a_pitch_apart(x: Tensor, pitch: int) -> None:
    numbers, found = arrays.rows(x)
    assert found == pitch
    width = x.shape[-1]
    for i, row in enumerate(x.reshape(-1, width)):
        assert numbers[i * pitch : i * pitch + width].tolist() == row.tolist()


def test_rows_of_heads() -> None:
    """Where heads do not follow one another they are copied, else read where they are."""
    x_BTHD = WHOLE_BTD[..., :6].unflatten(-1, (2, 3))
    assert arrays.rows(x_BTHD, 2).pitch == 8
    apart_BTHD = WHOLE_BTD.unflatten(-1, (2, 4))[..., :3]
    numbers, pitch = arrays.rows(apart_BTHD, 2)
    assert pitch == 6
    assert numbers.tolist() == apart_BTHD.flatten().tolist()


def test_rows_are_not_copied_without_need() -> None:
    numbers, _ = arrays.rows(WHOLE_BTD[..., 2:5])
    assert numbers.ctypes.data == WHOLE_BTD[..., 2:].data_ptr()


def test_a_copy_of_a_parameter_is_one() -> None:
    weight_D = torch.nn.Parameter(torch.ones(3))
    arrays.own(weight_D)[0] = 7
    assert weight_D.tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_kernels_are_for_float32(dtype: torch.dtype) -> None:
    assert arrays.has_kernel(WHOLE_BTD)
    assert not arrays.has_kernel(WHOLE_BTD.to(dtype))
    assert not arrays.has_kernel(WHOLE_BTD.to("meta"))
