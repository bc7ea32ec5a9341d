"""Which files of a dataset are read: its own, or the hub's parquet copy of them. No network."""

from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retort.data import hub
from retort.data.files import file_rows
from retort.data.hub import copied_files, hub_files, own_files
from retort.recipe import Text

CARD = """---
configs:
- config_name: all
  data_files:
  - split: train
    path: many/*.parquet
- config_name: sample
  data_files:
  - split: train
    path: few/*.parquet
  - split: test
    path: held-out.parquet
---
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset with a card, as it is on the hub: there, too, its files are resolved by it."""
    folder = tmp_path / "dataset"
    for name in ("many/1", "many/0", "few/0", "held-out"):
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [name]}), path)
    (folder / "README.md").write_text(CARD)
    return folder


def names(files: list[str], folder: Path) -> list[str]:
    return [str(Path(each).relative_to(folder)) for each in files]


def test_the_card_says_which_files(dataset: Path) -> None:
    all_of_it = own_files(str(dataset), "all", "train")
    assert names(all_of_it, dataset) == ["many/0.parquet", "many/1.parquet"]
    held_out = own_files(str(dataset), "sample", "test")
    assert names(held_out, dataset) == ["held-out.parquet"]


def test_a_dataset_is_read_by_its_card(dataset: Path) -> None:
    data = Text(kind="text", hub=str(dataset), subset="sample")
    rows = file_rows(data, ["text"], lambda row: row["text"], 0).read(range(2))
    assert [row and row.content for row in rows] == ["few/0", "few/0"]


@pytest.mark.parametrize(
    ("subset", "split", "message"),
    [
        ("sample", "validation", "no split 'validation'; it has: train, test"),
        ("other", "train", "other"),
        (None, "train", "all.*sample"),
    ],
)
def test_subsets_and_splits_that_are_not_there(
    dataset: Path, subset: str | None, split: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        hub_files(str(dataset), subset, split)
    assert str(caught.value).startswith(str(dataset))
    assert "\n" not in str(caught.value)


def test_files_of_another_format_are_not_the_ones(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    assert own_files(str(tmp_path), None, "train") == []


# ---------------------------------------------------------------- the hub's copy


@pytest.fixture
def copies() -> tuple[fsspec.AbstractFileSystem, str]:
    """Two datasets as the hub copies them: one of a single subset, one of two."""
    memory = fsspec.filesystem("memory")
    paths = ("one/default/train/1", "one/default/train/0", "one/default/test/0", "two/a/train/0")
    for path in (*paths, "two/b/partial-train/0"):
        memory.pipe(f"/copies/{path}.parquet", b"")
    return memory, "/copies"


def test_the_only_subset_needs_no_name(copies: tuple[fsspec.AbstractFileSystem, str]) -> None:
    memory, root = copies
    found = copied_files(memory, f"{root}/one", None, "train")
    assert found == [f"{root}/one/default/train/{i}.parquet" for i in range(2)]
    assert copied_files(memory, f"{root}/one", "default", "train") == found


@pytest.mark.parametrize(
    ("subset", "split", "message"),
    [
        (None, "train", "no subset None; it has: a, b"),
        ("c", "train", "no subset 'c'; it has: a, b"),
        ("b", "train", "no split 'train'; it has: partial-train"),
    ],
)
def test_copies_that_are_not_there(
    copies: tuple[fsspec.AbstractFileSystem, str], subset: str | None, split: str, message: str
) -> None:
    memory, root = copies
    with pytest.raises(ValueError, match=message):
        copied_files(memory, f"{root}/two", subset, split)


def test_without_own_parquet_the_copy_is_read(
    copies: tuple[fsspec.AbstractFileSystem, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, root = copies
    asked = []

    def url_to_fs(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
        asked.append(url)
        return memory, f"{root}/one"

    monkeypatch.setattr(hub, "own_files", lambda *_: [])
    monkeypatch.setattr(hub, "url_to_fs", url_to_fs)
    addresses = hub_files("some/one", None, "test")
    assert asked == ["hf://datasets/some/one@refs/convert/parquet"]
    assert addresses == [f"memory://{root}/one/default/test/0.parquet"]


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError, OSError, RuntimeError])
def test_without_a_network(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """One message, which says how to do without."""

    def unreachable(*_: object) -> list[str]:
        raise error("no route\nto host")

    monkeypatch.setattr(hub, "own_files", unreachable)
    wanted = (
        rf"some/one: not to be had from the hub \({error.__name__}: no route to host\); with "
        "`hf download --repo-type dataset some/one --local-dir FOLDER`, and path=FOLDER"
    )
    with pytest.raises(ValueError, match=wanted):
        hub_files("some/one", None, "train")
