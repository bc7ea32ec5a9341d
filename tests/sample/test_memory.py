"""How many slots a machine's memory gives."""

from collections.abc import Callable

import pytest
import torch

from retort.model.cost import parameters, state_bytes
from retort.model.decoder import Decoder
from retort.ops.cpu import products
from retort.sample import memory


@pytest.fixture(params=[False, True], ids=["torch", "panels"])
def ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this processor is one for our own products."""
    suited: bool = request.param
    monkeypatch.setattr(products, "suited", lambda: suited)
    return suited


@pytest.mark.parametrize("layers", ["aa", "am", "mm"])
def test_slots_fill_their_share_of_the_free_memory(
    make_decoder: Callable[..., Decoder], layers: str, monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    """Beside a copy of the weights where there is one."""
    decoder = make_decoder(layers)
    states = decoder.init_state(1, 100).nbytes
    logits = 2 * 4 * decoder.config.vocab_size
    copy = 4 * parameters(decoder.config).total if ours else 0
    free = (20.5 * (states + logits) + copy) / memory.SHARE
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    # A row's length is not of its state: 8 bytes more in `nbytes`.
    assert abs(memory.auto_slots([decoder], 100) - 20) <= 1
    assert state_bytes(decoder.config, 4) <= states < parameters(decoder.config).total * 4


@pytest.mark.parametrize("count", [1, 2])
def test_processes_share_what_is_free(
    make_decoder: Callable[..., Decoder], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "suited", lambda: False)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2e6)
    decoders = [make_decoder("am")] * count
    alone, third = (memory.auto_slots(decoders, 100, processes=each) for each in (1, 3))
    assert third > 4
    assert third == alone // 3


def test_a_draft_takes_its_part(
    make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    """Of the slots, and of the room for copies of weights."""
    decoder = make_decoder("am")
    monkeypatch.setattr(products, "suited", lambda: ours)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2e6)
    both = memory.auto_slots([decoder, decoder], 100)
    copy = memory.panel_bytes(decoder)
    assert (copy > 0) == ours
    monkeypatch.setattr(memory, "free_memory", lambda device: 2e6 - copy / memory.SHARE)
    assert both == memory.auto_slots([decoder], 100) // 2 > 4


def test_a_copy_of_weights_where_there_is_room_for_it(
    make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    decoder = make_decoder("am")
    size = memory.weight_bytes(decoder)
    assert size == 4 * parameters(decoder.config).total

    def found(free: float, states: float = 0.0, like: Decoder = decoder) -> int:
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        return memory.panel_bytes(like, states)

    assert found(2 * size) == (size if ours else 0)
    assert found(2 * size - 1) == 0
    assert found(10 * size, 8 * size) == (size if ours else 0)
    assert found(10 * size, 8 * size + 1) == 0
    assert found(1e15, like=make_decoder("am").bfloat16()) == 0
    assert memory.room(decoder) == memory.SHARE * 1e15 - (size if ours else 0)
    published = make_decoder("am").bfloat16().float()
    assert found(size, like=published) == (size // 2 if ours else 0)
    assert found(size - 1, like=published) == 0


@pytest.mark.parametrize(("free", "slots"), [(0.0, 1), (1e15, memory.MOST["cpu"])])
def test_slots_have_bounds(
    make_decoder: Callable[..., Decoder],
    free: float,
    slots: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    assert memory.auto_slots([make_decoder("am")], 100) == slots


def test_free_memory_of_this_machine() -> None:
    assert 2**20 < memory.free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory\nCompile with ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
    ],
    ids=str,
)
def test_what_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert memory.is_out_of_memory(error) == expected
