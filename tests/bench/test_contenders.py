"""What is timed is what the engine does, at the contexts that were asked for."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from retort.bench.contenders import WARM_STEPS, Case, Ours
from retort.bench.models import Model, sizes
from retort.bench.spans import Span
from retort.model.decoder import Decoder
from retort.sample.cache import CacheSettings
from retort.sample.forward import Plain


class Watched(Plain):
    """Notes what a forward is asked to do."""

    def __init__(
        self, decoder: Decoder, slots: int, max_length: int, own_length: int, cache: CacheSettings
    ) -> None:
        super().__init__(decoder, slots, max_length)
        self.log.append(("open", slots, max_length, own_length))

    log: ClassVar[list[Any]] = []

    def admit(self, slot_S: Tensor, prompt: Any) -> None:
        self.log.append(("admit", slot_S.tolist(), id(prompt)))
        super().admit(slot_S, prompt)

    def step(self, token_S: Tensor, reach: int) -> Tensor:
        self.log.append(("step", token_S.shape[0], reach, self.state.length_B.tolist()))
        return super().step(token_S, reach)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the engine's forward is asked to do."""
    Watched.log = []
    monkeypatch.setattr("retort.sample.slots.open_forward", Watched)
    return Watched.log


def steps(log: list[Any]) -> list[Any]:
    return [each for each in log if each[0] == "step"]


def test_steps_are_at_the_contexts_of_the_span(models: list[Model], log: list[Any]) -> None:
    ours, case = Ours(models[0]), Case(3, Span(context=9, steps=4))
    ours.decode(case, ours.read(case.lead))
    # The first timed step reads the 10th token of each row.
    assert [reach for _, _, reach, _ in steps(log)][WARM_STEPS:] == [10, 11, 12, 13]
    assert [lengths for *_, lengths in steps(log)][WARM_STEPS] == [9, 9, 9]
    assert {rows for _, rows, _, _ in steps(log)} == {3}
    # Room for the prompt, the steps that warm up, those of the span, and one that is not read.
    own = WARM_STEPS + 4 + 1
    assert log[0] == ("open", 3, 9 - WARM_STEPS + own, own)


def test_clock_starts_after_the_steps_that_warm_up(
    models: list[Model], log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = []

    def clock() -> float:
        before.append(len(steps(log)))
        return float(before[-1])

    monkeypatch.setattr("retort.bench.machine.time.perf_counter", clock)
    ours, case = Ours(models[1]), Case(2, Span(9, 5))
    timed = ours.decode(case, ours.read(case.lead))
    assert timed.seconds == 5
    assert before == [WARM_STEPS, WARM_STEPS + 5]


def test_rows_share_a_prompt_only_where_asked(models: list[Model], log: list[Any]) -> None:
    ours = Ours(models[0])
    for prompts in ("own", "shared"):
        case = Case(3, Span(5, 1), prompts)
        ours.decode(case, ours.read(case.lead))
    admitted = [rows for kind, rows, *_ in log if kind == "admit"]
    assert admitted == [[0], [1], [2], [0, 1, 2]]


def test_state_bytes_are_those_of_all_rows(models: list[Model]) -> None:
    ours, case = Ours(models[1], plain=True), Case(4, Span(5, 1))
    timed = ours.decode(case, ours.read(case.lead))
    assert timed.state_bytes == 4 * sizes(models[1]).state_bytes


def test_plain_does_not_go_through_the_engines_forward(models: list[Model], log: list[Any]) -> None:
    plain, case = Ours(models[0], plain=True), Case(2, Span(5, 1))
    plain.decode(case, plain.read(case.lead))
    assert log == []
    assert (plain.name, plain.runtime) == ("attention (plain torch)", "plain")


@pytest.mark.parametrize("n", [1, 5])
def test_a_prompt_is_read_once_for_n_completions(models: list[Model], n: int) -> None:
    read = []

    def note(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read.append(inputs[0].numel())

    hook = models[2].decoder.model.embed_tokens.register_forward_pre_hook(note)
    tokens, seconds = Ours(models[2]).complete(7, n)
    hook.remove()
    assert tokens == 7 == sum(read)
    assert seconds > 0


def test_short_contexts_have_a_token_to_start_from() -> None:
    assert Case(1, Span(1, 4)).lead == 1
    assert Case(1, Span(100, 4)).lead == 100 - WARM_STEPS
