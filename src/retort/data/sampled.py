"""What models have answered, kept where it was graded correct: rejection sampling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from retort.data.chat import Turn, ask
from retort.data.rows import ListedRows, Row
from retort.recipe import Sampled
from retort.store import Run
from retort.tables import row_keys


@dataclass(frozen=True)
class _Answer:
    """A correct completion of a run, and the user's turn that it answers."""

    prompt: str
    place: str
    sample_idx: int
    text: str


def sampled(data: Sampled, seed: int) -> ListedRows:
    """The correct completions of graded runs, as rows.

    Of the same text under the same prompt one is kept, and of each prompt the `per_problem` that
    were sampled first, taking turns among the runs. Completions that a length limit cut off teach
    no end and are left out. Raises ValueError for a folder that is no graded run, and when no run
    has a completion to learn from.
    """
    by_prompt: dict[str, list[_Answer]] = defaultdict(list)
    for folder in data.runs:
        for answer in _correct(Run.open(folder)):
            by_prompt[answer.prompt].append(answer)
    kept = [
        answer for answers in by_prompt.values() for answer in _first(answers, data.per_problem)
    ]
    if not kept:
        runs = ", ".join(map(str, data.runs))
        raise ValueError(f"{runs}: no completion that is correct and ended by itself")
    turns = [(Turn("user", answer.prompt), Turn("assistant", answer.text)) for answer in kept]
    listed = [Row(answer.place, both) for answer, both in zip(kept, turns, strict=True)]
    return ListedRows(listed, seed)


def _first(answers: list[_Answer], limit: int | None) -> list[_Answer]:
    different: dict[str, _Answer] = {}
    for answer in sorted(answers, key=lambda answer: answer.sample_idx):
        different.setdefault(answer.text, answer)
    return list(different.values())[:limit]


def _correct(run: Run) -> Iterator[_Answer]:
    """The run's correct completions in the order of its problems and samples."""
    keys = _correct_keys(run)
    prompts = _prompts(run)
    answers = []
    columns = ["problem_id", "sample_idx", "text", "finish_reason"]
    for part in run.completions.parts(columns):
        ends = part["finish_reason"].to_pylist()
        for key, text, end in zip(row_keys(part), part["text"], ends, strict=True):
            if key in keys and end == "stop":
                place = f"{run.folder}:{key[0]}:{key[1]}"
                answers.append(_Answer(prompts[key[0]], place, key[1], text.as_py()))
    order = {prompt: i for i, prompt in enumerate(prompts.values())}
    yield from sorted(answers, key=lambda answer: (order[answer.prompt], answer.sample_idx))


def _correct_keys(run: Run) -> set[tuple[str, int]]:
    """The completions that the run's newest grader found correct."""
    versions = run.verdict_versions()
    if not versions:
        raise ValueError(
            f"{run.folder}: not graded; `retort grade {run.folder}` does that "
            "(docs/data.md#rejection-sampling)"
        )
    newest = max(versions, key=lambda version: (len(version), version))  # "10" is after "9"
    verdicts = run.verdicts(newest).read(["problem_id", "sample_idx", "correct"])
    flags = verdicts["correct"].to_pylist()
    return {key for key, correct in zip(row_keys(verdicts), flags, strict=True) if correct}


def _prompts(run: Run) -> dict[str, str]:
    """The user's turn of each problem, as the run asked it."""
    prompt = run.manifest["identity"].get("prompt")
    if not isinstance(prompt, str):
        raise ValueError(f"{run.folder}: its run.json has no prompt, so what was asked is unknown")
    problems = run.problems.read(["problem_id", "question"]).to_pylist()
    return {row["problem_id"]: ask(prompt, row["question"]) for row in problems}
