"""Reading ahead: tokens of which it is known only afterwards how many stay read.

Keys and values of tokens that do not stay lie past a row's length, where they mean nothing. A
recurrent state cannot be taken back, so it waits: a layer keeps what its recurrence read of the
tokens, which is far less than a state for each of them, and goes on from its old state by those
that stay (multi-step verification, arXiv 2408.15237, section 4).

Shapes: B rows, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retort.model.decoder import Decoder, StateSpace
from retort.model.recurrent import Unread
from retort.model.state import AttentionState, DecoderState, MambaState


@dataclass(frozen=True)
class _Pending:
    """A state-space layer, its state before the tokens, and what it read of them."""

    mixer: StateSpace
    state: MambaState
    unread: Unread[Any]


@dataclass(frozen=True)
class Ahead:
    """Tokens that were read behind those of `state`, which does not know of them yet."""

    state: DecoderState
    pending: list[_Pending]

    @torch.no_grad()
    def keep(self, count_B: Tensor) -> None:
        """Moves the state on by the first `count_B` of the tokens; to be called once."""
        for layer in self.pending:
            # The mixer made `unread` itself, so the two are of one kind.
            layer.mixer.keep(layer.unread, layer.state, count_B)
        self.state.length_B += count_B


def read_ahead(decoder: Decoder, ids_BT: Tensor, state: DecoderState) -> tuple[Tensor, Ahead]:
    """Logits_BTV of two tokens a row or more that follow those of `state`, and how to keep them.

    The state stays as it is until `keep` is called, but for what lies past its rows' lengths.
    Raises ValueError when the state has no room for the tokens.
    """
    assert ids_BT.shape[1] > 1, "one token a row is a step"
    context = decoder.context(ids_BT, state, None)
    h_BTD = decoder.model.embed_tokens(ids_BT)
    pending = []
    for block, layer in zip(decoder.blocks, state.layers, strict=True):
        u_BTD = block.input_layernorm(h_BTD)
        if isinstance(layer, AttentionState):
            h_BTD = h_BTD + block.self_attn(u_BTD, context, layer)
        else:
            y_BTD, unread = block.mamba.ahead(u_BTD, context, layer)
            h_BTD = h_BTD + y_BTD
            pending.append(_Pending(block.mamba, layer, unread))
        h_BTD = h_BTD + block.mlp(block.post_attention_layernorm(h_BTD))
    logits_BTV = decoder.lm_head(decoder.model.norm(h_BTD))
    return logits_BTV, Ahead(state, pending)
