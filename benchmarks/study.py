"""A study of every kind of student: trained, fine-tuned, asked, judged and compared.

    OMP_NUM_THREADS=1 python benchmarks/study.py runs/study benchmarks/results

writes study-curves.json, the data of the report that stands in the study's folder, and
study-decode.json, speed over batch sizes. Teacher, students and questions are those of
recipes/study; what is there already is not made again, so a stopped study goes on with the same
command. Sizes are for one core of a CPU and an hour or two; KEY=VALUE words lie over every training
recipe, such as device=cuda.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from retort.bench.commands import Asked, Where, measure_decode
from retort.grade.run import grade
from retort.recipe import RECIPES, DistillRecipe, SampleRecipe, ScoreRecipe, VerifierRecipe, load
from retort.report.run import report
from retort.sample.run import sample
from retort.score.run import score
from retort.score.training import train_verifier
from retort.score.verifier import is_verifier
from retort.train.folder import finished, work_folder
from retort.train.loop import distill

STUDENTS = ("pure", "native", "hybrid")
BACKBONE = "pure"
LENGTHS = 137, 267, 64
"""Tokens of a prompt and of a completion, and steps of them that are measured."""
BATCHES, REPEATS = (1, 4, 16, 64, 256), 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = train(arguments.folder, arguments.settings)
    runs = [ask(arguments.folder, name) for name in names]
    judge(arguments.folder, runs)
    curves = report(runs, arguments.folder / "report")
    (arguments.results / "study-curves.json").write_text(curves.to_json() + "\n", encoding="utf-8")
    bench = speeds(arguments.folder)
    shutil.copyfile(bench / "bench-decode.json", arguments.results / "study-decode.json")


def train(folder: Path, settings: list[str]) -> list[str]:
    """The teacher, its students, and these fine-tuned; returns all names."""
    made("teacher", [f"out={folder / 'teacher'}", *settings])
    for name in STUDENTS:
        made(name, [f"teacher={folder / 'teacher'}", f"out={folder / name}", *settings])
    tuned = [f"{name}-sft" for name in STUDENTS]
    for name, source in zip(tuned, STUDENTS, strict=True):
        made("sft", [f"student.folder={folder / source}", f"out={folder / name}", *settings])
    return ["teacher", *STUDENTS, *tuned]


def made(name: str, settings: list[str]) -> None:
    recipe = load(DistillRecipe, [RECIPES / "study" / f"{name}.yaml", *settings])
    if not finished(recipe, work_folder(recipe.out)):
        distill(recipe)


def ask(folder: Path, name: str, recipe: str = "sample", run: str | None = None) -> Path:
    """A graded run of a model."""
    out = folder / "samples" / (run or name)
    settings = [f"name={run or name}", f"model={folder / name}", f"out={out}"]
    path = sample(load(SampleRecipe, [RECIPES / "study" / f"{recipe}.yaml", *settings]))
    grade(path)
    return path


def speeds(folder: Path) -> Path:
    """Decoding of teacher and students at the study's lengths, over batch sizes."""
    bench = folder / "bench"
    asked = Asked([str(folder / name) for name in ("teacher", *STUDENTS)])
    measure_decode(asked, Where(threads=1, out=bench), LENGTHS, "own", BATCHES, None, REPEATS)
    return bench


def judge(folder: Path, runs: list[Path]) -> None:
    """Scores the runs with a verifier on the pure student's backbone."""
    verifier = folder / "verifier"
    if not is_verifier(verifier):
        lessons = ask(folder, BACKBONE, "lessons", "lessons")
        train_verifier(VerifierRecipe(run=lessons, model=folder / BACKBONE, out=verifier))
    for run in runs:
        score(ScoreRecipe(run=run, model=verifier, kind="verifier"))


if __name__ == "__main__":
    main()
