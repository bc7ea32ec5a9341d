"""`retort distill`: objectives, stages, and the recipe that they make up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from retort.recipe.base import Fraction, Frozen, ModelFolder
from retort.recipe.data import Data, Problems
from retort.recipe.running import (
    Checkpoints,
    Evaluation,
    Guard,
    Parallel,
    Planning,
    Tracker,
)
from retort.recipe.students import Student


class MixingMatrices(Frozen):
    """MOHAWK stage 1: match the attention matrices."""

    kind: Literal["mixing_matrices"]
    squared: bool = False


class HiddenStates(Frozen):
    """MOHAWK stage 2: match each block's output, or its mixer's output alone."""

    kind: Literal["hidden_states"]
    compare: Literal["block", "mixer"] = "block"


class OnPolicy(Frozen):
    """The student writes what it learns from: in a `share` of the steps its own answers to the
    prompts of the stage's data stand in for the answers there (arXiv 2306.13649).
    """

    share: Annotated[Fraction, Field(gt=0)] = 1.0
    max_tokens: PositiveInt = 512
    temperature: PositiveFloat = 1.0


class Distill(Frozen):
    """KL between token distributions, end to end (MOHAWK stage 3; MambaInLlama)."""

    kind: Literal["distill"]
    direction: Literal["forward", "reverse", "jsd"] = "forward"
    temperature: PositiveFloat = 1.0
    ce_weight: Fraction = 0.0
    on_policy: OnPolicy | None = None


class Supervised(Frozen):
    """Cross-entropy on the answer tokens."""

    kind: Literal["supervised"]


Objective = Annotated[
    MixingMatrices | HiddenStates | Distill | Supervised, Field(discriminator="kind")
]


class Optim(Frozen):
    """AdamW and its learning-rate schedule; `warmup` and `decay` are fractions of the stage."""

    lr: PositiveFloat
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: PositiveFloat = 1.0
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: Fraction = 0.1
    decay: Fraction = 0.1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError("warmup and decay are fractions of the stage: their sum exceeds 1")
        return self


class Stage(Frozen):
    """One stage: an objective on data for `tokens` tokens, `rows` rows of `length` in each step."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    objective: Objective
    data: Data
    tokens: PositiveInt
    rows: PositiveInt = 16
    micro_rows: PositiveInt | None = None
    length: Annotated[int, Field(ge=8)] = 512
    optim: Optim
    freeze: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.micro_rows is not None and self.rows % self.micro_rows:
            raise ValueError("rows must be a multiple of micro_rows")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps: the token budget over the tokens of a step, rounded up."""
        return -(-self.tokens // (self.rows * self.length))


class DistillRecipe(Frozen):
    """`retort distill`: a student, the stages it goes through, and the folder it ends in."""

    out: Path
    teacher: ModelFolder | None = None
    student: Student
    stages: tuple[Stage, ...]
    seed: NonNegativeInt = 0
    device: str = "cpu"
    force: bool = False
    parallel: Parallel = Parallel()
    checkpoints: Checkpoints = Checkpoints()
    guard: Guard = Guard()
    evaluation: Evaluation | None = None
    decontaminate: tuple[Problems, ...] = ()
    trackers: tuple[Tracker, ...] = ()
    planning: Planning = Planning()

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("stages: empty; a recipe needs at least one")
        if len(set(names)) < len(names):
            raise ValueError("stages: every stage needs a name of its own")
        alone = all(stage.objective.kind == "supervised" for stage in self.stages)
        if self.teacher is None and (self.student.start == "transplant" or not alone):
            raise ValueError("teacher: missing; only supervised stages do without one")
        if self.checkpoints.best and self.evaluation is None:
            raise ValueError("checkpoints.best: needs evaluation, which says which student is best")
        self._check_mixer()
        return self

    def _check_mixer(self) -> None:
        student = self.student
        if student.start != "transplant":
            return
        if student.initial == "identity" and student.mixer != "discrete_mamba2":
            raise ValueError(
                f"student.initial: {student.mixer} cannot start as the identity, since its gate "
                "has no bias; choose discrete_mamba2, or start from the attention"
            )
        for index, stage in enumerate(self.stages):
            if student.mixer == "mamba1" and stage.objective.kind == "mixing_matrices":
                raise ValueError(
                    f"stages.{index}.objective: mamba1 has no mixing matrices to match; leave the "
                    "stage out, or choose mamba2 or discrete_mamba2"
                )
