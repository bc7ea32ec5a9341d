"""What the commands have in common."""

from __future__ import annotations

import os
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as a last line of JSON.")]
Sources = Annotated[
    list[str], typer.Argument(metavar="RECIPE.yaml|KEY=VALUE ...", show_default=False)
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1 ...")]


def is_main_process() -> bool:
    """Of the processes that torchrun starts, one speaks."""
    return os.environ.get("RANK", "0") == "0"
