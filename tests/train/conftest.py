"""What tests of training share."""

from collections.abc import Iterator

import pytest

from retort.recipe import Parallel
from retort.train.parallel import World, open_world


@pytest.fixture
def world() -> Iterator[World]:
    """This process alone, on its CPU."""
    with open_world("cpu", Parallel()) as opened:
        yield opened
