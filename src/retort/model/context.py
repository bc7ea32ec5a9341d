"""What every layer of a decoder needs to know about one call: positions, documents, masks.

Shapes: B rows, T tokens of this call, L cached positions, D half of a head's channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.model.config import DecoderConfig, Llama3Rope
from retort.model.state import DecoderState


@dataclass(frozen=True)
class Context:
    """Computed once per call and shared by the layers; None stands for the plain causal case.

    `valid_BT` is false for padding and `count_B` counts the valid tokens of each row.
    `mask_BTL` says which cached positions (with a state) or tokens (without) a token attends to.
    `runs` are the lengths of the documents, row by row, where the host knows them at no cost.
    """

    cos_BTD: Tensor
    sin_BTD: Tensor
    position_BT: Tensor
    reach: int
    document_BT: Tensor | None = None
    valid_BT: Tensor | None = None
    count_B: Tensor | None = None
    mask_BTL: Tensor | None = None
    runs: tuple[int, ...] | None = None


def parallel(config: DecoderConfig, ids_BT: Tensor, document_BT: Tensor | None) -> Context:
    """The context of a forward without a state: every row starts afresh."""
    length = ids_BT.shape[1]
    position_BT = torch.arange(length, device=ids_BT.device)[None]
    cos_BTD, sin_BTD = rotations(config, position_BT)
    if document_BT is None:
        return Context(cos_BTD, sin_BTD, position_BT, length)
    valid_BT = document_BT >= 0
    causal_TL = position_BT[0, :, None] >= position_BT[0, None, :]
    mask_BTL = causal_TL & (document_BT[:, :, None] == document_BT[:, None, :])
    count_B, lengths = valid_BT.sum(1), runs(document_BT)
    return Context(
        cos_BTD, sin_BTD, position_BT, length, document_BT, valid_BT, count_B, mask_BTL, lengths
    )


def runs(document_BT: Tensor) -> tuple[int, ...] | None:
    """The lengths of the documents, row by row; a GPU would have to be waited for."""
    if document_BT.device.type != "cpu":
        return None
    starts_BT = torch.ones_like(document_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    start_X = starts_BT.flatten().nonzero().flatten()
    end = start_X.new_tensor([document_BT.numel()])
    return tuple(torch.diff(start_X, append=end).tolist())


def continued(
    config: DecoderConfig, ids_BT: Tensor, document_BT: Tensor | None, state: DecoderState
) -> Context:
    """The context of a call that continues from a state, each row from its own position.

    A row of a state is one document, so `document_BT` only tells tokens (0) from the padding
    behind them (negative). Raises ValueError when the state has no room left.
    """
    length = ids_BT.shape[1]
    reach = state.reach + length
    if reach > state.max_length:
        raise ValueError(
            f"the state has room for {state.max_length} tokens a row, and this call needs {reach}: "
            "make it with a larger max_length"
        )
    steps_T = torch.arange(length, device=ids_BT.device)
    position_BT = state.length_B[:, None] + steps_T
    cos_BTD, sin_BTD = rotations(config, position_BT)
    mask_BTL = position_BT[..., None] >= torch.arange(reach, device=ids_BT.device)
    if document_BT is None:
        return Context(cos_BTD, sin_BTD, position_BT, reach, mask_BTL=mask_BTL)
    if bool((document_BT > 0).any()):
        raise ValueError("document_BT with a state: a row is one document, use 0 and -1 (padding)")
    valid_BT = document_BT >= 0
    return Context(cos_BTD, sin_BTD, position_BT, reach, None, valid_BT, valid_BT.sum(1), mask_BTL)


def rotations(config: DecoderConfig, position_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE's angles (arXiv 2104.09864), one for each pair of channels."""
    frequency_D = frequencies(config).to(position_BT.device)
    angle_BTD = position_BT[..., None].float() * frequency_D
    return angle_BTD.cos(), angle_BTD.sin()


def frequencies(config: DecoderConfig) -> Tensor:
    """RoPE's angle per position for each pair of channels, with Llama 3's scaling if any."""
    exponent_D = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequency_D = 1.0 / config.rope_theta**exponent_D
    scaling = config.rope_scaling
    return frequency_D if scaling is None else _llama3(frequency_D, scaling)


def _llama3(frequency_D: Tensor, scaling: Llama3Rope) -> Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, with a ramp in between."""
    turns_D = scaling.original_max_position * frequency_D / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep_D = ((turns_D - scaling.low_freq_factor) / span).clamp(0, 1)
    return keep_D * frequency_D + (1 - keep_D) * frequency_D / scaling.factor
