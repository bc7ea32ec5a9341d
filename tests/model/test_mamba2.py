"""The two Mamba-2 mixers: how they start, and what is particular to their gates."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import silu, softplus

from retort.model.config import Mamba2Config
from retort.model.decoder import Decoder
from retort.model.mamba2 import IDENTITY_GATE, DiscreteMamba2, Mamba2

MakeDecoder = Callable[..., Decoder]


def mamba_of(decoder: Decoder) -> Mamba2:
    mixer = decoder.blocks[0].mixer
    assert isinstance(mixer, Mamba2)
    return mixer


def discrete_of(decoder: Decoder) -> DiscreteMamba2:
    mixer = decoder.blocks[0].mixer
    assert isinstance(mixer, DiscreteMamba2)
    return mixer


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


def test_norm_works_within_groups(make_decoder: MakeDecoder) -> None:
    """One group's size does not change what another group's channels come out as."""
    norm = mamba_of(make_decoder("m")).norm
    y_BTE, z_BTE = torch.randn(1, 1, 64), torch.randn(1, 1, 64)
    louder = y_BTE.clone()
    louder[..., :32] *= 100
    skip = torch.zeros(1, 1, 64), torch.zeros(4)
    found, wanted = norm(louder, *skip, z_BTE), norm(y_BTE, *skip, z_BTE)
    torch.testing.assert_close(found[..., 32:], wanted[..., 32:])


def test_an_open_gate_is_one(make_decoder: MakeDecoder) -> None:
    """Whatever the input: the mixer is then its mixing matrix and its projections alone."""
    assert float(silu(torch.tensor(IDENTITY_GATE))) == pytest.approx(1, abs=1e-7)
    decoder = make_decoder("d")
    mixer, u_BTD = discrete_of(decoder), 10 * torch.randn(2, 9, 32)
    mixer.open_gate()
    context = decoder.context(torch.zeros(2, 9, dtype=torch.long), None, None)
    matrix_BHTS, x_BTHP = mixer.mixing_matrix(u_BTD, context), mixer.values(u_BTD, context)
    y_BTE = torch.einsum("bhts,bshp->bthp", matrix_BHTS, x_BTHP).flatten(2)
    found_BTD, wanted_BTD = mixer(u_BTD, context), mixer.out_proj(y_BTE)
    assert float((found_BTD - wanted_BTD).abs().max() / wanted_BTD.abs().max()) <= 1e-6
    rows_x, _, _ = mixer.rows()
    torch.testing.assert_close(x_BTHP.flatten(2), u_BTD @ rows_x.T)


def test_fresh_discrete_mixers_neither_shift_their_gate_nor_scale_their_input(
    make_decoder: MakeDecoder,
) -> None:
    mixer = discrete_of(make_decoder("d"))
    mixer.reset_parameters()
    assert not mixer.z_bias.any()
    assert torch.equal(mixer.D, torch.ones(4))
