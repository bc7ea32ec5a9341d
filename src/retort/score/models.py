"""Reward models: what is read of a completion, and the scores at the positions that matter.

All are checkpoint folders that transformers' own classes load: no code from a folder is run, and
nothing is unpickled.

Shapes: B rows, T tokens, K steps of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Model,
    Qwen2PreTrainedModel,
)

from retort.score import reading
from retort.score.reading import Reading

Kind = Literal["process", "outcome"]
Scale = Literal["probability", "logit"]


class RewardModel(Protocol):
    """A model that judges completions: process models each step, outcome models the whole."""

    def read(self, question: str, text: str) -> Reading:
        """What the model reads of a completion. Raises ValueError for a tokenizer that is unfit."""

    def scores(self, readings: Sequence[Reading]) -> list[list[float]]:
        """The scores of completions that are read together, one for each of their positions."""

    @property
    def limit(self) -> int | None:
        """The most tokens it can read; None where there is no such limit."""


class PlusMinus:
    """A causal language model that answers each step with + or -: RLHFlow's process models.

    The score of a step is the probability of + where only + and - are possible. Of the head's rows
    those two are kept, so that no logits of a whole vocabulary are ever computed.
    """

    def __init__(self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        signs = [reading.single_token(tokenizer, sign) for sign in (reading.MINUS, reading.PLUS)]
        head = module.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        module.set_output_embeddings(_Rows(head, signs))
        self.module, self.tokenizer = module, tokenizer

    def read(self, question: str, text: str) -> Reading:
        """A conversation that answers every step with a plus sign."""
        return reading.plus_minus(self.tokenizer, question, text)

    def scores(self, readings: Sequence[Reading]) -> list[list[float]]:
        """The probability of + at each step."""
        return _probabilities(self.module, readings)

    @property
    def limit(self) -> int | None:
        """The model's number of positions."""
        return _positions(self.module)


class _Rows(nn.Module):
    """Some rows of a linear layer, multiplied in float32: what is compared are close numbers."""

    def __init__(self, layer: nn.Linear, rows: list[int]) -> None:
        super().__init__()
        weights = {name: each[rows].detach().float() for name, each in layer.named_parameters()}
        self.register_buffer("weight", weights["weight"])
        self.register_buffer("bias", weights.get("bias"))

    def forward(self, h_BTD: Tensor) -> Tensor:
        """The logits of these rows alone."""
        return linear(h_BTD.float(), self.get_buffer("weight"), self._buffers["bias"])


class QwenScorer(Qwen2PreTrainedModel):
    """Qwen2 with a head of two layers that labels every token wrong (0) or right (1).

    The architecture of Qwen2.5-Math-PRM (arXiv 2501.07301), whose folders come with code of their
    own that is never run; the names are those of their tensors.
    """

    # Their folders may keep the head of the language model that they were made from.
    _keys_to_ignore_on_load_unexpected = [r"lm_head\."]  # noqa: RUF012  # declared so above

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        width = config.hidden_size
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Logits_BT2 of wrong and right at every token."""
        output = self.model(input_ids, attention_mask=attention_mask, **options)
        output["logits"] = self.score(output.last_hidden_state)
        return output


class Qwen:
    """A process model of Qwen's kind; a step's score is the probability that it is right."""

    def __init__(self, module: QwenScorer, tokenizer: PreTrainedTokenizerBase) -> None:
        reading.single_token(tokenizer, reading.STEP_END)
        self.module, self.tokenizer = module, tokenizer

    def read(self, question: str, text: str) -> Reading:
        """An answer with a marker behind each step."""
        return reading.step_ends(self.tokenizer, question, text)

    def scores(self, readings: Sequence[Reading]) -> list[list[float]]:
        """The probability of `right` at each marker."""
        return _probabilities(self.module, readings)

    @property
    def limit(self) -> int | None:
        """The model's number of positions."""
        return _positions(self.module)


class Outcome:
    """A sequence classifier with one label, whose logit is the score; it may be negative."""

    def __init__(self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.module, self.tokenizer = module, tokenizer
        self.pad: Final = module.config.get_text_config().pad_token_id

    def read(self, question: str, text: str) -> Reading:
        """Question and answer as a conversation."""
        return reading.conversation(self.tokenizer, question, text)

    @torch.inference_mode()
    def scores(self, readings: Sequence[Reading]) -> list[list[float]]:
        """The logit of each completion."""
        pad = _unused(readings) if self.pad is None else self.pad
        # The classes take the last token that is no padding, and find it by the padding's id.
        self.module.config.get_text_config().pad_token_id = pad
        logits_B1 = self.module(**padded(readings, pad, self.module.device)).logits
        return [[score] for score in logits_B1[:, 0].float().tolist()]

    @property
    def limit(self) -> int | None:
        """The model's number of positions."""
        return _positions(self.module)


def padded(readings: Sequence[Reading], pad: int, device: torch.device) -> dict[str, Tensor]:
    """The rows side by side, padded on the right, where a causal model never looks back from."""
    longest = max(len(each.ids) for each in readings)
    ids = [each.ids + [pad] * (longest - len(each.ids)) for each in readings]
    mask = [[1] * len(each.ids) + [0] * (longest - len(each.ids)) for each in readings]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


@torch.inference_mode()
def _probabilities(module: PreTrainedModel, readings: Sequence[Reading]) -> list[list[float]]:
    """The probability of the second of two logits at each of the readings' positions."""
    logits_BT2 = module(**padded(readings, 0, module.device)).logits
    rows, columns = places(readings, module.device)
    probability_K = logits_BT2[rows, columns].float().softmax(-1)[:, 1]
    return split(probability_K.tolist(), [len(each.at) for each in readings])


def places(readings: Sequence[Reading], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every position, row by row."""
    places = [(row, at) for row, each in enumerate(readings) for at in each.at]
    row_K, column_K = torch.tensor(places, device=device).T
    return row_K, column_K


def split(values: list[float], counts: Sequence[int]) -> list[list[float]]:
    """The values cut into pieces of these lengths."""
    remaining = iter(values)
    return [[next(remaining) for _ in range(count)] for count in counts]


def _unused(readings: Sequence[Reading]) -> int:
    """A token id that none of the readings ends in, for a model that names no padding."""
    last = {each.ids[-1] for each in readings}
    return next(id for id in range(len(last) + 1) if id not in last)


def _positions(module: PreTrainedModel) -> int | None:
    # Not every configuration has the key: recurrent models read without end.
    limit: int | None = module.config.get_text_config().to_dict().get("max_position_embeddings")
    return limit
