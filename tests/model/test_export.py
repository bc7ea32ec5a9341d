"""Folders that are written: transformers reads them and computes, and says, the same."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import retort
from retort.model import formats, weights
from retort.model.config import DecoderConfig, Llama3Rope, Mamba2Config
from retort.model.decoder import Decoder
from retort.model.formats.families import ARCHITECTURES

from .theirs import (
    FAMILIES,
    LLAMA3_ROPE,
    assert_same_logits,
    edit_config,
    family,
    granite,
    skip_where_groups_differ,
    stored,
    tokens,
)

MakeDecoder = Callable[..., Decoder]

GRANITE = "GraniteMoeHybridForCausalLM"
ROPE: dict[str, Any] = {"rope_theta": 500.0, "rope_scaling": Llama3Rope(8.0, 1.0, 4.0, 64)}
FAMILY_CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 12},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 16},
}


@pytest.fixture
def make_student(make_decoder: MakeDecoder) -> MakeDecoder:
    """Decoders whose mixers are as wide as the model, as those from a transplant are."""

    def make(layers: str, **changes: Any) -> Decoder:
        mixer = Mamba2Config(heads=4, head_dim=8, state_size=8, groups=4, chunk_size=4)
        return make_decoder(layers, **{"mixer": mixer, "max_position": 512} | changes)

    return make


@pytest.fixture
def attention_alone(make_student: MakeDecoder) -> MakeDecoder:
    """A decoder of a family."""

    def make(name: str, **changes: Any) -> Decoder:
        return make_student("aa", mixer=None, family=name, **FAMILY_CHANGES[name] | changes)

    return make


def opened(folder: Path) -> PreTrainedModel:
    """What transformers makes of a folder."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def written(decoder: Decoder, folder: Path) -> PreTrainedModel:
    """What transformers makes of the decoder's folder."""
    retort.save(decoder, folder)
    return opened(folder)


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / weights.CONFIG).read_text())
    return values


def assert_same_tensors(found: Decoder, wanted: Decoder) -> None:
    """Names, dtypes and every bit."""
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


# ---------------------------------------------------------------- in and out again


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_families_come_out_as_they_went_in(
    tmp_path: Path, name: str, tied: bool, dtype: torch.dtype
) -> None:
    model = family(name, tie_word_embeddings=tied, eos_token_id=[3, 5]).to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    retort.save(retort.load(tmp_path / "theirs"), tmp_path / "ours")
    assert stored(tmp_path / "ours") == stored(tmp_path / "theirs")
    assert_same_model(tmp_path / "ours", tmp_path / "theirs")
    again = opened(tmp_path / "ours")
    assert again.dtype == dtype
    assert again.generation_config.eos_token_id == [3, 5]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rope", [{}, {"rope_parameters": LLAMA3_ROPE}], ids=["plain", "llama3"])
def test_configs_come_out_as_they_went_in(tmp_path: Path, name: str, rope: dict[str, Any]) -> None:
    """All that transformers reads in them."""
    theirs = family(name, bos_token_id=1, eos_token_id=[3, 5], pad_token_id=None, **rope)
    theirs.save_pretrained(tmp_path / "theirs")
    retort.save(retort.load(tmp_path / "theirs"), tmp_path / "ours")
    before, after = (
        AutoConfig.from_pretrained(tmp_path / folder).to_dict() for folder in ("theirs", "ours")
    )
    training = {"initializer_range", "_name_or_path"}
    changed = {key for key in before if before[key] != after.get(key)}
    assert changed <= training
    assert config_of(tmp_path / "ours")["architectures"] == [ARCHITECTURES[name]]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_granite_comes_out_as_it_went_in(
    tmp_path: Path, tied: bool, bias: bool, dtype: torch.dtype
) -> None:
    model = granite(tie_word_embeddings=tied, attention_bias=bias).to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    ours = retort.load(tmp_path / "theirs")
    retort.save(ours, tmp_path / "ours")
    assert stored(tmp_path / "ours") == stored(tmp_path / "theirs")
    assert_same_model(tmp_path / "ours", tmp_path / "theirs")
    again = retort.load(tmp_path / "ours")
    assert again.config == ours.config
    assert_same_tensors(again, ours)


@torch.no_grad()
def assert_same_model(found: Path, wanted: Path) -> None:
    """To transformers: its class, and all bits of its logits."""
    ours, theirs, ids_BT = opened(found), opened(wanted), tokens()
    assert type(ours) is type(theirs)
    assert torch.equal(ours(ids_BT).logits, theirs(ids_BT).logits)


# ---------------------------------------------------------------- attention alone


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_alone_is_written_as_its_family(
    tmp_path: Path, attention_alone: MakeDecoder, name: str, tied: bool, kv_heads: int
) -> None:
    ours = attention_alone(name, tie_embeddings=tied, kv_heads=kv_heads, **ROPE)
    theirs = written(ours, tmp_path / "out")
    assert type(theirs).__name__ == ARCHITECTURES[name]  # type: ignore[index]
    assert_same_logits(ours, theirs, atol=1e-5)
    again = retort.load(tmp_path / "out")
    assert again.config == ours.config
    assert_same_tensors(again, ours)


# ---------------------------------------------------------------- students


@pytest.mark.parametrize("layers", ["m", "am", "mma"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("groups", [1, 4])
def test_students_are_written_as_granite(
    tmp_path: Path, make_student: MakeDecoder, layers: str, tied: bool, groups: int
) -> None:
    mixer = Mamba2Config(heads=4, head_dim=8, state_size=16, groups=groups, chunk_size=4)
    ours = make_student(layers, mixer=mixer, tie_embeddings=tied, **ROPE)
    theirs = written(ours, tmp_path / "out")
    assert type(theirs).__name__ == GRANITE
    assert_same_logits(ours, theirs, atol=1e-4)
    again = retort.load(tmp_path / "out")
    assert again.config == ours.config
    assert_same_tensors(again, ours)


@pytest.mark.parametrize("layers", ["m", "mam"])
def test_students_with_wider_mixers(tmp_path: Path, make_student: MakeDecoder, layers: str) -> None:
    """Twice the hidden size, which is what llama.cpp's converter asks for."""
    mixer = Mamba2Config(heads=8, head_dim=8, state_size=4, groups=2, conv_width=3, chunk_size=4)
    ours = make_student(layers, mixer=mixer, **ROPE)
    assert_same_logits(ours, written(ours, tmp_path / "out"), atol=1e-4)
    assert config_of(tmp_path / "out")["mamba_expand"] == 2


@pytest.mark.parametrize("layers", ["m", "mam"])
def test_students_of_qwen2(tmp_path: Path, make_student: MakeDecoder, layers: str) -> None:
    """The format has biases on all four projections, so that of the output is zero."""
    ours = make_student(layers, qkv_bias=True, family="qwen2", **ROPE)
    theirs = written(ours, tmp_path / "out")
    assert_same_logits(ours, theirs, atol=1e-4)
    attention = config_of(tmp_path / "out")["layer_types"].index("attention")
    assert not theirs.get_parameter(f"model.layers.{attention}.self_attn.o_proj.bias").any()
    again = retort.load(tmp_path / "out")
    assert again.config == ours.config
    assert_same_tensors(again, ours)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "family": "qwen2"}], ids=["", "qwen2"])
def test_pure_students_have_one_null_block_at_the_end(
    tmp_path: Path, make_student: MakeDecoder, changes: dict[str, Any]
) -> None:
    ours = make_student("mm", **changes)
    theirs = written(ours, tmp_path / "out")
    values = config_of(tmp_path / "out")
    assert values["layer_types"] == ["mamba", "mamba", "attention"]
    assert values["num_hidden_layers"] == 3
    assert values["null_layers"] == [2]
    block = {name: t for name, t in theirs.state_dict().items() if ".layers.2." in name}
    null = {name for name, tensor in block.items() if not tensor.any()}
    assert null == {name for name in block if "layernorm" not in name}
    assert all((block[name] == 1).all() for name in block.keys() - null)
    again = retort.load(tmp_path / "out")
    assert again.config == ours.config
    assert again.config.attention_layers == ()
    assert_same_tensors(again, ours)


def test_the_null_block_changes_nothing(tmp_path: Path, make_student: MakeDecoder) -> None:
    """Not a bit, with a cache and without one."""
    theirs, ids_BT = written(make_student("mm"), tmp_path / "out"), tokens()
    with torch.no_grad():
        wanted = theirs(ids_BT, use_cache=False).logits
        assert torch.equal(theirs(ids_BT, use_cache=True).logits, wanted)
        # Another attention block would be felt: its zeros are what makes it none.
        theirs.get_parameter("model.layers.2.self_attn.o_proj.weight").fill_(0.1)
        theirs.get_parameter("model.layers.2.self_attn.v_proj.weight").fill_(0.1)
        assert (theirs(ids_BT).logits - wanted).abs().max() > 1e-2


def test_pure_students_of_qwen3_are_written(tmp_path: Path, make_student: MakeDecoder) -> None:
    """Neither norms of q and k nor heads that are wider than the model are left in them."""
    mixer = Mamba2Config(heads=4, head_dim=16, state_size=16, groups=4, chunk_size=4)
    ours = make_student("mm", qk_norm=True, family="qwen3", head_dim=16, mixer=mixer)
    theirs = written(ours, tmp_path / "out")
    assert type(theirs).__name__ == GRANITE
    assert_same_logits(ours, theirs, atol=1e-4)
    again = retort.load(tmp_path / "out")
    assert_same_tensors(again, ours)
    assert without_attention(again.config) == without_attention(ours.config)


def without_attention(config: DecoderConfig) -> DecoderConfig:
    """Less what only says how the attention is that there is none of."""
    return replace(config, heads=1, kv_heads=1, head_dim=2, qk_norm=False, family="llama")


def test_a_layer_that_is_not_null_is_refused(tmp_path: Path, make_student: MakeDecoder) -> None:
    """Leaving it out would make another model of it."""
    theirs = written(make_student("mm", qkv_bias=True, family="qwen2"), tmp_path / "out")
    writes = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "shared_mlp.output_linear.weight")
    for name in writes:
        parameter = theirs.get_parameter(f"model.layers.2.{name}")
        torch.nn.init.constant_(parameter, 0.01)
        theirs.save_pretrained(tmp_path / "changed")
        with pytest.raises(ValueError, match=f"changed: model.layers.2.{name}: .* is not null"):
            retort.load(tmp_path / "changed")
        torch.nn.init.zeros_(parameter)
    theirs.save_pretrained(tmp_path / "changed")
    retort.load(tmp_path / "changed")


@pytest.mark.parametrize("null", [[0], [1, 2], [1], 2])
def test_only_a_last_layer_of_attention_can_be_null(
    tmp_path: Path, make_student: MakeDecoder, null: object
) -> None:
    retort.save(make_student("mm"), tmp_path)
    edit_config(tmp_path, null_layers=null)
    with pytest.raises(ValueError, match="null_layers"):
        retort.load(tmp_path)
    edit_config(tmp_path, null_layers=[2], layer_types=["mamba"] * 3)
    with pytest.raises(ValueError, match=r"null_layers \[2\]: only a last layer of attention"):
        retort.load(tmp_path)


@pytest.mark.parametrize("kept", ["new", "old"])
@pytest.mark.parametrize("layers", ["aa", "ma"])
def test_either_spelling_of_rope_is_enough(
    tmp_path: Path, make_student: MakeDecoder, layers: str, kept: str
) -> None:
    """Programs that know only one of them compute the same."""
    changes: dict[str, Any] = {"mixer": None} if layers == "aa" else {}
    ours = make_student(layers, **ROPE, **changes)
    retort.save(ours, tmp_path)
    old = ("rope_theta", "rope_scaling")
    edit_config(tmp_path, drop=old if kept == "new" else ("rope_parameters",))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(ours, theirs, atol=1e-4)
    assert_same_logits(retort.load(tmp_path), theirs, atol=1e-4)


@pytest.mark.parametrize("layers", ["mm", "am"])
def test_half_precision_is_written_as_such(
    tmp_path: Path, make_student: MakeDecoder, layers: str
) -> None:
    ours = make_student(layers).to(torch.bfloat16)
    theirs = written(ours, tmp_path / "out")
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    assert theirs.dtype == torch.bfloat16
    assert_same_tensors(retort.load(tmp_path / "out"), ours)
    # In float32, where numbers can be compared, the rounded weights are the same.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_same_logits(retort.load(tmp_path / "out", torch.float32), theirs, atol=1e-4)


@pytest.mark.parametrize("layers", ["aa", "mm", "am"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_shards_are_read(
    tmp_path: Path,
    make_student: MakeDecoder,
    monkeypatch: pytest.MonkeyPatch,
    layers: str,
    tied: bool,
) -> None:
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 20_000)
    ours = make_student(layers, tie_embeddings=tied, **({"mixer": None} if layers == "aa" else {}))
    theirs = written(ours, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert_same_logits(ours, theirs, atol=1e-4)


# ---------------------------------------------------------------- what no other program reads

OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "discrete_mamba2": ("d", {}),
    "discrete_mamba2 hybrid": ("ad", {}),
    "mamba1": ("s", {}),
    "mamba1 hybrid": ("sa", {"tie_embeddings": True}),
    "norms of q and k": ("am", {"qk_norm": True, "family": "qwen3", "eos_token_ids": (3, 5)}),
    "wide heads": ("am", {"head_dim": 16, **ROPE}),
    "odd width": ("m", {"mixer": Mamba2Config(heads=3, head_dim=8, state_size=4, groups=1)}),
    "mixed family": ("aa", {"qk_norm": True, "qkv_bias": True}),
}


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_own_format(
    tmp_path: Path, make_decoder: MakeDecoder, kind: str, dtype: torch.dtype
) -> None:
    layers, changes = OWN[kind]
    ours = make_decoder(layers, **changes).to(dtype)
    assert formats.portable(ours.config) is None
    retort.save(ours, tmp_path / "out")
    assert config_of(tmp_path / "out")["architectures"] == ["RetortForCausalLM"]
    again = retort.load(tmp_path / "out")
    assert again.config == ours.config
    assert_same_tensors(again, ours)
    ids_BT = tokens(9)
    assert torch.equal(again(ids_BT), ours(ids_BT))


# ---------------------------------------------------------------- generation

LENGTHS = (7, 3, 12)
NEW = 40


@pytest.mark.parametrize("layers", ["mam", "mm", "mam qwen2", "mm qwen3", *FAMILIES])
def test_greedy_generation_is_ours(
    tmp_path: Path, make_student: MakeDecoder, attention_alone: MakeDecoder, layers: str
) -> None:
    """One prompt alone, and prompts of different lengths padded on the left."""
    ours = decoder_of(layers, make_student, attention_alone)
    theirs: Any = written(ours, tmp_path / "out")
    skip_where_groups_differ(theirs)
    rows = [clear_greedy(ours, length) for length in LENGTHS]
    prompt_BT = rows[0][None, : LENGTHS[0]]
    assert torch.equal(theirs.generate(prompt_BT, max_new_tokens=NEW, do_sample=False)[0], rows[0])
    prompts = [row[:length] for row, length in zip(rows, LENGTHS, strict=True)]
    found_BT = theirs.generate(**left_padded(prompts), max_new_tokens=NEW, do_sample=False)
    for found_T, row in zip(found_BT, rows, strict=True):
        assert torch.equal(found_T[-NEW:], row[-NEW:])


def decoder_of(layers: str, make_student: MakeDecoder, attention_alone: MakeDecoder) -> Decoder:
    wide = Mamba2Config(heads=4, head_dim=16, state_size=16, groups=4, chunk_size=4)
    settings: dict[str, Any] = {"pad_token_id": 0, **ROPE}
    match layers.split():
        case [kinds, "qwen2"]:
            return make_student(kinds, qkv_bias=True, family="qwen2", **settings)
        case [kinds, "qwen3"]:
            return make_student(
                kinds, qk_norm=True, family="qwen3", head_dim=16, mixer=wide, **settings
            )
        case [name] if name in FAMILIES:
            return attention_alone(name, **settings)
    return make_student(layers, **settings)


def clear_greedy(decoder: Decoder, length: int, candidates: int = 24) -> Tensor:
    """A prompt and its greedy continuation, varied and with no token that was a close choice: the
    clearest of some random ones, so that rounding cannot change it.
    """
    ids_BT = torch.randint(1, 61, (candidates, length))
    state = decoder.init_state(candidates, length + NEW)
    logits_BV = decoder(ids_BT, state)[:, -1]
    margins = []
    for _ in range(NEW):
        first_B2, token_B2 = logits_BV.topk(2)
        margins.append(first_B2[:, 0] - first_B2[:, 1])
        ids_BT = torch.cat([ids_BT, token_B2[:, :1]], dim=1)
        logits_BV = decoder(token_B2[:, :1], state)[:, -1]
    margin_B = torch.stack(margins).amin(0)
    varied_B = torch.tensor([len(ids_T[length:].unique()) > 10 for ids_T in ids_BT])
    best = int((margin_B * varied_B).argmax())
    assert varied_B[best]
    assert margin_B[best] > 1e-3
    return ids_BT[best]


def left_padded(prompts: Sequence[Tensor]) -> dict[str, Tensor]:
    """With token 0, which is also a token like any other: only the mask tells them apart."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for ids_T, mask_T, prompt in zip(ids_BT, mask_BT, prompts, strict=True):
        ids_T[-len(prompt) :] = prompt
        mask_T[-len(prompt) :] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}
