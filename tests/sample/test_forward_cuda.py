"""A step by kernels for GPUs against the decoder itself, and what the host does for it."""

import gc
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels for GPUs need triton, which is for Linux")

from retort.model.config import DiscreteMamba2Config, Mamba1Config, Mamba2Config, MixerConfig
from retort.model.cost import state_bytes
from retort.model.decoder import Decoder
from retort.ops.cuda.draw import Filters, draw
from retort.sample import engine, prefill, samplers
from retort.sample.cache import CacheSettings
from retort.sample.forward import Forward, Plain
from retort.sample.forward_cuda import Cuda
from retort.sample.graphs import Replayed
from retort.sample.slots import Graphed
from retort.sample.tokens import SamplingParams

Make = Callable[..., Decoder]
SMALL: dict[str, MixerConfig] = {
    "m": Mamba2Config(heads=2, head_dim=8, state_size=4, groups=2),
    "d": DiscreteMamba2Config(heads=2, head_dim=6, state_size=3, groups=1),
    "s": Mamba1Config(heads=4, kv_heads=2, head_dim=4, dt_rank=3, state_size=4),
}


def tiny(make_decoder: Make, layers: str, device: str, **changes: Any) -> Decoder:
    kind = (set(layers) - {"a"} or {""}).pop()
    settings = {"heads": 2, "kv_heads": 1, "mixer": SMALL.get(kind)}
    return make_decoder(layers, **settings | changes).to(device)


def rows(numbers: Sequence[int], device: str) -> Tensor:
    return torch.tensor(numbers, device=device)


@torch.inference_mode()
def scenario(forward: Forward, prompts: Sequence[prefill.Prompt]) -> list[Tensor]:
    """Logits of steps in which rows start together and later, stop and move."""
    device = str(forward.device)
    found: list[Tensor] = []

    def step(tokens: Sequence[int], reach: int) -> None:
        found.append(forward.step(rows(tokens, device), reach).clone())

    forward.admit(rows([0, 1], device), prompts[0].state)
    step([5, 6], 3)
    forward.admit(rows([2], device), prompts[1].state)
    step([7, 8, 9], 7)
    forward.move(rows([0], device), rows([2], device))  # the first row has stopped
    step([10, 11], 8)
    forward.admit(rows([1], device), prompts[0].state)
    step([12, 13], 9)
    return found


@pytest.mark.parametrize(
    ("layers", "changes"),
    [
        ("am", {}),
        ("s", {}),
        ("a", {"qkv_bias": True, "qk_norm": True, "tie_embeddings": True}),
    ],
    ids=["attention and mamba2", "mamba1", "qwen"],
)
def test_steps(layers: str, changes: Any, make_decoder: Make, triton_device: str) -> None:
    decoder = tiny(make_decoder, layers, triton_device, **changes)
    prompts = prefill.read(decoder, [[3, 4], [5, 6, 7, 8, 9]])
    wanted = scenario(Plain(decoder, 3, 12), prompts)
    found = scenario(Cuda(decoder, 3, 12, own_length=4), prompts)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_states_written_now_and_then(make_decoder: Make, triton_device: str) -> None:
    decoder = tiny(make_decoder, "d", triton_device)
    prompts = prefill.read(decoder, [[3, 4], [5, 6, 7, 8, 9]])
    wanted = scenario(Plain(decoder, 3, 12), prompts)
    found = scenario(Cuda(decoder, 3, 12, cache=CacheSettings(write_every=2)), prompts)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_half_precision(make_decoder: Make, triton_device: str) -> None:
    """No further from float32 than torch is."""
    decoder = tiny(make_decoder, "a", triton_device).bfloat16()
    prompts = prefill.read(decoder, [[3, 4], [5, 6, 7, 8, 9]])
    found = torch.cat(scenario(Cuda(decoder, 3, 12), prompts))
    of_torch = torch.cat(scenario(Plain(decoder, 3, 12), prompts))
    decoder = decoder.float()
    prompts = prefill.read(decoder, [[3, 4], [5, 6, 7, 8, 9]])
    precise = torch.cat(scenario(Plain(decoder, 3, 12), prompts))
    assert found.dtype == torch.bfloat16
    mistake, allowed = ((x.float() - precise).abs().mean() for x in (found, of_torch))
    assert mistake <= 1.5 * allowed


class Sampler:
    """A row's registers, and a step that samples: all that a graph holds."""

    def __init__(self, forward: Cuda) -> None:
        self.forward = forward
        device = forward.device
        self.token_S, self.count_S = torch.zeros(2, forward.slots, dtype=torch.long, device=device)
        self.seed_S = torch.arange(forward.slots, device=device)
        self.token_S += 3

    @torch.inference_mode()
    def launch(self, size: int) -> None:
        logits_SV = self.forward.launch(self.token_S[:size])
        seed_S, count_S = self.seed_S[:size], self.count_S[:size]
        token_S, _ = draw(logits_SV, seed_S, count_S, 1.0, Filters())
        self.token_S[:size].copy_(token_S)
        count_S.add_(1)


def sampled(decoder: Decoder, steps: int, replayed: bool, capture: bool) -> list[list[int]]:
    """What three rows of five slots say; the second prompt's row joins after two steps."""
    forward = Cuda(decoder, 5, 30)
    sampler, device = Sampler(forward), str(forward.device)
    graphs = Replayed(forward, capture)
    prompts = prefill.read(decoder, [[3, 4], [5, 6, 7, 8, 9]])
    forward.admit(rows([0, 1], device), prompts[0].state)
    texts = []
    for step in range(steps):
        if step == 2:
            forward.admit(rows([2], device), prompts[1].state)
        count = 3 if step >= 2 else 2
        if replayed:
            graphs.step(count, 20, sampler.launch)
        else:
            forward.prepare(count, 20)
            sampler.launch(count)
        texts.append(sampler.token_S[:count].tolist())
    return texts


def test_rows_that_fill_a_graph_up_change_nothing(make_decoder: Make, triton_device: str) -> None:
    decoder = tiny(make_decoder, "a", triton_device)
    wanted = sampled(decoder, 3, replayed=False, capture=False)
    assert sampled(decoder, 3, replayed=True, capture=False) == wanted


@pytest.mark.cuda
@pytest.mark.parametrize("layers", ["am", "ad", "as"])
def test_graphs(layers: str, make_decoder: Make) -> None:
    decoder = tiny(make_decoder, layers, "cuda")
    wanted = sampled(decoder, 12, replayed=False, capture=False)
    assert sampled(decoder, 12, replayed=True, capture=True) == wanted


def test_a_batch_leaves_no_memory_behind(
    make_decoder: Make, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches and graphs of a batch that has ended must not wait for a collection of garbage."""
    ended: list[weakref.ref[Cuda]] = []

    def open_slots(
        decoder: Decoder,
        slots: int,
        lengths: tuple[int, int],
        params: SamplingParams,
        stops: Collection[int],
        cache: CacheSettings,
    ) -> Graphed:
        forward, capture = Cuda(decoder, slots, *lengths, cache), triton_device == "cuda"
        ended.append(weakref.ref(forward))
        return Graphed(forward, samplers.Plain(params), params.max_tokens, stops, capture)

    monkeypatch.setattr(engine, "open_slots", open_slots)
    sampler = engine.Engine(tiny(make_decoder, "am", triton_device), slots=3)
    gc.disable()
    try:
        sampler.generate([[3, 4], [5, 6]], SamplingParams(n=2, max_tokens=3))
        assert [forward() for forward in ended] == [None]
    finally:
        gc.enable()


# ---------------------------------------------------------------- the host's part


def test_a_prompt_is_kept_only_where_it_is_read(make_decoder: Make, triton_device: str) -> None:
    """A state is copied; keys and values are read where they are."""
    for layers, kept in (("mm", False), ("am", True)):
        decoder = tiny(make_decoder, layers, triton_device)
        forward = Cuda(decoder, 2, 12)
        (prompt,) = prefill.read(decoder, [[3, 4]])
        forward.admit(rows([0, 1], triton_device), prompt.state)
        alive = weakref.ref(prompt.state)
        del prompt
        assert (alive() is not None) == kept


def test_rows_of_a_prompt_are_tiled(make_decoder: Make, triton_device: str) -> None:
    decoder = tiny(make_decoder, "a", triton_device)  # 32 rows of two heads make a tile
    forward = Cuda(decoder, 80, 12)
    prompts = prefill.read(decoder, [[3, 4], [5]])
    forward.admit(torch.arange(70, device=forward.device), prompts[0].state)
    forward.admit(torch.arange(70, 80, device=forward.device), prompts[1].state)
    assert forward.prepare(80, 5) == 4
    tile_TW = forward.shared.rows.tile_TW
    assert [[row for row in tile if row >= 0] for tile in tile_TW[:4].tolist()] == [
        list(range(32)),
        list(range(32, 64)),
        list(range(64, 70)),
        list(range(70, 80)),
    ]
    assert forward.prepare(20, 5) == 1
    assert tile_TW[0].tolist() == [*range(20), *[-1] * 12]


def test_prompts_live_as_long_as_their_rows(make_decoder: Make, triton_device: str) -> None:
    decoder = tiny(make_decoder, "a", triton_device)
    forward = Cuda(decoder, 3, 12)
    one, two = (prompt.state for prompt in prefill.read(decoder, [[3, 4], [5]]))
    forward.admit(rows([0, 1], triton_device), one)
    forward.admit(rows([2], triton_device), two)
    assert forward.sharing.prompts == [one, one, two]
    forward.move(rows([0], triton_device), rows([2], triton_device))
    forward.admit(rows([1, 2], triton_device), two)
    assert forward.sharing.prompts == [two] * 3


def test_bounds_are_checked(make_decoder: Make, triton_device: str) -> None:
    decoder = tiny(make_decoder, "a", triton_device)
    forward = Cuda(decoder, 2, 12, own_length=2)
    with pytest.raises(ValueError, match="room for 12 tokens a row, and this step needs 13"):
        forward.prepare(1, 13)
    state = prefill.read(decoder, [[3, 4]])[0].state
    forward.admit(rows([0], triton_device), state)
    for _ in range(2):
        forward.prepare(1, 5)
    forward.admit(rows([1], triton_device), state)
    with pytest.raises(ValueError, match="room for 2 tokens behind a prompt"):
        forward.prepare(2, 6)


def test_dtypes_are_checked(make_decoder: Make) -> None:
    with pytest.raises(ValueError, match=r"no kernels for torch\.float64"):
        Cuda(make_decoder("a").double(), 1, 8)


def test_bytes_of_states(make_decoder: Make, triton_device: str) -> None:
    decoder = tiny(make_decoder, "am", triton_device)
    whole = Cuda(decoder, 4, 100).nbytes
    half = Cuda(decoder, 4, 100, own_length=50).nbytes
    assert whole - half == 4 * 50 * 2 * 8 * 4  # slots, tokens, keys and values, channels, bytes


def test_bytes_of_states_that_are_written_rarely(make_decoder: Make, triton_device: str) -> None:
    decoder = tiny(make_decoder, "am", triton_device)
    usual, rare = CacheSettings(), CacheSettings(ssm_dtype=torch.bfloat16, write_every=4)
    found = [Cuda(decoder, 3, 20, cache=each).nbytes for each in (usual, rare)]
    counted = [
        3 * state_bytes(decoder.config, 4, each.bytes_of(torch.float32)) for each in (usual, rare)
    ]
    assert found[1] - found[0] == counted[1] - counted[0]
