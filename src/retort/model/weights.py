"""Checkpoint folders in and out: safetensors and `config.json`, strict in both directions.

Nothing is ever unpickled and no code from a checkpoint is run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retort.model import formats
from retort.model.config import DecoderConfig
from retort.model.decoder import Decoder
from retort.model.formats import Reader, Tensors, Writer, mamba_in_llama
from retort.model.formats.common import special_tokens, special_tokens_to_hf

CONFIG = "config.json"
MAMBA_CONFIG = "mamba_config.json"
GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STORED: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
RATES = ("A_log", "dt_bias", ".D")


def load(
    folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Decoder:
    """The decoder in a checkpoint folder, in `dtype` or as stored, ready to run on `device`.

    The rates of state-space mixers (A_log, dt_bias, D) are never rounded to a smaller dtype: they
    are few, and long sums of them decide what is remembered.

    Raises ValueError when the folder is missing, is no checkpoint, describes an architecture that
    is not supported, or has missing, extra, misshapen or unreadable tensors; all of it before the
    weights are read. Only what has to be zero is found out by reading it.
    """
    folder = Path(folder)
    reader, config = _open(folder)
    decoder = empty(config)
    _check_headers(folder, reader, decoder)
    stored = _native(reader, config, dict(_file_tensors(folder, device)), folder)
    dtype = dtype or stored["model.embed_tokens.weight"].dtype
    # Popped one by one, so that a model is never in memory in two dtypes.
    tensors = {name: _cast(name, stored.pop(name), dtype) for name in list(stored)}
    if config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    decoder.load_state_dict(tensors, strict=True, assign=True)
    if config.tie_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    return decoder.eval().requires_grad_(False)


def check(folder: Path) -> dict[str, Tensor]:
    """The tensors that a folder holds under this project's names, as shapes and dtypes alone.

    Reads the heads of the files. Raises ValueError as `load` does.
    """
    reader, config = _open(folder)
    return _check_headers(folder, reader, empty(config))


def _check_headers(folder: Path, reader: Reader, decoder: Decoder) -> dict[str, Tensor]:
    headers = _native(reader, decoder.config, dict(_headers(folder)), folder)
    wanted = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    if decoder.config.tie_embeddings:
        del wanted["lm_head.weight"]
    _check(folder, wanted, {name: tuple(tensor.shape) for name, tensor in headers.items()})
    return headers


def empty(config: DecoderConfig) -> Decoder:
    """A decoder without weights, on torch's `meta` device."""
    with torch.device("meta"):
        return Decoder(config)


def save(
    decoder: Decoder, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Writes a checkpoint folder: of the teacher's family where all layers are attention, as
    GraniteMoeHybrid where its mixers are stock Mamba-2, else in a format of Retort's own.

    The folder is written aside and renamed, so it is complete or absent; a checkpoint that was
    there before is replaced. Raises ValueError for a folder that holds something else.
    """
    write(decoder, Path(folder), formats.writer(decoder.config), tokenizer)


def write(
    decoder: Decoder,
    folder: Path,
    writer: Writer,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """`save` in a given format; `texts` are further files of the folder, by name."""
    check_target(folder)
    dtype = str(decoder.lm_head.weight.dtype).removeprefix("torch.")
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    _write_configs(decoder.config, aside, writer, dtype)
    tensors = {name: tensor.detach() for name, tensor in decoder.state_dict().items()}
    written = writer.tensors(tensors, decoder.config)
    _save_tensors({name: tensor.cpu().contiguous() for name, tensor in written.items()}, aside)
    for path in aside.glob("*.safetensors"):
        shutil.copymode(aside / CONFIG, path)  # safetensors makes files that only the owner reads
    if tokenizer is not None:
        tokenizer.save_pretrained(aside)
    for name, text in (texts or {}).items():
        (aside / name).write_text(text, encoding="utf-8")
    _swap(aside, folder)


def save_config(
    config: DecoderConfig,
    folder: Path,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Writes what `save` does but for the weights: `read_config` reads it back."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_configs(config, folder, formats.writer(config), str(dtype).removeprefix("torch."))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write_configs(config: DecoderConfig, folder: Path, writer: Writer, dtype: str) -> None:
    _write_json(folder / CONFIG, writer.config(config, dtype))
    _write_json(folder / GENERATION, special_tokens_to_hf(config))


def check_target(folder: Path) -> None:
    """Raises ValueError unless `save` may write here: nothing, an empty folder, or a checkpoint
    with no folders in it, such as the `.git` of a clone, that would be lost.
    """
    if folder.is_file():
        raise ValueError(f"{folder}: is a file, and a checkpoint is a folder")
    if folder.is_dir() and any(folder.iterdir()) and not _is_checkpoint(folder):
        raise ValueError(f"{folder}: holds files but no checkpoint; choose an empty or new folder")
    inner = sorted(path.name for path in folder.glob("*") if path.is_dir())
    if inner:
        raise ValueError(
            f"{folder}: holds the folder {inner[0]}, which replacing the model would delete; "
            "choose an empty or new folder"
        )


def _is_checkpoint(folder: Path) -> bool:
    """Whether there are weights: many programs have a config.json."""
    weights = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    return weights and (folder / CONFIG).is_file()


def read_config(folder: Path) -> DecoderConfig:
    """The decoder that a folder's `config.json` describes, with the stop tokens of generation."""
    return _open(folder)[1]


def format_name(folder: Path) -> str:
    """What the folder's format is called: an architecture of transformers, or a project."""
    return _open(folder)[0].name


def _open(folder: Path) -> tuple[Reader, DecoderConfig]:
    """How the folder is read, and what it describes."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; a model is a Hugging Face checkpoint folder on this machine"
        )
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: no checkpoint here ({CONFIG} is missing)")
    values = _read_json(folder / CONFIG)
    if (folder / MAMBA_CONFIG).is_file():
        values[mamba_in_llama.KEY] = _read_json(folder / MAMBA_CONFIG)
    try:
        reader = formats.reader(values)
        config = reader.config(values)
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG}: no key {error} in the configuration") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    if not (folder / GENERATION).is_file():
        return reader, config
    # Chat models often list more stop tokens here than in config.json.
    values = _read_json(folder / GENERATION)
    try:
        eos = special_tokens(values)["eos_token_ids"]
    except ValueError as error:
        raise ValueError(f"{folder / GENERATION}: {error}") from None
    return reader, replace(config, eos_token_ids=eos or config.eos_token_ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a JSON object was expected")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- reading


def _native(reader: Reader, config: DecoderConfig, tensors: Tensors, folder: Path) -> Tensors:
    """The folder's tensors under this project's names; a tied head is not one of them."""
    try:
        return formats.untied(reader.tensors(tensors, config), config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    kept = name.endswith(RATES)
    return tensor.to(torch.promote_types(tensor.dtype, dtype) if kept else dtype)


def _file_tensors(folder: Path, device: str | torch.device) -> Iterator[tuple[str, Tensor]]:
    for path in _tensor_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                yield name, file.get_tensor(name).to(device)


def _headers(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names, shapes and dtypes, as tensors without data."""
    for path in _tensor_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                part = file.get_slice(name)
                stored = part.get_dtype()
                if stored not in STORED:
                    raise ValueError(f"{path}: {name} is stored as {stored}, which is not read")
                yield name, torch.empty(part.get_shape(), dtype=STORED[stored], device="meta")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({error})") from None


def _tensor_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / INDEX}: no weight_map from tensors to files in it")
        names = sorted({str(name) for name in weight_map.values()})
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{folder / INDEX}: {outside[0]} is no file of this folder")
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
    raise ValueError(
        f"{folder}: no checkpoint here (neither {SINGLE} nor {INDEX}){hint} (docs/models.md#read)"
    )


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
