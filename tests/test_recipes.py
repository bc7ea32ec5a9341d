"""The bundled recipes: each can be planned on any machine, and says what it needs."""

import re
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from retort.model import formats
from retort.model.geometries import geometry
from retort.model.transplant import keep_attention, mixer_config
from retort.recipe import (
    RECIPES,
    Chat,
    Data,
    DistillRecipe,
    Mixture,
    SampleRecipe,
    Source,
    Text,
    load,
)
from retort.train.gpus import GPUS
from retort.train.plan import Plan, plan
from retort.train.plan_tables import tables

DOCS = Path(__file__).parents[1] / "docs" / "recipes.md"
WIDTH = 80

LARGE = sorted(path for path in RECIPES.glob("*.yaml") if path.stem != "hybrid")
names = pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {path.stem: plan(load(DistillRecipe, [path])) for path in LARGE}


def sources(recipe: DistillRecipe) -> Iterator[Source]:
    for stage in recipe.stages:
        yield from _sources(stage.data)


def _sources(data: Data) -> Iterator[Source]:
    if isinstance(data, Mixture):
        yield from (part.data for part in data.parts)
    else:
        yield data


def test_all_are_here() -> None:
    llamba = {"llamba-1b", "llamba-4b"}
    hybrids = {"mamba-in-llama-1b", "mamba-in-llama-3b"}
    tuned = {f"{name}-sft" for name in llamba | hybrids}
    native = {"native-1b", "native-3b", "native-qwen2.5-0.5b"}
    assert {path.stem for path in LARGE} == llamba | hybrids | tuned | native


@names
def test_the_head_says_what_to_download_and_how_to_start(path: Path) -> None:
    recipe = load(DistillRecipe, [path])
    head = path.read_text(encoding="utf-8").partition("out:")[0]
    assert f"retort distill recipes/{path.name} --plan" in head
    for source in sources(recipe):
        assert isinstance(source, Text | Chat)
        assert source.hub is not None
        assert source.hub in head
    if recipe.teacher is not None:
        assert f"--local-dir {recipe.teacher}" in head
    if recipe.planning.gpus > 1:
        assert re.search(r"torchrun .*-nproc-per-node 8 ", head)


@names
def test_runs_as_planned(path: Path, plans: dict[str, Plan]) -> None:
    found, recipe = plans[path.stem], load(DistillRecipe, [path])
    assert all(stage.fits for stage in found.stages)
    assert recipe.out == Path("models") / path.stem
    assert recipe.decontaminate
    assert recipe.evaluation is not None
    for stage in recipe.stages:
        rows = stage.rows // recipe.planning.gpus
        assert stage.micro_rows is not None
        assert rows % stage.micro_rows == 0, "the last micro-batch would be smaller"


@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [
        ("llamba-1b", 1_235_814_400, 1_405_159_936),
        ("llamba-4b", 3_212_749_824, 3_568_082_592),
        ("mamba-in-llama-1b", 1_235_814_400, 1_293_002_752),
        ("native-qwen2.5-0.5b", 494_032_768, 533_719_924),
        ("llamba-1b-sft", None, 1_405_159_936),
        ("llamba-4b-sft", None, 3_568_082_592),
        ("mamba-in-llama-3b-sft", None, 3_447_874_560),
    ],
)
def test_parameters(name: str, teacher: int | None, student: int, plans: dict[str, Plan]) -> None:
    assert (plans[name].teacher, plans[name].student) == (teacher, student)


@pytest.mark.parametrize("name", ["llamba-1b", "llamba-4b", "mamba-in-llama-1b"])
def test_fine_tuning_starts_from_what_is_left(name: str, plans: dict[str, Plan]) -> None:
    first = load(DistillRecipe, [RECIPES / f"{name}.yaml"])
    tuned = load(DistillRecipe, [RECIPES / f"{name}-sft.yaml"])
    assert tuned.student.start == "folder"
    assert tuned.student.folder == first.out
    assert plans[name].student == plans[f"{name}-sft"].student


def test_the_papers_numbers() -> None:
    stages = {
        name: [(stage.tokens, stage.rows, stage.length, stage.optim.lr) for stage in recipe.stages]
        for name in ("llamba-1b", "llamba-4b", "mamba-in-llama-3b")
        for recipe in [load(DistillRecipe, [RECIPES / f"{name}.yaml"])]
    }
    last = [(5_000_000_000, 64, 2048, 1e-4), (8_000_000_000, 128, 2048, 1e-5)]
    assert stages["llamba-1b"] == [(300_000_000, 64, 2048, 1e-4), *last]
    assert stages["llamba-4b"] == [(1_000_000_000, 64, 2048, 1e-4), *last]
    assert stages["mamba-in-llama-3b"] == [(8_000_000_000, 64, 8192, 1e-5)]
    (stage,) = load(DistillRecipe, [RECIPES / "mamba-in-llama-3b.yaml"]).stages
    assert round(stage.optim.warmup * stage.steps) == 200


@pytest.mark.parametrize("name", ["native-1b", "native-qwen2.5-0.5b"])
@pytest.mark.parametrize("more", [[], ["student.keep_attention=[]"]], ids=["hybrid", "pure"])
def test_native_students_are_served_by_others(name: str, more: list[str]) -> None:
    recipe = load(DistillRecipe, [RECIPES / f"{name}.yaml", *more])
    assert recipe.student.start == "transplant"
    assert recipe.student.mixer == "mamba2"
    teacher = geometry(recipe.planning.teacher or "")
    keep = [] if more else [3, 7]
    mixer = mixer_config(teacher, recipe.student.mixer)
    student = replace(teacher, layer_types=tuple(keep_attention(teacher.layers, keep)), mixer=mixer)
    assert formats.portable(student) is not None


def test_progressive_replacement(tmp_path: Path, plans: dict[str, Plan]) -> None:
    """Two passes of a hybrid, as its recipe says; the first one's student is not here yet."""
    recipe = RECIPES / "mamba-in-llama-1b.yaml"
    first = plan(
        load(DistillRecipe, [recipe, "student.keep_attention=[1, 3, 5, 7, 9, 11, 13, 15]"])
    )
    second = plan(load(DistillRecipe, [recipe, f"student.source={tmp_path / 'first'}"]))
    alone = plan(load(DistillRecipe, [recipe]))
    assert first.student < second.student == alone.student


# ------------------------------------------------------------------ what is printed


def shown(found: Plan) -> str:
    console = Console(width=WIDTH, record=True, file=StringIO())
    for table in tables(found):
        console.print(table)
    lines = (line.rstrip() for line in console.export_text().splitlines())
    return "\n".join(line for line in lines if line) + "\n"


@names
def test_tables_fit_a_terminal(path: Path, plans: dict[str, Plan]) -> None:
    for table in tables(plans[path.stem])[1:]:
        assert Console(width=200).measure(table).maximum <= WIDTH
    assert all(len(line) <= WIDTH for line in shown(plans[path.stem]).splitlines())


def overview(plans: dict[str, Plan]) -> str:
    """A row for each recipe."""
    lines = [
        "| recipe | tokens | on | GPU-hours | fullest GPU, GiB | disk, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in plans.items():
        assert found.hours is not None
        most = max(stage.memory.total for stage in found.stages)
        lines.append(
            f"| `{name}` | {found.tokens / 1e9:.3g} B | {found.processes} x {found.gpu} "
            f"| {found.hours * found.processes:.3g} | {most / 2**30:.1f} "
            f"| {found.disk.total / 2**30:.0f} |"
        )
    return "\n".join(lines) + "\n"


def test_documentation_says_what_is_planned(plans: dict[str, Plan]) -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert f"```\n{shown(plans['llamba-1b'])}```" in text
    assert overview(plans) in text
    named = re.search(r"`planning.gpu` is one of (.*?)\.\s", text, re.DOTALL)
    assert named is not None
    assert re.findall(r"`(.*?)`", named[1]) == list(GPUS)


# What is asked of models


@pytest.mark.parametrize(
    "sources", [["gsm8k"], ["math500"], ["gsm8k", "four-shot"], ["math500", "boxed"]]
)
def test_sampling_recipes_can_be_laid_over_one_another(sources: list[str]) -> None:
    recipe = load(SampleRecipe, [*(f"sample/{name}.yaml" for name in sources), "model=m", "out=o"])
    assert recipe.problems.kind == sources[0]
    assert (recipe.sampling.n, recipe.sampling.temperature) == (256, 0.8)
    assert bool(recipe.shots) == bool(recipe.sampling.stop) == ("four-shot" in sources)
    assert ("boxed" in recipe.prompt) == ("boxed" in sources)


def test_shots_need_a_count() -> None:
    sources = ["sample/gsm8k.yaml", "model=m", "out=o", "shots.kind=gsm8k", "shots.split=train"]
    with pytest.raises(ValueError, match=r"shots: say how many .*shots\.count=4"):
        load(SampleRecipe, sources)
    assert load(SampleRecipe, [*sources, "shots.count=4"]).shots
