"""What a recipe's data opens to: sources with their shares, read as documents of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from transformers import PreTrainedTokenizerBase

from retort.data.chat import Document, conversation_document, text_document
from retort.data.decontamination import Known, Match
from retort.data.faults import TOO_LONG, Fault
from retort.data.problems import Problem
from retort.data.rows import Row, Source
from retort.data.sources import open_source, source_name
from retort.recipe import Data, Mixture, Part

LONGEST = 1_000_000
"""Characters of the longest row that is taken; a longer one would fill hundreds of rows alone."""


@dataclass(frozen=True)
class OpenData:
    """Sources by name, the share of the tokens that each is to have, and how they are read."""

    sources: Mapping[str, Source]
    shares: Mapping[str, float]
    tokenizer: PreTrainedTokenizerBase | None
    known: Known | None = None

    def document(self, row: Row) -> Document | Fault | Match:
        """A row as token ids, why it has none, or the evaluation problem that it repeats.

        Raises ValueError as `conversation_document` does.
        """
        content = row.content
        if isinstance(content, Fault):
            return content
        texts = _texts(row)
        if sum(map(len, texts)) > LONGEST:
            return TOO_LONG
        match = self._match(texts)
        if match is not None:
            return match
        assert self.tokenizer is not None
        if isinstance(content, str):
            return text_document(self.tokenizer, content)
        return conversation_document(self.tokenizer, content)

    def _match(self, texts: list[str]) -> Match | None:
        if self.known is None:
            return None
        return next(filter(None, map(self.known.match, texts)), None)

    def texts(self) -> Iterator[str]:
        """Texts and turns in proportion to the shares, for training a tokenizer; they end with the
        pass of the first source that does.
        """
        sizes = dict.fromkeys(self.sources, 0)
        passes = {name: _one_pass(source) for name, source in self.sources.items()}
        while True:
            name = next_source(self.shares, sizes)
            row = next(passes[name], None)
            if row is None:
                return
            texts = _texts(row)
            sizes[name] += sum(map(len, texts))
            yield from texts


def next_source(shares: Mapping[str, float], sizes: Mapping[str, int]) -> str:
    """The source that is furthest behind its share of what has been taken so far."""
    total = sum(sizes.values())
    return max(shares, key=lambda name: shares[name] * total - sizes[name])


def open_data(
    data: Data,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    against: Sequence[Problem] = (),
) -> OpenData:
    """The documents a recipe's data describes, less those that repeat a problem of `against`.

    A source whose weight is 0 is not even opened. Raises ValueError for unusable files.
    """
    parts = data.parts if isinstance(data, Mixture) else (Part(weight=1, data=data),)
    parts = tuple(part for part in parts if part.weight > 0)
    names = _distinct([source_name(part.data) for part in parts])
    total = sum(part.weight for part in parts)
    return OpenData(
        {name: open_source(part.data, seed) for name, part in zip(names, parts, strict=True)},
        {name: part.weight / total for name, part in zip(names, parts, strict=True)},
        tokenizer,
        Known(against) if against else None,
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """Repeated names with a number behind: the same file may come in twice, as text and as chat."""
    return [
        f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name
        for i, name in enumerate(names)
    ]


def _one_pass(source: Source) -> Iterator[Row]:
    indices = count() if source.rows is None else range(source.rows)
    for index in indices:
        yield from filter(None, source.read(range(index, index + 1)))


def _texts(row: Row) -> list[str]:
    match row.content:
        case Fault():
            return []
        case str(text):
            return [text]
        case turns:
            return [turn.text for turn in turns]
