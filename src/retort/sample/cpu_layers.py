"""The layers of a decoder on a CPU, one token a row: their weights as kernels read them, the states
of all slots, and room for what a step computes.

Kernels take NumPy's views of torch's memory, made once.

Shapes: S slots, D model width, C columns of a projection, R the rank of dt, E inner width, F conv
channels, I the MLP's width, L positions, W past inputs, K = W + 1 taps, H heads, P head channels, N
state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retort.model.attention import Attention
from retort.model.causal_conv import CausalConv
from retort.model.decoder import MLP, LayerState, Mixer
from retort.model.mamba1 import Mamba1
from retort.model.mamba2 import DiscreteMamba2, Mamba2
from retort.model.norms import RMSNorm
from retort.model.state import AttentionState, MambaState
from retort.ops.cpu import attention, mamba1, mamba2, norms, storage
from retort.ops.cpu.team import Team
from retort.sample.cpu_products import Product
from retort.sample.cpu_prompts import Prompts

Floats = NDArray[np.float32]

OpenProduct = Callable[[Sequence[nn.Linear], Tensor, Tensor | None], Product]
"""Opens the product of x_SI with the weights of some layers, into y_SO or room of its own."""


@dataclass(frozen=True)
class Shared:
    """What the layers share: what each of them reads, `u_SD`, and room for what it adds to the
    residual stream, `y_SD`; how many tokens each row has read, which rows read prompts together,
    RoPE's angles by position, the dtype of keys and values, the threads, and how to multiply.
    """

    u_SD: Tensor
    y_SD: Tensor
    length_S: NDArray[np.int64]
    prompts: Prompts
    cos_LD: NDArray[np.float32]
    sin_LD: NDArray[np.float32]
    kv_dtype: torch.dtype
    team: Team
    open_product: OpenProduct

    @property
    def slots(self) -> int:
        """The number of rows at most."""
        return self.length_S.size

    def inward(self, *layers: nn.Linear) -> Product:
        """The product of what a layer reads with its first weights."""
        return self.open_product(layers, self.u_SD, None)

    def outward(self, layer: nn.Linear, x_SI: Tensor) -> Product:
        """The product with a layer's last weights, which makes what it adds to the stream."""
        return self.open_product([layer], x_SI, self.y_SD)


class Layer(Protocol):
    """A mixer with its states; the first dimension of each of their tensors is the slot."""

    def tensors(self) -> list[Tensor]:
        """The states."""

    def admit(self, slot_S: Tensor, prompt: LayerState, length: int) -> None:
        """Starts rows from a prompt of one row and `length` tokens."""

    def move(self, slot_S: Tensor, source_S: Tensor, length: int) -> None:
        """Copies rows over others, of which at most `length` tokens are their own."""

    def step(self, rows: int) -> Floats:
        """What it adds to the residual stream of the first rows, y_SD; their states go on."""


class AttentionLayer:
    """Attention over a cache of each slot's tokens, or of those behind a prompt that it shares."""

    def __init__(self, mixer: Attention, index: int, shared: Shared) -> None:
        self.index, self.shared = index, shared
        projections = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
        self.qkv = shared.inward(*projections)
        biases = [bias for name, bias in mixer.named_parameters() if name.endswith("_proj.bias")]
        self.bias_C = torch.cat([torch.empty(0), *biases]).detach().numpy()
        scales = [mixer.q_norm, mixer.k_norm]
        self.scales = [_weight(norm) for norm in scales]
        self.eps = max(norm.eps if isinstance(norm, RMSNorm) else 0.0 for norm in scales)
        shape = shared.slots, mixer.kv_heads, len(shared.cos_LD), mixer.head_dim
        self.k_SKLD, self.v_SKLD = torch.zeros(2, *shape, dtype=shared.kv_dtype)
        self.caches = [storage.array(self.k_SKLD), storage.array(self.v_SKLD)]
        group = mixer.heads // mixer.kv_heads
        self.score_TGL = np.empty((shared.team[0], group, shape[2]), np.float32)
        self.y_SE = torch.empty(shared.slots, mixer.heads * mixer.head_dim)
        self.y_SHD = self.y_SE.view(-1, mixer.heads, mixer.head_dim).numpy()
        self.out = shared.outward(mixer.o_proj, self.y_SE)

    def tensors(self) -> list[Tensor]:
        """Keys and values."""
        return [self.k_SKLD, self.v_SKLD]

    def admit(self, slot_S: Tensor, prompt: LayerState, length: int) -> None:
        """Copies the prompt's keys and values to each slot, unless it reads them where they are."""
        assert isinstance(prompt, AttentionState)
        if self.shared.prompts.start_S[int(slot_S[0])] > 0:
            return
        for mine, theirs in zip(self.tensors(), prompt.tensors(), strict=True):
            mine[slot_S, :, :length] = theirs[:, :, :length].to(mine.dtype)

    def move(self, slot_S: Tensor, source_S: Tensor, length: int) -> None:
        """Copies what rows of at most `length` tokens hold."""
        for tensor in self.tensors():
            tensor[slot_S, :, :length] = tensor[source_S, :, :length]

    def step(self, rows: int) -> Floats:
        """What it adds to the residual stream of the first rows; their caches grow."""
        shared, prompts = self.shared, self.shared.prompts
        q_KSGD, prompt_KSGD, sums_2KSG = prompts.arrays
        attention.rotate(
            self.qkv(rows),
            self.bias_C,
            *self.scales,
            self.eps,
            shared.cos_LD,
            shared.sin_LD,
            shared.length_S,
            prompts.start_S,
            *self.caches,
            q_KSGD,
            rows,
            shared.team,
        )
        prompts.read(self.index, rows)
        attention.attend(
            q_KSGD,
            shared.length_S,
            prompts.start_S,
            *self.caches,
            prompt_KSGD,
            sums_2KSG,
            self.score_TGL,
            self.y_SHD,
            rows,
            shared.team,
        )
        return self.out(rows)


class Recurrent:
    """The states of a state-space mixer: past inputs of its convolution, as a ring, and its own."""

    def __init__(self, conv: CausalConv, states: tuple[int, int, int], shared: Shared) -> None:
        self.shared = shared
        self.past_SWF = torch.zeros(shared.slots, conv.width - 1, conv.bias.numel())
        self.state_SHNP = torch.zeros(shared.slots, *states)
        self.conv = _array(conv.weight.squeeze(1).t()), _array(conv.bias)
        self.arrays = self.past_SWF.numpy(), self.state_SHNP.numpy()

    def tensors(self) -> list[Tensor]:
        """Past inputs and states."""
        return [self.past_SWF, self.state_SHNP]

    def admit(self, slot_S: Tensor, prompt: LayerState, length: int) -> None:
        """Copies the prompt's state to each slot."""
        assert isinstance(prompt, MambaState)
        # The oldest input is that of position length - W, whose place is the same as length's.
        self.past_SWF[slot_S] = prompt.conv_BWE.roll(length, dims=1)
        self.state_SHNP[slot_S] = prompt.ssm_BHPN.transpose(-1, -2)

    def move(self, slot_S: Tensor, source_S: Tensor, length: int) -> None:
        """Copies rows over others."""
        for tensor in self.tensors():
            tensor[slot_S] = tensor[source_S]


class DualLayer(Recurrent):
    """A Mamba-2 mixer, stock or discrete."""

    def __init__(self, mixer: Mamba2 | DiscreteMamba2, shared: Shared) -> None:
        config = mixer.config
        super().__init__(mixer.conv1d, (config.heads, config.state_size, config.head_dim), shared)
        self.groups = config.groups
        self.project = shared.inward(mixer.in_proj)
        y_SE = torch.empty(shared.slots, config.inner)
        self.y_SE, self.out = y_SE.numpy(), shared.outward(mixer.out_proj, y_SE)
        self.kernel: Any
        self.weights: tuple[Any, ...]
        if isinstance(mixer, Mamba2):
            rate_H, eps = _array(-mixer.A_log.exp()), mixer.norm.eps
            own = _array(mixer.dt_bias), rate_H, _array(mixer.D), _array(mixer.norm.weight), eps
            self.kernel, self.weights = mamba2.stock, (*self.conv, *own)
        else:
            self.kernel = mamba2.discrete
            self.weights = (*self.conv, _array(mixer.z_bias), _array(mixer.D))

    def step(self, rows: int) -> Floats:
        """What it adds to the residual stream of the first rows; their states go on."""
        states = self.shared.length_S, *self.arrays, self.groups
        last = self.y_SE, rows, self.shared.team
        self.kernel(self.project(rows), *self.weights, *states, *last)
        return self.out(rows)


class SelectiveLayer(Recurrent):
    """A Mamba-1 mixer."""

    def __init__(self, mixer: Mamba1, shared: Shared) -> None:
        config = mixer.config
        inner, states = config.inner, config.state_size
        super().__init__(mixer.conv1d, (inner // states, states, states), shared)
        self.shared_width, self.rank = config.kv_inner, config.dt_rank
        self.project = shared.inward(mixer.in_proj)
        rank_SR = torch.empty(shared.slots, self.rank)
        self.rank_SR, self.dt = rank_SR.numpy(), shared.open_product([mixer.dt_proj], rank_SR, None)
        x_SE, y_SE = torch.empty(2, shared.slots, inner)
        self.room, self.out = (x_SE.numpy(), y_SE.numpy()), shared.outward(mixer.out_proj, y_SE)
        self.source_E = mixer.repeat(torch.arange(config.kv_inner)).numpy()
        bias_E = mixer.dt_proj.bias * (2 if config.released_quirks else 1)
        rate_HPN = -mixer.A_log.exp().unflatten(0, (-1, states))
        self.weights = _array(bias_E), _array(rate_HPN.transpose(1, 2)), _array(mixer.D)

    def step(self, rows: int) -> Floats:
        """What it adds to the residual stream of the first rows; their states go on."""
        shared, projected_SC = self.shared, self.project(rows)
        self.rank_SR[:rows] = projected_SC[:rows, -self.rank :]
        mamba1.selective(
            projected_SC,
            self.dt(rows),
            self.source_E,
            self.shared_width,
            *self.conv,
            *self.weights,
            shared.length_S,
            *self.arrays,
            *self.room,
            rows,
            shared.team,
        )
        return self.out(rows)


class FeedForward:
    """The gated feed-forward layer."""

    def __init__(self, mlp: MLP, shared: Shared) -> None:
        self.team = shared.team
        self.gate_and_up = shared.inward(mlp.gate_proj, mlp.up_proj)
        gated_SI = torch.empty(shared.slots, mlp.down_proj.in_features)
        self.gated_SI, self.down = gated_SI.numpy(), shared.outward(mlp.down_proj, gated_SI)

    def step(self, rows: int) -> Floats:
        """What it adds to the residual stream of the first rows."""
        norms.gate(self.gate_and_up(rows), self.gated_SI, rows, self.team)
        return self.down(rows)


def open_layer(mixer: Mixer, index: int, shared: Shared) -> Layer:
    """The mixer of a block, with states for the slots that `shared` is of."""
    if isinstance(mixer, Attention):
        return AttentionLayer(mixer, index, shared)
    if isinstance(mixer, Mamba1):
        return SelectiveLayer(mixer, shared)
    return DualLayer(mixer, shared)


def _array(tensor: Tensor) -> NDArray[Any]:
    """A tensor's numbers, side by side."""
    return tensor.detach().contiguous().numpy()


def _weight(norm: nn.Module) -> NDArray[Any]:
    """The weight of a norm, empty where there is none."""
    return _array(norm.weight) if isinstance(norm, RMSNorm) else np.empty(0, np.float32)
