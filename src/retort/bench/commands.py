"""`retort bench decode | prefill | train | targets`: from the words of a command to its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from retort import console
from retort.bench import decode, huggingface, peers, prefill, targets, training, views
from retort.bench.contenders import Contender, Prompts
from retort.bench.head import Head, head
from retort.bench.machine import threads
from retort.bench.models import Model, open_models
from retort.bench.running import finish
from retort.bench.spans import Protocol
from retort.model.devices import open_device
from retort.sample.cache import CacheSettings

STEPS = 128
"""Steps that are measured on a CPU where nothing is said."""
TARGET_MODELS = ("small", "small-pure")


@dataclass(frozen=True)
class Where:
    """The device, threads of the CPU (None for all cores), the folder that results are written into
    and whether pictures are.
    """

    device: str = "cpu"
    threads: int | None = None
    out: Path | None = None
    pictures: bool = False


@dataclass(frozen=True)
class Asked:
    """Models by folder or size, and what they are measured beside."""

    models: Sequence[str] = ()
    plain: bool = False
    against: Sequence[str] = ()
    cache: CacheSettings | None = None


def measure_decode(
    asked: Asked,
    where: Where,
    protocol: tuple[int, int, int | None],
    prompts: str,
    batches: Sequence[int] | None,
    most: int | None,
    repeats: int,
) -> decode.Decode:
    """`protocol` has tokens of a prompt, new ones, and how many of their steps are measured.

    Raises ValueError for models, devices and programs that are not here.
    """
    prompt, new, steps = protocol
    steps = steps or (STEPS if open_device(where.device).type == "cpu" else new)
    settings = decode.Settings(
        Protocol(prompt, new, steps),
        _prompts(prompts),
        tuple(batches) if batches else None,
        most,
        repeats,
    )
    with threads(where.threads):
        found, top = _contenders(asked, where)
        results = decode.decode(found, settings, top)
        return finish("decode", results, views.of_decode, where.out, where.pictures)


def measure_prefill(
    asked: Asked, where: Where, lengths: Sequence[int] | None, n: int, repeats: int
) -> prefill.Prefill:
    """Reading prompts. Raises ValueError as `measure_decode` does."""
    chosen = tuple(lengths or prefill.LENGTHS)
    with threads(where.threads):
        found, top = _contenders(asked, where)
        results = prefill.prefill(found, prefill.Settings(chosen, n, repeats), top)
        return finish("prefill", results, views.of_prefill, where.out, where.pictures)


def measure_train(
    models: Sequence[str], where: Where, rows: int, lengths: Sequence[int] | None, repeats: int
) -> training.Training:
    """Forward and backward. Raises ValueError for models and devices that are not here."""
    settings = training.Settings(rows, tuple(lengths or training.LENGTHS), repeats)
    with threads(where.threads):
        opened = open_models(models, where.device, torch.float32)
        results = training.train(opened, settings, _head(opened, where))
        return finish("train", results, views.of_training, where.out)


def measure_targets(where: Where, batch: int, steps: int, repeats: int) -> targets.Targets:
    """The CPU's targets, on the small models. Raises ValueError for more threads than cores."""
    settings = targets.Settings(batch, steps, repeats)
    with threads(where.threads):
        teacher, student = open_models(TARGET_MODELS, "cpu")
        notes = [each for model in (teacher, student) for each in huggingface.caveats(model)]
        top = _head([teacher, student], where, notes)
        results = targets.targets(teacher, student, settings, top)
        return finish("targets", results, views.of_targets, where.out)


def _contenders(asked: Asked, where: Where) -> tuple[list[Contender[Any]], Head]:
    """What is measured, and the head of its result."""
    opened: list[Model] = open_models(asked.models, where.device)
    found, notes = peers.contenders(opened, asked.plain, asked.against, asked.cache)
    return found, _head(opened, where, notes)


def _head(models: Sequence[Model], where: Where, notes: Sequence[str] = ()) -> Head:
    """The head of a result; its notes are told at once, while there is time to stop."""
    top = head(models, open_device(where.device), notes)
    for note in top.notes:
        console.warn(note)
    return top


def _prompts(asked: str) -> tuple[Prompts, ...]:
    """The ways in which rows have prompts."""
    choices: dict[str, tuple[Prompts, ...]] = {
        **{each: (each,) for each in get_args(Prompts)},
        "both": get_args(Prompts),
    }
    if asked not in choices:
        raise ValueError(f"--prompts {asked}: choose {', '.join(choices)}")
    return choices[asked]
