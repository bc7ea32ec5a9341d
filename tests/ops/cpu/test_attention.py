"""Attention of one query a row against torch, over rows of different length."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from retort.ops.cpu import attention
from retort.ops.cpu.team import of_threads

EPS = 1e-3
BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}


def rotated(x_SHD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    one, two = x_SHD.chunk(2, dim=-1)
    cos, sin = cos_SD[:, None], sin_SD[:, None]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


class Case:
    """Random inputs of some shape, what the kernel makes of them, and what torch does."""

    def __init__(
        self, slots: int, rows: int, heads: int, kv_heads: int, width: int, room: int, extras: bool
    ) -> None:
        self.rows, self.heads, self.kv_heads, self.width = rows, heads, kv_heads, width
        channels = (heads + 2 * kv_heads) * width
        self.qkv_SC, self.room = torch.randn(slots, channels), room
        self.bias_C = torch.randn(channels if extras else 0)
        self.norms_2D = torch.randn(2, width if extras else 0)
        self.cos_LD, self.sin_LD = torch.randn(2, room, width // 2)
        self.length_S = torch.randint(0, room, (slots,))
        self.length_S[0], self.length_S[rows - 1] = 0, room - 1
        self.caches = torch.randn(2, slots, kv_heads, room, width)

    def wanted(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The outputs and caches afterwards; what is cached is rounded to `dtype`."""
        qkv_SC = self.qkv_SC + self.bias_C if len(self.bias_C) else self.qkv_SC
        parts = [count * self.width for count in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (x.unflatten(1, (-1, self.width)) for x in qkv_SC.split(parts, dim=1))
        if len(self.norms_2D[0]):
            q, k = (
                rms_norm(x, (self.width,), weight_D, EPS)
                for x, weight_D in zip((q, k), self.norms_2D, strict=True)
            )
        angles = self.cos_LD[self.length_S], self.sin_LD[self.length_S]
        q, k = rotated(q, *angles), rotated(k, *angles)
        caches, y = self.caches.to(dtype).float(), torch.full_like(q, 7.0)
        for row in range(self.rows):
            length = int(self.length_S[row])
            caches[0, row, :, length], caches[1, row, :, length] = (
                x[row].to(dtype).float() for x in (k, v)
            )
            read = caches[:, row, :, : length + 1]
            y[row] = scaled_dot_product_attention(q[row, :, None], *read, enable_gqa=True).squeeze(
                1
            )
        return y, caches

    def found(self, dtype: torch.dtype, threads: int) -> tuple[Tensor, Tensor]:
        """The same by the kernel."""
        caches = self.caches.to(dtype)
        y_SHD = torch.full((len(self.qkv_SC), self.heads, self.width), 7.0)
        group = self.heads // self.kv_heads
        attention.attend(
            self.qkv_SC.clone().numpy(),
            self.bias_C.numpy(),
            *self.norms_2D.numpy(),
            EPS,
            self.cos_LD.numpy(),
            self.sin_LD.numpy(),
            self.length_S.numpy(),
            *(cache.view(BITS[dtype]).numpy() for cache in caches),
            np.empty((threads, group, self.room), np.float32),
            y_SHD.numpy(),
            self.rows,
            of_threads(threads),
        )
        return y_SHD, caches.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 2, 1), (4, 3, 6, 2, 10, 9), (3, 3, 4, 4, 16, 40), (70, 66, 4, 2, 64, 50)]
)
def test_attention(shape: tuple[int, ...], extras: bool, threads: int, dtype: torch.dtype) -> None:
    case = Case(*shape, extras=extras)  # type: ignore[arg-type]  # six numbers
    y_SHD, caches = case.found(dtype, threads)
    wanted_SHD, wanted = case.wanted(dtype)
    # A bfloat16 may be rounded the other way, where the number is a tie but for the last bit.
    close = {} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(caches, wanted, **close)
    torch.testing.assert_close(y_SHD, wanted_SHD, **close)
