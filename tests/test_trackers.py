"""Trackers, with stand-ins for the packages: their functions take what the real ones take."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from retort.trackers import check_trackers, numbers_in, open_trackers

RECORD = {"step": 3, "stage": "match", "loss": 1.5, "mfu": None, "data": {"maths": 20}}
SENT = {"loss": 1.5, "data/maths": 20.0}
CONFIG = {"out": "runs/pure"}


@dataclass
class Run:
    """What trackio and wandb return from `init`; it fails from the `breaks`-th call of log on."""

    settings: dict[str, Any]
    breaks: int = 1000
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    calls: int = 0
    finished: bool = False

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.calls += 1
        if self.calls >= self.breaks:
            raise ConnectionError("no\nnetwork")
        assert step is not None
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    runs: list[Run] = []

    def init(project: str, name: str, config: dict[str, Any], resume: str) -> Run:
        print("* Trackio project initialized")
        runs.append(Run({"project": project, "name": name, "config": config, "resume": resume}))
        return runs[-1]

    install(monkeypatch, "trackio", init=init)
    return runs


def settings(console: str) -> dict[str, str]:
    return {"console": console}


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    runs: list[Run] = []

    def init(
        *, project: str, name: str, id: str, resume: str, dir: Path, config: Any, settings: Any
    ) -> Run:
        runs.append(Run({"project": project, "name": name, "id": id, "resume": resume, "dir": dir}))
        return runs[-1]

    install(monkeypatch, "wandb", init=init, Settings=settings)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return runs


class Writer:
    """Stands for torch's SummaryWriter."""

    made: list["Writer"]

    def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
        self.log_dir, self.purge_step = log_dir, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[str] = []
        self.closed = False
        self.made.append(self)

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.append((tag, scalar_value, global_step))

    def add_text(self, tag: str, text_string: str) -> None:
        self.texts.append(text_string)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    Writer.made = []
    install(monkeypatch, "tensorboard")
    install(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Writer)
    return Writer.made


def test_numbers_are_taken_out_of_a_record() -> None:
    record = RECORD | {"skipped": True, "bad": float("nan"), "worse": float("inf"), "list": [1]}
    assert numbers_in(record) == SENT | {"skipped": 1.0}


def test_missing_package_is_said_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"^trackers: wandb is not installed; pip install wandb"):
        check_trackers(["wandb"])
    with (
        pytest.raises(ValueError, match="not installed"),
        open_trackers(["wandb"], "r", tmp_path, {}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_tracker_leaves_nothing(tmp_path: Path) -> None:
    with open_trackers([], "pure", tmp_path, CONFIG) as sink:
        sink.write(RECORD)
    assert list(tmp_path.iterdir()) == []


def test_trackio(trackio: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_trackers(["trackio"], "pure", tmp_path, CONFIG) as sink:
        sink.write(RECORD)
        assert not trackio[0].finished
    (run,) = trackio
    assert run.logged == [(3, SENT)]
    assert run.finished
    id = (tmp_path / "tracker-id").read_text()
    wanted = {"project": "retort", "name": f"pure-{id}", "config": CONFIG, "resume": "allow"}
    assert run.settings == wanted
    assert capsys.readouterr().out == ""  # results alone go there


def test_wandb(wandb: list[Run], tmp_path: Path) -> None:
    with open_trackers(["wandb"], "pure", tmp_path, CONFIG) as sink:
        sink.write(RECORD)
    (run,) = wandb
    assert run.logged == [(3, SENT)]
    assert run.finished
    id = (tmp_path / "tracker-id").read_text()
    wanted = {"project": "retort", "name": "pure", "id": id, "resume": "allow", "dir": tmp_path}
    assert run.settings == wanted


def test_tensorboard(writers: list[Writer], tmp_path: Path) -> None:
    with open_trackers(["tensorboard"], "pure", tmp_path, CONFIG) as sink:
        sink.write(RECORD)
    (writer,) = writers
    assert writer.log_dir == str(tmp_path / "tensorboard")
    assert writer.scalars == [("loss", 1.5, 3), ("data/maths", 20.0, 3)]
    assert "runs/pure" in writer.texts[0]
    assert writer.closed
    assert writer.purge_step is None


def test_a_continued_run_is_the_same_run(
    wandb: list[Run], trackio: list[Run], writers: list[Writer], tmp_path: Path
) -> None:
    for step in (0, 40):
        with open_trackers(["wandb", "trackio", "tensorboard"], "pure", tmp_path, CONFIG, step):
            pass
    assert wandb[0].settings == wandb[1].settings
    assert trackio[0].settings == trackio[1].settings
    assert [(writer.purge_step, len(writer.texts)) for writer in writers] == [(None, 1), (41, 0)]


def test_another_run_of_that_name_is_another(wandb: list[Run], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with open_trackers(["wandb"], "pure", tmp_path / name, CONFIG):
            pass
    assert wandb[0].settings["id"] != wandb[1].settings["id"]


def test_damaged_id_is_replaced(wandb: list[Run], tmp_path: Path) -> None:
    (tmp_path / "tracker-id").write_text("")
    with open_trackers(["wandb"], "pure", tmp_path, CONFIG):
        pass
    assert len(wandb[0].settings["id"]) == 8


def test_failing_tracker_is_left_out_with_one_warning(
    wandb: list[Run], trackio: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_trackers(["wandb", "trackio"], "pure", tmp_path, CONFIG) as sink:
        wandb[0].breaks = 2
        for step in range(1, 5):
            sink.write({"step": step, "loss": 1.0})
    assert [step for step, _ in wandb[0].logged] == [1]
    assert wandb[0].calls == 2
    assert [step for step, _ in trackio[0].logged] == [1, 2, 3, 4]
    assert (
        capsys.readouterr().err.count("warning: trackers: wandb failed (ConnectionError: no n") == 1
    )


def test_trackers_are_closed_when_training_ends_early(wandb: list[Run], tmp_path: Path) -> None:
    with pytest.raises(SystemExit), open_trackers(["wandb"], "pure", tmp_path, CONFIG):
        raise SystemExit(143)
    assert wandb[0].finished


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def init(**settings: object) -> Run:
        raise RuntimeError("api_key not configured (no-tty)")

    install(monkeypatch, "wandb", init=init, Settings=settings)
    return init


@pytest.mark.usefixtures("unreachable")
def test_start_that_fails_stops_a_new_run(tmp_path: Path) -> None:
    wanted = r"wandb failed \(RuntimeError: api_key not configured \(no-tty\)\); mend it, or leave"
    with pytest.raises(ValueError, match=wanted), open_trackers(["wandb"], "p", tmp_path, {}):
        pass


@pytest.mark.usefixtures("unreachable")
def test_start_that_fails_does_not_stop_a_continued_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_trackers(["wandb"], "pure", tmp_path, {}, step=1) as sink:
        sink.write(RECORD)
    assert "going on without it" in capsys.readouterr().err
