"""From completions to seconds: what a budget buys, and which choices are worth their time.

The conversion is the paper's ("Thinking Slow, Fast", arXiv 2502.20339): decoding only, at the
throughput that was measured while sampling; reading the prompt (prefill) is not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass


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


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (seconds, accuracy) points that no other beats, fastest first.

    A point is beaten by one that is at least as fast and as accurate, and better in one of the two.
    Of equal points the first is kept.
    """
    fastest_first = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in fastest_first:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front
