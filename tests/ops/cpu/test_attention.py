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
    """Random inputs of some shape, what the kernels make of them, and what torch does."""

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
            for cache, x in zip(caches, (k, v), strict=True):
                cache[row, :, length] = x[row].to(dtype).float()
            read = caches[:, row, :, : length + 1]
            attended = scaled_dot_product_attention(q[row, :, None], *read, enable_gqa=True)
            y[row] = attended.squeeze(1)
        return y, caches

    def found(self, dtype: torch.dtype, threads: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """The same by the kernels; the first `start` tokens are one prompt of all rows."""
        caches = self.caches[:, :, :, start:].to(dtype).contiguous()
        stored = [cache.view(BITS[dtype]).numpy() for cache in caches]
        group, team = self.heads // self.kv_heads, of_threads(threads)
        slots = len(self.qkv_SC)
        q, prompt, sums = self._room(slots, group)
        starts_S = np.full(slots, start)
        attention.rotate(
            self.qkv_SC.clone().numpy(),
            self.bias_C.numpy(),
            *self.norms_2D.numpy(),
            EPS,
            self.cos_LD.numpy(),
            self.sin_LD.numpy(),
            self.length_S.numpy(),
            starts_S,
            *stored,
            q.numpy(),
            self.rows,
            team,
        )
        if start:
            self._read_prompt(q, prompt, sums, start)
        y_SHD = torch.full((slots, self.heads, self.width), 7.0)
        attention.attend(
            q.numpy(),
            self.length_S.numpy(),
            starts_S,
            *stored,
            prompt.numpy(),
            sums.numpy(),
            np.empty((threads, group, self.room), np.float32),
            y_SHD.numpy(),
            self.rows,
            team,
        )
        return y_SHD, caches.float()

    def _room(self, slots: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, sums of prompts and their scales: nonsense, where nothing is written."""
        shape = self.kv_heads, slots, group
        nan = float("nan")
        return (
            torch.full((*shape, self.width), nan),
            torch.full((*shape, self.width), nan),
            torch.full((2, *shape), nan),
        )

    def _read_prompt(self, q: Tensor, prompt: Tensor, sums: Tensor, start: int) -> None:
        """What the first tokens of row 0 add up to, for all rows."""
        k, v = self.caches[:, 0, :, :start]
        score = q.flatten(1, 2) @ k.mT
        sums_2KR = torch.empty(2, *score.shape[:2])
        attention.weigh(score.numpy(), sums_2KR.numpy(), of_threads(1))
        sums.copy_(sums_2KR.view_as(sums))
        prompt.copy_((score @ v).view_as(prompt))


SHAPES = [
    (1, 1, 1, 1, 2, 1),
    (4, 3, 6, 2, 10, 9),
    (3, 3, 4, 4, 16, 40),
    (70, 66, 4, 2, 64, 50),
    (3, 3, 4, 2, 96, 150),
    (3, 3, 3, 1, 72, 70),
    (2, 2, 10, 2, 80, 75),
]
THREADS = pytest.mark.parametrize("threads", [1, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@THREADS
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape: tuple[int, ...], extras: bool, threads: int, dtype: torch.dtype) -> None:
    case = Case(*shape, extras=extras)  # type: ignore[arg-type]  # six numbers
    y_SHD, caches = case.found(dtype, threads)
    wanted_SHD, wanted = case.wanted(dtype)
    # A bfloat16 may be rounded the other way, where the number is a tie but for the last bit.
    close = {} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(caches, wanted, **close)
    torch.testing.assert_close(y_SHD, wanted_SHD, **close)


@THREADS
@pytest.mark.parametrize("start", [1, 5, 8])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_rows_of_one_prompt(shape: tuple[int, ...], start: int, threads: int) -> None:
    case = Case(*shape, extras=True)  # type: ignore[arg-type]  # six numbers
    case.caches[:, :, :, :start] = case.caches[:, :1, :, :start]
    case.length_S.clamp_(min=start)
    y_SHD, caches = case.found(torch.float32, threads, start)
    wanted_SHD, wanted = case.wanted(torch.float32)
    torch.testing.assert_close(caches, wanted[:, :, :, start:])
    torch.testing.assert_close(y_SHD, wanted_SHD)
