"""A few completions to look at: numbers alone hide a model that is right for the wrong reason."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from retort.report.curves import Example, Shown
from retort.report.tally import Tally
from retort.tables import Table

SHOWN_CHARACTERS = 8000  # of one completion; a runaway one would fill the page


def examples(tallies: Sequence[Tally]) -> tuple[Example, ...]:
    """The first, middle and last problem by id with each model's sample 0: nobody picked them."""
    ids = tallies[0].problem_ids
    chosen = sorted({ids[0], ids[len(ids) // 2], ids[-1]})
    problems = _by_problem(tallies[0].run.problems, chosen)
    shown = [_first_completions(tally, chosen) for tally in tallies]
    return tuple(
        Example(
            id, problems[id]["question"], problems[id]["answer"], tuple(each[id] for each in shown)
        )
        for id in chosen
    )


def _first_completions(tally: Tally, chosen: Sequence[str]) -> dict[str, Shown]:
    completions = _by_problem(tally.run.completions, chosen, sample=0)
    verdicts = _by_problem(tally.run.verdicts(tally.verdicts), chosen, sample=0)
    return {id: _shown(tally.run.name, completions[id], verdicts[id]) for id in chosen}


def _shown(name: str, completion: Mapping[str, Any], verdict: Mapping[str, Any]) -> Shown:
    return Shown(
        name=name,
        text=_shortened(completion["text"]),
        token_count=completion["token_count"],
        finish_reason=completion["finish_reason"],
        answer=verdict["answer"],
        correct=verdict["correct"],
    )


def _shortened(text: str) -> str:
    left_out = len(text) - SHOWN_CHARACTERS
    return text if left_out <= 0 else f"{text[:SHOWN_CHARACTERS]} […{left_out} more characters]"


def _by_problem(
    table: Table, chosen: Sequence[str], sample: int | None = None
) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for part in table.parts():
        wanted = pc.is_in(part["problem_id"], pa.array(chosen))
        if sample is not None:
            wanted = pc.and_(wanted, pc.equal(part["sample_idx"], sample))
        rows |= {row["problem_id"]: row for row in part.filter(wanted).to_pylist()}
    return rows
