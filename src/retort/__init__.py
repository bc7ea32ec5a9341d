"""Distil a Transformer into a subquadratic student, sample it fast, and see what the time buys.

The names below are imported when they are first used, so `import retort` loads neither torch nor
transformers, and commands that need neither stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from retort._version import __version__

if TYPE_CHECKING:
    from retort import grade, report
    from retort.model.config import DecoderConfig
    from retort.model.decoder import Decoder
    from retort.model.transplant import transplant
    from retort.model.weights import load, save
    from retort.publishing import publish
    from retort.sample.cache import CacheSettings
    from retort.sample.engine import Completion, Engine
    from retort.sample.tokens import SamplingParams

__all__ = [
    "CacheSettings",
    "Completion",
    "Decoder",
    "DecoderConfig",
    "Engine",
    "SamplingParams",
    "__version__",
    "grade",
    "load",
    "publish",
    "report",
    "save",
    "transplant",
]

_HOME: Final = {
    "CacheSettings": "retort.sample.cache",
    "Completion": "retort.sample.engine",
    "Decoder": "retort.model.decoder",
    "DecoderConfig": "retort.model.config",
    "Engine": "retort.sample.engine",
    "SamplingParams": "retort.sample.tokens",
    "load": "retort.model.weights",
    "publish": "retort.publishing",
    "save": "retort.model.weights",
    "transplant": "retort.model.transplant",
}

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(import_module(_HOME[name]), name)
        if name in __all__:
            return import_module(f"retort.{name}")
        raise AttributeError(f"module 'retort' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
