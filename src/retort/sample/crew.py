"""Who samples: one engine in this process, or workers of a cluster; to a run they are the same."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from retort.data.chat import load_tokenizer
from retort.model import weights
from retort.model.decoder import Decoder
from retort.model.devices import fast_dtype, open_device
from retort.recipe import SampleRecipe
from retort.sample.cache import CacheSettings
from retort.sample.engine import Decode, Engine
from retort.sample.memory import auto_slots
from retort.sample.speculative import Speculative, load_draft
from retort.sample.work import Portion, Work, params_of, portions


class Crew(Protocol):
    """One engine or more, on what `device` names."""

    @property
    def device(self) -> str:
        """What it runs on, in words."""

    def sample(self, work: Sequence[Work]) -> Iterator[Portion | None]:
        """All of the work, each completion once, in portions as engines finish them; None now and
        then where nothing has finished for a while.
        """


@dataclass(frozen=True)
class Alone:
    """An engine in this process."""

    recipe: SampleRecipe
    engine: Engine

    @property
    def device(self) -> str:
        """What it runs on, in words."""
        return device_name(self.recipe.device)

    def sample(self, work: Sequence[Work]) -> Iterator[Portion | None]:
        """All of the work, in portions as completions finish."""
        self.engine.warm(params_of(self.recipe.sampling))
        return portions(self.engine, self.recipe.sampling, work)


def open_engine(recipe: SampleRecipe, prompt_tokens: int, processes: int = 1) -> Engine:
    """The recipe's model in an engine, with its draft if it has one.

    With `slots: auto` there are as many as fit behind prompts of at most `prompt_tokens`, where so
    many processes share the device's memory. Raises ValueError for folders or a device that do not
    work here.
    """
    open_device(recipe.device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    dtype, tokenizer = dtype_of(recipe), load_tokenizer(recipe.model)
    decoder = weights.load(recipe.model, dtype, recipe.device)
    cache, decode = CacheSettings.of(recipe.cache), _decoding(tokenizer)
    longest = prompt_tokens + recipe.sampling.max_tokens

    def slots(*decoders: Decoder) -> int:
        if recipe.slots == "auto":
            return auto_slots(decoders, longest, cache, processes)
        return recipe.slots

    if recipe.draft is None:
        return Engine(decoder, slots(decoder), decode, cache=cache)
    draft = load_draft(recipe.draft.model, decoder, tokenizer, dtype)
    return Speculative(decoder, draft, recipe.draft.tokens, slots(decoder, draft), decode)


def _decoding(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """As runs have it: without markers."""

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    return decode


def models(recipe: SampleRecipe) -> list[Path]:
    """The folders of all models that sample."""
    return [recipe.model, *([recipe.draft.model] if recipe.draft else [])]


def dtype_of(recipe: SampleRecipe) -> torch.dtype:
    """The asked type, else the one that suits the device; the device need not be here."""
    if recipe.dtype is not None:
        return weights.DTYPES[recipe.dtype]
    return fast_dtype(torch.device(recipe.device))


def device_name(device: str) -> str:
    """A device of this machine, in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
