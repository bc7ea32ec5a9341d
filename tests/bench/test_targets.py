"""Targets: ratios of what was measured beside each other, met or missed."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from retort.bench import llama_cpp, operators
from retort.bench import targets as measuring
from retort.bench.contenders import Case, Timed
from retort.bench.head import Head
from retort.bench.models import Model
from retort.bench.spans import Protocol
from retort.bench.targets import Settings, Target, Targets, targets
from retort.bench.views import of_targets


def test_every_target_is_measured_or_says_why(
    models: list[Model], top: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "SCAN", (16, 4))
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    brief = Settings(batch=2, steps=4, repeats=1, n=3)
    attention, mamba, _ = models
    *_, result = targets(attention, mamba, brief, top)
    assert result.complete
    least = [3, 5, 2, 2.5, 3, 5, 2]
    assert [each.at_least for each in result.targets] == least
    assert [each.measured is None for each in result.targets] == [
        False, False, True, False, False, False, False,
    ]  # fmt: skip
    assert "pip install llama-cpp-python" in result.targets[2].how
    assert result.targets[4].measured == 3, "three completions, one prompt"
    assert json.loads(json.dumps(asdict(result)))["settings"]["batch"] == 2


class Fake:
    """Takes the seconds that it is told for each span."""

    def __init__(self, model: Model, name: str, seconds: list[float]) -> None:
        self.model, self.name, self.seconds = model, name, iter([0.0, *seconds])

    def read(self, length: int) -> None:
        """A prompt."""

    def decode(self, case: Case, prompt: None) -> Timed:
        assert case.batch == 5
        return Timed(next(self.seconds), None)


def test_ratios_are_of_the_same_repeat(models: list[Model]) -> None:
    ours: Any = Fake(models[0], "ours", [1.0, 2.0, 4.0])
    theirs: Any = Fake(models[0], "theirs", [3.0, 8.0, 10.0])
    asked, settings = Target("what", 3.5, "how"), Settings(batch=5, repeats=3)
    found = measuring._decoded(
        asked, ours, theirs, Protocol(4, 2, 2), settings, lambda *_, **__: None
    )
    assert found.runs == (3.0, 4.0, 2.5)
    assert found.measured == 3.0
    assert found.met is False
    assert found.seconds == {"ours": [[1.0], [2.0], [4.0]], "theirs": [[3.0], [8.0], [10.0]]}
    assert found.how == "batch 5, how"


@pytest.mark.parametrize(("measured", "word"), [(5.0, "met"), (4.99, "missed"), (None, "-")])
def test_met_or_missed(top: Head, measured: float | None, word: str) -> None:
    target = Target("what", 5.0, "how", measured)
    assert target.met is {"met": True, "missed": False, "-": None}[word]
    (grid,) = of_targets(Targets(top, Settings(), (target,))).grids
    cells = {column.heading: column.cells[0] for column in grid.columns}
    assert cells[""] == word
    assert cells["target"] == "5x"
    assert cells["measured"] == ("-" if measured is None else f"{measured:.2f}x")


def test_out_of_memory_is_no_ratio(models: list[Model]) -> None:
    ours: Any = Fake(models[0], "ours", [1.0])
    theirs: Any = Fake(models[0], "theirs", [1.0])
    theirs.decode = lambda case, prompt: (_ for _ in ()).throw(MemoryError)
    asked, settings = Target("what", 3.5, "how"), Settings(batch=5, repeats=1)
    found = measuring._decoded(
        asked, ours, theirs, Protocol(4, 2, 2), settings, lambda *_, **__: None
    )
    assert found.met is None
    assert found.how.startswith("not measured: out of memory")


def test_speedup_is_the_median_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 9.0, 1.0, 4.0, 2.0, 6.0, 1.0, 5.0])
    monkeypatch.setattr(operators, "timed", lambda step, device: next(seconds))
    sizes = iter([10, 40])
    monkeypatch.setattr(operators, "peak_bytes", lambda step: next(sizes))
    found = operators.compare(lambda: None, lambda: None, repeats=3)
    assert found.speedup == 4.0
    assert (found.seconds, found.plain_seconds) == (1.0, 5.0)
    assert found.memory_ratio == 0.25


def test_scans_do_the_same_work() -> None:
    chunked, sequential = operators.scans(32, 8)
    assert 0 < operators.peak_bytes(chunked) < operators.peak_bytes(sequential)


def test_settings_count_their_work() -> None:
    assert Settings(repeats=3).work == 2 * Settings(repeats=1).work
    assert replace(Settings(), repeats=0).work == 2 * len(measuring.TARGETS)
