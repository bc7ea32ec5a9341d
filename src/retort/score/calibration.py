"""Fitting scores, and making probabilities of them.

Everything is weighted: a text that was sampled several times counts as often.

Shapes: N examples, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

STEPS = 200


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
