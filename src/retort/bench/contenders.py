"""What decodes: a model under the engine's own forward, or under the plain torch one.

Shapes: S rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from retort.bench.machine import timed
from retort.bench.models import Model
from retort.bench.spans import Span
from retort.model.cost import CacheBytes
from retort.sample import prefill, samplers
from retort.sample.cache import CacheSettings
from retort.sample.engine import Engine
from retort.sample.forward import Plain
from retort.sample.slots import Slots, open_slots
from retort.sample.tokens import SamplingParams

Runtime = Literal["retort", "plain", "transformers", "llama.cpp"]
Prompts = Literal["own", "shared"]

TEMPERATURE = 0.8
WARM_STEPS = 3
"""Steps before the clock starts: the first ones make buffers, compile, and record a graph."""

USUAL = CacheSettings()

P = TypeVar("P")


@dataclass(frozen=True)
class Case:
    """So many rows decoding over a span, from prompts of their own or from one that they share."""

    batch: int
    span: Span
    prompts: Prompts = "own"

    @property
    def lead(self) -> int:
        """Tokens to be read before the steps that warm up."""
        return max(1, self.span.context - WARM_STEPS)


@dataclass(frozen=True)
class Timed:
    """Seconds of a span's steps, and bytes of the states of all rows, if a runtime tells."""

    seconds: float
    state_bytes: int | None


class Contender(Protocol[P]):
    """A model under a runtime; P is what it knows of a prompt that has been read."""

    @property
    def model(self) -> Model:
        """The model."""

    @property
    def runtime(self) -> Runtime:
        """The runtime."""

    @property
    def name(self) -> str:
        """What tables call it: no two are called the same."""

    @property
    def cache(self) -> CacheBytes:
        """What its rows remember, as the cost model counts it."""

    def read(self, length: int) -> P:
        """Reads a prompt of random tokens, up to the logits of its next token."""

    def decode(self, case: Case, prompt: P) -> Timed:
        """Forks a prompt of `case.lead` tokens to the rows, and samples the span's steps."""

    def complete(self, length: int, n: int) -> tuple[int, float]:
        """Tokens read, and seconds, for the first tokens of n completions of one prompt."""


@dataclass(frozen=True)
class Ours:
    """A model under the engine's forward, with what rows remember kept as `kept` says, or under
    torch's plain one.
    """

    model: Model
    plain: bool = False
    kept: CacheSettings = USUAL

    @property
    def runtime(self) -> Runtime:
        """Which forward it is."""
        return "plain" if self.plain else "retort"

    @property
    def name(self) -> str:
        """The model's name, and what is not as usual."""
        unusual = "plain torch" if self.plain else str(self.kept)
        return f"{self.model.name} ({unusual})" if unusual else self.model.name

    @property
    def cache(self) -> CacheBytes:
        """What its rows remember, as the cost model counts it."""
        return self.kept.bytes_of(self.model.decoder.lm_head.weight.dtype)

    def read(self, length: int) -> prefill.Prompt:
        """Reads a prompt as the engine does."""
        tokens = random_tokens(self.model.config.vocab_size, length)[0].tolist()
        return prefill.read(self.model.decoder, [tokens])[0]

    @torch.inference_mode()
    def decode(self, case: Case, prompt: prefill.Prompt) -> Timed:
        """As the engine does it: through its forward, its registers and its sampler."""
        steps = WARM_STEPS + case.span.steps
        slots = self._slots(case, steps + 1)
        _start(slots, prompt, case)
        _steps(slots, case, range(WARM_STEPS))
        device = slots.forward.device
        seconds = timed(lambda: _steps(slots, case, range(WARM_STEPS, steps)), device)
        return Timed(seconds, slots.forward.nbytes)

    def complete(self, length: int, n: int) -> tuple[int, float]:
        """Tokens that the engine's prefill reads, and its seconds, for n completions."""
        engine = Engine(self.model.decoder, slots=n)
        tokens = random_tokens(self.model.config.vocab_size, length)[0].tolist()
        engine.generate([tokens], SamplingParams(n=n, max_tokens=1, temperature=TEMPERATURE))
        return engine.timing.prefill_tokens, engine.timing.prefill_seconds

    def _slots(self, case: Case, tokens: int) -> Slots:
        """For so many tokens of each row: as the engine opens them, or with what torch brings along
        and nothing else.
        """
        decoder, length = self.model.decoder, case.lead + tokens
        params = SamplingParams(max_tokens=tokens, temperature=TEMPERATURE)
        if self.plain:
            forward = Plain(decoder, case.batch, length)
            return Slots(forward, samplers.Plain(params), tokens, stops=())
        lengths = length, tokens
        return open_slots(decoder, case.batch, lengths, params, stops=(), cache=self.kept)


def random_tokens(vocabulary: int, length: int) -> Tensor:
    """Ids_1T on the CPU, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, length), generator=generator)


def _start(slots: Slots, prompt: prefill.Prompt, case: Case) -> None:
    """Admits the prompt to all rows at once, or a copy of it to each: then none is shared."""
    slot_S = torch.arange(case.batch, device=slots.forward.device)
    if case.prompts == "shared":
        slots.start(slot_S, prompt.state, prompt.logits_1V, list(range(case.batch)))
        return
    for row in range(case.batch):
        own = prompt.state.select([0])
        slots.start(slot_S[row : row + 1], own, prompt.logits_1V, [row])


def _steps(slots: Slots, case: Case, steps: range) -> None:
    for step in steps:
        slots.step(case.batch, case.lead + step + 1)
