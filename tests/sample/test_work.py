"""Work and its shares: each sample once, large shares first, slots kept full."""

from collections.abc import Callable

import pytest

from retort.model.decoder import Decoder
from retort.recipe import Sampling
from retort.sample import work as of_engines
from retort.sample.clock import Spent, Timing
from retort.sample.engine import Completion, Engine
from retort.sample.work import FULLEST, Done, Portion, Share, Shares, Work, portions

Key = tuple[str, int]


def work(problems: int, samples: int) -> list[Work]:
    return [Work(f"p{i}", [1, 2, 3], list(range(samples))) for i in range(problems)]


def keys(items: list[Work]) -> list[Key]:
    return [(item.problem_id, j) for item in items for j in item.samples]


def portion(*done: Key, worker: int = 0) -> Portion:
    """As an engine hands over completions of these samples."""
    completion = Completion([1], "stop", -1.0)
    finished = [Done(*key, 0, 3, completion, 1.0, 2.0) for key in done]
    return Portion(
        worker, 4, 1, None, finished, Timing(0, 0.0, 1, 1, 1), {(1, 2): Spent(1, 4, 1.0)}
    )


def cut_all(shares: Shares, slots: int) -> list[Share]:
    return list(iter(lambda: shares.cut(slots), None))


@pytest.mark.parametrize(
    ("problems", "samples", "engines", "slots"),
    [(1, 1, 1, 1), (3, 1, 8, 64), (5, 7, 2, 4), (40, 256, 3, 64), (1, 999, 2, 16), (1000, 1, 4, 8)],
)
def test_shares_are_the_work(problems: int, samples: int, engines: int, slots: int) -> None:
    asked = work(problems, samples)
    shares = Shares(asked, engines)
    found = cut_all(shares, slots)
    assert sorted(key for share in found for key in keys(share.work)) == sorted(keys(asked))
    assert len({share.number for share in found}) == len(found)
    assert shares  # nothing has been done yet


def test_shares_shrink_and_fill_the_slots() -> None:
    sizes = [len(keys(share.work)) for share in cut_all(Shares(work(100, 40), 4), slots=16)]
    assert sizes[0] == 4000 // 8
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes[:-1]) == 16


def test_no_share_is_endless() -> None:
    sizes = [len(keys(share.work)) for share in cut_all(Shares(work(100, 100), 1), slots=4)]
    assert max(sizes) == FULLEST * 4


def test_little_work_is_for_all() -> None:
    sizes = [len(keys(share.work)) for share in cut_all(Shares(work(1, 64), 2), slots=64)]
    assert sizes == [32, 32]


def test_what_is_taken_once_is_not_taken_again() -> None:
    shares = Shares(work(2, 2), 1)
    first = shares.accept(portion(("p0", 0), ("p1", 1)))
    assert [done.key for done in first.done] == [("p0", 0), ("p1", 1)]
    again = shares.accept(portion(("p1", 1), ("p1", 0), ("p1", 0), ("p9", 0)))
    assert [done.key for done in again.done] == [("p1", 0)]
    assert shares
    shares.accept(portion(("p0", 1)))
    assert not shares


def test_what_is_given_back_waits_again_without_what_was_done() -> None:
    shares = Shares(work(3, 4), 1)
    share = shares.cut(100)
    assert share is not None
    assert shares.cut(100) is None
    shares.accept(portion(("p0", 0), *(("p1", j) for j in range(4))))
    left = shares.left(share)
    assert left is not None
    assert left.number == share.number
    assert keys(left.work) == [*(("p0", j) for j in (1, 2, 3)), *(("p2", j) for j in range(4))]
    shares.give_back(share)
    found = cut_all(shares, 100)
    assert sorted(key for each in found for key in keys(each.work)) == sorted(keys(left.work))
    assert share.number not in {each.number for each in found}


def test_a_share_that_is_done_is_none() -> None:
    shares = Shares(work(1, 2), 1)
    share = shares.cut(2)
    assert share is not None
    shares.accept(portion(("p0", 0), ("p0", 1)))
    assert shares.left(share) is None
    shares.give_back(share)
    assert shares.cut(2) is None


def test_portions_of_one_engine_add_up() -> None:
    both = portion(("a", 0)) + portion(("a", 1), ("b", 0))
    assert [done.key for done in both.done] == [("a", 0), ("a", 1), ("b", 0)]
    assert both.timing == Timing(0, 0.0, 2, 2, 2)


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_portions_are_the_work_and_the_time(
    make_decoder: Callable[..., Decoder], seconds: float
) -> None:
    engine = Engine(make_decoder(eos_token_ids=tuple(range(0, 61, 8))), slots=3)
    items = [Work("a", [1, 2, 3], [0, 5]), Work("b", [4, 5], [1, 2, 7])]
    settings = Sampling(max_tokens=9, seed=3)
    for _ in range(2):  # the second time the engine has been used before
        told = portions(engine, settings, items, worker=7, seconds=seconds)
        found = [part for part in told if part is not None]
        assert len(found) == 1 if seconds else 1 < len(found) <= 5
        done = [each for part in found for each in part.done]
        assert sorted(each.key for each in done) == sorted(keys(items))
        assert {each.prompt_tokens for each in done if each.problem_id == "b"} == {2}
        tokens = sum(len(each.completion.token_ids) for each in done)
        assert sum(part.timing.decode_tokens for part in found) == tokens
        assert {(part.worker, part.slots) for part in found} == {(7, 3)}


def test_an_engine_says_when_nothing_has_finished(
    make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_engines, "QUIET_SECONDS", 0.0)
    engine = Engine(make_decoder(eos_token_ids=()), slots=2)
    told = portions(engine, Sampling(max_tokens=9), [Work("a", [1, 2, 3], [0, 1])])
    *quiet, last = [part is None for part in told]
    assert len(quiet) == 8
    assert all(quiet)
    assert not last


def test_timings_add_up_field_by_field() -> None:
    one, more = Timing(*range(1, 10)), Timing(*range(10, 100, 10))
    assert one + more == Timing(*range(11, 100, 11))
    assert one + more - more == one
