"""What the README and the pages of docs/ say can be run, runs; what they name is there.

A page's commands and Python blocks run in their order, as they are printed, for a reader who has
what `GIVEN` says. Those that are marked (see `documentation.MARK`) are parsed by the command line
and the recipes that they would go to, so that no option or key in them can grow old.
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer.main
from tests.documentation import (
    PAGES,
    ROOT,
    Command,
    Python,
    anchors,
    leads_nowhere,
    steps,
    steps_of,
)
from tests.readers import GIVEN, smaller

import retort
from retort import cli
from retort.recipe import (
    RECIPES,
    DistillRecipe,
    Frozen,
    SampleRecipe,
    ScoreRecipe,
    VerifierRecipe,
    load,
)
from retort.train.plan import Plan, plan

SOURCE = Path(retort.__file__).parent

KINDS: Mapping[str, type[Frozen]] = {
    "distill": DistillRecipe,
    "sample": SampleRecipe,
    "score": ScoreRecipe,
    "verifier": VerifierRecipe,
}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Goes to a folder with what the reader of a page has, and returns the page's name."""

    def go(page: Path) -> str:
        name = page.relative_to(ROOT).as_posix()
        for path, make in GIVEN.get(name, {}).items():
            make(tmp_path / path)
        (tmp_path / "recipes").symlink_to(RECIPES)
        monkeypatch.chdir(tmp_path)
        return name

    return go


# ---------------------------------------------------------------- running


pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
def test_a_page_runs_as_printed(
    page: Path,
    reader: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = reader(page)
    names: dict[str, Any] = {}
    for step in steps(page):
        if isinstance(step, Python):
            check_python(step)
            if not step.marked:
                exec(compile(step.text, step.place, "exec"), names)
            continue
        check(step)
        words = step.retort
        if words is None or step.marked or step.synopsis:
            continue
        monkeypatch.setattr(sys, "argv", ["retort", *words, *smaller(name, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0, (step.place, step.text, capsys.readouterr().err)
    if name == "README.md":
        reports()


def reports() -> None:
    """Which files, and of which models, is what a reader of the README looks at."""
    for report in ("first-report", "report"):
        made = {path.name for path in Path("runs", report).iterdir()}
        assert {"report.html", "coverage.png", "coverage.svg", "curves.json"} <= made
    models = json.loads(Path("runs/report/curves.json").read_text())["models"]
    assert [model["name"] for model in models] == ["my-llama", "my-hybrid"]


# ---------------------------------------------------------------- what commands name


def check(command: Command) -> None:
    """Fails for a command that this project does not have as it is written."""
    words = command.retort
    for word in command.words:
        check_path(command.place, word)
    if words is not None:
        (check_synopsis if command.synopsis else check_words)(command.place, words)
        started = command.words[0] == "retort"
        assert started or command.marked, f"{command.place}: neither run nor marked"
    elif command.words[0] == "make":
        check_targets(command)
    else:
        check_other(command)


def check_path(place: str, word: str) -> None:
    if word.startswith(("benchmarks/", "docs/", "recipes/", "src/")):
        assert (ROOT / word).exists(), f"{place}: no {word}"


def check_words(place: str, words: list[str]) -> None:
    """The words of a whole command, as the command line and the recipe read them."""
    try:
        name, params = parsed(words)
        if name in KINDS:
            load(KINDS[name], params["sources"])
    except Exception as error:
        raise AssertionError(f"{place}: {error}") from error


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that words call, and what it is given; the command line's own errors."""
    command, name, rest = typer.main.get_command(cli.app), "retort", words
    while commands := getattr(command, "commands", None):
        if not rest:
            return name, {}
        name, *rest = rest
        assert name in commands, f"no command {name}"
        command = commands[name]
    return name, command.make_context(name, list(rest)).params


def check_synopsis(place: str, words: list[str]) -> None:
    """A synopsis has placeholders for values; commands, options and keys are as they are."""
    command: Any = typer.main.get_command(cli.app)
    rest = list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    assert not (rest and getattr(command, "commands", None)), f"{place}: no command {rest[0]}"
    options = {name for each in command.params for name in each.opts}
    kind = KINDS.get(command.name)
    for word in rest:
        for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", word):
            assert option in options, f"{place}: no option {option}"
        key = re.match(r"([a-z_]+)[\w.]*=", word)
        if kind is not None and key is not None:
            assert key[1] in kind.model_fields, f"{place}: no key {key[1]}"


def check_targets(command: Command) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in command.words[1:]:
        assert "=" in target or target in targets, f"{command.place}: no target {target}"


def check_other(command: Command) -> None:
    """Scripts of this project have the options named; what is not ours is not run."""
    program, *words = command.words
    assert command.marked or program == "source", f"{command.place}: neither run nor marked"
    if program == "python" and words[0].startswith("benchmarks/"):
        script = (ROOT / words[0]).read_text(encoding="utf-8")
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in script, f"{command.place}: no option {option}"


def check_python(block: Python) -> None:
    """What a block imports of this project is there; it need not be run for that."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("retort"):
            module = __import__(node.module or "", fromlist=["_"])
            for alias in node.names:
                assert getattr(module, alias.name, None) is not None, f"{block.place}: {alias.name}"


@pages
def test_commands_in_the_text_are_there(page: Path) -> None:
    for words in re.findall(r"`retort( [a-z][^`]*)`", page.read_text(encoding="utf-8")):
        check_synopsis(f"{page.name}: retort{words}", words.split())


WRONG = {
    "an option": "retort grade runs/a --worker 2",
    "an option of a marked command": "retort bench decode --devise cuda  # needs a GPU",
    "an option's value": "retort report runs/a --aggregate best  # takes hours",
    "an option of a synopsis": "retort report RUN ... [--outt FOLDER]",
    "a key of a synopsis": "retort score run=RUN modle=FOLDER",
    "a command": "retort sampel out=runs/a",
    "a command of a synopsis": "retort sampel out=RUN",
    "a recipe": "retort distill recipes/llamba-2b.yaml --plan",
    "a recipe that is laid over": "retort sample sample/gsm9k.yaml model=m out=o  # needs a GPU",
    "a key": "torchrun -m retort distill recipes/llamba-1b.yaml sed=1  # needs GPUs",
    "a target": "make tests",
    "a script": "python benchmarks/gradings.py DATA out.json  # takes minutes",
    "an option of a script": "python benchmarks/grading.py a b --worker 2  # takes minutes",
    "a program that is not ours": "pip install ray",
    "a mark": "vllm serve exported  # needs a GPUU",
}


@pytest.mark.parametrize("line", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found(line: str) -> None:
    (command,) = steps_of("page", f"    {line}\n")
    assert isinstance(command, Command)
    with pytest.raises(AssertionError, match=r"^page:1: |no command"):
        check(command)


def test_blocks_are_found() -> None:
    text = "Text.\n\n    retort \\\n        runs\n\n```\nmake lint\n```\n\n```python\nx = 1\n```\n"
    found = list(steps_of("page", text + "\n    A=1 retort grade RUN  # takes hours\n"))
    assert [step.place for step in found] == ["page:3", "page:7", "page:10", "page:14"]
    runs, lint, python, last = found
    assert isinstance(runs, Command)
    assert isinstance(lint, Command)
    assert isinstance(last, Command)
    assert runs.words == ["retort", "runs"]
    assert (lint.synopsis, lint.marked) == (False, False)
    assert python == Python("page:10", "x = 1\n")
    assert (last.synopsis, last.marked) == (True, True)


# ---------------------------------------------------------------- where pages lead


@pages
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8"))
    for file, anchor in links:
        target = page.parent / file if file else page
        assert not leads_nowhere(target, anchor), (file, anchor)


@pages
def test_files_and_names_of_the_code_are_there(page: Path) -> None:
    """`ops/ssd.py: step` is a name in a file; files are those of the package or the repository."""
    named = re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", page.read_text(encoding="utf-8"))
    for file, name in named:
        path = next((p for p in (SOURCE / file, ROOT / file) if p.is_file()), None)
        assert path is not None, file
        if name:
            wanted = rf"^ *(def|class) {name.split('.')[-1]}\b|^{name}\b"
            assert re.search(wanted, path.read_text(encoding="utf-8"), re.MULTILINE), (file, name)


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[[^\]]+\]\((\S+\.md)\)", index, flags=re.MULTILINE)
    assert sorted(listed) == sorted(p.name for p in PAGES[1:] if p.name != "README.md")


POINTER = re.compile(r"\((docs/[\w-]+\.md|README\.md)(?:#([\w-]+))?\)")


def test_errors_point_to_headings_that_are_there() -> None:
    """A message may end in a pointer such as (docs/sampling.md#seconds), to say where more is."""
    found = [
        (path.name, file, anchor)
        for path in sorted(SOURCE.rglob("*.py"))
        for file, anchor in POINTER.findall(path.read_text(encoding="utf-8"))
    ]
    assert len(found) >= 12
    assert not [each for each in found if leads_nowhere(ROOT / each[1], each[2])]
    assert leads_nowhere(ROOT / "docs" / "sampling.md", "secondss")
    assert "seconds" in anchors(ROOT / "docs" / "sampling.md")


# ---------------------------------------------------------------- costs

GIB = 2**30
REPRODUCED = ("llamba-1b", "llamba-4b", "mamba-in-llama-1b", "mamba-in-llama-3b")


def cost_row(name: str, found: Plan) -> str:
    """What a plan says, as a row of the table."""
    hours, most = found.hours, max(stage.memory.total for stage in found.stages)
    assert hours is not None
    return (
        f"| `{name}` | {found.tokens / 1e9:.3g} B | {found.flops:.2e} "
        f"| {hours * found.processes:.3g} | {found.processes} x {found.gpu}, {hours:.3g} h "
        f"| {most / GIB:.1f} | {found.saving / GIB:.1f} | {found.disk.total / GIB:.0f} |"
    )


def test_costs_are_those_of_the_plans() -> None:
    text = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    for name in (each for first in REPRODUCED for each in (first, f"{first}-sft")):
        row = cost_row(name, plan(load(DistillRecipe, [RECIPES / f"{name}.yaml"])))
        assert row in text.splitlines(), row
