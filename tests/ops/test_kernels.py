"""The scan that a device gets, and what flash-linear-attention is given and gives back."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.ops import chunked, kernels, ssd

HEADS, GROUPS = 4, 2


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """What chunk_simple_gla documents, token by token: S = exp(g) S + k^T v, o = scale q S, for
    q, k (B, T, H, K), v (B, T, H, V), g (B, T, H) and states (N, H, K, V).
    """
    assert output_final_state
    assert all(x.is_contiguous() for x in (q, k, v, g, initial_state))
    assert q.shape == k.shape
    assert q.shape[:3] == v.shape[:3] == g.shape
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        decayed = g[:, t].exp()[..., None, None] * state
        state = decayed + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in flash-linear-attention's place."""
    names = ("fla", "fla.ops", "fla.ops.simple_gla")
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].chunk_simple_gla = simple_gla  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def make_inputs(
    length: int, device: str = "cpu", channels: int = 6, state: int = 5
) -> list[Tensor]:
    inputs = [
        torch.randn(2, length, HEADS, channels),
        -torch.rand(2, length, HEADS) * 3,
        torch.randn(2, length, GROUPS, state),
        torch.randn(2, length, GROUPS, state),
        torch.randn(2, HEADS, channels, state),
    ]
    return [x.to(device).requires_grad_() for x in inputs]


def documents(length: int, device: str = "cpu") -> Tensor:
    """Two rows with bounds at different places; padding is a document, too."""
    document_BT = torch.arange(length).expand(2, -1) // 5
    document_BT = torch.stack([document_BT[0], (document_BT[1] + 1) // 2])
    document_BT[1, -2:] = -1
    return document_BT.to(device)


def compare(inputs: list[Tensor], document_BT: Tensor | None, tolerance: float) -> None:
    """Outputs, states and gradients of both scans."""
    results: list[list[Any]] = []
    for scan in (ssd.scan_chunked, kernels.scan_simple_gla):
        y_BTHP, last_BHPN = scan(*inputs, document_BT=document_BT)
        loss = (y_BTHP.sin().sum() + (last_BHPN * last_BHPN).sum()) / 7
        results.append([y_BTHP, last_BHPN, *torch.autograd.grad(loss, inputs)])
    for wanted, found in zip(*results, strict=True):
        scale = wanted.detach().abs().max() + 1e-3
        torch.testing.assert_close(found / scale, wanted / scale, atol=tolerance, rtol=0)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("length", [1, 23])
def test_arguments_and_results(length: int, packed: bool) -> None:
    compare(make_inputs(length), documents(length) if packed else None, 2e-5)


@pytest.mark.usefixtures("stand_in")
def test_decays_of_any_strength() -> None:
    inputs = [x.detach() for x in make_inputs(9)]
    inputs[1][:, 4] = -torch.inf
    inputs[1][:, 6] = -1e20
    for wanted, found in zip(
        ssd.scan_chunked(*inputs), kernels.scan_simple_gla(*inputs), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_cpu_and_exact_products_get_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_fla", lambda: True)
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32)):
        assert kernels.open_scan(torch.device(device), dtype) is ssd.scan_chunked
    assert kernels.open_scan(torch.device("cpu"), torch.float32) is chunked.scan
    with torch.no_grad():
        assert kernels.open_scan(torch.device("cpu"), torch.float32) is ssd.scan_chunked


def test_a_gpu_gets_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, wanted in ((True, kernels.scan_simple_gla), (False, ssd.scan_chunked)):
        monkeypatch.setattr(kernels, "has_fla", lambda installed=installed: installed)
        assert kernels.open_scan(torch.device("cuda"), torch.bfloat16) is wanted


def test_a_compiler_gets_what_it_can_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_fla", lambda: True)
    monkeypatch.setattr(kernels, "is_compiling", lambda: True)
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        assert kernels.open_scan(torch.device(device), dtype) is ssd.scan_chunked


@pytest.mark.cuda
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_the_real_one(packed: bool) -> None:
    pytest.importorskip("fla", reason="flash-linear-attention is not installed: the extra `gpu`")
    inputs = make_inputs(200, "cuda", channels=64, state=64)
    compare(inputs, documents(200, "cuda") if packed else None, 5e-3)  # its products are in TF32
