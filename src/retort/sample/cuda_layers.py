"""The mixers of a decoder on a GPU, one token a row: their weights as kernels read them, and the
states of all slots.

Shapes: S slots or the rows that run, D model width, C columns of a projection, L positions, W past
inputs, X channels that a convolution's inputs are kept of; others as in `ops.cuda`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from retort.model.attention import Attention
from retort.model.causal_conv import CausalConv
from retort.model.decoder import Mixer
from retort.model.mamba1 import Mamba1
from retort.model.mamba2 import DiscreteMamba2, Mamba2
from retort.model.norms import RMSNorm
from retort.model.state import AttentionState, MambaState
from retort.ops.cuda import attention, dual, selective
from retort.sample.cache import CacheSettings


@dataclass(frozen=True)
class Shared:
    """What all layers share: where rows are, RoPE's angles by position, and how many tokens of each
    row are not in its recurrent states yet.
    """

    rows: attention.Rows
    cos_LD: Tensor
    sin_LD: Tensor
    held_S: Tensor


@dataclass(frozen=True)
class Sums:
    """Where the attention layers of one step put unfinished sums, one layer after the other; the
    first `tiles` tiles of rows that share a prompt are gone through.
    """

    tiles: int
    parts: attention.Parts


class Layer(Protocol):
    """A mixer with its states; the first dimension of each of their tensors is the slot."""

    def tensors(self) -> list[Tensor]:
        """The states."""

    def admit(self, slot_S: Tensor, prompt: AttentionState | MambaState, length_1: Tensor) -> None:
        """Starts rows from a prompt of one row."""

    def step(self, u_SD: Tensor, sums: Sums | None) -> Tensor:
        """What it adds to the residual stream of the first S slots; their states go on."""


class AttentionLayer:
    """Attention with a cache of the tokens behind each row's prompt; `index` counts such layers."""

    def __init__(self, mixer: Attention, index: int, shared: Shared, room: int) -> None:
        self.index, self.rows = index, shared.rows
        self.o_DE = mixer.o_proj.weight
        projections = mixer.q_proj, mixer.k_proj, mixer.v_proj
        # One product where the decoder has three, two of which are too small to fill a GPU.
        self.qkv_CD = torch.cat([projection.weight.detach() for projection in projections])
        biases = [bias for name, bias in mixer.named_parameters() if name.endswith("_proj.bias")]
        self.bias_C = torch.cat([bias.detach() for bias in biases]) if biases else None
        norms = [norm for norm in (mixer.q_norm, mixer.k_norm) if isinstance(norm, RMSNorm)]
        eps = norms[0].eps if norms else None
        self.geometry = attention.Geometry(mixer.heads, mixer.kv_heads, mixer.head_dim, eps)
        weights = [norm.weight for norm in norms]
        self.rotation = attention.Rotation(shared.cos_LD, shared.sin_LD, *weights)
        shape = len(shared.held_S), mixer.kv_heads, room, mixer.head_dim
        self.k_SKLD, self.v_SKLD = self.qkv_CD.new_zeros(shape), self.qkv_CD.new_zeros(shape)

    def tensors(self) -> list[Tensor]:
        """Keys and values."""
        return [self.k_SKLD, self.v_SKLD]

    def admit(self, slot_S: Tensor, prompt: AttentionState | MambaState, length_1: Tensor) -> None:
        """Nothing: the prompt's keys and values are read where they are."""

    def step(self, u_SD: Tensor, sums: Sums | None) -> Tensor:
        """What it adds to the residual stream of the first S slots; their caches grow."""
        assert sums is not None
        caches = self.k_SKLD, self.v_SKLD
        qkv_SC = linear(u_SD, self.qkv_CD, self.bias_C)
        q_SHD = attention.rotate_and_store(self.geometry, self.rotation, qkv_SC, self.rows, *caches)
        y_SE = attention.attend(
            self.geometry, q_SHD, self.rows, *caches, self.index, sums.tiles, sums.parts
        )
        return linear(y_SE, self.o_DE)


class DualLayer:
    """A Mamba-2 mixer, stock or discrete."""

    def __init__(
        self, mixer: Mamba2 | DiscreteMamba2, shared: Shared, cache: CacheSettings
    ) -> None:
        self.length_S = shared.rows.length_S
        self.in_CD, self.out_DE = mixer.in_proj.weight, mixer.out_proj.weight
        self.geometry = _geometry(mixer)
        self.weights = _weights(mixer)
        self.state = _empty_state(self.geometry, self.in_CD, shared.held_S, cache)

    def tensors(self) -> list[Tensor]:
        """Recurrent states, past inputs, and the ring if there is one."""
        state, ring = self.state, self.state.ring
        if ring is None:
            return [state.ssm_SHPN, state.conv_SKF]
        rings = [ring.x_SRE, ring.b_SRM, ring.log_decay_SHR, ring.scale_SHR]
        return [state.ssm_SHPN, state.conv_SKF, *rings]

    def admit(self, slot_S: Tensor, prompt: AttentionState | MambaState, length_1: Tensor) -> None:
        """Copies the prompt's state to each slot; what a ring holds counts only as it is told."""
        assert isinstance(prompt, MambaState)
        self.state.ssm_SHPN[slot_S] = prompt.ssm_BHPN.to(self.state.ssm_SHPN.dtype)
        _put_past(self.state.conv_SKF, slot_S, prompt.conv_BWE, length_1)

    def step(self, u_SD: Tensor, sums: Sums | None) -> Tensor:
        """What it adds to the residual stream of the first S slots; their states go on."""
        projected_SC = linear(u_SD, self.in_CD)
        y_SE = dual.step(self.geometry, self.weights, projected_SC, self.length_S, self.state)
        return linear(y_SE, self.out_DE)


class SelectiveLayer:
    """A Mamba-1 mixer."""

    def __init__(self, mixer: Mamba1, shared: Shared, cache: CacheSettings) -> None:
        config = mixer.config
        self.length_S, self.rank = shared.rows.length_S, config.dt_rank
        self.in_CD, self.out_DE = mixer.in_proj.weight, mixer.out_proj.weight
        self.dt_ER = mixer.dt_proj.weight
        piece = config.state_size if config.released_quirks else config.head_dim
        self.geometry = selective.Geometry(
            config.inner, config.kv_inner, config.state_size, config.conv_width, piece
        )
        bias_E = mixer.dt_proj.bias.float() * (2 if config.released_quirks else 1)
        conv, rate_EN = mixer.conv1d, -mixer.A_log.float().exp()
        self.weights = selective.Weights(taps_first(conv), conv.bias, bias_E, rate_EN, mixer.D)
        slots, empty = len(shared.held_S), self.in_CD.new_zeros
        self.state = selective.State(
            empty(slots, config.inner, config.state_size, dtype=cache.ssm_dtype),
            empty(slots, config.conv_width, config.kv_inner),
        )
        x_X = torch.arange(config.kv_inner, device=bias_E.device)
        self.first_X = x_X // piece * self.geometry.repeats * piece + x_X % piece

    def tensors(self) -> list[Tensor]:
        """Recurrent states and past inputs."""
        return [self.state.ssm_SEN, self.state.conv_SKX]

    def admit(self, slot_S: Tensor, prompt: AttentionState | MambaState, length_1: Tensor) -> None:
        """Copies the prompt's state to each slot, of repeated inputs the first."""
        assert isinstance(prompt, MambaState)
        self.state.ssm_SEN[slot_S] = prompt.ssm_BHPN.flatten(1, 2).to(self.state.ssm_SEN.dtype)
        _put_past(self.state.conv_SKX, slot_S, prompt.conv_BWE[..., self.first_X], length_1)

    def step(self, u_SD: Tensor, sums: Sums | None) -> Tensor:
        """What it adds to the residual stream of the first S slots; their states go on."""
        projected_SC = linear(u_SD, self.in_CD)
        dt_SE = linear(projected_SC[:, -self.rank :], self.dt_ER)
        y_SE = selective.step(
            self.geometry, self.weights, projected_SC, dt_SE, self.length_S, self.state
        )
        return linear(y_SE, self.out_DE)


def open_layer(mixer: Mixer, index: int, shared: Shared, room: int, cache: CacheSettings) -> Layer:
    """A mixer for the slots that `shared` is of; `index` and `room` are of attention."""
    if isinstance(mixer, Attention):
        return AttentionLayer(mixer, index, shared, room)
    if isinstance(mixer, Mamba1):
        return SelectiveLayer(mixer, shared, cache)
    return DualLayer(mixer, shared, cache)


def taps_first(conv: CausalConv) -> Tensor:
    """A convolution's weights as the kernels read them: channels side by side."""
    return conv.weight.detach().squeeze(1).t().contiguous()


def _geometry(mixer: Mamba2 | DiscreteMamba2) -> dual.Geometry:
    config = mixer.config
    eps = mixer.norm.eps if isinstance(mixer, Mamba2) else None
    sizes = config.heads, config.head_dim, config.state_size, config.groups, config.conv_width
    return dual.Geometry(*sizes, norm_eps=eps)


def _weights(mixer: Mamba2 | DiscreteMamba2) -> dual.Weights:
    common = taps_first(mixer.conv1d), mixer.conv1d.bias, mixer.D
    if isinstance(mixer, Mamba2):
        return dual.Weights(*common, mixer.dt_bias, mixer.A_log, mixer.norm.weight)
    return dual.Weights(*common, gate_bias_E=mixer.z_bias)


def _empty_state(
    geometry: dual.Geometry, like: Tensor, held_S: Tensor, cache: CacheSettings
) -> dual.State:
    slots, tokens = len(held_S), cache.write_every
    shape = slots, geometry.heads, geometry.head_dim, geometry.state
    ssm_SHPN = like.new_zeros(shape, dtype=cache.ssm_dtype)
    conv_SKF = like.new_zeros(slots, geometry.taps, geometry.channels)
    if tokens == 1:
        return dual.State(ssm_SHPN, conv_SKF)
    decays = slots, geometry.heads, tokens
    ring = dual.Ring(
        held_S,
        like.new_zeros(slots, tokens, geometry.inner),
        like.new_zeros(slots, tokens, geometry.shared),
        like.new_zeros(decays, dtype=torch.float32),
        like.new_zeros(decays, dtype=torch.float32),
    )
    return dual.State(ssm_SHPN, conv_SKF, ring)


def _put_past(conv_SKX: Tensor, slot_S: Tensor, past_1WX: Tensor, length_1: Tensor) -> None:
    """Puts past inputs, oldest first, where the convolution looks for those before `length_1`."""
    taps, past = conv_SKX.shape[1], past_1WX.shape[1]
    assert past == taps - 1
    place_W = (length_1 - past + torch.arange(past, device=length_1.device)) % taps
    conv_SKX[slot_S[:, None], place_W[None]] = past_1WX
