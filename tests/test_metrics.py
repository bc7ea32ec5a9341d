"""The metrics file."""

from pathlib import Path

import pytest

from retort.metrics import MetricsLog, last_record, read_metrics

NAN = float("nan")


def test_metrics_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    MetricsLog(path).write({"step": 1, "loss": 2.5})
    MetricsLog(path).write({"step": 2, "loss": NAN})
    assert path.read_text() == '{"step":1,"loss":2.5}\n{"step":2,"loss":null}\n'
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]


def test_metrics_past_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.write({"step": step})
    log.write({"event": "evaluated"})
    log.truncate_after(3)
    log.write({"step": 4})
    assert read_metrics(log.path) == [
        {"step": 1}, {"step": 2}, {"step": 3}, {"event": "evaluated"}, {"step": 4},
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    log = MetricsLog(path)
    log.write({"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_torn_only_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xe2\x82")
    log = MetricsLog(path)
    log.truncate_after(10)
    assert path.read_bytes() == b""
    assert read_metrics(path) == []


@pytest.mark.parametrize("line", ["{broken", "[1]", ""])
def test_damage_elsewhere_is_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step":1}}\n{line}\n{{"step":2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        MetricsLog(path)
    assert path.read_text() == before


@pytest.mark.parametrize("count", [1, 2, 5000])
def test_the_last_record_alone(tmp_path: Path, count: int) -> None:
    """Even of a file longer than what is looked at, and with a line still being written."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with log.path.open("w") as file:
        file.writelines(f'{{"step":{i},"text":"{"é" * 150}"}}\n' for i in range(count))
        file.write('{"step": 99999')
    found = last_record(log.path)
    assert found is not None
    assert found["step"] == count - 1


def test_no_last_record(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert last_record(tmp_path / "empty") is None
    (tmp_path / "torn").write_text('{"step": 1')
    assert last_record(tmp_path / "torn") is None
