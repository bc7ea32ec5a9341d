"""What all tests share: one thread, fixed seeds, and public data where it is at hand."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retort.model.config import ATTENTION, LINEAR, DecoderConfig, Mamba2Config
from retort.model.decoder import Decoder


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


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    """Tiny decoders: "am" has an attention and a Mamba-2 layer; `changes` are of the config."""

    def make(layers: str = "am", **changes: Any) -> Decoder:
        settings: dict[str, Any] = {
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "layer_types": tuple({"a": ATTENTION, "m": LINEAR}[letter] for letter in layers),
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
        }
        if "m" in layers:
            settings["mixer"] = Mamba2Config(
                heads=4, head_dim=16, state_size=8, groups=2, chunk_size=4
            )
        decoder = Decoder(DecoderConfig(**settings | changes))
        decoder.reset_parameters()
        _roughen(decoder)
        return decoder.eval().requires_grad_(False)

    return make


@torch.no_grad()
def _roughen(decoder: Decoder) -> None:
    """No weight stays at 0 or 1, where leaving it out would not show, and tokens differ widely."""
    for parameter in decoder.parameters():
        if parameter.ndim < 2:
            parameter.add_(0.3 * torch.randn_like(parameter))
    for table in (decoder.model.embed_tokens, decoder.lm_head):
        table.weight.normal_(std=0.5)
