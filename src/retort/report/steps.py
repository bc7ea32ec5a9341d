"""What a decode step takes, from the steps that sampling has timed: rows, and the tokens that
it reads, decide.

Shape suffixes: O observations, J knots, U terms of the model, B rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import pyarrow as pa

from retort.report.metrics import Floats


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a decode step: a part for its rows, and one for each token that it reads; those of
    a prompt that several rows share are read once.

    by_rows_B: seconds by the number of rows from 0, without the context's part; they never fall.
    start: seconds that starting a completion takes. tokens: what a row writes in a step, 1 unless
    a draft proposes more. look: steps between two looks at what has finished. share_from: tokens of
    all rows of a prompt from which on they read it together; None where they never do.
    """

    by_rows_B: Floats
    per_context: float
    start: float = 0.0
    tokens: float = 1.0
    look: int = 1
    share_from: int | None = None

    @property
    def slots(self) -> int:
        """The most rows that a step was seen with."""
        return len(self.by_rows_B) - 1

    def seconds(self, rows: int, context: float) -> float:
        """A step of so many rows that reads `context` tokens in all."""
        return float(self.by_rows_B[rows] + self.per_context * context)

    def shares(self, rows: int, prompt: float) -> bool:
        """Whether so many rows read a prompt of so many tokens together."""
        return self.share_from is not None and rows * prompt >= self.share_from

    def throughput(self, rows: int, context: float, length: float) -> float:
        """Tokens per second of full slots whose steps read `context` tokens, and whose rows start
        anew every `length` tokens.
        """
        token = self.seconds(rows, context) / (rows * self.tokens)
        return 1 / (token + self.start / length)


def fit(table: pa.Table) -> tuple[Floats, float]:
    """`by_rows_B` and `per_context` that come closest to the measured steps, in relative terms.

    table: rows, steps, context, seconds, of which there is one step at least. The part for the rows
    is linear between the fewest rows that were seen and the most of each octave: 1, 2, 4, ... where
    all were. Steps of fewer rows than any that was seen are taken to cost as much as that one. No
    part of it can be negative.
    """
    rows_O, steps_O, context_O, seconds_O = (
        np.asarray(table[name], np.float64) for name in ("rows", "steps", "context", "seconds")
    )
    knots = _knots(rows_O)
    mean_O = seconds_O / steps_O
    design_OU = np.column_stack([_terms(rows_O, knots), context_O / steps_O])
    # a mean over s steps is right to 1/sqrt(s) of itself, about
    weight_O = np.sqrt(steps_O) / mean_O
    found_U = non_negative(design_OU * weight_O[:, None], mean_O * weight_O)
    by_rows_B = _terms(np.arange(knots[-1] + 1.0), knots) @ found_U[:-1]
    return by_rows_B, float(found_U[-1])


def _knots(rows_O: Floats) -> list[int]:
    """The numbers of rows between which a step's time is linear, each of which was seen."""
    seen = sorted(set(map(int, rows_O)))
    most = {(rows - 1).bit_length(): rows for rows in seen}
    return sorted({seen[0], *most.values()})


def _terms(rows_O: Floats, knots: list[int]) -> Floats:
    """1, and for each two neighbouring knots how much of the way between them the rows have come:
    sums of these with positive weights never fall.
    """
    spans = [np.clip((rows_O - low) / (high - low), 0, 1) for low, high in pairwise(knots)]
    return np.column_stack([np.ones(len(rows_O)), *spans])


def non_negative(design_OU: Floats, target_O: Floats) -> Floats:
    """The least-squares solution without negative numbers, by trying which terms are positive:
    exact, and quick for the dozen terms there are.
    """
    _, reduced = np.linalg.qr(np.column_stack([design_OU, target_O]), mode="reduced")
    left, right = reduced[:, :-1], reduced[:, -1]
    best, found = np.inf, np.zeros(left.shape[1])
    for count in range(1, left.shape[1] + 1):
        for terms in map(list, combinations(range(left.shape[1]), count)):
            solved, *_ = np.linalg.lstsq(left[:, terms], right)
            error = float(np.sum((left[:, terms] @ solved - right) ** 2))
            if (solved >= 0).all() and error < best:
                best, found = error, np.zeros(left.shape[1])
                found[terms] = solved
    return found
