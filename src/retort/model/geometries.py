"""Sizes of published models and of the students trained here, by the name that commands take.

Sizes only: what a checkpoint adds to them (special tokens, quirks of its code) is read from its
folder. A student is its teacher with other mixers.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType

from retort.model.config import (
    ATTENTION,
    LINEAR,
    DecoderConfig,
    DiscreteMamba2Config,
    Llama3Rope,
    Mamba1Config,
    Mamba2Config,
    MixerConfig,
)

# ------------------------------------------------------------------ attention alone (config.json)

_LLAMA_1B = DecoderConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    layer_types=(ATTENTION,) * 16,
    heads=32,
    kv_heads=8,
    head_dim=64,
    rope_theta=500_000.0,
    rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192),
    max_position=131_072,
    tie_embeddings=True,
)
_LLAMA_3B = replace(
    _LLAMA_1B, hidden_size=3072, layer_types=(ATTENTION,) * 28, heads=24, head_dim=128
)
_LLAMA_8B = replace(
    _LLAMA_1B,
    hidden_size=4096,
    intermediate_size=14_336,
    layer_types=(ATTENTION,) * 32,
    head_dim=128,
    rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192),
    tie_embeddings=False,
)
_QWEN25_HALF_B = DecoderConfig(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    layer_types=(ATTENTION,) * 24,
    heads=14,
    kv_heads=2,
    head_dim=64,
    norm_eps=1e-6,
    rope_theta=1_000_000.0,
    max_position=32_768,
    tie_embeddings=True,
    qkv_bias=True,
    family="qwen2",
)
_QWEN3_HALF_B = DecoderConfig(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    layer_types=(ATTENTION,) * 28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    norm_eps=1e-6,
    rope_theta=1_000_000.0,
    max_position=40_960,
    tie_embeddings=True,
    qk_norm=True,
    family="qwen3",
)
_SMOLLM2_135M = DecoderConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    layer_types=(ATTENTION,) * 30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    rope_theta=100_000.0,
    max_position=8192,
    tie_embeddings=True,
)
_SMOLLM2_2B = replace(
    _SMOLLM2_135M,
    hidden_size=2048,
    intermediate_size=8192,
    layer_types=(ATTENTION,) * 24,
    heads=32,
    kv_heads=32,
    rope_theta=130_000.0,
)

# No published model, but one that a CPU decodes in milliseconds: what speed is measured with there.
_SMALL = DecoderConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=768,
    layer_types=(ATTENTION,) * 6,
    heads=4,
    kv_heads=2,
    head_dim=64,
    max_position=4096,
    tie_embeddings=True,
)

# ------------------------------------------------------------------ students

_KEPT_SMALL = (3,)
_KEPT_1B = (3, 7, 11, 15)
_KEPT_3B = (3, 8, 13, 18, 23, 27)


def _student(
    teacher: DecoderConfig, mixer: MixerConfig, kept: Collection[int] = ()
) -> DecoderConfig:
    kinds = tuple(ATTENTION if i in kept else LINEAR for i in range(teacher.layers))
    return replace(teacher, layer_types=kinds, mixer=mixer)


def _llamba(teacher: DecoderConfig, heads: int = 32) -> DecoderConfig:
    """Llamba (arXiv 2502.14458): 32 heads as wide as the model together, state 64, tied head."""
    mixer = DiscreteMamba2Config(
        heads=heads,
        head_dim=teacher.hidden_size // heads,
        state_size=64,
        groups=heads,
        chunk_size=128,
    )
    return replace(_student(teacher, mixer), tie_embeddings=True)


def _hybrid(teacher: DecoderConfig, kept: Collection[int]) -> DecoderConfig:
    """MambaInLlama with Mamba-1 (arXiv 2408.15237): state 16, rank of dt a 16th of the width."""
    mixer = Mamba1Config(
        heads=teacher.heads,
        kv_heads=teacher.kv_heads,
        head_dim=teacher.head_dim,
        dt_rank=teacher.hidden_size // 16,
    )
    return _student(teacher, mixer, kept)


def _native(teacher: DecoderConfig, kept: Collection[int] = ()) -> DecoderConfig:
    """Stock Mamba-2 with the shape of the attention it replaces: a group and a state per head."""
    mixer = Mamba2Config(
        heads=teacher.heads,
        head_dim=teacher.head_dim,
        state_size=teacher.head_dim,
        groups=teacher.heads,
    )
    return _student(teacher, mixer, kept)


GEOMETRIES: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "llama-3.2-1b": _LLAMA_1B,
        "llama-3.2-3b": _LLAMA_3B,
        "llama-3.1-8b": _LLAMA_8B,
        "qwen2.5-0.5b": _QWEN25_HALF_B,
        "qwen3-0.6b": _QWEN3_HALF_B,
        "smollm2-135m": _SMOLLM2_135M,
        "smollm2-1.7b": _SMOLLM2_2B,
        "small": _SMALL,
        "llamba-1b": _llamba(_LLAMA_1B),
        "llamba-4b": _llamba(_LLAMA_3B),  # the papers' name; published as Llamba-3B
        "llamba-4b-24-heads": _llamba(_LLAMA_3B, heads=24),  # a head for each of the teacher's
        "llamba-8b": _llamba(_LLAMA_8B),
        "hybrid-1b": _hybrid(_LLAMA_1B, _KEPT_1B),
        "hybrid-3b": _hybrid(_LLAMA_3B, _KEPT_3B),
        "native-1b": _native(_LLAMA_1B),
        "native-3b": _native(_LLAMA_3B),
        "native-1b-hybrid": _native(_LLAMA_1B, _KEPT_1B),
        "native-3b-hybrid": _native(_LLAMA_3B, _KEPT_3B),
        "small-pure": _native(_SMALL),
        "small-hybrid": _native(_SMALL, _KEPT_SMALL),
    }
)
"""`hybrid` and `native-*-hybrid` keep the same attention layers; `native-*` keeps none. `small` and
its students are for measuring speed on a CPU.
"""


def geometry(name: str) -> DecoderConfig:
    """The configuration that a name of `GEOMETRIES` stands for. Raises ValueError for others."""
    if name in GEOMETRIES:
        return GEOMETRIES[name]
    close = difflib.get_close_matches(name.lower(), GEOMETRIES, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(GEOMETRIES)}"
    raise ValueError(f"no geometry is called {name!r}; {hint}")
