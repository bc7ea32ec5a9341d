"""The page's tables of models against the reference, and of what a Pareto front is made of.

What is asked first, coverage and majority, stands open; other rules open at a click.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from retort.report import front_plots
from retort.report.comparisons import Candidate, Crossover, Difference, SpeedUp
from retort.report.curves import Curves
from retort.report.frame import cell, estimate_cell, folded, head, row, table, words
from retort.report.rules import BASIC, Rule, rules
from retort.report.wording import THIN, interval, percent, points, seconds, times

DASH = "\N{EN DASH}"


def _by_rule(curves: Curves, named: set[str], table_of: Callable[[Sequence[Rule]], str]) -> str:
    """A table of the basic rules, and one of the others, of those that are named."""
    found = [rule for rule in rules(curves.models) if rule.name in named]
    others = [rule for rule in found if rule not in BASIC]
    basic = [rule for rule in found if rule in BASIC]
    more = folded("By other ways of choosing", table_of(others)) if others else ""
    return (table_of(basic) if basic else "") + more


def front(curves: Curves) -> str:
    """The candidates on each rule's front, fastest first."""

    def of(rules: Sequence[Rule]) -> str:
        found = [(rule, each) for rule in rules for each in front_plots.front(curves, rule)]
        rows = (row(rule.title, _on_front(each)) for rule, each in found)
        return table(
            head("Rule", "Model", "k", "Slots", "Time", "Accuracy", "Kept", worded=2), rows
        )

    return _by_rule(curves, {each.rule for each in curves.comparisons.candidates}, of)


def _on_front(each: Candidate) -> list[str]:
    return [
        words("Model", each.name),
        cell("k", str(each.k)),
        cell("Slots", str(each.slots)),
        cell("Time", seconds(each.seconds)),
        cell("Accuracy", interval(each.accuracy)),
        cell("Kept", f"{percent(each.kept)}{THIN}%"),
    ]


def speed_ups(curves: Curves) -> str:
    """How much faster each model is than the reference at each of its accuracies."""
    found = curves.comparisons.speed_ups
    names = list(dict.fromkeys(each.name for each in found))
    at = f"k of {curves.comparisons.reference}"

    def of(rules: Sequence[Rule]) -> str:
        rows = (
            row(rule.title, _speed_up(by_name, names, k, at))
            for rule in rules
            for k, by_name in _by_k(each for each in found if each.rule == rule.name).items()
        )
        return table(head("At equal", at, "Accuracy", *names), rows)

    return _by_rule(curves, {each.rule for each in found}, of)


def _by_k(found: Iterable[SpeedUp]) -> dict[int, dict[str, SpeedUp]]:
    rows: dict[int, dict[str, SpeedUp]] = {}
    for each in found:
        rows.setdefault(each.reference_k, {})[each.name] = each
    return rows


def _speed_up(by_name: dict[str, SpeedUp], names: Sequence[str], k: int, at: str) -> Iterator[str]:
    accuracy = next(iter(by_name.values())).accuracy
    yield cell(at, str(k))
    yield cell("Accuracy", f"{percent(accuracy)}{THIN}%")
    for name in names:
        yield _times(by_name[name]) if name in by_name else cell(name, DASH)


def _times(each: SpeedUp) -> str:
    reached = f"reached in {percent(each.reached)}{THIN}%"
    if each.times is None:
        return estimate_cell(each.name, "not reached", reached)
    spread = f"{times(each.times.low)}{DASH}{times(each.times.high)}"
    remark = spread if each.reached == 1 else f"{spread}, {reached}"
    return estimate_cell(each.name, times(each.times.value), remark)


def crossovers(curves: Curves) -> str:
    """From which time on each model is ahead of the reference."""
    found = curves.comparisons.crossovers

    def of(rules: Sequence[Rule]) -> str:
        rows = (
            row(each.name, _crossed(rule, each))
            for rule in rules
            for each in found
            if each.rule == rule.name
        )
        return table(
            head("Model", "Rule", "Ahead from", "Compared", "Ahead at the end", worded=2), rows
        )

    return _by_rule(curves, {each.rule for each in found}, of)


def _crossed(rule: Rule, each: Crossover) -> list[str]:
    return [
        words("Rule", rule.title),
        estimate_cell("Ahead from", *_from(each)),
        cell("Compared", f"{seconds(each.first)} to {seconds(each.last)}"),
        cell("Ahead at the end", f"in {percent(each.ahead)}{THIN}% of resamples"),
    ]


def _from(each: Crossover) -> tuple[str, str]:
    if each.seconds is None:
        return "not ahead", ""
    spread = f"{seconds(each.seconds.low)} to {seconds(each.seconds.high)}"
    if each.seconds.value <= each.first:
        return "throughout", spread
    return seconds(each.seconds.value), spread


def differences(curves: Curves, ks: Sequence[int]) -> str:
    """What each model's accuracy is beyond the reference's with as many completions."""
    found = [each for each in curves.comparisons.differences if each.k in ks]

    def of(rules: Sequence[Rule]) -> str:
        rows: dict[tuple[str, str], dict[int, Difference]] = {}
        for rule in rules:
            for each in found:
                if each.rule == rule.name:
                    rows.setdefault((each.name, rule.title), {})[each.k] = each
        lines = (row(name, _beyond(title, by_k, ks)) for (name, title), by_k in rows.items())
        return table(head("Model", "Rule", *(f"k = {k}" for k in ks), worded=2), lines)

    return _by_rule(curves, {each.rule for each in found}, of)


def _beyond(rule: str, by_k: dict[int, Difference], ks: Sequence[int]) -> Iterator[str]:
    yield words("Rule", rule)
    for k in ks:
        if k not in by_k:
            yield cell(f"k = {k}", DASH)
            continue
        by = by_k[k].by
        spread = f"{points(by.low)} to {points(by.high)}"
        yield estimate_cell(f"k = {k}", points(by.value), spread)
