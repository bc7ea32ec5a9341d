"""AdamW and the learning rate's course over a stage."""

from __future__ import annotations

import math
from fnmatch import fnmatch

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from retort.recipe import Optim


def adamw(named: dict[str, nn.Parameter], optim: Optim) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101); only matrices decay: not norms, biases, A_log, D or dt_bias.

    Sharded parameters are in groups of their own, since one operation takes one kind.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        decays = parameter.ndim >= 2 and not name.endswith("A_log")
        groups.setdefault((decays, isinstance(parameter, DTensor)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": group, "weight_decay": optim.weight_decay if decays else 0.0}
            for (decays, _), group in groups.items()
        ],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of step 0 .. steps - 1: a linear warm-up, then constant with a linear decay to 0 at
    the end (wsd), or a half cosine down to 0 (cosine).
    """
    warmup = optim.warmup * steps
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    if optim.schedule == "cosine":
        progress = (step - warmup) / max(1.0, steps - warmup)
        return optim.lr * (1 + math.cos(math.pi * progress)) / 2
    decay = optim.decay * steps
    return optim.lr * min(1.0, (steps - step) / max(1.0, decay))


def not_frozen(names: set[str], freeze: tuple[str, ...]) -> set[str]:
    """The names that no pattern of `freeze` matches. Raises ValueError for an idle pattern."""
    for pattern in freeze:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"freeze: {pattern!r} matches no parameter this stage trains")
    left = {name for name in names if not any(fnmatch(name, pattern) for pattern in freeze)}
    if not left:
        raise ValueError("freeze: leaves this stage no parameter to train")
    return left
