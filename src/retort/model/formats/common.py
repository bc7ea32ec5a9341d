"""What the formats share: the shape of a reader and a writer, and the keys all configs have.

Tensors are handled in whole dictionaries, by names; a mapping must also work on `meta` tensors, so
that a folder can be checked before its weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retort.model.config import DecoderConfig, Llama3Rope
from retort.model.formats import keys

Values = Mapping[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Reader:
    """A folder format that is read: its `config.json`, and its tensors under this project's names.

    Both raise ValueError for what is not supported. `tensors` may empty the dictionary it is given.
    """

    name: str
    config: Callable[[Values], DecoderConfig]
    tensors: Callable[[Tensors, DecoderConfig], Tensors]


@dataclass(frozen=True)
class Writer:
    """A folder format that is written. `refusals` says why a decoder cannot be, and what to change;
    the others are called when it is empty. `runtimes` names the programs that read the format, and
    why one of them cannot run this decoder; an empty reason means that it can.
    """

    name: str
    refusals: Callable[[DecoderConfig], list[str]]
    runtimes: Callable[[DecoderConfig], Mapping[str, str]]
    config: Callable[[DecoderConfig, str], dict[str, Any]]
    tensors: Callable[[Tensors, DecoderConfig], Tensors]


def shared_from_hf(values: Values) -> dict[str, Any]:
    """The fields of DecoderConfig that all Hugging Face configs spell alike."""
    keys.check(values, keys.HUGGING_FACE)
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {values['hidden_act']!r}: only 'silu' is supported")
    theta, scaling = _rope_from_hf(values)
    heads = values["num_attention_heads"]
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "heads": heads,
        "kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
        "norm_eps": values["rms_norm_eps"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position": values["max_position_embeddings"],
        "tie_embeddings": bool(values.get("tie_word_embeddings")),
        **special_tokens(values),
    }


def special_tokens(values: Values) -> dict[str, Any]:
    """The fields of DecoderConfig for token ids with a meaning."""
    keys.check(values, keys.TOKENS)
    eos = values.get("eos_token_id")
    return {
        "bos_token_id": values.get("bos_token_id"),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "pad_token_id": values.get("pad_token_id"),
    }


def shared_to_hf(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The reverse of `shared_from_hf`, less head_dim, which not all formats know."""
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
        **special_tokens_to_hf(config),
        **_rope_to_hf(config),
    }


def special_tokens_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Token ids with a meaning, as `config.json` and `generation_config.json` spell them."""
    eos = list(config.eos_token_ids)
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
    }


def untied(tensors: Tensors, config: DecoderConfig) -> Tensors:
    """The tensors as they are, less a head that is the embedding."""
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def repeat_heads(rows: Tensor, width: int, times: int) -> Tensor:
    """Each run of `width` rows `times` times side by side: what GQA does with keys and values."""
    return rows.unflatten(0, (-1, width)).repeat_interleave(times, dim=0).flatten(0, 1)


def _rope_from_hf(values: Values) -> tuple[float, Llama3Rope | None]:
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
