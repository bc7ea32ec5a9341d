"""Runs in processes of their own, which a test may kill.

A server that has imported everything forks them, so that one starts in no time and a kill hits
training. What runs there is named by its module, so `tests` must be found by an import
(`pythonpath` in pyproject.toml).
"""

import multiprocessing
import os
import signal
import sys
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import NamedTuple

import torch

from retort.recipe import DistillRecipe
from retort.train import checkpoint, loop
from retort.train.checkpoint import Checkpoints
from retort.train.step import Stepper

REFUSED = 3
"""How a process ends that has met a mistake."""


class Moment(NamedTuple):
    """The n-th time that a function is called."""

    function: str
    call: int


STEP, WRITTEN = "a step", "a file that is written out"
_OWNERS = {STEP: (Stepper, "_gradients"), WRITTEN: (checkpoint, "_sync")}


def forks() -> ForkServerContext:
    """What starts processes that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.warm"])
    return context


def start(recipe: DistillRecipe, fatal: Moment | None = None) -> ForkServerProcess:
    """Begins a run, to be killed at a moment."""
    process = forks().Process(target=run, args=[recipe.model_dump_json(), fatal])
    process.start()
    return process


def run_until_killed(recipe: DistillRecipe, fatal: Moment) -> None:
    """A run that is killed (SIGKILL) as it comes to a moment."""
    process = start(recipe, fatal)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def run(recipe: str, fatal: Moment | None = None) -> None:
    """A run within this process."""
    torch.set_num_threads(1)
    if fatal is not None:
        _arrange(fatal)
    try:
        loop.distill(DistillRecipe.model_validate_json(recipe))
    except ValueError as mistake:
        print(mistake, file=sys.stderr)
        sys.exit(REFUSED)


def _arrange(fatal: Moment) -> None:
    owner, name = _OWNERS[fatal.function]
    function, calls = getattr(owner, name), iter(range(1, 1000))

    def killed(*arguments: object) -> object:
        if next(calls) == fatal.call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    setattr(owner, name, killed)
    # Whether a state that is written in the background is done by then is not for chance to decide.
    Checkpoints.poll = Checkpoints.finish  # type: ignore[method-assign]
