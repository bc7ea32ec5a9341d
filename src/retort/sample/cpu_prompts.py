"""Prompts whose keys and values are read by many rows at once, and where they are.

Two products for all rows of a prompt take a fraction of the time of going over it for each row.
Rows that are started one by one, or from a few tokens, have a copy of their prompt instead.

Shapes: S slots, A rows of one prompt, R = A G queries, K key/value heads, G queries for each, D head
channels, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retort.model.config import DecoderConfig
from retort.model.state import AttentionState, DecoderState
from retort.ops.cpu import attention
from retort.ops.cpu.team import Team

ROWS = 4
TOKENS = 32
"""With fewer it is not worth while."""


@dataclass(frozen=True)
class Group:
    """The running rows of one prompt, and room for what is computed of them in a layer."""

    prompt: DecoderState
    length: int
    slot_A: Tensor
    q_KAGD: Tensor
    y_KAGD: Tensor
    score_KRL: Tensor
    sums_2KAG: Tensor


class Prompts:
    """Which prompt each slot reads with others, if any; and what a layer makes of them.

    A prompt is held as long as a slot refers to it.
    """

    def __init__(self, config: DecoderConfig, slots: int, team: Team) -> None:
        self.team = team
        self.start_S = np.zeros(slots, np.int64)
        self.of_S: list[DecoderState | None] = [None] * slots
        self.found: tuple[int, list[Group]] | None = None
        shape = config.kv_heads, slots, config.heads // config.kv_heads
        self.q_KSGD, self.y_KSGD = torch.zeros(2, *shape, config.head_dim)
        self.sums_2KSG = torch.zeros(2, *shape)
        self.arrays = self.q_KSGD.numpy(), self.y_KSGD.numpy(), self.sums_2KSG.numpy()

    def admit(self, slots: list[int], prompt: DecoderState, length: int) -> bool:
        """Whether these slots are to share it: they are many, or others share it already."""
        worthwhile = len(slots) >= ROWS and length >= TOKENS
        shared = worthwhile or any(each is prompt for each in self.of_S)
        for slot in slots:
            self.of_S[slot] = prompt if shared else None
            self.start_S[slot] = length if shared else 0
        self.found = None
        return shared

    def move(self, slots: list[int], sources: list[int]) -> None:
        """Has slots read what others do."""
        for slot, source in zip(slots, sources, strict=True):
            self.of_S[slot] = self.of_S[source]
            self.start_S[slot] = self.start_S[source]
        self.found = None

    def read(self, layer: int, rows: int) -> None:
        """Goes over the prompts that the first rows share, in one layer: scores, weights, sums."""
        for group in self._groups(rows):
            cache = group.prompt.layers[layer]
            assert isinstance(cache, AttentionState)
            k_KLD, v_KLD = (x[0, :, : group.length] for x in (cache.k_BKLD, cache.v_BKLD))
            torch.index_select(self.q_KSGD, 1, group.slot_A, out=group.q_KAGD)
            torch.bmm(group.q_KAGD.flatten(1, 2), k_KLD.mT, out=group.score_KRL)
            sums_2KR = group.sums_2KAG.flatten(2)
            attention.weigh(group.score_KRL.numpy(), sums_2KR.numpy(), self.team)
            torch.bmm(group.score_KRL, v_KLD, out=group.y_KAGD.flatten(1, 2))
            self.y_KSGD.index_copy_(1, group.slot_A, group.y_KAGD)
            self.sums_2KSG.index_copy_(2, group.slot_A, group.sums_2KAG)

    def _groups(self, rows: int) -> list[Group]:
        """The groups of the first rows, found again when rows have come or gone."""
        if self.found is None or self.found[0] != rows:
            slots_of: dict[int, list[int]] = {}
            for slot, prompt in enumerate(self.of_S[:rows]):
                if prompt is not None:
                    slots_of.setdefault(id(prompt), []).append(slot)
            self.found = rows, [self._group(slots) for slots in slots_of.values()]
        return self.found[1]

    def _group(self, slots: list[int]) -> Group:
        prompt, length = self.of_S[slots[0]], int(self.start_S[slots[0]])
        assert prompt is not None
        heads, _, queries, width = self.q_KSGD.shape
        shape = heads, len(slots), queries
        return Group(
            prompt,
            length,
            torch.tensor(slots),
            torch.empty(*shape, width),
            torch.empty(*shape, width),
            torch.empty(heads, len(slots) * queries, length),
            torch.empty(2, *shape),
        )
