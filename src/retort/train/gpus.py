"""GPUs by name: what a plan needs to know of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

USABLE = 0.93
"""The share of a GPU's memory that tensors can have; CUDA, NCCL and the allocator's gaps have the
rest.
"""


@dataclass(frozen=True)
class Gpu:
    """Products of dense bfloat16 matrices that add up in float32, and memory as the driver shows
    it; `tflops` are 1e12 a second, at most.
    """

    tflops: float
    memory_gib: float

    @property
    def usable_bytes(self) -> float:
        """Memory for tensors."""
        return self.memory_gib * 2**30 * USABLE


# Data sheets state twice as much "with sparsity", and the GeForce white papers twice as much for
# sums in float16.
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "a100-40gb": Gpu(312, 40.0),  # NVIDIA A100 data sheet
        "a100-80gb": Gpu(312, 80.0),
        "h100-80gb": Gpu(989, 79.6),  # NVIDIA H100 data sheet, SXM
        "h100-pcie-80gb": Gpu(756, 79.6),  # the same, PCIe
        "h200-141gb": Gpu(989, 140.4),  # NVIDIA H200 data sheet, SXM
        "b200-180gb": Gpu(2250, 179.0),  # NVIDIA HGX B200 data sheet
        "l40s-48gb": Gpu(362, 45.0),  # NVIDIA L40S data sheet
        "rtx-3090-24gb": Gpu(71, 24.0),  # NVIDIA Ampere GA102 white paper
        "rtx-4090-24gb": Gpu(165.2, 24.0),  # NVIDIA Ada white paper
        "rtx-5090-32gb": Gpu(209.5, 31.8),  # NVIDIA RTX Blackwell white paper
    }
)


# What CUDA calls them; the first that is part of a device's name.
_DEVICES = (
    ("H200", "h200-141gb"),
    ("H100 PCIe", "h100-pcie-80gb"),
    ("H100", "h100-80gb"),
    ("B200", "b200-180gb"),
    ("A100-SXM4-40GB", "a100-40gb"),
    ("A100-PCIE-40GB", "a100-40gb"),
    ("A100", "a100-80gb"),
    ("L40S", "l40s-48gb"),
    ("RTX 3090", "rtx-3090-24gb"),
    ("RTX 4090", "rtx-4090-24gb"),
    ("RTX 5090", "rtx-5090-32gb"),
)


def of_device(name: str) -> Gpu | None:
    """The GPU that CUDA calls by that name, if it is in the table."""
    return next((GPUS[key] for part, key in _DEVICES if part in name), None)


def gpu(name: str) -> Gpu:
    """The GPU of that name. Raises ValueError for one that is not in the table."""
    if name in GPUS:
        return GPUS[name]
    close = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(GPUS)}"
    raise ValueError(f"planning.gpu: no GPU is called {name!r}; {hint}")
