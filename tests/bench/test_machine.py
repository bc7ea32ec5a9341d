"""What is known of the machine."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from retort.bench import machine
from retort.bench.machine import copy_bandwidth, cores, threads

CPU = torch.device("cpu")


def test_machine_is_described() -> None:
    found = machine.machine(CPU)
    assert found.device == found.cpu
    assert found.threads == torch.get_num_threads()
    assert found.cores == cores() >= 1
    assert found.versions["torch"] == torch.__version__
    assert "retort" in found.versions
    assert found.memory_bytes > 1 << 28


def test_busy_machine_is_told() -> None:
    found = replace(machine.machine(CPU), cores=4, load=2.0)
    assert found.warning is None
    busy = replace(found, load=2.6).warning
    assert busy == "the machine was busy: load 2.6 on 4 cores at the start"


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    with threads(None):
        assert torch.get_num_threads() == cores()
    assert torch.get_num_threads() == before


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(ValueError, match=f"--threads 4000: this process may use {cores()} cores"):
        threads(4000).__enter__()


def test_bandwidth_counts_reading_and_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "COPIED", 1000)

    def clocked(work: Callable[[], object], device: torch.device) -> float:
        work()
        return 0.5

    monkeypatch.setattr(machine, "timed", clocked)
    assert copy_bandwidth(CPU) == 2 * 1000 * 2 / 0.5


def test_only_known_gpus_have_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.peak_flops(CPU) is None
    names = iter(["NVIDIA H100 80GB HBM3", "Abacus 9000"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    assert machine.peak_flops(torch.device("cuda")) == 989e12
    assert machine.peak_flops(torch.device("cuda")) is None
