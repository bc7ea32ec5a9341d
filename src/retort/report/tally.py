"""What a graded run folder holds, counted.

Memory is bounded by the number of completions, not their length: texts are read a part at a time.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from retort.report.budget import Pace
from retort.report.metrics import VoteGroup
from retort.store import Run


@dataclass(frozen=True)
class Tally:
    """Counts of one run; problems in the order of their ids, so runs on the same ones line up.

    The last three are shares of completions: those that hit the length limit, those in which the
    grader found no answer, and those that repeat another's text on the same problem.
    """

    run: Run
    verdicts: str  # grader version
    problem_ids: tuple[str, ...]
    samples: int  # completions per problem
    correct_P: NDArray[np.int64]
    groups_P: tuple[tuple[VoteGroup, ...], ...]
    pace: Pace
    slots: int
    truncated: float
    unanswered: float
    duplicates: float


def tally(run: Run, version: str) -> Tally:
    """Count a run with the verdicts of one grader version.

    Raises ValueError when completions or verdicts are missing, or nothing was timed.
    """
    with duckdb.connect() as db:
        _load(db, run, version)
        _check_complete(db, run)
        _check_graded(db, run)
        return Tally(
            run=run,
            verdicts=version,
            problem_ids=tuple(id for (id,) in _rows(db, PROBLEM_IDS)),
            samples=run.manifest["n"],
            correct_P=np.array([count for _, count in _rows(db, CORRECT)], dtype=np.int64),
            groups_P=_vote_groups(db, run),
            pace=_pace(db, run),
            slots=_value(db, "SELECT max(slots) FROM timing"),
            truncated=_value(db, TRUNCATED),
            unanswered=_value(db, UNANSWERED),
            duplicates=_duplicates(run),
        )


def common_version(runs: Sequence[Run]) -> str:
    """The newest grader version that has judged every run.

    Raises ValueError that names a run without verdicts, or says that no version judged all.
    """
    for run in runs:
        if not run.verdict_versions():
            raise ValueError(f"{run.folder} is not graded; run `retort grade {run.folder}`")
    shared = set.intersection(*(set(run.verdict_versions()) for run in runs))
    if not shared:
        judged = ", ".join(f"{run.folder} by {'/'.join(run.verdict_versions())}" for run in runs)
        raise ValueError(
            f"no grader version judged every run ({judged}); run `retort grade FOLDER` on each"
        )
    return max(shared, key=lambda version: (len(version), version))  # "10" is newer than "9"


def check_comparable(tallies: Sequence[Tally]) -> None:
    """ValueError unless all runs answered the same problems, under names that tell them apart."""
    names = Counter(tally.run.name for tally in tallies)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} runs are named {name!r}; give each its own `name` when sampling")
    for other in tallies[1:]:
        _check_same_problems(tallies[0], other)


def _check_same_problems(first: Tally, other: Tally) -> None:
    here, there = set(first.problem_ids), set(other.problem_ids)
    if here != there:
        raise ValueError(
            f"{first.run.folder} and {other.run.folder} answer different problems: "
            f"{len(here - there)} of {len(here)} are only in the first, {len(there - here)} of "
            f"{len(there)} only in the second; sample both with the same `problems`"
        )


# Queries

# A run that was continued with a smaller n holds more samples than it is about.
COMPLETIONS = """
    CREATE TABLE completions AS
    SELECT * FROM sampled SEMI JOIN problems USING (problem_id) WHERE sample_idx < {n}
"""
VERDICTS = """
    CREATE TABLE verdicts AS
    SELECT * FROM judged SEMI JOIN completions USING (problem_id, sample_idx)
"""
MISSING = """
    SELECT count(*), sum({n} - present)::BIGINT FROM (
        SELECT problem_id, count(sample_idx) AS present
        FROM problems LEFT JOIN completions USING (problem_id) GROUP BY problem_id
    ) WHERE present < {n}
"""
UNGRADED = "SELECT count(*) FROM completions ANTI JOIN verdicts USING (problem_id, sample_idx)"
PROBLEM_IDS = "SELECT problem_id FROM problems ORDER BY problem_id"
CORRECT = """
    SELECT problem_id, count(*) FILTER (correct) FROM verdicts
    GROUP BY problem_id ORDER BY problem_id
"""
GROUPS = """
    SELECT problem_id, "group", count(*), min(correct), max(correct) FROM verdicts
    WHERE "group" IS NOT NULL GROUP BY problem_id, "group" ORDER BY problem_id, "group"
"""
PACE = """
    SELECT sum(decode_tokens)::DOUBLE, sum(decode_seconds),
           (SELECT avg(token_count) FROM completions) FROM timing
"""
TRUNCATED = "SELECT avg((finish_reason = 'length')::INT) FROM completions"
UNANSWERED = "SELECT avg((method = 'no answer')::INT) FROM verdicts"


def _load(db: duckdb.DuckDBPyConnection, run: Run, version: str) -> None:
    """Tables problems, timing, completions and verdicts."""
    keys = ["problem_id", "sample_idx"]
    db.register("problems", run.problems.read(["problem_id"]))
    db.register("timing", run.timing.read())
    db.register("sampled", run.completions.read([*keys, "token_count", "finish_reason"]))
    db.register("judged", run.verdicts(version).read([*keys, "group", "correct", "method"]))
    db.execute(COMPLETIONS.format(n=int(run.manifest["n"])))
    db.execute(VERDICTS)


def _rows(db: duckdb.DuckDBPyConnection, query: str) -> list[tuple[Any, ...]]:
    return db.execute(query).fetchall()


def _value(db: duckdb.DuckDBPyConnection, query: str) -> Any:
    return _rows(db, query)[0][0]


def _check_complete(db: duckdb.DuckDBPyConnection, run: Run) -> None:
    n = run.manifest["n"]
    problems = _value(db, "SELECT count(*) FROM problems")
    if not problems:
        raise ValueError(f"{run.folder} holds no problems; `retort sample` puts them there")
    short, missing = _rows(db, MISSING.format(n=int(n)))[0]
    if short:
        raise ValueError(
            f"{run.folder}: {short} of {problems} problems lack some of their {n} completions "
            f"({missing} in all); repeat its `retort sample` command, which makes what is missing"
        )


def _check_graded(db: duckdb.DuckDBPyConnection, run: Run) -> None:
    if ungraded := _value(db, UNGRADED):
        raise ValueError(
            f"{run.folder}: {ungraded} completions are not graded; run `retort grade {run.folder}`"
        )


def _vote_groups(db: duckdb.DuckDBPyConnection, run: Run) -> tuple[tuple[VoteGroup, ...], ...]:
    groups: dict[str, list[VoteGroup]] = {id: [] for (id,) in _rows(db, PROBLEM_IDS)}
    for problem, key, size, all_right, any_right in _rows(db, GROUPS):
        if all_right != any_right:
            raise ValueError(
                f"{run.folder}: on problem {problem} the answer {key!r} is judged both right and "
                "wrong; delete its verdicts and grade it again"
            )
        groups[problem].append(VoteGroup(size, all_right))
    return tuple(map(tuple, groups.values()))


def _pace(db: duckdb.DuckDBPyConnection, run: Run) -> Pace:
    tokens, seconds, mean_tokens = _rows(db, PACE)[0]
    if not tokens or not seconds:
        raise ValueError(
            f"{run.folder} holds no decode times, so seconds are unknown; sample it again "
            "with force=true"
        )
    return Pace(tokens / seconds, mean_tokens)


def _duplicates(run: Run) -> float:
    """Share of completions whose text an earlier one on the same problem has already."""
    seen: defaultdict[str, set[bytes]] = defaultdict(set)
    total = 0
    for part in run.completions.parts(["problem_id", "text"]):
        total += part.num_rows
        pairs = zip(part["problem_id"].to_pylist(), part["text"].to_pylist(), strict=True)
        for problem, text in pairs:
            seen[problem].add(hashlib.blake2b(text.encode(), digest_size=16).digest())
    return 1 - sum(map(len, seen.values())) / total
