"""One optimiser step: the gradients of all micro-batches and processes, guarded and applied."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retort import console
from retort.data.packing import Batch
from retort.model.decoder import Decoder
from retort.recipe import Guard, Stage
from retort.train.gpus import of_device
from retort.train.guard import is_finite, is_spike
from retort.train.objectives import count
from retort.train.parallel import Trained, clip
from retort.train.schedule import learning_rate
from retort.train.state import State
from retort.train.world import KnownToAll, World


@dataclass(frozen=True)
class Stepper:
    """What takes the steps of a stage; `token_flops` are those of the models for one token."""

    trained: Trained
    teacher: Decoder | None
    state: State
    stage: Stage
    guard: Guard
    world: World
    token_flops: float = 0.0

    def take(self, batch: Batch, waited: float = 0.0) -> dict[str, Any]:
        """Takes a step with this process's rows of a batch; returns what is recorded of it.

        The seconds that were `waited` for the batch count towards the pace as those of the step do.
        Raises ValueError when too many steps in a row have gone wrong.
        """
        began = time.perf_counter()
        progress = self.state.progress
        rate = self._set_rate()
        tokens = self.stage.rows * self.stage.length  # padding too, be it cut off
        means, norm = self._gradients(batch.to(self.world.device))
        spike = is_spike(means["loss"], progress.losses, self.guard)
        good = is_finite(means["loss"], norm)
        self._update(good)
        self._count(means["loss"], good, spike)
        seconds = waited + time.perf_counter() - began
        progress.step += 1
        progress.tokens += tokens
        return means | {
            "tokens": progress.tokens,
            "lr": rate,
            "gradient_norm": norm,
            "skipped": int(not good),
            "spike": int(spike),
            "bad_steps": progress.bad_steps,
            "tokens_per_second": tokens / seconds,
            "waited": waited,
            **_utilisation(self.world, self.token_flops * tokens / seconds),
            **_memory(self.world.device),
        }

    def _set_rate(self) -> float:
        assert self.state.optimizer is not None
        rate = learning_rate(self.stage.optim, self.state.progress.step, self.stage.steps)
        for group in self.state.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _gradients(self, batch: Batch) -> tuple[dict[str, float], float]:
        """Gradients of the mean loss over all rows of all processes, clipped; means, and norm.

        FSDP takes the mean over processes where the sum is wanted, so their number is multiplied in
        (gloo cannot be told another divisor).
        """
        objective = self.stage.objective
        total = max(self.world.sum([count(batch, objective)])[0], 1)
        sums: dict[str, Tensor] = {}
        for micro in batch.split(self.stage.micro_rows or batch.ids_BT.shape[0]):
            loss = self.trained(self.teacher, micro, objective)
            (loss.sum * (self.world.size / total)).backward()
            for name, value in {"loss": loss.sum, **loss.parts}.items():
                sums[name] = sums.get(name, value.new_zeros(())) + value.detach()
        found = self.world.sum(torch.stack(list(sums.values())).tolist())
        means = {name: value / total for name, value in zip(sums, found, strict=True)}
        return means, clip(self.state.named, self.stage.optim.clip, self.world)

    def _update(self, good: bool) -> None:
        assert self.state.optimizer is not None
        if good:
            self.state.optimizer.step()
            self.state.progress.updates += 1
        self.state.optimizer.zero_grad(set_to_none=True)

    def _count(self, loss: float, good: bool, spike: bool) -> None:
        """Remembers the loss, and counts what went wrong."""
        progress = self.state.progress
        if good:
            progress.losses = [*progress.losses, loss][-self.guard.window :]
        progress.skipped += not good
        progress.spikes += spike
        if spike and self.world.main:
            console.warn(
                f"step {progress.step + 1} of {self.stage.name}: the loss jumped to {loss:.4g}"
            )
        progress.bad_steps = 0 if good and not spike else progress.bad_steps + 1
        if progress.bad_steps >= self.guard.bad_steps:
            raise KnownToAll(
                f"stage {self.stage.name}: {progress.bad_steps} steps in a row gave a loss or "
                "gradient that is not finite, or a loss far above those before; lower optim.lr, or "
                "continue from an earlier checkpoint (docs/training.md#when-something-goes-wrong)"
            )


def _utilisation(world: World, flops_per_second: float) -> dict[str, float]:
    """The share of the GPUs' arithmetic that went into the models, where it is known."""
    if world.device.type != "cuda":
        return {}
    found = of_device(torch.cuda.get_device_name(world.device))
    return {} if found is None else {"mfu": flops_per_second / (1e12 * found.tflops * world.size)}


def _memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process has had on its GPU."""
    if device.type != "cuda":
        return {}
    return {"memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
