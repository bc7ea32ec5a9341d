"""MambaInLlama's published folders (arXiv 2408.15237), of its Mamba-1 and its Mamba-2 kind.

A Llama `config.json` beside a `mamba_config.json`, which the folder's reader puts under the key
`mamba_config`. Tensors come as they were trained, or with the projections of a layer fused for
inference. The Mamba-2 kind shares x and B among heads as GQA does; repeating the rows of their
projections and the channels of their convolution makes it a stock Mamba-2 mixer without loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from retort.model.config import (
    ATTENTION,
    LINEAR,
    DecoderConfig,
    Mamba1Config,
    Mamba2Config,
    MixerConfig,
)
from retort.model.formats import keys
from retort.model.formats.common import Reader, Tensors, Values, repeat_heads
from retort.model.formats.families import read_config

KEY = "mamba_config"
QUIRKS = "released_quirks"

# The order of the rows of the fused in_proj.
_TRAINED = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")
_NORM_EPS = 1e-5  # of the gated norm, fixed in the released code


def _config(values: Values) -> DecoderConfig:
    mamba = values[KEY]
    keys.check(mamba, keys.MAMBA_IN_LLAMA, KEY)
    base = read_config(values, "llama")
    quirks = mamba.get(QUIRKS, True)
    _check_supported(mamba, base)
    kept = set(mamba["attn_layers"])
    return replace(
        base,
        layer_types=tuple(ATTENTION if i in kept else LINEAR for i in range(base.layers)),
        # The released code rotates with the plain frequencies, whatever config.json says.
        rope_scaling=None if quirks else base.rope_scaling,
        mixer=_mixer(mamba, base, quirks),
    )


def _check_supported(mamba: Values, base: DecoderConfig) -> None:
    expected = {
        "d_model": base.hidden_size,
        "n_layer": base.layers,
        "intermediate_size": base.intermediate_size,
        "rms_norm_eps": base.norm_eps,
        "hidden_act": "silu",
    }
    for key, value in expected.items():
        if mamba.get(key, value) != value:
            raise ValueError(f"{KEY}: {key} is {mamba[key]}, but config.json has {value}")
    outside = [i for i in mamba["attn_layers"] if not 0 <= i < base.layers]
    if outside:
        raise ValueError(f"{KEY}: attn_layers has {outside[0]}, and there are {base.layers} layers")


def _mixer(mamba: Values, base: DecoderConfig, quirks: bool) -> MixerConfig:
    shared, ssm = mamba["d_xb"], mamba["ssm_cfg"]
    inner = mamba.get("d_inner") or ssm.get("expand", 2) * base.hidden_size
    if inner % base.head_dim or shared % base.head_dim:
        raise ValueError(f"{KEY}: d_inner and d_xb are no multiples of head_dim {base.head_dim}")
    if "ngroups" in ssm:  # only the Mamba-2 kind has groups
        return _mamba2(ssm, inner, base)
    return Mamba1Config(
        heads=inner // base.head_dim,
        kv_heads=shared // base.head_dim,
        head_dim=base.head_dim,
        dt_rank=_rank(ssm, base),
        state_size=ssm.get("d_state", 16),
        conv_width=ssm.get("d_conv", 4),
        released_quirks=quirks,
    )


def _mamba2(ssm: Values, inner: int, base: DecoderConfig) -> Mamba2Config:
    groups, state = ssm["ngroups"], ssm["d_state"]
    if groups * state != inner:
        raise ValueError(f"{KEY}: ngroups * d_state = {groups * state} is not d_inner = {inner}")
    if base.norm_eps != _NORM_EPS:
        raise ValueError(f"rms_norm_eps {base.norm_eps}: the Mamba-2 kind supports {_NORM_EPS}")
    return Mamba2Config(
        heads=groups,
        head_dim=state,
        state_size=state,
        groups=groups,
        conv_width=ssm.get("d_conv", 4),
    )


def _rank(ssm: Values, base: DecoderConfig) -> int:
    rank = ssm.get("dt_rank", "auto")
    return -(-base.hidden_size // 16) if rank == "auto" else rank


# ---------------------------------------------------------------- tensors


def _tensors(tensors: Tensors, config: DecoderConfig) -> Tensors:
    for i in config.attention_layers:
        _split_attention(tensors, f"model.layers.{i}.", config)
    for i in config.linear_layers:
        prefix = f"model.layers.{i}.mamba."
        if isinstance(config.mixer, Mamba2Config):
            _spread_mamba2(tensors, prefix, config.mixer)
        elif isinstance(config.mixer, Mamba1Config):
            _fuse_mamba1(tensors, prefix, config.mixer, config.hidden_size)
            _spread_conv(tensors, prefix, config.mixer)
    return tensors


def _split_attention(tensors: Tensors, prefix: str, config: DecoderConfig) -> None:
    """The inference form's `mha` back into the projections; anything else is left as it is."""
    fused, out = f"{prefix}mha.in_proj.weight", f"{prefix}mha.out_proj.weight"
    sizes = [config.heads * config.head_dim] + [config.kv_heads * config.head_dim] * 2
    if fused in tensors and tensors[fused].shape[:1] == (sum(sizes),):
        for part, rows in zip("qkv", tensors.pop(fused).split(sizes), strict=True):
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = rows.contiguous()
    if out in tensors:
        tensors[f"{prefix}self_attn.o_proj.weight"] = tensors.pop(out)


def _fuse_mamba1(tensors: Tensors, prefix: str, mixer: Mamba1Config, width: int) -> None:
    names = [f"{prefix}{part}.weight" for part in _TRAINED]
    if not all(name in tensors for name in names):
        return
    inner, shared = mixer.inner, mixer.kv_inner
    for name, rows in zip(names, (inner, shared, shared, inner, mixer.dt_rank), strict=True):
        found = tuple(tensors[name].shape)
        if found != (rows, width):
            raise ValueError(f"wrong shape {name} {found}, not {(rows, width)}")
    tensors[f"{prefix}in_proj.weight"] = torch.cat([tensors.pop(name) for name in names])


def _spread_conv(tensors: Tensors, prefix: str, mixer: Mamba1Config) -> None:
    """A convolution that ran before x was repeated, as one that runs after it."""
    width = mixer.state_size if mixer.released_quirks else mixer.head_dim
    for name in (f"{prefix}conv1d.weight", f"{prefix}conv1d.bias"):
        if name in tensors and tensors[name].shape[:1] == (mixer.kv_inner,) != (mixer.inner,):
            tensors[name] = repeat_heads(tensors[name], width, mixer.heads // mixer.kv_heads)


def _spread_mamba2(tensors: Tensors, prefix: str, mixer: Mamba2Config) -> None:
    """Repeats what GQA shares. z | x | B | C | dt are the rows of in_proj, x | B | C of conv1d."""
    name = f"{prefix}in_proj.weight"
    if name not in tensors or not tensors[name].ndim:
        return
    inner = mixer.inner
    shared, odd = divmod(tensors[name].shape[0] - 2 * inner - mixer.heads, 2)
    if odd or shared <= 0 or inner % shared or shared % mixer.state_size:
        return  # its shape will be reported
    sizes = [inner, shared, shared, inner, mixer.heads]
    z, x, b, c, dt = tensors[name].split(sizes)
    tensors[name] = torch.cat([z, _spread(x, mixer), _spread(b, mixer), c, dt])
    for part in ("weight", "bias"):
        name = f"{prefix}conv1d.{part}"
        if name in tensors and tensors[name].shape[:1] == (inner + 2 * shared,):
            x, b, c = tensors[name].split([shared, shared, inner])
            tensors[name] = torch.cat([_spread(x, mixer), _spread(b, mixer), c])


def _spread(rows: Tensor, mixer: Mamba2Config) -> Tensor:
    return repeat_heads(rows, mixer.state_size, mixer.inner // rows.shape[0])


READER = Reader("MambaInLlama", _config, _tensors)
