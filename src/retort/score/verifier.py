"""A verifier: a student's backbone, and a head trained on graded completions (arXiv 2110.14168).

The backbone stays as it was. What a head learns of it is one pass over the completions and a convex
problem of a few hundred numbers, where training the whole model on a few hundred problems would
take longer and learn the problems by heart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from retort.data.chat import load_tokenizer
from retort.model import weights
from retort.model.config import ATTENTION
from retort.model.decoder import Decoder
from retort.model.devices import open_device
from retort.score import features, reading
from retort.score.head import Head, load_head
from retort.score.models import split
from retort.score.reading import Reading
from retort.tables import write_aside

SETTINGS = "verifier.json"


@dataclass(frozen=True)
class Settings:
    """How a verifier reads: the prompt that completions answer, and whether it judges each step."""

    prompt: str
    every_step: bool

    def save(self, folder: Path) -> None:
        """Writes the settings into a checkpoint folder, which makes it a verifier's."""
        write_aside(folder / SETTINGS, json.dumps(asdict(self), indent=2).encode())


def read_settings(folder: Path) -> Settings:
    """The settings in a verifier's folder. Raises ValueError for any other folder."""
    path = folder / SETTINGS
    if not path.is_file():
        raise ValueError(f"{folder}: no verifier here ({SETTINGS} is missing); `retort verifier`")
    try:
        return TypeAdapter(Settings).validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: damaged ({' '.join(str(error).split())[:200]})") from None


class Verifier:
    """A reward model of this project's own; scores are calibrated probabilities of being right."""

    def __init__(
        self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, head: Head, settings: Settings
    ) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.head, self.settings = head, settings

    def read(self, question: str, text: str) -> Reading:
        """The student's prompt and the completion."""
        return reading.continuation(
            self.tokenizer, self.settings.prompt, question, text, self.settings.every_step
        )

    def scores(self, readings: Sequence[Reading]) -> list[list[float]]:
        """The probability that the answer is or will be right, at each position."""
        x_KF = features.features(self.decoder, readings)
        probability_K = self.head.logits(x_KF).sigmoid()
        return split(probability_K.tolist(), [len(each.at) for each in readings])

    @property
    def limit(self) -> int | None:
        """The student's number of positions, where it has attention."""
        config = self.decoder.config
        return config.max_position if ATTENTION in config.layer_types else None


def is_verifier(folder: Path) -> bool:
    """Whether a folder holds a verifier, whole."""
    return (folder / SETTINGS).is_file()


def open_verifier(folder: Path, dtype: torch.dtype, device: str) -> Verifier:
    """A verifier from its folder. Raises ValueError where files are missing or do not fit."""
    settings = read_settings(folder)
    decoder = weights.load(folder, dtype, open_device(device))
    head = load_head(folder, sum(features.parts(decoder)))
    return Verifier(decoder, load_tokenizer(folder), head, settings)
