"""The engine: what it samples depends on prompt and seed alone, and its batch is kept full."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from itertools import chain

import pytest
import torch
from torch import Tensor

from retort.model.decoder import Decoder
from retort.sample import prefill, queue, samplers, slots
from retort.sample.cache import CacheSettings
from retort.sample.engine import Completion, Engine, Finished, Request, Timing
from retort.sample.forward import Plain
from retort.sample.forward_cpu import Cpu
from retort.sample.tokens import SamplingParams, draw, log_probability, uniforms

VOCABULARY = 61
STOPS = (3, 7, 11, 19, 23)
"""A random model meets one of them every dozen tokens or so: some completions stop, some do not."""


@pytest.fixture(params=["aa", "mm", "am"], ids=["attention", "mamba", "hybrid"])
def decoder(request: pytest.FixtureRequest, make_decoder: Callable[..., Decoder]) -> Decoder:
    # In float64 other batches round differently by 1e-15 or so instead of 1e-7 (norms and the
    # recurrence stay in float32), so a uniform number that falls between two roundings, which would
    # change a token, is out of the question.
    return make_decoder(request.param, eos_token_ids=STOPS).double()


@pytest.fixture
def hybrid(make_decoder: Callable[..., Decoder]) -> Decoder:
    return make_decoder("am", eos_token_ids=STOPS).double()


@pytest.fixture
def prompts() -> list[list[int]]:
    """Of different lengths, shorter and longer than the chunks and the convolution of the mixer."""
    return [torch.randint(VOCABULARY, (length,)).tolist() for length in (2, 9, 5, 1, 13, 4)]


@pytest.fixture
def requests(prompts: list[list[int]]) -> list[Request]:
    """Three completions of each prompt."""
    return [Request(prompt, [100 * i + j for j in range(3)]) for i, prompt in enumerate(prompts)]


def sampled(
    engine: Engine, requests: Sequence[Request], params: SamplingParams
) -> list[list[Completion]]:
    """What `stream` finishes, by request and seed; each once."""
    found = list(engine.stream(requests, params))
    by_place = {(done.request, done.sample): done.completion for done in found}
    assert len(by_place) == len(found)
    return [
        [by_place[i, j] for j in range(len(request.seeds))] for i, request in enumerate(requests)
    ]


def tokens(completions: Sequence[Sequence[Completion]]) -> list[list[tuple[list[int], str]]]:
    return [[(each.token_ids, each.finish_reason) for each in group] for group in completions]


def flat(groups: Sequence[Sequence[Completion]]) -> list[Completion]:
    return list(chain.from_iterable(groups))


@torch.inference_mode()
def one_by_one(
    decoder: Decoder, prompt: Sequence[int], seed: int, params: SamplingParams
) -> Completion:
    """The same with neither batch nor state: the whole sequence is read again for every token."""
    ids, logprob = list(prompt), 0.0
    for position in range(params.max_tokens):
        logits_1V = decoder(torch.tensor([ids]))[:, -1]
        uniform_1 = uniforms(torch.tensor([seed]), torch.tensor([position]))
        token_1 = draw(logits_1V, uniform_1, params)
        logprob += log_probability(logits_1V, token_1).item()
        ids.append(int(token_1))
        if ids[-1] in STOPS:
            return Completion(ids[len(prompt) :], "stop", logprob)
    return Completion(ids[len(prompt) :], "length", logprob)


class Calls:
    """The shapes of what a decoder reads; prompts of several tokens can be told from steps."""

    def __init__(self, decoder: Decoder) -> None:
        self.shapes: list[tuple[int, int]] = []
        decoder.model.embed_tokens.register_forward_pre_hook(self._note)

    def _note(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows, columns = inputs[0].shape
        self.shapes.append((rows, columns))

    @property
    def prefills(self) -> list[tuple[int, int]]:
        return [shape for shape in self.shapes if shape[1] > 1]

    @property
    def steps(self) -> list[int]:
        """Rows of each step."""
        return [rows for rows, columns in self.shapes if columns == 1]


# What is sampled


def test_greedy_is_the_argmax_of_the_parallel_forward(
    decoder: Decoder, prompts: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=())
    for prompt, (found,) in zip(
        prompts, Engine(decoder, slots=4).generate(prompts, params), strict=True
    ):
        logits_TV = decoder(torch.tensor([prompt + found.token_ids[:-1]]))[0, len(prompt) - 1 :]
        assert found.token_ids == logits_TV.argmax(-1).tolist()


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_completions_equal_those_made_one_by_one(
    decoder: Decoder, requests: list[Request], slots: int
) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.1, top_p=0.95)
    found = sampled(Engine(decoder, slots), requests, params)
    expected = [
        [one_by_one(decoder, request.prompt, seed, params) for seed in request.seeds]
        for request in requests
    ]
    assert tokens(found) == tokens(expected)
    reasons = {completion.finish_reason for group in found for completion in group}
    assert reasons == {"stop", "length"}, "the models should make both kinds, or little is tested"
    for ours, theirs in zip(flat(found), flat(expected), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_neither_order_nor_company_matters(
    decoder: Decoder, requests: list[Request], slots: int
) -> None:
    params = SamplingParams(max_tokens=12)
    together = tokens(sampled(Engine(decoder, 4), requests, params))
    engine = Engine(decoder, slots)
    assert tokens(sampled(engine, requests[::-1], params))[::-1] == together
    assert tokens(sampled(engine, requests[1::2], params)) == together[1::2]
    # Seeds in another order, and fewer of them: what a run that continues asks for.
    some = [replace(request, seeds=request.seeds[:0:-1]) for request in requests]
    assert tokens(sampled(engine, some, params)) == [group[:0:-1] for group in together]


def test_forked_completions_equal_independent_ones(decoder: Decoder) -> None:
    prompt, params = [5, 6, 8, 9, 10], SamplingParams(max_tokens=12)
    (forked,) = sampled(Engine(decoder, 8), [Request(prompt, range(5))], params)
    alone = sampled(Engine(decoder, 8), [Request(prompt, [seed]) for seed in range(5)], params)
    assert tokens([forked]) == tokens([flat(alone)])
    assert len({tuple(completion.token_ids) for completion in forked}) > 1


def test_generate_gives_n_completions_in_the_order_of_the_prompts(
    hybrid: Decoder, prompts: list[list[int]]
) -> None:
    params = SamplingParams(n=4, max_tokens=12, seed=5)
    found = Engine(hybrid, 3).generate(prompts, params)
    assert [len(group) for group in found] == [4] * len(prompts)
    # A prompt that is added behind the others, or a larger n, changes nothing of the rest.
    more = Engine(hybrid, 64).generate([*prompts, [1, 2]], replace(params, n=6))
    assert tokens([group[:4] for group in more[:-1]]) == tokens(found)
    other = Engine(hybrid, 3).generate(prompts, replace(params, seed=6))
    assert tokens(other) != tokens(found)


def test_equal_prompts_get_completions_of_their_own(hybrid: Decoder) -> None:
    first, second = Engine(hybrid).generate([[1, 2], [1, 2]], SamplingParams(n=3, max_tokens=12))
    assert tokens([first]) != tokens([second])


def test_logprob_is_the_sum_over_the_parallel_forward(
    decoder: Decoder, prompts: list[list[int]]
) -> None:
    # A temperature and filters, which must not enter the model's own probability.
    params = SamplingParams(n=2, max_tokens=12, temperature=1.5, top_k=20)
    found = Engine(decoder, slots=5).generate(prompts, params)
    for prompt, group in zip(prompts, found, strict=True):
        for completion in group:
            logits_TV = decoder(torch.tensor([prompt + completion.token_ids]))[0]
            logprob_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
            chosen_T = logprob_TV.gather(1, torch.tensor(completion.token_ids)[:, None])
            assert completion.logprob == pytest.approx(float(chosen_T.sum()), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_precisions(decoder: Decoder, prompts: list[list[int]], dtype: torch.dtype) -> None:
    params = SamplingParams(n=3, max_tokens=12)
    exact = Engine(decoder, 4).generate(prompts, params)
    found = Engine(decoder.to(dtype), 4).generate(prompts, params)
    # Rounding changes a token now and then, and from there on the completion, but not most.
    pairs = list(zip(flat(exact), flat(found), strict=True))
    same = [(ours, theirs) for ours, theirs in pairs if ours.token_ids == theirs.token_ids]
    assert len(same) >= (len(pairs) if dtype == torch.float32 else len(pairs) // 2)
    for ours, theirs in same:
        assert ours.logprob == pytest.approx(theirs.logprob, abs=0.5)


# Where completions end


def test_a_stop_token_ends_a_completion_and_belongs_to_it(
    hybrid: Decoder, prompts: list[list[int]]
) -> None:
    found = flat(Engine(hybrid, 5).generate(prompts, SamplingParams(n=5, max_tokens=15)))
    stopped = [each.token_ids for each in found if each.finish_reason == "stop"]
    cut = [each.token_ids for each in found if each.finish_reason == "length"]
    assert stopped
    assert cut
    assert all(ids[-1] in STOPS for ids in stopped)
    assert all(len(ids) == 15 and ids[-1] not in STOPS for ids in cut)
    assert not any(token in STOPS for ids in stopped + cut for token in ids[:-1])


def test_stop_tokens_of_the_caller_replace_the_models(hybrid: Decoder) -> None:
    params = SamplingParams(n=20, max_tokens=15, stop_token_ids=(1, 2))
    (found,) = Engine(hybrid).generate([[4, 5]], params)
    assert any(token in STOPS for each in found for token in each.token_ids)
    stopped = [each.token_ids for each in found if each.finish_reason == "stop"]
    assert stopped
    assert all(ids[-1] in (1, 2) for ids in stopped)


def test_no_stop_tokens_never_stop(hybrid: Decoder, prompts: list[list[int]]) -> None:
    params = SamplingParams(n=3, max_tokens=15, stop_token_ids=())
    found = flat(Engine(hybrid, 4).generate(prompts, params))
    assert {(each.finish_reason, len(each.token_ids)) for each in found} == {("length", 15)}
    assert any(token in STOPS for each in found for token in each.token_ids)


def test_the_first_token_may_stop(hybrid: Decoder, prompts: list[list[int]]) -> None:
    engine, every = Engine(hybrid, 2), tuple(range(VOCABULARY))
    found = engine.generate(prompts, SamplingParams(n=5, max_tokens=15, stop_token_ids=every))
    assert {(each.finish_reason, len(each.token_ids)) for each in flat(found)} == {("stop", 1)}
    assert engine.timing.decode_steps == 0, "the prompt's own logits give the first token"


def test_one_token(decoder: Decoder, requests: list[Request]) -> None:
    params = SamplingParams(max_tokens=1, stop_token_ids=())
    found = sampled(Engine(decoder, 2), requests, params)
    assert {(each.finish_reason, len(each.token_ids)) for each in flat(found)} == {("length", 1)}
    longer = sampled(Engine(decoder, 2), requests, replace(params, max_tokens=5))
    assert [each.token_ids for each in flat(found)] == [each.token_ids[:1] for each in flat(longer)]


def test_a_stop_token_at_the_limit_counts_as_a_stop(hybrid: Decoder) -> None:
    params = SamplingParams(n=64, max_tokens=1, stop_token_ids=tuple(range(30)))
    (found,) = Engine(hybrid).generate([[4, 5]], params)
    assert {(each.token_ids[0] < 30, each.finish_reason) for each in found} == {
        (True, "stop"),
        (False, "length"),
    }


# What is asked for


def test_empty_prompt_is_refused(hybrid: Decoder) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        Engine(hybrid).generate([[1], [], [2]], SamplingParams())


def test_no_prompts_no_completions(hybrid: Decoder) -> None:
    engine = Engine(hybrid)
    assert engine.generate([], SamplingParams()) == []
    assert engine.timing == Timing()


def test_requests_without_seeds_are_not_read(hybrid: Decoder) -> None:
    engine, params = Engine(hybrid, 2), SamplingParams(max_tokens=3)
    assert list(engine.stream([Request([1, 2], [])], params)) == []
    (done,) = engine.stream([Request([1, 2], []), Request([3, 4, 5], [9])], params)
    assert (done.request, done.sample) == (1, 0)
    assert engine.timing.prefill_tokens == 3


def test_at_least_one_slot(hybrid: Decoder) -> None:
    with pytest.raises(ValueError, match="slots = 0"):
        Engine(hybrid, slots=0)


# How the work is done


@pytest.mark.parametrize("slots", [2, 64])
def test_each_prompt_is_read_once(decoder: Decoder, slots: int) -> None:
    prompts = [torch.randint(VOCABULARY, (2 + i,)).tolist() for i in range(8)]
    calls, engine = Calls(decoder), Engine(decoder, slots)
    engine.generate(prompts, SamplingParams(n=5, max_tokens=6))
    assert sum(rows for rows, _ in calls.prefills) == len(prompts)
    assert engine.timing.prefill_tokens == sum(len(prompt) for prompt in prompts)


def test_prompts_wait_unread_until_there_is_room(hybrid: Decoder) -> None:
    # A prompt that has been read occupies memory: two slots hold two completions of one prompt, or
    # one each of two prompts.
    prompts, params = [[i, i + 1] for i in range(6)], SamplingParams(max_tokens=3)
    for n, at_once in ((1, 2), (2, 1), (3, 1)):
        calls = Calls(hybrid)
        Engine(hybrid, 2).generate(prompts, replace(params, n=n, stop_token_ids=()))
        assert {rows for rows, _ in calls.prefills} == {at_once}


def test_prefill_keeps_within_its_bounds(
    hybrid: Decoder, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=6)
    expected = tokens(sampled(Engine(hybrid, 64), requests, params))
    monkeypatch.setattr(prefill, "TOKENS", 12)
    calls = Calls(hybrid)
    assert tokens(sampled(Engine(hybrid, 64), requests, params)) == expected
    assert max(rows * columns for rows, columns in calls.prefills) == 12
    monkeypatch.setattr(prefill, "ROWS", 2)
    monkeypatch.setattr(prefill, "TOKENS", 10_000)
    calls.shapes.clear()
    assert tokens(sampled(Engine(hybrid, 64), requests, params)) == expected
    assert {rows for rows, _ in calls.prefills} == {2}


@pytest.mark.parametrize("bound", [3, 4, 7])
def test_long_prompts_are_read_in_pieces(
    decoder: Decoder, requests: list[Request], bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and several of different lengths together, some of which end in earlier pieces."""
    whole = prefill.read(decoder, [request.prompt for request in requests])
    monkeypatch.setattr(prefill, "TOKENS", bound * len(requests))
    pieces = prefill.read(decoder, [request.prompt for request in requests])
    for ours, theirs in zip(pieces, whole, strict=True):
        torch.testing.assert_close(ours.logits_1V, theirs.logits_1V, rtol=1e-5, atol=1e-5)
        assert ours.state.length_B.tolist() == theirs.state.length_B.tolist()
    params = SamplingParams(max_tokens=6)
    monkeypatch.setattr(prefill, "TOKENS", bound)
    found = sampled(Engine(decoder, 64), requests, params)
    monkeypatch.undo()
    assert tokens(found) == tokens(sampled(Engine(decoder, 64), requests, params))


def test_prompts_of_like_length_are_read_together(
    hybrid: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "ROWS", 4)
    monkeypatch.setattr(queue, "WINDOW", 8)
    prompts = [[1] * (2 + 10 * (i % 2)) for i in range(12)]
    calls = Calls(hybrid)
    Engine(hybrid, 64).generate(prompts, SamplingParams(max_tokens=1))
    # Eight prompts in the first window and four in the second, half of them long.
    assert calls.prefills == [(4, 12), (4, 2), (4, 12)]


def test_a_finished_row_makes_room_at_once(decoder: Decoder, requests: list[Request]) -> None:
    several = [request for request in requests if len(request.prompt) > 1]
    calls = Calls(decoder)
    found = flat(sampled(Engine(decoder, 4), several, SamplingParams(max_tokens=12)))
    lengths = [len(completion.token_ids) for completion in found]
    assert len(set(lengths)) > 3
    # Every token but a completion's first, which the prompt's own logits give, takes a row.
    assert sum(calls.steps) == sum(lengths) - len(lengths)
    # Once a slot stays empty nothing is left to start, so the batch never grows again.
    assert calls.steps[0] == 4
    assert calls.steps == sorted(calls.steps, reverse=True)


def test_steps_of_equally_long_completions_are_as_few_as_can_be(hybrid: Decoder) -> None:
    engine = Engine(hybrid, 3)
    params = SamplingParams(n=2, max_tokens=5, stop_token_ids=())
    engine.generate([[i, i + 1] for i in range(6)], params)
    # Four rounds of three completions; a round's first tokens come from the prompts.
    assert engine.timing.decode_steps == 4 * 4
    assert engine.timing.decode_tokens == 12 * 5


def test_many_prompts_through_few_slots(decoder: Decoder) -> None:
    prompts = [torch.randint(VOCABULARY, (1 + i % 7,)).tolist() for i in range(60)]
    calls, engine = Calls(decoder), Engine(decoder, 3)
    found = engine.generate(prompts, SamplingParams(n=2, max_tokens=8))
    assert [len(group) for group in found] == [2] * 60
    assert all(rows <= 3 for rows in calls.steps)
    counts = sum(len(completion.token_ids) for group in found for completion in group)
    assert engine.timing.decode_tokens == counts


def test_timing_adds_up_over_calls(hybrid: Decoder, requests: list[Request]) -> None:
    engine, params = Engine(hybrid, 4), SamplingParams(max_tokens=8)
    for these in (requests, requests[:2]):
        before = engine.timing
        found = flat(sampled(engine, these, params))
        spent = engine.timing - before
        assert astuple(before + spent) == pytest.approx(astuple(engine.timing))
        assert spent.prefill_tokens == sum(len(request.prompt) for request in these)
        assert spent.decode_tokens == sum(len(completion.token_ids) for completion in found)
        assert min(spent.prefill_seconds, spent.decode_seconds) > 0
        assert spent.starts == len(found)
        assert 0 < spent.start_seconds < spent.decode_seconds


@pytest.mark.parametrize("look", [1, 4])
def test_steps_are_logged_by_their_size(hybrid: Decoder, look: int) -> None:
    engine = Engine(hybrid, 2, look=look)
    params = SamplingParams(n=2, max_tokens=9, stop_token_ids=())
    engine.generate([[1, 2, 3, 4]], params)
    log = engine.log.take()
    # The prompt gives the first of nine tokens; the first steps load kernels, and are left out.
    assert sum(spent.steps for spent in log.values()) == 8 - look
    assert {rows for rows, _ in log} == {2}
    # The second token's step sees the prompt and the first.
    seen = [5 + step for step in range(look, 8)]
    assert sum(spent.context for spent in log.values()) == 2 * sum(seen)
    for (rows, half_octaves), spent in log.items():
        mean = spent.context / (rows * spent.steps)
        assert mean == pytest.approx(2 ** (half_octaves / 2), rel=0.3)
    assert 0 < sum(spent.seconds for spent in log.values()) < engine.timing.decode_seconds
    assert engine.log.take() == {}, "what is taken is not told again"


def test_completions_come_as_they_finish(hybrid: Decoder, requests: list[Request]) -> None:
    done: list[Finished] = list(Engine(hybrid, 3).stream(requests, SamplingParams(max_tokens=12)))
    assert all(each.started <= each.ended for each in done)
    ended = [each.ended for each in done]
    assert ended == sorted(ended)
    # With three slots for eighteen completions the last ones start after the first ones ended.
    assert max(each.started for each in done) > min(ended)


# Looking seldom, running out of memory, stopping


@pytest.mark.parametrize(("look", "slots"), [(2, 64), (5, 3), (40, 4)])
def test_looking_seldom_changes_nothing_but_the_steps(
    decoder: Decoder, requests: list[Request], slots: int, look: int
) -> None:
    params = SamplingParams(max_tokens=12)
    expected = sampled(Engine(decoder, slots), requests, params)
    engine = Engine(decoder, slots, look=look)
    found = sampled(engine, requests, params)
    assert tokens(found) == tokens(expected)
    for ours, theirs in zip(flat(found), flat(expected), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert engine.timing.decode_tokens == sum(len(each.token_ids) for each in flat(expected))
    assert engine.timing.decode_steps % look == 0


class Crowded(Plain):
    """Memory for three rows of the state, or for two steps of more than one."""

    steps = 0

    def __init__(
        self, decoder: Decoder, slots: int, max_length: int, own_length: int, cache: CacheSettings
    ) -> None:
        if slots > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().__init__(decoder, slots, max_length)

    def step(self, token_S: Tensor, reach: int) -> Tensor:
        self.steps += len(token_S) > 1
        if self.steps > 7:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: no memory")
        return super().step(token_S, reach)


def test_out_of_memory_goes_on_with_fewer_slots(
    hybrid: Decoder,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While the batch is made, and in the middle of it, where some completions are done."""
    params = SamplingParams(max_tokens=12)
    expected = tokens(sampled(Engine(hybrid, 4), requests, params))
    monkeypatch.setattr(slots, "open_forward", Crowded)
    engine = Engine(hybrid, 8)
    assert tokens(sampled(engine, requests, params)) == expected
    told = capsys.readouterr().err
    assert [f"going on with {n} slots" in told for n in (4, 2, 1)] == [True] * 3
    assert engine.slots == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    hybrid: Decoder, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Plain:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(slots, "open_forward", broken)
    with pytest.raises(RuntimeError, match="no kernel for this"):
        list(Engine(hybrid, 8).stream(requests, SamplingParams()))


def test_one_may_stop_listening(hybrid: Decoder, requests: list[Request]) -> None:
    params = SamplingParams(max_tokens=12)
    engine = Engine(hybrid, 4)
    stream = engine.stream(requests, params)
    first = [next(stream) for _ in range(3)]
    stream.close()  # type: ignore[attr-defined]  # it is a generator
    done = {(each.request, each.sample): each.completion for each in first}
    again = sampled(engine, requests, params)
    assert all(again[i][j] == completion for (i, j), completion in done.items())


def letters(tokens: Sequence[int]) -> str:
    """Each token two letters, so that a string may start in the middle of one."""
    return "".join(f"{'abcdefgh'[token % 8]}{'xyz'[token % 3]}" for token in tokens)


@pytest.mark.parametrize("look", [1, 6])
@pytest.mark.parametrize("stop", [("ax",), ("yb", "zc"), ("xaxb", "xby", "ga")], ids=str)
def test_a_stop_string_ends_a_completion_where_it_is_complete(
    hybrid: Decoder, requests: list[Request], stop: tuple[str, ...], look: int
) -> None:
    params = SamplingParams(max_tokens=40, stop_token_ids=(3,))
    free = flat(sampled(Engine(hybrid, 4), requests, params))
    engine = Engine(hybrid, 4, decode=letters, look=look)
    cut = flat(sampled(engine, requests, replace(params, stop=stop)))
    assert any(len(a.token_ids) < len(b.token_ids) for a, b in zip(cut, free, strict=True))
    for ours, theirs in zip(cut, free, strict=True):
        ends = range(1, len(theirs.token_ids) + 1)
        held = [n for n in ends if any(each in letters(theirs.token_ids[:n]) for each in stop)]
        assert ours.token_ids == theirs.token_ids[: held[0] if held else None]
        assert ours.finish_reason == ("stop" if held else theirs.finish_reason)
    assert engine.timing.decode_tokens == sum(len(each.token_ids) for each in cut)


def test_stop_strings_need_something_to_decode_with(hybrid: Decoder) -> None:
    with pytest.raises(ValueError, match="stop strings need"):
        Engine(hybrid).generate([[1]], SamplingParams(stop=("x",)))


def test_log_probabilities_of_each_token(hybrid: Decoder, requests: list[Request]) -> None:
    params = SamplingParams(max_tokens=12)
    plain = flat(sampled(Engine(hybrid, 4), requests, params))
    told = flat(sampled(Engine(hybrid, 4), requests, replace(params, logprobs=True)))
    assert {each.logprobs for each in plain} == {None}
    for ours, theirs in zip(told, plain, strict=True):
        assert ours.logprobs is not None
        assert len(ours.logprobs) == len(ours.token_ids)
        assert sum(ours.logprobs) == pytest.approx(theirs.logprob)


# With the kernels of a CPU, in float32


@pytest.mark.parametrize("layers", ["aa", "mm", "am", "dd", "sa"])
@pytest.mark.parametrize("temperature", [0.0, 1.1])
def test_kernels_sample_the_same(
    make_decoder: Callable[..., Decoder],
    requests: list[Request],
    layers: str,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slots are refilled and rows moved; a rounding may decide a token now and then."""
    decoder = make_decoder(layers, eos_token_ids=STOPS)
    params = SamplingParams(max_tokens=40, temperature=temperature)
    found = flat(sampled(Engine(decoder, 4), requests, params))
    monkeypatch.setattr(slots, "open_forward", lambda *args: Plain(*args[:3]))
    monkeypatch.setattr(slots, "open_sampler", lambda params, *_: samplers.Plain(params))
    plain = flat(sampled(Engine(decoder, 4), requests, params))
    same = [(a, b) for a, b in zip(found, plain, strict=True) if a.token_ids == b.token_ids]
    assert len(same) >= len(plain) - 1
    for ours, theirs in same:
        assert ours.finish_reason == theirs.finish_reason
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def test_a_cpu_in_float32_has_kernels(make_decoder: Callable[..., Decoder]) -> None:
    decoder, params = make_decoder("am"), SamplingParams()
    opened = slots.open_slots(decoder, 2, (8, 8), params, ())
    assert isinstance(opened.forward, Cpu)
    assert isinstance(opened.sampler, samplers.Cpu)
    filtered = slots.open_slots(decoder, 2, (8, 8), replace(params, top_p=0.9), ())
    assert isinstance(filtered.sampler, samplers.Plain)
    exact = slots.open_slots(decoder.double(), 2, (8, 8), params, ())
    assert isinstance(exact.forward, Plain)
    assert isinstance(exact.sampler, samplers.Plain)
