"""What tests of training share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from retort.recipe import Parallel
from retort.train import loop
from retort.train.world import World, open_world

from .tiny import fresh


@pytest.fixture
def world() -> Iterator[World]:
    """This process alone, on its CPU."""
    with open_world("cpu", Parallel()) as opened:
        yield opened


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its tokenizer, after three steps of training; nobody writes beside it."""
    torch.manual_seed(0)
    return loop.distill(fresh(tmp_path_factory.mktemp("teacher") / "teacher"))
