"""FLOPs of a stage against those of the products that the objectives really compute."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from retort.data.packing import Batch
from retort.model import cost
from retort.model.decoder import Decoder
from retort.model.geometries import geometry
from retort.recipe import Distill, HiddenStates, MixingMatrices, Objective, Parallel, Supervised
from retort.train.objectives import trainable
from retort.train.parallel import spread_student
from retort.train.work import Work, multiplied_weights, work
from retort.train.world import open_world

MakeDecoder = Callable[..., Decoder]

ROWS, LENGTH = 2, 12
DISTILL = Distill(kind="distill")
SUPERVISED = Supervised(kind="supervised")
BLOCKS = HiddenStates(kind="hidden_states")
MIXERS = HiddenStates(kind="hidden_states", compare="mixer")
MATRICES = MixingMatrices(kind="mixing_matrices")


def products(
    student: Decoder, teacher: Decoder, objective: Objective, recompute: Any = "none"
) -> tuple[float, float]:
    """FLOPs of a token with weights (mm), and of tokens with each other (bmm)."""
    ids_BT = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    batch = Batch(ids_BT, ids_BT, ids_BT == 0)
    names = trainable(student, objective)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    settings = Parallel(recompute=recompute)
    with open_world("cpu", settings) as world:
        trained = spread_student(student, world, settings)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        trained(teacher, batch, objective).sum.backward()
    found = counter.get_flop_counts()["Global"]
    tokens = ROWS * LENGTH
    return found[torch.ops.aten.mm] / tokens, found.get(torch.ops.aten.bmm, 0) / tokens


def weights(config: Any, head: float = 1.0) -> float:
    """FLOPs of a token with the weights of a decoder."""
    flops = cost.prefill_flops(config, LENGTH)
    return flops.projections + flops.mlp + head * flops.head


@pytest.mark.parametrize("layers", ["am", "dd", "sa"])
def test_products_with_weights_end_to_end(make_decoder: MakeDecoder, layers: str) -> None:
    """Three passes of the student's, and one of the teacher's; logits are made once."""
    student, teacher = make_decoder(layers), make_decoder("aa")
    seen, _ = products(student, teacher, DISTILL)
    assert seen == weights(teacher.config) + 3 * weights(student.config)
    alone, _ = products(student, teacher, SUPERVISED)
    assert alone == 3 * weights(student.config)


@pytest.mark.parametrize("layers", ["am", "dd", "sa"])
def test_work_end_to_end(make_decoder: MakeDecoder, layers: str) -> None:
    student, teacher = make_decoder(layers).config, make_decoder("aa").config
    ours, theirs = cost.prefill_flops(student, LENGTH), cost.prefill_flops(teacher, LENGTH)
    found = work(DISTILL, student, teacher, LENGTH, "none")
    assert found == Work(theirs.total, 3 * ours.total, 0)
    assert work(SUPERVISED, student, None, LENGTH, "none") == Work(0, 3 * ours.total, 0)


@pytest.mark.parametrize("objective", [DISTILL, BLOCKS])
def test_what_is_computed_again(make_decoder: MakeDecoder, objective: Objective) -> None:
    def again(recompute: Any) -> float:
        student, teacher = make_decoder("mm"), make_decoder("aa")
        return products(student, teacher, objective, recompute)[0]

    config, teacher = make_decoder("mm").config, make_decoder("aa").config

    def counted(recompute: Any) -> float:
        return work(objective, config, teacher, LENGTH, recompute).recomputed

    blocks = weights(config, head=0)
    # A checkpoint stops once it has what the backward pass asks for: the last product is not made.
    last = 2 * config.layers * config.hidden_size * config.intermediate_size
    assert again("full") - again("none") in (blocks, blocks - last)
    assert again("selective") == again("none")
    flops = cost.prefill_flops(config, LENGTH)
    assert counted("full") - counted("none") == flops.total - flops.head
    assert counted("selective") - counted("none") == flops.mixing + flops.convolution


def test_replaced_layers_alone_are_compared(make_decoder: MakeDecoder) -> None:
    student, teacher = make_decoder("amm"), make_decoder("aaa")
    replaced = weights(make_decoder("mm").config, head=0)
    seen, _ = products(student, teacher, BLOCKS)
    # Nobody asks for the gradient of a block's input, but a norm's weight does for that of in_proj.
    assert seen == weights(teacher.config, head=0) + 3 * replaced
    found = work(BLOCKS, student.config, teacher.config, LENGTH, "none")
    two = cost.prefill_flops(make_decoder("mm").config, LENGTH)
    assert found.student == 3 * (two.total - two.head)
    theirs = cost.prefill_flops(teacher.config, LENGTH)
    assert found.teacher == theirs.total - theirs.head


def test_mixers_alone_are_compared(make_decoder: MakeDecoder) -> None:
    student, teacher = make_decoder("amm"), make_decoder("aaa")
    seen, _ = products(student, teacher, MIXERS)
    two = cost.prefill_flops(make_decoder("mm").config, LENGTH)
    attention = cost.prefill_flops(make_decoder("aa").config, LENGTH).projections
    assert seen == weights(teacher.config, head=0) + attention + 3 * two.projections
    found = work(MIXERS, student.config, teacher.config, LENGTH, "full")
    assert found.student == 3 * (two.projections + two.convolution + two.mixing)
    assert found.recomputed == 0


@pytest.mark.parametrize("layers", ["amm", "add"])
def test_matrices(make_decoder: MakeDecoder, layers: str) -> None:
    student, teacher = make_decoder(layers), make_decoder("aaa")
    seen_mm, seen_bmm = products(student, teacher, MATRICES)
    found = work(MATRICES, student.config, teacher.config, LENGTH, "none")
    config, mixer = teacher.config, student.config.mixer
    assert mixer is not None
    convolution = 3 * cost.prefill_flops(student.config, LENGTH).convolution
    theirs = cost.prefill_flops(config, LENGTH)
    square = 3 * 4 * config.heads * config.head_dim * LENGTH  # where causal halves are counted
    counted = found.student + found.teacher - convolution - theirs.mixing + square
    assert seen_mm + seen_bmm == pytest.approx(counted)
    again = sum(products(make_decoder(layers), teacher, MATRICES, "full")) - seen_mm - seen_bmm
    planned = work(MATRICES, student.config, teacher.config, LENGTH, "full").recomputed
    assert again == pytest.approx(planned - convolution / 3)


def test_frozen_weights_have_no_gradients(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("am")
    names = {name for name, _ in decoder.named_parameters()}
    everything = multiplied_weights(decoder, names)
    config = decoder.config
    assert 2 * everything == weights(config)
    mlp = {name for name in names if ".mlp." in name}
    frozen = multiplied_weights(decoder, names - mlp)
    assert everything - frozen == 2 * 3 * config.hidden_size * config.intermediate_size
    whole = work(SUPERVISED, config, None, LENGTH, "none", everything)
    assert whole == work(SUPERVISED, config, None, LENGTH, "none")
    part = work(SUPERVISED, config, None, LENGTH, "none", frozen)
    assert whole.student - part.student == cost.prefill_flops(config, LENGTH).mlp


def test_a_tied_head_is_multiplied_with_and_a_table_only_looked_up(
    make_decoder: MakeDecoder,
) -> None:
    for tied in (True, False):
        decoder = make_decoder("a", tie_embeddings=tied)
        names = {name for name, _ in decoder.named_parameters()}
        assert 2 * multiplied_weights(decoder, names) == weights(decoder.config)


def test_six_flops_for_each_parameter_and_token() -> None:
    """The usual estimate, less the attention to other tokens: 4 T H D for all 16 layers, tripled,
    halved for causality.
    """
    config, length = geometry("llama-3.2-1b"), 2048
    assert cost.parameters(config).total == 1_235_814_400
    found = work(SUPERVISED, config, None, length, "none")
    attention = 3 * 16 * 4 * 2048 * (length + 1) / 2
    norms = (2 * 16 + 1) * 2048
    assert found.student == pytest.approx(6 * (1_235_814_400 - norms) + attention)
    assert found.student / (6 * 1_235_814_400) == pytest.approx(1.054, abs=1e-3)
    assert found.recomputed == 0
