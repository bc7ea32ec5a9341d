"""The engine: prompts are read once, forked to their completions, and the batch is kept full.

queue of prompts --prefill--> waiting prompts --admit--> slots --step--> finished completions
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch import Tensor

from retort.console import warn
from retort.model.decoder import Decoder
from retort.sample import prefill
from retort.sample.forward import open_forward
from retort.sample.memory import is_out_of_memory
from retort.sample.slots import Slots
from retort.sample.stopping import StopStrings
from retort.sample.tokens import SamplingParams
from retort.store import sample_seed

LOOK_STEPS = 16
"""Steps of an accelerator between looks at what has finished; waiting for it each time is slow."""
WINDOW = 256
"""Prompts among which those of like length are read together."""

Reason = Literal["stop", "length"]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Completion:
    """A sampled continuation, its stop token included, and its log-probability under the model.

    `logprobs` has that of each token, where it was asked for.
    """

    token_ids: list[int]
    finish_reason: Reason
    logprob: float
    logprobs: list[float] | None = None


@dataclass(frozen=True)
class Request:
    """A prompt, and the seed of each completion that is wanted of it."""

    prompt: Sequence[int]
    seeds: Sequence[int]


@dataclass(frozen=True)
class Finished:
    """A completion, which request and which of its seeds it belongs to, and when it ran."""

    request: int
    sample: int
    completion: Completion
    started: float
    ended: float


@dataclass(frozen=True)
class Timing:
    """What an engine has done so far; prefill and decoding are timed apart."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0

    def __sub__(self, earlier: Timing) -> Timing:
        return Timing(*(a - b for a, b in zip(astuple(self), astuple(earlier), strict=True)))

    def __add__(self, more: Timing) -> Timing:
        return Timing(*(a + b for a, b in zip(astuple(self), astuple(more), strict=True)))


class Engine:
    """Samples many completions of many prompts with one decoder.

    At most `slots` completions run at once; a finished one makes room for the next. What a
    completion says depends on its prompt and its seed alone, not on what shares its batch (up to
    ties in floating point). `decode` turns tokens into text, for stop strings; `look` is the number
    of steps between looks at what has finished, by default what suits the device.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: int = 64,
        decode: Decode | None = None,
        look: int | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots = {slots}: at least one is needed")
        self.decoder, self.slots, self.decode = decoder, slots, decode
        self.look = look or (1 if decoder.device.type == "cpu" else LOOK_STEPS)
        self.timing = Timing()

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[list[Completion]]:
        """`params.n` completions for each prompt, in the prompts' order."""
        requests = [
            Request(prompt, [sample_seed(params.seed, str(i), j) for j in range(params.n)])
            for i, prompt in enumerate(prompts)
        ]
        found = {(done.request, done.sample): done for done in self.stream(requests, params)}
        return [[found[i, j].completion for j in range(params.n)] for i in range(len(requests))]

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Finished]:
        """Completions as they finish. One may stop listening at any time; what runs is dropped.

        When memory runs out the engine goes on with half the slots, and says so. Raises ValueError
        for an empty prompt, and for stop strings where there is nothing to decode tokens with.
        """
        self._check(requests, params)
        left = _Queue(requests)
        while left:
            try:
                for done in _Batch(self, left, params).run():
                    left.finish(done.request, done.sample)
                    yield done
            except (RuntimeError, MemoryError) as error:
                if self.slots == 1 or not is_out_of_memory(error):
                    raise
                self.slots //= 2
                warn(f"out of memory: going on with {self.slots} slots")

    def _check(self, requests: Sequence[Request], params: SamplingParams) -> None:
        for i, request in enumerate(requests):
            if len(request.prompt) == 0:
                raise ValueError(f"prompt {i} is empty: a model needs at least one token to start")
        if params.stop and self.decode is None:
            raise ValueError("SamplingParams: stop strings need an engine that can decode tokens")


class _Queue:
    """What is still to be done: the requests, and the seeds of each that have not finished."""

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
        return [i for each in windows for i in sorted(each, key=self._length, reverse=True)]

    def _length(self, request: int) -> int:
        return len(self.requests[request].prompt)


@dataclass(frozen=True)
class _Waiting:
    """A prompt that has been read, and the samples that wait to start from it."""

    request: int
    prompt: prefill.Prompt
    samples: deque[int]


@dataclass(frozen=True)
class _Row:
    """What the host knows of a running completion; `lead` and the batch's steps make its length."""

    request: int
    sample: int
    started: float
    lead: int


class _Batch:
    """The running rows, and what is still to come."""

    def __init__(self, engine: Engine, left: _Queue, params: SamplingParams) -> None:
        self.engine, self.params, self.left = engine, params, left
        self.decoder = engine.decoder
        eos = self.decoder.config.eos_token_ids
        stops = eos if params.stop_token_ids is None else params.stop_token_ids
        self.stops = frozenset(stops)
        self.queue = deque(left.order())
        self.waiting: deque[_Waiting] = deque()
        self.running: list[_Row] = []
        self.steps = 0
        self.tokens = 0  # of the running rows, when last looked at
        # Rows that have finished still go on until the next look.
        longest = max(len(left.requests[i].prompt) for i in self.queue)
        self.capacity = longest + params.max_tokens + engine.look
        forward = open_forward(self.decoder, min(engine.slots, len(left)), self.capacity)
        self.slots = Slots(forward, params, stops)
        self.strings = StopStrings.of(params, engine.decode)

    def run(self) -> Iterator[Finished]:
        """Completions as they finish, until none is left."""
        while self.running or self.queue or self.waiting:
            while self._room() > 0 and (self.waiting or self.queue):
                yield from self._admit()
            if self.running:
                yield from self._steps()

    # ------------------------------------------------------------ admitting

    @torch.inference_mode()
    def _admit(self) -> list[Finished]:
        """Starts as many samples of the next prompt as fit; returns what already finished."""
        if not self.waiting:
            self._read()
        began = time.perf_counter()
        waiting, first = self.waiting[0], len(self.running)
        count = min(self._room(), len(waiting.samples))
        samples = [waiting.samples.popleft() for _ in range(count)]
        seeds = self.left.requests[waiting.request].seeds
        slot_S = torch.arange(first, first + count, device=self.decoder.device)
        now = time.time()
        lead = len(self.left.requests[waiting.request].prompt) - self.steps
        self.running += [_Row(waiting.request, sample, now, lead) for sample in samples]
        self.slots.start(
            slot_S, waiting.prompt.state, waiting.prompt.logits_1V, [seeds[j] for j in samples]
        )
        if not waiting.samples:
            self.waiting.popleft()
        return self._look(began, steps=0)

    def _read(self) -> None:
        """Reads the next prompts, each once however many samples it has."""
        began = time.perf_counter()
        chosen = self._next_prompts()
        prompts = [self.left.requests[i].prompt for i in chosen]
        for i, prompt in zip(chosen, prefill.read(self.decoder, prompts), strict=True):
            self.waiting.append(_Waiting(i, prompt, deque(self.left.missing[i])))
        _synchronise(self.decoder.device)
        self.engine.timing += Timing(
            prefill_tokens=sum(len(prompt) for prompt in prompts),
            prefill_seconds=time.perf_counter() - began,
        )

    def _next_prompts(self) -> list[int]:
        """Prompts enough for the free slots, within the bounds of one prefill."""
        chosen: list[int] = []
        lengths: list[int] = []
        free = self._room()
        while self.queue and free > 0:
            lengths.append(len(self.left.requests[self.queue[0]].prompt))
            if not prefill.fits(lengths):
                break
            chosen.append(self.queue.popleft())
            free -= len(self.left.missing[chosen[-1]])
        return chosen

    def _room(self) -> int:
        return self.slots.forward.slots - len(self.running)

    # ------------------------------------------------------------ stepping

    @torch.inference_mode()
    def _steps(self) -> list[Finished]:
        """A token or more for every running row; returns the completions that this finished."""
        began = time.perf_counter()
        longest = max(row.lead for row in self.running)
        for _ in range(self.engine.look):
            self.steps += 1
            self.slots.step(len(self.running), longest + self.steps)
        return self._look(began, self.engine.look)

    def _look(self, began: float, steps: int) -> list[Finished]:
        """Waits for the device, clocks what was done since `began`, takes out what has finished."""
        self.strings.apply(self.slots, len(self.running), max(1, steps))
        rows = len(self.running)
        finished = self.slots.finished_S[:rows].nonzero().flatten()
        tokens = int(self.slots.count_S[:rows].sum())
        self.engine.timing += Timing(
            decode_tokens=tokens - self.tokens,
            decode_steps=steps,
            decode_seconds=time.perf_counter() - began,
        )
        self.tokens = tokens
        return self._retire(finished) if len(finished) else []

    def _retire(self, row_F: Tensor) -> list[Finished]:
        """Takes finished rows out, moving the rows behind them into their place."""
        now = time.time()
        done = [
            Finished(row.request, row.sample, completion, row.started, now)
            for row, completion in zip(
                [self.running[i] for i in row_F.tolist()], self._completions(row_F), strict=True
            )
        ]
        self.tokens -= sum(len(each.completion.token_ids) for each in done)
        self._close(set(row_F.tolist()))
        return done

    def _completions(self, row_F: Tensor) -> Iterator[Completion]:
        """What the finished rows have written."""
        slots = self.slots
        told = zip(
            slots.count_S[row_F].tolist(),
            slots.written_SM[row_F].tolist(),
            slots.logprob_SM[row_F].tolist(),
            slots.cut_S[row_F].tolist(),
            strict=True,
        )
        for count, tokens, logprobs, cut in told:
            stopped = cut or tokens[count - 1] in self.stops
            yield Completion(
                tokens[:count],
                "stop" if stopped else "length",
                math.fsum(logprobs[:count]),
                logprobs[:count] if self.params.logprobs else None,
            )

    def _close(self, finished: set[int]) -> None:
        """Closes the gaps that finished rows leave: only the rows that fill one are copied."""
        rows = len(self.running)
        left = rows - len(finished)
        gaps = [row for row in range(left) if row in finished]
        movers = [row for row in range(left, rows) if row not in finished]
        if gaps:
            device = self.decoder.device
            self.slots.move(torch.tensor(gaps, device=device), torch.tensor(movers, device=device))
        for gap, mover in zip(gaps, movers, strict=True):
            self.running[gap] = self.running[mover]
        del self.running[left:]


def _synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
