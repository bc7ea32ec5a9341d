"""The same numbers on a GPU as on the CPU: run by `make gpu`."""

from pathlib import Path

import pytest
import torch

import retort
from retort.model.config import ATTENTION
from retort.model.decoder import Decoder
from retort.model.transplant import keep_attention
from retort.recipe import BUNDLED_TEACHER

pytestmark = pytest.mark.cuda

MIXERS = ("mamba2", "discrete_mamba2", "mamba1")


def hybrid(mixer: str, device: str) -> Decoder:
    """A transplanted student with one attention layer: the same one on every device."""
    torch.manual_seed(0)
    teacher = retort.load(BUNDLED_TEACHER)
    types = keep_attention(teacher.config.layers, [1])
    student = retort.transplant(teacher, types, mixer)
    return student.eval().requires_grad_(False).to(device)


@pytest.mark.parametrize("mixer", MIXERS)
def test_parallel_and_step(mixer: str) -> None:
    here, there = hybrid(mixer, "cpu"), hybrid(mixer, "cuda")
    ids_BT = torch.randint(here.config.vocab_size, (2, 40))
    wanted_BTV = here(ids_BT)
    torch.testing.assert_close(there(ids_BT.cuda()).cpu(), wanted_BTV, atol=1e-3, rtol=1e-4)
    state = there.init_state(2, 40)
    parts = [there(part_BT.cuda(), state) for part_BT in ids_BT.split([17, *[1] * 23], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1).cpu(), wanted_BTV, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients(mixer: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        decoder = hybrid(mixer, device).requires_grad_()
        ids_BT = torch.arange(60, device=device).reshape(2, 30)
        document_BT = (torch.arange(30, device=device) // 11).expand(2, -1)
        decoder(ids_BT, None, document_BT).square().mean().backward()
        found.append({name: p.grad.cpu() for name, p in decoder.named_parameters()})
    for name, wanted in found[0].items():
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found[1][name], wanted, atol=1e-3 * scale + 1e-7, rtol=1e-3)


@pytest.mark.parametrize("mixer", MIXERS)
def test_half_precision_is_finite(mixer: str) -> None:
    decoder = hybrid(mixer, "cuda").to(torch.bfloat16)
    assert torch.isfinite(decoder(torch.arange(64, device="cuda")[None])).all()


def test_greedy_texts_are_those_of_the_cpu() -> None:
    params = retort.SamplingParams(n=1, max_tokens=24, temperature=0)
    prompts = [[5, 9, 30], [7] * 12]
    texts = []
    for device in ("cpu", "cuda"):
        decoder = retort.load(BUNDLED_TEACHER, device=device)
        assert set(decoder.config.layer_types) == {ATTENTION}
        found = retort.Engine(decoder, slots=2).generate(prompts, params)
        texts.append([list(completions[0].token_ids) for completions in found])
    assert texts[0] == texts[1]


def test_folders(tmp_path: Path) -> None:
    ours = hybrid("mamba2", "cuda")
    retort.save(ours, tmp_path / "out")
    again = retort.load(tmp_path / "out", device="cuda")
    assert again.device.type == "cuda"
    ids_BT = torch.arange(20, device="cuda")[None]
    assert torch.equal(again(ids_BT), ours(ids_BT))
