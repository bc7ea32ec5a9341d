"""Things take turns, and one that runs out of memory leaves the others alone."""

from collections.abc import Callable

import pytest

from retort.bench.rounds import Work, measure, noise, spread


def ignore(amount: int = 1, note: str = "") -> None:
    """Progress that nobody watches."""


def work(log: list[str], name: str, run: Callable[[], int]) -> Work[int]:
    def noted() -> int:
        log.append(name)
        return run()

    return Work(noted, lambda: log.append(f"warm {name}"))


def test_rounds_go_round() -> None:
    log: list[str] = []
    numbers = iter(range(10))
    works = {name: work(log, name, lambda: next(numbers)) for name in "ab"}
    assert measure(works, 2, ignore) == {"a": [0, 2], "b": [1, 3]}
    assert log == ["warm a", "warm b", "a", "b", "a", "b"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: no memory")])
def test_out_of_memory_ends_one(error: Exception) -> None:
    def fail() -> int:
        raise error

    log: list[str] = []
    works = {"a": work(log, "a", lambda: 1), "b": work(log, "b", fail)}
    assert measure(works, 3, ignore) == {"a": [1, 1, 1]}
    assert log.count("b") == 1


def test_other_errors_are_not_swallowed() -> None:
    def fail() -> int:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        measure({"a": work([], "a", fail)}, 1, ignore)


def test_progress_counts_every_round() -> None:
    notes: list[str] = []
    measure({"a": work([], "a", lambda: 1)}, 2, lambda amount, note: notes.append(note), str.upper)
    assert notes == ["A", "A", "A"]


def test_spread_is_relative() -> None:
    assert spread([90.0, 100.0, 120.0]) == pytest.approx(0.3)


def test_noise_names_the_worst() -> None:
    assert noise({"a": 0.1, "b": 0.02}) == []
    (told,) = noise({"a": 0.11, "b": 0.02, "c": 0.5})
    assert told.startswith("2 of 3 rows spread by more than 10%, most of all c (50%)")
