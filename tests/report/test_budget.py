import pytest

from retort.report.budget import Pace, pareto_front


def test_seconds_and_completions_are_inverse() -> None:
    pace = Pace(tokens_per_second=500, mean_tokens=200)
    assert pace.seconds(8) == pytest.approx(3.2)
    assert pace.completions(3.2) == pytest.approx(8)


def test_pace_refuses_what_never_ends() -> None:
    with pytest.raises(ValueError, match=r"0 tokens/s and 200 tokens .* above 0"):
        Pace(tokens_per_second=0, mean_tokens=200)


def test_pareto_front_keeps_what_nothing_beats() -> None:
    points = [(4.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (3.0, 0.7), (8.0, 0.9), (1.0, 0.5)]
    assert pareto_front(points) == [1, 3, 0]
    assert pareto_front([]) == []
