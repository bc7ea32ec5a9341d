"""The one training loop: every stage of every recipe goes through here.

A run leaves the finished student in `out` and works beside it in `out`.training: the recipe it was
started with, checkpoints, and `metrics.jsonl`. The same command continues a run that was stopped.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from retort import console
from retort.data.text import Batch, Packer, open_source
from retort.model import weights
from retort.model.decoder import Decoder
from retort.recipe import DistillRecipe, Stage
from retort.train import checkpoint, importance
from retort.train.objectives import evaluate, trainable
from retort.train.prepare import Job, finished, identity, prepare, work_folder
from retort.train.schedule import adamw, learning_rate, not_frozen


@dataclass
class Progress:
    """The counters of a run; with the tensors, all there is to resume from."""

    stage: int = 0
    step: int = 0
    tokens: int = 0
    bad_steps: int = 0
    seconds: float = 0.0
    cursor: int = 0
    queue: list[list[int]] = field(default_factory=list)
    skipped: int = 0


def distill(recipe: DistillRecipe) -> Path:
    """Trains a student through all stages of a recipe and returns its folder.

    Continues where a run with the same recipe stopped, and does nothing when it has finished.
    Raises ValueError for folders, data or a recipe that do not fit, before anything is written,
    and when too many steps in a row are not finite.
    """
    work = work_folder(recipe.out)
    if finished(recipe, work):
        console.say(f"{recipe.out}: already finished; force=true starts over")
        return recipe.out
    job = prepare(recipe)
    if recipe.force:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    (work / "recipe.json").write_text(identity(recipe), encoding="utf-8")
    if job.costs:
        importance.remember(work, identity(recipe), job.costs)
    progress, optimizer_state = _resume(job)
    log = console.MetricsLog(work / "metrics.jsonl")
    log.truncate_after(_global_step(recipe, progress))
    with _stop_requests() as stop:
        for index in range(progress.stage, len(recipe.stages)):
            _run_stage(job, index, progress, optimizer_state, log, stop)
            optimizer_state = {}
    weights.save(job.student, recipe.out, job.tokenizer)
    (work / "finished").touch()
    return recipe.out


# ---------------------------------------------------------------- one stage


def _run_stage(
    job: Job,
    index: int,
    progress: Progress,
    optimizer_state: dict[str, Tensor],
    log: console.MetricsLog,
    stop: list[int],
) -> None:
    recipe, stage = job.recipe, job.recipe.stages[index]
    named = _trained(job.student, stage)
    optimizer = adamw(named, stage.optim)
    _restore_optimizer(optimizer, named, optimizer_state)
    source = open_source(stage.data, job.tokenizer, recipe.seed + index)
    queue = [(document, start) for document, start in progress.queue]
    packer = Packer(source, stage.length, progress.cursor, queue, progress.skipped)
    with console.progress(stage.name, stage.steps, "steps", progress.step) as advance:
        while progress.step < stage.steps:
            record = _step(job, stage, packer, optimizer, named, progress)
            log.write({"step": _global_step(recipe, progress), "stage": stage.name, **record})
            advance(1, f"loss {record['loss']:.4g}, {record['tokens_per_second']:.0f} tokens/s")
            last = progress.step == stage.steps
            if stop or (not last and progress.step % recipe.checkpoints.every == 0):
                _save(job, progress, packer, optimizer, named)
            if stop:
                raise SystemExit(128 + stop[0])
    progress.stage, progress.step = index + 1, 0
    progress.cursor, progress.queue, progress.skipped = 0, [], 0
    _save(job, progress, None, None, {})


def _step(
    job: Job,
    stage: Stage,
    packer: Packer,
    optimizer: torch.optim.Optimizer,
    named: dict[str, nn.Parameter],
    progress: Progress,
) -> dict[str, Any]:
    """One optimiser step; returns what the metrics record of it."""
    began = time.perf_counter()
    rate = learning_rate(stage.optim, progress.step, stage.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    batch = packer.batch(stage.rows).to(job.student.device)
    means, gradient_norm = _gradients(job, stage, batch, named)
    good = math.isfinite(means["loss"]) and math.isfinite(gradient_norm)
    if good:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    progress.bad_steps = 0 if good else progress.bad_steps + 1
    if progress.bad_steps > job.recipe.guard.bad_steps:
        raise ValueError(
            f"stage {stage.name}: {progress.bad_steps} steps in a row gave a loss or gradient that "
            "is not finite; lower optim.lr, or continue from an earlier checkpoint"
        )
    seconds = time.perf_counter() - began
    tokens = batch.ids_BT.numel()
    progress.step += 1
    progress.tokens += tokens
    progress.seconds += seconds
    return means | {
        "tokens": progress.tokens,
        "lr": rate,
        "gradient_norm": gradient_norm,
        "bad_steps": progress.bad_steps,
        "skipped_documents": packer.skipped,
        "tokens_per_second": tokens / seconds,
        "seconds": progress.seconds,
    }


def _gradients(
    job: Job, stage: Stage, batch: Batch, named: dict[str, nn.Parameter]
) -> tuple[dict[str, float], float]:
    """Gradients of the mean loss over all micro-batches, clipped; the means, and the norm."""
    count = 0
    sums: dict[str, float] = {}
    for micro in batch.split(stage.micro_rows or stage.rows):
        loss = evaluate(job.student, job.teacher, micro, stage.objective)
        loss.sum.backward()
        count += loss.count
        for name, value in {"loss": loss.sum, **loss.parts}.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
    gradients = [p.grad for p in named.values() if p.grad is not None]
    for gradient in gradients:
        gradient.div_(max(count, 1))
    norm = nn.utils.clip_grad_norm_(named.values(), stage.optim.clip)
    return {name: value / max(count, 1) for name, value in sums.items()}, float(norm)


def _trained(student: Decoder, stage: Stage) -> dict[str, nn.Parameter]:
    """The parameters a stage trains, by name; all others are switched off."""
    names = not_frozen(trainable(student, stage.objective), stage.freeze)
    named = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            named[name] = parameter
    return named


# ---------------------------------------------------------------- stopping and resuming


def _global_step(recipe: DistillRecipe, progress: Progress) -> int:
    return sum(stage.steps for stage in recipe.stages[: progress.stage]) + progress.step


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


def _save(
    job: Job,
    progress: Progress,
    packer: Packer | None,
    optimizer: torch.optim.Optimizer | None,
    named: dict[str, nn.Parameter],
) -> None:
    tensors = {f"model.{k}": v for k, v in job.student.state_dict().items() if not _tied(job, k)}
    if packer is not None and optimizer is not None:
        progress.cursor, progress.skipped = packer.cursor, packer.skipped
        progress.queue = [list(piece) for piece in packer.queue]
        for name, parameter in named.items():
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
    root, keep = job.work / "checkpoints", job.recipe.checkpoints.keep
    step = _global_step(job.recipe, progress)
    checkpoint.save(root, step, tensors, vars(progress), keep)


def _tied(job: Job, name: str) -> bool:
    return name == "lm_head.weight" and job.student.config.tie_embeddings


def _resume(job: Job) -> tuple[Progress, dict[str, Tensor]]:
    """Loads the newest checkpoint into the student; the counters, and the optimiser's tensors."""
    tensors, values, damaged = checkpoint.latest(job.work / "checkpoints")
    for path in damaged:
        console.warn(f"{path}: damaged, continuing from the state before it")
    if values is None:
        return Progress(), {}
    model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    if job.student.config.tie_embeddings:
        model["lm_head.weight"] = model["model.embed_tokens.weight"]
    job.student.load_state_dict(model, strict=True)
    progress = Progress(**values)
    console.say(f"continuing at step {_global_step(job.recipe, progress)}")
    prefix = "optimizer."
    return progress, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    for name, parameter in named.items():
        prefix = f"{name}."
        state = {
            key.removeprefix(prefix): tensor.to(parameter.device)
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        if state:
            optimizer.state[parameter] = state
