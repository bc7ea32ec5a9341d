"""The fused steps of the state-space mixers against the mixers themselves, token by token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels for GPUs need triton, which is for Linux")

from retort.model.config import DiscreteMamba2Config, Mamba1Config, Mamba2Config, MixerConfig
from retort.model.context import Context
from retort.model.decoder import Decoder, StateSpace
from retort.ops.cuda.attention import Rows
from retort.sample.cache import CacheSettings
from retort.sample.cuda_layers import Shared, open_layer

SIZES: dict[str, Any] = {"heads": 2, "head_dim": 5, "state_size": 3}
STOCK = Mamba2Config(**SIZES, groups=2)
WIDE = Mamba2Config(heads=2, head_dim=8, state_size=4, groups=1)
DISCRETE = DiscreteMamba2Config(**SIZES, groups=1)
SELECTIVE = Mamba1Config(heads=4, kv_heads=2, head_dim=6, dt_rank=3, state_size=3)
QUIRKS = Mamba1Config(
    heads=4, kv_heads=2, head_dim=6, dt_rank=3, state_size=3, conv_width=3, released_quirks=True
)

Make = Callable[..., Decoder]


def mixer_of(make_decoder: Make, config: MixerConfig, device: str, dtype: torch.dtype) -> Any:
    letter = {"mamba2": "m", "discrete_mamba2": "d", "mamba1": "s"}[config.kind]
    decoder = make_decoder(letter, hidden_size=16, mixer=config)
    return decoder.blocks[0].mixer.to(device, dtype)


def shared(rows: int, device: str) -> Shared:
    """Rows without anything that attention needs."""
    length_S, held_S = torch.zeros(2, rows, dtype=torch.int32, device=device)
    none = torch.empty(0, device=device)
    return Shared(Rows(length_S, none, none, none, none), none, none, held_S)


def run(
    mixer: StateSpace, u_TSD: Tensor, cache: CacheSettings, again: int = -1
) -> tuple[Tensor, list[Tensor]]:
    """Outputs and last states by kernels; the first row starts again before token `again`."""
    rows = shared(u_TSD.shape[1], str(u_TSD.device))
    layer = open_layer(mixer, 0, rows, 0, cache)
    outputs = []
    for t, u_SD in enumerate(u_TSD):
        if t == again:
            for tensor in (*layer.tensors()[:2], rows.rows.length_S, rows.held_S):
                tensor[0] = 0
        outputs.append(layer.step(u_SD, None))
        rows.rows.length_S.add_(1)
        rows.held_S.add_(1).remainder_(cache.write_every)
    return torch.stack(outputs), layer.tensors()


def plain(mixer: StateSpace, u_TSD: Tensor, again: int = -1) -> tuple[Tensor, Tensor]:
    """Outputs and last recurrent states by the mixer's own step."""
    state = mixer.init_state(u_TSD.shape[1], 0)
    none = torch.empty(0)
    outputs = []
    for t, u_SD in enumerate(u_TSD):
        if t == again:
            for tensor in state.tensors():
                tensor[0] = 0
        outputs.append(mixer(u_SD[:, None], Context(none, none, none, 0), state)[:, 0])
    return torch.stack(outputs), state.ssm_BHPN


def close(found: Tensor, wanted: Tensor, tolerance: float = 3e-5) -> None:
    torch.testing.assert_close(found.float(), wanted.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "config",
    [STOCK, WIDE, DISCRETE, SELECTIVE, QUIRKS],
    ids=["stock", "one group", "discrete", "mamba1", "mamba1 as released"],
)
def test_steps(config: MixerConfig, make_decoder: Make, triton_device: str) -> None:
    mixer = mixer_of(make_decoder, config, triton_device, torch.float32)
    u_TSD = torch.randn(4, 2, 16, device=triton_device)
    found_TSD, states = run(mixer, u_TSD, CacheSettings(), again=2)
    wanted_TSD, state_SHPN = plain(mixer, u_TSD, again=2)
    close(found_TSD, wanted_TSD)
    close(states[0].flatten(), state_SHPN.flatten())


@pytest.mark.parametrize("config", [WIDE, DISCRETE], ids=["stock", "discrete"])
def test_states_written_now_and_then(
    config: MixerConfig, make_decoder: Make, triton_device: str
) -> None:
    mixer = mixer_of(make_decoder, config, triton_device, torch.float32)
    u_TSD = torch.randn(6, 2, 16, device=triton_device)
    found_TSD, _ = run(mixer, u_TSD, CacheSettings(write_every=4), again=2)
    wanted_TSD, _ = plain(mixer, u_TSD, again=2)
    close(found_TSD, wanted_TSD)


def test_when_a_state_is_written(make_decoder: Make, triton_device: str) -> None:
    mixer = mixer_of(make_decoder, STOCK, triton_device, torch.float32)
    u_TSD = torch.randn(5, 1, 16, device=triton_device)
    _, early = run(mixer, u_TSD[:3], CacheSettings(write_every=4))
    assert not early[0].any()
    _, late = run(mixer, u_TSD, CacheSettings(write_every=4))
    close(late[0], plain(mixer, u_TSD[:4])[1])


@pytest.mark.parametrize("every", [1, 4])
def test_states_in_half_precision(every: int, make_decoder: Make, triton_device: str) -> None:
    mixer = mixer_of(make_decoder, DISCRETE, triton_device, torch.float32)
    u_TSD = torch.randn(5, 1, 16, device=triton_device)
    found_TSD, states = run(
        mixer, u_TSD, CacheSettings(ssm_dtype=torch.bfloat16, write_every=every)
    )
    assert states[0].dtype == torch.bfloat16
    close(found_TSD, plain(mixer, u_TSD)[0], 0.03)


@pytest.mark.parametrize("config", [STOCK, DISCRETE, SELECTIVE], ids=lambda config: config.kind)
def test_weights_in_half_precision(
    config: MixerConfig, make_decoder: Make, triton_device: str
) -> None:
    mixer = mixer_of(make_decoder, config, triton_device, torch.bfloat16)
    u_TSD = torch.randn(3, 1, 16, device=triton_device).bfloat16()
    precise_TSD, _ = plain(mixer.float(), u_TSD.float())
    plain_TSD, _ = plain(mixer.bfloat16(), u_TSD)
    found_TSD, _ = run(mixer, u_TSD, CacheSettings(write_every=1))
    assert found_TSD.dtype == torch.bfloat16
    mistake, of_torch = ((x - precise_TSD).abs().mean() for x in (found_TSD, plain_TSD))
    assert mistake <= 1.5 * of_torch
