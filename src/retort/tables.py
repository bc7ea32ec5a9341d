"""Tables on disk: a folder of parquet parts that share one schema, written one part at a time."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def _schema(fields: dict[str, pa.DataType], nullable: tuple[str, ...] = ()) -> pa.Schema:
    return pa.schema([pa.field(name, kind, name in nullable) for name, kind in fields.items()])


PROBLEMS = _schema({"problem_id": pa.string(), "question": pa.string(), "answer": pa.string()})

# finish_reason is "stop" or "length"; logprob is the sum over the completion's tokens; started and
# ended are unix seconds; batch numbers the engine call that made the completion.
COMPLETIONS = _schema(
    {
        "problem_id": pa.string(),
        "sample_idx": pa.int32(),
        "seed": pa.int64(),
        "text": pa.string(),
        "token_count": pa.int32(),
        "finish_reason": pa.string(),
        "prompt_tokens": pa.int32(),
        "logprob": pa.float64(),
        "batch": pa.int32(),
        "started": pa.float64(),
        "ended": pa.float64(),
    }
)

# What an engine did for a part of completions; look is the number of steps between two looks at
# what has finished; share_from the tokens, of all rows of a prompt, from which on they read it
# together, null where they never do; start_seconds the part of the decode seconds in which
# completions were started.
TIMING = _schema(
    {
        "slots": pa.int32(),
        "look": pa.int32(),
        "share_from": pa.int32(),
        "prefill_tokens": pa.int64(),
        "prefill_seconds": pa.float64(),
        "decode_tokens": pa.int64(),
        "decode_steps": pa.int64(),
        "decode_seconds": pa.float64(),
        "starts": pa.int64(),
        "start_seconds": pa.float64(),
        "verifications": pa.int64(),
        "accepted": pa.int64(),
        "started": pa.float64(),
    },
    nullable=("share_from",),
)

# Decode steps of so many rows; context counts the tokens that all these steps read, those of a
# prompt that rows share once.
STEPS = _schema(
    {
        "rows": pa.int32(),
        "steps": pa.int64(),
        "context": pa.int64(),
        "seconds": pa.float64(),
    }
)

# How many completions a reward model judged in how many seconds.
SCORING = _schema({"completions": pa.int64(), "seconds": pa.float64()})

# answer is what was found in the text; group is the key it votes under, null when it does not vote;
# method says how the verdict was reached.
VERDICTS = _schema(
    {
        "problem_id": pa.string(),
        "sample_idx": pa.int32(),
        "answer": pa.string(),
        "group": pa.string(),
        "correct": pa.bool_(),
        "method": pa.string(),
    },
    nullable=("answer", "group"),
)

# Keys that are equal answers have one group; of verdicts without this table each key is a group.
VOTES = _schema({"problem_id": pa.string(), "key": pa.string(), "group": pa.string()})

# scores has one number for each step that a process model judged, one in all of an outcome model,
# and none for a completion that could not be judged: such a one never votes.
SCORES = _schema(
    {
        "problem_id": pa.string(),
        "sample_idx": pa.int32(),
        "scores": pa.list_(pa.float64()),
    }
)


class DamagedPart(ValueError):
    """A part that cannot be read: torn, cut short, or with pages that fail their checksum."""


@dataclass(frozen=True)
class Table:
    """A folder of parquet parts that share one schema."""

    folder: Path
    schema: pa.Schema

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows as one new part, atomically; the caller holds `Run.lock`.

        Raises ValueError when a row's keys are not the schema's columns or a value does not fit.
        """
        if rows:
            self._write(self._next_part(), rows)

    def replace(self, rows: list[dict[str, Any]]) -> None:
        """Make the rows, none included, the whole table, atomically; for one that is never appended
        to. Raises as `append` does."""
        self._write(self.folder / "part-000000.parquet", rows)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All rows, in the order they were appended; an empty table when there are none.

        Raises DamagedPart naming the file, KeyError for an unknown column.
        """
        return pa.concat_tables([self._columns(columns).empty_table(), *self.parts(columns)])

    def parts(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The same rows one part at a time, for work that should not hold all of them in memory."""
        schema = self._columns(columns)
        return (_read_part(path, schema) for path in self.part_files())

    def keys(self) -> set[tuple[str, int]]:
        """The (problem_id, sample_idx) pairs that are present."""
        return {key for part in self.parts(["problem_id", "sample_idx"]) for key in row_keys(part)}

    def rows(self) -> int:
        """How many there are, from the parts' footers alone. Raises DamagedPart."""
        return sum(_footer(path).num_rows for path in self.part_files())

    def set_aside_damaged(self) -> list[Path]:
        """Renames the parts that cannot be read to `*.damaged`, so that whoever makes their rows
        finds them missing; returns the new paths. Every page is read; the caller holds `Run.lock`.
        """
        moved = []
        for path in self.part_files():
            try:
                with _opened(path) as part:  # whatever its columns: an older one may have fewer
                    part.read(use_threads=False)
            except DamagedPart:
                moved.append(path.replace(path.with_suffix(".damaged")))
        return moved

    def part_files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    @property
    def next_number(self) -> int:
        """The number that the next part gets; those of lost parts may come again."""
        taken = [int(path.stem.removeprefix("part-")) for path in self.part_files()]
        return max(taken, default=-1) + 1

    def _write(self, part: Path, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._check_columns(row)
        self.folder.mkdir(parents=True, exist_ok=True)
        sink = io.BytesIO()
        table = pa.Table.from_pylist(rows, schema=self.schema)
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        write_aside(part, sink.getvalue())

    def _columns(self, names: list[str] | None) -> pa.Schema:
        return self.schema if names is None else pa.schema([self.schema.field(n) for n in names])

    def _check_columns(self, row: dict[str, Any]) -> None:
        # from_pylist would drop a misspelt column without a word
        if wrong := row.keys() ^ set(self.schema.names):
            names = ", ".join(sorted(wrong))
            raise ValueError(f"row for {self.folder}: columns missing or unknown: {names}")

    def _next_part(self) -> Path:
        return self.folder / f"part-{self.next_number:06d}.parquet"


def row_keys(table: pa.Table) -> Iterator[tuple[str, int]]:
    """(problem_id, sample_idx) of each row; rows of one problem share one string object."""
    ids = table["problem_id"].combine_chunks().dictionary_encode()
    names = ids.dictionary.to_pylist()
    indices = ids.indices.to_pylist()
    return zip((names[i] for i in indices), table["sample_idx"].to_pylist(), strict=True)


def write_aside(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, also after a power cut."""
    # A killed writer leaves a file of this name, which nobody reads; its successor writes the same
    # part under the same name, so the leftover goes without a sweep that could hit someone's file.
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_part(path: Path, schema: pa.Schema) -> pa.Table:
    with _opened(path) as part:
        table = part.read(columns=schema.names, use_threads=False)
    if table.schema != schema:
        raise ValueError(f"{path}: {_changes(table.schema, schema)}; make its folder anew")
    return table


def _changes(found: pa.Schema, wanted: pa.Schema) -> str:
    """How a part that another release wrote differs from what this one reads."""
    missing = ", ".join(name for name in wanted.names if name not in found.names)
    if missing:
        return f"of another release, without the columns {missing}"
    return f"of another release, with other kinds of columns than {', '.join(wanted.names)}"


def _footer(path: Path) -> pq.FileMetaData:
    with _opened(path) as part:
        return part.metadata


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as part:
            yield part
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's refusal (permissions, a disk that fails), not the file's content
        raise DamagedPart(
            f"{path} is damaged ({str(error).splitlines()[0]}); "
            "repeat the command that wrote it, which redoes its rows"
        ) from error
