"""Decode attention over a shared prompt and a row's own tokens, against a softmax over both."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels for GPUs need triton, which is for Linux")

from retort.model.norms import RMSNorm
from retort.ops.cuda import attention
from retort.ops.cuda.attention import Geometry, Parts, Rotation, Rows

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make_rows(
    geometry: Geometry,
    prompts: list[tuple[Tensor, Tensor]],
    prompt_of_row: list[int],
    starts: list[int],
    lengths: list[int],
    device: str,
) -> Rows:
    """Rows of which each reads the first `starts` positions of its prompt's cache."""
    tile_TW = torch.full((4, geometry.tile_rows), -1, dtype=torch.int32)
    for tile, prompt in enumerate(sorted(set(prompt_of_row))):
        members = [row for row, each in enumerate(prompt_of_row) if each == prompt]
        tile_TW[tile, : len(members)] = torch.tensor(members)
    numbers = [lengths, starts, [prompts[each][0].shape[1] for each in prompt_of_row]]
    length_S, start_S, room_S = torch.tensor(numbers, dtype=torch.int32, device=device)
    address_SA2 = torch.zeros(len(lengths), 2, 2, dtype=torch.int64, device=device)
    for row, each in enumerate(prompt_of_row):
        address_SA2[row, 1] = torch.tensor([cache.data_ptr() for cache in prompts[each]])
    return Rows(length_S, start_S, room_S, address_SA2, tile_TW.to(device))


def plain(q_HD: Tensor, k_KLD: Tensor, v_KLD: Tensor) -> Tensor:
    """Attention of one row, in float64."""
    times = len(q_HD) // len(k_KLD)
    k_HLD, v_HLD = (x.double().repeat_interleave(times, dim=0) for x in (k_KLD, v_KLD))
    score_HL = torch.einsum("hd,hld->hl", q_HD.double(), k_HLD) * q_HD.shape[-1] ** -0.5
    return torch.einsum("hl,hld->hd", score_HL.softmax(-1), v_HLD).flatten()


@pytest.mark.parametrize(
    ("shared", "own", "dtype"), [(1, 1, torch.bfloat16), (2, 3, torch.float32)], ids=str
)
def test_attention(shared: int, own: int, dtype: torch.dtype, triton_device: str) -> None:
    """Two rows of a long prompt, one of a short one, one without; parts that stay empty."""
    geometry = Geometry(heads=6, kv_heads=2, head_dim=20)
    prompts = [(torch.randn(2, room, 20), torch.randn(2, room, 20)) for room in (300, 7, 1)]
    prompts = [(k.to(triton_device, dtype), v.to(triton_device, dtype)) for k, v in prompts]
    starts, lengths = [290, 290, 5, 0], [293, 430, 5, 140]
    rows = make_rows(geometry, prompts, [0, 0, 1, 2], starts, lengths, triton_device)
    k_SKLD, v_SKLD = torch.randn(2, 4, 2, 160, 20).to(triton_device, dtype)
    q_SHD = torch.randn(4, 6, 20).to(triton_device, dtype)
    parts = Parts.empty(geometry, 4, shared, own, q_SHD)
    parts.y_SHID.fill_(torch.nan)
    found_SE = attention.attend(geometry, q_SHD, rows, k_SKLD, v_SKLD, 1, 4, parts)
    for row, (each, start, length) in enumerate(zip([0, 0, 1, 2], starts, lengths, strict=True)):
        own_length = length + 1 - start
        k_KLD, v_KLD = (
            torch.cat([prompt[:, :start], cache[row, :, :own_length]], dim=1)
            for prompt, cache in zip(prompts[each], (k_SKLD, v_SKLD), strict=True)
        )
        wanted_E = plain(q_SHD[row], k_KLD, v_KLD)
        tolerance = 2e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found_SE[row].double(), wanted_E, atol=tolerance, rtol=tolerance)


def test_without_prompts(triton_device: str) -> None:
    geometry = Geometry(heads=4, kv_heads=2, head_dim=8)
    none = [(torch.empty(2, 1, 8, device=triton_device),) * 2]
    rows = make_rows(geometry, none, [0, 0], [0, 0], [4, 9], triton_device)
    k_SKLD, v_SKLD = torch.randn(2, 2, 2, 10, 8, device=triton_device)
    q_SHD = torch.randn(2, 4, 8, device=triton_device)
    parts = Parts.empty(geometry, 2, 1, 2, q_SHD)
    found_SE = attention.attend(geometry, q_SHD, rows, k_SKLD, v_SKLD, 1, 0, parts)
    for row, length in enumerate([5, 10]):
        wanted_E = plain(q_SHD[row], k_SKLD[row, :, :length], v_SKLD[row, :, :length])
        torch.testing.assert_close(found_SE[row].double(), wanted_E, atol=1e-5, rtol=1e-5)


@DTYPES
@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
def test_rotation_and_caches(normed: bool, dtype: torch.dtype, triton_device: str) -> None:
    geometry = Geometry(heads=3, kv_heads=1, head_dim=6, norm_eps=1e-3 if normed else None)
    angle_LD = torch.randn(12, 3, device=triton_device)
    norms = [RMSNorm(6, 1e-3).to(triton_device, dtype) for _ in range(2)] if normed else []
    for norm in norms:
        norm.weight.data += torch.randn(6, device=triton_device).to(dtype)
    weights = [norm.weight for norm in norms]
    rotation = Rotation(angle_LD.cos(), angle_LD.sin(), *weights)
    lengths, starts, room = [4, 11, 9], [3, 0, 4], 5
    numbers = torch.tensor([lengths, starts], dtype=torch.int32, device=triton_device)
    none = torch.empty(0)
    rows = Rows(*numbers, none, none, none)
    qkv_SC = torch.randn(3, 30, device=triton_device).to(dtype)
    k_SKLD, v_SKLD = torch.zeros(2, 3, 1, room, 6, device=triton_device, dtype=dtype)
    found = attention.rotate_and_store(geometry, rotation, qkv_SC, rows, k_SKLD, v_SKLD)

    q_SHD, k_SKD, v_SKD = qkv_SC.unflatten(1, (5, 6)).split([3, 1, 1], dim=1)
    q_SHD, k_SKD = (
        turned(x if not normed else norms[i](x), angle_LD[lengths])
        for i, x in enumerate((q_SHD, k_SKD))
    )
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), q_SHD, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(k_SKLD[0, :, 1].float(), k_SKD[0], atol=tolerance, rtol=tolerance)
    assert torch.equal(v_SKLD[0, :, 1], v_SKD[0])
    written = [[1], [], []]  # the second row has no room, the third one's last place is before it
    for row, places in enumerate(written):
        untouched = [place for place in range(room) if place not in places]
        assert not k_SKLD[row, :, untouched].any()
        assert not v_SKLD[row, :, untouched].any()


def turned(x_SHD: Tensor, angle_SD: Tensor) -> Tensor:
    """RoPE as complex numbers."""
    half = x_SHD.shape[-1] // 2
    pairs = torch.complex(x_SHD[..., :half].float(), x_SHD[..., half:].float())
    rotated = pairs * torch.polar(torch.ones_like(angle_SD), angle_SD)[:, None]
    return torch.cat([rotated.real, rotated.imag], dim=-1)
