"""The samples of each problem as arrays: their vote groups, verdicts and scores.

Shape suffixes: C completions of a run, N samples of one problem, P problems.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from retort.report.metrics import Floats

Aggregate = Literal["last", "min", "prod", "mean"]
"""How the scores of a completion's steps become one."""

Scale = Literal["probability", "logit"]

SILENT = -1
KEYS = ["problem_id", "sample_idx"]

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Samples:
    """One problem's samples, in the order of their numbers.

    group_N: vote groups, numbered from 0; `SILENT` where no answer was found.
    confidence_N: the geometric mean of the probabilities that the model gave to its tokens.
    scores: by scorer, in [0, 1]; NaN where a completion could not be scored.
    """

    group_N: Ints
    correct_N: Bools
    confidence_N: Floats
    scores: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def groups(self) -> list[int | None]:
        """The vote groups as estimators take them: None for silence."""
        return [None if group == SILENT else group for group in self.group_N.tolist()]

    def of_voters(self, score_N: Floats) -> Floats:
        """The scores, NaN for samples that found no answer: they are never chosen."""
        return np.where(self.group_N == SILENT, np.nan, score_N)


def by_problem(
    completions: pa.Table, verdicts: pa.Table, scores: Mapping[str, pa.Table]
) -> tuple[Samples, ...]:
    """A run's samples, problems in the order of their ids.

    completions: KEYS, token_count, logprob. verdicts: KEYS, group, correct. scores: by scorer, KEYS
    and `value`. All tables hold the same keys, once each.
    """
    order = [(name, "ascending") for name in KEYS]
    completions, verdicts = completions.sort_by(order), verdicts.sort_by(order)
    ids = completions["problem_id"].to_numpy()
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    bounds = [*starts.tolist(), len(ids)]
    group_C = _codes(verdicts["group"])
    correct_C = verdicts["correct"].to_numpy()
    logprob_C, count_C = (completions[name].to_numpy() for name in ("logprob", "token_count"))
    confidence_C = np.exp(logprob_C / np.maximum(count_C, 1))
    score_C = {name: table.sort_by(order)["value"].to_numpy() for name, table in scores.items()}
    return tuple(
        Samples(
            _renumbered(group_C[start:stop]),
            correct_C[start:stop],
            confidence_C[start:stop],
            {name: values_C[start:stop] for name, values_C in score_C.items()},
        )
        for start, stop in pairwise(bounds)
    )


def aggregated(table: pa.Table, aggregate: Aggregate, scale: Scale) -> pa.Table:
    """Scores of steps as one `value` in [0, 1] for each completion; NaN where there is none.

    Logits become probabilities by the sigmoid first, since weights must not be negative.
    """
    lists = table["scores"].combine_chunks()
    step_S = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    if scale == "logit":
        step_S = 0.5 * (1 + np.tanh(step_S / 2))
    size_C = np.asarray(lists.value_lengths())
    value_C = np.full(len(size_C), np.nan)
    some_C = size_C > 0
    if some_C.any():
        value_C[some_C] = _reduced(step_S, size_C[some_C], aggregate)
    return table.select(KEYS).append_column("value", pa.array(value_C))


def _reduced(step_S: Floats, size_C: Ints, aggregate: Aggregate) -> Floats:
    ends_C = np.cumsum(size_C)
    starts_C = ends_C - size_C
    match aggregate:
        case "last":
            return step_S[ends_C - 1]
        case "min":
            return np.minimum.reduceat(step_S, starts_C)
        case "prod":
            return np.multiply.reduceat(step_S, starts_C)
        case "mean":
            return np.add.reduceat(step_S, starts_C) / size_C


def _codes(groups: pa.ChunkedArray) -> Ints:
    indices = groups.combine_chunks().dictionary_encode().indices
    return np.asarray(indices.fill_null(SILENT), dtype=np.int64)


def _renumbered(group_N: Ints) -> Ints:
    """The groups of one problem from 0, in the order of their first sample; silence stays."""
    numbers: dict[int, int] = {}
    return np.array(
        [SILENT if g == SILENT else numbers.setdefault(g, len(numbers)) for g in group_N.tolist()],
        dtype=np.int64,
    )
