"""`--plan`: what it says of a recipe, and which mistakes it finds."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import retort
from retort import cli
from retort.model import cost, weights
from retort.model.decoder import Decoder
from retort.model.geometries import geometry
from retort.recipe import RECIPES, DistillRecipe, load, parse
from retort.train.gpus import GPUS, USABLE, gpu
from retort.train.plan import Plan, plan
from retort.train.plan_tables import tables

MakeDecoder = Callable[..., Decoder]

WIDTH = 80


def stage(kind: str = "distill", **changes: Any) -> dict[str, Any]:
    values = {
        "name": kind,
        "objective": {"kind": kind},
        "data": {"kind": "text", "path": "nowhere.jsonl"},
        "tokens": 1_000_000,
        "rows": 16,
        "length": 512,
        "optim": {"lr": 1e-4},
    }
    return values | changes


def recipe(*stages: dict[str, Any], **changes: Any) -> DistillRecipe:
    values: dict[str, Any] = {
        "out": "out",
        "teacher": "no/teacher",
        "student": {"start": "transplant"},
        "stages": list(stages) or [stage()],
        "device": "cuda",
        "planning": {"teacher": "llama-3.2-1b"},
    }
    return parse(DistillRecipe, values | changes)


def shown(found: Plan) -> str:
    console = Console(width=WIDTH, record=True, file=StringIO())
    for table in tables(found):
        console.print(table)
    lines = (line.rstrip() for line in console.export_text().splitlines())
    return "\n".join(line for line in lines if line) + "\n"


# ------------------------------------------------------------------ sizes


def test_sizes_are_those_of_the_geometry() -> None:
    found = plan(recipe())
    assert found.teacher == 1_235_814_400
    assert found.student == cost.parameters(geometry("native-1b")).total
    (only,) = found.stages
    assert (only.trainable, only.steps, only.tokens_per_step) == (found.student, 123, 8192)
    assert only.tokens == 123 * 8192


def test_layer_wise_stages_train_less() -> None:
    found = plan(recipe(stage("mixing_matrices"), stage("hidden_states"), stage()))
    table = cost.parameters(geometry("native-1b"))
    mixers, blocks, whole = (each.trainable for each in found.stages)
    norm = 2048  # the one in front of the mixer
    assert mixers == sum(block.mixer + norm for block in table.blocks)
    assert blocks == sum(block.total for block in table.blocks)
    assert whole == table.total


def test_frozen_parameters() -> None:
    whole, frozen = (plan(recipe(stage(freeze=freeze))).stages[0] for freeze in ([], ["*.mlp.*"]))
    mlp = 16 * 3 * 2048 * 8192
    assert whole.trainable - frozen.trainable == mlp
    assert whole.flops.student - frozen.flops.student == 2 * mlp * whole.tokens
    assert whole.memory.moments - frozen.memory.moments == 2 * 4 * mlp


def test_the_folder_says_the_size_where_it_is(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    teacher = make_decoder("aaaa")
    weights.save_config(teacher.config, tmp_path / "t", teacher.lm_head.weight.dtype)
    found = plan(recipe(teacher=tmp_path / "t"))
    assert found.teacher == teacher.size
    assert not any("is not here" in note for note in found.notes)


def test_a_source_is_read_where_it_is(tmp_path: Path, make_decoder: MakeDecoder) -> None:
    for name, layers in (("t", "aaaa"), ("s", "amam")):
        decoder = make_decoder(layers)
        weights.save_config(decoder.config, tmp_path / name, decoder.lm_head.weight.dtype)
    student = {"start": "transplant", "source": tmp_path / "s", "keep_attention": [0, 1]}
    with pytest.raises(ValueError, match="no attention in layer 1"):
        plan(recipe(teacher=tmp_path / "t", student=student))


def test_writing_text_may_take_more_than_a_step() -> None:
    """All of the student's weights are on every process then, however many there are."""
    evaluation = {"problems": {"kind": "arithmetic"}, "every": 10}
    settings = {"evaluation": evaluation, "planning": {"teacher": "llama-3.2-1b", "gpus": 64}}
    found = plan(recipe(stage("mixing_matrices", rows=64, micro_rows=1), **settings))
    (planned,) = found.stages
    assert planned.generating > 2 * found.student
    assert planned.generating > planned.memory.total
    needed = f"{planned.generating / 2**30:.1f} GiB, more than a step does"
    assert [note for note in found.notes if note.endswith(needed)]
    (without,) = plan(recipe()).stages
    assert without.generating == 0


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_rows_are_no_longer_than_there_are_positions(
    tmp_path: Path, make_decoder: MakeDecoder, kind: str
) -> None:
    for name in ("teacher", "student"):
        decoder = make_decoder("aa", max_position=64 if name == kind else 128)
        weights.save_config(decoder.config, tmp_path / name, decoder.lm_head.weight.dtype)
    folders = {
        "teacher": tmp_path / "teacher",
        "student": {"start": "folder", "folder": tmp_path / "student"},
    }
    plan(recipe(stage("distill", length=64), **folders))
    with pytest.raises(ValueError, match=f"length = 65 exceeds the 64 positions of the {kind}"):
        plan(recipe(stage("distill", length=65), **folders))


def test_fresh_students_have_no_teacher() -> None:
    student = {"start": "fresh", "vocab_size": 512, "layers": 6}
    found = plan(recipe(stage("supervised"), teacher=None, student=student, device="cpu"))
    assert found.teacher is None
    assert found.student == 512 * 128 + 6 * (128 * 128 * 3 + 3 * 128 * 384 + 2 * 128) + 128


def test_important_layers_are_as_many_as_are_kept() -> None:
    keep = {"kind": "important", "count": 4, "data": {"kind": "text", "path": "x"}}
    found = plan(recipe(student={"start": "transplant", "keep_attention": keep}))
    assert found.student == cost.parameters(geometry("native-1b-hybrid")).total
    assert "keep_attention: the time to measure each layer is not counted" in found.notes


# ------------------------------------------------------------------ time, memory, disk


def test_hours() -> None:
    planning = {"teacher": "llama-3.2-1b", "gpu": "a100-80gb", "gpus": 4, "utilisation": 0.5}
    (only,) = plan(recipe(planning=planning)).stages
    assert only.hours == pytest.approx(only.flops.total / (4 * 312e12 * 0.5) / 3600)


def test_memory_is_shared_by_processes() -> None:
    one, four = (
        plan(recipe(planning={"teacher": "llama-3.2-1b", "gpus": gpus})).stages[0].memory
        for gpus in (1, 4)
    )
    size = cost.parameters(geometry("native-1b")).total
    assert one.weights == 4 * size
    assert one.moments == 8 * size
    rates = 16 * 3 * 32
    assert four.weights == 4 * ((size - rates) // 4 + rates)
    assert four.activations < one.activations / 3.9


def test_hybrid_sharding_keeps_more_copies() -> None:
    planning = {"teacher": "llama-3.2-1b", "gpus": 8}
    whole, pairs = (
        plan(recipe(planning=planning, parallel={"shard": shard})).stages[0].memory.weights
        for shard in (None, 2)
    )
    assert pairs == pytest.approx(4 * whole, rel=1e-4)


def test_micro_rows_lower_the_activations_alone() -> None:
    many, few = (plan(recipe(stage(micro_rows=rows))).stages[0] for rows in (16, 2))
    assert (many.micro_batches, few.micro_batches) == (1, 8)
    assert few.memory.activations < many.memory.activations / 3
    assert few.flops == many.flops


def test_recomputing_trades_time_for_memory() -> None:
    none, selective, full = (
        plan(recipe(parallel={"recompute": recompute})).stages[0]
        for recompute in ("none", "selective", "full")
    )
    kept = [each.memory.activations for each in (none, selective, full)]
    again = [each.flops.recomputed for each in (none, selective, full)]
    assert kept == sorted(kept, reverse=True)
    assert again == sorted(again)
    assert again[0] == 0 < again[1]


def test_what_does_not_fit_is_said() -> None:
    found = plan(recipe(planning={"teacher": "llama-3.2-1b", "gpu": "rtx-4090-24gb"}))
    assert found.stages[0].fits is False
    assert "does NOT fit" in shown(found)


def test_on_a_cpu_all_is_in_float32_and_whole() -> None:
    found = plan(recipe(device="cpu"))
    need = found.stages[0].memory
    assert (found.gpu, found.processes, found.hours) == (None, 1, None)
    assert need.gathered == 0
    assert need.teacher == 4 * 1_235_814_400
    assert found.disk.students == 4 * found.student


def test_host_memory_of_saving() -> None:
    """A process's part of the weights and moments of the stage that has the most, three times."""
    planning = {"teacher": "llama-3.2-1b", "gpus": 8}
    found = plan(recipe(stage("hidden_states"), stage(), planning=planning))
    part = 12 * found.student / 8
    assert found.saving == pytest.approx(3 * part, rel=0.01)  # rates are whole everywhere
    assert plan(recipe(stage("hidden_states"), planning=planning)).saving < 0.9 * found.saving
    assert "of each process, while a state is written" in shown(found)


def test_disk() -> None:
    evaluation = {"problems": {"kind": "gsm8k"}, "every": 10}
    checkpoints = {"keep": 3, "best": True}
    found = plan(recipe(evaluation=evaluation, checkpoints=checkpoints))
    assert found.disk.state == 12 * found.student
    assert found.disk.states == 4 * found.disk.state
    assert found.disk.students == 2 * 2 * found.student


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"planning": {}}, "no/teacher is not here.*planning.teacher=llama-3.2-1b"),
        ({"planning": {"teacher": "lama-3.2-1b"}}, "did you mean 'llama-3.2-1b'"),
        (
            {"planning": {"teacher": "llama-3.2-1b", "gpu": "h100"}},
            "planning.gpu: no GPU is called 'h100'; did you mean 'h100-80gb'",
        ),
        (
            {"planning": {"teacher": "llama-3.2-1b", "gpus": 3}},
            "16 rows cannot be shared by 3 processes",
        ),
        (
            {"planning": {"teacher": "llama-3.2-1b", "gpus": 4}, "parallel": {"shard": 3}},
            "parallel.shard: 3 does not divide the 4 processes",
        ),
        ({"stages": [stage(freeze=["nothing"])]}, "'nothing' matches no parameter"),
        ({"student": {"start": "transplant", "keep_attention": [16]}}, "no layer 16"),
        (
            {"student": {"start": "transplant", "settings": {"state_size": 32}}},
            "state_size 32 cannot hold",
        ),
        (
            {"student": {"start": "folder", "folder": "no/student"}},
            "student: no/student is not here.*planning.student",
        ),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(recipe(**changes))


def test_heads_that_have_no_counterpart() -> None:
    """The published shape of Llamba-3B cannot go through the first stage."""
    settings = ["heads=32", "head_dim=96", "groups=32"]
    changed = [f"student.settings.{setting}" for setting in settings]
    with pytest.raises(ValueError, match="32 heads and the teacher's attention has 24"):
        plan(load(DistillRecipe, [RECIPES / "llamba-4b.yaml", *changed]))


def test_gpus() -> None:
    assert all(each.tflops > 50 and each.memory_gib >= 24 for each in GPUS.values())
    assert gpu("a100-80gb").usable_bytes == 80 * 2**30 * USABLE


# ------------------------------------------------------------------ what is printed


def test_long_names_are_cut() -> None:
    found = plan(recipe(stage(name="a-stage-with-a-very-long-name")))
    assert Console(width=200).measure(tables(found)[2]).maximum <= WIDTH


@pytest.mark.parametrize("name", ["pure", "hybrid", "teacher"])
def test_the_demo_can_be_planned(name: str) -> None:
    found = plan(load(DistillRecipe, [RECIPES / "demo" / f"{name}.yaml"]))
    assert found.teacher in (None, retort.load(retort.recipe.BUNDLED_TEACHER).size)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["distill", str(RECIPES / "llamba-1b.yaml"), "--plan", "--json"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["student"] == 1_405_159_936
    assert told["total"]["tokens"] == sum(each["tokens"] for each in told["stages"])
    assert not list(tmp_path.iterdir())
