"""Forward and backward: rates agree with times, and memory with the plan's."""

import pytest
import torch
from tests.plain import only_torch

from retort.bench.head import Head
from retort.bench.models import Model
from retort.bench.training import Settings, Training, train
from retort.model import cost


@pytest.fixture
def result(models: list[Model], top: Head, monkeypatch: pytest.MonkeyPatch) -> Training:
    only_torch(monkeypatch)  # which memory is planned for; kernels of a CPU keep less
    *_, last = train(models, Settings(rows=3, lengths=(16, 32), repeats=2), top)
    return last


def test_a_row_for_each_length(result: Training, models: list[Model]) -> None:
    assert [(row.length, row.contender) for row in result.rows] == [
        (length, model.name) for length in (16, 32) for model in models
    ]
    assert result.complete
    configs = {model.name: model.config for model in models}
    for row in result.rows:
        seconds = sum(row.seconds) / 2
        assert row.tokens_per_second == pytest.approx(3 * row.length / seconds)
        flops = cost.train_flops(configs[row.contender], row.length)
        assert row.flops_per_second == pytest.approx(flops * row.tokens_per_second)
        assert row.utilisation is None


def test_memory_is_about_what_a_plan_says(result: Training, models: list[Model]) -> None:
    gradients = {model.name: 4 * model.decoder.size for model in models}
    for row in result.rows:
        assert row.peak_bytes > gradients[row.contender]
        assert row.planned_bytes == pytest.approx(row.peak_bytes, rel=0.25)


def test_gradients_are_not_kept(result: Training, models: list[Model]) -> None:
    assert result.rows
    for model in models:
        assert all(parameter.grad is None for parameter in model.decoder.parameters())
        assert all(parameter.dtype == torch.float32 for parameter in model.decoder.parameters())
