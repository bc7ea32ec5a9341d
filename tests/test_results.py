"""What the pages say of results is what the raw numbers say."""

import json
import re
from pathlib import Path

import pytest
from benchmarks import results
from benchmarks.results import BLOCK, BLOCKS, PAGES, filled

PAGES_BY_NAME = {page.name: page for page in PAGES}


@pytest.mark.parametrize("name", PAGES_BY_NAME)
def test_tables_are_those_of_the_raw_numbers(name: str) -> None:
    page = PAGES_BY_NAME[name].read_text(encoding="utf-8")
    assert BLOCK.search(page)
    assert filled(page) == page, "make results writes them anew"


def test_other_numbers_make_other_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.loads((results.RESULTS / "ablations.json").read_text())
    raw["variants"][0]["points"][0]["coverage"]["value"] = 0.123
    (tmp_path / "ablations.json").write_text(json.dumps(raw))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    results.raw.cache_clear()
    page = PAGES_BY_NAME["results.md"].read_text(encoding="utf-8")
    blocks = {found[2]: found[0] for found in BLOCK.finditer(page)}
    try:
        changed = filled(blocks["ablations"])
    finally:
        results.raw.cache_clear()
    assert "| 12 % |" in changed
    assert changed != blocks["ablations"]


def test_a_block_that_nothing_makes() -> None:
    with pytest.raises(ValueError, match="block 'other': nothing makes it; there are demo-summary"):
        filled("<!-- results: other -->\n<!-- end -->")


def test_pages_have_no_table_of_results_twice() -> None:
    named = [found[2] for page in PAGES for found in BLOCK.finditer(page.read_text("utf-8"))]
    assert set(named) <= set(BLOCKS)
    for page in PAGES:
        own = [found[2] for found in BLOCK.finditer(page.read_text("utf-8"))]
        assert len(own) == len(set(own))


def test_figures_are_there() -> None:
    text = PAGES_BY_NAME["results.md"].read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\((figures/[^)]+)\)", text)
    assert shown
    for path in shown:
        assert (PAGES_BY_NAME["results.md"].parent / path).read_bytes().startswith(b"\x89PNG")
    assert {name for name, _ in results.figures()} >= {Path(path).stem for path in shown}
