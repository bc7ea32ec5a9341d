import numpy as np
import pytest

from retort.report.budget import Pace, TokenWork, completions_to_reach, pareto_front, prices
from retort.report.scheduler import Lengths


def test_seconds_and_completions_are_inverse() -> None:
    pace = Pace(tokens_per_second=500, mean_tokens=200)
    assert pace.seconds(8) == pytest.approx(3.2)
    assert pace.completions(3.2) == pytest.approx(8)


def test_pace_refuses_what_never_ends() -> None:
    with pytest.raises(ValueError, match=r"0 tokens/s and 200 tokens .* above 0"):
        Pace(tokens_per_second=0, mean_tokens=200)


def test_pareto_front_keeps_what_nothing_beats() -> None:
    points = [(4.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (3.0, 0.7), (8.0, 0.9), (1.0, 0.5)]
    front_C = pareto_front(*np.array(points).T)
    assert np.flatnonzero(front_C).tolist() == [0, 1, 3]


def test_pareto_fronts_of_resamples_are_apart() -> None:
    rng = np.random.default_rng(0)
    seconds_RC, accuracy_RC = rng.integers(0, 6, (2, 50, 12)).astype(float)
    front_RC = pareto_front(seconds_RC, accuracy_RC)
    for row in range(50):
        points = list(zip(seconds_RC[row], accuracy_RC[row], strict=True))
        for i, point in enumerate(points):
            beaten = any(beats(other, point) for other in points) or point in points[:i]
            assert front_RC[row, i] == (not beaten)


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other


def test_completions_to_reach_a_target_by_curve() -> None:
    k_K = np.array([1.0, 4.0, 16.0])
    curve_RK = np.array([[0.2, 0.4, 0.6], [0.2, 0.4, 0.6], [0.5, 0.4, 0.7], [0.1, 0.2, 0.3]])
    found_R = completions_to_reach(k_K, curve_RK, np.array([0.3, 0.1, 0.5, 0.4]))
    np.testing.assert_allclose(found_R, [2, 1, 1, np.nan])


def test_a_completion_costs_flops_and_bytes() -> None:
    work = TokenWork(100, 2, weight_bytes=1000, row_bytes=10, bytes_per_context=3)
    # the first token of three sees five tokens of the prompt and itself
    flops, moved = work.of_completion([Lengths(np.array([3]), 5, 0.0)], rows=4)
    assert flops == 3 * 100 + 2 * (6 + 7 + 8)
    assert moved == 3 * (10 + 1000 / 4) + 3 * (6 + 7 + 8)


def test_prices() -> None:
    assert prices([]) == {}
    assert prices(["2.5", "a=b=1e1"]) == {"": 2.5, "a=b": 10}
    for wrong in ("", "a=", "a=free", "-1", "0", "inf", "nan"):
        with pytest.raises(ValueError, match=r"price .* above 0, such as 2\.5"):
            prices([wrong])
