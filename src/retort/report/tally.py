"""What a graded run folder holds, counted.

Memory is bounded by the number of completions, not their length: texts are read a part at a time.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from retort.report.budget import Pace
from retort.report.metrics import VoteGroup
from retort.store import Run

KEYS = ["problem_id", "sample_idx"]


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
    ids = sorted(set(run.problems.read(["problem_id"])["problem_id"].to_pylist()))
    completions = _completions(run, ids)
    verdicts = _verdicts(run, version, completions)
    right = _by_problem(verdicts, ("correct", "sum"))
    return Tally(
        run=run,
        verdicts=version,
        problem_ids=tuple(ids),
        samples=run.manifest["n"],
        correct_P=np.array([right[id] for id in ids], dtype=np.int64),
        groups_P=_vote_groups(run, ids, verdicts),
        pace=_pace(run, completions),
        slots=pc.max(run.timing.read(["slots"])["slots"]).as_py(),
        truncated=_share(completions["finish_reason"], "length"),
        unanswered=_share(verdicts["method"], "no answer"),
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


# Counting


def _completions(run: Run, ids: list[str]) -> pa.Table:
    """The completions that the run is about, checked to be all there."""
    n = run.manifest["n"]
    table = run.completions.read([*KEYS, "token_count", "finish_reason"])
    # a run that was continued with a smaller n, or fewer problems, holds more than it is about
    known = pc.is_in(table["problem_id"], pa.array(ids, pa.string()))
    table = table.filter(pc.and_(known, pc.less(table["sample_idx"], n)))
    _check_complete(run, ids, _by_problem(table, ("sample_idx", "count")))
    return table


def _check_complete(run: Run, ids: list[str], present: dict[str, int]) -> None:
    if not ids:
        raise ValueError(f"{run.folder} holds no problems; `retort sample` puts them there")
    n = run.manifest["n"]
    missing = [n - present.get(id, 0) for id in ids if present.get(id, 0) < n]
    if missing:
        raise ValueError(
            f"{run.folder}: {len(missing)} of {len(ids)} problems lack some of their {n} "
            f"completions ({sum(missing)} in all); repeat its `retort sample` command, which makes "
            "what is missing"
        )


def _verdicts(run: Run, version: str, completions: pa.Table) -> pa.Table:
    """The verdicts on these completions, checked to be all there."""
    judged = run.verdicts(version).read([*KEYS, "group", "correct", "method"])
    verdicts = judged.join(completions.select(KEYS), KEYS, join_type="left semi")
    if ungraded := completions.num_rows - verdicts.num_rows:
        raise ValueError(
            f"{run.folder}: {ungraded} completions are not graded; run `retort grade {run.folder}`"
        )
    return verdicts


def _by_problem(table: pa.Table, aggregation: tuple[str, str]) -> dict[str, int]:
    counts = table.group_by("problem_id", use_threads=False).aggregate([aggregation])
    values = counts["_".join(aggregation)].to_pylist()
    return dict(zip(counts["problem_id"].to_pylist(), values, strict=True))


def _vote_groups(run: Run, ids: list[str], verdicts: pa.Table) -> tuple[tuple[VoteGroup, ...], ...]:
    votes = verdicts.filter(pc.is_valid(verdicts["group"]))
    counted = votes.group_by(["problem_id", "group"], use_threads=False).aggregate(
        [("group", "count"), ("correct", "all"), ("correct", "any")]
    )
    groups: dict[str, list[VoteGroup]] = {id: [] for id in ids}
    for row in counted.to_pylist():
        if row["correct_all"] != row["correct_any"]:
            raise ValueError(
                f"{run.folder}: on problem {row['problem_id']} the answer {row['group']!r} is "
                "judged both right and wrong; delete its verdicts and grade it again"
            )
        groups[row["problem_id"]].append(VoteGroup(row["group_count"], row["correct_all"]))
    return tuple(map(tuple, groups.values()))


def _pace(run: Run, completions: pa.Table) -> Pace:
    timing = run.timing.read(["decode_tokens", "decode_seconds"])
    tokens, seconds = (pc.sum(column).as_py() for column in timing.itercolumns())
    if not tokens or not seconds:
        raise ValueError(
            f"{run.folder} holds no decode times, so seconds are unknown; sample it again "
            "with force=true"
        )
    return Pace(tokens / seconds, pc.mean(completions["token_count"]).as_py())


def _share(column: pa.ChunkedArray, value: str) -> float:
    return float(pc.mean(pc.equal(column, value)).as_py())


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
