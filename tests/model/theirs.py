"""Tiny random models of transformers, and what is compared with them."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    PreTrainedModel,
)

from retort.model.decoder import Decoder
from retort.model.formats.granite import GROUPED_NORM, norms_groups

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500.0}
# Of the 4 wavelengths that 8 head channels have, some are kept, some stretched, some in between.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def family(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny model with attention in every layer; Qwen3's heads are wider than the model."""
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": DEFAULT_ROPE,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    own = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 16}}
    config = AutoConfig.for_model(name, **settings | own.get(name, {}) | changes)
    return roughened(AutoModelForCausalLM.from_config(config))


def granite(**changes: Any) -> PreTrainedModel:
    """A tiny GraniteMoeHybrid of the kind that a student is saved as."""
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "shared_intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope",
        "attention_multiplier": 8**-0.5,
        "rope_parameters": DEFAULT_ROPE,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 4,
        "initializer_range": 0.3,
    }
    config = GraniteMoeHybridConfig(**settings | changes)
    return roughened(GraniteMoeHybridForCausalLM(config))


@torch.no_grad()
def roughened(model: PreTrainedModel) -> PreTrainedModel:
    """No weight stays at 0 or 1, where leaving it out would not show; a bias of o_proj does."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.endswith("o_proj.bias"):
            parameter.add_(0.5 * torch.rand_like(parameter))
    return model.eval()


def tokens(length: int = 70) -> Tensor:
    """Long enough for positions to matter to every wavelength."""
    return torch.randint(61, (2, length))


def skip_where_groups_differ(theirs: PreTrainedModel) -> None:
    """Ends a test where this release of transformers norms the groups of a mixer together."""
    groups, release = getattr(theirs.config, "mamba_n_groups", 1), version("transformers")
    if groups > 1 and not norms_groups(release):
        pytest.skip(f"needs transformers {GROUPED_NORM}, which norms groups apart, not {release}")


@torch.no_grad()
def assert_same_logits(ours: Decoder, theirs: PreTrainedModel, atol: float) -> None:
    """On random tokens, in the dtype of both."""
    skip_where_groups_differ(theirs)
    ids_BT = tokens()
    wanted = theirs(ids_BT, use_cache=False).logits
    assert wanted.std() > 0.1  # else the tolerance would say nothing
    torch.testing.assert_close(ours(ids_BT), wanted, rtol=0, atol=atol)


def edit_config(folder: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    """Changes a folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    kept = {key: value for key, value in config.items() if key not in drop}
    path.write_text(json.dumps(kept | values))


def stored(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor in a folder."""
    found: dict[str, tuple[str, list[int], bytes]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                part, tensor = file.get_slice(name), file.get_tensor(name)
                data = tensor.flatten().view(torch.uint8).numpy().tobytes()
                assert name not in found
                found[name] = (part.get_dtype(), part.get_shape(), data)
    return found
