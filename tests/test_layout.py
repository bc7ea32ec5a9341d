"""Imports point one way, and reports need no torch: read from the source, not from running it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import retort

SOURCE = Path(retort.__file__).parent

# What each unit (a module or sub-package of retort) may import of retort besides itself and the
# version. `retort` stands for `__init__.py` and the lazy public names in it.
LEAVES: dict[str, set[str]] = {
    name: set() for name in ("ops", "recipe", "metrics", "tables", "interrupts")
}
RUNS = {"recipe", "console", "metrics", "store", "tables", "interrupts"}
LIBRARY: dict[str, set[str]] = LEAVES | {
    "console": {"metrics"},
    "trackers": {"console", "recipe"},
    "store": {"tables"},
    "model": {"ops"},
    "data": {"recipe", "model", "store", "tables"},
    "sample": {*RUNS, "ops", "model", "data"},
    "train": {*RUNS, "trackers", "ops", "model", "data", "sample", "grade"},
    "grade": RUNS,
    "score": {*RUNS, "model", "data", "sample", "grade", "report"},
    "report": RUNS,
    "bench": {"recipe", "console", "ops", "model", "data", "sample", "train", "report", "tables"},
    "inspection": {"console", "model"},
    "listing": {"store", "tables"},
    "doctor": {"ops", "model"},
    "publishing": {"recipe", "console", "model", "data", "report", "inspection"},
}
EDGES: dict[str, set[str]] = LIBRARY | {
    "_version": set(),
    "retort": {"model", "sample", "grade", "report", "publishing"},
    "demo": {"retort", *LIBRARY},
    "cli": {"retort", "demo", *LIBRARY},
    "__main__": {"cli"},
}

# `retort --help` must answer at once, so the command line imports the rest inside its commands.
EAGER_IN_CLI = {"console", "recipe"}

HEAVY = {"torch", "transformers"}
LIGHT_UNITS = {*RUNS, "grade", "report"}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full dotted name."""

    file: str  # relative to the package, with forward slashes
    line: int
    module: str
    eager: bool  # executed when the file is imported

    @property
    def source(self) -> str:
        return unit_of_file(self.file)

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    @property
    def target(self) -> str | None:
        """The unit of retort that is imported, None for third parties."""
        _, *inner = self.module.split(".")
        return [*inner, "retort"][0] if self.top == "retort" else None

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def unit_of_file(file: str) -> str:
    unit = file.split("/")[0].removesuffix(".py")
    return "retort" if unit == "__init__" else unit


def imports_of(package: Path) -> list[Import]:
    """All imports of a package's files, those inside functions too."""
    return [found for path in sorted(package.rglob("*.py")) for found in imports_in(package, path)]


def imports_in(package: Path, path: Path) -> Iterator[Import]:
    file = path.relative_to(package).as_posix()
    for node, eager in walk(ast.parse(path.read_text(encoding="utf-8"))):
        for module in imported_modules(node, file, package):
            yield Import(file, node.lineno, module, eager)


def walk(node: ast.AST, eager: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements below `node`, and whether importing the file executes them."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, eager
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        eager = False
    typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    for child in ast.iter_child_nodes(node):
        yield from walk(child, eager and not typing_only)


def imported_modules(node: ast.Import | ast.ImportFrom, file: str, package: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = absolute_base(node, file)
    # Of `from retort import x`, x may be a unit or a public name; deeper down the base says enough.
    if base == "retort":
        return [
            f"retort.{alias.name}" if is_unit(package, alias.name) else public(alias.name)
            for alias in node.names
        ]
    return [base]


def absolute_base(node: ast.ImportFrom, file: str) -> str:
    if not node.level:
        return node.module or ""
    folders = ["retort", *file.split("/")[:-1]]
    return ".".join([*folders[: len(folders) - node.level + 1], *filter(None, [node.module])])


def is_unit(package: Path, name: str) -> bool:
    return (package / name).is_dir() or (package / f"{name}.py").is_file()


def public(name: str) -> str:
    return "retort._version" if name == "__version__" else "retort"


def wrong_edges(imports: list[Import]) -> list[str]:
    def allowed(unit: str) -> set[str | None]:
        return {None, unit, "_version", *EDGES.get(unit, ())}

    return [str(i) for i in imports if i.target not in allowed(i.source)]


def eager_cli_imports(imports: list[Import]) -> list[str]:
    allowed = {None, "cli", "_version", *EAGER_IN_CLI}
    eager = [i for i in imports if i.source == "cli" and i.eager]
    return [str(i) for i in eager if i.target not in allowed or i.top in HEAVY]


def heavy_imports(imports: list[Import]) -> list[str]:
    light = [i for i in imports if i.source in LIGHT_UNITS]
    return [str(i) for i in light if i.top in HEAVY]


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return imports_of(SOURCE)


def test_every_unit_has_its_edges() -> None:
    units = {unit_of_file(path.relative_to(SOURCE).as_posix()) for path in SOURCE.rglob("*.py")}
    assert units <= EDGES.keys(), "say in EDGES what the new unit may import"


def test_imports_point_one_way(imports: list[Import]) -> None:
    assert wrong_edges(imports) == []


def test_command_line_imports_inside_commands(imports: list[Import]) -> None:
    assert eager_cli_imports(imports) == []


def test_reports_need_no_torch(imports: list[Import]) -> None:
    assert heavy_imports(imports) == []


def test_edges_have_no_cycle() -> None:
    done: list[str] = []
    while ready := [u for u in EDGES if u not in done and EDGES[u] <= set(done)]:
        done += ready
    assert set(done) == EDGES.keys()


# The check itself, on packages made to break the rules.


def package_with(tmp_path: Path, file: str, source: str) -> list[Import]:
    for unit in EDGES.keys() - {"retort"}:
        (tmp_path / unit).mkdir()
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    return imports_of(tmp_path)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/decoder.py", "import retort.train.loop"),
        ("model/decoder.py", "import numpy, retort.sample"),
        ("model/decoder.py", "from retort.train import loop"),
        ("model/decoder.py", "from retort import train"),
        ("model/decoder.py", "from retort import load"),
        ("model/decoder.py", "from ..train import loop"),
        ("model/decoder.py", "from .. import train"),
        ("model/deeper/decoder.py", "from ...train.loop import run"),
        ("ops/ssd.py", "def f():\n    from retort.model import config"),
        ("recipe.py", "if TYPE_CHECKING:\n    from retort.model import config"),
        ("console.py", "import retort"),
        ("grade/run.py", "try:\n    import retort.sample\nexcept ImportError:\n    pass"),
        ("demo/run.py", "from retort.cli import main"),
    ],
)
def test_wrong_edge_is_found(tmp_path: Path, file: str, source: str) -> None:
    assert len(wrong_edges(package_with(tmp_path, file, source))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/decoder.py", "import torch\nfrom retort.ops import ssd\nfrom . import config"),
        ("model/decoder.py", "from retort import __version__, ops\nfrom ..ops.ssd import step"),
        ("train/loop.py", "from retort import console, recipe"),
        ("cli.py", "def demo():\n    from retort.demo import run"),
        ("__init__.py", "from retort._version import __version__"),
    ],
)
def test_right_edge_is_not(tmp_path: Path, file: str, source: str) -> None:
    assert wrong_edges(package_with(tmp_path, file, source)) == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from retort.model import decoder", 1),
        ("import torch", 1),
        ("class A:\n    import retort.sample", 1),
        ("from retort import console\nfrom retort.recipe import load", 0),
        ("def sample():\n    import torch\n    import retort.sample", 0),
        ("if TYPE_CHECKING:\n    from retort.model import decoder", 0),
    ],
)
def test_eager_command_line_is_found(tmp_path: Path, source: str, wrong: int) -> None:
    assert len(eager_cli_imports(package_with(tmp_path, "cli.py", source))) == wrong


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("report/metrics.py", "def f():\n    import torch", 1),
        ("grade/answers.py", "from transformers import AutoTokenizer", 1),
        ("grade/run.py", "import torch.nn", 1),
        ("report/plots.py", "import altair", 0),
    ],
)
def test_torch_in_a_light_unit_is_found(tmp_path: Path, file: str, source: str, wrong: int) -> None:
    assert len(heavy_imports(package_with(tmp_path, file, source))) == wrong
