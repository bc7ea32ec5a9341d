"""Ten thousand completions in one go: memory stays as it was after the first two thousand."""

import gc
from collections.abc import Callable

import psutil
import pytest

from retort.model.decoder import Decoder
from retort.sample.engine import Engine, Request
from retort.sample.tokens import SamplingParams

MIB = 1 << 20


@pytest.mark.slow
def test_memory_is_flat(make_decoder: Callable[..., Decoder]) -> None:
    # A third of the tokens end a completion, so slots are refilled at every step.
    decoder = make_decoder("am", eos_token_ids=tuple(range(0, 61, 3)))
    engine = Engine(decoder, slots=96)
    requests = [
        Request([1 + i % 60] * (4 + i % 29), list(range(10 * i, 10 * i + 10))) for i in range(1000)
    ]
    resident: dict[int, int] = {}
    stream = engine.stream(requests, SamplingParams(max_tokens=24))
    for number, _ in enumerate(stream, start=1):
        if number in (2_000, 10_000):
            gc.collect()
            resident[number] = psutil.Process().memory_info().rss
    assert number == 10_000
    assert resident[10_000] - resident[2_000] < 2 * MIB
