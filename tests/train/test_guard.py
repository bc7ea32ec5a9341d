"""Spikes: far above what losses were lately, by how much they usually differ."""

import pytest

from retort.recipe import Guard
from retort.train.guard import is_finite, is_spike

GUARD = Guard(window=8, spike=10.0)
LOSSES = [2.0, 2.2, 1.9, 2.1, 2.0, 2.2, 1.8, 2.1]  # median 2.05, median deviation 0.1


@pytest.mark.parametrize(("loss", "wanted"), [(1.0, False), (3.0, False), (3.2, True)])
def test_far_above_the_median(loss: float, wanted: bool) -> None:
    assert is_spike(loss, LOSSES, GUARD) == wanted


def test_not_before_there_are_enough_losses() -> None:
    assert not is_spike(100.0, LOSSES[:7], GUARD)
    assert is_spike(100.0, LOSSES, GUARD)


def test_a_loss_that_stands_still_may_move_a_little() -> None:
    still = [2.0] * 8
    assert not is_spike(2.01, still, GUARD)
    assert is_spike(2.03, still, GUARD)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [((1.0, 2.0), True), ((1.0, float("nan")), False), ((float("inf"), 0.0), False)],
)
def test_finite(values: tuple[float, float], wanted: bool) -> None:
    assert is_finite(*values) == wanted
