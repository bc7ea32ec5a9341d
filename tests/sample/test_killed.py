"""A run that is killed again and again ends as one that nobody touched."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.sample import killed
from tests.train.processes import forks

from retort.grade import GRADER_VERSION
from retort.grade.run import grade
from retort.recipe import SampleRecipe, load
from retort.sample.run import sample
from retort.store import Run

KILLS = 20
TIMES = {"batch", "started", "ended"}
"""What may differ: where a completion was written, and when it ran."""


def contents(folder: Path) -> list[dict[str, Any]]:
    """Completions and verdicts by key, less times; log-probabilities as far as they are the same
    in any batch.
    """
    run = Run.open(folder)
    rows = []
    for table in (run.completions, run.verdicts(GRADER_VERSION)):
        found = [
            {name: value for name, value in row.items() if name not in TIMES}
            | ({"logprob": round(row["logprob"], 3)} if "logprob" in row else {})
            for row in table.read().to_pylist()
        ]
        rows += sorted(found, key=lambda row: (row["problem_id"], row["sample_idx"]))
    return rows


def sampled(folder: Path) -> int:
    """How many completions there are."""
    return Run.open(folder).completions.rows() if (folder / "run.json").is_file() else 0


@pytest.mark.multiprocess
def test_killed_twenty_times_at_random(settings: list[str], tmp_path: Path) -> None:
    def asked(name: str, n: int) -> SampleRecipe:
        return load(SampleRecipe, [*settings, f"out={tmp_path / name}", f"sampling.n={n}"])

    moments, n, kills, while_grading = random.Random(1), 2, 0, 0
    while kills < KILLS:
        recipe = asked("killed", n)
        arguments = [recipe.model_dump_json(), moments.randint(1, 30)]
        process = forks().Process(target=killed.run, args=arguments)
        process.start()
        process.join(120)
        if process.exitcode == 0:  # it came to its end before the moment did: ask for more
            n += 2
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        while_grading += sampled(recipe.out) == 4 * n
    assert 3 <= while_grading <= KILLS - 3, "kills of one kind show half"
    grade(sample(asked("killed", n)))
    grade(sample(asked("undisturbed", n)))
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    leftovers = {path.name for path in (tmp_path / "killed").rglob("*")}
    assert not [name for name in leftovers if name.endswith((".tmp", ".damaged"))]
