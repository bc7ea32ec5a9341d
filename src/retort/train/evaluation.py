"""Evaluation by generation: a student answers problems while it is trained, and is graded.

Likelihoods hide what distillation damages, so the student writes whole answers, as it will when it
is used. The same problems, prompts and random streams come every time: two evaluations differ by
what was learnt between them alone. Nothing that training depends on is touched.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Self

from transformers import PreTrainedTokenizerBase

from retort.data import problems as sets
from retort.data.chat import ask, prompt_ids
from retort.data.problems import Problem
from retort.grade.answers import grade_text
from retort.model.config import ATTENTION, DecoderConfig
from retort.model.decoder import Decoder
from retort.recipe import Evaluation
from retort.sample.engine import Engine, Finished, Request
from retort.sample.tokens import SamplingParams
from retort.store import sample_seed


@dataclass(frozen=True)
class Questions:
    """The problems of an evaluation, and each one's prompt as tokens."""

    settings: Evaluation
    problems: tuple[Problem, ...]
    prompts: tuple[list[int], ...]

    def share(self, rank: int = 0, size: int = 1) -> range:
        """The problems that one of `size` processes answers."""
        return range(rank, len(self.problems), size)


@dataclass(frozen=True)
class Answers:
    """What came of some problems: counts, which add up over processes, and their seconds.

    `asked` is the number of completions wanted, and `completions` the number of those made;
    `covered` counts problems with a right completion, `truncated` completions that were cut off,
    `no_answer` those in which no answer was found.
    """

    asked: float = 0
    problems: float = 0
    covered: float = 0
    completions: float = 0
    correct: float = 0
    truncated: float = 0
    no_answer: float = 0
    tokens: float = 0
    seconds: float = 0

    def __add__(self, more: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(astuple(self), astuple(more), strict=True)))

    @property
    def complete(self) -> bool:
        """Whether all that was asked was answered: False where an evaluation was stopped."""
        return self.completions == self.asked

    @property
    def coverage(self) -> float:
        """The share of problems with at least one right completion: pass@n with all n samples."""
        return self.covered / self.problems

    @property
    def accuracy(self) -> float:
        """The share of completions that are right: pass@1."""
        return self.correct / self.completions

    def record(self) -> dict[str, float]:
        """What the metrics say of a complete evaluation."""
        return {
            "coverage": self.coverage,
            "accuracy": self.accuracy,
            "truncated": self.truncated / self.completions,
            "no_answer": self.no_answer / self.completions,
            "mean_tokens": self.tokens / self.completions,
            "problems": self.problems,
            "n": self.completions / self.problems,
            "seconds": self.seconds,
        }


def open_questions(
    settings: Evaluation, tokenizer: PreTrainedTokenizerBase, config: DecoderConfig
) -> Questions:
    """The problems that a recipe evaluates with.

    Raises ValueError for files that are missing or damaged, and for answers that do not fit the
    student's positions.
    """
    problems = tuple(sets.load(settings.problems))
    prompts = tuple(prompt_ids(tokenizer, ask(settings.prompt, p.question)) for p in problems)
    longest = max(map(len, prompts))
    if ATTENTION in config.layer_types and longest + settings.max_tokens > config.max_position:
        raise ValueError(
            f"evaluation.max_tokens = {settings.max_tokens}: with a prompt of {longest} tokens "
            f"that exceeds the student's {config.max_position} positions; at most "
            f"{config.max_position - longest} fit"
        )
    return Questions(settings, problems, prompts)


def comparable(settings: Evaluation) -> str:
    """What must be the same in two evaluations for their scores to be compared, as text: not when
    they come, nor how many answers are written at once.
    """
    return settings.model_dump_json(exclude={"every", "slots"})


def evaluate_by_generation(
    student: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    share: range,
    stopped: Callable[[], bool] = lambda: False,
) -> Answers:
    """Answers a share of the problems, `n` times each, and grades what was written.

    The student must be whole on this process: processes take different numbers of steps, and one
    that waits for another's weights would wait for ever. `stopped` is asked after each completion;
    once it says True the rest is left out.
    """
    began = time.perf_counter()
    asked = len(share) * questions.settings.n
    done = Counter[str]()
    covered = set[int]()
    with eval_mode(student):
        for finished in _finished(student, questions, share):
            problem = share[finished.request]
            found = _graded(tokenizer, questions.problems[problem], finished)
            done.update(found)
            if found["correct"]:
                covered.add(problem)
            if stopped():
                break
    seconds = time.perf_counter() - began
    return Answers(asked, len(share), len(covered), seconds=seconds, **done)


@contextmanager
def eval_mode(student: Decoder) -> Iterator[None]:
    """Has a decoder in evaluation mode for a while."""
    training = student.training
    student.eval()
    try:
        yield
    finally:
        student.train(training)


def _finished(student: Decoder, questions: Questions, share: range) -> Iterator[Finished]:
    settings = questions.settings
    requests = [
        Request(
            questions.prompts[i],
            [sample_seed(settings.seed, questions.problems[i].id, j) for j in range(settings.n)],
        )
        for i in share
    ]
    params = SamplingParams(max_tokens=settings.max_tokens, temperature=settings.temperature)
    return Engine(student, settings.slots).stream(requests, params)


def _graded(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, finished: Finished
) -> Mapping[str, int]:
    """One completion as counts."""
    completion = finished.completion
    (text,) = tokenizer.batch_decode([completion.token_ids], skip_special_tokens=True)
    verdict = grade_text(problem.answer, text)
    return {
        "completions": 1,
        "correct": int(verdict.correct),
        "truncated": int(completion.finish_reason == "length"),
        "no_answer": int(verdict.answer is None),
        "tokens": len(completion.token_ids),
    }
