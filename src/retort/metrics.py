"""Metrics on disk: a file of JSON lines that a run appends to, and whoever likes may read."""

import json
import math
import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

LONGEST_RECORD = 1 << 20
"""Bytes in which a record is sure to end."""


class MetricsLog:
    """A file of JSON lines that only grows; each line has left the process when `write` returns.

    The file is opened for each line, so a log holds no resource, and a killed run loses at most the
    line it was writing: opening the log again drops that torn line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._keep(lambda record: True)

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record; NaN and infinity become null."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")

    def truncate_after(self, step: int) -> None:
        """Drop what a killed run wrote past its checkpoint at `step`: resuming repeats it."""
        self._keep(lambda record: record.get("step", step) <= step)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        if not self.path.exists():
            return
        new = "".join(line for line, record in _lines(self.path) if wanted(record)).encode()
        if len(new) != self.path.stat().st_size:
            _replace_file(self.path, new)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, without a last line still being written.

    Raises:
        ValueError: another line is not a JSON object.
    """
    return list(iterate_metrics(path))


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The same records one at a time: a long run's need not be in memory together."""
    return (record for _, record in _lines(path))


def last_record(path: Path) -> dict[str, Any] | None:
    """The newest whole record, in time that does not grow with the file; None in an empty one.

    Raises ValueError where the end of the file is no JSON object.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST_RECORD))
        whole, _, _torn = file.read().rpartition(b"\n")
    line = whole.rpartition(b"\n")[2].decode("utf-8", errors="replace")
    return _parse_record(line, str(path)) if line else None


def to_json(obj: object) -> str:
    """`obj` as one compact line; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_plain(obj), separators=(",", ":"), allow_nan=False)


def _plain(obj: object) -> Any:
    """`obj` in JSON's own types; numpy's scalars and paths have an obvious place there."""
    match obj:
        case bool() | None | str():
            return obj
        case numbers.Integral():
            return int(obj)
        case numbers.Real():
            return float(obj) if math.isfinite(obj) else None
        case os.PathLike():
            return os.fspath(obj)
        case Mapping():
            return {str(key): _plain(value) for key, value in obj.items()}
        case list() | tuple():
            return [_plain(value) for value in obj]
    raise TypeError(f"{type(obj).__name__} has no place in JSON: {obj!r}")


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole lines with what they say."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith("\n"):
                yield line, _parse_record(line.removesuffix("\n"), f"{path}:{number}")


def _parse_record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}): {line[:80]!r}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {line[:80]!r}")
    return record


def _replace_file(path: Path, content: bytes) -> None:
    """Write aside, then rename: a reader, or a crash, finds the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
