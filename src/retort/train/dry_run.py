"""`retort distill --dry-run`: two real steps of every stage, with random data, nothing written.

A model whose folder is not here has its planned size and random weights; neither data nor a
tokenizer is needed. What a step takes is measured, and its memory set beside the plan's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from retort import console
from retort.data.packing import Batch
from retort.model import weights
from retort.model.config import DecoderConfig
from retort.model.decoder import Decoder
from retort.model.transplant import transplant
from retort.recipe import Continued, DistillRecipe, Fresh, Transplanted
from retort.train.outline import outline
from retort.train.parallel import note_trained, spread_student, spread_teacher, tie, whole
from retort.train.plan import StagePlan, plan
from retort.train.state import Progress, State
from retort.train.step import Stepper
from retort.train.work import token_flops
from retort.train.world import World, compute_dtype, open_world

STEPS = 2
"""The first one also makes the optimiser's state and whatever kernels are compiled."""


@dataclass(frozen=True)
class Trial:
    """One stage's last step: seconds, tokens a second over all processes, the share of the GPUs'
    arithmetic that the model's FLOPs are (None on a CPU), and the GiB of one process, measured
    (None on a CPU) and planned.
    """

    stage: str
    loss: float
    seconds: float
    tokens_per_second: float
    utilisation: float | None
    memory_gib: float | None
    planned_gib: float


def dry_run(recipe: DistillRecipe) -> tuple[Trial, ...]:
    """Tries every stage of a recipe on the processes that there are.

    Raises ValueError as `plan` does, and for a device that is not there.
    """
    with open_world(recipe.device, recipe.parallel) as world:
        here = recipe.model_copy(
            update={"planning": recipe.planning.model_copy(update={"gpus": world.size})}
        )
        planned = plan(here)
        student, teacher = _models(here, world)
        spread = teacher and spread_teacher(teacher, world, recipe.parallel)
        trained = spread_student(student, world, recipe.parallel)
        state = State(trained.student, Progress())
        trials = []
        for index, stage in enumerate(recipe.stages):
            state.begin(stage)
            note_trained(trained)
            flops = token_flops(stage, trained.student, spread, state.named)
            stepper = Stepper(trained, spread, state, stage, recipe.guard, world, flops)
            trials.append(_trial(stepper, planned.stages[index]))
            if planned.stages[index].generating:
                # Does it fit? Else the first evaluation would be the first to tell.
                whole(trained.student, world, compute_dtype(world.device, recipe.parallel))
            state.end()
        return tuple(trials)


def _models(recipe: DistillRecipe, world: World) -> tuple[Decoder, Decoder | None]:
    """The student and the teacher, with weights on the main process."""
    found = outline(recipe)
    if not world.main:
        return found.student, found.teacher
    torch.manual_seed(recipe.seed)
    teacher = found.teacher
    if teacher is not None:
        assert recipe.teacher is not None
        teacher = _with_weights(teacher, recipe.teacher)
    match recipe.student:
        case Transplanted() as spec:
            assert teacher is not None
            return _transplanted(spec, found.student.config, teacher), teacher
        case Continued() as spec:
            return _with_weights(found.student, spec.folder), teacher
        case Fresh():
            return _filled(found.student), teacher


def _transplanted(spec: Transplanted, config: DecoderConfig, teacher: Decoder) -> Decoder:
    source = teacher
    if spec.source is not None and spec.source.is_dir():
        source = weights.load(spec.source, torch.float32)
    settings = spec.settings.model_dump()
    return transplant(source, config.layer_types, spec.mixer, start=spec.initial, **settings)


def _with_weights(decoder: Decoder, folder: Path) -> Decoder:
    """The folder's weights, or random ones where it has none."""
    if next(folder.glob("*.safetensors"), None) is None:
        return _filled(decoder)
    return weights.load(folder, torch.float32)


def _filled(decoder: Decoder) -> Decoder:
    """The decoder with random weights."""
    filled = decoder.to_empty(device="cpu")
    tie(filled)
    for parameter in filled.parameters():
        torch.nn.init.ones_(parameter)  # norms, that is: the next line draws all that is larger
    filled.reset_parameters()
    return filled


def _trial(stepper: Stepper, planned: StagePlan) -> Trial:
    world, stage = stepper.world, stepper.stage
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    with console.progress(stage.name, STEPS, "steps", show=world.main) as advance:
        for step in range(STEPS):
            record = stepper.take(_batch(stepper, step))
            advance()
    seconds = stage.rows * stage.length / record["tokens_per_second"]
    return Trial(
        stage=stage.name,
        loss=record["loss"],
        seconds=seconds,
        tokens_per_second=record["tokens_per_second"],
        utilisation=record.get("mfu"),
        memory_gib=record.get("memory_gib"),
        planned_gib=planned.memory.total / 2**30,
    )


def _batch(stepper: Stepper, step: int) -> Batch:
    """Random tokens, all of one document a row, all learnt: as a plan assumes."""
    world, stage = stepper.world, stepper.stage
    shape = len(world.share(stage.rows)), stage.length
    generator = torch.Generator().manual_seed(step * world.size + world.rank)
    vocabulary = stepper.trained.student.config.vocab_size
    ids_BT = torch.randint(vocabulary, shape, generator=generator)
    learn_BT = torch.ones(shape, dtype=torch.bool)
    learn_BT[:, -1] = False  # nothing follows it
    return Batch(ids_BT, torch.zeros(shape, dtype=torch.long), learn_BT)


def table(trials: Sequence[Trial]) -> Table:
    """The trials for a terminal."""
    shown = Table(box=SIMPLE_HEAD)
    for heading in ("stage", "s/step", "tokens/s", "MFU", "memory", "planned"):
        shown.add_column(heading, justify="left" if heading == "stage" else "right")
    for trial in trials:
        used, measured = trial.utilisation, trial.memory_gib
        shown.add_row(
            console.printable(trial.stage),
            console.format_seconds(trial.seconds),
            console.format_count(trial.tokens_per_second),
            "-" if used is None else f"{used:.0%}",
            "-" if measured is None else _size(measured),
            _size(trial.planned_gib),
        )
    return shown


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 1 else f"{1024 * gib:.0f} MiB"
