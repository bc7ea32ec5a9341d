"""Compiled code: kept on disk, made anew when any of the source has changed, and never required."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retort.ops import cpu
from retort.ops.cpu import jit

RUN = """
import numpy as np
from {package}.norms import gate
found = np.empty((1, 1), np.float32)
gate(np.array([[2, 1]], np.float32), found, 1, (1, 0, 0))
print(found[0, 0], sum(gate.stats.cache_hits.values()))
"""


def run(folder: Path, **environment: str) -> list[float]:
    """silu(2) * 1 by a copy of the kernels, and how often it was found compiled."""
    command = [sys.executable, "-c", RUN.format(package="kernels")]
    variables = {**os.environ, "PYTHONPATH": str(folder), **environment}
    told = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return [float(word) for word in told.stdout.split()]


@pytest.mark.multiprocess
def test_compiled_code_is_kept_and_forgotten_with_its_source(tmp_path: Path) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(Path(cpu.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.glob("*.py"):
        path.write_text(path.read_text().replace("retort.ops.cpu", "kernels"))
    assert run(tmp_path) == pytest.approx([1.7615942, 0])
    assert run(tmp_path) == pytest.approx([1.7615942, 1])
    maths = copy / "maths.py"  # another file than the kernel's
    maths.write_text(maths.read_text().replace("return x / (F(1)", "return x / (F(2)"))
    assert run(tmp_path) == pytest.approx([2 / (2 + 0.1353353), 0])


def test_kernels_work_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dispatcher: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    def add(numbers: list[float]) -> None:
        raise AssertionError("not called")

    monkeypatch.setattr("numba.core.dispatcher.Dispatcher.enable_caching", refuse)
    assert jit.kernel(add).py_func is add
