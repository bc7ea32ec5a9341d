"""The same weights under transformers: exported, loaded there, and sampled with its `generate`.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as their_logging

from retort.bench.contenders import TEMPERATURE, WARM_STEPS, Case, Runtime, Timed, random_tokens
from retort.bench.machine import synchronise, timed
from retort.bench.models import Model
from retort.bench.spans import Span
from retort.model import formats, weights
from retort.model.cost import CacheBytes
from retort.model.formats import granite


@dataclass(frozen=True)
class Prompt:
    """A prompt and one token more, and the cache of the prompt."""

    ids_1T: Tensor
    cache: DynamicCache


@dataclass(frozen=True)
class Theirs:
    """A model under transformers, with the attention that it chooses by itself."""

    model: Model
    loaded: Any  # a PreTrainedModel, whose own types say less than it does
    runtime: Runtime = "transformers"

    @property
    def name(self) -> str:
        """The model's name, and that it is not ours."""
        return f"{self.model.name} (transformers)"

    @property
    def cache(self) -> CacheBytes:
        """What its rows remember, as the cost model counts it."""
        return self.model.cache

    @torch.inference_mode()
    def read(self, length: int) -> Prompt:
        """Reads a prompt in one forward pass, which makes the logits of its last token alone."""
        ids_1T = self._ids(length + 1)
        cache = DynamicCache(config=self.loaded.config)
        given = {cache_keyword(self.loaded): cache}
        self.loaded(ids_1T[:, :-1], use_cache=True, logits_to_keep=1, **given)
        return Prompt(ids_1T, cache)

    @torch.inference_mode()
    def decode(self, case: Case, prompt: Prompt) -> Timed:
        """The steps of a `generate` that goes on from the prompt's cache, forked to the rows."""
        assert case.prompts == "own", "generate knows of no shared prompts"
        cache = deepcopy(prompt.cache)
        first_B = torch.zeros(case.batch, dtype=torch.long, device=self.loaded.device)
        cache.reorder_cache(first_B)  # type: ignore[arg-type]  # it says LongTensor
        ids_BT = prompt.ids_1T.expand(case.batch, -1)
        new = WARM_STEPS + case.span.steps
        clock = _Clock(WARM_STEPS, new, self.loaded.device)
        self.loaded.generate(
            ids_BT,
            min_new_tokens=new,
            max_new_tokens=new,
            stopping_criteria=StoppingCriteriaList([clock]),
            **{cache_keyword(self.loaded): cache},
            **_sampling(ids_BT),
        )
        return Timed(clock.seconds, None)

    @torch.inference_mode()
    def complete(self, length: int, n: int) -> tuple[int, float]:
        """Tokens that go through the model, and seconds, for the first tokens of n completions."""
        ids_1T = self._ids(length)
        read = 0

        def count(module: object, inputs: tuple[Tensor, ...]) -> None:
            nonlocal read
            read += inputs[0].numel()

        hook = self.loaded.get_input_embeddings().register_forward_pre_hook(count)
        try:
            seconds = timed(
                lambda: self.loaded.generate(
                    ids_1T, num_return_sequences=n, max_new_tokens=1, **_sampling(ids_1T)
                ),
                ids_1T.device,
            )
        finally:
            hook.remove()
        return read, seconds

    def _ids(self, length: int) -> Tensor:
        return random_tokens(self.model.config.vocab_size, length).to(self.loaded.device)


def open_transformers(model: Model) -> Theirs:
    """Exports a model and loads it with transformers, where the decoder is and in its dtype.

    Raises ValueError for a model that transformers has no architecture for.
    """
    if formats.portable(model.config) is None:
        reasons = "; ".join(granite.GRANITE.refusals(model.config))
        raise ValueError(f"{model.name} does not run under transformers: {reasons}")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        weights.save(model.decoder, Path(folder) / "model")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=model.decoder.lm_head.weight.dtype
        )
        theirs = Theirs(model, loaded.to(model.decoder.device).eval())
        case = Case(1, Span(1, 1))
        theirs.decode(case, theirs.read(case.lead))  # what it says at its first steps is not heard
    return theirs


def cache_keyword(loaded: Any) -> str:
    """What a model of transformers calls its cache: the name changed within version 5."""
    return "cache" if "cache" in signature(loaded.forward).parameters else "past_key_values"


def caveats(model: Model) -> list[str]:
    """What makes the comparison less than fair, if anything."""
    found = []
    if model.config.linear_layers and importlib.util.find_spec("mamba_ssm") is None:
        found.append(f"{model.name}: transformers runs its mixers in torch, without mamba_ssm")
    if not model.config.attention_layers:
        found.append(f"{model.name}: exported with one block more, which adds exactly nothing")
    oldest = granite.oldest_transformers(model.config)
    if oldest and not granite.norms_groups(version("transformers")):
        found.append(f"{model.name}: transformers before {oldest} computes noise, as fast")
    return found


def _sampling(ids_BT: Tensor) -> dict[str, Any]:
    """The distribution that our rows are drawn from; every token of the prompt is one."""
    return {
        "attention_mask": torch.ones_like(ids_BT),
        "do_sample": True,
        "temperature": TEMPERATURE,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": 0,
    }


class _Clock(StoppingCriteria):
    """Never stops; reads the time when the `start`-th token is out, and again at the `end`-th."""

    def __init__(self, start: int, end: int, device: torch.device) -> None:
        self.start, self.end, self.device = start, end, device
        self.tokens, self.seconds = 0, 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self.tokens += 1
        if self.tokens in (self.start, self.end):
            synchronise(self.device)
            now = time.perf_counter()
            self.seconds = now - self.seconds
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=self.device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars for loading, and without advice on packages: `caveats` says what matters."""
    level, bars = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        their_logging.set_verbosity(level)
        if bars:
            their_logging.enable_progress_bar()
