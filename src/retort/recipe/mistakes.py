"""One line for each mistake in a recipe, in the words of someone who has not read the code."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic_core import ErrorDetails

from retort.recipe.base import Frozen


def one_line(kind: type[Frozen], error: ErrorDetails) -> str:
    """What is wrong, and where, with a hint where there is one."""
    place = [part for part in error["loc"] if not str(part).startswith("function-")]
    if error["type"] == "extra_forbidden":
        return _unknown_key(kind, place)
    where = _where(kind, place)
    if error["type"] == "missing":
        return f"{where}: missing, and it has no default"
    message = _message(kind, place, error)
    if re.match(r"(stages|student|teacher)[.0-9a-z]*:", message):
        return message
    given = "" if isinstance(error["input"], dict) else f", not {error['input']!r}"
    return f"{where or 'recipe'}: {message[0].lower()}{message[1:]}{given}"


def _message(kind: type[Frozen], place: list[int | str], error: ErrorDetails) -> str:
    """What is wrong, in the words of someone who has not read this module."""
    context = error.get("ctx", {})
    tag = str(context.get("discriminator")).strip("'")
    match error["type"]:
        case "union_tag_invalid":
            return f"{tag} {context['tag']!r} is not known, choose {context['expected_tags']}"
        case "union_tag_not_found":
            tags = [each for member in _members(_model_at(kind, place)) for each in _tags(member)]
            return f"{tag} is missing, choose {', '.join(map(repr, tags))}"
        case "model_type" | "model_attributes_type":
            return "must be a mapping of keys to values"
        case "tuple_type":
            return "must be a list"
    return error["msg"].removeprefix("Value error, ")


def _unknown_key(kind: type[Frozen], place: list[int | str]) -> str:
    known = list(_model_at(kind, place[:-1]).model_fields)
    close = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
    return f"{_where(kind, place)}: unknown key, {hint}"


def _where(kind: type[Frozen], place: Sequence[int | str]) -> str:
    """The place as the user wrote it: pydantic adds the tags of unions to its own."""
    parts, current = [], kind
    for part in place:
        current, written = _step(current, part)
        parts += [str(part)] if written else []
    return ".".join(parts)


def _model_at(kind: type[Frozen], place: Sequence[int | str]) -> type[Frozen]:
    current: Any = kind
    for part in place:
        current, _ = _step(current, part)
    return current


def _step(current: Any, part: int | str) -> tuple[Any, bool]:
    """The annotation one step below `current`, and whether the user's file has that step."""
    if isinstance(current, type) and issubclass(current, Frozen):
        field = current.model_fields.get(str(part))
        return (field.annotation if field else None), True
    members = _members(current)
    for member in members:
        if isinstance(member, type) and issubclass(member, Frozen) and part in _tags(member):
            return member, False
    if typing.get_origin(current) is tuple:
        return members[0], True
    return None, True


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) is Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        return typing.get_args(annotation)
    return ()


def _tags(model: type[Frozen]) -> tuple[Any, ...]:
    """The values of the field that tells a model from the others in its union."""
    field = model.model_fields.get("kind") or model.model_fields.get("start")
    return typing.get_args(field.annotation) if field else ()
