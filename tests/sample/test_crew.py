"""An engine has run before its clocks do: its kernels are there, and nothing has been counted."""

from pathlib import Path
from typing import Any

import pytest

from retort import recipe as recipes
from retort.recipe import SampleRecipe
from retort.sample.clock import Timing
from retort.sample.crew import Alone, open_engine
from retort.sample.engine import WARM_TOKENS, Engine
from retort.sample.queue import Queue
from retort.sample.tokens import SamplingParams
from retort.sample.work import Work


@pytest.fixture
def asked(tmp_path: Path) -> SampleRecipe:
    values: dict[str, Any] = {
        "model": "bundled",
        "problems": {"kind": "arithmetic", "count": 1},
        "sampling": {"n": 3, "max_tokens": 6, "temperature": 0.7, "top_p": 0.9},
        "slots": 2,
        "out": tmp_path / "run",
    }
    return recipes.parse(SampleRecipe, values)


def test_an_engine_is_warm_before_a_run(
    asked: SampleRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same kinds of tokens are drawn first, and not counted."""
    runs: list[tuple[SamplingParams, int]] = []
    before = Engine._run

    def watched(engine: Engine, left: Queue, params: SamplingParams) -> Any:
        yield from before(engine, left, params)
        runs.append((params, engine.timing.decode_steps))

    monkeypatch.setattr(Engine, "_run", watched)
    crew = Alone(asked, open_engine(asked, 3))
    portions = crew.sample([Work("problem", [1, 2, 3], [0, 1, 2])])
    assert crew.engine.timing == Timing()
    assert not crew.engine.log.take()
    counted = sum(len(portion.done) for portion in portions if portion)
    (first, steps), (second, _) = runs
    assert counted == 3
    assert (first.max_tokens, second.max_tokens) == (WARM_TOKENS, 6)
    assert (first.temperature, first.top_p) == (0.7, 0.9)
    assert steps == WARM_TOKENS - 1
