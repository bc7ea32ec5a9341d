"""Training states on disk: complete or absent, the newest few kept, nothing pickled.

A state is a folder of safetensors files, one from each process, with the numbers beside them in
`values.json`. It is read back by any number of processes (torch.distributed.checkpoint), and is
written aside and renamed, in the background while training goes on.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from retort import console
from retort.train.world import World

FOLDER = "checkpoints"
VALUES = "values.json"
PARTIAL = ".partial"
REPLACED = ".replaced"


@dataclass
class Checkpoints:
    """The states of one run in the folder `root`, of which the newest `keep` stay."""

    root: Path
    keep: int
    world: World
    _running: tuple[int, Future[Any]] | None = field(default=None, init=False)

    def save(self, step: int, tensors: dict[str, Tensor], values: Any) -> None:
        """Begins to write the state of a step; the tensors are copied before this returns.

        Whatever an earlier call began is finished first.
        """
        self.finish()
        aside = self.root / PARTIAL
        if self.world.main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            (aside / VALUES).write_text(json.dumps(values), encoding="utf-8")
        self.world.wait()
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        future = async_save(tensors, storage_writer=writer, process_group=self.world.saving)
        assert isinstance(future, Future)
        self._running = step, future

    def poll(self) -> None:
        """Finishes what is being written if nothing has to be waited for, on any process."""
        if self._running is not None:
            done = self.world.sum([self._running[1].done()])[0] == self.world.size
            if done:
                self.finish()

    def finish(self) -> None:
        """Waits for the state that is being written and puts it in its place.

        Raises OSError on every process where one of them could not write its part.
        """
        if self._running is None:
            return
        step, future = self._running
        self._running = None
        with _plain_errors(self.root, f"the state of step {step} could not be written"):
            future.result()
        self.world.wait()
        if self.world.main:
            self._settle(step)

    def _settle(self, step: int) -> None:
        """Renames a state that has been written, and drops those that are too old.

        States of later steps go too: they are damaged ones that a resume has passed over.
        """
        aside, final = self.root / PARTIAL, folder(self.root, step)
        sizes = {path.name: path.stat().st_size for path in aside.glob("*.safetensors")}
        values = json.loads((aside / VALUES).read_text(encoding="utf-8"))
        text = json.dumps({"files": sizes, "values": values})
        (aside / VALUES).write_text(text, encoding="utf-8")
        _sync(aside / VALUES)
        _sync(aside)
        replaced = self.root / REPLACED  # deleting takes a while, in which a run may be killed
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        _sync(self.root)
        shutil.rmtree(replaced, ignore_errors=True)
        kept = [path for path in states(self.root) if path <= final][-self.keep :]
        for other in set(states(self.root)) - set(kept):
            shutil.rmtree(other)


def newest(root: Path) -> tuple[Path, Any] | None:
    """The newest state that is whole, and its values; says which ones are damaged, and passed over
    for it.
    """
    damaged = list[Path]()
    for path in reversed(states(root)):
        values = read_values(path)
        if values is not None:
            for each in damaged:
                console.warn(f"{each}: damaged; {path.name}, which is whole, takes its place")
            return path, values
        damaged.append(path)
    for each in damaged:
        console.warn(f"{each}: damaged, and so is every state before it")
    return None


def read(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Reads a state's tensors into those given, whichever part of each a process has.

    Raises OSError on every process where one of them could not read its part.
    """
    reader = HuggingFaceStorageReader(str(path))
    with _plain_errors(path, "could not be read"):
        load(tensors, storage_reader=reader, process_group=world.saving)


@contextmanager
def _plain_errors(path: Path, what: str) -> Iterator[None]:
    """Turns what went wrong on any process into an OSError that says what, and why."""
    try:
        yield
    except CheckpointException as error:
        why = "; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))
        raise OSError(errno.EIO, f"{what}: {why}", str(path)) from error


def folder(root: Path, step: int) -> Path:
    """Where the state of a step is, if it has been kept."""
    return root / f"step-{step:09d}"


def step_of(path: Path) -> int:
    """The step of a state's folder."""
    return int(path.name.removeprefix("step-"))


def states(root: Path) -> list[Path]:
    """The folders of all states, oldest first."""
    return sorted(root.glob("step-*"))


def read_values(path: Path) -> Any:
    """The values of a state, or None where the state is not whole."""
    try:
        told = json.loads((path / VALUES).read_text(encoding="utf-8"))
        for name, size in told["files"].items():
            if (path / name).stat().st_size != size:
                return None
            with safe_open(path / name, framework="pt"):
                pass
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return told["values"]


def _sync(path: Path) -> None:
    """Makes sure that a rename never overtakes what it renames, even when power fails."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
