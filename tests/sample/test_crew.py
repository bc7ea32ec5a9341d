"""An engine that is opened has run: its kernels are there, and its clocks have counted nothing."""

from pathlib import Path
from typing import Any

import pytest

from retort import recipe as recipes
from retort.recipe import SampleRecipe
from retort.sample.clock import Timing
from retort.sample.crew import open_engine
from retort.sample.engine import Engine


def test_an_engine_has_sampled_before_its_clocks_run(
    bundled_recipe: SampleRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    generate = Engine.generate

    def spied(engine: Engine, prompts: Any, params: Any) -> Any:
        found = generate(engine, prompts, params)
        asked.append((params.temperature, params.top_p, engine.timing.decode_steps, found))
        return found

    monkeypatch.setattr(Engine, "generate", spied)
    engine = open_engine(bundled_recipe)
    ((temperature, top_p, steps, ((one, other),)),) = asked
    sampling = bundled_recipe.sampling
    assert (temperature, top_p) == (sampling.temperature, sampling.top_p)
    assert steps >= 1
    assert max(len(one.tokens), len(other.tokens)) > 1
    assert engine.timing == Timing()
    assert not engine.log.take()


@pytest.fixture
def bundled_recipe(tmp_path: Path) -> SampleRecipe:
    values: dict[str, Any] = {
        "model": "bundled",
        "problems": {"kind": "arithmetic", "count": 1},
        "sampling": {"n": 3, "temperature": 0.7, "top_p": 0.9},
        "slots": 2,
        "out": tmp_path / "run",
    }
    return recipes.parse(SampleRecipe, values)
