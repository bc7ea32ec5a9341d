"""Packed training rows: whole documents side by side, with document ids, exactly resumable.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retort.data import arithmetic, problems
from retort.data.chat import Document, ask, worked_document
from retort.recipe import Arithmetic, Data, Text, Worked

LOOKAHEAD = 32
PATIENCE = 10_000
PADDING = -1


class Batch(NamedTuple):
    """Rows of documents. `learn_BT` is true where the token that FOLLOWS is to be learnt.

    `document_BT` numbers the documents of each row and is negative on padding.
    """

    ids_BT: Tensor
    document_BT: Tensor
    learn_BT: Tensor

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return type(self)(*(tensor.to(device, non_blocking=True) for tensor in self))

    def split(self, rows: int) -> Iterator[Self]:
        """Micro-batches of at most `rows` rows."""
        for parts in zip(*(tensor.split(rows) for tensor in self), strict=True):
            yield type(self)(*parts)


class Source(Protocol):
    """An endless list of documents; None stands for one that is to be passed over."""

    def document(self, index: int) -> Document | None: ...

    def texts(self) -> Iterator[str]:
        """The same documents as text, for training a tokenizer."""
        ...


def open_source(data: Data, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> Source:
    """The documents a recipe's data describes. Raises ValueError for unusable files."""
    if isinstance(data, Text):
        return TextSource(data, tokenizer, seed)
    if isinstance(data.problems, Arithmetic):
        return ArithmeticSource(data, data.problems, tokenizer)
    return WorkedSource(data, tokenizer, seed)


@dataclass(frozen=True)
class ArithmeticSource:
    """Procedural problems without end: no document comes twice."""

    data: Worked
    spec: Arithmetic
    tokenizer: PreTrainedTokenizerBase | None

    def document(self, index: int) -> Document | None:
        """The index-th problem, worked; None where it belongs to the other split."""
        example = arithmetic.make(random.Random(f"{self.spec.seed}:{index}"), self.spec.difficulty)
        if arithmetic.is_test(example.question) != (self.spec.split == "test"):
            return None
        assert self.tokenizer is not None
        text = ask(self.data.prompt, example.question)
        return worked_document(self.tokenizer, text, example.solution)

    def texts(self) -> Iterator[str]:
        """Prompts and solutions."""
        spec = self.spec
        for example in arithmetic.examples(spec.split, spec.seed, spec.difficulty):
            yield ask(self.data.prompt, example.question)
            yield example.solution


class WorkedSource:
    """Problems from a file with their solutions, shuffled anew for each pass."""

    def __init__(self, data: Worked, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        self.data, self.tokenizer, self.seed = data, tokenizer, seed
        self.problems = problems.load(data.problems)
        lacking = [problem.id for problem in self.problems if not problem.solution]
        if lacking:
            raise ValueError(
                f"training problems need a worked solution, and {len(lacking)} have none "
                f"(first: {lacking[0]}); name its key with solution="
            )

    def document(self, index: int) -> Document:
        """The index-th problem of an endless series of shuffled passes, worked."""
        problem = self.problems[shuffled(len(self.problems), self.seed, index)]
        assert self.tokenizer is not None and problem.solution is not None
        text = ask(self.data.prompt, problem.question)
        return worked_document(self.tokenizer, text, problem.solution)

    def texts(self) -> Iterator[str]:
        """Prompts and solutions, one pass."""
        for problem in self.problems:
            yield ask(self.data.prompt, problem.question)
            yield problem.solution or ""


class TextSource:
    """Plain text from a JSONL file, shuffled anew for each pass; every token is learnt."""

    def __init__(self, data: Text, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.rows = list(_column(data))

    def document(self, index: int) -> Document:
        """The index-th text of an endless series of shuffled passes."""
        assert self.tokenizer is not None
        eos = self.tokenizer.eos_token_id
        text = self.rows[shuffled(len(self.rows), self.seed, index)]
        return Document(self.tokenizer.encode(text) + ([] if eos is None else [eos]))

    def texts(self) -> Iterator[str]:
        """One pass, in the file's order."""
        return iter(self.rows)


def _column(data: Text) -> Iterator[str]:
    if not data.path.is_file():
        raise ValueError(f"{data.path}: no such file of texts (JSONL, one object in each line)")
    found = False
    with data.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                found = True
                yield _text(line, data.column, f"{data.path}:{number}")
    if not found:
        raise ValueError(f"{data.path}: no texts in it")


def _text(line: bytes, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or not str(row.get(column) or "").strip():
        raise ValueError(f"{where}: no {column!r} in this row")
    return str(row[column])


def shuffled(count: int, seed: int, index: int) -> int:
    """Position `index` of an endless series in which every pass is a new permutation."""
    return _permutation(count, seed, index // count)[index % count]


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}:{epoch}").sample(range(count), count)


Piece = tuple[int, int]
"""A document's index and the token it is taken from."""


@dataclass
class Packer:
    """Fills rows of `length` tokens with documents in their order, looking ahead for what fits.

    Text is cut where a row ends and goes on in another; a conversation is kept whole, and one that
    is longer than a row is skipped and counted. `cursor`, `queue` and `skipped` are all there is
    to resume from.
    """

    source: Source
    length: int
    cursor: int = 0
    queue: list[Piece] = field(default_factory=list)
    skipped: int = 0
    _loaded: dict[int, Document] = field(default_factory=dict)

    def batch(self, rows: int) -> Batch:
        """The next rows. Raises ValueError when documents keep being too long for them."""
        packed = [_tensors(self._row(), self.length) for _ in range(rows)]
        return Batch(*(torch.stack(column) for column in zip(*packed, strict=True)))

    def _row(self) -> list[Document]:
        pieces: list[Document] = []
        room, i = self.length, 0
        while i < LOOKAHEAD and room > 1:
            if i == len(self.queue):
                self.queue.append(self._draw())
            index, start = self.queue[i]
            document = self._document(index)
            left = len(document.ids) - start
            if left > room and document.learn is not None:
                i += 1
                continue
            pieces.append(_cut(document, start, start + min(left, room)))
            if left > room:
                self.queue[i] = (index, start + room)
            else:
                self._loaded.pop(self.queue.pop(i)[0])
            room -= min(left, room)
        return pieces

    def _draw(self) -> Piece:
        """The next document that can be placed at all."""
        for index in range(self.cursor, self.cursor + PATIENCE):
            document = self.source.document(index)
            if document is None or len(document.ids) < 2:
                continue
            if document.learn is None or len(document.ids) <= self.length:
                self.cursor = index + 1
                self._loaded[index] = document
                return index, 0
            self.skipped += 1
        raise ValueError(f"{PATIENCE} documents in a row do not fit a row of {self.length} tokens")

    def _document(self, index: int) -> Document:
        if index not in self._loaded:  # after a resume, the queue is known only by its indices
            document = self.source.document(index)
            assert document is not None
            self._loaded[index] = document
        return self._loaded[index]


def _cut(document: Document, start: int, stop: int) -> Document:
    learn = None if document.learn is None else document.learn[start:stop]
    return Document(document.ids[start:stop], learn)


def _tensors(pieces: list[Document], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """One row: ids, document numbers, and whether the token that follows is to be learnt."""
    ids = torch.zeros(length, dtype=torch.long)
    document = torch.full((length,), PADDING)
    learn = torch.zeros(length, dtype=torch.bool)
    start = 0
    for number, piece in enumerate(pieces):
        stop = start + len(piece.ids)
        ids[start:stop] = torch.tensor(piece.ids)
        document[start:stop] = number
        # Position t predicts token t + 1, so the mask moves one to the left with the labels.
        following = [True] * (len(piece.ids) - 1) if piece.learn is None else piece.learn[1:]
        learn[start : stop - 1] = torch.tensor(following, dtype=torch.bool)
        start = stop
    return ids, document, learn
