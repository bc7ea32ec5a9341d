"""Reading prompts: rates agree with times, and n completions read one prompt."""

import pytest

from retort.bench import prefill as reading
from retort.bench.contenders import Ours
from retort.bench.head import Head
from retort.bench.models import Model
from retort.bench.prefill import Prefill, Settings, prefill, prompt_flops
from retort.model import cost


@pytest.fixture
def result(models: list[Model], top: Head) -> Prefill:
    *_, last = prefill([Ours(each) for each in models], Settings((5, 9), n=4, repeats=2), top)
    return last


def test_a_row_for_each_length(result: Prefill, models: list[Model]) -> None:
    names = [model.name for model in models]
    assert [(row.length, row.contender) for row in result.rows] == [
        (length, name) for length in (5, 9) for name in names
    ]
    assert result.complete
    for row in result.rows:
        assert len(row.seconds) == 2
        seconds = sum(row.seconds) / 2
        assert row.tokens_per_second == pytest.approx(row.length / seconds)
        assert row.utilisation is None


def test_n_completions_read_one_prompt(result: Prefill) -> None:
    assert [(each.length, each.n, each.tokens, each.prompts) for each in result.shared] == [
        (5, 4, 5, 1)
    ] * 3


def test_flops_count_one_token_of_the_head(models: list[Model]) -> None:
    config = models[2].config
    flops = cost.prefill_flops(config, 9)
    head = 2 * config.vocab_size * config.hidden_size
    assert flops.head == head
    assert prompt_flops(models[2], 9) == pytest.approx(9 * flops.total - 8 * head)


def test_utilisation_is_of_the_gpus_peak(
    models: list[Model], top: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "peak_flops", lambda device: 1e12)
    (*_, last) = prefill([Ours(models[0])], Settings((5,), n=2, repeats=1), top)
    (row,) = last.rows
    assert row.utilisation == pytest.approx(row.flops_per_second / 1e12)
    assert row.flops_per_second * row.seconds[0] == pytest.approx(prompt_flops(models[0], 5))


def test_result_grows_with_each_length(models: list[Model], top: Head) -> None:
    results = prefill([Ours(models[0])], Settings((3, 5), n=2, repeats=1), top)
    assert [(len(each.rows), len(each.shared), each.complete) for each in results] == [
        (1, 0, False),
        (2, 0, False),
        (2, 1, True),
    ]
