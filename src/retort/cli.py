"""The `retort` command: distil a student, sample it, grade, measure, and report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from retort.bench.decode import Decode
    from retort.bench.prefill import Prefill
    from retort.bench.targets import Targets
    from retort.bench.training import Training
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


@app.command()
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


@app.command()
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


@app.command()
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
    aggregate: Annotated[
        Literal["last", "min", "prod", "mean"],
        typer.Option(help="How a process model's scores of steps become one."),
    ] = "last",
    json: Json = False,
) -> None:
    """Coverage and accuracy against seconds, as a page, figures and data; and training curves."""
    from json import loads

    from retort import console
    from retort.report import training
    from retort.report.run import report as run
    from retort.report.run import report_training, summary_table, training_table
    from retort.report.wording import warnings

    trained = [folder for folder in runs if training.is_training(folder)]
    sampled = [folder for folder in runs if folder not in trained]
    result: dict[str, Any] = {}
    if sampled:
        curves = run(sampled, out, k, aggregate)
        console.say(f"report: {out / 'report.html'}")
        for model in curves.models:
            for line in warnings(model):
                console.warn(line)
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


benches = typer.Typer(no_args_is_help=True)
app.add_typer(benches, name="bench", help="Measure speed: decode, prefill, train, targets.")

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL ...",
        help="Folders, or sizes such as llama-3.2-1b, llamba-1b, hybrid-1b with random weights; "
        "none: a teacher and two students, small ones on a CPU, of 1B on a GPU.",
        show_default=False,
    ),
]
Plain = Annotated[bool, typer.Option("--plain", help="The plain torch reference beside it.")]
Against = Annotated[
    list[str] | None,
    typer.Option(help="The same weights under transformers or llama.cpp beside it; repeatable."),
]
Repeats = Annotated[int, typer.Option(min=1, help="Measurements of each, in turns.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; none: all cores.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for bench-*.json, with every repeat, and a page.")
]
Pictures = Annotated[bool, typer.Option("--pictures", help="Charts as SVG and PNG too.")]
Lengths = Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a row; repeatable.")]


@benches.command("decode")
def bench_decode(
    models: Models = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Rows at once; repeatable. None: 1, 2, 4 and so on."),
    ] = None,
    most: Annotated[
        int | None,
        typer.Option(min=1, help="The most of them; none: 64 on a CPU, what fits on a GPU."),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 512,
    new: Annotated[int, typer.Option(min=1, help="New tokens.")] = 512,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps to measure, spread over the new tokens; none: 128, on a GPU all."
        ),
    ] = None,
    prompts: Annotated[
        str, typer.Option(help="Prompts: own (one for each row), shared (one for all) or both.")
    ] = "both",
    plain: Plain = False,
    against: Against = None,
    repeats: Repeats = 3,
    threads: Threads = None,
    device: Device = "cpu",
    out: Out = None,
    pictures: Pictures = False,
    json: Json = False,
) -> None:
    """Tokens a second at growing batches, beside what the memory's bandwidth allows."""
    from retort.bench.commands import Asked, Where, measure_decode

    asked, where = Asked(models or (), plain, against or ()), Where(device, threads, out, pictures)
    _end_bench(
        measure_decode(asked, where, (prompt, new, steps), prompts, batch, most, repeats), json
    )


@benches.command("prefill")
def bench_prefill(
    models: Models = None,
    length: Lengths = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Completions of one prompt.")] = 16,
    plain: Plain = False,
    against: Against = None,
    repeats: Repeats = 3,
    threads: Threads = None,
    device: Device = "cpu",
    out: Out = None,
    pictures: Pictures = False,
    json: Json = False,
) -> None:
    """Tokens a second in reading prompts, and how often n completions of one read it."""
    from retort.bench.commands import Asked, Where, measure_prefill

    asked, where = Asked(models or (), plain, against or ()), Where(device, threads, out, pictures)
    _end_bench(measure_prefill(asked, where, length, n, repeats), json)


@benches.command("train")
def bench_train(
    models: Models = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    length: Lengths = None,
    repeats: Repeats = 3,
    threads: Threads = None,
    device: Device = "cpu",
    out: Out = None,
    json: Json = False,
) -> None:
    """Tokens a second, forward and backward, and memory beside what --plan says."""
    from retort.bench.commands import Where, measure_train

    where = Where(device, threads, out)
    _end_bench(measure_train(models or (), where, rows, length, repeats), json)


@benches.command("targets")
def bench_targets(
    batch: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 64,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps to measure, spread over 512 new tokens.")
    ] = 128,
    repeats: Repeats = 3,
    threads: Threads = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """The ratios that Retort sets itself on a CPU: measured side by side, met or missed."""
    from retort.bench.commands import Where, measure_targets

    _end_bench(measure_targets(Where("cpu", threads, out), batch, steps, repeats), json)


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


def _end_bench(result: Decode | Prefill | Training | Targets, json: bool) -> None:
    """Prints the result as JSON where asked; what was interrupted ends in exit code 1."""
    from dataclasses import asdict

    from retort import console

    if json:
        console.print_json_line(asdict(result))
    if not result.complete:
        raise typer.Exit(1)


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
