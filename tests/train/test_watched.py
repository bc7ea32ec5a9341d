"""Runs that answer questions on the way, learn from their own answers, and drop what they must not
see."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import retort
from retort import recipe as recipes
from retort.data import problems
from retort.metrics import read_metrics
from retort.recipe import Arithmetic, DistillRecipe
from retort.train import loop
from retort.train.evaluation import Answers
from retort.train.folder import DROPPED, METRICS, work_folder
from retort.train.step import Stepper

from .tiny import PROBLEMS, Values, hybrid, stage

EVALUATION = {
    "problems": {"kind": "arithmetic", "count": 3, "difficulty": [1, 1]},
    "prompt": "{question}",
    "every": 2,
    "n": 2,
    "max_tokens": 8,
}
ON_POLICY = {"share": 0.5, "max_tokens": 8}


def student(
    out: Path, teacher: Path, on_policy: Values | None = None, **changes: Any
) -> DistillRecipe:
    objective = {"kind": "distill", "direction": "reverse", "on_policy": on_policy}
    return hybrid(out, teacher, stage("distill", 5, objective=objective), **changes)


def records(out: Path) -> list[Values]:
    return read_metrics(work_folder(out) / METRICS)


def weights_of(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def watched(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation every two steps."""
    changes = {"evaluation": EVALUATION, "checkpoints": {"every": 2, "best": True}}
    return loop.distill(student(tmp_path_factory.mktemp("runs") / "watched", teacher, **changes))


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
    assert weights_of(loop.distill(student(tmp_path / "student", teacher))) == weights_of(watched)


def test_the_best_student_is_kept(watched: Path) -> None:
    found = {r["step"]: r["evaluation"] for r in records(watched) if "evaluation" in r}
    first_best = max(found, key=lambda step: found[step]["accuracy"])
    best = retort.load(work_folder(watched) / loop.BEST)
    kept = work_folder(watched) / "checkpoints"
    assert best.config == retort.load(watched).config
    assert first_best == 2  # with eight tokens nothing is ever right, so the first stays
    assert weights_of(work_folder(watched) / loop.BEST) != weights_of(watched)
    assert kept.is_dir()


def test_the_best_is_the_best_since_it_was_asked_for(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = iter([9, 5])
    monkeypatch.setattr(
        loop, "evaluate_by_generation", lambda *_: Answers(10, 10, 9, 10, next(right))
    )
    best = work_folder(tmp_path / "student") / loop.BEST
    for asked in (False, True):
        changes = {"evaluation": EVALUATION, "checkpoints": {"every": 2, "best": asked}}
        with monkeypatch.context() as patch, suppress(SystemExit):
            on_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
            loop.distill(student(tmp_path / "student", teacher, **changes))
        assert best.exists() == asked


def test_scores_are_compared_with_those_of_the_same_questions(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on with other questions begins anew; how often it asks is no other one."""
    right = iter([9, 5, 3, 2])  # of ten answers: at steps 2 and 4, and then of other questions
    monkeypatch.setattr(
        loop, "evaluate_by_generation", lambda *_: Answers(10, 10, 9, 10, next(right))
    )
    best = work_folder(tmp_path / "student") / loop.BEST

    def run(stop: int, **settings: Any) -> bytes:
        changes = {"evaluation": EVALUATION | settings, "checkpoints": {"every": 2, "best": True}}
        with monkeypatch.context() as patch, suppress(SystemExit):
            on_step(patch, stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
            loop.distill(student(tmp_path / "student", teacher, **changes))
        return weights_of(best)

    first = run(2)  # which saves, and so ends, after the evaluation that is due
    assert run(2, slots=3) == first  # worse than before
    last = run(9, max_tokens=7)
    assert last != first
    records_of = [r["evaluation"]["accuracy"] for r in records(tmp_path / "student")
                  if "evaluation" in r]  # fmt: skip
    assert records_of == [0.9, 0.5, 0.3]


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
    undisturbed = loop.distill(student(tmp_path / "undisturbed", teacher, ON_POLICY))
    with monkeypatch.context() as patch:
        on_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            loop.distill(student(tmp_path / "stopped", teacher, ON_POLICY))
    stopped = loop.distill(student(tmp_path / "stopped", teacher, ON_POLICY))
    assert weights_of(stopped) == weights_of(undisturbed)
    without = loop.distill(student(tmp_path / "without", teacher))
    losses = [[r["loss"] for r in records(out)] for out in (undisturbed, without)]
    same = [a == b for a, b in zip(*losses, strict=True)]
    assert [r.get("left_out") for r in records(stopped)] == [None, 0, None, 0, None]
    assert same[0]  # the first step of two is learnt from the data
    assert not any(same[1:])


# ---------------------------------------------------------------- decontamination


def test_what_repeats_an_evaluation_problem_is_dropped_and_told(
    tmp_path: Path, teacher: Path
) -> None:
    """Against the problems that the training data begins with: the run goes on with others."""
    known = PROBLEMS | {"count": 4}
    out = loop.distill(student(tmp_path / "student", teacher, decontaminate=[known]))
    dropped = read_metrics(work_folder(out) / DROPPED)
    wanted = {problem.id for problem in problems.load(recipes.parse(Arithmetic, known))}
    assert {each["problem_id"] for each in dropped} == wanted
    assert all(each["text"] and each["place"] and each["step"] >= 1 for each in dropped)
    without = loop.distill(student(tmp_path / "without", teacher))
    assert weights_of(out) != weights_of(without)
    assert not (work_folder(without) / DROPPED).exists()
