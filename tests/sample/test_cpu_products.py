"""Weights of several layers as one: the same numbers, held once, found again, or in a copy."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from retort.model.decoder import Decoder
from retort.ops.cpu import products
from retort.ops.cpu.team import ALONE
from retort.sample import cpu_products
from retort.sample.cpu_products import Matrix, Panels, fused, with_panels


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


@pytest.mark.parametrize("outputs", [(3,), (200, 56), (256,)])
@pytest.mark.parametrize("rows", [1, 7, 8])
@pytest.mark.parametrize(
    "packed",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not torch.backends.mkl.is_available(), reason="torch multiplies without MKL"
            ),
        ),
    ],
)
def test_torchs_product(rows: int, outputs: tuple[int, ...], packed: bool) -> None:
    several = layers(*outputs, inputs=33)
    x_SI, y_SO = torch.randn(8, 33), torch.full((8, sum(outputs)), 7.0)
    product = Matrix(several, x_SI, y_SO, copied=False, packed=packed)
    found_SO = torch.from_numpy(product(rows))
    assert found_SO.is_contiguous()
    assert (found_SO.data_ptr() == y_SO.data_ptr()) == (rows < 8 or not packed)
    torch.testing.assert_close(found_SO[:rows], x_SI[:rows] @ side_by_side(several))
    if rows < 8:
        assert (y_SO[rows:] == 7).all()


@pytest.mark.parametrize("outputs", [(3,), (200, 56), (16, 5)])
@pytest.mark.parametrize("rows", [1, 8])
def test_our_product(rows: int, outputs: tuple[int, ...]) -> None:
    several = layers(*outputs, inputs=33)
    places = [layer.weight.data_ptr() for layer in several]
    x_SI, y_SO = torch.randn(8, 33), torch.full((8, sum(outputs)), 7.0)
    found_SO = torch.from_numpy(Panels(several, x_SI, y_SO, ALONE)(rows))
    assert found_SO.data_ptr() == y_SO.data_ptr()
    torch.testing.assert_close(found_SO[:rows], x_SI[:rows] @ side_by_side(several))
    assert (y_SO[rows:] == 7).all()
    assert places == [layer.weight.data_ptr() for layer in several], "layers are left alone"


def test_products_read_what_has_been_written_since() -> None:
    """Into room of their own, where none is given."""
    several = layers(4, 5)
    x_SI = torch.zeros(3, 5)
    products = Panels(several, x_SI, None, ALONE), Matrix(several, x_SI, None, True, False)
    x_SI += torch.randn(3, 5)
    for product in products:
        torch.testing.assert_close(torch.from_numpy(product(3)), x_SI @ side_by_side(several))


@torch.inference_mode()
@pytest.mark.parametrize("few", [1, 256])
@pytest.mark.parametrize("layers", ["am", "d", "s"])
def test_a_decoder_with_panels_computes_the_same(
    make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, layers: str, few: int
) -> None:
    monkeypatch.setattr(cpu_products, "FEW", few)
    decoder = make_decoder(layers, qkv_bias=True)
    opened = with_panels(decoder, 1)
    assert {id(each) for each in opened.parameters()} == {id(x) for x in decoder.parameters()}
    ids_BT = torch.randint(61, (2, 7))
    called: list[int] = []
    multiply = products.multiply
    monkeypatch.setattr(
        products, "multiply", lambda *given: (called.append(given[3]), multiply(*given))
    )
    found = opened(ids_BT)
    assert set(called) == ({14} if few > 1 else set())
    called.clear()
    torch.testing.assert_close(found, decoder(ids_BT), atol=1e-5, rtol=1e-5)
    assert not called, "the decoder itself is as it was"
