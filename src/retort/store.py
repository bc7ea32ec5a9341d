"""Run folders on disk: one model's completions on one set of problems, and the verdicts on them.

    run.json                        manifest: what the run is (identity) and facts about it
    problems/part-*.parquet         PROBLEMS
    completions/part-*.parquet      COMPLETIONS
    timing/part-*.parquet           TIMING
    steps/part-*.parquet            STEPS, seconds of decode steps by their rows
    verdicts-<version>/part-*.parquet   VERDICTS, one folder per grader version
    votes-<version>/part-*.parquet      VOTES, which of their keys are equal answers
    scores-<name>/part-*.parquet    SCORES, one folder per reward model
    scores-<name>/timing/part-*.parquet SCORING
    scores-<name>/scorer.json       which reward model that is

Every file is written aside, flushed to the disk and renamed, so a reader meets whole files only,
and whatever is missing after a crash is exactly what the same command has to redo.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from retort.tables import (
    COMPLETIONS,
    PROBLEMS,
    SCORES,
    SCORING,
    STEPS,
    TIMING,
    VERDICTS,
    VOTES,
    Table,
    write_aside,
)

__all__ = [
    "COMPLETIONS",
    "LOCK",
    "PROBLEMS",
    "SCORER",
    "SCORES",
    "SCORING",
    "STEPS",
    "TIMING",
    "VERDICTS",
    "VOTES",
    "Run",
    "Table",
    "fingerprint",
    "locked",
    "sample_seed",
]

LOCK = ".lock"
SCORER = "scorer.json"
_FINGERPRINTED = (
    "config.json",
    "generation_config.json",  # its stop tokens
    "mamba_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
LOCK_TRIES, LOCK_WAIT = 3, 0.02  # seconds


@dataclass(frozen=True)
class Run:
    """A run folder and its manifest, as they were when the run was opened."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open an existing run for reading; ValueError when the folder is none."""
        if not (folder / "run.json").is_file():
            raise ValueError(
                f"{folder} is no run folder (no run.json); `retort sample` makes one "
                "(docs/sampling.md)"
            )
        return cls(folder, _read_manifest(folder))

    @classmethod
    def start(
        cls,
        folder: Path,
        identity: dict[str, Any],
        facts: dict[str, Any],
        *,
        force: bool = False,
        check: Callable[[Self], object] | None = None,
    ) -> Self:
        """Create a run, or continue the one in `folder` when its identity is the same.

        identity: what decides which completions exist; a run never mixes two of them.
        facts: anything else worth recording; on continuing, newer values replace older ones.
        force: drop the completions, timings, verdicts and scores of the old run and start over.
        check: raises ValueError when the run that is continued does not fit in some other way.
        Raises ValueError, altering nothing, when the folder holds another run or foreign files.
        """
        assert "identity" not in facts
        _refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            old = _read_manifest(folder) if (folder / "run.json").exists() else {}
            if old and force:
                _remove_content(folder)
                old = {}
            if old:
                _refuse_change(folder, old["identity"], identity)
                if check is not None:
                    check(cls(folder, old))
            manifest = _plain({**old, **facts, "identity": identity})
            write_aside(folder / "run.json", json.dumps(manifest, indent=2).encode())
        return cls(folder, manifest)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for writing; the system releases it when the process ends, however it ends.

        Raises ValueError when another writer holds it, or has made another run of the folder.
        """
        with locked(self.folder):
            current = _read_manifest(self.folder)["identity"]
            _refuse_change(self.folder, current, self.manifest["identity"])
            yield

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def problems(self) -> Table:
        return Table(self.folder / "problems", PROBLEMS)

    @property
    def completions(self) -> Table:
        return Table(self.folder / "completions", COMPLETIONS)

    @property
    def timing(self) -> Table:
        return Table(self.folder / "timing", TIMING)

    @property
    def steps(self) -> Table:
        return Table(self.folder / "steps", STEPS)

    def verdicts(self, version: str) -> Table:
        return Table(self.folder / f"verdicts-{version}", VERDICTS)

    def votes(self, version: str) -> Table:
        return Table(self.folder / f"votes-{version}", VOTES)

    def verdict_versions(self) -> list[str]:
        return sorted(p.name.removeprefix("verdicts-") for p in self.folder.glob("verdicts-*"))

    def scores(self, name: str) -> Table:
        return Table(self.folder / f"scores-{name}", SCORES)

    def scoring(self, name: str) -> Table:
        return Table(self.folder / f"scores-{name}" / "timing", SCORING)

    def score_names(self) -> list[str]:
        return sorted(p.name.removeprefix("scores-") for p in self.folder.glob("scores-*"))


def sample_seed(run_seed: int, problem_id: str, sample_idx: int) -> int:
    """Seed of one completion, in [0, 2**63): the same on every machine, batch size and restart."""
    # the id comes last, so no two different triples are written the same way
    name = f"{run_seed}/{sample_idx}/{problem_id}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def fingerprint(folder: Path) -> str:
    """Hash of what a checkpoint folder computes, in time that does not grow with the weights.

    Covers configurations, tokenizer and chat template whole, and of each *.safetensors file its
    name, its size, its header (names, shapes, types, offsets) and the first and last MiB of data.
    Two checkpoints that differ in the middle of a file alone share a fingerprint.
    Raises ValueError when config.json or the weights are missing or a weights file is cut short.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise ValueError(f"{folder} is no checkpoint folder (config.json and *.safetensors needed)")
    texts = [folder / name for name in _FINGERPRINTED]
    pieces = {path.name: path.read_bytes() for path in texts if path.is_file()}
    pieces |= {path.name: _weights_summary(path) for path in weights}
    digest = hashlib.blake2b(digest_size=16)
    for name, piece in pieces.items():
        digest.update(f"{name}\0{len(piece)}\0".encode() + piece)
    return digest.hexdigest()


def _weights_summary(path: Path) -> bytes:
    mib, size = 1 << 20, path.stat().st_size
    with path.open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        if data > size:
            raise ValueError(f"{path} is cut short: {size} bytes, its header alone needs {data}")
        file.seek(0)
        head = file.read(data + mib)
        file.seek(max(data, size - mib))
        return f"{size}\0".encode() + head + file.read()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:  # neither JSON nor UTF-8
        raise ValueError(f"{path} is damaged ({error}); choose another out folder") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        raise ValueError(f'{path} is no run manifest: it needs an object with an "identity"')
    return manifest


def _plain(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest as it will read back: tuples are lists, keys are strings."""
    return dict(json.loads(json.dumps(manifest)))


def _refuse_change(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    was, now = _leaves(old), _leaves(_plain(new))
    changes = [
        f"{name} was {was.get(name, 'absent')}, is now {now.get(name, 'absent')}"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    ]
    if changes:
        raise ValueError(
            f"{folder} holds another run: {'; '.join(changes)}; "
            "choose another out folder, or force=true starts over "
            "(docs/sampling.md#stopping-and-going-on)"
        )


def _leaves(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}: a change deep inside a recipe is named, not buried."""
    leaves: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            leaves |= _leaves(item, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = json.dumps(item)
    return leaves


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a run needs a folder")
    if (folder / "run.json").exists() or not folder.exists():
        return
    # a run that was killed while it was being created leaves these two and nothing else
    if {path.name for path in folder.iterdir()} - {LOCK, ".run.json.tmp"}:
        raise ValueError(f"{folder} holds files and no run.json; choose an empty or a new folder")


def _remove_content(folder: Path) -> None:
    # What was derived goes first: should this be cut off, no verdict outlives its completion.
    # run.json stays until it is replaced, so the folder is a run at every moment.
    derived = ("scores-*/timing", "scores-*", "votes-*", "verdicts-*")
    for pattern in (*derived, "steps", "timing", "completions", "problems"):
        for table in folder.glob(pattern):
            for path in [*table.glob("part-*.parquet"), *table.glob(".part-*.parquet.tmp")]:
                path.unlink()
            (table / SCORER).unlink(missing_ok=True)
            if not any(table.iterdir()):
                table.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps others from writing to a folder. Raises ValueError where another process does."""
    # The file stays when the lock is released: unlinking it would let two writers lock two files.
    with (folder / LOCK).open("a+") as file:
        if not _taken(file):
            file.seek(0)
            raise ValueError(
                f"{folder} is being written by process {file.read()}; wait for it or stop it"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def writer(folder: Path) -> str | None:
    """The number of the process that is writing to a folder; None where none is."""
    if not (folder / LOCK).is_file():
        return None
    with (folder / LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read()
    return None


def _taken(file: IO[str]) -> bool:
    """Whether the lock could be had. Somebody who asks for the writer holds it for a moment."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_WAIT)
        else:
            return True
    return False
