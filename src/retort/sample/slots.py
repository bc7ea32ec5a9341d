"""The running rows of a batch: what the device knows of each, and one step of all of them.

The device decides which rows have finished, so the host need not wait for it after every token.

Shapes: S rows that run, M tokens of a completion, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from retort.model.decoder import Decoder
from retort.model.state import DecoderState
from retort.sample.cache import CacheSettings
from retort.sample.forward import Forward, Plain, open_forward
from retort.sample.graphs import Replayed
from retort.sample.samplers import Sampler, open_sampler
from retort.sample.tokens import SamplingParams

if TYPE_CHECKING:
    from retort.sample.forward_cuda import Cuda  # Triton is not everywhere


class Slots:
    """Registers of every slot, beside the forward that holds their states.

    `seed_S` and `count_S` say where a row is in its random stream, `token_S` is its last token,
    sampled but not yet read by the model. A row that has `finished_S` goes on with the others
    until it is taken out, but writes nothing more; `cut_S` is one that ended before its last token.
    """

    def __init__(
        self, forward: Forward, sampler: Sampler, max_tokens: int, stops: Collection[int]
    ) -> None:
        self.forward, self.sampler, self.max_tokens = forward, sampler, max_tokens
        slots, device = forward.slots, forward.device
        self.seed_S, self.count_S, self.token_S = torch.zeros(
            3, slots, dtype=torch.long, device=device
        )
        self.finished_S, self.cut_S = torch.zeros(2, slots, dtype=torch.bool, device=device)
        self.stop_N = torch.tensor(sorted(stops), dtype=torch.long, device=device)
        # A last column takes what rows that have finished still draw.
        shape = slots, max_tokens + 1
        self.written_SM = torch.zeros(shape, dtype=torch.int32, device=device)
        self.logprob_SM = torch.zeros(shape, dtype=torch.float32, device=device)

    def start(
        self, slot_S: Tensor, prompt: DecoderState, logits_1V: Tensor, seeds: Sequence[int]
    ) -> None:
        """Forks a prompt to some slots and samples the first token of each."""
        self.forward.admit(slot_S, prompt)
        self.seed_S[slot_S] = torch.tensor(seeds, device=self.seed_S.device)
        self.count_S[slot_S] = 0
        self.finished_S[slot_S] = self.cut_S[slot_S] = False
        rows = slice(int(slot_S[0]), int(slot_S[-1]) + 1)
        self._sample(rows, logits_1V.expand(len(seeds), -1))

    def step(self, rows: int, reach: int) -> None:
        """One more token for each of the first rows, which then have read at most `reach`."""
        logits_SV = self.forward.step(self.token_S[:rows], reach)
        self._sample(slice(0, rows), logits_SV)

    def move(self, slot_S: Tensor, source_S: Tensor) -> None:
        """Copies rows from `source_S` over those of `slot_S`."""
        self.forward.move(slot_S, source_S)
        for register in (
            self.seed_S,
            self.count_S,
            self.token_S,
            self.finished_S,
            self.cut_S,
            self.written_SM,
            self.logprob_SM,
        ):
            register[slot_S] = register[source_S]

    def cut(self, row: int, count: int) -> None:
        """Ends a row behind its first `count` tokens."""
        self.count_S[row] = count
        self.finished_S[row] = self.cut_S[row] = True

    def _sample(self, rows: slice, logits_SV: Tensor) -> None:
        """Draws a token for each of the rows, writes it down, and sees whether it is the last."""
        count_S, finished_S = self.count_S[rows], self.finished_S[rows]
        token_S, logprob_S = self.sampler(logits_SV, self.seed_S[rows], count_S)
        place_S1 = count_S.masked_fill(finished_S, self.max_tokens)[:, None]
        self.written_SM[rows].scatter_(1, place_S1, token_S[:, None].int())
        self.logprob_SM[rows].scatter_(1, place_S1, logprob_S[:, None])
        self.token_S[rows] = token_S
        count_S += ~finished_S
        finished_S |= (token_S[:, None] == self.stop_N).any(1) | (count_S >= self.max_tokens)


class Graphed(Slots):
    """Slots on a GPU: a step is one CUDA graph, sampling included."""

    forward: Cuda

    def __init__(
        self,
        forward: Cuda,
        sampler: Sampler,
        max_tokens: int,
        stops: Collection[int],
        capture: bool = True,
    ) -> None:
        super().__init__(forward, sampler, max_tokens, stops)
        self.replayed = Replayed(forward, capture)

    def step(self, rows: int, reach: int) -> None:
        """One more token for each of the first rows, which then have read at most `reach`."""
        self.replayed.step(rows, reach, self._launch)

    def _launch(self, rows: int) -> None:
        """All of a step that the device does, for the first rows or some more."""
        self._sample(slice(0, rows), self.forward.launch(self.token_S[:rows]))


def open_slots(
    decoder: Decoder,
    slots: int,
    lengths: tuple[int, int],
    params: SamplingParams,
    stops: Collection[int],
    cache: CacheSettings | None = None,
) -> Slots:
    """Slots by the fastest way there is for the decoder's device and dtype.

    `lengths` bound the tokens of a row: all of them, and those behind its prompt. Raises ValueError
    as the kernels do.
    """
    forward = open_forward(decoder, slots, *lengths, cache)
    sampler = open_sampler(params, decoder, slots)
    if isinstance(forward, Plain) or forward.device.type != "cuda":
        return Slots(forward, sampler, params.max_tokens, stops)
    return Graphed(cast("Cuda", forward), sampler, params.max_tokens, stops)
