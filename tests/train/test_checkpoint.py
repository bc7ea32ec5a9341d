"""Training states on disk: complete or absent, the newest few, and what a damaged one does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.train import checkpoint


def tensors(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((3,), value), "step": torch.tensor(value)}


def steps(root: Path) -> list[int]:
    """The states that are there, by what their folders are called."""
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))


def newest(root: Path) -> tuple[dict[str, Tensor], Any, list[Path]]:
    found = checkpoint.latest(root)
    assert found is not None
    return found


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") == ({}, None, [])
    assert checkpoint.latest(tmp_path) == ({}, None, [])


def test_there_and_back(tmp_path: Path) -> None:
    values = {"step": 7, "queue": [[3, 0], [4, 12]], "seconds": 1.5}
    transposed = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    half = torch.ones(2, dtype=torch.bfloat16)
    checkpoint.save(tmp_path / "new" / "root", 7, {"a": transposed, "b": half}, values, keep=2)
    found, read, damaged = newest(tmp_path / "new" / "root")
    assert torch.equal(found["a"], transposed)
    assert torch.equal(found["b"], half)
    assert (read, damaged) == (values, [])


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 100):
        checkpoint.save(tmp_path, step, tensors(step), {"step": step}, keep=2)
    assert steps(tmp_path) == [10, 100]
    assert newest(tmp_path)[1] == {"step": 100}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path, 5, tensors(value), {"value": value}, keep=2)
    found, values, _ = newest(tmp_path)
    assert values == {"value": 2.0}
    assert float(found["step"]) == 2


@pytest.mark.parametrize("moment", ["save_file", "_sync"])
def test_a_state_is_complete_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Whenever the write ends, the state before it is still the newest, and the next one works."""
    checkpoint.save(tmp_path, 1, tensors(1), {"step": 1}, keep=1)

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, moment, fail)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, tensors(2), {"step": 2}, keep=1)
    assert newest(tmp_path)[1:] == ({"step": 1}, [])
    checkpoint.save(tmp_path, 2, tensors(2), {"step": 2}, keep=1)
    assert newest(tmp_path)[1:] == ({"step": 2}, [])
    assert steps(tmp_path) == [2]


def truncate_tensors(state: Path) -> None:
    path = state / checkpoint.TENSORS
    path.write_bytes(path.read_bytes()[:-3])


def lose_tensors(state: Path) -> None:
    (state / checkpoint.TENSORS).unlink()


def truncate_values(state: Path) -> None:
    (state / checkpoint.VALUES).write_text('{"step": ')


def lose_values(state: Path) -> None:
    (state / checkpoint.VALUES).unlink()


DAMAGES = [truncate_tensors, lose_tensors, truncate_values, lose_values]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_passed_over(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tensors(step), {"step": step}, keep=3)
    for step in (2, 3):
        damage(tmp_path / f"step-{step:09d}")
    found, values, damaged = newest(tmp_path)
    assert values == {"step": 1}
    assert float(found["step"]) == 1
    assert [path.name for path in damaged] == ["step-000000003", "step-000000002"]


def test_damaged_states_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """After falling back, new states have lower numbers than the damaged one: they must stay."""
    for step in (1, 5):
        checkpoint.save(tmp_path, step, tensors(step), {"step": step}, keep=2)
    truncate_tensors(tmp_path / "step-000000005")
    for step in (2, 3):
        checkpoint.save(tmp_path, step, tensors(step), {"step": step}, keep=1)
        assert newest(tmp_path)[1] == {"step": step}
