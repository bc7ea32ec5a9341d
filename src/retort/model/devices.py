"""Devices by name, and the types that suit them."""

from __future__ import annotations

import torch


def open_device(name: str) -> torch.device:
    """The device of that name. Raises ValueError when this machine, or this torch, lacks it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {name!r} cannot be used here: {reason} (README.md#install)"
        ) from None
    return device


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on accelerators; float32 on a CPU, where bfloat16 is emulated and slow."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
