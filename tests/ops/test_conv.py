"""The causal convolution: parallel, step by step, and as torch has it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.by_kernels import check, check_threads
from torch import Tensor
from torch.nn.functional import conv1d

from retort.ops import conv

CHANNELS = 3
PROPERTY = settings(max_examples=30, derandomize=True, deadline=None)
SEEDS = st.integers(0, 9999)


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


@PROPERTY
@given(taps=st.integers(1, 5), length=st.integers(1, 9), seed=SEEDS)
def test_steps_equal_torch(taps: int, length: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight_EK, bias_E = weights(taps)
    x_BTE, before_BKE = torch.randn(2, length, CHANNELS), torch.randn(2, taps - 1, CHANNELS)
    wanted_BTE = reference(x_BTE, weight_EK, bias_E, before_BKE)
    state_BKE = before_BKE
    for t in range(length):
        y_BE, state_BKE = conv.step(x_BTE[:, t], weight_EK, bias_E, state_BKE)
        torch.testing.assert_close(y_BE, wanted_BTE[:, t])
    history_BTE = torch.cat([before_BKE, x_BTE], dim=1)
    torch.testing.assert_close(state_BKE, history_BTE[:, length:])


@PROPERTY
@given(
    taps=st.integers(1, 5),
    parts=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    with_state=st.booleans(),
    seed=SEEDS,
)
def test_any_split_carries_its_state(
    taps: int, parts: list[int], with_state: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight_EK, bias_E = weights(taps)
    x_BTE = torch.randn(2, sum(parts), CHANNELS)
    state_BKE = torch.randn(2, taps - 1, CHANNELS) if with_state else None
    before_BKE = nothing(taps) if state_BKE is None else state_BKE
    wanted_BTE = reference(x_BTE, weight_EK, bias_E, before_BKE)
    outputs = []
    for part_BTE in x_BTE.split(parts, dim=1):
        outputs.append(conv.scan(part_BTE, weight_EK, bias_E, state_BKE))
        length_B = torch.full((2,), part_BTE.shape[1])
        state_BKE = conv.last_inputs(part_BTE, taps, length_B, state_BKE)
    torch.testing.assert_close(torch.cat(outputs, dim=1), wanted_BTE)


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


@PROPERTY
@given(
    taps=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    with_state=st.booleans(),
    seed=SEEDS,
)
def test_packed_documents_equal_separate_ones(
    taps: int, lengths: list[int], with_state: bool, seed: int
) -> None:
    """Documents may be shorter than the filter; a starting state belongs to the first."""
    torch.manual_seed(seed)
    inputs = (torch.randn(2, sum(lengths), CHANNELS), *weights(taps))
    x_BTE, weight_EK, bias_E = leaves = [tensor.requires_grad_() for tensor in inputs]
    state_BKE = torch.randn(2, taps - 1, CHANNELS) if with_state else None
    before_BKE = nothing(taps) if state_BKE is None else state_BKE
    wanted = torch.cat(
        [
            reference(part_BTE, weight_EK, bias_E, nothing(taps) if i else before_BKE)
            for i, part_BTE in enumerate(x_BTE.split(lengths, dim=1))
        ],
        dim=1,
    )
    found = conv.scan(x_BTE, weight_EK, bias_E, state_BKE, documents(lengths).expand(2, -1))
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    ours = torch.autograd.grad(found, leaves, upstream)
    for one, other in zip(ours, torch.autograd.grad(wanted, leaves, upstream), strict=True):
        torch.testing.assert_close(one, other)


def test_rows_may_hold_different_documents() -> None:
    taps, rows = 4, [[5, 4], [2, 1, 6]]
    weight_EK, bias_E = weights(taps)
    x_BTE = torch.randn(2, 9, CHANNELS)
    document_BT = torch.cat([documents(lengths) for lengths in rows])
    found = conv.scan(x_BTE, weight_EK, bias_E, None, document_BT)
    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            part_BTE = x_BTE[row : row + 1, start : start + length]
            wanted = reference(part_BTE, weight_EK, bias_E, nothing(taps, batch=1))
            torch.testing.assert_close(found[row : row + 1, start : start + length], wanted)
            start += length


def documents(lengths: list[int]) -> Tensor:
    """Ids of one row that go up and down, and never by one: only where they change may matter."""
    ids = (9 * torch.arange(len(lengths)) + 20) % 31
    return torch.repeat_interleave(ids, torch.tensor(lengths))[None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_results_have_the_dtype_of_the_inputs(dtype: torch.dtype) -> None:
    """The state may be in another one: a model's dtype can change between two calls."""
    weight_EK, bias_E = (tensor.to(dtype) for tensor in weights(4))
    x_BTE, state_BKE = torch.randn(2, 6, CHANNELS, dtype=dtype), torch.randn(2, 3, CHANNELS)
    y_BTE = conv.scan(x_BTE, weight_EK, bias_E, state_BKE)
    wanted = reference(x_BTE, weight_EK, bias_E, state_BKE.to(dtype))
    assert y_BTE.dtype == dtype
    torch.testing.assert_close(y_BTE, wanted, rtol=3e-2, atol=3e-2)


def test_gradients_equal_those_of_torch() -> None:
    taps = 4
    weight_EK, bias_E = weights(taps)
    x_BTE, state_BKE = torch.randn(2, 6, CHANNELS), torch.randn(2, taps - 1, CHANNELS)
    leaves = [tensor.requires_grad_() for tensor in (x_BTE, weight_EK, bias_E, state_BKE)]
    ours = torch.autograd.grad(conv.scan(*leaves).square().sum(), leaves)
    theirs = torch.autograd.grad(reference(*leaves).square().sum(), leaves)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradients_of_packed_documents_equal_those_of_separate_ones() -> None:
    """Over more tokens than the backward pass takes at a time."""
    lengths = [conv.BLOCK + 5, 2, conv.BLOCK]
    weight_EK, bias_E = (each.double().requires_grad_() for each in weights(4))
    x_BTE = torch.randn(1, sum(lengths), CHANNELS, dtype=torch.double, requires_grad=True)
    wanted_BTE = torch.randn_like(x_BTE)
    document_BT = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]

    packed_BTE = conv.scan(x_BTE, weight_EK, bias_E, None, document_BT)
    separate = [conv.scan(part, weight_EK, bias_E) for part in x_BTE.split(lengths, dim=1)]
    found, expected = (
        torch.autograd.grad(y_BTE, (x_BTE, weight_EK, bias_E), wanted_BTE)
        for y_BTE in (packed_BTE, torch.cat(separate, dim=1))
    )
    torch.testing.assert_close(found, expected)


@PROPERTY
@given(
    taps=st.integers(1, 5),
    length=st.integers(1, 2 * conv.BLOCK + 3),
    channels=st.sampled_from([1, 15, 16, 40, 300]),
    with_state=st.booleans(),
    packed=st.booleans(),
    activated=st.booleans(),
    seed=SEEDS,
)
def test_kernels_equal_the_plain_form(
    taps: int,
    length: int,
    channels: int,
    with_state: bool,
    packed: bool,
    activated: bool,
    seed: int,
) -> None:
    """What they read lies in wider rows, as a part of a projection does."""
    torch.manual_seed(seed)
    x_BTE = torch.randn(2, length, channels + 3)[..., 1 : 1 + channels]
    before_BKE = torch.randn(2, taps - 1, channels)
    document_BT = torch.randint(3, (2, length)).sort(1).values if packed else None
    inputs = (x_BTE, torch.randn(channels, taps), torch.randn(channels), before_BKE)

    leaves = inputs if with_state and taps > 1 else inputs[:3]

    def scan(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
        return conv.scan(x, weight, bias, before, document_BT, activated)

    check(scan, scan, leaves, 1e-5)  # in float64 there are no kernels


def test_any_number_of_threads_gives_the_same() -> None:
    inputs = torch.randn(2, 200, 600), torch.randn(600, 4), torch.randn(600)
    check_threads(lambda *x: conv.scan(*x, activated=True), inputs)


def test_kernels_hand_on_what_is_not_finite() -> None:
    x_BTE = torch.randn(1, 8, 20)
    x_BTE[0, 3, 5], x_BTE[0, 4, 6] = float("inf"), float("nan")
    inputs = x_BTE, torch.rand(20, 4) + 0.1, torch.randn(20)
    found, wanted = conv.scan(*inputs), conv.scan(*(each.double() for each in inputs)).float()
    torch.testing.assert_close(found, wanted, equal_nan=True)
    assert not found.isfinite().all()
