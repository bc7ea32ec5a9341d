"""Losses from hidden states, in chunks, against the textbook formulas on all logits at once."""

from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from retort.train import divergence
from retort.train.divergence import (
    Direction,
    cross_entropy_sum,
    distillation_sum,
    divergence_sum,
)

TOKENS, WIDTH, VOCABULARY = 10, 6, 13
DIRECTIONS: list[Direction] = ["forward", "reverse", "jsd"]


@pytest.fixture(params=[1, 3, 10, 1000], ids=lambda tokens: f"{tokens}-token-chunks")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The tokens in a chunk: all sizes give the same."""
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", request.param * VOCABULARY + VOCABULARY - 1)
    size: int = request.param
    return size


class Model:
    """Hidden states and a head, which both get gradients."""

    def __init__(self) -> None:
        self.h_MD = torch.randn(TOKENS, WIDTH).requires_grad_()
        self.head_VD = torch.randn(VOCABULARY, WIDTH).requires_grad_()

    def log_p(self, temperature: float) -> Tensor:
        return (self.h_MD @ self.head_VD.T / temperature).log_softmax(-1)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [self.h_MD, self.head_VD])


def naive(direction: Direction, student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
    """kl_div(input, target) of torch is KL(target || input)."""

    def kl(p_MV: Tensor, q_MV: Tensor) -> Tensor:
        return kl_div(q_MV, p_MV, reduction="sum", log_target=True)

    if direction == "forward":
        return kl(teacher_MV, student_MV)
    if direction == "reverse":
        return kl(student_MV, teacher_MV)
    mixture_MV = ((student_MV.exp() + teacher_MV.exp()) / 2).log()
    return (kl(student_MV, mixture_MV) + kl(teacher_MV, mixture_MV)) / 2


def assert_same(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for found, reference in zip(ours, wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_in_chunks(chunks: int, direction: Direction, temperature: float) -> None:
    student, teacher = Model(), Model()
    heads = student.head_VD, teacher.head_VD.detach()
    found = divergence_sum(
        student.h_MD, heads[0], teacher.h_MD.detach(), heads[1], direction, temperature
    )
    wanted = temperature**2 * naive(
        direction, student.log_p(temperature), teacher.log_p(temperature).detach()
    )
    assert_same((found,), (wanted,))
    assert_same(student.gradients(found), student.gradients(wanted))


def test_cross_entropy_in_chunks(chunks: int) -> None:
    student, target_M = Model(), torch.randint(VOCABULARY, (TOKENS,))
    found = cross_entropy_sum(student.h_MD, student.head_VD, target_M)
    wanted = cross_entropy(student.log_p(1.0), target_M, reduction="sum")
    assert_same((found,), (wanted,))
    assert_same(student.gradients(found), student.gradients(wanted))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_both_at_once(chunks: int, direction: Direction, temperature: float) -> None:
    student, teacher = Model(), Model()
    target_M = torch.randint(VOCABULARY, (TOKENS,))
    sides = student.h_MD, student.head_VD, teacher.h_MD.detach(), teacher.head_VD.detach()
    kl = divergence_sum(*sides, direction, temperature)
    ce = cross_entropy_sum(student.h_MD, student.head_VD, target_M)
    wanted = 0.75 * kl + 0.25 * ce
    found, *parts = distillation_sum(*sides, target_M, 0.25, direction, temperature)
    assert not any(part.requires_grad for part in parts)
    assert_same((found, *parts), (wanted, kl, ce))
    assert_same(student.gradients(found), student.gradients(wanted))


def test_both_at_once_without_gradients() -> None:
    student, teacher = Model(), Model()
    target_M = torch.randint(VOCABULARY, (TOKENS,))
    sides = student.h_MD, student.head_VD, teacher.h_MD, teacher.head_VD
    wanted = distillation_sum(*sides, target_M, 0.25)
    with torch.no_grad():
        assert_same(distillation_sum(*sides, target_M, 0.25), wanted)


def test_both_at_once_make_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    logits: Callable[[Tensor, Tensor], Tensor] = divergence._logits

    def noted(h_MD: Tensor, head_VD: Tensor) -> Tensor:
        made.append(head_VD)
        return logits(h_MD, head_VD)

    monkeypatch.setattr(divergence, "_logits", noted)
    student, teacher = Model(), Model()
    sides = student.h_MD, student.head_VD, teacher.h_MD.detach(), teacher.head_VD.detach()
    target_M = torch.zeros(TOKENS, dtype=torch.long)
    student.gradients(distillation_sum(*sides, target_M, 0.5)[0])
    assert len(made) == 2


def test_never_more_logits_than_a_chunk(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each is made once: the backward pass needs none."""
    made: list[int] = []
    logits: Callable[[Tensor, Tensor], Tensor] = divergence._logits

    def counted(h_MD: Tensor, head_VD: Tensor) -> Tensor:
        made.append(len(h_MD))
        return logits(h_MD, head_VD)

    monkeypatch.setattr(divergence, "_logits", counted)
    student = Model()
    student.gradients(
        cross_entropy_sum(student.h_MD, student.head_VD, torch.zeros(TOKENS, dtype=torch.long))
    )
    assert max(made) == min(chunks, TOKENS)
    assert sum(made) == TOKENS


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_divergence_from_itself(direction: Direction) -> None:
    model = Model()
    loss = divergence_sum(
        model.h_MD, model.head_VD, model.h_MD.detach(), model.head_VD.detach(), direction
    )
    assert abs(loss.item()) < 1e-5
    assert all(gradient.abs().max() < 1e-5 for gradient in model.gradients(loss))


def test_jsd_is_at_most_a_bit_and_even_where_probabilities_vanish() -> None:
    """Two certain and different predictions: probabilities of e^-400 are zeros in float32."""
    h_MD, head_VD = torch.eye(2) * 400, torch.eye(2)
    loss = divergence_sum(h_MD, head_VD, h_MD.flip(0), head_VD, "jsd")
    assert loss.item() == pytest.approx(2 * log(2))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_tokens_no_loss(direction: Direction) -> None:
    """A micro-batch may have nothing to learn: it adds zeros, not NaN."""
    student, teacher = Model(), Model()
    nothing, target_M = student.h_MD[:0], torch.zeros(0, dtype=torch.long)
    heads = student.head_VD, teacher.head_VD
    loss = divergence_sum(nothing, heads[0], teacher.h_MD[:0], heads[1], direction)
    loss = loss + cross_entropy_sum(nothing, heads[0], target_M)
    assert loss.item() == 0
    loss.backward()
    assert student.head_VD.grad is None or not student.head_VD.grad.any()
    assert student.h_MD.grad is not None
    assert not student.h_MD.grad.any()


def test_half_precision_models_are_compared_in_full() -> None:
    student, teacher = Model(), Model()
    full = student.h_MD, student.head_VD, teacher.h_MD, teacher.head_VD
    a, b, c, d = (tensor.bfloat16() for tensor in full)
    loss = divergence_sum(a, b, c, d)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(divergence_sum(*full).item(), rel=0.02)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_in_bfloat16_keep_their_scale(frozen: bool) -> None:
    """What divides the sum, such as the number of tokens, is not rounded along with products."""
    generator = torch.Generator().manual_seed(0)
    h_MD = torch.randn(32, 16, generator=generator).bfloat16().requires_grad_()
    head_VD = torch.randn(61, 16, generator=generator).bfloat16().requires_grad_(not frozen)
    target_M = torch.randint(61, (32,), generator=generator)
    loss = cross_entropy_sum(h_MD, head_VD, target_M)
    (whole_MD,) = torch.autograd.grad(loss, h_MD, retain_graph=True)
    (third_MD,) = torch.autograd.grad(loss / 3, h_MD)
    ratio = third_MD.double().norm() / whole_MD.double().norm()
    assert ratio.item() == pytest.approx(1 / 3, rel=5e-4)
