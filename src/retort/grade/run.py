"""Verdicts on a run's completions, stored beside them; grading never touches the completions."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from retort import console, interrupts
from retort.grade import ballots
from retort.grade.answers import GRADER_VERSION, Verdict
from retort.grade.grader import Grader
from retort.store import Run
from retort.tables import row_keys

ROWS_PER_PART = 20_000
FLUSH_SECONDS = 20.0
"""A killed run has to grade again at most this much."""
_ROWS_AT_ONCE = 1_000  # whose algebra is done together

Completion = tuple[tuple[str, int], str]
"""((problem_id, sample_idx), text)."""


@dataclass(frozen=True)
class GradeSummary:
    """graded: verdicts this call added. The rest counts the whole run: completions, those that are
    correct, those without an answer, those cut off by the length limit, and those whose answer
    took too long to compare."""

    graded: int
    total: int
    correct: int
    no_answer: int
    truncated: int
    timeouts: int


def grade(folder: Path, grader: Grader | None = None) -> GradeSummary:
    """Grade the completions of a run that have no verdict of this grader version yet.

    What is judged is written whatever ends the grading, and the same call goes on from there.
    Memory holds one part of completions, the keys that are done and one part of verdicts.
    Raises ValueError when the folder is no run, is being written by another process, or holds a
    completion whose problem it does not know.
    """
    run = Run.open(folder)
    if grader is None:
        with Grader() as own:
            return grade(folder, own)
    with run.lock():
        _set_damaged_aside(run)
        ballots.prepare(run, GRADER_VERSION)
        graded = _grade_missing(run, grader)
        ballots.update(run, GRADER_VERSION, grader, _golds(run))
        return _summary(run, graded)


def _set_damaged_aside(run: Run) -> None:
    """What damaged parts held is missing now, and is made again."""
    for table in (run.verdicts(GRADER_VERSION), run.votes(GRADER_VERSION)):
        for path in table.set_aside_damaged():
            console.warn(f"{path}: a damaged part, set aside; what it held is judged again")


def _grade_missing(run: Run, grader: Grader) -> int:
    verdicts = run.verdicts(GRADER_VERSION)
    done = verdicts.keys()
    total = run.completions.read(["sample_idx"]).num_rows
    if len(done) == total:
        return 0
    golds = _golds(run)
    ballots.recall(run, GRADER_VERSION, grader, golds)
    graded = 0
    with console.progress(f"grade {run.name}", total, "", len(done)) as advance:
        for rows in _flushes(_judged(run, grader, golds, done)):
            with interrupts.held_back():
                verdicts.append([row for each in rows for row in each])
            count = sum(map(len, rows))
            graded += count
            advance(count)
    return graded


def _judged(
    run: Run, grader: Grader, golds: dict[str, str], done: set[tuple[str, int]]
) -> Iterator[list[dict[str, Any]]]:
    for some in _chunks(run, done):
        pairs = [(_gold(golds, key[0], run.folder), text) for key, text in some]
        verdicts = grader.grade(pairs)
        yield [_row(key, verdict) for (key, _), verdict in zip(some, verdicts, strict=True)]


def _chunks(run: Run, done: set[tuple[str, int]]) -> Iterator[list[Completion]]:
    """Completions without a verdict, some at a time; a part is read once."""
    some: list[Completion] = []
    for part in run.completions.parts(["problem_id", "sample_idx", "text"]):
        for key, text in zip(row_keys(part), part["text"], strict=True):
            if key not in done:
                some.append((key, text.as_py()))
            if len(some) == _ROWS_AT_ONCE:
                yield some
                some = []
    if some:
        yield some


def _flushes(chunks: Iterator[list[dict[str, Any]]]) -> Iterator[list[list[dict[str, Any]]]]:
    """Chunks to be written together. What is judged is handed out whatever ends the grading."""
    ready: list[list[dict[str, Any]]] = []
    flushed = time.monotonic()
    try:
        for rows in chunks:
            ready.append(rows)
            late = time.monotonic() - flushed > FLUSH_SECONDS
            if late or sum(map(len, ready)) >= ROWS_PER_PART:
                yield ready
                ready, flushed = [], time.monotonic()
    except (Exception, KeyboardInterrupt):
        if ready:
            yield ready
        raise
    if ready:
        yield ready


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


def _summary(run: Run, graded: int) -> GradeSummary:
    reasons = run.completions.read(["finish_reason"])["finish_reason"]
    verdicts = run.verdicts(GRADER_VERSION).read(["correct", "method"])
    return GradeSummary(
        graded=graded,
        total=len(reasons),
        correct=_count(verdicts["correct"]),
        no_answer=_count(pc.equal(verdicts["method"], "no answer")),
        truncated=_count(pc.equal(reasons, "length")),
        timeouts=_count(pc.equal(verdicts["method"], "timeout")),
    )


def _count(flags: pa.ChunkedArray) -> int:
    return int(pc.sum(flags, min_count=0).as_py())
