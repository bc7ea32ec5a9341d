"""`retort demo`: the whole way, from the bundled teacher to a report, on a laptop's CPU.

Two students are distilled side by side, each in a process of its own with one thread: small
matrices gain little from more, and threads that wait for a busy core lose a great deal. Then all
three models answer the same problems, one after the other, so that their speeds compare; and a
verifier on the pure student's backbone, which learns from its answers to other problems, scores all
that they have answered.

Every step continues where an earlier run of the same command stopped. SIGINT and SIGTERM end the
distillations too, which save first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from retort import console
from retort.grade.run import grade
from retort.metrics import last_record
from retort.recipe import (
    RECIPES,
    DistillRecipe,
    SampleRecipe,
    ScoreRecipe,
    VerifierRecipe,
    load,
)
from retort.report.curves import Curves
from retort.report.run import report, report_training
from retort.report.training import is_training
from retort.sample.run import sample
from retort.score.run import score
from retort.score.training import train_verifier
from retort.score.verifier import is_verifier
from retort.train.folder import METRICS, finished, work_folder
from retort.train.stopping import stop_requests

STUDENTS = ("pure", "hybrid")
BACKBONE = "pure"
POLL_SECONDS = 0.5
THREADS = 2
"""For decoding, at most: two make 1.1 to 1.3 times the tokens of one with models this small."""


def demo(out: Path) -> Curves:
    """Distils, samples, grades and reports into `out`; returns what the report shows.

    Raises ValueError when a step cannot be done, with the reason that step gave.
    """
    torch.set_num_threads(min(torch.get_num_threads(), THREADS))
    students = {name: out / "models" / name for name in STUDENTS}
    _distill_all([_Distillation(name, folder) for name, folder in students.items()])
    runs = [_sample("sample", "teacher", "bundled", out)]
    runs += [_sample("sample", name, str(folder), out) for name, folder in students.items()]
    _judge(runs, students[BACKBONE], out)
    trained = [work for folder in students.values() if is_training(work := work_folder(folder))]
    if trained:
        report_training(trained, out)
    return report(runs, out, training=bool(trained))


def _sample(recipe: str, name: str, model: str, out: Path) -> Path:
    """A graded run of a model on the problems of a recipe."""
    settings = [f"name={name}", f"model={model}", f"out={out / 'samples' / name}"]
    run = sample(load(SampleRecipe, [RECIPES / "demo" / f"{recipe}.yaml", *settings]))
    grade(run)
    return run


def _judge(runs: Sequence[Path], student: Path, out: Path) -> None:
    """Scores the runs with a verifier; without one where the lessons do not let it learn."""
    verifier = out / "models" / "verifier"
    if not is_verifier(verifier):
        lessons = _sample("lessons", "lessons", str(student), out)
        try:
            train_verifier(VerifierRecipe(run=lessons, model=student, out=verifier))
        except ValueError as reason:
            console.warn(f"no verifier, so no votes weighted by one: {reason}")
            return
    for run in runs:
        score(ScoreRecipe(run=run, model=verifier, kind="verifier"))


@dataclass(frozen=True)
class _Distillation:
    """A student to be made in `folder`; `sources` are the words of its command."""

    name: str
    folder: Path

    @property
    def sources(self) -> list[str]:
        return [str(RECIPES / "demo" / f"{self.name}.yaml"), f"out={self.folder}"]

    @property
    def recipe(self) -> DistillRecipe:
        return load(DistillRecipe, self.sources)

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return self.recipe.steps

    def done(self) -> int:
        """Steps taken so far, this time and before."""
        metrics = work_folder(self.folder) / METRICS
        last = last_record(metrics) if metrics.is_file() else None
        return int(last["step"]) if last else 0

    @contextmanager
    def running(self) -> Iterator[_Child]:
        """Its process, which has ended, and saved what it has, when the `with` block has."""
        log = self.folder.with_name(f"{self.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as sink:
            process = subprocess.Popen(
                _command(self.sources),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        try:
            yield _Child(self.name, process, log)
        finally:
            process.terminate()  # nothing, where it has ended
            process.wait()


def _command(sources: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "retort", "distill", *sources]


@dataclass(frozen=True)
class _Child:
    """A distillation in a process of its own, its messages in a file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raises ValueError with the last words of a process that failed."""
        if self.process.poll():
            words = self.log.read_text(encoding="utf-8", errors="replace").strip()
            raise ValueError(f"distilling {self.name} failed: {words[-2000:]}")


def _distill_all(students: Sequence[_Distillation]) -> None:
    """Waits for all distillations behind one progress bar; ends all when one fails, or when this
    process is to end.
    """
    left = [each for each in students if not finished(each.recipe, work_folder(each.folder))]
    if not left:
        return
    total, before = sum(each.steps for each in left), sum(each.done() for each in left)
    with ExitStack() as stack:
        requests = stack.enter_context(stop_requests())
        advance = stack.enter_context(console.progress("distil", total, "steps", before))
        children = [stack.enter_context(each.running()) for each in left]
        while any(child.process.poll() is None for child in children):
            time.sleep(POLL_SECONDS)
            done = sum(each.done() for each in left)
            advance(done - before, " and ".join(child.name for child in children))
            before = done
            for child in children:
                child.check()
            if requests:
                raise SystemExit(128 + requests[0])
