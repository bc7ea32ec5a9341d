"""What a decoder is made of, read from and written to Hugging Face `config.json` contents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

LayerType = Literal["full_attention", "linear_attention"]
ATTENTION: LayerType = "full_attention"
LINEAR: LayerType = "linear_attention"


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3's stretching of RoPE wavelengths (the `llama3` rope type of Hugging Face)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class Mamba2Config:
    """Geometry of a stock Mamba-2 mixer: E = heads * head_dim inner channels."""

    heads: int
    head_dim: int
    state_size: int
    groups: int
    conv_width: int = 4
    chunk_size: int = 64

    @property
    def inner(self) -> int:
        """E, the inner width."""
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of x, B and C together, which the convolution runs over."""
        return self.inner + 2 * self.groups * self.state_size


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-shaped decoder whose layers are attention or a state-space mixer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[LayerType, ...]
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | None = None
    max_position: int = 2048
    tie_embeddings: bool = False
    mixer: Mamba2Config | None = None
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
        unknown = set(self.layer_types) - {ATTENTION, LINEAR}
        if unknown:
            raise ValueError(f"layer_types: unknown {sorted(unknown)}; use {ATTENTION}, {LINEAR}")
        if LINEAR in self.layer_types and self.mixer is None:
            raise ValueError(f"layer_types has {LINEAR} layers but there are no mixer settings")
        if self.mixer and self.mixer.heads % self.mixer.groups:
            raise ValueError(f"mixer: {self.mixer.heads} heads do not divide into groups")

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return len(self.layer_types)


def from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a `config.json` describes. Raises ValueError for anything not supported."""
    names = values.get("architectures") or ["none"]
    reader = _READERS.get(names[0])
    if reader is None:
        raise ValueError(f"architecture {names[0]}; supported are {', '.join(sorted(_READERS))}")
    try:
        return reader(values)
    except KeyError as error:
        raise ValueError(f"no key {error} in the configuration") from None


def to_hf(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """`config.json` contents: Llama where all layers are attention, else GraniteMoeHybrid."""
    shared = _shared_to_hf(config, dtype)
    if LINEAR not in config.layer_types:
        return shared | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "head_dim": config.head_dim,
            "intermediate_size": config.intermediate_size,
            "attention_bias": False,
            "mlp_bias": False,
        }
    return shared | _granite_to_hf(config)


def _llama_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            raise ValueError(f"{key} = true is not supported")
    return replace(
        _shared_from_hf(values),
        layer_types=(ATTENTION,) * values["num_hidden_layers"],
        intermediate_size=values["intermediate_size"],
    )


_GRANITE_UNIT_KEYS = ("embedding_multiplier", "logits_scaling", "residual_multiplier")


def _granite_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    shared = _shared_from_hf(values)
    if values.get("num_local_experts"):
        raise ValueError("num_local_experts > 0: mixture-of-experts layers are not supported")
    for key in _GRANITE_UNIT_KEYS:
        if values.get(key, 1.0) != 1.0:
            raise ValueError(f"{key} = {values[key]}: only 1 is supported")
    scale = shared.head_dim**-0.5
    if abs(values.get("attention_multiplier", 1.0) - scale) > 1e-6:
        raise ValueError(f"attention_multiplier: only head_dim**-0.5 = {scale:.6f} is supported")
    if not _unlimited(values.get("time_step_limit")):
        raise ValueError(f"time_step_limit {values['time_step_limit']}: no limit is supported")
    types = values.get("layer_types") or values["layers_block_type"]
    words: dict[str, LayerType] = {"mamba": LINEAR, "attention": ATTENTION}
    layer_types = tuple(words.get(name, name) for name in types)
    if ATTENTION in layer_types and values.get("position_embedding_type") != "rope":
        raise ValueError("position_embedding_type: attention layers without rope are not supported")
    return replace(
        shared,
        layer_types=layer_types,
        intermediate_size=values["shared_intermediate_size"],
        mixer=Mamba2Config(
            heads=values["mamba_n_heads"],
            head_dim=values["mamba_d_head"],
            state_size=values["mamba_d_state"],
            groups=values["mamba_n_groups"],
            conv_width=values["mamba_d_conv"],
            chunk_size=values["mamba_chunk_size"],
        ),
    )


def _unlimited(limit: Any) -> bool:
    """Whether dt is left as it is; transformers writes infinity as an object of its own."""
    low, high = limit or (0.0, math.inf)
    return low == 0 and (isinstance(high, dict) or high >= 1e6)


def _granite_to_hf(config: DecoderConfig) -> dict[str, Any]:
    mixer = config.mixer
    assert mixer is not None
    if mixer.inner % config.hidden_size:
        raise ValueError(
            f"mixer heads * head_dim = {mixer.inner} is no multiple of hidden_size "
            f"{config.hidden_size}, which the GraniteMoeHybrid format needs"
        )
    if config.head_dim * config.heads != config.hidden_size:
        raise ValueError(
            f"head_dim {config.head_dim} * heads {config.heads} differs from hidden_size "
            f"{config.hidden_size}, which the GraniteMoeHybrid format cannot hold"
        )
    words = {LINEAR: "mamba", ATTENTION: "attention"}
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "layer_types": [words[name] for name in config.layer_types],
        "shared_intermediate_size": config.intermediate_size,
        "intermediate_size": config.intermediate_size,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": config.head_dim**-0.5,
        "attention_bias": False,
        "position_embedding_type": "rope",
        "mamba_n_heads": mixer.heads,
        "mamba_d_head": mixer.head_dim,
        "mamba_d_state": mixer.state_size,
        "mamba_n_groups": mixer.groups,
        "mamba_d_conv": mixer.conv_width,
        "mamba_expand": mixer.inner // config.hidden_size,
        "mamba_chunk_size": mixer.chunk_size,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        # A finite number: JSON has no infinity, and no softplus output comes near it.
        "time_step_limit": [0.0, 1e9],
    }


_READERS: Mapping[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    "LlamaForCausalLM": _llama_from_hf,
    "GraniteMoeHybridForCausalLM": _granite_from_hf,
}


def _shared_from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """The part that both formats have; the callers add layers and widths."""
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {values['hidden_act']!r}: only 'silu' is supported")
    theta, scaling = _rope_from_hf(values)
    heads = values["num_attention_heads"]
    eos = values.get("eos_token_id")
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=0,
        layer_types=(),
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        norm_eps=values["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=values["max_position_embeddings"],
        tie_embeddings=values.get("tie_word_embeddings", False),
        bos_token_id=values.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_token_id=values.get("pad_token_id"),
    )


def _shared_to_hf(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    eos = list(config.eos_token_ids)
    return {
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
        **_rope_to_hf(config),
    }


def _rope_from_hf(values: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
    """RoPE base and scaling, from `rope_parameters` or the older `rope_theta`, `rope_scaling`."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or values.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope type {kind!r}: only 'default' and 'llama3' are supported")
    return theta, Llama3Rope(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position=rope["original_max_position_embeddings"],
    )


def _rope_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Both spellings: some runtimes read only the older one and would assume base 10000."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling:
        scaling = config.rope_scaling
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return {
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
    }
