"""One self-contained HTML page of training runs; what others wrote is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape

from retort._version import __version__
from retort.console import format_count
from retort.report import plots, training_plots
from retort.report.frame import cell, charts, foldable, page, row, section, table
from retort.report.reading import MARKS
from retort.report.training import StageCurves, Training
from retort.report.training_plots import Panel
from retort.report.wording import THIN, last_loss, percent, training_summary

METHOD = (
    "All curves are drawn against the tokens that were trained on. Where a stage has more steps "
    "than a curve has points, a line is the mean of neighbouring steps, and its band reaches from "
    "the least to the greatest of them.",
    "Crosses at the foot of a chart are steps whose loss or gradient was not finite, and which "
    "were not taken; triangles are steps whose loss was far above those before. At most "
    f"{MARKS} of a stage are marked, its first ones; the table counts all.",
    "Coverage is the share of problems with at least one right answer among those that the student "
    "wrote, and accuracy the share of answers that are right. The problems and the random streams "
    "are the same in each evaluation.",
)


def render(trainings: Sequence[Training]) -> str:
    """The page as HTML text."""
    parts = {
        "Answers": training_plots.answers(trainings),
        "Loss": training_plots.losses(trainings),
        "Layers": training_plots.layers(trainings),
        "Optimisation": training_plots.optimisation(trainings),
        "Speed and memory": training_plots.speed(trainings),
    }
    specs = {panel.id: panel.spec() for panels in parts.values() for panel in panels}
    title = f"Retort training: {_title(trainings)}"
    width = plots.name_width(each.name for each in trainings)
    return page(title, _body(trainings, parts), specs, width)


def _body(trainings: Sequence[Training], parts: dict[str, list[Panel]]) -> Iterator[str]:
    title = escape(_title(trainings))
    yield f'<header><p class="eyebrow">Retort training</p><h1>{title}</h1></header>'
    yield section("Summary", _summary(trainings))
    for heading, panels in parts.items():
        if panels:
            yield section(heading, charts(panel.id for panel in panels))
    yield section("Stages", _stages(trainings))
    yield section("Recipes", "".join(map(_recipe, trainings)))
    yield section("Method", "".join(f"<p>{escape(sentence)}</p>" for sentence in METHOD))
    made = f"Retort {__version__}, {datetime.now(UTC).isoformat(timespec='seconds')}"
    yield f"<footer>{escape(made)}</footer>"


def _title(trainings: Sequence[Training]) -> str:
    if len(trainings) > 2:
        return f"{len(trainings)} training runs"
    return " and ".join(each.name for each in trainings)


def _summary(trainings: Sequence[Training]) -> str:
    return table(_head("Run", *training_summary(trainings[0])), map(_summary_row, trainings))


def _summary_row(training: Training) -> str:
    return row(training.name, [cell(*each) for each in training_summary(training).items()])


def _stages(trainings: Sequence[Training]) -> str:
    head = _head(
        "Run and stage", "Steps", "Tokens", "Last loss", "Skipped", "Spikes", "Data", "Unused rows"
    )
    return table(head, (_stage_row(each, stage) for each in trainings for stage in each.stages))


def _stage_row(training: Training, stage: StageCurves) -> str:
    cells = {
        "Steps": f"{stage.steps:,}",
        "Tokens": format_count(stage.end - stage.start),
        "Last loss": last_loss(stage),
        "Skipped": str(stage.skipped),
        "Spikes": str(stage.spikes),
        "Data": _sources(stage.data),
        "Unused rows": ", ".join(f"{count:,.0f} {why}" for why, count in stage.unused.items()),
    }
    return row(f"{training.name}, {stage.name}", [cell(*each) for each in cells.items()])


def _sources(data: dict[str, float]) -> str:
    """Sources with their shares of the tokens."""
    total = sum(data.values()) or 1.0
    return ", ".join(f"{name} {percent(value / total)}{THIN}%" for name, value in data.items())


def _head(*titles: str) -> str:
    return f"<tr>{''.join(f'<th>{escape(title)}</th>' for title in titles)}</tr>"


def _recipe(training: Training) -> str:
    text = json.dumps(training.recipe, indent=2, ensure_ascii=False)
    return foldable(f"<b>{escape(training.name)}</b>", text)
