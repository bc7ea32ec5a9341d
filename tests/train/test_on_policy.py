"""On-policy batches: the student's answers where the data's were, and nothing else moved."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from retort.data.packing import Batch
from retort.model.decoder import Decoder
from retort.recipe import OnPolicy
from retort.train.on_policy import is_on_policy, on_policy_batch

MakeDecoder = Callable[..., Decoder]
GREEDY = 1e-6
END = 7


def chat(prompt: Sequence[int], answer: Sequence[int]) -> tuple[list[int], list[bool]]:
    """Tokens, and which of them are learnt."""
    return [*prompt, *answer], [False] * len(prompt) + [True] * len(answer)


def batch_of(length: int, *rows: Sequence[tuple[list[int], list[bool]]]) -> Batch:
    """Rows of documents, each its tokens and which of them are learnt."""
    ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    document_BT = torch.full((len(rows), length), -1)
    learn_BT = torch.zeros(len(rows), length, dtype=torch.bool)
    for b, row in enumerate(rows):
        start = 0
        for number, (ids, learnt) in enumerate(row):
            stop = start + len(ids)
            ids_BT[b, start:stop] = torch.tensor(ids)
            document_BT[b, start:stop] = number
            learn_BT[b, start : stop - 1] = torch.tensor(learnt[1:])
            start = stop
    return Batch(ids_BT, document_BT, learn_BT)


def greedy(decoder: Decoder, prompt: Sequence[int], most: int) -> list[int]:
    """What the model says, by its plain forward."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        ids.append(int(decoder(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in decoder.config.eos_token_ids:
            break
    return ids[len(prompt) :]


def written(batch: Batch, row: int, document: int) -> tuple[list[int], list[int]]:
    """A document's tokens, and those of them that are learnt."""
    here_T = batch.document_BT[row] == document
    ids = batch.ids_BT[row, here_T].tolist()
    learn = batch.learn_BT[row, here_T].tolist()
    assert not learn[-1]
    return ids, [token for token, learnt in zip(ids[1:], learn, strict=False) if learnt]


def answered(*arguments: Any) -> Batch:
    return on_policy_batch(*arguments).batch


@pytest.fixture(params=["aa", "am"])
def student(request: pytest.FixtureRequest, make_decoder: MakeDecoder) -> Decoder:
    decoder = make_decoder(request.param, eos_token_ids=(END,)).double()
    return decoder.train().requires_grad_()


PROMPTS = ([1, 2, 3], [9, 8], [5, 5, 5, 5, 6], [11, 12])


@pytest.fixture
def batch() -> Batch:
    first, second, third, fourth = PROMPTS
    return batch_of(
        24,
        [chat(first, [20, 21, END]), chat(second, [30, END])],
        [chat(third, [40, 41, 42, 43]), chat(fourth, [50])],
    )


def test_the_students_words_stand_in_for_the_data(student: Decoder, batch: Batch) -> None:
    found = answered(student, batch, OnPolicy(max_tokens=6, temperature=GREEDY), 0, 0)
    for tensor, before in zip(found[:3], batch[:3], strict=True):
        assert tensor.shape == before.shape
        assert tensor.dtype == before.dtype
    for i, prompt in enumerate(PROMPTS):
        answer = greedy(student, prompt, 6)
        assert written(found, *divmod(i, 2)) == ([*prompt, *answer], answer)
    padding_BT = found.document_BT < 0
    assert padding_BT[:, -1].all()
    assert not found.learn_BT[padding_BT].any()


@pytest.fixture
def endless(make_decoder: MakeDecoder) -> Decoder:
    return make_decoder("am", eos_token_ids=()).double()


def test_an_answer_is_cut_at_its_most_tokens_and_at_the_row(endless: Decoder) -> None:
    batch = batch_of(8, [chat([1, 2, 3], [20])], [chat([4, 5], [20])])
    for most, wanted in ((2, 2), (5, 5), (50, 5)):
        found = answered(endless, batch, OnPolicy(max_tokens=most, temperature=GREEDY), 0, 0)
        answer = greedy(endless, [1, 2, 3], wanted)
        assert written(found, 0, 0) == ([1, 2, 3, *answer], answer)


def test_a_stop_token_ends_an_answer_and_is_learnt(make_decoder: MakeDecoder) -> None:
    prompt = PROMPTS[0]
    first = greedy(make_decoder("am"), prompt, 1)
    torch.manual_seed(0)
    student = make_decoder("am", eos_token_ids=(*first, 60))
    assert greedy(student, prompt, 9) == first
    found = answered(
        student, batch_of(12, [chat(prompt, [20])]), OnPolicy(temperature=GREEDY), 0, 0
    )
    assert written(found, 0, 0) == ([*prompt, *first], first)


def test_what_asks_nothing_stays_as_it_is(student: Decoder) -> None:
    text = [3, 4, 5, 6, 7, 8], [True] * 6
    silent = [13, 14, 15], [False] * 3
    batch = batch_of(20, [text, chat([1, 2], [20, 21]), silent], [([9] * 20, [True] * 20)])
    found = answered(student, batch, OnPolicy(max_tokens=3, temperature=GREEDY), 0, 0)
    answer = greedy(student, [1, 2], 3)
    assert written(found, 0, 0) == (text[0], text[0][1:])
    assert written(found, 0, 1) == ([1, 2, *answer], answer)
    assert written(found, 0, 2) == (silent[0], [])
    for tensor, before in zip(found[:3], batch[:3], strict=True):
        assert torch.equal(tensor[1], before[1])


def test_a_batch_that_asks_nothing_is_not_changed(student: Decoder) -> None:
    batch = batch_of(9, [([9] * 4, [True] * 4)], [])
    for tensor, before in zip(
        answered(student, batch, OnPolicy(), 0, 0)[:3], batch[:3], strict=True
    ):
        assert torch.equal(tensor, before)


def test_the_last_turn_is_answered(student: Decoder) -> None:
    ids = [1, 2, 20, 21, 3, 4, 22, 23, 5]
    learnt = [token in (20, 21, 22, 23) for token in ids]
    found = answered(
        student, batch_of(16, [(ids, learnt)]), OnPolicy(max_tokens=4, temperature=GREEDY), 0, 0
    )
    answer = greedy(student, ids[:6], 4)
    assert written(found, 0, 0) == ([*ids[:6], *answer], answer)


def test_documents_that_no_longer_fit_are_left_out(endless: Decoder) -> None:
    text = [3, 4, 5], [True] * 3
    batch = batch_of(14, [chat([8, 1], [20]), chat([8, 2], [21]), text])
    settings = OnPolicy(max_tokens=8, temperature=GREEDY)
    found, left_out = on_policy_batch(endless, batch, settings, 0, 0)
    assert left_out == 1
    assert found.document_BT[0].tolist() == [0] * 10 + [1] * 3 + [-1]
    assert written(found, 0, 0)[0] == [8, 1, *greedy(endless, [8, 1], 8)]
    assert written(found, 0, 1) == (text[0], text[0][1:])
    assert on_policy_batch(endless, batch_of(3, [chat([8, 1], [20])]), settings, 0, 0).left_out == 0


def test_answers_do_not_depend_on_their_neighbours(student: Decoder, batch: Batch) -> None:
    settings = OnPolicy(max_tokens=6, temperature=1.5)
    found = answered(student, batch, settings, 3, 5)
    again = answered(student, batch, settings, 3, 5)
    rows = [answered(student, part, settings, 3, 5)[:3] for part in batch.split(1)]
    for tensor, same, *alone in zip(found[:3], again[:3], *rows, strict=True):
        assert torch.equal(tensor, same)
        assert torch.equal(tensor, torch.cat(alone))
    for seed, step in ((3, 6), (4, 5)):
        other = answered(student, batch, settings, seed, step)
        assert not torch.equal(found.ids_BT, other.ids_BT)


def test_training_does_not_notice(student: Decoder, batch: Batch) -> None:
    before = torch.get_rng_state(), [p.clone() for p in student.parameters()]
    found = answered(student, batch, OnPolicy(max_tokens=4), 0, 0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(map(torch.equal, before[1], student.parameters()))
    assert student.training
    student(found.ids_BT, None, found.document_BT).sum().backward()  # no tensor of inference mode
    assert all(p.grad is not None for p in student.parameters())


def reverse_kl(student: Decoder, teacher: Decoder, ids_BT: Tensor) -> Tensor:
    """KL(student || teacher) of what follows each token, exactly, kl_BT."""
    logs = [decoder(ids_BT).log_softmax(-1) for decoder in (student, teacher)]
    return kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)


def test_reverse_kl_on_own_words_has_the_right_expectation(make_decoder: MakeDecoder) -> None:
    """Of two tokens after each prompt there is: KL of the first, and of the second under it."""
    size = 6
    student, teacher = (make_decoder("a", vocab_size=size).double() for _ in range(2))
    prompts_PT = torch.cartesian_prod(*3 * [torch.arange(size)])
    batch = batch_of(5, *([chat(prompt, [0, 0])] for prompt in prompts_PT.tolist()))
    sampled = []
    for step in range(6):
        found = answered(student, batch, OnPolicy(max_tokens=2), 0, step)
        assert found.learn_BT.tolist() == [[False, False, True, True, False]] * size**3
        kl_BT = reverse_kl(student, teacher, found.ids_BT)
        sampled.append((kl_BT * found.learn_BT).sum(1))
    sampled_P = torch.stack(sampled).mean(0)
    follow_PVT = torch.stack([extended(prompts_PT, token) for token in range(size)], dim=1)
    kl_PVT = reverse_kl(student, teacher, follow_PVT.flatten(0, 1)).unflatten(0, (-1, size))

    def expected(writer: Decoder) -> Tensor:
        """What is found of each prompt when `writer` writes the first token."""
        p_PV = writer(prompts_PT)[:, -1].softmax(-1)
        return kl_PVT[:, 0, -2] + (p_PV * kl_PVT[..., -1]).sum(1)

    own_P, other_P = expected(student), expected(teacher)

    def surprise(expected_P: Tensor) -> float:
        """How many standard errors the samples are away, in the direction of the other writer."""
        error_P = (sampled_P - expected_P) * (own_P - other_P).sign()
        return abs(float(error_P.mean() / error_P.std())) * len(error_P) ** 0.5

    assert surprise(own_P) < 3
    assert surprise(other_P) > 6


def extended(ids_BT: Tensor, token: int) -> Tensor:
    return torch.cat([ids_BT, torch.full_like(ids_BT[:, :1], token)], dim=1)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.7, 1.0])
def test_the_share_of_steps(share: float) -> None:
    chosen = [is_on_policy(OnPolicy(share=share), step) for step in range(1000)]
    for end in range(1, 1001):
        assert abs(sum(chosen[:end]) - share * end) <= 1 + 1e-6
    assert abs(sum(chosen) - 1000 * share) < 1
