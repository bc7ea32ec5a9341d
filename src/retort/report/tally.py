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
from pydantic import TypeAdapter, ValidationError

from retort.report.budget import Pace, TokenWork
from retort.report.metrics import VoteGroup
from retort.report.samples import KEYS, Aggregate, Samples, Scale, aggregated, by_problem
from retort.report.scheduler import Lengths, lengths
from retort.report.steps import StepTimes
from retort.report.timing import (
    mean_rows,
    pace,
    prefill_seconds,
    scoring_seconds,
    step_times,
    token_work,
)
from retort.store import SCORER, Run


@dataclass(frozen=True)
class Tally:
    """Counts of one run; problems in the order of their ids, so runs on the same ones line up.

    lengths_P: what the completions take in tokens. rows: tokens that a step wrote, in the mean.
    times: of the run's steps, by which a replay reckons; None where none were timed.
    decode_seconds: of all steps, as they were measured. token: what decoding one takes; None where
    the run does not say. prefill_seconds: of a problem's prompt. scoring_seconds: of a completion,
    by scorer.

    The last four are shares of completions: those that hit the length limit, those in which the
    grader found no answer, those that repeat another's text on the same problem, and those whose
    answer took the grader too long.
    """

    run: Run
    verdicts: str  # grader version
    problem_ids: tuple[str, ...]
    samples: int  # completions per problem
    correct_P: NDArray[np.int64]
    groups_P: tuple[tuple[VoteGroup, ...], ...]
    samples_P: tuple[Samples, ...]
    lengths_P: tuple[Lengths, ...]
    pace: Pace
    slots: int
    rows: float
    times: StepTimes | None
    decode_seconds: float
    token: TokenWork | None
    prefill_seconds: float
    scoring_seconds: dict[str, float]
    truncated: float
    unanswered: float
    duplicates: float
    timeouts: float


@dataclass(frozen=True)
class _Scorer:
    """What is read of a scorer's description."""

    scale: Scale


def tally(run: Run, version: str, aggregate: Aggregate = "last") -> Tally:
    """Count a run with the verdicts of one grader version, and the scores of all its scorers.

    aggregate: how the scores of a completion's steps become one.
    Raises ValueError when completions, verdicts or scores are missing, or nothing was timed.
    """
    ids = sorted(set(run.problems.read(["problem_id"])["problem_id"].to_pylist()))
    completions = _completions(run, ids)
    verdicts = _verdicts(run, version, completions)
    right = _by_problem(verdicts, ("correct", "sum"))
    timing = run.timing.read()
    return Tally(
        run=run,
        verdicts=version,
        problem_ids=tuple(ids),
        samples=run.manifest["n"],
        correct_P=np.array([right[id] for id in ids], dtype=np.int64),
        groups_P=_vote_groups(run, ids, verdicts),
        samples_P=by_problem(completions, verdicts, _scores(run, completions, aggregate)),
        lengths_P=lengths(completions),
        pace=pace(run, timing, completions),
        slots=pc.max(timing["slots"]).as_py(),
        rows=mean_rows(timing),
        times=step_times(run, timing),
        decode_seconds=pc.sum(timing["decode_seconds"]).as_py(),
        token=token_work(run),
        prefill_seconds=prefill_seconds(timing, completions),
        scoring_seconds=scoring_seconds(run),
        truncated=_share(completions["finish_reason"], "length"),
        unanswered=_share(verdicts["method"], "no answer"),
        duplicates=_duplicates(run),
        timeouts=_share(verdicts["method"], "timeout"),
    )


def common_version(runs: Sequence[Run]) -> str:
    """The newest grader version that has judged every run.

    Raises ValueError that names a run without completions or verdicts, or says that no version
    judged all.
    """
    for run in runs:
        if not run.completions.rows():
            raise ValueError(
                f"{run.folder} holds no completions yet; repeat its `retort sample` command "
                "(docs/sampling.md#stopping-and-going-on)"
            )
        if not run.verdict_versions():
            raise ValueError(
                f"{run.folder} is not graded; run `retort grade {run.folder}` (docs/grading.md)"
            )
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
            f"{len(there)} only in the second; sample both with the same "
            "`problems` (docs/report.md#comparisons)"
        )


# Counting


def _completions(run: Run, ids: list[str]) -> pa.Table:
    """The completions that the run is about, checked to be all there."""
    n = run.manifest["n"]
    columns = ["token_count", "prompt_tokens", "finish_reason", "logprob", "started"]
    table = run.completions.read([*KEYS, *columns])
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
    """The verdicts on these completions, checked to be all there; equal answers have one group."""
    judged = run.verdicts(version).read([*KEYS, "group", "correct", "method"])
    verdicts = judged.join(completions.select(KEYS), KEYS, join_type="left semi")
    if ungraded := completions.num_rows - verdicts.num_rows:
        raise ValueError(
            f"{run.folder}: {ungraded} completions are not graded; run `retort grade {run.folder}`"
        )
    return _grouped(run, version, verdicts)


def _grouped(run: Run, version: str, verdicts: pa.Table) -> pa.Table:
    """The verdicts with vote groups for keys, where the grader has worked out which are equal."""
    votes = run.votes(version)
    if not votes.part_files():
        return verdicts  # of a grader whose keys are its groups
    keyed = verdicts.rename_columns({"group": "key"})
    joined = keyed.join(votes.read(), ["problem_id", "key"], join_type="left outer")
    lacking = pc.and_(pc.is_valid(joined["key"]), pc.is_null(joined["group"]))
    if missing := pc.sum(lacking, min_count=0).as_py():
        raise ValueError(
            f"{run.folder}: {missing} answers have no vote group yet; "
            f"run `retort grade {run.folder}`"
        )
    return joined


def _scores(run: Run, completions: pa.Table, aggregate: Aggregate) -> dict[str, pa.Table]:
    """One score for each of these completions, by scorer, checked to be all there."""
    found = {}
    for name in run.score_names():
        values = aggregated(run.scores(name).read(), aggregate, scale(run, name))
        scored = values.join(completions.select(KEYS), KEYS, join_type="left semi")
        if missing := completions.num_rows - scored.num_rows:
            raise ValueError(
                f"{run.folder}: {missing} completions have no score by {name}; repeat its `retort "
                f"score` command, or delete {run.folder / f'scores-{name}'}"
            )
        found[name] = scored
    return found


def scale(run: Run, name: str) -> Scale:
    """What the scores of a scorer are. Raises ValueError where its description is damaged."""
    path = run.folder / f"scores-{name}" / SCORER
    try:
        return TypeAdapter(_Scorer).validate_json(path.read_bytes()).scale
    except ValidationError:
        raise ValueError(f"{path} is damaged; repeat the `retort score` command") from None


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
