"""The causal convolution: parallel, step by step, and as torch has it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv1d

from retort.ops import conv

CHANNELS = 3


def weights(taps: int) -> tuple[Tensor, Tensor]:
    return torch.randn(CHANNELS, taps), torch.randn(CHANNELS)


def reference(x_BTE: Tensor, weight_EK: Tensor, bias_E: Tensor, before_BKE: Tensor) -> Tensor:
    """torch's convolution over the inputs with what came before them in front."""
    padded_BET = torch.cat([before_BKE, x_BTE], dim=1).transpose(1, 2)
    return conv1d(padded_BET, weight_EK[:, None], bias_E, groups=CHANNELS).transpose(1, 2)


def nothing(taps: int, batch: int = 2) -> Tensor:
    return torch.zeros(batch, taps - 1, CHANNELS)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_scan_equals_torch(taps: int, length: int) -> None:
    weight_EK, bias_E = weights(taps)
    x_BTE, state_BKE = torch.randn(2, length, CHANNELS), torch.randn(2, taps - 1, CHANNELS)
    fresh = conv.scan(x_BTE, weight_EK, bias_E)
    torch.testing.assert_close(fresh, reference(x_BTE, weight_EK, bias_E, nothing(taps)))
    continued = conv.scan(x_BTE, weight_EK, bias_E, state_BKE)
    torch.testing.assert_close(continued, reference(x_BTE, weight_EK, bias_E, state_BKE))


@pytest.mark.parametrize("taps", [2, 4])
def test_steps_equal_scan(taps: int) -> None:
    weight_EK, bias_E = weights(taps)
    x_BTE, state_BKE = torch.randn(2, 7, CHANNELS), torch.randn(2, taps - 1, CHANNELS)
    wanted_BTE = conv.scan(x_BTE, weight_EK, bias_E, state_BKE)
    for t in range(7):
        y_BE, state_BKE = conv.step(x_BTE[:, t], weight_EK, bias_E, state_BKE)
        torch.testing.assert_close(y_BE, wanted_BTE[:, t])
    torch.testing.assert_close(state_BKE, x_BTE[:, -(taps - 1) :])


@pytest.mark.parametrize("with_state", [False, True])
def test_any_split_carries_its_state(with_state: bool) -> None:
    taps = 4
    weight_EK, bias_E = weights(taps)
    x_BTE = torch.randn(2, 9, CHANNELS)
    state_BKE = torch.randn(2, taps - 1, CHANNELS) if with_state else None
    wanted_BTE = conv.scan(x_BTE, weight_EK, bias_E, state_BKE)
    for cut in range(1, 9):
        first, second = x_BTE[:, :cut], x_BTE[:, cut:]
        between = conv.last_inputs(first, taps, torch.tensor([cut, cut]), state_BKE)
        parts = [
            conv.scan(first, weight_EK, bias_E, state_BKE),
            conv.scan(second, weight_EK, bias_E, between),
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), wanted_BTE)


@pytest.mark.parametrize("with_state", [False, True])
def test_last_inputs_of_rows_of_different_lengths(with_state: bool) -> None:
    """Rows shorter than the state's three inputs keep what the state held, or zeros."""
    taps, lengths = 4, [0, 1, 2, 3, 6]
    x_BTE = torch.randn(len(lengths), 6, CHANNELS)
    before_BKE = torch.randn(len(lengths), taps - 1, CHANNELS)
    state_BKE = before_BKE if with_state else None
    found = conv.last_inputs(x_BTE, taps, torch.tensor(lengths), state_BKE)
    history = before_BKE if with_state else torch.zeros_like(before_BKE)
    for row, length in enumerate(lengths):
        wanted = torch.cat([history[row], x_BTE[row, :length]])[-(taps - 1) :]
        torch.testing.assert_close(found[row], wanted)


@settings(max_examples=25, deadline=None)
@given(taps=st.integers(2, 4), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_packed_documents_equal_separate_ones(taps: int, lengths: list[int]) -> None:
    """Documents may be shorter than the filter; a starting state belongs to the first."""
    weight_EK, bias_E = weights(taps)
    x_BTE, state_BKE = torch.randn(1, sum(lengths), CHANNELS), torch.randn(1, taps - 1, CHANNELS)
    document_BT = torch.repeat_interleave(torch.tensor(lengths))[None]
    wanted = [
        reference(part, weight_EK, bias_E, nothing(taps, 1) if i else state_BKE)
        for i, part in enumerate(x_BTE.split(lengths, dim=1))
    ]
    found = conv.scan(x_BTE, weight_EK, bias_E, state_BKE, document_BT)
    torch.testing.assert_close(found, torch.cat(wanted, dim=1))


def test_gradients_equal_those_of_torch() -> None:
    taps = 4
    weight_EK, bias_E = weights(taps)
    x_BTE, state_BKE = torch.randn(2, 6, CHANNELS), torch.randn(2, taps - 1, CHANNELS)
    leaves = [tensor.requires_grad_() for tensor in (x_BTE, weight_EK, bias_E, state_BKE)]
    ours = torch.autograd.grad(conv.scan(*leaves).square().sum(), leaves)
    theirs = torch.autograd.grad(reference(*leaves).square().sum(), leaves)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted)
