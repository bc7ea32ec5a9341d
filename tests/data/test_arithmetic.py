"""Procedural problems: right in every step, the same everywhere, and never in both splits."""

import operator
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import islice

import pytest

from retort.data.arithmetic import LARGEST, Example, examples, is_test, make

WORKING = re.compile(r"(\w+) has .*\. That is (.*) = (\d+)\. So \1 has \3 (\w+)\.$")
OPERATIONS: dict[str, Callable[[int, int], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
SHARES = {"half": 2}


def sample(count: int = 300, difficulty: tuple[int, int] = (1, 12)) -> list[Example]:
    return list(islice(examples("train", 0, difficulty), count))


def answer_of(question: str) -> int:
    """The question read and answered without a look at how it was made."""
    *statements, asked = re.findall(r"[^.?]+[.?]", re.sub(r"\b\d+\. ", "", question))
    values: dict[str, int] = {}
    for statement in statements:
        name, claim = parts(r" ?(\w+) has (.*)\.", statement)
        values[name] = meaning(claim, values)
    (name,) = parts(r" How many \w+ does (\w+) have\?", asked)
    return values[name]


def parts(pattern: str, sentence: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, sentence)
    assert found is not None
    return found.groups()


def meaning(claim: str, values: dict[str, int]) -> int:
    match claim.split():
        case [number, _]:
            return int(number)
        case [number, "more", _, "than", other]:
            return values[other] + int(number)
        case [number, "fewer", _, "than", other]:
            return values[other] - int(number)
        case [number, "times", "as", "many", _, "as", other]:
            return values[other] * int(number)
        case ["as", "many", _, "as", one, "and", other, "together"]:
            return values[one] + values[other]
        case [*share, "as", "many", _, "as", other]:
            value = values[other] / SHARES[" ".join(share)]
            assert value == int(value)
            return int(value)
    raise AssertionError(claim)


def test_answers_follow_from_the_questions() -> None:
    for example in sample():
        assert example.answer == str(answer_of(example.question))


def worked_out(sum_: str) -> float:
    """The value of `a + b` and the like."""
    left, sign, right = sum_.split()
    return OPERATIONS[sign](int(left), int(right))


def test_every_step_of_a_solution_is_right() -> None:
    signs = set()
    for example in sample():
        given, *steps, final = example.solution.split("\n\n")
        assert given in example.question
        for step in steps:
            found = WORKING.search(step)
            assert found is not None
            _, sums, result, item = found.groups()
            assert {worked_out(sum_) for sum_ in sums.split(" = ")} == {int(result)}
            assert 2 <= int(result) <= LARGEST
            assert f"How many {item} does" in example.question
            assert step.split(". That is ")[0] in example.question
            signs.add(sums.split()[1])
        assert result == example.answer
        assert final == f"The final answer is {example.answer}."
    assert signs == set(OPERATIONS)


@pytest.mark.parametrize("steps", [1, 2, 7, 12])
def test_difficulty_is_the_number_of_derived_quantities(steps: int) -> None:
    for example in sample(30, (steps, steps)):
        assert example.question.count(" has ") == steps + 1
        assert example.solution.count(". That is ") == steps


def test_difficulties_are_drawn_evenly() -> None:
    rng = random.Random(0)
    counts = [make(rng, (2, 4)).solution.count(". That is ") for _ in range(600)]
    assert all(150 < counts.count(steps) < 250 for steps in (2, 3, 4))


@pytest.mark.parametrize("reach", [1, 2, 5])
def test_nothing_is_derived_from_beyond_the_reach(reach: int) -> None:
    found = [back for example in within(reach) for back in distances(example.question)]
    assert max(found) == reach
    assert min(found) == 1


def test_answers_within_a_reach_follow_from_the_questions() -> None:
    for example in within(2):
        assert example.answer == str(answer_of(example.question))


def within(reach: int) -> list[Example]:
    return list(islice(examples("train", 0, (2, 20), reach), 100))


def distances(question: str) -> list[int]:
    """How many statements back each name stands that a statement derives from."""
    *statements, _ = re.findall(r"[^.?]+[.?]", re.sub(r"\b\d+\. ", "", question))
    names = [statement.split()[0] for statement in statements]
    return [
        i - names.index(word)
        for i, statement in enumerate(statements)
        for word in re.findall(r"\w+", statement)[1:]
        if word in names
    ]


def test_same_arguments_same_examples() -> None:
    first = list(islice(examples("train", 5, (1, 4)), 20))
    assert list(islice(examples("train", 5, (1, 4)), 20)) == first
    assert list(islice(examples("train", 6, (1, 4)), 20)) != first


def test_examples_do_not_depend_on_the_process() -> None:
    """Python hashes strings differently in every process."""
    code = (
        "from itertools import islice; from retort.data.arithmetic import examples;"
        "print(list(islice(examples('test', 0, (1, 6)), 10)))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {f"{list(islice(examples('test', 0, (1, 6)), 10))}\n"}


def test_splits_are_disjoint_over_all_seeds() -> None:
    """With few and small problems, so that the same question does come up under many seeds."""
    splits: dict[str, set[str]] = {"train": set(), "test": set()}
    drawn = 0
    for seed in range(40):
        for name in ("train", "test"):
            found = [e.question for e in islice(examples(name, seed, (1, 1)), 50)]
            splits[name].update(found)
            drawn += len(found)
    assert splits["train"].isdisjoint(splits["test"])
    assert drawn == 4000


def test_a_tenth_is_for_testing() -> None:
    rng = random.Random(0)
    share = sum(is_test(make(rng, (3, 3)).question) for _ in range(2000)) / 2000
    assert 0.08 < share < 0.12
