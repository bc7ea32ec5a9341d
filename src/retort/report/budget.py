"""From completions to seconds, FLOPs and bytes: what a budget buys, and what is worth its time.

The conversion to seconds is the paper's ("Thinking Slow, Fast", arXiv 2502.20339): decoding only,
at the throughput that was measured while sampling; reading the prompt (prefill) is not counted.

Shape suffixes: P problems, C candidates, K points of a curve, R bootstrap resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan

import numpy as np
from numpy.typing import NDArray

from retort.report.metrics import Floats
from retort.report.scheduler import Lengths


@dataclass(frozen=True)
class Pace:
    """How fast a model writes: tokens per second over all slots, mean tokens per completion."""

    tokens_per_second: float
    mean_tokens: float

    def __post_init__(self) -> None:
        if not (self.tokens_per_second > 0 and self.mean_tokens > 0):
            raise ValueError(
                f"pace of {self.tokens_per_second} tokens/s and {self.mean_tokens} tokens for each "
                "completion: both must be above 0"
            )

    def seconds(self, k: float) -> float:
        """Decode seconds per problem for k completions: k * mean length / throughput."""
        return k * self.mean_tokens / self.tokens_per_second

    def completions(self, seconds: float) -> float:
        """Completions per problem in a time, unrounded: k(T) = T * throughput / mean length."""
        return seconds * self.tokens_per_second / self.mean_tokens


@dataclass(frozen=True)
class TokenWork:
    """What decoding a token takes: FLOPs and bytes of itself, and for each token that it sees;
    weight_bytes are read once for all rows of a step.
    """

    flops: float
    flops_per_context: float
    weight_bytes: float
    row_bytes: float
    bytes_per_context: float

    def of_completion(self, lengths_P: Sequence[Lengths], rows: float) -> tuple[float, float]:
        """FLOPs and bytes of a completion, in the mean over problems, in steps of so many rows."""
        tokens, seen = np.mean([_tokens_and_seen(each) for each in lengths_P], axis=0).tolist()
        flops = self.flops * tokens + self.flops_per_context * seen
        row_bytes = self.row_bytes + self.weight_bytes / rows
        return flops, row_bytes * tokens + self.bytes_per_context * seen


def _tokens_and_seen(lengths: Lengths) -> tuple[float, float]:
    """Tokens of a problem's completions, and how many tokens all of them see, in the mean."""
    length_N = lengths.length_N.astype(np.float64)
    seen_N = length_N * lengths.prompt_tokens + length_N * (length_N + 1) / 2
    return float(length_N.mean()), float(seen_N.mean())


def pareto_front(seconds_C: Floats, accuracy_C: Floats) -> NDArray[np.bool_]:
    """Which candidates no other beats.

    One is beaten by another that is at least as fast and as accurate, and better in one of the two;
    of equal ones the first is kept. Leading dimensions, such as bootstrap resamples, are apart.
    """
    # fastest first, of equally fast ones the most accurate
    order_C = np.lexsort((-accuracy_C, seconds_C), axis=-1)
    best_C = np.maximum.accumulate(np.take_along_axis(accuracy_C, order_C, -1), axis=-1)
    first = np.full((*best_C.shape[:-1], 1), -np.inf)
    better_C = np.diff(best_C, prepend=first, axis=-1) > 0
    found_C = np.zeros(accuracy_C.shape, np.bool_)
    np.put_along_axis(found_C, order_C, better_C, -1)
    return found_C


def completions_to_reach(k_K: Floats, accuracy_RK: Floats, target_R: Floats) -> Floats:
    """The k from which each curve reaches its target, (R,), between its points on a logarithmic
    scale; the smallest k where already that is as accurate, NaN where none is.
    """
    reached_RK = accuracy_RK >= target_R[:, None]
    at_R = reached_RK.argmax(axis=1)
    row_R, before_R = np.arange(len(target_R)), np.maximum(at_R - 1, 0)
    low_R, high_R = accuracy_RK[row_R, before_R], accuracy_RK[row_R, at_R]
    with np.errstate(invalid="ignore", divide="ignore"):
        share_R = np.where(at_R == 0, 1.0, (target_R - low_R) / (high_R - low_R))
    k_R = k_K[before_R] * (k_K[at_R] / k_K[before_R]) ** share_R
    return np.where(reached_RK.any(axis=1), k_R, np.nan)


def prices(texts: Sequence[str]) -> dict[str, float]:
    """What an hour costs by name, from `NAME=MONEY`; `MONEY` alone, for all that are not named, has
    an empty name. Raises ValueError for what is no amount.
    """
    found = {}
    for text in texts:
        name, _, money = text.rpartition("=")
        try:
            found[name] = float(money)
        except ValueError:
            found[name] = nan
        if not 0 < found[name] < inf:
            raise ValueError(f"price {text!r}: expected an amount above 0, such as 2.5 or name=2.5")
    return found
