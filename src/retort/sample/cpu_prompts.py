"""Prompts whose keys and values are read by many rows at once, and where they are.

Two products for all rows of a prompt take a fraction of the time of going over it for each row.
Where that does not pay, a row has a copy of its prompt in its own cache.

Shapes: S slots, A rows of one prompt, K key/value heads, G queries for each, R = A G, D head
channels, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import ReferenceType, ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retort.model.config import DecoderConfig
from retort.model.state import AttentionState, DecoderState
from retort.ops.cpu import attention
from retort.ops.cpu.team import Team

WORTHWHILE = 2048
"""Tokens, of all rows of a prompt, from which on new rows share it."""


class Prompts:
    """Which slots read which prompts together, and room for what comes of it in a layer.

    The cache of a slot starts with token `start_S`, behind the prompt that it shares, `shared_S`; a
    prompt is held for as long as a slot shares it. `copied_S` are those of the other slots, whose
    caches are of `kv_dtype`: a prompt that is shared is rounded to it, so that rows say the same
    whether they share it or not.
    """

    def __init__(
        self, config: DecoderConfig, slots: int, team: Team, kv_dtype: torch.dtype = torch.float32
    ) -> None:
        self.team, self.kv_dtype = team, kv_dtype
        self.share_from = WORTHWHILE if config.attention_layers else None
        self.start_S = np.zeros(slots, np.int64)
        self.shared_S: list[DecoderState | None] = [None] * slots
        self.copied_S: list[ReferenceType[DecoderState] | None] = [None] * slots
        self.found: list[Group] | None = None
        self.rows = 0
        shape = config.kv_heads, slots, config.heads // config.kv_heads
        self.q_KSGD, self.y_KSGD = torch.zeros(2, *shape, config.head_dim)
        self.sums_2KSG = torch.zeros(2, *shape)
        self.arrays = self.q_KSGD.numpy(), self.y_KSGD.numpy(), self.sums_2KSG.numpy()

    def admit(self, slots: Sequence[int], prompt: DecoderState, length: int) -> None:
        """Has slots share a prompt if others do, or if they and those with a copy are enough."""
        times = len(slots)
        self._put(slots, [None] * times, [None] * times, [0] * times)
        some = any(each is prompt for each in self.shared_S)
        copies = sum(each is not None and each() is prompt for each in self.copied_S)
        if self.share_from is not None and (some or (copies + times) * length >= self.share_from):
            if not some:
                _round(prompt, self.kv_dtype)
            self._put(slots, [prompt] * times, [None] * times, [length] * times)
        else:
            self._put(slots, [None] * times, [ref(prompt)] * times, [0] * times)

    def move(self, slots: Sequence[int], sources: Sequence[int]) -> None:
        """Has slots read what others do."""
        self._put(
            slots,
            [self.shared_S[source] for source in sources],
            [self.copied_S[source] for source in sources],
            [int(self.start_S[source]) for source in sources],
        )

    def groups(self, rows: int) -> Iterable[list[int]]:
        """The slots of each group of the first rows."""
        return [group.slots for group in self._groups(rows)]

    def read(self, layer: int, rows: int) -> None:
        """Goes over the prompts that the first rows share, in one layer: scores, weights, sums."""
        for group in self._groups(rows):
            k_KDL, v_KLD = group.caches[layer]
            torch.index_select(self.q_KSGD, 1, group.slot_A, out=group.q_KAGD)
            torch.bmm(group.q_KRD, k_KDL, out=group.score_KRL)
            attention.weigh(*group.arrays, self.team)
            torch.bmm(group.score_KRL, v_KLD, out=group.y_KRD)
            self.y_KSGD.index_copy_(1, group.slot_A, group.y_KAGD)
            self.sums_2KSG.index_copy_(2, group.slot_A, group.sums_2KAG)

    def _put(
        self,
        slots: Sequence[int],
        shared: Sequence[DecoderState | None],
        copied: Sequence[ReferenceType[DecoderState] | None],
        starts: Sequence[int],
    ) -> None:
        for slot, one, other, start in zip(slots, shared, copied, starts, strict=True):
            self.shared_S[slot], self.copied_S[slot], self.start_S[slot] = one, other, start
        self.found = None

    def _groups(self, rows: int) -> list[Group]:
        """The groups of the first rows, found again when rows have come or gone."""
        if self.found is None or self.rows != rows:
            slots_of: dict[int, list[int]] = {}
            for slot, prompt in enumerate(self.shared_S[:rows]):
                if prompt is not None:
                    slots_of.setdefault(id(prompt), []).append(slot)
            self.rows, self.found = rows, [self._group(slots) for slots in slots_of.values()]
        return self.found

    def _group(self, slots: list[int]) -> Group:
        prompt, length = self.shared_S[slots[0]], int(self.start_S[slots[0]])
        assert prompt is not None
        heads, _, queries, width = self.q_KSGD.shape
        shape = heads, len(slots), queries
        return Group.of(_caches(prompt, length), slots, (*shape, width), length)


@dataclass(frozen=True)
class Group:
    """The running rows of one prompt, its keys and values by layer, and room for what is computed
    of them: the same memory in several shapes.
    """

    caches: dict[int, tuple[Tensor, Tensor]]
    slots: list[int]
    slot_A: Tensor
    q_KAGD: Tensor
    q_KRD: Tensor
    y_KAGD: Tensor
    y_KRD: Tensor
    score_KRL: Tensor
    sums_2KAG: Tensor
    arrays: tuple[NDArray[np.float32], NDArray[np.float32]]

    @classmethod
    def of(
        cls,
        caches: dict[int, tuple[Tensor, Tensor]],
        slots: list[int],
        shape: tuple[int, int, int, int],
        length: int,
    ) -> Group:
        """A group with room for its rows; `shape` is that of its queries."""
        q_KAGD, y_KAGD = torch.empty(shape), torch.empty(shape)
        q_KRD, y_KRD = q_KAGD.flatten(1, 2), y_KAGD.flatten(1, 2)
        score_KRL = torch.empty(*q_KRD.shape[:2], length)
        sums_2KAG = torch.empty(2, *shape[:3])
        arrays = score_KRL.numpy(), sums_2KAG.flatten(2).numpy()
        slot_A = torch.tensor(slots)
        return cls(
            caches, slots, slot_A, q_KAGD, q_KRD, y_KAGD, y_KRD, score_KRL, sums_2KAG, arrays
        )


def _round(prompt: DecoderState, kv_dtype: torch.dtype) -> None:
    """Rounds keys and values where they are, which does no more the second time."""
    for layer in prompt.layers:
        if isinstance(layer, AttentionState) and layer.k_BKLD.dtype != kv_dtype:
            for tensor in layer.tensors():
                tensor.copy_(tensor.to(kv_dtype))


def _caches(prompt: DecoderState, length: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys, turned for a product, and values of each layer that has some."""
    return {
        i: (layer.k_BKLD[0, :, :length].mT, layer.v_BKLD[0, :, :length])
        for i, layer in enumerate(prompt.layers)
        if isinstance(layer, AttentionState)
    }
