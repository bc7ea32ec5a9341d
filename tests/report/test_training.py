"""Training curves: what is read of metrics files, how it is reduced, and how it is shown."""

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from retort.report import training_page, training_plots
from retort.report.reading import LAYER_POINTS, MARKS, POINTS, read_trainings, reduce
from retort.report.run import report_training, training_table
from retort.report.training import Mark, Training, is_training, stage_names, to_json

from .pages import HOSTILE, Page

Records = Iterable[Mapping[str, Any]]
Make = Callable[..., Path]
FILES = {"training.json", "training.html", "training.png", "training.svg"}
RECIPE = {"out": "runs/pure", "teacher": HOSTILE}
ROW = 100
"""Tokens of a step."""


def step(number: int, stage: str = "distill", **fields: Any) -> dict[str, Any]:
    usual = {
        "loss": 2.0,
        "lr": 1e-4,
        "gradient_norm": 0.5,
        "skipped": 0,
        "spike": 0,
        "bad_steps": 0,
        "tokens_per_second": 1000.0,
        "seconds": number / 10,
    }
    return {"step": number, "stage": stage, "tokens": ROW * number, **usual, **fields}


def evaluation(number: int, **values: Any) -> dict[str, Any]:
    return {"step": number, "stage": "distill", "evaluation": values}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a training folder."""

    def make(name: str, records: Records) -> Path:
        folder = tmp_path / f"{name}.training"
        folder.mkdir(parents=True)
        (folder / "recipe.json").write_text(json.dumps(RECIPE))
        lines = (json.dumps(record) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text("".join(lines))
        return folder

    return make


def whole(offset: float = 0.0) -> list[dict[str, Any]]:
    """Two stages, layers, parts, marks, evaluations, memory and sources: all there is."""
    records: list[dict[str, Any]] = [evaluation(0, coverage=0.0, accuracy=0.0, n=4)]
    for i in range(1, 31):
        layers = {f"layer_{layer}": layer + 1 / i for layer in (0, 3, 11)}
        records.append(step(i, "match", loss=offset + 1 / i, **layers))
    for i in range(31, 61):
        parts = {"kl": 1.0 / i, "ce": 3.0 / i, "mfu": 0.4, "memory_gib": 60.5}
        data = {HOSTILE: 60 * i, "maths": 40 * i}
        unused = {"too long": i, HOSTILE: 1}
        records.append(step(i, loss=offset + 2.0 / i, **parts, data=data, unused=unused))
    records[40] |= {"loss": None, "skipped": 1}
    records[50] |= {"loss": 40.0, "spike": 1}
    records += [evaluation(60, coverage=0.6, accuracy=0.3, truncated=0.1, no_answer=0.2, n=4)]
    return records


# Reading


def test_what_is_read(make: Make) -> None:
    (training,) = read_trainings([make("pure", whole())])
    assert (training.name, training.steps, training.tokens) == ("pure", 60, 6000)
    assert training.seconds == 6.0
    assert training.recipe == RECIPE
    match, distill = training.stages
    assert (match.name, match.steps, match.start, match.end) == ("match", 30, 0, 3000)
    assert (distill.name, distill.steps, distill.start, distill.end) == ("distill", 30, 3000, 6000)
    assert list(match.layers) == [0, 3, 11]
    assert match.layers[3].mean[:2] == (4.0, 3.5)
    assert match.curves["lr"].tokens[:3] == (100, 200, 300)
    assert distill.layers == {}
    assert "kl" not in match.curves
    assert distill.curves["kl"].mean[0] == pytest.approx(1 / 31, rel=1e-5)
    assert (distill.skipped, distill.spikes) == (1, 1)
    assert distill.marks == (Mark(40, 4000, "skipped"), Mark(50, 5000, "spike"))
    assert len(distill.curves["loss"].tokens) == 29  # the skipped step has none
    assert distill.data == {HOSTILE: 3600, "maths": 2400}
    assert distill.unused == {"too long": 60, HOSTILE: 1}
    first, last = training.evaluations
    assert (first.step, first.tokens, first.values["coverage"]) == (0, 0, 0.0)
    assert (last.step, last.tokens, last.values["coverage"]) == (60, 6000, 0.6)
    assert training.best == last


def test_fields_may_be_absent(make: Make) -> None:
    records = [{"step": 1, "stage": "s", "tokens": 10, "loss": 1.0}, step(2, "s", lr=None, mfu=0.5)]
    (training,) = read_trainings([make("pure", records)])
    (stage,) = training.stages
    assert stage.curves["mfu"].tokens == (200,)
    assert stage.curves["gradient_norm"].mean == (0.5,)
    assert "lr" not in stage.curves
    assert training.best is None


def test_a_stage_without_a_finite_loss(make: Make) -> None:
    folder = make("pure", [step(1, loss=None, gradient_norm=None, skipped=1)])
    (training,) = read_trainings([folder])
    assert "loss" not in training.stages[0].curves
    assert training.stages[0].skipped == 1
    html = training_page.render([training])
    assert "loss-0-loss" not in html
    assert "run-lr" in html


def test_what_else_is_in_the_file_is_passed_over(make: Make) -> None:
    (training,) = read_trainings(
        [make("p", [{"event": "saved"}, step(1), {"step": 1, "note": "x"}])]
    )
    assert training.steps == 1


def test_a_run_that_is_going_on_is_read_as_far_as_it_is(make: Make) -> None:
    folder = make("pure", [step(1), step(2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    (training,) = read_trainings([folder])
    assert training.steps == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "recipe.json").unlink(), "no training folder .recipe.json is missing"),
        (lambda f: (f / "metrics.jsonl").unlink(), "no training folder .metrics.jsonl is missing"),
        (lambda f: (f / "metrics.jsonl").write_text(""), r"metrics.jsonl: no step in it yet"),
        (lambda f: (f / "recipe.json").write_text("{"), r"recipe.json: not JSON"),
        (lambda f: (f / "recipe.json").write_text("[]"), r"recipe.json: not the recipe"),
        (lambda f: (f / "metrics.jsonl").write_text("x\n"), r"metrics.jsonl:1: not JSON"),
        (lambda f: append(f, loss="<b>"), "loss is '<b>', which is no number"),
        (lambda f: append(f, lr=[1]), "lr is '.1.', which is no number"),
        (lambda f: append(f, gradient_norm=10**400), "gradient_norm is '1000"),
        (lambda f: append(f, tokens=None), "lacks its step or its tokens"),
    ],
)
def test_what_is_no_training(
    make: Make, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = make("pure", [step(1)])
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        report_training([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def append(folder: Path, **fields: Any) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(2, **fields)) + "\n")


def test_training_folders_are_known(make: Make, tmp_path: Path) -> None:
    assert is_training(make("pure", [step(1)]))
    assert not is_training(tmp_path)


def test_runs_of_one_name_are_told_apart(make: Make) -> None:
    folders = [make(f"{parent}/pure", [step(1)]) for parent in "ab"] + [make("c", [step(1)])]
    names = [training.name for training in read_trainings(folders)]
    assert names == [str(folders[0]), str(folders[1]), "c"]
    with pytest.raises(ValueError, match="given twice"):
        read_trainings([folders[0], folders[0]])


def test_stages_come_in_their_order(make: Make) -> None:
    short = make("short", [step(1, "distill")])
    long = make("long", [step(i, name) for i, name in enumerate(["match", "hidden", "distill"], 1)])
    assert stage_names(read_trainings([short, long])) == ["match", "hidden", "distill"]


# Reducing


def test_few_points_stay_as_they_are() -> None:
    x, y = np.arange(5.0), np.array([3.0, np.nan, 1.0, np.inf, 2.0])
    curve = reduce(x, y, 5)
    assert curve.tokens == (0, 2, 4)
    assert curve.mean == curve.low == curve.high == (3, 1, 2)


def test_many_points_become_means_with_their_extremes() -> None:
    count = 100_000
    y = np.arange(count) % 7 + np.arange(count) / count
    y[500] = 1e5
    y[60_000:61_000] = np.nan
    curve = reduce(np.arange(count, dtype=float), y, 200)
    assert len(curve.tokens) == 198  # two of them hold nothing
    assert curve.tokens[0] == 249.5
    assert curve.mean[0] == pytest.approx(y[:500].mean(), rel=1e-5)
    assert (curve.low[0], curve.high[0]) == (0, pytest.approx(y[:500].max(), rel=1e-5))
    assert curve.high[1] == 1e5  # a single step that stands out is seen
    assert curve.mean[-1] == pytest.approx(y[-500:].mean(), rel=1e-5)


def test_a_long_run_is_bounded(make: Make) -> None:
    records = (step(i, layer_0=1.0, spike=1, loss=float(i)) for i in range(1, 3001))
    (training,) = read_trainings([make("long", records)])
    (stage,) = training.stages
    assert len(stage.curves["loss"].tokens) == POINTS
    assert len(stage.layers[0].tokens) == LAYER_POINTS
    assert len(stage.marks) == MARKS
    assert stage.spikes == 3000
    assert len(to_json([training])) < 70_000


# Showing


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Training, ...], Path]:
    root = tmp_path_factory.mktemp("trainings")
    folders = []
    for name, records in (
        ("pure", whole()),
        (f"other {HOSTILE.replace('/', '')}", whole(0.5)[31:]),
    ):
        folder = root / f"{name}.training"
        folder.mkdir()
        (folder / "recipe.json").write_text(json.dumps(RECIPE))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        folders.append(folder)
    return report_training(folders, root / "out"), root / "out"


@pytest.fixture
def html(made: tuple[tuple[Training, ...], Path]) -> str:
    return (made[1] / "training.html").read_text()


def test_every_file_is_written_whole(made: tuple[tuple[Training, ...], Path]) -> None:
    trainings, out = made
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "training.json").read_text()) == json.loads(to_json(trainings))


def test_pictures(made: tuple[tuple[Training, ...], Path]) -> None:
    png = (made[1] / "training.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(png[16:20], "big") > 1500
    svg = ElementTree.fromstring((made[1] / "training.svg").read_text())
    texts = set(svg.itertext())
    assert {"pure", "match: loss", "distill: loss", "distill: ce", "learning rate"} <= texts


def test_hostile_text_stays_text(html: str) -> None:
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert {"img", "iframe", "object", "link"}.isdisjoint(tag for tag, _ in page.tags)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert not [attrs for _, attrs in page.tags if attrs.keys() & {"src", "href", "srcset"}]
    assert f"{HOSTILE} 60" in page.text


def test_every_figure_has_its_place_and_its_data(html: str) -> None:
    page = Page(html)
    specs = json.loads(page.data["figures"])["specs"]
    places = [attrs["id"] for _, attrs in page.tags if attrs.get("class") == "chart"]
    assert places == list(specs)
    assert places == [
        "answers-coverage", "answers-accuracy", "answers-truncated", "answers-no_answer",
        "loss-0-loss", "loss-1-loss", "loss-1-kl", "loss-1-ce", "layers-0",
        "run-lr", "run-gradient_norm",
        "run-tokens_per_second", "run-mfu", "run-memory_gib",
    ]  # fmt: skip
    values: dict[str, Any] = {}
    for spec in specs.values():
        data = spec.pop("datasets")
        used = set(re.findall(r'"name": "([^"]*)"', json.dumps(spec)))
        assert {name for name in data if data[name]} == used & data.keys()
        values |= data
    marks = values["loss-1-loss-marks"]
    assert {(mark["kind"], mark["step"]) for mark in marks} == {("skipped", 40), ("spike", 50)}
    starts = values["run-lr-starts"]
    assert starts == [
        {"tokens": 0, "stage": "match, distill"},
        {"tokens": 3000, "stage": "distill"},
    ]


def test_page_tells_the_facts(html: str) -> None:
    text = Page(html).text.replace("\N{NARROW NO-BREAK SPACE}", " ")
    for fact in ("6.0 k", "6.0 s", "60 %", "30 %", "maths 40 %", "pure, match", "60 too long, 1 "):
        assert fact in text


def test_wide_losses_are_shown_on_a_log_scale(make: Make) -> None:
    def scales(low: float) -> list[Any]:
        folder = make(f"run{low}", [step(1, loss=100.0), step(2, loss=low)])
        (panel,) = training_plots.losses(read_trainings([folder]))
        return [layer["encoding"]["y"]["scale"] for layer in panel.spec()["layer"]]

    assert scales(1.0) == 2 * [{"type": "log", "nice": False}]
    assert scales(50.0) == scales(0.0) == 2 * [{"zero": False}]


def test_table_fits_a_terminal(made: tuple[tuple[Training, ...], Path]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(training_table(made[0]))
    lines = console.export_text().replace("\N{NARROW NO-BREAK SPACE}", " ").splitlines()
    (row,) = (line for line in lines if line.startswith("pure"))
    assert row.split()[1:] == ["60", "6.0", "k", "6.0", "s", "0.03333", "60", "%", "30", "%"]
