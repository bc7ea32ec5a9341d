"""Checkpoint folders: what is written is whole, and what is read has the dtype asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import retort
from retort.model import weights
from retort.model.decoder import Decoder
from retort.model.state import MambaState

from .theirs import edit_config, stored

MakeDecoder = Callable[..., Decoder]


@pytest.fixture
def folder(tmp_path: Path, make_decoder: MakeDecoder) -> Path:
    """A readable checkpoint."""
    retort.save(make_decoder("a"), tmp_path / "model")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes a checkpoint's tensors."""
    tensors = load_file(folder / weights.SINGLE)
    change(tensors)
    save_file(tensors, folder / weights.SINGLE)


# ---------------------------------------------------------------- what is overlooked on purpose


def test_constants_of_old_exports(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(4)}))
    retort.load(folder)


def test_head_stored_beside_a_tied_embedding(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    retort.save(make_decoder("a", tie_embeddings=True), tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": torch.ones(2)}))
    decoder = retort.load(tmp_path / "model")
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight


@pytest.mark.parametrize(("eos", "wanted"), [(5, (5,)), ([5, 7], (5, 7)), (None, (3,))])
def test_stop_tokens_of_generation(folder: Path, eos: Any, wanted: tuple[int, ...]) -> None:
    """Chat models list more of them there than in config.json."""
    edit_config(folder, eos_token_id=3)
    (folder / weights.GENERATION).write_text(json.dumps({"eos_token_id": eos}))
    assert weights.read_config(folder).eos_token_ids == wanted


def test_loaded_models_are_for_use_not_for_training(folder: Path) -> None:
    decoder = retort.load(folder)
    assert not decoder.training
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("layers", ["aa", "ma", "mm", "ad", "s"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [8000, 10**9])
def test_there_and_back(
    tmp_path: Path,
    make_decoder: MakeDecoder,
    monkeypatch: pytest.MonkeyPatch,
    layers: str,
    tied: bool,
    shard_bytes: int,
) -> None:
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", shard_bytes)
    decoder = make_decoder(layers, tie_embeddings=tied, eos_token_ids=(3, 9), pad_token_id=0)
    retort.save(decoder, tmp_path / "model")
    again = retort.load(tmp_path / "model")
    assert again.config == decoder.config
    found, wanted = again.state_dict(), decoder.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_new_folders_are_made(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    retort.save(make_decoder("a"), tmp_path / "some" / "new" / "model")
    (tmp_path / "empty").mkdir()
    retort.save(make_decoder("a"), tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "some"]
    retort.load(tmp_path / "empty")


def test_an_old_checkpoint_is_replaced_whole(
    tmp_path: Path, make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards and tokenizer of the old one would belong to another model."""
    folder = tmp_path / "model"
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 8000)
    retort.save(make_decoder("a"), folder)
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 10**9)
    decoder = make_decoder("m")
    retort.save(decoder, folder)
    assert sorted(contents(folder)) == [weights.CONFIG, weights.GENERATION, weights.SINGLE]
    assert retort.load(folder).config == decoder.config
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("names", [["notes.txt"], ["data/a.csv"], ["config.json", "main.py"]])
def test_folders_with_something_else_are_refused(
    tmp_path: Path, make_decoder: MakeDecoder, names: list[str]
) -> None:
    """A config.json alone makes no checkpoint: many programs have one."""
    for name in names:
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds files but no checkpoint"):
        retort.save(make_decoder("a"), tmp_path / "home")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_file_in_the_way_is_refused(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ValueError, match="model: is a file"):
        retort.save(make_decoder("a"), tmp_path / "model")
    assert contents(tmp_path) == {"model": b"mine"}


def test_a_failing_write_leaves_the_old_checkpoint(
    folder: Path, make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full half-way: the folder is as before, and the next save cleans up."""
    before = contents(folder)

    def fail(*arguments: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_save_tensors", fail)
        with pytest.raises(OSError, match="no space"):
            retort.save(make_decoder("a"), folder)
    assert contents(folder) == before
    retort.save(make_decoder("a"), folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


# ---------------------------------------------------------------- dtypes

RATES = {
    "am": {"model.layers.1.mamba.A_log", "model.layers.1.mamba.dt_bias", "model.layers.1.mamba.D"},
    "ad": {"model.layers.1.mamba.D"},
    "as": {"model.layers.1.mamba.A_log", "model.layers.1.mamba.D"},
}
HALF = [torch.bfloat16, torch.float16]


def dtypes(decoder: Decoder) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in decoder.state_dict().items()}


@pytest.mark.parametrize("layers", RATES)
@pytest.mark.parametrize("asked", HALF, ids=str)
def test_rates_are_never_rounded(
    tmp_path: Path, make_decoder: MakeDecoder, layers: str, asked: torch.dtype
) -> None:
    whole = make_decoder(layers)
    retort.save(whole, tmp_path)
    ours = retort.load(tmp_path, asked)
    for name, tensor in ours.state_dict().items():
        kept = name in RATES[layers]
        assert tensor.dtype == (torch.float32 if kept else asked), name
        assert torch.equal(tensor, whole.state_dict()[name].to(tensor.dtype)), name


@pytest.mark.parametrize(
    ("written", "asked", "kept"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        # Neither holds all numbers of the other.
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_rates_have_the_larger_dtype(
    tmp_path: Path,
    make_decoder: MakeDecoder,
    written: torch.dtype,
    asked: torch.dtype,
    kept: torch.dtype,
) -> None:
    """Of what is stored and what is asked for; everything else has what is asked for."""
    whole = make_decoder("am").to(written)
    retort.save(whole, tmp_path)
    ours = retort.load(tmp_path, asked)
    for name, dtype in dtypes(ours).items():
        assert dtype == (kept if name in RATES["am"] else asked), name
    for name in RATES["am"]:
        assert torch.equal(ours.state_dict()[name].float(), whole.state_dict()[name].float())


@pytest.mark.parametrize("embedding", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_dtype_the_embedding_decides(
    tmp_path: Path, make_decoder: MakeDecoder, embedding: torch.dtype
) -> None:
    """In folders of several dtypes."""
    retort.save(make_decoder("am"), tmp_path)
    rest = torch.bfloat16 if embedding == torch.float32 else torch.float32
    rewrite(tmp_path, lambda tensors: tensors.update({k: t.to(rest) for k, t in tensors.items()}))
    name = "model.embed_tokens.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(embedding)}))
    found = dtypes(retort.load(tmp_path))
    assert {found[name] for name in RATES["am"]} == {torch.float32}
    assert {dtype for name, dtype in found.items() if name not in RATES["am"]} == {embedding}


@pytest.mark.parametrize("layers", RATES)
def test_mixtures_are_written_and_read_as_they_are(
    tmp_path: Path, make_decoder: MakeDecoder, layers: str
) -> None:
    retort.save(make_decoder(layers), tmp_path / "whole")
    mixed = retort.load(tmp_path / "whole", torch.bfloat16)
    retort.save(mixed, tmp_path / "mixed")
    again = retort.load(tmp_path / "mixed")
    assert dtypes(again) == dtypes(mixed)
    assert {entry[0] for entry in stored(tmp_path / "mixed").values()} == {"F32", "BF16"}
    retort.save(again, tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tmp_path / "mixed")


@pytest.mark.parametrize("layers", ["am", "mm", "ad", "as"])
@pytest.mark.parametrize("asked", HALF, ids=str)
def test_mixtures_compute(
    tmp_path: Path, make_decoder: MakeDecoder, layers: str, asked: torch.dtype
) -> None:
    """All at once and token by token, near to what the whole precision gives."""
    whole = make_decoder(layers)
    retort.save(whole, tmp_path)
    mixed = retort.load(tmp_path, asked)
    ids_BT = torch.randint(61, (2, 12))
    logits_BTV = mixed(ids_BT)
    assert logits_BTV.dtype == asked
    state = mixed.init_state(2, 12)
    steps = [mixed(part_BT, state) for part_BT in ids_BT.split([5, *[1] * 7], dim=1)]
    wanted = whole(ids_BT)
    assert wanted.std() > 1
    for found in (logits_BTV, torch.cat(steps, dim=1)):
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.3)
        assert (found.float() - wanted).abs().mean() < 0.03
    assert all(
        layer.ssm_BHPN.dtype == torch.float32
        for layer in state.layers
        if isinstance(layer, MambaState)
    )


def test_a_clone_is_not_written_over(folder: Path, make_decoder: MakeDecoder) -> None:
    (folder / ".git").mkdir()
    before = contents(folder.parent)
    with pytest.raises(ValueError, match=r"holds the folder \.git, which .* would delete"):
        retort.save(make_decoder("am"), folder)
    assert contents(folder.parent) == before
