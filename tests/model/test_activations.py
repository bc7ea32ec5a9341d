"""What blocks keep for their backward pass: the formulas against bytes that are allocated."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.plain import only_torch
from torch.profiler import ProfilerActivity, profile

from retort.model import activations
from retort.model.config import Mamba1Config
from retort.model.decoder import Decoder
from retort.recipe import Parallel
from retort.train.parallel import cast, spread_student
from retort.train.world import open_world

MakeDecoder = Callable[..., Decoder]

ROWS, LENGTH = 2, 72
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 176, "heads": 8, "kv_heads": 4}


def allocations(work: Callable[[], Any]) -> list[int]:
    """The bytes that some work allocates and frees (negative), in order."""
    gc.collect()  # cycles of earlier work are not freed in the middle of this
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        kept = work()
    events = trace.profiler.kineto_results.events()
    found = [(e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]"]
    del kept
    return [size for _, _, size in sorted(found)]


def wide(make_decoder: MakeDecoder, layers: str, **changes: Any) -> Decoder:
    """Wide enough that what is left out, a few bytes a token, is little; four chunks and a half."""
    decoder = make_decoder(layers, **WIDE | changes)
    mixer = decoder.config.mixer
    if mixer is None:
        return decoder
    groups = {} if isinstance(mixer, Mamba1Config) else {"groups": 2}
    settings = {"heads": 8, "chunk_size": 16, "state_size": 8, **groups}
    return make_decoder(layers, **WIDE | changes, mixer=replace(mixer, **settings))


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas are of operators in plain torch; kernels of a CPU keep less."""
    only_torch(monkeypatch)


def kept(decoder: Decoder, recompute: Any, dtype: torch.dtype) -> int:
    """Bytes that stay allocated after the blocks have run, their output among them."""
    settings = Parallel(recompute=recompute)
    with open_world("cpu", settings) as world:
        student = spread_student(decoder.requires_grad_(True), world, settings).student
    cast(student, dtype)
    ids_BT = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    document_BT = (torch.arange(LENGTH) // 40).expand(ROWS, -1).contiguous()
    context = student.context(ids_BT, None, document_BT)
    h_BTD = student.model.embed_tokens(ids_BT).detach().requires_grad_(True)

    def work() -> torch.Tensor:
        output_BTD = h_BTD
        for block in student.blocks:
            output_BTD = block(output_BTD, context)
        return output_BTD

    work()  # what is made once and stays is not counted
    generator = 0 if recompute == "none" else torch.get_rng_state().nbytes  # of each checkpoint
    return sum(allocations(work)) - generator * len(student.blocks)


def expected(decoder: Decoder, recompute: str, size: int) -> float:
    """Less the input of the first block, which was there before, with the last one's output."""
    config = decoder.config
    total = 0.0
    for kind in config.layer_types:
        match recompute:
            case "none":
                total += activations.block(config, kind, LENGTH, size)
            case "selective":
                total += activations.products(config, kind, size)
            case "full":
                total += activations.inputs(config, size)
    if size == 2 and recompute == "none":
        total += size * config.hidden_size  # the output; in float32 the next norm keeps it
    return ROWS * LENGTH * total


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", ["aa", "mm", "dd", "ss", "am", "sa"])
def test_bytes_that_are_kept(
    make_decoder: MakeDecoder, layers: str, dtype: torch.dtype, recompute: str
) -> None:
    decoder = wide(make_decoder, layers)
    found = kept(decoder, recompute, dtype)
    assert expected(decoder, recompute, dtype.itemsize) == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("changes", [{"qk_norm": True}, {"qkv_bias": True}, {"kv_heads": 8}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kinds_of_attention(
    make_decoder: MakeDecoder, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    decoder = wide(make_decoder, "aa", **changes)
    found = kept(decoder, "none", dtype)
    assert expected(decoder, "none", dtype.itemsize) == pytest.approx(found, rel=0.03)
