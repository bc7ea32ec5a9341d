"""The results of each kind of measurement as tables and charts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from retort.bench import decode, prefill, targets, training
from retort.bench.head import Head
from retort.bench.models import Sizes
from retort.bench.view import Chart, Column, Grid, Point, View
from retort.console import format_count, format_seconds

T = TypeVar("T")

PROMPTS = {"own": "prompts of their own", "shared": "one prompt for all rows"}


# ---------------------------------------------------------------- decode


def of_decode(result: decode.Decode) -> View:
    """Models and prefill, then a table for each way that rows have prompts."""
    kinds = list(dict.fromkeys(row.prompts for row in result.rows))
    decoded = [
        _decoded([row for row in result.rows if row.prompts == kind], result) for kind in kinds
    ]
    charts = [
        _decode_chart(
            result, "rate", "tokens a second", "~s", True, lambda row, ms: row.batch / ms * 1000
        ),
        _decode_chart(result, "step", "milliseconds a step", "~g", True, lambda row, ms: ms),
        _decode_chart(
            result,
            "limit",
            "share of what memory allows",
            "~%",
            False,
            lambda row, ms: row.of_limit * row.ms_per_step / ms,
        ),
    ]
    title = f"decode, {result.protocol.whole}, {_place(result.head)}"
    grids = [_models(result.head), _prefills(result), *decoded]
    return View(title, grids, charts if result.rows else [], result.notes)


def _decoded(rows: Sequence[decode.Row], result: decode.Decode) -> Grid:
    """One table; its ratios are to the first contender at the same batch size."""
    first = {row.batch: row.tokens_per_second for row in reversed(rows)}
    bandwidths = sorted(row.bandwidth for row in rows)
    low, high = (f"{1e-9 * each:.3g}" for each in (bandwidths[0], bandwidths[-1]))
    found = low if low == high else f"{low} to {high}"
    caption = (
        f"limit: the share of {found} GB/s, the copy bandwidth measured meanwhile, that the bytes "
        "of the cost model take; what stays in caches can beat it"
    )
    return Grid(
        f"decode, {PROMPTS[rows[0].prompts]}, {replace(result.protocol, steps=rows[0].steps)}",
        _columns(
            rows,
            ("model", 0, lambda row: row.contender),
            ("batch", 0, lambda row: str(row.batch)),
            ("ms/step", 2, lambda row: f"{row.ms_per_step:.3g}"),
            ("tokens/s", 0, lambda row: f"{row.tokens_per_second:,.0f}"),
            ("spread", 5, lambda row: f"{row.spread:.0%}"),
            ("GB/s", 4, lambda row: f"{row.gb_per_second:.3g}"),
            ("limit", 3, lambda row: f"{row.of_limit:.0%}"),
            ("state", 6, lambda row: _bytes(row.state_bytes)),
            ("ratio", 1, lambda row: f"{row.tokens_per_second / first[row.batch]:.2f}x"),
        ),
        caption,
    )


def _decode_chart(
    result: decode.Decode,
    id: str,
    title: str,
    format: str,
    log: bool,
    value: Callable[[decode.Row, float], float],
) -> Chart:
    """A quantity that follows from a row's milliseconds of a step, against the batch size."""
    points = []
    for row in result.rows:
        repeats = [value(row, 1000 * sum(run) / row.steps) for run in row.seconds]
        middle = value(row, row.ms_per_step)
        style = PROMPTS[row.prompts]
        points.append(Point(row.contender, style, row.batch, middle, min(repeats), max(repeats)))
    return Chart(id, title.capitalize(), "rows at once (log scale)", title, points, format, log)


def _prefills(result: decode.Decode) -> Grid:
    prompt = result.protocol.prompt
    return Grid(
        f"prefill of one prompt, {prompt} tokens",
        _columns(
            result.prefills,
            ("model", 0, lambda each: each.contender),
            ("time", 0, lambda each: format_seconds(each.median)),
            ("tokens/s", 1, lambda each: f"{prompt / each.median:,.0f}"),
        ),
    )


# ---------------------------------------------------------------- prefill


def of_prefill(result: prefill.Prefill) -> View:
    """Speed at each length, then how often a prompt is read."""
    read = Grid(
        "prefill, one prompt",
        _columns(
            result.rows,
            ("model", 0, lambda row: row.contender),
            ("tokens", 0, lambda row: str(row.length)),
            ("time", 2, lambda row: format_seconds(row.length / row.tokens_per_second)),
            ("tokens/s", 0, lambda row: f"{row.tokens_per_second:,.0f}"),
            ("spread", 4, lambda row: f"{row.spread:.0%}"),
            ("GFLOP/s", 1, lambda row: f"{1e-9 * row.flops_per_second:,.0f}"),
            ("MFU", 3, lambda row: _share(row.utilisation)),
        ),
    )
    grids = [_models(result.head), read]
    if result.shared:
        grids.append(_shared(result.shared))
    rates = [(row, [row.length / each for each in row.seconds]) for row in result.rows]
    points = [
        Point(row.contender, "", row.length, row.tokens_per_second, min(runs), max(runs))
        for row, runs in rates
    ]
    chart = Chart("prefill", "Prefill", "tokens of the prompt (log scale)", "tokens/s", points)
    title = f"prefill, {_place(result.head)}"
    return View(title, grids, [chart] if points else [], result.notes)


def _shared(found: Sequence[prefill.Shared]) -> Grid:
    return Grid(
        f"prefill for {found[0].n} completions of one prompt, {found[0].length} tokens",
        _columns(
            found,
            ("model", 0, lambda each: each.contender),
            ("tokens read", 0, lambda each: f"{each.tokens:,}"),
            ("prompts", 0, lambda each: f"{each.prompts:.3g}"),
            ("time", 1, lambda each: format_seconds(sorted(each.seconds)[len(each.seconds) // 2])),
        ),
    )


# ---------------------------------------------------------------- training


def of_training(result: training.Training) -> View:
    """Speed and memory of forward and backward."""
    learnt = Grid(
        "forward and backward",
        _columns(
            result.rows,
            ("model", 0, lambda row: row.contender),
            ("rows", 5, lambda row: str(row.rows)),
            ("tokens", 1, lambda row: str(row.length)),
            ("tokens/s", 0, lambda row: f"{row.tokens_per_second:,.0f}"),
            ("spread", 6, lambda row: f"{row.spread:.0%}"),
            ("GFLOP/s", 2, lambda row: f"{1e-9 * row.flops_per_second:,.0f}"),
            ("MFU", 4, lambda row: _share(row.utilisation)),
            ("memory", 1, lambda row: _bytes(row.peak_bytes)),
            ("planned", 3, lambda row: _bytes(row.planned_bytes)),
        ),
        "memory: what is allocated beyond the weights, at most; planned: what --plan says of it",
    )
    return View(f"train, {_place(result.head)}", [_models(result.head), learnt], [], result.notes)


# ---------------------------------------------------------------- targets


def of_targets(result: targets.Targets) -> View:
    """A line for each target."""
    shown = Grid(
        "targets",
        _columns(
            result.targets,
            ("what", 0, lambda each: each.what),
            ("target", 1, lambda each: f"{each.at_least:g}x"),
            ("measured", 0, lambda each: "-" if each.measured is None else f"{each.measured:.2f}x"),
            ("", 0, lambda each: {True: "met", False: "missed", None: "-"}[each.met]),
            ("repeats", 3, lambda each: _range(each.runs)),
            ("how", 2, lambda each: each.how),
        ),
    )
    return View(f"targets, {_place(result.head)}", [shown], [], result.notes)


def _range(runs: Sequence[float]) -> str:
    return f"{min(runs):.2f}-{max(runs):.2f}" if len(runs) > 1 else ""


# ---------------------------------------------------------------- shared


def _columns(rows: Sequence[T], *columns: tuple[str, int, Callable[[T], str]]) -> list[Column]:
    """A column for each heading, rank and way to make a cell of a row."""
    return [Column(heading, [cell(row) for row in rows], rank) for heading, rank, cell in columns]


def _models(head: Head) -> Grid:
    return Grid(
        "models",
        _columns(
            head.models,
            ("model", 0, lambda each: each.name),
            ("parameters", 0, lambda each: format_count(each.parameters)),
            ("dtype", 3, lambda each: each.dtype),
            ("layers", 2, _layers),
            ("state", 1, lambda each: _bytes(each.state_bytes)),
            ("KV/token", 1, lambda each: _bytes(each.kv_bytes_per_token)),
        ),
    )


def _layers(each: Sizes) -> str:
    kinds = {"attention": each.attention_layers, each.mixer or "": each.linear_layers}
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)


def _place(head: Head) -> str:
    here = head.machine
    threads = (
        f", {here.threads} thread{'s' * (here.threads > 1)}" if here.device == here.cpu else ""
    )
    return f"{here.device}{threads}"


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{format_count(count)}B"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
