import itertools
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import comb, isnan, sqrt

import numpy as np
import pytest

from retort.report import metrics
from retort.report.metrics import (
    VoteGroup,
    bootstrap,
    bootstrap_counts,
    intervals,
    majority_at_k,
    pass_at_k,
    vote_at_k,
    wilson,
)

Answers = Sequence[str | None]


def brute_pass(correct: Sequence[bool], k: int) -> float:
    subsets = list(itertools.combinations(correct, k))
    return float(Fraction(sum(any(subset) for subset in subsets), len(subsets)))


def brute_majority(answers: Answers, right: dict[str, bool], k: int) -> float:
    subsets = list(itertools.combinations(answers, k))
    return float(sum(vote(subset, right) for subset in subsets) / len(subsets))


def vote(answers: Answers, right: dict[str, bool]) -> Fraction:
    votes = Counter(answer for answer in answers if answer is not None)
    top = [answer for answer in votes if votes[answer] == max(votes.values())]
    return Fraction(sum(right[answer] for answer in top), max(len(top), 1))


def enumerated_majority(sizes: Sequence[int], n: int, k: int) -> float:
    """The first of the groups is right; every possible count of votes, weighted exactly."""
    total = Fraction(0)
    for votes in itertools.product(*(range(min(size, k) + 1) for size in sizes)):
        silent = k - sum(votes)
        if silent >= 0 and votes[0] == max(votes) > 0:
            ways = np.prod([comb(*pair) for pair in zip(sizes, votes, strict=True)], dtype=object)
            total += Fraction(ways * comb(n - sum(sizes), silent), votes.count(votes[0]))
    return float(total / comb(n, k))


def drawn_answers(rng: random.Random) -> tuple[Answers, dict[str, bool]]:
    keys = "abcde"[: rng.randint(1, 5)]
    right = {key: rng.random() < 0.5 for key in keys}
    return rng.choices([None, *keys], k=rng.randint(1, 8)), right


def test_pass_at_k_equals_brute_force() -> None:
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            correct = [True] * c + [False] * (n - c)
            assert pass_at_k(n, c, k) == pytest.approx(brute_pass(correct, k), abs=1e-15)


def test_pass_at_k_broadcasts() -> None:
    values = pass_at_k(256, np.array([[0], [1], [256]]), np.array([1, 256]))
    np.testing.assert_array_equal(values, [[0, 0], [1 / 256, 1], [1, 1]])


def test_pass_at_k_keeps_tiny_chances() -> None:
    # 1 - C(n-1, 1)/C(n, 1) in floating point would have lost all but a few digits
    assert pass_at_k(10**15, 1, 1) == 1e-15


def test_more_completions_than_samples_are_undefined() -> None:
    assert isnan(pass_at_k(4, 2, 5))
    assert np.isnan(pass_at_k(4, [0, 4], 5)).all()
    assert isnan(majority_at_k(["a"] * 4, [True] * 4, 5))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_majority_equals_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(150):
        answers, right = drawn_answers(rng)
        correct = [answer is not None and right[answer] for answer in answers]
        for k in range(1, len(answers) + 1):
            expected = brute_majority(answers, right, k)
            assert majority_at_k(answers, correct, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 13, 30, 59, 60])
def test_majority_of_large_groups_equals_enumeration(k: int) -> None:
    sizes = [20, 19, 14]
    groups = [VoteGroup(size, i == 0) for i, size in enumerate(sizes)]
    expected = enumerated_majority(sizes, 60, k)
    assert vote_at_k(groups, 60, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sizes", [[64] * 4, [2] * 128, [1] * 256, [10] * 25])
@pytest.mark.parametrize("k", [7, 64, 256])
def test_equal_groups_share_the_vote_evenly(sizes: list[int], k: int) -> None:
    groups = [VoteGroup(size, i == 0) for i, size in enumerate(sizes)]
    assert vote_at_k(groups, 256, k) == pytest.approx(1 / len(sizes), abs=1e-11)


def test_without_a_vote_the_majority_is_wrong() -> None:
    assert majority_at_k([None, None], [False, False], 2) == 0
    assert majority_at_k([None, "a"], [False, True], 1) == 0.5


def test_two_groups_may_both_be_right() -> None:
    groups = [VoteGroup(3, True), VoteGroup(3, True)]
    assert vote_at_k(groups, 6, 4) == pytest.approx(1)


def test_sampled_majority_agrees_with_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [VoteGroup(30, True), VoteGroup(28, False), VoteGroup(5, False)]
    exact = [vote_at_k(groups, 80, k) for k in (1, 8, 41)]
    monkeypatch.setattr(metrics, "EXACT_SAMPLES", 10)
    sampled = [vote_at_k(groups, 80, k) for k in (1, 8, 41)]
    assert sampled == pytest.approx(exact, abs=4 * 0.0035)
    assert sampled == [vote_at_k(groups, 80, k) for k in (1, 8, 41)]


def test_majority_refuses_an_answer_with_two_verdicts() -> None:
    with pytest.raises(ValueError, match="'a' is judged both right and wrong"):
        majority_at_k(["a", "b", "a"], [True, False, False], 2)


def test_majority_refuses_what_does_not_fit_together() -> None:
    with pytest.raises(ValueError, match="3 answers but 2 verdicts"):
        majority_at_k(["a", "b", "a"], [True, False], 2)
    with pytest.raises(ValueError, match="k=0"):
        majority_at_k(["a"], [True], 0)
    with pytest.raises(ValueError, match="votes <= n"):
        vote_at_k([VoteGroup(3, True)], 2, 1)


def test_bootstrap_interval_has_the_width_of_a_known_variance() -> None:
    values_PK = np.random.default_rng(1).normal(5, 2, size=(400, 1))
    (estimate,) = bootstrap(values_PK, bootstrap_counts(400))
    assert estimate.value == pytest.approx(values_PK.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 2 / sqrt(400), rel=0.1)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    # 300 data sets of 150 problems with mean 0.7, as columns of one matrix
    values_PK = (np.random.default_rng(2).random((150, 300)) < 0.7).astype(float)
    estimates = bootstrap(values_PK, bootstrap_counts(150))
    hits = np.mean([estimate.low <= 0.7 <= estimate.high for estimate in estimates])
    assert 0.91 <= hits <= 0.98


def test_shared_weights_pair_the_models() -> None:
    chances_P = np.random.default_rng(3).random(200)
    values_PK = np.stack([chances_P, chances_P + 0.05], axis=1)
    counts_RP = bootstrap_counts(200)
    (difference,) = bootstrap(values_PK[:, [1]] - values_PK[:, [0]], counts_RP)
    assert (difference.low, difference.high) == pytest.approx((0.05, 0.05))
    assert (counts_RP.sum(axis=1) == 200).all()


def test_wilson_interval_solves_its_equation() -> None:
    for value, problems in [(0.0, 10), (0.3, 50), (0.75, 8), (1.0, 20)]:
        estimate = wilson(value, problems)
        for bound in {estimate.low, estimate.high} - {0.0, 1.0}:
            error = metrics.NORMAL_95 * sqrt(bound * (1 - bound) / problems)
            assert abs(value - bound) == pytest.approx(error)
    assert (wilson(0.0, 10).low, wilson(1.0, 10).high) == (0, 1)


def test_few_problems_get_wilson_and_many_the_bootstrap() -> None:
    few, many = np.ones((99, 1)), np.ones((100, 1))
    assert intervals(few, bootstrap_counts(99)) == [wilson(1.0, 99)]
    assert intervals(many, bootstrap_counts(100)) == [metrics.Estimate(1.0, 1.0, 1.0)]
