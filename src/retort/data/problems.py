"""Problems with a checkable answer: procedural, GSM8K, MATH-500, or any JSONL file."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retort.data import arithmetic
from retort.recipe import Arithmetic, Gsm8k, Jsonl, Math500, Problems

_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Problem:
    """A question, the answer it is graded against, and a worked solution where there is one."""

    id: str
    question: str
    answer: str
    solution: str | None = None


def load(spec: Problems) -> list[Problem]:
    """The problems that a recipe asks for, in an order that depends on nothing but the recipe.

    Raises ValueError for a file that is missing, empty or damaged, and for a row without a
    question or an answer, naming the file and the line.
    """
    if isinstance(spec, Arithmetic):
        return _arithmetic(spec)
    return _subset(_numbered(list(_READERS[type(spec)](spec))), spec.count, spec.seed)


def shots(spec: Problems, asked: list[Problem]) -> list[Problem]:
    """Solved problems to show before each question.

    Raises ValueError for a problem without a solution, and for one that is among those asked.
    """
    shown = load(spec)
    questions = {problem.question for problem in asked}
    for problem in shown:
        if problem.solution is None:
            raise ValueError(f"shots: problem {problem.id} has no worked solution to show")
        if problem.question in questions:
            raise ValueError(
                f"shots: problem {problem.id} is also asked; take the shots from another split"
            )
    return shown


def worked(problem: Problem) -> str:
    """A problem's solution, ending as the paper's prompt asks: "The final answer is ...".

    GSM8K's marks, for the answer and for its calculator, are left out.
    """
    assert problem.solution is not None
    text = _CALCULATOR.sub("", problem.solution.rsplit("####", 1)[0]).rstrip()
    if "final answer is" in text.lower():
        return text
    return f"{text}\nThe final answer is {problem.answer}"


def _arithmetic(spec: Arithmetic) -> list[Problem]:
    distinct: dict[str, Problem] = {}
    for example in arithmetic.examples(spec.split, spec.seed, spec.difficulty, spec.reach):
        problem = _problem(example.question, example.answer, example.solution)
        distinct.setdefault(problem.id, problem)
        if len(distinct) == spec.count:
            break
    return list(distinct.values())


def _gsm8k(spec: Gsm8k) -> Iterator[Problem]:
    rows = _rows(spec.path) if spec.path else _hub_rows("openai/gsm8k", "main", spec.split)
    for where, row in rows:
        solution = _field(row, "answer", where)
        if "####" not in solution:
            raise ValueError(f"{where}: the answer of a GSM8K row ends in '#### number'")
        answer = solution.rsplit("####", 1)[1].strip()
        yield _problem(_field(row, "question", where), answer, solution)


def _math500(spec: Math500) -> Iterator[Problem]:
    rows = _rows(spec.path) if spec.path else _hub_rows("HuggingFaceH4/MATH-500", None, "test")
    for where, row in rows:
        question, answer = _field(row, "problem", where), _field(row, "answer", where)
        yield _problem(question, answer, row.get("solution"), row.get("unique_id"))


def _jsonl(spec: Jsonl) -> Iterator[Problem]:
    for where, row in _rows(spec.path):
        solution = _field(row, spec.solution, where) if spec.solution else None
        question = _field(row, spec.question, where)
        answer = _field(row, spec.answer, where)
        yield _problem(question, answer, solution, row.get("id"))


_READERS: Mapping[type, Callable[[Any], Iterator[Problem]]] = {
    Gsm8k: _gsm8k,
    Math500: _math500,
    Jsonl: _jsonl,
}


def _problem(question: str, answer: str, solution: str | None, id: object = None) -> Problem:
    """A problem under its own id, or under a hash of its question: the same text, the same id."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).hexdigest()
    return Problem(digest if id is None else str(id), question, answer, solution)


def _numbered(problems: list[Problem]) -> list[Problem]:
    """Gives repeated ids a number behind, so that each problem has one of its own."""
    times: Counter[str] = Counter()
    unique: dict[str, Problem] = {}
    for problem in problems:
        id = problem.id
        while id in unique:  # more than once where a file has such ids of its own
            times[problem.id] += 1
            id = f"{problem.id}-{times[problem.id] + 1}"
        unique[id] = replace(problem, id=id)
    return list(unique.values())


def _subset(problems: list[Problem], count: int | None, seed: int) -> list[Problem]:
    """The first `count` of a shuffle by `seed`: a larger count only adds problems."""
    if count is None:
        return problems
    if count > len(problems):
        raise ValueError(f"count = {count}: there are only {len(problems)} problems")
    return random.Random(seed).sample(problems, len(problems))[:count]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place for messages."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file of problems (JSONL, one object in each line)")
    found = False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                found = True
                yield f"{path}:{number}", _object(line, f"{path}:{number}")
    if not found:
        raise ValueError(f"{path}: no problems in it")


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON object was expected")
    return row


def _hub_rows(name: str, subset: str | None, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, subset, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}: not to be had from the hub; give a path= ({reason})") from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{number}", row


def _field(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if value is None or not str(value).strip():
        keys = ", ".join(sorted(row))
        raise ValueError(f"{where}: no {key!r} in this row (it has: {keys})")
    return str(value)
