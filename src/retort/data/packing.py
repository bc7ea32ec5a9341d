"""Packed training rows: whole documents side by side, with document ids, exactly resumable.

Row j of every global batch is a lane: it has documents of its own and packs them on its own. So
what is in it does not depend on how many processes there are, and a process reads, tokenizes and
remembers its own lanes alone.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from retort.data.chat import Document
from retort.data.decontamination import Match
from retort.data.faults import EMPTY, REPEATED, TOO_LONG, Fault
from retort.data.mixture import OpenData, next_source
from retort.data.rows import Row

LOOKAHEAD = 32
FIRST_ROWS, FIRST_RUNS = 1000, 8
"""Of a source, among which one has to be of use before training starts; neighbours are alike."""
PATIENCE = 100_000
"""Rows that may be of no use later on: a sorted file has long stretches of the same kind."""
PADDING = -1


class Batch(NamedTuple):
    """Rows of documents. `learn_BT` is true where the token that FOLLOWS is to be learnt.

    `document_BT` numbers the documents of each row and is negative on padding. `taught` are the
    hidden states (BTD) that a teacher has found already, if any.
    """

    ids_BT: Tensor
    document_BT: Tensor
    learn_BT: Tensor
    taught: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return self._of([tensor.to(device, non_blocking=True) for tensor in self._tensors()])

    def split(self, rows: int) -> Iterator[Self]:
        """Micro-batches of at most `rows` rows."""
        for parts in zip(*(tensor.split(rows) for tensor in self._tensors()), strict=True):
            yield self._of(parts)

    def trimmed(self) -> Self:
        """Without the padding that is behind the documents of every row."""
        used_T = (self.document_BT != PADDING).any(0)
        length = max(1, int(used_T.nonzero().max()) + 1 if used_T.any() else 0)
        return self._of([tensor[:, :length].contiguous() for tensor in self._tensors()])

    def _tensors(self) -> tuple[Tensor, ...]:
        return (*self[:3], *self.taught)

    def _of(self, tensors: Sequence[Tensor]) -> Self:
        ids_BT, document_BT, learn_BT, *taught = tensors
        return type(self)(ids_BT, document_BT, learn_BT, tuple(taught))


class Dropped(NamedTuple):
    """A row that repeats an evaluation problem: where it is, and the words they share."""

    source: str
    place: str
    problem_id: str
    kind: str
    text: str


class Rows:
    """The rows of global batches of `rows` rows of `length` tokens that one process makes.

    `mine` are its rows. `state` is what `state()` returned, of this process or of all of them with
    their "rows" merged: each takes its own from it. Raises ValueError where that is not the state
    of this data.
    """

    def __init__(
        self,
        data: OpenData,
        rows: int,
        length: int,
        mine: range,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.lanes = [Lane(data, j, rows, length) for j in mine]
        if state is not None:
            for lane in self.lanes:
                lane.restore(state["rows"])

    def batch(self) -> Batch:
        """This process's rows of the next global batch, in their order.

        Raises ValueError when too many rows of a source, one after another, are of no use.
        """
        packed = [lane.row() for lane in self.lanes]
        ids_BT, document_BT, learn_BT = (torch.stack(each) for each in zip(*packed, strict=True))
        return Batch(ids_BT, document_BT, learn_BT)

    def state(self) -> dict[str, Any]:
        """All there is to resume from, as plain JSON, for each row of this process."""
        return {"rows": {str(lane.number): lane.state() for lane in self.lanes}}

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens in this process's rows so far, by source."""
        return dict(sum((lane.placed for lane in self.lanes), Counter()))

    @property
    def skipped(self) -> dict[str, int]:
        """Rows of the sources that were of no use so far, by reason."""
        return dict(sum((lane.skipped for lane in self.lanes), Counter()))

    def dropped(self) -> list[Dropped]:
        """The rows that repeat an evaluation problem, of those met since the last call."""
        found = [each for lane in self.lanes for each in lane.dropped]
        for lane in self.lanes:
            lane.dropped.clear()
        return found


def check(data: OpenData, length: int) -> None:
    """Reads one document of every source, so that unusable ones are found before any work starts.

    Raises ValueError when the first rows of a source are of no use.
    """
    for source in data.sources:
        lane = Lane(data, 0, 1, length)
        lane.draw(source, max(FIRST_ROWS, FIRST_RUNS * lane.run(source)))


class Piece(NamedTuple):
    """A source, the number that a document of it has in its lane, and the first token to take."""

    source: str
    number: int
    start: int


@dataclass
class Lane:
    """Fills one row of every batch with documents in their order, looking ahead for what fits.

    Text is cut where a row ends and goes on in the next; a conversation is kept whole, and one that
    is longer than a row is skipped and counted.
    """

    data: OpenData
    number: int
    lanes: int
    length: int
    queue: list[Piece] = field(default_factory=list)
    drawn: Counter[str] = field(default_factory=Counter)  # tokens of the documents so far
    placed: Counter[str] = field(default_factory=Counter)  # those of them that are in rows
    cursors: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    dropped: list[Dropped] = field(default_factory=list)
    _runs: dict[str, tuple[int, Sequence[Row | None]]] = field(default_factory=dict)
    _loaded: dict[tuple[str, int], Document] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Where the lane is, as plain JSON."""
        return {
            "of": self._sizes(),
            "queue": [list(piece) for piece in self.queue],
            "drawn": dict(self.drawn),
            "placed": dict(self.placed),
            "cursors": dict(self.cursors),
            "skipped": dict(self.skipped),
        }

    def restore(self, states: Mapping[str, Any]) -> None:
        """Goes to where the lane was. Raises ValueError when that was among other data."""
        state = states.get(str(self.number))
        if state is None or state["of"] != self._sizes():
            was = None if state is None else state["of"]
            raise ValueError(
                f"the training data has changed: the rows of its sources are {self._sizes()}, and "
                f"were {was} when the run was stopped; bring the files back, or add force=true to "
                "start over (docs/data.md#stopping-and-going-on)"
            )
        self.queue = [Piece(*piece) for piece in state["queue"]]
        self.drawn, self.placed = Counter(state["drawn"]), Counter(state["placed"])
        self.cursors, self.skipped = Counter(state["cursors"]), Counter(state["skipped"])

    def row(self) -> tuple[Tensor, Tensor, Tensor]:
        """The lane's next row: ids, document numbers, and what is to be learnt."""
        pieces: list[Document] = []
        room, i = self.length, 0
        while i < LOOKAHEAD and room > 1:
            if i == len(self.queue):
                shares = self.data.shares
                turn = next_source(shares, {name: self.drawn[name] for name in shares})
                self.queue.append(self.draw(turn))
            piece = self.queue[i]
            document = self._document(piece)
            left = len(document.ids) - piece.start
            if left > room and document.learn is not None:
                i += 1
                continue
            taken = min(left, room)
            pieces.append(_cut(document, piece.start, piece.start + taken))
            if left > room:
                self.queue[i] = piece._replace(start=piece.start + room)
            else:
                del self.queue[i], self._loaded[piece.source, piece.number]
            self.placed[piece.source] += taken
            room -= taken
        return _tensors(pieces, self.length)

    def draw(self, source: str, patience: int = PATIENCE) -> Piece:
        """The next document of a source that can be placed at all.

        Raises ValueError when there is none among its next rows, so many as there is patience for.
        """
        faults: list[str] = []
        for number in range(self.cursors[source], self.cursors[source] + patience):
            row = self._row(source, number)
            if row is None:
                continue
            document = self._read(row)
            if isinstance(document, Document):
                self.cursors[source] = number + 1
                self.drawn[source] += len(document.ids)
                self._loaded[source, number] = document
                return Piece(source, number, 0)
            if isinstance(document, Match):
                self.dropped.append(Dropped(source, row.place, *document))
                document = REPEATED
            self.skipped[document.reason] += 1
            if len(faults) < 2:
                faults.append(f"{row.place}: {document.reason}")
        raise ValueError(
            f"{source}: {patience} rows one after another are of no use to training rows of "
            f"{self.length} tokens ({'; '.join(faults) or 'none is of the split'})"
        )

    def run(self, source: str) -> int:
        """Neighbours that a lane reads at a time."""
        opened = self.data.sources[source]
        return 1 if opened.rows is None else max(1, min(opened.run, opened.rows // self.lanes))

    def _row(self, source: str, number: int) -> Row | None:
        """The lane's `number`-th row of a source: lanes take turns with runs of neighbours."""
        opened, run = self.data.sources[source], self.run(source)
        turn, position = divmod(number, run)
        if source not in self._runs or self._runs[source][0] != turn:
            start = (turn * self.lanes + self.number) * run
            self._runs[source] = turn, opened.read(range(start, start + run))
        return self._runs[source][1][position]

    def _read(self, row: Row) -> Document | Fault | Match:
        document = self.data.document(row)
        if not isinstance(document, Document):
            return document
        if len(document.ids) < 2:
            return EMPTY
        whole = document.learn is not None
        return TOO_LONG if whole and len(document.ids) > self.length else document

    def _document(self, piece: Piece) -> Document:
        key = piece.source, piece.number
        if key not in self._loaded:  # after a resume, the queue is known only by its numbers
            row = self._row(*key)
            assert row is not None
            document = self._read(row)
            assert isinstance(document, Document)
            self._loaded[key] = document
        return self._loaded[key]

    def _sizes(self) -> dict[str, int | None]:
        return {name: source.rows for name, source in self.data.sources.items()}


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
