"""What a verifier sees of a completion: the student's own hidden states and probabilities.

Everything at a position is of the completion up to there, so that a step is judged by what a reader
has seen by then, and all steps are read in one pass.

Shapes: B rows, T tokens, D model width, K positions of all rows, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retort.model.decoder import Decoder
from retort.score.models import padded, places
from retort.score.reading import Reading

CHUNK_TOKENS = 2048
"""Tokens whose logits are in memory at once."""


def parts(decoder: Decoder) -> tuple[int, ...]:
    """The sizes of the groups of features, which add up to F: two of hidden units, and the
    log-probabilities.
    """
    return decoder.config.hidden_size, decoder.config.hidden_size, 3


@torch.inference_mode()
def features(decoder: Decoder, readings: Sequence[Reading]) -> Tensor:
    """x_KF at the readings' positions, row by row, in float32: the hidden state, the mean of the
    hidden states of the completion so far, and the least, the mean and the sum of its tokens'
    log-probabilities so far. A completion begins behind at least one token of a prompt.
    """
    ids_BT = padded(readings, 0, decoder.device)["input_ids"]
    h_BTD = decoder.hidden(ids_BT)  # padding is on the right, where no token looks
    logprob_BT = token_logprobs(decoder, h_BTD, ids_BT)
    start_B1 = torch.tensor([[each.start] for each in readings], device=decoder.device)
    own_BT = torch.arange(ids_BT.shape[1], device=decoder.device) >= start_B1
    sum_BT = (logprob_BT * own_BT).cumsum(1)
    count_BT1 = own_BT.cumsum(1).clamp(min=1)[..., None]
    parts_BTX = [
        h_BTD.float(),
        (h_BTD.float() * own_BT[..., None]).cumsum(1) / count_BT1,
        (logprob_BT * own_BT).cummin(1).values[..., None],
        sum_BT[..., None] / count_BT1,
        sum_BT[..., None],
    ]
    row_K, column_K = places(readings, decoder.device)
    return torch.cat([part[row_K, column_K] for part in parts_BTX], dim=1)


def token_logprobs(decoder: Decoder, h_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """The log-probability of each token behind those before it; 0 for the first of a row."""
    before_ND, next_N = h_BTD[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
    found = [
        -torch.nn.functional.cross_entropy(decoder.lm_head(h_XD).float(), next_X, reduction="none")
        for h_XD, next_X in zip(
            before_ND.split(CHUNK_TOKENS), next_N.split(CHUNK_TOKENS), strict=True
        )
    ]
    logprob_BT = torch.cat(found).view(ids_BT.shape[0], -1)
    return torch.cat([torch.zeros_like(logprob_BT[:, :1]), logprob_BT], dim=1)
