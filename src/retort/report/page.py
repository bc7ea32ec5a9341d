"""One self-contained HTML page of the curves; what others wrote is escaped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from retort.console import format_count
from retort.report import (
    choices_page,
    comparisons_page,
    completions_page,
    explorer,
    front_plots,
    plots,
    reliability_plots,
    runs_page,
)
from retort.report.completions import Completions
from retort.report.curves import Curves, ModelCurve
from retort.report.frame import (
    cell,
    charts,
    contents,
    estimate_cell,
    folded,
    note,
    page,
    row,
    section,
    spec,
    table,
)
from retort.report.metrics import Estimate
from retort.report.rules import BASIC
from retort.report.wording import (
    THIN,
    advantages,
    budget_note,
    headline,
    percent,
    seconds,
    shared_ks,
    votes_note,
)

COLUMNS = (1, 8, 64)  # completions per problem in the summary
TRAINING = "training.html"
DASH = "\N{EN DASH}"

METHOD = (
    "Coverage at k is the chance that at least one of k completions is right, and majority at k "
    "the chance that the most frequent answer among them is, ties shared; both are averages over "
    "all sets of k samples of a problem, and then over the problems.",
    "The time for k completions is k times the mean length of a completion, divided by the tokens "
    "per second measured while sampling, all slots together; it counts decoding only, not reading "
    "the prompt. Replayed time lets the stored completions, each with its own length, run through "
    "the slots again with the times that steps of so many rows took.",
    f"Intervals are 95{THIN}% over problems, by Wilson's formula with fewer than 100 problems and "
    "else by a bootstrap that draws the same problems for every model; they say how much another "
    "draw of problems could change a number, not another training run.",
)
FRONT = (
    "Small marks are every model with every k and number of slots; on the line are those that no "
    "other beats in both. Kept is the share of resamples of the problems in which a candidate "
    "stays on the front."
)
SPEED_UPS = (
    "How many times as fast a model reaches the accuracy that the reference has with k "
    "completions, with intervals over the resamples of the problems in which it does reach it."
)
CROSSOVERS = (
    "The time per problem from which on a model is ahead of the reference, up to the last time "
    "that both have samples for."
)
DIFFERENCES = (
    "Percentage points of accuracy beyond the reference's with as many completions, paired over "
    "problems: what another training gained or lost, whatever it costs to run."
)
STOPPING = (
    "Stored samples in random orders, a window at a time: after each window the rule decides "
    "whether to draw more, and the answer is the majority of what was drawn (by confidence: votes "
    "weighted by the mean probability of their tokens). Spared is against the fixed k whose "
    "majority is as accurate."
)
RELIABILITY = (
    "The share of completions that were right, at the mean of their scores, in ten bins; on the "
    "dashed line a score is the probability of being right. Calibration error is the mean distance "
    "from it. Ranking is the chance that a right completion scores above a wrong one: a half is "
    "worth nothing, whatever the scale."
)


@dataclass(frozen=True)
class Section:
    """A heading, and HTML under it."""

    title: str
    content: str


def render(curves: Curves, shown: Completions, training: bool = False) -> str:
    """The page as HTML text.

    shown: completions for its browser. training: whether training.html lies beside the page.
    """
    scripts = {"explorer": explorer.data(curves), "completions": completions_page.data(shown)}
    return page(
        f"Retort report: {_title(curves)}",
        _body(curves, list(_sections(curves, shown, training))),
        dict(_specs(curves)),
        plots.name_width(model.name for model in curves.models),
        scripts,
        [f"{name}.js" for name in scripts],
    )


def _body(curves: Curves, sections: list[Section]) -> Iterator[str]:
    yield _header(curves)
    yield contents(each.title for each in sections)
    for each in sections:
        yield section(each.title, each.content)
    made = f"Retort {curves.retort}, grader {curves.grader}, {curves.created}"
    yield f"<footer>{escape(made)}</footer>"


def _specs(curves: Curves) -> Iterator[tuple[str, Any]]:
    for rule in front_plots.offered(curves):
        chart = front_plots.panel(curves, rule).properties(title=rule.title)
        yield f"front-{rule.name}", spec(chart)
    for i, scorer in enumerate(reliability_plots.scorers(curves)):
        chart = reliability_plots.panel(curves, scorer).properties(title=scorer)
        yield f"reliability-{i}", spec(chart)


def _sections(curves: Curves, shown: Completions, training: bool) -> Iterator[Section]:
    models, ks = curves.models, shared_ks(curves.models, COLUMNS)
    yield Section("Accuracy and its cost", explorer.content(curves))
    yield Section("Summary", _budget(curves) + _summary(curves, ks))
    yield from _compared(curves)
    yield Section("Choosing one answer", choices_page.choosing(models, ks))
    if reliability_plots.scorers(curves):
        yield Section("What scores are worth", _reliability(curves))
    if all(model.stopping for model in models):
        yield Section("Stopping early", note(STOPPING) + choices_page.stopping(models))
    yield Section("Speed", runs_page.speed(models))
    yield Section("Lengths and failures", runs_page.failures(models))
    if training:
        link = f'<a href="{TRAINING}">Losses, evaluations and speed of the training runs</a>'
        yield Section("Training", f"<p>{link}</p>")
    yield Section("Completions", completions_page.content(shown))
    yield Section("How it was run", runs_page.facts(models))
    yield Section("Method", "".join(f"<p>{escape(sentence)}</p>" for sentence in METHOD))


def _compared(curves: Curves) -> Iterator[Section]:
    found = curves.comparisons
    if found.candidates:
        drawn = charts(f"front-{rule.name}" for rule in front_plots.offered(curves))
        yield Section("Pareto front", note(FRONT) + drawn + _fronts(curves))
    if found.speed_ups:
        table = comparisons_page.speed_ups(curves)
        yield Section("Speed at equal accuracy", note(SPEED_UPS) + table)
    if found.crossovers:
        yield Section("Crossovers", note(CROSSOVERS) + comparisons_page.crossovers(curves))
    if found.differences:
        ks = sorted({each.k for each in found.differences})
        wanted = [k for k in ks if k in COLUMNS] or ks
        differences = comparisons_page.differences(curves, wanted)
        yield Section(f"Differences to {found.reference}", note(DIFFERENCES) + differences)


def _fronts(curves: Curves) -> str:
    return folded("The fronts as a table", comparisons_page.front(curves))


# The parts


def _title(curves: Curves) -> str:
    if len(curves.models) > 2:
        return f"{len(curves.models)} models, one time budget"
    return " and ".join(model.name for model in curves.models)


def _header(curves: Curves) -> str:
    samples = " or ".join(map(str, sorted({model.samples for model in curves.models})))
    facts = f"Retort report · {curves.models[0].problems} problems · {samples} completions each"
    told = advantages(curves)
    more = f'<p class="lead">{escape(told)}</p>' if told else ""
    return (
        f'<header><p class="eyebrow">{facts}</p><h1>{escape(_title(curves))}</h1>'
        f'<p class="lead">{escape(headline(curves))}</p>{more}</header>'
    )


def _budget(curves: Curves) -> str:
    brackets = f"In brackets: 95{THIN}% intervals."
    return note(f"{budget_note(curves.comparison)} {votes_note(curves.comparison)} {brackets}")


def _reliability(curves: Curves) -> str:
    scorers = reliability_plots.scorers(curves)
    drawn = charts(f"reliability-{i}" for i in range(len(scorers)))
    return note(RELIABILITY) + drawn + choices_page.judged(curves.models)


def _summary(curves: Curves, ks: list[int]) -> str:
    measures = "".join(f'<th colspan="{len(ks)}">{rule.title}, k =</th>' for rule in BASIC)
    numbers = "".join(f"<th>{k}</th>" for k in [*ks, *ks])
    headings = (
        f'<tr><th rowspan="2">Model</th><th rowspan="2">Parameters</th>{measures}'
        f'<th rowspan="2">Tokens/s</th><th rowspan="2">Time per problem,<br>k = {ks[-1]}</th></tr>'
        f"<tr>{numbers}</tr>"
    )
    return table(headings, (_summary_row(model, ks) for model in curves.models))


def _summary_row(model: ModelCurve, ks: list[int]) -> str:
    points = {point.k: point for point in model.points}
    cells = [
        cell("Parameters", format_count(model.parameters)),
        *(_estimate_cell(f"Coverage, k = {k}", points[k].coverage) for k in ks),
        *(_estimate_cell(f"Majority vote, k = {k}", points[k].majority) for k in ks),
        cell("Tokens/s", format_count(model.tokens_per_second)),
        cell(f"Time per problem, k = {ks[-1]}", seconds(points[ks[-1]].seconds)),
    ]
    return row(model.name, cells)


def _estimate_cell(label: str, estimate: Estimate) -> str:
    spread = f"{percent(estimate.low)}{DASH}{percent(estimate.high)}"
    return estimate_cell(label, f"{percent(estimate.value)}{THIN}%", spread)
