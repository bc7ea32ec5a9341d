"""Root-mean-square norms (arXiv 1910.07467), computed in float32.

Shapes: B rows, T tokens, D model width, E inner width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retort.ops import norms


class RMSNorm(nn.Module):
    """x / RMS(x) over the last dimension, times a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The normalised input, in its dtype."""
        return norms.rms_norm(x_BTD, self.weight, self.eps)


class GatedNorm(nn.Module):
    """A skip and a gate first, then RMS over each group's channels."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y_BTE: Tensor, x_BTE: Tensor, skip_H: Tensor, z_BTE: Tensor) -> Tensor:
        """The normalised (y + skip x) silu(z), in the dtype of the gate."""
        skip_E = skip_H.float().repeat_interleave(y_BTE.shape[-1] // skip_H.shape[0])
        return norms.gated_norm(y_BTE, x_BTE, skip_E, z_BTE, self.weight, self.groups, self.eps)
