"""`retort demo` and `retort distill`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retort.cli.options import Json, Sources, is_main_process

if TYPE_CHECKING:
    from retort.recipe import DistillRecipe
    from retort.report.curves import Curves


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(
        "runs/demo"
    ),
    json: Json = False,
) -> None:
    """Distil two students from the bundled teacher and compare them with it, on this CPU."""
    from retort import console
    from retort.demo import demo as run
    from retort.report.run import summary_table

    curves = run(out)
    console.print_table(summary_table(curves))
    if json:
        _print_curves(curves)
    console.say(f"report: {out / 'report.html'}")


def distill(
    sources: Sources,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it would cost, and do nothing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Take two steps of each stage with random data.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a student as a recipe says: YAML files and KEY=VALUE, the later ones winning.

    A run that was stopped continues with the same command.
    """
    from retort import console
    from retort.recipe import DistillRecipe, load

    recipe = load(DistillRecipe, sources)
    if plan or dry_run:
        if plan:
            _print_plan(recipe, json)
        if dry_run:
            _print_trials(recipe, json)
        return
    from retort.train.loop import distill as run

    folder = run(recipe)
    if json and is_main_process():
        console.print_json_line({"out": folder})


def _print_plan(recipe: DistillRecipe, json: bool) -> None:
    from dataclasses import asdict

    from retort import console
    from retort.train.plan import plan
    from retort.train.plan_tables import tables

    found = plan(recipe)
    for table in tables(found):
        console.print_table(table)
    if json:
        totals = {"tokens": found.tokens, "flops": found.flops, "hours": found.hours}
        console.print_json_line(asdict(found) | {"total": totals})


def _print_trials(recipe: DistillRecipe, json: bool) -> None:
    from dataclasses import asdict

    from retort import console
    from retort.train.dry_run import dry_run, table

    trials = dry_run(recipe)
    if is_main_process():
        console.print_table(table(trials))
        if json:
            console.print_json_line([asdict(trial) for trial in trials])


def _print_curves(curves: Curves) -> None:
    from json import loads

    from retort import console

    console.print_json_line(loads(curves.to_json()))
