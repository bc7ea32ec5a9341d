"""All there is to resume a run from, as one object: tensors, and plain values.

Model, moments of the optimiser, and counters; the schedule is a function of the step, the data's
position is in the counters, and no random generator is drawn from: what is random in training is a
function of the recipe's seed and the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from retort.model.decoder import Decoder
from retort.recipe import DistillRecipe, Stage
from retort.train.objectives import trainable
from retort.train.schedule import adamw, not_frozen

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """The counters of a run. `updates` counts the steps of this stage that changed the weights;
    `data` is the position of all rows in the stage's data; `losses` are the last good ones; `best`
    is the highest accuracy of an evaluation, and `scored` the settings that it was found with.
    """

    stage: int = 0
    step: int = 0
    updates: int = 0
    tokens: int = 0
    skipped: int = 0
    spikes: int = 0
    bad_steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    data: dict[str, Any] | None = None
    best: float | None = None
    scored: str | None = None
    evaluated: int = 0

    def total(self, recipe: DistillRecipe) -> int:
        """Steps taken in this stage and all before it."""
        return sum(stage.steps for stage in recipe.stages[: self.stage]) + self.step

    def next_stage(self) -> None:
        """Moves to the beginning of the stage after this one."""
        self.stage, self.step, self.updates, self.bad_steps = self.stage + 1, 0, 0, 0
        self.losses, self.data = [], None


@dataclass
class State:
    """A run at one moment: the student, what its stage trains of it and with what, and counters."""

    student: Decoder
    progress: Progress
    named: dict[str, nn.Parameter] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None

    def begin(self, stage: Stage) -> None:
        """Makes the optimiser of a stage, and switches off what it does not train."""
        names = not_frozen(trainable(self.student, stage.objective), stage.freeze)
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in names)
        self.named = {n: p for n, p in self.student.named_parameters() if n in names}
        self.optimizer = adamw(self.named, stage.optim)

    def end(self) -> None:
        """Drops the optimiser and counts the stage as done."""
        self.named, self.optimizer = {}, None
        self.progress.next_stage()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by its name, to be written, or to be read into."""
        found = {f"model.{name}": tensor for name, tensor in untied(self.student).items()}
        if self.optimizer is not None:
            for name, parameter in self.named.items():
                moments = self.optimizer.state[parameter] or self._first_moments(parameter)
                found |= {f"optimizer.{name}.{key}": moments[key] for key in MOMENTS}
        return found

    def values(self) -> dict[str, Any]:
        """Everything else, as JSON has it."""
        return asdict(self.progress)

    def restored(self) -> None:
        """Completes a state whose tensors and progress have been read."""
        for parameter in self.named.values():
            assert self.optimizer is not None
            steps = torch.tensor(float(self.progress.updates), device=parameter.device)
            self.optimizer.state[parameter]["step"] = steps

    def _first_moments(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        """What AdamW has before its first step."""
        assert self.optimizer is not None
        state = self.optimizer.state[parameter]
        state["step"] = torch.tensor(0.0, device=parameter.device)
        for key in MOMENTS:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
        return state


def untied(student: Decoder) -> dict[str, Tensor]:
    """The student's tensors; a head that is the embedding is not one of them."""
    tensors = dict(student.state_dict())
    if student.config.tie_embeddings:
        del tensors["lm_head.weight"]
    return tensors
