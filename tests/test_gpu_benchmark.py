"""The benchmark for GPUs does what it is told, on a CPU with small models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import gpu

from retort.sample.cache import CacheSettings

SMALL = gpu.Settings(
    device="cpu",
    batches=(1, 2),
    steps=2,
    repeats=1,
    cache=CacheSettings(kv_dtype=torch.bfloat16),
    recipe=("demo/pure.yaml", *(f"stages.{i}.micro_rows=1" for i in range(3))),
)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LENGTHS", {"1k": (8, 4), "4k": (8, 6)})
    monkeypatch.setattr("retort.bench.decode.copy_bandwidth", lambda device: 1e10)


def test_sweeps(tmp_path: Path) -> None:
    gpu.decode(("small-hybrid",), "tiny", tmp_path, SMALL)
    for length, steps in (("1k", 4), ("4k", 6)):
        told = json.loads((tmp_path / f"gpu-decode-tiny-{length}.json").read_text())
        assert told["complete"]
        assert told["protocol"]["new"] == steps
        names = {row["contender"] for row in told["rows"]}
        assert names == {"small-hybrid", "small-hybrid (KV bfloat16)"}
        assert {row["batch"] for row in told["rows"]} == {1, 2}
        assert {row["prompts"] for row in told["rows"]} == (
            {"own", "shared"} if length == "1k" else {"own"}
        )


def test_training(tmp_path: Path) -> None:
    gpu.train(tmp_path, SMALL)
    told = json.loads((tmp_path / "gpu-train.json").read_text())
    assert [trial["stage"] for trial in told["trials"]] == ["mixing", "hidden", "distill"]
    assert all(trial["planned_gib"] > 0 and trial["seconds"] > 0 for trial in told["trials"])


def test_profiles(tmp_path: Path) -> None:
    gpu.profiles(("small",), tmp_path, replace(SMALL, batches=(1, 3, 9)))
    told = json.loads((tmp_path / "gpu-profile.json").read_text())
    assert told["batch"] == 3
    spent = [row["us"] for row in told["kernels"]["small"]]
    assert spent == sorted(spent, reverse=True)
    assert spent[0] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.sys, "argv", ["gpu.py", "train", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "device 'cuda' cannot be used here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tests_that_fail_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.sys, "executable", "false")
    with pytest.raises(SystemExit, match="1"):
        gpu.tests(tmp_path, SMALL)
    assert json.loads((tmp_path / "gpu-tests.json").read_text())["returncode"] == 1
