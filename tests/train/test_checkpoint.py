"""Training states on disk: complete or absent, the newest few, and what a damaged one does."""

import errno
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from retort.train import checkpoint
from retort.train.checkpoint import Checkpoints
from retort.train.memory import SAVING
from retort.train.world import World


def tensors(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((3,), value), "matrix": torch.full((2, 2), -value)}


@pytest.fixture
def save(tmp_path: Path, world: World) -> Callable[..., None]:
    """Writes a state and waits for it."""

    def write(step: int, keep: int = 2, root: Path = tmp_path, value: float | None = None) -> None:
        kept = Checkpoints(root, keep, world)
        kept.save(step, tensors(step if value is None else value), {"step": step})
        kept.finish()

    return write


def steps(root: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.states(root)]


def newest_values(root: Path) -> Any:
    found = checkpoint.newest(root)
    assert found is not None
    return found[1]


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") is None
    assert checkpoint.newest(tmp_path) is None


def test_there_and_back(tmp_path: Path, world: World) -> None:
    values = {"step": 7, "queue": [["a", 3, 0]], "seconds": 1.5, "best": None}
    transposed = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    half = torch.ones(2, dtype=torch.bfloat16)
    kept = Checkpoints(tmp_path / "new" / "root", 2, world)
    kept.save(7, {"a": transposed, "b": half}, values)
    kept.finish()
    found = checkpoint.newest(tmp_path / "new" / "root")
    assert found is not None
    read = {"a": torch.zeros(3, 2), "b": torch.zeros(2, dtype=torch.bfloat16)}
    checkpoint.read(found[0], read, world)
    assert torch.equal(read["a"], transposed)
    assert torch.equal(read["b"], half)
    assert found[1] == values


def test_a_part_of_a_state_can_be_read(
    tmp_path: Path, world: World, save: Callable[..., None]
) -> None:
    save(3)
    read = {"matrix": torch.zeros(2, 2)}
    checkpoint.read(checkpoint.folder(tmp_path, 3), read, world)
    assert torch.equal(read["matrix"], torch.full((2, 2), -3.0))


def test_the_tensors_may_change_while_they_are_written(tmp_path: Path, world: World) -> None:
    kept, changing = Checkpoints(tmp_path, 2, world), tensors(1.0)
    kept.save(1, changing, {})
    for tensor in changing.values():
        tensor.fill_(9.0)
    kept.finish()
    checkpoint.read(checkpoint.folder(tmp_path, 1), changing, world)
    assert torch.equal(changing["weight"], torch.ones(3))


def test_the_newest_few_are_kept(tmp_path: Path, save: Callable[..., None]) -> None:
    for step in (1, 2, 9, 10, 100):
        save(step)
    assert steps(tmp_path) == [10, 100]
    assert newest_values(tmp_path) == {"step": 100}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_same_step_again_replaces_it(
    tmp_path: Path, world: World, save: Callable[..., None]
) -> None:
    for value in (1.0, 2.0):
        save(5, value=value)
    read = tensors(0.0)
    checkpoint.read(checkpoint.folder(tmp_path, 5), read, world)
    assert torch.equal(read["weight"], torch.full((3,), 2.0))


def test_what_is_being_written_is_finished_first(tmp_path: Path, world: World) -> None:
    kept = Checkpoints(tmp_path, 9, world)
    for step in (1, 2, 3):
        kept.save(step, tensors(step), {"step": step})
    assert steps(tmp_path)[:2] == [1, 2]
    kept.finish()
    assert steps(tmp_path) == [1, 2, 3]


def test_nothing_waits_for_a_state_that_is_not_ready(tmp_path: Path, world: World) -> None:
    kept = Checkpoints(tmp_path, 9, world)
    kept.poll()
    kept.save(1, tensors(1), {"step": 1})
    assert kept._running is not None
    written = kept._running[1]
    kept._running = 1, Future()  # one that never ends
    kept.poll()
    assert steps(tmp_path) == []
    written.result()
    kept._running = 1, written
    kept.poll()
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("moment", ["async_save", "_sync"])
def test_a_state_is_complete_or_absent(
    tmp_path: Path, save: Callable[..., None], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Whenever the write ends, the state before it is still the newest, and the next one works."""
    save(1, keep=1)

    def fail(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, moment, fail)
        with pytest.raises(KeyboardInterrupt):
            save(2, keep=1)
    assert newest_values(tmp_path) == {"step": 1}
    save(2, keep=1)
    assert newest_values(tmp_path) == {"step": 2}
    assert steps(tmp_path) == [2]


def test_a_state_is_there_while_the_one_it_replaces_is_deleted(
    tmp_path: Path, save: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(5, keep=1, value=1.0)
    delete = shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists() and path.name != checkpoint.PARTIAL:
            next(path.glob("*.safetensors")).unlink()
            raise KeyboardInterrupt
        delete(path, ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(5, keep=1, value=2.0)
    assert newest_values(tmp_path) == {"step": 5}
    save(6, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000006"]


def test_what_cannot_be_written_is_told(
    tmp_path: Path, save: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(1)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save", full)
        with pytest.raises(OSError, match=r"step 2 could not be written: .*No space left") as told:
            save(2)
    assert told.value.filename == str(tmp_path)
    assert newest_values(tmp_path) == {"step": 1}
    save(2)
    assert newest_values(tmp_path) == {"step": 2}


def test_what_cannot_be_read_is_told(
    tmp_path: Path, world: World, save: Callable[..., None]
) -> None:
    save(1)
    (path,) = checkpoint.folder(tmp_path, 1).glob("*.safetensors")
    path.write_bytes(b"")
    with pytest.raises(OSError, match="could not be read"):
        checkpoint.read(checkpoint.folder(tmp_path, 1), tensors(0.0), world)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize("what", ["*.safetensors", checkpoint.VALUES])
@pytest.mark.parametrize("damage", [cut, garble, Path.unlink])
def test_a_damaged_state_is_passed_over_and_told(
    tmp_path: Path,
    save: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    what: str,
    damage: Callable[[Path], None],
) -> None:
    save(1)
    save(2)
    (path,) = checkpoint.folder(tmp_path, 2).glob(what)
    damage(path)
    assert newest_values(tmp_path) == {"step": 1}
    told = capsys.readouterr().err
    assert "step-000000002: damaged; step-000000001, which is whole, takes its place" in told
    save(2)
    assert newest_values(tmp_path) == {"step": 2}


def test_where_all_are_damaged_none_is_promised(
    tmp_path: Path, save: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    save(1)
    save(2)
    for path in tmp_path.rglob(checkpoint.VALUES):
        path.unlink()
    assert checkpoint.newest(tmp_path) is None
    told = capsys.readouterr().err
    for name in ("step-000000001", "step-000000002"):
        assert f"{name}: damaged, and so is every state before it" in told


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux tells it"
)
def test_memory_while_a_state_is_written(tmp_path: Path, world: World) -> None:
    """What a plan says that it takes, besides the tensors themselves."""

    def kib(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    kept = Checkpoints(tmp_path, 2, world)
    kept.save(1, tensors(1), {})  # whatever is made once
    kept.finish()
    large = {f"{i}": torch.ones(2**18, 10) for i in range(6)}  # 60 MiB
    before = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    kept.save(2, large, {})
    kept.finish()
    assert (kib("VmHWM") - before) / (60 * 1024) == pytest.approx(SAVING, abs=0.4)


def test_later_states_are_dropped_when_a_run_has_gone_back(
    tmp_path: Path, save: Callable[..., None]
) -> None:
    for step in (1, 2, 3):
        save(step, keep=9)
    save(2, keep=9)
    assert steps(tmp_path) == [1, 2]


def test_values_that_are_no_state(tmp_path: Path, save: Callable[..., None]) -> None:
    save(1)
    (checkpoint.folder(tmp_path, 1) / checkpoint.VALUES).write_text(json.dumps(["files"]))
    assert checkpoint.newest(tmp_path) is None
