"""Windows stand for all steps."""

import pytest

from retort.bench.spans import Protocol, Span


def test_all_steps_are_one_span() -> None:
    assert Protocol(512, 512, 512).spans == (Span(512, 512),)
    assert Protocol(7, 5, 9).spans == (Span(7, 5),)
    assert Protocol(7, 5, 9).measured == 5


def test_windows_are_spread_evenly() -> None:
    # Quarters of 128 tokens, 32 steps in the middle of each.
    assert Protocol(128, 512, 128).spans == tuple(
        Span(128 + 48 + 128 * quarter, 32) for quarter in range(4)
    )
    assert Protocol(128, 512, 128).measured == 128


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 130, 511, 512])
def test_their_mean_context_is_that_of_all_steps(steps: int) -> None:
    protocol = Protocol(100, 512, steps)
    mean = sum(span.middle for span in protocol.spans) / len(protocol.spans)
    # The k-th new token's step has read the prompt and k tokens.
    assert mean == pytest.approx(sum(100 + k for k in range(1, 513)) / 512, abs=1)
    for span in protocol.spans:
        assert span.context >= 100
        assert span.context + span.steps <= 612


def test_says_what_is_measured() -> None:
    assert str(Protocol(512, 512, 512)) == "512 + 512 tokens"
    assert str(Protocol(512, 512, 130)) == "512 + 512 tokens, 128 of 512 steps"
