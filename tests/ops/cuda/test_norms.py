"""Norms, residual additions and gates against torch."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

pytest.importorskip("triton", reason="kernels for GPUs need triton, which is for Linux")

from retort.model.norms import GatedNorm, RMSNorm
from retort.ops.cuda import norms

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape).to(device, dtype)


@DTYPES
@pytest.mark.parametrize("width", [32, 45])
def test_residual_and_norm(width: int, dtype: torch.dtype, triton_device: str) -> None:
    h_SD, y_SD = (random(3, width, dtype=dtype, device=triton_device) for _ in range(2))
    norm = RMSNorm(width, 1e-3).to(triton_device, dtype)
    norm.weight.data += random(width, dtype=dtype, device=triton_device)
    alone = norms.rms_norm(h_SD, norm.weight, norm.eps)
    torch.testing.assert_close(alone, norm(h_SD))
    wanted_h, wanted_u = h_SD + y_SD, norm(h_SD + y_SD)
    found_u = norms.add_norm(h_SD, y_SD, norm.weight, norm.eps)
    assert torch.equal(h_SD, wanted_h)
    torch.testing.assert_close(found_u, wanted_u)


@DTYPES
@pytest.mark.parametrize("groups", [1, 3])
def test_norm_of_groups(groups: int, dtype: torch.dtype, triton_device: str) -> None:
    norm = GatedNorm(30, groups, 1e-3).to(triton_device, dtype)
    norm.weight.data += random(30, dtype=dtype, device=triton_device)
    y_SE = random(2, 30, dtype=torch.float32, device=triton_device)
    open_SE = torch.full_like(y_SE, 1.278464542761)  # a gate of 1
    nothing = torch.zeros_like(y_SE), torch.zeros(1, device=triton_device)
    wanted_SE = norm(y_SE, *nothing, open_SE).to(dtype)
    found_SE = norms.group_norm(y_SE, norm.weight, norm.eps, groups)
    assert found_SE.dtype == dtype
    torch.testing.assert_close(found_SE, wanted_SE)


@DTYPES
def test_gated_product(dtype: torch.dtype, triton_device: str) -> None:
    gate_SF, up_SF = (random(2, 1500, dtype=dtype, device=triton_device) for _ in range(2))
    wanted_SF = silu(gate_SF.float()) * up_SF.float()
    torch.testing.assert_close(norms.silu_times(gate_SF, up_SF), wanted_SF.to(dtype))
