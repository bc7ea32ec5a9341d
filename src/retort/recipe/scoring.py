"""`retort score` and `retort verifier`: what judges the completions of a run, and its training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from retort.recipe.base import Frozen, ModelFolder

ScorerKind = Literal["rlhflow", "qwen", "outcome", "verifier"]


class ScoreRecipe(Frozen):
    """`retort score`: one reward model on the completions of one run.

    `kind` says how the model is asked: `rlhflow` process models answer each step with + or -,
    `qwen` process models label the `<extra_0>` behind each step, `outcome` models are sequence
    classifiers with one label, and a `verifier` is what `retort verifier` has trained. Scores are
    kept under `name`, by default that of the model's folder. A batch has at most `batch_tokens`
    tokens, padding included, unless one completion alone has more.
    """

    run: Path
    model: ModelFolder
    kind: ScorerKind
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    batch_tokens: PositiveInt = 16_384
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class Rollouts(Frozen):
    """Step labels by Monte Carlo: from the end of each step of `completions` different completions
    of a problem, `n` continuations are sampled as the run was; the label is the share of them that
    end in the right answer. `slots` is how many run at once.
    """

    n: PositiveInt = 4
    completions: PositiveInt = 4
    slots: PositiveInt = 64


class VerifierRecipe(Frozen):
    """`retort verifier`: a head on a student, trained on the graded completions of a run.

    It judges whole completions, or with `rollouts` each step. The run's problems should be others
    than those whose votes it is to weigh.
    """

    run: Path
    model: ModelFolder
    out: Path
    rollouts: Rollouts | None = None
    seed: NonNegativeInt = 0
    batch_tokens: PositiveInt = 16_384
    device: str = "cpu"
