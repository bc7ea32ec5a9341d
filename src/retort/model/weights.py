"""Checkpoint folders in and out: safetensors and `config.json`, strict in both directions.

Nothing is ever unpickled and no code from a checkpoint is run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retort.model.config import LINEAR, DecoderConfig, from_hf, to_hf
from retort.model.decoder import Decoder

CONFIG = "config.json"
GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load(
    folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Decoder:
    """The decoder in a checkpoint folder, in `dtype` or as stored, ready to run on `device`.

    Raises ValueError when the folder is missing, is no checkpoint, describes an architecture that
    is not supported, or has missing, extra, misshapen or unreadable tensors.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        decoder = Decoder(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in _native_tensors(folder, config):
        if not (config.tie_embeddings and name == "lm_head.weight"):
            tensors[name] = tensor.to(device=device, dtype=dtype or tensor.dtype)
    if config.tie_embeddings and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    _check(folder, wanted, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    decoder.load_state_dict(tensors, strict=True, assign=True)
    if config.tie_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    return decoder.eval().requires_grad_(False)


def save(
    decoder: Decoder, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Writes a checkpoint folder that transformers reads: Llama, or GraniteMoeHybrid for students.

    The folder is written aside and renamed, so it is complete or absent; a checkpoint that was
    there before is replaced. Raises ValueError for a folder that holds something else, and for a
    decoder that the format cannot represent.
    """
    folder = Path(folder)
    check_target(folder)
    dtype = str(decoder.lm_head.weight.dtype).removeprefix("torch.")
    config = to_hf(decoder.config, dtype)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    _write_json(aside / CONFIG, config)
    _write_json(aside / GENERATION, _generation(config))
    _save_tensors(_stored_tensors(decoder), aside)
    for path in aside.glob("*.safetensors"):
        shutil.copymode(aside / CONFIG, path)  # safetensors makes files that only the owner reads
    if tokenizer is not None:
        tokenizer.save_pretrained(aside)
    _swap(aside, folder)


def check_target(folder: Path) -> None:
    """Raises ValueError unless `save` may write here: nothing, an empty folder, or a checkpoint."""
    if folder.is_file():
        raise ValueError(f"{folder}: is a file, and a checkpoint is a folder")
    if folder.is_dir() and any(folder.iterdir()) and not _is_checkpoint(folder):
        raise ValueError(f"{folder}: holds files but no checkpoint; choose an empty or new folder")


def _is_checkpoint(folder: Path) -> bool:
    """Whether there are weights: many programs have a config.json."""
    weights = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    return weights and (folder / CONFIG).is_file()


def read_config(folder: Path) -> DecoderConfig:
    """The decoder that a folder's `config.json` describes, with the stop tokens of generation."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a model is a Hugging Face checkpoint folder")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: no checkpoint here ({CONFIG} is missing)")
    values = _read_json(folder / CONFIG)
    try:
        config = from_hf(values)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    if not (folder / GENERATION).is_file():
        return config
    # Chat models often list more stop tokens here than in config.json.
    eos = _read_json(folder / GENERATION).get("eos_token_id")
    if eos is None:
        return config
    return replace(config, eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a JSON object was expected")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _generation(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


# ---------------------------------------------------------------- reading


def _native_tensors(folder: Path, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """The folder's tensors under this project's names (Llama's)."""
    granite = LINEAR in config.layer_types
    for name, tensor in _file_tensors(folder):
        if name.endswith("rotary_emb.inv_freq"):  # a constant that old exports carry along
            continue
        yield from _from_granite(name, tensor) if granite else [(name, tensor)]


def _file_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in _tensor_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged or truncated safetensors file ({error})") from None


def _tensor_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / INDEX}: no weight_map from tensors to files in it")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder}: missing {', '.join(missing)}, which {INDEX} names")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(
        path.name for path in folder.glob("*.pt*")
    )
    hint = f"; {pickled[0]} is a pickle, which is never read: convert it" if pickled else ""
    raise ValueError(f"{folder}: no checkpoint here (neither {SINGLE} nor {INDEX}){hint}")


def _check(folder: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """All three kinds of disagreement in one message."""
    shapes = {name for name in wanted.keys() & found.keys() if wanted[name] != found[name]}
    problems = [
        _some("missing", wanted.keys() - found.keys()),
        _some("unexpected", found.keys() - wanted.keys()),
        _some("wrong shape", {f"{n} {found[n]}, not {wanted[n]}" for n in shapes}),
    ]
    if any(problems):
        told = "; ".join(problem for problem in problems if problem)
        raise ValueError(f"{folder}: its tensors do not fit its {CONFIG}: {told}")


def _some(what: str, names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {shown}{more}" if names else ""


# ---------------------------------------------------------------- GraniteMoeHybrid names


def _from_granite(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if name.endswith("shared_mlp.input_linear.weight"):
        prefix = name.removesuffix("shared_mlp.input_linear.weight")
        gate, up = tensor.chunk(2)
        return [
            (f"{prefix}mlp.gate_proj.weight", gate.contiguous()),
            (f"{prefix}mlp.up_proj.weight", up.contiguous()),
        ]
    return [(name.replace("shared_mlp.output_linear", "mlp.down_proj"), tensor)]


def _stored_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's tensors under the names of the format it is saved in."""
    tensors = {name: tensor.detach() for name, tensor in decoder.state_dict().items()}
    if decoder.config.tie_embeddings:
        del tensors["lm_head.weight"]
    if LINEAR in decoder.config.layer_types:
        tensors = _to_granite(tensors)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _to_granite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate_proj.weight"):
            prefix = name.removesuffix("mlp.gate_proj.weight")
            up = tensors[f"{prefix}mlp.up_proj.weight"]
            stored[f"{prefix}shared_mlp.input_linear.weight"] = torch.cat([tensor, up])
        elif not name.endswith("mlp.up_proj.weight"):
            stored[name.replace("mlp.down_proj", "shared_mlp.output_linear")] = tensor
    return stored


# ---------------------------------------------------------------- writing


def _save_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    shards = _shards(tensors)
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _swap(aside: Path, folder: Path) -> None:
    """Puts the finished folder in place of whatever checkpoint was there."""
    if not folder.exists():
        aside.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old)
