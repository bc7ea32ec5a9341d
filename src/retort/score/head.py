"""The head of a verifier: one linear layer from features to a calibrated probability.

Standardising, regularising and calibrating are all linear, so they are done once, in training, and
folded into the layer's weights.

Shapes: N examples, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from retort.score.calibration import balanced, cross_entropy, fit_line, platt

STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""How strongly slopes are held down; the strength that does best on other problems is taken."""
WEIGHTS = "verifier.safetensors"


@dataclass(frozen=True)
class Head:
    """Slope and intercept over the features as they are; the sigmoid is the probability."""

    slope_F: Tensor
    intercept: Tensor

    def logits(self, x_NF: Tensor) -> Tensor:
        """The logit of each example, in float64: features may differ much in scale."""
        return x_NF.double() @ self.slope_F.to(x_NF.device) + self.intercept.to(x_NF.device)

    def save(self, folder: Path) -> None:
        """Writes the head into a checkpoint folder."""
        save_file({"slope": self.slope_F, "intercept": self.intercept}, folder / WEIGHTS)


def load_head(folder: Path, features: int) -> Head:
    """The head in a folder. Raises ValueError where there is none for so many features."""
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
        head = Head(tensors["slope"].double(), tensors["intercept"].double())
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path}: missing or damaged ({error})") from None
    if head.slope_F.shape != (features,):
        raise ValueError(
            f"{path}: made for {head.slope_F.numel()} features, and this model has {features}"
        )
    return head


@dataclass(frozen=True)
class Examples:
    """Features, labels (1 is right, or a share) and weights of some positions."""

    x_NF: Tensor
    y_N: Tensor
    weight_N: Tensor

    @property
    def one_sided(self) -> bool:
        """Whether nothing is right or nothing is wrong."""
        right = (self.y_N * self.weight_N).sum().item()
        return right in (0.0, self.weight_N.sum().item())


def fit_head(train: Examples, calibrate: Examples, parts: Sequence[int]) -> tuple[Head, Head]:
    """A head fitted with balanced cross-entropy, and the same one calibrated.

    `parts` are the sizes of the groups of features; each group starts out with the same total
    variance, so that many hidden units do not outweigh a few log-probabilities. Strength of the
    penalty, scale and shift are those that suit the problems to calibrate with.
    """
    mean_F, scale_F = _scales(train.x_NF.double(), parts)
    x_NF = (train.x_NF.double() - mean_F) / scale_F
    weight_N = balanced(train.y_N, train.weight_N)
    heads = []
    for strength in STRENGTHS:
        slope_F, intercept = fit_line(x_NF, train.y_N, weight_N, strength)
        slope_F = slope_F / scale_F
        heads.append(Head(slope_F, intercept - slope_F @ mean_F))
    best = min(heads, key=lambda head: _loss(head, calibrate))
    a, b = platt(best.logits(calibrate.x_NF), calibrate.y_N, calibrate.weight_N)
    return best, Head(best.slope_F * a, best.intercept * a + b)


def _loss(head: Head, examples: Examples) -> float:
    weight_N = balanced(examples.y_N, examples.weight_N)
    return cross_entropy(head.logits(examples.x_NF), examples.y_N.double(), weight_N).item()


def _scales(x_NF: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The mean of each feature, and what it is divided by."""
    size_F = torch.cat([torch.full((size,), float(size)) for size in parts])
    spread_F = x_NF.std(dim=0).clamp(min=1e-6)
    return x_NF.mean(dim=0), spread_F * size_F.sqrt()
