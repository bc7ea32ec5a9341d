"""Wider mixers, the same model."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from retort.model.config import DiscreteMamba2Config, Mamba2Config
from retort.model.decoder import Decoder
from retort.model.widen import widened

MakeDecoder = Callable[..., Decoder]


def mixer(groups: int) -> Mamba2Config:
    return Mamba2Config(heads=4, head_dim=8, state_size=8, groups=groups, chunk_size=4)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layers", ["m", "ma"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_stay(make_decoder: MakeDecoder, layers: str, groups: int, tied: bool) -> None:
    narrow = make_decoder(layers, mixer=mixer(groups), tie_embeddings=tied)
    wide = widened(narrow, 3 * 32)
    assert wide.config == replace(
        narrow.config, mixer=replace(mixer(groups), heads=12, groups=3 * groups)
    )
    ids_BT = torch.randint(61, (2, 11))
    torch.testing.assert_close(wide(ids_BT), narrow(ids_BT))
    states = [decoder.init_state(2, 11) for decoder in (narrow, wide)]
    for t in range(11):
        step_BT = ids_BT[:, t : t + 1]
        torch.testing.assert_close(wide(step_BT, states[1]), narrow(step_BT, states[0]))


def test_the_original_is_left_alone(make_decoder: MakeDecoder) -> None:
    narrow = make_decoder("m", mixer=mixer(4))
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    for parameter in widened(narrow, 64).parameters():
        parameter.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in narrow.state_dict().items())


def test_mistakes(make_decoder: MakeDecoder) -> None:
    narrow = make_decoder("m", mixer=mixer(4))
    for inner in (16, 48):
        with pytest.raises(ValueError, match=f"32 channels cannot be widened to {inner}"):
            widened(narrow, inner)
    discrete = DiscreteMamba2Config(heads=4, head_dim=8, state_size=8, groups=4)
    with pytest.raises(ValueError, match="only decoders with mamba2 mixers"):
        widened(make_decoder("m", mixer=discrete), 64)
