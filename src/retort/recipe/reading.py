"""Recipes from YAML files and `key.path=value` arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from retort.recipe.base import RECIPES, Frozen, RecipeError
from retort.recipe.mistakes import one_line

R = TypeVar("R", bound=Frozen)


def load(kind: type[R], sources: Iterable[str | Path]) -> R:
    """The recipe that `sources` describe, read from left to right, the later ones winning.

    A source with a `=` sets one value (`stages.0.optim.lr=1e-3`); any other is a YAML file, of this
    machine or, where there is none, a bundled one (`llamba-1b.yaml`, `demo/pure.yaml`).
    Mappings are merged key by key, everything else is replaced.
    Raises RecipeError, with a line for each mistake.
    """
    merged: Any = {}
    for source in sources:
        text = str(source)
        if isinstance(source, str) and "=" in text:
            _assign(merged, *text.split("=", 1))
        else:
            merged = _merge(merged, _read(_found(Path(text))))
    return parse(kind, merged)


def parse(kind: type[R], values: Mapping[str, Any]) -> R:
    """The recipe that a plain mapping describes. Raises RecipeError as `load` does."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise RecipeError("\n".join(one_line(kind, each) for each in details)) from None


class _Loader(yaml.SafeLoader):
    """YAML as people write it in recipes: `1e-3` and `3e8` are numbers, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _found(path: Path) -> Path:
    bundled = RECIPES / path
    return bundled if bundled.is_file() and not path.exists() else path


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader: plain data
    except FileNotFoundError:
        known = ", ".join(sorted(str(p.relative_to(RECIPES)) for p in RECIPES.rglob("*.yaml")))
        raise RecipeError(
            f"{path}: no such recipe file (bundled ones: {known}) (docs/recipes.md)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    return {key: _unshared(value) for key, value in values.items()}


def _unshared(value: Any) -> Any:
    """A copy of its own for each of YAML's aliases, so that one can be set without the others."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_unshared(each) for each in value]
    return value


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: _merge(base.get(key), value) for key, value in over.items()}
    return over


def _assign(values: dict[str, Any], path: str, text: str) -> None:
    """Sets `path` (keys and list positions joined by dots) in `values` to YAML `text`."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise RecipeError(f"{path}: {text!r} is not a YAML value") from None
    *parents, last = path.split(".")
    place: Any = values
    for key in parents:
        place = _child(place, key, path)
    if isinstance(place, list):
        place[_position(place, last, path)] = value
    else:
        place[last] = value


def _child(place: Any, key: str, path: str) -> Any:
    if isinstance(place, list):
        child = place[_position(place, key, path)]
    else:
        child = place.setdefault(key, {})
    if not isinstance(child, dict | list):
        raise RecipeError(f"{path}: {key} is a single value and has no keys below it")
    return child


def _position(items: list[Any], key: str, path: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise RecipeError(f"{path}: {key!r} is no position in a list of {len(items)} (0 is first)")
    return int(key)
