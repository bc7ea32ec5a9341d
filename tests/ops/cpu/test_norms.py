"""Norms, residual sums and gates against torch."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from retort.ops.cpu import norms
from retort.ops.cpu.team import of_threads

EPS = 1e-3
WIDTHS = pytest.mark.parametrize(("slots", "rows", "width"), [(1, 1, 1), (5, 3, 33), (90, 90, 256)])
THREADS = pytest.mark.parametrize("threads", [1, 2])


def untouched(found_SD: Tensor, rows: int) -> bool:
    return bool((found_SD[rows:] == 7).all())


@WIDTHS
@THREADS
def test_norm(slots: int, rows: int, width: int, threads: int) -> None:
    h_SD, weight_D, found_SD = (
        torch.randn(slots, width),
        torch.randn(width),
        torch.full((slots, width), 7.0),
    )
    norms.norm(h_SD.numpy(), weight_D.numpy(), EPS, found_SD.numpy(), rows, of_threads(threads))
    wanted_SD = rms_norm(h_SD, (width,), weight_D, EPS)
    torch.testing.assert_close(found_SD[:rows], wanted_SD[:rows])
    assert untouched(found_SD, rows)


@WIDTHS
@THREADS
def test_sum_and_norm(slots: int, rows: int, width: int, threads: int) -> None:
    h_SD, y_SD = torch.randn(2, slots, width)
    weight_D, found_SD, before_SD = (
        torch.randn(width),
        torch.full((slots, width), 7.0),
        h_SD.clone(),
    )
    arrays = h_SD.numpy(), y_SD.numpy(), weight_D.numpy()
    norms.add_norm(*arrays, EPS, found_SD.numpy(), rows, of_threads(threads))
    wanted_SD = (before_SD + y_SD)[:rows]
    torch.testing.assert_close(h_SD[:rows], wanted_SD)
    torch.testing.assert_close(h_SD[rows:], before_SD[rows:])
    torch.testing.assert_close(found_SD[:rows], rms_norm(wanted_SD, (width,), weight_D, EPS))
    assert untouched(found_SD, rows)


@WIDTHS
@THREADS
def test_gate(slots: int, rows: int, width: int, threads: int) -> None:
    both_SI, found_SI = 9 * torch.randn(slots, 2 * width), torch.full((slots, width), 7.0)
    norms.gate(both_SI.numpy(), found_SI.numpy(), rows, of_threads(threads))
    gate_SI, up_SI = both_SI.chunk(2, dim=1)
    torch.testing.assert_close(found_SI[:rows], (silu(gate_SI) * up_SI)[:rows])
    assert untouched(found_SI, rows)
