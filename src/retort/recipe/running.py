"""How a training run is spread over machines, watched, kept, and planned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from retort.recipe.base import PAPER_PROMPT, Fraction, Frozen, Prompt
from retort.recipe.data import Problems

Tracker = Literal["trackio", "wandb", "tensorboard"]


class Parallel(Frozen):
    """How a model is spread over the processes that torchrun starts, and what is computed twice to
    save memory.

    `shard` is the number of processes that hold one copy between them (all of them, where nothing
    is said); with fewer, copies are replicated (hybrid sharding). `recompute` drops activations in
    the forward pass: `full` keeps the input of each block alone, `selective` also the products
    with weights. `dtype` is what is computed in; master weights are float32 either way, and unless
    said it is bfloat16 on a GPU and float32 on a CPU.
    """

    shard: PositiveInt | None = None
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None


class Checkpoints(Frozen):
    """When training state is written (steps apart) and how many states are kept. `best` also keeps
    the student that answered best, as a model folder; it needs `evaluation`.
    """

    every: PositiveInt = 200
    keep: PositiveInt = 2
    best: bool = False


class Guard(Frozen):
    """What stops a run that goes wrong: `bad_steps` steps in a row that are not finite, or whose
    loss is a spike: more than `spike` times its usual spread above the median of the last `window`
    steps. A step that is not finite is always skipped.
    """

    bad_steps: PositiveInt = 20
    window: Annotated[int, Field(ge=8)] = 128
    spike: PositiveFloat = 12.0


class Evaluation(Frozen):
    """Evaluation by generation: every `every` steps the student answers `problems`, `n` times each;
    likelihoods hide what distillation damages.
    """

    problems: Problems
    prompt: Prompt = PAPER_PROMPT
    every: PositiveInt
    n: PositiveInt = 4
    max_tokens: PositiveInt = 512
    temperature: Annotated[float, Field(ge=0)] = 0.8
    slots: PositiveInt = 64
    seed: NonNegativeInt = 0


class Planning(Frozen):
    """What `--plan` assumes: how many GPUs of which kind, the share of their arithmetic that a step
    reaches, and by name the sizes of models whose folders are not here yet.
    """

    gpu: str = "h100-80gb"
    gpus: PositiveInt = 1
    utilisation: Annotated[Fraction, Field(gt=0)] = 0.4
    teacher: str | None = None
    student: str | None = None
