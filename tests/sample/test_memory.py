"""How many slots a machine's memory gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from retort.model.cost import parameters, state_bytes
from retort.model.decoder import Decoder
from retort.sample import memory


@pytest.mark.parametrize("layers", ["aa", "am", "mm"])
def test_slots_fill_their_share_of_the_free_memory(
    make_decoder: Callable[..., Decoder], layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(layers)
    states = decoder.init_state(1, 100).nbytes
    logits = 2 * 4 * decoder.config.vocab_size
    free = 20.5 * (states + logits) / memory.SHARE
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    # A row's length is not of its state: 8 bytes more in `nbytes`.
    assert abs(memory.auto_slots([decoder], 100) - 20) <= 1
    assert state_bytes(decoder.config, 4) <= states < parameters(decoder.config).total * 4


def test_a_draft_takes_its_part(
    make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder("am")
    monkeypatch.setattr(memory, "free_memory", lambda device: 2e6)
    alone = memory.auto_slots([decoder], 100)
    assert memory.auto_slots([decoder, decoder], 100) == alone // 2
    assert alone > 4


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
    ("limit", "free"), [("max\n", float("inf")), ("1000\n", 400.0), (None, float("inf"))]
)
def test_a_container_may_take_less(tmp_path: Path, limit: str | None, free: float) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("600\n")
    assert memory.group_memory(tmp_path) == free


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
    ],
    ids=str,
)
def test_what_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert memory.is_out_of_memory(error) == expected
