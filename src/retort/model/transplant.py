"""Teacher to student: which layers stay attention, and how the new mixers start.

A Mamba-2 head is linear attention with a decay, so a trained attention layer is a good place to
start from (The Mamba in the Llama, arXiv 2408.15237): x takes the weights of the values, B those
of the keys, C those of the queries, and the output projection stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from retort.model.attention import Attention
from retort.model.config import ATTENTION, LINEAR, DecoderConfig, LayerType, Mamba2Config
from retort.model.decoder import Decoder
from retort.model.mamba2 import Mamba2


def transplant(
    teacher: Decoder,
    layer_types: Sequence[LayerType],
    mixer: str = "mamba2",
    *,
    state_size: int | None = None,
    conv_width: int = 4,
    chunk_size: int = 64,
) -> Decoder:
    """A student with the teacher's MLPs, norms, embeddings and kept attention layers.

    Layers that become `linear_attention` get a mixer with the geometry of the attention they
    replace (as many heads and groups as query heads, P = head_dim) and start from its weights. The
    convolution starts as the identity and decays start slow; what attention has no counterpart for
    (gate, decay, dt, states beyond head_dim) is drawn from torch's global generator.

    Raises ValueError for a wrong number of layers, a linear layer of the teacher asked to become
    attention, an unknown mixer, a state smaller than head_dim, or linear layers of the teacher
    whose mixers have another geometry.
    """
    config = teacher.config
    if mixer != "mamba2":
        raise ValueError(f"mixer {mixer!r}: only 'mamba2' is known")
    if len(layer_types) != config.layers:
        raise ValueError(
            f"layer_types has {len(layer_types)} entries for a teacher of {config.layers} layers"
        )
    revived = [
        i
        for i, (old, new) in enumerate(zip(config.layer_types, layer_types, strict=True))
        if old == LINEAR and new == ATTENTION
    ]
    if revived:
        raise ValueError(f"layer_types: the teacher has no attention in layer {revived[0]}")
    settings = _mixer_config(config, state_size, conv_width, chunk_size)
    if LINEAR in config.layer_types and _geometry(settings) != _geometry(config.mixer):
        raise ValueError(
            f"the teacher's linear layers have other mixers ({config.mixer}) than those asked for "
            f"({settings}); give its state_size and conv_width"
        )
    student = Decoder(replace(config, layer_types=tuple(layer_types), mixer=settings))
    student.to(device=teacher.device, dtype=teacher.lm_head.weight.dtype)
    _fill(student, teacher)
    return student


def keep_attention(layers: int, kept: Sequence[int]) -> list[LayerType]:
    """`layer_types` that keep attention in the given layers. Raises ValueError outside them."""
    outside = [index for index in kept if not 0 <= index < layers]
    if outside:
        raise ValueError(f"keep_attention: no layer {outside[0]}; layers are 0 to {layers - 1}")
    return [ATTENTION if index in kept else LINEAR for index in range(layers)]


def _mixer_config(
    config: DecoderConfig, state_size: int | None, conv_width: int, chunk_size: int
) -> Mamba2Config:
    if state_size is not None and state_size < config.head_dim:
        raise ValueError(
            f"state_size {state_size} cannot hold the teacher's keys of {config.head_dim} channels"
        )
    return Mamba2Config(
        heads=config.heads,
        head_dim=config.head_dim,
        state_size=state_size or config.head_dim,
        groups=config.heads,
        conv_width=conv_width,
        chunk_size=chunk_size,
    )


def _geometry(mixer: Mamba2Config | None) -> Mamba2Config | None:
    """The settings less the chunk size, which changes the speed alone."""
    return mixer and replace(mixer, chunk_size=1)


@torch.no_grad()
def _fill(student: Decoder, teacher: Decoder) -> None:
    """Copies every tensor that both have, then starts the new mixers."""
    given = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        if name in given and given[name].shape == tensor.shape:
            tensor.copy_(given[name])
    for new, old in zip(student.blocks, teacher.blocks, strict=True):
        if new.layer_type == LINEAR and old.layer_type == ATTENTION:
            _start_mamba2(new.mamba, old.self_attn)


@torch.no_grad()
def _start_mamba2(mixer: Mamba2, attention: Attention) -> None:
    config = mixer.config
    repeats = attention.heads // attention.kv_heads
    split = attention.head_dim
    # Views into the rows of in_proj, which are ordered z | x | B | C | dt.
    sizes = [config.inner, config.inner] + [config.groups * config.state_size] * 2 + [config.heads]
    _, x, b, c, _ = mixer.in_proj.weight.split(sizes)
    x.copy_(_repeat_heads(attention.v_proj.weight, split, repeats))
    keys = _repeat_heads(attention.k_proj.weight, split, repeats)
    _first_states(b, config)[:] = keys.unflatten(0, (config.groups, split))
    queries = attention.q_proj.weight
    _first_states(c, config)[:] = queries.unflatten(0, (config.groups, split))
    mixer.out_proj.weight.copy_(attention.o_proj.weight)
    _pass_through(mixer.conv1d)
    mixer.reset_parameters()
    # Attention forgets nothing, so decays start slow: A = -U(1/16, 1), not Mamba's -U(1, 16).
    mixer.A_log.sub_(math.log(16))


def _pass_through(conv: nn.Conv1d) -> None:
    """Attention looks at single tokens, so the convolution starts by handing on the current one."""
    assert conv.bias is not None
    conv.bias.zero_()
    conv.weight.zero_()
    conv.weight[:, :, -1] = 1


def _repeat_heads(weight: torch.Tensor, head_dim: int, repeats: int) -> torch.Tensor:
    """Each key/value head's rows once for every query head that reads it."""
    return weight.unflatten(0, (-1, head_dim)).repeat_interleave(repeats, dim=0).flatten(0, 1)


def _first_states(rows: torch.Tensor, config: Mamba2Config) -> torch.Tensor:
    """The rows of each group's first head_dim states, as a view (G, head_dim, D)."""
    return rows.unflatten(0, (config.groups, config.state_size))[:, : config.head_dim]
