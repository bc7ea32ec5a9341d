"""A plan as tables for a terminal of 80 columns."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from retort import console
from retort.train.gpus import gpu
from retort.train.plan import Plan, StagePlan

_NAME = 12
"""Cells of a stage's name."""


def tables(plan: Plan) -> list[Table]:
    """The whole, the work of each stage, and the memory of one process in each."""
    return [_summary(plan), _work(plan), _memory(plan)]


def _summary(plan: Plan) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    teacher = "none" if plan.teacher is None else f"{plan.teacher:,}"
    rows = [
        ("parameters", f"student {plan.student:,}, teacher {teacher}"),
        ("tokens", f"{console.format_count(plan.tokens)} in {_steps(plan)} steps"),
        ("FLOPs", _flops(plan)),
        ("runs on", _machine(plan)),
        ("time", _time(plan)),
        ("memory", _fullest(plan)),
        ("host", f"{_bytes(plan.saving)} of each process, while a state is written"),
        ("disk", _disk(plan)),
        *(("note", console.printable(note)) for note in plan.notes),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _steps(plan: Plan) -> str:
    return f"{sum(stage.steps for stage in plan.stages):,}"


def _flops(plan: Plan) -> str:
    teacher = sum(stage.flops.teacher for stage in plan.stages)
    again = sum(stage.flops.recomputed for stage in plan.stages)
    shares = f"{teacher / plan.flops:.0%} the teacher's, {again / plan.flops:.0%} computed again"
    return f"{plan.flops:.3g} ({shares})"


def _machine(plan: Plan) -> str:
    if plan.gpu is None:
        return f"{plan.processes} process on a CPU"
    peak = f"{plan.utilisation:.0%} of {gpu(plan.gpu).tflops:g} TFLOP/s"
    return f"{plan.processes} x {plan.gpu}, at {peak}"


def _time(plan: Plan) -> str:
    if plan.hours is None:
        return "not known for a CPU"
    total = console.format_seconds(3600 * plan.hours)
    return f"{total}, {plan.processes * plan.hours:.3g} GPU-hours"


def _fullest(plan: Plan) -> str:
    most = _most(plan)
    if plan.gpu is None:
        return _bytes(most)
    room = gpu(plan.gpu).usable_bytes
    verdict = "fits" if most <= room else "does NOT fit: lower micro_rows, recompute, or take more"
    return f"{_bytes(most)} of the {_bytes(room)} that a GPU has for it: {verdict}"


def _disk(plan: Plan) -> str:
    disk = plan.disk
    states = f"states {_bytes(disk.states)} ({_bytes(disk.state)} each)"
    return f"{_bytes(disk.total)}: {states}, students {_bytes(disk.students)}"


def _work(plan: Plan) -> Table:
    table = Table("stage", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("trained", "tokens", "steps", "a step", "FLOPs", "hours"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(
            _name(stage),
            console.format_count(stage.trainable),
            console.format_count(stage.tokens),
            f"{stage.steps:,}",
            console.format_count(stage.tokens_per_step),
            f"{stage.flops.total:.3g}",
            "-" if stage.hours is None else f"{stage.hours:.3g}",
        )
    return table


def _memory(plan: Plan) -> Table:
    unit = "GiB" if _most(plan) >= 2**30 else "MiB"
    table = Table(unit, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    parts = ("weights", "grads", "AdamW", "whole", "teacher", "activ.", "logits", "total")
    for name in parts:
        table.add_column(name, justify="right", no_wrap=True)
    for stage in plan.stages:
        need = stage.memory
        shown = (
            need.weights,
            need.gradients,
            need.moments,
            need.gathered,
            need.teacher,
            need.activations,
            need.logits,
            need.total,
        )
        scale = 2**30 if unit == "GiB" else 2**20
        table.add_row(_name(stage), *(_figures(count / scale) for count in shown))
    return table


def _name(stage: StagePlan) -> str:
    """A stage's name, cut to leave room for numbers."""
    return stage.name if len(stage.name) <= _NAME else f"{stage.name[: _NAME - 1]}…"


def _most(plan: Plan) -> int:
    return max(stage.memory.total for stage in plan.stages)


def _bytes(count: float) -> str:
    gib = count / 2**30
    return f"{_figures(gib)} GiB" if gib >= 1 else f"{_figures(count / 2**20)} MiB"


def _figures(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}"
