"""The one training loop: every stage of every recipe goes through here.

A run leaves the finished student in `out` and works beside it in `out`.training: the recipe it was
started with, the student's configuration and tokenizer, checkpoints, and `metrics.jsonl`. The same
command continues a run that was stopped, on any number of processes.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from retort import console
from retort.data.mixture import open_data
from retort.data.packing import Rows
from retort.model.decoder import Decoder
from retort.recipe import DistillRecipe, Stage
from retort.train import checkpoint, export, importance
from retort.train.checkpoint import Checkpoints
from retort.train.parallel import (
    Trained,
    World,
    note_trained,
    open_world,
    spread_student,
    spread_teacher,
)
from retort.train.prepare import Job, finished, identity, prepare_all, work_folder
from retort.train.state import Progress, State
from retort.train.step import Stepper


def distill(recipe: DistillRecipe) -> Path:
    """Trains a student through all stages of a recipe and returns its folder.

    Continues where a run with the same recipe stopped, and does nothing when it has finished.
    Raises ValueError for folders, data or a recipe that do not fit, before anything is written,
    and when too many steps in a row go wrong.
    """
    with open_world(recipe.device, recipe.parallel) as world:
        work = work_folder(recipe.out)
        if world.from_main(finished(recipe, work)):
            if world.main:
                console.say(f"{recipe.out}: already finished; force=true starts over")
            return recipe.out
        job = prepare_all(recipe, world)
        if world.main:
            _open_work(job, world)
        world.wait()
        run = _Run.start(job, world)
        with _stop_requests() as stop:
            while run.state.progress.stage < len(recipe.stages):
                run.stage(stop)
        export.save(run.trained.student, recipe.out, job.tokenizer, world, recipe.parallel)
        if world.main:
            (work / "finished").touch()
        world.wait()
    return recipe.out


def _open_work(job: Job, world: World) -> None:
    """Makes the run's folder, or finds it as an earlier run of the recipe has left it."""
    recipe, work = job.recipe, job.work
    if recipe.force:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    (work / "recipe.json").write_text(identity(recipe), encoding="utf-8")
    export.prepare(job.student, work, job.tokenizer, world, recipe.parallel)
    if job.costs:
        importance.remember(work, identity(recipe), job.costs)


@dataclass(frozen=True)
class _Run:
    """What all stages of a run share."""

    recipe: DistillRecipe
    job: Job
    world: World
    trained: Trained
    teacher: Decoder | None
    state: State
    checkpoints: Checkpoints
    log: console.MetricsLog | None

    @classmethod
    def start(cls, job: Job, world: World) -> _Run:
        """Spreads the models over the processes and reads the newest state, if there is one."""
        recipe = job.recipe
        teacher = job.teacher and spread_teacher(job.teacher, world, recipe.parallel)
        trained = spread_student(job.student, world, recipe.parallel)
        state = _resumed(job, trained.student, world)
        log = console.MetricsLog(job.work / "metrics.jsonl") if world.main else None
        if log is not None:
            log.truncate_after(state.progress.total(recipe))
        kept = Checkpoints(job.work / checkpoint.FOLDER, recipe.checkpoints.keep, world)
        return cls(recipe, job, world, trained, teacher, state, kept, log)

    def stage(self, stop: list[int]) -> None:
        """Takes the steps of the stage that the run is in, from the one that it has come to."""
        progress, stage = self.state.progress, self.recipe.stages[self.state.progress.stage]
        if self.state.optimizer is None:
            self.state.begin(stage)
        note_trained(self.trained)
        data = open_data(stage.data, self.job.tokenizer, self.recipe.seed + progress.stage)
        rows = Rows(data, stage.rows, stage.length, self.world.share(stage.rows), progress.data)
        stepper = Stepper(
            self.trained, self.teacher, self.state, stage, self.recipe.guard, self.world
        )
        bar = console.progress(stage.name, stage.steps, "steps", progress.step, self.world.main)
        with bar as advance:
            while progress.step < stage.steps:
                record = stepper.take(rows.batch())
                self._record(stage, record, rows)
                advance(1, f"loss {record['loss']:.4g}, {record['tokens_per_second']:.0f} tokens/s")
                self._keep(stage, rows, stop)
        self.state.end()
        self._save()
        self.checkpoints.finish()

    def _record(self, stage: Stage, record: dict[str, Any], rows: Rows) -> None:
        """Logs a step, with the tokens of each source so far and what was of no use, by reason."""
        data = {"data": self.world.counted(rows.tokens), "unused": self.world.counted(rows.skipped)}
        if self.log is not None:
            step = self.state.progress.total(self.recipe)
            self.log.write({"step": step, "stage": stage.name, **record, **data})

    def _keep(self, stage: Stage, rows: Rows, stop: list[int]) -> None:
        """Saves the state where it is due, and ends the run where that was asked for."""
        progress = self.state.progress
        asked = int(self.world.largest(max(stop, default=0)))
        due = progress.step % self.recipe.checkpoints.every == 0 and progress.step < stage.steps
        self.checkpoints.poll()
        if asked or due:
            states = [state["rows"] for state in self.world.gather(rows.state())]
            progress.data = {"rows": {key: each for state in states for key, each in state.items()}}
            self._save()
        if asked:
            self.checkpoints.finish()
            raise SystemExit(128 + asked)

    def _save(self) -> None:
        step = self.state.progress.total(self.recipe)
        self.checkpoints.save(step, self.state.tensors(), self.state.values())


def _resumed(job: Job, student: Decoder, world: World) -> State:
    """The state of the newest checkpoint, or that of a run which begins."""
    found = checkpoint.newest(job.work / checkpoint.FOLDER) if world.main else None
    found = world.from_main(found)
    if found is None:
        return State(student, Progress())
    path, values = found
    state = State(student, Progress(**values))
    if state.progress.data is not None:
        state.begin(job.recipe.stages[state.progress.stage])
    tensors: dict[str, Tensor] = state.tensors()
    checkpoint.read(path, tensors, world)
    state.restored()
    if world.main:
        console.say(f"continuing at step {state.progress.total(job.recipe)}")
    return state


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that a step is finished and saved before the run ends."""
    requests: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
