"""Procedural word problems with chain-of-thought solutions: endless, checkable, and of any length.

A problem lists quantities, each derived from earlier ones, and asks for the last of them.
Its solution derives them one by one in the paper's format: steps separated by blank lines and
a closing "The final answer is N". The number of derived quantities is the difficulty, and `reach`
how far back one may look for what it derives from: how long to think and how much to remember.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kira", "Leo",
    "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Uma", "Vera", "Will", "Yara", "Zoe",
)  # fmt: skip
ITEMS = (
    "apples", "books", "coins", "shells", "cards", "stamps", "pens", "beads",
    "stones", "tickets", "marbles", "buttons",
)  # fmt: skip
LEAST, LARGEST = 5, 199
TEST_SHARE = 0.1


@dataclass(frozen=True)
class Example:
    """A word problem, its answer, and the worked solution that a model learns from."""

    question: str
    answer: str
    solution: str


@dataclass(frozen=True)
class Quantity:
    """What one person has: the sentence that states it, how it is worked out, and its value."""

    name: str
    value: int
    statement: str
    working: str


def examples(
    split: Literal["train", "test"],
    seed: int,
    difficulty: tuple[int, int],
    reach: int | None = None,
) -> Iterator[Example]:
    """Endless examples, the same for the same arguments on every machine.

    A question's hash decides its split, so no seed puts a test question into training.
    """
    index = 0
    while True:
        example = make(random.Random(f"{seed}:{index}"), difficulty, reach)
        index += 1
        if is_test(example.question) == (split == "test"):
            yield example


def is_test(question: str) -> bool:
    """Whether a question belongs to the test split, by its hash."""
    digest = hashlib.blake2b(question.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < TEST_SHARE * 2**32


def make(rng: random.Random, difficulty: tuple[int, int], reach: int | None = None) -> Example:
    """One example with a number of derived quantities drawn evenly from the difficulty range.

    Each is derived from the last `reach` quantities, or from any when that is None.
    """
    steps = rng.randint(*difficulty)
    names = rng.sample(NAMES, steps + 1)
    item = rng.choice(ITEMS)
    chain = [_given(rng, names[0], item)]
    for name in names[1:]:
        chain.append(_derived(rng, name, item, chain if reach is None else chain[-reach:]))
    last = chain[-1]
    statements = " ".join(f"{i}. {quantity.statement}" for i, quantity in enumerate(chain, 1))
    workings = "\n\n".join(f"{i}. {quantity.working}" for i, quantity in enumerate(chain, 1))
    return Example(
        question=f"{statements} How many {item} does {last.name} have?",
        answer=str(last.value),
        solution=f"{workings}\n\nThe final answer is {last.value}.",
    )


def _given(rng: random.Random, name: str, item: str) -> Quantity:
    value = rng.randint(11, 60)
    sentence = f"{name} has {value} {item}."
    return Quantity(name, value, sentence, sentence)


def _derived(rng: random.Random, name: str, item: str, known: list[Quantity]) -> Quantity:
    """A quantity derived from the last known one, or now and then from any of them."""
    base = known[-1] if rng.random() < 0.75 else rng.choice(known)
    relations = (_more, _fewer, _times, _half, _together)
    for relation in rng.sample(relations, len(relations)):
        found = relation(rng, item, base, known)
        if found is not None and LEAST <= found.value <= LARGEST:
            claim = f"{name} has {found.claim}"
            result = f"{found.working} = {found.value}. So {name} has {found.value} {item}."
            working = f"{claim}. That is {result}"
            return Quantity(name, found.value, f"{claim}.", working)
    return _derived(rng, name, item, known)


@dataclass(frozen=True)
class Relation:
    """How a quantity follows from earlier ones: in words, worked out, and its value.

    The working goes by tens and ones, as one does in one's head, so that every step is a small one.
    """

    claim: str
    working: str
    value: int


def _more(rng: random.Random, item: str, base: Quantity, known: list[Quantity]) -> Relation | None:
    by = rng.randint(11, 60)
    claim = f"{by} more {item} than {base.name}"
    return Relation(claim, _added(base.value, by), base.value + by)


def _fewer(rng: random.Random, item: str, base: Quantity, known: list[Quantity]) -> Relation | None:
    by = rng.randint(11, 60)
    claim = f"{by} fewer {item} than {base.name}"
    after_tens = base.value - by // 10 * 10
    working = f"{base.value} - {by} = {after_tens} - {by % 10}"
    return Relation(claim, working, base.value - by)


def _times(rng: random.Random, item: str, base: Quantity, known: list[Quantity]) -> Relation | None:
    by = rng.randint(2, 4)
    tens, ones = base.value // 10 * 10, base.value % 10
    claim = f"{by} times as many {item} as {base.name}"
    working = f"{by} * {base.value} = {by * tens} + {by * ones}"
    return Relation(claim, working, by * base.value)


def _half(rng: random.Random, item: str, base: Quantity, known: list[Quantity]) -> Relation | None:
    if base.value % 2:
        return None
    tens, ones = base.value // 10 * 10, base.value % 10
    claim = f"half as many {item} as {base.name}"
    working = f"{base.value} / 2 = {tens // 2} + {ones // 2}"
    return Relation(claim, working, base.value // 2)


def _together(
    rng: random.Random, item: str, base: Quantity, known: list[Quantity]
) -> Relation | None:
    others = [quantity for quantity in known if quantity is not base]
    if not others:
        return None
    other = rng.choice(others)
    claim = f"as many {item} as {base.name} and {other.name} together"
    return Relation(claim, _added(base.value, other.value), base.value + other.value)


def _added(first: int, second: int) -> str:
    tens = first // 10 * 10 + second // 10 * 10
    return f"{first} + {second} = {tens} + {first % 10 + second % 10}"
