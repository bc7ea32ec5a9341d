"""`retort sample`: how completions are drawn, and of what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from retort.recipe.base import PAPER_PROMPT, Frozen, ModelFolder, Prompt
from retort.recipe.data import Problems


class Sampling(Frozen):
    """How completions are drawn; the defaults are the paper's. Text ends where a `stop` begins."""

    n: PositiveInt = 256
    max_tokens: PositiveInt = 2048
    temperature: Annotated[float, Field(ge=0)] = 0.8
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: NonNegativeInt = 0
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()


class Draft(Frozen):
    """A small model that proposes tokens, so many at a time, for the large one to verify."""

    model: ModelFolder
    tokens: PositiveInt = 4


class Cache(Frozen):
    """How what completions remember is kept: keys and values in the model's dtype unless said, and
    recurrent states, those of the Mamba-2 kinds written after so many tokens.
    """

    kv_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    ssm_dtype: Literal["float32", "bfloat16"] = "float32"
    write_every: Literal[1, 2, 4, 8, 16, 32, 64] = 1


class SampleRecipe(Frozen):
    """`retort sample`: one model on one set of problems, into one run folder.

    `slots` auto stands for as many as the free memory holds and are of use. `shots` are problems
    with worked solutions that are asked and answered before each question, `count` of them.
    `threads` are a CPU's, one for each core unless said.
    """

    out: Path
    model: ModelFolder
    name: str | None = None
    problems: Problems
    prompt: Prompt = PAPER_PROMPT
    shots: Problems | None = None
    sampling: Sampling = Sampling()
    draft: Draft | None = None
    cache: Cache = Cache()
    slots: PositiveInt | Literal["auto"] = "auto"
    threads: PositiveInt | None = None
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    force: bool = False

    @model_validator(mode="after")
    def _few_shots(self) -> Self:
        # Sets have thousands of problems, and all of them in one prompt is what nobody asks for.
        if self.shots is not None and "count" not in self.shots.model_fields_set:
            raise ValueError("shots: say how many examples to show, such as shots.count=4")
        return self

    @model_validator(mode="after")
    def _plain_cache(self) -> Self:
        if self.draft is not None and self.cache != Cache():
            raise ValueError(
                "cache: what a draft proposes is verified with everything kept as the model has "
                "it; leave out draft or cache"
            )
        return self
