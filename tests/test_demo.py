"""The demo's plumbing, with recipes so small that nothing is learnt."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from retort import demo
from retort.recipe import BUNDLED_TEACHER, RECIPES
from retort.report.run import summary_table


@pytest.fixture
def small_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's own recipes with a few steps, problems and samples."""
    folder = tmp_path / "recipes"
    shutil.copytree(RECIPES, folder)
    for name in demo.STUDENTS:
        path = folder / "demo" / f"{name}.yaml"
        recipe = yaml.safe_load(path.read_text())
        for stage in recipe["stages"]:
            stage |= {"tokens": 1200, "rows": 1, "length": 400}
        path.write_text(yaml.safe_dump(recipe))
    for name, count, n, tokens in (("sample", 3, 4, 20), ("lessons", 20, 2, 150)):
        path = folder / "demo" / f"{name}.yaml"
        recipe = yaml.safe_load(path.read_text())
        recipe["problems"]["count"] = count
        recipe["sampling"] |= {"n": n, "max_tokens": tokens}
        path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(demo, "RECIPES", folder)
    return folder


@pytest.mark.multiprocess
@pytest.mark.usefixtures("small_recipes")
def test_demo_ends_in_a_report_and_does_nothing_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    curves = demo.demo(out)
    assert [model.name for model in curves.models] == ["teacher", "pure", "hybrid"]
    made = {"report.html", "coverage.png", "curves.json", "training.html"}
    assert made <= {path.name for path in out.iterdir()}
    assert 'href="training.html"' in (out / "report.html").read_text()
    assert "warning: no verifier, so no votes weighted by one" in capfd.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in (out / "samples").rglob("*.parquet")}
    models = {path: path.stat().st_mtime_ns for path in (out / "models").rglob("*")}
    demo.demo(out)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert models == {path: path.stat().st_mtime_ns for path in models}


@pytest.mark.usefixtures("small_recipes")
def test_a_student_that_has_learnt_gets_a_verifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of the teacher stand for students, which takes no training."""

    def copied(students: list[Any], out: Path) -> None:
        for each in students:
            if not each.folder.is_dir():
                shutil.copytree(BUNDLED_TEACHER, each.folder)

    monkeypatch.setattr(demo, "_distill_all", copied)
    out = tmp_path / "demo"
    curves = demo.demo(out)
    names = [choice.name for choice in curves.models[1].choices]
    assert names[1:] == ["best of k by verifier", "vote weighted by verifier"]
    headings = [str(column.header) for column in summary_table(curves).columns]
    assert headings == ["model", "k", "time", "coverage", "majority", "weighted"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if "models" in path.parts}
    demo.demo(out)
    assert before == {path: path.stat().st_mtime_ns for path in before}


# ---------------------------------------------------------------- distillations that end early

WORKING = """
import signal, sys, time

def save(number, frame):
    time.sleep(0.5)
    open(sys.argv[1] + ".saved", "w").close()
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, save)
open(sys.argv[1] + ".working", "w").close()
time.sleep(60)
"""
FAILING = """
import os, sys, time

while not os.path.exists(sys.argv[1].replace("hybrid", "pure") + ".working"):
    time.sleep(0.01)
sys.exit("no layer 99")
"""


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Has scripts take the place of distillations, and of other commands by their names; they are
    told where to leave their files.
    """

    def arrange(**scripts: str) -> None:
        def command(*words: str) -> list[str]:
            name = Path(words[1]).stem if words[0] == "distill" else words[0]
            return [sys.executable, "-c", scripts[name], str(tmp_path / name)]

        monkeypatch.setattr(demo, "_command", command)

    return arrange


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


@pytest.mark.multiprocess
def test_a_failing_distillation_ends_the_other_and_tells_why(
    tmp_path: Path, play: Callable[..., None]
) -> None:
    play(pure=WORKING, hybrid=FAILING)
    with pytest.raises(ValueError, match=r"distilling hybrid failed.*no layer 99"):
        demo.demo(tmp_path / "demo")
    assert files(tmp_path) == {"pure.working", "pure.saved"}


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_demo_that_is_ended_ends_both_and_lets_them_save(
    tmp_path: Path, play: Callable[..., None], number: signal.Signals
) -> None:
    play(pure=WORKING, hybrid=WORKING)

    def end() -> None:
        while len(files(tmp_path)) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    ending, before = threading.Thread(target=end), signal.getsignal(number)
    ending.start()
    with pytest.raises(SystemExit) as ended:
        demo.demo(tmp_path / "demo")
    ending.join()
    assert ended.value.code == 128 + number
    assert files(tmp_path) == {f"{name}.{did}" for name in ("pure", "hybrid") for did in
                               ("working", "saved")}  # fmt: skip
    assert signal.getsignal(number) == before


# ---------------------------------------------------------------- a verifier learns on a free core

READY = ""
ASKED = """
import sys

open(sys.argv[1] + ".asked", "x").close()
"""
UNTIL = """
import os, sys, time

for _ in range(3000):
    if os.path.exists(sys.argv[1].replace("pure", "{name}") + ".asked"):
        time.sleep(1.2)
        sys.exit()
    time.sleep(0.01)
sys.exit("{name} was not asked")
"""


def students(out: Path) -> list[demo._Distillation]:
    return [demo._Distillation(name, out / "models" / name) for name in demo.STUDENTS]


@pytest.mark.multiprocess
def test_the_verifier_learns_while_the_other_student_is_still_trained(
    tmp_path: Path, play: Callable[..., None]
) -> None:
    pure = UNTIL.format(name="verifier")
    play(pure=pure, hybrid=READY, sample=ASKED, grade=ASKED, verifier=ASKED)
    demo._distill_all(students(tmp_path / "demo"), tmp_path / "demo")
    asked = [tmp_path / f"{name}.asked" for name in ("sample", "grade", "verifier")]
    times = [path.stat().st_mtime_ns for path in asked]
    assert times == sorted(times)


@pytest.mark.multiprocess
def test_a_verifier_that_fails_ahead_leaves_it_to_be_done_later(
    tmp_path: Path, play: Callable[..., None]
) -> None:
    failing = ASKED + "sys.exit('no space')"
    play(
        pure=UNTIL.format(name="sample"), hybrid=READY, sample=failing, grade=ASKED, verifier=ASKED
    )
    demo._distill_all(students(tmp_path / "demo"), tmp_path / "demo")
    assert files(tmp_path) == {"sample.asked"}
    log = tmp_path / "demo" / "models" / "verifier.log"
    assert log.read_text() == "no space\n"
