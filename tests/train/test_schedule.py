"""The learning rate's course, the optimiser's groups, and what is frozen."""

from typing import Any

import pytest
import torch
from torch import nn

from retort.recipe import Optim
from retort.train.schedule import adamw, learning_rate, not_frozen


def rates(steps: int, **settings: Any) -> list[float]:
    optim = Optim(lr=1.0, **settings)
    return [learning_rate(optim, step, steps) for step in range(steps)]


def test_warm_up_stable_decay() -> None:
    """Over 20 steps: 2 of warm-up, 16 level ones, and 2 that approach 0 at the end."""
    found = rates(20, warmup=0.1, decay=0.1)
    assert found == pytest.approx([1 / 3, 2 / 3] + [1.0] * 17 + [0.5])


def test_long_decay_is_linear() -> None:
    found = rates(10, warmup=0.0, decay=0.5)
    assert found == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_cosine() -> None:
    found = rates(8, schedule="cosine", warmup=0.5, decay=0.0)
    half = 2**-0.5
    cosine = [1, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, *cosine])


def test_neither_warm_up_nor_decay_is_constant() -> None:
    assert rates(5, warmup=0.0, decay=0.0) == [1.0] * 5


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_every_step_of_a_short_stage_teaches(schedule: str, steps: int) -> None:
    assert all(0 < rate <= 1 for rate in rates(steps, schedule=schedule))


def test_only_matrices_decay() -> None:
    named = {
        "weight": nn.Parameter(torch.ones(2, 2)),
        "conv": nn.Parameter(torch.ones(2, 1, 4)),
        "norm": nn.Parameter(torch.ones(2)),
        "mamba.A_log": nn.Parameter(torch.ones(2, 2)),  # of Mamba-1: a rate for each state
    }
    optimizer = adamw(named, Optim(lr=0.1, weight_decay=0.5))
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert [float(named[name].detach().mean()) for name in named] == pytest.approx(
        [0.95, 0.95, 1, 1]
    )


def test_frozen_names() -> None:
    names = {"model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"}
    assert not_frozen(names, ()) == names
    assert not_frozen(names, ("*.mlp.*", "lm_head.weight")) == {"model.norm.weight"}


def test_a_pattern_that_freezes_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"freeze: '\*.attn.\*' matches no parameter"):
        not_frozen({"lm_head.weight"}, ("lm_head.*", "*.attn.*"))
