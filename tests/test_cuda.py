"""The same numbers on a GPU as on the CPU: run by `make gpu`."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import retort
from retort import recipe as recipes
from retort.metrics import read_metrics
from retort.model.config import ATTENTION
from retort.model.decoder import Decoder
from retort.model.transplant import keep_attention
from retort.recipe import BUNDLED_TEACHER, DistillRecipe
from retort.train import dry_run, loop
from retort.train.folder import METRICS, work_folder
from retort.train.step import Stepper

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


# ---------------------------------------------------------------- training

DATA = {
    "kind": "worked",
    "prompt": "{question}",
    "problems": {"kind": "arithmetic", "split": "train", "difficulty": [1, 2]},
}


def student(out: Path, **changes: Any) -> DistillRecipe:
    """Three stages of three steps from the bundled teacher."""
    stages = [
        {
            "name": kind,
            "objective": {"kind": kind},
            "data": DATA,
            "tokens": 3 * 2 * 256,
            "rows": 2,
            "length": 256,
            "optim": {"lr": 1e-3},
        }
        for kind in ("mixing_matrices", "hidden_states", "distill")
    ]
    values = {
        "out": out,
        "teacher": "bundled",
        "student": {"start": "transplant", "keep_attention": [1]},
        "stages": stages,
        "checkpoints": {"every": 2},
    }
    return recipes.parse(DistillRecipe, values | changes)


def losses(recipe: DistillRecipe) -> list[float]:
    records = read_metrics(work_folder(loop.distill(recipe)) / METRICS)
    return [record["loss"] for record in records]


def test_a_run_in_bfloat16(tmp_path: Path) -> None:
    wanted = losses(student(tmp_path / "cpu"))
    found = losses(student(tmp_path / "cuda", device="cuda"))
    assert found == pytest.approx(wanted, rel=0.05)
    left = retort.load(tmp_path / "cuda")
    assert left.lm_head.weight.dtype == torch.bfloat16
    record = read_metrics(tmp_path / "cuda.training" / METRICS)[-1]
    assert record["memory_gib"] > 0


@pytest.mark.parametrize(
    "settings", [{"recompute": "full"}, {"recompute": "selective"}, {"compile": True}], ids=str
)
def test_what_saves_memory_or_time_changes_nothing(tmp_path: Path, settings: Any) -> None:
    plain = losses(student(tmp_path / "plain", device="cuda"))
    other = losses(student(tmp_path / "other", device="cuda", parallel=settings))
    assert other == pytest.approx(plain, rel=0.02)


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = losses(student(tmp_path / "undisturbed", device="cuda"))
    stopped, take, calls = (
        student(tmp_path / "stopped", device="cuda"),
        Stepper.take,
        iter(range(9)),
    )

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "take", interrupted)
        with pytest.raises(SystemExit):
            loop.distill(stopped)
    assert losses(stopped) == pytest.approx(undisturbed, rel=0.02)


def test_memory_is_as_planned() -> None:
    """A student of a billion parameters from a teacher of as many, with random weights."""
    available = torch.cuda.get_device_properties(0).total_memory / 2**30
    if available < 70:
        pytest.skip(f"needs a GPU of 70 GiB, and this one has {available:.0f}")
    recipe = recipes.load(DistillRecipe, ["llamba-1b.yaml", "parallel.compile=false"])
    few = [stage.model_copy(update={"rows": 2 * stage.micro_rows}) for stage in recipe.stages]
    for trial in dry_run.dry_run(recipe.model_copy(update={"stages": tuple(few)})):
        assert trial.memory_gib == pytest.approx(trial.planned_gib, rel=0.1), trial
