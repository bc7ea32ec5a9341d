"""The processes of a run: one on a CPU, one GPU, or the many that torchrun starts."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from retort.model.devices import fast_dtype, open_device
from retort.recipe import Parallel

T = TypeVar("T")


class KnownToAll(ValueError):
    """A mistake that every process raises: one of them is enough to tell it."""


class OfOneProcess(ValueError):
    """A mistake that another process than the main one has found, and nobody else may know of."""


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them.

    Without a mesh there is one process, and nothing is sharded. `saving` is a group of its own for
    checkpoints that are written while training goes on: collectives of two threads in one group
    would meet each other's.
    """

    device: torch.device
    saving: dist.ProcessGroup
    rank: int
    size: int
    mesh: DeviceMesh | None

    @property
    def main(self) -> bool:
        """Whether this is the process that speaks and writes what is written once."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's part of `count` things, which the number of processes divides."""
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def largest(self, value: float) -> float:
        """The largest that any process has."""
        if self.size == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def gather(self, value: T) -> list[T]:
        """What each process has, in the order of their ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def counted(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Counts by name, summed over all processes."""
        return dict(sum(map(Counter, self.gather(dict(counts))), Counter[str]()))

    def from_main(self, value: T) -> T:
        """What the main process has."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def agree(self, make: Callable[[], T]) -> T:
        """What `make` gives here. Raises ValueError on all processes for what any of them finds."""
        made: list[T] = []
        problem: str | None = None
        try:
            made.append(make())
        except ValueError as error:
            problem = str(error)
        for found in self.gather(problem):
            if found is not None:
                raise KnownToAll(found)
        return made[0]

    def wait(self) -> None:
        """Returns when all processes have come this far."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def open_world(device: str, settings: Parallel) -> Iterator[World]:
    """The world that torchrun describes in the environment, or this process alone.

    Raises ValueError for a device that is not there or would be shared, and for a shard size that
    does not divide the number of processes.
    """
    with _named():
        yield from _opened(device, settings)


def _opened(device: str, settings: Parallel) -> Iterator[World]:
    found = open_device(own_device(device))
    size = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    shard = settings.shard or size
    if size % shard:
        raise KnownToAll(f"parallel.shard: {shard} does not divide the {size} processes")
    if found.type == "cuda":
        torch.cuda.set_device(found)
    with _joined(found):
        saving = dist.new_group(backend="gloo")
        mesh = init_device_mesh(found.type, (size // shard, shard), mesh_dim_names=("copy", "part"))
        # Sharding is also what casts for each use, which one process needs too, if not in float32.
        plain = size == 1 and compute_dtype(found, settings) == torch.float32
        yield World(found, saving, dist.get_rank(), size, None if plain else mesh)


@contextmanager
def _named() -> Iterator[None]:
    """Mistakes of another process than the main one say whose they are."""
    try:
        yield
    except KnownToAll:
        raise
    except ValueError as error:
        rank = os.environ["RANK"] if dist.is_torchelastic_launched() else "0"
        if rank == "0":
            raise
        raise OfOneProcess(f"process {rank} on {platform.node()}: {error}") from error


def own_device(name: str) -> str:
    """The device of that name which is this process's own: with `cuda`, a GPU for each.

    Raises ValueError for one GPU, named by its number, for several processes of a machine.
    """
    launched = dist.is_torchelastic_launched()
    if launched and name.startswith("cuda:") and int(os.environ["LOCAL_WORLD_SIZE"]) > 1:
        raise ValueError(f"device: {name} is one GPU for several processes; say cuda, for one each")
    if name != "cuda":
        return name
    return f"cuda:{os.environ['LOCAL_RANK'] if launched else 0}"


@contextmanager
def _joined(device: torch.device) -> Iterator[None]:
    """Connected with the other processes.

    One of several that fails just ends: all must disconnect together, and the others may be
    waiting for it elsewhere.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    together = True
    try:
        yield
    except Exception:
        together = dist.get_world_size() == 1
        raise
    finally:
        if together:
            dist.destroy_process_group()


def compute_dtype(device: torch.device, settings: Parallel) -> torch.dtype:
    """What products are computed in: as asked for, or what suits the device."""
    if settings.dtype is None:
        return fast_dtype(device)
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
