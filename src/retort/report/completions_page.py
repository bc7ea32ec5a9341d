"""The page's browser of completions: its controls, and what its script reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from retort.report.completions import VERDICTS, Completions, Problem
from retort.report.frame import note, select

ALL = ("", "all")
LONGEST_LABEL = 70  # letters
NO_SCRIPT = (
    '<noscript><p class="note">Browsing needs JavaScript; `retort runs` lists the folders whose '
    "completions these are.</p></noscript>"
)


def content(shown: Completions) -> str:
    """What is shown of how much, the controls, and the place of the list, as HTML."""
    return (
        f"{note(_told(shown))}{_controls(shown)}"
        '<p id="completions-status" class="note" role="status" aria-live="polite" tabindex="-1">'
        "</p>"
        '<ul id="completions-list" aria-label="Completions"></ul>'
        '<p id="completions-pager"><button type="button" value="back">Back</button> '
        f'<button type="button" value="on">Next</button></p>{NO_SCRIPT}'
    )


def data(shown: Completions) -> dict[str, Any]:
    """The completions as columns, which take less space than as many objects."""
    every, models = shown.completions, _models(shown)
    scorers = dict.fromkeys(scorer for each in every for scorer in each.scores)
    return {
        "models": models,
        "problems": [asdict(problem) for problem in shown.problems],
        "model": [models.index(each.model) for each in every],
        "problem": [each.problem for each in every],
        "sample": [each.sample for each in every],
        "steps": [each.steps for each in every],
        "tokens": [each.tokens for each in every],
        "cut": [int(each.cut) for each in every],
        "answer": [each.answer for each in every],
        "right": [int(each.right) for each in every],
        "verdict": [each.verdict for each in every],
        "method": [each.method for each in every],
        "scores": {name: [each.scores.get(name) for each in every] for name in scorers},
    }


def _told(shown: Completions) -> str:
    problems = _of(len(shown.problems), shown.all_problems, "problems")
    samples = _of(shown.samples, shown.all_samples, "completions")
    how = "evenly spaced by id, with the first completions of each; nobody picked them"
    part = (len(shown.problems), shown.samples) != (shown.all_problems, shown.all_samples)
    told = f"{problems}, {samples} of each model on each{f': {how}' if part else ''}."
    return told[:1].upper() + told[1:]


def _of(count: int, total: int, what: str) -> str:
    return f"all {total} {what}" if count == total else f"{count} of {total} {what}"


def _controls(shown: Completions) -> str:
    menus = (
        select("model", "Model", [ALL, *_numbered(_models(shown))]),
        select("problem", "Problem", [ALL, *_numbered(map(_label, shown.problems))]),
        select("verdict", "Verdict", [ALL, *((each, each) for each in VERDICTS)]),
        select("sort", "Order", _orders(shown)),
    )
    search = (
        '<label class="field"><span>Text</span><input type="search" name="text" autocomplete="off" '
        'placeholder="question, completion or answer"></label>'
    )
    return (
        '<form id="completions-controls" class="controls" aria-label="Which completions are shown">'
        f"{''.join(menus)}{search}</form>"
    )


def _orders(shown: Completions) -> Sequence[tuple[str, str]]:
    scorers = dict.fromkeys(name for each in shown.completions for name in each.scores)
    by_score = (
        (f"{way}:{name}", f"{title} by {name}")
        for name in scorers
        for way, title in (("high", "highest score"), ("low", "lowest score"))
    )
    fixed = (("problem", "by problem"), ("long", "longest first"), ("short", "shortest first"))
    return [*fixed, *by_score]


def _models(shown: Completions) -> list[str]:
    return list(dict.fromkeys(each.model for each in shown.completions))


def _label(problem: Problem) -> str:
    """What tells a problem from others in a menu."""
    text = f"{problem.id}: {' '.join(problem.question.split())}"
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"


def _numbered(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(str(i), name) for i, name in enumerate(names)]
