"""What commands print."""

import json
import os
import pty
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.table import Table

from retort import console
from retort.console import Snapshot

NAN = float("nan")


# Messages and results


def test_fail_prints_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        console.fail("no [bold]such[/bold] key [/oops] :smile: in a.yaml")
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: no [bold]such[/bold] key [/oops] :smile: in a.yaml\n"


def test_long_messages_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    message = "/a/very/long/path" * 20
    console.say(message)
    console.warn(message)
    assert capsys.readouterr().err == f"{message}\nwarning: {message}\n"


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("a\x1b[2Jb\rc\x9bd\ne\u00a0é")
    assert capsys.readouterr().err == "a\ufffd[2Jb\ufffdc\ufffdd\ne\u00a0é\n"


def test_table_goes_to_stdout_whole(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("model", "text")
    table.add_row("[/b] :smile:", "x" * 200)
    console.print_table(table)
    out, err = capsys.readouterr()
    assert err == ""
    assert "[/b] :smile:" in out
    assert "x" * 200 in out


def test_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "loss": NAN,
        "ratio": [float("inf"), 1.5],
        "count": np.int64(3),
        "mean": np.float32(0.5),
        "path": Path("a/b"),
        "flag": True,
        "none": None,
        "text": "é\n",
    }
    console.print_json_line(record)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert ", " not in out
    assert json.loads(out) == {
        "loss": None,
        "ratio": [None, 1.5],
        "count": 3,
        "mean": 0.5,
        "path": "a/b",
        "flag": True,
        "none": None,
        "text": "é\n",
    }


def test_json_line_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="set has no place in JSON"):
        console.print_json_line({"a": {1}})


# Numbers for people


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (950, "950"),
        (12.34, "12.3"),
        (99.97, "100"),
        (999, "999"),
        (999.7, "1.0 k"),
        (1234, "1.2 k"),
        (99_960, "100 k"),
        (999_499, "999 k"),
        (999_500, "1.0 M"),
        (1_234_567, "1.2 M"),
        (8_030_000_000, "8.0 B"),
        (5e15, "5000 T"),
        (-1500, "-1.5 k"),
        (NAN, "nan"),
    ],
)
def test_format_count(n: float, text: str) -> None:
    assert console.format_count(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.042, "42 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (90, "1 min 30 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (86_369, "23 h 59 min"),
        (86_371, "1 d 0 h"),
        (273_600, "3 d 4 h"),
        (float("inf"), "inf"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert console.format_seconds(seconds) == text


# Progress


def at(done: int, total: int = 1000, resumed: int = 0, elapsed: float = 60.0) -> Snapshot:
    return Snapshot("distil", "steps", total, resumed, done, elapsed, "loss 2.31")


def test_time_left() -> None:
    assert at(250).seconds_left == pytest.approx(180)
    assert at(0).seconds_left is None
    assert at(1000).seconds_left == 0
    assert at(0, total=0).seconds_left == 0


def test_time_left_after_resuming_uses_the_work_of_this_run() -> None:
    # 100 steps in 60 s leave 300 s for the last 500; the 400 earlier steps took no time here.
    assert at(500, resumed=400).seconds_left == pytest.approx(300)
    assert at(400, resumed=400).seconds_left is None


def test_plain_line() -> None:
    line = "distil: 25 % (250/1000 steps), 1 min 00 s elapsed, 3 min 00 s left, loss 2.31"
    assert console.plain_line(at(250)) == line
    assert console.plain_line(at(1000)).startswith("distil: 100 % (1000/1000 steps), 1 min 00 s")
    assert console.plain_line(at(999_999, total=1_000_000)).startswith("distil: 99 % (1.0 M/1.0 M")


def test_bar_line_shows_everything_when_there_is_room() -> None:
    line = console.bar_line(at(250), width=100).plain
    parts = r"distil ━+─+  25% 250/1000 steps 1:00 3:00 left loss 2.31"
    assert re.fullmatch(parts, line)


def test_bar_line_in_forty_columns() -> None:
    assert console.bar_line(at(250), width=40).plain == "distil  25% 250/1000 steps 3:00 left"


@pytest.mark.parametrize("width", [1, 5, 20, 40, 60, 80, 200])
@pytest.mark.parametrize("done", [0, 1, 999, 1000, 2000])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_bar_line_fits(width: int, done: int, ascii_only: bool) -> None:
    note = "loss\n2.31\x1b[2J [red]" + "長" * 50
    now = Snapshot("a long label " * 3, "tokens", 1000, 0, done, 7e5, note)
    line = console.bar_line(now, width, ascii_only).plain
    assert cell_len(line) < max(width, 2)
    assert "\n" not in line
    assert "\x1b" not in line


def test_progress_in_a_log_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("sample", total=3, unit="rows") as advance:
        for _ in range(3):
            advance(1, "12 k tokens/s")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"sample: 100 % \(3/3 rows\), \d+ ms elapsed, 12 k tokens/s\n", err)


def test_progress_in_a_log_prints_at_intervals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with console.progress("sample", total=100, done=40) as advance:
        for _ in range(12):
            now += 3.0
            advance()
    assert capsys.readouterr().err.splitlines() == [
        "sample: 44 % (44/100), 12 s elapsed, 2 min 48 s left",
        "sample: 48 % (48/100), 24 s elapsed, 2 min 36 s left",
        "sample: 52 % (52/100), 36 s elapsed, 2 min 24 s left",
        "sample: 52 % (52/100), 36 s elapsed, 2 min 24 s left",
    ]


def test_progress_says_where_failed_work_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with console.progress("grade", total=4) as advance:
            advance(2)
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        work()
    assert capsys.readouterr().err.startswith("grade: 50 % (2/4)")


def test_silent_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("train", total=2, show=False) as advance:
        advance(2)
    assert capsys.readouterr() == ("", "")


def on_terminal(code: str, columns: int) -> tuple[str, str]:
    """stdout, a pipe, and stderr, a terminal, of a fresh interpreter."""
    leader, follower = pty.openpty()
    env = os.environ | {"COLUMNS": str(columns), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE, stderr=follower, env=env, text=True, check=True,
    )  # fmt: skip
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()  # small enough to wait in the terminal's buffer
    os.close(leader)
    return done.stdout, shown


@pytest.mark.parametrize("columns", [40, 100])
def test_bar_on_a_terminal(columns: int) -> None:
    code = """
        from retort import console
        with console.progress("[b]distil[/b]", total=1000, unit="steps") as advance:
            print("a result")
            advance(1000, "loss 2.31 [/b]")
    """
    out, shown = on_terminal(code, columns)
    assert out == "a result\n"
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).split("\n")
    assert all(len(line.split("\r")[-1]) < columns for line in lines)
    assert sum("100%" in line for line in lines) == 1
    assert "[b]distil[/b" in lines[-2]
    assert "1000/1000 steps" in lines[-2]
