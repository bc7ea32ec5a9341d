"""`retort bench` as a user meets it."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import retort
from retort import cli
from retort.bench.contenders import Ours
from retort.bench.models import Model


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`retort bench` with these words, on one thread."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["retort", "bench", *map(str, words), "--threads", "1"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return Outcome(int(end.value.code or 0), out, err)

    return run


@pytest.fixture
def folders(models: list[Model], tmp_path: Path) -> list[Path]:
    for model in models[:2]:
        retort.save(model.decoder, tmp_path / model.name)
    return [tmp_path / model.name for model in models[:2]]


SIZES = ("--batch", 1, "--batch", 3, "--prompt", 5, "--new", 4, "--repeats", 2)


def test_decode(bench: Command, folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "results"
    done = bench("decode", *folders, *SIZES, "--plain", "--out", out, "--pictures", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert {(row["contender"], row["batch"], row["prompts"]) for row in result["rows"]} == {
        (name, batch, prompts)
        for batch in (1, 3)
        for name in ("attention", "mamba", "attention (plain torch)", "mamba (plain torch)")
        for prompts in (("own",) if "plain" in name else ("own", "shared"))
    }
    assert result["complete"]
    assert result["protocol"] == {"prompt": 5, "new": 4, "steps": 128}
    assert result["head"]["command"].startswith("retort bench decode")
    assert result["head"]["machine"]["threads"] == 1
    assert json.loads((out / "bench-decode.json").read_text()) == result
    names = {path.name for path in out.iterdir()}
    assert names == {f"bench-decode.{ending}" for ending in ("json", "html", "svg", "png")}
    assert (out / "bench-decode.svg").read_text().startswith("<svg")
    assert (out / "bench-decode.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in done.out


def test_prefill_and_train(bench: Command, folders: list[Path]) -> None:
    done = bench("prefill", *folders, "--length", 5, "-n", 3, "--repeats", 1, "--json")
    assert done.code == 0, done.err
    shared = json.loads(done.out.splitlines()[-1])["shared"]
    assert [each["tokens"] for each in shared] == [5, 5]
    done = bench("train", *folders, "--rows", 2, "--length", 8, "--repeats", 1, "--json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out.splitlines()[-1])["rows"]) == 2


def test_ctrl_c_leaves_what_was_measured(
    bench: Command, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Ours.decode

    def interrupted(self: Ours, case: Any, prompt: Any) -> Any:
        if case.batch == 3:
            raise KeyboardInterrupt
        return decode(self, case, prompt)

    monkeypatch.setattr(Ours, "decode", interrupted)
    done = bench("decode", *folders, *SIZES, "--out", tmp_path / "results", "--json")
    assert done.code == 1
    assert "interrupted: this is what was measured until then" in done.err
    result = json.loads(done.out.splitlines()[-1])
    assert not result["complete"]
    assert {row["batch"] for row in result["rows"]} == {1}
    assert json.loads((tmp_path / "results" / "bench-decode.json").read_text()) == result


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("decode", "--prompts", "none"), "--prompts none: choose own, shared, both"),
        (("decode", "--against", "vllm"), "--against vllm: choose transformers or llama.cpp"),
        (("decode", "--device", "abacus"), "device 'abacus' cannot be used here"),
        (("prefill", "--device", "abacus"), "device 'abacus' cannot be used here"),
        (("train", "--device", "abacus"), "device 'abacus' cannot be used here"),
        (("decode", "--batch", "0"), "Invalid value for '--batch'"),
        (("train", "--length", "0"), "Invalid value for '--length'"),
        (("targets", "--repeats", "0"), "Invalid value for '--repeats'"),
    ],
)
def test_mistakes(
    bench: Command, folders: list[Path], tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    models = [] if words[0] == "targets" else folders
    done = bench(*words, *models, "--out", tmp_path / "results")
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert not (tmp_path / "results").exists(), "nothing is written"


def test_out_that_is_a_file(bench: Command, folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = bench("decode", *folders, *SIZES, "--out", tmp_path / "file")
    assert (done.code, done.out) == (2, "")
    assert "file: File exists" in done.err
