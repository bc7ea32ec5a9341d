"""The scan by kernels, against the plain one in float64."""

from functools import partial

import pytest
import torch
from tests.ops.by_kernels import check, check_threads
from torch import Tensor

from retort.ops import chunked, ssd


def inputs(
    batch: int, length: int, heads: int, groups: int, channels: int, states: int
) -> list[Tensor]:
    """v, b and c lie side by side, as what comes out of a convolution does."""
    sizes = [heads * channels, groups * states, groups * states]
    v, b, c = torch.randn(batch, length, sum(sizes)).split(sizes, dim=-1)
    return [
        v.unflatten(-1, (heads, channels)),
        -torch.rand(batch, length, heads),
        b.unflatten(-1, (groups, states)),
        c.unflatten(-1, (groups, states)),
        torch.randn(batch, heads, channels, states),
    ]


GEOMETRIES = [
    ((1, 1, 1, 1, 1, 1), 64),
    ((3, 7, 2, 1, 1, 3), 1),
    ((2, 37, 4, 2, 3, 5), 8),
    ((1, 100, 4, 1, 8, 16), 16),
    ((2, 130, 2, 2, 32, 20), 64),
]


@pytest.mark.parametrize(("geometry", "chunk"), GEOMETRIES)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("strong", [None, -50.0, -1e4, float("-inf")])
def test_kernels_equal_torch(
    geometry: tuple[int, int, int, int, int, int], chunk: int, packed: bool, strong: float | None
) -> None:
    x = inputs(*geometry)
    if strong is not None:
        x[1][:, 3::5] = strong
    ids = torch.randint(4, geometry[:2]).sort(1).values
    documents = ids if packed else None
    scans = (partial(scan, document_BT=documents, chunk=chunk) for scan in SCANS)
    check(*scans, x, 2e-5)


SCANS = (chunked.scan, ssd.scan_chunked)


def test_documents_of_one_row_for_all() -> None:
    x, document_BT = inputs(2, 20, 2, 1, 3, 4), torch.arange(20)[None] // 7
    check(*(partial(scan, document_BT=document_BT, chunk=8) for scan in SCANS), x, 2e-5)


def test_any_number_of_threads_gives_the_same() -> None:
    check_threads(chunked.scan, inputs(2, 300, 4, 2, 32, 32))


def test_states_are_not_written_over() -> None:
    *x, state_BHPN = inputs(1, 9, 2, 1, 3, 4)
    before = state_BHPN.clone()
    chunked.scan(*x, state_BHPN, chunk=4)
    assert torch.equal(state_BHPN, before)


def test_less_is_kept_than_by_torch() -> None:
    """Bytes for the backward pass, beside the inputs."""
    x = [each.requires_grad_() for each in inputs(1, 256, 4, 4, 32, 64)]
    kept = []
    for scan in SCANS:
        found: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, found=found: found.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            scan(*x)
        kept.append(sum(found.values()))
    assert kept[0] < kept[1]
