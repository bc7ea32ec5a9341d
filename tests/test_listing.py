"""What `retort runs` says of run folders in every state."""

import os
from pathlib import Path

import pytest
from tests.report.conftest import completion, manifest, problem, verdict

from retort.listing import runs, table
from retort.store import Run


def run(folder: Path, problems: int = 2, n: int = 3) -> Run:
    made = Run.start(folder, {"seed": 0}, manifest(f"[bold]{folder.name}", n))
    with made.lock():
        made.problems.append([problem(str(i)) for i in range(problems)])
    return made


def sampled(made: Run, problems: int, n: int) -> Run:
    with made.lock():
        made.completions.append(
            [completion(str(i), j, "text", 5) for i in range(problems) for j in range(n)]
        )
    return made


def test_every_state_is_told(tmp_path: Path) -> None:
    run(tmp_path / "a")
    sampled(run(tmp_path / "deep" / "b"), 1, 2)
    whole = sampled(run(tmp_path / "c"), 2, 3)
    with whole.lock():
        whole.verdicts("1").append([verdict(str(i), j, "42") for i in range(2) for j in range(3)])
        whole.verdicts("2").append([verdict("0", 0, "42")])
        whole.scores("rm").append([{"problem_id": "0", "sample_idx": 0, "scores": [0.5]}])
    found = runs(tmp_path)
    assert [each.folder.name for each in found] == ["a", "c", "b"]
    assert [each.state for each in found] == ["0 of 6 sampled", "all sampled", "2 of 6 sampled"]
    assert [each.covered(each.verdicts) for each in found] == ["", "1, 2 (1 of 6)", ""]
    assert [each.covered(each.scores) for each in found] == ["", "rm (1 of 6)", ""]


def test_a_run_itself_may_be_named(tmp_path: Path) -> None:
    run(tmp_path / "a")
    assert [each.folder for each in runs(tmp_path / "a")] == [tmp_path / "a"]


def test_who_writes_is_told_and_is_not_disturbed(tmp_path: Path) -> None:
    made = run(tmp_path / "a")
    with made.lock():
        (held,) = runs(tmp_path)
        assert held.writer == str(os.getpid())
        assert held.state == f"being written by process {os.getpid()}, 0 of 6 sampled"
    (free,) = runs(tmp_path)
    assert free.writer is None
    with made.lock():
        pass


@pytest.mark.parametrize("damage", ["run.json", "completions/part-000000.parquet"])
def test_a_damaged_run_is_listed_with_its_fault(tmp_path: Path, damage: str) -> None:
    sampled(run(tmp_path / "a"), 2, 3)
    run(tmp_path / "b")
    (tmp_path / "a" / damage).write_bytes(b"{")
    damaged, good = runs(tmp_path)
    assert damaged.state.startswith(f"damaged: {tmp_path / 'a' / damage} is damaged")
    assert good.fault is None


def test_a_run_of_something_older_is_listed(tmp_path: Path) -> None:
    Run.start(tmp_path / "a", {"seed": 0}, {"name": "a"})
    (found,) = runs(tmp_path)
    assert found.state == "damaged: run.json has no 'model'"


def test_the_table_holds_names_as_they_are(tmp_path: Path) -> None:
    sampled(run(tmp_path / "a"), 2, 3)
    shown = table(runs(tmp_path))
    cells = [str(cell) for column in shown.columns for cell in column.cells]
    assert cells[:3] == [str(tmp_path / "a"), "[bold]a", "all sampled"]


def test_no_folder_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        runs(tmp_path / "none")
    assert runs(tmp_path) == []
