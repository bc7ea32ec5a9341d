"""A replay foretells the seconds of an engine; benchmarks/replay.py says how well."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch

from retort.model.config import DecoderConfig
from retort.model.decoder import Decoder
from retort.report.samples import Ints
from retort.report.scheduler import replay
from retort.report.steps import StepTimes, fit
from retort.sample.engine import Engine, Request
from retort.sample.tokens import SamplingParams

PROMPT = [3, 1, 4, 1, 5]
LONG = [*range(9, 60)] * 6
"""That eight rows or more read together, and fewer do not."""
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


class Done(NamedTuple):
    """Completions as `replay` takes them."""

    length_N: Ints
    problem_N: Ints
    prompt_P: Ints


def sampled(engine: Engine, completions: int, prompts: Sequence[list[int]] = (PROMPT,)) -> Done:
    """Lengths of the completions of each prompt, in the order in which they were started."""
    requests = [Request(prompt, range(completions)) for prompt in prompts]
    done = list(engine.stream(requests, PARAMS))
    done.sort(key=lambda each: (each.request, each.sample))
    return Done(
        np.array([len(each.completion.token_ids) for each in done]),
        np.array([each.request for each in done]),
        np.array([len(prompt) for prompt in prompts]),
    )


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
    assert replay(*found, slots, steps) == engine.timing.decode_steps
    # the first steps are not logged: their rows see the prompt, and a token more with each step
    rows = min(slots, completions)
    first = rows * sum(range(len(PROMPT) + 1, len(PROMPT) + look + 1))
    seen = first + sum(spent.context for spent in engine.log.take().values())
    context = StepTimes(np.zeros(slots + 1), 1.0, look=look)
    assert replay(*found, slots, context) == seen


@pytest.mark.parametrize("look", [1, 5])
@pytest.mark.parametrize(("slots", "completions"), [(16, 9), (12, 24), (4, 6), (32, 12)])
def test_the_replay_reads_what_the_engine_does(
    decoder: Decoder, slots: int, completions: int, look: int
) -> None:
    engine = Engine(decoder, slots, look=look)
    prompts = [LONG, LONG[:280], LONG[:260]]
    found = sampled(engine, completions, prompts)
    log = engine.log.take().values()
    assert engine.share_from is not None
    context = StepTimes(np.zeros(slots + 1), 1.0, look=look, share_from=engine.share_from)
    read = replay(*found, slots, context)
    # the first steps are not logged: how many rows there are of which prompt
    rows = [min(completions, max(0, slots - completions * i)) for i in range(len(prompts))]
    prompt = sum(
        length * (1 if count * length >= engine.share_from else count)
        for length, count in zip(found.prompt_P.tolist(), rows, strict=True)
    )
    first = look * prompt + sum(rows) * sum(range(1, look + 1))
    assert read == first + sum(spent.context for spent in log)
    apart = replay(*found, slots, replace(context, share_from=None))
    assert (read < apart) == (slots > 8), "prompts are shared where there are rows enough"


def test_seconds_are_foretold(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    # seconds of this process: others that run beside it take none of them, though they slow it down
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    sampled(Engine(decoder, 16), 4)  # loads kernels
    foretold = measured = 0.0
    for slots, completions in SHAPES:
        times = step_times(decoder)
        engine = Engine(decoder, slots)
        foretold += replay(*sampled(engine, completions), slots, times)
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
