"""The decoder: teacher and student are this one class, told apart by `layer_types`.

Module names are Hugging Face's, so that a checkpoint's tensors load by their names.

Shapes: B rows, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retort.model import context as contexts
from retort.model.attention import Attention
from retort.model.config import (
    ATTENTION,
    DecoderConfig,
    DiscreteMamba2Config,
    LayerType,
    Mamba1Config,
    Mamba2Config,
)
from retort.model.context import Context
from retort.model.mamba1 import Mamba1
from retort.model.mamba2 import DiscreteMamba2, Mamba2
from retort.model.norms import RMSNorm
from retort.model.state import AttentionState, DecoderState, MambaState
from retort.ops.norms import gated

StateSpace = Mamba2 | DiscreteMamba2 | Mamba1
Mixer = Attention | StateSpace
LayerState = AttentionState | MambaState


class MLP(nn.Module):
    """The gated feed-forward layer of Llama: down(silu(gate x) * up x)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The layer's output, of the input's shape."""
        return self.down_proj(gated(self.gate_proj(x_BTD), self.up_proj(x_BTD)))


class Block(nn.Module):
    """A sequence mixer and an MLP, each behind a norm and beside a residual path."""

    def __init__(self, config: DecoderConfig, layer_type: LayerType) -> None:
        super().__init__()
        self.layer_type = layer_type
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        if layer_type == ATTENTION:
            self.self_attn = Attention(config)
        else:
            self.mamba = state_space(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    @property
    def mixer(self) -> Mixer:
        """The sequence mixer, under whichever name checkpoints have it."""
        return self.self_attn if self.layer_type == ATTENTION else self.mamba

    def forward(self, h_BTD: Tensor, context: Context, state: LayerState | None = None) -> Tensor:
        """The next hidden state; a layer state is updated in place."""
        h_BTD = h_BTD + self._mix(h_BTD, context, state)
        return h_BTD + self.mlp(self.post_attention_layernorm(h_BTD))

    def mix(self, h_BTD: Tensor, context: Context) -> Tensor:
        """The mixer's contribution to the residual stream."""
        return self._mix(h_BTD, context, None)

    # Not `mix`, so that each way into a block is entered once: sharding frees weights at its end.
    def _mix(self, h_BTD: Tensor, context: Context, state: LayerState | None) -> Tensor:
        mixer: nn.Module = self.mixer  # a state always comes from this mixer's own init_state
        return mixer(self.input_layernorm(h_BTD), context, state)

    def mixing_matrix(self, h_BTD: Tensor, context: Context) -> Tensor:
        """The mixer as a T x T matrix for each head, M_BHTS. Raises ValueError for Mamba-1."""
        if isinstance(self.mixer, Mamba1):
            raise ValueError("mamba1 mixes the tokens of each channel in its own way: no matrices")
        return self.mixer.mixing_matrix(self.input_layernorm(h_BTD), context)


def state_space(config: DecoderConfig) -> StateSpace:
    """The mixer of the decoder's linear layers."""
    match config.mixer:
        case Mamba2Config():
            return Mamba2(config, config.mixer)
        case DiscreteMamba2Config():
            return DiscreteMamba2(config, config.mixer)
        case Mamba1Config():
            return Mamba1(config, config.mixer)
    raise AssertionError("a configuration with linear layers has a mixer")


class Backbone(nn.Module):
    """Embedding, blocks and final norm: all but the head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, name) for name in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    """A causal language model of attention and state-space layers."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        ids_BT: Tensor,
        state: DecoderState | None = None,
        document_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits_BTV.

        With a `state` the call continues from it and updates it in place. Without one,
        `document_BT` gives each token's document: neither attention nor state crosses from one to
        the next, and negative ids are padding. Documents lie one behind the other, so no id comes
        back in a row. With a state, only padding may be told (0 and -1).
        Raises ValueError when the state has no room for the tokens.
        """
        return self.lm_head(self.hidden(ids_BT, state, document_BT))

    def hidden(
        self,
        ids_BT: Tensor,
        state: DecoderState | None = None,
        document_BT: Tensor | None = None,
    ) -> Tensor:
        """What the head projects: the last hidden state after the final norm, h_BTD."""
        context = self.context(ids_BT, state, document_BT)
        h_BTD = self.model.embed_tokens(ids_BT)
        for i, block in enumerate(self.blocks):
            h_BTD = block(h_BTD, context, None if state is None else state.layers[i])
        if state is not None:
            state.length_B += ids_BT.shape[1] if context.count_B is None else context.count_B
            state.reach = context.reach
        return self.model.norm(h_BTD)

    def hidden_states(self, ids_BT: Tensor, document_BT: Tensor | None = None) -> list[Tensor]:
        """The input of every block and the output of the last one, before the final norm."""
        context = self.context(ids_BT, None, document_BT)
        states = [self.model.embed_tokens(ids_BT)]
        for block in self.blocks:
            states.append(block(states[-1], context))
        return states

    def context(
        self, ids_BT: Tensor, state: DecoderState | None, document_BT: Tensor | None
    ) -> Context:
        """Positions, masks and documents of one call, shared by all blocks."""
        if state is None:
            return contexts.parallel(self.config, ids_BT, document_BT)
        return contexts.continued(self.config, ids_BT, document_BT, state)

    def init_state(self, batch: int, max_length: int) -> DecoderState:
        """An empty state for `batch` rows of at most `max_length` tokens."""
        layers = [block.mixer.init_state(batch, max_length) for block in self.blocks]
        length_B = torch.zeros(batch, dtype=torch.long, device=self.device)
        return DecoderState(layers, length_B, max_length)

    @property
    def blocks(self) -> list[Block]:
        """The blocks, first to last."""
        return list(self.model.layers)  # type: ignore[arg-type]  # a ModuleList of Blocks

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    @property
    def size(self) -> int:
        """The number of parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random weights for training from nothing; draws from torch's global generator.

        Everything keeps the scale of its input, and what writes to the residual stream starts
        small, so that the first blocks do not drown the embeddings.
        """
        depth_scale = (2 * self.config.layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = module.weight.shape[-1] ** -0.5
                writes = name.endswith(("o_proj", "out_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std * (depth_scale if writes else 1))
        for block in self.blocks:
            if isinstance(block.mixer, StateSpace):
                block.mixer.reset_parameters()
