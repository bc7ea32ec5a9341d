"""What run folders there are below a folder, and how far each of them has come.

Read from manifests and the footers of tables, so a run of a million completions takes no longer
than a small one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from retort.store import Run, writer

DEPTH = 4
"""Folders below the one that is searched."""


@dataclass(frozen=True)
class Listed:
    """A run: what was asked of it, what is there, and what is wrong with it, if anything.

    verdicts and scores count rows by grader version and by scorer; `writer` is the process that
    writes the run now.
    """

    folder: Path
    name: str = ""
    model: str = ""
    problems: int = 0
    n: int = 0
    completions: int = 0
    verdicts: Mapping[str, int] | None = None
    scores: Mapping[str, int] | None = None
    writer: str | None = None
    fault: str | None = None

    @property
    def asked(self) -> int:
        return self.problems * self.n

    @property
    def state(self) -> str:
        """In a few words, the first that applies: damaged, being written, and how much is there."""
        if self.fault is not None:
            return f"damaged: {self.fault}"
        if self.writer is not None:
            return f"being written by process {self.writer}, {self._sampled()}"
        return self._sampled()

    def _sampled(self) -> str:
        if self.completions < self.asked:
            return f"{self.completions} of {self.asked} sampled"
        return "all sampled" if self.asked else "nothing sampled"

    def covered(self, table: Mapping[str, int] | None) -> str:
        """The names of a set of tables, each with its share of the completions unless whole."""
        return ", ".join(
            name if rows >= self.completions else f"{name} ({rows} of {self.completions})"
            for name, rows in (table or {}).items()
        )


def runs(folder: Path) -> list[Listed]:
    """The runs in a folder and below it, by path. Raises ValueError where there is no folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name one that holds runs")
    return [_listed(found) for found in sorted(_run_folders(folder, DEPTH))]


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "run.json").is_file():
        yield folder
    elif depth:
        for below in folder.iterdir():
            if below.is_dir() and not below.is_symlink():
                yield from _run_folders(below, depth - 1)


def _listed(folder: Path) -> Listed:
    try:
        run = Run.open(folder)
        return Listed(
            folder=folder,
            name=run.name,
            model=str(run.manifest["model"]["folder"]),
            problems=run.problems.rows(),
            n=run.manifest["n"],
            completions=run.completions.rows(),
            verdicts={name: run.verdicts(name).rows() for name in run.verdict_versions()},
            scores={name: run.scores(name).rows() for name in run.score_names()},
            writer=writer(folder),
        )
    except KeyError as error:
        return Listed(folder=folder, fault=f"run.json has no {error}")
    except ValueError as error:
        return Listed(folder=folder, fault=str(error).splitlines()[0])


def table(found: list[Listed]) -> Table:
    """The runs for a terminal."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "model", "state", "graded", "scored"):
        shown.add_column(heading, overflow="fold")
    for run in found:
        # as Text, so that brackets in a name are not read as markup
        values = (
            str(run.folder),
            Path(run.model).name,
            run.state,
            run.covered(run.verdicts),
            run.covered(run.scores),
        )
        shown.add_row(*map(Text, values))
    return shown
