from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from itertools import permutations
from math import comb

import numpy as np
import pytest

from retort.report.adaptive import (
    CONFIDENCE,
    ORDERS,
    RULES,
    Replay,
    Rule,
    along,
    enough,
    leads,
    replay,
)

Groups = Sequence[int | None]


def naive(
    groups: Groups, weights: Sequence[float], correct: Sequence[bool], rule: Rule, window: int
) -> Replay:
    """Every order, a sample at a time."""
    results = []
    for order in permutations(range(len(groups))):
        drawn: list[int] = []
        while len(drawn) < len(order):
            new = order[len(drawn) : len(drawn) + window]
            drawn += new
            if stops([groups[i] for i in drawn], [groups[i] for i in new], rule):
                break
        alike, weighed = (share(groups, w, correct, drawn) for w in ([1.0] * len(order), weights))
        results.append((alike, weighed, len(drawn)))
    return Replay(*map(float, np.mean(results, axis=0)))


def stops(votes: Groups, new: Groups, rule: Rule) -> bool:
    if rule == "unanimous":
        return new[0] is not None and len(set(new)) == 1
    counts = [count for _, count in Counter(v for v in votes if v is not None).most_common(2)]
    first, second = [*counts, 0, 0][:2]
    return leads(first, second) >= CONFIDENCE


def share(
    groups: Groups, weights: Sequence[float], correct: Sequence[bool], drawn: Sequence[int]
) -> float:
    totals: Counter[int] = Counter()
    for i in drawn:
        group = groups[i]
        if group is not None:
            totals[group] += weights[i]  # type: ignore[assignment]
    top = [group for group, total in totals.items() if total == max(totals.values())]
    right = {group: correct[i] for i, group in enumerate(groups) if group is not None}
    return sum(right[group] for group in top) / max(1, len(top))


def test_votes_that_are_needed_are_the_fewest_that_lead() -> None:
    needed = enough(300)
    assert len(needed) == 301
    for second in (*range(40), 300):
        assert leads(needed[second], second) >= CONFIDENCE > leads(needed[second] - 1, second)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("window", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("groups", "right"),
    [
        ((0, 0, 0, 0, 1, 2, None), {0}),
        ((0, 1, 1, 1, 1, 1, 1), {1}),
        ((0, 0, 1, 1, None, None, None), {0}),
        ((None, None, None), set()),
        ((0, 0, 0, 0, 0, 0), {0}),
    ],
)
def test_a_replay_equals_going_through_every_order(
    rule: Rule, window: int, groups: Groups, right: set[int]
) -> None:
    correct = [group in right for group in groups]
    weights = [1.0, 2.0, 0.5, 0.25, 4.0, 1.0, 1.0][: len(groups)]
    order_RN = np.array(list(permutations(range(len(groups)))))
    found = along(order_RN, groups, weights, correct, rule, window)
    expected = naive(groups, weights, correct, rule, window)
    assert astuple(found) == pytest.approx(astuple(expected), abs=1e-12)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (4, 0), (5, 1), (30, 20), (2, 2)])
def test_the_lead_is_the_beta_distribution_beyond_a_half(first: int, second: int) -> None:
    p = (np.arange(200_000) + 0.5) / 200_000
    density = p**first * (1 - p) ** second * comb(first + second, first) * (first + second + 1)
    assert leads(first, second) == pytest.approx(density[p > 0.5].mean() / 2, abs=1e-6)


def test_a_settled_problem_takes_four_samples() -> None:
    # 1 - 1/2^5 is the first above 0.95
    assert replay([0] * 64, [1] * 64, [True] * 64, "beta", 1) == Replay(1, 1, 4)
    assert replay([0] * 64, [1] * 64, [True] * 64, "unanimous", 5) == Replay(1, 1, 5)
    assert replay([0] * 64, [1] * 64, [True] * 64, "beta", 16) == Replay(1, 1, 16)


def test_the_window_is_what_a_look_costs() -> None:
    groups = [i % 3 for i in range(30)]
    correct = [group == 0 for group in groups]
    samples = [replay(groups, [1] * 30, correct, "beta", window).samples for window in (1, 5, 30)]
    assert samples == sorted(samples)
    assert samples[-1] == 30


def test_orders_depend_on_the_seed_alone() -> None:
    groups = [0] * 12 + [1] * 10 + [None] * 4
    correct = [group == 0 for group in groups]
    runs = [replay(groups, [1] * 26, correct, "beta", 2, seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert abs(runs[0].accuracy - runs[2].accuracy) < 4 / np.sqrt(ORDERS)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="2 groups, 1 weights and 2 verdicts"):
        replay([0, 1], [1], [True, False], "beta", 1)
    with pytest.raises(ValueError, match="a window of 0"):
        replay([0, 1], [1, 1], [True, False], "beta", 0)
