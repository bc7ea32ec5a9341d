"""Students out of a run at any step that it has kept."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import retort
from retort import recipe as recipes
from retort.recipe import DistillRecipe
from retort.train import checkpoint, export, loop
from retort.train.folder import work_folder

STAGE = {
    "name": "answers",
    "objective": {"kind": "supervised"},
    "data": {
        "kind": "worked",
        "prompt": "{question}",
        "problems": {"kind": "arithmetic", "split": "train", "difficulty": [1, 1]},
    },
    "tokens": 5 * 288,
    "rows": 1,
    "length": 288,
    "optim": {"lr": 5e-3},
}
STUDENT = {
    "start": "fresh",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has kept its states after two, four and five steps."""
    out = tmp_path_factory.mktemp("models") / "model"
    values: dict[str, Any] = {"out": out, "student": STUDENT, "stages": [STAGE]}
    return work_folder(
        loop.distill(
            recipes.parse(DistillRecipe, values | {"checkpoints": {"every": 2, "keep": 3}})
        )
    )


def test_the_newest_state_is_what_the_run_ended_in(run: Path, tmp_path: Path) -> None:
    state = export.export(run, tmp_path / "out")
    assert checkpoint.step_of(state) == 5
    finished = run.with_name("model")
    assert {p.name: p.read_bytes() for p in finished.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()
    }


def test_an_earlier_state(run: Path, tmp_path: Path) -> None:
    export.export(run, tmp_path / "two", step=2)
    export.export(run, tmp_path / "four", step=4)
    two, four, end = (
        retort.load(each).state_dict()["lm_head.weight"]
        for each in (tmp_path / "two", tmp_path / "four", run.with_name("model"))
    )
    assert not torch.equal(two, four)
    assert not torch.equal(four, end)


def file_there(out: Path) -> None:
    out.write_text("something else")


def folder_there(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("something else")


@pytest.mark.parametrize("there", [file_there, folder_there])
def test_nothing_else_is_written_over(
    run: Path, tmp_path: Path, there: Callable[[Path], None]
) -> None:
    there(tmp_path / "out")
    with pytest.raises(ValueError, match=r"is a file|holds files"):
        export.export(run, tmp_path / "out")


def test_steps_that_were_not_kept(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no whole state of step 3 \(there are: 2, 4, 5\)"):
        export.export(run, tmp_path / "out", step=3)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training run"):
        export.export(tmp_path, tmp_path / "out")


def test_a_run_with_damaged_states_alone(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "model.training")
    for path in (tmp_path / "model.training").rglob(checkpoint.VALUES):
        path.unlink()
    with pytest.raises(ValueError, match=r"model.training: no state is whole"):
        export.export(tmp_path / "model.training", tmp_path / "out")
