"""Rows from files of every kind, wherever they are, in an order that any index can be read from."""

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.data import blocks, files
from retort.data.faults import NO_OBJECT, NOT_JSON, NOT_TEXT, TOO_LONG, Fault
from retort.data.files import KEPT, RUN_BYTES, RUN_ROWS, FileRows, file_rows
from retort.data.rows import permutation, shuffled
from retort.recipe import Text


def parquet(path: Path, texts: Sequence[Any], group: int = 3, **columns: list[Any]) -> Path:
    pq.write_table(pa.table({"text": texts, **columns}), path, row_group_size=group)
    return path


def jsonl(path: Path, texts: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def opened(path: Path, seed: int = 0) -> FileRows:
    return file_rows(Text(kind="text", path=path), ["text"], lambda row: row["text"], seed)


def contents(rows: FileRows, indices: range) -> list[Any]:
    return [None if row is None else row.content for row in rows.read(indices)]


def numbered(start: int, stop: int) -> list[str]:
    return [f"text {i}" for i in range(start, stop)]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with 20 texts in files of every kind, and files that are none of its data."""
    folder = tmp_path / "data"
    (folder / "deeper").mkdir(parents=True)
    (folder / ".cache").mkdir()
    parquet(folder / "a.parquet", numbered(0, 8))
    parquet(folder / "deeper" / "b.PARQUET", numbered(8, 10))
    jsonl(folder / "c.jsonl", numbered(10, 18))
    (folder / "d.txt").write_text("text 18")
    (folder / "e.txt").write_text("text 19")
    (folder / "README.md").write_text("Nothing to learn.")
    (folder / ".cache" / "f.txt").write_text("hidden")
    return folder


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("seed", [0, 1])
def test_every_pass_has_every_row_once(mixed: Path, seed: int) -> None:
    rows = opened(mixed, seed)
    assert rows.rows == 20
    passes = [contents(rows, range(20 * i, 20 * i + 20)) for i in range(3)]
    assert all(sorted(each) == sorted(numbered(0, 20)) for each in passes)
    assert len({tuple(each) for each in passes}) == 3


def test_rows_of_a_block_have_another_order_in_each_pass(tmp_path: Path) -> None:
    rows = opened(parquet(tmp_path / "a.parquet", numbered(0, 20), group=20))
    passes = [contents(rows, range(20 * i, 20 * i + 20)) for i in range(3)]
    assert all(sorted(each) == sorted(numbered(0, 20)) for each in passes)
    assert len({tuple(each) for each in passes}) == 3


def test_seeds_differ_and_repeat(mixed: Path) -> None:
    orders = [contents(opened(mixed, seed), range(20)) for seed in (0, 1, 0)]
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


def test_any_index_is_found_alone(mixed: Path) -> None:
    """As after a resume, and whatever was read before it."""
    whole = contents(opened(mixed), range(60))
    assert [contents(opened(mixed), range(i, i + 1))[0] for i in reversed(range(60))] == whole[::-1]
    assert contents(opened(mixed), range(15, 45)) == whole[15:45]


def test_blocks_are_shuffled_and_their_rows_too(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", numbered(0, 400), group=20)
    found = [int(text.split()[1]) for text in contents(opened(path), range(400))]
    groups = [[number // 20 for number in found[i : i + 20]] for i in range(0, 400, 20)]
    assert all(len(set(group)) == 1 for group in groups)  # read together
    assert [group[0] for group in groups] != list(range(20))
    assert all(found[i : i + 20] != sorted(found[i : i + 20]) for i in range(0, 400, 20))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_every_pass_is_a_permutation(count: int, seed: int) -> None:
    passes = [[shuffled(count, seed, p * count + i) for i in range(count)] for p in range(3)]
    assert all(sorted(order) == list(range(count)) for order in passes)
    assert passes[0] == [shuffled(count, seed, i) for i in range(count)]  # whatever came between


def test_orders_are_the_same_everywhere_and_for_ever() -> None:
    """A run that is continued elsewhere, or with another numpy, must go on in the same order."""
    assert permutation(8, 3, 1).tolist() == [1, 3, 6, 0, 7, 2, 4, 5]


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("pattern", ["*.parquet", "**/*.jsonl", "[de].txt"])
def test_patterns(mixed: Path, pattern: str) -> None:
    wanted = {"*.parquet": 8, "**/*.jsonl": 8, "[de].txt": 2}
    assert opened(mixed / pattern).rows == wanted[pattern]


def test_places_are_files_and_rows(mixed: Path) -> None:
    rows = opened(mixed)
    places = {row.content: row.place for row in rows.read(range(20)) if row is not None}
    assert places["text 0"] == f"{mixed}/a.parquet:1"
    assert places["text 7"] == f"{mixed}/a.parquet:8"
    assert places["text 17"] == f"{mixed}/c.jsonl:8"
    assert places["text 18"] == f"{mixed}/d.txt"


def test_only_the_columns_asked_for_are_decoded(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ["a", "b"], other=["x" * 1000, "y"])
    seen: list[dict[str, Any]] = []
    data = Text(kind="text", path=path)
    file_rows(data, ["text"], lambda row: seen.append(row) or "", 0).read(range(2))
    assert sorted(map(str, seen)) == ["{'text': 'a'}", "{'text': 'b'}"]


def test_few_blocks_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a block is decoded once for the rows of it that are read together."""
    loads: list[int] = []
    load = blocks.RowGroup.load

    def counted(self: blocks.RowGroup, columns: Sequence[str]) -> Any:
        loads.append(self.number)
        return load(self, columns)

    monkeypatch.setattr(blocks.RowGroup, "load", counted)
    rows = opened(parquet(tmp_path / "a.parquet", numbered(0, 100), group=10))
    assert loads == []  # opening reads the file's index alone
    rows.read(range(100))
    assert sorted(loads) == list(range(10))
    assert len(rows._kept) == KEPT


def test_lines_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LINES", 4)
    monkeypatch.setattr(blocks, "BYTES", 200)
    texts = [*numbered(0, 10), "x" * 500, *numbered(11, 13)]
    rows = opened(jsonl(tmp_path / "a.jsonl", texts))
    assert [block.rows for block in rows.blocks] == [4, 4, 3, 2]
    assert sorted(contents(rows, range(13))) == sorted(texts)


def test_a_file_larger_than_memory(tmp_path: Path) -> None:
    """Of 30 MB of lines, the blocks that are kept and little more are in memory."""
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(30_000):
            file.write(json.dumps({"text": f"{i} {'x' * 1000}"}) + "\n")
    tracemalloc.start()
    rows = opened(path)
    for start in range(0, 30_000, 3001):
        rows.read(range(start, start + 10))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12e6


@pytest.mark.parametrize(("size", "run"), [(10, RUN_ROWS), (RUN_BYTES // 8, 8), (2 * RUN_BYTES, 1)])
def test_rows_read_together_are_few_where_they_are_long(
    tmp_path: Path, size: int, run: int
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("x" * size)
    assert opened(tmp_path).run == run


def test_files_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through any file system that fsspec knows, of which the hub's is one."""
    memory = fsspec.filesystem("memory")
    for i in range(2):
        with memory.open(f"/elsewhere/{i}.parquet", "wb") as file:
            pq.write_table(pa.table({"text": numbered(5 * i, 5 * i + 5)}), file, row_group_size=2)
    addresses = ["memory://elsewhere/0.parquet", "memory://elsewhere/1.parquet"]
    monkeypatch.setattr(files, "hub_files", lambda hub, subset, split: addresses)
    data = Text(kind="text", hub="some/texts")
    rows = file_rows(data, ["text"], lambda row: row["text"], 0)
    assert sorted(contents(rows, range(10))) == numbered(0, 10)
    assert len(rows.blocks) == 6


# ---------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, "no such file, folder or pattern"),
        ("*.jsonl", None, "no such file, folder or pattern"),
        ("", None, "no such file, folder or pattern"),  # an empty folder
        ("a.csv", b"text\na", r"files are to end in \.parquet, \.jsonl, \.txt"),
        ("a.jsonl", b"", "no rows in it"),
        ("a.jsonl", b"\n \n", "no rows in it"),
        ("a.jsonl", b'{"body": "a", "title": "b"}', "no column 'text'; it has: body, title"),
        ("a.jsonl", b'[]\n\n{"body": "a"}', "no column 'text'; it has: body"),
        ("a.parquet", b"", "damaged, or no parquet file"),
        ("a.parquet", b"PAR1 and then something else PAR1", "damaged, or no parquet file"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        opened(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet: no rows in it"):
        opened(parquet(tmp_path / "a.parquet", []))


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ["a"], url=["b"])
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'body'; it has: text, url"):
        file_rows(Text(kind="text", path=path), ["body"], lambda row: row["body"], 0)


def test_a_parquet_file_cut_short(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", numbered(0, 1000))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.parquet: damaged, or no parquet file"):
        opened(path)


def test_a_row_group_overwritten(tmp_path: Path) -> None:
    """The index at the file's end is whole, so this is found when the rows are read."""
    path = tmp_path / "a.parquet"
    table = pa.table({"text": numbered(0, 1000)})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[100:1000] = bytes(900)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: damaged, or no parquet file"):
        opened(path).read(range(1000))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{", NOT_JSON),
        (b'{"text": "\xff"}', NOT_TEXT),
        (b"[1, 2]", NO_OBJECT),
        (b"3", NO_OBJECT),
        (b"[" * 100_000, NOT_JSON),
        (b'{"text": "' + b"a" * (16 << 20) + b'"}', TOO_LONG),
        (b"  ", None),
    ],
)
def test_a_broken_line_is_a_fault_of_its_own(
    tmp_path: Path, line: bytes, fault: Fault | None
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\r\n')
    found = contents(opened(path), range(3))
    assert sorted(map(str, found)) == sorted(map(str, ["a", fault, "b"]))


def test_texts_that_are_not_valid(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe")
    assert contents(opened(path), range(1)) == [NOT_TEXT]
    broken = pa.array([b"good", b"\xff", b"fine"]).cast(pa.binary())
    texts = pa.StringArray.from_buffers(3, broken.buffers()[1], broken.buffers()[2])
    found = contents(opened(parquet(tmp_path / "b.parquet", texts)), range(3))
    assert sorted(map(str, found)) == sorted(map(str, ["good", NOT_TEXT, "fine"]))
