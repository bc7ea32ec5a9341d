"""What `retort inspect` says of a folder, against the decoder that is in it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

import retort
from retort.inspection import Inspection, format_bytes, inspect, tables
from retort.model.config import ATTENTION, LINEAR, DiscreteMamba2Config, Mamba1Config, MixerConfig
from retort.model.decoder import Decoder

MakeDecoder = Callable[..., Decoder]

MIXERS = {
    "mamba2": None,  # that of the fixture
    "discrete_mamba2": DiscreteMamba2Config(heads=4, head_dim=8, state_size=8, groups=2),
    "mamba1": Mamba1Config(heads=4, kv_heads=2, head_dim=8, dt_rank=2, state_size=4),
}


def saved(
    folder: Path, make_decoder: MakeDecoder, layers: str, mixer: MixerConfig | None
) -> Decoder:
    decoder = make_decoder(layers, **({} if mixer is None else {"mixer": mixer}))
    retort.save(decoder, folder)
    return decoder


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("layers", ["mam", "mm"])
def test_counts_are_those_of_the_decoder(
    tmp_path: Path, make_decoder: MakeDecoder, layers: str, kind: str
) -> None:
    decoder = saved(tmp_path / "m", make_decoder, layers, MIXERS[kind])
    found = inspect(tmp_path / "m")
    assert found.parameters == decoder.size
    assert found.dtypes == {"float32": decoder.size}
    empty, one = (decoder.init_state(1, length).nbytes for length in (0, 1))
    assert (found.state_bytes, found.kv_bytes_per_token) == (empty, one - empty)
    kinds = {ATTENTION: "attention", LINEAR: kind}
    rows = [(run.mixer, index) for run in found.runs for index in range(run.first, run.last + 1)]
    assert rows == [(kinds[name], i) for i, name in enumerate(decoder.config.layer_types)]
    for run in found.runs:
        mixer = decoder.blocks[run.first].mixer
        assert run.mixer_parameters == sum(p.numel() for p in mixer.parameters())


def test_formats_and_reasons(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    def reasons(layers: str, kind: str) -> list[str]:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        saved(tmp_path / "m", make_decoder, layers, MIXERS[kind])
        return ["; ".join(each.reasons) for each in inspect(tmp_path / "m").formats]

    assert reasons("aa", "mamba2") == ["", "it has no state-space layers"]
    own, granite = reasons("am", "mamba2")
    assert "state-space layers" in own
    assert granite == ""
    assert "its mixer is mamba1" in reasons("am", "mamba1")[1]
    assert "its mixer is discrete_mamba2" in reasons("mm", "discrete_mamba2")[1]


def test_what_runs_it(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    saved(tmp_path / "wide", make_decoder, "am", None)  # 4 heads of 16 for a width of 32
    assert set(inspect(tmp_path / "wide").formats[1].runtimes.values()) == {""}
    narrow = replace(make_decoder("m").config.mixer, head_dim=8)  # type: ignore[type-var]
    saved(tmp_path / "narrow", make_decoder, "am", narrow)
    runtimes = inspect(tmp_path / "narrow").formats[1].runtimes
    assert {name for name, reason in runtimes.items() if reason} == {"llama.cpp"}
    assert "twice as wide as hidden_size 32, not 32" in runtimes["llama.cpp"]


def test_half_precision_halves_what_is_not_a_recurrent_state(
    tmp_path: Path, make_decoder: MakeDecoder
) -> None:
    retort.save(make_decoder("am").to(torch.bfloat16), tmp_path / "m")
    found = inspect(tmp_path / "m")
    assert set(found.dtypes) == {"bfloat16"}
    state = make_decoder("am").to(torch.bfloat16).init_state(1, 1)
    assert found.state_bytes + found.kv_bytes_per_token == state.nbytes


def test_weights_are_not_read(
    tmp_path: Path, make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "m", make_decoder, "am", None)

    def fail(*arguments: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("retort.model.weights._file_tensors", fail)
    inspect(tmp_path / "m")


def shown(result: Inspection, width: int) -> str:
    console = Console(width=width, record=True, file=StringIO())
    for table in tables(result):
        console.print(table)
    return console.export_text()


def test_tables(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    saved(tmp_path / "m", make_decoder, "mmma", None)
    text = shown(inspect(tmp_path / "m"), 120)
    assert "0-2" in text
    assert "mamba2" in text
    assert "GraniteMoeHybridForCausalLM" in text
    assert all(len(line) <= 60 for line in shown(inspect(tmp_path / "m"), 60).splitlines())


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        inspect(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (32 * 1024, "32 KiB"),
        (3 << 19, "1.5 MiB"),
        (1 << 43, "8192 GiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text
