"""Retort's own folders, for decoders that no other program's format can hold.

`config.json` has the fields of `DecoderConfig` under the key `decoder`, and tensors have the names
of the modules.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from retort.model.config import DecoderConfig
from retort.model.formats import keys
from retort.model.formats.common import (
    Reader,
    Tensors,
    Values,
    Writer,
    special_tokens_to_hf,
    untied,
)

ARCHITECTURE = "RetortForCausalLM"

_CONFIG = TypeAdapter(DecoderConfig)


def _read_config(values: Values) -> DecoderConfig:
    given = values["decoder"]
    try:
        config = _CONFIG.validate_python(given)
    except ValidationError as error:
        raise ValueError(keys.first_problem(error, "decoder")) from None
    _check_known("decoder", given, asdict(config))
    return config


def _check_known(place: str, given: Any, known: Any) -> None:
    """A key that is not known may be a later version's, and leaving it out another model."""
    if not isinstance(given, dict):
        return
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{place}.{key}: unknown key")
        _check_known(f"{place}.{key}", value, known[key])


def _write_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURE],
        "dtype": dtype,
        **special_tokens_to_hf(config),
        "decoder": asdict(config),
    }


def _as_is(tensors: Tensors, config: DecoderConfig) -> Tensors:
    return dict(tensors)


OWN = Writer(ARCHITECTURE, lambda _: [], lambda _: {"retort": ""}, _write_config, untied)
READERS = {ARCHITECTURE: Reader(ARCHITECTURE, _read_config, _as_is)}
