"""What tells a step that went wrong from an ordinary one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from retort.recipe import Guard

LEAST_SPREAD = 1e-3
"""The least usual spread, as a fraction of the median: a loss that hardly moves is no alarm."""


def is_spike(loss: float, recent: Sequence[float], guard: Guard) -> bool:
    """Whether a loss lies more than `guard.spike` median absolute deviations above the median of
    the losses before it; never while there are fewer than `guard.window` of them.
    """
    if len(recent) < guard.window:
        return False
    middle = median(recent)
    spread = median(abs(each - middle) for each in recent)
    return loss > middle + guard.spike * max(spread, LEAST_SPREAD * abs(middle))


def is_finite(*values: float) -> bool:
    """Whether none of the values is infinite or not a number."""
    return all(math.isfinite(value) for value in values)
