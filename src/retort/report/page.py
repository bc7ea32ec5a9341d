"""One self-contained HTML page of the curves; what others wrote is escaped."""

import json
from collections.abc import Iterator, Sequence
from html import escape

from retort.console import format_count
from retort.report import choices_page, plots
from retort.report.curves import Curves, Example, ModelCurve, Shown
from retort.report.frame import cell, charts, foldable, page, row, section, spec, table
from retort.report.metrics import Estimate
from retort.report.wording import (
    THIN,
    budget_note,
    headline,
    percent,
    seconds,
    shared_ks,
    votes_note,
    warnings,
)

COLUMNS = (1, 8, 32)  # completions per problem in the summary
METHOD = (
    "Coverage at k is the chance that at least one of k completions is right, and majority at k "
    "the chance that the most frequent answer among them is, ties shared; both are averages over "
    "all sets of k samples of a problem, and then over the problems.",
    "The time for k completions is k times the mean length of a completion, divided by the tokens "
    "per second measured while sampling, all slots together; it counts decoding only, not reading "
    "the prompt.",
    f"Intervals are 95{THIN}% over problems, by Wilson's formula with fewer than 100 problems and "
    "else by a bootstrap that draws the same problems for every model; they say how much another "
    "draw of problems could change a number, not another training run.",
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


def render(curves: Curves) -> str:
    """The page as HTML text."""
    specs = {
        f"{measure}-{axis}": spec(plots.panel(curves, measure, axis))
        for measure in plots.MEASURES
        for axis in plots.AXES
    }
    for i, scorer in enumerate(plots.scorers(curves)):
        specs[f"reliability-{i}"] = spec(plots.reliable(curves, scorer))
    title = f"Retort report: {_title(curves)}"
    return page(
        title, _body(curves), specs, plots.name_width(model.name for model in curves.models)
    )


# Sections


def _body(curves: Curves) -> Iterator[str]:
    yield _header(curves)
    yield section("Summary", _summary(curves))
    for measure, title in plots.MEASURES.items():
        yield section(title, _charts(measure))
    ks = shared_ks(curves.models, COLUMNS)
    yield section("Choosing one answer", choices_page.choosing(curves.models, ks))
    if scorers := plots.scorers(curves):
        yield section("What scores are worth", _reliability(curves, scorers))
    if all(model.stopping for model in curves.models):
        note = f'<p class="note">{escape(STOPPING)}</p>'
        yield section("Stopping early", note + choices_page.stopping(curves.models))
    yield section("Lengths and failures", _failures(curves))
    yield section("Examples", "".join(map(_example, curves.examples)))
    yield section("How it was run", "".join(map(_facts, curves.models)))
    yield section("Method", "".join(f"<p>{escape(sentence)}</p>" for sentence in METHOD))
    made = f"Retort {curves.retort}, grader {curves.grader}, {curves.created}"
    yield f"<footer>{escape(made)}</footer>"


def _title(curves: Curves) -> str:
    if len(curves.models) > 2:
        return f"{len(curves.models)} models, one time budget"
    return " and ".join(model.name for model in curves.models)


def _header(curves: Curves) -> str:
    samples = " or ".join(map(str, sorted({model.samples for model in curves.models})))
    facts = f"Retort report · {curves.models[0].problems} problems · {samples} completions each"
    notes = f"{budget_note(curves.comparison)} {votes_note(curves.comparison)}"
    return (
        f'<header><p class="eyebrow">{facts}</p><h1>{escape(_title(curves))}</h1>'
        f'<p class="lead">{escape(headline(curves))}</p><p class="note">{escape(notes)} '
        f"In brackets: 95{THIN}% intervals.</p></header>"
    )


def _charts(measure: plots.Measure) -> str:
    meaning = f"The {plots.MEANING[measure]}, against time and against k."
    return f'<p class="note">{meaning}</p>{charts(f"{measure}-{axis}" for axis in plots.AXES)}'


def _reliability(curves: Curves, scorers: Sequence[str]) -> str:
    names = ", ".join(scorers)
    note = f'<p class="note">{escape(f"Of {names}, in this order. {RELIABILITY}")}</p>'
    drawn = charts(f"reliability-{i}" for i in range(len(scorers)))
    return note + drawn + choices_page.judged(curves.models)


def _summary(curves: Curves) -> str:
    ks = shared_ks(curves.models, COLUMNS)
    measures = "".join(
        f'<th colspan="{len(ks)}">{title}, k =</th>' for title in plots.MEASURES.values()
    )
    numbers = "".join(f"<th>{k}</th>" for k in [*ks, *ks])
    head = (
        f'<tr><th rowspan="2">Model</th><th rowspan="2">Parameters</th>{measures}'
        f'<th rowspan="2">Tokens/s</th><th rowspan="2">Time per problem,<br>k = {ks[-1]}</th></tr>'
        f"<tr>{numbers}</tr>"
    )
    return table(head, (_summary_row(model, ks) for model in curves.models))


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


def _failures(curves: Curves) -> str:
    titles = _failure_values(curves.models[0])
    head = "".join(f"<th>{title}</th>" for title in ("Model", *titles))
    rows = (
        row(model.name, [cell(*each) for each in _failure_values(model).items()])
        for model in curves.models
    )
    told = (line for model in curves.models for line in warnings(model))
    warned = "".join(f'<p class="note">Warning: {escape(line)}</p>' for line in told)
    return table(f"<tr>{head}</tr>", rows) + warned


def _failure_values(model: ModelCurve) -> dict[str, str]:
    return {
        "Tokens per completion": format_count(round(model.mean_tokens)),
        "Cut off at the length limit": f"{percent(model.truncated)}{THIN}%",
        "No answer found": f"{percent(model.unanswered)}{THIN}%",
        "Repeats of another text": f"{percent(model.duplicates)}{THIN}%",
        "Grader out of time": f"{percent(model.timeouts)}{THIN}%",
    }


def _estimate_cell(label: str, estimate: Estimate) -> str:
    spread = f"{percent(estimate.low)}\N{EN DASH}{percent(estimate.high)}"
    value = f"{escape(percent(estimate.value))}{THIN}%<small>{escape(spread)}</small>"
    return f'<td data-label="{escape(label)}">{value}</td>'


def _example(example: Example) -> str:
    return (
        f'<article><h3>{escape(example.problem_id)}</h3><div class="text">'
        f'{escape(example.question)}</div><p class="note">Answer: {escape(example.answer)}</p>'
        f"{''.join(map(_completion, example.completions))}</article>"
    )


def _completion(shown: Shown) -> str:
    verdict = "right" if shown.correct else "wrong"
    found = "no answer found" if shown.answer is None else f"answered {shown.answer}"
    end = ", cut off" if shown.finish_reason == "length" else ""
    summary = (
        f'<b>{escape(shown.name)}</b>: <span class="{verdict}">{verdict}</span> '
        f'<span class="note">({escape(found)}, {shown.token_count} tokens{end})</span>'
    )
    return foldable(summary, shown.text)


def _facts(model: ModelCurve) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in model.versions.items())
    facts = f"{model.device}, {model.slots} slots, {versions}"
    summary = f'<b>{escape(model.name)}</b> <span class="note">{escape(facts)}</span>'
    return foldable(summary, json.dumps(model.recipe, indent=2, ensure_ascii=False))
