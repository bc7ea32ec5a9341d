"""Runs that answer questions on the way, learn from their own answers, and drop what they must not
see."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import retort
from retort import recipe as recipes
from retort.data import problems
from retort.metrics import read_metrics
from retort.recipe import Arithmetic, DistillRecipe
from retort.train import loop
from retort.train.prepare import work_folder
from retort.train.step import Stepper

Values = dict[str, Any]

PROBLEMS = {"kind": "arithmetic", "split": "train", "difficulty": [1, 1]}
DATA = {"kind": "worked", "prompt": "{question}", "problems": PROBLEMS}
FRESH = {
    "start": "fresh",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
}
EVALUATION = {
    "problems": {"kind": "arithmetic", "count": 3, "difficulty": [1, 1]},
    "prompt": "{question}",
    "every": 2,
    "n": 2,
    "max_tokens": 8,
}
ON_POLICY = {"share": 0.5, "max_tokens": 8}


def stage(kind: str, **objective: Any) -> Values:
    return {
        "name": kind,
        "objective": {"kind": kind, **objective},
        "data": DATA,
        "tokens": 5 * 2 * 288,
        "rows": 2,
        "length": 288,
        "optim": {"lr": 5e-3},
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "teacher"
    values = {"out": out, "student": FRESH, "stages": [stage("supervised")]}
    return loop.distill(recipes.parse(DistillRecipe, values))


def student(out: Path, teacher: Path, on_policy: Values | None = None, **changes: Any) -> Values:
    start = {"start": "transplant", "keep_attention": [1], "settings": {"chunk_size": 16}}
    stages = [stage("distill", direction="reverse", on_policy=on_policy)]
    values = {"out": out, "teacher": teacher, "student": start, "stages": stages}
    return values | {"checkpoints": {"every": 2}} | changes


def trained(values: Values) -> Path:
    return loop.distill(recipes.parse(DistillRecipe, values))


def records(out: Path) -> list[Values]:
    return read_metrics(work_folder(out) / loop.METRICS)


def weights_of(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def watched(teacher: Path) -> Path:
    """A run with an evaluation every two steps."""
    changes = {"evaluation": EVALUATION, "checkpoints": {"every": 2, "best": True}}
    return trained(student(teacher.with_name("watched"), teacher, **changes))


# ---------------------------------------------------------------- evaluation


def test_evaluations_are_recorded_where_they_are_due(watched: Path) -> None:
    found = {r["step"]: r["evaluation"] for r in records(watched) if "evaluation" in r}
    assert found.keys() == {2, 4, 5}  # and at the end
    assert all(each["problems"] == 3 and each["n"] == 2 for each in found.values())
    assert all(0 <= each["accuracy"] <= each["coverage"] <= 1 for each in found.values())
    assert all(1 <= each["mean_tokens"] <= 8 for each in found.values())


def test_training_is_the_same_with_and_without(
    tmp_path: Path, teacher: Path, watched: Path
) -> None:
    assert weights_of(trained(student(tmp_path / "student", teacher))) == weights_of(watched)


def test_the_best_student_is_kept(watched: Path) -> None:
    found = {r["step"]: r["evaluation"] for r in records(watched) if "evaluation" in r}
    first_best = max(found, key=lambda step: found[step]["accuracy"])
    best = retort.load(work_folder(watched) / loop.BEST)
    kept = work_folder(watched) / "checkpoints"
    assert best.config == retort.load(watched).config
    assert first_best == 2  # with eight tokens nothing is ever right, so the first stays
    assert weights_of(work_folder(watched) / loop.BEST) != weights_of(watched)
    assert kept.is_dir()


# ---------------------------------------------------------------- on policy


def on_step(monkeypatch: pytest.MonkeyPatch, number: int, happen: Callable[[], object]) -> None:
    take, calls = Stepper.take, iter(range(1, 1000))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == number:
            happen()
        return take(*arguments)

    monkeypatch.setattr(Stepper, "take", interrupted)


def test_on_policy_steps_may_be_stopped_between(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = trained(student(tmp_path / "undisturbed", teacher, ON_POLICY))
    with monkeypatch.context() as patch:
        on_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            trained(student(tmp_path / "stopped", teacher, ON_POLICY))
    stopped = trained(student(tmp_path / "stopped", teacher, ON_POLICY))
    assert weights_of(stopped) == weights_of(undisturbed)
    without = trained(student(tmp_path / "without", teacher))
    losses = [[r["loss"] for r in records(out)] for out in (undisturbed, without)]
    same = [a == b for a, b in zip(*losses, strict=True)]
    assert same[0]  # the first step of two is learnt from the data
    assert not any(same[1:])


# ---------------------------------------------------------------- decontamination


def test_what_repeats_an_evaluation_problem_is_dropped_and_told(
    tmp_path: Path, teacher: Path
) -> None:
    """Against the problems that the training data begins with: the run goes on with others."""
    known = PROBLEMS | {"count": 4}
    out = trained(student(tmp_path / "student", teacher, decontaminate=[known]))
    dropped = read_metrics(work_folder(out) / loop.DROPPED)
    wanted = {problem.id for problem in problems.load(recipes.parse(Arithmetic, known))}
    assert {each["problem_id"] for each in dropped} == wanted
    assert all(each["text"] and each["place"] and each["step"] >= 1 for each in dropped)
    without = trained(student(tmp_path / "without", teacher))
    assert weights_of(out) != weights_of(without)
    assert not (work_folder(without) / loop.DROPPED).exists()
