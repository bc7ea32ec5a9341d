"""What all tests share: one thread, fixed seeds, and public data where it is at hand."""

import gc
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retort.model.config import (
    ATTENTION,
    LINEAR,
    DecoderConfig,
    DiscreteMamba2Config,
    Mamba1Config,
    Mamba2Config,
    MixerConfig,
)
from retort.model.decoder import Decoder

from .interpreter import mend

MIXERS: dict[str, MixerConfig] = {
    "m": Mamba2Config(heads=4, head_dim=16, state_size=8, groups=2, chunk_size=4),
    "d": DiscreteMamba2Config(heads=4, head_dim=12, state_size=6, groups=2, chunk_size=4),
    "s": Mamba1Config(heads=4, kv_heads=2, head_dim=8, dt_rank=3, state_size=4, chunk_size=4),
}


def pytest_configure() -> None:
    # The models are tiny: a second thread costs more than it brings.
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # Must be known before anything imports triton: its own functions are interpreted, too.
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that start processes take longest: begun first, none is left over for one worker alone.
    slow = {item.path for item in items if item.get_closest_marker("multiprocess")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    # What imports have made stays for ever: collecting garbage need not look at it each time.
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU (torch.cuda.is_available() is False)")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def triton_device(request: pytest.FixtureRequest) -> str:
    """Where kernels for GPUs run: on one, or in Triton's interpreter where there is none."""
    if request.param == "cpu":
        if torch.cuda.is_available():
            pytest.skip("nothing is interpreted where there is a GPU to compile for")
        mend()
    return request.param


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
    """Tiny decoders, a letter for each layer: a is attention, m a Mamba-2 mixer, d a discrete one
    and s Mamba-1; a decoder has one kind of mixer. `changes` are of the config.
    """

    def make(layers: str = "am", **changes: Any) -> Decoder:
        settings: dict[str, Any] = {
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "layer_types": tuple(ATTENTION if letter == "a" else LINEAR for letter in layers),
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
        }
        kinds = set(layers) - {"a"}
        if kinds:
            (kind,) = kinds
            settings["mixer"] = MIXERS[kind]
        decoder = Decoder(DecoderConfig(**settings | changes))
        decoder.reset_parameters()
        _roughen(decoder)
        return decoder.eval().requires_grad_(False)

    return make


@torch.no_grad()
def _roughen(decoder: Decoder) -> None:
    """No weight stays at 0 or 1, where leaving it out would not show, and tokens differ widely."""
    for name, parameter in decoder.named_parameters():
        if parameter.ndim < 2 or name.endswith("A_log"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    for table in (decoder.model.embed_tokens, decoder.lm_head):
        table.weight.normal_(std=0.5)
