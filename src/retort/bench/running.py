"""What becomes of a measurement: it is shown, and written, also where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, TypeVar

from retort import console
from retort.bench import terminal
from retort.bench.head import Head
from retort.bench.view import View
from retort.tables import write_aside


class Result(Protocol):
    """What a measurement gives, whole or as far as it came."""

    @property
    def head(self) -> Head:
        """When, how and where."""

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""


R = TypeVar("R", bound=Result)


def finish(
    name: str,
    results: Iterator[R],
    view: Callable[[R], View],
    out: Path | None,
    drawn: bool = False,
) -> R:
    """Measures to the end, or to Ctrl-C; shows what there is, and writes it into the folder `out`.

    Writes bench-NAME.json after each part, and in the end bench-NAME.html; `drawn` adds .svg and
    .png where there are charts.
    """
    result = _last(name, results, out)
    seen = view(result)
    terminal.show(seen, told=result.head.notes)
    if out is not None:
        _write_page(out / f"bench-{name}", result.head, seen, drawn)
        console.say(f"written: {out / f'bench-{name}.json'} and .html")
    if not result.complete:
        console.warn("interrupted: this is what was measured until then")
    return result


def _last(name: str, results: Iterator[R], out: Path | None) -> R:
    """The last result, each of them written as it comes."""
    found: list[R] = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    try:
        for result in results:
            found[:] = [result]
            if out is not None:
                text = json.dumps(asdict(result), indent=2) + "\n"  # type: ignore[call-overload]
                write_aside(out / f"bench-{name}.json", text.encode())
    except KeyboardInterrupt:
        if not found:
            raise
    return found[0]


def _write_page(path: Path, head: Head, view: View, drawn: bool) -> None:
    from retort.bench import page, plots  # Altair is slow to import, and only writing needs it

    write_aside(path.with_suffix(".html"), page.render(view, head).encode())
    if drawn and view.charts:
        for ending, content in plots.pictures(view):
            write_aside(path.with_suffix(ending), content)
