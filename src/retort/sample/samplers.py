"""A token and its log-probability for each row, by the fastest way there is to draw it.

Shapes: S rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retort.model.decoder import Decoder
from retort.sample.forward import has_gpu_kernels
from retort.sample.tokens import SamplingParams, draw, log_probability, uniforms

Sampler = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits_SV, seed_S, count_S) -> token_S in int64, and logprob_S in float32, of the model itself
before temperature and filters. Number `count_S` of the stream of `seed_S` decides."""


def open_sampler(params: SamplingParams, decoder: Decoder, slots: int) -> Sampler:
    """The fastest one for the logits of a decoder."""
    weight = decoder.lm_head.weight
    if has_gpu_kernels(weight):
        return _cuda(params)
    filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and not filtered:
        return Cpu(params.temperature, slots, decoder.config.vocab_size)
    return Plain(params)


@dataclass(frozen=True)
class Plain:
    """As torch does it, on any device and with any filter: the reference."""

    params: SamplingParams

    def __call__(self, logits_SV: Tensor, seed_S: Tensor, count_S: Tensor) -> tuple[Tensor, Tensor]:
        token_S = draw(logits_SV, uniforms(seed_S, count_S), self.params)
        return token_S, log_probability(logits_SV, token_S).float()


class Cpu:
    """One kernel over the logits, with room of its own; for temperature alone."""

    def __init__(self, temperature: float, slots: int, vocabulary: int) -> None:
        from retort.ops.cpu import sampling, team

        self.kernel, self.temperature = sampling.sample, temperature
        self.team = team.of_threads(torch.get_num_threads())
        blocks = -(-vocabulary // sampling.BLOCK)
        self.part_SJ = torch.empty(slots, blocks, dtype=torch.float64).numpy()

    def __call__(self, logits_SV: Tensor, seed_S: Tensor, count_S: Tensor) -> tuple[Tensor, Tensor]:
        rows = len(seed_S)
        token_S, logprob_S = torch.empty(rows, dtype=torch.long), torch.empty(rows)
        arrays = (each.numpy() for each in (logits_SV.contiguous(), seed_S, count_S))
        written = token_S.numpy(), logprob_S.numpy()
        self.kernel(*arrays, self.temperature, self.part_SJ[:rows], *written, self.team)
        return token_S, logprob_S


def _cuda(params: SamplingParams) -> Sampler:
    from retort.ops.cuda.draw import Filters, draw

    filters = Filters(params.top_k, params.top_p, params.min_p)

    def sample(logits_SV: Tensor, seed_S: Tensor, count_S: Tensor) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(logits_SV):  # kernels run on the current one
            return draw(logits_SV, seed_S, count_S, params.temperature, filters)

    return sample
