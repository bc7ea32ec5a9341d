"""Packed rows: every token once, documents apart, masks with their labels, whoever makes them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.data.chat import Document
from retort.data.decontamination import Match
from retort.data.faults import Fault
from retort.data.packing import LOOKAHEAD, Batch, Dropped, Rows, check
from retort.data.rows import Row, shuffled

WIDTH = 1000  # a token's id is document * WIDTH + position: it says where it comes from
FAULT, MATCH = 0, 1  # lengths that stand for rows without a document


@dataclass(frozen=True)
class Numbers:
    """Rows whose place is their index: without end, or a few of them shuffled in each pass."""

    rows: int | None = None
    run: int = 1

    def read(self, indices: range) -> list[Row]:
        if self.rows is None:
            return [Row(str(index), "") for index in indices]
        return [Row(str(shuffled(self.rows, 0, index)), "") for index in indices]


@dataclass(frozen=True)
class Fake:
    """Documents of some lengths, in turn for each of the lanes; negative are conversations."""

    lengths: tuple[int, ...]
    sources: Mapping[str, Any] = field(default_factory=lambda: {"fake": Numbers()})
    shares: Mapping[str, float] = field(default_factory=lambda: {"fake": 1.0})
    lanes: int = 1

    def length_of(self, index: int) -> int:
        return self.lengths[index // self.lanes % len(self.lengths)]

    def document(self, row: Row) -> Document | Fault | Match:
        index = int(row.place)
        length = self.length_of(index)
        if length == FAULT:
            return Fault("bad")
        if length == MATCH:
            return Match("p1", "question", f"words of {index}")
        ids = [index * WIDTH + position for position in range(abs(length))]
        return Document(ids, None if length > 0 else [p % 3 == 2 for p in range(-length)])


def packed(lengths: tuple[int, ...], length: int = 16) -> Rows:
    return Rows(Fake(lengths), 1, length, range(1))


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


kinds = st.integers(-14, -2) | st.integers(2, 40) | st.sampled_from([FAULT, MATCH])
lengths_of_some = (
    st.lists(kinds, min_size=1, max_size=8)
    .filter(lambda lengths: any(abs(length) > 1 for length in lengths))
    .map(tuple)
)


# ---------------------------------------------------------------- one row


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of_some, length=st.integers(14, 24), count=st.integers(1, 3))
def test_every_token_comes_once_and_in_order(
    lengths: tuple[int, ...], length: int, count: int
) -> None:
    """A lane has the documents of its own number, and has placed all that do not wait."""
    data = Fake(lengths, lanes=count)
    rows = Rows(data, count, length, range(count))
    next_start: dict[int, int] = {}
    for _ in range(6):
        batch = rows.batch()
        for j in range(count):
            for piece in placed(Batch(*(column[j : j + 1] for column in batch[:3]))):
                assert piece.document % count == j
                assert piece.start == next_start.get(piece.document, 0)
                next_start[piece.document] = piece.stop
                whole = data.length_of(piece.document)
                if whole < 0:  # conversations are
                    assert (piece.start, piece.stop) == (0, -whole)
    for lane in rows.lanes:
        waiting = {piece.number: piece.start for piece in lane.queue}
        assert len(waiting) == len(lane.queue) <= LOOKAHEAD
        for number in range(lane.cursors["fake"]):
            index = number * count + lane.number
            document = data.document(Row(str(index), ""))
            whole = len(document.ids) if isinstance(document, Document) else 0
            assert next_start.get(index, 0) == waiting.get(number, whole)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of_some, length=st.integers(14, 24))
def test_masks_are_shifted_with_the_labels(lengths: tuple[int, ...], length: int) -> None:
    """Position t learns token t + 1: where that is of the same piece, and is to be learnt."""
    rows = packed(lengths, length)
    for _ in range(4):
        for ids, numbers, learn in zip(*rows.batch()[:3], strict=True):
            for t in range(length):
                if t + 1 == length or numbers[t] < 0 or numbers[t] != numbers[t + 1]:
                    assert not learn[t]
                    continue
                document = Fake(lengths).document(Row(str(int(ids[t]) // WIDTH), ""))
                assert isinstance(document, Document)
                position = int(ids[t]) % WIDTH + 1
                assert bool(learn[t]) == (document.learn is None or document.learn[position])


def test_short_documents_fill_the_gaps() -> None:
    """What does not fit is overtaken by what does, and comes first in the next row."""
    rows = packed((-10, -10, -4, -4))
    found = [(p.document, p.stop) for _ in range(2) for p in placed(rows.batch())]
    assert found == [(0, 10), (2, 4), (1, 10), (3, 4)]


def test_a_single_token_of_room_is_padding() -> None:
    """A piece of one token would teach nothing."""
    rows = packed((15, 20))
    batch = rows.batch()
    assert batch.document_BT[0].tolist() == [0] * 15 + [-1]
    assert placed(rows.batch()) == [Placed(1, 0, 16)]


def test_trimmed_batches_end_with_their_longest_row() -> None:
    document_BT = torch.tensor([[0, 0, 1, -1, -1, -1], [0, 0, 0, 0, -1, -1]])
    ids_BT, learn_BT = torch.arange(12).view(2, 6), torch.rand(2, 6) > 0.5
    batch = Batch(ids_BT, document_BT, learn_BT, (torch.randn(2, 6, 3),))
    found = batch.trimmed()
    for ours, whole in zip((*found[:3], *found.taught), (*batch[:3], *batch.taught), strict=True):
        assert torch.equal(ours, whole[:, :4])
        assert ours.is_contiguous()
    assert torch.equal(found.trimmed().ids_BT, found.ids_BT)


def test_a_batch_of_nothing_but_padding_keeps_a_token() -> None:
    nothing_BT = torch.zeros(2, 5, dtype=torch.long)
    batch = Batch(nothing_BT, torch.full((2, 5), -1), nothing_BT > 0)
    assert batch.trimmed().ids_BT.shape == (2, 1)


def test_what_is_of_no_use_is_counted_by_reason() -> None:
    rows = packed((-17, -16, FAULT, MATCH, -20))
    for i in range(3):
        assert placed(rows.batch()) == [Placed(1 + 5 * i, 0, 16)]
    read = rows.lanes[0].cursors["fake"]
    wanted = {"too long": (0, 4), "bad": (2,), "repeats an evaluation problem": (3,)}
    assert rows.skipped == {
        reason: sum(index % 5 in remainders for index in range(read))
        for reason, remainders in wanted.items()
    }
    assert rows.tokens == {"fake": 48}


def test_repeated_problems_are_told_once() -> None:
    rows = packed((MATCH, -16))
    rows.batch()
    before = rows.dropped()
    assert before[0] == Dropped("fake", "0", "p1", "question", "words of 0")
    assert rows.dropped() == []
    for _ in range(LOOKAHEAD):
        rows.batch()
    places = [each.place for each in before + rows.dropped()]
    assert places == [str(index) for index in range(0, 2 * len(places), 2)]


@pytest.mark.parametrize(
    ("lengths", "reason"),
    [
        ((-17,), "0: too long"),
        ((FAULT,), "0: bad"),
        ((MATCH,), "0: repeats an evaluation problem"),
        ((-17, FAULT), "0: too long; 1: bad"),
    ],
)
def test_nothing_of_use_is_a_mistake(lengths: tuple[int, ...], reason: str) -> None:
    message = rf"fake: %s rows .* of no use to training rows of 16 tokens \({reason}"
    with pytest.raises(ValueError, match=message % 100000):
        packed(lengths).batch()
    with pytest.raises(ValueError, match=message % 1000):
        check(Fake(lengths), 16)


def test_a_long_stretch_of_no_use_is_passed_over() -> None:
    """As a file has that is sorted by length, at its beginning perhaps."""

    class Sorted:
        rows, run = 4096, 1024

        def read(self, indices: range) -> list[Row]:
            return [Row(str(index % self.rows), "") for index in indices]

    data = Fake((*[-17] * 2048, *[-5] * 2048), {"fake": Sorted()})
    check(data, 16)
    rows = Rows(data, 1, 16, range(1))
    for _ in range(1000):
        rows.batch()
    (lane,) = rows.lanes
    assert lane.cursors["fake"] > 4096 + 2048, "the second pass, beyond its stretch"
    assert lane.skipped["too long"] == 2 * 2048


def test_every_source_is_checked_beforehand() -> None:
    class Second(Fake):
        def document(self, row: Row) -> Document | Fault | Match:
            return Fault("bad") if row.place == "second" else super().document(row)

    class Bad:
        rows, run = 1, 1

        def read(self, indices: range) -> list[Row]:
            return [Row("second", "")] * len(indices)

    sources = {"good": Numbers(), "worse": Bad()}
    check(Second((9,)), 16)
    with pytest.raises(ValueError, match="worse: 1000 rows"):
        check(Second((9,), sources, {"good": 0.99, "worse": 0.01}), 16)


def test_micro_batches_are_the_batch() -> None:
    batch = Rows(Fake((9, -5, 23)), 5, 16, range(5)).batch()
    parts = list(batch.split(2))
    assert [len(part.ids_BT) for part in parts] == [2, 2, 1]
    columns = zip(*(part[:3] for part in parts), strict=True)
    for column, whole in zip(columns, batch[:3], strict=True):
        assert torch.equal(torch.cat(column), whole)


# ---------------------------------------------------------------- many processes, and resuming

mixtures = st.builds(
    lambda lengths, sizes, weights: Fake(
        (7, *lengths),
        {str(i): Numbers(*size) for i, size in enumerate(sizes)},
        {str(i): weight / sum(weights) for i, weight in enumerate(weights)},
        lanes=4,
    ),
    lengths_of_some,
    st.tuples(*[st.sampled_from([(None, 1), (1, 8), (3, 8), (50, 1), (50, 4), (50, 64)])] * 3),
    st.tuples(*[st.floats(0.05, 1)] * 3),
)


processes = st.sampled_from([1, 2, 4])


def splits(rows: int, processes: int) -> list[range]:
    each = rows // processes
    return [range(p * each, (p + 1) * each) for p in range(processes)]


def opened(data: Fake, processes: int, state: dict[str, Any] | None = None) -> list[Rows]:
    return [Rows(data, 4, 16, mine, state) for mine in splits(4, processes)]


def joined(parts: list[Rows]) -> Batch:
    columns = zip(*(part.batch()[:3] for part in parts), strict=True)
    return Batch(*(torch.cat(column) for column in columns))


def merged(parts: list[Rows]) -> dict[str, Any]:
    """The states of all processes as one, as they come back from a file."""
    rows = {row: state for part in parts for row, state in part.state()["rows"].items()}
    return json.loads(json.dumps({"rows": rows}))


def assert_same(ours: Batch, theirs: Batch) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))


@settings(max_examples=30, deadline=None)
@given(data=mixtures)
def test_batches_do_not_depend_on_the_number_of_processes(data: Fake) -> None:
    one, two, four = opened(data, 1), opened(data, 2), opened(data, 4)
    for _ in range(5):
        whole = joined(one)
        assert_same(joined(two), whole)
        assert_same(joined(four), whole)
    assert merged(one) == merged(two) == merged(four)


@settings(max_examples=40, deadline=None)
@given(data=mixtures, done=st.integers(0, 5), before=processes, after=processes)
def test_resumed_packing_goes_on_alike(data: Fake, done: int, before: int, after: int) -> None:
    """From the state alone, on as many processes as before or on another number."""
    first = opened(data, before)
    for _ in range(done):
        joined(first)
    again = opened(data, after, merged(first))
    for _ in range(3):
        assert_same(joined(first), joined(again))
    assert merged(first) == merged(again)


def test_counters_are_resumed() -> None:
    first = packed((-17, 9, FAULT))
    for _ in range(4):
        first.batch()
    again = Rows(Fake((-17, 9, FAULT)), 1, 16, range(1), merged([first]))
    assert (again.tokens, again.skipped) == (first.tokens, first.skipped)
    assert first.tokens["fake"] > 0
    assert first.skipped["bad"] > 0


def test_other_data_cannot_be_continued() -> None:
    state = merged(opened(Fake((9,), {"fake": Numbers(50)}), 1))
    with pytest.raises(ValueError, match=r"data has changed: .*'fake': 51.* were .*'fake': 50"):
        opened(Fake((9,), {"fake": Numbers(51)}), 1, state)
    with pytest.raises(ValueError, match="data has changed"):
        Rows(Fake((9,), {"fake": Numbers(50)}), 5, 16, range(5), state)


@pytest.mark.parametrize("run", [1, 5, 1000])
def test_lanes_share_a_pass_between_them(run: int) -> None:
    """However many neighbours a lane takes at a time, no row comes twice before it must."""
    data = Fake((16,), {"fake": Numbers(40, run)})
    rows = Rows(data, 4, 16, range(4))
    documents = [piece.document for _ in range(10) for piece in placed(rows.batch())]
    assert sorted(documents) == list(range(40))


@settings(max_examples=25, deadline=None)
@given(data=mixtures)
def test_no_source_exceeds_its_share_by_more_than_a_document(data: Fake) -> None:
    (rows,) = opened(data, 1)
    for _ in range(15):
        rows.batch()
    longest = max(map(abs, data.lengths))
    for lane in rows.lanes:
        total = sum(lane.drawn.values())
        for name, share in data.shares.items():
            assert lane.drawn[name] - share * total <= longest
            waiting = lane.drawn[name] - lane.placed[name]
            assert 0 <= waiting <= LOOKAHEAD * longest


def test_shares_are_of_tokens_not_of_documents() -> None:
    """One source's documents are ten times as long as the other's."""

    class Uneven(Fake):
        def document(self, row: Row) -> Document:
            return Document(list(range(20 if row.content == "long" else 2)))

    @dataclass(frozen=True)
    class Named:
        content: str
        rows: None = None
        run: int = 1

        def read(self, indices: range) -> list[Row]:
            return [Row("", self.content)] * len(indices)

    sources = {"long": Named("long"), "short": Named("short")}
    rows = Rows(Uneven((), sources, {"long": 0.3, "short": 0.7}), 1, 100, range(1))
    for _ in range(40):
        rows.batch()
    share = rows.tokens["long"] / sum(rows.tokens.values())
    assert abs(share - 0.3) < 0.01
