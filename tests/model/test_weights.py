"""Checkpoint folders: what cannot be read says why, and what is written is whole."""

import json
import pickle
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

MakeDecoder = Callable[..., Decoder]


@pytest.fixture
def folder(tmp_path: Path, make_decoder: MakeDecoder) -> Path:
    """A readable checkpoint."""
    retort.save(make_decoder("a"), tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Path) -> str:
    """The message with which a folder is refused: one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers look at the message
        retort.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes a checkpoint's tensors."""
    tensors = load_file(folder / weights.SINGLE)
    change(tensors)
    save_file(tensors, folder / weights.SINGLE)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / weights.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---------------------------------------------------------------- what cannot be read


def test_missing_folder(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'}: no such folder" in refusal(tmp_path / "none")


def test_file_instead_of_a_folder(folder: Path) -> None:
    assert "no such folder" in refusal(folder / weights.SINGLE)


def test_folder_without_a_config(folder: Path) -> None:
    (folder / weights.CONFIG).unlink()
    assert refusal(folder) == f"{folder}: no checkpoint here (config.json is missing)"


@pytest.mark.parametrize("text", ["{", "", "[1]", '"words"'])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_json(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    message = refusal(folder)
    assert str(folder / name) in message
    assert "JSON" in message


def test_json_that_is_not_text(folder: Path) -> None:
    (folder / weights.CONFIG).write_bytes(b"\xff\xfe\x00")
    assert "config.json: not valid JSON" in refusal(folder)


def test_unknown_architecture(folder: Path) -> None:
    edit_config(folder, architectures=["MambaForCausalLM"])
    message = refusal(folder)
    assert str(folder / weights.CONFIG) in message
    assert "architecture MambaForCausalLM; supported are" in message
    assert "LlamaForCausalLM" in message


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_truncated_tensors(folder: Path, keep: float) -> None:
    path = folder / weights.SINGLE
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    message = refusal(folder)
    assert str(path) in message
    assert "damaged or truncated" in message


def test_only_pickled_weights(folder: Path) -> None:
    """They would run whatever code they hold: not even looked into."""
    (folder / weights.SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    message = refusal(folder)
    assert "pytorch_model.bin is a pickle, which is never read" in message
    assert "neither model.safetensors nor" in message


class Bomb:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return pytest.fail, ("a pickle was read",)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / weights.SINGLE).unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(folder)


def test_missing_shard(
    tmp_path: Path, make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 8000)
    retort.save(make_decoder("a"), tmp_path / "model")
    lost = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    lost.unlink()
    assert f"missing {lost.name}, which {weights.INDEX} names" in refusal(tmp_path / "model")


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a.safetensors"]}, {"weight_map": None}])
def test_index_without_a_map(folder: Path, index: dict[str, Any]) -> None:
    (folder / weights.INDEX).write_text(json.dumps(index))
    message = refusal(folder)
    assert str(folder / weights.INDEX) in message
    assert "weight_map" in message


def test_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert refusal(folder).endswith("do not fit its config.json: missing model.norm.weight")


def test_unexpected_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(bias=torch.zeros(1)))
    assert refusal(folder).endswith(": unexpected bias")


def test_misshapen_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)}))
    assert "wrong shape model.norm.weight (31,), not (32,)" in refusal(folder)


def test_all_disagreements_are_told_but_not_all_names(folder: Path) -> None:
    """A config of more and wider layers: pages of names would hide what is wrong."""
    edit_config(folder, num_hidden_layers=3, intermediate_size=64, tie_word_embeddings=False)
    rewrite(folder, lambda tensors: tensors.update(bias=torch.zeros(1)))
    message = refusal(folder)
    assert "missing model.layers.1." in message
    assert "and 15 more; unexpected bias; wrong shape model.layers.0.mlp." in message
    assert len(message) < 1000


def test_untied_config_without_a_head(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    retort.save(make_decoder("a", tie_embeddings=True), tmp_path / "model")
    edit_config(tmp_path / "model", tie_word_embeddings=False)
    assert "missing lm_head.weight" in refusal(tmp_path / "model")


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


@pytest.mark.parametrize("layers", ["aa", "ma"])
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


def test_what_the_format_cannot_hold_leaves_the_old_checkpoint(
    folder: Path, make_decoder: MakeDecoder
) -> None:
    before = contents(folder.parent)
    with pytest.raises(ValueError, match="GraniteMoeHybrid format cannot hold"):
        retort.save(make_decoder("am", head_dim=16), folder)
    assert contents(folder.parent) == before


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
