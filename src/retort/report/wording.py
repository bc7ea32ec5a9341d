"""The report in words: numbers for people, and the one sentence that says who is ahead."""

from retort.console import format_count, format_seconds
from retort.report.adaptive import Rule
from retort.report.comparisons import Comparisons, Crossover, SpeedUp
from retort.report.curves import Comparison, Curves, ModelCurve, Standing
from retort.report.metrics import Estimate
from retort.report.training import StageCurves, Training

MINUS = "\N{MINUS SIGN}"
THIN = "\N{NARROW NO-BREAK SPACE}"


def percent(share: float) -> str:
    """A share in whole percent, without the sign; never 0 or 100 unless it is exactly that."""
    if 0 < share <= 0.005:
        return "<1"
    return ">99" if 0.995 <= share < 1 else f"{100 * share:.0f}"


def interval(estimate: Estimate) -> str:
    """`87 % (80-92)`, with an en dash."""
    spread = f"{percent(estimate.low)}\N{EN DASH}{percent(estimate.high)}"
    return f"{percent(estimate.value)}{THIN}% ({spread})"


def seconds(s: float) -> str:
    """Like `console.format_seconds`, with two figures below ten milliseconds as well."""
    return format_seconds(s) if s >= 0.01 else f"{1000 * s:.2g} ms"


def whole_percent(share: float) -> str:
    """A share that may be negative, or above 1."""
    return f"{100 * share:.0f}{THIN}%".replace("-", MINUS)


def completions(k: float) -> str:
    """A mean number of completions: `1 completion`, `10.4 completions`."""
    shown = f"{k:.1f}".removesuffix(".0")
    return f"{shown} completion{'' if shown == '1' else 's'}"


def headline(curves: Curves) -> str:
    """Who covers how much in the common time, and whether the difference is more than chance."""
    leader, *others = curves.comparison.standings
    shares = [f"{leader.name} covers {interval(leader.coverage)} of the problems"]
    shares += [f"{other.name} {interval(other.coverage)}" for other in others]
    time = seconds(curves.comparison.seconds)
    sentence = f"In {time} of decoding per problem, {', '.join(shares)}."
    return f"{sentence} {_lead(leader, others[0])}" if others else sentence


def _lead(leader: Standing, second: Standing) -> str:
    ahead = second.behind
    points = f"{_points(ahead.value)} percentage points"
    spread = f"({_points(ahead.low)} to {_points(ahead.high)})"
    if ahead.low <= 0:
        return f"The difference to {second.name}, {points} {spread}, could be chance."
    return f"{leader.name} leads {second.name} by {points} {spread}."


def _points(share: float) -> str:
    shown = f"{100 * share:.1f}"
    return shown.replace("-", MINUS) if float(shown) else "0.0"


def budget_note(comparison: Comparison) -> str:
    """How the budget of the headline came about, and what each model does with it."""
    first, *others = comparison.standings
    made = [f"{first.name} makes {completions(first.k)}"]
    made += [f"{other.name} {other.k:.1f}".removesuffix(".0") for other in others]
    time = seconds(comparison.seconds)
    return f"{time} is the longest time that all have samples for: {', '.join(made)}."


def votes_note(comparison: Comparison) -> str:
    """Majority voting at the same budget."""
    shares = (f"{each.name} {interval(each.majority)}" for each in comparison.standings)
    return f"Majority votes over them are right on: {', '.join(shares)}."


def shared_ks(models: tuple[ModelCurve, ...], wanted: tuple[int, ...]) -> list[int]:
    """The wanted numbers of completions that every model has a point for.

    The largest that all share stands in for those that are missing beyond it.
    """
    shared = set.intersection(*({point.k for point in model.points} for model in models))
    found = shared.intersection(wanted)
    return sorted(found | {max(shared)} if not found or max(shared) < max(wanted) else found)


# Shares of completions above which a report warns: below them the reasons are rarely worth a look.
HIGH_UNANSWERED, HIGH_TRUNCATED, HIGH_TIMEOUTS, HIGH_DUPLICATES = 0.05, 0.05, 0.01, 0.95


def warnings(model: ModelCurve) -> list[str]:
    """What a reader of the model's curves should know before believing them."""
    told = (
        (model.unanswered, HIGH_UNANSWERED, "hold no answer that could be found; look at some"),
        (model.truncated, HIGH_TRUNCATED, "were cut off; raise sampling.max_tokens"),
        (model.timeouts, HIGH_TIMEOUTS, "took the grader too long and count as wrong"),
        (model.duplicates, HIGH_DUPLICATES, "repeat another's text; raise sampling.temperature"),
    )
    return [
        f"{model.name}: {percent(share)}{THIN}% of the completions {what}"
        for share, high, what in told
        if share > high
    ]


def training_summary(training: Training) -> dict[str, str]:
    """A run in a few words, for a table: what was done, and what came of it."""
    last = training.evaluations[-1].values if training.evaluations else {}
    best = training.best.values if training.best else {}
    return {
        "Steps": f"{training.steps:,}",
        "Tokens": format_count(training.tokens),
        "Time": format_seconds(training.seconds),
        "Skipped": str(sum(stage.skipped for stage in training.stages)),
        "Spikes": str(sum(stage.spikes for stage in training.stages)),
        "Last loss": last_loss(training.stages[-1]),
        "Coverage": _share(last.get("coverage")),
        "Best": _share(best.get("coverage")),
        "Accuracy": _share(last.get("accuracy")),
    }


def last_loss(stage: StageCurves) -> str:
    """The mean of a stage's last steps, or a dash where none was finite."""
    return f"{stage.curves['loss'].mean[-1]:.4g}" if "loss" in stage.curves else "–"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{percent(value)}{THIN}%"


# Comparisons


def times(factor: float) -> str:
    """How many times as fast: `3.2×`, `12×`."""
    return f"{factor:.1f}×" if factor < 9.95 else f"{factor:.0f}×"


def points(share: float) -> str:
    """A difference in percentage points, with its sign."""
    shown = _points(share)
    return shown if shown.startswith((MINUS, "0.0")) else f"+{shown}"


def ahead_from(name: str, time: float) -> str:
    """The label of a crossover."""
    return f"{name} ahead from {seconds(time)}"


def stopping_rule(rule: Rule) -> str:
    """When a rule stops drawing."""
    return {
        "beta": f"the leader stays ahead, 95{THIN}%",
        "unanimous": "a window gives one answer",
    }[rule]


def advantages(curves: Curves) -> str:
    """What the others have over the reference: speed at equal coverage, and from when on a lead.

    Empty where nothing was compared.
    """
    found = curves.comparisons
    covering = [each for each in found.crossovers if each.rule == "coverage"]
    told = [_speed_ups(found), *(_overtakes(each, found.reference) for each in covering)]
    behind = [f"{each.name} (to {seconds(each.last)})" for each in covering if each.seconds is None]
    if behind:
        does = "does" if len(behind) == 1 else "do"
        told.append(f"{_listed(behind)} {does} not overtake {found.reference}.")
    return " ".join(filter(None, told))


def _speed_ups(found: Comparisons) -> str:
    """At the most completions of the reference whose coverage any model reaches."""
    covering = [each for each in found.speed_ups if each.rule == "coverage"]
    if not covering:
        return ""
    reached = [each.reference_k for each in covering if each.times is not None]
    k = max(reached or [each.reference_k for each in covering])
    shown = [each for each in covering if each.reference_k == k]
    who = _listed([_speed_up(each) for each in shown])
    covered = f"{percent(shown[0].accuracy)}{THIN}%"
    return f"To cover the {covered} that {found.reference} does with {completions(k)}, {who}."


def _speed_up(each: SpeedUp) -> str:
    if each.times is None:
        return f"{each.name} does not reach that"
    spread = f"{times(each.times.low)} to {times(each.times.high)}"
    return f"{each.name} is {times(each.times.value)} as fast ({spread})"


def _overtakes(each: Crossover, reference: str) -> str:
    if each.seconds is None:
        return ""
    if each.seconds.value <= each.first:
        return f"{each.name} is ahead of {reference} throughout."
    spread = f"({seconds(each.seconds.low)} to {seconds(each.seconds.high)})"
    return f"{each.name} is ahead of {reference} from {seconds(each.seconds.value)} {spread} on."


def _listed(parts: list[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
