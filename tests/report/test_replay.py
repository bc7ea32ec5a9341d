"""A replay foretells the seconds of an engine; benchmarks/replay.py says how well."""

import time
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
import torch

from retort.model.config import DecoderConfig
from retort.model.decoder import Decoder
from retort.report.scheduler import Lengths, replay
from retort.report.steps import StepTimes, fit
from retort.sample.engine import Engine, Request
from retort.sample.tokens import SamplingParams

PROMPT = [3, 1, 4, 1, 5]
PARAMS = SamplingParams(max_tokens=120, temperature=1.0, stop_token_ids=(7, 8))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        layer_types=("full_attention",) * 2,
        heads=2,
        kv_heads=1,
        head_dim=32,
        eos_token_ids=(7,),
    )
    decoder = Decoder(config)
    decoder.reset_parameters()
    return decoder.eval()


SHAPES = [(16, 40), (8, 40), (4, 16), (2, 8), (1, 3), (16, 5)]
"""Slots, and completions."""


def sampled(engine: Engine, completions: int) -> Lengths:
    """Lengths of the completions, in the order in which they were started."""
    done = list(engine.stream([Request(PROMPT, range(completions))], PARAMS))
    done.sort(key=lambda each: each.sample)
    length_N = np.array([len(each.completion.token_ids) for each in done])
    return Lengths(length_N, len(PROMPT), 0.0)


def replayed(found: Lengths, slots: int, times: StepTimes) -> float:
    prompt_N = np.full(len(found.length_N), found.prompt_tokens)
    return replay(found.length_N, prompt_N, slots, times)


@pytest.mark.parametrize("look", [1, 5])
@pytest.mark.parametrize(("slots", "completions"), SHAPES)
def test_the_replay_takes_the_engines_steps(
    decoder: Decoder, slots: int, completions: int, look: int
) -> None:
    engine = Engine(decoder, slots, look=look)
    found = sampled(engine, completions)
    if completions > 5:
        assert found.length_N.std() > 5, "one length would be an easy thing to foretell"
    steps = StepTimes(np.ones(slots + 1), 0.0, look=look)
    assert replayed(found, slots, steps) == engine.timing.decode_steps
    # the first steps are not logged: their rows see the prompt, and a token more with each step
    rows = min(slots, completions)
    first = rows * sum(range(len(PROMPT) + 1, len(PROMPT) + look + 1))
    seen = first + sum(spent.context for spent in engine.log.take().values())
    context = StepTimes(np.zeros(slots + 1), 1.0, look=look)
    assert replayed(found, slots, context) == seen


def test_seconds_are_foretold(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    # seconds of this process: others that run beside it take none of them, though they slow it down
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    sampled(Engine(decoder, 16), 4)  # loads kernels
    foretold = measured = 0.0
    for slots, completions in SHAPES:
        times = step_times(decoder)
        engine = Engine(decoder, slots)
        foretold += replayed(sampled(engine, completions), slots, times)
        measured += engine.timing.decode_seconds
    assert 0.5 < foretold / measured < 2


def step_times(decoder: Decoder) -> StepTimes:
    engine = Engine(decoder, 16)
    sampled(engine, 64)
    log = engine.log.take()
    table = pa.Table.from_pylist(
        [{"rows": rows, **asdict(each)} for (rows, _), each in log.items()]
    )
    timing = engine.timing
    return StepTimes(*fit(table), start=timing.start_seconds / timing.starts)
