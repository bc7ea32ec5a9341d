"""Grading a run: every completion once, whatever was interrupted, and nothing else is touched."""

from pathlib import Path
from typing import Any

import pytest

from retort.grade import run as grading
from retort.grade.answers import GRADER_VERSION
from retort.grade.run import GradeSummary, grade
from retort.store import Run

TEXTS = [
    "The final answer is 5.",
    r"so \boxed{\frac{10}{2}}",
    "The final answer is 6 or 7.",
    "I run out of tok",
]
METHODS = ["string", "rational", "different", "no answer"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.start(tmp_path / "run", {"model": "tiny"}, {"name": "tiny"})
    run.problems.append([{"problem_id": p, "question": "?", "answer": "5"} for p in "ab"])
    return run


def sampled(run: Run, problem_id: str, start: int = 0) -> list[tuple[str, int]]:
    """Four completions, one of each method, as one part."""
    keys = [(problem_id, start + i) for i in range(len(TEXTS))]
    run.completions.append([completion(*key) for key in keys])
    return keys


def completion(problem_id: str, sample_idx: int) -> dict[str, Any]:
    kind = sample_idx % len(TEXTS)
    return {
        "problem_id": problem_id,
        "sample_idx": sample_idx,
        "seed": 0,
        "text": TEXTS[kind],
        "token_count": 7,
        "finish_reason": "length" if kind == 3 else "stop",
        "prompt_tokens": 3,
        "logprob": -1.5,
        "batch": 0,
        "started": 1.0,
        "ended": 2.5,
    }


def test_every_completion_gets_its_verdict(run: Run) -> None:
    keys = sampled(run, "a") + sampled(run, "b")
    summary = grade(run.folder)
    assert summary == GradeSummary(graded=8, total=8, correct=4, no_answer=2, truncated=2)
    verdicts = run.verdicts(GRADER_VERSION)
    assert verdicts.keys() == set(keys)
    assert verdicts.read(["method"])["method"].to_pylist() == METHODS * 2
    assert verdicts.read().to_pylist()[1] == {
        "problem_id": "a",
        "sample_idx": 1,
        "answer": r"\frac{10}{2}",
        "group": "5",
        "correct": True,
        "method": "rational",
    }


def test_second_call_does_nothing(run: Run) -> None:
    sampled(run, "a")
    grade(run.folder)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.parquet")}
    assert grade(run.folder) == GradeSummary(0, 4, 2, 1, 1)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.parquet")} == before


def test_new_completions_are_added(run: Run) -> None:
    sampled(run, "a")
    grade(run.folder)
    sampled(run, "a", start=4)
    sampled(run, "b")
    assert grade(run.folder).graded == 8
    assert run.verdicts(GRADER_VERSION).keys() == run.completions.keys()


def test_interrupted_grading_keeps_its_parts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "ROWS_PER_PART", 3)
    for start in (0, 4, 8):
        sampled(run, "a", start)
    with pytest.raises(KeyboardInterrupt):
        grade(run.folder, stop_after(6))
    assert len(run.verdicts(GRADER_VERSION).keys()) == 6
    calls: list[tuple[int, int]] = []
    summary = grade(run.folder, lambda done, total: calls.append((done, total)))
    assert summary == GradeSummary(graded=6, total=12, correct=6, no_answer=3, truncated=3)
    assert calls == [(9, 12), (12, 12)]
    assert run.verdicts(GRADER_VERSION).read().num_rows == 12


def stop_after(count: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return progress


def test_deleted_verdict_part_is_graded_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "ROWS_PER_PART", 2)
    sampled(run, "a")
    grade(run.folder)
    torn = run.verdicts(GRADER_VERSION).part_files()[0]
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{torn} is damaged"):
        grade(run.folder)
    torn.unlink()
    assert grade(run.folder) == GradeSummary(2, 4, 2, 1, 1)


def test_other_grader_versions_are_left_alone(run: Run) -> None:
    sampled(run, "a")
    verdict = {"problem_id": "a", "sample_idx": 0, "answer": "1", "group": "1", "correct": False}
    run.verdicts("0").append([verdict | {"method": "different"}])
    assert grade(run.folder).graded == 4
    assert run.verdict_versions() == ["0", GRADER_VERSION]
    assert run.verdicts("0").read().num_rows == 1


def test_run_without_completions(run: Run) -> None:
    assert grade(run.folder) == GradeSummary(0, 0, 0, 0, 0)


def test_completion_of_an_unknown_problem_is_refused(run: Run) -> None:
    sampled(run, "c")
    with pytest.raises(ValueError, match=f"{run.folder}: completions of problem 'c'"):
        grade(run.folder)


def test_grading_waits_for_no_other_writer(run: Run) -> None:
    sampled(run, "a")
    with run.lock(), pytest.raises(ValueError, match="is being written by process"):
        grade(run.folder)
    assert run.verdict_versions() == []


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run folder"):
        grade(tmp_path)
