"""Run folders: what is written is read back whole, nothing is mixed, nothing foreign is touched."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retort.store import COMPLETIONS, PROBLEMS, Run, Table, fingerprint, sample_seed
from retort.tables import DamagedPart

IDENTITY = {"model": "tiny", "sampling": {"temperature": 0.8, "top_p": 1.0}, "n": (1, 2)}
FACTS = {"name": "a run", "device": "cpu"}


def completion(problem_id: str, sample_idx: int, **changes: Any) -> dict[str, Any]:
    row = {
        "problem_id": problem_id,
        "sample_idx": sample_idx,
        "seed": sample_seed(0, problem_id, sample_idx),
        "text": f"Thinking\n\N{GREEK SMALL LETTER PI}\0 about {problem_id}.",
        "token_count": 7,
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "logprob": -1.5,
        "batch": 0,
        "started": 1.0,
        "ended": 2.5,
    }
    return row | changes


def problem(problem_id: str) -> dict[str, Any]:
    return {"problem_id": problem_id, "question": "1 + 1?", "answer": "2"}


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path / "completions", COMPLETIONS)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.start(tmp_path / "run", IDENTITY, FACTS)


def content(folder: Path) -> dict[str, bytes]:
    # .lock names the last writer, and so may change
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Tables


def test_rows_come_back_as_they_were(table: Table) -> None:
    first, second = [completion("a", 0), completion("a", 1)], [completion("b", 0, logprob=-3e300)]
    table.append(first)
    table.append(second)
    assert table.read().to_pylist() == first + second
    assert table.read().schema == COMPLETIONS
    assert table.keys() == {("a", 0), ("a", 1), ("b", 0)}


def test_columns_are_read_in_the_order_asked_for(table: Table) -> None:
    table.append([completion("a", 4)])
    read = table.read(["sample_idx", "problem_id"])
    assert read.to_pydict() == {"sample_idx": [4], "problem_id": ["a"]}
    assert read.column_names == ["sample_idx", "problem_id"]


def test_empty_table_has_its_schema(table: Table) -> None:
    table.append([])
    assert not table.folder.exists()
    assert table.read().schema == COMPLETIONS
    assert table.read(["text"]).column_names == ["text"]
    assert table.keys() == set()


def test_unknown_column_is_an_error_and_not_an_empty_one(table: Table) -> None:
    table.append([completion("a", 0)])
    with pytest.raises(KeyError, match="txt"):
        table.read(["txt"])


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (completion("a", 0, txt="?"), "txt"),
        ({"problem_id": "a", "sample_idx": 0}, "finish_reason"),
        (completion("a", 0, text=None), "text"),
        (completion("a", 2**40), "int32|range|large"),
    ],
)
def test_row_that_does_not_fit_writes_nothing(table: Table, row: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        table.append([completion("b", 0), row])
    assert table.read().num_rows == 0


def test_parts_are_numbered_past_the_last_one(table: Table) -> None:
    for i in range(3):
        table.append([completion("a", i)])
    table.part_files()[1].unlink()
    table.append([completion("a", 3)])
    names = [path.name for path in table.part_files()]
    assert names == ["part-000000.parquet", "part-000002.parquet", "part-000003.parquet"]
    assert [part.num_rows for part in table.parts()] == [1, 1, 1]


def test_writer_that_dies_before_the_rename_leaves_no_part(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.append([completion("a", 0)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dies)
        with pytest.raises(KeyboardInterrupt):
            table.append([completion("a", 1)])
    assert table.keys() == {("a", 0)}
    table.append([completion("a", 2)])
    assert table.keys() == {("a", 0), ("a", 2)}
    assert len(list(table.folder.iterdir())) == 2, "the leftover is gone"


def dies(*_: Any) -> None:
    raise KeyboardInterrupt


def test_file_is_on_disk_before_it_has_its_name(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    rename = Path.replace

    def renamed(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", lambda handle: events.append("fsync"))
    monkeypatch.setattr(Path, "replace", renamed)
    table.append([completion("a", 0)])
    assert events == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_torn_part_is_named_and_can_be_set_aside(table: Table, keep: float) -> None:
    for i in range(3):
        table.append([completion("a", i)])
    torn = table.part_files()[1]
    whole = torn.read_bytes()
    torn.write_bytes(whole[: int(keep * len(whole))])
    for read in (table.read, table.keys):
        with pytest.raises(DamagedPart, match=rf"{torn} is damaged .* repeat .* redoes") as error:
            read()
        assert "\n" not in str(error.value)
    assert table.set_aside_damaged() == [torn.with_suffix(".damaged")]
    assert table.keys() == {("a", 0), ("a", 2)}
    assert table.rows() == 2
    assert table.set_aside_damaged() == []


def test_a_part_with_fewer_columns_is_not_damaged(table: Table) -> None:
    table.append([completion("a", 0)])
    (part,) = table.part_files()
    older = pq.read_table(part).drop_columns(["logprob"])
    pq.write_table(older, part)
    assert table.set_aside_damaged() == []
    assert table.keys() == {("a", 0)}
    with pytest.raises(ValueError, match=r"of another release, without the columns logprob; make"):
        table.read()


def test_flipped_bit_is_found(table: Table) -> None:
    table.append([completion("a", i, text=f"{i}" * 50) for i in range(50)])
    (part,) = table.part_files()
    whole, good = bytearray(part.read_bytes()), table.read()
    harmless = 0
    for place in range(4, len(whole), 37):
        part.write_bytes(bytes([*whole[:place], whole[place] ^ 1, *whole[place + 1 :]]))
        outcome = read_or_complaint(table)
        assert outcome == good or str(part) in str(outcome)
        harmless += outcome == good  # in a statistic or a page header's free text
    assert harmless < len(whole) / 37 / 2


def read_or_complaint(table: Table) -> pa.Table | str:
    try:
        return table.read()
    except ValueError as error:
        return str(error)


def test_part_of_another_schema_is_refused(table: Table) -> None:
    table.append([completion("a", 0)])
    other = table.folder / "part-000001.parquet"
    pq.write_table(pa.table({"problem_id": ["a"], "sample_idx": [1]}), other)
    with pytest.raises(ValueError, match=rf"{other}: of another release, without .*seed, text"):
        table.read()
    kinds = pq.read_table(table.part_files()[0]).set_column(1, "sample_idx", pa.array([0.5]))
    pq.write_table(kinds, other)
    with pytest.raises(ValueError, match=rf"{other}: of another release, with other kinds"):
        table.read()


# Runs


def test_run_is_started_and_opened(run: Run) -> None:
    opened = Run.open(run.folder)
    assert opened == run
    assert opened.name == "a run"
    assert opened.manifest == FACTS | {"identity": json.loads(json.dumps(IDENTITY))}


def test_tables_of_a_run(run: Run) -> None:
    run.problems.append([problem("a")])
    assert run.problems.read(["answer"]).to_pydict() == {"answer": ["2"]}
    assert run.verdict_versions() == []
    verdict = {"problem_id": "a", "sample_idx": 0, "correct": False, "method": "no answer"}
    for version in ("2", "1"):
        run.verdicts(version).append([verdict | {"answer": None, "group": None}])
    assert run.verdict_versions() == ["1", "2"]
    assert run.verdicts("1").read()["answer"].to_pylist() == [None]


def test_folder_without_manifest_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} is no run folder \(no run.json\)"):
        Run.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"identity": 3}', "\udcff"])
def test_manifest_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, errors="surrogateescape")
    for use in (Run.open, lambda folder: Run.start(folder, IDENTITY, FACTS)):
        with pytest.raises(ValueError, match=rf"{tmp_path}/run.json is "):
            use(tmp_path)


def test_same_identity_continues_and_updates_the_facts(run: Run) -> None:
    run.completions.append([completion("a", 0)])
    again = Run.start(run.folder, IDENTITY, {"name": "renamed", "batch": 8})
    assert again.manifest == run.manifest | {"name": "renamed", "batch": 8}
    assert Run.open(run.folder) == again
    assert again.completions.keys() == {("a", 0)}


def test_other_identity_is_refused_and_nothing_altered(run: Run) -> None:
    run.completions.append([completion("a", 0)])
    before = content(run.folder)
    other = {"model": "tiny", "sampling": {"temperature": 0.7, "top_p": 1.0}, "seed": 3}
    with pytest.raises(ValueError, match="holds another run") as error:
        Run.start(run.folder, other, {"name": "b"})
    message = str(error.value)
    assert "sampling.temperature was 0.8, is now 0.7" in message
    assert "n was [1, 2], is now absent" in message
    assert "seed was absent, is now 3" in message
    assert "top_p" not in message
    assert "force=true starts over" in message
    assert content(run.folder) == before


def test_force_starts_over_and_spares_what_is_not_its_own(run: Run) -> None:
    run.completions.append([completion("a", 0)])
    run.problems.append([problem("a")])
    (run.folder / "completions" / ".part-000001.parquet.tmp").write_text("half")
    for derived in ("scores-some-model", "verdicts-2", "votes-2"):
        Table(run.folder / derived, PROBLEMS).append([problem("a")])
    mine = [run.folder / "notes.txt", run.folder / "completions" / "notes.txt"]
    for path in mine:
        path.write_text("mine")
    fresh = Run.start(run.folder, {"model": "other"}, {"name": "b"}, force=True)
    assert fresh.manifest == {"name": "b", "identity": {"model": "other"}}
    assert content(run.folder).keys() == {"run.json", "notes.txt", "completions/notes.txt"}
    assert fresh.completions.keys() == set()


@pytest.mark.parametrize("force", [False, True])
def test_folder_of_something_else_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions" / "part-000000.parquet").write_text("somebody's")
    with pytest.raises(ValueError, match=r"holds files and no run\.json"):
        Run.start(tmp_path, IDENTITY, FACTS, force=force)
    assert content(tmp_path) == {"completions/part-000000.parquet": b"somebody's"}


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        Run.start(tmp_path / "run", IDENTITY, FACTS)


def test_run_killed_while_it_was_created_can_be_started(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("123")
    (tmp_path / ".run.json.tmp").write_text('{"identity"')
    assert Run.start(tmp_path, IDENTITY, FACTS) == Run.open(tmp_path)
    assert not (tmp_path / ".run.json.tmp").exists()


# The lock

HOLD = """
import sys, time
from pathlib import Path
from retort.store import Run

with Run.open(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def other_writer(run: Run) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(run.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.mark.multiprocess
def test_second_writer_is_told_who_holds_the_run(run: Run) -> None:
    run.completions.append([completion("a", 0)])
    with other_writer(run) as process:
        before = content(run.folder)
        message = rf"{run.folder} is being written by process {process.pid};"
        with pytest.raises(ValueError, match=message), run.lock():
            pass
        with pytest.raises(ValueError, match=message):
            Run.start(run.folder, {"model": "other"}, {}, force=True)
        assert content(run.folder) == before


@pytest.mark.multiprocess
def test_killed_writer_gives_the_lock_back(run: Run) -> None:
    with other_writer(run) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with run.lock():
            run.completions.append([completion("a", 0)])
    assert run.completions.keys() == {("a", 0)}


def test_lock_is_given_back_after_an_error(run: Run) -> None:
    with pytest.raises(ZeroDivisionError), run.lock():
        _ = 1 / 0
    with run.lock(), pytest.raises(ValueError, match=f"by process {os.getpid()};"), run.lock():
        pass


def test_run_that_was_started_over_cannot_be_written_by_its_old_owner(run: Run) -> None:
    Run.start(run.folder, {"model": "other"}, {}, force=True)
    with pytest.raises(ValueError, match="holds another run"), run.lock():
        pass


# Seeds and fingerprints


def test_seeds_are_the_same_everywhere() -> None:
    # literal values: another machine, Python or process must find these too
    assert sample_seed(0, "gsm8k/17", 5) == 8156113635058297241
    assert sample_seed(-1, "\N{GREEK SMALL LETTER PI}", 0) == 3598342489392628454


def test_seeds_differ_and_fit_63_bits() -> None:
    triples = [(r, p, i) for r in (0, 1, 11) for p in ("1", "11", "1/1", "") for i in range(300)]
    seeds = [sample_seed(*triple) for triple in triples]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    header = json.dumps({"w": {"dtype": "U8", "shape": [3 << 20], "data_offsets": [0, 3 << 20]}})
    weights = len(header).to_bytes(8, "little") + header.encode() + bytes(3 << 20)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("first")
    return tmp_path


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("config.json", 3),
        ("tokenizer.json", 0),
        ("model.safetensors", 12),
        ("model.safetensors", 200),
        ("model.safetensors", -1),
    ],
)
def test_fingerprint_sees_a_change(checkpoint: Path, name: str, place: int) -> None:
    before = fingerprint(checkpoint)
    flip(checkpoint / name, place)
    assert fingerprint(checkpoint) != before


def test_fingerprint_sees_renamed_and_added_files(checkpoint: Path) -> None:
    seen = [fingerprint(checkpoint)]
    (checkpoint / "model.safetensors").rename(checkpoint / "weights.safetensors")
    seen.append(fingerprint(checkpoint))
    for name in ("tokenizer_config", "generation_config", "mamba_config"):
        (checkpoint / f"{name}.json").write_text("{}")
        seen.append(fingerprint(checkpoint))
    assert len(set(seen)) == 5


def test_fingerprint_ignores_what_computes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    before = fingerprint(checkpoint)
    (checkpoint / "README.md").write_text("second")
    os.utime(checkpoint / "config.json", (0, 0))
    assert fingerprint(checkpoint) == before
    # the documented limit: the middle of a large file is not read
    flip(checkpoint / "model.safetensors", 3 << 19)
    assert fingerprint(checkpoint) == before


def test_fingerprint_needs_a_whole_checkpoint(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short"):
        fingerprint(checkpoint)
    weights.unlink()
    with pytest.raises(ValueError, match="is no checkpoint folder"):
        fingerprint(checkpoint)
