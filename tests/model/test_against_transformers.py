"""The same numbers as transformers, from its folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import retort
from retort.model.config import Llama3Rope
from retort.model.context import frequencies
from retort.model.decoder import Decoder

from .theirs import (
    DEFAULT_ROPE,
    FAMILIES,
    LLAMA3_ROPE,
    assert_same_logits,
    edit_config,
    family,
    granite,
    tokens,
)

MakeDecoder = Callable[..., Decoder]

# Keys that came with later releases, beside the spelling of RoPE.
LATER_KEYS = ("rope_parameters", "head_dim", "attention_bias", "mlp_bias", "layer_types")


# ---------------------------------------------------------------- attention in every layer


@pytest.mark.parametrize("rope", [DEFAULT_ROPE, LLAMA3_ROPE], ids=["default", "llama3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_folder(tmp_path: Path, rope: dict[str, Any], tied: bool, kv_heads: int) -> None:
    theirs = family(
        "llama", rope_parameters=rope, tie_word_embeddings=tied, num_key_value_heads=kv_heads
    )
    theirs.save_pretrained(tmp_path)
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_family_folder(tmp_path: Path, name: str, tied: bool) -> None:
    theirs = family(name, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    ours = retort.load(tmp_path)
    assert_same_logits(ours, theirs, atol=1e-5)
    assert ours.config.family == name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_shows(name: str) -> None:
    """A tensor read wrongly or not at all changes the logits far more than the tests allow."""
    theirs, ids_BT = family(name), tokens()
    names = [each for each, _ in theirs.named_parameters()]
    assert any("q_proj.bias" in each for each in names) == (name == "qwen2")
    assert any("k_norm" in each for each in names) == (name == "qwen3")
    with torch.no_grad():
        wanted = theirs(ids_BT).logits
        for each in names:
            weight = theirs.get_parameter(each)
            before = weight.clone()
            weight.copy_(weight.flip(0))
            assert (theirs(ids_BT).logits - wanted).abs().max() > 1e-2, each
            weight.copy_(before)


def test_smollm2_folder(tmp_path: Path) -> None:
    """A tied Llama with a larger RoPE base."""
    rope = {"rope_type": "default", "rope_theta": 100_000.0}
    theirs = family("llama", rope_parameters=rope, tie_word_embeddings=True, num_attention_heads=2)
    theirs.save_pretrained(tmp_path)
    edit_config(
        tmp_path, drop=LATER_KEYS, rope_theta=100_000, rope_scaling=None, rope_interleaved=False
    )
    ours = retort.load(tmp_path)
    assert ours.config.rope_theta == 100_000
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert_same_logits(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("head_dim", [4, 12])
def test_heads_of_any_width(tmp_path: Path, name: str, head_dim: int) -> None:
    """heads * head_dim need not be the hidden size: in Mistral Nemo and Qwen3 it is not."""
    theirs = family(name, head_dim=head_dim)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-5)


def test_qwen3_without_head_dim_has_heads_of_128(tmp_path: Path) -> None:
    theirs = family("qwen3", head_dim=128, num_hidden_layers=1)
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, drop=("head_dim",))
    ours = retort.load(tmp_path)
    assert ours.config.head_dim == 128
    assert_same_logits(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_sharded_folder(tmp_path: Path, name: str) -> None:
    theirs = family(name)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_folder(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Read as it is stored, or as float32: then the numbers are those of the rounded weights."""
    family(name).to(dtype).save_pretrained(tmp_path)
    assert dtypes(retort.load(tmp_path)) == {dtype}
    ours = retort.load(tmp_path, dtype=torch.float32)
    assert dtypes(ours) == {torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_older_config_with_rope_at_the_top_level(tmp_path: Path, kind: str) -> None:
    theirs = family("llama", rope_parameters=LLAMA3_ROPE)
    theirs.save_pretrained(tmp_path)
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k not in ("rope_type", "rope_theta")}
    edit_config(
        tmp_path,
        drop=LATER_KEYS,
        rope_theta=LLAMA3_ROPE["rope_theta"],
        rope_scaling=scaling | {kind: "llama3"},
    )
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_older_config_without_scaling(tmp_path: Path, name: str) -> None:
    theirs = family(name)
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, drop=("rope_parameters",), rope_theta=500.0, rope_scaling=None)
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-5)


def test_older_config_without_a_base(tmp_path: Path) -> None:
    """10000 is what it was before there was a key for it."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    theirs = family("llama", rope_parameters=rope)
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, drop=LATER_KEYS)
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-5)


# ---------------------------------------------------------------- sliding windows

UNFELT: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 512}),
    ("mistral", {"sliding_window": 4096}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0}),
    ("llama", {"sliding_window": 16}),
]


@pytest.mark.parametrize(("name", "window"), UNFELT)
def test_windows_that_are_not_felt(tmp_path: Path, name: str, window: dict[str, Any]) -> None:
    """Written into the file as published folders have it: transformers drops what it ignores."""
    theirs = family(name)
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, drop=("layer_types",), **window)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-5)


FELT: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 16}),
    ("mistral", {"sliding_window": 511}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
]


@pytest.mark.parametrize(("name", "window"), FELT)
def test_windows_that_are_felt_are_refused(
    tmp_path: Path, name: str, window: dict[str, Any]
) -> None:
    family(name).save_pretrained(tmp_path)
    edit_config(tmp_path, drop=("layer_types",), **window)
    size = window["sliding_window"]
    wanted = f"config.json: sliding_window {size} is not .* set max_position_embeddings to {size} "
    with pytest.raises(ValueError, match=wanted):
        retort.load(tmp_path)


@pytest.mark.parametrize("window", [{"sliding_window": 16}, {}], ids=["given", "default"])
@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_windows_are_not_felt_within_them(
    tmp_path: Path, name: str, window: dict[str, int]
) -> None:
    """What the refusal advises. Without the key, a window has 4096 tokens."""
    size = window.get("sliding_window", 4096)
    family(name, max_position_embeddings=2 * size).save_pretrained(tmp_path)
    edit_config(
        tmp_path,
        drop=("layer_types", "sliding_window"),
        use_sliding_window=True,
        max_window_layers=0,
        **window,
    )
    with pytest.raises(ValueError, match=f"set max_position_embeddings to {size} "):
        retort.load(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.sliding_window == size
    edit_config(tmp_path, max_position_embeddings=size)
    ours, ids_BT = retort.load(tmp_path), tokens(17)
    with torch.no_grad():
        differences = (theirs(ids_BT).logits - ours(ids_BT)).abs().amax((0, 2))
    assert differences[:16].max() < 1e-5
    assert size > 16 or differences[16] > 1e-3


# ---------------------------------------------------------------- GraniteMoeHybrid


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_granite_folder(tmp_path: Path, groups: int, tied: bool) -> None:
    theirs = granite(mamba_n_groups=groups, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-4)


@pytest.mark.parametrize("key", ["layer_types", "layers_block_type"])
@pytest.mark.parametrize(
    "words", [("mamba", "attention"), ("linear_attention", "full_attention")], ids=["old", "new"]
)
def test_words_for_layers(tmp_path: Path, key: str, words: tuple[str, str]) -> None:
    theirs = granite()
    theirs.save_pretrained(tmp_path)
    names = [words[0], words[1], words[0]]
    edit_config(tmp_path, drop=("layer_types", "layers_block_type"), **{key: names})
    ours = retort.load(tmp_path)
    assert ours.config.attention_layers == (1,)
    assert_same_logits(ours, theirs, atol=1e-4)


def test_granite_without_attention(tmp_path: Path) -> None:
    theirs = granite(layer_types=["mamba"] * 3, position_embedding_type=None)
    theirs.save_pretrained(tmp_path)
    ours = retort.load(tmp_path)
    assert ours.config.attention_layers == ()
    assert_same_logits(ours, theirs, atol=1e-4)


def test_granite_with_automatic_head_width(tmp_path: Path) -> None:
    theirs = granite()
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, mamba_d_head="auto")
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-4)


def test_granite_with_biases_of_attention(tmp_path: Path) -> None:
    theirs = granite(attention_bias=True)
    theirs.save_pretrained(tmp_path)
    ours = retort.load(tmp_path)
    assert ours.config.qkv_bias
    assert_same_logits(ours, theirs, atol=1e-4)


def test_bias_of_the_output_is_refused(tmp_path: Path) -> None:
    theirs = granite(attention_bias=True)
    theirs.save_pretrained(tmp_path)
    name = "model.layers.1.self_attn.o_proj.bias"
    edit_tensor(tmp_path, name, lambda bias: bias[3:4].fill_(0.01))
    with pytest.raises(ValueError, match=f"{tmp_path}: {name}: a bias of the attention's output"):
        retort.load(tmp_path)


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


def dtypes(decoder: Decoder) -> set[torch.dtype]:
    return {tensor.dtype for tensor in decoder.state_dict().values()}


def edit_tensor(folder: Path, name: str, change: Callable[[Tensor], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
