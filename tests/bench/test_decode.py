"""The sweep: its rows agree with each other and with the models they are about."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from retort.bench import decode as decoding
from retort.bench.contenders import Case, Ours, Runtime, Timed
from retort.bench.decode import Decode, Row, Settings, decode, step_bytes
from retort.bench.head import Head
from retort.bench.models import Model
from retort.bench.spans import Protocol
from retort.model import cost


@dataclass
class Fake:
    """Decodes in the seconds that it is told, one span at a time, up to `most` rows."""

    model: Model
    name: str
    seconds: list[float]
    most: int = 1000
    runtime: Runtime = "retort"
    cases: list[Case] = field(default_factory=list)

    @property
    def cache(self) -> cost.CacheBytes:
        return self.model.cache

    def read(self, length: int) -> int:
        return length

    def decode(self, case: Case, prompt: int) -> Timed:
        assert prompt == case.lead
        if case.batch > self.most:
            raise MemoryError
        self.cases.append(case)
        return Timed(self.seconds[len(self.cases) % len(self.seconds)], 77)

    def complete(self, length: int, n: int) -> tuple[int, float]:
        raise NotImplementedError


def whole(contenders: list[Any], settings: Settings, top: Head) -> Decode:
    *_, last = decode(contenders, settings, top)
    return last


def test_a_row_for_each_contender_and_batch(
    models: list[Model], brief: Settings, top: Head
) -> None:
    result = whole([Ours(each) for each in models], brief, top)
    assert [(row.prompts, row.batch, row.model) for row in result.rows] == [
        (prompts, batch, name)
        for batch in (1, 3)
        for prompts in ("own", "shared")
        for name in ("attention", "mamba", "hybrid")
    ]
    assert result.complete
    for row in result.rows:
        assert len(row.seconds) == 2
        # Windows stand for all steps only where nothing is shared.
        assert row.steps == (4 if row.prompts == "own" else 8)
        assert [len(spans) for spans in row.seconds] == [4 if row.prompts == "own" else 1] * 2
        assert row.tokens_per_second == pytest.approx(row.batch * 1000 / row.ms_per_step)
        assert row.gb_per_second == pytest.approx(1e-9 * row.of_limit * row.bandwidth)
    assert [each.contender for each in result.prefills] == ["attention", "mamba", "hybrid"]


def test_result_grows_with_each_batch(models: list[Model], brief: Settings, top: Head) -> None:
    results = list(decode([Ours(models[0])], brief, top))
    assert [(len(each.rows), each.complete) for each in results] == [
        (2, False),
        (4, False),
        (4, True),
    ]


def test_times_are_medians_and_spread_is_relative(models: list[Model], top: Head) -> None:
    settings = Settings(Protocol(6, 10, 10), ("own",), (5,), repeats=3)
    # The first decoding warms up.
    fake = Fake(models[0], "fake", seconds=[9.0, 99.0, 2.0, 1.0, 4.0])
    (row,) = whole([fake], settings, top).rows
    assert row.seconds == [[2.0], [1.0], [4.0]]
    assert row.ms_per_step == 1000 * 2.0 / 10
    assert row.tokens_per_second == 5 * 10 / 2.0
    assert row.spread == pytest.approx((10 / 1 - 10 / 4) / (10 / 2))
    assert row.state_bytes == 77
    assert fake.cases[0].span.steps < fake.cases[1].span.steps == 10


def test_the_clock_of_the_others_is_not_shared(models: list[Model], top: Head) -> None:
    """Only a forward of ours can know of a shared prompt."""
    settings = Settings(Protocol(4, 2, 2), batches=(2,), repeats=1)
    theirs = Fake(models[0], "theirs", [1.0], runtime="transformers")
    ours = Fake(models[0], "ours", [1.0])
    rows = whole([ours, theirs], settings, top).rows
    assert [(row.contender, row.prompts) for row in rows] == [
        ("ours", "own"),
        ("theirs", "own"),
        ("ours", "shared"),
    ]


def test_out_of_memory_ends_a_sweep_and_is_said(models: list[Model], top: Head) -> None:
    settings = Settings(Protocol(4, 2, 2), ("own",), most=8, repeats=1)
    contenders = [Fake(models[0], "small", [1.0], most=2), Fake(models[1], "large", [1.0])]
    result = whole(contenders, settings, top)
    assert [(row.contender, row.batch) for row in result.rows] == [
        ("small", 1),
        ("large", 1),
        ("small", 2),
        ("large", 2),
        ("large", 4),
        ("large", 8),
    ]
    (end,) = result.ended
    assert (end.contender, end.batch) == ("small", 4)
    assert "small, own prompts: not at batch 4, out of memory" in result.notes


def test_sweep_ends_where_memory_does(
    models: list[Model], top: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, mamba = models[0], models[1]
    row = 120 * cost.kv_bytes_per_token(attention.config, 4) + 61 * 8
    monkeypatch.setattr(decoding, "room", lambda decoder: 5.5 * row)
    fakes = [Fake(attention, "attention", [1.0]), Fake(mamba, "mamba", [1.0])]
    result = whole(fakes, Settings(Protocol(112, 8, 8), ("own",), repeats=1), top)
    batches = {
        name: [row.batch for row in result.rows if row.contender == name]
        for name in ("attention", "mamba")
    }
    fits = int(5.5 * row // (cost.state_bytes(mamba.config, 4) + 61 * 8))
    assert batches == {
        "attention": [1, 2, 4],
        "mamba": [1 << i for i in range(fits.bit_length())],
    }
    assert max(case.batch for case in fakes[0].cases) == 4, "it is not even tried"
    (end,) = result.ended
    assert (end.contender, end.batch) == ("attention", 8)
    assert end.reason == "since memory holds 5 rows of the cost model"


def test_sweep_of_a_cpu_stops_at_some_size(models: list[Model], top: Head) -> None:
    result = whole([Fake(models[1], "fake", [1.0])], Settings(Protocol(4, 2, 2), ("own",)), top)
    assert [row.batch for row in result.rows] == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("runtime", "itemsize"), [("retort", 2), ("plain", 4), ("transformers", 4)]
)
def test_weights_that_our_steps_read_in_bfloat16(
    models: list[Model], top: Head, runtime: Runtime, itemsize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "read_itemsize", 2)
    protocol = Protocol(10, 4, 4)
    fake = Fake(models[0], "fake", [1.0], runtime=runtime)
    result = whole([fake], Settings(protocol, ("own",), batches=(3,)), top)
    wanted = step_bytes(models[0], 3, "own", protocol, models[0].cache, itemsize)
    assert [row.step_bytes for row in result.rows] == [wanted]


def test_bytes_of_a_step(models: list[Model]) -> None:
    protocol = Protocol(10, 4, 4)
    for model in models:
        own = step_bytes(model, 3, "own", protocol, model.cache, 4)
        # Steps that see 11, 12, 13 and 14 tokens; the cost model takes whole ones.
        assert own == cost.decode_bytes(model.config, 3, 12, 4).total
        prompt = 10 * cost.kv_bytes_per_token(model.config, 4)
        assert own - step_bytes(model, 3, "shared", protocol, model.cache, 4) == 2 * prompt
        half = step_bytes(model, 3, "own", protocol, model.cache, 2.0)
        assert own - half == cost.decode_bytes(model.config, 3, 12, 4).weights / 2
    alone = [
        step_bytes(models[0], 1, prompts, protocol, models[0].cache, 4)
        for prompts in ("own", "shared")
    ]
    assert alone[0] == alone[1]


def test_limit_is_of_the_bandwidth_of_the_same_rounds(
    models: list[Model], top: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter([1e9, 3e9, 2e9, 2e9])
    monkeypatch.setattr(decoding, "copy_bandwidth", lambda device: next(speeds))
    settings = Settings(Protocol(4, 2, 2), ("own",), (1,), repeats=1)
    (row,) = whole([Fake(models[0], "fake", [0.5])], settings, top).rows
    assert row.bandwidth == 2e9
    limit = cost.decode_limit(models[0].config, 1, 6, 2e9, 4)
    assert row.of_limit == pytest.approx(row.tokens_per_second / limit)


def test_noisy_rows_are_told(models: list[Model], top: Head) -> None:
    row = Row("a", "a", "retort", "own", 4, 512, 1.0, 4000.0, 0.3, 1.0, 1.0, 1.0, None, [[1.0]])
    quiet = replace(row, contender="b", spread=0.01)
    (told,) = set(Decode(top, Protocol(), 1, (), (row, quiet)).notes) - set(top.notes)
    assert told.startswith("1 of 2 rows spread by more than 10%, most of all a at batch 4, own")
