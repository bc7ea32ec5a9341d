"""`retort distill --plan`: what a recipe costs, from the sizes of its models alone.

Models are built without weights, by the same code as in a run, so a plan finds the same mistakes.
Neither weights, nor data, nor a tokenizer, nor a GPU is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from retort.model.decoder import Decoder
from retort.recipe import (
    Distill,
    DistillRecipe,
    KeepImportant,
    Stage,
    Transplanted,
)
from retort.train.divergence import CHUNK_ELEMENTS, CHUNK_ELEMENTS_CUDA
from retort.train.gpus import gpu
from retort.train.memory import Memory, Setup, generating, memory, sizes
from retort.train.objectives import trainable
from retort.train.on_policy import SLOTS
from retort.train.outline import outline
from retort.train.prepare import check_rows, check_shapes
from retort.train.schedule import not_frozen
from retort.train.work import Work, multiplied_weights, work

_FLOAT32, _BFLOAT16 = 4, 2


@dataclass(frozen=True)
class StagePlan:
    """What one stage costs. `memory` is of one process, at the fullest moment of a step, and
    `generating` its bytes while the student writes text (0 where it never does); `hours` are None,
    and so is `fits`, where the recipe does not run on GPUs.
    """

    name: str
    objective: str
    trainable: int
    tokens: int
    steps: int
    tokens_per_step: int
    micro_batches: int
    flops: Work
    hours: float | None
    memory: Memory
    generating: int
    fits: bool | None


@dataclass(frozen=True)
class Disk:
    """Bytes that a run needs on its disk: a training state at its largest, all that are there at
    once (one more than are kept, while that is written), and the students that are written out.
    """

    state: int
    states: int
    students: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.states + self.students


@dataclass(frozen=True)
class Plan:
    """What a recipe costs on `processes` processes; `gpu` is None for a CPU. `saving` are the bytes
    of host memory that each process needs while a state is written. `notes` say what the numbers do
    not.
    """

    teacher: int | None
    student: int
    gpu: str | None
    processes: int
    utilisation: float
    stages: tuple[StagePlan, ...]
    disk: Disk
    saving: int
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Of all stages."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> float:
        """Of all stages."""
        return sum(stage.flops.total for stage in self.stages)

    @property
    def hours(self) -> float | None:
        """From the beginning to the end."""
        hours = [stage.hours for stage in self.stages if stage.hours is not None]
        return sum(hours) if hours else None


def plan(recipe: DistillRecipe) -> Plan:
    """What a recipe costs. Raises ValueError for one that does not fit its models, for processes
    that cannot share its rows, and for a model of unknown size.
    """
    found = outline(recipe)
    student, teacher = found.student, found.teacher
    check_shapes(recipe, student, teacher)
    processes = 1 if _on_cpu(recipe) else recipe.planning.gpus
    check_rows(recipe, processes)
    setup = _setup(recipe, processes)
    stages = [_stage(recipe, stage, student, teacher, processes, setup) for stage in recipe.stages]
    return Plan(
        teacher=None if teacher is None else teacher.size,
        student=student.size,
        gpu=None if _on_cpu(recipe) else recipe.planning.gpu,
        processes=processes,
        utilisation=recipe.planning.utilisation,
        stages=tuple(stages),
        disk=_disk(recipe, student.size, max(stage.trainable for stage in stages), setup),
        saving=max(stage.memory.saving for stage in stages),
        notes=(*found.notes, *_uncounted(recipe), *_more_than_steps(stages)),
    )


def _on_cpu(recipe: DistillRecipe) -> bool:
    return recipe.device == "cpu"


def _setup(recipe: DistillRecipe, processes: int) -> Setup:
    settings = recipe.parallel
    shard = settings.shard or processes
    if processes % shard:
        raise ValueError(f"parallel.shard: {shard} does not divide the {processes} processes")
    dtype = settings.dtype or ("float32" if _on_cpu(recipe) else "bfloat16")
    alone = _on_cpu(recipe) and dtype == "float32"
    size = _FLOAT32 if dtype == "float32" else _BFLOAT16
    chunk = CHUNK_ELEMENTS if _on_cpu(recipe) else CHUNK_ELEMENTS_CUDA
    return Setup(shard, not alone, size, settings.recompute, chunk)


def _stage(
    recipe: DistillRecipe,
    stage: Stage,
    student: Decoder,
    teacher: Decoder | None,
    processes: int,
    setup: Setup,
) -> StagePlan:
    names = not_frozen(trainable(student, stage.objective), stage.freeze)
    trained = sizes(student, names)
    rows = stage.rows // processes
    micro_rows = min(stage.micro_rows or rows, rows)
    micro_batches = -(-rows // micro_rows)
    needed = memory(stage, micro_rows, micro_batches, student, trained, teacher, setup)
    writes = [
        generating(student, trained, teacher, slots, length, setup)
        for slots, length in _written(recipe, stage)
    ]
    most = max([needed.total, *writes])
    per_token = work(
        stage.objective,
        student.config,
        None if teacher is None else teacher.config,
        stage.length,
        recipe.parallel.recompute,
        multiplied_weights(student, names),
    )
    tokens = stage.steps * stage.rows * stage.length
    flops = per_token.times(tokens)
    return StagePlan(
        name=stage.name,
        objective=stage.objective.kind,
        trainable=trained.total,
        tokens=tokens,
        steps=stage.steps,
        tokens_per_step=stage.rows * stage.length,
        micro_batches=micro_batches,
        flops=flops,
        hours=_hours(recipe, flops.total, processes),
        memory=needed,
        generating=max(writes, default=0),
        fits=None if _on_cpu(recipe) else most <= gpu(recipe.planning.gpu).usable_bytes,
    )


def _written(recipe: DistillRecipe, stage: Stage) -> Iterator[tuple[int, int]]:
    """How many answers the student writes at once, of how many tokens: to be evaluated, and to be
    learnt from.
    """
    if recipe.evaluation is not None:
        yield recipe.evaluation.slots, recipe.evaluation.max_tokens
    if isinstance(stage.objective, Distill) and stage.objective.on_policy is not None:
        yield SLOTS, stage.length


def _hours(recipe: DistillRecipe, flops: float, processes: int) -> float | None:
    if _on_cpu(recipe):
        return None
    reached = 1e12 * gpu(recipe.planning.gpu).tflops * recipe.planning.utilisation
    return flops / (reached * processes) / 3600


def _disk(recipe: DistillRecipe, student: int, trained: int, setup: Setup) -> Disk:
    """States have master weights and both moments; students are written as they are computed."""
    state = _FLOAT32 * (student + 2 * trained)
    students = 2 if recipe.checkpoints.best else 1
    return Disk(state, state * (recipe.checkpoints.keep + 1), students * setup.size * student)


def _more_than_steps(stages: Sequence[StagePlan]) -> list[str]:
    """Whether the fullest moment of a stage is not one of a step."""
    full = [stage for stage in stages if stage.generating > stage.memory.total]
    if not full:
        return []
    most = max(full, key=lambda stage: stage.generating)
    return [
        f"stage {most.name}: while the student writes text, each process has all of its weights "
        f"and needs {most.generating / 2**30:.1f} GiB, more than a step does"
    ]


def _uncounted(recipe: DistillRecipe) -> list[str]:
    """Time that depends on more than sizes."""
    notes = []
    for stage in recipe.stages:
        objective = stage.objective
        if isinstance(objective, Distill) and objective.on_policy is not None:
            notes.append(f"stage {stage.name}: the time to sample its answers is not counted")
    student = recipe.student
    if isinstance(student, Transplanted) and isinstance(student.keep_attention, KeepImportant):
        notes.append("keep_attention: the time to measure each layer is not counted")
    if recipe.evaluation is not None:
        notes.append("evaluation: the time to sample its answers is not counted")
    return notes
