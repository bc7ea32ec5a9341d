"""Grading a run: every completion once, whatever was interrupted, and nothing else is touched."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from retort.grade import Grader, ballots
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
    assert summary == GradeSummary(
        graded=8, total=8, correct=4, no_answer=2, truncated=2, timeouts=0
    )
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
    assert grade(run.folder) == GradeSummary(0, 4, 2, 1, 1, 0)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.parquet")} == before


def test_new_completions_are_added(run: Run) -> None:
    sampled(run, "a")
    grade(run.folder)
    sampled(run, "a", start=4)
    sampled(run, "b")
    assert grade(run.folder).graded == 8
    assert run.verdicts(GRADER_VERSION).keys() == run.completions.keys()


def interrupted_after(judged: int) -> Callable[..., Any]:
    """Grader.grade, until so many completions are judged."""
    whole, count = Grader.grade, 0

    def grade_some(self: Grader, pairs: list[tuple[str, str]]) -> Any:
        nonlocal count
        if count >= judged:
            raise KeyboardInterrupt
        count += len(pairs)
        return whole(self, pairs)

    return grade_some


def test_interrupted_grading_keeps_what_it_has(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grading, "ROWS_PER_PART", 4)
    monkeypatch.setattr(grading, "_ROWS_AT_ONCE", 2)
    for start in (0, 4, 8):
        sampled(run, "a", start)
    with monkeypatch.context() as patch:
        patch.setattr(Grader, "grade", interrupted_after(6))
        with pytest.raises(KeyboardInterrupt):
            grade(run.folder)
    assert len(run.verdicts(GRADER_VERSION).keys()) == 6
    assert "grade tiny: 50 % (6/12)" in capfd.readouterr().err
    summary = grade(run.folder)
    assert summary == GradeSummary(6, 12, 6, 3, 3, 0)
    assert "grade tiny: 100 % (12/12)" in capfd.readouterr().err
    assert run.verdicts(GRADER_VERSION).read().num_rows == 12
    assert len(run.verdicts(GRADER_VERSION).part_files()) == 4


@pytest.mark.parametrize("table", ["verdicts-2", "votes-2"])
def test_what_a_damaged_part_held_is_judged_again(
    run: Run, capfd: pytest.CaptureFixture[str], table: str
) -> None:
    assert table.endswith(GRADER_VERSION)
    sampled(run, "a", 0)
    grade(run.folder)
    before = [run.verdicts(GRADER_VERSION).read(), run.votes(GRADER_VERSION).read()]
    torn = run.folder / table / "part-000000.parquet"
    torn.write_bytes(torn.read_bytes()[:-9])
    grade(run.folder)
    assert f"warning: {torn.with_suffix('.damaged')}: a damaged part" in capfd.readouterr().err
    assert [run.verdicts(GRADER_VERSION).read(), run.votes(GRADER_VERSION).read()] == before


def test_what_is_judged_is_written_in_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "FLUSH_SECONDS", -1.0)
    monkeypatch.setattr(grading, "_ROWS_AT_ONCE", 3)
    sampled(run, "a")
    grade(run.folder)
    assert len(run.verdicts(GRADER_VERSION).part_files()) == 2


def test_only_what_is_lost_is_judged_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "ROWS_PER_PART", 2)
    monkeypatch.setattr(grading, "_ROWS_AT_ONCE", 2)
    sampled(run, "a")
    grade(run.folder)
    run.verdicts(GRADER_VERSION).part_files()[0].write_bytes(b"PAR1")
    assert grade(run.folder) == GradeSummary(2, 4, 2, 1, 1, 0)


def test_other_grader_versions_are_left_alone(run: Run) -> None:
    sampled(run, "a")
    verdict = {"problem_id": "a", "sample_idx": 0, "answer": "1", "group": "1", "correct": False}
    run.verdicts("0").append([verdict | {"method": "different"}])
    assert grade(run.folder).graded == 4
    assert run.verdict_versions() == ["0", GRADER_VERSION]
    assert run.verdicts("0").read().num_rows == 1


def test_run_without_completions(run: Run) -> None:
    assert grade(run.folder) == GradeSummary(0, 0, 0, 0, 0, 0)


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


# Answers that take algebra

ANSWERS = ["8!", "40320", "2x", "x+x", "x", "3 cm", r"\sqrt{9}", None]
GROUPS = {"40320": "40320", "8!": "40320", "2x": "2x", "x+x": "2x", "x": "x", "3": "3"}
GROUPS |= {r"\sqrt{9}": "3"}


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1, timeout=1) as grader:
        yield grader


@pytest.fixture
def algebraic(run: Run) -> Run:
    run.problems.append([{"problem_id": "c", "question": "?", "answer": "40,320"}])
    rows = [completion("c", i) for i in range(len(ANSWERS))]
    run.completions.append(
        [row | {"text": f"#### {a}" if a else ""} for row, a in zip(rows, ANSWERS, strict=True)]
    )
    return run


def votes(run: Run) -> dict[str, str]:
    rows = run.votes(GRADER_VERSION).read().to_pylist()
    assert [(r["problem_id"], r["key"]) for r in rows] == sorted(
        (r["problem_id"], r["key"]) for r in rows
    )
    return {row["key"]: row["group"] for row in rows if row["problem_id"] == "c"}


def test_equal_keys_get_one_group(algebraic: Run, grader: Grader) -> None:
    assert grade(algebraic.folder, grader) == GradeSummary(8, 8, 2, 1, 2, 0)
    groups = votes(algebraic)
    assert groups == GROUPS | {"2x": groups["2x"], "x+x": groups["2x"]}


def test_groups_do_not_depend_on_the_order(
    algebraic: Run, grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grading, "_ROWS_AT_ONCE", 1)
    monkeypatch.setattr(grading, "ROWS_PER_PART", 1)
    sampled(algebraic, "a")
    with monkeypatch.context() as patch:
        patch.setattr(Grader, "grade", interrupted_after(5))
        with pytest.raises(KeyboardInterrupt):
            grade(algebraic.folder, grader)
    assert algebraic.votes(GRADER_VERSION).part_files()  # there, and incomplete
    assert votes(algebraic) == {}
    with monkeypatch.context() as patch:
        patch.setattr(ballots, "grouped", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            grade(algebraic.folder, grader)
    grade(algebraic.folder, grader)
    first = votes(algebraic)
    for part in algebraic.verdicts(GRADER_VERSION).part_files()[::2]:
        part.unlink()
    grade(algebraic.folder, grader)
    assert votes(algebraic) == first
    assert first.keys() == GROUPS.keys()


def test_new_answers_are_grouped_again(algebraic: Run, grader: Grader) -> None:
    grade(algebraic.folder, grader)
    algebraic.completions.append([completion("c", 100) | {"text": "#### 1+2"}])
    grade(algebraic.folder, grader)
    assert votes(algebraic)["3"] == votes(algebraic)["1+2"] == votes(algebraic)[r"\sqrt{9}"]


def test_a_timeout_is_kept(run: Run, grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    late = "#### \\lfloor 2^{10^{10}}\\rfloor"
    run.completions.append([completion("a", i) | {"text": late} for i in range(2)])
    assert grade(run.folder, grader).timeouts == 2
    run.completions.append([completion("a", 2) | {"text": late}])
    with Grader(workers=1) as other:
        monkeypatch.setattr(other.pool, "ask", lambda requests: [1 / 0 for _ in requests])
        assert grade(run.folder, other).timeouts == 3


def test_workers_killed_while_grading(algebraic: Run, grader: Grader) -> None:
    grade(algebraic.folder, grader)
    expected = algebraic.verdicts(GRADER_VERSION).read().to_pylist(), votes(algebraic)
    for part in algebraic.folder.rglob("v*-*/part-*.parquet"):
        part.unlink()
    with Grader(workers=1) as other:
        other.equivalent("x+1", "1+x")
        os.kill(other.pool.pids[0], signal.SIGKILL)
        grade(algebraic.folder, other)
    assert (algebraic.verdicts(GRADER_VERSION).read().to_pylist(), votes(algebraic)) == expected
