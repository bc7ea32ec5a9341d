"""Losses between token distributions, straight from hidden states, a chunk of tokens at a time.

Gradients are made along with the loss, since both need the logits: never more than a chunk of T x V
exists, and none of it twice. The head's gradient is summed in float32 over the chunks, however
rounded the products are.

Shapes: M tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Direction = Literal["forward", "reverse", "jsd"]
Valued = tuple[Tensor, Tensor]
"""A sum over tokens, and its gradient by what it was made from."""

ChunkLoss = Callable[[Tensor, int, int], Valued]
"""The loss of the tokens from one position to another, and its gradient, from their logits."""

CHUNK_ELEMENTS = 2**23
"""Logits that exist at once: 32 MiB in float32."""

CHUNK_ELEMENTS_CUDA = 2**26
"""The same on a GPU, whose products must be large to be worth reading the head for."""


def cross_entropy_sum(h_MD: Tensor, head_VD: Tensor, target_M: Tensor) -> Tensor:
    """Sum over tokens of -log p(target)."""

    def loss(logits_CV: Tensor, start: int, stop: int) -> Valued:
        log_p_CV = logits_CV.log_softmax(-1)
        return _cross_entropy(log_p_CV, target_M[start:stop], out_CV=log_p_CV)

    return _in_chunks(loss, h_MD, head_VD)


def _cross_entropy(log_p_CV: Tensor, target_C: Tensor, out_CV: Tensor | None = None) -> Valued:
    """-log p(target), whose gradient is p - 1 there and p elsewhere; written into `out_CV`, which
    may be the log-probabilities themselves.
    """
    target_C1 = target_C[:, None]
    value = -log_p_CV.gather(-1, target_C1).sum()
    gradient_CV = torch.exp(log_p_CV, out=out_CV)
    gradient_CV.scatter_add_(-1, target_C1, -torch.ones_like(gradient_CV[:, :1]))
    return value, gradient_CV


def divergence_sum(
    student_MD: Tensor,
    student_head_VD: Tensor,
    teacher_MD: Tensor,
    teacher_head_VD: Tensor,
    direction: Direction = "forward",
    temperature: float = 1.0,
) -> Tensor:
    """Sum over tokens of the divergence between teacher and student, times temperature squared.

    forward: KL(teacher || student); reverse: KL(student || teacher); jsd: the mean of both KLs to
    the even mixture. The square keeps the gradient's scale (Hinton et al. 2015, arXiv 1503.02531).
    The teacher's side is taken as it is: nothing is learnt there.
    """

    def loss(logits_CV: Tensor, start: int, stop: int) -> Valued:
        theirs_CV = _logits(teacher_MD[start:stop].detach(), teacher_head_VD.detach())
        return _divergence(_softened(logits_CV, temperature), theirs_CV, direction, temperature)

    return _in_chunks(loss, student_MD, student_head_VD)


def distillation_sum(
    student_MD: Tensor,
    student_head_VD: Tensor,
    teacher_MD: Tensor,
    teacher_head_VD: Tensor,
    target_M: Tensor,
    ce_weight: float,
    direction: Direction = "forward",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - w) `divergence_sum` + w `cross_entropy_sum` from the same logits; and each of the two by
    itself, without gradients.
    """
    kl, ce = (student_MD.new_zeros((), dtype=torch.float32) for _ in range(2))

    def loss(logits_CV: Tensor, start: int, stop: int) -> Valued:
        log_q_CV = logits_CV.log_softmax(-1)
        of_target, of_target_CV = _cross_entropy(log_q_CV, target_M[start:stop])
        if temperature != 1:
            log_q_CV = _softened(log_q_CV, temperature)  # log-probabilities are logits too
        theirs_CV = _logits(teacher_MD[start:stop].detach(), teacher_head_VD.detach())
        of_teacher, of_teacher_CV = _divergence(log_q_CV, theirs_CV, direction, temperature)
        kl.add_(of_teacher)
        ce.add_(of_target)
        value = torch.lerp(of_teacher, of_target, ce_weight)
        return value, of_teacher_CV.lerp_(of_target_CV, ce_weight)

    return _in_chunks(loss, student_MD, student_head_VD), kl, ce


def _softened(logits_CV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities; the logits are written over."""
    return logits_CV.div_(temperature).log_softmax(-1)


def _divergence(
    log_q_CV: Tensor, theirs_CV: Tensor, direction: Direction, temperature: float
) -> Valued:
    """From the student's softened log-probabilities and the teacher's logits, which are both
    written over.
    """
    value, gradient_CV = _DIVERGENCES[direction](log_q_CV, _softened(theirs_CV, temperature))
    return temperature**2 * value, gradient_CV.mul_(temperature)


# Each gives the divergence and its gradient by the student's logits, from the log-probabilities of
# the student (q) and of the teacher (p). Both are done with afterwards, and may be written over.


def _forward(log_q_MV: Tensor, log_p_MV: Tensor) -> Valued:
    """KL(p || q), whose gradient is q - p."""
    p_MV = log_p_MV.exp()
    value = log_p_MV.sub_(log_q_MV).mul_(p_MV).sum()
    return value, log_q_MV.exp_().sub_(p_MV)


def _reverse(log_q_MV: Tensor, log_p_MV: Tensor) -> Valued:
    """KL(q || p), whose gradient is q (log q - log p - KL)."""
    ratio_MV = torch.sub(log_q_MV, log_p_MV, out=log_p_MV)
    return _from_ratio(log_q_MV, ratio_MV)


def _jsd(log_q_MV: Tensor, log_p_MV: Tensor) -> Valued:
    """(KL(q || m) + KL(p || m)) / 2 with m their mean; of its gradient the first half is left."""
    log_m_MV = torch.logaddexp(log_q_MV, log_p_MV).sub_(log(2))
    theirs = log_p_MV.exp().mul_(log_p_MV.sub_(log_m_MV)).sum()
    ours, gradient_MV = _from_ratio(log_q_MV, torch.sub(log_q_MV, log_m_MV, out=log_m_MV))
    return (ours + theirs) / 2, gradient_MV.div_(2)


def _from_ratio(log_q_MV: Tensor, ratio_MV: Tensor) -> Valued:
    """The mean of a log-ratio under q, and q (ratio - mean)."""
    q_MV = log_q_MV.exp_()
    mean_M1 = (q_MV * ratio_MV).sum(-1, keepdim=True)
    return mean_M1.sum(), ratio_MV.sub_(mean_M1).mul_(q_MV)


_DIVERGENCES = {"forward": _forward, "reverse": _reverse, "jsd": _jsd}


def _logits(h_MD: Tensor, head_VD: Tensor) -> Tensor:
    return (h_MD @ head_VD.T).float()


# ---------------------------------------------------------------- chunks


def _in_chunks(loss: ChunkLoss, h_MD: Tensor, head_VD: Tensor) -> Tensor:
    """The sum of a loss over all tokens."""
    if torch.is_grad_enabled() and (h_MD.requires_grad or head_VD.requires_grad):
        total: Tensor = _WithGradients.apply(h_MD, head_VD, loss)
        return total
    total = h_MD.new_zeros((), dtype=torch.float32)
    for start, stop in _spans(h_MD, head_VD):
        total += loss(_logits(h_MD[start:stop], head_VD), start, stop)[0]
    return total


def _spans(h_MD: Tensor, head_VD: Tensor) -> list[tuple[int, int]]:
    tokens = h_MD.shape[0]
    elements = CHUNK_ELEMENTS_CUDA if h_MD.is_cuda else CHUNK_ELEMENTS
    size = max(1, elements // head_VD.shape[0])
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class _WithGradients(torch.autograd.Function):
    """The sum, with the gradients of its hidden states and of the head ready for the backward."""

    @staticmethod
    def forward(ctx: Any, h_MD: Tensor, head_VD: Tensor, loss: ChunkLoss) -> Tensor:
        total = h_MD.new_zeros((), dtype=torch.float32)
        of_h_MD = torch.empty_like(h_MD) if ctx.needs_input_grad[0] else None
        needed = ctx.needs_input_grad[1]
        of_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if needed else None
        for start, stop in _spans(h_MD, head_VD):
            h_CD = h_MD[start:stop]
            value, gradient_CV = loss(_logits(h_CD, head_VD), start, stop)
            total += value
            of_logits_CV = gradient_CV.to(h_CD.dtype)
            if of_h_MD is not None:
                of_h_MD[start:stop] = of_logits_CV @ head_VD
            if of_head_VD is not None:
                of_head_VD += of_logits_CV.T @ h_CD
            del gradient_CV, of_logits_CV  # before the next chunk is made
        ctx.save_for_backward(of_h_MD, of_head_VD)
        ctx.dtype = head_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_h_MD, of_head_VD = ctx.saved_tensors
        of_h_MD = None if of_h_MD is None else of_h_MD * scale  # a scalar, and not to be rounded
        of_head_VD = None if of_head_VD is None else of_head_VD.to(ctx.dtype) * scale
        return of_h_MD, of_head_VD, None
