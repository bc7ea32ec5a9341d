import numpy as np
import pyarrow as pa
import pytest

from retort.report.metrics import Floats
from retort.report.steps import StepTimes, fit, non_negative


def observed(
    rows: list[int], contexts: list[int], seconds: list[float], steps: int = 10
) -> pa.Table:
    """So many steps of each number of rows, which see so many tokens each."""
    return pa.table(
        {
            "rows": rows,
            "steps": [steps] * len(rows),
            "context": [steps * row * seen for row, seen in zip(rows, contexts, strict=True)],
            "seconds": [steps * second for second in seconds],
        }
    )


def test_planted_times_are_found() -> None:
    by_rows = {1: 4.0, 2: 5.0, 4: 7.0, 8: 8.0, 12: 20.0}
    rows = [row for row in by_rows for _ in range(3)]
    contexts = [10, 100, 1000] * len(by_rows)
    seconds = [by_rows[row] + 0.002 * row * seen for row, seen in zip(rows, contexts, strict=True)]
    found_B, per_context = fit(observed(rows, contexts, seconds))
    assert per_context == pytest.approx(0.002)
    assert len(found_B) == 13
    np.testing.assert_allclose(found_B[[1, 2, 4, 8, 12]], list(by_rows.values()))
    assert found_B[3] == pytest.approx(6), "halfway between two rows and four"
    assert found_B[6] == pytest.approx(7.5)
    assert found_B[10] == pytest.approx(14)


def test_times_never_fall_with_rows_nor_with_context() -> None:
    found_B, per_context = fit(observed([1, 2, 4], [100, 50, 10], [9.0, 5.0, 4.0]))
    assert per_context >= 0
    assert (np.diff(found_B) >= 0).all()
    assert found_B[-1] > 0 or per_context > 0


def test_rows_that_were_not_seen_lie_between_those_that_were() -> None:
    found_B, _ = fit(observed([1, 1, 7, 7], [10, 50, 10, 50], [2.0, 2.0, 8.0, 8.0]))
    np.testing.assert_allclose(found_B[1:], np.arange(2.0, 9.0))


def test_steps_of_few_rows_cost_as_the_fewest_that_were_seen() -> None:
    found_B, per_context = fit(observed([8], [100], [3.0]))
    times = StepTimes(found_B, per_context)
    assert times.slots == 8
    assert times.seconds(8, 800) == pytest.approx(3)
    assert times.seconds(1, 100) <= 3


def test_many_steps_say_more_than_one() -> None:
    few = observed([4], [100], [3.0], steps=1)
    found_B, per_context = fit(pa.concat_tables([observed([4], [100], [1.0], steps=100), few]))
    assert StepTimes(found_B, per_context).seconds(4, 400) == pytest.approx(1, rel=0.05)


def test_throughput_counts_starts() -> None:
    times = StepTimes(np.full(5, 0.5), 0.01, start=2.0, tokens=3.0)
    step = 0.5 + 0.01 * 4 * 50
    assert times.throughput(4, 4 * 50, 20) == pytest.approx(1 / (step / 12 + 2 / 20))


def test_non_negative_least_squares() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        design, target = rng.normal(size=(12, 5)), rng.normal(size=12)
        found = non_negative(design, target)
        gradient = design.T @ (design @ found - target)
        assert_optimal(found, gradient)


def assert_optimal(found: Floats, gradient: Floats) -> None:
    """Karush, Kuhn and Tucker: where it is positive nothing is to be gained, elsewhere only by
    going below zero."""
    assert (found >= 0).all()
    np.testing.assert_allclose(gradient[found > 0], 0, atol=1e-9)
    assert (gradient[found == 0] >= -1e-9).all()
