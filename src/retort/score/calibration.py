"""How far a score can be taken at its word: calibration, reliability, and discrimination.

Everything is weighted: a text that was sampled several times counts as often.

Shapes: N examples, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

BINS = 10
STEPS = 200


@dataclass(frozen=True)
class Bin:
    """Scores between two bounds: how many, their mean, and the share of them that were right."""

    low: float
    high: float
    count: float
    score: float
    right: float


def fit_line(x_NF: Tensor, y_N: Tensor, weight_N: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Logistic regression: slope_F and intercept of the least weighted mean cross-entropy plus
    l2 |slope|^2, in float64. Targets may be shares. The problem is convex, so nothing is random.
    """
    x_NF, y_N = x_NF.double(), y_N.double()
    weight_N = weight_N.double() / weight_N.double().sum()
    slope_F = torch.zeros(x_NF.shape[1], dtype=torch.float64, requires_grad=True)
    intercept = torch.zeros((), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [slope_F, intercept], max_iter=STEPS, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = cross_entropy(x_NF @ slope_F + intercept, y_N, weight_N)
        value = value + l2 * slope_F.square().sum()
        value.backward()
        return value

    search.step(loss)
    return slope_F.detach(), intercept.detach()


def cross_entropy(logit_N: Tensor, y_N: Tensor, weight_N: Tensor) -> Tensor:
    """The weighted mean of the binary cross-entropy."""
    loss_N = binary_cross_entropy_with_logits(logit_N, y_N, reduction="none")
    return (loss_N * weight_N).sum() / weight_N.sum()


def balanced(y_N: Tensor, weight_N: Tensor) -> Tensor:
    """Weights by which right and wrong weigh the same; a share is partly both."""
    right, wrong = (weight_N * y_N).sum(), (weight_N * (1 - y_N)).sum()
    return weight_N * (y_N / right + (1 - y_N) / wrong)


def platt(logit_N: Tensor, y_N: Tensor, weight_N: Tensor) -> tuple[float, float]:
    """Scale and shift that make the sigmoid of scale * logit + shift a probability (Platt 1999),
    with his targets, which keep both finite where the logits separate right from wrong.
    """
    right, wrong = (weight_N * y_N).sum(), (weight_N * (1 - y_N)).sum()
    target_N = y_N * (right + 1) / (right + 2) + (1 - y_N) / (wrong + 2)
    slope_1, intercept = fit_line(logit_N[:, None], target_N, weight_N, l2=0.0)
    return slope_1.item(), intercept.item()


def reliability(score_N: Tensor, y_N: Tensor, weight_N: Tensor) -> list[Bin]:
    """Ten bins of equal width over [0, 1], the empty ones left out: the reliability diagram."""
    which_N = (score_N * BINS).long().clamp(max=BINS - 1)
    bins = []
    for i in range(BINS):
        inside = which_N == i
        count = weight_N[inside].sum().item()
        if count:
            mean = [((weight_N * v)[inside].sum() / count).item() for v in (score_N, y_N)]
            bins.append(Bin(i / BINS, (i + 1) / BINS, count, *mean))
    return bins


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error: the mean distance of score and share right, over the bins."""
    total = sum(each.count for each in bins)
    return sum(each.count * abs(each.score - each.right) for each in bins) / total


def ranking(score_N: Tensor, y_N: Tensor, weight_N: Tensor) -> float:
    """The probability that something right scores above something wrong, ties counting half: the
    area under the ROC curve. NaN where all is right or all is wrong.
    """
    levels, which_N = score_N.unique(return_inverse=True)
    right_L, wrong_L = (
        torch.zeros(len(levels), dtype=torch.float64).index_add(0, which_N, (weight_N * v).double())
        for v in (y_N, 1 - y_N)
    )
    below_L = wrong_L.cumsum(0) - wrong_L / 2
    return ((right_L * below_L).sum() / (right_L.sum() * wrong_L.sum())).item()
