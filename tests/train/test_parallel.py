"""Two processes do what one does: gradients, steps and states."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).with_name("ranks.py")


def torchrun(*arguments: str | Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Relative errors of everything that `ranks.py` compares."""
    out = tmp_path_factory.mktemp("ranks") / "errors.json"
    done = torchrun(RANKS, out)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


EXACT = [
    *(f"{kind} {what}" for kind in ("mixing_matrices", "hidden_states", "distill", "supervised")
      for what in ("gradients", "weights")),
    *(f"{name} {what}" for name in ("sharded", "copied", "full", "selective")
      for what in ("gradients", "weights")),
    "mamba1 gradients", "mamba1 weights", "resumed by two", "resumed by one",
]  # fmt: skip


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_two_processes_equal_one(errors: dict[str, float], name: str) -> None:
    """Losses, gradients, their norm, and weights after two steps, with uneven masks."""
    assert errors[name] <= (1e-6 if name.endswith("gradients") else 1e-5)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_products_in_bfloat16_with_masters_in_float32(errors: dict[str, float]) -> None:
    assert errors["masters in float32"] == 0
    assert errors["rates in float32"] == 0
    assert 1e-4 < errors["bfloat16 gradients"] < 0.1
