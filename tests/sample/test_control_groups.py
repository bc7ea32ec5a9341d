"""What a container or a batch system leaves to its processes."""

from pathlib import Path

import pytest

from retort.sample.control_groups import memory_left

NONE = float("inf")


def group(folder: Path, limit: str, used: int, cached: int) -> None:
    """One of the second version."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")


def member(tmp_path: Path, lines: str) -> Path:
    own = tmp_path / "own"
    own.write_text(lines)
    return own


@pytest.mark.parametrize(("limit", "left"), [("max", NONE), ("1000", 400.0)])
def test_a_container_may_take_less(tmp_path: Path, limit: str, left: float) -> None:
    group(tmp_path, limit, 600, 0)
    assert memory_left(tmp_path, member(tmp_path, "0::/\n")) == left


def test_files_that_were_read_take_nothing(tmp_path: Path) -> None:
    """Copying a checkpoint into a container fills its memory with what can be read again."""
    group(tmp_path, "1000", 990, 700)
    assert memory_left(tmp_path, member(tmp_path, "0::/\n")) == 710


@pytest.mark.parametrize("narrow", ["", "job", "job/step"])
def test_the_narrowest_group_decides(tmp_path: Path, narrow: str) -> None:
    for name in ("job", "job/step"):
        group(tmp_path / name, "1000" if name == narrow else "max", 100, 0)
    left = memory_left(tmp_path, member(tmp_path, "0::/job/step\n"))
    assert left == (900.0 if narrow else NONE)


def test_the_first_version_has_other_names(tmp_path: Path) -> None:
    job = tmp_path / "memory" / "slurm" / "job"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("1000\n")
    (job / "memory.usage_in_bytes").write_text("600\n")
    (job / "memory.stat").write_text("inactive_file 5\ntotal_inactive_file 50\n")
    lines = "9:cpu,cpuacct:/slurm\n4:memory:/slurm/job\n0::/\n"
    assert memory_left(tmp_path, member(tmp_path, lines)) == 450


def test_a_group_around_the_container_is_not_seen(tmp_path: Path) -> None:
    assert memory_left(tmp_path, member(tmp_path, "0::/docker/abc\n")) == NONE


def test_elsewhere_there_are_none(tmp_path: Path) -> None:
    assert memory_left(tmp_path, tmp_path / "none") == NONE


def test_this_process() -> None:
    assert memory_left() > 1 << 20
