"""The demo's plumbing, with recipes so small that nothing is learnt."""

import shutil
import time
from pathlib import Path

import pytest
import yaml

from retort import demo
from retort.recipe import RECIPES
from retort.train.prepare import work_folder


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
    path = folder / "demo" / "sample.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["problems"]["count"] = 3
    recipe["sampling"] |= {"n": 4, "max_tokens": 20}
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(demo, "RECIPES", folder)
    return folder


@pytest.mark.multiprocess
@pytest.mark.usefixtures("small_recipes")
def test_demo_ends_in_a_report_and_does_nothing_twice(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    curves = demo.demo(out)
    assert [model.name for model in curves.models] == ["teacher", "pure", "hybrid"]
    assert {"report.html", "coverage.png", "curves.json"} <= {path.name for path in out.iterdir()}
    before = {path: path.stat().st_mtime_ns for path in (out / "samples").rglob("*.parquet")}
    models = {path: path.stat().st_mtime_ns for path in (out / "models").rglob("*.safetensors")}
    demo.demo(out)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert models == {path: path.stat().st_mtime_ns for path in models}


@pytest.mark.multiprocess
def test_a_failing_distillation_ends_the_other_and_tells_why(
    tmp_path: Path, small_recipes: Path
) -> None:
    path = small_recipes / "demo" / "hybrid.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["student"]["keep_attention"] = [99]
    path.write_text(yaml.safe_dump(recipe))
    path = small_recipes / "demo" / "pure.yaml"
    path.write_text(path.read_text().replace("tokens: 1200", "tokens: 90000000"))
    with pytest.raises(ValueError, match=r"distilling hybrid failed.*no layer 99"):
        demo.demo(tmp_path / "demo")
    metrics = work_folder(tmp_path / "demo" / "models" / "pure") / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.is_file() else 0
    time.sleep(1)
    assert size == (metrics.stat().st_size if metrics.is_file() else 0)
