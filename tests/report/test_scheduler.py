import random
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import pytest

from retort.report.scheduler import Lengths, alone, replay, together
from retort.report.steps import StepTimes

BY_ROWS = np.array([0.0, 1.0, 1.5, 1.7, 2.6, 3.0])


@dataclass
class Row:
    problem: int
    written: int
    left: int
    shares: bool


def step_by_step(
    lengths: list[int], problems: list[int], prompts: list[int], slots: int, times: StepTimes
) -> float:
    """One step after another, with a list of the rows that run."""
    waiting = list(zip(problems, (length - 1 for length in lengths), strict=True))
    running: list[Row] = []
    seconds, step = times.start * len(lengths), 0
    while waiting or running:
        if step % times.look == 0:
            running = [row for row in running if row.left > 0]
            while len(running) < slots and waiting:
                admit(waiting, running, prompts, slots, times.share_from)
        if not running:
            break
        for row in running:
            row.written += 1
            row.left -= 1
        seconds += times.seconds(len(running), tokens_read(running, prompts))
        step += 1
    return seconds


def admit(
    waiting: list[tuple[int, int]],
    running: list[Row],
    prompts: list[int],
    slots: int,
    share_from: int | None,
) -> None:
    """Starts as many rows of the next problem as fit."""
    problem = waiting[0][0]
    started = list(takewhile(lambda each: each[0] == problem, waiting))[: slots - len(running)]
    del waiting[: len(started)]
    same = [row for row in running if row.problem == problem]
    copies = sum(not row.shares for row in same) + len(started)
    enough = share_from is not None and copies * prompts[problem] >= share_from
    shares = enough or any(row.shares for row in same)
    running += [Row(problem, 0, left, shares) for _, left in started if left]


def tokens_read(running: list[Row], prompts: list[int]) -> int:
    shared = {row.problem for row in running if row.shares}
    copied = [row.problem for row in running if not row.shares]
    own = sum(row.written for row in running)
    return own + sum(prompts[problem] for problem in [*shared, *copied])


@pytest.mark.parametrize("share_from", [None, 0, 16])
@pytest.mark.parametrize("look", [1, 3])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_replay_is_one_step_after_another(slots: int, look: int, share_from: int | None) -> None:
    rng = random.Random(slots)
    times = StepTimes(BY_ROWS, 0.01, start=0.25, look=look, share_from=share_from)
    for count in (1, 4, 23):
        lengths, prompts = ([rng.randint(1, 9) for _ in range(count)] for _ in range(2))
        problems = sorted(rng.randrange(count) // 3 for _ in range(count))
        found = replay(np.array(lengths), np.array(problems), np.array(prompts), slots, times)
        assert found == pytest.approx(step_by_step(lengths, problems, prompts, slots, times))


def test_a_shared_prompt_is_read_once() -> None:
    context = StepTimes(np.zeros(6), 1.0, share_from=0)
    # three rows for two steps, then one for one more: each reads its own tokens
    read = replay(np.array([3, 3, 4]), np.zeros(3, int), np.array([100]), 3, context)
    assert read == (100 + 3 * 1) + (100 + 3 * 2) + (100 + 3)


def test_the_last_rows_run_alone() -> None:
    times = StepTimes(BY_ROWS, 0.0)
    # three rows for two steps, then one for seven
    length_N, problem_N, prompt_P = np.array([3, 3, 10]), np.arange(3), np.zeros(3, int)
    assert replay(length_N, problem_N, prompt_P, 3, times) == 2 * 1.7 + 7 * 1.0


def test_a_draft_saves_steps() -> None:
    times = StepTimes(BY_ROWS, 0.0, tokens=2.5)
    assert replay(np.array([11]), np.array([0]), np.array([4]), 1, times) == 4


def test_more_slots_than_were_timed_are_refused() -> None:
    with pytest.raises(ValueError, match="6 slots: steps of 1 to 5 rows have been timed"):
        replay(np.array([3]), np.array([0]), np.array([4]), 6, StepTimes(BY_ROWS, 0.0))


@pytest.fixture
def lengths() -> list[Lengths]:
    return [
        Lengths(np.array([5, 9, 2, 7]), 3, started=2.0),
        Lengths(np.array([4, 1, 8, 8]), 6, 1.0),
    ]


def test_all_samples_together_run_in_the_order_of_their_start(lengths: list[Lengths]) -> None:
    times = StepTimes(BY_ROWS, 0.01, share_from=10)
    problems = [0] * 4 + [1] * 4
    expected = step_by_step([4, 1, 8, 8, 5, 9, 2, 7], problems, [6, 3], 3, times)
    assert together(lengths, 4, 3, times) == pytest.approx(expected / 2)


def test_problems_alone_wait_for_nobody(lengths: list[Lengths]) -> None:
    times = StepTimes(BY_ROWS, 0.01, share_from=20)
    each = [
        step_by_step(one.length_N.tolist(), [0] * 4, [one.prompt_tokens], 5, times)
        for one in lengths
    ]
    assert alone(lengths, 4, 5, times) == pytest.approx(np.mean(each))


def test_few_samples_are_drawn_from_all(lengths: list[Lengths]) -> None:
    one = [Lengths(np.array([2, 100]), 3, 0.0)] * 50
    times = StepTimes(BY_ROWS, 0.0)
    assert alone(one, 1, 1, times) == pytest.approx(50, rel=0.2), "the mean of 1 step and of 99"
    assert together(one, 1, 1, times) == pytest.approx(50, rel=0.2)
    assert together(one, 1, 1, times) == together(one, 1, 1, times)
