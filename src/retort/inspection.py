"""What a checkpoint folder holds: layers, sizes, and the formats it can be given to others in.

Read from the configuration and the heads of the weight files; no weights are loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from rich.table import Table

from retort import console
from retort.model import cost, formats, weights
from retort.model.config import ATTENTION, DecoderConfig, LayerType, Mamba1Config


@dataclass(frozen=True)
class Run:
    """Neighbouring layers of one kind; all numbers are of one of them.

    Bytes are of one row, in the dtype of the weights: `state_bytes` whatever the row's length, and
    `kv_bytes_per_token` for each token of it.
    """

    first: int
    last: int
    mixer: str
    geometry: str
    mixer_parameters: int
    other_parameters: int
    state_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class Format:
    """A format the folder's model can be written in, or why not; and what then runs it."""

    name: str
    reasons: tuple[str, ...]
    runtimes: Mapping[str, str]


@dataclass(frozen=True)
class Inspection:
    """A folder's contents. `dtypes` counts parameters by dtype."""

    folder: Path
    format: str
    parameters: int
    dtypes: Mapping[str, int]
    vocab_size: int
    hidden_size: int
    max_position: int
    state_bytes: int
    kv_bytes_per_token: int
    runs: tuple[Run, ...]
    formats: tuple[Format, ...]


def inspect(folder: Path) -> Inspection:
    """Reads what a folder holds. Raises ValueError for one that `retort.load` would refuse."""
    config = weights.read_config(folder)
    tensors = weights.check(folder)
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    itemsize = tensors["model.embed_tokens.weight"].element_size()
    return Inspection(
        folder=folder,
        format=weights.format_name(folder),
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_position=config.max_position,
        state_bytes=cost.state_bytes(config, itemsize),
        kv_bytes_per_token=cost.kv_bytes_per_token(config, itemsize),
        runs=tuple(_runs(config, itemsize)),
        formats=tuple(_format(config, writer) for writer in formats.PORTABLE),
    )


def tables(result: Inspection) -> list[Table]:
    """What a person reads: the whole, the layers, the formats."""
    return [_summary(result), _layers(result), _formats(result)]


def _runs(config: DecoderConfig, itemsize: int) -> Iterator[Run]:
    blocks = cost.parameters(config).blocks
    for kind, numbers in groupby(range(config.layers), key=lambda i: config.layer_types[i]):
        layers = list(numbers)
        block = blocks[layers[0]]
        one = replace(config, layer_types=(kind,))
        yield Run(
            first=layers[0],
            last=layers[-1],
            mixer=_mixer_name(config, kind),
            geometry=_geometry(config, kind),
            mixer_parameters=block.mixer,
            other_parameters=block.mlp + block.norms,
            state_bytes=cost.state_bytes(one, itemsize),
            kv_bytes_per_token=cost.kv_bytes_per_token(one, itemsize),
        )


def _mixer_name(config: DecoderConfig, kind: LayerType) -> str:
    if kind == ATTENTION:
        return "attention"
    assert config.mixer is not None
    return config.mixer.kind


def _geometry(config: DecoderConfig, kind: LayerType) -> str:
    mixer = config.mixer
    if kind == ATTENTION or mixer is None:
        return f"{config.heads} heads of {config.head_dim}, {config.kv_heads} key/value"
    shared = mixer.kv_heads if isinstance(mixer, Mamba1Config) else mixer.groups
    return f"{mixer.heads} heads of {mixer.head_dim}, {shared} groups, state {mixer.state_size}"


def _format(config: DecoderConfig, writer: formats.Writer) -> Format:
    reasons = tuple(writer.refusals(config))
    return Format(writer.name, reasons, {} if reasons else writer.runtimes(config))


def _summary(result: Inspection) -> Table:
    table = Table(show_header=False, box=None)
    dtypes = ", ".join(
        f"{console.format_count(count)} {name}" for name, count in sorted(result.dtypes.items())
    )
    rows = [
        ("folder", console.printable(str(result.folder))),
        ("format", result.format),
        ("parameters", f"{console.format_count(result.parameters)} ({dtypes})"),
        ("vocabulary", f"{result.vocab_size:,}"),
        ("width", f"{result.hidden_size:,}"),
        ("positions", f"{result.max_position:,}"),
        ("state of a row", format_bytes(result.state_bytes)),
        ("keys and values", f"{format_bytes(result.kv_bytes_per_token)} a token"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _layers(result: Inspection) -> Table:
    table = Table("layers", "mixer", "geometry")
    for name in ("mixer", "norms, MLP", "state", "KV a token"):
        table.add_column(name, justify="right")
    for run in result.runs:
        span = str(run.first) if run.first == run.last else f"{run.first}-{run.last}"
        table.add_row(
            span,
            run.mixer,
            run.geometry,
            console.format_count(run.mixer_parameters),
            console.format_count(run.other_parameters),
            format_bytes(run.state_bytes),
            format_bytes(run.kv_bytes_per_token),
        )
    return table


def _formats(result: Inspection) -> Table:
    table = Table("can be published as", "", "runs in")
    for each in result.formats:
        served = [name for name, reason in each.runtimes.items() if not reason]
        refused = [f"{name}: {reason}" for name, reason in each.runtimes.items() if reason]
        told = "\n".join([", ".join(served), *refused] if each.runtimes else each.reasons)
        table.add_row(each.name, "no" if each.reasons else "yes", told)
    return table


def format_bytes(count: int) -> str:
    """Bytes in binary units: 32 KiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.4g} {unit}"
        value /= 1024
    raise AssertionError
