"""The selective scan: chunked, sequential and step by step are one map, in bounded memory.

Errors are relative to the largest value of a float64 reference.
"""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from retort.ops import scan

PROPERTY = settings(max_examples=25, derandomize=True, deadline=None)


class Inputs(NamedTuple):
    """The arguments of a scan, in its order."""

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    state: Tensor

    def between(self, start: int, stop: int, state: Tensor) -> "Inputs":
        """The tokens start .. stop - 1, from another state."""
        x, dt, b, c = (tensor[:, start:stop] for tensor in (self.x, self.dt, self.b, self.c))
        return Inputs(x, dt, self.a, b, c, state)

    def double(self) -> "Inputs":
        return Inputs(*(tensor.double() for tensor in self))

    def leaves(self) -> "Inputs":
        return Inputs(*(tensor.detach().clone().requires_grad_() for tensor in self))


def inputs(
    length: int,
    heads: int = 2,
    channels: int = 3,
    states: int = 5,
    *,
    dt: float = 1.0,
    batch: int = 2,
) -> Inputs:
    """Random inputs with steps between 0 and `dt`, and rates between -3 and 0."""
    return Inputs(
        torch.randn(batch, length, heads, channels),
        dt * torch.rand(batch, length, heads, channels),
        -3 * torch.rand(heads, channels, states),
        torch.randn(batch, length, heads, states),
        torch.randn(batch, length, heads, states),
        torch.randn(batch, heads, channels, states),
    )


@st.composite
def any_inputs(draw: st.DrawFn, length: int | None = None) -> Inputs:
    """Inputs of any small geometry; some steps are 0, and some forget all there was."""
    torch.manual_seed(draw(st.integers(0, 9999)))
    x = inputs(
        length or draw(st.integers(1, 40)),
        heads=draw(st.integers(1, 3)),
        channels=draw(st.integers(3, 5)),
        states=draw(st.integers(1, 6)),
        dt=draw(st.sampled_from([1e-3, 0.1, 1.0])),
    )
    share = draw(st.sampled_from([0.0, 0.0, 0.1, 0.5]))
    return with_extremes(x, draw(st.sampled_from([0.0, 1e4])), share)


def with_extremes(x: Inputs, dt: float, share: float) -> Inputs:
    """The inputs with a share of their steps, chosen at random, replaced.

    x shrinks as the step grows: one huge update would hide errors in all that follows it.
    """
    chosen = torch.rand_like(x.dt) < share
    x_BTHP = torch.where(chosen, x.x / max(dt, 1), x.x)
    return x._replace(x=x_BTHP, dt=x.dt.masked_fill(chosen, dt))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest error over the largest value. NaN stays: it is not within any bound."""
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))


def check(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def formula(x: Inputs) -> tuple[Tensor, Tensor]:
    """The recurrence in float64, with one loop over tokens and nothing of the package."""
    values, dt, a, b, c, state = x.double()
    outputs = []
    for t in range(values.shape[1]):
        decay = torch.exp(torch.einsum("bhp,hpn->bhpn", dt[:, t], a))
        added = torch.einsum("bhp,bhp,bhn->bhpn", dt[:, t], values[:, t], b[:, t])
        state = decay * state + added
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]))
    return torch.stack(outputs, dim=1), state


def gradients(x: Inputs, scanned: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Gradients of every input, the same ones for any way to scan and any dtype."""
    weights = torch.Generator().manual_seed(1)
    loss = sum((result * torch.randn(result.shape, generator=weights)).sum() for result in scanned)
    return torch.autograd.grad(loss, x)


def check_gradients(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for name, ours, theirs in zip(Inputs._fields, found, wanted, strict=True):
        assert relative_error(ours, theirs) <= 1e-4, name


# ---------------------------------------------------------------- one map


@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 1), (1, 64), (4, 4), (5, 4), (12, 4), (13, 5), (9, 1), (7, 64)]
)
def test_chunks_of_any_size(length: int, chunk: int) -> None:
    """The corners, whatever the property tests happen to draw."""
    x = inputs(length)
    check(scan.scan_chunked(*x, chunk=chunk), formula(x))


@PROPERTY
@given(x=any_inputs(), chunk=st.integers(1, 50))
def test_chunked_equals_the_recurrence(x: Inputs, chunk: int) -> None:
    check(scan.scan_chunked(*x, chunk=chunk), formula(x))


@PROPERTY
@given(x=any_inputs())
def test_steps_equal_the_recurrence(x: Inputs) -> None:
    check(scan.scan_sequential(*x), formula(x))


@PROPERTY
@given(
    parts=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    chunk=st.integers(1, 16),
    data=st.data(),
)
def test_any_split_carries_its_state(parts: list[int], chunk: int, data: st.DataObject) -> None:
    x = data.draw(any_inputs(sum(parts)))
    outputs, state, start = [], x.state, 0
    for part in parts:
        y, state = scan.scan_chunked(*x.between(start, start + part, state), chunk=chunk)
        outputs.append(y)
        start += part
    check((torch.cat(outputs, dim=1), state), formula(x))


@PROPERTY
@given(x=any_inputs(), chunk=st.integers(1, 50))
def test_gradients_equal_those_of_the_recurrence(x: Inputs, chunk: int) -> None:
    ours, theirs = x.leaves(), x.double().leaves()
    found = gradients(ours, scan.scan_chunked(*ours, chunk=chunk))
    check_gradients(found, gradients(theirs, formula(theirs)))


@pytest.mark.parametrize("result", [0, 1])
def test_gradients_equal_finite_differences(result: int) -> None:
    """Also where only the outputs, or only the final state, are used."""
    leaves, document_BT = tuple(inputs(7).double().leaves()), documents([3, 4], batch=2)
    assert torch.autograd.gradcheck(
        lambda *x: scan.scan_chunked(*x, document_BT, 2)[result], leaves
    )


def test_results_have_the_dtype_of_the_inputs() -> None:
    x = inputs(9).double()
    y, last = scan.scan_chunked(*x, chunk=4)
    assert {y.dtype, last.dtype} == {torch.float64}
    assert relative_error(y, formula(x)[0]) <= 1e-12


# ---------------------------------------------------------------- extreme steps


@pytest.mark.parametrize("value", [0.0, 1e5])
def test_tokens_without_a_step_leave_the_state_untouched(value: float) -> None:
    """Padding behind the tokens or among them: the state is the same one, bit by bit."""
    x = inputs(24)
    real = torch.arange(24) < 15
    padded = x._replace(
        x=x.x.masked_fill(~real[:, None, None], value), dt=x.dt * real[:, None, None]
    )
    _, last = scan.scan_chunked(*padded, chunk=8)
    _, wanted = scan.scan_chunked(*x.between(0, 15, x.state), chunk=8)
    assert torch.equal(last, wanted)
    nothing = padded.between(15, 24, x.state)
    assert torch.equal(scan.scan_chunked(*nothing)[1], x.state)
    assert torch.equal(scan.scan_sequential(*nothing)[1], x.state)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("dt", [0.0, 1e-30, 1e-6, 1e4, 1e30])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_extreme_steps(dt: float, share: float, dtype: torch.dtype, bound: float) -> None:
    """Right values, and finite gradients, whether all tokens or some of them are extreme."""
    x = with_extremes(inputs(20), dt, share)
    x = Inputs(*(tensor.to(dtype) for tensor in x)).leaves()
    found = scan.scan_chunked(*x, chunk=8)
    for ours, theirs in zip(found, formula(x), strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) <= bound
    for name, gradient in zip(Inputs._fields, gradients(x, found), strict=True):
        assert gradient.isfinite().all(), name


def test_sixteen_thousand_tokens() -> None:
    """Steps from 1e-6 up to 10, so that decays lie next to 1, next to 0 and in between."""
    length = 16384
    x = inputs(length, heads=1, channels=2, states=2, batch=1)
    x.dt.copy_(10 ** (7 * torch.rand_like(x.dt) - 6))
    x.a.copy_(-torch.rand_like(x.a) - 0.1)
    found = scan.scan_chunked(*x, chunk=128)
    check(found, formula(x))
    for ours, theirs in zip(found, scan.scan_sequential(*x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


# ---------------------------------------------------------------- memory


def saved_bytes(x: Inputs, chunk: int) -> int:
    """Bytes that the backward pass of a scan needs kept, its inputs included."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        scanned = scan.scan_chunked(*x, chunk=chunk)
        gradients_of = [tensor.grad_fn for tensor in scanned]  # keeps what was saved alive
    assert all(gradients_of)
    return sum(kept.values())


def test_memory_is_that_of_the_inputs_and_one_state_a_chunk() -> None:
    length, chunk = 512, 16
    x = inputs(length, heads=1, channels=16, states=16, batch=1).leaves()
    all_states, boundaries = length * x.state.nbytes, length // chunk * x.state.nbytes
    bound = boundaries + sum(tensor.nbytes for tensor in x) + 1024
    assert bound < all_states / 2
    assert saved_bytes(x, chunk) <= bound


# ---------------------------------------------------------------- documents


def documents(lengths: list[int], batch: int) -> Tensor:
    """Ids that go up and down, and never by one: only where they change may matter."""
    ids = (9 * torch.arange(len(lengths)) + 20) % 31
    return torch.repeat_interleave(ids, torch.tensor(lengths)).expand(batch, -1)


def separately(x: Inputs, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Each document alone; the starting state belongs to the first."""
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    outputs, last = [], x.state
    for i, (start, stop) in enumerate(pairwise(ends)):
        state = x.state if i == 0 else torch.zeros_like(x.state)
        y, last = formula(x.between(start, stop, state))
        outputs.append(y)
    return torch.cat(outputs, dim=1), last


@PROPERTY
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    chunk=st.integers(1, 20),
    data=st.data(),
)
def test_packed_documents_equal_separate_ones(
    lengths: list[int], chunk: int, data: st.DataObject
) -> None:
    x = data.draw(any_inputs(sum(lengths)))
    document_BT = documents(lengths, batch=2)
    check(scan.scan_chunked(*x, document_BT, chunk), separately(x, lengths))
    ours, theirs = x.leaves(), x.double().leaves()
    found = gradients(ours, scan.scan_chunked(*ours, document_BT, chunk))
    check_gradients(found, gradients(theirs, separately(theirs, lengths)))


def test_rows_may_hold_different_documents() -> None:
    x = inputs(12)
    rows = [[5, 7], [9, 1, 2]]
    document_BT = torch.cat([documents(lengths, 1) for lengths in rows])
    y, last = scan.scan_chunked(*x, document_BT, chunk=4)
    for i, lengths in enumerate(rows):
        alone = x._replace(
            x=x.x[i : i + 1],
            dt=x.dt[i : i + 1],
            b=x.b[i : i + 1],
            c=x.c[i : i + 1],
            state=x.state[i : i + 1],
        )
        check((y[i : i + 1], last[i : i + 1]), separately(alone, lengths))
