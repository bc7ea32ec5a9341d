"""Where problems and training rows come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from retort.recipe.base import PAPER_PROMPT, Difficulty, Frozen, Prompt


class Arithmetic(Frozen):
    """Procedural word problems; `difficulty` is the least and the largest number of steps.

    A step builds on the last `reach` quantities: the fewer, the less there is to remember. Without
    it, on any of them.
    """

    kind: Literal["arithmetic"]
    split: Literal["train", "test"] = "test"
    count: PositiveInt = 100
    seed: NonNegativeInt = 0
    difficulty: tuple[Difficulty, Difficulty] = (3, 6)
    reach: PositiveInt | None = None

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


class Files(Frozen):
    """Rows from files on this machine or from a dataset of the hub.

    `path` is a file (.parquet, .jsonl, .txt, the last one document a file), a folder of them, or a
    pattern such as `data/*.parquet`. `hub` is a dataset's id, whose parquet files are read where
    they are, a row group at a time; download it (`hf download --repo-type dataset ID`) and give a
    path to train without a network.
    """

    path: Path | None = None
    hub: str | None = None
    subset: str | None = None
    split: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub, the one place where the rows are")
        if self.path is not None and (self.subset or self.split):
            raise ValueError("subset and split: belong to hub; a path names its files itself")
        return self


class Text(Files):
    """Plain text, one document in each row's `column`; every token is learnt."""

    kind: Literal["text"]
    column: str = "text"


class Chat(Files):
    """Conversations, rendered with the model's chat template; the assistant's turns are learnt.

    `messages` names a column of turns (role and content, or from and value); or `question` and
    `answer` name two columns, of which the first is put into `prompt`.
    """

    kind: Literal["chat"]
    messages: str | None = None
    question: str | None = None
    answer: str | None = None
    prompt: Prompt = "{question}"

    @model_validator(mode="after")
    def _columns(self) -> Self:
        pair = self.question is not None and self.answer is not None
        if pair == (self.messages is not None) or (self.question is None) != (self.answer is None):
            raise ValueError("give either messages, or question and answer: the columns to read")
        return self


class Sampled(Frozen):
    """What models have answered in graded run folders (`retort sample`, `retort grade`): correct
    and finished completions alone, at most `per_problem` different ones of each problem (rejection
    sampling).
    """

    kind: Literal["sampled"]
    runs: Annotated[tuple[Path, ...], Field(min_length=1)]
    per_problem: PositiveInt | None = None


Source = Annotated[Worked | Text | Chat | Sampled, Field(discriminator="kind")]


class Part(Frozen):
    """One source of a mixture, and its share of the tokens in proportion to the other weights."""

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    data: Source


class Mixture(Frozen):
    """Several sources at once. A weight of 0 leaves a source out."""

    kind: Literal["mixture"]
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not any(part.weight for part in self.parts):
            raise ValueError("parts: all weights are 0; at least one source must have some")
        return self


Data = Annotated[Worked | Text | Chat | Sampled | Mixture, Field(discriminator="kind")]
