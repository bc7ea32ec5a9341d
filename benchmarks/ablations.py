"""What each stage of MOHAWK is worth: the demo's long recipe, with stages left out or changed.

    python benchmarks/ablations.py runs/ablations benchmarks/results/ablations.json --share 0.13

Every variant reads the same number of tokens: what a stage that is left out would have read, the
last one reads instead. Then each answers the same problems, which neither training nor the demo
knows. A further seed trains on other problems of the same kinds. A stopped run goes on where it
was, and the summary is written anew after each variant.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

import retort
from retort.data.chat import load_tokenizer
from retort.grade.run import grade
from retort.metrics import read_metrics
from retort.model import weights
from retort.model.config import LINEAR
from retort.model.decoder import state_space
from retort.model.transplant import keep_attention, transplant
from retort.recipe import (
    RECIPES,
    Continued,
    DistillRecipe,
    KeepLayers,
    SampleRecipe,
    Stage,
    Transplanted,
    load,
)
from retort.report.build import build
from retort.report.tally import common_version, tally
from retort.sample.run import sample
from retort.store import Run
from retort.train.folder import work_folder
from retort.train.loop import distill

PROBLEMS = ["problems.seed=777", "problems.count=200"]
CURVE_POINTS = 50
KS = (1, 8, 32)
SEED_STRIDE = 1000  # further than the seeds of a recipe's stages lie apart


@dataclass(frozen=True)
class Variant:
    """The recipe less some stages, from another start, with the other direction of KL, or with
    another learning rate in stage 1.
    """

    name: str
    without: tuple[str, ...] = ()
    start: Literal["attention", "random"] = "attention"
    direction: Literal["forward", "reverse"] = "forward"
    mixing_lr: float | None = None


VARIANTS = (
    Variant("full"),
    Variant("without stage 1", without=("mixing",)),
    Variant("without stage 2", without=("hidden",)),
    Variant("without both", without=("mixing", "hidden")),
    Variant("stage 1 at 5e-3", mixing_lr=5e-3),
    Variant("reverse KL", direction="reverse"),
    # From nothing there is nothing to lose, and more to learn.
    Variant("random start", start="random", mixing_lr=5e-3),
    Variant("random start, without both", without=("mixing", "hidden"), start="random"),
)


def main() -> None:
    """Trains and asks every variant, and the teacher."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("summary", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the recipe's tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a training run for each")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--only", nargs="+", default=names, choices=names, help="these variants")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = load(DistillRecipe, [RECIPES / "demo" / "long.yaml"])
    found = [{"name": "teacher", **answers("teacher", "bundled", arguments.runs)}]
    for seed, variant in product(arguments.seeds, VARIANTS):
        if variant.name in arguments.only:
            found.append(row(reseeded(base, seed), variant, arguments.runs, arguments.share))
            write(arguments.summary, arguments.share, arguments.seeds, found)


def row(base: DistillRecipe, variant: Variant, runs: Path, share: float) -> dict[str, Any]:
    """A variant trained and asked."""
    name = variant.name if base.seed == 0 else f"{variant.name}, seed {base.seed}"
    recipe = changed(base, variant, runs / slug(name), share)
    distill(recipe)
    found = asdict(variant) | {"seed": base.seed, "training": training(recipe)}
    return found | answers(name, str(recipe.out), runs)


def reseeded(base: DistillRecipe, seed: int) -> DistillRecipe:
    """The recipe with other problems of the same kinds; seed 0 is the recipe itself."""
    stages = []
    for stage in base.stages:
        problems = stage.data.problems
        problems = problems.model_copy(update={"seed": problems.seed + SEED_STRIDE * seed})
        data = stage.data.model_copy(update={"problems": problems})
        stages.append(stage.model_copy(update={"data": data}))
    return base.model_copy(update={"seed": seed, "stages": tuple(stages)})


def changed(base: DistillRecipe, variant: Variant, folder: Path, share: float) -> DistillRecipe:
    """The recipe of a variant; makes the student that a random start needs."""
    total = int(share * sum(stage.tokens for stage in base.stages))
    stages = [
        stage.model_copy(update={"tokens": int(share * stage.tokens)})
        for stage in base.stages
        if stage.name not in variant.without
    ]
    rest = total - sum(stage.tokens for stage in stages[:-1])
    stages[-1] = _directed(stages[-1], variant.direction, rest)
    if variant.mixing_lr is not None:
        optim = stages[0].optim.model_copy(update={"lr": variant.mixing_lr})
        stages[0] = stages[0].model_copy(update={"optim": optim})
    student = base.student
    if variant.start == "random":
        student = Continued(start="folder", folder=random_student(base, folder))
    return base.model_copy(update={"out": folder, "stages": tuple(stages), "student": student})


def _directed(stage: Stage, direction: str, tokens: int) -> Stage:
    objective = stage.objective.model_copy(update={"direction": direction})
    return stage.model_copy(update={"objective": objective, "tokens": tokens})


def random_student(base: DistillRecipe, folder: Path) -> Path:
    """The same student, its mixers as a Mamba that is trained from nothing starts."""
    start = folder.with_name(f"random-student-{base.seed}" if base.seed else "random-student")
    if start.is_dir():
        return start
    spec = base.student
    assert isinstance(spec, Transplanted)
    assert isinstance(spec.keep_attention, KeepLayers)
    assert base.teacher is not None
    teacher = weights.load(base.teacher, torch.float32, torch.device("cpu"))
    torch.manual_seed(base.seed)
    types = keep_attention(teacher.config.layers, spec.keep_attention.layers)
    student = transplant(teacher, types, spec.mixer, **spec.settings.model_dump())
    for block in student.blocks:
        if block.layer_type == LINEAR:
            block.mamba = state_space(student.config)
            block.mamba.reset_parameters()
    weights.save(student, start, load_tokenizer(base.teacher))
    return start


def training(recipe: DistillRecipe) -> dict[str, Any]:
    """Tokens of each stage, seconds in all, and some points of the loss's course."""
    records = read_metrics(work_folder(recipe.out) / "metrics.jsonl")
    every = max(1, len(records) // CURVE_POINTS)
    return {
        "tokens": {stage.name: stage.tokens for stage in recipe.stages},
        "seconds": records[-1]["seconds"],
        "losses": [
            {key: record[key] for key in ("step", "stage", "loss")}
            for record in records[every - 1 :: every]
        ],
    }


def slug(name: str) -> str:
    """The name as a folder's."""
    return name.replace(", ", "-").replace(" ", "-")


def answers(name: str, model: str, runs: Path) -> dict[str, Any]:
    """Coverage of a model on the problems kept for this, with 95 % intervals."""
    settings = [f"name={name}", f"model={model}", f"out={runs / 'samples' / slug(name)}", *PROBLEMS]
    folder = sample(load(SampleRecipe, [RECIPES / "demo" / "sample.yaml", *settings]))
    grade(folder)
    run = Run.open(folder)
    curve = build([tally(run, common_version([run]))], KS).models[0]
    points = [{"k": point.k, "coverage": asdict(point.coverage)} for point in curve.points]
    return {"problems": curve.problems, "samples": curve.samples, "points": points}


def write(summary: Path, share: float, seeds: list[int], found: list[dict[str, Any]]) -> None:
    """Everything so far, as JSON without a path in it, and a table for the eye."""
    options = f"--share {share} --seeds {' '.join(map(str, seeds))}"
    facts = {
        "command": f"python benchmarks/ablations.py RUNS SUMMARY {options}",
        "retort": retort.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, 1 thread",
        "questions": " ".join(PROBLEMS),
        "variants": found,
    }
    summary.parent.mkdir(parents=True, exist_ok=True)
    summary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for each in found:
        values = [f"{100 * point['coverage']['value']:5.1f}" for point in each["points"]]
        name = f"{each['name']}, seed {each['seed']}" if "seed" in each else each["name"]
        print(f"{name:38s}" + " ".join(values), flush=True)


if __name__ == "__main__":
    main()
