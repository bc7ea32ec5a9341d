"""The `retort` command: distil a student, sample it, grade, measure, and report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from retort.recipe import DistillRecipe
    from retort.report.curves import Curves

app = typer.Typer(
    help="Distil a Transformer into a subquadratic student, sample it fast, show what that buys.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as a last line of JSON.")]
Sources = Annotated[
    list[str], typer.Argument(metavar="RECIPE.yaml|KEY=VALUE ...", show_default=False)
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1 ...")]

INTERRUPTED = 130
"""The exit code that Typer makes of Ctrl-C, without a word."""


def main() -> None:
    """Runs the command line; a user's mistake ends in one message and exit code 2."""
    from retort import console

    try:
        app()
    except ValueError as error:
        if not _main_process():
            raise SystemExit(2) from None
        console.fail(str(error))
    except OSError as error:
        console.fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            console.say("interrupted; the same command continues")
        raise


@app.command()
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
    console.say(f"report: {out / 'report.html'}")
    console.print_table(summary_table(curves))
    if json:
        _print_curves(curves)


@app.command()
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
    if json:
        console.print_json_line({"out": folder})


@app.command()
def sample(sources: Sources, json: Json = False) -> None:
    """Sample completions into a run folder; what is there already is not sampled again.

    Keys: out, model, problems.kind (arithmetic, gsm8k, math500, jsonl), problems.path,
    problems.count, sampling.n, sampling.temperature, sampling.max_tokens, slots, device ...
    """
    from retort import console
    from retort.recipe import SampleRecipe, load
    from retort.sample.run import sample as run

    folder = run(load(SampleRecipe, sources))
    if json:
        console.print_json_line({"out": folder})


@app.command()
def grade(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    json: Json = False,
) -> None:
    """Compare the completions of run folders with the gold answers."""
    from dataclasses import asdict

    from retort import console
    from retort.grade.run import grade as run

    summaries = {str(folder): asdict(run(folder)) for folder in runs}
    for folder, summary in summaries.items():
        counts = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in summary.items())
        console.say(f"{folder}: {counts}")
    if json:
        console.print_json_line(summaries)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Graded run folders, or .training folders.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("report"),
    k: Annotated[
        list[int] | None, typer.Option(help="Completions per problem to report; repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """Coverage and accuracy against seconds, as a page, figures and data; and training curves."""
    from json import loads

    from retort import console
    from retort.report import training
    from retort.report.run import report as run
    from retort.report.run import report_training, summary_table, training_table

    trained = [folder for folder in runs if training.is_training(folder)]
    sampled = [folder for folder in runs if folder not in trained]
    result: dict[str, Any] = {}
    if sampled:
        curves = run(sampled, out, k)
        console.say(f"report: {out / 'report.html'}")
        console.print_table(summary_table(curves))
        result |= loads(curves.to_json())
    if trained:
        trainings = report_training(trained, out)
        console.say(f"training curves: {out / 'training.html'}")
        console.print_table(training_table(trainings))
        result |= {"trainings": loads(training.to_json(trainings))}
    if json:
        console.print_json_line(result)


@app.command()
def bench(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Model folders; none: the bundled teacher's shape.", show_default=False
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows at once; repeatable.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 512,
    new: Annotated[int, typer.Option(min=1, help="New tokens.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 3,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the raw numbers.")] = None,
    json: Json = False,
) -> None:
    """Measure decoding speed, models side by side."""
    from dataclasses import asdict

    from retort import bench as benches
    from retort import console

    result = benches.bench(
        benches.open_models(models or [], device), batch or [1, 16, 64], prompt, new, repeats
    )
    console.print_table(benches.table(result))
    if out is not None:
        from json import dumps

        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    if json:
        console.print_json_line(asdict(result))


@app.command()
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


@app.command()
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


@app.command()
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
    if _main_process():
        console.print_table(table(trials))
        if json:
            console.print_json_line([asdict(trial) for trial in trials])


def _main_process() -> bool:
    """Of the processes that torchrun starts, one speaks."""
    return os.environ.get("RANK", "0") == "0"


def _print_curves(curves: Curves) -> None:
    from json import loads

    from retort import console

    console.print_json_line(loads(curves.to_json()))
