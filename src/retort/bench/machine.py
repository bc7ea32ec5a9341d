"""The machine that a measurement is of: what it is, how busy it is, how fast its memory copies."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from retort._version import __version__
from retort.train.gpus import of_device

COPIED = 1 << 28
"""Bytes of the array that is copied: more than any cache holds."""
COPIES = {"cpu": 2, "cuda": 16}

BUSY = 0.5
"""Of a machine's cores, the share whose load by others is worth a warning."""
PACKAGES = ("numba", "triton", "transformers", "flash-linear-attention")


@dataclass(frozen=True)
class Machine:
    """`device` is the GPU's name or the CPU's; `load` is the number of processes that wanted a core
    in the minute before; `versions` are of the packages there.
    """

    device: str
    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    system: str
    load: float
    versions: dict[str, str]

    @property
    def warning(self) -> str | None:
        """What a reader of the numbers should know about this machine, if anything."""
        if self.load <= BUSY * self.cores:
            return None
        return f"the machine was busy: load {self.load:.1f} on {self.cores} cores at the start"


def machine(device: torch.device) -> Machine:
    """The machine as it is now."""
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        cpu=_cpu(),
        cores=cores(),
        threads=torch.get_num_threads(),
        memory_bytes=_memory(device),
        system=platform.platform(),
        load=psutil.getloadavg()[0],
        versions={
            "retort": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,  # names the build, which an installed package need not
            **dict(_versions()),
        },
    )


def cores() -> int:
    """Cores that this process may use."""
    usable = psutil.Process().cpu_affinity() if sys.platform != "darwin" else None
    return len(usable) if usable else os.cpu_count() or 1


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """As many threads for torch, which our kernels share; None is one for each core.

    Raises ValueError for more than there are cores.
    """
    if count is not None and count > cores():
        raise ValueError(f"--threads {count}: this process may use {cores()} cores")
    before = torch.get_num_threads()
    torch.set_num_threads(count or cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of a large array reads and writes, both counted."""
    source = torch.ones(COPIED // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source).copy_(source)  # so that its pages are there
    times = COPIES.get(device.type, COPIES["cuda"])

    def copy() -> None:
        for _ in range(times):
            target.copy_(source)

    return 2 * COPIED * times / timed(copy, device)


def peak_flops(device: torch.device) -> float | None:
    """What a GPU can do at most in a second, in bfloat16; None for others, and for a CPU."""
    if device.type != "cuda":
        return None
    found = of_device(torch.cuda.get_device_name(device))
    return None if found is None else 1e12 * found.tflops


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of some work, all that it started on the device included."""
    synchronise(device)
    began = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu() -> str:
    """The CPU's name, which Linux keeps from `platform`."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
