"""Tiny models to measure, and a machine whose memory copies at once."""

from collections.abc import Callable

import pytest
import torch

from retort.bench import decode, machine
from retort.bench.head import Head, head
from retort.bench.models import Model
from retort.model.decoder import Decoder


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real bandwidths need arrays that take half a second to copy."""
    monkeypatch.setattr(machine, "COPIED", 1 << 16)


@pytest.fixture
def models(make_decoder: Callable[..., Decoder]) -> list[Model]:
    """Attention alone, Mamba-2 alone, and one layer of each."""
    layers = {"attention": "aa", "mamba": "mm", "hybrid": "am"}
    return [Model(name, make_decoder(each)) for name, each in layers.items()]


@pytest.fixture
def top(models: list[Model]) -> Head:
    return head(models, torch.device("cpu"))


@pytest.fixture
def brief() -> decode.Settings:
    """Two batch sizes, four steps in all."""
    return decode.Settings(decode.Protocol(6, 8, 4), batches=(1, 3), repeats=2)
