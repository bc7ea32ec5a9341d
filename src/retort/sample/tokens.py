"""From logits to tokens: temperature, top-k, top-p, min-p, and one random stream per completion.

Randomness is counter-based: the uniform number behind a token is a hash of (the completion's seed,
the token's position), so a completion does not depend on its neighbours or on when it runs.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How to draw completions. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    `stop_token_ids` None stands for the model's own; `stop` strings end a completion at the token
    that completes one. With `logprobs` completions tell that of each token. Raises ValueError for
    values out of range.
    """

    n: int = 1
    max_tokens: int = 512
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name, good in (
            ("n", self.n >= 1),
            ("max_tokens", self.max_tokens >= 1),
            ("temperature", self.temperature >= 0),
            ("top_k", self.top_k >= 0),
            ("top_p", 0 < self.top_p <= 1),
            ("min_p", 0 <= self.min_p < 1),
            ("stop", all(self.stop)),
        ):
            if not good:
                raise ValueError(f"SamplingParams: {name} = {getattr(self, name)} is out of range")


def draw(logits_BV: Tensor, uniform_B: Tensor, params: SamplingParams) -> Tensor:
    """One token for each row, token_B, by inverting the cumulative distribution at `uniform_B`."""
    if params.temperature == 0:
        return logits_BV.argmax(-1)
    return choose(_weights(logits_BV, params), uniform_B)


def probabilities(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """What `draw` draws each token with, p_BV: after temperature and filters, in float32."""
    if params.temperature == 0:
        p_BV = torch.zeros_like(logits_BV, dtype=torch.float32)
        return p_BV.scatter_(1, logits_BV.argmax(-1, keepdim=True), 1)
    p_BV = _weights(logits_BV, params)
    return p_BV / p_BV.sum(-1, keepdim=True)


def choose(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token of each row at which its share of the row's weight reaches `uniform_B`."""
    cdf_BV = weight_BV.cumsum(-1)
    # Scaled to the total that was actually summed, so that rounding cannot leave the range.
    threshold_B1 = uniform_B.to(cdf_BV.dtype)[:, None] * cdf_BV[:, -1:]
    token_B = (cdf_BV <= threshold_B1).sum(-1)
    # A uniform number that rounds to 1 must still fall on the last token with any probability.
    last_B = (cdf_BV < cdf_BV[:, -1:]).sum(-1)
    return torch.minimum(token_B, last_B)


def log_probability(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    """log p(token) under the model itself, before temperature and filters, in float64."""
    chosen_B = logits_BV.gather(1, token_B[:, None]).squeeze(1)
    return (chosen_B.float() - logits_BV.float().logsumexp(-1)).double()


def uniforms(seed_B: Tensor, position_B: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), in float64, from 63-bit seeds and positions: the same anywhere.

    SplitMix64 (Steele et al. 2014) of the seed advanced by the position, in wrapping int64.
    """
    z = seed_B + (position_B + 1) * -0x61C8864680B583EB
    z = (z ^ _shift_right(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shift_right(z, 27)) * -0x6B2FB644ECCEEE15
    return _shift_right(z ^ _shift_right(z, 31), 11).double() * 2.0**-53


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """A logical shift: int64's own would copy the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _weights(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities at the temperature, 0 where a filter leaves a token out."""
    return _filtered((logits_BV.float() / params.temperature).softmax(-1), params)


def _filtered(p_BV: Tensor, params: SamplingParams) -> Tensor:
    """Zeroes what top-k, then top-p (of what is left), then min-p leave out."""
    if 0 < params.top_k < p_BV.shape[-1]:
        least_B1 = p_BV.topk(params.top_k, dim=-1).values[:, -1:]
        p_BV = p_BV.where(p_BV >= least_B1, 0)
    if params.top_p < 1:
        p_BV = p_BV.where(p_BV >= _nucleus_floor(p_BV, params.top_p), 0)
    if params.min_p > 0:
        p_BV = p_BV.where(p_BV >= params.min_p * p_BV.amax(-1, keepdim=True), 0)
    return p_BV


def _nucleus_floor(p_BV: Tensor, top_p: float) -> Tensor:
    """The smallest probability in the smallest set of tokens that holds `top_p` of the mass."""
    sorted_BV = p_BV.sort(-1, descending=True).values
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    inside_BV = before_BV < top_p * sorted_BV.sum(-1, keepdim=True)
    return sorted_BV.where(inside_BV, float("inf")).amin(-1, keepdim=True)
