"""How many completions a machine's memory holds at once."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from retort.model.cost import largest_batch, parameters
from retort.model.decoder import Decoder
from retort.ops.cpu import products
from retort.sample import control_groups
from retort.sample.cache import CacheSettings

SHARE = 0.8
"""Of the free memory, what slots may take; the rest is for activations and other programs."""
COPY_SHARE = 0.5
"""Of the free memory, what a copy of the weights may take that makes a CPU's products faster."""
FULL = 0.9
"""Of the free memory, what it and all slots may take together."""
OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",  # of graphs and kernels, which torch does not allocate
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What other errors than torch's own say where memory is short."""
MOST = {"cpu": 128, "cuda": 1024}
"""More slots than these bring no more tokens per second."""


def auto_slots(
    decoders: Sequence[Decoder],
    max_length: int,
    cache: CacheSettings | None = None,
    processes: int = 1,
) -> int:
    """As many slots for rows of `max_length` tokens, of which each decoder has a state, as this
    process's part of the free memory of their device holds, and are of use; at least one.

    `processes` that share it begin at the same time, so none sees yet what the others take.
    """
    cache = cache or CacheSettings()
    device = decoders[0].device
    copies = sum(panel_bytes(decoder) for decoder in decoders)
    budget = SHARE * free_memory(device) / processes - copies
    # A row takes what it takes of each, so that shares of the budget for a row add up.
    share = sum(1 / max(1, _rows(decoder, max_length, budget, cache)) for decoder in decoders)
    return max(1, min(MOST.get(device.type, 1024), int(1 / share)))


def _rows(decoder: Decoder, max_length: int, budget: float, cache: CacheSettings) -> int:
    config, dtype = decoder.config, decoder.lm_head.weight.dtype
    # `largest_batch` takes the weights off, and these are there already.
    budget += parameters(config).total * dtype.itemsize
    return largest_batch(config, max_length, budget, dtype.itemsize, cache.bytes_of(dtype))


def room(decoder: Decoder) -> float:
    """Bytes that slots may take beside a decoder, and beside the copy of its weights that a CPU's
    forward makes.
    """
    return SHARE * free_memory(decoder.device) - panel_bytes(decoder)


def panel_bytes(decoder: Decoder, states: float = 0.0) -> int:
    """Bytes of a copy of the weights for our own products on a CPU, beside the states of all slots:
    0 where there is none, because other products are faster, or memory is short.
    """
    weight = decoder.lm_head.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not products.suited():
        return 0
    size = sum(products.itemsize(each) * each.numel() for each in decoder.parameters())
    free = free_memory(weight.device)
    return size if size <= min(COPY_SHARE * free, FULL * free - states) else 0


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of a decoder's parameters."""
    return sum(parameter.nbytes for parameter in decoder.parameters())


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device; on a CPU within what control groups allow."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    return min(psutil.virtual_memory().available, control_groups.memory_left())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is a failed allocation, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)
