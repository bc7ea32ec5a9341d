"""`retort bench`: what is fast, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retort.cli.options import Device, Json

if TYPE_CHECKING:
    from retort.bench.decode import Decode
    from retort.bench.prefill import Prefill
    from retort.bench.targets import Targets
    from retort.bench.training import Training

benches = typer.Typer(no_args_is_help=True)

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
    kv_dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="Beside it: keys and values kept in bfloat16, say."),
    ] = None,
    ssm_dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Beside it: recurrent states in bfloat16, say.")
    ] = "float32",
    write_every: Annotated[
        int, typer.Option(metavar="TOKENS", help="Beside it: states written every 16 tokens, say.")
    ] = 1,
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
    from retort.recipe import Cache, parse
    from retort.sample.cache import CacheSettings

    told = {"kv_dtype": kv_dtype, "ssm_dtype": ssm_dtype, "write_every": write_every}
    cache = CacheSettings.of(parse(Cache, told))
    beside = None if cache == CacheSettings() else cache
    asked = Asked(models or (), plain, against or (), beside)
    where = Where(device, threads, out, pictures)
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


def _end_bench(result: Decode | Prefill | Training | Targets, json: bool) -> None:
    """Prints the result as JSON where asked; what was interrupted ends in exit code 1."""
    from dataclasses import asdict

    from retort import console

    if json:
        console.print_json_line(asdict(result))
    if not result.complete:
        raise typer.Exit(1)
