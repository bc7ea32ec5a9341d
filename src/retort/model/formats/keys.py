"""What kind of value each key of a foreign configuration has, so that a wrong one is told by name.

Only keys that are read are listed, and missing ones are told where they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from typing_extensions import TypedDict  # pydantic does not take that of typing before Python 3.12


class _Tokens(TypedDict, total=False):
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None


class _Rope(TypedDict, total=False):
    rope_theta: PositiveFloat | None
    rope_type: str | None
    type: str | None
    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt


class _HuggingFace(TypedDict, total=False):
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    shared_intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None
    head_dim: PositiveInt | None
    layer_types: list[str] | None
    layers_block_type: list[str] | None
    null_layers: list[int] | None
    rms_norm_eps: NonNegativeFloat
    max_position_embeddings: PositiveInt
    rope_parameters: _Rope | None
    rope_scaling: _Rope | None
    rope_theta: PositiveFloat | None
    sliding_window: PositiveInt | None
    use_sliding_window: bool | None
    tie_word_embeddings: bool | None
    attention_bias: bool | None
    attention_multiplier: float
    mamba_n_heads: PositiveInt
    mamba_d_head: PositiveInt | Literal["auto"]
    mamba_d_state: PositiveInt
    mamba_n_groups: PositiveInt
    mamba_d_conv: PositiveInt
    mamba_expand: PositiveInt
    mamba_chunk_size: PositiveInt
    time_step_limit: (
        Annotated[list[float | dict[str, Any]], Field(min_length=2, max_length=2)] | None
    )


class _LlambaMLP(TypedDict, total=False):
    intermediate_size: PositiveInt


class _LlambaMixer(TypedDict, total=False):
    d_state: PositiveInt
    n_v_heads: PositiveInt
    n_qk_heads: PositiveInt
    d_conv: PositiveInt
    expand: PositiveInt
    chunk_size: PositiveInt


class _Llamba(TypedDict, total=False):
    vocab_size: PositiveInt
    pad_vocab_size_multiple: PositiveInt
    d_model: PositiveInt
    n_layer: PositiveInt
    norm_epsilon: NonNegativeFloat
    tie_embeddings: bool
    mlp_cfg: _LlambaMLP
    ssm_cfg: _LlambaMixer


class _MambaInLlamaMixer(TypedDict, total=False):
    d_state: PositiveInt
    d_conv: PositiveInt
    ngroups: PositiveInt
    dt_rank: PositiveInt | Literal["auto"]


class _MambaInLlama(TypedDict, total=False):
    d_inner: PositiveInt | None
    d_xb: PositiveInt
    attn_layers: list[int]
    ssm_cfg: _MambaInLlamaMixer
    released_quirks: bool


TOKENS = TypeAdapter(_Tokens)
HUGGING_FACE = TypeAdapter(_HuggingFace)
LLAMBA = TypeAdapter(_Llamba)
MAMBA_IN_LLAMA = TypeAdapter(_MambaInLlama)


def check(values: Mapping[str, Any], kinds: TypeAdapter[Any], place: str = "") -> None:
    """Raises ValueError for the first value that is of another kind than its key's."""
    try:
        kinds.validate_python(values, strict=True)
    except ValidationError as error:
        raise ValueError(first_problem(error, place)) from None


def first_problem(error: ValidationError, place: str = "") -> str:
    """The first of pydantic's complaints as one line, with the keys that lead to it."""
    first = error.errors(include_url=False)[0]
    keys = [place, *map(str, first["loc"])]
    return f"{'.'.join(key for key in keys if key)}: {first['msg']}"
