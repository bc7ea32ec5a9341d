import random
from collections.abc import Sequence
from itertools import combinations
from math import isnan, nan

import numpy as np
import pytest

from retort.report import selection
from retort.report.metrics import majority_at_k, pass_at_k
from retort.report.selection import best_of_k, weighted_at_k, weighted_vote

Sample = tuple[str | None, float, bool]
"""Group, score, verdict."""


def drawn(rng: random.Random) -> list[Sample]:
    """Up to 8 samples; scores from a few values, so that many are tied, and some are missing."""
    right = {key: rng.random() < 0.5 for key in "abcd"}
    groups = rng.choices([None, *right], k=rng.randint(1, 8))
    scores = rng.choices([0.0, 0.1, 0.2, 0.3, 0.7, nan], k=len(groups))
    return [
        (group, score, group is not None and right[group])
        for group, score in zip(groups, scores, strict=True)
    ]


def columns(samples: Sequence[Sample]) -> tuple[list[str | None], list[float], list[bool]]:
    groups, scores, correct = map(list, zip(*samples, strict=True))
    return groups, scores, correct


def brute(samples: Sequence[Sample], k: int, win: "type[Best] | type[Heaviest]") -> float:
    subsets = list(combinations(samples, k))
    return sum(win.share(subset) for subset in subsets) / len(subsets)


class Best:
    @staticmethod
    def share(subset: Sequence[Sample]) -> float:
        scored = [sample for sample in subset if not isnan(sample[1])]
        top = [right for _, score, right in scored if score == max(each[1] for each in scored)]
        return sum(top) / len(top) if top else 0.0


class Heaviest:
    @staticmethod
    def share(subset: Sequence[Sample]) -> float:
        votes = [each for each in subset if each[0] is not None and not isnan(each[1])]
        # in tenths, so that equal weights are equal
        weights = {
            group: sum(round(10 * score) for other, score, _ in votes if other == group)
            for group, _, _ in votes
        }
        right = {group: correct for group, _, correct in votes}
        top = [group for group, weight in weights.items() if weight == max(weights.values())]
        return sum(right[group] for group in top) / len(top) if top else 0.0


@pytest.mark.parametrize("seed", range(60))
def test_both_equal_brute_force(seed: int) -> None:
    samples = drawn(random.Random(seed))
    groups, scores, correct = columns(samples)
    ks = range(1, len(samples) + 1)
    best = [brute(samples, k, Best) for k in ks]
    heaviest = [brute(samples, k, Heaviest) for k in ks]
    np.testing.assert_allclose(best_of_k(scores, correct, np.array(ks)), best, atol=1e-12)
    np.testing.assert_allclose(
        weighted_at_k(groups, scores, correct, np.array(ks)), heaviest, atol=1e-12
    )


def test_numbers_give_numbers_and_arrays_arrays() -> None:
    samples = (["a", "b"], [0.2, 0.4], [True, False])
    assert best_of_k(*samples[1:], 1) == weighted_at_k(*samples, 1) == 0.5
    assert best_of_k(*samples[1:], 2) == weighted_at_k(*samples, 2) == 0
    for values in (best_of_k(*samples[1:], [[1, 2, 3]]), weighted_at_k(*samples, [[1, 2, 3]])):
        np.testing.assert_array_equal(values, [[0.5, 0, nan]])


def test_random_orders_are_within_their_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    samples = [sample for _ in range(3) for sample in drawn(rng)][:14]
    groups, scores, correct = columns(samples)
    groups = [None if group is None else f"{group}{right}" for group, _, right in samples]
    off = []
    ks = [2, 3, 5, 8, 12]
    monkeypatch.setattr(selection, "ENUMERATED_SUBSETS", 10**6)
    exact = weighted_vote(groups, scores, correct, ks)
    assert not exact.error_K.any()
    monkeypatch.setattr(selection, "ENUMERATED_SUBSETS", 0)
    for seed in range(40):
        found = weighted_vote(groups, scores, correct, ks, seed)
        off.append((found.value_K - exact.value_K) / found.error_K)
    # standard errors: the mean is right, and the spread is what was said
    assert np.abs(np.mean(off, axis=0)).max() < 4 / np.sqrt(40)
    assert 0.7 < np.std(off) < 1.3


def test_ks_keep_their_places_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "ENUMERATED_SUBSETS", 0)
    samples = (
        list("aabbc") * 4,
        list(np.linspace(0.1, 1, 20)),
        [True, True, False, False, False] * 4,
    )
    together = weighted_vote(*samples, [20, 3, 7, 3]).value_K
    apart = [weighted_vote(*samples, [k]).value_K[0] for k in (20, 3, 7, 3)]
    assert together[1] == together[3]
    assert together[0] == apart[0], "all samples are all samples in any order"
    np.testing.assert_allclose(together, apart, atol=0.15)


def test_equal_scores_are_a_coin_and_a_majority() -> None:
    groups, correct = list("aaabbc"), [True] * 3 + [False] * 3
    for k in range(1, 7):
        assert best_of_k([0.5] * 6, correct, k) == pytest.approx(0.5, abs=1e-12)
        expected = majority_at_k(groups, correct, k)
        assert weighted_at_k(groups, [0.3] * 6, correct, k) == pytest.approx(expected, abs=1e-12)


def test_a_perfect_scorer_reaches_coverage() -> None:
    correct = [True] * 3 + [False] * 253
    ks = np.array([1, 2, 16, 128, 256])
    np.testing.assert_allclose(
        best_of_k(np.array(correct) * 1.0, correct, ks), pass_at_k(256, 3, ks), rtol=1e-12
    )


def test_rounding_does_not_break_ties() -> None:
    # in floating point 0.1 + 0.2 is more than 0.3
    groups, correct = ["a", "a", "b"], [True, True, False]
    assert weighted_at_k(groups, [0.1, 0.2, 0.3], correct, 3) == 0.5


def test_silence_is_wrong() -> None:
    assert best_of_k([nan, nan], [False, False], 2) == 0
    assert weighted_at_k([None, "a"], [0.5, nan], [False, True], 2) == 0
    assert weighted_at_k([None, "a"], [0.5, 0.5], [False, True], 1) == 0.5
    assert best_of_k([nan, 0.5], [False, True], 1) == 0.5


@pytest.mark.parametrize("score", [-0.1, float("inf")])
def test_weights_that_are_none_are_refused(score: float) -> None:
    with pytest.raises(ValueError, match=r"score -0.1; weights|score inf; weights"):
        weighted_at_k(["a", "b"], [0.5, score], [True, False], 1)


@pytest.mark.parametrize("lengths", [(2, 3), (3, 2)])
def test_lengths_must_agree(lengths: tuple[int, int]) -> None:
    scores, correct = [0.5] * lengths[0], [True] * lengths[1]
    with pytest.raises(ValueError, match=f"{lengths[0]} scores but {lengths[1]} verdicts"):
        best_of_k(scores, correct, 1)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        best_of_k([0.5], [True], 0)
    with pytest.raises(ValueError, match="at least 1"):
        weighted_at_k(["a"], [0.5], [True], 0)
    with pytest.raises(ValueError, match="1 groups but 2 scores"):
        weighted_at_k(["a"], [0.5, 0.5], [True, True], 1)
    with pytest.raises(ValueError, match="both right and wrong"):
        weighted_at_k(["a", "a"], [0.5, 0.5], [True, False], 1)
