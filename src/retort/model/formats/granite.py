"""GraniteMoeHybrid without experts: the Llama-shaped hybrid that other runtimes know.

A Mamba-2 student is written in it, with every multiplier at 1. A student without attention gets one
block that adds exactly nothing, because transformers cannot cache a model without attention;
`null_layers` in the configuration names it, and reading leaves it out again.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retort.model.config import (
    ATTENTION,
    LINEAR,
    DecoderConfig,
    Family,
    LayerType,
    Mamba2Config,
)
from retort.model.formats.common import (
    Reader,
    Tensors,
    Values,
    Writer,
    shared_from_hf,
    shared_to_hf,
    untied,
)

ARCHITECTURE = "GraniteMoeHybridForCausalLM"

_UNIT_KEYS = ("embedding_multiplier", "logits_scaling", "residual_multiplier")
# What other runtimes read, older releases of transformers among them; transformers 5 reads both.
_WRITTEN = {LINEAR: "mamba", ATTENTION: "attention"}
_READ: dict[str, LayerType] = {"mamba": LINEAR, "attention": ATTENTION}

RETRAIN = "distil a student with student.mixer=mamba2"

GROUPED_NORM = "5.23"
"""The release of transformers from which on it norms each group of a mixer by itself, as the other
programs do. Older ones load the same folder, norm all groups together, and say nothing.
"""


# ---------------------------------------------------------------- reading


def _read_config(values: Values) -> DecoderConfig:
    shared = shared_from_hf(values)
    _check_supported(values, shared["head_dim"] ** -0.5)
    layer_types = _layer_types(values)
    if ATTENTION in layer_types and values.get("position_embedding_type") != "rope":
        raise ValueError("position_embedding_type: attention layers without rope are not supported")
    family: Family = "qwen2" if values.get("attention_bias") else "llama"
    return DecoderConfig(
        **shared,
        layer_types=layer_types,
        intermediate_size=values["shared_intermediate_size"],
        qkv_bias=bool(values.get("attention_bias")),
        family=family,
        mixer=_mixer(values) if LINEAR in layer_types else None,
    )


def _layer_types(values: Values) -> tuple[LayerType, ...]:
    names = values.get("layer_types") or values["layers_block_type"]
    if len(names) != values["num_hidden_layers"]:
        raise ValueError(f"layer_types: {len(names)} for {values['num_hidden_layers']} layers")
    null = values.get("null_layers") or []
    if null and (null != [len(names) - 1] or names[-1] not in (ATTENTION, _WRITTEN[ATTENTION])):
        raise ValueError(f"null_layers {null}: only a last layer of attention can be one")
    return tuple(_READ.get(name, name) for name in names[: len(names) - len(null)])


def _check_supported(values: Values, scale: float) -> None:
    if values.get("num_local_experts"):
        raise ValueError("num_local_experts > 0: mixture-of-experts layers are not supported")
    for key in _UNIT_KEYS:
        if values.get(key, 1.0) != 1.0:
            raise ValueError(f"{key} = {values[key]}: only 1 is supported")
    if abs(values.get("attention_multiplier", 1.0) - scale) > 1e-6:
        raise ValueError(f"attention_multiplier: only head_dim**-0.5 = {scale:.6f} is supported")
    if not _unlimited(values.get("time_step_limit")):
        raise ValueError(f"time_step_limit {values['time_step_limit']}: no limit is supported")
    if values.get("mamba_proj_bias") or not values.get("mamba_conv_bias", True):
        raise ValueError("only mamba_proj_bias = false and mamba_conv_bias = true are supported")


def _unlimited(limit: Any) -> bool:
    """Whether dt is left as it is; transformers writes infinity as an object of its own."""
    low, high = limit or (0.0, math.inf)
    return low == 0 and (isinstance(high, dict) or high >= 1e6)


def _mixer(values: Values) -> Mamba2Config:
    heads, width = values["mamba_n_heads"], values["mamba_d_head"]
    if width == "auto":
        width = values["mamba_expand"] * values["hidden_size"] // heads
    return Mamba2Config(
        heads=heads,
        head_dim=width,
        state_size=values["mamba_d_state"],
        groups=values["mamba_n_groups"],
        conv_width=values["mamba_d_conv"],
        chunk_size=values["mamba_chunk_size"],
    )


def _read_tensors(tensors: Tensors, config: DecoderConfig) -> Tensors:
    native: Tensors = {}
    for name in list(tensors):
        tensor = tensors.pop(name)  # so that what is split is not kept twice
        if _is_pure(config) and name.startswith(f"model.layers.{config.layers}."):
            _check_null(name, tensor, config)
        elif name.endswith("self_attn.o_proj.bias"):
            _check_zero(name, tensor)
        elif name.endswith("shared_mlp.input_linear.weight") and tensor.ndim:
            prefix = name.removesuffix("shared_mlp.input_linear.weight")
            gate, up = tensor.tensor_split(2)
            native[f"{prefix}mlp.gate_proj.weight"] = gate.contiguous()
            native[f"{prefix}mlp.up_proj.weight"] = up.contiguous()
        else:
            native[name.replace("shared_mlp.output_linear", "mlp.down_proj")] = tensor
    return native


def _check_zero(name: str, tensor: Tensor) -> None:
    if not tensor.is_meta and tensor.any():
        raise ValueError(f"{name}: a bias of the attention's output is not supported")


def _check_null(name: str, tensor: Tensor, config: DecoderConfig) -> None:
    """Both of the block's outputs must be zero, or leaving it out would change the model."""
    writes = name.endswith(("o_proj.weight", "o_proj.bias", "output_linear.weight"))
    if writes and not tensor.is_meta and tensor.any():
        raise ValueError(f"{name}: layer {config.layers} is in null_layers but is not null")


# ---------------------------------------------------------------- writing


def _refusals(config: DecoderConfig) -> list[str]:
    found = []
    mixer = config.mixer
    if not isinstance(mixer, Mamba2Config):
        if mixer is None:
            return ["it has no state-space layers"]
        return [f"its mixer is {mixer.kind}, and other runtimes know mamba2 alone: {RETRAIN}"]
    if mixer.inner % config.hidden_size:
        found.append(
            f"the mixer's heads * head_dim = {mixer.inner} is no multiple of hidden_size "
            f"{config.hidden_size}: choose heads and head_dim so that it is"
        )
    if not config.attention_layers:
        return found
    if config.qk_norm:
        found.append(
            "its attention layers normalise queries and keys, which the format cannot hold: "
            "keep no attention (student.keep_attention=[])"
        )
    if config.head_dim * config.heads != config.hidden_size:
        found.append(
            f"its attention layers have heads * head_dim = {config.heads * config.head_dim}, and "
            f"the format holds hidden_size {config.hidden_size} alone: keep no attention "
            "(student.keep_attention=[])"
        )
    return found


def _write_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    mixer = config.mixer
    assert isinstance(mixer, Mamba2Config)
    null = [config.layers] if _is_pure(config) else []
    written = _with_null(config)
    return {
        "architectures": _architectures(config),
        "model_type": "granitemoehybrid",
        **shared_to_hf(written, dtype),
        "layer_types": [_WRITTEN[kind] for kind in written.layer_types],
        **({"null_layers": null} if null else {}),
        "shared_intermediate_size": config.intermediate_size,
        "intermediate_size": config.intermediate_size,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        **dict.fromkeys(_UNIT_KEYS, 1.0),
        "attention_multiplier": written.head_dim**-0.5,
        "attention_bias": config.qkv_bias,
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


def _architectures(config: DecoderConfig) -> list[str]:
    """The first is what it is. llama.cpp's converter leaves RoPE out of hybrids that do not name
    Bamba as well, so those that llama.cpp can run do.
    """
    if _is_pure(config) or _runtimes(config)["llama.cpp"]:
        return [ARCHITECTURE]
    return [ARCHITECTURE, "BambaForCausalLM"]


def _is_pure(config: DecoderConfig) -> bool:
    return ATTENTION not in config.layer_types


def _with_null(config: DecoderConfig) -> DecoderConfig:
    """The configuration as it is written: with a null block, of whatever geometry the format can
    hold, behind the layers of a pure student.
    """
    if not _is_pure(config):
        return config
    layer_types = (*config.layer_types, ATTENTION)
    if config.heads * config.head_dim == config.hidden_size:
        return replace(config, layer_types=layer_types)
    heads = next(n for n in (config.heads, 1) if not config.hidden_size % (2 * n))
    head_dim = config.hidden_size // heads
    return replace(config, layer_types=layer_types, heads=heads, kv_heads=heads, head_dim=head_dim)


def _write_tensors(tensors: Tensors, config: DecoderConfig) -> Tensors:
    written: Tensors = {}
    for name, tensor in untied(tensors, config).items():
        if name.endswith("mlp.gate_proj.weight"):
            prefix = name.removesuffix("mlp.gate_proj.weight")
            up = tensors[f"{prefix}mlp.up_proj.weight"]
            written[f"{prefix}shared_mlp.input_linear.weight"] = torch.cat([tensor, up])
        elif not name.endswith("mlp.up_proj.weight"):
            written[name.replace("mlp.down_proj", "shared_mlp.output_linear")] = tensor
        if config.qkv_bias and name.endswith("o_proj.weight"):
            # The format has biases on all four projections or on none.
            bias = name.removesuffix("weight") + "bias"
            written[bias] = tensor.new_zeros(config.hidden_size)
    if _is_pure(config):
        written |= _null_block(_with_null(config), written["model.norm.weight"])
    return written


def _null_block(config: DecoderConfig, like: Tensor) -> Tensors:
    """An attention block whose outputs are zero, so that the residual stream passes unchanged."""
    hidden, width = config.hidden_size, config.heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (width, hidden),
        "self_attn.k_proj.weight": (config.kv_heads * config.head_dim, hidden),
        "self_attn.v_proj.weight": (config.kv_heads * config.head_dim, hidden),
        "self_attn.o_proj.weight": (hidden, width),
        "shared_mlp.input_linear.weight": (2 * config.intermediate_size, hidden),
        "shared_mlp.output_linear.weight": (hidden, config.intermediate_size),
    }
    if config.qkv_bias:
        shapes |= {
            f"self_attn.{part}_proj.bias": (shapes[f"self_attn.{part}_proj.weight"][0],)
            for part in "qkvo"
        }
    prefix = f"model.layers.{config.layers - 1}."
    block = {f"{prefix}{name}": like.new_zeros(shape) for name, shape in shapes.items()}
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return block | {f"{prefix}{name}": like.new_ones(hidden) for name in norms}


def _runtimes(config: DecoderConfig) -> dict[str, str]:
    """llama.cpp and its converter have conditions of their own."""
    assert config.mixer is not None
    reasons = []
    if config.mixer.inner != 2 * config.hidden_size:
        reasons.append(
            f"needs mixers twice as wide as hidden_size {config.hidden_size}, not "
            f"{config.mixer.inner} (publish with --llama-cpp)"
        )
    if config.rope_scaling and not _is_pure(config):
        reasons.append("cannot convert llama3 RoPE scaling in this format")
    served = dict.fromkeys(("transformers", "vLLM", "SGLang"), "")
    return served | {"llama.cpp": "; ".join(reasons)}


def oldest_transformers(config: DecoderConfig) -> str | None:
    """The oldest release of transformers that computes what a written decoder does; None where all
    that know the format do.
    """
    mixer = config.mixer if config.linear_layers else None
    return GROUPED_NORM if isinstance(mixer, Mamba2Config) and mixer.groups > 1 else None


def norms_groups(release: str) -> bool:
    """Whether this release of transformers does, from `GROUPED_NORM` on."""
    found, first = ([int(part) for part in each.split(".")[:2]] for each in (release, GROUPED_NORM))
    return found >= first


GRANITE = Writer(ARCHITECTURE, _refusals, _runtimes, _write_config, _write_tensors)
READERS = {ARCHITECTURE: Reader(ARCHITECTURE, _read_config, _read_tensors)}
