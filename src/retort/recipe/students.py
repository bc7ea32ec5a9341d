"""What a student is made of, and which layers of its teacher it keeps."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from retort.recipe.base import Frozen, ModelFolder
from retort.recipe.data import Data


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
