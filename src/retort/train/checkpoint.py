"""Training states on disk: complete or absent, the newest few kept, nothing pickled."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS = "tensors.safetensors"
VALUES = "values.json"


def save(root: Path, step: int, tensors: dict[str, Tensor], values: Any, keep: int) -> None:
    """Writes the state of a global step aside and renames it, then drops all but `keep` states.

    States of later steps go too: they are damaged ones that a resume has passed over.
    """
    root.mkdir(parents=True, exist_ok=True)
    aside = root / ".partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / TENSORS)
    (aside / VALUES).write_text(json.dumps(values), encoding="utf-8")
    for name in (TENSORS, VALUES):
        _sync(aside / name)
    final = root / f"step-{step:09d}"
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _sync(root)
    kept = [path for path in _states(root) if path <= final][-keep:]
    for other in set(_states(root)) - set(kept):
        shutil.rmtree(other)


def latest(root: Path) -> tuple[dict[str, Tensor], Any, list[Path]]:
    """Tensors and values of the newest readable state, and the damaged ones newer than it.

    Without a readable state there are no tensors, and the values are None.
    """
    damaged: list[Path] = []
    for path in reversed(_states(root)):
        try:
            values = json.loads((path / VALUES).read_text(encoding="utf-8"))
            return load_file(path / TENSORS), values, damaged
        except (OSError, SafetensorError, json.JSONDecodeError):
            damaged.append(path)
    return {}, None, damaged


def _states(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"))


def _sync(path: Path) -> None:
    """Makes sure that a rename never overtakes what it renames, even when power fails."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
