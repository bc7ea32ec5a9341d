"""Files as blocks of rows that can be read on their own: row groups, lines, whole files.

Only where the blocks are is kept; what is in them is read when it is asked for, so files may be of
any size, on this machine or anywhere that fsspec reaches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from retort.data.faults import NO_OBJECT, NOT_JSON, NOT_TEXT, TOO_LONG, Fault

LINES = 1024
BYTES = 4 << 20
"""A block of lines ends after this many of them, or as soon as it has this many bytes."""

LONGEST_LINE = 16 << 20
"""Bytes; a longer line is not even parsed."""


class Record(NamedTuple):
    """The columns of one row, and where it is; None for a blank line."""

    place: str
    values: dict[str, Any] | Fault | None


class Block(Protocol):
    """Neighbouring rows of a file."""

    @property
    def rows(self) -> int: ...

    @property
    def bytes(self) -> int:
        """What the rows take up, roughly."""
        ...

    def load(self, columns: Sequence[str]) -> Callable[[int], Record]:
        """Reads the block; what comes back finds a row by its position there.

        Raises ValueError naming the file when it is damaged.
        """
        ...


@dataclass(frozen=True)
class File:
    """A file, and the file system that it is in."""

    system: AbstractFileSystem
    path: str

    @property
    def kind(self) -> str:
        """The ending of its name, in lower case and without the dot."""
        return self.path.rpartition(".")[2].lower()


# ---------------------------------------------------------------- parquet


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file."""

    file: File
    number: int
    first: int
    rows: int
    bytes: int

    def load(self, columns: Sequence[str]) -> Callable[[int], Record]:
        """Decodes the columns that are asked for, and no others."""
        with _naming(self.file), self.file.system.open(self.file.path) as opened:
            table = pq.ParquetFile(opened).read_row_group(self.number, columns=list(columns))
        return lambda position: Record(
            f"{self.file.path}:{self.first + position + 1}", _values(table, position)
        )


def row_groups(file: File, columns: Sequence[str]) -> list[Block]:
    """The row groups of a parquet file. Raises ValueError when it is damaged or lacks a column."""
    with _naming(file), file.system.open(file.path) as opened:
        metadata = pq.read_metadata(opened)
    check_columns(file.path, columns, metadata.schema.to_arrow_schema().names)
    groups: list[Block] = []
    first = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        groups.append(RowGroup(file, number, first, group.num_rows, group.total_byte_size))
        first += group.num_rows
    return groups


def check_columns(place: str, wanted: Sequence[str], present: Sequence[str]) -> None:
    """Raises ValueError when a column is missing."""
    for column in wanted:
        if column not in present:
            raise ValueError(f"{place}: no column {column!r}; it has: {', '.join(present)}")


class _naming:
    """Turns what pyarrow says of a damaged file into a ValueError that names it."""

    def __init__(self, file: File) -> None:
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        ours = isinstance(error, pa.ArrowException | EOFError)
        if ours or (isinstance(error, OSError) and error.errno is None):
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self.file.path}: damaged, or no parquet file ({reason})") from error


def _values(table: pa.Table, position: int) -> dict[str, Any] | Fault:
    try:
        return {name: table[name][position].as_py() for name in table.column_names}
    except UnicodeDecodeError:
        return NOT_TEXT


# ---------------------------------------------------------------- lines


@dataclass(frozen=True)
class Lines:
    """Lines of a JSONL file, between two of its bytes; blank ones count."""

    file: File
    offset: int
    first: int
    rows: int
    bytes: int

    def load(self, columns: Sequence[str]) -> Callable[[int], Record]:
        """Reads the lines, and parses one when it is asked for."""
        with self.file.system.open(self.file.path) as opened:
            opened.seek(self.offset)
            lines = opened.read(self.bytes).split(b"\n")
        return lambda position: Record(
            f"{self.file.path}:{self.first + position + 1}", _parsed(lines[position])
        )


def line_blocks(file: File, columns: Sequence[str]) -> list[Block]:
    """The blocks of a JSONL file, found by reading it once.

    Raises ValueError when no object of the first block with one has all the columns.
    """
    with file.system.open(file.path) as opened:
        blocks: list[Block] = list(_blocks_of(file, opened))
    says_something = False
    for block in blocks:
        found = block.load(columns)
        values = [found(i).values for i in range(block.rows)]
        keys = [list(each) for each in values if isinstance(each, dict)]
        if keys:
            best = max(keys, key=lambda present: sum(column in present for column in columns))
            check_columns(file.path, columns, best)
            return blocks
        says_something = says_something or any(each is not None for each in values)
    return blocks if says_something else []


def _blocks_of(file: File, opened: Iterator[bytes]) -> Iterator[Lines]:
    offset = first = rows = size = 0
    for line in opened:
        rows, size = rows + 1, size + len(line)
        if rows == LINES or size >= BYTES:
            yield Lines(file, offset, first, rows, size)
            offset, first, rows, size = offset + size, first + rows, 0, 0
    if rows:
        yield Lines(file, offset, first, rows, size)


def _parsed(line: bytes) -> dict[str, Any] | Fault | None:
    if not line or line.isspace():
        return None
    if len(line) > LONGEST_LINE:
        return TOO_LONG
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError:
        return NOT_TEXT
    except (ValueError, RecursionError):  # JSONDecodeError, or a number of too many digits
        return NOT_JSON
    return values if isinstance(values, dict) else NO_OBJECT


# ---------------------------------------------------------------- whole files


@dataclass(frozen=True)
class WholeFile:
    """A text file, which is one row of one column."""

    file: File
    column: str
    bytes: int
    rows: int = 1

    def load(self, columns: Sequence[str]) -> Callable[[int], Record]:
        """Reads the file."""
        content = self.file.system.cat_file(self.file.path)
        try:
            values: dict[str, Any] | Fault = {self.column: content.decode()}
        except UnicodeDecodeError:
            values = NOT_TEXT
        return lambda position: Record(self.file.path, values)


def whole_file(file: File, column: str) -> Block:
    """The one block of a text file."""
    return WholeFile(file, column, file.system.size(file.path))
