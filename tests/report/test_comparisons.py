import numpy as np
import pytest

from retort.report.comparisons import Comparisons, Measured, compare
from retort.report.metrics import Floats, bootstrap_counts

PROBLEMS = 40
K_K = np.array([1.0, 2, 4, 8, 16])


def model(name: str, accuracy: list[float], second: float, fewer_slots: float = 2.0) -> Measured:
    """One accuracy for every problem, so that resamples change nothing; fewer slots are slower."""
    chance_PK = np.tile(accuracy, (PROBLEMS, 1))
    seconds = {64: np.full(PROBLEMS, second), 16: np.full(PROBLEMS, fewer_slots * second)}
    return Measured(name, K_K, {"coverage": chance_PK}, 64, seconds)


def compared(*models: Measured) -> Comparisons:
    return compare(models, models[0].name, bootstrap_counts(PROBLEMS, 50))


TEACHER = model("teacher", [0.3, 0.4, 0.5, 0.6, 0.7], second=4.0)


def test_speed_up_at_equal_accuracy() -> None:
    twin = model("twin", [0.3, 0.4, 0.5, 0.6, 0.7], second=1.0)
    found = compared(TEACHER, twin).speed_ups
    assert [(up.name, up.reference_k, up.k) for up in found] == [
        ("twin", 1, 1),
        ("twin", 8, pytest.approx(8)),
        ("twin", 16, pytest.approx(16)),
    ]
    for up in found:
        assert up.times is not None
        assert (up.times.value, up.times.low, up.times.high) == pytest.approx((4, 4, 4))
        assert up.reached == 1


def test_a_worse_student_needs_more_completions() -> None:
    student = model("student", [0.2, 0.3, 0.4, 0.5, 0.6], second=1.0)
    first, eighth, last = compared(TEACHER, student).speed_ups
    assert first.k == pytest.approx(2)
    assert first.times is not None
    assert first.times.value == pytest.approx(4 / 2)
    assert eighth.k == pytest.approx(16)
    assert (last.k, last.times, last.reached) == (None, None, 0)
    assert last.accuracy == pytest.approx(0.7)


def test_speed_up_counts_from_the_fewest_completions_that_are_as_accurate() -> None:
    peaked = model("peaked", [0.3, 0.5, 0.5, 0.5, 0.5], second=1.0)
    *_, last = compared(peaked, model("other", [0.3, 0.5, 0.6, 0.7, 0.8], 1.0)).speed_ups
    assert (last.k, last.times.value if last.times else None) == (2, 1)


def test_crossover_where_the_curves_cross() -> None:
    student = model("student", [0.05, 0.1, 0.2, 0.45, 0.6], second=1.0)
    (crossing,) = compared(TEACHER, student).crossovers
    assert (crossing.first, crossing.last) == (1, 16)
    assert crossing.seconds is not None
    # u octaves beyond 4 s: the student has 0.2 + 0.25 u, the teacher 0.3 + 0.1 u
    assert crossing.seconds.value == pytest.approx(4 * 2 ** (2 / 3), rel=1e-3)
    assert crossing.ahead == 1
    assert crossing.seconds.low == pytest.approx(crossing.seconds.high)


def test_crossover_at_the_start_and_never() -> None:
    better = model("better", [0.4, 0.5, 0.6, 0.7, 0.8], second=1.0)
    worse = model("worse", [0.1, 0.15, 0.2, 0.25, 0.3], second=4.0)
    first, second = compared(TEACHER, better, worse).crossovers
    assert first.seconds is not None
    assert first.seconds.value == first.first == 1
    assert (second.seconds, second.ahead) == (None, 0)


def test_equal_models_are_not_ahead_of_each_other() -> None:
    twin = model("twin", [0.3, 0.4, 0.5, 0.6, 0.7], second=4.0)
    (crossing,) = compared(TEACHER, twin).crossovers
    assert (crossing.seconds, crossing.ahead) == (None, 0)


def test_too_little_time_for_a_completion_is_enough_for_some_problems() -> None:
    teacher = model("teacher", [0.3] * 5, second=4.0)
    student = model("student", [0.2, 0.35, 0.4, 0.4, 0.4], second=1.0)
    (crossing,) = compared(teacher, student).crossovers
    # in one second the teacher makes a completion of a quarter of the problems, 0.075 in all
    assert crossing.seconds is not None
    assert crossing.seconds.value == crossing.first == 1


def test_shares_are_of_resamples() -> None:
    rng = np.random.default_rng(1)
    ones = {1: np.ones(PROBLEMS)}
    before = Measured("before", K_K, {"coverage": np.full((PROBLEMS, 5), 0.5)}, 1, ones)
    chance_PK = np.tile((rng.random((PROBLEMS, 1)) < 0.5).astype(np.float64), 5)
    after = Measured("after", K_K, {"coverage": chance_PK}, 1, ones)
    found = compared(before, after)
    assert 0 < found.speed_ups[0].reached < 1
    assert 0 < found.crossovers[0].ahead < 1


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    chance_PK = rng.random((PROBLEMS, 5))
    second = np.ones(PROBLEMS)
    before = Measured("before", K_K, {"majority": chance_PK}, 1, {1: second})
    after = Measured("after", K_K, {"majority": chance_PK + 0.05}, 1, {1: second})
    found = compared(before, after).differences
    assert [(each.rule, each.name, each.k) for each in found] == [
        ("majority", "after", k) for k in (1, 8, 16)
    ]
    for each in found:
        assert (each.by.value, each.by.low, each.by.high) == pytest.approx((0.05, 0.05, 0.05))


def test_candidates_and_the_front() -> None:
    student = model("student", [0.2, 0.3, 0.4, 0.5, 0.6], second=1.0)
    found = {(c.name, c.k, c.slots): c for c in compared(TEACHER, student).candidates}
    assert len(found) == 2 * 5 * 2
    front = {key for key, candidate in found.items() if candidate.on_front}
    assert front == {("student", k, 64) for k in (1, 2, 4, 8, 16)} | {("teacher", 16, 64)}
    assert all(candidate.kept == candidate.on_front for candidate in found.values())
    assert found["teacher", 4, 16].seconds == 4 * 2 * 4


def test_inclusion_is_a_share_of_resamples() -> None:
    rng = np.random.default_rng(0)

    def drawn(name: str) -> Measured:
        chance_PK = (rng.random((PROBLEMS, 1)) < 0.5).astype(np.float64)
        return Measured(name, np.ones(1), {"coverage": chance_PK}, 1, {1: np.ones(PROBLEMS)})

    kept = [each.kept for each in compared(drawn("a"), drawn("b")).candidates]
    assert 0 < kept[1] < 1
    assert sum(kept) == pytest.approx(1), "equally fast: one of the two, and the first of equals"


def test_rules_that_not_all_have_are_left_out() -> None:
    chances: dict[str, Floats] = {**TEACHER.chance_PK, "best of k by judge": np.ones((PROBLEMS, 5))}
    scored = Measured("scored", K_K, chances, 64, TEACHER.seconds_P)
    assert {each.rule for each in compared(scored, TEACHER).candidates} == {"coverage"}
    assert {each.rule for each in compared(scored).candidates} == {*chances}
    assert compared(scored).speed_ups == ()
