"""Speculative sampling: a draft proposes tokens, and the model that they are for judges them.

What is drawn has the model's own distribution, whatever the draft proposes (Leviathan et al. 2022,
arXiv 2211.17192). Every position of a completion has one random number for each purpose, so its
tokens depend neither on its neighbours nor on what was proposed and dropped before.

Shapes: S rows, K proposals, T = K + 1, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.model.decoder import Decoder
from retort.model.state import DecoderState
from retort.sample.tokens import SamplingParams, choose, probabilities, uniforms

DRAW, PROPOSE, ACCEPT = 0, 1 << 40, 2 << 40
"""Where the numbers for each purpose begin in a completion's stream; none is longer than that."""


@dataclass(frozen=True)
class Streams:
    """The completions' seeds, and the position of the token that each of them needs next."""

    seed_S: Tensor
    position_S: Tensor

    def numbers(self, purpose: int, ahead_S: Tensor | int) -> Tensor:
        """Uniform numbers for a purpose, some positions ahead."""
        return uniforms(self.seed_S, self.position_S + ahead_S + purpose)


@dataclass(frozen=True)
class Proposals:
    """Tokens that a draft drew, and the probability it gave to every token where it drew them."""

    token_SK: Tensor
    q_SKV: Tensor


def read(draft: Decoder, state: DecoderState, unread: Sequence[Sequence[int]]) -> Tensor:
    """Logits_SV behind some tokens, of which each row has its own number; the state goes on."""
    device = draft.device
    ids_ST = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(tokens) for tokens in unread], batch_first=True
    )
    length_S = torch.tensor([len(tokens) for tokens in unread])
    padding_ST = torch.arange(ids_ST.shape[1]) >= length_S[:, None]
    document_ST = -padding_ST.long().to(device) if bool(padding_ST.any()) else None
    h_STD = draft.hidden(ids_ST.to(device), state, document_ST)
    row_S = torch.arange(len(unread), device=device)
    return draft.lm_head(h_STD[row_S, (length_S - 1).to(device)])


def propose(
    draft: Decoder,
    state: DecoderState,
    logits_SV: Tensor,
    streams: Streams,
    tokens: int,
    params: SamplingParams,
) -> Proposals:
    """Draws `tokens` tokens for each row from the draft, whose state stays as it is.

    `logits_SV` are those of the first of them.
    """
    branch = state.branch()
    drawn, q = [], []
    for k in range(tokens):
        q.append(probabilities(logits_SV, params))
        drawn.append(choose(q[-1], streams.numbers(PROPOSE, k)))
        if k + 1 < tokens:
            logits_SV = draft(drawn[-1][:, None], branch).squeeze(1)
    return Proposals(torch.stack(drawn, dim=1), torch.stack(q, dim=1))


def judge(
    logits_STV: Tensor, proposals: Proposals, streams: Streams, params: SamplingParams
) -> tuple[Tensor, Tensor]:
    """The tokens of each row, token_ST, and how many of its proposals are among them, accepted_S.

    Proposal x stays with probability min(1, p(x) / q(x)). The token behind those that stay is drawn
    from what p has in excess of q, or from p where none is left to drop; what follows it means
    nothing. `logits_STV` are those of the places of all proposals, and of the one behind the last.
    """
    token_SK, q_SKV = proposals.token_SK, proposals.q_SKV
    rows, count = token_SK.shape
    p_STV = probabilities(logits_STV.flatten(0, 1), params).unflatten(0, (rows, count + 1))
    p_SK = p_STV[:, :count].gather(2, token_SK[..., None]).squeeze(2)
    q_SK = q_SKV.gather(2, token_SK[..., None]).squeeze(2)
    number_SK = torch.stack([streams.numbers(ACCEPT, k) for k in range(count)], dim=1)
    accepted_S = (number_SK * q_SK < p_SK).long().cumprod(1).sum(1)

    row_S = torch.arange(rows, device=token_SK.device)
    p_SV = p_STV[row_S, accepted_S]
    q_SV = q_SKV[row_S, accepted_S.clamp(max=count - 1)] * (accepted_S < count)[:, None]
    drawn_S = choose(_excess(p_SV, q_SV), streams.numbers(DRAW, accepted_S))
    token_ST = torch.cat([token_SK, drawn_S[:, None]], dim=1)
    return token_ST.scatter(1, accepted_S[:, None], drawn_S[:, None]), accepted_S


def _excess(p_SV: Tensor, q_SV: Tensor) -> Tensor:
    """What p has more than q. Where that is nothing the two differ by rounding alone, and p will
    do.
    """
    excess_SV = (p_SV - q_SV).clamp(min=0)
    return excess_SV.where(excess_SV.sum(-1, keepdim=True) > 0, p_SV)
