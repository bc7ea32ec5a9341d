"""How what rows remember is kept: what can be asked for, of whom, and that it gets there."""

from collections.abc import Callable, Sequence

import pytest
import torch

import retort
from retort.model.cost import CacheBytes, recurrent_bytes
from retort.model.decoder import Decoder
from retort.recipe import Cache, RecipeError, SampleRecipe, parse
from retort.sample import cpu_prompts, crew, forward, memory, prefill, run
from retort.sample.cache import CacheSettings
from retort.sample.engine import Engine
from retort.sample.forward import check_cache, open_forward
from retort.sample.forward_cpu import Cpu
from retort.sample.tokens import SamplingParams

Make = Callable[..., Decoder]
HALF = CacheSettings(kv_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_dtype": torch.int8}, r"kv_dtype torch\.int8: use float32, bfloat16 or float16"),
        ({"ssm_dtype": torch.float16}, r"ssm_dtype torch\.float16: use float32 or bfloat16"),
        ({"write_every": 3}, "write_every = 3: use 1, 2, 4, .. or 64"),
    ],
)
def test_other_values_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheSettings(**settings)  # type: ignore[arg-type]


def test_it_is_a_public_name() -> None:
    assert retort.CacheSettings is CacheSettings


def test_in_words() -> None:
    assert str(CacheSettings()) == ""
    every = CacheSettings(torch.bfloat16, torch.bfloat16, 16)
    assert str(every) == "KV bfloat16, states bfloat16, written every 16"


def test_a_recipe_says_the_same() -> None:
    assert CacheSettings.of(Cache()) == CacheSettings()
    asked = Cache(kv_dtype="bfloat16", ssm_dtype="bfloat16", write_every=16)
    assert CacheSettings.of(asked) == CacheSettings(torch.bfloat16, torch.bfloat16, 16)


def test_bytes_of_it() -> None:
    assert CacheSettings().bytes_of(torch.bfloat16) == CacheBytes(2)
    assert HALF.bytes_of(torch.float32) == CacheBytes(kv=2)
    rare = CacheSettings(ssm_dtype=torch.bfloat16, write_every=8)
    assert rare.bytes_of(torch.float32) == CacheBytes(kv=4, ssm=2, write_every=8)


@pytest.mark.parametrize(
    "cache",
    [
        CacheSettings(ssm_dtype=torch.bfloat16),
        CacheSettings(write_every=4),
        CacheSettings(kv_dtype=torch.float16),
    ],
)
def test_a_cpu_chooses_bfloat16_keys_and_values_alone(
    make_decoder: Make, cache: CacheSettings
) -> None:
    with pytest.raises(ValueError, match="on a CPU"):
        Engine(make_decoder("am"), cache=cache)
    with pytest.raises(ValueError, match="on a CPU"):
        open_forward(make_decoder("am"), 1, 8, cache=cache)


def test_without_kernels_all_is_as_the_model_has_it(make_decoder: Make) -> None:
    decoder = make_decoder("a").to(torch.bfloat16)
    check_cache(decoder, CacheSettings())
    with pytest.raises(ValueError, match=r"KV bfloat16.*without kernels.*or use float32"):
        check_cache(decoder, HALF)


def test_what_a_gpu_cannot_keep(make_decoder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "has_gpu_kernels", lambda weight: True)
    monkeypatch.setattr(forward, "has_cpu_kernels", lambda weight: False)
    rarely = CacheSettings(ssm_dtype=torch.bfloat16, write_every=16)
    check_cache(make_decoder("am"), rarely)
    with pytest.raises(ValueError, match="Mamba-1 writes its states in every step"):
        check_cache(make_decoder("as"), rarely)
    with pytest.raises(ValueError, match=r"on a GPU keys and values have the model's dtype"):
        check_cache(make_decoder("am"), HALF)


def test_an_engine_keeps_what_it_is_told(make_decoder: Make) -> None:
    decoder = make_decoder("am")
    params = SamplingParams(n=2, max_tokens=6, temperature=0.0)
    (usual,) = Engine(decoder, 2).generate([[3, 4, 5]], params)
    (half,) = Engine(decoder, 2, cache=HALF).generate([[3, 4, 5]], params)
    assert half[0].logprob != usual[0].logprob, "rounded keys and values show"
    assert half[0].logprob == pytest.approx(usual[0].logprob, abs=0.1)
    opened = open_forward(decoder, 2, 50, cache=HALF)
    assert isinstance(opened, Cpu)
    caches = open_forward(decoder, 2, 50).nbytes - opened.nbytes
    assert caches == 2 * 50 * 2 * 2 * 8 * 2  # slots, tokens, K and V, heads, channels, bytes


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_share_their_prompt_read_it_as_others_do(
    make_decoder: Make, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which rows share one depends on how many there are: what they say must not."""
    decoder = make_decoder("am")
    prompt = list(range(3, 40))
    found = []
    for worthwhile in (1, 1 << 40):
        monkeypatch.setattr(cpu_prompts, "WORTHWHILE", worthwhile)
        forward = Cpu(decoder, 2, 60, dtype)
        (read,) = prefill.read(decoder, [prompt])
        forward.admit(torch.arange(2), read.state)
        assert bool(list(forward.groups(2))) == (worthwhile == 1)
        found.append(forward.step(torch.tensor([5, 6]), 38).clone())
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_more_rows_fit_where_they_keep_less(
    make_decoder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e6)
    decoders = [make_decoder("aa")]
    assert memory.auto_slots(decoders, 100, HALF) > 1.5 * memory.auto_slots(decoders, 100)


ASKED = {"out": "run", "model": "bundled", "problems": {"kind": "arithmetic", "count": 1}}


def test_slots_are_as_many_as_such_caches_leave_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as prompts and other processes do."""
    seen: list[tuple[int, CacheSettings, int]] = []

    def slots(
        decoders: Sequence[Decoder], longest: int, cache: CacheSettings, processes: int
    ) -> int:
        seen.append((longest, cache, processes))
        return 1

    monkeypatch.setattr(crew, "auto_slots", slots)
    settings = {"cache": {"kv_dtype": "bfloat16"}, "sampling": {"max_tokens": 70}}
    crew.open_engine(parse(SampleRecipe, ASKED | settings), 3000, 4)
    assert seen == [(3070, HALF, 4)]


def test_bytes_of_a_token_are_those_of_the_cache(make_decoder: Make) -> None:
    config = make_decoder("am").config
    asked = Cache(kv_dtype="bfloat16", ssm_dtype="bfloat16")
    usual, half = (
        run._token(config, torch.float32, CacheSettings.of(each)) for each in (Cache(), asked)
    )
    assert usual["bytes_per_context"] == 2 * half["bytes_per_context"]
    assert usual["row_bytes"] - half["row_bytes"] == recurrent_bytes(config)
    assert usual["weight_bytes"] == half["weight_bytes"]


def test_a_recipe_opens_an_engine_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    asked = {"slots": 3, "threads": 2, "cache": {"kv_dtype": "bfloat16"}}
    assert crew.open_engine(parse(SampleRecipe, ASKED | asked), 9).cache == HALF
    assert threads == [2]
    crew.open_engine(parse(SampleRecipe, ASKED), 9)
    assert threads == [2], "torch's own where nothing is said"


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"kv_dtype": "int8"}, r"cache\.kv_dtype: .*float32.*bfloat16"),
        ({"write_every": 3}, r"cache\.write_every: "),
        ({"kv": "bfloat16"}, r"cache\.kv: unknown key"),
    ],
)
def test_mistakes_in_a_recipe(cache: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(SampleRecipe, ASKED | {"cache": cache})


def test_a_draft_is_verified_with_everything_as_usual() -> None:
    asked = {"draft": {"model": "bundled"}, "cache": {"kv_dtype": "bfloat16"}}
    with pytest.raises(RecipeError, match="leave out draft or cache"):
        parse(SampleRecipe, ASKED | asked)
