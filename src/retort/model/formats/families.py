"""Decoders with attention in every layer: Llama (and SmolLM2), Mistral, Qwen2 and 2.5, Qwen3.

Their tensors have the names that this project uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from retort.model.config import ATTENTION, LINEAR, DecoderConfig, Family
from retort.model.formats.common import (
    Reader,
    Tensors,
    Values,
    Writer,
    shared_from_hf,
    shared_to_hf,
    untied,
)

ARCHITECTURES: Mapping[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What a configuration without the key means.
QWEN3_HEAD_DIM = 128  # and not hidden_size / heads
SLIDING_WINDOW = 4096


def read_config(values: Values, family: Family) -> DecoderConfig:
    """The decoder that a family's `config.json` describes. Raises ValueError, KeyError."""
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            raise ValueError(f"{key} = true is not supported")
    shared = shared_from_hf(values)
    if family == "qwen3" and not values.get("head_dim"):
        shared["head_dim"] = QWEN3_HEAD_DIM
    _check_window(values, family)
    return DecoderConfig(
        **shared,
        layer_types=(ATTENTION,) * values["num_hidden_layers"],
        intermediate_size=values["intermediate_size"],
        family=family,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def _check_window(values: Values, family: Family) -> None:
    """Refuses sliding windows that would be felt. Qwen names one even where it is switched off."""
    used = family == "mistral" or (family != "llama" and values.get("use_sliding_window"))
    window = values.get("sliding_window", SLIDING_WINDOW) if used else None
    if window is not None and window < values["max_position_embeddings"]:
        raise ValueError(
            f"sliding_window {window} is not supported; up to {window} tokens it changes nothing, "
            f"so set max_position_embeddings to {window} to use the model within them"
        )


def _keep(tensors: Tensors, config: DecoderConfig) -> Tensors:
    # Old exports carry a constant along.
    return {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


READERS: Mapping[str, Reader] = {
    architecture: Reader(architecture, partial(read_config, family=family), _keep)
    for family, architecture in ARCHITECTURES.items()
}


def _refusals(config: DecoderConfig) -> list[str]:
    if LINEAR in config.layer_types:
        return ["it has state-space layers, and this format has attention alone"]
    found = []
    if config.qkv_bias != (config.family == "qwen2"):
        found.append(f"qkv_bias = {config.qkv_bias}, which {config.family} has not")
    if config.qk_norm != (config.family == "qwen3"):
        found.append(f"qk_norm = {config.qk_norm}, which {config.family} has not")
    return found


def _write_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    extra: Mapping[Family, dict[str, Any]] = {
        "llama": {"attention_bias": False, "mlp_bias": False},
        "mistral": {"sliding_window": None},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"use_sliding_window": False, "attention_bias": False},
    }
    return {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        **shared_to_hf(config, dtype),
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        **extra[config.family],
    }


def _runtimes(config: DecoderConfig) -> dict[str, str]:
    return dict.fromkeys(("transformers", "vLLM", "SGLang", "llama.cpp"), "")


FAMILY = Writer("attention alone", _refusals, _runtimes, _write_config, untied)
