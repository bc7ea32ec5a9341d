"""The page's parts on single runs: how fast they were, what went wrong, and how they were made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from retort.console import format_count
from retort.report.curves import ModelCurve
from retort.report.frame import cell, foldable, head, note, row, table
from retort.report.wording import THIN, percent, seconds, warnings

DASH = "\N{EN DASH}"

SPEED = (
    "Tokens per second while decoding, all slots together; prefill is reading a problem's prompt, "
    "once for all its completions; scoring is judging one completion. Replay against clock is what "
    "the replay foretells of the run itself, over the decode time that was measured."
)


def speed(models: Sequence[ModelCurve]) -> str:
    """How fast each model was, and what the time was spent on besides decoding."""
    rows = [(model, _speed_values(model)) for model in models]
    columns = list(dict.fromkeys(name for _, values in rows for name in values))
    return note(SPEED) + table(
        head("Model", *columns),
        (
            row(model.name, (cell(name, values.get(name, DASH)) for name in columns))
            for model, values in rows
        ),
    )


def _speed_values(model: ModelCurve) -> dict[str, str]:
    """Without what nobody measured or said."""
    values = {
        "Tokens/s": format_count(model.tokens_per_second),
        "Slots": str(model.slots),
        "Tokens per completion": format_count(round(model.mean_tokens)),
        "Prefill": seconds(model.prefill_seconds),
    }
    values |= {f"Scoring by {name}": seconds(s) for name, s in model.scoring_seconds.items()}
    if model.replay_ratio is not None:
        values["Replay against clock"] = f"{model.replay_ratio:.2f}"
    if model.price is not None:
        values["Price of an hour"] = f"{model.price:g}"
    return values


def failures(models: Sequence[ModelCurve]) -> str:
    """Lengths, and the shares of completions that say little of a model."""
    titles = _failure_values(models[0])
    rows = (
        row(model.name, [cell(*each) for each in _failure_values(model).items()])
        for model in models
    )
    told = (line for model in models for line in warnings(model))
    warned = "".join(note(f"Warning: {line}") for line in told)
    return table(head("Model", *titles), rows) + warned


def _failure_values(model: ModelCurve) -> dict[str, str]:
    return {
        "Tokens per completion": format_count(round(model.mean_tokens)),
        "Cut off at the length limit": f"{percent(model.truncated)}{THIN}%",
        "No answer found": f"{percent(model.unanswered)}{THIN}%",
        "Repeats of another text": f"{percent(model.duplicates)}{THIN}%",
        "Grader out of time": f"{percent(model.timeouts)}{THIN}%",
    }


def facts(models: Sequence[ModelCurve]) -> str:
    """Device, versions and recipe of each run."""
    return "".join(map(_facts, models))


def _facts(model: ModelCurve) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in model.versions.items())
    facts = f"{model.device}, {model.slots} slots, {versions}"
    summary = f'<b>{escape(model.name)}</b> <span class="note">{escape(facts)}</span>'
    return foldable(summary, json.dumps(model.recipe, indent=2, ensure_ascii=False))
