"""A replay foretells the seconds of an engine; benchmarks/replay.py says how well."""

from dataclasses import asdict
from statistics import median

import numpy as np
import pyarrow as pa
import pytest
import torch

from retort.model.config import DecoderConfig
from retort.model.decoder import Decoder
from retort.report.scheduler import replay
from retort.report.steps import StepTimes, fit
from retort.sample.clock import together
from retort.sample.engine import Engine, Finished, Request
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


def sampled(engine: Engine, completions: int) -> tuple[list[Finished], float]:
    before = engine.timing
    done = list(engine.stream([Request(PROMPT, range(completions))], PARAMS))
    return done, (engine.timing - before).decode_seconds


def test_other_numbers_of_slots_and_completions_are_foretold(decoder: Decoder) -> None:
    engine = Engine(decoder, 16)
    sampled(engine, 4)  # loads kernels
    before = engine.timing
    engine.log.take()
    sampled(engine, 96)
    spent, log = engine.timing - before, together([engine.log.take()])
    table = pa.Table.from_pylist(
        [{"rows": rows, **asdict(each)} for (rows, _), each in log.items()]
    )
    times = StepTimes(*fit(table), start=spent.start_seconds / spent.starts)
    ratios = []
    for slots, completions in ((16, 40), (8, 40), (4, 16), (2, 8), (1, 3)):
        done, seconds = sampled(Engine(decoder, slots), completions)
        length_N = np.array([len(each.completion.token_ids) for each in done])
        assert length_N.std() > 5, "completions of one length would be an easy thing to foretell"
        order = np.argsort([each.sample for each in done])
        prompt_N = np.full(completions, len(PROMPT))
        ratios.append(replay(length_N[order], prompt_N, slots, times) / seconds)
    assert 0.6 < median(ratios) < 1.6, ratios
    assert 0.3 < min(ratios) <= max(ratios) < 3, ratios
