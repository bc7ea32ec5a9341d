"""The `retort` command: distil a student, sample it, grade, measure, and report."""

from __future__ import annotations

from collections.abc import Callable

import typer

from retort.cli import bench, machine, models, runs, training
from retort.cli.options import is_main_process

COMMANDS: list[Callable[..., None]] = [
    training.demo,
    training.distill,
    runs.sample,
    runs.grade,
    runs.score,
    runs.verifier,
    runs.report,
    runs.runs,
    models.inspect,
    models.export,
    models.publish,
    machine.doctor,
]

app = typer.Typer(
    callback=machine.first,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(bench.benches, name="bench", help="Measure speed: decode, prefill, train, targets.")

INTERRUPTED = 130
"""The exit code that Typer makes of Ctrl-C, without a word."""


def main() -> None:
    """Runs the command line; a user's mistake ends in one message and exit code 2."""
    from retort import console

    try:
        app()
    except ValueError as error:
        if not is_main_process() and not _of_this_process(error):
            raise SystemExit(2) from None
        console.fail(str(error))
    except OSError as error:
        console.fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            console.say("interrupted; the same command continues")
        raise


def _of_this_process(error: ValueError) -> bool:
    """Whether the main process may not know of it."""
    from retort.train.world import OfOneProcess

    return isinstance(error, OfOneProcess)
