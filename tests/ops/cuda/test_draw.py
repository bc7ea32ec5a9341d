"""Draws from logits against the sampler in torch, token by token from the same uniform numbers."""

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels for GPUs need triton, which is for Linux")

from retort.ops.cuda.draw import BLOCK, Filters, draw, floors, uniforms
from retort.sample import tokens

EDGES = [0, 1, 2**31, 2**62 + 12345, 2**63 - 1]


def streams(rows: int, device: str) -> tuple[Tensor, Tensor]:
    return torch.randint(2**62, (rows,), device=device), torch.randint(900, (rows,), device=device)


def params_of(temperature: float, filters: Filters) -> tokens.SamplingParams:
    return tokens.SamplingParams(temperature=temperature, **asdict(filters))


def check(logits_SV: Tensor, temperature: float, filters: Filters) -> Tensor:
    """That what is drawn is what the sampler in torch draws; returns it."""
    seed_S, count_S = streams(len(logits_SV), str(logits_SV.device))
    params = params_of(temperature, filters)
    token_S, logprob_S = draw(logits_SV, seed_S, count_S, temperature, filters)
    wanted_S = tokens.draw(logits_SV, tokens.uniforms(seed_S, count_S), params)
    assert token_S.tolist() == wanted_S.tolist()
    wanted_logprob_S = tokens.log_probability(logits_SV, token_S)
    torch.testing.assert_close(logprob_S, wanted_logprob_S.float(), atol=1e-5, rtol=1e-5)
    return token_S


def test_uniform_numbers_bit_by_bit(triton_device: str) -> None:
    seed_S, count_S = streams(300, triton_device)
    seed_S[: len(EDGES)] = torch.tensor(EDGES)
    count_S[:4] = torch.tensor([0, 2**40, 10**6, 2**31])
    found_S = uniforms(seed_S, count_S)
    assert found_S.dtype == torch.float64
    assert torch.equal(found_S, tokens.uniforms(seed_S, count_S))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_draws(temperature: float, dtype: torch.dtype, triton_device: str) -> None:
    logits_SV = (3 * torch.randn(5, 61)).to(triton_device, dtype)
    found_S = check(logits_SV, temperature, Filters())
    assert len(found_S.unique()) > 2


def test_several_blocks(triton_device: str) -> None:
    vocabulary = 2 * BLOCK + 77
    logits_SV = torch.randn(4, vocabulary, device=triton_device)
    logits_SV[0] = -math.inf
    logits_SV[0, -1] = 3.0  # blocks of nothing before the only one
    logits_SV[1, :BLOCK] += 20
    logits_SV[2, BLOCK] = 30
    found_S = check(logits_SV, 1.0, Filters())
    assert found_S[0] == vocabulary - 1
    assert found_S[1] < BLOCK
    assert found_S[2] == BLOCK
    check(logits_SV, 0.0, Filters())


def test_of_equal_logits_the_first_is_greedy(triton_device: str) -> None:
    logits_SV = torch.zeros(2, BLOCK + 50, device=triton_device)
    logits_SV[1, [BLOCK - 1, BLOCK + 3]] = 1.0
    seed_S, count_S = streams(2, triton_device)
    token_S, _ = draw(logits_SV, seed_S, count_S, 0.0, Filters())
    assert token_S.tolist() == [0, BLOCK - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "filters",
    [Filters(5), Filters(0, 0.6), Filters(0, 1.0, 0.2), Filters(30, 0.6), Filters(9, 0.9, 0.3)],
    ids=str,
)
def test_filters(filters: Filters, dtype: torch.dtype, triton_device: str) -> None:
    """Of neighbours among bfloat16 numbers, of either sign, and of equal ones."""
    bits = torch.randperm(61) + 15900
    above, below = bits.to(torch.int16).view(torch.bfloat16), (bits - 2**15).to(torch.int16)
    equal = torch.randn(61).round()
    rows = [above.float(), below.view(torch.bfloat16).float(), equal]
    logits_SV = torch.stack(rows).to(triton_device, dtype)
    floor_S = floors(logits_SV, 0.8, filters)
    assert floor_S is not None
    p_SV = tokens.probabilities(logits_SV, params_of(0.8, filters))
    assert torch.equal(logits_SV.float() >= floor_S[:, None], p_SV > 0)


def test_a_filter_leaves_out_what_it_says(triton_device: str) -> None:
    logits_SV = torch.arange(40, device=triton_device).bfloat16().div(40).expand(6, -1)
    assert set(check(logits_SV, 4.0, Filters(top_k=2)).tolist()) == {38, 39}


def test_more_than_all_tokens_is_no_filter(triton_device: str) -> None:
    check(torch.randn(3, 61, device=triton_device), 1.0, Filters(top_k=100))


def test_rows_of_a_larger_matrix(triton_device: str) -> None:
    logits_SV = torch.randn(4, 80, device=triton_device)[:, :61]
    check(logits_SV, 1.0, Filters())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: compiled code is silent
def test_what_is_not_a_number_stays_in_the_vocabulary(triton_device: str) -> None:
    logits_SV = torch.full((2, BLOCK + 50), math.nan, device=triton_device)
    for temperature in (0.0, 1.0):
        token_S, _ = draw(logits_SV, *streams(2, triton_device), temperature, Filters())
        assert ((token_S >= 0) & (token_S < BLOCK + 50)).all()
