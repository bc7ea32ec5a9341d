"""Losses between token distributions, straight from hidden states, a chunk of tokens at a time.

The logits of a chunk are made, compared and dropped, and made again in the backward pass, so that
never more than a chunk of T x V exists.

Shapes: M tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**23
"""Logits that exist at once: 32 MiB in float32."""

Direction = Literal["forward", "reverse", "jsd"]


def cross_entropy_sum(h_MD: Tensor, head_VD: Tensor, target_M: Tensor) -> Tensor:
    """Sum over tokens of -log p(target)."""

    def loss(h_MD: Tensor, target_M: Tensor) -> Tensor:
        return cross_entropy(_logits(h_MD, head_VD), target_M, reduction="sum")

    return _in_chunks(loss, head_VD.shape[0], h_MD, target_M)


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
    """

    def loss(student_MD: Tensor, teacher_MD: Tensor) -> Tensor:
        student_MV = (_logits(student_MD, student_head_VD) / temperature).log_softmax(-1)
        teacher_MV = (_logits(teacher_MD, teacher_head_VD) / temperature).log_softmax(-1)
        return temperature**2 * _DIVERGENCES[direction](student_MV, teacher_MV)

    return _in_chunks(loss, student_head_VD.shape[0], student_MD, teacher_MD)


def kl_sum(log_p_MV: Tensor, log_q_MV: Tensor) -> Tensor:
    """Sum over tokens of KL(p || q), from log-probabilities."""
    return (log_p_MV.exp() * (log_p_MV - log_q_MV)).sum()


def _forward(student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
    return kl_sum(teacher_MV, student_MV)


def _reverse(student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
    return kl_sum(student_MV, teacher_MV)


def _jsd(student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
    mixture_MV = torch.logaddexp(student_MV, teacher_MV) - log(2)
    return (kl_sum(student_MV, mixture_MV) + kl_sum(teacher_MV, mixture_MV)) / 2


_DIVERGENCES = {"forward": _forward, "reverse": _reverse, "jsd": _jsd}


def _logits(h_MD: Tensor, head_VD: Tensor) -> Tensor:
    return (h_MD @ head_VD.T).float()


def _in_chunks(
    loss: Callable[[Tensor, Tensor], Tensor], vocabulary: int, first_M: Tensor, second_M: Tensor
) -> Tensor:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    total = first_M.new_zeros((), dtype=torch.float32)
    for first, second in zip(first_M.split(size), second_M.split(size), strict=True):
        total = total + checkpoint(loss, first, second, use_reentrant=False)
    return total
