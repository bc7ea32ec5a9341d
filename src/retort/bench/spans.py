"""Which of the decode steps are measured: all of them, or windows spread over them.

A step of attention costs more the more tokens its row has read, in proportion, so that the mean
over windows whose middles are spread evenly is the mean over all steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

WINDOWS = 4


@dataclass(frozen=True)
class Span:
    """Decode steps one after another; `context` tokens have been read before the first."""

    context: int
    steps: int

    @property
    def middle(self) -> float:
        """The tokens that its steps have read with their own, on average."""
        return self.context + (self.steps + 1) / 2


@dataclass(frozen=True)
class Protocol:
    """Prompts of `prompt` tokens continued by `new`, of whose steps `steps` are measured: all, or
    windows spread over them.
    """

    prompt: int = 512
    new: int = 512
    steps: int = 512

    @property
    def spans(self) -> tuple[Span, ...]:
        """What is measured, in order."""
        if self.steps >= self.new:
            return (Span(self.prompt, self.new),)
        windows = min(WINDOWS, self.steps)
        each = self.steps // windows
        between = self.new / windows
        starts = (self.prompt + (i + 0.5) * between - each / 2 for i in range(windows))
        return tuple(Span(int(start), each) for start in starts)

    @property
    def measured(self) -> int:
        """Steps in all spans."""
        return sum(span.steps for span in self.spans)

    @property
    def whole(self) -> Protocol:
        """The same with every step measured."""
        return replace(self, steps=self.new)

    def __str__(self) -> str:
        part = "" if self.measured == self.new else f", {self.measured} of {self.new} steps"
        return f"{self.prompt} + {self.new} tokens{part}"
