"""The engine: prompts are read once, forked to their completions, and the batch is kept full.

queue of prompts --prefill--> waiting prompts --admit--> slots --step--> finished completions
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from retort.console import warn
from retort.model.decoder import Decoder
from retort.sample.cache import CacheSettings
from retort.sample.clock import StepLog, Timing
from retort.sample.forward import check_cache
from retort.sample.memory import is_out_of_memory
from retort.sample.queue import Prompts, Queue, Request, fill
from retort.sample.slots import open_slots
from retort.sample.stopping import StopStrings
from retort.sample.tokens import SamplingParams
from retort.store import sample_seed

__all__ = ["Completion", "Decode", "Engine", "Finished", "Reason", "Request", "Timing"]

LOOK_STEPS = 16
"""Steps of an accelerator between looks at what has finished; waiting for it each time is slow."""

WARM_TOKENS = 4
"""Of a prompt, and of each of two completions, that an engine is made warm with."""

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
class Finished:
    """A completion, which request and which of its seeds it belongs to, and when it ran."""

    request: int
    sample: int
    completion: Completion
    started: float
    ended: float


class Engine:
    """Samples many completions of many prompts with one decoder.

    At most `slots` completions run at once; a finished one makes room for the next. What a
    completion says depends on its prompt and its seed alone, not on what shares its batch (up to
    ties in floating point). `decode` turns tokens into text, for stop strings; `look` is the number
    of steps between looks at what has finished, by default what suits the device; `cache` how what
    rows remember is kept. Raises ValueError where there are no slots, or no kernels for the cache.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: int = 64,
        decode: Decode | None = None,
        look: int | None = None,
        cache: CacheSettings | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots = {slots}: at least one is needed")
        self.decoder, self.slots, self.decode = decoder, slots, decode
        self.cache = cache or CacheSettings()
        check_cache(decoder, self.cache)
        self.look = look or (1 if decoder.device.type == "cpu" else LOOK_STEPS)
        self.share_from: int | None = None  # `Forward.share_from`, once slots are open
        self.timing, self.log = Timing(), StepLog()

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
        for some in self.looks(requests, params):
            yield from some

    def looks(
        self, requests: Sequence[Request], params: SamplingParams
    ) -> Iterator[list[Finished]]:
        """As `stream`; what has finished whenever the engine looks, often nothing."""
        self._check(requests, params)
        left = Queue(requests)
        while left:
            try:
                for some in self._run(left, params):
                    for done in some:
                        left.finish(done.request, done.sample)
                    yield some
            except (RuntimeError, MemoryError) as error:
                if self.slots == 1 or not is_out_of_memory(error):
                    raise
                self.slots //= 2
                warn(f"out of memory: going on with {self.slots} slots")

    def warm(self, params: SamplingParams) -> None:
        """Samples a few tokens, so that kernels are there before a clock counts; the clocks then
        start from nothing.
        """
        few = replace(params, max_tokens=WARM_TOKENS)
        for _ in self._run(Queue([Request([0] * WARM_TOKENS, [0, 1])]), few):
            pass
        self.timing, self.log = Timing(), StepLog()

    def _run(self, left: Queue, params: SamplingParams) -> Iterator[list[Finished]]:
        """Completions of what is left, until memory runs out."""
        return _Batch(self, left, params).run()

    def stops(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that end a completion."""
        eos = self.decoder.config.eos_token_ids
        return frozenset(eos if params.stop_token_ids is None else params.stop_token_ids)

    def _check(self, requests: Sequence[Request], params: SamplingParams) -> None:
        for i, request in enumerate(requests):
            if len(request.prompt) == 0:
                raise ValueError(f"prompt {i} is empty: a model needs at least one token to start")
        if params.stop and self.decode is None:
            raise ValueError("SamplingParams: stop strings need an engine that can decode tokens")


@dataclass(frozen=True)
class _Row:
    """What the host knows of a running completion; `lead` and the batch's steps make its length."""

    request: int
    sample: int
    started: float
    lead: int


class _Batch:
    """The running rows, and what is still to come."""

    def __init__(self, engine: Engine, left: Queue, params: SamplingParams) -> None:
        self.engine, self.params = engine, params
        self.device = engine.decoder.device
        self.prompts = Prompts(left, [engine.decoder])
        self.stops = engine.stops(params)
        self.strings = StopStrings.of(params, engine.decode)
        self.running: list[_Row] = []
        self.steps = 0
        self.tokens = 0  # of the running rows, when last looked at
        self.warm = False  # the first steps load kernels, or compile them
        # Rows that have finished still go on until the next look.
        own = params.max_tokens + engine.look
        lengths = self.prompts.longest + own, own
        count = min(engine.slots, len(left))
        self.slots = open_slots(engine.decoder, count, lengths, params, self.stops, engine.cache)
        engine.share_from = self.slots.forward.share_from

    def run(self) -> Iterator[list[Finished]]:
        """What has finished whenever that is looked at, often nothing, until none is left."""
        while self.running or self.prompts:
            while self._room() > 0 and self.prompts:
                yield self._admit()
            if self.running:
                yield self._steps()

    @torch.inference_mode()
    def _admit(self) -> list[Finished]:
        """Starts as many samples of the next prompt as fit; returns what already finished."""
        before = self.prompts.timing
        start = self.prompts.start(self._room())
        self.engine.timing += self.prompts.timing - before
        began, now = time.perf_counter(), time.time()
        (prompt,) = start.prompts
        first = len(self.running)
        slot_S = torch.arange(first, first + len(start.samples), device=self.device)
        lead = self.prompts.left.length(start.request) - self.steps
        self.running += [_Row(start.request, sample, now, lead) for sample in start.samples]
        self.slots.start(slot_S, prompt.state, prompt.logits_1V, start.seeds)
        done = self._look(began, steps=0)
        seconds = time.perf_counter() - began
        self.engine.timing += Timing(starts=len(start.samples), start_seconds=seconds)
        return done

    def _room(self) -> int:
        return self.slots.forward.slots - len(self.running)

    @torch.inference_mode()
    def _steps(self) -> list[Finished]:
        """A token or more for every running row; returns the completions that this finished."""
        began = time.perf_counter()
        rows, look = len(self.running), self.engine.look
        longest, context = max(row.lead for row in self.running), self._context(look)
        for _ in range(look):
            self.steps += 1
            self.slots.step(rows, longest + self.steps)
        done = self._look(began, look)
        if self.warm:
            self.engine.log.add(rows, context, look, time.perf_counter() - began)
        self.warm = True
        return done

    def _context(self, steps: int) -> int:
        """Tokens that are read in the next steps: what each row has, and its new token; those of a
        prompt that rows share count once.
        """
        leads = sum(row.lead for row in self.running)
        rows, own = len(self.running), sum(range(self.steps + 1, self.steps + steps + 1))
        groups = self.slots.forward.groups(rows)
        spared = sum((len(group) - 1) * self._prompt_tokens(group[0]) for group in groups)
        return steps * (leads - spared) + rows * own

    def _prompt_tokens(self, row: int) -> int:
        return self.prompts.left.length(self.running[row].request)

    def _look(self, began: float, steps: int) -> list[Finished]:
        """Waits for the device, takes out what has finished, clocks what was done since `began`."""
        self.strings.apply(self.slots, len(self.running), max(1, steps))
        rows = len(self.running)
        finished = self.slots.finished_S[:rows].nonzero().flatten()
        tokens, before = int(self.slots.count_S[:rows].sum()), self.tokens
        self.tokens = tokens
        done = self._retire(finished) if len(finished) else []
        self.engine.timing += Timing(
            decode_tokens=tokens - before,
            decode_steps=steps,
            decode_seconds=time.perf_counter() - began,
        )
        return done

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
        gaps, movers = fill(len(self.running), finished)
        if gaps:
            slots, sources = (torch.tensor(rows, device=self.device) for rows in (gaps, movers))
            self.slots.move(slots, sources)
        for gap, mover in zip(gaps, movers, strict=True):
            self.running[gap] = self.running[mover]
        del self.running[len(self.running) - len(finished) :]
