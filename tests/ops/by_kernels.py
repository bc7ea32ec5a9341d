"""A function of float32 tensors, which kernels compute, against its reference in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


def results(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What it returns, and the gradients of the inputs by a sum of the sines of that."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    found = function(*leaves)
    outputs = found if isinstance(found, tuple) else (found,)
    loss = torch.stack([each.sin().sum() for each in outputs]).sum()
    return [*(each.detach() for each in outputs), *torch.autograd.grad(loss, leaves)]


def check(fast: Function, plain: Function, inputs: Sequence[Tensor], tolerance: float) -> None:
    """Values and gradients agree, relative to the largest of each."""
    wanted = results(plain, [each.double() for each in inputs])
    for i, (ours, theirs) in enumerate(zip(results(fast, inputs), wanted, strict=True)):
        assert ours.shape == theirs.shape
        scale = theirs.abs().max().clamp(min=1e-2)
        assert float((ours - theirs).abs().max() / scale) <= tolerance, f"result {i}"


def check_threads(fast: Function, inputs: Sequence[Tensor]) -> None:
    """Every bit is the same with one thread and with two."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(fast, inputs))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
