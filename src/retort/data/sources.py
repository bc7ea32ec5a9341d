"""The sources that a recipe names: worked problems, files of text or conversations, samples."""

from __future__ import annotations

import random
from dataclasses import dataclass

from retort.data import arithmetic, problems
from retort.data.chat import Conversation, Turn, ask
from retort.data.columns import chat_columns, text_columns
from retort.data.files import file_rows
from retort.data.rows import ListedRows, Row, Source
from retort.data.sampled import sampled
from retort.recipe import Arithmetic, Chat, Jsonl, Sampled, Text, Worked
from retort.recipe import Source as SourceSpec


def source_name(data: SourceSpec) -> str:
    """What metrics call a source: what it holds, or where it is."""
    match data:
        case Worked(problems=Jsonl(path=path)):
            return str(path)
        case Worked():
            return data.problems.kind
        case Text() | Chat():
            return str(data.path or ":".join(filter(None, (data.hub, data.subset))))
        case Sampled():
            return ", ".join(map(str, data.runs))


def open_source(data: SourceSpec, seed: int) -> Source:
    """The rows of one source. Raises ValueError for unusable files."""
    match data:
        case Worked():
            return worked(data, seed)
        case Text():
            return file_rows(data, *text_columns(data), seed)
        case Chat():
            return file_rows(data, *chat_columns(data), seed)
        case Sampled():
            return sampled(data, seed)


@dataclass(frozen=True)
class ArithmeticRows:
    """Procedural problems without end: no row comes twice."""

    spec: Arithmetic
    prompt: str
    rows: None = None
    run: int = 1

    def read(self, indices: range) -> list[Row | None]:
        """Worked problems; None where one belongs to the other split."""
        return [self._row(index) for index in indices]

    def _row(self, index: int) -> Row | None:
        spec = self.spec
        rng = random.Random(f"{spec.seed}:{index}")
        example = arithmetic.make(rng, spec.difficulty, spec.reach)
        if arithmetic.is_test(example.question) != (spec.split == "test"):
            return None
        return Row(str(index), _solved(self.prompt, example.question, example.solution))


def worked(data: Worked, seed: int) -> Source:
    """Problems with their solutions. Raises ValueError for one that has none."""
    if isinstance(data.problems, Arithmetic):
        return ArithmeticRows(data.problems, data.prompt)
    found = problems.load(data.problems)
    lacking = [problem.id for problem in found if not problem.solution]
    if lacking:
        raise ValueError(
            f"training problems need a worked solution, and {len(lacking)} have none "
            f"(first: {lacking[0]}); name its key with solution="
        )
    listed = [Row(p.id, _solved(data.prompt, p.question, p.solution or "")) for p in found]
    return ListedRows(listed, seed)


def _solved(prompt: str, question: str, solution: str) -> Conversation:
    return Turn("user", ask(prompt, question)), Turn("assistant", solution)
