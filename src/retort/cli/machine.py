"""`retort` alone and `retort doctor`: where to begin, and what this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retort.cli.options import Json

FIRST = """\
Begin with
  retort demo      two students of a small teacher beside it, in minutes
  retort doctor    what this machine has, and what is missing for what

A student of your own
  retort distill native-1b.yaml --plan
  retort distill native-1b.yaml

What a model is worth
  retort sample out=runs/mine model=FOLDER sample/gsm8k.yaml
  retort grade runs/mine
  retort report runs/mine

retort --help lists all commands, retort COMMAND --help says more of one.
"""


def first(context: typer.Context) -> None:
    """Distil a Transformer into a subquadratic student, sample it fast, show what that buys."""
    if context.invoked_subcommand is None:
        print(FIRST, end="")


def doctor(
    folder: Annotated[Path, typer.Argument(help="Where runs would go.")] = Path("runs"),
    json: Json = False,
) -> None:
    """Say what this machine has and what is missing for what; exit code 1 if it is too little."""
    from dataclasses import asdict

    from retort import console
    from retort import doctor as check

    found = check.findings(folder)
    console.print_table(check.table(found))
    if json:
        console.print_json_line([asdict(each) for each in found])
    if not all(each.fine or not each.needed for each in found):
        raise typer.Exit(1)
