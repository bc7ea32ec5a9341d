"""Packed rows: every token once, documents apart, masks with their labels, and exact resumption."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from retort.data import arithmetic
from retort.data.chat import Document, ask, train_tokenizer, worked_document
from retort.data.text import LOOKAHEAD, Batch, Packer, open_source, shuffled
from retort.recipe import Arithmetic, Jsonl, Text, Worked

WIDTH = 1000  # a token's id is document * WIDTH + position: it says where it comes from


@dataclass(frozen=True)
class Fake:
    """Documents of given lengths, over and over; negative ones are chats, 0 is passed over."""

    lengths: tuple[int, ...]

    def document(self, index: int) -> Document | None:
        length = self.lengths[index % len(self.lengths)]
        if length == 0:
            return None
        ids = [index * WIDTH + position for position in range(abs(length))]
        if length > 0:
            return Document(ids)
        return Document(ids, [position % 3 == 2 for position in range(-length)])

    def texts(self) -> Iterator[str]:
        raise NotImplementedError


@dataclass(frozen=True)
class Placed:
    """A run of a document's tokens in a row."""

    document: int
    start: int
    stop: int


def placed(batch: Batch) -> list[Placed]:
    """The pieces of a batch in their order; checks that a piece is one run of one document."""
    pieces = []
    for ids, numbers in zip(batch.ids_BT, batch.document_BT, strict=True):
        kept = int((numbers >= 0).sum())
        assert (numbers[:kept] >= 0).all()  # padding is at the end only
        assert (numbers[kept:] == -1).all()
        for number in range(int(numbers.max()) + 1):
            piece = ids[numbers == number].tolist()
            assert piece == list(range(piece[0], piece[0] + len(piece)))
            assert numbers[:kept].diff().ge(0).all()
            document, start = divmod(piece[0], WIDTH)
            pieces.append(Placed(document, start, start + len(piece)))
    return pieces


kinds = st.integers(-14, -2) | st.integers(2, 40) | st.just(0)
mixtures = st.lists(kinds, min_size=1, max_size=8).filter(any).map(tuple)


@settings(max_examples=60, deadline=None)
@given(lengths=mixtures, length=st.integers(14, 24), rows=st.integers(1, 3))
def test_every_token_comes_once_and_in_order(
    lengths: tuple[int, ...], length: int, rows: int
) -> None:
    source = Fake(lengths)
    packer = Packer(source, length)
    next_start: dict[int, int] = {}
    for _ in range(6):
        for piece in placed(packer.batch(rows)):
            assert piece.start == next_start.get(piece.document, 0)
            next_start[piece.document] = piece.stop
            if lengths[piece.document % len(lengths)] < 0:  # conversations are whole
                assert (piece.start, piece.stop) == (0, -lengths[piece.document % len(lengths)])
    waiting = dict(packer.queue)
    assert len(waiting) == len(packer.queue) <= LOOKAHEAD
    for index in range(packer.cursor):
        document = source.document(index)
        whole = 0 if document is None else len(document.ids)
        assert next_start.get(index, 0) == waiting.get(index, whole)


@settings(max_examples=60, deadline=None)
@given(lengths=mixtures, length=st.integers(14, 24))
def test_masks_are_shifted_with_the_labels(lengths: tuple[int, ...], length: int) -> None:
    """Position t learns token t + 1: where that is of the same piece, and is to be learnt."""
    source = Fake(lengths)
    batch = Packer(source, length).batch(4)
    for ids, numbers, learn in zip(*batch, strict=True):
        for t in range(length):
            if t + 1 == length or numbers[t] < 0 or numbers[t] != numbers[t + 1]:
                assert not learn[t]
                continue
            document = source.document(int(ids[t]) // WIDTH)
            assert document is not None
            position = int(ids[t]) % WIDTH + 1
            assert bool(learn[t]) == (document.learn is None or document.learn[position])


@settings(max_examples=40, deadline=None)
@given(lengths=mixtures, done=st.integers(0, 4), long=st.booleans())
def test_resumed_packing_goes_on_alike(lengths: tuple[int, ...], done: int, long: bool) -> None:
    """From the cursor, the queue and the count alone, as they come back from JSON."""
    source = Fake((*lengths, -30) if long else lengths)  # -30: longer than a row, skipped
    first = Packer(source, 16)
    for _ in range(done):
        first.batch(2)
    cursor, queue, skipped = json.loads(json.dumps([first.cursor, first.queue, first.skipped]))
    again = Packer(source, 16, cursor, [(index, start) for index, start in queue], skipped)
    for _ in range(3):
        for ours, theirs in zip(first.batch(2), again.batch(2), strict=True):
            assert torch.equal(ours, theirs)
    assert (first.cursor, first.queue, first.skipped) == (again.cursor, again.queue, again.skipped)


def test_short_documents_fill_the_gaps() -> None:
    """What does not fit is overtaken by what does, and comes first in the next row."""
    batch = Packer(Fake((-10, -10, -4, -4)), 16).batch(2)
    assert [(p.document, p.stop) for p in placed(batch)] == [(0, 10), (2, 4), (1, 10), (3, 4)]


def test_a_single_token_of_room_is_padding() -> None:
    """A piece of one token would teach nothing."""
    batch = Packer(Fake((15, 20)), 16).batch(2)
    assert batch.document_BT[0].tolist() == [0] * 15 + [-1]
    assert [(p.document, p.start, p.stop) for p in placed(batch)] == [(0, 0, 15), (1, 0, 16)]


def test_too_long_conversations_are_skipped_and_counted() -> None:
    packer = Packer(Fake((-17, -16, -20)), 16)
    batch = packer.batch(3)
    assert [piece.document for piece in placed(batch)] == [1, 4, 7]
    assert packer.skipped >= 5
    assert packer.skipped == sum(index % 3 != 1 for index in range(packer.cursor))


@pytest.mark.parametrize("lengths", [(-17,), (0,), (1,), (-17, 0, 1)])
def test_nothing_that_fits_is_a_mistake(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="documents in a row do not fit a row of 16 tokens"):
        Packer(Fake(lengths), 16).batch(1)


def test_micro_batches_are_the_batch() -> None:
    batch = Packer(Fake((9, -5, 23)), 16).batch(5)
    parts = list(batch.split(2))
    assert [len(part.ids_BT) for part in parts] == [2, 2, 1]
    for column, whole in zip(zip(*parts, strict=True), batch, strict=True):
        assert torch.equal(torch.cat(column), whole)


# ---------------------------------------------------------------- sources


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["Ada has 12 apples and Ben 30: that is 42."], 300)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 12), seed=st.integers(0, 5))
def test_every_pass_is_a_permutation(count: int, seed: int) -> None:
    passes = [[shuffled(count, seed, p * count + i) for i in range(count)] for p in range(3)]
    assert all(sorted(order) == list(range(count)) for order in passes)
    assert passes[0] == [shuffled(count, seed, i) for i in range(count)]  # whatever came between


def test_passes_and_seeds_differ() -> None:
    orders = {
        tuple(shuffled(20, seed, p * 20 + i) for i in range(20)) for seed in (0, 1) for p in (0, 1)
    }
    assert len(orders) == 4


def test_text_ends_and_comes_once_in_each_pass(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [f"{word} text." for word in ("one", "another", "the third")]
    path = jsonl(tmp_path / "a.jsonl", [{"body": text, "text": "no"} for text in texts])
    source = open_source(Text(kind="text", path=path, column="body"), tokenizer, seed=0)
    assert list(source.texts()) == texts
    for start in (0, 3):
        documents = [source.document(index) for index in range(start, start + 3)]
        assert {decoded(tokenizer, d) for d in documents} == {f"{text}<|end|>" for text in texts}
        assert all(document is not None and document.learn is None for document in documents)


def decoded(tokenizer: PreTrainedTokenizerFast, document: Document | None) -> str:
    assert document is not None
    text = tokenizer.decode(document.ids)
    assert isinstance(text, str)
    return text


def test_arithmetic_source_has_the_examples_of_its_split(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    spec = Arithmetic(kind="arithmetic", split="train", seed=3, difficulty=(1, 2))
    data = Worked(kind="worked", problems=spec, prompt="Q: {question}")
    source = open_source(data, tokenizer, seed=99)  # the problems have a seed of their own
    documents = [d for d in map(source.document, range(60)) if d is not None]
    wanted = list(islice(arithmetic.examples("train", 3, (1, 2)), len(documents)))
    assert 40 < len(documents) < 60
    assert documents == [
        worked_document(tokenizer, ask(data.prompt, e.question), e.solution) for e in wanted
    ]
    first, second = islice(source.texts(), 2)
    assert (first, second) == (f"Q: {wanted[0].question}", wanted[0].solution)


def test_worked_problems_from_a_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"question": f"{i}?", "answer": i, "why": f"It is {i}."} for i in range(4)]
    spec = Jsonl(kind="jsonl", path=jsonl(tmp_path / "a.jsonl", rows), solution="why")
    data = Worked(kind="worked", problems=spec, prompt="{question}")
    source = open_source(data, tokenizer, seed=0)
    texts = {decoded(tokenizer, source.document(index)) for index in range(4)}
    assert texts == {f"<|user|>{i}?<|end|><|assistant|>It is {i}.<|end|>" for i in range(4)}
    assert list(islice(source.texts(), 2)) == ["0?", "It is 0."]


def test_problems_without_a_solution_cannot_be_learnt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"id": f"p{i}", "question": "?", "answer": 1} for i in range(3)]
    spec = Jsonl(kind="jsonl", path=jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(ValueError, match=r"3 have none \(first: p0\); name its key with solution="):
        open_source(Worked(kind="worked", problems=spec), tokenizer, seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file of texts"),
        (b"", "no texts in it"),
        (b"\n\n", "no texts in it"),
        (b'{"text": "a"}\n{', ":2: not valid JSON"),
        (b'{"text": "a"}\n\xff', ":2: not valid JSON"),
        (b'{"text": "a"}\n\n[]', ":3: no 'text' in this row"),
        (b'{"text": ""}', ":1: no 'text' in this row"),
        (b'{"body": "a"}', ":1: no 'text' in this row"),
    ],
)
def test_unusable_texts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: bytes | None, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        open_source(Text(kind="text", path=path), tokenizer, seed=0)
