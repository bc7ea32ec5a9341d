"""Prompts, read once each: together where they are short, in pieces where they are long.

Shapes: B prompts, T tokens, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.model.decoder import Decoder
from retort.model.state import DecoderState

ROWS = 16
TOKENS = 8192
"""Bounds of one pass: prompts, and tokens with their padding."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that has been read: its state, of one row, and the logits of its next token."""

    state: DecoderState
    logits_1V: Tensor


def fits(lengths: Sequence[int]) -> bool:
    """Whether prompts of these lengths may be read together."""
    return len(lengths) == 1 or (len(lengths) <= ROWS and len(lengths) * max(lengths) <= TOKENS)


@torch.inference_mode()
def read(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> list[Prompt]:
    """The states of some prompts after their last tokens."""
    length_B = torch.tensor([len(prompt) for prompt in prompts])
    ids_BT = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(prompt) for prompt in prompts], batch_first=True
    )
    state = decoder.init_state(*ids_BT.shape)
    last: dict[int, Tensor] = {}
    for start, piece_BT in _pieces(ids_BT):
        left_B = length_B - start
        h_BTD = _continue(decoder, state, piece_BT, left_B)
        ends_B = (left_B > 0) & (left_B <= piece_BT.shape[1])
        for row in ends_B.nonzero().flatten().tolist():
            last[row] = h_BTD[row, left_B[row] - 1]
    logits_BV = decoder.lm_head(torch.stack([last[row] for row in range(len(prompts))]))
    return [Prompt(state.select([row]), logits_BV[row : row + 1]) for row in range(len(prompts))]


def _continue(decoder: Decoder, state: DecoderState, ids_BT: Tensor, left_B: Tensor) -> Tensor:
    """Reads the next columns, of which the last ones of a row may be padding."""
    padding_BT = torch.arange(ids_BT.shape[1]) >= left_B[:, None]
    document_BT = -padding_BT.long().to(decoder.device) if bool(padding_BT.any()) else None
    return decoder.hidden(ids_BT.to(decoder.device), state, document_BT)


def _pieces(ids_BT: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Columns of at most `TOKENS` tokens, and where they start."""
    columns = max(1, TOKENS // ids_BT.shape[0])
    for start in range(0, ids_BT.shape[1], columns):
        yield start, ids_BT[:, start : start + columns]
