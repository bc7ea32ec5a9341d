"""A decoder with the states of a fixed number of rows: what one decode step needs, and no more.

`Plain` is the decoder as torch runs it, on any device and in any dtype: the reference that faster
ones are tested against.

Shapes: S rows that run, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from retort.model.config import Mamba1Config
from retort.model.decoder import Decoder
from retort.model.state import DecoderState
from retort.sample.cache import CacheSettings

KERNELS = (torch.bfloat16, torch.float16, torch.float32)
"""What a GPU has kernels for."""


class Forward(Protocol):
    """The states of `slots` rows, and a step of the first of them by one token each."""

    slots: int
    device: torch.device
    share_from: int | None
    """Tokens, of all rows of a prompt, from which on rows that start from it read its keys and
    values together; None where they never do.
    """

    def admit(self, slot_S: Tensor, prompt: DecoderState) -> None:
        """Starts rows from a prompt that has been read: a state of one row, forked to each slot.

        One prompt may be admitted several times, as slots become free: the same object each time.
        """

    def step(self, token_S: Tensor, reach: int) -> Tensor:
        """Logits_SV of the first S slots after one more token each; their states go on.

        `reach` bounds the number of tokens that any of them has read with this one. The logits
        may be overwritten by the next step.
        """

    def move(self, slot_S: Tensor, source_S: Tensor) -> None:
        """Copies rows from `source_S` over those of `slot_S`; the two do not meet."""

    def groups(self, rows: int) -> Iterable[list[int]]:
        """Those of the first rows that read the keys and values of one prompt together."""

    @property
    def nbytes(self) -> int:
        """Bytes of the states of all slots."""


class Plain:
    """The decoder's own forward pass, for rows of at most `max_length` tokens."""

    share_from: int | None = None

    def __init__(self, decoder: Decoder, slots: int, max_length: int) -> None:
        self.decoder, self.slots, self.device = decoder, slots, decoder.device
        self.state = decoder.init_state(slots, max_length)

    def admit(self, slot_S: Tensor, prompt: DecoderState) -> None:
        """Copies the prompt's state to each slot."""
        self.state.put(slot_S, prompt)

    def step(self, token_S: Tensor, reach: int) -> Tensor:
        """Logits_SV of the first S slots after one more token each."""
        state = self.state.first(token_S.shape[0], reach=reach - 1)
        return self.decoder(token_S[:, None], state).squeeze(1)

    def move(self, slot_S: Tensor, source_S: Tensor) -> None:
        """Copies rows from `source_S` over those of `slot_S`."""
        self.state.put(slot_S, self.state.select(source_S))

    def groups(self, rows: int) -> Iterable[list[int]]:
        """None of them: every row has a copy of its prompt."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes of the states of all slots."""
        return self.state.nbytes


def has_gpu_kernels(weight: Tensor) -> bool:
    """Whether Triton's kernels are for a decoder with such weights; not all builds of torch bring
    Triton.
    """
    on_gpu = weight.device.type == "cuda" and weight.dtype in KERNELS
    return on_gpu and importlib.util.find_spec("triton") is not None


def has_cpu_kernels(weight: Tensor) -> bool:
    """Whether Numba's kernels are for a decoder with such weights."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def check_cache(decoder: Decoder, cache: CacheSettings) -> None:
    """Raises ValueError for settings that the decoder's forward has no kernels for."""
    weight, config = decoder.lm_head.weight, decoder.config
    gpu, cpu = has_gpu_kernels(weight), has_cpu_kernels(weight)
    if cache != CacheSettings() and not (gpu or cpu):
        raise ValueError(
            f"cache ({cache}): {weight.dtype} on {weight.device.type} runs without kernels, which "
            "keeps everything as the model has it; leave cache out, or use float32"
        )
    if cpu and (cache.ssm_dtype != torch.float32 or cache.write_every > 1):
        raise ValueError(
            f"cache ({cache}): on a CPU recurrent states are in float32 and written in every step; "
            "only kv_dtype can be chosen"
        )
    if cpu and cache.kv_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"cache ({cache}): on a CPU kv_dtype is float32 or bfloat16")
    if gpu and cache.kv_dtype not in (None, weight.dtype):
        raise ValueError(
            f"cache ({cache}): on a GPU keys and values have the model's dtype, {weight.dtype}"
        )
    if isinstance(config.mixer, Mamba1Config) and cache.write_every > 1:
        raise ValueError(f"cache ({cache}): Mamba-1 writes its states in every step")


def open_forward(
    decoder: Decoder,
    slots: int,
    max_length: int,
    own_length: int | None = None,
    cache: CacheSettings | None = None,
) -> Forward:
    """The fastest forward for the decoder's device and dtype.

    Rows have at most `max_length` tokens, `own_length` of them behind their prompts. Raises
    ValueError for a cache that it has no kernels for.
    """
    weight, cache = decoder.lm_head.weight, cache or CacheSettings()
    check_cache(decoder, cache)
    if has_gpu_kernels(weight):
        from retort.sample.forward_cuda import Cuda

        return Cuda(decoder, slots, max_length, own_length, cache)
    if has_cpu_kernels(weight):
        from retort.sample.forward_cpu import Cpu

        return Cpu(decoder, slots, max_length, cache.kv_dtype or torch.float32)
    return Plain(decoder, slots, max_length)
