"""States as data: forked, selected, and put into the slots of a longer one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retort.model.decoder import Decoder
from retort.model.state import DecoderState

MakeDecoder = Callable[..., Decoder]
KINDS = ["a", "m", "am", "d", "ad", "s", "as"]


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(61, (rows, length))


def prefilled(decoder: Decoder, ids_BT: Tensor, max_length: int) -> DecoderState:
    state = decoder.init_state(len(ids_BT), max_length)
    decoder(ids_BT, state)
    return state


def stepped(decoder: Decoder, state: DecoderState, ids_BT: Tensor) -> Tensor:
    return torch.cat([decoder(ids_BT[:, t : t + 1], state) for t in range(ids_BT.shape[1])], dim=1)


@pytest.mark.parametrize("layers", KINDS)
def test_forked_rows_equal_independent_runs(make_decoder: MakeDecoder, layers: str) -> None:
    decoder, prompts, answers = make_decoder(layers), tokens(2, 5), tokens(6, 4)
    forked = prefilled(decoder, prompts, 9).fork(3)
    assert forked.batch == 6
    found = stepped(decoder, forked, answers)
    whole = torch.cat([prompts.repeat_interleave(3, dim=0), answers], dim=1)
    torch.testing.assert_close(found, decoder(whole)[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", KINDS)
def test_a_fork_is_a_copy(make_decoder: MakeDecoder, layers: str) -> None:
    """What is read after it changes neither the state it comes from nor the other copies."""
    decoder = make_decoder(layers)
    state = prefilled(decoder, tokens(1, 5), 9)
    before = [tensor.clone() for layer in state.layers for tensor in layer.tensors()]
    decoder(tokens(2, 1), state.fork(2))
    after = [tensor for layer in state.layers for tensor in layer.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert state.length_B.tolist() == [5]
    assert state.reach == 5


@pytest.mark.parametrize("layers", KINDS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_selected_rows_continue(make_decoder: MakeDecoder, layers: str, as_tensor: bool) -> None:
    decoder, prompts, rows = make_decoder(layers), tokens(3, 4), [2, 0, 2]
    state = prefilled(decoder, prompts, 6).select(torch.tensor(rows) if as_tensor else rows)
    more = tokens(3, 2)
    wanted = decoder(torch.cat([prompts[rows], more], dim=1))[:, 4:]
    torch.testing.assert_close(stepped(decoder, state, more), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", KINDS)
def test_rows_put_into_slots_of_a_longer_state(make_decoder: MakeDecoder, layers: str) -> None:
    """Slots that others have used; the rows beside them go on undisturbed."""
    decoder, old, new = make_decoder(layers), tokens(4, 7), tokens(2, 3)
    slots = [3, 1]
    state = prefilled(decoder, old, 12)
    state.put(slots, prefilled(decoder, new, 5))
    assert state.length_B.tolist() == [7, 3, 7, 3]
    assert state.reach == 7
    more = tokens(4, 4)
    found = stepped(decoder, state, more)
    prompts = [old[0], new[1], old[2], new[0]]
    for row, prompt in enumerate(prompts):
        wanted = decoder(torch.cat([prompt, more[row]])[None])[0, len(prompt) :]
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)


def test_a_longer_row_raises_the_reach(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("a")
    state = prefilled(decoder, tokens(2, 2), 9)
    state.put([0], prefilled(decoder, tokens(1, 6), 9))
    assert state.reach == 6


def test_bytes_are_counted(make_decoder: MakeDecoder) -> None:
    """float32: keys and values of 2 heads x 8; S of 4 x 16 x 8; 3 inputs of 96 conv channels."""
    attention, mamba = 2 * 10 * 2 * 8, 4 * 16 * 8 + 3 * 96
    assert make_decoder("am").init_state(3, 10).nbytes == 3 * 4 * (attention + mamba)
    half = make_decoder("am").to(torch.bfloat16).init_state(3, 10)
    assert half.nbytes == 3 * (2 * attention + 4 * 4 * 16 * 8 + 2 * 3 * 96)


@pytest.mark.parametrize("layers", KINDS)
def test_one_row_put_into_many_slots(make_decoder: MakeDecoder, layers: str) -> None:
    decoder, old, prompt = make_decoder(layers), tokens(3, 4), tokens(1, 6)
    state = prefilled(decoder, old, 9)
    state.put([0, 2], prefilled(decoder, prompt, 7))
    more = tokens(3, 2)
    found = stepped(decoder, state, more)
    for row, start in enumerate([prompt[0], old[1], prompt[0]]):
        wanted = decoder(torch.cat([start, more[row]])[None])[0, len(start) :]
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", KINDS)
def test_first_rows_are_views(make_decoder: MakeDecoder, layers: str) -> None:
    """Steps of the first rows alone move the whole state on, and leave its other rows."""
    decoder, prompts, more = make_decoder(layers), tokens(3, 4), tokens(3, 3)
    state = prefilled(decoder, prompts, 9)
    stepped(decoder, state.first(2, reach=4), more[:2, :2])
    assert state.length_B.tolist() == [6, 6, 4]
    state.reach = 6
    last = decoder(torch.stack([more[0, 2], more[1, 2], more[2, 0]])[:, None], state)
    for row, read in enumerate([3, 3, 1]):
        wanted = decoder(torch.cat([prompts[row], more[row, :read]])[None])[0, -1]
        torch.testing.assert_close(last[row, 0], wanted, rtol=1e-4, atol=1e-5)
