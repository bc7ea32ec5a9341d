"""Who is measured side by side: our models, and the same weights under other programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

from retort.bench import huggingface, llama_cpp
from retort.bench.contenders import Contender, Ours
from retort.bench.models import Model
from retort.model import cost
from retort.sample.cache import CacheSettings
from retort.sample.forward import check_cache

PEERS = ("transformers", "llama.cpp")


def contenders(
    models: Sequence[Model],
    plain: bool = False,
    against: Sequence[str] = (),
    cache: CacheSettings | None = None,
) -> tuple[list[Contender[Any]], list[str]]:
    """Each model, and beside it what is asked for: with what rows remember kept as `cache` says,
    in plain torch, under other programs; and notes on what is left out or unfair.

    Raises ValueError for a program that is unknown, not here, or runs none of the models, and for
    a cache that none of them can have.
    """
    found: list[Contender[Any]] = [Ours(model) for model in models]
    notes: list[str] = []
    if cache is not None:
        kept, notes = _kept(models, cache)
        found += kept
    if plain:
        found += [_plain(model) for model in models]
    for program in dict.fromkeys(against):
        opened, said = _opened(program, models)
        found += opened
        notes += said
    return found, notes


def _kept(models: Sequence[Model], cache: CacheSettings) -> tuple[list[Ours], list[str]]:
    """The models that keep something else, or keep it in another way, with such a cache."""
    found: list[Ours] = []
    notes: list[str] = []
    for model in models:
        ours = Ours(model, kept=cache)
        one = partial(cost.decode_bytes, model.config, 1, 1, model.itemsize)
        try:
            check_cache(model.decoder, cache)
        except ValueError as error:
            notes.append(f"{model.name}: {error}")
        else:
            found += [ours] if one(ours.cache) != one(model.cache) else []
    if not found:
        raise ValueError("; ".join(notes) or f"cache ({cache}): changes nothing for these models")
    return found, notes


def _plain(model: Model) -> Ours:
    """The torch reference, with weights of its own: kernels may lay theirs out anew."""
    return Ours(Model(model.name, deepcopy(model.decoder)), plain=True)


def _opened(program: str, models: Sequence[Model]) -> tuple[list[Contender[Any]], list[str]]:
    """The models that a program runs, and notes."""
    open_one, caveat = _program(program)
    found: list[Contender[Any]] = []
    notes: list[str] = []
    for model in models:
        try:
            found.append(open_one(model))
        except ValueError as error:
            notes.append(str(error))
        else:
            notes += caveat(model)
    if not found:
        raise ValueError(f"--against {program}: {'; '.join(notes)}")
    return found, notes


def _program(
    name: str,
) -> tuple[Callable[[Model], Contender[Any]], Callable[[Model], list[str]]]:
    """What opens a model with the program, and what it has to say of the comparison."""
    if name == "transformers":
        return huggingface.open_transformers, huggingface.caveats
    if name == "llama.cpp":
        llama_cpp.check()
        return llama_cpp.open_llama_cpp, llama_cpp.caveats
    raise ValueError(f"--against {name}: choose {' or '.join(PEERS)}")
