"""Checkpoint formats: which there are, and which one a folder has or a decoder gets."""

from __future__ import annotations

from retort.model.config import DecoderConfig
from retort.model.formats import families, granite, llamba, mamba_in_llama, own
from retort.model.formats.common import Reader, Tensors, Values, Writer, untied

__all__ = [
    "PORTABLE",
    "Reader",
    "Tensors",
    "Values",
    "Writer",
    "portable",
    "reader",
    "untied",
    "writer",
]

PORTABLE = (families.FAMILY, granite.GRANITE)
"""What other programs read, too."""

_READERS = {**families.READERS, **granite.READERS, **own.READERS}


def reader(values: Values) -> Reader:
    """The reader for a `config.json`. Raises ValueError when none knows it."""
    if mamba_in_llama.KEY in values:
        return mamba_in_llama.READER
    if llamba.describes(values):
        return llamba.READER
    names = values.get("architectures") or ["none"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ValueError(f"architectures {names!r}: a list of names was expected")
    name = names[0]
    if name not in _READERS:
        known = ", ".join(sorted([*_READERS, "Llamba", "MambaInLlama"]))
        raise ValueError(f"architecture {name}; supported are {known} (docs/models.md#read)")
    return _READERS[name]


def portable(config: DecoderConfig) -> Writer | None:
    """The format that other programs read as well, if there is one for this decoder."""
    return next((each for each in PORTABLE if not each.refusals(config)), None)


def writer(config: DecoderConfig) -> Writer:
    """The format that a decoder is saved in: a portable one where there is one."""
    return portable(config) or own.OWN
