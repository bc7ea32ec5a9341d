"""Kernels must be what the compiler takes, of which the interpreter is no proof."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels for GPUs need triton, which is for Linux")

import retort.ops.cuda


def test_every_kernel_compiles(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compiled.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    sources = Path(retort.ops.cuda.__file__).parent.glob("*.py")
    kernels = {
        name for path in sources for name in re.findall(r"def (\w+_kernel)\(", path.read_text())
    }
    assert set(done.stdout.split()) == kernels
