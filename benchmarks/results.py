"""Every table of docs/results.md and of the README, and their figures, from the raw results.

    python benchmarks/results.py

Pages hold blocks between `<!-- results: NAME -->` and `<!-- end -->`. This fills them from
benchmarks/results/*.json, and draws the figures into docs/figures. Nothing is measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import vl_convert

from retort.console import format_count
from retort.report import curve_plots, front_plots, wording
from retort.report.comparisons import Crossover, SpeedUp
from retort.report.curves import Curves, ModelCurve
from retort.report.frame import vega_lite_version
from retort.report.markdown import table
from retort.report.metrics import Estimate
from retort.report.rules import BASIC, accuracies, rules

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
KS = (1, 8, 64)
PIXELS_PER_POINT = 2


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    FIGURES.mkdir(exist_ok=True)
    for name, spec in figures():
        picture = vl_convert.vegalite_to_png(spec, vega_lite_version(), scale=PIXELS_PER_POINT)
        (FIGURES / f"{name}.png").write_bytes(picture)


def filled(page: str) -> str:
    """A page with its blocks made anew. Raises ValueError for a block that nothing makes."""

    def made(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise ValueError(f"block {found[2]!r}: nothing makes it; there are {', '.join(BLOCKS)}")
        return f"{found[1]}\n{BLOCKS[found[2]]()}\n\n{found[3]}"

    return BLOCK.sub(made, page)


def figures() -> Iterator[tuple[str, dict[str, Any]]]:
    """Vega-Lite figures by name."""
    for name in ("demo", "heldout", "study"):
        yield f"{name}-coverage", curve_plots.figure(curves(name), BASIC[0])
    for name in ("demo", "study"):
        yield f"{name}-pareto", front_plots.figure(curves(name))


@cache
def curves(name: str) -> Curves:
    return Curves.read(RESULTS / f"{name}-curves.json")


@cache
def raw(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


# Models


def models(name: str) -> str:
    """Each model at a few k: coverage, votes, the best and the most by a scorer, speed."""
    shown = curves(name)
    found = rules(shown.models)
    head = ("model", "k", *(rule.title.lower() for rule in found), "time per problem")
    rows = (row for model in shown.models for row in _model(model, [rule.name for rule in found]))
    return table(head, rows)


def _model(model: ModelCurve, names: list[str]) -> Iterator[tuple[str, ...]]:
    values = [accuracies(model, name) for name in names]
    for i, point in enumerate(model.points):
        if point.k in KS or point is model.points[-1]:
            first = f"{model.name}, {format_count(model.parameters)}" if point.k == KS[0] else ""
            shares = (_share(each[i]) for each in values)
            yield first, str(point.k), *shares, wording.seconds(point.seconds)


def summary(name: str) -> str:
    """The same in a few columns: at the first and the last k, with one scorer's votes."""
    shown = curves(name).models
    names = [rule.name for rule in (*BASIC, *(r for r in rules(shown) if _votes(shown, r.name)))]
    head = ("model", "k", *names, "tokens/s", "time per problem")
    return table(head, (row for model in shown for row in _summary(model, names)))


def _votes(shown: tuple[ModelCurve, ...], name: str) -> bool:
    """Whether a rule has votes weighted by a scorer."""
    choices = (choice for model in shown for choice in model.choices)
    return any(each.name == name and each.votes and each.scorer is not None for each in choices)


def _summary(model: ModelCurve, names: list[str]) -> Iterator[tuple[str, ...]]:
    values = [accuracies(model, name) for name in names]
    for i in (0, len(model.points) - 1):
        point = model.points[i]
        first = (f"{model.name}, {format_count(model.parameters)} parameters", "")[i > 0]
        speed = ("", format_count(model.tokens_per_second))[i == 0]
        shares = (_share(each[i]) for each in values)
        yield first, str(point.k), *shares, speed, wording.seconds(point.seconds)


def _share(estimate: Estimate) -> str:
    value, low, high = map(wording.percent, (estimate.value, estimate.low, estimate.high))
    return f"{value} % ({low}-{high})"


def speeds(name: str) -> str:
    """What each model's run took."""
    head = ("model", "tokens/s", "slots", "tokens a completion", "prefill of a prompt",
            "replay over measured")  # fmt: skip
    rows = (
        (
            model.name,
            format_count(model.tokens_per_second),
            str(model.slots),
            f"{model.mean_tokens:.0f}",
            wording.seconds(model.prefill_seconds),
            "-" if model.replay_ratio is None else f"{model.replay_ratio:.2f}",
        )
        for model in curves(name).models
    )
    return table(head, rows)


def comparison(name: str) -> str:
    """Speed-up at equal accuracy and crossovers, by coverage and by majority."""
    found = curves(name).comparisons
    head = ("rule", "model", f"as accurate as {found.reference} with k =", "that is",
            "with k =", "times as fast", "reached in")  # fmt: skip
    basic = {rule.name for rule in BASIC}
    ups = table(head, (_speed_up(up) for up in found.speed_ups if up.rule in basic))
    columns = (f"ahead of {found.reference} from", "compared up to", "ahead there in")
    crossed = table(
        ("rule", "model", *columns),
        (_crossover(each) for each in found.crossovers if each.rule in basic),
    )
    return f"{ups}\n\n{crossed}"


def _speed_up(up: SpeedUp) -> tuple[str, ...]:
    reached = "not reached"
    if up.times is not None:
        reached = f"{up.times.value:.2f} ({up.times.low:.2f}-{up.times.high:.2f})"
    needed = "-" if up.k is None else f"{up.k:.3g}"
    accuracy, share = f"{100 * up.accuracy:.1f} %", f"{100 * up.reached:.0f} %"
    return up.rule, up.name, str(up.reference_k), accuracy, needed, reached, share


def _crossover(each: Crossover) -> tuple[str, ...]:
    when = "not ahead"
    if each.seconds is not None:
        low, high = wording.seconds(each.seconds.low), wording.seconds(each.seconds.high)
        start = " (the first time compared)" if each.seconds.value == each.first else ""
        when = f"{wording.seconds(each.seconds.value)} ({low} to {high}){start}"
    return each.rule, each.name, when, wording.seconds(each.last), f"{100 * each.ahead:.0f} %"


def differences(name: str, rule: str = "coverage") -> str:
    """Percentage points to the reference with the same k, paired over problems."""
    found = [each for each in curves(name).comparisons.differences if each.rule == rule]
    ks = sorted({each.k for each in found})
    names = list(dict.fromkeys(each.name for each in found))
    at = {(each.name, each.k): each.by for each in found}
    rows = ((name, *(_points(at[name, k]) for k in ks)) for name in names)
    return table(("model", *(f"k = {k}" for k in ks)), rows)


def _points(by: Estimate) -> str:
    value, low, high = (f"{100 * each:+.1f}" for each in (by.value, by.low, by.high))
    return f"{value} ({low} to {high})"


def front(name: str) -> str:
    """The candidates on the front of coverage."""
    rows = (
        (each.name, str(each.k), str(each.slots), wording.seconds(each.seconds),
         _share(each.accuracy), f"{100 * each.kept:.0f} %")
        for each in front_plots.front(curves(name), BASIC[0])
    )  # fmt: skip
    return table(("model", "k", "slots", "time per problem", "coverage", "on the front in"), rows)


# Measurements


def batches() -> str:
    """The study's tokens a second by rows at once, and how many times the teacher's they are."""
    found = raw("study-decode")["rows"]
    names = list(dict.fromkeys(row["model"] for row in found))
    sizes = sorted({row["batch"] for row in found})
    rate = {(row["model"], row["batch"]): row["tokens_per_second"] for row in found}
    rows = (
        (str(size), *(_rate(rate[name, size], rate[names[0], size]) for name in names))
        for size in sizes
    )
    return table(("rows at once", *names), rows)


def _rate(rate: float, reference: float) -> str:
    times = "" if rate == reference else f" ({rate / reference:.2f}x)"
    return f"{format_count(rate)}{times}"


def replays() -> str:
    """Foretold over measured seconds, by what was run."""
    found = raw("replay")["rows"]
    names = list(dict.fromkeys(row["model"] for row in found))
    shapes = list(dict.fromkeys(_shape(row) for row in found))
    ratio = {(_shape(row), row["model"]): row["ratio"] for row in found}
    rows = (
        (*map(str, shape), *(f"{ratio[shape, name]:.2f}" for name in names)) for shape in shapes
    )
    off = [abs(row["ratio"] - 1) for row in found]
    told = f"Off by {100 * max(off):.1f} % at most, {100 * median(off):.1f} % in the median."
    return f"{table(('problems', 'completions', 'slots', *names), rows)}\n\n{told}"


def _shape(row: Mapping[str, Any]) -> tuple[int, int, int]:
    return row["problems"], row["completions"], row["slots"]


def ablations() -> str:
    """What the long recipe reaches with stages left out."""
    rows = []
    for variant in raw("ablations")["variants"]:
        at = {point["k"]: point["coverage"] for point in variant["points"]}
        last = at[32]
        shares = [f"{100 * at[k]['value']:.0f} %" for k in (1, 8, 32)]
        rows.append((variant["name"], *shares, f"{100 * last['low']:.0f}-{100 * last['high']:.0f}"))
    return table(("", "pass@1", "coverage@8", "coverage@32", "95 % interval"), rows)


def targets() -> str:
    """The targets for a CPU, on two kinds of it."""
    columns = [raw(name)["targets"] for name in ("bench-targets-avx2", "bench-targets")]
    rows = (
        (each["what"], f"{each['at_least']:g}x", _measured(each), _measured(other))
        for each, other in zip(*columns, strict=True)
    )
    return table(("what", "target", "with AVX2", "with AVX-512"), rows)


def _measured(target: dict[str, Any]) -> str:
    """A target's median and the range of its repeats."""
    if target["measured"] is None:
        return "-"
    runs = target["runs"]
    return f"{target['measured']:.2f}x ({min(runs):.2f}-{max(runs):.2f})"


def published() -> str:
    """A model of a published size: tokens a second by rows at once, ours and transformers'."""
    found = {(row["runtime"], row["batch"]): row for row in raw("bench-qwen2.5-0.5b")["rows"]}
    head = ("rows", "Retort", "of the limit", "transformers", "times as fast")
    return table(head, (_published(found, rows) for rows in sorted({key[1] for key in found})))


def _published(found: Mapping[tuple[str, int], dict[str, Any]], rows: int) -> tuple[str, ...]:
    ours, theirs = found["retort", rows], found["transformers", rows]
    rates = [each["tokens_per_second"] for each in (ours, theirs)]
    limit = f"{100 * ours['of_limit']:.0f} %"
    return str(rows), f"{rates[0]:.0f}", limit, f"{rates[1]:.0f}", f"{rates[0] / rates[1]:.1f}x"


BLOCKS: dict[str, Callable[[], str]] = {
    "demo-summary": lambda: summary("demo"),
    "demo-models": lambda: models("demo"),
    "demo-speeds": lambda: speeds("demo"),
    "demo-comparison": lambda: comparison("demo"),
    "demo-differences": lambda: differences("demo"),
    "demo-front": lambda: front("demo"),
    "heldout-models": lambda: models("heldout"),
    "heldout-comparison": lambda: comparison("heldout"),
    "study-models": lambda: models("study"),
    "study-speeds": lambda: speeds("study"),
    "study-comparison": lambda: comparison("study"),
    "study-differences": lambda: differences("study"),
    "study-front": lambda: front("study"),
    "study-batches": batches,
    "replays": replays,
    "ablations": ablations,
    "targets": targets,
    "published": published,
}


if __name__ == "__main__":
    main()
