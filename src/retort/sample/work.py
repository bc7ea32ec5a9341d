"""What is to be sampled, the shares of it that engines take, and what they hand back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from retort.recipe import Sampling
from retort.sample.clock import Steps, Timing, together
from retort.sample.engine import Completion, Engine, Finished, Request
from retort.sample.tokens import SamplingParams
from retort.store import sample_seed

QUIET_SECONDS = 1.0
"""Without anything finished, after which an engine says so."""
FULLEST = 32
"""A share fills an engine's slots at most so many times."""


@dataclass(frozen=True)
class Work:
    """A problem's prompt, and the samples that are wanted of it."""

    problem_id: str
    prompt: list[int]
    samples: list[int]


@dataclass(frozen=True)
class Done:
    """A completion by its problem and number, the prompt's length, and when it ran."""

    problem_id: str
    sample_idx: int
    seed: int
    prompt_tokens: int
    completion: Completion
    started: float
    ended: float

    @property
    def key(self) -> tuple[str, int]:
        return self.problem_id, self.sample_idx


@dataclass(frozen=True)
class Portion:
    """Completions that one engine has finished, and what it has done since its last portion.

    look: the steps between its looks at what has finished. share_from: tokens of all rows of a
    prompt from which on they read it together; None where they never do.
    """

    worker: int
    slots: int
    look: int
    share_from: int | None
    done: list[Done]
    timing: Timing
    steps: Steps

    def __add__(self, more: Portion) -> Portion:
        """Two portions of one engine, together."""
        assert self.worker == more.worker
        return replace(
            more,
            done=self.done + more.done,
            timing=self.timing + more.timing,
            steps=together([self.steps, more.steps]),
        )


def params_of(sampling: Sampling) -> SamplingParams:
    """What an engine is asked for; how many of each problem is for the work to say."""
    return SamplingParams(**sampling.model_dump(exclude={"n"}))


def portions(
    engine: Engine,
    sampling: Sampling,
    work: Sequence[Work],
    worker: int = 0,
    seconds: float = 0.0,
) -> Iterator[Portion | None]:
    """Samples all of the work; a portion comes when more has finished and at least `seconds` have
    passed since the last, and None where nothing has for a while: the listener may have to see to
    something by then.
    """
    params = params_of(sampling)
    requests = [_request(item, sampling.seed) for item in work]
    ready: list[Done] = []
    told, began = engine.timing, time.monotonic()
    spoken = began
    for some in engine.looks(requests, params):
        ready += [_done(work, requests, finished) for finished in some]
        now = time.monotonic()
        if ready and now - began >= seconds:
            yield _portion(engine, worker, ready, told)
            ready, told, began = [], engine.timing, time.monotonic()
            spoken = began
        elif now - spoken >= QUIET_SECONDS:
            yield None
            spoken = time.monotonic()
    if ready:
        yield _portion(engine, worker, ready, told)


def _done(work: Sequence[Work], requests: Sequence[Request], finished: Finished) -> Done:
    item, seeds = work[finished.request], requests[finished.request].seeds
    return Done(
        item.problem_id,
        item.samples[finished.sample],
        seeds[finished.sample],
        len(item.prompt),
        finished.completion,
        finished.started,
        finished.ended,
    )


def _portion(engine: Engine, worker: int, done: list[Done], told: Timing) -> Portion:
    timing = engine.timing - told
    settings = engine.slots, engine.look, engine.share_from
    return Portion(worker, *settings, done, timing, engine.log.take())


def _request(item: Work, seed: int) -> Request:
    return Request(item.prompt, [sample_seed(seed, item.problem_id, j) for j in item.samples])


@dataclass(frozen=True)
class Share:
    """Work that one engine does, and a number by which it knows the share again."""

    number: int
    work: list[Work]


class Shares:
    """Work that several engines do, handed out in shares: large ones first, so that slots are
    seldom empty, and smaller ones towards the end, so that all end at about the same time.

    It is true until all is done. A completion is taken once, however often it is made.
    """

    def __init__(self, work: Sequence[Work], engines: int) -> None:
        self.engines = engines
        self.waiting = deque(work)
        self.missing = {(item.problem_id, j) for item in work for j in item.samples}
        self.even = -(-len(self.missing) // engines)
        self.count = 0

    def __bool__(self) -> bool:
        return bool(self.missing)

    def cut(self, slots: int) -> Share | None:
        """The next share for an engine with so many slots; None where no work waits."""
        if not self.waiting:
            return None
        waiting = sum(len(item.samples) for item in self.waiting)
        # Half of an even part of what waits, unless that leaves slots empty.
        count = max(waiting // (2 * self.engines), min(slots, self.even))
        self.count += 1
        return Share(self.count, self._take(min(count, FULLEST * slots)))

    def _take(self, count: int) -> list[Work]:
        """The first `count` samples that wait, or all there are."""
        taken: list[Work] = []
        while self.waiting and count > 0:
            item = self.waiting.popleft()
            taken.append(replace(item, samples=item.samples[:count]))
            if rest := item.samples[count:]:
                self.waiting.appendleft(replace(item, samples=rest))
            count -= len(item.samples)
        return taken

    def left(self, share: Share) -> Share | None:
        """What is still missing of a share; None where nothing is."""
        items = [
            replace(item, samples=[j for j in item.samples if (item.problem_id, j) in self.missing])
            for item in share.work
        ]
        work = [item for item in items if item.samples]
        return replace(share, work=work) if work else None

    def give_back(self, share: Share) -> None:
        """Lets others do what is left of a share."""
        if left := self.left(share):
            self.waiting.extendleft(left.work)

    def accept(self, portion: Portion) -> Portion:
        """The portion without completions that came before, noting the others as done."""
        new = {done.key: done for done in portion.done if done.key in self.missing}
        self.missing -= new.keys()
        return replace(portion, done=list(new.values()))
