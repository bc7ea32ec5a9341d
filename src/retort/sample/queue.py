"""What is still to be sampled, and the prompts of it, read when there is room for completions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from retort.model.decoder import Decoder
from retort.sample import prefill
from retort.sample.clock import Timing

WINDOW = 256
"""Prompts among which those of like length are read together."""


@dataclass(frozen=True)
class Request:
    """A prompt, and the seed of each completion that is wanted of it."""

    prompt: Sequence[int]
    seeds: Sequence[int]


class Queue:
    """The requests, and the samples of each that have not finished; true until all have."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.missing = [dict.fromkeys(range(len(request.seeds))) for request in requests]
        self.count = sum(len(request.seeds) for request in requests)

    def __len__(self) -> int:
        return self.count

    def finish(self, request: int, sample: int) -> None:
        """Notes that a completion is done."""
        del self.missing[request][sample]
        self.count -= 1

    def order(self) -> list[int]:
        """Requests with something to do, those of like length near each other, the longest first:
        what runs out of memory does so early.
        """
        wanted = [i for i, samples in enumerate(self.missing) if samples]
        windows = [wanted[at : at + WINDOW] for at in range(0, len(wanted), WINDOW)]
        return [i for each in windows for i in sorted(each, key=self.length, reverse=True)]

    def length(self, request: int) -> int:
        """Tokens of a request's prompt."""
        return len(self.requests[request].prompt)


@dataclass(frozen=True)
class Start:
    """Samples of a request that start now, from its prompt as each decoder has read it."""

    request: int
    samples: list[int]
    seeds: list[int]
    prompts: tuple[prefill.Prompt, ...]


@dataclass(frozen=True)
class _Waiting:
    """A prompt that has been read, and the samples that wait to start from it."""

    request: int
    prompts: tuple[prefill.Prompt, ...]
    samples: deque[int]


class Prompts:
    """The prompts of a queue, read by one decoder or more, each once however many samples it has.

    A prompt that has been read occupies memory, so no more are read than there is room for.
    """

    def __init__(self, left: Queue, decoders: Sequence[Decoder]) -> None:
        self.left, self.decoders = left, decoders
        self.unread = deque(left.order())
        self.waiting: deque[_Waiting] = deque()
        self.timing = Timing()

    def __bool__(self) -> bool:
        return bool(self.waiting or self.unread)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that has not been read."""
        return max(map(self.left.length, self.unread))

    def start(self, room: int) -> Start:
        """As many samples of the next prompt as there is room for."""
        if not self.waiting:
            self._read(room)
        waiting = self.waiting[0]
        count = min(room, len(waiting.samples))
        samples = [waiting.samples.popleft() for _ in range(count)]
        if not waiting.samples:
            self.waiting.popleft()
        seeds = self.left.requests[waiting.request].seeds
        return Start(waiting.request, samples, [seeds[j] for j in samples], waiting.prompts)

    def _read(self, room: int) -> None:
        """Reads the next prompts, together."""
        began = time.perf_counter()
        chosen = self._next(room)
        prompts = [self.left.requests[i].prompt for i in chosen]
        found = [prefill.read(decoder, prompts) for decoder in self.decoders]
        for i, *read in zip(chosen, *found, strict=True):
            self.waiting.append(_Waiting(i, tuple(read), deque(self.left.missing[i])))
        _synchronise(self.decoders[0].device)
        self.timing += Timing(
            prefill_tokens=sum(len(prompt) for prompt in prompts),
            prefill_seconds=time.perf_counter() - began,
        )

    def _next(self, room: int) -> list[int]:
        """Prompts enough for the room, within the bounds of one pass."""
        chosen: list[int] = []
        lengths: list[int] = []
        while self.unread and room > 0:
            lengths.append(self.left.length(self.unread[0]))
            if not prefill.fits(lengths):
                break
            chosen.append(self.unread.popleft())
            room -= len(self.left.missing[chosen[-1]])
        return chosen


def fill(rows: int, finished: Collection[int]) -> tuple[list[int], list[int]]:
    """The gaps that finished rows leave, and the rows from the end that fill them."""
    left = rows - len(finished)
    gaps = [row for row in range(left) if row in finished]
    movers = [row for row in range(left, rows) if row not in finished]
    return gaps, movers


def _synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
