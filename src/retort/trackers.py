"""Trackers: where a run's metrics go besides its own file, by name, when they are installed.

trackio and Weights & Biases are told through their own clients and keep to their own settings, such
as WANDB_MODE=offline or TRACKIO_SPACE_ID; TensorBoard reads files in the run's folder.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from retort import console
from retort.recipe import Tracker

PROJECT = "retort"
RUN_ID = "tracker-id"


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of a run when it starts.

    `id` names the run for good, over all its continuations; `step` is the last step of those
    before, which the next one follows.
    """

    name: str
    id: str
    folder: Path
    config: Mapping[str, Any]
    step: int


class Client(Protocol):
    """A tracker that has been started."""

    def send(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Sink:
    """Sends records to trackers. One that fails is left out from then on, with a warning."""

    def __init__(self, clients: Mapping[str, Client]) -> None:
        self._clients = dict(clients)

    def write(self, record: Mapping[str, Any]) -> None:
        """Sends the numbers of a record with its step."""
        values = numbers_in(record)
        for name, client in list(self._clients.items()):
            self._try(name, partial(client.send, values, record["step"]))

    def close(self) -> None:
        """Lets each tracker send what it has kept back."""
        for name, client in list(self._clients.items()):
            self._try(name, client.close)

    def _try(self, name: str, call: Callable[[], None]) -> None:
        # Whatever a tracker raises, hours of training must not end with it.
        try:
            with redirect_stdout(sys.stderr):
                call()
        except Exception as error:
            del self._clients[name]
            console.warn(f"{_reason(name, error)}; it is told no more, metrics.jsonl is complete")


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raises ValueError for a tracker whose package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(
                f"trackers: {name} is not installed; pip install {name}, or leave it out "
                "(docs/watching.md#trackers)"
            )


@contextmanager
def open_trackers(
    names: Sequence[Tracker], name: str, folder: Path, config: Mapping[str, Any], step: int = 0
) -> Iterator[Sink]:
    """A sink for the metrics of a run, for the process that writes them.

    Args:
        name: what people call the run.
        folder: where its training leaves what it needs; the run's id is kept here, so that a
            continuation is the same run to every tracker.
        config: the recipe, in JSON's types.
        step: the last step before this; 0 for a new run.

    Raises:
        ValueError: a package is missing; or a tracker cannot start, at the beginning of a run. A
            run that continues does so without it, with a warning.
    """
    check_trackers(names)
    run = Tracked(name, _run_id(folder) if names else "", folder, config, step)
    sink = Sink({each: client for each in names if (client := _started(each, run))})
    try:
        yield sink
    finally:
        sink.close()


def numbers_in(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a record but its step, those of inner mappings as `outer/inner`."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= numbers_in(value, f"{prefix}{key}/")
        elif isinstance(value, numbers.Real) and math.isfinite(value) and key != "step":
            found[f"{prefix}{key}"] = float(value)
    return found


def _run_id(folder: Path) -> str:
    """What names this run and no other one, however often its folder's name is used."""
    path = folder / RUN_ID
    known = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not re.fullmatch("[0-9a-f]{8}", known):
        known = secrets.token_hex(4)
        path.write_text(known, encoding="utf-8")
    return known


def _started(name: Tracker, run: Tracked) -> Client | None:
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            return _start(name, run)
    except Exception as error:  # a missing key, a network that is down: whatever clients raise
        if run.step == 0:
            raise ValueError(f"{_reason(name, error)}; mend it, or leave it out") from None
        console.warn(f"{_reason(name, error)}; going on without it, metrics.jsonl is complete")
        return None


def _reason(name: str, error: Exception) -> str:
    return f"trackers: {name} failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})"


def _start(name: Tracker, run: Tracked) -> Client:
    match name:
        case "trackio":
            return _Trackio(run)
        case "wandb":
            return _Wandb(run)
        case "tensorboard":
            return _TensorBoard(run)


class _Trackio:
    """trackio knows runs by their names, so the id is part of the name."""

    def __init__(self, run: Tracked) -> None:
        import trackio

        name = f"{run.name}-{run.id}"
        self.run = trackio.init(PROJECT, name=name, config=dict(run.config), resume="allow")

    def send(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _Wandb:
    """A step that was sent before a kill and comes again is passed over by wandb itself."""

    def __init__(self, run: Tracked) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id,
            resume="allow",
            dir=run.folder,
            config=dict(run.config),
            settings=wandb.Settings(console="off"),  # what is printed here is progress bars
        )

    def send(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _TensorBoard:
    """Files in the run's folder; what a killed run wrote past its checkpoint is hidden."""

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(run.folder / "tensorboard")
        self.writer = SummaryWriter(folder, purge_step=run.step + 1 if run.step else None)
        if run.step == 0:
            self.writer.add_text(
                "recipe", f"```json\n{json.dumps(dict(run.config), indent=2)}\n```"
            )

    def send(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()
