"""Sampling by workers: what is sampled is what one process would, whoever is lost on the way.

Most of it with a stand-in for Ray whose actors live in this process and are lost as a test says;
the rest with a real cluster on the loopback device, in a process that a test starts and ends.
"""

import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import retort
from retort import cli
from retort.recipe import BUNDLED_TEACHER, SampleRecipe, load
from retort.sample import cluster, workers
from retort.sample.cluster import Cluster, connected, of_flags
from retort.sample.engine import Engine
from retort.sample.run import sample
from retort.sample.tokens import SamplingParams
from retort.sample.work import Portion
from retort.store import Run, fingerprint

TWO = Cluster("local", 2)


def recipe(settings: Sequence[str], *changes: str) -> SampleRecipe:
    return load(SampleRecipe, [*settings, *changes])


def said(folder: Path) -> dict[tuple[str, int], tuple[str, int, str, int]]:
    """What was sampled by key, each key once, without when and by whom."""
    table = Run.open(folder).completions.read().to_pylist()
    by_key = {
        (row["problem_id"], row["sample_idx"]): (
            row["text"],
            row["token_count"],
            row["finish_reason"],
            row["seed"],
        )
        for row in table
    }
    assert len(by_key) == len(table)
    return by_key


# A stand-in for Ray


class RayError(Exception):
    """What Ray raises."""


class RayTaskError(RayError):
    """What it raises where a worker's method did."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


Call = Callable[[], Any]
Lost = Callable[[int, str, int], bool]


class Actor:
    """A worker that loses its state, and its answer, at the calls for which `lost` is true."""

    def __init__(self, ray: "Ray", new: Callable[[], Any], number: int) -> None:
        self.ray, self.new, self.number, self.calls = ray, new, number, 0
        self.worker = new()
        self.open = SimpleNamespace(remote=partial(self.call, "open"))
        sample = SimpleNamespace(remote=partial(self.call, "sample"))
        self.sample = SimpleNamespace(options=lambda max_task_retries: sample)

    def call(self, method: str, *values: Any) -> Call:
        return partial(self.answer, method, *values)

    def answer(self, method: str, *values: Any) -> Any:
        self.calls += 1
        if self.ray.lost(self.number, method, self.calls):
            self.worker = self.new()
            raise RayError("the actor is unavailable\nsocket closed")
        try:
            return getattr(self.worker, method)(*values)
        except Exception as error:
            raise RayTaskError(error) from None


class Ray:
    """The part of Ray that is used; the workers answer in turn."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, lost: Lost) -> None:
        self.lost, self.actors, self.killed = lost, [], []
        self.asked: dict[str, Any] = {}
        self.turns: deque[Call] = deque()

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.asked = options
        return lambda kind: SimpleNamespace(remote=partial(self.start, kind))

    def nodes(self) -> list[dict[str, bool]]:
        return [{"Alive": True}, {"Alive": False}, {"Alive": True}]

    def start(self, kind: type, *values: Any) -> Actor:
        self.actors.append(Actor(self, partial(kind, *values), len(self.actors)))
        return self.actors[-1]

    def wait(self, calls: list[Call], timeout: float | None = None) -> tuple[Any, Any]:
        actors = {call.func.__self__ for call in calls}
        assert len(actors) == len(calls)  # at most one call for each worker
        return calls[:1], calls[1:]

    def get(self, call: Call) -> Any:
        return call()

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ray]:
    """Puts it in Ray's place; workers hand over each completion."""

    def put(lost: Lost = lambda number, method, calls: False) -> Ray:
        ray = Ray(lost)

        @contextmanager
        def connected(cluster: Cluster, gpus: int) -> Iterator[Ray]:
            yield ray

        monkeypatch.setattr(workers, "connected", connected)
        monkeypatch.setattr(workers, "TELL_SECONDS", 0.0)
        return ray

    return put


@pytest.mark.parametrize("count", [1, 2, 20])
def test_workers_sample_what_one_process_does(
    settings: list[str], stand_in: Callable[..., Ray], count: int
) -> None:
    ray = stand_in()
    folder = sample(recipe(settings), Cluster("local", count))
    assert said(folder) == said(sample(recipe(settings, f"out={folder}-alone")))
    assert ray.killed == ray.actors
    assert len(ray.actors) == count
    assert ray.asked["num_gpus"] == 0
    assert Run.open(folder).manifest["device"].startswith(f"{count} workers on ")


def test_workers_have_a_draft_too(
    settings: list[str], stand_in: Callable[..., Ray], make_model: Callable[..., Path]
) -> None:
    stand_in()
    drafted = [*settings, f"draft.model={make_model('small', layers='m', seed=1)}"]
    folder = sample(recipe(drafted), TWO)
    assert said(folder) == said(sample(recipe(drafted, f"out={folder}-alone")))


def test_both_ways_are_one_run(settings: list[str], stand_in: Callable[..., Ray]) -> None:
    stand_in()
    folder = sample(recipe(settings, "sampling.n=1"), TWO)
    sample(recipe(settings, "sampling.n=2"))
    sample(recipe(settings), TWO)
    assert said(folder) == said(sample(recipe(settings, f"out={folder}-alone")))


@pytest.mark.parametrize(
    "lost",
    [
        lambda number, method, calls: number == 0 and calls == 3,
        lambda number, method, calls: calls in (2, 4, 6),
        lambda number, method, calls: number == 1 and method == "sample" and calls % 3 == 0,
    ],
)
def test_lost_workers_lose_nothing(
    settings: list[str], stand_in: Callable[..., Ray], lost: Lost, capfd: Any
) -> None:
    stand_in(lost)
    folder = sample(recipe(settings, "sampling.n=9"), TWO)
    assert "was lost; Ray starts it again" in capfd.readouterr().err
    assert said(folder) == said(sample(recipe(settings, "sampling.n=9", f"out={folder}-alone")))


def test_an_answer_that_is_lost_is_made_again(
    settings: list[str], stand_in: Callable[..., Ray], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each worker goes on living, but its third answer does not arrive.
    ray = stand_in()
    answer = Actor.answer

    def unheard(self: Actor, method: str, *values: Any) -> Any:
        found = answer(self, method, *values)
        if self.calls == 3:
            raise RayError("socket closed")
        return found

    monkeypatch.setattr(Actor, "answer", unheard)
    folder = sample(recipe(settings), TWO)
    assert min(actor.calls for actor in ray.actors) > 3
    assert said(folder) == said(sample(recipe(settings, f"out={folder}-alone")))


def test_a_worker_lost_again_and_again_ends_the_run(
    settings: list[str], stand_in: Callable[..., Ray]
) -> None:
    stand_in(lambda number, method, calls: number == 1 and method == "sample")
    asked = recipe(settings, "sampling.n=20")
    with pytest.raises(
        ValueError, match=r"worker 1 was lost 4 times .*fewer slots.*socket closed \(docs/"
    ):
        sample(asked, TWO)
    kept = said(asked.out)  # what the other one had finished
    assert 0 < len(kept) < 80
    stand_in()
    sample(asked, TWO)
    assert kept.items() <= said(asked.out).items()
    assert len(said(asked.out)) == 80


def test_a_full_cluster_is_waited_for(
    settings: list[str], stand_in: Callable[..., Ray], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    ray = stand_in()
    wait = Ray.wait

    patience = cycle([True, False])

    def full(self: Ray, calls: list[Call], timeout: float | None = None) -> tuple[Any, Any]:
        """Every second time that somebody waits for so long only, it is too short."""
        late = timeout is not None and next(patience)
        return ([], calls) if late else wait(self, calls)

    monkeypatch.setattr(Ray, "wait", full)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0}, raising=False)
    folder = sample(recipe(settings), TWO)
    assert "waiting for the first of 2 workers; the cluster has 16 CPUs" in capfd.readouterr().err
    assert len(said(folder)) == 12


def test_an_error_of_ours_is_not_hidden(
    settings: list[str], stand_in: Callable[..., Ray], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in()
    monkeypatch.delattr(workers, "portions")
    with pytest.raises(RayTaskError) as error:
        sample(recipe(settings), TWO)
    assert isinstance(error.value.cause, NameError)


def test_a_worker_that_cannot_start_ends_it_before_anything_is_written(
    settings: list[str], stand_in: Callable[..., Ray]
) -> None:
    ray = stand_in(lambda number, method, calls: True)
    asked = recipe(settings)
    with pytest.raises(ValueError, match="worker 0 was lost"):
        sample(asked, TWO)
    assert not asked.out.exists()
    assert ray.killed == ray.actors


def test_timing_has_a_row_for_each_worker(
    settings: list[str], stand_in: Callable[..., Ray]
) -> None:
    stand_in()
    opened = Run.open(sample(recipe(settings), TWO))
    timing, found = opened.timing.read().to_pylist(), opened.completions.read().to_pylist()
    assert len(timing) == 2
    assert sum(row["decode_tokens"] for row in timing) == sum(row["token_count"] for row in found)
    assert all(row["slots"] == 5 and row["decode_seconds"] > 0 for row in timing)
    assert {row["batch"] for row in found} == {0}


def test_an_interruption_keeps_what_was_handed_over(
    settings: list[str], stand_in: Callable[..., Ray], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = stand_in()
    get, handed = Ray.get, 0

    def interrupted(self: Ray, call: Call) -> Any:
        nonlocal handed
        if sum(actor.calls for actor in self.actors) == 6:
            raise KeyboardInterrupt
        answer = get(self, call)
        handed += len(answer.done) if isinstance(answer, Portion) else 0
        return answer

    asked = recipe(settings)
    with monkeypatch.context() as patch:
        patch.setattr(Ray, "get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(asked, TWO)
    assert 0 < len(said(asked.out)) == handed < 12
    assert ray.killed == ray.actors
    sample(asked, TWO)
    assert len(said(asked.out)) == 12


# What a worker is told, and what it refuses


def told(
    asked: SampleRecipe, prints: Sequence[str] = (), version: str = retort.__version__
) -> workers.Told:
    return workers.Told(workers._recipe_for_others(asked), list(prints), version, 20, 1)


def test_a_worker_finds_the_model_from_anywhere(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = recipe(settings, "model=tiny", "draft.model=small")
    found = told(relative).recipe
    assert found["model"] == str(tmp_path / "tiny")
    assert found["draft"] == {"model": str(tmp_path / "small"), "tokens": 4}
    of_retort = told(recipe(settings, "model=bundled"))
    assert of_retort.recipe["model"] == "bundled"
    bundled = workers.Worker(0, of_retort)
    assert bundled.recipe.model == BUNDLED_TEACHER


def test_a_workers_engine_is_warm_when_it_is_open(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(settings)
    warmed: list[SamplingParams] = []
    monkeypatch.setattr(Engine, "warm", lambda engine, params: warmed.append(params))
    prints = [fingerprint(asked.model)]
    worker = workers.Worker(0, told(asked, prints))
    assert worker.open().slots == worker.engine.slots == 5
    assert [params.max_tokens for params in warmed] == [10]


@pytest.mark.parametrize(("asked", "threads"), [((), 1), (("threads=3",), 3)])
def test_a_worker_has_one_thread_unless_told(
    settings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    asked: tuple[str, ...],
    threads: int,
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", set_to.append)
    monkeypatch.setattr(Engine, "warm", lambda engine, params: None)
    told_recipe = recipe(settings, *asked)
    prints = [fingerprint(told_recipe.model)]
    workers.Worker(0, told(told_recipe, prints)).open()
    assert set_to == [threads]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "tiny is no checkpoint folder"),
        (lambda folder: folder.rename(folder.with_name("gone")), "tiny is no checkpoint folder"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "another model than where"),
    ],
)
def test_a_node_that_cannot_read_the_model_is_named(
    settings: list[str],
    stand_in: Callable[..., Ray],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    ray = stand_in()
    monkeypatch.setattr("platform.node", lambda: "gpu-3")
    start, asked = ray.start, recipe(settings)

    def spoilt(kind: type, *values: Any) -> Actor:
        if not ray.actors:
            spoil(asked.model)
        return start(kind, *values)

    monkeypatch.setattr(ray, "start", spoilt)
    line = rf"^worker 0: node gpu-3: .*{message}.*same path\) \(docs/"
    with pytest.raises(ValueError, match=line):
        sample(asked, TWO)
    assert not asked.out.exists()


def test_another_version_is_refused(settings: list[str]) -> None:
    worker = workers.Worker(0, told(recipe(settings), version="0.0.1"))
    with pytest.raises(ValueError, match=r"and 0\.0\.1 where the run was started"):
        worker.open()


@pytest.mark.parametrize(("count", "processes"), [(1, 1), (2, 1), (5, 3)])
def test_workers_of_a_node_share_its_memory(
    settings: list[str], stand_in: Callable[..., Ray], count: int, processes: int
) -> None:
    ray = stand_in()
    asked = recipe(settings)
    sample(asked, Cluster("auto", count))
    told_to = [actor.worker.told for actor in ray.actors]
    assert {each.processes for each in told_to} == {processes}
    assert all(each.prompt_tokens > 1 for each in told_to)


def test_one_gpu_each(settings: list[str], stand_in: Callable[..., Ray]) -> None:
    assert (workers._gpus("cpu"), workers._gpus("cuda")) == (0, 1)
    with pytest.raises(ValueError, match="device = cuda:1: with --ray it is cpu or cuda"):
        sample(recipe(settings, "device=cuda:1"), TWO)


# Flags and addresses


def test_flags_come_together() -> None:
    assert of_flags(None, None) is None
    assert of_flags("auto", 3) == Cluster("auto", 3)
    with pytest.raises(
        ValueError, match="--ray local: say how many engines as well, with --workers"
    ):
        of_flags("local", None)
    with pytest.raises(ValueError, match="--workers 2: say where as well, with --ray"):
        of_flags(None, 2)


def test_without_ray_the_flag_says_how_to_install_it(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it now fails
    words = ["retort", "sample", *settings, "--ray", "local", "--workers", "2"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --ray needs Ray")
    assert 'pip install "retort-lm[ray]"' in line
    assert not recipe(settings).out.exists()


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module `ray` that finds no cluster."""

    def init(*values: Any, **options: Any) -> None:
        raise ConnectionError("Failed to connect\nto the cluster")

    module = SimpleNamespace(init=init, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "say local, auto, HOST:PORT or ray://HOST:PORT"),
        ("ray://nonsense", "say local, auto"),
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("ray://127.0.0.1:1", "no Ray cluster answers there"),
        ("127.0.0.1:99999", "no Ray cluster answers there"),
        ("auto", "Failed to connect$"),
    ],
)
@pytest.mark.usefixtures("fake_ray")
def test_wrong_addresses_are_told_at_once(address: str, message: str) -> None:
    began = time.monotonic()
    with (
        pytest.raises(ValueError, match=rf"--ray {address}: {message}"),
        connected(Cluster(address, 1), gpus=0),
    ):
        pass
    assert time.monotonic() - began < cluster.REACH_SECONDS + 5


def test_the_environment_is_left_as_it_was(
    fake_ray: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    before, seen, asked = dict(os.environ), {}, []

    def init(address: str, **options: Any) -> None:
        asked.append(address)
        seen.update(os.environ)

    fake_ray.init = init
    fake_ray.cluster_resources = dict
    fake_ray.nodes = lambda: [{"NodeManagerAddress": "127.0.0.1"}]
    with connected(TWO, gpus=0):
        assert dict(os.environ) == before
    assert asked == ["local"]
    assert seen["RAY_USAGE_STATS_ENABLED"] == "0"
    assert seen["RAY_AUTH_MODE"] == "token"
    assert before.items() | seen.items() == {**seen}.items() | {("RAY_AUTH_MODE", "disabled")}


def test_an_own_cluster_has_a_gpu_for_each_worker_and_no_other_address(
    fake_ray: SimpleNamespace,
) -> None:
    fake_ray.init = lambda *values, **options: None
    fake_ray.cluster_resources = lambda: {"GPU": 1.0}
    fake_ray.nodes = lambda: [{"NodeManagerAddress": "192.0.2.1"}]
    with pytest.raises(ValueError, match=r"--workers 2: each needs a GPU, and .* has 1"):
        connected(TWO, gpus=1).__enter__()
    with pytest.raises(RuntimeError, match="loopback"):
        connected(TWO, gpus=0).__enter__()


# A real cluster


class Sampling:
    """`retort sample` with Ray, in a process of its own."""

    def __init__(self, settings: list[str], log: Path) -> None:
        words = ["-m", "retort", "sample", *settings, "--ray", "local", "--workers", "2", "--json"]
        self.log = log.open("wb")
        self.process = psutil.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=self.log
        )

    def workers(self) -> list[psutil.Process]:
        """Those that are sampling now; Ray puts that in a process's title."""
        return [each for each in self.children() if _title(each) == "ray::Worker.sample"]

    def children(self) -> list[psutil.Process]:
        return self.process.children(recursive=True) if self.process.is_running() else []

    def wait_for_workers(self) -> list[psutil.Process]:
        deadline = time.monotonic() + 240
        while self.process.poll() is None and time.monotonic() < deadline:
            if len(found := self.workers()) == 2:
                return found
            time.sleep(0.02)
        raise AssertionError(f"no two workers: {Path(self.log.name).read_text()}")


def _title(process: psutil.Process) -> str:
    try:
        return next(iter(process.cmdline()), "")
    except psutil.Error:  # it has just ended
        return ""


@pytest.fixture
def start(settings: list[str], tmp_path: Path) -> Iterator[Callable[..., Sampling]]:
    """Starts sampling; whatever is left of it ends with the test."""
    started: list[Sampling] = []

    def begin(*changes: str) -> Sampling:
        started.append(Sampling([*settings, *changes], tmp_path / "stderr.txt"))
        return started[-1]

    yield begin
    for each in started:
        left = [*each.children(), each.process]
        for process in left:
            if process.is_running():
                process.kill()
        psutil.wait_procs(left, timeout=10)
        assert each.process.stdout is not None
        each.process.stdout.close()
        each.log.close()


# So much that both workers are at it together, however late the second one starts.
LONG = ("problems.count=10", "sampling.n=100", "sampling.max_tokens=60", "slots=1")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_worker_loses_nothing(
    settings: list[str], start: Callable[..., Sampling], tmp_path: Path
) -> None:
    running = start(*LONG)
    running.wait_for_workers()[0].kill()
    there = running.children()
    assert addresses([*there, running.process]) == {"127.0.0.1"}
    out, _ = running.process.communicate(timeout=240)
    told = (tmp_path / "stderr.txt").read_text()
    assert running.process.returncode == 0, told
    assert re.search(r"^warning: worker [01] was lost; Ray starts it again", told, re.MULTILINE)
    assert out.decode() == f'{{"out":"{tmp_path / "run"}"}}\n'  # Ray itself says nothing there
    assert psutil.wait_procs(there, timeout=20)[1] == []
    found = said(tmp_path / "run")
    assert len(found) == 1000
    assert found == said(sample(recipe(settings, *LONG, f"out={tmp_path / 'alone'}")))


def addresses(processes: Sequence[psutil.Process]) -> set[str]:
    """Where they listen; those that have just ended do not."""
    found: set[str] = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= {
                connection.laddr.ip.removeprefix("::ffff:")
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            }
    return found
