"""What a decoder remembers of the tokens it has read, one entry for each layer and row.

Shapes: B rows, L cached positions, H heads, K key/value heads, D head channels, P, N state,
W the convolution's past inputs, E channels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerState:
    """Tensors whose first dimension is the row; updated in place by the layer that owns them."""

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def select(self, rows: Tensor) -> Self:
        """A copy that holds the given rows, in that order; a row may be taken many times."""
        return type(self)(*(tensor.index_select(0, rows) for tensor in self.tensors()))

    def first(self, rows: int) -> Self:
        """The first rows, as views: what is written to them is written here."""
        return type(self)(*(tensor[:rows] for tensor in self.tensors()))

    def branch(self) -> Self:
        """A state that can be read on from while this one keeps its meaning: here a copy."""
        return type(self)(*(tensor.clone() for tensor in self.tensors()))

    def put(self, slots: Tensor, source: Self) -> None:
        """Overwrites the rows `slots` with those of `source`, or all with its only row."""
        for mine, theirs in zip(self.tensors(), source.tensors(), strict=True):
            mine[slots] = theirs


@dataclass(frozen=True)
class AttentionState(LayerState):
    """Cached keys and values; positions from a row's length on hold nothing of meaning."""

    k_BKLD: Tensor
    v_BKLD: Tensor

    def branch(self) -> Self:
        """The cache itself: what is written past a row's length means nothing to it."""
        return self

    def put(self, slots: Tensor, source: Self) -> None:
        """Overwrites rows; `source` may be shorter, since what lies past its length is unused."""
        for mine, theirs in zip(self.tensors(), source.tensors(), strict=True):
            mine[slots, :, : theirs.shape[2]] = theirs


@dataclass(frozen=True)
class MambaState(LayerState):
    """The recurrent state, in float32 whatever the model's dtype, and the last conv inputs."""

    ssm_BHPN: Tensor
    conv_BWE: Tensor


@dataclass
class DecoderState:
    """The states of all layers, and how many tokens each row has read.

    `reach` is an upper bound of the row lengths, kept on the host: attention reads the cache up to
    it, and nothing has to wait for the device to learn it.
    """

    layers: list[AttentionState | MambaState]
    length_B: Tensor
    max_length: int
    reach: int = 0

    @property
    def batch(self) -> int:
        """The number of rows."""
        return self.length_B.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for layer in self.layers for t in layer.tensors())

    def fork(self, n: int) -> DecoderState:
        """A copy with every row n times, copies side by side: rows 0, 0, ..., 1, 1, ..."""
        rows = torch.arange(self.batch, device=self.length_B.device)
        return self.select(rows.repeat_interleave(n))

    def select(self, rows: Tensor | list[int]) -> DecoderState:
        """A copy with the given rows, in that order; a row may be taken many times."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.length_B.device)
        layers = [layer.select(index) for layer in self.layers]
        return DecoderState(layers, self.length_B[index], self.max_length, self.reach)

    def branch(self) -> DecoderState:
        """A state to read on from and throw away: this one stays as it is up to its lengths."""
        layers = [layer.branch() for layer in self.layers]
        return DecoderState(layers, self.length_B.clone(), self.max_length, self.reach)

    def first(self, rows: int, reach: int) -> DecoderState:
        """The first rows, as views: a call that continues from them updates this state."""
        layers = [layer.first(rows) for layer in self.layers]
        return DecoderState(layers, self.length_B[:rows], self.max_length, reach)

    def put(self, slots: Tensor | list[int], source: DecoderState) -> None:
        """Overwrites the rows `slots` with those of `source`, or all of them with its only row.

        `source` may have been made for fewer tokens.
        """
        assert source.max_length <= self.max_length
        index = torch.as_tensor(slots, dtype=torch.long, device=self.length_B.device)
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            mine.put(index, theirs)  # type: ignore[arg-type]  # same decoder, same kinds
        self.length_B[index] = source.length_B
        self.reach = max(self.reach, source.reach)
