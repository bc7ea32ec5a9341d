"""The same numbers as transformers, from its folders and from ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import retort
from retort.model.config import Llama3Rope, Mamba2Config
from retort.model.context import frequencies
from retort.model.decoder import Decoder

MakeDecoder = Callable[..., Decoder]

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


def llama(**changes: Any) -> LlamaForCausalLM:
    """A tiny Llama, all weights random."""
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
    }
    model = LlamaForCausalLM(LlamaConfig(**settings | changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def granite(**changes: Any) -> GraniteMoeHybridForCausalLM:
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
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**settings | changes)).eval()


def tokens() -> Tensor:
    # Long enough for positions to matter to every wavelength.
    return torch.randint(61, (2, 70))


def assert_same_logits(ours: Decoder, theirs: PreTrainedModel, atol: float) -> None:
    ids_BT = tokens()
    with torch.no_grad():
        wanted = theirs(ids_BT, use_cache=False).logits
    assert wanted.std() > 0.1  # else the tolerance would say nothing
    torch.testing.assert_close(ours(ids_BT), wanted, rtol=0, atol=atol)


def edit_config(folder: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    kept = {key: value for key, value in config.items() if key not in drop}
    path.write_text(json.dumps(kept | values))


# ---------------------------------------------------------------- their folders, read


@pytest.mark.parametrize("rope", [DEFAULT_ROPE, LLAMA3_ROPE], ids=["default", "llama3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_folder(tmp_path: Path, rope: dict[str, Any], tied: bool, kv_heads: int) -> None:
    theirs = llama(rope_parameters=rope, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-5)


def test_llama_folder_with_wide_heads(tmp_path: Path) -> None:
    """heads * head_dim need not be the hidden size."""
    theirs = llama(head_dim=12)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-5)


def test_sharded_folder(tmp_path: Path) -> None:
    theirs = llama()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-5)


def test_half_precision_folder(tmp_path: Path) -> None:
    """Read as it is stored, or as float32: then the numbers are those of the rounded weights."""
    rounded = llama()
    rounded.bfloat16()
    rounded.save_pretrained(tmp_path)
    assert retort.load(tmp_path).lm_head.weight.dtype == torch.bfloat16
    ours = retort.load(tmp_path, dtype=torch.float32)
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_older_config_with_rope_at_the_top_level(tmp_path: Path, kind: str) -> None:
    theirs = llama(rope_parameters=LLAMA3_ROPE)
    theirs.save_pretrained(tmp_path)
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k not in ("rope_type", "rope_theta")}
    edit_config(
        tmp_path,
        drop=("rope_parameters", "head_dim", "attention_bias", "mlp_bias"),
        rope_theta=LLAMA3_ROPE["rope_theta"],
        rope_scaling=scaling | {kind: "llama3"},
    )
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-5)


def test_older_config_without_scaling(tmp_path: Path) -> None:
    theirs = llama()
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, drop=("rope_parameters",), rope_theta=500.0, rope_scaling=None)
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_granite_folder(tmp_path: Path, groups: int, tied: bool) -> None:
    theirs = granite(mamba_n_groups=groups, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-4)


def test_generate_equals_ours(tmp_path: Path) -> None:
    """Greedy generation by transformers, with its own cache, and ours step by step."""
    theirs: Any = llama(eos_token_id=None, pad_token_id=0)
    theirs.save_pretrained(tmp_path)
    ours, prompt_BT = retort.load(tmp_path), tokens()[:, :5]
    wanted = theirs.generate(prompt_BT, max_new_tokens=8, do_sample=False)
    state = ours.init_state(2, 13)
    logits_BV, found = ours(prompt_BT, state)[:, -1], [prompt_BT]
    for _ in range(8):
        found.append(logits_BV.argmax(-1, keepdim=True))
        logits_BV = ours(found[-1], state)[:, -1]
    assert torch.equal(torch.cat(found, dim=1), wanted)


# ---------------------------------------------------------------- our folders, read by them


@pytest.mark.parametrize("rope", [None, Llama3Rope(8.0, 1.0, 4.0, 64)], ids=["default", "llama3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_only_is_saved_as_llama(
    tmp_path: Path, make_decoder: MakeDecoder, rope: Llama3Rope | None, tied: bool, kv_heads: int
) -> None:
    ours = make_decoder(
        "aa", rope_scaling=rope, rope_theta=500.0, tie_embeddings=tied, kv_heads=kv_heads
    )
    retort.save(ours, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(theirs, LlamaForCausalLM)
    assert_same_logits(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("layers", ["m", "am", "mma"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("groups", [1, 4])
def test_students_are_saved_as_granite(
    tmp_path: Path, make_decoder: MakeDecoder, layers: str, tied: bool, groups: int
) -> None:
    mixer = Mamba2Config(heads=4, head_dim=8, state_size=16, groups=groups, chunk_size=4)
    ours = make_decoder(
        layers,
        mixer=mixer,
        tie_embeddings=tied,
        rope_theta=500.0,
        rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 64),
    )
    retort.save(ours, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(theirs, GraniteMoeHybridForCausalLM)
    assert_same_logits(ours, theirs, atol=1e-4)
    again = retort.load(tmp_path / "out")
    assert again.config == ours.config
    ids_BT = tokens()
    assert torch.equal(again(ids_BT), ours(ids_BT))


def test_half_precision_is_saved_as_such(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    ours = make_decoder("am").to(torch.bfloat16)
    retort.save(ours, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert retort.load(tmp_path / "out").lm_head.weight.dtype == torch.bfloat16


# ---------------------------------------------------------------- parts


def test_llama3_frequencies(make_decoder: MakeDecoder) -> None:
    """With the constants of Llama 3.2, which reach all three ranges of wavelengths."""
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, **scaling}
    theirs = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        rope_parameters=rope | {"original_max_position_embeddings": 8192},
    )
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    ours = make_decoder(
        "a", head_dim=64, rope_theta=500_000.0, rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192)
    )
    torch.testing.assert_close(frequencies(ours.config), wanted, rtol=1e-6, atol=0)
