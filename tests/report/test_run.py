import base64
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from retort.report import report
from retort.report.curves import Curves
from retort.report.run import summary_table
from retort.store import Run

from .pages import HOSTILE, Page
from .test_choices import scored

MakeRun = Callable[..., Run]

RIGHT = "42"
PICTURES = ("coverage", "majority", "pareto", "reliability")
FILES = {"curves.json", "report.html"} | {
    f"{name}.{ending}" for name in PICTURES for ending in ("png", "svg", "csv")
}
SCORER = "judge &lt;b&gt;"


@pytest.fixture(scope="module")
def made(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Curves, Path]:
    outcomes = {f"p{i}": [RIGHT, "7", None, HOSTILE] for i in range(5)}
    quick = make_run(f"quick [red] {HOSTILE}", outcomes, 4000, text=lambda *key: f"{HOSTILE} {key}")
    slow = make_run("slow", outcomes, 1000)
    scored(slow, SCORER, lambda i: [0.9 if i == 0 else 0.3], "probability")
    out = tmp_path_factory.mktemp("report")
    return report([quick.folder, slow.folder], out), out


@pytest.fixture
def html(made: tuple[Curves, Path]) -> str:
    return (made[1] / "report.html").read_text()


def test_every_file_is_written_whole(made: tuple[Curves, Path]) -> None:
    curves, out = made
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "curves.json").read_text()) == json.loads(curves.to_json())


@pytest.mark.parametrize("measure", PICTURES)
def test_pictures(made: tuple[Curves, Path], measure: str) -> None:
    png = (made[1] / f"{measure}.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) > 20_000
    panels = 1 if measure == "reliability" else 2
    assert int.from_bytes(png[16:20], "big") > 750 * panels  # pixels across, at double density
    svg = ElementTree.fromstring((made[1] / f"{measure}.svg").read_text())
    assert svg.tag.endswith("svg")
    assert any(text == "slow" for text in svg.itertext())


def test_hostile_text_stays_text(html: str) -> None:
    page = Page(html)
    scripts = [attrs.get("id") for tag, attrs in page.tags if tag == "script"]
    assert scripts == [
        "data-figures",
        "data-explorer",
        "data-completions",
        None,
    ]  # the last is code
    assert {"img", "iframe", "object", "link"}.isdisjoint(tag for tag, _ in page.tags)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    shown = json.loads(page.data["completions"])
    assert [f"{HOSTILE} ('p0', 0)"] in shown["steps"]
    assert f"quick [red] {HOSTILE}" in page.text


def test_page_loads_nothing(html: str) -> None:
    page = Page(html)
    assert not [attrs for _, attrs in page.tags if attrs.keys() & {"src", "srcset"}]
    links = [attrs["href"] for _, attrs in page.tags if attrs.get("href")]
    assert all(link.startswith("#") for link in links if link)
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.split(";")[1]


def test_policy_admits_the_code_of_the_page(html: str) -> None:
    code = html.rpartition("<script>")[2].rpartition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in html
    assert "\r" not in code  # a browser would hash a line feed in its place


def test_figures_are_in_the_page(html: str) -> None:
    page = Page(html)
    figures = json.loads(page.data["figures"])
    places = [attrs["id"] for _, attrs in page.tags if attrs.get("class") == "chart"]
    assert places[:2] == ["explorer-cost", "explorer-k"]
    assert places[2:] == ["front-coverage", "front-majority", "reliability-0"]
    assert places[2:] == list(figures["specs"])
    told = json.loads(page.data["explorer"])
    assert [model["name"] for model in told["models"]] == [f"quick [red] {HOSTILE}", "slow"]
    assert [rule["name"] for rule in told["rules"]][:2] == ["coverage", "majority"]
    assert told["models"][0]["costs"]["k"] == [1, 2, 4]
    assert len(told["models"][0]["rules"]["coverage"]) == 3


def test_links_lead_to_sections(html: str) -> None:
    page = Page(html)
    ids = {attrs.get("id") for tag, attrs in page.tags if tag == "section"}
    links = [attrs["href"] or "" for tag, attrs in page.tags if tag == "a"]
    assert len(links) > 8
    assert {link.removeprefix("#") for link in links} == ids


def test_page_tells_the_facts(html: str) -> None:
    text = Page(html).text.replace("\N{NARROW NO-BREAK SPACE}", " ")
    for fact in ("5 problems · 4 completions each", "test device, 8 slots", "25 %", "1.5 M"):
        assert fact in text
    for fact in ("Choosing one answer", "confidence-weighted vote", "an oracle (coverage)"):
        assert fact in text
    # 0.9 for what is right and 0.3 for what is not
    for fact in ("What scores are worth", "Calibration error", "0.250", "1.000"):
        assert fact in text
    for fact in (
        "Stopping early",
        "the leader stays ahead",
        "slow: 25 % of the completions hold no",
    ):
        assert fact in text


def test_report_replaces_an_older_one(make_run: MakeRun, tmp_path: Path) -> None:
    older, newer = (make_run(name, {"p": [RIGHT]}) for name in ("older", "newer"))
    scored(older, "rm", lambda i: [0.5], "probability")
    for run in (older, newer):
        report([run.folder], tmp_path)
    assert [
        model["name"] for model in json.loads((tmp_path / "curves.json").read_text())["models"]
    ] == ["newer"]
    of_scores = {"reliability.png", "reliability.svg", "reliability.csv"}
    assert {path.name for path in tmp_path.iterdir()} == FILES - of_scores


def test_a_mistake_writes_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("m", {"p": [RIGHT]})
    with pytest.raises(ValueError, match="k = 2 asked"):
        report([run.folder], tmp_path / "out", k=[2])
    with pytest.raises(ValueError, match="no run folder"):
        report([tmp_path], tmp_path / "out")
    with pytest.raises(ValueError, match="no run folder given"):
        report([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_table_fits_a_terminal(made: tuple[Curves, Path]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(made[0]))
    lines = console.export_text().splitlines()
    assert "quick [red]" in lines[2]
    (row,) = (i for i, line in enumerate(lines) if line.startswith("slow"))
    assert lines[row].split()[1:] == ["1", "10", "ms", "25", "%", "(5-66)", "25", "%", "(5-66)"]
    assert lines[row + 1].startswith("1.5 M parameters")
    assert lines[row + 2].startswith("1.0 k tokens/s")


def test_import_is_light() -> None:
    code = "import sys, retort.report; print({'altair', 'torch', 'vl_convert'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"
