"""Where problems and training rows come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from retort.recipe.base import PAPER_PROMPT, Difficulty, Frozen, Prompt


class Arithmetic(Frozen):
    """Procedural word problems; `difficulty` is the least and the largest number of steps."""

    kind: Literal["arithmetic"]
    split: Literal["train", "test"] = "test"
    count: PositiveInt = 100
    seed: NonNegativeInt = 0
    difficulty: tuple[Difficulty, Difficulty] = (3, 6)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.difficulty[0] > self.difficulty[1]:
            raise ValueError("difficulty is [least, largest]: the first number is the larger one")
        return self


class Subset(Frozen):
    """Problems from a file: all of them, or `count` of them drawn with `seed`."""

    count: PositiveInt | None = None
    seed: NonNegativeInt = 0


class Gsm8k(Subset):
    """GSM8K from a local JSONL, or from the hub as openai/gsm8k when no path is given."""

    kind: Literal["gsm8k"]
    path: Path | None = None
    split: Literal["train", "test"] = "test"


class Math500(Subset):
    """MATH-500 from a local JSONL, or from the hub as HuggingFaceH4/MATH-500."""

    kind: Literal["math500"]
    path: Path | None = None


class Jsonl(Subset):
    """Any JSONL file with a question and an answer in each row, under the keys named here."""

    kind: Literal["jsonl"]
    path: Path
    question: str = "question"
    answer: str = "answer"
    solution: str | None = None


Problems = Annotated[Arithmetic | Gsm8k | Math500 | Jsonl, Field(discriminator="kind")]


class Worked(Frozen):
    """Training rows from problems with a worked solution: chat template, loss on the answer."""

    kind: Literal["worked"]
    problems: Problems
    prompt: Prompt = PAPER_PROMPT


class Text(Frozen):
    """Training rows from plain text: JSONL files with one document in the field `column`."""

    kind: Literal["text"]
    path: Path
    column: str = "text"


Data = Annotated[Worked | Text, Field(discriminator="kind")]
