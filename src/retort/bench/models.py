"""The models that are measured: a folder's, or a geometry's size with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from retort.model import cost, weights
from retort.model.config import DecoderConfig
from retort.model.decoder import Decoder
from retort.model.devices import fast_dtype, open_device
from retort.model.geometries import GEOMETRIES, geometry
from retort.sample.memory import panel_bytes

DEFAULTS = {
    "cpu": ("small", "small-pure", "small-hybrid"),
    "cuda": ("llama-3.2-1b", "llamba-1b", "hybrid-1b"),
}
"""A teacher, a student without attention, and one that keeps some, for each kind of device."""


@dataclass(frozen=True)
class Model:
    """A decoder, ready to run, by the name that it is shown under."""

    name: str
    decoder: Decoder

    @property
    def config(self) -> DecoderConfig:
        """The decoder's sizes."""
        return self.decoder.config

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the weights."""
        return self.decoder.lm_head.weight.element_size()

    @cached_property
    def read_itemsize(self) -> float:
        """Bytes of a weight as the engine's steps read it: fewer where a CPU's copy of the weights
        is in bfloat16.
        """
        copied = panel_bytes(self.decoder)
        return copied / self.decoder.size if copied else self.itemsize

    @property
    def cache(self) -> cost.CacheBytes:
        """What rows remember, kept as usual."""
        return cost.CacheBytes(self.itemsize)


@dataclass(frozen=True)
class Sizes:
    """What a model keeps: parameters, bytes of a row's state whatever its length (recurrence and
    convolution), and bytes of keys and values for each token, as the cost model counts them.
    """

    name: str
    parameters: int
    attention_layers: int
    linear_layers: int
    mixer: str | None
    dtype: str
    state_bytes: int
    kv_bytes_per_token: int


def sizes(model: Model) -> Sizes:
    """The sizes of a model, for tables."""
    config = model.config
    return Sizes(
        name=model.name,
        parameters=model.decoder.size,
        attention_layers=len(config.attention_layers),
        linear_layers=len(config.linear_layers),
        mixer=config.mixer.kind if config.mixer is not None else None,
        dtype=str(model.decoder.lm_head.weight.dtype).removeprefix("torch."),
        state_bytes=cost.state_bytes(config, model.itemsize),
        kv_bytes_per_token=cost.kv_bytes_per_token(config, model.itemsize),
    )


def open_models(names: Sequence[str], device: str, dtype: torch.dtype | None = None) -> list[Model]:
    """Models by folder or by the name of a geometry; without any, those of `DEFAULTS`.

    In the dtype that suits the device, unless said. Raises ValueError for a name that is neither,
    for folders that are no checkpoints, and for a device that is not there, before any is made.
    """
    place = open_device(device)
    dtype = dtype or fast_dtype(place)
    names = names or DEFAULTS.get(place.type, DEFAULTS["cuda"])
    found = {name: _config(name) for name in names}
    shown = _shown(list(found))
    return [Model(shown[name], _open(name, config, place, dtype)) for name, config in found.items()]


def random_decoder(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A decoder with random weights, made where and as they are needed. The mixers' rates stay in
    float32, as in a checkpoint that is loaded.
    """
    decoder = weights.empty(config)
    tensors = {
        name: torch.ones(
            tensor.shape,
            dtype=torch.float32 if name.endswith(weights.RATES) else dtype,
            device=device,
        )
        for name, tensor in decoder.state_dict().items()
    }
    decoder.load_state_dict(tensors, strict=True, assign=True)
    if config.tie_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        decoder.reset_parameters()
    return decoder.eval().requires_grad_(False)


def _config(name: str) -> DecoderConfig:
    """What a folder or a geometry describes."""
    if Path(name).is_dir():
        return weights.read_config(Path(name))
    if name in GEOMETRIES:
        return geometry(name)
    if "/" in name:
        raise ValueError(f"{name}: no such folder")
    try:
        return geometry(name)
    except ValueError as error:
        raise ValueError(f"{name}: no such folder, and {error}") from None


def _open(name: str, config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    if Path(name).is_dir():
        return weights.load(name, dtype, device)
    decoder = random_decoder(config, device, dtype)
    if name not in DEFAULTS["cpu"]:
        _round(decoder)
    return decoder


@torch.no_grad()
def _round(decoder: Decoder) -> None:
    """Leaves of the weights what bfloat16 holds, in which models of these sizes are published."""
    for name, parameter in decoder.named_parameters():
        if not name.endswith(weights.RATES):
            parameter.copy_(parameter.bfloat16())


def _shown(names: Sequence[str]) -> dict[str, str]:
    """Folders by their last part where that is enough to tell them apart."""
    short = {name: Path(name).resolve().name if Path(name).is_dir() else name for name in names}
    shared = [each for each in short.values() if list(short.values()).count(each) > 1]
    return {name: name if each in shared else each for name, each in short.items()}
