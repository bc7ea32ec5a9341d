"""What a command shows a person: progress, tables, results, errors.

Progress and messages go to stderr, results (tables, one JSON line) to stdout, so that `--json` can
be piped. Nothing printed here is read as rich markup: text comes from users, data and models.
"""

import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Final, NoReturn, Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from retort.metrics import to_json

PLAIN_INTERVAL_S = 10.0
"""Seconds between two lines of progress when stderr is not a terminal."""


@cache  # not one for each call: live displays nest only within one console
def stdout() -> Console:
    """Where results go."""
    return _console()


@cache
def stderr() -> Console:
    """Where progress and messages go."""
    return _console(stderr=True)


def _console(stderr: bool = False, width: int | None = None) -> Console:
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


# Messages and results


def say(message: str) -> None:
    """Tell the person something, on stderr."""
    stderr().print(printable(message), soft_wrap=True)


def warn(message: str) -> None:
    """Print `warning: message` on stderr."""
    _print_labelled("warning: ", "bold yellow", message)


def fail(message: str) -> NoReturn:
    """Print `error: message` on stderr and exit with code 2, the code for a user's mistake."""
    _print_labelled("error: ", "bold red", message)
    raise SystemExit(2)


def print_table(table: Table) -> None:
    """Print a table on stdout, as wide as it likes when nobody's terminal limits it."""
    out = stdout()
    if not out.is_terminal:
        unlimited = out.options.update(max_width=10_000)
        out = _console(width=Measurement.get(out, unlimited, table).maximum)
    out.print(table)


def print_json_line(obj: object) -> None:
    """Print one compact line of JSON on stdout; NaN and infinity, which JSON lacks, become null."""
    print(to_json(obj), flush=True)


def _print_labelled(label: str, style: str, message: str) -> None:
    text = Text.assemble((label, style), printable(message))
    stderr().print(text, soft_wrap=True)


def printable(text: str) -> str:
    """`text` without the control characters by which it could drive the terminal."""
    return text.translate(_CONTROLS)


_CONTROLS: Final = dict.fromkeys([*range(32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}") | {
    ord("\n"): "\n",
    ord("\t"): "\t",
}


# Numbers for people


def format_count(n: float) -> str:
    """Three figures and a unit: 950, 1.2 k, 350 M, 8.0 B."""
    if not math.isfinite(n):
        return str(n)
    if abs(n) < 999.5:
        return f"{n:.0f}" if n == round(n) or abs(n) >= 99.95 else f"{n:.1f}"
    for unit in ("k", "M", "B", "T"):
        n /= 1000
        if abs(n) < 999.5 or unit == "T":
            break
    return f"{n:.1f} {unit}" if abs(n) < 99.95 else f"{n:.0f} {unit}"


def format_seconds(s: float) -> str:
    """Two figures of time: 42 ms, 3.2 s, 12 s, 1 min 30 s, 2 h 05 min, 3 d 4 h."""
    if not math.isfinite(s):
        return str(s)
    if s < 0.9995:
        return f"{1000 * s:.0f} ms"
    if s < 9.95:
        return f"{s:.1f} s"
    if s < 59.5:
        return f"{s:.0f} s"
    if s < 3599.5:
        return "{} min {:02d} s".format(*divmod(round(s), 60))
    if s < 86_370:
        return "{} h {:02d} min".format(*divmod(round(s / 60), 60))
    return "{} d {} h".format(*divmod(round(s / 3600), 24))


# Progress


class Advance(Protocol):
    """Report `amount` of work as done; a `note` replaces the short text beside the bar."""

    def __call__(self, amount: int = 1, note: str = "") -> None: ...


@dataclass(frozen=True)
class Snapshot:
    """Where a piece of work stands: `done` of `total`, of which `resumed` before this run."""

    label: str
    unit: str
    total: int
    resumed: int
    done: int
    elapsed: float = 0.0
    note: str = ""

    @property
    def fraction(self) -> float:
        return min(self.done / self.total, 1.0) if self.total else 1.0

    @property
    def seconds_left(self) -> float | None:
        """At the pace of this run, or None before there is one."""
        if self.done >= self.total:
            return 0.0
        if self.done <= self.resumed:
            return None
        return self.elapsed * (self.total - self.done) / (self.done - self.resumed)


class _Meter:
    """Counts work as threads report it."""

    def __init__(self, start: Snapshot) -> None:
        self._latest = start
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, amount: int = 1, note: str = "") -> None:
        with self._lock:
            now = self._latest
            self._latest = replace(now, done=now.done + amount, note=note or now.note)

    def read(self) -> Snapshot:
        return replace(self._latest, elapsed=time.monotonic() - self._began)


@contextmanager
def progress(
    label: str, total: int, unit: str = "", done: int = 0, show: bool = True
) -> Iterator[Advance]:
    """Show how far a piece of work is while the `with` block does it.

        with progress("distil", total=steps, unit="steps", done=first_step) as advance:
            for step in range(first_step, steps):
                ...
                advance(1, f"loss {loss:.3f}")

    Args:
        total: how much there is to do, counted in `unit`.
        done: what an earlier run did; the time left is judged by the work of this one alone.
        show: False counts silently, for the processes of a group that are not the first.

    On a terminal it is a bar of one line; elsewhere a line at most every `PLAIN_INTERVAL_S`
    seconds, and one at the end.
    """
    meter = _Meter(Snapshot(_one_line(label), unit, total, resumed=done, done=done))
    with _display(meter, show) as advance:
        yield advance


def _display(meter: _Meter, show: bool) -> AbstractContextManager[Advance]:
    if not show:
        return _silent(meter)
    err = stderr()
    # A real terminal, whatever FORCE_COLOR says: continuous integration sets it and keeps a log.
    if err.is_interactive and sys.stderr.isatty():
        return _bar(meter, err)
    return _plain_lines(meter)


@contextmanager
def _silent(meter: _Meter) -> Iterator[Advance]:
    yield meter.advance


@contextmanager
def _bar(meter: _Meter, err: Console) -> Iterator[Advance]:
    def line() -> Text:
        return bar_line(meter.read(), err.width, ascii_only=err.options.ascii_only)

    # While a bar is shown rich takes over stdout too, and would send it to stderr: wrong in a pipe.
    live = Live(get_renderable=line, console=err, redirect_stdout=sys.stdout.isatty())
    with live:
        yield meter.advance


@contextmanager
def _plain_lines(meter: _Meter) -> Iterator[Advance]:
    printed = time.monotonic()

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal printed
        meter.advance(amount, note)
        if time.monotonic() - printed >= PLAIN_INTERVAL_S:
            printed = time.monotonic()
            _print_plain(meter)

    try:
        yield advance
    finally:
        _print_plain(meter)


def _print_plain(meter: _Meter) -> None:
    print(plain_line(meter.read()), file=sys.stderr, flush=True)


def plain_line(now: Snapshot) -> str:
    """`now` for a log: `distil: 42 % (420/1000 steps), 12 s elapsed, 17 s left, loss 2.3`."""
    left = now.seconds_left
    parts = [
        f"{now.label}: {_percent(now)} % ({_count(now)})",
        f"{format_seconds(now.elapsed)} elapsed",
        f"{format_seconds(left)} left" if left else "",
        _one_line(now.note),
    ]
    return ", ".join(part for part in parts if part)


def bar_line(now: Snapshot, width: int, ascii_only: bool = False) -> Text:
    """`now` as one line that fits `width` cells; what matters least gives way first."""
    room = max(width - 1, 1)  # many terminals go to the next line once their last cell is written
    left = now.seconds_left
    parts = {
        "label": _clip(now.label, room // 3),
        "percent": f"{_percent(now):3}%",
        "left": f"{_clock(left)} left" if left else "",
        "count": _count(now),
        "elapsed": _clock(now.elapsed),
        "bar": 10 * " ",
    }
    parts = _fitting(parts, room)
    spare = room - _cells(parts)
    note = _clip(_one_line(now.note), spare - 1) if spare > 8 else ""
    spare -= cell_len(note) + 1
    bar = _draw_bar(now.fraction, 10 + min(max(spare, 0), 30), ascii_only) if "bar" in parts else ""
    after = [parts.get(key, "") for key in ("percent", "count", "elapsed", "left")]
    shown = [part for part in (parts.get("label", ""), bar, *after, note) if part]
    return Text(" ").join(Text(part) if isinstance(part, str) else part for part in shown)


def _fitting(parts: Mapping[str, str], room: int) -> dict[str, str]:
    """The parts for which there is room, the first ones first."""
    kept: dict[str, str] = {}
    for key, part in parts.items():
        if part and _cells(kept | {key: part}) <= room:
            kept[key] = part
    return kept


def _cells(parts: Mapping[str, str]) -> int:
    """The width of the parts with a space between them."""
    return sum(cell_len(part) + 1 for part in parts.values()) - 1


def _clip(text: str, cells: int) -> str:
    clipped = Text(text)
    clipped.truncate(max(cells, 0), overflow="crop")
    return clipped.plain.rstrip()


def _draw_bar(fraction: float, width: int, ascii_only: bool) -> Text:
    full = int(fraction * width)
    done, rest = ("#", "-") if ascii_only else ("━", "─")
    return Text.assemble((done * full, "green"), (rest * (width - full), "dim"))


def _clock(seconds: float) -> str:
    """0:42, 12:03, 3:12:03: narrower than `format_seconds`, and steadier while it counts."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def _percent(now: Snapshot) -> int:
    """Rounded down: 100 is said when all is done."""
    return min(100 * now.done // now.total, 100) if now.total else 100


def _count(now: Snapshot) -> str:
    return f"{_short(now.done)}/{_short(now.total)} {now.unit}".rstrip()


def _short(n: int) -> str:
    return str(n) if n < 10_000 else format_count(n)


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())
