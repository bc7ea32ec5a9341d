"""How what rows remember is kept while they are decoded: the storage of keys, values and states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from retort.model.cost import CacheBytes
from retort.model.weights import DTYPES
from retort.recipe import Cache

KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SSM_DTYPES = (torch.float32, torch.bfloat16)
WRITES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class CacheSettings:
    """Storage of what rows remember; sums are in float32 whatever it is.

    kv_dtype: of keys and values; None is the model's. ssm_dtype: of recurrent states. write_every:
    tokens after which a state of the Mamba-2 kinds is written; until then the last inputs are kept
    beside it, and gone over again in each step. Raises ValueError for other values.
    """

    kv_dtype: torch.dtype | None = None
    ssm_dtype: torch.dtype = torch.float32
    write_every: int = 1

    def __post_init__(self) -> None:
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise ValueError(f"kv_dtype {self.kv_dtype}: use float32, bfloat16 or float16")
        if self.ssm_dtype not in SSM_DTYPES:
            raise ValueError(f"ssm_dtype {self.ssm_dtype}: use float32 or bfloat16")
        if self.write_every not in WRITES:
            raise ValueError(f"write_every = {self.write_every}: use 1, 2, 4, .. or 64 tokens")

    @classmethod
    def of(cls, asked: Cache) -> Self:
        """As a recipe says it."""
        kv_dtype = None if asked.kv_dtype is None else DTYPES[asked.kv_dtype]
        return cls(kv_dtype, DTYPES[asked.ssm_dtype], asked.write_every)

    def bytes_of(self, dtype: torch.dtype) -> CacheBytes:
        """As the cost model takes it, for a model of that dtype."""
        kv = self.kv_dtype or dtype
        return CacheBytes(kv.itemsize, self.ssm_dtype.itemsize, self.write_every)

    def __str__(self) -> str:
        """What differs from the usual, in words; empty where nothing does."""
        words = [] if self.kv_dtype is None else [f"KV {_name(self.kv_dtype)}"]
        if self.ssm_dtype != torch.float32:
            words.append(f"states {_name(self.ssm_dtype)}")
        if self.write_every > 1:
            words.append(f"written every {self.write_every}")
        return ", ".join(words)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
