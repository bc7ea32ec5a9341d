"""The state-space dual: three views of one map, whatever the chunks, splits and documents.

Errors are relative to the largest value of a float64 reference.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retort.ops import ssd

PROPERTY = settings(max_examples=30, derandomize=True, deadline=None)
EXTREME = [0.0, -1e-30, -1e-6, -1e4, -1e31, float("-inf")]


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

    def leaves(self) -> "Inputs":
        return Inputs(*(tensor.detach().clone().requires_grad_() for tensor in self))

    @property
    def length(self) -> int:
        return self.v.shape[1]


def inputs(
    length: int,
    heads: int = 4,
    groups: int = 2,
    channels: int = 3,
    states: int = 5,
    *,
    decay: float = 1.0,
    batch: int = 2,
) -> Inputs:
    """Random inputs with log-decays between -`decay` and 0."""
    return Inputs(
        torch.randn(batch, length, heads, channels),
        -decay * torch.rand(batch, length, heads),
        torch.randn(batch, length, groups, states),
        torch.randn(batch, length, groups, states),
        torch.randn(batch, heads, channels, states),
    )


@st.composite
def any_inputs(draw: st.DrawFn, length: int | None = None) -> Inputs:
    """Inputs of any small geometry, with decays from weak to strong and some that are total."""
    torch.manual_seed(draw(st.integers(0, 9999)))
    groups = draw(st.integers(1, 3))
    x = inputs(
        length or draw(st.integers(1, 40)),
        heads=2 * groups * draw(st.integers(1, 2)),
        groups=groups,
        channels=draw(st.integers(1, 4)),
        states=draw(st.integers(1, 6)),
        decay=draw(st.sampled_from([1e-6, 1e-3, 0.1, 1.0])),
    )
    share = draw(st.sampled_from([0.0, 0.0, 0.1, 0.5]))
    return with_extremes(x, draw(st.sampled_from([-1e4, -1e31, float("-inf")])), share)


def with_extremes(x: Inputs, log_decay: float, share: float) -> Inputs:
    """The inputs with a share of their log-decays, chosen at random, replaced."""
    chosen = torch.rand_like(x.log_decay) < share
    return x._replace(log_decay=x.log_decay.masked_fill(chosen, log_decay))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest error over the largest value. NaN stays: it is not within any bound."""
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    # The floor is for gradients that are all 0: rounding may leave them 1e-17.
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))


def check(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def reference(x: Inputs) -> tuple[Tensor, Tensor]:
    return ssd.scan_sequential(*x.double())


def from_zero(x: Inputs) -> Inputs:
    return x._replace(state=torch.zeros_like(x.state))


def apply(matrix_BHTS: Tensor, v_BTHP: Tensor) -> Tensor:
    return torch.einsum("bhts,bshp->bthp", matrix_BHTS, v_BTHP)


def in_parts(x: Inputs, parts: list[int], chunk: int) -> tuple[Tensor, Tensor]:
    """The scan in several calls, each from the state that the one before it left."""
    outputs, state, start = [], x.state, 0
    for part in parts:
        y, state = ssd.scan_chunked(*x.between(start, start + part, state), chunk=chunk)
        outputs.append(y)
        start += part
    return torch.cat(outputs, dim=1), state


def gradients(x: Inputs, scanned: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Gradients of every input, the same ones for any way to scan and any dtype."""
    weights = torch.Generator().manual_seed(1)
    loss = sum((result * torch.randn(result.shape, generator=weights)).sum() for result in scanned)
    return torch.autograd.grad(loss, x)


# ---------------------------------------------------------------- three views


@PROPERTY
@given(x=any_inputs(), chunk=st.integers(1, 50))
def test_chunked_equals_the_recurrence(x: Inputs, chunk: int) -> None:
    check(ssd.scan_chunked(*x, chunk=chunk), reference(x))


@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 1), (1, 64), (4, 4), (5, 4), (12, 4), (13, 5), (9, 1), (7, 64)]
)
def test_chunks_of_any_size(length: int, chunk: int) -> None:
    """The corners, whatever the property tests happen to draw."""
    x = inputs(length)
    check(ssd.scan_chunked(*x, chunk=chunk), reference(x))


@PROPERTY
@given(x=any_inputs())
def test_steps_equal_the_recurrence(x: Inputs) -> None:
    """`scan_sequential` is made of steps: here the recurrence is written out once more."""
    heads = x.v.shape[2]
    v, log_decay, b, c, state = x.double()
    b, c = (tensor.repeat_interleave(heads // b.shape[2], dim=2) for tensor in (b, c))
    outputs = []
    for t in range(x.length):
        kept = torch.einsum("bh,bhpn->bhpn", log_decay[:, t].exp(), state)
        state = kept + torch.einsum("bhp,bhn->bhpn", v[:, t], b[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]))
    check(ssd.scan_sequential(*x), (torch.stack(outputs, dim=1), state))


@PROPERTY
@given(x=any_inputs())
def test_mixing_matrix_equals_the_recurrence(x: Inputs) -> None:
    matrix_BHTS = ssd.mixing_matrix(x.log_decay, x.b, x.c)
    assert relative_error(apply(matrix_BHTS, x.v), reference(from_zero(x))[0]) <= 1e-5


def test_mixing_matrix_is_the_formula() -> None:
    """Each entry worked out by itself, so that the sequential reference is not all there is."""
    x = inputs(length=5, heads=4, groups=2)
    matrix_BHTS = ssd.mixing_matrix(x.log_decay, x.b, x.c)
    for h in range(4):
        for t in range(5):
            for s in range(5):
                decay = x.log_decay[1, s + 1 : t + 1, h].sum().exp()
                score = x.c[1, t, h // 2] @ x.b[1, s, h // 2]
                wanted = score * decay if s <= t else torch.zeros(())
                torch.testing.assert_close(matrix_BHTS[1, h, t, s], wanted)


@PROPERTY
@given(
    parts=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    chunk=st.integers(1, 16),
    data=st.data(),
)
def test_any_split_carries_its_state(parts: list[int], chunk: int, data: st.DataObject) -> None:
    x = data.draw(any_inputs(sum(parts)))
    check(in_parts(x, parts, chunk), reference(x))


@PROPERTY
@given(x=any_inputs(), chunk=st.integers(1, 50))
def test_gradients_equal_those_of_the_recurrence(x: Inputs, chunk: int) -> None:
    ours, theirs = x.leaves(), x.double().leaves()
    found = gradients(ours, ssd.scan_chunked(*ours, chunk=chunk))
    wanted = gradients(theirs, ssd.scan_sequential(*theirs))
    for name, one, other in zip(Inputs._fields, found, wanted, strict=True):
        assert relative_error(one, other) <= 1e-4, name


def test_gradients_of_a_matrix_are_those_of_its_formula() -> None:
    x = inputs(length=6).double().leaves()
    leaves = (x.log_decay, x.b, x.c)
    assert torch.autograd.gradcheck(ssd.mixing_matrix, leaves)


def test_results_have_the_dtype_of_the_inputs() -> None:
    x = inputs(9).double()
    y, last = ssd.scan_chunked(*x, chunk=4)
    assert {y.dtype, last.dtype} == {torch.float64}
    assert relative_error(y, ssd.scan_sequential(*x)[0]) <= 1e-12


# ---------------------------------------------------------------- extreme decays


@pytest.mark.parametrize("strong", [-50.0, -1e4, -1e31, float("-inf")])
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_strong_decays_among_weak_ones(strong: float, chunk: int) -> None:
    """A total of -1e4 leaves float32 an error of 1e-3: what comes after it must not feel that."""
    x = inputs(40, decay=1e-3)
    x.log_decay[:, [0, 13, 14, 25]] = strong
    check(ssd.scan_chunked(*x, chunk=chunk), reference(x))
    matrix_BHTS = ssd.mixing_matrix(x.log_decay, x.b, x.c)
    assert relative_error(apply(matrix_BHTS, x.v), reference(from_zero(x))[0]) <= 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("log_decay", EXTREME)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_extreme_decays(log_decay: float, share: float, dtype: torch.dtype, bound: float) -> None:
    """Right values, and finite gradients, whether all tokens or some of them are extreme."""
    x = with_extremes(inputs(20), log_decay, share)
    x = Inputs(*(tensor.to(dtype) for tensor in x)).leaves()
    matrix_BHTS = ssd.mixing_matrix(x.log_decay, x.b, x.c)
    found = (*ssd.scan_chunked(*x, chunk=8), apply(matrix_BHTS, x.v))
    for ours, theirs in zip(found, (*reference(x), reference(from_zero(x))[0]), strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) <= bound
    loss = sum(result.square().sum() for result in found)
    for name, gradient in zip(Inputs._fields, torch.autograd.grad(loss, x), strict=True):
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("log_decay", EXTREME)
def test_extreme_decays_in_one_step(log_decay: float) -> None:
    """What a decay of 0 leaves of the state is 0, and what one of 1 leaves is all of it."""
    x = inputs(1)
    x.log_decay.fill_(log_decay)
    nothing = torch.zeros_like(x.v[:, 0])
    _, state = ssd.step(nothing, x.log_decay[:, 0], x.b[:, 0], x.c[:, 0], x.state)
    kept = {0.0: x.state, -1e-30: x.state, -1e-6: x.state * (1 - 1e-6)}
    torch.testing.assert_close(state, kept.get(log_decay, torch.zeros_like(x.state)))


@pytest.mark.parametrize("chunk", [64, 256])
def test_sixteen_thousand_tokens(chunk: int) -> None:
    """Weak decays, two of three heads with strong ones among them; gradients are finite."""
    length = 16384
    x = inputs(length, heads=3, groups=1, channels=2, states=2, batch=1)
    x.log_decay.copy_(-(10 ** -(3 + 3 * torch.rand_like(x.log_decay))))
    for head, strong in ((1, -20.0), (2, float("-inf"))):
        x.log_decay[:, torch.rand(length) < 1e-3, head] = strong
    leaves = x.leaves()
    found = ssd.scan_chunked(*leaves, chunk=chunk)
    check(found, reference(x))
    assert all(gradient.isfinite().all() for gradient in gradients(leaves, found))


class Count(TorchDispatchMode):
    """Counts the operations run under it, those of a backward pass too."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **kwargs or {})


def test_operations_do_not_grow_with_the_length() -> None:
    """Nothing loops over tokens or chunks, forward or backward."""
    counts = set()
    for length in (16, 160):
        x = inputs(length).leaves()
        with Count() as count:
            gradients(x, ssd.scan_chunked(*x, chunk=8))
        counts.add(count.operations)
    assert len(counts) == 1


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
        y, last = ssd.scan_sequential(*x.between(start, stop, state))
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
    check(ssd.scan_chunked(*x, document_BT, chunk), separately(x.double(), lengths))
    ours, theirs = x.leaves(), x.double().leaves()
    found = gradients(ours, ssd.scan_chunked(*ours, document_BT, chunk))
    wanted = gradients(theirs, separately(theirs, lengths))
    for name, one, other in zip(Inputs._fields, found, wanted, strict=True):
        assert relative_error(one, other) <= 1e-4, name


def test_rows_may_hold_different_documents() -> None:
    x = inputs(12)
    rows = [[5, 7], [9, 1, 2]]
    document_BT = torch.cat([documents(lengths, 1) for lengths in rows])
    y, last = ssd.scan_chunked(*x, document_BT, chunk=4)
    for i, lengths in enumerate(rows):
        alone = Inputs(*(tensor[i : i + 1] for tensor in x.double()))
        check((y[i : i + 1], last[i : i + 1]), separately(alone, lengths))


def test_mixing_matrix_is_block_diagonal_over_documents() -> None:
    x, lengths = from_zero(inputs(10)), [3, 1, 6]
    document_BT = documents(lengths, 2)
    matrix_BHTS = ssd.mixing_matrix(x.log_decay, x.b, x.c, document_BT)
    wanted, _ = separately(x.double(), lengths)
    assert relative_error(apply(matrix_BHTS, x.v), wanted) <= 1e-5
    crossing = document_BT[:, :, None] != document_BT[:, None, :]
    assert not matrix_BHTS.masked_select(crossing[:, None]).any()


# The halves of a scan


@PROPERTY
@given(st.integers(1, 20), st.data())
def test_the_halves_of_a_scan_equal_the_recurrence(length: int, data: st.DataObject) -> None:
    x = data.draw(any_inputs(length))
    state_BHPN = x.state.clone()
    y_BTHP = ssd.outputs_ahead(*x)
    assert torch.equal(x.state, state_BHPN)
    ssd.advance_(x.v, x.log_decay, x.b, state_BHPN)
    check((y_BTHP, state_BHPN), ssd.scan_sequential(*x.double()))


def test_a_state_is_advanced_in_place_among_other_rows() -> None:
    x, state_BHPN = inputs(5, batch=2), torch.randn(6, 4, 3, 5)
    before = state_BHPN.clone()
    ssd.advance_(x.v, x.log_decay, x.b, state_BHPN[:2])
    _, expected = ssd.scan_sequential(*x._replace(state=before[:2]))
    torch.testing.assert_close(state_BHPN[:2], expected, atol=1e-5, rtol=0)
    assert torch.equal(state_BHPN[2:], before[2:])
