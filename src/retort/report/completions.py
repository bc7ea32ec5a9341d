"""Completions to look at: numbers alone hide a model that is right for the wrong reason.

A page cannot hold all of a large run: it has problems evenly spaced by their ids, and the first
samples of each, the same for every model. Nobody picked them. Of a run only these are read, a part
at a time.

Shape suffixes: P problems, S samples.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retort.report.tally import Tally, scale
from retort.store import Run
from retort.tables import Table

Verdict = Literal["right", "wrong", "no answer", "cut off"]
Key = tuple[str, int]
Rows = dict[Key, dict[str, Any]]

VERDICTS: tuple[Verdict, ...] = ("right", "wrong", "no answer", "cut off")
PAGE_BYTES = 3_000_000
MOST = 6_000  # completions of all models together, read before the bytes are known
FEWEST_SAMPLES = 8  # of a problem, before problems are left out
SHOWN_CHARACTERS = 8_000  # of one completion; a runaway one would fill the page


@dataclass(frozen=True)
class Problem:
    """What was asked, and the right answer."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True)
class Completion:
    """One completion in its steps, which blank lines separate, with its verdict.

    problem: its place among those shown. answer: what the grader found; None for nothing. scores:
    by scorer, a probability for each step, one of the whole, or none where it could not be judged.
    """

    model: str
    problem: int
    sample: int
    steps: tuple[str, ...]
    tokens: int
    cut: bool
    answer: str | None
    right: bool
    method: str
    scores: Mapping[str, tuple[float, ...]]

    @property
    def verdict(self) -> Verdict:
        """Right, or why not."""
        if self.right:
            return "right"
        if self.cut:
            return "cut off"
        return "no answer" if self.answer is None else "wrong"


@dataclass(frozen=True)
class Completions:
    """What is shown, of how much: `samples` of `all_samples` completions on each problem."""

    problems: tuple[Problem, ...]
    all_problems: int
    samples: int
    all_samples: int
    completions: tuple[Completion, ...]


def completions(tallies: Sequence[Tally], size: int = PAGE_BYTES) -> Completions:
    """As many as `size` bytes of JSON hold, of each problem the first ones of each model."""
    samples, ids = _first_choice(tallies)
    every = [each for tally in tallies for each in _read(tally, ids, samples)]
    problems = _problems(tallies[0].run, ids)
    size_PS = np.zeros((len(ids), samples))
    for each in every:
        size_PS[each.problem, each.sample] += _size(each)
    size_PS[:, 0] += [_size(problem) for problem in problems]
    kept, samples = _fitting(size_PS, size)
    place = {at: i for i, at in enumerate(kept)}
    return Completions(
        problems=tuple(problems[at] for at in kept),
        all_problems=len(tallies[0].problem_ids),
        samples=samples,
        all_samples=min(tally.samples for tally in tallies),
        completions=tuple(
            replace(each, problem=place[each.problem])
            for each in every
            if each.problem in place and each.sample < samples
        ),
    )


# Choosing


def _first_choice(tallies: Sequence[Tally]) -> tuple[int, list[str]]:
    """Samples of each problem, and ids of problems, such that all models have at most `MOST`."""
    ids = tallies[0].problem_ids
    most = max(1, MOST // len(tallies))
    available = min(tally.samples for tally in tallies)
    samples = min(available, max(FEWEST_SAMPLES, most // len(ids)))
    count = min(len(ids), max(1, most // samples))
    return samples, [ids[i] for i in spaced(len(ids), count)]


def spaced(total: int, count: int) -> list[int]:
    """`count` of `total` places, evenly spaced, both ends among them."""
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _fitting(size_PS: np.ndarray[Any, Any], size: int) -> tuple[list[int], int]:
    """Fewer samples first, down to `FEWEST_SAMPLES`, and then fewer problems."""
    problems, samples = size_PS.shape
    while samples > FEWEST_SAMPLES and size_PS[:, :samples].sum() > size:
        samples -= 1
    count = problems
    while count > 1 and size_PS[spaced(problems, count), :samples].sum() > size:
        count -= 1
    return spaced(problems, count), samples


def _size(value: Problem | Completion) -> int:
    return len(json.dumps(asdict(value), ensure_ascii=False).encode())


# Reading


def _problems(run: Run, ids: Sequence[str]) -> list[Problem]:
    found = {
        row["problem_id"]: Problem(row["problem_id"], row["question"], row["answer"])
        for part in run.problems.parts()
        for row in part.filter(pc.is_in(part["problem_id"], pa.array(ids))).to_pylist()
    }
    return [found[id] for id in ids]


def _read(tally: Tally, ids: Sequence[str], samples: int) -> Iterator[Completion]:
    run, place = tally.run, {id: i for i, id in enumerate(ids)}
    texts = _rows(run.completions, ["text", "token_count", "finish_reason"], ids, samples)
    verdicts = _rows(run.verdicts(tally.verdicts), ["answer", "correct", "method"], ids, samples)
    scores = {name: _scores(run, name, ids, samples) for name in run.score_names()}
    for key in sorted(texts):
        row, verdict = texts[key], verdicts[key]
        yield Completion(
            model=run.name,
            problem=place[key[0]],
            sample=key[1],
            steps=tuple(_steps(_shortened(row["text"]))),
            tokens=row["token_count"],
            cut=row["finish_reason"] == "length",
            answer=verdict["answer"],
            right=verdict["correct"],
            method=verdict["method"],
            scores={name: found[key] for name, found in scores.items()},
        )


def _rows(table: Table, columns: list[str], ids: Sequence[str], samples: int) -> Rows:
    rows: Rows = {}
    for part in table.parts(["problem_id", "sample_idx", *columns]):
        known = pc.is_in(part["problem_id"], pa.array(ids))
        wanted = pc.and_(known, pc.less(part["sample_idx"], samples))
        for row in part.filter(wanted).to_pylist():
            rows[row["problem_id"], row["sample_idx"]] = row
    return rows


def _scores(run: Run, name: str, ids: Sequence[str], samples: int) -> dict[Key, tuple[float, ...]]:
    logits = scale(run, name) == "logit"
    rows = _rows(run.scores(name), ["scores"], ids, samples)
    return {key: tuple(_probability(x, logits) for x in row["scores"]) for key, row in rows.items()}


def _probability(score: float, logit: bool) -> float:
    """Rounded to what is shown."""
    return round(0.5 * (1 + math.tanh(score / 2)) if logit else score, 3)


def _steps(text: str) -> list[str]:
    """What blank lines separate, as reward models of steps read it."""
    return [step.strip() for step in re.split(r"\n\s*\n", text) if step.strip()]


def _shortened(text: str) -> str:
    left_out = len(text) - SHOWN_CHARACTERS
    return text if left_out <= 0 else f"{text[:SHOWN_CHARACTERS]} […{left_out} more characters]"
