"""Sampling and grading in a process of its own, which kills itself at some moment.

The moments are those at which something has been done or is about to: a completion that the engine
hands out, a file that is flushed to the disk, a file that gets its name.
"""

import os
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch

from retort.grade import run as grading
from retort.recipe import SampleRecipe
from retort.sample import run as sampling
from retort.sample.engine import Engine, Finished


def run(recipe: str, fatal: int) -> None:
    """Samples and grades, in small parts, up to the moment of this number."""
    torch.set_num_threads(1)
    sampling.FLUSH_ROWS = 3
    grading.ROWS_PER_PART = 5
    _arrange(fatal)
    grading.grade(sampling.sample(SampleRecipe.model_validate_json(recipe)))


def _arrange(fatal: int) -> None:
    moments = count(1)

    def pass_moment() -> None:
        if next(moments) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            pass_moment()
            result = function(*arguments)
            pass_moment()
            return result

        return call

    looks = Engine.looks

    def looked(self: Engine, *asked: Any) -> Iterator[list[Finished]]:
        for some in looks(self, *asked):
            for done in some:
                pass_moment()
                yield [done]

    os.fsync = watched(os.fsync)
    Path.replace = watched(Path.replace)  # type: ignore[method-assign]
    Engine.looks = looked  # type: ignore[method-assign]
