"""What kernels are given of tensors: memory as NumPy has it, and threads.

`has_kernel` says which tensors are for the kernels in `ops.cpu`; all others are for plain torch.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

if TYPE_CHECKING:
    from retort.ops.cpu.team import Team  # Numba takes its time to load


class Rows(NamedTuple):
    """Numbers from a tensor's first one on, and how far each row starts behind the one before."""

    numbers: Any
    pitch: int


def has_kernel(x: Tensor) -> bool:
    """Whether it is for the kernels in `ops.cpu`; a compiler takes what torch alone can do."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not is_compiling()


def in_training(x: Tensor) -> bool:
    """Whether it is for the kernels that make gradients. Without these plain torch computes, whose
    last bits are what other libraries give.
    """
    return torch.is_grad_enabled() and has_kernel(x)


def rows(x: Tensor, inner: int = 1) -> Rows:
    """A tensor as rows of its last `inner` dimensions; what does not lie like that is copied."""
    if x.is_contiguous():
        return Rows(x.detach().view(-1).numpy(), x.shape[-inner:].numel())
    pitch = _pitch(x, inner)
    if pitch is None:
        x = x.contiguous()
        pitch = x.shape[-inner:].numel()
    count, width = x.shape[:-inner].numel(), x.shape[-inner:].numel()
    found = x.detach().as_strided((max(count - 1, 0) * pitch + width,), (1,))
    return Rows(found.numpy(), pitch)


def _pitch(x: Tensor, inner: int) -> int | None:
    """The distance between rows that are equally far apart, whole, and not empty."""
    if x.numel() == 0:
        return None
    width = 1
    for size, stride in zip(reversed(x.shape[-inner:]), reversed(x.stride()[-inner:]), strict=True):
        if size > 1 and stride != width:
            return None
        width *= size
    pitch, count = width, 1
    for size, stride in zip(reversed(x.shape[:-inner]), reversed(x.stride()[:-inner]), strict=True):
        if size > 1 and count == 1:
            pitch = stride
        elif size > 1 and stride != pitch * count:
            return None
        count *= size
    return pitch


def whole(x: Tensor) -> Any:
    """The memory of a tensor that nothing else holds on to."""
    return x.detach().contiguous().numpy()


def own(parameter: Tensor) -> Any:
    """A copy of a parameter: sharding could not free memory that NumPy has seen."""
    return parameter.detach().clone(memory_format=torch.contiguous_format).numpy()


def team() -> Team:
    """The threads that torch computes with."""
    return _team(torch.get_num_threads())


@cache
def _team(threads: int) -> Team:
    from retort.ops.cpu.team import of_threads

    return of_threads(threads)
