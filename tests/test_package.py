"""The package as a user meets it: its public names, what importing it costs, what is installed."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import retort

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "altair", "numpy")


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["retort", "retort.console"])
def test_import_is_light(module: str) -> None:
    assert modules_after(f"import {module}").isdisjoint(HEAVY)


@pytest.mark.parametrize("name", ["grade", "report"])
def test_torch_free_subpackages(name: str) -> None:
    assert modules_after(f"import retort; retort.{name}").isdisjoint({"torch", "transformers"})


@pytest.mark.parametrize("name", retort.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(retort, name) is not None


def test_dir_lists_public_names() -> None:
    assert dir(retort) == sorted(retort.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'retort' has no attribute 'lod'"):
        _ = retort.lod  # type: ignore[attr-defined]


def test_installed_metadata() -> None:
    installed = metadata.metadata("retort-lm")
    assert installed["Version"] == retort.__version__
    assert installed["License-Expression"] == "Apache-2.0"
    scripts = metadata.entry_points(group="console_scripts", name="retort")
    assert [script.value for script in scripts] == ["retort.cli:main"]


def test_package_is_typed() -> None:
    assert (Path(retort.__file__).parent / "py.typed").is_file()


def test_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {retort.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_recipes_at_the_root_are_those_of_the_package() -> None:
    assert (ROOT / "recipes").resolve() == ROOT / "src" / "retort" / "recipes"
