"""What all tests share: one thread, fixed seeds, and public data where it is at hand."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch


def pytest_configure() -> None:
    # The models are tiny: a second thread costs more than it brings.
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU (torch.cuda.is_available() is False)")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers in each test, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def data_folder() -> Path:
    """The folder with gsm8k_test.jsonl, math500_test.jsonl and the like."""
    folder = os.environ.get("RETORT_DATA")
    if not folder:
        pytest.skip("needs public problem sets: RETORT_DATA does not name their folder")
    return Path(folder)
