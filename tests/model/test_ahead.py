"""Reading ahead: the outputs are those of reading on, and only what is kept counts as read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retort.model.ahead import read_ahead
from retort.model.decoder import Decoder
from retort.model.state import AttentionState, DecoderState

KINDS = ["aa", "mm", "dad", "sa"]
READ, AHEAD = 9, 6
"""Longer than the chunks of the mixers, whose convolution reaches back by 3."""


@pytest.fixture(params=KINDS)
def decoder(request: pytest.FixtureRequest, make_decoder: Callable[..., Decoder]) -> Decoder:
    return make_decoder(request.param).double()


@pytest.fixture
def ids_BT() -> Tensor:
    return torch.randint(61, (4, READ + AHEAD + 4))


def begun(decoder: Decoder, ids_BT: Tensor) -> DecoderState:
    """A state of rows that have read different numbers of tokens, `READ` and fewer."""
    state = decoder.init_state(ids_BT.shape[0], 40)
    padding_BT = torch.arange(READ) >= READ - torch.arange(ids_BT.shape[0])[:, None]
    decoder(ids_BT[:, :READ], state, -padding_BT.long())
    return state


def following(ids_BT: Tensor, state: DecoderState, count: int) -> Tensor:
    """The tokens of each row behind those that it has read."""
    return torch.stack(
        [ids_BT[row, start : start + count] for row, start in enumerate(state.length_B.tolist())]
    )


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [2, 3, AHEAD])
def test_outputs_are_those_of_reading_on(decoder: Decoder, ids_BT: Tensor, tokens: int) -> None:
    state = begun(decoder, ids_BT)
    expected_BTV = decoder(ids_BT)
    logits_BTV, _ = read_ahead(decoder, following(ids_BT, state, tokens), state)
    for row, start in enumerate(state.length_B.tolist()):
        found, expected = logits_BTV[row], expected_BTV[row, start : start + tokens]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_nothing_is_read_until_it_is_kept(decoder: Decoder, ids_BT: Tensor) -> None:
    state = begun(decoder, ids_BT)
    before = state.select(range(4))
    read_ahead(decoder, torch.randint(61, (4, AHEAD)), state)
    assert torch.equal(state.length_B, before.length_B)
    then_B1 = following(ids_BT, state, 1)
    assert torch.equal(decoder(then_B1, state), decoder(then_B1, before))


@torch.inference_mode()
@pytest.mark.parametrize("counts", [[0, 1, 2, 6], [6, 6, 6, 6], [4, 3, 5, 1]])
def test_a_row_goes_on_behind_what_it_keeps(
    decoder: Decoder, ids_BT: Tensor, counts: list[int]
) -> None:
    expected_BTV = decoder(ids_BT)
    state, count_B = begun(decoder, ids_BT), torch.tensor(counts)
    ids_BA = following(ids_BT, state, AHEAD)
    dropped_BA = torch.arange(AHEAD) >= count_B[:, None]
    ids_BA = ids_BA.where(~dropped_BA, torch.randint(61, (4, AHEAD)))
    _, ahead = read_ahead(decoder, ids_BA, state)
    ahead.keep(count_B)
    assert state.length_B.tolist() == [READ - i + count for i, count in enumerate(counts)]
    state.reach = READ + AHEAD
    # Once more, since the convolution's past has to be right as well.
    for count in (2, 1):
        lengths = state.length_B.tolist()
        logits_BTV, ahead = read_ahead(decoder, following(ids_BT, state, 2), state)
        for row, start in enumerate(lengths):
            expected = expected_BTV[row, start : start + 2]
            torch.testing.assert_close(logits_BTV[row], expected, atol=1e-5, rtol=0)
        ahead.keep(torch.full((4,), count))
        state.reach += 2


@torch.inference_mode()
def test_first_rows_alone(decoder: Decoder, ids_BT: Tensor) -> None:
    state = begun(decoder, ids_BT)
    before = state.select(range(4))
    some = state.first(2, reach=READ)
    _, ahead = read_ahead(decoder, following(ids_BT, some, 3), some)
    ahead.keep(torch.tensor([3, 2]))
    assert (state.length_B - before.length_B).tolist() == [3, 2, 0, 0]
    for mine, theirs in zip(state.layers, before.layers, strict=True):
        for a, b in zip(mine.tensors(), theirs.tensors(), strict=True):
            assert torch.equal(a[2:], b[2:])
            assert not torch.equal(a[:2], b[:2])


@torch.inference_mode()
def test_a_branch_leaves_its_state_alone(decoder: Decoder, ids_BT: Tensor) -> None:
    state = begun(decoder, ids_BT)
    before, branch = state.select(range(4)), state.branch()
    for _ in range(3):
        decoder(torch.randint(61, (4, 1)), branch)
    assert torch.equal(branch.length_B, state.length_B + 3)
    then_B1 = following(ids_BT, state, 1)
    assert torch.equal(decoder(then_B1, state), decoder(then_B1, before))
    for mine, theirs in zip(state.layers, branch.layers, strict=True):
        assert (mine is theirs) == isinstance(mine, AttentionState), "long caches are not copied"


def test_no_room(make_decoder: Callable[..., Decoder], ids_BT: Tensor) -> None:
    decoder = make_decoder("am")
    state = decoder.init_state(4, 10)
    decoder(ids_BT[:, :8], state)
    with pytest.raises(ValueError, match="room for 10 tokens a row, and this call needs 11"):
        read_ahead(decoder, ids_BT[:, :3], state)
