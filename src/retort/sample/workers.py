"""Sampling by workers of a Ray cluster, with one engine each.

Ray starts a lost worker again; what it had not handed over goes to whichever worker is free. Only
the driver, which is the process that runs `sample`, writes to the run.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from retort import console
from retort._version import __version__
from retort.recipe import BUNDLED_TEACHER, SampleRecipe, parse
from retort.sample.cluster import Cluster, connected
from retort.sample.crew import device_name, models, open_engine
from retort.sample.engine import Engine
from retort.sample.work import (
    QUIET_SECONDS,
    Portion,
    Share,
    Shares,
    Work,
    params_of,
    portions,
)
from retort.store import fingerprint

TELL_SECONDS = 2.0
"""How long a worker keeps what it has finished before it hands it over."""
PATIENCE = 20.0
"""Seconds without a worker after which the person is told what is waited for."""
LOSSES = 3
"""How often a worker may be lost without having handed anything over in between."""


@contextmanager
def crew(recipe: SampleRecipe, prompt_tokens: int, cluster: Cluster) -> Iterator[Workers]:
    """Workers that have the recipe's model, for prompts of at most `prompt_tokens`; the first is
    ready. They end with the `with` block.

    Raises ValueError, in one line, where Ray is not installed, the cluster does not answer, has no
    such device, or a node cannot read the model.
    """
    gpus = _gpus(recipe.device)
    with connected(cluster, gpus) as ray:
        # With retries a call to a worker that is being started again waits for it.
        kind = ray.remote(
            num_cpus=1,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=LOSSES,
            scheduling_strategy="SPREAD",
        )(Worker)
        # GPUs are not shared; the memory of a node is, by the workers that are spread there.
        nodes = sum(node["Alive"] for node in ray.nodes())
        processes = 1 if gpus else -(-cluster.workers // nodes)
        told = Told(
            _recipe_for_others(recipe),
            [fingerprint(folder) for folder in models(recipe)],
            __version__,
            prompt_tokens,
            processes,
        )
        actors = [kind.remote(number, told) for number in range(cluster.workers)]
        try:
            workers = Workers(ray, actors)
            workers.wait()
            yield workers
        finally:
            # Without this a cluster that outlives the driver would keep them for a while.
            for actor in actors:
                ray.kill(actor)


def _gpus(device: str) -> int:
    """GPUs for each worker."""
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"device = {device}: with --ray it is cpu or cuda, and Ray gives each worker a GPU"
        )
    return int(device == "cuda")


def _recipe_for_others(recipe: SampleRecipe) -> dict[str, Any]:
    """The recipe as it is sent to other machines, whose folders are not relative to this one's."""
    told = recipe.model_dump(mode="json") | {"model": _place(recipe.model)}
    if recipe.draft is not None:
        told["draft"]["model"] = _place(recipe.draft.model)
    return told


def _place(model: Path) -> str:
    return "bundled" if model == BUNDLED_TEACHER else str(model.resolve())


# ------------------------------------------------------------ in a worker's process


@dataclass(frozen=True)
class Told:
    """What a worker is told: the recipe as other machines read it, its models' fingerprints, the
    version that the run was started with, the longest prompt, and how many share a node's memory.
    """

    recipe: Mapping[str, Any]
    fingerprints: list[str]
    version: str
    prompt_tokens: int
    processes: int


@dataclass(frozen=True)
class Opened:
    """What a worker says of itself once it has the model."""

    device: str
    slots: int


class Worker:
    """An engine in a process of Ray's. One that was started again opens the model again."""

    def __init__(self, number: int, told: Told) -> None:
        self.number, self.told = number, told
        self.share: int | None = None
        self.portions: Iterator[Portion | None] = iter(())

    def open(self) -> Opened:
        """Opens the model. Raises ValueError, naming the node, where that cannot be done."""
        return Opened(device_name(self.recipe.device), self.engine.slots)

    def sample(self, share: Share) -> Portion:
        """Goes on with a share, or begins it, until something of it has finished."""
        if share.number != self.share:
            self.share = share.number
            self.portions = portions(
                self.engine, self.recipe.sampling, share.work, self.number, TELL_SECONDS
            )
        return next(portion for portion in self.portions if portion is not None)

    @cached_property
    def recipe(self) -> SampleRecipe:
        if self.told.version != __version__:
            raise ValueError(
                f"retort {__version__} is installed on node {platform.node()} and "
                f"{self.told.version} where the run was started; they must be the same"
            )
        return parse(SampleRecipe, self.told.recipe)

    @cached_property
    def engine(self) -> Engine:
        if self.recipe.device == "cpu" and self.recipe.threads is None:
            # Workers side by side with several threads each would wait for one another's.
            torch.set_num_threads(1)
        try:
            for folder, known in zip(models(self.recipe), self.told.fingerprints, strict=True):
                if fingerprint(folder) != known:
                    raise ValueError(f"{folder}: another model than where the run started")
            engine = open_engine(self.recipe, self.told.prompt_tokens, self.told.processes)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"node {platform.node()}: {error} (every node reads the model from the same path) "
                "(docs/sampling.md#many-engines-ray)"
            ) from error
        engine.warm(params_of(self.recipe.sampling))
        return engine


# ------------------------------------------------------------ in the driver's process


class Workers:
    """Workers of a cluster, each of which has at most one call to answer.

    A worker that is not among `opened` has yet to start, or to start again.
    """

    def __init__(self, ray: Any, actors: Sequence[Any]) -> None:
        self.ray, self.actors = ray, actors
        self.calls: dict[Any, int] = {}
        self.opened: dict[int, Opened] = {}
        self.held: dict[int, Share] = {}
        self.losses: Counter[int] = Counter()
        self.shares = Shares([], len(actors))
        for number in range(len(actors)):
            self._open(number)

    @property
    def device(self) -> str:
        """What they run on, in words."""
        first = next(iter(self.opened.values()))
        return f"{len(self.actors)} workers on {first.device}"

    def wait(self) -> None:
        """Waits until a worker is ready, and says so where that takes long."""
        if not self.ray.wait(list(self.calls), timeout=PATIENCE)[0]:
            there = self.ray.cluster_resources()
            console.say(
                f"waiting for the first of {len(self.actors)} workers; the cluster has "
                f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs in all"
            )
        while not self.opened:
            self._hear()

    def sample(self, work: Sequence[Work]) -> Iterator[Portion | None]:
        """All of the work, each completion once, in portions as workers hand them over; None where
        none does for a while.

        Raises ValueError where a worker is lost again and again, or a node cannot read the model.
        """
        self.shares = Shares(work, len(self.actors))
        self._employ()
        while self.shares:
            portion = self._hear(QUIET_SECONDS)
            self._employ()  # they go on while the portion is written
            if portion is None or portion.done:
                yield portion

    def _open(self, number: int) -> None:
        self.calls[self.actors[number].open.remote()] = number

    def _employ(self) -> None:
        """Lets every worker that has no call go on with its share, or begin another."""
        for number in sorted(self.opened.keys() - self.calls.values()):
            held = self.held.get(number)
            share = self.shares.left(held) if held else None
            share = share or self.shares.cut(self.opened[number].slots)
            if share:
                self.held[number] = share
                # Not repeated by Ray: others may be free long before a lost worker is back.
                sample = self.actors[number].sample.options(max_task_retries=0)
                self.calls[sample.remote(share)] = number

    def _hear(self, seconds: float | None = None) -> Portion | None:
        """Waits for the next answer, at most so long; returns what it hands over, if anything."""
        calls, _ = self.ray.wait(list(self.calls), timeout=seconds)
        if not calls:
            return None
        (call,) = calls
        number = self.calls.pop(call)
        try:
            answer = self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise ValueError(f"worker {number}: {error.cause}") from None
            raise
        except self.ray.exceptions.RayError as error:
            self._lose(number, str(error))
            return None
        if isinstance(answer, Opened):
            self.opened[number] = answer
            return None
        self.losses[number] = 0
        return self.shares.accept(answer)

    def _lose(self, number: int, reason: str) -> None:
        """Gives what a lost worker had to others, until Ray has started it again."""
        self.losses[number] += 1
        if number not in self.opened or self.losses[number] > LOSSES:
            last = reason.strip().splitlines()[-1]
            raise ValueError(
                f"worker {number} was lost {LOSSES + 1} times before it could hand anything over, "
                f"perhaps for want of memory (fewer slots need less): {last} "
                "(docs/sampling.md#lost-workers)"
            )
        console.warn(f"worker {number} was lost; Ray starts it again, and its work is done again")
        del self.opened[number]
        self.shares.give_back(self.held.pop(number))
        self._open(number)
