"""Weights of several layers as one: the same numbers, held once, found again, or in a copy."""

import pytest
import torch
from torch import Tensor, nn

from retort.ops.cpu.team import ALONE
from retort.sample.fused_weights import Matrix, Panels, fused


def layers(*outputs: int, inputs: int = 5) -> list[nn.Linear]:
    return [nn.Linear(inputs, each, bias=False).requires_grad_(False) for each in outputs]


def side_by_side(several: list[nn.Linear]) -> Tensor:
    return torch.cat([layer.weight.detach().t() for layer in several], dim=1)


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("outputs", [(3,), (4, 2, 3), (200, 56), (256,)])
def test_one_matrix(outputs: tuple[int, ...], copied: bool) -> None:
    several = layers(*outputs)
    wanted, before = side_by_side(several), [layer.weight.clone() for layer in several]
    matrix_IO = fused(several, copied)
    assert torch.equal(matrix_IO, wanted)
    assert matrix_IO.stride(1) == 1
    for layer, weight in zip(several, before, strict=True):
        assert torch.equal(layer.weight, weight)
        assert (place(layer.weight) == place(matrix_IO)) != copied


@pytest.mark.parametrize("outputs", [(3,), (4, 2, 3), (200, 56)])
def test_found_again(outputs: tuple[int, ...]) -> None:
    several = layers(*outputs)
    first, again = fused(several, False), fused(several, True)
    assert first.data_ptr() == again.data_ptr()
    assert first.stride() == again.stride()
    assert torch.equal(first, again)


def test_other_neighbours_are_not_taken_for_it() -> None:
    one, two, three = several = layers(4, 2, 3)
    wanted = {pair: side_by_side(list(pair)) for pair in [(two, one), (one, three), (one, two)]}
    fused(several, False)
    for pair, matrix_IO in wanted.items():
        assert torch.equal(fused(list(pair), True), matrix_IO)


def test_rows_do_not_compete_for_a_cache() -> None:
    assert fused(layers(200, 56), False).stride(0) == 272
    assert fused(layers(200), False).stride(0) == 200


def test_made_in_inference_mode_it_can_be_trained() -> None:
    (layer,) = several = layers(3)
    with torch.inference_mode():
        fused(several, False)
    layer.requires_grad_(True)
    layer(torch.randn(2, 5)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch multiplies without MKL")
@pytest.mark.parametrize("outputs", [(3,), (200, 56), (256,)])
@pytest.mark.parametrize("rows", [1, 7, 8])
def test_products_with_packed_weights(rows: int, outputs: tuple[int, ...]) -> None:
    several = layers(*outputs, inputs=33)
    matrix = Matrix(several, slots=8, copied=False, packed=True)
    wide_SI = torch.randn(rows, 40)
    for x_SI in (wide_SI[:, :33].contiguous(), wide_SI[:, 7:]):
        room_SO = torch.full((rows, sum(outputs)), 7.0)
        found_SO = matrix.times(x_SI, room_SO)
        assert found_SO.is_contiguous()
        assert (found_SO.data_ptr() == room_SO.data_ptr()) == (rows < 8)
        torch.testing.assert_close(found_SO, x_SI @ side_by_side(several))


@pytest.mark.parametrize("outputs", [(3,), (200, 56), (16, 5)])
@pytest.mark.parametrize("rows", [1, 8])
def test_products_with_panels(rows: int, outputs: tuple[int, ...]) -> None:
    several = layers(*outputs, inputs=33)
    places = [layer.weight.data_ptr() for layer in several]
    panels = Panels(several, ALONE)
    assert panels.outputs == sum(outputs)
    wide_SI = torch.randn(rows, 40)
    for x_SI in (wide_SI[:, :33].contiguous(), wide_SI[:, 7:]):
        room_SO = torch.full((rows, sum(outputs)), 7.0)
        assert panels.times(x_SI, room_SO) is room_SO
        torch.testing.assert_close(room_SO, x_SI @ side_by_side(several))
    assert places == [layer.weight.data_ptr() for layer in several], "layers are left alone"
