"""Which graph a step takes."""

import torch

from retort.sample.graphs import Replayed, rounded


def test_numbers_of_rows_are_rounded_up() -> None:
    wanted = {1: 1, 2: 2, 3: 4, 5: 8, 33: 64, 64: 64, 65: 128, 129: 192, 400: 448, 450: 500}
    assert {rows: rounded(rows, 500) for rows in wanted} == wanted
    assert len({rounded(rows, 500) for rows in range(1, 501)}) == 14


class Recorded:
    """Prepares nothing; tells what it was asked."""

    slots, device = 6, torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def prepare(self, rows: int, reach: int) -> int:
        self.asked.append((rows, reach))
        return reach // 10


def test_each_step_is_prepared_for_its_own_rows() -> None:
    forward, launched = Recorded(), list[int]()
    steps = Replayed(forward, capture=False)
    asked = [(1, 5), (3, 6), (3, 17), (5, 18), (3, 7)]
    for rows, reach in asked:
        steps.step(rows, reach, launched.append)
    assert forward.asked == asked
    assert launched == [1, 4, 4, 6, 4]
    assert set(steps.graphs) == {(1, 0), (4, 0), (4, 1), (6, 1)}
