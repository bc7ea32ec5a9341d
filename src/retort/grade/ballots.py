"""A run's vote groups, stored beside its verdicts: for each key of a problem the group it is in.

They follow from the set of keys alone. A verdict has the key of its own answer, so verdicts do not
depend on the order in which they are made; which keys are equal is worked out at the end.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from retort import console
from retort.grade.answers import vote_key
from retort.grade.grader import Grader
from retort.grade.votes import grouped
from retort.store import Run
from retort.tables import Table

_PROBLEMS_AT_ONCE = 100
_BY_ALGEBRA = frozenset({"symbolic", "different", "timeout"})

Groups = dict[str, dict[str, str]]
"""problem_id -> key -> group."""


def prepare(run: Run, version: str) -> None:
    """From now on the run's votes are told by groups, and are incomplete until `update` is done."""
    votes = run.votes(version)
    if not votes.part_files():
        votes.replace([])


def recall(run: Run, version: str, grader: Grader, golds: dict[str, str]) -> None:
    """Keep to what is judged: an answer has one verdict on a problem, also if it took too long."""
    for row in _distinct(run, version, ["problem_id", "group", "method"]):
        if row["group"] is not None and row["method"] in _BY_ALGEBRA:
            grader.remember(golds[row["problem_id"]], row["group"], row["method"])


def update(run: Run, version: str, grader: Grader, golds: dict[str, str]) -> None:
    """Group the keys of those problems that have other keys than when they were grouped last.

    The correct ones are one group, named by the gold answer's key. The table is replaced after
    every few problems, so little is lost when this is interrupted.
    """
    votes = run.votes(version)
    keys, groups = _judged_keys(run, version), _stored(votes)
    stale = sorted(id for id in keys if keys[id].keys() != groups.get(id, {}).keys())
    if not stale:
        return
    with console.progress(
        f"vote groups of {run.name}", len(keys), "", len(keys) - len(stale)
    ) as advance:
        for ids in _chunks(stale):
            wrong = [[key for key, right in keys[id].items() if not right] for id in ids]
            found = grouped(grader.pool, wrong)
            for id, wrong_groups in zip(ids, found, strict=True):
                gold = vote_key(golds[id])
                right_groups = {key: str(gold) for key, right in keys[id].items() if right}
                groups[id] = right_groups | wrong_groups
            votes.replace(_rows(groups))
            advance(len(ids))


def _chunks(ids: list[str]) -> Iterator[list[str]]:
    return (ids[i : i + _PROBLEMS_AT_ONCE] for i in range(0, len(ids), _PROBLEMS_AT_ONCE))


def _judged_keys(run: Run, version: str) -> dict[str, dict[str, bool]]:
    """problem_id -> key -> whether it is correct."""
    keys: defaultdict[str, dict[str, bool]] = defaultdict(dict)
    for row in _distinct(run, version, ["problem_id", "group", "correct"]):
        if row["group"] is not None:
            keys[row["problem_id"]][row["group"]] = row["correct"]
    return keys


def _stored(votes: Table) -> Groups:
    groups: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for row in votes.read().to_pylist():
        groups[row["problem_id"]][row["key"]] = row["group"]
    return groups


def _distinct(run: Run, version: str, columns: list[str]) -> list[dict[str, Any]]:
    table: pa.Table = run.verdicts(version).read(columns)
    rows: list[dict[str, Any]] = (
        table.group_by(columns, use_threads=False).aggregate([]).to_pylist()
    )
    return rows


def _rows(groups: Groups) -> list[dict[str, Any]]:
    return [
        {"problem_id": id, "key": key, "group": group}
        for id in sorted(groups)
        for key, group in sorted(groups[id].items())
    ]
