"""Verdicts on a run's completions, stored beside them; grading never touches the completions."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from retort.grade.answers import GRADER_VERSION, Verdict, extract, judge
from retort.store import Run
from retort.tables import row_keys

ROWS_PER_PART = 20_000  # what a killed run has to grade again at most
_SEEN_ANSWERS = 65_536  # most of a problem's samples repeat an answer that is already judged


@dataclass(frozen=True)
class GradeSummary:
    """graded: verdicts this call added. The rest counts the whole run: completions, those that are
    correct, those without an answer, those cut off by the length limit."""

    graded: int
    total: int
    correct: int
    no_answer: int
    truncated: int


def grade(folder: Path, progress: Callable[[int, int], None] | None = None) -> GradeSummary:
    """Grade the completions of a run that have no verdict of this grader version yet.

    progress(done, total) is told after each part how many of the run's completions have a verdict.
    Memory holds one part of completions, the keys that are done and one part of verdicts.
    Raises ValueError when the folder is no run, is being written by another process, or holds a
    completion whose problem it does not know.
    """
    run = Run.open(folder)
    with run.lock():
        graded = _grade_missing(run, progress or (lambda done, total: None))
        return _summary(run, graded)


def _grade_missing(run: Run, progress: Callable[[int, int], None]) -> int:
    total = run.completions.read(["sample_idx"]).num_rows
    verdicts = run.verdicts(GRADER_VERSION)
    done = verdicts.keys()
    graded = 0
    for rows in _batches(_verdict_rows(run, done)):
        verdicts.append(rows)
        graded += len(rows)
        progress(len(done) + graded, total)
    return graded


def _verdict_rows(run: Run, done: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    golds = _golds(run)
    judged = lru_cache(_SEEN_ANSWERS)(judge)
    for part in run.completions.parts(["problem_id", "sample_idx", "text"]):
        for key, text in zip(row_keys(part), part["text"], strict=True):
            if key not in done:
                gold = _gold(golds, key[0], run.folder)
                yield _row(key, judged(gold, extract(text.as_py())))


def _row(key: tuple[str, int], verdict: Verdict) -> dict[str, Any]:
    return {"problem_id": key[0], "sample_idx": key[1], **asdict(verdict)}


def _golds(run: Run) -> dict[str, str]:
    problems = run.problems.read(["problem_id", "answer"])
    ids, answers = (column.to_pylist() for column in problems.columns)
    return dict(zip(ids, answers, strict=True))


def _gold(golds: dict[str, str], problem_id: str, folder: Path) -> str:
    if problem_id not in golds:
        raise ValueError(
            f"{folder}: completions of problem {problem_id!r}, which its problems table lacks; "
            "continue the sampling command that made the run, it writes the problems"
        )
    return golds[problem_id]


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == ROWS_PER_PART:
            yield batch
            batch = []
    if batch:
        yield batch


def _summary(run: Run, graded: int) -> GradeSummary:
    reasons = run.completions.read(["finish_reason"])["finish_reason"]
    verdicts = run.verdicts(GRADER_VERSION).read(["correct", "method"])
    return GradeSummary(
        graded=graded,
        total=len(reasons),
        correct=_count(verdicts["correct"]),
        no_answer=_count(pc.equal(verdicts["method"], "no answer")),
        truncated=_count(pc.equal(reasons, "length")),
    )


def _count(flags: pa.ChunkedArray) -> int:
    return int(pc.sum(flags, min_count=0).as_py())
