"""A dry run takes two steps of each stage with the sizes of a recipe, and writes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from retort import recipe as recipes
from retort.model import weights
from retort.model.decoder import Decoder
from retort.recipe import DistillRecipe
from retort.train import dry_run
from retort.train.gpus import GPUS, of_device

Values = dict[str, Any]
DATA = {"kind": "text", "path": "not/here.jsonl"}


def stage(kind: str) -> Values:
    return {
        "name": kind,
        "objective": {"kind": kind},
        "data": DATA,
        "tokens": 10 * 2 * 32,
        "rows": 2,
        "micro_rows": 1,
        "length": 32,
        "optim": {"lr": 1e-3},
    }


def recipe(tmp_path: Path, **changes: Any) -> DistillRecipe:
    values = {
        "out": tmp_path / "out",
        "teacher": tmp_path / "teacher",
        "student": {"start": "transplant", "settings": {"chunk_size": 16}},
        "stages": [stage(kind) for kind in ("mixing_matrices", "hidden_states", "distill")],
    }
    return recipes.parse(DistillRecipe, values | changes)


@pytest.fixture
def teacher(tmp_path: Path, make_decoder: Any) -> Decoder:
    """In the folder that the recipe names, without a tokenizer."""
    decoder: Decoder = make_decoder("aa")
    weights.save(decoder, tmp_path / "teacher")
    return decoder


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_two_steps_of_each_stage(tmp_path: Path, teacher: Decoder) -> None:
    before = files(tmp_path)
    trials = dry_run.dry_run(recipe(tmp_path))
    assert [trial.stage for trial in trials] == ["mixing_matrices", "hidden_states", "distill"]
    for trial in trials:
        assert trial.loss > 0
        assert trial.tokens_per_second == pytest.approx(2 * 32 / trial.seconds)
        assert (trial.utilisation, trial.memory_gib) == (None, None)
        assert trial.planned_gib > 0
    assert files(tmp_path) == before
    assert dry_run.table(trials).row_count == 3


def test_random_weights_where_there_are_none(tmp_path: Path, teacher: Decoder) -> None:
    (tmp_path / "teacher" / weights.SINGLE).unlink()
    trials = dry_run.dry_run(recipe(tmp_path))
    assert all(torch.isfinite(torch.tensor(trial.loss)) for trial in trials)


def test_a_teacher_of_unknown_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher is not here.*planning\.teacher"):
        dry_run.dry_run(recipe(tmp_path))


@pytest.mark.parametrize(
    "student",
    [
        {"start": "folder", "folder": "teacher"},
        {"start": "fresh", "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1},
    ],
    ids=["folder", "fresh"],
)
def test_students_without_a_teacher(tmp_path: Path, teacher: Decoder, student: Values) -> None:
    if "folder" in student:
        student = student | {"folder": tmp_path / "teacher"}
    wanted = recipe(tmp_path, teacher=None, student=student, stages=[stage("supervised")])
    (trial,) = dry_run.dry_run(wanted)
    assert trial.loss > 1


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090-24gb"),
        ("NVIDIA T4", None),
    ],
)
def test_gpus_by_what_cuda_calls_them(device: str, name: str | None) -> None:
    assert of_device(device) == (None if name is None else GPUS[name])
