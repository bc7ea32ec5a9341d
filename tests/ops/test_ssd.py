"""The state-space dual: three views of one map, whatever the chunks, splits and documents."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retort.ops import ssd

HEADS, CHANNELS, STATES = 4, 3, 5


class Inputs(NamedTuple):
    """The arguments of a scan, in its order."""

    v: Tensor
    log_decay: Tensor
    b: Tensor
    c: Tensor
    state: Tensor

    def between(self, start: int, stop: int, state: Tensor) -> "Inputs":
        """The tokens start .. stop - 1, from another state."""
        v, log_decay, b, c = (tensor[:, start:stop] for tensor in self[:4])
        return Inputs(v, log_decay, b, c, state)

    def double(self) -> "Inputs":
        return Inputs(*(tensor.double() for tensor in self))


def inputs(length: int, groups: int = 2, batch: int = 2) -> Inputs:
    return Inputs(
        torch.randn(batch, length, HEADS, CHANNELS),
        -torch.rand(batch, length, HEADS),
        torch.randn(batch, length, groups, STATES),
        torch.randn(batch, length, groups, STATES),
        torch.randn(batch, HEADS, CHANNELS, STATES),
    )


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def apply(matrix_BHTS: Tensor, v_BTHP: Tensor) -> Tensor:
    return torch.einsum("bhts,bshp->bthp", matrix_BHTS, v_BTHP)


# ---------------------------------------------------------------- three views


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 4), (4, 4), (5, 4), (12, 4), (13, 5), (9, 1), (7, 64), (70, 64)]
)
def test_chunked_equals_sequential(length: int, chunk: int, groups: int) -> None:
    given_ = inputs(length, groups)
    y, last = ssd.scan_chunked(*given_, chunk=chunk)
    wanted_y, wanted_last = ssd.scan_sequential(*given_)
    assert relative_error(y, wanted_y) <= 1e-5
    assert relative_error(last, wanted_last) <= 1e-5


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_mixing_matrix_equals_sequential(length: int, groups: int) -> None:
    x = inputs(length, groups)
    wanted, _ = ssd.scan_sequential(*x._replace(state=torch.zeros_like(x.state)))
    matrix_BHTS = ssd.mixing_matrix(x.log_decay, x.b, x.c)
    assert relative_error(apply(matrix_BHTS, x.v), wanted) <= 1e-5


def test_mixing_matrix_is_the_formula() -> None:
    """Each entry worked out by itself, so that the sequential reference is not all there is."""
    x = inputs(length=5)
    matrix_BHTS = ssd.mixing_matrix(x.log_decay, x.b, x.c)
    for h in range(HEADS):
        group = h // 2  # two groups for four heads
        for t in range(5):
            for s in range(5):
                decay = x.log_decay[1, s + 1 : t + 1, h].sum().exp()
                wanted = (
                    (x.c[1, t, group] @ x.b[1, s, group]) * decay if s <= t else torch.zeros(())
                )
                torch.testing.assert_close(matrix_BHTS[1, h, t, s], wanted)


@settings(max_examples=25, deadline=None)
@given(
    chunk=st.integers(1, 12),
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    groups=st.sampled_from([1, 2, HEADS]),
)
def test_any_split_carries_its_state(chunk: int, parts: list[int], groups: int) -> None:
    x = inputs(sum(parts), groups, batch=1)
    wanted_y, wanted_last = ssd.scan_sequential(*x)
    outputs, state, start = [], x.state, 0
    for part in parts:
        y, state = ssd.scan_chunked(*x.between(start, start + part, state), chunk=chunk)
        outputs.append(y)
        start += part
    assert relative_error(torch.cat(outputs, dim=1), wanted_y) <= 1e-5
    assert relative_error(state, wanted_last) <= 1e-5


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_gradients_equal_those_of_the_recurrence(chunk: int, groups: int) -> None:
    x = inputs(11, groups)
    weight_y, weight_last = torch.randn_like(x.v), torch.randn_like(x.state)

    def gradients(scanned: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        y, last = scanned
        return torch.autograd.grad((y * weight_y).sum() + (last * weight_last).sum(), x)

    for tensor in x:
        tensor.requires_grad_()
    wanted = gradients(ssd.scan_sequential(*x))
    for ours, theirs in zip(gradients(ssd.scan_chunked(*x, chunk=chunk)), wanted, strict=True):
        assert relative_error(ours, theirs) <= 1e-4


def test_results_have_the_dtype_of_the_inputs() -> None:
    x = inputs(9).double()
    y, last = ssd.scan_chunked(*x, chunk=4)
    assert {y.dtype, last.dtype} == {torch.float64}
    assert relative_error(y, ssd.scan_sequential(*x)[0]) <= 1e-12


# ---------------------------------------------------------------- strong decays


@pytest.mark.parametrize("strong", [-50.0, -1e4])
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_strong_decays_among_weak_ones(strong: float, chunk: int) -> None:
    """A total of -1e4 leaves float32 an error of 1e-3: what comes after it must not feel that."""
    x = inputs(40)
    x.log_decay.mul_(1e-3)
    x.log_decay[:, [0, 13, 14, 25]] = strong
    wanted_y, wanted_last = ssd.scan_sequential(*x.double())
    y, last = ssd.scan_chunked(*x, chunk=chunk)
    assert relative_error(y, wanted_y) <= 1e-5
    assert relative_error(last, wanted_last) <= 1e-5
    matrix_BHTS = ssd.mixing_matrix(x.log_decay, x.b, x.c)
    wanted, _ = ssd.scan_sequential(*x._replace(state=torch.zeros_like(x.state)).double())
    assert relative_error(apply(matrix_BHTS, x.v), wanted) <= 1e-5


@pytest.mark.parametrize("strong", [-50.0, -1e4])
def test_strong_decays_have_finite_gradients(strong: float) -> None:
    x = inputs(20)
    x.log_decay[:, 7] = strong
    for tensor in x:
        tensor.requires_grad_()
    y, last = ssd.scan_chunked(*x, chunk=8)
    gradients = torch.autograd.grad(y.square().sum() + last.square().sum(), x)
    assert all(gradient.isfinite().all() for gradient in gradients)


# ---------------------------------------------------------------- documents


def documents(lengths: list[int], batch: int) -> Tensor:
    """Ids that grow by more than one: only where they change may matter."""
    ids = torch.tensor([2 * i + 3 for i, length in enumerate(lengths) for _ in range(length)])
    return ids.expand(batch, -1)


def separately(x: Inputs, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Each document alone; the starting state belongs to the first."""
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    outputs, last = [], x.state
    for i, (start, stop) in enumerate(pairwise(ends)):
        state = x.state if i == 0 else torch.zeros_like(x.state)
        y, last = ssd.scan_sequential(*x.between(start, stop, state))
        outputs.append(y)
    return torch.cat(outputs, dim=1), last


@settings(max_examples=25, deadline=None)
@given(chunk=st.integers(1, 9), lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_packed_documents_equal_separate_ones(chunk: int, lengths: list[int]) -> None:
    x = inputs(sum(lengths), batch=1)
    y, last = ssd.scan_chunked(*x, documents(lengths, 1), chunk)
    wanted_y, wanted_last = separately(x, lengths)
    assert relative_error(y, wanted_y) <= 1e-5
    assert relative_error(last, wanted_last) <= 1e-5


def test_rows_may_hold_different_documents() -> None:
    x = inputs(12)
    rows = [[5, 7], [9, 1, 2]]
    document_BT = torch.cat([documents(lengths, 1) for lengths in rows])
    y, last = ssd.scan_chunked(*x, document_BT, chunk=4)
    for i, lengths in enumerate(rows):
        alone = Inputs(*(tensor[i : i + 1] for tensor in x))
        wanted_y, wanted_last = separately(alone, lengths)
        assert relative_error(y[i : i + 1], wanted_y) <= 1e-5
        assert relative_error(last[i : i + 1], wanted_last) <= 1e-5


def test_mixing_matrix_is_block_diagonal_over_documents() -> None:
    x, lengths = inputs(10), [3, 1, 6]
    x = x._replace(state=torch.zeros_like(x.state))
    document_BT = documents(lengths, 2)
    matrix_BHTS = ssd.mixing_matrix(x.log_decay, x.b, x.c, document_BT)
    wanted, _ = separately(x, lengths)
    assert relative_error(apply(matrix_BHTS, x.v), wanted) <= 1e-5
    crossing = document_BT[:, :, None] != document_BT[:, None, :]
    assert not matrix_BHTS.masked_select(crossing[:, None]).any()
