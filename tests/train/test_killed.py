"""A run that is killed at any moment, on any number of processes, goes on as if nothing had been.

Killed means SIGKILL: no handler, no clean-up.
"""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

import retort
from retort import recipe as recipes
from retort.data.packing import Batch
from retort.metrics import read_metrics
from retort.recipe import DistillRecipe
from retort.train import loop
from retort.train.prepare import work_folder
from retort.train.step import Stepper

KILLS = 10
REFUSED = 3
"""How a process ends that has met a mistake."""

DATA = {
    "kind": "worked",
    "prompt": "{question}",
    "problems": {"kind": "arithmetic", "split": "train", "difficulty": [1, 1]},
}
FRESH = {
    "start": "fresh",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
}


def stage(kind: str, steps: int) -> dict[str, Any]:
    return {
        "name": kind,
        "objective": {"kind": kind},
        "data": DATA,
        "tokens": steps * 2 * 288,
        "rows": 2,
        "length": 288,
        "optim": {"lr": 5e-3},
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "teacher"
    values = {"out": out, "student": FRESH, "stages": [stage("supervised", 3)]}
    return loop.distill(recipes.parse(DistillRecipe, values))


def student(out: Path, teacher: Path, steps: int) -> DistillRecipe:
    values = {
        "out": out,
        "teacher": teacher,
        "student": {"start": "transplant", "keep_attention": [1], "settings": {"chunk_size": 16}},
        "stages": [stage("hidden_states", steps), stage("distill", steps)],
        "checkpoints": {"every": 3},
    }
    return recipes.parse(DistillRecipe, values)


def losses(recipe: DistillRecipe) -> list[tuple[int, float]]:
    records = read_metrics(work_folder(recipe.out) / "metrics.jsonl")
    return [(record["step"], record["loss"]) for record in records]


def run(recipe: str) -> None:
    torch.set_num_threads(1)
    loop.distill(DistillRecipe.model_validate_json(recipe))


@pytest.fixture(scope="module")
def ready() -> ForkServerContext:
    """Starts processes that have imported everything already, so that kills hit training."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["retort.train.loop"])
    return context


@pytest.mark.multiprocess
@pytest.mark.slow
def test_killed_ten_times_at_random(
    tmp_path: Path, teacher: Path, ready: ForkServerContext
) -> None:
    """One process in float32: bit for bit the same student, and the same losses."""
    undisturbed = student(tmp_path / "undisturbed", teacher, 60)
    began = time.monotonic()
    loop.distill(undisturbed)
    took = time.monotonic() - began
    killed = student(tmp_path / "killed", teacher, 60)
    moments = random.Random(0)
    for _ in range(KILLS):
        process = ready.Process(target=run, args=[killed.model_dump_json()])
        process.start()
        process.join(moments.uniform(0.05, 0.35) * took)
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    run(killed.model_dump_json())
    assert losses(killed) == losses(undisturbed)
    names = sorted(path.name for path in undisturbed.out.iterdir())
    assert names == sorted(path.name for path in killed.out.iterdir())
    assert all(
        (killed.out / name).read_bytes() == (undisturbed.out / name).read_bytes() for name in names
    )


# ---------------------------------------------------------------- other numbers of processes


def rank_of(rank: int, processes: int, port: int, recipe: str, fatal: int) -> None:
    """One process as torchrun starts it, which kills itself as its n-th step begins."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    take, calls = Stepper.take, iter(range(1, 1000))

    def killed(self: Stepper, batch: Batch) -> dict[str, Any]:
        if next(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, batch)

    Stepper.take = killed  # type: ignore[method-assign]
    try:
        run(recipe)
    except ValueError:
        sys.exit(REFUSED)


def until(ready: ForkServerContext, recipe: DistillRecipe, processes: int, fatal: int) -> list[int]:
    """Runs on so many processes, killed at this run's n-th step; how each of them ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = recipe.model_dump_json()
    ranks = [
        ready.Process(target=rank_of, args=[rank, processes, port, text, fatal])
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
def test_goes_on_with_another_number_of_processes(
    tmp_path: Path, teacher: Path, ready: ForkServerContext
) -> None:
    """Two, killed, two, killed, one, killed, two: the curve of one process that nothing stopped.

    A kill may come before the last state is on the disk; then the one before it is gone on from.
    """
    undisturbed = student(tmp_path / "undisturbed", teacher, 8)
    loop.distill(undisturbed)
    changed = student(tmp_path / "changed", teacher, 8)
    last = []
    for processes, fatal in ((2, 6), (2, 5), (1, 6)):
        ended = until(ready, changed, processes, fatal)
        assert ended == [-signal.SIGKILL] * processes
        last.append(losses(changed)[-1][0])
    assert last[0] == 5
    assert last[1] in (3 + 4, 4)
    assert 8 < last[2] < 16  # in the second stage
    assert until(ready, changed, 2, 1000) == [0, 0]
    found, wanted = dict(losses(changed)), dict(losses(undisturbed))
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=2e-5)
    tensors, other = (retort.load(each.out).state_dict() for each in (changed, undisturbed))
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-5)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_mistake_ends_all_processes(
    tmp_path: Path, teacher: Path, ready: ForkServerContext
) -> None:
    wanted = student(tmp_path / "student", teacher / "missing", 8)
    assert until(ready, wanted, 2, 1000) == [REFUSED, REFUSED]
    assert list(tmp_path.iterdir()) == []
