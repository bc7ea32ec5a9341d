"""Configurations: what is impossible is refused."""

from dataclasses import replace
from typing import Any

import pytest

from retort.model.config import (
    ATTENTION,
    LINEAR,
    DecoderConfig,
    Mamba1Config,
    Mamba2Config,
)

PLAIN = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    layer_types=(ATTENTION, ATTENTION),
    heads=4,
    kv_heads=2,
    head_dim=8,
)
MIXER = Mamba2Config(heads=4, head_dim=16, state_size=8, groups=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 9}, "head_dim 9 is odd, and RoPE turns pairs of channels"),
        ({"layer_types": (ATTENTION, "mamba")}, r"layer_types: unknown \['mamba'\]"),
        ({"layer_types": (ATTENTION, LINEAR)}, "no mixer settings"),
    ],
)
def test_impossible_decoders(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **changes)


def test_impossible_mixers() -> None:
    with pytest.raises(ValueError, match="4 heads do not divide into 3 groups"):
        replace(MIXER, groups=3)
    with pytest.raises(ValueError, match="4 heads are no multiple of 3"):
        Mamba1Config(heads=4, kv_heads=3, head_dim=16, dt_rank=2)
    with pytest.raises(ValueError, match="= 24 is no multiple of the state size 16"):
        Mamba1Config(heads=4, kv_heads=2, head_dim=12, dt_rank=2)


def test_layers() -> None:
    config = replace(PLAIN, layer_types=(LINEAR, ATTENTION, LINEAR), mixer=MIXER)
    assert config.layers == 3
    assert config.attention_layers == (1,)
    assert config.linear_layers == (0, 2)
