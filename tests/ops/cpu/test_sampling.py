"""Tokens by the kernel against those by torch."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from retort.ops.cpu import sampling
from retort.ops.cpu.team import of_threads
from retort.sample.tokens import SamplingParams, draw, uniforms

NONE = -math.inf


def streams(rows: int) -> tuple[Tensor, Tensor]:
    seed_S, count_S = torch.randint(0, 2**63 - 1, (rows,)), torch.randint(0, 9999, (rows,))
    seed_S[0], count_S[0] = 2**63 - 1, 0
    return seed_S, count_S


def sampled(
    logits_SV: Tensor, seed_S: Tensor, count_S: Tensor, temperature: float, threads: int = 1
) -> tuple[Tensor, Tensor]:
    rows, tokens = logits_SV.shape
    token_S, logprob_S = torch.full((rows,), -1), torch.zeros(rows)
    part_SJ = np.empty((rows, -(-tokens // sampling.BLOCK)))
    sampling.sample(
        logits_SV.numpy(),
        seed_S.numpy(),
        count_S.numpy(),
        temperature,
        part_SJ,
        token_S.numpy(),
        logprob_S.numpy(),
        of_threads(threads),
    )
    return token_S, logprob_S


def test_uniform_numbers_are_the_same_bit_by_bit() -> None:
    seed_S, count_S = streams(10_000)
    found_S = np.empty(10_000)
    sampling.uniforms(seed_S.numpy(), count_S.numpy(), found_S)
    assert np.array_equal(found_S, uniforms(seed_S, count_S).numpy())


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("tokens", [1, 2, 61, 256, 257, 1000])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_tokens_as_torch(temperature: float, tokens: int, threads: int) -> None:
    logits_SV = 3 * torch.randn(300, tokens)
    logits_SV[::3] -= 1e3  # far from 0, where nothing but differences count
    logits_SV[1::3, ::2] = NONE
    logits_SV[:, -1] = logits_SV[:, -1].clamp(min=-2e3)
    seed_S, count_S = streams(300)
    token_S, logprob_S = sampled(logits_SV, seed_S, count_S, temperature, threads)
    wanted_S = draw(logits_SV, uniforms(seed_S, count_S), SamplingParams(temperature=temperature))
    assert torch.equal(token_S, wanted_S)
    precise_S = logits_SV.double().log_softmax(1).gather(1, wanted_S[:, None]).squeeze(1).float()
    torch.testing.assert_close(logprob_S, precise_S)


def test_shares_are_the_probabilities() -> None:
    logits_V = torch.tensor([0.0, NONE, 2.0, 1.0, NONE])
    rows = 40_000
    token_S, _ = sampled(logits_V.expand(rows, -1).contiguous(), *streams(rows), 0.7)
    shares = torch.bincount(token_S, minlength=5) / rows
    torch.testing.assert_close(shares, (logits_V / 0.7).softmax(0), atol=0.01, rtol=0)
    assert shares[1] == shares[4] == 0


def test_the_last_token_that_can_be_drawn_ends_the_distribution() -> None:
    """The largest uniform numbers must not fall behind it, into blocks of no weight."""
    logits_SV = torch.full((2000, 700), NONE)
    logits_SV[:, 100:300] = torch.randn(2000, 200)
    token_S, _ = sampled(logits_SV, *streams(2000), 1.0)
    assert ((token_S >= 100) & (token_S < 300)).all()


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_of_no_meaning_are_told(bad: float, temperature: float) -> None:
    logits_SV = torch.randn(3, 600)
    logits_SV[0, 400], logits_SV[1] = bad, NONE
    token_S, logprob_S = sampled(logits_SV, *streams(3), temperature)
    assert token_S[:2].tolist() == [0, 0]
    assert logprob_S.isnan().tolist() == [True, True, False]


def test_greedy_takes_the_first_of_several() -> None:
    logits_SV = torch.zeros(1, 600)
    logits_SV[0, [5, 300, 301]] = 1.0
    assert sampled(logits_SV, *streams(1), 0.0)[0].tolist() == [5]
