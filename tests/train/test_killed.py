"""A run that is killed at any moment, on any number of processes, goes on as if nothing had been.

Killed means SIGKILL: no handler, no clean-up.
"""

import os
import random
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

import retort
from retort.metrics import read_metrics
from retort.recipe import DistillRecipe
from retort.train import loop
from retort.train.folder import work_folder

from .processes import REFUSED, STEP, Moment, forks, run, start
from .tiny import hybrid, stage

KILLS = 10
STEPS = 24
"""Of each stage: enough for a kill to come before, in and between states."""

NEVER = 1000


def student(out: Path, teacher: Path, steps: int) -> DistillRecipe:
    stages = [stage("hidden_states", steps), stage("distill", steps)]
    return hybrid(out, teacher, *stages, checkpoints={"every": 3})


def losses(recipe: DistillRecipe) -> list[tuple[int, float]]:
    records = read_metrics(work_folder(recipe.out) / "metrics.jsonl")
    return [(record["step"], record["loss"]) for record in records]


def wait_for_steps(recipe: DistillRecipe, more: int, process: BaseProcess) -> None:
    """Returns when a run has taken so many steps more than any before it."""
    log = work_folder(recipe.out) / "metrics.jsonl"

    def steps() -> int:
        return log.read_bytes().count(b"\n") if log.is_file() else 0

    wanted = steps() + more
    while steps() < wanted:
        assert process.is_alive()
        time.sleep(0.002)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_killed_ten_times_at_random(tmp_path: Path, teacher: Path) -> None:
    """One process in float32: bit for bit the same student, and the same losses."""
    undisturbed = student(tmp_path / "undisturbed", teacher, STEPS)
    loop.distill(undisturbed)
    killed = student(tmp_path / "killed", teacher, STEPS)
    moments = random.Random(0)
    for _ in range(KILLS):
        process = start(killed)
        wait_for_steps(killed, moments.randrange(6), process)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    loop.distill(killed)
    assert losses(killed) == losses(undisturbed)
    names = sorted(path.name for path in undisturbed.out.iterdir())
    assert names == sorted(path.name for path in killed.out.iterdir())
    assert all(
        (killed.out / name).read_bytes() == (undisturbed.out / name).read_bytes() for name in names
    )


# ---------------------------------------------------------------- other numbers of processes


def rank_of(rank: int, processes: int, port: int, recipe: str, fatal: int) -> None:
    """One process as torchrun starts it, which kills itself in its n-th step."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    run(recipe, Moment(STEP, fatal))


def until(recipe: DistillRecipe, processes: int, fatal: int) -> list[int]:
    """Runs on so many processes, killed at this run's n-th step; how each of them ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = recipe.model_dump_json()
    ranks = [
        forks().Process(target=rank_of, args=[rank, processes, port, text, fatal])
        for rank in range(processes)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert not any(process.is_alive() for process in ranks)
    return [process.exitcode or 0 for process in ranks]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_goes_on_with_another_number_of_processes(tmp_path: Path, teacher: Path) -> None:
    """Two, killed, two, killed, one, killed, two: the curve of one process that nothing stopped."""
    undisturbed = student(tmp_path / "undisturbed", teacher, 8)
    loop.distill(undisturbed)
    changed = student(tmp_path / "changed", teacher, 8)
    last = []  # steps that were recorded; states are those of 3, 6, 8 and 11
    for processes, fatal in ((2, 6), (2, 5), (1, 6)):
        ended = until(changed, processes, fatal)
        assert ended == [-signal.SIGKILL] * processes
        last.append(losses(changed)[-1][0])
    assert last == [5, 7, 11]
    assert until(changed, 2, NEVER) == [0, 0]
    found, wanted = dict(losses(changed)), dict(losses(undisturbed))
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=2e-5)
    tensors, other = (retort.load(each.out).state_dict() for each in (changed, undisturbed))
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-5)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_mistake_ends_all_processes(tmp_path: Path, teacher: Path) -> None:
    wanted = student(tmp_path / "student", teacher / "missing", 8)
    assert until(wanted, 2, NEVER) == [REFUSED, REFUSED]
    assert list(tmp_path.iterdir()) == []
