"""`retort demo`: the whole way, from the bundled teacher to a report, on a laptop's CPU.

Two students are distilled side by side, each in a process of its own with one thread: small
matrices gain little from more, and threads that wait for a busy core lose a great deal. The hybrid
is ready long before the other, and in its core's free time a verifier on its backbone learns from
its answers to other problems. Then all three models answer the same problems, one after the other,
so that their speeds compare, and the verifier scores all that they have answered.

Every step continues where an earlier run of the same command stopped. SIGINT and SIGTERM end the
distillations too, which save first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
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
BACKBONE = "hybrid"
"""The verifier's: the student that is ready first."""
POLL_SECONDS = 0.5
THREADS = 2
"""For decoding, at most: two make 1.1 to 1.3 times the tokens of one with models this small."""


def demo(out: Path) -> Curves:
    """Distils, samples, grades and reports into `out`; returns what the report shows.

    Raises ValueError when a step cannot be done, with the reason that step gave.
    """
    torch.set_num_threads(min(torch.get_num_threads(), THREADS))
    students = {name: out / "models" / name for name in STUDENTS}
    _distill_all([_Distillation(name, folder) for name, folder in students.items()], out)
    verifier = _verifier(out)
    runs = [_sample("sample", "teacher", "bundled", out)]
    runs += [_sample("sample", name, str(folder), out) for name, folder in students.items()]
    if verifier is not None:
        for run in runs:
            score(ScoreRecipe(run=run, model=verifier, kind="verifier"))
    trained = [work for folder in students.values() if is_training(work := work_folder(folder))]
    if trained:
        report_training(trained, out)
    return report(runs, out, training=bool(trained))


def _sample(recipe: str, name: str, model: str, out: Path) -> Path:
    """A graded run of a model on the problems of a recipe."""
    run = sample(load(SampleRecipe, _sources(recipe, name, model, out)))
    grade(run)
    return run


def _sources(recipe: str, name: str, model: str, out: Path) -> list[str]:
    settings = [f"name={name}", f"model={model}", f"out={out / 'samples' / name}"]
    return [str(RECIPES / "demo" / f"{recipe}.yaml"), *settings]


def _verifier(out: Path) -> Path | None:
    """A verifier's folder; none where the lessons do not let it learn."""
    student, verifier = out / "models" / BACKBONE, _verifier_folder(out)
    if not is_verifier(verifier):
        lessons = _sample("lessons", "lessons", str(student), out)
        try:
            train_verifier(VerifierRecipe(run=lessons, model=student, out=verifier))
        except ValueError as reason:
            console.warn(f"no verifier, so no votes weighted by one: {reason}")
            return None
    return verifier


def _verifier_folder(out: Path) -> Path:
    return out / "models" / "verifier"


def _verifier_ahead(out: Path) -> _Child:
    """What `_verifier` does, in the background; it does whatever this one leaves to be done."""
    student, lessons = out / "models" / BACKBONE, out / "samples" / "lessons"
    verifier = [f"run={lessons}", f"model={student}", f"out={_verifier_folder(out)}"]
    commands = [
        _command("sample", *_sources("lessons", "lessons", str(student), out)),
        _command("grade", "--workers", "1", str(lessons)),
        _command("verifier", *verifier),
    ]
    return _Child("verifier", out / "models" / "verifier.log", commands)


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

    def child(self) -> _Child:
        """Its process, not begun."""
        log = self.folder.with_name(f"{self.name}.log")
        return _Child(self.name, log, [_command("distill", *self.sources)])


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "retort", *words]


class _Child:
    """Commands in processes of their own, one after another, each with one thread, their messages
    in a file. They run while it is entered as a context.
    """

    def __init__(self, name: str, log: Path, commands: Sequence[list[str]]) -> None:
        self.name = name
        self._log = log
        self._commands = list(commands)

    def __enter__(self) -> _Child:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.write_bytes(b"")
        self._next()
        return self

    def _next(self) -> None:
        with self._log.open("ab") as sink:
            self._process = subprocess.Popen(
                self._commands.pop(0),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def running(self) -> bool:
        """Begins the next command where one has ended well; False when the last has ended, or one
        badly.
        """
        if self._process.poll() == 0 and self._commands:
            self._next()
        return self._process.poll() is None

    def check(self) -> None:
        """Raises ValueError with the last words of a command that failed."""
        if self._process.poll():
            words = self._log.read_text(encoding="utf-8", errors="replace").strip()
            raise ValueError(f"distilling {self.name} failed: {words[-2000:]}")

    def __exit__(self, *reason: object) -> None:
        """Returns when the process has ended, which saves what it has before it does."""
        self._process.terminate()  # nothing, where it has ended
        self._process.wait()


def _distill_all(students: Sequence[_Distillation], out: Path) -> None:
    """Waits for all distillations behind one progress bar, and begins on the verifier when its
    backbone is there and a core free. Ends all when a distillation fails, or when this process is
    to end.
    """
    left = [each for each in students if not finished(each.recipe, work_folder(each.folder))]
    if not left:
        return
    total, before = sum(each.steps for each in left), sum(each.done() for each in left)
    with ExitStack() as stack:
        requests = stack.enter_context(stop_requests())
        advance = stack.enter_context(console.progress("distil", total, "steps", before))
        children = [stack.enter_context(each.child()) for each in left]
        ahead = None
        while busy := [child.name for child in children if child.running()]:
            time.sleep(POLL_SECONDS)
            if requests:
                raise SystemExit(128 + requests[0])
            for child in children:
                child.check()
            if ahead is None and BACKBONE not in busy and not is_verifier(_verifier_folder(out)):
                ahead = stack.enter_context(_verifier_ahead(out))
            if ahead is not None and ahead.running():
                busy.append(ahead.name)
            done = sum(each.done() for each in left)
            advance(done - before, " and ".join(busy))
            before = done
