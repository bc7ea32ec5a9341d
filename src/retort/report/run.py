"""`retort report`: from run folders to curves.json, report.html and the figures; from training
folders to training.json, training.html and theirs.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retort.console import format_count
from retort.report import wording
from retort.report.build import build
from retort.report.completions import Completions, completions
from retort.report.curves import Curves, ModelCurve, Point
from retort.report.metrics import Estimate
from retort.report.reading import read_trainings
from retort.report.samples import Aggregate
from retort.report.tally import check_comparable, common_version, tally
from retort.report.training import Training, to_json
from retort.store import Run
from retort.tables import write_aside

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

PIXELS_PER_POINT = 2
RELIABILITY, PARETO = "reliability", "pareto"


def report(
    runs: Sequence[Path],
    out: Path,
    k: Sequence[int] | None = None,
    aggregate: Aggregate = "last",
    reference: str | None = None,
    prices: Mapping[str, float] | None = None,
    training: bool = False,
) -> Curves:
    """Compare graded runs of the same problems: write the report into `out` and return its data.

    Writes curves.json, report.html, and coverage, majority, pareto and, where there are scores,
    their reliability as .png, .svg and .csv; each file appears whole or not at all.

    k: the numbers of completions per problem to report, by default 1, 2, 4, ... and all samples.
    aggregate: how a process reward model's scores of the steps become one for the completion.
    reference: the name of the run that others are compared with, by default the first.
    prices: by name, of an hour of the machine that a run was sampled on. training: whether the page
    links to training.html beside it.

    Raises ValueError when a folder is no run, when runs are incomplete, not graded, not timed, of
    one name or about different problems, when a k exceeds the samples, or for a name of no run.
    """
    if not runs:
        raise ValueError("no run folder given; name one or more that `retort sample` made")
    opened = [Run.open(Path(folder)) for folder in runs]
    version = common_version(opened)
    tallies = [tally(run, version, aggregate) for run in opened]
    check_comparable(tallies)
    curves = build(tallies, k, reference, prices)
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, content in _files(curves, completions(tallies), training):
        write_aside(Path(out) / name, content)
    if not any(model.judged for model in curves.models):
        for file in Path(out).glob(f"{RELIABILITY}.*"):
            file.unlink()  # of an older report
    return curves


def report_training(folders: Sequence[Path], out: Path) -> tuple[Training, ...]:
    """Draw the curves of training folders over one another, into `out`, and return their data.

    Writes training.json, training.html, training.png and training.svg; each appears whole or not
    at all. A run that is still going on is drawn as far as it has come.

    Raises ValueError for a folder that is no training folder or holds no step yet, for damaged
    files, and for folders that cannot be told apart.
    """
    trainings = read_trainings([Path(folder) for folder in folders])
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, content in _training_files(trainings):
        write_aside(Path(out) / name, content)
    return trainings


def _files(curves: Curves, shown: Completions, training: bool) -> Iterator[tuple[str, bytes]]:
    # Altair is slow to import, and only writing needs it
    from retort.report import curve_plots, figure_data, front_plots, page, reliability_plots
    from retort.report.rules import BASIC

    yield "curves.json", curves.to_json().encode()
    yield "report.html", page.render(curves, shown, training).encode()
    for rule in BASIC:
        yield from _pictures(rule.name, curve_plots.figure(curves, rule))
        yield f"{rule.name}.csv", figure_data.curve(curves, rule).encode()
    yield from _pictures(PARETO, front_plots.figure(curves))
    yield f"{PARETO}.csv", figure_data.pareto(curves).encode()
    if reliability_plots.scorers(curves):
        yield from _pictures(RELIABILITY, reliability_plots.figure(curves))
        yield f"{RELIABILITY}.csv", figure_data.reliability(curves).encode()


def _training_files(trainings: Sequence[Training]) -> Iterator[tuple[str, bytes]]:
    from retort.report import training_page, training_plots

    yield "training.json", to_json(trainings).encode()
    yield "training.html", training_page.render(trainings).encode()
    yield from _pictures("training", training_plots.figure(trainings))


def _pictures(name: str, spec: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """A Vega-Lite figure as SVG and PNG."""
    import vl_convert

    from retort.report.frame import vega_lite_version

    version = vega_lite_version()
    yield f"{name}.svg", vl_convert.vegalite_to_svg(spec, version).encode()
    yield f"{name}.png", vl_convert.vegalite_to_png(spec, version, scale=PIXELS_PER_POINT)


def summary_table(curves: Curves, ks: Sequence[int] = (1, 8, 64)) -> "Table":
    """The curves at a few k for an 80-column terminal, one block of lines for each model. Time is
    for a problem; votes are weighted by a scorer where all models have been scored.

    A k that some model has no point for is left out; the largest that all share stands in for it.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 1, 0))
    table.add_column("model", overflow="fold")
    scored = all(_weighted(model) for model in curves.models)
    for heading in ("k", "time", "coverage", "majority", *(["weighted"] if scored else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    shared = wording.shared_ks(curves.models, tuple(ks))
    for model in curves.models:
        lines = [_values(point) for point in model.points if point.k in shared]
        if scored:
            weights = _weighted(model)
            lines = [(*line, _plain(weights[k])) for line, k in zip(lines, shared, strict=True)]
        table.add_row(_facts(model), *map("\n".join, zip(*lines, strict=True)))
    return table


def _weighted(model: ModelCurve) -> dict[int, Estimate]:
    """By k the accuracy of votes weighted by the first scorer of the model; empty without one."""
    for choice in model.choices:
        if choice.scorer is not None and choice.votes:
            return {point.k: point.accuracy for point in choice.points}
    return {}


def _facts(model: ModelCurve) -> "Text":
    from rich.text import Text

    size, rate = format_count(model.parameters), format_count(model.tokens_per_second)
    # as Text, so that brackets in a name are not read as markup
    return Text(f"{model.name}\n{size} parameters\n{rate} tokens/s")


def _values(point: Point) -> tuple[str, ...]:
    shares = (_plain(point.coverage), _plain(point.majority))
    return str(point.k), wording.seconds(point.seconds), *shares


def _plain(estimate: Estimate) -> str:
    value, low, high = map(wording.percent, (estimate.value, estimate.low, estimate.high))
    return f"{value} % ({low}-{high})"


def training_table(trainings: Sequence[Training]) -> "Table":
    """Training runs in a few words each, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    headings = ("Steps", "Tokens", "Time", "Last loss", "Coverage", "Accuracy")  # 80 columns
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    for heading in headings:
        table.add_column(heading.lower(), justify="right", no_wrap=True)
    for training in trainings:
        values = wording.training_summary(training)
        table.add_row(Text(training.name), *(values[heading] for heading in headings))
    return table
