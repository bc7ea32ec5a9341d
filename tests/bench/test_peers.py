"""The same weights elsewhere: the same tokens, at the same contexts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.model.theirs import skip_where_groups_differ

from retort.bench import gguf, huggingface, llama_cpp
from retort.bench.contenders import WARM_STEPS, Case, random_tokens
from retort.bench.decode import step_bytes
from retort.bench.huggingface import cache_keyword, caveats, open_transformers
from retort.bench.models import Model
from retort.bench.peers import contenders
from retort.bench.spans import Protocol, Span
from retort.model.decoder import Decoder
from retort.sample.cache import CacheSettings


@pytest.fixture
def models(make_decoder: Callable[..., Decoder]) -> list[Model]:
    """Attention alone, Mamba-2 alone, and a hybrid, as GraniteMoeHybrid has them."""
    layers = {"attention": "aa", "mamba": "mm", "hybrid": "am"}
    return [Model(name, make_decoder(each)) for name, each in layers.items()]


def test_transformers_has_the_same_weights(models: list[Model]) -> None:
    ids_1T = random_tokens(61, 20)
    for model in models:
        theirs = open_transformers(model)
        skip_where_groups_differ(theirs.loaded)
        with torch.inference_mode():
            wanted = theirs.loaded(ids_1T).logits
        torch.testing.assert_close(model.decoder(ids_1T), wanted, rtol=0, atol=1e-4)


def test_transformers_decodes_the_steps_of_the_span(models: list[Model]) -> None:
    for model in models:
        theirs = open_transformers(model)
        case = Case(3, Span(context=9, steps=4))
        prompt = theirs.read(case.lead)
        seen: list[tuple[tuple[int, int], int]] = []

        def note(module: object, args: Any, kwargs: Any, seen: Any = seen) -> None:
            cache = kwargs[cache_keyword(module)]
            seen.append((tuple(kwargs["input_ids"].shape), cache.get_seq_length()))

        theirs.loaded.register_forward_pre_hook(note, with_kwargs=True)
        timed = theirs.decode(case, prompt)
        assert timed.seconds > 0
        # Each step reads one token of each row; the first timed one makes it the tenth.
        assert [shape for shape, _ in seen] == [(3, 1)] * (WARM_STEPS + 4)
        assert [length + 1 for _, length in seen][-4:] == [10, 11, 12, 13]
        theirs.decode(case, prompt)  # the prompt's cache is as it was
        assert seen[len(seen) // 2 :] == seen[: len(seen) // 2]


def test_transformers_clock_covers_the_steps_alone(
    models: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, read = open_transformers(models[0]), 0

    def note(module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal read
        read += 1

    theirs.loaded.get_input_embeddings().register_forward_pre_hook(note)
    monkeypatch.setattr("retort.bench.huggingface.time.perf_counter", lambda: float(read))
    case = Case(2, Span(9, 5))
    assert theirs.decode(case, theirs.read(case.lead)).seconds == 5


def test_transformers_reads_a_prompt_for_each_completion(models: list[Model]) -> None:
    tokens, seconds = open_transformers(models[1]).complete(7, 5)
    assert tokens == 5 * 7
    assert seconds > 0


def test_unfair_comparisons_are_told(models: list[Model], monkeypatch: pytest.MonkeyPatch) -> None:
    assert caveats(models[0]) == []
    assert any("one block more" in note for note in caveats(models[1]))
    assert not any("one block more" in note for note in caveats(models[2]))
    monkeypatch.setattr(huggingface, "version", lambda package: "5.22.2")
    assert [any("before 5.23" in note for note in caveats(each)) for each in models] == [
        False,
        True,
        True,
    ]


def test_who_is_measured(models: list[Model]) -> None:
    found, _ = contenders(models[:2], plain=True, against=["transformers"])
    assert [each.name for each in found] == [
        "attention",
        "mamba",
        "attention (plain torch)",
        "mamba (plain torch)",
        "attention (transformers)",
        "mamba (transformers)",
    ]


def test_a_cache_is_measured_beside_the_usual_one(models: list[Model]) -> None:
    half = CacheSettings(kv_dtype=torch.bfloat16)
    found, notes = contenders(models[:2], cache=half)
    assert [each.name for each in found] == ["attention", "mamba", "attention (KV bfloat16)"]
    assert notes == [], "without keys and values nothing changes"
    usual, _, other = found
    moved = [step_bytes(each.model, 2, "own", Protocol(8, 4, 4), each.cache, 4) for each in found]
    assert moved[0] - moved[2] == 2 * 2 * 10 * 2 * 2 * 8 * 2  # layers, rows, tokens, K and V ...
    case = Case(2, Span(9, 4))
    bytes_of = [each.decode(case, each.read(case.lead)).state_bytes for each in (usual, other)]
    assert bytes_of[0] == 2 * bytes_of[1]


def test_a_cache_that_no_model_can_have(models: list[Model]) -> None:
    with pytest.raises(ValueError, match=r"attention: cache \(written every 4\): on a CPU"):
        contenders(models, cache=CacheSettings(write_every=4))
    with pytest.raises(ValueError, match="changes nothing for these models"):
        contenders(models[1:2], cache=CacheSettings(kv_dtype=torch.bfloat16))


def test_models_that_transformers_has_not_are_told(
    models: list[Model], make_decoder: Callable[..., Decoder]
) -> None:
    llamba = Model("llamba", make_decoder("dd"))
    found, notes = contenders([models[0], llamba], against=["transformers"])
    assert [each.name for each in found] == ["attention", "llamba", "attention (transformers)"]
    assert any(note.startswith("llamba does not run under transformers: ") for note in notes)
    with pytest.raises(ValueError, match="--against transformers: llamba does not run"):
        contenders([llamba], against=["transformers"])


def test_unknown_programs_are_refused(models: list[Model]) -> None:
    with pytest.raises(ValueError, match=r"^--against vllm: choose transformers or llama\.cpp$"):
        contenders(models, against=["vllm"])


def test_missing_llama_cpp_is_told(models: list[Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    with pytest.raises(ValueError, match="pip install llama-cpp-python gguf"):
        contenders(models, against=["llama.cpp"])


def test_llama_cpp_is_asked_for_what_it_can(
    models: list[Model], make_decoder: Callable[..., Decoder]
) -> None:
    assert list(llama_cpp.refusals(models[0])) == []
    biased = Model("biased", make_decoder("aa", qkv_bias=True, family="qwen2"))
    half = Model("half", make_decoder("aa").to(torch.bfloat16))
    for model in (models[1], biased, half):
        assert len(list(llama_cpp.refusals(model))) == 1


def test_gguf_pairs_neighbours_where_we_pair_halves() -> None:
    weight = torch.arange(8.0)[:, None]  # one head of 8 channels, or two of 4
    assert gguf._paired(weight, 1).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert gguf._paired(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_gguf_has_every_weight_once(models: list[Model]) -> None:
    named = dict(gguf.tensors(models[0].decoder))
    assert sum(tensor.numel() for tensor in named.values()) == models[0].decoder.size


@pytest.mark.skipif(not llama_cpp.installed(), reason=llama_cpp.HOW_TO_INSTALL)
def test_llama_cpp_decodes(make_decoder: Callable[..., Decoder]) -> None:
    decoder = make_decoder("aa", hidden_size=64, heads=2, kv_heads=1, head_dim=32)
    theirs, case = llama_cpp.open_llama_cpp(Model("attention", decoder)), Case(3, Span(9, 4))
    assert theirs.decode(case, theirs.read(case.lead)).seconds > 0
