"""The CPU's own forward against the plain one: the same logits, whatever rows come and go."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from weakref import ReferenceType, ref

import numpy as np
import pytest
import torch
from torch import Tensor

from retort.model import weights
from retort.model.config import Mamba1Config
from retort.model.decoder import Decoder
from retort.ops.cpu import products
from retort.ops.cpu.team import ALONE
from retort.sample import cpu_prompts, forward_cpu, memory, prefill
from retort.sample.cpu_products import Matrix, Panels
from retort.sample.forward import Forward, Plain
from retort.sample.forward_cpu import Cpu
from retort.sample.prefill import Prompt

Make = Callable[..., Decoder]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
PROMPTS = [[1, 2, 3], [5], list(range(7, 20))]
LONG = [[i % 61 for i in range(40)], [1, 2], [i * i % 61 for i in range(50)]]
AT_ONCE = 200  # tokens of so many rows of a prompt: 5 of the first, 4 of the last
MIXERS = ["a", "m", "d", "s"]
HYBRIDS = ["am", "mam", "da", "ssa"]


def bfloat16(decoder: Decoder, slots: int, room: int) -> Cpu:
    return Cpu(decoder, slots, room, kv_dtype=torch.bfloat16)


class Pair:
    """Two forwards that are told the same, and must answer the same."""

    def __init__(
        self,
        decoder: Decoder,
        slots: int,
        room: int,
        threads: int = 1,
        prompts: Sequence[Sequence[int]] = PROMPTS,
    ) -> None:
        self.prompts = prefill.read(decoder, prompts)
        plain = Plain(deepcopy(decoder), slots, room)
        self.forwards: list[Forward] = [plain, Cpu(decoder, slots, room, threads=threads)]
        self.reach = max(len(prompt) for prompt in prompts)

    def admit(self, slots: Sequence[int], prompt: int) -> None:
        for forward in self.forwards:
            forward.admit(torch.tensor(slots), self.prompts[prompt].state)

    def move(self, slots: Sequence[int], sources: Sequence[int]) -> None:
        for forward in self.forwards:
            forward.move(torch.tensor(slots), torch.tensor(sources))

    def step(self, rows: int, times: int = 1) -> None:
        for _ in range(times):
            self.reach += 1
            token_S = torch.randint(0, 61, (rows,))
            wanted_SV, found_SV = (each.step(token_S, self.reach) for each in self.forwards)
            torch.testing.assert_close(found_SV, wanted_SV, **CLOSE)


def come_and_go(decoder: Decoder, threads: int = 1) -> None:
    """Rows of three prompts, of which some end, move and make room for others."""
    pair = Pair(decoder, 6, 40, threads)
    pair.admit([0, 1], 0)
    pair.step(2, 3)
    pair.admit([2], 1)
    pair.admit([3, 4, 5], 2)
    pair.step(6, 5)
    pair.move([1, 2], [5, 4])
    pair.step(4, 2)
    pair.admit([3, 4], 1)
    pair.move([0], [4])
    pair.step(3, 4)
    pair.admit([0, 1, 2, 3, 4, 5], 0)
    pair.step(6, 2)


@pytest.fixture(params=[False, True], ids=["torch", "panels"])
def ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this processor is one for our own products."""
    suited: bool = request.param
    monkeypatch.setattr(products, "suited", lambda: suited)
    return suited


@pytest.mark.parametrize("layers", MIXERS + HYBRIDS)
def test_rows_come_and_go(make_decoder: Make, layers: str, ours: bool) -> None:
    come_and_go(make_decoder(layers))


@pytest.mark.parametrize("layers", ["am", "d", "s"])
def test_own_products_of_a_row_whatever_shares_its_step(
    make_decoder: Make, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: neither the number of rows nor a row's place decides how it is summed up."""
    monkeypatch.setattr(products, "suited", lambda: True)
    decoder = make_decoder(layers)
    (prompt, *_) = prefill.read(decoder, PROMPTS)
    few, many = (Cpu(decoder, slots, 30, threads=threads) for slots, threads in ((2, 1), (70, 2)))
    few.admit(torch.tensor([0, 1]), prompt.state)
    many.admit(torch.arange(70), prompt.state)
    for reach in range(4, 9):
        token_S = torch.randint(0, 61, (70,))
        found_SV = many.step(token_S, reach)
        assert torch.equal(few.step(token_S[[3, 69]], reach), found_SV[[3, 69]])
        few.move(torch.tensor([0]), torch.tensor([1]))
        many.move(torch.tensor([3]), torch.tensor([69]))


@pytest.mark.parametrize("layers", ["a", "am"])
@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True},
        {"qk_norm": True, "norm_eps": 1e-2},
        {"qkv_bias": True, "qk_norm": True, "kv_heads": 4},
        {"tie_embeddings": True, "kv_heads": 1, "head_dim": 6},
        {"hidden_size": 256, "intermediate_size": 128},  # what would be aliased is padded
    ],
)
def test_kinds_of_attention_and_head(make_decoder: Make, layers: str, changes: dict) -> None:
    come_and_go(make_decoder(layers, **changes))


def test_released_mamba1(make_decoder: Make) -> None:
    mixer = make_decoder("s").config.mixer
    assert isinstance(mixer, Mamba1Config)
    come_and_go(make_decoder("sa", mixer=replace(mixer, released_quirks=True)))


@pytest.mark.parametrize("taps", [1, 2, 3])
@pytest.mark.parametrize("layers", ["m", "d", "s"])
def test_other_convolutions(make_decoder: Make, layers: str, taps: int) -> None:
    mixer = make_decoder(layers).config.mixer
    assert mixer is not None
    come_and_go(make_decoder(layers, mixer=replace(mixer, conv_width=taps)))


@pytest.mark.parametrize("layers", MIXERS)
def test_two_threads(make_decoder: Make, layers: str) -> None:
    """With as many rows as it takes to share the work."""
    pair = Pair(make_decoder(layers), 90, 30, threads=2)
    pair.admit(range(60), 2)
    pair.admit(range(60, 90), 0)
    pair.step(90, 5)
    pair.step(77, 5)


@pytest.mark.parametrize("layers", ["am", "d", "s"])
def test_long_rows_do_not_drift(make_decoder: Make, layers: str) -> None:
    pair = Pair(make_decoder(layers), 2, 260)
    pair.admit([0], 0)
    pair.admit([1], 2)
    pair.step(2, 230)


# ---------------------------------------------------------------- prompts that rows share


@pytest.fixture
def soon_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that are too short to be shared otherwise."""
    monkeypatch.setattr(cpu_prompts, "WORTHWHILE", AT_ONCE)


@pytest.mark.usefixtures("soon_shared")
@pytest.mark.parametrize("layers", ["a", "am", "sa"])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_share_prompts(make_decoder: Make, layers: str, threads: int) -> None:
    """Beside others that do not, while rows of all kinds come, move and go."""
    decoder = make_decoder(layers, qkv_bias=True)
    pair = Pair(decoder, 16, 90, threads, LONG)
    cpu = pair.forwards[1]
    assert isinstance(cpu, Cpu)
    pair.admit(range(5), 0)
    pair.step(5, 2)
    pair.admit([5, 6], 1)
    pair.admit(range(7, 14), 2)
    pair.admit([14], 0)  # joins the others
    pair.admit([15], 1)
    assert cpu.shared.prompts.start_S.tolist() == [40] * 5 + [0] * 2 + [50] * 7 + [40, 0]
    pair.step(16, 3)
    pair.move([0, 5], [15, 13])
    pair.step(13, 3)
    pair.admit([2, 3], 2)
    pair.move([1], [4])
    pair.step(4, 3)
    pair.admit(range(4), 1)
    pair.step(4, 3)


@pytest.mark.usefixtures("soon_shared")
def test_who_shares_a_prompt(make_decoder: Make) -> None:
    """Rows from the fifth on, however they come; a copy that has gone does not count."""
    decoder = make_decoder("am")
    long, short, _ = prefill.read(decoder, LONG)
    forward = Cpu(decoder, 12, 60)
    start_S = forward.shared.prompts.start_S
    forward.admit(torch.arange(6, 12), short.state)
    forward.admit(torch.arange(3), long.state)
    forward.admit(torch.tensor([3]), long.state)
    forward.admit(torch.tensor([3]), long.state)
    assert not start_S.any()
    forward.move(torch.tensor([4]), torch.tensor([0]))
    forward.admit(torch.tensor([0]), long.state)
    assert start_S.tolist() == [40] + [0] * 11


@pytest.mark.usefixtures("soon_shared")
def test_nothing_is_shared_without_attention(make_decoder: Make) -> None:
    decoder = make_decoder("m")
    forward = Cpu(decoder, 8, 60)
    forward.admit(torch.arange(8), prefill.read(decoder, LONG[:1])[0].state)
    assert not forward.shared.prompts.start_S.any()


@pytest.mark.usefixtures("soon_shared")
def test_prompts_without_rows_are_forgotten(make_decoder: Make) -> None:
    """Whether other prompts, with or without copies, took their places, or other rows."""
    decoder = make_decoder("a")
    forward = Cpu(decoder, 6, 60)
    left: list[ReferenceType[object]] = []
    for turn in range(30):
        for prompt in prefill.read(decoder, LONG):
            left.append(ref(prompt.state))
            forward.admit(torch.arange(5), prompt.state)
            forward.admit(torch.arange(turn % 5, 6), prompt.state)
            forward.step(torch.zeros(6, dtype=torch.long), 60)
            forward.move(torch.tensor([0]), torch.tensor([5]))
        del prompt
    assert sum(each() is not None for each in left) <= 1


def test_keys_and_values_in_bfloat16(make_decoder: Make) -> None:
    decoder = make_decoder("aa")
    (prompt,) = prefill.read(decoder, PROMPTS[2:])
    precise, coarse = Cpu(decoder, 3, 40), bfloat16(decoder, 3, 40)
    for step in range(12):
        token_S = torch.randint(0, 61, (3,))
        if step == 0:
            precise.admit(torch.arange(3), prompt.state)
            coarse.admit(torch.arange(3), prompt.state)
        if step == 6:
            precise.move(torch.tensor([0]), torch.tensor([2]))
            coarse.move(torch.tensor([0]), torch.tensor([2]))
        wanted_SV, found_SV = (each.step(token_S, 40) for each in (precise, coarse))
        assert not torch.equal(found_SV, wanted_SV)
        torch.testing.assert_close(found_SV, wanted_SV, atol=0.05, rtol=0.02)
    assert coarse.nbytes == precise.nbytes / 2


@pytest.mark.parametrize("layers", ["am", "sa"])
def test_state_takes_as_much_as_the_plain_one(make_decoder: Make, layers: str) -> None:
    decoder = make_decoder(layers)
    assert Cpu(decoder, 5, 30).nbytes == Plain(decoder, 5, 30).nbytes


def test_inference_mode_may_begin_and_end_anywhere(make_decoder: Make) -> None:
    decoder = make_decoder("am")
    (prompt,) = prefill.read(decoder, PROMPTS[:1])
    with torch.inference_mode():
        forward = Cpu(decoder, 2, 30)
    forward.admit(torch.arange(2), prompt.state)
    forward.step(torch.tensor([3, 4]), 4)
    forward.move(torch.tensor([0]), torch.tensor([1]))
    with torch.inference_mode():
        forward.step(torch.tensor([3, 4]), 5)


def test_prompt_stays_as_it_is(make_decoder: Make) -> None:
    decoder = make_decoder("am")
    (prompt,) = prefill.read(decoder, PROMPTS[:1])
    before = [tensor.clone() for layer in prompt.state.layers for tensor in layer.tensors()]
    forward = Cpu(decoder, 2, 30)
    forward.admit(torch.arange(2), prompt.state)
    first_SV = forward.step(torch.tensor([3, 4]), 4).clone()
    after = [tensor for layer in prompt.state.layers for tensor in layer.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    forward.admit(torch.arange(2), prompt.state)
    assert torch.equal(forward.step(torch.tensor([3, 4]), 4), first_SV)


# ---------------------------------------------------------------- the decoder's weights


def everything(decoder: Decoder) -> Tensor:
    return decoder(torch.arange(24).reshape(2, 12))


@pytest.mark.parametrize("layers", ["am", "d", "s"])
def test_decoder_stays_of_use(make_decoder: Make, layers: str, ours: bool) -> None:
    decoder = make_decoder(layers, qkv_bias=True)
    before, parameters = everything(decoder), deepcopy(decoder.state_dict())
    Cpu(decoder, 1, 10)
    torch.testing.assert_close(everything(decoder), before)
    for name, weight in decoder.state_dict().items():
        assert torch.equal(weight, parameters[name])


def test_weights_are_not_held_twice(make_decoder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "suited", lambda: False)
    decoder = make_decoder("am")
    one, other = Cpu(decoder, 1, 10), Cpu(decoder, 2, 10)
    weight = decoder.blocks[0].mlp.up_proj.weight
    shared = weight.untyped_storage().data_ptr()
    for forward in (one, other):
        held, head = forward.mlps[0].gate_and_up, forward.head
        assert isinstance(held, Matrix)
        assert isinstance(head, Matrix)
        assert held.weight_IO.untyped_storage().data_ptr() == shared
        assert head.packed is None
        assert head.weight_IO.data_ptr() == decoder.lm_head.weight.data_ptr()


def test_own_products_where_there_is_room(
    make_decoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's own weights stay where they are. Torch multiplies where memory is short, or our
    kernels have fewer threads than it.
    """
    monkeypatch.setattr(products, "suited", lambda: True)
    decoder = make_decoder("am").requires_grad_(False)
    places = {name: p.data_ptr() for name, p in decoder.named_parameters()}
    size = memory.weight_bytes(decoder)
    slots = 1 + size // Cpu(decoder, 1, 30).nbytes
    states = Cpu(decoder, slots, 30).nbytes
    assert places == {name: p.data_ptr() for name, p in decoder.named_parameters()}

    def kind() -> type:
        return type(Cpu(decoder, slots, 30).head)

    monkeypatch.setattr(memory, "free_memory", lambda device: (size + states) / memory.FULL + 1)
    assert kind() is Panels
    monkeypatch.setattr(memory, "free_memory", lambda device: (size + states) / memory.FULL - 1)
    assert kind() is Matrix
    monkeypatch.undo()
    monkeypatch.setattr(products, "suited", lambda: True)
    monkeypatch.setattr(forward_cpu, "of_threads", lambda threads: ALONE)
    assert type(Cpu(decoder, 8, 30, threads=2).head) is Matrix
    assert type(Cpu(decoder, 8, 30, threads=1).head) is Panels


@pytest.mark.parametrize("layers", ["am", "d", "s"])
def test_a_published_models_weights_in_half_the_bytes(
    make_decoder: Make, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they come from a folder in bfloat16: to the last bit what the same in float32 gives."""
    monkeypatch.setattr(products, "suited", lambda: True)
    decoder = make_decoder(layers, qkv_bias=True).bfloat16().float()
    half = Cpu(decoder, 3, 20)
    monkeypatch.setattr(products, "itemsize", lambda weight: 4)
    whole = Cpu(decoder, 3, 20)
    (prompt,) = prefill.read(decoder, [[1, 2, 3]])
    for forward, dtype in ((half, np.uint16), (whole, np.float32)):
        assert isinstance(forward.head, Panels)
        assert forward.head.arrays[1].dtype == dtype
        forward.admit(torch.arange(3), prompt.state)
    for token in range(4):
        token_S = torch.tensor([token, 2 * token, 3 * token])
        assert torch.equal(half.step(token_S, 4 + token), whole.step(token_S, 4 + token))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch multiplies without MKL")
@pytest.mark.parametrize("layers", ["am", "d", "s"])
def test_packed_weights_where_there_is_room(
    make_decoder: Make, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "suited", lambda: False)
    decoder = make_decoder(layers, qkv_bias=True)
    pair = Pair(decoder, 16, 30)
    forward = pair.forwards[1]
    assert isinstance(forward, Cpu)
    assert isinstance(forward.head, Matrix)
    assert forward.head.packed is not None
    pair.admit(range(16), 0)
    pair.step(16, 3)
    pair.step(15, 2)
    monkeypatch.setattr(forward_cpu, "free_memory", lambda device: 1e4)
    head = Cpu(decoder, 16, 30).head
    assert isinstance(head, Matrix)
    assert head.packed is None


def test_decoder_in_training_is_left_alone(make_decoder: Make, ours: bool) -> None:
    decoder = make_decoder("am").requires_grad_(True)
    places = {name: (p.data_ptr(), p.stride()) for name, p in decoder.named_parameters()}
    pair = Pair(decoder, 2, 30)
    assert places == {name: (p.data_ptr(), p.stride()) for name, p in decoder.named_parameters()}
    pair.admit([0, 1], 0)
    pair.step(2, 2)


def test_decoder_can_be_trained_afterwards(make_decoder: Make, ours: bool) -> None:
    decoder = make_decoder("am")
    Cpu(decoder, 1, 10)
    decoder.requires_grad_(True)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    before = everything(decoder).square().sum()
    before.backward()
    optimiser.step()
    assert everything(decoder).square().sum() < before
    come_and_go(decoder)


def test_decoder_is_saved_as_before(make_decoder: Make, tmp_path: Path) -> None:
    decoder = make_decoder("am")
    before = deepcopy(decoder.state_dict())
    Cpu(decoder, 1, 10)
    weights.save(decoder, tmp_path / "model")
    for name, weight in weights.load(tmp_path / "model").state_dict().items():
        assert torch.equal(weight, before[name])


# ---------------------------------------------------------------- mistakes, and threads


@pytest.mark.parametrize("reach", [4, 6])
def test_no_room(make_decoder: Make, reach: int) -> None:
    """Whether the caller knows it or not."""
    decoder = make_decoder("a")
    forward = Cpu(decoder, 1, 5)
    forward.admit(torch.arange(1), prefill.read(decoder, [[1, 2, 3, 4, 5]])[0].state)
    with pytest.raises(ValueError, match="room for 5 tokens a row, and this step needs 6"):
        forward.step(torch.tensor([1]), reach)


def test_other_dtypes(make_decoder: Make) -> None:
    with pytest.raises(ValueError, match=r"no CPU kernels for torch\.float64 on cpu: use float32"):
        Cpu(make_decoder("a").double(), 1, 5)
    with pytest.raises(ValueError, match=r"kv_dtype torch\.float16: use float32 or bfloat16"):
        Cpu(make_decoder("a"), 1, 5, kv_dtype=torch.float16)


def logits_of(decoder: Decoder, prompt: Prompt, seed: int) -> Tensor:
    forward = Cpu(decoder, 70, 30, threads=2)
    forward.admit(torch.arange(70), prompt.state)
    token_TS = torch.randint(0, 61, (10, 70), generator=torch.Generator().manual_seed(seed))
    return torch.stack([forward.step(token_S, 30).clone() for token_S in token_TS])


def test_forwards_in_several_threads_at_once(make_decoder: Make) -> None:
    decoder = make_decoder("am")
    (prompt,) = prefill.read(decoder, PROMPTS[2:])
    wanted = [logits_of(decoder, prompt, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: logits_of(decoder, prompt, seed), range(4)))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
