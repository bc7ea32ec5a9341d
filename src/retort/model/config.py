"""What a decoder is made of. How it is spelt in checkpoint folders is the business of `formats`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import PositiveFloat, PositiveInt  # checked in what is read from a file

LayerType = Literal["full_attention", "linear_attention"]
ATTENTION: LayerType = "full_attention"
LINEAR: LayerType = "linear_attention"

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
"""The Hugging Face model type that a decoder with attention in all layers is saved as."""

MixerKind = Literal["mamba2", "discrete_mamba2", "mamba1"]


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3's stretching of RoPE wavelengths (the `llama3` rope type of Hugging Face)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: PositiveInt


@dataclass(frozen=True)
class _StateSpaceDual:
    """The geometry that both Mamba-2 mixers share: head h reads group h // (heads / groups)."""

    heads: PositiveInt
    head_dim: PositiveInt
    state_size: PositiveInt
    groups: PositiveInt
    conv_width: PositiveInt = 4
    chunk_size: PositiveInt = 64

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise ValueError(f"mixer: {self.heads} heads do not divide into {self.groups} groups")

    @property
    def inner(self) -> int:
        """E, the inner width."""
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of x, B and C together, which the convolution runs over."""
        return self.inner + 2 * self.groups * self.state_size

    @property
    def state_channels(self) -> int:
        """Numbers in the recurrent state of one row."""
        return self.inner * self.state_size


@dataclass(frozen=True)
class Mamba2Config(_StateSpaceDual):
    """Geometry of a stock Mamba-2 mixer (arXiv 2405.21060)."""

    kind: Literal["mamba2"] = "mamba2"


@dataclass(frozen=True)
class DiscreteMamba2Config(_StateSpaceDual):
    """Geometry of Llamba's discrete Mamba-2 mixer (arXiv 2502.14458)."""

    kind: Literal["discrete_mamba2"] = "discrete_mamba2"


@dataclass(frozen=True)
class Mamba1Config:
    """Geometry of MambaInLlama's Mamba-1 mixer (arXiv 2408.15237).

    x and B are computed for `kv_heads` heads and repeated to `heads`, as attention repeats values
    and keys; the recurrence then runs over heads of `state_size` channels.

    `released_quirks` is for the published checkpoints, whose code adds the bias of dt twice and
    repeats pieces of `state_size` channels instead of whole heads.
    """

    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    dt_rank: PositiveInt
    state_size: PositiveInt = 16
    conv_width: PositiveInt = 4
    chunk_size: PositiveInt = 16
    released_quirks: bool = False
    kind: Literal["mamba1"] = "mamba1"

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"mixer: {self.heads} heads are no multiple of {self.kv_heads}")
        if self.kv_inner % self.state_size:
            raise ValueError(
                f"mixer: kv_heads * head_dim = {self.kv_inner} is no multiple of the state size "
                f"{self.state_size}"
            )

    @property
    def inner(self) -> int:
        """E, the inner width."""
        return self.heads * self.head_dim

    @property
    def kv_inner(self) -> int:
        """The width of x and B before they are repeated."""
        return self.kv_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """The convolution runs over x alone, after it is repeated."""
        return self.inner

    @property
    def state_channels(self) -> int:
        """Numbers in the recurrent state of one row."""
        return self.inner * self.state_size


MixerConfig = Mamba2Config | DiscreteMamba2Config | Mamba1Config


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-shaped decoder whose layers are attention or a state-space mixer.

    `qkv_bias` (Qwen2) and `qk_norm` (Qwen3) are of the attention layers.
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    layer_types: tuple[LayerType, ...]
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    norm_eps: float = 1e-5
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: Llama3Rope | None = None
    max_position: PositiveInt = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    family: Family = "llama"
    mixer: MixerConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.heads} is no multiple of "
                f"num_key_value_heads {self.kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and RoPE turns pairs of channels")
        unknown = set(self.layer_types) - set(get_args(LayerType))
        if unknown:
            raise ValueError(f"layer_types: unknown {sorted(unknown)}; use {ATTENTION}, {LINEAR}")
        if LINEAR in self.layer_types and self.mixer is None:
            raise ValueError(f"layer_types has {LINEAR} layers but there are no mixer settings")

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return len(self.layer_types)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Which blocks have attention."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == ATTENTION)

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Which blocks have the state-space mixer."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == LINEAR)
