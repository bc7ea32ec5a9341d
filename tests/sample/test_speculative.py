"""Speculative decoding: what it samples is what the model alone would, in fewer passes."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.data.chat import train_tokenizer
from retort.model import weights
from retort.model.decoder import Decoder
from retort.recipe import RecipeError, SampleRecipe, load
from retort.sample import speculative
from retort.sample.clock import Timing
from retort.sample.engine import Completion, Engine, Request
from retort.sample.proposals import Proposals, Streams, judge
from retort.sample.speculative import Speculative, load_draft
from retort.sample.tokens import SamplingParams, choose, probabilities, uniforms

VOCABULARY = 61
STOPS = (3, 7, 11, 19, 23)
GREEDY = SamplingParams(temperature=0, max_tokens=20)

Make = Callable[..., Decoder]


def noisy(decoder: Decoder, std: float = 0.15) -> Decoder:
    """A draft that often agrees with the model, but not always."""
    draft = deepcopy(decoder)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(std * parameter.std() * torch.randn_like(parameter))
    return draft


@pytest.fixture(params=["aa", "m", "d", "sa", "am"])
def decoder(request: pytest.FixtureRequest, make_decoder: Make) -> Decoder:
    """In float64, so that no tie is decided by how a pass is divided."""
    return make_decoder(request.param, eos_token_ids=STOPS).double()


@pytest.fixture
def hybrid(make_decoder: Make) -> Decoder:
    return make_decoder("am", eos_token_ids=STOPS).double()


@pytest.fixture
def stranger(make_decoder: Make) -> Decoder:
    """A draft of another kind and size, which hardly ever agrees."""
    return make_decoder("ada", hidden_size=16, heads=2, kv_heads=1).double()


@pytest.fixture
def requests() -> list[Request]:
    """Three completions of each of six prompts of different lengths."""
    lengths = (2, 9, 5, 1, 13, 4)
    prompts = [torch.randint(VOCABULARY, (length,)).tolist() for length in lengths]
    return [Request(prompt, [100 * i + j for j in range(3)]) for i, prompt in enumerate(prompts)]


@pytest.fixture
def singles(requests: list[Request]) -> list[Request]:
    """One completion of each: more of them would be the same where nothing is drawn."""
    return [replace(request, seeds=[0]) for request in requests]


def sampled(engine: Engine, requests: Sequence[Request], params: SamplingParams) -> Any:
    """Completions by request and seed, each once."""
    found = list(engine.stream(requests, params))
    by_place = {(done.request, done.sample): done.completion for done in found}
    assert len(by_place) == len(found)
    return [
        [by_place[i, j] for j in range(len(request.seeds))] for i, request in enumerate(requests)
    ]


def tokens(groups: Sequence[Sequence[Completion]]) -> list[list[tuple[list[int], str]]]:
    return [[(each.token_ids, each.finish_reason) for each in group] for group in groups]


def flat(groups: Sequence[Sequence[Completion]]) -> list[Completion]:
    return list(chain.from_iterable(groups))


def shapes(decoder: Decoder) -> list[tuple[int, ...]]:
    """Rows and columns of whatever the decoder reads from now on."""
    found: list[tuple[int, ...]] = []
    hook = decoder.model.embed_tokens.register_forward_pre_hook
    hook(lambda _, inputs: found.append(tuple(inputs[0].shape)))
    return found


# Greedy: the very tokens of the model alone


def test_greedy_equals_plain_decoding(
    decoder: Decoder, stranger: Decoder, singles: list[Request]
) -> None:
    expected = sampled(Engine(decoder, 4), singles, GREEDY)
    for draft, least, most in ((noisy(decoder), 0.3, 2.8), (stranger, 0, 0.3)):
        engine = Speculative(decoder, draft, 3, slots=4)
        found = sampled(engine, singles, GREEDY)
        assert tokens(found) == tokens(expected)
        assert least <= engine.timing.acceptance <= most, "else little is tested"
        for ours, theirs in zip(flat(found), flat(expected), strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("proposed", [1, 2, 7])
def test_greedy_with_any_number_of_proposals(
    hybrid: Decoder, singles: list[Request], proposed: int
) -> None:
    """Fewer and more than the convolution's taps, and than the chunks of a scan."""
    expected = tokens(sampled(Engine(hybrid, 4), singles, GREEDY))
    for slots in (1, 4):
        engine = Speculative(hybrid, noisy(hybrid), proposed, slots)
        assert tokens(sampled(engine, singles, GREEDY)) == expected


def test_the_model_as_its_own_draft_is_always_right(decoder: Decoder) -> None:
    engine = Speculative(decoder, decoder, 4, slots=3)
    params = replace(GREEDY, max_tokens=16, stop_token_ids=())
    (group,) = engine.generate([[5, 6, 8]], params)
    assert tokens([group]) == tokens(Engine(decoder).generate([[5, 6, 8]], params))
    # One token comes from the prompt, and five of each round.
    assert engine.timing.decode_steps == 3
    assert (engine.timing.verifications, engine.timing.accepted) == (3, 12)
    log = engine.log.take()
    assert sum(spent.steps for spent in log.values()) == 3
    assert {rows for rows, _ in log} == {1}


# Sampled: the model's own distribution

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 3},
    {"temperature": 1.3, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
]


def chi_square_is_likely(counts: Counter[Any], expected: dict[Any, float]) -> None:
    """Fails for what happens to one right sampler in a million."""
    total = sum(counts.values())
    assert all(expected[each] > 0 for each in counts), "something without probability was drawn"
    cells = [(counts[each], total * p) for each, p in expected.items() if p > 0]
    # Rare ones together, so that the statistic has its distribution.
    rare = [cell for cell in cells if cell[1] < 10]
    cells = [cell for cell in cells if cell[1] >= 10]
    if sum(e for _, e in rare) >= 10:
        cells.append((sum(n for n, _ in rare), sum(e for _, e in rare)))
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    free = len(cells) - 1
    # Wilson and Hilferty's approximation of the quantile at 4.75 standard deviations.
    assert statistic < free * (1 - 2 / (9 * free) + 4.75 * math.sqrt(2 / (9 * free))) ** 3


@torch.inference_mode()
def exactly(
    decoder: Decoder, prompt: list[int], params: SamplingParams
) -> dict[tuple[int, ...], float]:
    """The probability of every completion, by reading all of them."""
    vocabulary, length = decoder.config.vocab_size, params.max_tokens
    endings = list(product(range(vocabulary), repeat=length))
    ids_BT = torch.tensor([[*prompt, *ending] for ending in endings])
    logits_BTV = decoder(ids_BT)[:, len(prompt) - 1 : -1]
    p_NV = probabilities(logits_BTV.flatten(0, 1), params).double()
    p_BT = p_NV.gather(1, ids_BT[:, len(prompt) :].reshape(-1, 1)).view(-1, length)
    return dict(zip(endings, p_BT.prod(1).tolist(), strict=True))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_completions_have_the_models_distribution(
    make_decoder: Make, settings: dict[str, Any]
) -> None:
    decoder = make_decoder("sa", vocab_size=5, hidden_size=16, intermediate_size=16)
    params = SamplingParams(max_tokens=3, stop_token_ids=(), **settings)
    engine = Speculative(decoder, noisy(decoder, std=0.7), 2, slots=500)
    (group,) = sampled(engine, [Request([1, 2], range(10_000))], params)
    counts = Counter(tuple(each.token_ids) for each in group)
    chi_square_is_likely(counts, exactly(decoder, [1, 2], params))
    assert 0.3 < engine.timing.acceptance < 1.7


def test_what_judges_has_the_models_distribution() -> None:
    """The rule alone, many times and for several models and drafts."""
    count, vocabulary = 40_000, 4
    params = SamplingParams(temperature=1.0)
    for case in range(3):
        # p and q of each place depend on the token before it, as those of a language model do.
        p_TUV, q_KUV = 1.5 * torch.randn(2, 3, vocabulary, vocabulary)
        streams = Streams(torch.arange(count) + (case << 32), torch.full((count,), 7))
        token_SK, q_SKV, last_S = [], [], torch.zeros(count, dtype=torch.long)
        logits_STV = [p_TUV[0][last_S]]
        for k in range(2):
            q_SKV.append(probabilities(q_KUV[k][last_S], params))
            last_S = choose(q_SKV[-1], streams.numbers(1 << 40, k))
            token_SK.append(last_S)
            logits_STV.append(p_TUV[k + 1][last_S])
        proposals = Proposals(torch.stack(token_SK, 1), torch.stack(q_SKV, 1))
        token_ST, accepted_S = judge(torch.stack(logits_STV, 1), proposals, streams, params)
        p = p_TUV.double().softmax(-1)
        for length in (1, 2, 3):
            some = token_ST[accepted_S >= length - 1]
            drawn = Counter(map(tuple, token_ST[:, :1].tolist()))
            if length == 1:
                chi_square_is_likely(drawn, {(a,): float(p[0, 0, a]) for a in range(4)})
            # What comes next, given what came before, whether it was proposed or drawn anew.
            for before in product(range(4), repeat=length - 1):
                mask = (some[:, : length - 1] == torch.tensor(before)).all(1)
                given = Counter(some[mask, length - 1].tolist())
                row_V = p[length - 1, before[-1] if before else 0]
                if sum(given.values()) > 100:
                    chi_square_is_likely(given, dict(enumerate(row_V.tolist())))


def test_proposals_of_no_probability_never_stay() -> None:
    none = -math.inf
    logits_STV = torch.tensor([[[none, 0.0, none, 1.0]] * 3] * 50)
    q_SKV = torch.tensor([[[0.5, 0.0, 0.5, 0.0]] * 2] * 50)
    streams = Streams(torch.arange(50), torch.zeros(50, dtype=torch.long))
    proposals = Proposals(torch.randint(2, (50, 2)) * 2, q_SKV)
    token_ST, accepted_S = judge(logits_STV, proposals, streams, SamplingParams())
    assert accepted_S.tolist() == [0] * 50
    assert set(token_ST[:, 0].tolist()) == {1, 3}


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_where_model_and_draft_agree_all_proposals_stay(
    monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    numbers = torch.full((20,), number, dtype=torch.float64)
    monkeypatch.setattr(Streams, "numbers", lambda *_: numbers)
    logits_STV, params = torch.randn(20, 4, 9), SamplingParams(top_k=4)
    q_SKV = torch.stack([probabilities(logits_STV[:, k], params) for k in range(3)], 1)
    token_SK = torch.stack([choose(q_SKV[:, k], torch.rand(20)) for k in range(3)], 1)
    token_ST, accepted_S = judge(
        logits_STV, Proposals(token_SK, q_SKV), Streams(numbers, numbers), params
    )
    assert accepted_S.tolist() == [3] * 20
    assert torch.equal(token_ST[:, :3], token_SK)


def test_the_three_streams_of_a_completion_have_nothing_in_common() -> None:
    streams = Streams(torch.arange(3000), torch.randint(50, (3000,)))
    kinds = [streams.numbers(purpose << 40, 1) for purpose in range(3)]
    assert torch.equal(kinds[0], uniforms(streams.seed_S, streams.position_S + 1))
    correlation = torch.corrcoef(torch.stack(kinds)) - torch.eye(3)
    assert correlation.abs().max() < 5 / math.sqrt(3000)


# A completion depends on its prompt and its seed alone


def test_neither_order_nor_company_matters(decoder: Decoder, requests: list[Request]) -> None:
    params, draft = SamplingParams(max_tokens=12, temperature=1.1, top_p=0.95), noisy(decoder)
    engine = Speculative(decoder, draft, 3, slots=4)
    together = tokens(sampled(engine, requests, params))
    assert 0.3 < engine.timing.acceptance < 2.8
    some = [replace(request, seeds=request.seeds[:0:-1]) for request in requests]
    for slots in (2, 64):
        engine = Speculative(decoder, draft, 3, slots)
        assert tokens(sampled(engine, some[::-1], params))[::-1] == [g[:0:-1] for g in together]
    reasons = {reason for group in together for _, reason in group}
    assert reasons == {"stop", "length"}


def test_logprob_is_the_models_own(decoder: Decoder, requests: list[Request]) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, top_k=20, logprobs=True)
    engine = Speculative(decoder, noisy(decoder), 3, slots=5)
    for request, group in zip(requests, sampled(engine, requests, params), strict=True):
        for completion in group:
            ids = torch.tensor([[*request.prompt, *completion.token_ids]])
            logprob_TV = decoder(ids)[0, len(request.prompt) - 1 : -1].log_softmax(-1)
            chosen_T1 = logprob_TV.gather(1, ids[0, len(request.prompt) :, None])
            assert completion.logprobs == pytest.approx(chosen_T1.flatten().tolist(), abs=1e-4)
            assert completion.logprob == pytest.approx(float(chosen_T1.sum()), abs=1e-4)


# Where completions end


def test_the_limit_cuts_a_round(hybrid: Decoder) -> None:
    request = Request([4, 5, 6], range(40))
    for limit in (1, 2, 5, 8, 9):
        params = SamplingParams(max_tokens=limit, stop_token_ids=())
        # Where all proposals are right, every limit but one in six falls into a round.
        for draft in (hybrid, noisy(hybrid)):
            (found,) = sampled(Speculative(hybrid, draft, 5), [request], params)
            reasons = {(len(each.token_ids), each.finish_reason) for each in found}
            assert reasons == {(limit, "length")}


def test_a_stop_token_cuts_a_round(hybrid: Decoder, requests: list[Request]) -> None:
    for draft, proposed in ((hybrid, 6), (noisy(hybrid), 3)):
        engine = Speculative(hybrid, draft, proposed, slots=4)
        found = flat(sampled(engine, requests, SamplingParams(max_tokens=25)))
        stopped = [each.token_ids for each in found if each.finish_reason == "stop"]
        assert len({len(ids) % 4 for ids in stopped}) > 2
        assert all(ids[-1] in STOPS for ids in stopped)
        assert not any(token in STOPS for each in found for token in each.token_ids[:-1])
        cut = [each for each in found if each.finish_reason == "length"]
        assert all(len(each.token_ids) == 25 for each in cut)
        counts = sum(len(each.token_ids) for each in found)
        assert engine.timing.decode_tokens == counts


def test_a_stop_string_cuts_a_round(hybrid: Decoder, singles: list[Request]) -> None:
    def text(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    params = replace(GREEDY, max_tokens=20, stop=("5", "12 "), stop_token_ids=(3,))
    expected = sampled(Engine(hybrid, 4, decode=text), singles, params)
    engine = Speculative(hybrid, noisy(hybrid), 4, slots=4, decode=text)
    assert tokens(sampled(engine, singles, params)) == tokens(expected)
    assert len({len(each.token_ids) for each in flat(expected)}) > 2


# How the work is done


def test_what_is_read(hybrid: Decoder, stranger: Decoder) -> None:
    """Prompts once, by both models; then K + 1 tokens by the model in one pass, while the draft
    reads what was accepted in a pass, and its proposals but the last one by one.
    """
    requests = [Request([i] * 9, range(3)) for i in range(5)]
    ours, theirs = shapes(hybrid), shapes(stranger)
    engine = Speculative(hybrid, stranger, 3, slots=4)
    sampled(engine, requests, SamplingParams(max_tokens=9))
    rounds = engine.timing.decode_steps
    for read in (ours, theirs):
        assert sum(rows for rows, columns in read if columns == 9) == 5
    assert engine.timing.prefill_tokens == 5 * 9
    assert [columns for _, columns in ours if columns != 9] == [4] * rounds
    assert sum(columns == 1 for _, columns in theirs) >= 2 * rounds
    assert sum(columns != 9 for _, columns in theirs) == 3 * rounds


def test_a_finished_row_makes_room_at_once(hybrid: Decoder) -> None:
    requests = [Request([i] * 9, range(3)) for i in range(5)]
    read = shapes(hybrid)
    engine = Speculative(hybrid, noisy(hybrid), 3, slots=4)
    found = flat(sampled(engine, requests, SamplingParams(max_tokens=12)))
    assert len({len(each.token_ids) for each in found}) > 3
    rows = [count for count, columns in read if columns == 4]
    assert rows[0] == 4
    # Once a slot stays empty nothing is left to start, so the batch never grows again.
    assert rows == sorted(rows, reverse=True)


def test_timing_and_acceptance_add_up(hybrid: Decoder, requests: list[Request]) -> None:
    engine = Speculative(hybrid, noisy(hybrid), 3, slots=4)
    found = flat(sampled(engine, requests, SamplingParams(max_tokens=12, stop_token_ids=())))
    # Each round of a row gives what was accepted and one token, some of it past the end.
    made = engine.timing.accepted + engine.timing.verifications + len(found)
    assert 0 <= made - engine.timing.decode_tokens <= 3 * len(found)
    assert engine.timing.verifications <= 4 * engine.timing.decode_steps
    assert min(engine.timing.prefill_seconds, engine.timing.decode_seconds) > 0
    assert Timing().acceptance == 0


def test_out_of_memory_goes_on_with_fewer_slots(
    hybrid: Decoder,
    singles: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = tokens(sampled(Engine(hybrid, 4), singles, GREEDY))
    calls: Iterator[int] = iter(range(1000))

    def crowded(decoder: Decoder, ids_ST: Tensor, state: Any) -> Any:
        if ids_ST.shape[0] > 2 and next(calls) >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read_ahead(decoder, ids_ST, state)

    read_ahead = speculative.read_ahead
    monkeypatch.setattr(speculative, "read_ahead", crowded)
    engine = Speculative(hybrid, noisy(hybrid), 2, slots=8)
    assert tokens(sampled(engine, singles, GREEDY)) == expected
    assert engine.slots == 2
    assert "going on with 2 slots" in capsys.readouterr().err


# What is refused


def test_other_vocabularies_are_refused(make_decoder: Make) -> None:
    with pytest.raises(ValueError, match="vocabulary of 40 tokens and the model one of 61"):
        Speculative(make_decoder("a"), make_decoder("a", vocab_size=40))


def test_at_least_one_token_is_proposed(hybrid: Decoder) -> None:
    with pytest.raises(ValueError, match="draft tokens = 0: at least one"):
        Speculative(hybrid, hybrid, 0)


def test_empty_prompts_are_refused(hybrid: Decoder) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        Speculative(hybrid, hybrid).generate([[1], []], SamplingParams())
    assert Speculative(hybrid, hybrid).generate([], SamplingParams()) == []


def test_a_draft_must_have_the_models_tokenizer(tmp_path: Path, make_decoder: Make) -> None:
    tokenizer = train_tokenizer(["Ada has 3 apples."], 300)
    other = train_tokenizer(["Bob buys 7 books for 20 dollars."] * 2, 300)
    decoder = make_decoder("am", vocab_size=300)
    for name, theirs in (("same", tokenizer), ("other", other)):
        weights.save(make_decoder("a", vocab_size=300), tmp_path / name, theirs)
    draft = load_draft(tmp_path / "same", decoder, tokenizer, torch.float32)
    assert Speculative(decoder, draft).draft.config.layers == 1
    with pytest.raises(ValueError, match=r"other: its tokenizer differs .* in \d+ of \d+ tokens"):
        load_draft(tmp_path / "other", decoder, tokenizer, torch.float32)


def test_the_recipe_names_a_draft() -> None:
    keys = ["out=a", "model=b", "problems.kind=arithmetic"]
    assert load(SampleRecipe, keys).draft is None
    recipe = load(SampleRecipe, [*keys, "draft.model=c"])
    assert recipe.draft is not None
    assert (recipe.draft.model, recipe.draft.tokens) == (Path("c"), 4)
    with pytest.raises(RecipeError, match=r"draft\.tokens"):
        load(SampleRecipe, [*keys, "draft.model=c", "draft.tokens=0"])
