"""The arithmetic of a training stage: FLOPs of a token, by who does them and why.

Every token of a row is taken to be learnt, so where rows are questions and answers, the head does
less than is counted. A backward pass costs a forward pass for the gradients of what was put in, and
another for those of the weights that are trained.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from retort.model import cost
from retort.model.config import ATTENTION, LINEAR, DecoderConfig, Mamba1Config
from retort.model.decoder import Decoder
from retort.recipe import Distill, HiddenStates, MixingMatrices, Objective, Stage, Supervised

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Work:
    """FLOPs: the teacher's forward pass, the student's forward and backward pass, and whatever is
    computed a second time to save memory.
    """

    teacher: float
    student: float
    recomputed: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.teacher + self.student + self.recomputed

    def times(self, tokens: int) -> Work:
        """That of so many tokens."""
        return Work(self.teacher * tokens, self.student * tokens, self.recomputed * tokens)


def work(
    objective: Objective,
    student: DecoderConfig,
    teacher: DecoderConfig | None,
    length: int,
    recompute: Recompute,
    multiplied: int | None = None,
) -> Work:
    """FLOPs of a token in rows of `length`; `multiplied` are the trained weights that a token is
    multiplied with (`multiplied_weights`), all of them unless said.
    """
    match objective:
        case Supervised():
            return _end_to_end(student, None, length, recompute, multiplied)
        case Distill():
            return _end_to_end(student, teacher, length, recompute, multiplied)
    assert teacher is not None
    match objective:
        case HiddenStates():
            return _hidden_states(objective, student, teacher, length, recompute)
        case MixingMatrices():
            return _mixing_matrices(student, teacher, length, recompute)


def token_flops(
    stage: Stage, student: Decoder, teacher: Decoder | None, trained: Collection[str]
) -> float:
    """What the models need for a token of a stage: nothing that is computed twice."""
    config = None if teacher is None else teacher.config
    weights = multiplied_weights(student, trained)
    found = work(stage.objective, student.config, config, stage.length, "none", weights)
    return found.teacher + found.student


def multiplied_weights(decoder: Decoder, names: Collection[str]) -> int:
    """Weights among those named that every token is multiplied with: no embedding that is only
    looked up, no vectors, and not the convolutions, which `cost` counts by themselves.
    """
    looked_up = set() if decoder.config.tie_embeddings else {"model.embed_tokens.weight"}
    return sum(
        parameter.numel()
        for name, parameter in decoder.named_parameters()
        if name in names and parameter.ndim == 2
        if not name.endswith("A_log") and name not in looked_up
    )


def _end_to_end(
    student: DecoderConfig,
    teacher: DecoderConfig | None,
    length: int,
    recompute: Recompute,
    multiplied: int | None,
) -> Work:
    """Logits are made once, a chunk at a time, and with them their gradients."""
    ours = cost.prefill_flops(student, length)
    weights = ours.total if multiplied is None else 2 * multiplied + ours.mixing + ours.convolution
    again = _again(student, length, recompute)
    if teacher is None:
        return Work(0, 2 * ours.total + weights, again)
    theirs = cost.prefill_flops(teacher, length)
    return Work(theirs.total, 2 * ours.total + weights, again)


def _hidden_states(
    objective: HiddenStates,
    student: DecoderConfig,
    teacher: DecoderConfig,
    length: int,
    recompute: Recompute,
) -> Work:
    """The replaced blocks alone, each from the teacher's input."""
    replaced = replace(student, layer_types=(LINEAR,) * len(student.linear_layers))
    ours = cost.prefill_flops(replaced, length)
    theirs = cost.prefill_flops(teacher, length)
    blocks = theirs.total - theirs.head
    if objective.compare == "block":
        return Work(blocks, 3 * (ours.total - ours.head), _again(replaced, length, recompute))
    kept = replace(teacher, layer_types=(ATTENTION,) * len(student.linear_layers))
    mixers = cost.prefill_flops(kept, length)
    compared = mixers.projections + mixers.mixing
    return Work(blocks + compared, 3 * (ours.projections + ours.convolution + ours.mixing), 0)


def _mixing_matrices(
    student: DecoderConfig, teacher: DecoderConfig, length: int, recompute: Recompute
) -> Work:
    """Scores of every token with every other: queries with keys, C with B."""
    mixer, replaced = student.mixer, len(student.linear_layers)
    assert mixer is not None and not isinstance(mixer, Mamba1Config)
    theirs = cost.prefill_flops(teacher, length)
    queries, keys = teacher.heads * teacher.head_dim, teacher.kv_heads * teacher.head_dim
    matrices = replaced * 2 * (teacher.hidden_size * (queries + keys) + length * queries)
    projected = student.hidden_size * (mixer.conv_channels + mixer.inner + mixer.heads)
    convolved = mixer.conv_channels * mixer.conv_width
    ours = replaced * 2 * (projected + convolved + length * mixer.groups * mixer.state_size)
    again = 0 if recompute == "none" else matrices + ours
    return Work(theirs.total - theirs.head + matrices, 3 * ours, again)


def _again(config: DecoderConfig, length: int, recompute: Recompute) -> float:
    """What the blocks compute a second time: `selective` keeps products with weights, and
    attention.
    """
    if recompute == "none":
        return 0
    blocks = cost.prefill_flops(config, length)
    if recompute == "full":
        return blocks.total - blocks.head
    linear = replace(config, layer_types=(LINEAR,) * len(config.linear_layers))
    return cost.prefill_flops(linear, length).mixing + blocks.convolution
