"""What every result begins with: when, how and where it was measured."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from retort.bench.machine import Machine, machine
from retort.bench.models import Model, Sizes, sizes


@dataclass(frozen=True)
class Head:
    """The time and the command, the machine as it was then, the models, and what a reader should
    know before comparing numbers.
    """

    made: str
    command: str
    machine: Machine
    models: tuple[Sizes, ...]
    notes: tuple[str, ...]


def head(models: Sequence[Model], device: torch.device, notes: Sequence[str] = ()) -> Head:
    """The head of a result that begins now."""
    here = machine(device)
    busy = [here.warning] if here.warning else []
    return Head(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["retort", *sys.argv[1:]]),
        machine=here,
        models=tuple(map(sizes, models)),
        notes=(*busy, *notes),
    )
