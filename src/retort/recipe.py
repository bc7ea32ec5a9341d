"""Recipes: every setting of a run as frozen data, from YAML files and `key.path=value` arguments.

A recipe is checked whole before any work starts, and all its mistakes are reported at once.
This module imports neither torch nor anything else of Retort, so that reading a recipe is instant.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

PACKAGE = Path(__file__).parent
RECIPES = PACKAGE / "recipes"
BUNDLED_TEACHER = PACKAGE / "bundled" / "teacher"

# Wording and layout of the paper's GSM8K prompt (arXiv 2502.20339, appendix).
PAPER_PROMPT = (
    "Given the following problem, reason and give a final answer to the problem.\n"
    'Your response should end with "The final answer is [answer]" '
    "where [answer] is the response to the problem.\n"
    "Problem: {question}"
)


R = typing.TypeVar("R", bound="Frozen")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message has one line for each mistake."""


def _bundled(value: Any) -> Any:
    return BUNDLED_TEACHER if value == "bundled" else value


def _has_question(prompt: str) -> str:
    if "{question}" not in prompt:
        raise ValueError("must contain {question}, the place where the problem's text goes")
    return prompt


ModelFolder = Annotated[Path, BeforeValidator(_bundled)]
"""A checkpoint folder; the word `bundled` is the small teacher that comes with the package."""

Prompt = Annotated[str, AfterValidator(_has_question)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Difficulty = Annotated[int, Field(ge=1, le=12)]


class Frozen(BaseModel):
    """Base of all recipe parts: immutable, and unknown keys are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# ---------------------------------------------------------------- problems


class Arithmetic(Frozen):
    """Procedural word problems; `difficulty` is the least and the largest number of steps."""

    kind: Literal["arithmetic"]
    split: Literal["train", "test"] = "test"
    count: PositiveInt = 100
    seed: NonNegativeInt = 0
    difficulty: tuple[Difficulty, Difficulty] = (3, 6)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.difficulty[0] > self.difficulty[1]:
            raise ValueError("difficulty is [least, largest]: the first number is the larger one")
        return self


class Subset(Frozen):
    """Problems from a file: all of them, or `count` of them drawn with `seed`."""

    count: PositiveInt | None = None
    seed: NonNegativeInt = 0


class Gsm8k(Subset):
    """GSM8K from a local JSONL, or from the hub as openai/gsm8k when no path is given."""

    kind: Literal["gsm8k"]
    path: Path | None = None
    split: Literal["train", "test"] = "test"


class Math500(Subset):
    """MATH-500 from a local JSONL, or from the hub as HuggingFaceH4/MATH-500."""

    kind: Literal["math500"]
    path: Path | None = None


class Jsonl(Subset):
    """Any JSONL file with a question and an answer in each row, under the keys named here."""

    kind: Literal["jsonl"]
    path: Path
    question: str = "question"
    answer: str = "answer"
    solution: str | None = None


Problems = Annotated[Arithmetic | Gsm8k | Math500 | Jsonl, Field(discriminator="kind")]


# ---------------------------------------------------------------- distillation


class Worked(Frozen):
    """Training rows from problems with a worked solution: chat template, loss on the answer."""

    kind: Literal["worked"]
    problems: Problems
    prompt: Prompt = PAPER_PROMPT


class Text(Frozen):
    """Training rows from plain text: JSONL files with one document in the field `column`."""

    kind: Literal["text"]
    path: Path
    column: str = "text"


Data = Annotated[Worked | Text, Field(discriminator="kind")]


class MixerSettings(Frozen):
    """What a mixer does not take from the attention layer it replaces. `heads`, `head_dim` and
    `groups` are for the Mamba-2 kinds that do not start from the attention's weights.
    """

    state_size: PositiveInt | None = None
    conv_width: Annotated[int, Field(ge=2)] = 4
    chunk_size: PositiveInt | None = None
    heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    groups: PositiveInt | None = None


class KeepLayers(Frozen):
    """Attention stays in the layers named; a recipe may give the list alone."""

    kind: Literal["layers"]
    layers: tuple[NonNegativeInt, ...] = ()


class KeepEvery(Frozen):
    """Attention stays in every `step`-th layer: 3, 7, 11 ... for a step of 4."""

    kind: Literal["every"]
    step: PositiveInt


class KeepPaper(Frozen):
    """Attention stays where the published hybrids have it: 6 of 28 layers, or 4 of 16."""

    kind: Literal["paper"]


class KeepImportant(Frozen):
    """Attention stays in the `count` layers whose replacement alone costs most: each is replaced in
    turn, and the KL from the teacher measured on `rows` rows of `length` tokens.
    """

    kind: Literal["important"]
    count: NonNegativeInt
    data: Data
    rows: PositiveInt = 8
    length: Annotated[int, Field(ge=8)] = 512


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return {"kind": "layers", "layers": value}
    if not isinstance(value, dict | Frozen):
        raise ValueError("must be a list of layers, or a mapping such as {kind: every, step: 4}")
    return value


Keep = Annotated[
    KeepLayers | KeepEvery | KeepPaper | KeepImportant,
    Field(discriminator="kind"),
    BeforeValidator(_listed),
]


class Transplanted(Frozen):
    """A student made from the teacher, or from `source`, a student that has attention left to
    replace: layers in `keep_attention` stay, the others are replaced.
    """

    start: Literal["transplant"]
    source: ModelFolder | None = None
    keep_attention: Keep = KeepLayers(kind="layers")
    mixer: Literal["mamba2", "discrete_mamba2", "mamba1"] = "mamba2"
    initial: Literal["attention", "identity"] = "attention"
    settings: MixerSettings = MixerSettings()


class Fresh(Frozen):
    """A Llama-shaped model from random weights, with a tokenizer trained on the stage's data."""

    start: Literal["fresh"]
    vocab_size: Annotated[int, Field(ge=300)] = 512
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 384
    layers: PositiveInt = 6
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    max_position: PositiveInt = 4096
    rope_theta: PositiveFloat = 10_000.0


class Continued(Frozen):
    """A student read from a folder: one distilled before, or any checkpoint to fine-tune."""

    start: Literal["folder"]
    folder: ModelFolder


Student = Annotated[Transplanted | Fresh | Continued, Field(discriminator="start")]


class MixingMatrices(Frozen):
    """MOHAWK stage 1: match the attention matrices."""

    kind: Literal["mixing_matrices"]
    squared: bool = False


class HiddenStates(Frozen):
    """MOHAWK stage 2: match each block's output, or its mixer's output alone."""

    kind: Literal["hidden_states"]
    compare: Literal["block", "mixer"] = "block"


class Distill(Frozen):
    """KL between token distributions, end to end (MOHAWK stage 3; MambaInLlama)."""

    kind: Literal["distill"]
    direction: Literal["forward", "reverse", "jsd"] = "forward"
    temperature: PositiveFloat = 1.0
    ce_weight: Fraction = 0.0


class Supervised(Frozen):
    """Cross-entropy on the answer tokens."""

    kind: Literal["supervised"]


Objective = Annotated[
    MixingMatrices | HiddenStates | Distill | Supervised, Field(discriminator="kind")
]


class Optim(Frozen):
    """AdamW and its learning-rate schedule; `warmup` and `decay` are fractions of the stage."""

    lr: PositiveFloat
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: PositiveFloat = 1.0
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: Fraction = 0.1
    decay: Fraction = 0.1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError("warmup and decay are fractions of the stage: their sum exceeds 1")
        return self


class Stage(Frozen):
    """One stage: an objective on data for `tokens` tokens, `rows` rows of `length` in each step."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    objective: Objective
    data: Data
    tokens: PositiveInt
    rows: PositiveInt = 16
    micro_rows: PositiveInt | None = None
    length: Annotated[int, Field(ge=8)] = 512
    optim: Optim
    freeze: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.micro_rows is not None and self.rows % self.micro_rows:
            raise ValueError("rows must be a multiple of micro_rows")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps: the token budget over the tokens of a step, rounded up."""
        return -(-self.tokens // (self.rows * self.length))


class Checkpoints(Frozen):
    """When training state is written (steps apart) and how many states are kept."""

    every: PositiveInt = 200
    keep: PositiveInt = 2


class DistillRecipe(Frozen):
    """`retort distill`: a student, the stages it goes through, and the folder it ends in."""

    out: Path
    teacher: ModelFolder | None = None
    student: Student
    stages: tuple[Stage, ...]
    seed: NonNegativeInt = 0
    device: str = "cpu"
    max_bad_steps: PositiveInt = 20
    force: bool = False
    checkpoints: Checkpoints = Checkpoints()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("stages: empty; a recipe needs at least one")
        if len(set(names)) < len(names):
            raise ValueError("stages: every stage needs a name of its own")
        alone = all(stage.objective.kind == "supervised" for stage in self.stages)
        if self.teacher is None and (self.student.start == "transplant" or not alone):
            raise ValueError("teacher: missing; only supervised stages do without one")
        self._check_mixer()
        return self

    def _check_mixer(self) -> None:
        student = self.student
        if student.start != "transplant":
            return
        if student.initial == "identity" and student.mixer != "discrete_mamba2":
            raise ValueError(
                f"student.initial: {student.mixer} cannot start as the identity, since its gate "
                "has no bias; choose discrete_mamba2, or start from the attention"
            )
        for index, stage in enumerate(self.stages):
            if student.mixer == "mamba1" and stage.objective.kind == "mixing_matrices":
                raise ValueError(
                    f"stages.{index}.objective: mamba1 has no mixing matrices to match; leave the "
                    "stage out, or choose mamba2 or discrete_mamba2"
                )


# ---------------------------------------------------------------- sampling


class Sampling(Frozen):
    """How completions are drawn; the defaults are the paper's."""

    n: PositiveInt = 256
    max_tokens: PositiveInt = 2048
    temperature: Annotated[float, Field(ge=0)] = 0.8
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: NonNegativeInt = 0


class SampleRecipe(Frozen):
    """`retort sample`: one model on one set of problems, into one run folder."""

    out: Path
    model: ModelFolder
    name: str | None = None
    problems: Problems
    prompt: Prompt = PAPER_PROMPT
    sampling: Sampling = Sampling()
    slots: PositiveInt = 64
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    force: bool = False


# ---------------------------------------------------------------- reading


def load(kind: type[R], sources: Iterable[str | Path]) -> R:
    """The recipe that `sources` describe, read from left to right, the later ones winning.

    A source with a `=` sets one value (`stages.0.optim.lr=1e-3`); any other is a YAML file.
    Mappings are merged key by key, everything else is replaced.
    Raises RecipeError, with a line for each mistake.
    """
    merged: Any = {}
    for source in sources:
        text = str(source)
        if isinstance(source, str) and "=" in text:
            _assign(merged, *text.split("=", 1))
        else:
            merged = _merge(merged, _read(Path(text)))
    return parse(kind, merged)


def parse(kind: type[R], values: Mapping[str, Any]) -> R:
    """The recipe that a plain mapping describes. Raises RecipeError as `load` does."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise RecipeError("\n".join(_line(kind, each) for each in details)) from None


class _Loader(yaml.SafeLoader):
    """YAML as people write it in recipes: `1e-3` and `3e8` are numbers, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader: plain data
    except FileNotFoundError:
        known = ", ".join(sorted(str(p.relative_to(RECIPES)) for p in RECIPES.rglob("*.yaml")))
        raise RecipeError(f"{path}: no such recipe file (bundled ones: {known})") from None
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


# ---------------------------------------------------------------- one line for each mistake


def _line(kind: type[Frozen], error: ErrorDetails) -> str:
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
