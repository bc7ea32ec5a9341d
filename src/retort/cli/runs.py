"""Run folders: `retort sample`, `grade`, `score`, `verifier`, `report` and `runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from retort.cli.options import Json, Sources


def sample(
    sources: Sources,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS|local",
            help="Sample on a Ray cluster: local (one made here for this), auto or HOST:PORT.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Engines on the cluster; each takes a core or a GPU.")
    ] = None,
    json: Json = False,
) -> None:
    """Sample completions into a run folder; what is there already is not sampled again.

    Keys: out, model, problems.kind (arithmetic, gsm8k, math500, jsonl), problems.path,
    problems.count, sampling.n, sampling.temperature, sampling.max_tokens, slots, device ...
    """
    from retort import console
    from retort.recipe import SampleRecipe, load
    from retort.sample.cluster import of_flags
    from retort.sample.run import sample as run

    folder = run(load(SampleRecipe, sources), of_flags(ray, workers))
    if json:
        console.print_json_line({"out": folder})


def grade(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes for algebra; none: one for each core.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that one comparison may take.")
    ] = 5.0,
    json: Json = False,
) -> None:
    """Compare the completions of run folders with the gold answers.

    What is graded already is not graded again; a run that was stopped continues.
    """
    from dataclasses import asdict

    from retort import console
    from retort.grade import Grader
    from retort.grade.run import grade as run

    with Grader(workers, timeout) as grader:
        summaries = {str(folder): asdict(run(folder, grader)) for folder in runs}
    for folder, summary in summaries.items():
        counts = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in summary.items())
        console.say(f"{folder}: {counts}")
    if json:
        console.print_json_line(summaries)


def score(sources: Sources, json: Json = False) -> None:
    """Judge the completions of a run with a reward model; what has a score is not judged again.

    Keys: run, model, kind (rlhflow, qwen, outcome, verifier), name, batch_tokens, device, dtype.
    """
    from dataclasses import asdict

    from retort import console
    from retort.recipe import ScoreRecipe, load
    from retort.score.run import score as run

    summary = asdict(run(load(ScoreRecipe, sources)))
    console.say(", ".join(f"{name.replace('_', ' ')} {n}" for name, n in summary.items()))
    if json:
        console.print_json_line(summary)


def verifier(sources: Sources, json: Json = False) -> None:
    """Train a verifier on the graded completions of a run; `retort score` weighs votes with it.

    Keys: run, model, out, rollouts.n, rollouts.completions, rollouts.slots, seed, batch_tokens,
    device. With rollouts it judges each step, else the whole.
    """
    from dataclasses import asdict

    from retort import console
    from retort.recipe import VerifierRecipe, load
    from retort.score.training import in_words, reliability_table, train_verifier

    recipe = load(VerifierRecipe, sources)
    found = train_verifier(recipe)
    console.print_table(reliability_table(found))
    console.say(f"verifier: {recipe.out}; {in_words(found)}")
    if json:
        console.print_json_line(asdict(found))


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Graded run folders, or .training folders.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("report"),
    k: Annotated[
        list[int] | None, typer.Option(help="Completions per problem to report; repeatable.")
    ] = None,
    aggregate: Annotated[
        Literal["last", "min", "prod", "mean"],
        typer.Option(help="How a process model's scores of steps become one."),
    ] = "last",
    reference: Annotated[
        str | None, typer.Option(help="Name of the run to compare with; none: the first.")
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]MONEY", help="Of an hour of the machine; repeatable."),
    ] = None,
    json: Json = False,
) -> None:
    """Coverage and accuracy against seconds, as a page, figures and data; and training curves."""
    from json import loads

    from retort import console
    from retort.report import training
    from retort.report.budget import prices
    from retort.report.run import report as run
    from retort.report.run import report_training, summary_table, training_table
    from retort.report.wording import warnings

    trained = [folder for folder in runs if training.is_training(folder)]
    sampled = [folder for folder in runs if folder not in trained]
    result: dict[str, Any] = {}
    if sampled:
        curves = run(
            sampled, out, k, aggregate, reference, prices(price or []), training=bool(trained)
        )
        for model in curves.models:
            for line in warnings(model):
                console.warn(line)
        console.print_table(summary_table(curves))
        console.say(f"report: {out / 'report.html'}")
        result |= loads(curves.to_json())
    if trained:
        trainings = report_training(trained, out)
        console.print_table(training_table(trainings))
        console.say(f"training curves: {out / 'training.html'}")
        result |= {"trainings": loads(training.to_json(trainings))}
    if json:
        console.print_json_line(result)


def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look, folders below too.")] = Path(
        "runs"
    ),
    json: Json = False,
) -> None:
    """List run folders: how far each is sampled, graded and scored, and who is writing it."""
    from dataclasses import asdict

    from retort import console, listing

    found = listing.runs(folder)
    if found:
        console.print_table(listing.table(found))
    else:
        console.say(f"{folder}: no run folders here; `retort sample` makes them")
    if json:
        console.print_json_line([asdict(run) | {"state": run.state} for run in found])
