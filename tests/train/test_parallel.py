"""Two processes do what one does: gradients, steps, states, and whole runs that are killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from retort.recipe import Parallel
from retort.train.parallel import World, open_world, own_device

RANKS = Path(__file__).with_name("ranks.py")


# ---------------------------------------------------------------- one process among others


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As torchrun describes the third of eight processes of a machine."""
    told = {"TORCHELASTIC_RUN_ID": "test", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "8"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_each_process_has_a_gpu_of_its_own(launched: pytest.MonkeyPatch) -> None:
    assert own_device("cuda") == "cuda:2"
    assert own_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="device: cuda:1 is one GPU for several processes"):
        own_device("cuda:1")
    launched.setenv("LOCAL_WORLD_SIZE", "1")
    assert own_device("cuda:1") == "cuda:1"


def test_a_gpu_without_a_number_is_the_first() -> None:
    """A device without a number cannot be made the current one."""
    assert own_device("cuda") == "cuda:0"
    assert own_device("cuda:1") == "cuda:1"


def test_what_one_process_finds_all_are_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("mine")

    assert world.agree(lambda: 3) == 3
    with pytest.raises(ValueError, match="mine"):
        world.agree(fail)
    monkeypatch.setattr(World, "gather", lambda self, problem: [problem, "row 3 is bad"])
    with pytest.raises(ValueError, match="row 3 is bad"):
        world.agree(lambda: 3)


@pytest.mark.parametrize(("error", "leaves"), [(RuntimeError, False), (SystemExit, True)])
def test_one_of_several_that_fails_waits_for_no_other(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], leaves: bool
) -> None:
    left = []

    def fail(patch: pytest.MonkeyPatch) -> None:
        with open_world("cpu", Parallel()):
            patch.setattr(dist, "get_world_size", lambda: 2)
            patch.setattr(dist, "destroy_process_group", lambda: left.append(True))
            raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        fail(patch)
    dist.destroy_process_group()
    assert bool(left) == leaves


# ---------------------------------------------------------------- two processes


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
    "mamba1 gradients", "resumed by two", "resumed by one",
]  # fmt: skip


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_two_processes_equal_one(errors: dict[str, float], name: str) -> None:
    """Losses, gradients, their norm, and weights after three steps, with uneven masks."""
    assert errors[name] <= (1e-6 if name.endswith("gradients") else 1e-5)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_products_in_bfloat16_with_masters_in_float32(errors: dict[str, float]) -> None:
    assert errors["masters in float32"] == 0
    assert errors["rates in float32"] == 0
    assert 1e-4 < errors["bfloat16 gradients"] < 0.1
