"""A model's folder and a recipe that samples it, for what is tested in many ways."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import retort
from retort.data.chat import train_tokenizer
from retort.model.decoder import Decoder

TEXTS = [f"Ada has {i} apples and Ben has {2 * i} more. The final answer is {3 * i}." for i in "12"]


@pytest.fixture
def make_model(tmp_path: Path, make_decoder: Callable[..., Decoder]) -> Callable[..., Path]:
    """A checkpoint folder with random weights and a tokenizer; one seed, one model."""

    def make(name: str = "tiny", layers: str = "am", seed: int = 0, **changes: Any) -> Path:
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(TEXTS, 300)
        # Every eighth token ends a completion, so that some of them end early.
        settings = {"vocab_size": len(tokenizer), "eos_token_ids": tuple(range(0, 260, 8))}
        decoder = make_decoder(layers, **settings | changes)
        retort.save(decoder, tmp_path / name, tokenizer)
        return tmp_path / name

    return make


@pytest.fixture
def settings(tmp_path: Path, make_model: Callable[..., Path]) -> list[str]:
    """A recipe: 4 problems, 3 samples each, at most 10 tokens."""
    return [
        f"out={tmp_path / 'run'}",
        f"model={make_model()}",
        "problems.kind=arithmetic",
        "problems.count=4",
        "problems.difficulty=[1, 2]",
        "prompt='Q: {question}'",
        "sampling.n=3",
        "sampling.max_tokens=10",
        "slots=5",
    ]
