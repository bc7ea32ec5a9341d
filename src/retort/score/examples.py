"""What a verifier learns from: the graded completions of a run, each different text once."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from retort.grade import GRADER_VERSION
from retort.score.reading import Reading
from retort.store import Run
from retort.tables import row_keys

Text = tuple[str, str]
"""A completion's problem and what it says."""

SHARES = (0.6, 0.2)
"""Of the problems, those to fit with and those to calibrate with; the rest are held out."""


@dataclass(frozen=True)
class Example:
    """A text, how often it was sampled, and for each position of its reading the share of right
    answers that follow.
    """

    problem_id: str
    reading: Reading
    labels: list[float]
    weight: int


def graded(run: Run) -> dict[Text, tuple[int, bool]]:
    """How often each text was sampled, and whether its answer is right.

    Raises ValueError when completions have no verdict of this grader version.
    """
    correct: dict[tuple[str, int], bool] = {}
    verdicts = run.verdicts(GRADER_VERSION)
    for part in verdicts.parts(["problem_id", "sample_idx", "correct"]):
        correct |= zip(row_keys(part), part["correct"].to_pylist(), strict=True)
    count, right = Counter[Text](), dict[Text, bool]()
    for key, text in _texts(run):
        if key not in correct:
            raise ValueError(
                f"{run.folder}: completions without a verdict; `retort grade {run.folder}` first "
                "(docs/scoring.md#a-verifier-of-ones-own)"
            )
        count[text] += 1
        right[text] = correct[key]
    return {text: (n, right[text]) for text, n in count.items()}


def _texts(run: Run) -> Iterator[tuple[tuple[str, int], Text]]:
    for part in run.completions.parts(["problem_id", "sample_idx", "text"]):
        for key, text in zip(row_keys(part), part["text"].to_pylist(), strict=True):
            yield key, (key[0], text)


def first_texts(texts: Sequence[Text], count: int) -> list[Text]:
    """At most so many texts of each problem."""
    taken: dict[str, list[Text]] = defaultdict(list)
    for text in texts:
        if len(taken[text[0]]) < count:
            taken[text[0]].append(text)
    return [text for each in taken.values() for text in each]


def split_by_problem(examples: Sequence[Example], seed: int) -> list[list[Example]]:
    """To fit, to calibrate and to judge with: no problem is in two of them, so that what is learnt
    of a problem does not look like knowledge.
    """
    ids = sorted({each.problem_id for each in examples})
    random.Random(seed).shuffle(ids)
    first = round(SHARES[0] * len(ids))
    second = first + round(SHARES[1] * len(ids))
    part: Mapping[str, int] = {id: (i >= first) + (i >= second) for i, id in enumerate(ids)}
    return [[each for each in examples if part[each.problem_id] == i] for i in range(3)]
