"""Model folders: `retort inspect`, `export` and `publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retort.cli.options import Json


def inspect(
    folder: Annotated[Path, typer.Argument(help="A model folder.", show_default=False)],
    json: Json = False,
) -> None:
    """Show a model's layers, sizes, and the formats it can be published in."""
    from dataclasses import asdict

    from retort import console, inspection

    result = inspection.inspect(folder)
    for table in inspection.tables(result):
        console.print_table(table)
    if json:
        console.print_json_line(asdict(result))


def export(
    run: Annotated[Path, typer.Argument(help="A run's .training folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    step: Annotated[int | None, typer.Option(min=0, help="A step that was kept.")] = None,
    json: Json = False,
) -> None:
    """Write the student of a run's newest state, or of a step, as a model folder."""
    from retort import console
    from retort.train.export import export as write

    state = write(run, out, step)
    console.say(f"exported: {out}, from {state}")
    if json:
        console.print_json_line({"out": out, "state": state})


def publish(
    model: Annotated[Path, typer.Argument(help="A model folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    base_model: Annotated[
        str | None, typer.Option(help="The teacher, as it is called on the hub.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="The license, such as llama3.2.")] = None,
    curves: Annotated[
        Path | None, typer.Option(help="curves.json of a report, for the model card.")
    ] = None,
    llama_cpp: Annotated[
        bool, typer.Option("--llama-cpp", help="Widen the mixers so that llama.cpp runs them too.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a model as a folder that transformers, vLLM and SGLang run, with a model card."""
    from retort import console
    from retort.publishing import publish_folder

    publish_folder(model, out, base_model, license, curves, llama_cpp)
    console.say(f"published: {out}")
    if json:
        console.print_json_line({"out": out})
