"""Decoding speed: the numbers agree with each other and with the models they are about."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import retort
from retort import bench as benches
from retort import console
from retort.bench import Bench, Speed
from retort.model.decoder import Decoder

Models = list[tuple[str, Decoder]]


@pytest.fixture
def models(make_decoder: Callable[..., Decoder]) -> Models:
    return [("attention", make_decoder("aa")), ("mamba", make_decoder("mm"))]


def speed(model: str, batch: int, rate: float) -> Speed:
    return Speed(model, 1000, batch, 512, 512, 0.25, 1.5, rate, 0.07, 2_000_000)


def test_one_speed_for_each_model_and_batch(models: Models) -> None:
    result = benches.bench(models, [1, 4], prompt=6, new=3, repeats=2)
    assert [(s.batch, s.model) for s in result.speeds] == [
        (1, "attention"),
        (1, "mamba"),
        (4, "attention"),
        (4, "mamba"),
    ]
    sizes = dict(models)
    for s in result.speeds:
        assert (s.prompt, s.new) == (6, 3)
        assert s.parameters == sizes[s.model].size
    assert result.threads == torch.get_num_threads()
    assert (result.torch, result.retort) == (torch.__version__, retort.__version__)
    assert result.machine


def test_rates_and_times_agree(models: Models) -> None:
    for s in benches.bench(models, [1, 3], prompt=6, new=4, repeats=3).speeds:
        assert s.tokens_per_second == pytest.approx(s.batch * 1000 / s.ms_per_step)
        assert s.prefill_seconds > 0
        assert s.spread >= 0


def test_times_are_medians_and_spread_is_relative(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seconds of prefill and of decoding: of the round that warms up, then of three repeats.
    rounds = iter([(9.0, 99.0), (0.3, 2.0), (0.1, 1.0), (0.2, 4.0)])
    lengths = []

    def measured(decoder: Decoder, batch: int, prompt: int, new: int) -> tuple[float, float, int]:
        lengths.append(new)
        return (*next(rounds), 77)

    monkeypatch.setattr(benches, "_decode", measured)
    (s,) = benches.bench(models[:1], [5], prompt=6, new=20, repeats=3).speeds
    assert lengths == [8, 20, 20, 20], "the first round is short and does not count"
    assert s.prefill_seconds == 0.2
    assert s.ms_per_step == 1000 * 2.0 / 20
    assert s.tokens_per_second == 5 * 20 / 2.0
    assert s.spread == pytest.approx((100 - 25) / 50)
    assert s.state_bytes == 77


def test_seconds_are_those_of_the_steps(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that counts the tokens a row has read, instead of seconds.
    read = 0

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal read
        rows.add(inputs[0].shape[0])
        read += inputs[0].shape[1]

    rows: set[int] = set()
    models[0][1].model.embed_tokens.register_forward_pre_hook(note)
    monkeypatch.setattr("retort.bench.time.perf_counter", lambda: float(read))
    (s,) = benches.bench(models[:1], [5], prompt=6, new=4, repeats=2).speeds
    assert (s.prefill_seconds, s.ms_per_step) == (6, 1000)
    assert rows == {1, 5}, "the prompt is read once, for all rows"


def state_bytes(model: tuple[str, Decoder], prompt: int, new: int, batch: int = 2) -> int:
    (s,) = benches.bench([model], [batch], prompt, new, repeats=1).speeds
    return s.state_bytes


def test_state_of_attention_grows_with_the_length_and_mambas_does_not(models: Models) -> None:
    attention, mamba = models
    # Two layers, keys and values, two heads of eight channels, four bytes each.
    assert state_bytes(attention, 6, 4) == 2 * (6 + 4) * 2 * 2 * 2 * 8 * 4
    assert state_bytes(attention, 14, 6) == 2 * state_bytes(attention, 6, 4)
    assert state_bytes(mamba, 14, 6) == state_bytes(mamba, 6, 4)
    # Two layers of 4 heads, 16 channels and 8 states; 3 past inputs of 64 + 2 * 2 * 8 channels.
    assert state_bytes(mamba, 6, 4) == 2 * 2 * (4 * 16 * 8 + 3 * 96) * 4
    for model in models:
        assert state_bytes(model, 6, 4, batch=6) == 3 * state_bytes(model, 6, 4, batch=2)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    speeds = [
        speed("teacher", 1, 200.0),
        speed("[bold]student", 1, 500.0),
        speed("teacher", 64, 4000.0),
        speed("[bold]student", 64, 12_000.0),
    ]
    console.print_table(benches.table(Bench(speeds, "abacus", 3, "2.13", "0.1")))
    out = capsys.readouterr().out
    assert "3 threads, abacus" in out
    lines = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells[1] == [
        "[bold]student", "1", "250 ms", "1.50", "500", "7 %", "2.0 MB", "2.50x",
    ]  # fmt: skip
    # Each batch has its own first model to be compared with.
    assert [(line[0], line[4], line[7]) for line in cells] == [
        ("teacher", "200", "1.00x"),
        ("[bold]student", "500", "2.50x"),
        ("teacher", "4,000", "1.00x"),
        ("[bold]student", "12,000", "3.00x"),
    ]


def test_models_are_named_after_their_folders(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, decoder in models:
        retort.save(decoder, tmp_path / name)
    opened = benches.open_models([tmp_path / "mamba", tmp_path / "attention"])
    assert [(name, decoder.size) for name, decoder in opened] == [
        (name, decoder.size) for name, decoder in reversed(models)
    ]
    monkeypatch.chdir(tmp_path / "mamba")
    assert [name for name, _ in benches.open_models([Path()])] == ["mamba"]


def test_without_folders_the_bundled_teacher_beside_students_of_its_shape(
    make_decoder: Callable[..., Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retort.save(make_decoder("aaaa"), tmp_path / "teacher")
    monkeypatch.setattr(benches, "BUNDLED_TEACHER", tmp_path / "teacher")
    opened = benches.open_models([])
    attention = {
        name: [each == "full_attention" for each in decoder.config.layer_types]
        for name, decoder in opened
    }
    assert attention == {
        "teacher": [True] * 4,
        "pure": [False] * 4,
        "hybrid": [False, False, True, False],
    }
    assert not any(decoder.training for _, decoder in opened)
    assert len(benches.bench(opened, [2], prompt=3, new=2, repeats=1).speeds) == 3


def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        benches.open_models([tmp_path / "nowhere"])
