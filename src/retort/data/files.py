"""Files of rows, on this machine or on the hub, as one endless list shuffled anew for each pass.

A pass permutes the blocks of all files, and the rows of each block: any row is found without
reading those before it, and neighbours are read together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.core import url_to_fs
from numpy.typing import NDArray

from retort.data.blocks import Block, File, Record, line_blocks, row_groups, whole_file
from retort.data.faults import Fault
from retort.data.hub import hub_files
from retort.data.rows import Content, Row, permutation
from retort.recipe import Files, Text

ENDINGS = ("parquet", "jsonl", "txt")
THREADS = 16

KEPT = 2
"""Decoded blocks that stay in memory: lanes that keep step read the same ones."""

RUN_ROWS, RUN_BYTES = 1024, 4 << 20
"""Rows that are read together: this many, or as many as have this many bytes."""

Convert = Callable[[dict[str, Any]], Content]


def file_rows(data: Files, columns: Sequence[str], convert: Convert, seed: int) -> FileRows:
    """The rows of a recipe's files, each made of some columns by `convert`.

    Raises ValueError for files that are missing, damaged or empty, or that lack a column.
    """
    if data.path is not None:
        files = local_files(data.path)
    else:
        assert data.hub is not None
        files = _files(hub_files(data.hub, data.subset, data.split or "train"))
    with ThreadPoolExecutor(THREADS) as pool:
        blocks = list(pool.map(lambda file: _blocks(file, data, columns), files))
    rows = FileRows([b for each in blocks for b in each if b.rows], tuple(columns), convert, seed)
    if not rows.rows:
        raise ValueError(f"{data.path or data.hub}: no rows in it")
    return rows


def local_files(path: Path) -> list[File]:
    """A file, the files of a folder, or those that match a pattern, in the order of their names.

    Raises ValueError when there are none, or when one is of another kind.
    """
    if path.is_dir():
        found = [each for each in path.rglob("*") if _is_data(each, path)]
    else:
        found = [Path(each) for each in glob(str(path), recursive=True)]  # absolute
    if not found:
        raise ValueError(
            f"{path}: no such file, folder or pattern of files (.{', .'.join(ENDINGS)})"
        )
    return _files(sorted(map(str, found)))


def _is_data(file: Path, folder: Path) -> bool:
    """Whether a file in a folder is one to read: not a card, a licence, or something hidden."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower()[1:] in ENDINGS and not hidden


def _files(addresses: Iterable[str]) -> list[File]:
    files = [File(*url_to_fs(address)) for address in addresses]
    for file in files:
        if file.kind not in ENDINGS:
            raise ValueError(f"{file.path}: files are to end in .{', .'.join(ENDINGS)}")
    return files


def _blocks(file: File, data: Files, columns: Sequence[str]) -> list[Block]:
    match file.kind:
        case "parquet":
            return row_groups(file, columns)
        case "jsonl":
            return line_blocks(file, columns)
        case _:
            if not isinstance(data, Text):
                raise ValueError(f"{file.path}: a text file has no conversations; use kind: text")
            return [whole_file(file, data.column)]


@dataclass(frozen=True, eq=False)
class FileRows:
    """The rows of blocks as an endless list, of which at most `KEPT` blocks are in memory."""

    blocks: Sequence[Block]
    columns: tuple[str, ...]
    convert: Convert
    seed: int
    _kept: OrderedDict[int, Callable[[int], Record]] = field(default_factory=OrderedDict)

    @cached_property
    def rows(self) -> int:
        """The rows of one pass."""
        return sum(block.rows for block in self.blocks)

    @cached_property
    def run(self) -> int:
        """How many rows one lane reads at a time."""
        size = sum(block.bytes for block in self.blocks) / self.rows
        return max(1, min(RUN_ROWS, int(RUN_BYTES / max(size, 1))))

    def read(self, indices: range) -> list[Row | None]:
        """Rows of an endless series of shuffled passes. Raises ValueError for a damaged file."""
        return [self._row(*divmod(index, self.rows)) for index in indices]

    def _row(self, epoch: int, position: int) -> Row | None:
        order, starts = _pass(self, epoch)
        i = int(np.searchsorted(starts, position, side="right")) - 1
        block = int(order[i])
        rows = permutation(self.blocks[block].rows, self.seed, epoch, block)
        place, values = self._loaded(block)(int(rows[position - starts[i]]))
        if values is None:
            return None
        return Row(place, values if isinstance(values, Fault) else self.convert(values))

    def _loaded(self, block: int) -> Callable[[int], Record]:
        if block not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            self._kept[block] = self.blocks[block].load(self.columns)
        self._kept.move_to_end(block)
        return self._kept[block]


@lru_cache(maxsize=8)
def _pass(source: FileRows, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order of the blocks in a pass, and the position at which each of them starts."""
    order = permutation(len(source.blocks), source.seed, epoch)
    ends = np.cumsum([source.blocks[i].rows for i in order])
    return order, np.concatenate([[0], ends[:-1]])
