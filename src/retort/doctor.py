"""What this machine has for Retort, and what is missing for what."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
from rich.table import Table
from rich.text import Text

from retort._version import __version__

GIB = 2**30
ROOM, LEAST = 20 * GIB, GIB
"""Of disk: for the checkpoints of a 1B distillation, and for the demo."""


@dataclass(frozen=True)
class Extra:
    """An optional package: how it is imported and installed, and what for."""

    name: str
    module: str
    install: str
    purpose: str


EXTRAS = (
    Extra("Ray", "ray", '"retort-lm[ray]"', "sampling on many machines (docs/sampling.md)"),
    Extra("trackio", "trackio", "trackio", "following training (docs/watching.md)"),
    Extra("wandb", "wandb", "wandb", "following training (docs/watching.md)"),
    Extra("TensorBoard", "tensorboard", "tensorboard", "following training (docs/watching.md)"),
    Extra("llama.cpp", "llama_cpp", "llama-cpp-python gguf", "comparisons (docs/benchmarks.md)"),
)
FLA = Extra("flash-linear-attention", "fla", '"retort-lm[gpu]"', "fast Mamba-2 scans on the GPU")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `fine`, and if not, what to do about it.

    `needed` says whether Retort misses it, or only one of its features.
    """

    what: str
    found: str
    fine: bool = True
    needed: bool = True
    advice: str = ""


def findings(folder: Path) -> list[Finding]:
    """All of them; `folder` is where runs would go."""
    return [
        Finding("Retort", f"{__version__}, Python {platform.python_version()}"),
        *_computing(),
        _transformers(),
        _kernels(),
        _disk(folder),
        *(_extra(extra) for extra in EXTRAS),
    ]


def table(found: list[Finding]) -> Table:
    """What was found, a row each."""
    result = Table("", "what", "found", "what to do", box=None)
    for each in found:
        mark = "ok" if each.fine else "MISSING" if each.needed else "-"
        cells = (mark, each.what, each.found, each.advice)
        result.add_row(*(Text(cell) for cell in cells))
    return result


def _computing() -> Iterator[Finding]:
    import torch

    memory = psutil.virtual_memory()
    cores, threads = os.cpu_count(), torch.get_num_threads()
    yield Finding("torch", torch.__version__)
    yield Finding("CPU", f"{cores} cores, threads: {threads}; {_gib(memory.available)} free memory")
    if not torch.cuda.is_available():
        advice = "models beyond some 100 M parameters want one; the demo does not"
        yield Finding("GPU", "none that torch sees", fine=False, needed=False, advice=advice)
        return
    for index in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"GPU {index}", f"{name}, {_gib(free)} of {_gib(whole)} free")
    yield _extra(FLA)


def _transformers() -> Finding:
    """Retort itself does with less than its exported students ask for."""
    from retort.model.formats import granite

    found = version("transformers")
    if granite.norms_groups(found):
        return Finding("transformers", found)
    advice = f"exported students need {granite.GROUPED_NORM} in it (docs/serving.md)"
    return Finding("transformers", found, fine=False, needed=False, advice=advice)


def _kernels() -> Finding:
    """Whether compiled code can be kept, as Numba looks for a folder."""
    from retort.ops import cpu

    beside = Path(cpu.__file__).parent
    asked = os.environ.get("NUMBA_CACHE_DIR")
    places = [Path(asked)] if asked else [beside, Path.home()]
    for place in places:
        there = _existing(place)
        if there.is_dir() and os.access(there, os.W_OK):  # Numba makes what is missing
            return Finding("CPU kernels", f"kept compiled in {place}")
    advice = "set NUMBA_CACHE_DIR to a folder that can be written"
    return Finding("CPU kernels", "compiled anew at every start", fine=False, advice=advice)


def _disk(folder: Path) -> Finding:
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    found = f"{_gib(free)} free in {there.absolute()}"
    if free >= ROOM:
        return Finding("disk", found)
    advice = "checkpoints of 1B models take 20 GiB and more, the demo a hundredth of that"
    return Finding("disk", found, fine=False, needed=free < LEAST, advice=advice)


def _existing(place: Path) -> Path:
    """The place, or the nearest above it that there is."""
    return next(each for each in (place, *place.absolute().parents) if each.exists())


def _extra(extra: Extra) -> Finding:
    if find_spec(extra.module) is None:
        advice = f"for {extra.purpose}: pip install {extra.install}"
        return Finding(extra.name, "not installed", fine=False, needed=False, advice=advice)
    return Finding(extra.name, _version(extra.module), advice=f"for {extra.purpose}")


def _version(module: str) -> str:
    try:
        return version(module.replace("_", "-"))
    except PackageNotFoundError:
        return "installed"


def _gib(size: float) -> str:
    return f"{size / GIB:.0f} GiB"
