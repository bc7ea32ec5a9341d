"""The ways of giving one answer, as the report names them: coverage, majority, and the choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retort.report.curves import ModelCurve
from retort.report.metrics import Estimate

COVERAGE, MAJORITY = "coverage", "majority"


@dataclass(frozen=True)
class Rule:
    """A rule by its name in the data, its title, what its accuracy is, and the scorer it needs."""

    name: str
    title: str
    meaning: str
    scorer: str | None = None


BASIC = (
    Rule(COVERAGE, "Coverage", "share of problems with at least one right completion"),
    Rule(MAJORITY, "Majority vote", "share of problems on which the most frequent answer is right"),
)


def rules(models: Sequence[ModelCurve]) -> tuple[Rule, ...]:
    """Coverage, majority, and every choice that some model has, in that order."""
    found = {rule.name: rule for rule in BASIC}
    for model in models:
        for choice in model.choices:
            title = choice.name[:1].upper() + choice.name[1:]
            by = "the answer with the most weight" if choice.votes else "the best scored answer"
            meaning = f"share of problems on which {by} is right"
            found.setdefault(choice.name, Rule(choice.name, title, meaning, choice.scorer))
    return tuple(found.values())


def accuracies(model: ModelCurve, rule: str) -> list[Estimate]:
    """A model's accuracy by a rule at each of its points; empty where it has not that rule."""
    if rule == COVERAGE:
        return [point.coverage for point in model.points]
    if rule == MAJORITY:
        return [point.majority for point in model.points]
    at = {
        point.k: point.accuracy
        for choice in model.choices
        if choice.name == rule
        for point in choice.points
    }
    return [at[point.k] for point in model.points] if at else []
