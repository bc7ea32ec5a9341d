"""The same student with wider mixers: heads of zeros beside its own.

llama.cpp runs Mamba-2 mixers of twice the model's width alone, and those that took over an
attention layer are as wide as the model. A head whose projections are zero adds nothing, and groups
of its own keep it out of the others' norms, so the output stays what it was; the state and the
mixer's work grow with the heads.

Shapes: H heads, G groups, E = H * P inner channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from retort.model.config import DecoderConfig, Mamba2Config
from retort.model.decoder import Decoder


def widened(decoder: Decoder, inner: int) -> Decoder:
    """A copy of the decoder with mixers of `inner` channels.

    Raises ValueError as `wide_config` does.
    """
    with torch.device("meta"):
        result = Decoder(wide_config(decoder.config, inner))
    times = inner // _narrow(decoder.config).inner
    padded = {
        name: _widened(name.split(".mamba.")[1], tensor, times, decoder.config)
        if ".mamba." in name
        else tensor.clone()
        for name, tensor in decoder.state_dict().items()
    }
    if decoder.config.tie_embeddings:
        del padded["lm_head.weight"]
    result.load_state_dict(padded, strict=False, assign=True)
    if decoder.config.tie_embeddings:
        result.lm_head.weight = result.model.embed_tokens.weight
    return result.eval().requires_grad_(False)


def wide_config(config: DecoderConfig, inner: int) -> DecoderConfig:
    """What `widened` would make, without weights.

    Raises ValueError for mixers other than mamba2, and a width that is no multiple of theirs.
    """
    narrow = _narrow(config)
    times, rest = divmod(inner, narrow.inner)
    if rest or not times:
        raise ValueError(f"mixers of {narrow.inner} channels cannot be widened to {inner}")
    wide = replace(narrow, heads=times * narrow.heads, groups=times * narrow.groups)
    return replace(config, mixer=wide)


def _narrow(config: DecoderConfig) -> Mamba2Config:
    if not isinstance(config.mixer, Mamba2Config):
        raise ValueError("only decoders with mamba2 mixers can be widened")
    return config.mixer


def _widened(name: str, tensor: Tensor, times: int, config: DecoderConfig) -> Tensor:
    """A mixer's tensor with zeros for the new heads, behind each part that has rows for heads."""
    mixer = _narrow(config)
    if name == "out_proj.weight":
        return _padded(tensor.T, [mixer.inner], times).T.contiguous()
    shared = mixer.groups * mixer.state_size
    parts: Mapping[str, list[int]] = {
        "in_proj.weight": [mixer.inner, mixer.inner, shared, shared, mixer.heads],
        "conv1d.weight": [mixer.inner, shared, shared],
        "conv1d.bias": [mixer.inner, shared, shared],
        "norm.weight": [mixer.inner],
    }
    return _padded(tensor, parts.get(name, [mixer.heads]), times)


def _padded(rows: Tensor, sizes: list[int], times: int) -> Tensor:
    pieces = []
    for part in rows.split(sizes):
        zeros = part.new_zeros((times - 1) * part.shape[0], *part.shape[1:])
        pieces += [part, zeros]
    return torch.cat(pieces)
