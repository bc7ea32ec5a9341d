"""Evaluation by generation: what `retort sample` and `retort grade` find, and nothing disturbed."""

import random
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

import retort
from retort.data.chat import load_tokenizer
from retort.grade import GRADER_VERSION
from retort.grade.run import grade
from retort.model.decoder import Decoder
from retort.recipe import BUNDLED_TEACHER, Arithmetic, Evaluation, SampleRecipe, load
from retort.report.metrics import pass_at_k
from retort.sample.run import sample
from retort.store import Run
from retort.train.evaluation import Answers, Questions, evaluate_by_generation, open_questions

PROBLEMS = Arithmetic(kind="arithmetic", count=4, difficulty=(1, 2))
SETTINGS = Evaluation(
    problems=PROBLEMS, every=10, n=2, max_tokens=100, temperature=1.5, slots=4, seed=4
)


@pytest.fixture(scope="module")
def student() -> Decoder:
    # In float64 other batches round differently by 1e-15 or so, too little to change a token.
    return retort.load(BUNDLED_TEACHER).double().train().requires_grad_()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(BUNDLED_TEACHER)


@pytest.fixture(scope="module")
def questions(student: Decoder, tokenizer: PreTrainedTokenizerBase) -> Questions:
    return open_questions(SETTINGS, tokenizer, student.config)


@pytest.fixture(scope="module")
def answers(student: Decoder, tokenizer: PreTrainedTokenizerBase, questions: Questions) -> Answers:
    return evaluate_by_generation(student, tokenizer, questions, questions.share())


def counts(answers: Answers) -> tuple[float, ...]:
    return astuple(replace(answers, seconds=0))


def test_it_finds_what_sampling_and_grading_find(
    tokenizer: PreTrainedTokenizerBase, questions: Questions, tmp_path: Path
) -> None:
    values = ["n=2", "max_tokens=100", "temperature=1.5", "seed=4"]
    problems = ["kind=arithmetic", "count=4", "difficulty=[1,2]"]
    settings = [f"sampling.{value}" for value in values] + [f"problems.{p}" for p in problems]
    recipe = load(SampleRecipe, [f"out={tmp_path / 'run'}", "model=bundled", "slots=4", *settings])
    summary = grade(sample(recipe))
    found = evaluate_by_generation(
        retort.load(BUNDLED_TEACHER), tokenizer, questions, questions.share()
    )
    assert found.completions == summary.total == 8
    assert found.correct == summary.correct
    assert found.truncated == summary.truncated
    assert found.no_answer == summary.no_answer
    assert min(found.truncated, found.no_answer, found.correct) > 0  # there is something to count
    run = Run.open(tmp_path / "run")
    assert found.tokens == sum(run.completions.read(["token_count"])["token_count"].to_pylist())
    rows = run.verdicts(GRADER_VERSION).read(["problem_id", "correct"]).to_pylist()
    by_problem = [
        sum(r["correct"] for r in rows if r["problem_id"] == p.id) for p in questions.problems
    ]
    assert found.coverage == np.mean(pass_at_k(2, by_problem, 2))
    assert found.accuracy == pytest.approx(np.mean(pass_at_k(2, by_problem, 1)))


def test_processes_share_the_problems(
    student: Decoder, tokenizer: PreTrainedTokenizerBase, questions: Questions, answers: Answers
) -> None:
    shares = [questions.share(rank, 3) for rank in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(4))
    parts = [evaluate_by_generation(student, tokenizer, questions, share) for share in shares]
    assert counts(parts[0] + parts[1] + parts[2]) == counts(answers)
    nothing = evaluate_by_generation(student, tokenizer, questions, questions.share(4, 5))
    assert counts(nothing) == counts(Answers())


def test_training_does_not_notice(
    student: Decoder, tokenizer: PreTrainedTokenizerBase, questions: Questions
) -> None:
    def noticeable() -> list[Any]:
        weights = [tensor.clone() for tensor in student.state_dict().values()]
        generators = [torch.get_rng_state(), torch.tensor(random.getstate()[1])]
        return [*weights, *generators, torch.from_numpy(np.random.get_state()[1])]

    def gradients() -> list[torch.Tensor]:
        ids_BT = torch.arange(20).reshape(2, 10)
        return list(torch.autograd.grad(student(ids_BT).logsumexp(-1).sum(), student.parameters()))

    before = noticeable() + gradients()
    evaluate_by_generation(student, tokenizer, questions, range(1))
    for one, other in zip(before, noticeable() + gradients(), strict=True):
        assert torch.equal(one, other)
    assert all(module.training for module in student.modules())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


def test_record(answers: Answers) -> None:
    assert answers.complete
    record = answers.record()
    assert list(record) == [
        "coverage", "accuracy", "truncated", "no_answer", "mean_tokens", "problems", "n", "seconds",
    ]  # fmt: skip
    assert record["n"] == 2
    assert record["coverage"] == answers.covered / 4 > record["accuracy"] == answers.correct / 8
    assert record["seconds"] > 0


def test_it_can_be_stopped(
    student: Decoder, tokenizer: PreTrainedTokenizerBase, questions: Questions
) -> None:
    requests: list[bool] = []

    def stopped() -> bool:
        requests.append(True)
        return len(requests) == 3

    answers = evaluate_by_generation(student, tokenizer, questions, range(2), stopped)
    assert (answers.completions, answers.asked) == (3, 4)
    assert not answers.complete
    assert student.training


@pytest.mark.parametrize("layers", ["am", "mm"])
def test_answers_must_fit_the_positions(
    make_decoder: Callable[..., Decoder], tokenizer: PreTrainedTokenizerBase, layers: str
) -> None:
    longest = max(len(prompt) for prompt in open_questions(
        SETTINGS, tokenizer, make_decoder("mm").config
    ).prompts)  # fmt: skip
    config = make_decoder(layers, max_position=longest + 99).config
    if "a" in layers:
        with pytest.raises(ValueError, match=r"max_tokens = 100: .* at most 99 fit"):
            open_questions(SETTINGS, tokenizer, config)
    else:
        assert open_questions(SETTINGS, tokenizer, config).problems
