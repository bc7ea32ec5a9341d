import numpy as np
import pyarrow as pa
import pytest

from retort.report.samples import SILENT, Aggregate, aggregated, by_problem
from retort.tables import SCORES

KEYS = {"problem_id": ["b", "a", "a", "b"], "sample_idx": [0, 1, 0, 1]}


def test_tables_in_any_order_become_arrays_by_problem() -> None:
    completions = pa.table(
        KEYS | {"token_count": [2, 4, 0, 1], "logprob": [-2.0, -2.0, 0.0, -np.inf]}
    )
    shuffled = [2, 3, 1, 0]
    verdicts = pa.table(KEYS | {"group": ["x", "x", None, "y"], "correct": [True, False] * 2})
    scores = pa.table(KEYS | {"value": [0.1, 0.2, 0.3, 0.4]})
    a, b = by_problem(completions, verdicts.take(shuffled), {"rm": scores.take(shuffled[::-1])})
    assert (a.group_N.tolist(), b.group_N.tolist()) == ([SILENT, 0], [0, 1])
    assert (a.groups, b.groups) == ([None, 0], [0, 1])
    assert (a.correct_N.tolist(), b.correct_N.tolist()) == ([True, False], [True, False])
    np.testing.assert_allclose(a.confidence_N, [1, np.exp(-0.5)])
    np.testing.assert_allclose(b.confidence_N, [np.exp(-1), 0])
    assert (a.scores["rm"].tolist(), b.scores["rm"].tolist()) == ([0.3, 0.2], [0.1, 0.4])
    np.testing.assert_array_equal(a.of_voters(a.scores["rm"]), [np.nan, 0.2])


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("last", [0.2, np.nan, 0.9, np.nan]),
        ("min", [0.2, np.nan, 0.9, np.nan]),
        ("prod", [0.1, np.nan, 0.9, np.nan]),
        ("mean", [0.35, np.nan, 0.9, np.nan]),
    ],
)
def test_scores_of_steps_become_one(aggregate: Aggregate, expected: list[float]) -> None:
    table = scored([[0.5, 0.2], [], [0.9], []])
    value = aggregated(table, aggregate, "probability")["value"].to_numpy()
    np.testing.assert_allclose(value, expected, atol=1e-15)


def test_logits_become_probabilities_before_anything_else() -> None:
    table = scored([[-800.0], [0.0], [np.log(3)], [800.0]])
    value = aggregated(table, "last", "logit")["value"].to_numpy()
    np.testing.assert_allclose(value, [0, 0.5, 0.75, 1], atol=1e-15)
    two = scored([[np.log(3), 0.0], [0.0], [0.0], []])
    assert aggregated(two, "prod", "logit")["value"][0].as_py() == pytest.approx(0.375)


def test_nothing_scored_is_nothing() -> None:
    assert np.isnan(aggregated(scored([[], [], [], []]), "min", "probability")["value"]).all()


def scored(steps: list[list[float]]) -> pa.Table:
    return pa.table(KEYS | {"scores": steps}, schema=SCORES)
