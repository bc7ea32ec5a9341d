"""The one training loop: every stage of every recipe goes through here.

A run leaves the finished student in `out` and works beside it in `out`.training: the recipe it was
started with, the student's configuration and tokenizer, checkpoints, and `metrics.jsonl`. The same
command continues a run that was stopped, on any number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from retort import console
from retort.data.ahead import Ahead, as_it_is
from retort.data.mixture import open_data
from retort.data.packing import Batch, Rows
from retort.model.decoder import Decoder
from retort.recipe import Distill, DistillRecipe, Fresh, Stage
from retort.store import locked
from retort.tables import write_aside
from retort.train import checkpoint, export, importance
from retort.train.checkpoint import Checkpoints
from retort.train.evaluation import Answers, comparable, evaluate_by_generation
from retort.train.folder import (
    RECIPE,
    check_shared,
    clear,
    finished,
    identity,
    keep_tokenizer,
    work_folder,
)
from retort.train.objectives import teach
from retort.train.on_policy import Answered, is_on_policy, on_policy_batch
from retort.train.parallel import Trained, note_trained, spread_student, spread_teacher, whole
from retort.train.prepare import Job, prepare_all
from retort.train.records import Records, open_records
from retort.train.state import Progress, State
from retort.train.step import Stepper
from retort.train.stopping import stop_requests
from retort.train.work import token_flops
from retort.train.world import World, compute_dtype, open_world

BEST = "best"
"""The folder, among a run's files, of the student that has answered best so far."""


def distill(recipe: DistillRecipe) -> Path:
    """Trains a student through all stages of a recipe and returns its folder.

    Continues where a run with the same recipe stopped, and does nothing when it has finished.
    Raises ValueError for folders, data or a recipe that do not fit, before anything is written,
    and when too many steps in a row go wrong.
    """
    with open_world(recipe.device, recipe.parallel) as world:
        work = work_folder(recipe.out)
        if world.from_main(world.agree(lambda: world.main and finished(recipe, work))):
            if world.main:
                console.say(f"{recipe.out}: already finished; force=true starts over")
            return recipe.out
        job = prepare_all(recipe, world)
        with ExitStack() as stack:
            world.agree(lambda: _open_work(job, world, stack) if world.main else None)
            world.agree(lambda: check_shared(work))
            _train(job, world)
            if world.main:
                (work / "finished").touch()
            world.wait()
    return recipe.out


def _open_work(job: Job, world: World, stack: ExitStack) -> None:
    """Makes the run's folder, or finds it as an earlier run of the recipe has left it; no other
    process may write there until the stack is closed.
    """
    recipe, work = job.recipe, job.work
    work.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(work))
    if recipe.force:
        clear(work)
    if not (work / RECIPE).is_file():
        write_aside(work / RECIPE, identity(recipe).encode())
    if isinstance(recipe.student, Fresh):
        keep_tokenizer(work, job.tokenizer)
    export.prepare(job.student, work, job.tokenizer, world, recipe.parallel)
    if job.costs:
        importance.remember(work, identity(recipe), job.costs)


def _train(job: Job, world: World) -> None:
    """Takes the stages that are left, and leaves the student."""
    recipe = job.recipe
    teacher = job.teacher and spread_teacher(job.teacher, world, recipe.parallel)
    trained = spread_student(job.student, world, recipe.parallel)
    state = _resumed(job, trained.student, world)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        log = world.agree(
            lambda: stack.enter_context(_open_records(job, state)) if world.main else None
        )
        kept = Checkpoints(job.work / checkpoint.FOLDER, recipe.checkpoints.keep, world)
        began = time.perf_counter() - state.progress.seconds
        run = _Run(job, world, trained, teacher, state, kept, log, stop, began)
        while state.progress.stage < len(recipe.stages):
            run.stage()
    export.save(trained.student, recipe.out, job.tokenizer, world, recipe.parallel)


def _open_records(job: Job, state: State) -> AbstractContextManager[Records]:
    return open_records(job.recipe, job.work, state.progress.total(job.recipe))


def _resumed(job: Job, student: Decoder, world: World) -> State:
    """The state of the newest checkpoint, or that of a run which begins."""
    found = world.from_main(world.agree(lambda: _newest(job.work) if world.main else None))
    if found is None:
        return State(student, Progress())
    path, values = found
    state = State(student, Progress(**values))
    if state.progress.data is not None:  # in the middle of a stage
        state.begin(job.recipe.stages[state.progress.stage])
    checkpoint.read(path, state.tensors(), world)
    state.restored()
    if world.main:
        console.say(f"continuing at step {state.progress.total(job.recipe)}")
    return state


def _newest(work: Path) -> tuple[Path, Any] | None:
    """The newest whole state and its values. Raises ValueError where there are only damaged ones:
    that a run begins again, and deletes them, is not for a disk's bad moment to decide.
    """
    root = work / checkpoint.FOLDER
    found = checkpoint.newest(root)
    if found is None and checkpoint.states(root):
        raise ValueError(
            f"{root}: no state is whole; bring one back, or add force=true to start over "
            "(docs/training.md#stopping-and-going-on)"
        )
    return found


# ---------------------------------------------------------------- stages


@dataclass(frozen=True)
class _Run:
    """What all stages of a run share; `began` is when it would have, had nothing stopped it."""

    job: Job
    world: World
    trained: Trained
    teacher: Decoder | None
    state: State
    checkpoints: Checkpoints
    log: Records | None
    stop: list[int]
    began: float

    def stage(self) -> None:
        """Takes the steps of the stage that the run is in, from the one that it has come to."""
        recipe, progress = self.job.recipe, self.state.progress
        stage = recipe.stages[progress.stage]
        if self.state.optimizer is None:
            self.state.begin(stage)
        note_trained(self.trained)
        flops = token_flops(stage, self.trained.student, self.teacher, self.state.named)
        stepper = Stepper(
            self.trained, self.teacher, self.state, stage, recipe.guard, self.world, flops
        )
        show = self.world.main
        bar = console.progress(stage.name, stage.steps, "steps", progress.step, show)
        data = self.world.agree(lambda: self._rows(stage))
        with bar as advance, Ahead(data, self._ahead(stage)) as rows:
            self._evaluate(stage)  # which a signal may have cut short
            while progress.step < stage.steps:
                asked = time.perf_counter()
                drawn = self._drawn(stage, rows)
                record = stepper.take(drawn.batch, time.perf_counter() - asked)
                self._record(stage, record, drawn, rows)
                advance(1, f"loss {record['loss']:.4g}, {record['tokens_per_second']:.0f} tokens/s")
                self._evaluate(stage)
                self._keep(stage, rows)
        self.state.end()
        self._save()
        self.checkpoints.finish()

    def _rows(self, stage: Stage) -> Rows:
        job, progress = self.job, self.state.progress
        data = open_data(stage.data, job.tokenizer, job.recipe.seed + progress.stage, job.against)
        return Rows(data, stage.rows, stage.length, self.world.share(stage.rows), progress.data)

    def _ahead(self, stage: Stage) -> Callable[[Batch], Batch]:
        """What the thread that makes rows does with a batch. On a CPU it cuts off padding, and has
        the teacher read, for which another core may be free. GPUs are busy and want equal shapes,
        as compiled code does; processes must keep in step, a student's own answers need room and
        come later, and rows that are split may not fit into memory together.
        """
        alone = self.world.device.type == "cpu" and self.world.mesh is None
        objective, teacher = stage.objective, self.teacher
        own_answers = isinstance(objective, Distill) and objective.on_policy is not None
        if not alone or own_answers:
            return as_it_is
        cut = as_it_is if self.job.recipe.parallel.compile else Batch.trimmed
        if teacher is None or stage.micro_rows is not None:
            return cut
        return lambda batch: teach(teacher, cut(batch), objective)

    def _drawn(self, stage: Stage, rows: Ahead) -> Answered:
        """This process's rows of the next step, with the student's own answers where asked for."""
        batch, objective = self.world.agree(rows.batch), stage.objective
        settings = objective.on_policy if isinstance(objective, Distill) else None
        if settings is None or not is_on_policy(settings, self.state.progress.step):
            return Answered(batch)
        step = self.state.progress.total(self.job.recipe)
        return on_policy_batch(self._whole(), batch, settings, self.job.recipe.seed, step)

    def _whole(self) -> Decoder:
        dtype = compute_dtype(self.world.device, self.job.recipe.parallel)
        return whole(self.trained.student, self.world, dtype)

    def _record(self, stage: Stage, record: dict[str, Any], drawn: Answered, rows: Ahead) -> None:
        """Logs a step, with the tokens of each source so far and what was of no use, by reason."""
        self.state.progress.seconds = time.perf_counter() - self.began
        more = {"seconds": self.state.progress.seconds}
        if drawn.left_out is not None:
            more |= {"left_out": int(self.world.sum([drawn.left_out])[0])}
        data = {"data": self.world.counted(rows.tokens), "unused": self.world.counted(rows.skipped)}
        found = self.world.gather(rows.dropped()) if self.job.against else []
        if self.log is not None:
            head = {"step": self.state.progress.total(self.job.recipe), "stage": stage.name}
            self.log.write(head | record | more | data)
            for dropped in (each for process in found for each in process):
                self.log.dropped.write(head | dropped._asdict())

    # ------------------------------------------------------------ evaluation

    def _evaluate(self, stage: Stage) -> None:
        """Has the student answer where that is due and not done; what is interrupted is not."""
        settings, progress = self.job.recipe.evaluation, self.state.progress
        total = progress.total(self.job.recipe)
        if settings is None or total == progress.evaluated:
            return
        if total % settings.every and total < self.job.recipe.steps:
            return
        answers = self._answers()
        if not answers.complete:
            return
        progress.evaluated = total
        if self.log is not None:
            record = {"step": total, "stage": stage.name, "tokens": progress.tokens}
            self.log.write(record | {"evaluation": answers.record()})
        if self.job.recipe.checkpoints.best:
            self._keep_if_best(answers.accuracy, comparable(settings))

    def _keep_if_best(self, accuracy: float, scored: str) -> None:
        """Writes the student out if none that was did better at the same."""
        progress = self.state.progress
        if progress.best is None or progress.scored != scored or accuracy > progress.best:
            progress.best, progress.scored = accuracy, scored
            self._export(self.job.work / BEST)

    def _answers(self) -> Answers:
        questions, world = self.job.questions, self.world
        assert questions is not None
        share = questions.share(world.rank, world.size)
        found = evaluate_by_generation(
            self._whole(), self.job.tokenizer, questions, share, lambda: bool(self.stop)
        )
        return Answers(*world.sum(astuple(found)))

    def _export(self, folder: Path) -> None:
        job = self.job
        export.save(self.trained.student, folder, job.tokenizer, self.world, job.recipe.parallel)

    # ------------------------------------------------------------ states

    def _keep(self, stage: Stage, rows: Ahead) -> None:
        """Saves the state where it is due, and ends the run where that was asked for."""
        progress = self.state.progress
        asked = int(self.world.largest(max(self.stop, default=0)))
        due = progress.step % self.job.recipe.checkpoints.every == 0 and progress.step < stage.steps
        self.checkpoints.poll()
        if asked or due:
            states = [state["rows"] for state in self.world.gather(rows.state())]
            progress.data = {"rows": {key: each for state in states for key, each in state.items()}}
            self._save()
        if asked:
            self.checkpoints.finish()
            raise SystemExit(128 + asked)

    def _save(self) -> None:
        step = self.state.progress.total(self.job.recipe)
        self.checkpoints.save(step, self.state.tensors(), self.state.values())
