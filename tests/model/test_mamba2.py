"""The Mamba-2 mixer as a matrix, how it starts, and what its state is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from retort.model.config import Mamba2Config
from retort.model.decoder import Decoder
from retort.model.mamba2 import Mamba2
from retort.model.state import MambaState

MakeDecoder = Callable[..., Decoder]


def mamba_of(decoder: Decoder) -> Mamba2:
    mixer = decoder.blocks[0].mixer
    assert isinstance(mixer, Mamba2)
    return mixer


def before_the_norm(mixer: Mamba2, run: Callable[[], object]) -> Tensor:
    """What the gated norm is given while `run` calls the mixer: the recurrence's output with D."""
    seen: list[Tensor] = []
    handle = mixer.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        run()
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("document", [None, [0, 0, 0, 0, 0, 1, 1, 2, -1]])
def test_matrix_times_values_is_what_the_norm_is_given(
    make_decoder: MakeDecoder, groups: int, document: list[int] | None
) -> None:
    settings = Mamba2Config(heads=4, head_dim=16, state_size=8, groups=groups, chunk_size=4)
    decoder = make_decoder("m", mixer=settings)
    mixer, u_BTD = mamba_of(decoder), torch.randn(2, 9, 32)
    document_BT = None if document is None else torch.tensor([document, [0] * 9])
    context = decoder.context(torch.zeros(2, 9, dtype=torch.long), None, document_BT)
    matrix_BHTS, x_BTHP = mixer.mixing_matrix(u_BTD, context), mixer.values(u_BTD, context)
    y_BTE = torch.einsum("bhts,bshp->bthp", matrix_BHTS, x_BTHP).flatten(2)
    torch.testing.assert_close(y_BTE, before_the_norm(mixer, lambda: mixer(u_BTD, context)))
    assert not matrix_BHTS.triu(1).any()


def test_fresh_decay_and_step_sizes_are_in_range(make_decoder: MakeDecoder) -> None:
    settings = Mamba2Config(heads=64, head_dim=1, state_size=2, groups=1)
    mixer = mamba_of(make_decoder("m", mixer=settings))
    mixer.reset_parameters()
    rate, dt = mixer.A_log.exp(), softplus(mixer.dt_bias)
    assert 1 <= rate.min() < 3 < 14 < rate.max() <= 16
    assert 1e-3 <= dt.min() < 2e-3 < 5e-2 < dt.max() <= 0.1
    # Log-uniform: half of them are below the geometric mean of the ends.
    assert 0.3 < float((dt < 1e-2).float().mean()) < 0.7
    assert torch.equal(mixer.D, torch.ones(64))


def test_state_stays_in_float32(make_decoder: MakeDecoder) -> None:
    """Small contributions would be lost in a long bfloat16 sum."""
    decoder = make_decoder("m").to(torch.bfloat16)
    state = decoder.init_state(1, 4)
    decoder(torch.zeros(1, 3, dtype=torch.long), state)
    layer = state.layers[0]
    assert isinstance(layer, MambaState)
    assert layer.ssm_BHPN.dtype == torch.float32
    assert layer.ssm_BHPN.any()
    assert layer.conv_BWE.dtype == torch.bfloat16


def test_state_size_does_not_depend_on_the_length(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("m")
    assert decoder.init_state(2, 10_000).nbytes == decoder.init_state(2, 10).nbytes


def test_norm_works_within_groups(make_decoder: MakeDecoder) -> None:
    """One group's size does not change what another group's channels come out as."""
    norm = mamba_of(make_decoder("m")).norm
    y_BTE, z_BTE = torch.randn(1, 1, 64), torch.randn(1, 1, 64)
    louder = y_BTE.clone()
    louder[..., :32] *= 100
    torch.testing.assert_close(norm(louder, z_BTE)[..., 32:], norm(y_BTE, z_BTE)[..., 32:])
