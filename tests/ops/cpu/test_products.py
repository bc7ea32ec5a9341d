"""Products with weights in panels against torch, in float64."""

import sys

import pytest
import torch
from llvmlite import binding
from torch import nn

from retort.ops.cpu import products, storage
from retort.ops.cpu.team import of_threads

SHAPES = [(1, 1, 1), (2, 3, 15), (3, 5, 16), (4, 16, 17), (5, 33, 48), (6, 7, 31), (13, 40, 47)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [*SHAPES, (64, 300, 150)])
def test_product(rows: int, inputs: int, outputs: int, threads: int) -> None:
    x_SI, weight_OI = torch.randn(rows + 2, inputs), torch.randn(outputs, inputs)
    panel_CIL, y_SO = products.panels([weight_OI]), torch.full((rows + 2, outputs), 7.0)
    arrays = x_SI.numpy(), panel_CIL.numpy(), y_SO.numpy()
    products.multiply(*arrays, rows, of_threads(threads))
    wanted_SO = x_SI[:rows].double() @ weight_OI.double().t()
    # Rounding grows with the sums: a few units in the last place of what they are made of.
    scale_SO = x_SI[:rows].double().abs() @ weight_OI.double().abs().t()
    assert ((y_SO[:rows] - wanted_SO).abs() <= 1e-6 * scale_SO).all()
    assert (y_SO[rows:] == 7).all(), "rows that do not run are left alone"


def test_a_row_is_summed_up_the_same_beside_any_others() -> None:
    x_SI, weight_OI = torch.randn(23, 70), torch.randn(40, 70)
    panels = products.panels([weight_OI]).numpy()
    y_SO, alone_SO = torch.empty(2, 23, 40)
    products.multiply(x_SI.numpy(), panels, y_SO.numpy(), 23, of_threads(2))
    for row in range(23):
        one, found = x_SI[row : row + 1].numpy(), alone_SO[row : row + 1].numpy()
        products.multiply(one, panels, found, 1, of_threads(1))
    assert torch.equal(alone_SO, y_SO)


@pytest.mark.parametrize("rows", [1, 5, 6, 23])
def test_weights_that_bfloat16_holds_are_kept_in_it(rows: int) -> None:
    x_SI, exact_OI = torch.randn(rows, 70), torch.randn(48, 70).bfloat16().float()
    other_OI = exact_OI.clone()
    other_OI[-1, -1] = 1 + 2**-8  # a bit more than bfloat16 has: all columns in float32
    half_CIL, whole_CIL = products.panels([exact_OI]), products.panels([other_OI])
    assert (half_CIL.dtype, whole_CIL.dtype) == (torch.bfloat16, torch.float32)
    y_SO, wanted_SO = torch.empty(2, rows, 48)
    for panel_CIL, found_SO in ((half_CIL, y_SO), (whole_CIL, wanted_SO)):
        arrays = x_SI.numpy(), storage.array(panel_CIL), found_SO.numpy()
        products.multiply(*arrays, rows, of_threads(2))
    assert torch.equal(y_SO[:, :-1], wanted_SO[:, :-1])


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, float("inf"), float("-inf"), 2.0**-126, -3e38])
def test_what_bfloat16_holds(value: float) -> None:
    weight_OI = torch.full((40, 30), value).bfloat16().float()
    assert products.itemsize(weight_OI) == products.itemsize(weight_OI.t()) == 2


@pytest.mark.parametrize("place", [(0, 0), (39, 29), (39, 0), (20, 11)])
@pytest.mark.parametrize("value", [1 + 2**-8, 0.1, 1e-40])
def test_one_weight_that_bfloat16_does_not_hold(
    place: tuple[int, int], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "CHECKED", 100)  # in several parts, the last one shorter
    weight_OI = torch.ones(40, 30)
    weight_OI[place] = value
    assert products.itemsize(weight_OI) == products.itemsize(weight_OI.t()) == 4
    assert products.itemsize(nn.Parameter(weight_OI[place[0]])) == 4


@pytest.mark.parametrize("outputs", [(5,), (16, 16), (3, 13), (7, 20, 6)])
def test_panels_hold_all_columns_once(outputs: tuple[int, ...]) -> None:
    weights = [torch.randn(each, 9) for each in outputs]
    panel_CIL = products.panels(weights)
    columns_OI = panel_CIL.transpose(1, 2).flatten(0, 1)
    total = sum(outputs)
    assert torch.equal(columns_OI[:total], torch.cat(weights))
    assert (columns_OI[total:] == 0).all()
    assert len(columns_OI) - total < products.LANES


@pytest.mark.parametrize(
    ("features", "system", "expected"),
    [
        ({"avx2": True, "fma": True, "avx512f": False}, "linux", True),
        ({"avx2": True, "fma": True}, "linux", True),
        ({"avx2": True, "fma": True, "avx512f": True}, "linux", False),
        ({"avx2": True, "fma": False}, "linux", False),
        ({"neon": True}, "linux", False),
        ({"avx2": True, "fma": True}, "darwin", False),
    ],
)
def test_which_processors_it_is_for(
    features: dict[str, bool], system: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(sys, "platform", system)
    assert products.suited() is expected
