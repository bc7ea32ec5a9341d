"""`retort demo`: the whole way, from the bundled teacher to a report, on a laptop's CPU.

Two students are distilled side by side, each in a process of its own with one thread: small
matrices gain nothing from more, and threads that wait for a busy core lose a great deal. Then all
three models answer the same problems, one after the other, so that their speeds compare.

Every step continues where an earlier run of the same command stopped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from retort import console
from retort.grade.run import grade
from retort.metrics import last_record
from retort.recipe import RECIPES, DistillRecipe, SampleRecipe, load
from retort.report.curves import Curves
from retort.report.run import report
from retort.sample.run import sample
from retort.train.prepare import work_folder

STUDENTS = ("pure", "hybrid")
POLL_SECONDS = 0.5


def demo(out: Path) -> Curves:
    """Distils, samples, grades and reports into `out`; returns what the report shows.

    Raises ValueError when a step cannot be done, with the reason that step gave.
    """
    torch.set_num_threads(1)
    students = {name: out / "models" / name for name in STUDENTS}
    _distill_all([_Child.start(name, folder) for name, folder in students.items()])
    runs = [_sample("teacher", "bundled", out)]
    runs += [_sample(name, str(folder), out) for name, folder in students.items()]
    for run in runs:
        grade(run)
    return report(runs, out)


def _sample(name: str, model: str, out: Path) -> Path:
    settings = [f"name={name}", f"model={model}", f"out={out / 'samples' / name}"]
    return sample(load(SampleRecipe, [RECIPES / "demo" / "sample.yaml", *settings]))


@dataclass(frozen=True)
class _Child:
    """A distillation in a process of its own, its messages in a file."""

    name: str
    recipe: DistillRecipe
    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, name: str, folder: Path) -> _Child:
        sources = [str(RECIPES / "demo" / f"{name}.yaml"), f"out={folder}"]
        recipe = load(DistillRecipe, sources)
        log = folder.with_name(f"{name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "retort", "distill", *sources],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        return cls(name, recipe, process, log)

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.recipe.stages)

    def done(self) -> int:
        """Steps taken so far, this time and before."""
        metrics = work_folder(self.recipe.out) / "metrics.jsonl"
        last = last_record(metrics) if metrics.is_file() else None
        return int(last["step"]) if last else 0

    def check(self) -> None:
        """Raises ValueError with the last words of a process that failed."""
        if self.process.poll():
            words = self.log.read_text(encoding="utf-8", errors="replace").strip()
            raise ValueError(f"distilling {self.name} failed: {words[-2000:]}")


def _distill_all(children: Sequence[_Child]) -> None:
    """Waits for all distillations behind one progress bar; ends all when one fails."""
    total, before = sum(c.steps for c in children), sum(c.done() for c in children)
    try:
        with console.progress("distil", total, "steps", before) as advance:
            while any(child.process.poll() is None for child in children):
                time.sleep(POLL_SECONDS)
                done = sum(child.done() for child in children)
                advance(done - before, " and ".join(child.name for child in children))
                before = done
                for child in children:
                    child.check()
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.terminate()
                child.process.wait()
