"""Teacher to student: which layers stay attention, and how the new mixers start.

A state-space head is linear attention with a decay, so a trained attention layer is a good place to
start from (The Mamba in the Llama, arXiv 2408.15237): x takes the weights of the values, B those
of the keys, C those of the queries, and the output projection stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from retort.model.attention import Attention
from retort.model.config import (
    ATTENTION,
    LINEAR,
    DecoderConfig,
    DiscreteMamba2Config,
    LayerType,
    Mamba1Config,
    Mamba2Config,
    MixerConfig,
    MixerKind,
)
from retort.model.decoder import Block, Decoder, StateSpace, state_space
from retort.model.formats.common import repeat_heads
from retort.model.mamba1 import Mamba1
from retort.model.mamba2 import DiscreteMamba2, Mamba2

Start = Literal["attention", "identity"]

PAPER_LAYERS = {16: (3, 7, 11, 15), 28: (3, 8, 13, 18, 23, 27)}
"""Layers that the published hybrids keep, by how many there are (arXiv 2502.20339)."""


class Settings(TypedDict, total=False):
    """What a new mixer does not take from the attention layer it replaces: see `mixer_config`."""

    state_size: int | None
    conv_width: int
    chunk_size: int | None
    heads: int | None
    head_dim: int | None
    groups: int | None


def transplant(
    teacher: Decoder,
    layer_types: Sequence[LayerType],
    mixer: MixerKind = "mamba2",
    *,
    start: Start = "attention",
    **settings: Unpack[Settings],
) -> Decoder:
    """A student with the teacher's MLPs, norms, embeddings and kept attention layers.

    Layers that become `linear_attention` get a mixer whose geometry is, where nothing else is said,
    that of the attention they replace. With `start` "attention" they take over its weights: the
    convolution starts as the identity, decays start slow, and what attention has no counterpart for
    (gate, decay, dt, states beyond head_dim) is random. With "identity" the gate and the
    convolution pass everything on and the projections are random (MOHAWK, arXiv 2408.10189); only
    `discrete_mamba2` can. Random numbers come from torch's global generator.

    The teacher may be a student itself: its linear layers stay as they are, so that layers can be
    replaced a few at a time.

    Raises ValueError for a wrong number of layers, a linear layer of the teacher asked to become
    attention, a geometry that cannot take over the attention's weights, or linear layers of the
    teacher whose mixers have another geometry.
    """
    config = teacher.config
    asked = mixer_config(config, mixer, **settings)
    _check_layers(config, layer_types)
    _check_start(config, asked, start)
    if config.linear_layers and _geometry(asked) != _geometry(config.mixer):
        raise ValueError(
            f"the teacher's linear layers have other mixers ({config.mixer}) than those asked for "
            f"({asked}); ask for the same kind and settings"
        )
    # What is there keeps its settings, chunk size and quirks included.
    kept = config.mixer if config.linear_layers else asked
    with torch.device("meta"):
        student = Decoder(replace(config, layer_types=tuple(layer_types), mixer=kept))
    _fill(student, teacher, start)
    return student


def replaced_block(decoder: Decoder, index: int, mixer: MixerConfig, start: Start) -> Block:
    """A block of the decoder with a new mixer for its attention; norms and MLP are shared."""
    old = decoder.blocks[index]
    _check_start(decoder.config, mixer, start)
    new = Block(replace(decoder.config, mixer=mixer), LINEAR)
    new.to(device=decoder.device, dtype=decoder.lm_head.weight.dtype)
    new.input_layernorm, new.mlp = old.input_layernorm, old.mlp
    new.post_attention_layernorm = old.post_attention_layernorm
    _begin(new.mamba, old.self_attn, start)
    return new


def mixer_config(
    config: DecoderConfig,
    kind: MixerKind,
    state_size: int | None = None,
    conv_width: int = 4,
    chunk_size: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    groups: int | None = None,
) -> MixerConfig:
    """The geometry of a mixer in place of the decoder's attention: as many heads, as wide.

    The Mamba-2 kinds have a group for each head and a state of head_dim; Mamba-1 shares x and B
    as the attention shares values and keys, and has a state of 16. Raises ValueError for a setting
    that the kind does not have, and an unknown kind.
    """
    if kind == "mamba1":
        if heads or head_dim or groups:
            raise ValueError("mamba1 takes heads, head_dim and groups from the attention layer")
        return Mamba1Config(
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dt_rank=-(-config.hidden_size // 16),
            state_size=state_size or 16,
            conv_width=conv_width,
            chunk_size=chunk_size or 16,
        )
    kinds = {"mamba2": Mamba2Config, "discrete_mamba2": DiscreteMamba2Config}
    if kind not in kinds:
        raise ValueError(f"mixer {kind!r}: choose mamba2, discrete_mamba2 or mamba1")
    heads = heads or config.heads
    return kinds[kind](
        heads=heads,
        head_dim=head_dim or config.head_dim,
        state_size=state_size or config.head_dim,
        groups=groups or heads,
        conv_width=conv_width,
        chunk_size=chunk_size or 64,
    )


def keep_attention(layers: int, kept: Sequence[int]) -> list[LayerType]:
    """`layer_types` that keep attention in the given layers. Raises ValueError outside them."""
    outside = [index for index in kept if not 0 <= index < layers]
    if outside:
        raise ValueError(f"keep_attention: no layer {outside[0]}; layers are 0 to {layers - 1}")
    return [ATTENTION if index in kept else LINEAR for index in range(layers)]


def every(layers: int, step: int) -> list[LayerType]:
    """`layer_types` that keep attention in every `step`-th layer, the last of each run."""
    return keep_attention(layers, range(step - 1, layers, step))


def as_paper(layers: int) -> list[LayerType]:
    """`layer_types` of the published hybrid of that depth. Raises ValueError when there is none."""
    if layers not in PAPER_LAYERS:
        known = ", ".join(str(depth) for depth in PAPER_LAYERS)
        raise ValueError(
            f"keep_attention: the paper has hybrids of {known} layers, and this teacher has "
            f"{layers}: give a list, or every k-th"
        )
    return keep_attention(layers, PAPER_LAYERS[layers])


def _check_layers(config: DecoderConfig, layer_types: Sequence[LayerType]) -> None:
    if len(layer_types) != config.layers:
        raise ValueError(
            f"layer_types has {len(layer_types)} entries for a teacher of {config.layers} layers"
        )
    revived = [i for i in config.linear_layers if layer_types[i] == ATTENTION]
    if revived:
        raise ValueError(f"layer_types: the teacher has no attention in layer {revived[0]}")


def _check_start(config: DecoderConfig, mixer: MixerConfig, start: Start) -> None:
    if start == "identity":
        if not isinstance(mixer, DiscreteMamba2Config):
            raise ValueError(
                f"start identity: {mixer.kind} cannot pass its input on unchanged (it has no bias "
                "in its gate); use discrete_mamba2, or start from the attention"
            )
        return
    if start != "attention":
        raise ValueError(f"start {start!r}: choose attention or identity")
    if isinstance(mixer, Mamba1Config):
        return
    if mixer.state_size < config.head_dim:
        raise ValueError(
            f"state_size {mixer.state_size} cannot hold the teacher's keys of {config.head_dim} "
            "channels"
        )
    wanted = (config.heads, config.head_dim, config.heads)
    if (mixer.heads, mixer.head_dim, mixer.groups) != wanted:
        raise ValueError(
            f"heads {mixer.heads}, head_dim {mixer.head_dim}, groups {mixer.groups}: a start from "
            f"the attention needs its {config.heads} heads of {config.head_dim} and a group each"
        )


def _geometry(mixer: MixerConfig | None) -> MixerConfig | None:
    """The settings less what leaves the parameters as they are."""
    if isinstance(mixer, Mamba1Config):
        return replace(mixer, chunk_size=1, released_quirks=False)
    return mixer and replace(mixer, chunk_size=1)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes new parameters of that type: a large mixer is never in memory in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _fill(student: Decoder, teacher: Decoder, start: Start) -> None:
    """Copies every tensor that both have, dtype included, and starts the new mixers."""
    wanted = student.state_dict().keys()
    copies = {n: tensor.clone() for n, tensor in teacher.state_dict().items() if n in wanted}
    for new, old in zip(student.blocks, teacher.blocks, strict=True):
        if new.layer_type == LINEAR and old.layer_type == ATTENTION:
            with _default_dtype(teacher.lm_head.weight.dtype), teacher.device:
                new.mamba = state_space(student.config)
            _begin(new.mamba, old.self_attn, start)
    student.load_state_dict(copies, strict=False, assign=True)
    if student.config.tie_embeddings:
        student.lm_head.weight = student.model.embed_tokens.weight
    student.requires_grad_()


def _begin(mixer: StateSpace, attention: Attention, start: Start) -> None:
    mixer.reset_parameters()
    if start == "attention":
        _take_over(mixer, attention)
    elif isinstance(mixer, DiscreteMamba2):
        mixer.open_gate()


@torch.no_grad()
def _take_over(mixer: StateSpace, attention: Attention) -> None:
    match mixer:
        case Mamba2():
            # Attention forgets nothing, so decays start slow: A = -U(1/16, 1), not -U(1, 16).
            mixer.A_log.sub_(math.log(16))
        case DiscreteMamba2():
            mixer.open_gate()
    mixer.conv1d.pass_through()
    x, b, c = mixer.rows()
    match mixer:
        case Mamba1():
            # x and B stay shared among heads, as values and keys are; B and C have no bias.
            x.copy_(attention.v_proj.weight)
            b.copy_(attention.k_proj.weight)
            c.copy_(attention.q_proj.weight)
            if attention.v_proj.bias is not None:
                mixer.conv1d.bias.copy_(mixer.repeat(attention.v_proj.bias))
        case Mamba2() | DiscreteMamba2():
            for rows, found in zip((x, b, c), _per_head(attention, "weight"), strict=True):
                _first_channels(rows, attention)[:] = found
            if attention.v_proj.bias is not None:
                # The convolution starts as the identity, so its bias is added as theirs is.
                biases = mixer.conv1d.bias.split([len(x), len(b), len(c)])
                for bias, found in zip(biases, _per_head(attention, "bias"), strict=True):
                    _first_channels(bias, attention)[:] = found
    mixer.out_proj.weight.copy_(attention.o_proj.weight)


def _per_head(attention: Attention, part: str) -> list[Tensor]:
    """Values, keys and queries of every query head: (H, head_dim, ...)."""
    width, times = attention.head_dim, attention.heads // attention.kv_heads
    v, k, q = (
        getattr(projection, part)
        for projection in (attention.v_proj, attention.k_proj, attention.q_proj)
    )
    return [
        rows.unflatten(0, (attention.heads, width))
        for rows in (repeat_heads(v, width, times), repeat_heads(k, width, times), q)
    ]


def _first_channels(rows: Tensor, attention: Attention) -> Tensor:
    """Each head's first head_dim channels (a state may have more), as a view (H, head_dim, ...)."""
    return rows.unflatten(0, (attention.heads, -1))[:, : attention.head_dim]
