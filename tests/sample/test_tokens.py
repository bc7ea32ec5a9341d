"""From logits to tokens: the random stream, the draw, and the filters against a plain reference."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from retort.sample.tokens import (
    SamplingParams,
    draw,
    log_probability,
    probabilities,
    uniforms,
)

LARGEST_UNIFORM = 1 - 2**-53
NONE = -math.inf  # the logit of a token that cannot be drawn


def splitmix64(seed: int, position: int) -> float:
    """SplitMix64's output number `position` as a number in [0, 1), in Python's integers."""
    mask = 2**64 - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def stream(seed: int, count: int) -> Tensor:
    return uniforms(torch.full((count,), seed), torch.arange(count))


def grid(count: int) -> Tensor:
    """Evenly spaced uniform numbers: what they draw has its exact share, to within one of them."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def shares(logits: Sequence[float], params: SamplingParams, count: int = 4096) -> list[float]:
    """How often each token is drawn."""
    logits_BV = torch.tensor([logits]).expand(count, -1)
    drawn = Counter(draw(logits_BV, grid(count), params).tolist())
    return [drawn[token] / count for token in range(len(logits))]


def reference(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """What is drawn with which probability, by sorting and counting; equal tokens stay together."""
    top = max(logits)
    weight = [math.exp((logit - top) / params.temperature) for logit in logits]
    alive = set(range(len(weight)))
    if params.top_k:
        least = sorted(weight, reverse=True)[: params.top_k][-1]
        alive = {token for token in alive if weight[token] >= least}
    total, mass, least = sum(weight[token] for token in alive), 0.0, math.inf
    for token in sorted(alive, key=lambda token: -weight[token]):
        if mass < params.top_p * total:
            least = weight[token]
        mass += weight[token]
    alive = {token for token in alive if weight[token] >= least}
    alive = {token for token in alive if weight[token] >= params.min_p * max(weight)}
    total = sum(weight[token] for token in alive)
    return [weight[token] / total * (token in alive) for token in range(len(weight))]


def chi_square(counts: Sequence[float], expected: Sequence[float]) -> float:
    return sum((n - e) ** 2 / e for n, e in zip(counts, expected, strict=True))


# The random stream


def test_published_first_outputs() -> None:
    # The generator's first three outputs for seed 0, as its reference implementation prints them.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert stream(0, 3).tolist() == [(word >> 11) * 2.0**-53 for word in published]


def test_equals_the_generator_in_plain_integers() -> None:
    seeds = [0, 1, 2**31, 2**62 + 12345, 2**63 - 1, *torch.randint(2**62, (50,)).tolist()]
    positions = [0, 1, 2, 63, 2047, 10**6, 2**40]
    pairs = [(seed, position) for seed in seeds for position in positions]
    seed_B, position_B = torch.tensor(pairs).T
    ours = uniforms(seed_B, position_B)
    assert ours.dtype == torch.float64
    assert ours.tolist() == [splitmix64(*pair) for pair in pairs]


def test_the_same_in_any_batch_and_order() -> None:
    seed_B, position_B = torch.randint(2**62, (100,)), torch.randint(5000, (100,))
    together = uniforms(seed_B, position_B)
    order = torch.randperm(100)
    assert torch.equal(uniforms(seed_B[order], position_B[order]), together[order])
    alone = torch.cat([uniforms(seed_B[i : i + 1], position_B[i : i + 1]) for i in range(100)])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("across", ["positions", "seeds"])
def test_uniform(across: str) -> None:
    count, bins = 64_000, 64
    many, one = torch.arange(count), torch.full((count,), 7)
    u = uniforms(one, many) if across == "positions" else uniforms(many, one)
    assert 0 <= u.min() < 1e-3
    assert 0.999 < u.max() < 1
    # Five standard deviations of the mean, the variance and the lag-one correlation.
    margin = 5 / math.sqrt(count)
    assert abs(u.mean() - 0.5) < margin * math.sqrt(1 / 12)
    assert abs(u.var() - 1 / 12) < margin * math.sqrt(1 / 180)
    assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < margin
    # 63 degrees of freedom: beyond 131 in one of a million samples, and below 20 just as rarely.
    counts = (u * bins).long().bincount(minlength=bins).tolist()
    assert 20 < chi_square(counts, [count / bins] * bins) < 131


# The draw


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([1.0, -0.5, 0.0, 2.0, NONE, 1.0])
    count = 50_000
    params = SamplingParams(temperature=temperature)
    token_B = draw(logits.expand(count, -1), stream(11, count), params)
    counts = token_B.bincount(minlength=6).tolist()
    expected = (count * (logits.double() / temperature).softmax(0)).tolist()
    assert counts.pop(4) == expected.pop(4) == 0
    assert chi_square(counts, expected) < 33.4  # 4 degrees of freedom: one sample of a million


def test_rows_are_drawn_each_from_its_own_logits() -> None:
    logits_BV = torch.full((5, 5), NONE).fill_diagonal_(0.0)
    assert draw(logits_BV, torch.rand(5), SamplingParams()).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("u", [0.0, 2**-53, 0.5, 1 - 2**-24, LARGEST_UNIFORM])
@pytest.mark.parametrize(
    "logits",
    [
        [NONE, NONE, 0.0, 1.0],
        [0.0, 1.0, NONE, NONE],
        [NONE, 0.0, NONE, 0.0, NONE],
        [NONE, 0.0, NONE],
        [-1000.0, 0.0, -1000.0],  # no infinity, yet float32 has no number that small
    ],
)
def test_no_token_without_probability(logits: list[float], u: float) -> None:
    (token,) = draw(torch.tensor([logits]), torch.tensor([u]), SamplingParams()).tolist()
    assert logits[token] > -1000


@pytest.mark.parametrize("u", [0.0, LARGEST_UNIFORM])
@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.5}])
def test_no_token_that_a_filter_left_out(filters: dict[str, float], u: float) -> None:
    logits = torch.tensor([[0.0, 3.0, 0.0, 3.0, 0.0]])
    params = SamplingParams(**filters)  # type: ignore[arg-type]  # keys by name
    assert draw(logits, torch.tensor([u]), params).tolist() == ([1] if u == 0 else [3])


def test_a_large_vocabulary_leaves_no_room_at_the_end() -> None:
    # Rounding over 100 000 sums leaves the last one away from 1; u must still reach no further.
    logits_BV = torch.randn(4, 100_000)
    logits_BV[:, 50_000:] = NONE
    logits_BV[:, 5::7] = NONE
    for u in (0.0, 0.3, 1 - 2**-20, LARGEST_UNIFORM):
        token_B = draw(logits_BV, torch.full((4,), u, dtype=torch.float64), SamplingParams())
        assert (logits_BV.gather(1, token_B[:, None]) > NONE).all()


def test_greedy_takes_the_largest() -> None:
    logits_BV = torch.randn(50, 61)
    greedy = draw(logits_BV, torch.rand(50), SamplingParams(temperature=0))
    assert greedy.tolist() == [row.index(max(row)) for row in logits_BV.tolist()]


def test_a_low_temperature_is_nearly_greedy() -> None:
    logits_BV = torch.tensor([[0.0, 80.0, 79.0, -80.0]]).expand(100, -1)
    assert set(draw(logits_BV, grid(100), SamplingParams(temperature=1e-3)).tolist()) == {1}


def test_half_precision_is_drawn_in_float32() -> None:
    logits_BV = torch.randn(20, 61).bfloat16()
    u, params = torch.rand(20), SamplingParams(top_p=0.9)
    assert torch.equal(draw(logits_BV, u, params), draw(logits_BV.float(), u, params))


# The filters

FILTERS = [
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 12},
    {"top_k": 1000},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"min_p": 0.05},
    {"min_p": 0.6},
    {"top_k": 5, "top_p": 0.7},
    {"top_k": 4, "top_p": 0.8, "min_p": 0.3, "temperature": 1.7},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_equal_the_reference(filters: dict[str, float]) -> None:
    params = SamplingParams(**{"temperature": 0.9, **filters})  # type: ignore[arg-type]
    for _ in range(10):
        logits = (1.5 * torch.randn(12)).tolist()
        expected = reference(logits, params)
        assert shares(logits, params) == pytest.approx(expected, abs=1.5 / 4096)


@pytest.mark.parametrize("filters", [{}, *FILTERS], ids=str)
def test_probabilities_are_what_is_drawn(filters: dict[str, float]) -> None:
    params = SamplingParams(**{"temperature": 0.9, **filters})  # type: ignore[arg-type]
    logits_BV = 1.5 * torch.randn(10, 12)
    for logits, found in zip(logits_BV.tolist(), probabilities(logits_BV, params), strict=True):
        assert found.tolist() == pytest.approx(reference(logits, params), abs=1e-6)
    greedy = probabilities(logits_BV, SamplingParams(temperature=0))
    assert torch.equal(greedy.argmax(-1), logits_BV.argmax(-1))
    assert greedy.sum(-1).tolist() == greedy.amax(-1).tolist() == [1.0] * 10


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 1}, {1, 4}),
        ({"top_k": 2}, {1, 4}),
        ({"top_k": 3}, {0, 1, 2, 4, 5}),
        ({"top_p": 0.1}, {1, 4}),
        ({"top_p": 0.7}, {0, 1, 2, 4, 5}),
        ({"min_p": 0.9}, {1, 4}),
    ],
    ids=str,
)
def test_equal_tokens_stay_or_go_together(filters: dict[str, float], kept: set[int]) -> None:
    # Two tokens of 3/10 each, three of 1/10 and two of 1/20.
    ties = [math.log(p) for p in (0.1, 0.3, 0.1, 0.05, 0.3, 0.1, 0.05)]
    params = SamplingParams(temperature=1, **filters)  # type: ignore[arg-type]
    found = shares(ties, params)
    assert {token for token, share in enumerate(found) if share > 0} == kept
    assert found == pytest.approx(reference(ties, params), abs=1.5 / 4096)


def test_top_p_counts_what_top_k_left() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # Of the two that are left the first has 4/7, which is 0.55 and more; of all it has 0.4.
    assert shares(logits, SamplingParams(temperature=1, top_k=2, top_p=0.55))[:2] == [1, 0]
    assert shares(logits, SamplingParams(temperature=1, top_p=0.55))[1] > 0


def test_filters_come_after_the_temperature() -> None:
    logits = [0.0, -1.0, -2.0]
    assert shares(logits, SamplingParams(temperature=0.2, top_p=0.9)) == [1, 0, 0]
    assert min(shares(logits, SamplingParams(temperature=5, top_p=0.9))) > 0


# The rest


def test_log_probability_is_the_models_own() -> None:
    logits_BV, token_B = 5 * torch.randn(30, 61), torch.randint(61, (30,))
    expected = logits_BV.double().log_softmax(-1).gather(1, token_B[:, None]).squeeze(1)
    found = log_probability(logits_BV, token_B)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.0),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"SamplingParams: {name} = {value} is out of range"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_values_at_the_edge_are_not() -> None:
    SamplingParams(n=1, max_tokens=1, temperature=0, top_k=0, top_p=1, min_p=0)
