"""The models of a recipe without their weights: made by the code of a run, from sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from retort.model import weights
from retort.model.config import ATTENTION, DecoderConfig, LayerType
from retort.model.decoder import Decoder
from retort.model.geometries import geometry
from retort.model.transplant import as_paper, every, keep_attention, transplant
from retort.recipe import (
    Continued,
    DistillRecipe,
    Fresh,
    Keep,
    KeepEvery,
    KeepImportant,
    KeepLayers,
    KeepPaper,
    Transplanted,
)
from retort.train.importance import highest


@dataclass(frozen=True)
class Outline:
    """Student and teacher on torch's `meta` device; `notes` say which sizes are not a folder's."""

    student: Decoder
    teacher: Decoder | None
    notes: tuple[str, ...]


def outline(recipe: DistillRecipe) -> Outline:
    """The models of a recipe. Raises ValueError for settings that do not fit them, and for a model
    of unknown size.
    """
    notes: list[str] = []
    teacher = _teacher(recipe, notes)
    return Outline(_student(recipe, teacher, notes), teacher, tuple(notes))


def _teacher(recipe: DistillRecipe, notes: list[str]) -> Decoder | None:
    if recipe.teacher is None:
        return None
    return weights.empty(_config(recipe.teacher, recipe.planning.teacher, "teacher", notes))


def _config(folder: Path, name: str | None, key: str, notes: list[str]) -> DecoderConfig:
    """A folder's configuration; where it is not here yet, the size that the recipe names."""
    if folder.is_dir():
        return weights.read_config(folder)
    if name is None:
        raise ValueError(
            f"{key}: {folder} is not here, and a plan needs its size; put its config.json there, "
            f"or name the size: planning.{key}=llama-3.2-1b (docs/recipes.md#before-you-start-one)"
        )
    notes.append(f"{folder} is not here: {key} planned as a {name}")
    return geometry(name)


def _student(recipe: DistillRecipe, teacher: Decoder | None, notes: list[str]) -> Decoder:
    match recipe.student:
        case Transplanted() as spec:
            assert teacher is not None
            return _transplanted(spec, teacher)
        case Fresh() as spec:
            return weights.empty(fresh_config(spec, spec.vocab_size))
        case Continued() as spec:
            return weights.empty(_config(spec.folder, recipe.planning.student, "student", notes))


def _transplanted(spec: Transplanted, teacher: Decoder) -> Decoder:
    """A source that is not here yet differs from the teacher in layers that are replaced anyway."""
    source = teacher
    if spec.source is not None and spec.source.is_dir():
        source = weights.empty(weights.read_config(spec.source))
    types = layer_types(spec.keep_attention, source.config)
    with torch.device("meta"):
        settings = spec.settings.model_dump()
        return transplant(source, types, spec.mixer, start=spec.initial, **settings)


def layer_types(
    keep: Keep, source: DecoderConfig, costs: Mapping[int, float] | None = None
) -> list[LayerType]:
    """Which layers of a student are attention; those that are not in its source cannot be.

    Without the `costs` of replacing each layer, the first ones stand for those that cost most: all
    are of one size.
    """
    match keep:
        case KeepLayers():
            return keep_attention(source.layers, keep.layers)
        case KeepEvery():
            return every(source.layers, keep.step)
        case KeepPaper():
            return as_paper(source.layers)
        case KeepImportant():
            if costs is None:
                return keep_attention(source.layers, source.attention_layers[: keep.count])
            return keep_attention(source.layers, highest(costs, keep.count))


def fresh_config(spec: Fresh, vocab_size: int) -> DecoderConfig:
    """A model from nothing, with as many words as its tokenizer has or may have."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        layer_types=(ATTENTION,) * spec.layers,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.hidden_size // spec.heads,
        max_position=spec.max_position,
        rope_theta=spec.rope_theta,
        tie_embeddings=True,
    )
