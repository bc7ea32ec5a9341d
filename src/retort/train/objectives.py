"""The four objectives: (student, teacher, batch, settings) -> a sum, and `count`: over how many.

Sums and counts, not means: the loop adds them over micro-batches and processes before it divides,
since a mean of means is wrong when masks are uneven.

Shapes: B rows, T tokens, D model width, H heads, M learnt tokens.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from retort.data.packing import Batch
from retort.model.config import LINEAR
from retort.model.decoder import Decoder
from retort.recipe import Distill, HiddenStates, MixingMatrices, Objective, Supervised
from retort.train.divergence import cross_entropy_sum, distillation_sum, divergence_sum


class Loss(NamedTuple):
    """A sum to be minimised, and the sums that it is made of, for the log."""

    sum: Tensor
    parts: dict[str, Tensor]


def count(batch: Batch, objective: Objective) -> int:
    """What the sums of a batch's loss are over: rows, tokens, or learnt tokens."""
    match objective:
        case MixingMatrices():
            return batch.ids_BT.shape[0]
        case HiddenStates():
            return int((batch.document_BT >= 0).sum())
        case Distill() | Supervised():
            return int(batch.learn_BT.sum())


def evaluate(
    student: Decoder,
    teacher: Decoder | None,
    batch: Batch,
    objective: Objective,
    recompute: bool = False,
) -> Loss:
    """The loss of whichever objective a stage has. All but `supervised` need a teacher.

    `recompute` has matrices of T x T made again in the backward pass, one layer at a time.
    """
    if isinstance(objective, Supervised):
        return supervised(student, batch)
    assert teacher is not None
    match objective:
        case MixingMatrices():
            return mixing_matrices(student, teacher, batch, objective, recompute)
        case HiddenStates():
            return hidden_states(student, teacher, batch, objective)
        case Distill():
            return distill(student, teacher, batch, objective)


@torch.no_grad()
def teach(teacher: Decoder, batch: Batch, objective: Objective) -> Batch:
    """The batch with the teacher's hidden states that an objective compares with: what goes into
    each block and comes out of the last one, or, to distill from, what goes into the head.
    """
    match objective:
        case MixingMatrices() | HiddenStates():
            found = teacher.hidden_states(batch.ids_BT, batch.document_BT)
            return batch._replace(taught=tuple(found))
        case Distill():
            found = [teacher.hidden(batch.ids_BT, None, batch.document_BT)]
            return batch._replace(taught=tuple(found))
        case Supervised():
            return batch


def mixing_matrices(
    student: Decoder,
    teacher: Decoder,
    batch: Batch,
    settings: MixingMatrices,
    recompute: bool = False,
) -> Loss:
    """MOHAWK stage 1 (arXiv 2408.10189): the Frobenius distance between attention matrices and
    the student's mixing matrices, given the teacher's hidden states; a mean over heads, summed
    over replaced layers and rows.
    """
    inputs = _taught(teacher, batch, settings)
    context = student.context(batch.ids_BT, None, batch.document_BT)
    valid_B1T1 = (batch.document_BT >= 0)[:, None, :, None]  # nothing to imitate among padding

    def distance(i: int, h_BTD: Tensor) -> Tensor:
        with torch.no_grad():
            target_BHTT = teacher.blocks[i].mixing_matrix(h_BTD, context)
        difference_BHTT = target_BHTT - student.blocks[i].mixing_matrix(h_BTD, context)
        distance_BH = torch.linalg.matrix_norm((difference_BHTT * valid_B1T1).float())
        return (distance_BH**2 if settings.squared else distance_BH).mean(1).sum()

    if recompute:
        distance = partial(checkpoint, distance, use_reentrant=False)
    return _total({f"layer_{i}": distance(i, inputs[i]) for i in replaced_layers(student)})


def hidden_states(student: Decoder, teacher: Decoder, batch: Batch, settings: HiddenStates) -> Loss:
    """MOHAWK stage 2 (arXiv 2408.10189): the L2 distance between each replaced block's output and
    the teacher's, given the teacher's input to that block; or between the mixers' outputs alone.
    """
    inputs = _taught(teacher, batch, settings)
    context = student.context(batch.ids_BT, None, batch.document_BT)
    valid_BT = batch.document_BT >= 0
    parts = {}
    for i in replaced_layers(student):
        if settings.compare == "block":
            target_BTD, output_BTD = inputs[i + 1].detach(), student.blocks[i](inputs[i], context)
        else:
            with torch.no_grad():
                target_BTD = teacher.blocks[i].mix(inputs[i], context)
            output_BTD = student.blocks[i].mix(inputs[i], context)
        distance_BT = torch.linalg.vector_norm(output_BTD.float() - target_BTD.float(), dim=-1)
        parts[f"layer_{i}"] = (distance_BT * valid_BT).sum()
    return _total(parts)


def distill(student: Decoder, teacher: Decoder, batch: Batch, settings: Distill) -> Loss:
    """KL between the token distributions on the learnt tokens, and optionally cross-entropy:
    (1 - w) KL + w CE. MOHAWK stage 3 (forward) and MambaInLlama (arXiv 2408.15237; reverse).

    Heads may be padded to different widths for the same tokens, as those of models of several sizes
    are: the distributions are then those over the tokens that both have.
    """
    student_MD = _learnt(student, batch)
    teacher_MD = _taught(teacher, batch, settings)[-1][batch.learn_BT]
    width = min(student.config.vocab_size, teacher.config.vocab_size)
    heads = _first(student.lm_head.weight, width), _first(teacher.lm_head.weight, width)
    sides = student_MD, heads[0], teacher_MD, heads[1]
    kind = settings.direction, settings.temperature
    if settings.ce_weight == 0:
        kl = divergence_sum(*sides, *kind)
        return Loss(kl, {"kl": kl})
    total, kl, ce = distillation_sum(*sides, _targets(batch), settings.ce_weight, *kind)
    return Loss(total, {"kl": kl, "ce": ce})


def _first(head_VD: Tensor, width: int) -> Tensor:
    """The rows of a head that are compared; itself, not a view, where that is all of them."""
    return head_VD if head_VD.shape[0] == width else head_VD[:width]


def supervised(student: Decoder, batch: Batch) -> Loss:
    """Cross-entropy on the learnt tokens."""
    student_MD = _learnt(student, batch)
    ce = cross_entropy_sum(student_MD, student.lm_head.weight, _targets(batch))
    return Loss(ce, {"ce": ce})


def trainable(student: Decoder, objective: Objective) -> set[str]:
    """Names of the parameters that an objective trains: those its loss can teach anything."""
    names = {name for name, _ in student.named_parameters()}
    if isinstance(objective, Distill | Supervised):
        return names
    prefixes = tuple(f"model.layers.{i}." for i in replaced_layers(student))
    block = {name for name in names if name.startswith(prefixes)}
    if isinstance(objective, HiddenStates) and objective.compare == "block":
        return block
    return {name for name in block if ".mamba." in name or ".input_layernorm." in name}


def replaced_layers(student: Decoder) -> list[int]:
    """The layers whose mixer is not attention."""
    return [i for i, name in enumerate(student.config.layer_types) if name == LINEAR]


def _taught(teacher: Decoder, batch: Batch, objective: Objective) -> tuple[Tensor, ...]:
    return batch.taught or teach(teacher, batch, objective).taught


def _learnt(decoder: Decoder, batch: Batch) -> Tensor:
    """The hidden states that predict learnt tokens, h_MD."""
    return decoder.hidden(batch.ids_BT, None, batch.document_BT)[batch.learn_BT]


def _targets(batch: Batch) -> Tensor:
    return batch.ids_BT.roll(-1, dims=1)[batch.learn_BT]


def _total(parts: dict[str, Tensor]) -> Loss:
    return Loss(torch.stack(list(parts.values())).sum(), parts)
