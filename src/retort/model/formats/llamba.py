"""Llamba's published folders (arXiv 2502.14458): Cartesia's `config.json` keys and tensor names."""

from __future__ import annotations

from retort.model.config import LINEAR, DecoderConfig, DiscreteMamba2Config
from retort.model.formats import keys
from retort.model.formats.common import Reader, Tensors, Values, special_tokens

# Published configurations name no length: nothing in the model depends on a position.
UNLIMITED = 1 << 20

_NAMES = {
    "backbone.embedding.": "model.embed_tokens.",
    "backbone.final_layernorm.": "model.norm.",
    "backbone.layers.": "model.layers.",
    ".mixer.": ".mamba.",
}


def describes(values: Values) -> bool:
    """Whether a `config.json` is one of Llamba's, which may lack an architecture."""
    return {"d_model", "n_layer", "ssm_cfg", "mlp_cfg"} <= values.keys()


def _config(values: Values) -> DecoderConfig:
    keys.check(values, keys.LLAMBA)
    mlp, ssm = values["mlp_cfg"], values["ssm_cfg"]
    _check_supported(values, mlp, ssm)
    width = values["d_model"]
    inner, heads = ssm.get("expand", 1) * width, ssm["n_v_heads"]
    mixer = DiscreteMamba2Config(
        heads=heads,
        head_dim=inner // heads,
        state_size=ssm["d_state"],
        groups=ssm["n_qk_heads"],
        conv_width=ssm.get("d_conv", 4),
        chunk_size=ssm.get("chunk_size", 128),
    )
    multiple = values.get("pad_vocab_size_multiple", 8)
    return DecoderConfig(
        vocab_size=-(-values["vocab_size"] // multiple) * multiple,
        hidden_size=width,
        intermediate_size=mlp["intermediate_size"],
        layer_types=(LINEAR,) * values["n_layer"],
        # The attention that there is none of.
        heads=1,
        kv_heads=1,
        head_dim=width,
        norm_eps=values.get("norm_epsilon", 1e-5),
        max_position=UNLIMITED,
        tie_embeddings=values.get("tie_embeddings", False),
        mixer=mixer,
        **special_tokens(values),
    )


def _check_supported(values: Values, mlp: Values, ssm: Values) -> None:
    expected = [
        ("lm_head_bias", values.get("lm_head_bias", False), False),
        ("mlp_cfg.bias", mlp.get("bias", False), False),
        ("mlp_cfg.act_fn", mlp.get("act_fn", "silu"), "silu"),
        ("ssm_cfg.bias", ssm.get("bias", False), False),
        ("ssm_cfg.conv_bias", ssm.get("conv_bias", True), True),
        ("ssm_cfg.activation", ssm.get("activation", "identity"), "identity"),
    ]
    for key, value, supported in expected:
        if value != supported:
            raise ValueError(f"{key} = {value!r}: only {supported!r} is supported")
    if ssm.get("expand", 1) * values["d_model"] % ssm["n_v_heads"]:
        raise ValueError(f"d_model {values['d_model']} does not divide into n_v_heads heads")


def _tensors(tensors: Tensors, config: DecoderConfig) -> Tensors:
    return {_native_name(name): tensor for name, tensor in tensors.items()}


def _native_name(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


READER = Reader("Llamba", _config, _tensors)
