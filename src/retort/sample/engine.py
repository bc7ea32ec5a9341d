"""The engine: prompts are read once, forked to their completions, and the batch is kept full.

    queue of prompts --prefill--> waiting completions --admit--> slots --step--> finished ones

Shapes: S slots, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from retort.model.decoder import Decoder
from retort.model.state import DecoderState
from retort.sample.tokens import SamplingParams, draw, log_probability, uniforms
from retort.store import sample_seed

PREFILL_ROWS = 16
PREFILL_TOKENS = 8192
"""Bounds of one prefill: prompts, and tokens with their padding."""


@dataclass(frozen=True)
class Completion:
    """A sampled continuation, its stop token included, and its log-probability under the model."""

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprob: float


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

    At most `slots` completions run at once; a finished one makes room for the next at once. What a
    completion says depends on its prompt and its seed alone, not on what shares its batch (up to
    ties in floating point).
    """

    def __init__(self, decoder: Decoder, slots: int = 64) -> None:
        if slots < 1:
            raise ValueError(f"slots = {slots}: at least one is needed")
        self.decoder, self.slots = decoder, slots
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
        """Completions as they finish. Raises ValueError for an empty prompt."""
        for i, request in enumerate(requests):
            if len(request.prompt) == 0:
                raise ValueError(f"prompt {i} is empty: a model needs at least one token to start")
        batch = _Batch(self, requests, params)
        while batch.running or batch.queue or batch.waiting:
            yield from batch.admit()
            if batch.running:
                yield from batch.step()


@dataclass(frozen=True)
class _Waiting:
    """A prompt that has been read: its state, its next token's logits, and who waits for it."""

    request: int
    state: DecoderState
    logits_1V: Tensor
    samples: deque[int]


@dataclass
class _Slot:
    """One running completion, as the host sees it."""

    request: int
    sample: int
    started: float
    length: int
    logprob: float = 0.0
    tokens: list[int] = field(default_factory=list)


class _Batch:
    """The running rows of one `stream`, and what is still to come."""

    def __init__(self, engine: Engine, requests: Sequence[Request], params: SamplingParams) -> None:
        self.engine, self.requests, self.params = engine, requests, params
        self.decoder = engine.decoder
        stops = params.stop_token_ids
        self.stops = frozenset(self.decoder.config.eos_token_ids if stops is None else stops)
        self.queue = deque(i for i, request in enumerate(requests) if len(request.seeds) > 0)
        self.waiting: deque[_Waiting] = deque()
        self.running: list[_Slot] = []
        longest = max((len(request.prompt) for request in requests), default=0)
        self.max_length = longest + params.max_tokens
        wanted = min(engine.slots, sum(len(request.seeds) for request in requests))
        self.state = self.decoder.init_state(wanted, self.max_length)
        # Per slot, on the device: the seed, the tokens sampled so far, and the last of them.
        self.seed_S, self.count_S, self.token_S = torch.zeros(
            3, wanted, dtype=torch.long, device=self.decoder.device
        )

    # ------------------------------------------------------------ admitting

    @torch.inference_mode()
    def admit(self) -> list[Finished]:
        """Fills free slots from the prompts that wait; returns what its first token finished."""
        finished: list[Finished] = []
        while len(self.running) < self.state.batch and (self.waiting or self.queue):
            if not self.waiting:
                self._prefill()
            self._start(self.waiting[0])
            if not self.waiting[0].samples:
                self.waiting.popleft()
            finished += self._retire()
        return finished

    def _prefill(self) -> None:
        """Reads the next prompts, together and padded, each once however many samples it has."""
        began = time.perf_counter()
        chosen = self._next_prompts()
        prompts = [torch.tensor(self.requests[i].prompt) for i in chosen]
        ids_BT = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        length_B = torch.tensor([len(prompt) for prompt in prompts])
        padding_BT = torch.arange(ids_BT.shape[1]) >= length_B[:, None]
        device = self.decoder.device
        state = self.decoder.init_state(*ids_BT.shape)
        h_BTD = self.decoder.hidden(ids_BT.to(device), state, -padding_BT.long().to(device))
        last_BD = h_BTD[torch.arange(len(chosen), device=device), (length_B - 1).to(device)]
        logits_BV = self.decoder.lm_head(last_BD)
        for row, i in enumerate(chosen):
            samples = deque(range(len(self.requests[i].seeds)))
            self.waiting.append(_Waiting(i, state.select([row]), logits_BV[row : row + 1], samples))
        self._clock(began, prefill_tokens=int(length_B.sum()))

    def _next_prompts(self) -> list[int]:
        """Prompts enough for the free slots, within the bounds of one prefill."""
        chosen: list[int] = []
        free, longest = self.state.batch - len(self.running), 0
        while self.queue and free > 0 and len(chosen) < PREFILL_ROWS:
            request = self.requests[self.queue[0]]
            longest = max(longest, len(request.prompt))
            if chosen and longest * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            chosen.append(self.queue.popleft())
            free -= len(request.seeds)
        return chosen

    def _start(self, waiting: _Waiting) -> None:
        """Forks a prompt's state into free slots and samples the first token of each."""
        began = time.perf_counter()
        request = self.requests[waiting.request]
        first = len(self.running)
        count = min(self.state.batch - first, len(waiting.samples))
        samples = [waiting.samples.popleft() for _ in range(count)]
        slots = torch.arange(first, first + count, device=self.decoder.device)
        self.state.put(slots, waiting.state)
        self.seed_S[slots] = torch.tensor(
            [request.seeds[sample] for sample in samples], device=self.decoder.device
        )
        self.count_S[slots] = 0
        now = time.time()
        self.running += [
            _Slot(waiting.request, sample, now, len(request.prompt)) for sample in samples
        ]
        self._sample(slice(first, first + count), waiting.logits_1V.expand(count, -1))
        self._clock(began, decode_tokens=count)

    # ------------------------------------------------------------ stepping

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """One token for every running row; returns the completions that this finished."""
        began = time.perf_counter()
        rows = len(self.running)
        # The last token of a row has been sampled but not read, so states are one behind.
        state = self.state.first(rows, reach=max(slot.length for slot in self.running) - 1)
        logits_SV = self.decoder(self.token_S[:rows, None], state).squeeze(1)
        self._sample(slice(0, rows), logits_SV)
        self._clock(began, decode_tokens=rows, decode_steps=1)
        return self._retire()

    def _sample(self, rows: slice, logits_SV: Tensor) -> None:
        """Draws a token for each of the given rows and notes it on the device and on the host."""
        uniform_S = uniforms(self.seed_S[rows], self.count_S[rows])
        token_S = draw(logits_SV, uniform_S, self.params)
        logprob_S = log_probability(logits_SV, token_S)
        self.token_S[rows] = token_S
        self.count_S[rows] += 1
        told = zip(self.running[rows], token_S.tolist(), logprob_S.tolist(), strict=True)
        for slot, token, logprob in told:
            slot.tokens.append(token)
            slot.logprob += logprob
            slot.length += 1

    def _retire(self) -> list[Finished]:
        """Takes finished rows out, moving the rows behind them into their place."""
        finished, keep = [], []
        for row, slot in enumerate(self.running):
            reason = self._finish_reason(slot)
            if reason is None:
                keep.append(row)
                continue
            completion = Completion(slot.tokens, reason, slot.logprob)
            finished.append(
                Finished(slot.request, slot.sample, completion, slot.started, time.time())
            )
        if finished:
            self._move(keep)
        return finished

    def _finish_reason(self, slot: _Slot) -> Literal["stop", "length"] | None:
        if slot.tokens[-1] in self.stops:
            return "stop"
        return "length" if len(slot.tokens) >= self.params.max_tokens else None

    def _move(self, keep: list[int]) -> None:
        """Closes the gaps: only the rows that fill one are copied."""
        gaps = sorted(set(range(len(keep))) - set(keep))
        movers = [row for row in keep if row >= len(keep)]
        if movers:
            self.state.put(gaps, self.state.select(movers))
            for tensor_S in (self.seed_S, self.count_S, self.token_S):
                tensor_S[gaps] = tensor_S[movers]
        for gap, mover in zip(gaps, movers, strict=True):
            self.running[gap] = self.running[mover]
        del self.running[len(keep) :]

    def _clock(
        self, began: float, prefill_tokens: int = 0, decode_tokens: int = 0, decode_steps: int = 0
    ) -> None:
        """Adds the time since `began` to prefill or to decoding, whichever was done."""
        seconds = time.perf_counter() - began
        prefill = prefill_tokens > 0
        self.engine.timing += Timing(
            prefill_tokens,
            seconds if prefill else 0.0,
            decode_tokens,
            decode_steps,
            0.0 if prefill else seconds,
        )
