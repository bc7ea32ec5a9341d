"""Damaged and malicious folders: one line that says where and what, before weights are read."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import retort
from retort import cli
from retort.model import weights
from retort.model.config import Mamba2Config
from retort.model.decoder import Decoder
from retort.recipe import BUNDLED_TEACHER

from .published import MAMBA_CONFIG, Student, fused, llamba, mamba_in_llama
from .theirs import edit_config

MakeDecoder = Callable[..., Decoder]


@pytest.fixture
def folder(tmp_path: Path, make_decoder: MakeDecoder) -> Path:
    """A readable checkpoint."""
    retort.save(make_decoder("a"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path, make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A readable checkpoint of several files."""
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 8000)
    retort.save(make_decoder("a"), tmp_path / "sharded")
    return tmp_path / "sharded"


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a weight is read."""

    def fail(*arguments: object) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr(weights, "_file_tensors", fail)


def refusal(folder: Path) -> str:
    """The message with which a folder is refused: one line that names it."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers look at the message
        retort.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert len(message) < 1000
    return message


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes a checkpoint's tensors."""
    tensors = load_file(folder / weights.SINGLE)
    change(tensors)
    save_file(tensors, folder / weights.SINGLE)


def edit_index(folder: Path, **values: Any) -> None:
    path = folder / weights.INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_undamaged(folder: Path, sharded: Path) -> None:
    """What the tests below damage is whole."""
    assert weights.check(folder).keys() == weights.check(sharded).keys()


# ---------------------------------------------------------------- folders and configurations


def test_missing_folder(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'}: no such folder" in refusal(tmp_path / "none")


def test_file_instead_of_a_folder(folder: Path) -> None:
    assert "no such folder" in refusal(folder / weights.SINGLE)


def test_folder_without_a_config(folder: Path) -> None:
    (folder / weights.CONFIG).unlink()
    assert refusal(folder) == f"{folder}: no checkpoint here (config.json is missing)"


@pytest.mark.parametrize("text", ["{", "", "[1]", '"words"', "null", "[" * 100_000, "9" * 5000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "mamba_config.json"])
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


def test_no_architecture(folder: Path) -> None:
    edit_config(folder, drop=("architectures",))
    assert "config.json: architecture none; supported are" in refusal(folder)


@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "rms_norm_eps", "hidden_size"])
def test_missing_key(folder: Path, key: str) -> None:
    edit_config(folder, drop=(key,))
    assert f"config.json: no key '{key}'" in refusal(folder)


def test_missing_key_of_rope(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0})
    assert "config.json: no key 'factor'" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "hidden_size", "abc"),
        ("config.json", "num_attention_heads", 0),
        ("config.json", "rope_parameters", "abc"),
        ("config.json", "rms_norm_eps", "abc"),
        ("generation_config.json", "eos_token_id", ["abc"]),
    ],
)
def test_wrong_values(folder: Path, name: str, key: str, value: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert refusal(folder).startswith(f"{path}: {key}")


def test_wrong_layers(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    retort.save(make_decoder("am"), tmp_path)
    edit_config(tmp_path, layer_types=3)
    assert "config.json: layer_types: Input should be a valid list" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 48}, "mamba_config: d_model is 48, but config.json has 40"),
        ({"n_layer": 4}, "mamba_config: n_layer is 4, but config.json has 3"),
        ({"intermediate_size": 50}, "mamba_config: intermediate_size is 50, but config.json has"),
        ({"rms_norm_eps": 1e-6}, "mamba_config: rms_norm_eps is 1e-06, but config.json has 1e-05"),
        ({"attn_layers": [3]}, "mamba_config: attn_layers has 3, and there are 3 layers"),
        ({"attn_layers": [-1]}, "mamba_config: attn_layers has -1"),
        ({"d_inner": 44}, "mamba_config: d_inner and d_xb are no multiples of head_dim 10"),
        ({"d_xb": 15}, "mamba_config: d_inner and d_xb are no multiples of head_dim 10"),
        ({"d_xb": 30}, "mixer: 4 heads are no multiple of 3"),
        ({"ssm_cfg": {"ngroups": 4, "d_state": 5}}, "ngroups \\* d_state = 20 is not d_inner = 40"),
    ],
)
def test_contradicting_configs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    student = mamba_in_llama({"expand": 1, "d_state": 5}).with_config(MAMBA_CONFIG, **changes)
    student.write(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path / 'config.json'}: .*{message}"):
        retort.load(tmp_path)


# ---------------------------------------------------------------- files of tensors


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_truncated_tensors(folder: Path, keep: float) -> None:
    path = folder / weights.SINGLE
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    message = refusal(folder)
    assert str(path) in message
    assert "damaged or truncated" in message


@pytest.mark.parametrize(
    "garbage",
    [
        b"not tensors at all",
        bytes(range(256)) * 64,
        b"\xff" * 4096,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
    ],
)
def test_garbage(folder: Path, garbage: bytes) -> None:
    (folder / weights.SINGLE).write_bytes(garbage)
    assert f"{folder / weights.SINGLE}: damaged or truncated" in refusal(folder)


def test_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard}: damaged or truncated" in refusal(sharded)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / weights.SINGLE).unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(folder)


def test_missing_shard(sharded: Path) -> None:
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    assert f"missing {lost.name}, which {weights.INDEX} names" in refusal(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a.safetensors"]}, {"weight_map": None}])
def test_index_without_a_map(folder: Path, index: dict[str, Any]) -> None:
    (folder / weights.INDEX).write_text(json.dumps(index))
    message = refusal(folder)
    assert str(folder / weights.INDEX) in message
    assert "weight_map" in message


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_damaged_index(sharded: Path, text: str) -> None:
    (sharded / weights.INDEX).write_text(text)
    message = refusal(sharded)
    assert str(sharded / weights.INDEX) in message
    assert "JSON" in message


@pytest.mark.parametrize("up", ["../outside.safetensors", "sub/../../outside.safetensors"])
def test_index_that_leads_outside(folder: Path, sharded: Path, up: str) -> None:
    """Whatever is there: also a file that could be read."""
    (folder / weights.SINGLE).rename(folder.parent / "outside.safetensors")
    (sharded / "sub").mkdir()
    for name in (up, str(folder.parent / "outside.safetensors")):
        edit_index(sharded, weight_map={"model.norm.weight": name})
        assert refusal(sharded).endswith(f"{weights.INDEX}: {name} is no file of this folder")


@pytest.mark.parametrize("name", ["..", "", ".", "a\0b", 3, None, ["a"]])
def test_index_with_strange_names(sharded: Path, name: object) -> None:
    edit_index(sharded, weight_map={"model.norm.weight": name})
    refusal(sharded)


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


def test_untied_config_without_a_head(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    retort.save(make_decoder("a", tie_embeddings=True), tmp_path / "model")
    edit_config(tmp_path / "model", tie_word_embeddings=False)
    assert "missing lm_head.weight" in refusal(tmp_path / "model")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.bool, "BOOL"),
        (torch.float64, "F64"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
    ],
)
def test_dtypes_that_are_not_read(folder: Path, dtype: torch.dtype, name: str) -> None:
    """Quantised weights would need their scales."""
    rewrite(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(dtype)}))
    assert refusal(folder).endswith(f"model.norm.weight is stored as {name}, which is not read")


# ---------------------------------------------------------------- shapes, in every layout


def layouts() -> dict[str, Student]:
    mamba1, mamba2 = {"expand": 1, "d_state": 5}, {"expand": 1, "ngroups": 4, "d_state": 10}
    students = {
        "llamba": llamba(n_layer=1),
        "mamba1": mamba_in_llama(mamba1, n_layer=2),
        "mamba2": mamba_in_llama(mamba2, n_layer=2),
    }
    return students | {
        f"{name} fused": Student(student.configs, fused(student), student.quirks)
        for name, student in students.items()
        if name != "llamba"
    }


def misshapen(tensor: Tensor) -> list[Tensor]:
    """One row or column less or more, a dimension less or more, a single number, nothing."""
    return [
        tensor[:-1],
        torch.cat([tensor, tensor[:1]]),
        tensor[..., :-1],
        tensor[:1],
        tensor[:0],
        tensor[None],
        tensor[..., None],
        tensor.flatten()[0],
        tensor.flatten()[None, :] if tensor.ndim > 1 else tensor[:, None, None],
    ]


@pytest.mark.parametrize("layout", ["llamba", "mamba1", "mamba2", "mamba1 fused", "mamba2 fused"])
def test_misshapen_tensors_of_published_layouts(tmp_path: Path, layout: str) -> None:
    student = layouts()[layout]
    student.write(tmp_path)
    weights.check(tmp_path)
    assert_shapes_are_checked(tmp_path, student.weights)


def test_rows_that_divide_into_no_heads(tmp_path: Path) -> None:
    """x and B of 8 channels each: a divisor of the inner 40, but no multiple of the state of 10."""
    student = layouts()["mamba2"]
    name = "model.layers.0.mamba.in_proj.weight"
    rows = torch.zeros(2 * 40 + 2 * 8 + 4, 40)
    student.write(tmp_path)
    save_file(student.weights | {name: rows}, tmp_path / weights.SINGLE)
    assert f"{name} (100, 40), not (164, 40)" in refusal(tmp_path)


@pytest.mark.parametrize("layers", ["aa", "am", "m", "ad", "s"])
def test_misshapen_tensors(tmp_path: Path, make_decoder: MakeDecoder, layers: str) -> None:
    mixer = {"mixer": Mamba2Config(heads=4, head_dim=8, state_size=4, groups=2)}
    retort.save(make_decoder(layers, **(mixer if "m" in layers else {})), tmp_path)
    tensors = load_file(tmp_path / weights.SINGLE)
    # What reading leaves out anyway has no shape that matters.
    null = {name for name in tensors if layers == "m" and ".layers.1." in name}
    assert_shapes_are_checked(tmp_path, tensors, null)


def assert_shapes_are_checked(
    folder: Path, tensors: dict[str, Tensor], but: set[str] | None = None
) -> None:
    for name in tensors.keys() - (but or set()):
        for changed in misshapen(tensors[name]):
            if changed.shape == tensors[name].shape:
                continue
            save_file(tensors | {name: changed.contiguous()}, folder / weights.SINGLE)
            message = refusal(folder)
            told = ("wrong shape", "missing", "unexpected")  # and nothing of torch's
            assert any(words in message for words in told), (name, changed.shape, message)


@pytest.mark.parametrize("layout", ["llamba", "mamba1", "mamba2", "mamba1 fused", "mamba2 fused"])
def test_missing_tensors_of_published_layouts(tmp_path: Path, layout: str) -> None:
    student = layouts()[layout]
    student.write(tmp_path)
    for name in student.weights:
        rest = {key: tensor for key, tensor in student.weights.items() if key != name}
        save_file(rest, tmp_path / weights.SINGLE)
        assert "missing" in refusal(tmp_path), name


# ---------------------------------------------------------------- pickles


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
        return Path.touch, (self.marker,)


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_read(folder: Path, name: str) -> None:
    """They would run whatever code they hold: not even looked into."""
    (folder / weights.SINGLE).unlink()
    marker = folder.parent / "marker"
    (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    message = refusal(folder)
    assert f"{name} is a pickle, which is never read" in message
    assert "neither model.safetensors nor" in message
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_by_another_name(folder: Path, zipped: bool) -> None:
    marker = folder.parent / "marker"
    path = folder / weights.SINGLE
    torch.save({"a": Bomb(marker)}, path, _use_new_zipfile_serialization=zipped)
    assert f"{path}: damaged or truncated" in refusal(folder)
    assert not marker.exists()


def test_an_index_of_pickles(sharded: Path) -> None:
    marker = sharded.parent / "marker"
    (sharded / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    edit_index(sharded, weight_map={"model.norm.weight": "pytorch_model.bin"})
    assert "pytorch_model.bin: damaged or truncated" in refusal(sharded)
    assert not marker.exists()


def test_code_of_a_folder_is_not_run(folder: Path) -> None:
    """Of the kind that needs trust_remote_code elsewhere."""
    marker = folder.parent / "marker"
    (folder / "modeling.py").write_text(f"open({str(marker)!r}, 'w')\n")
    code = {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"}
    edit_config(folder, architectures=["Model"], auto_map=code)
    assert "architecture Model; supported are" in refusal(folder)
    edit_config(folder, architectures=["LlamaForCausalLM"])
    assert weights.read_config(folder).family == "llama"
    assert not marker.exists()


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("damage", ["shape", "truncated", "config", "pickle"])
def test_the_command_line_tells_it_in_one_message(
    folder: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUNDLED_TEACHER / name, folder)
    path = folder / weights.SINGLE
    match damage:
        case "shape":
            rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3)}))
        case "truncated":
            path.write_bytes(path.read_bytes()[:-9])
        case "config":
            edit_config(folder, hidden_size="abc")
        case "pickle":
            path.rename(folder / "pytorch_model.bin")
    words = ["sample", f"model={folder}", f"out={folder.parent / 'run'}", "sampling.max_tokens=9"]
    monkeypatch.setattr(sys, "argv", ["retort", *words, "problems.kind=arithmetic"])
    message = refusal(folder)
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    assert "Traceback" not in err
    assert " ".join(err.split()) == f"error: {message}"
