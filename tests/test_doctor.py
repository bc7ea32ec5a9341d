"""What is said of a machine, and what is missing for what."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import retort
from retort import doctor
from retort.doctor import GIB, Finding, findings, table


def of(name: str, folder: Path) -> Finding:
    (found,) = (each for each in findings(folder) if each.what == name)
    return found


def test_a_machine_that_is_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=50 * GIB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", {tmp_path: usage}.__getitem__)
    found = findings(tmp_path / "not" / "yet")
    assert all(each.fine for each in found if each.needed)
    assert [each.what for each in found[:5]] == ["Retort", "torch", "CPU", "GPU", "transformers"]
    assert of("disk", tmp_path / "runs") == Finding("disk", f"50 GiB free in {tmp_path}")
    assert of("Retort", tmp_path).found.startswith(f"{retort.__version__}, Python 3.")
    assert of("torch", tmp_path).found == torch.__version__


def test_little_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * GIB))
    found = of("disk", tmp_path)
    assert (found.fine, found.needed, found.found) == (False, False, f"3 GiB free in {tmp_path}")
    assert "checkpoints of 1B models" in found.advice
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=GIB // 2))
    assert of("disk", tmp_path).needed


@pytest.mark.parametrize(
    ("release", "fine"), [("5.22.2", False), ("5.23.0", True), ("6.0.0", True)]
)
def test_a_transformers_too_old_for_students_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, fine: bool
) -> None:
    monkeypatch.setattr(doctor, "version", lambda module: release)
    found = of("transformers", tmp_path)
    assert (found.found, found.fine, found.needed) == (release, fine, fine)
    assert ("exported students need 5.23" in found.advice) != fine


def test_kernels_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert of("CPU kernels", tmp_path) == Finding("CPU kernels", f"kept compiled in {tmp_path}")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "new"))
    assert of("CPU kernels", tmp_path).fine
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    found = of("CPU kernels", tmp_path)
    assert (found.fine, found.needed) == (False, True)
    assert "NUMBA_CACHE_DIR" in found.advice


def test_extras_say_what_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "wandb" else "here")
    missing = of("wandb", tmp_path)
    assert (missing.fine, missing.needed, missing.found) == (False, False, "not installed")
    assert missing.advice == "for following training (docs/watching.md): pip install wandb"
    assert of("Ray", tmp_path).fine


def test_gpus_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        mem_get_info=lambda index: ((70 + index) * GIB, 80 * GIB),
        get_device_name=lambda index: "Some GPU",
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    assert of("GPU 1", tmp_path).found == "Some GPU, 71 GiB of 80 GiB free"
    assert of("flash-linear-attention", tmp_path).needed is False


def test_the_table_marks_what_is_missing() -> None:
    found = [
        Finding("a", "[red]1"),
        Finding("b", "2", fine=False, advice="get it"),
        Finding("c", "3", fine=False, needed=False),
    ]
    columns = [[str(cell) for cell in column.cells] for column in table(found).columns]
    assert columns == [
        ["ok", "MISSING", "-"],
        ["a", "b", "c"],
        ["[red]1", "2", "3"],
        ["", "get it", ""],
    ]
