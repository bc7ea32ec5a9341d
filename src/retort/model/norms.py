"""Root-mean-square norms (arXiv 1910.07467), computed in float32.

Shapes: B rows, T tokens, D model width, E inner width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu


class RMSNorm(nn.Module):
    """x / RMS(x) over the last dimension, times a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The normalised input, in its dtype."""
        normed = rms_norm(x_BTD.float(), x_BTD.shape[-1:], eps=self.eps)
        return self.weight * normed.to(x_BTD.dtype)


class GatedNorm(nn.Module):
    """Gate first, then RMS over each group's channels."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y_BTE: Tensor, z_BTE: Tensor) -> Tensor:
        """The normalised product, in the dtype of the gate."""
        gated = (y_BTE.float() * silu(z_BTE.float())).unflatten(-1, (self.groups, -1))
        normed = rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return self.weight * normed.to(z_BTE.dtype)
