"""Replay of the scheduler: stored completions, with their own lengths, go through slots again.

A row starts when a slot is free, writes a token in every step and leaves when it has written its
last; a step takes what `StepTimes` says of the rows that run and what they see. So a few long
completions cost what they cost: the others have left, and the slots are empty.

Shape suffixes: N completions, P problems, S slots, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np
import pyarrow as pa

from retort.report.jit import compiled
from retort.report.metrics import Floats
from retort.report.samples import KEYS, Ints
from retort.report.steps import StepTimes

DRAWS = 8
"""Sets of k samples that a replay is averaged over."""


@dataclass(frozen=True)
class Lengths:
    """One problem's completions by what they take.

    length_N: tokens, in the order of the samples' numbers. prompt_tokens: of the prompt that they
    share. started: unix seconds when the first of them was.
    """

    length_N: Ints
    prompt_tokens: int
    started: float


def lengths(completions: pa.Table) -> tuple[Lengths, ...]:
    """Of a run's completions (KEYS, token_count, prompt_tokens, started), problems in the order of
    their ids.
    """
    table = completions.sort_by([(name, "ascending") for name in KEYS])
    ids = table["problem_id"].to_numpy()
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]]).tolist()
    names = ("token_count", "prompt_tokens", "started")
    length_C, prompt_C, started_C = (table[name].to_numpy() for name in names)
    return tuple(
        Lengths(
            length_C[start:stop].astype(np.int64),
            int(prompt_C[start]),
            float(started_C[start:stop].min()),
        )
        for start, stop in pairwise([*starts, len(ids)])
    )


@compiled
def through_slots(
    steps_N: Ints, prompt_N: Ints, slots: int, look: int, by_rows_B: Floats, per_context: float
) -> float:
    """Seconds of decode steps until all completions are through, in their order.

    steps_N: what each takes in steps; prompt_N: tokens that it sees before its first.
    A row that has finished goes on until the next look, every `look` steps.
    """
    end_S, start_S = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
    seconds, now, rows, context, waiting = 0.0, 0, 0, 0, 0
    while waiting < len(steps_N) or rows:
        while rows < slots and waiting < len(steps_N):
            if steps_N[waiting]:
                end_S[rows], start_S[rows] = now + steps_N[waiting], prompt_N[waiting] - now
                context += prompt_N[waiting]
                rows += 1
            waiting += 1
        if not rows:
            break
        ahead = end_S[:rows].min() - now
        ahead = (ahead + look - 1) // look * look
        seen = ahead * context + rows * ahead * (ahead + 1) // 2
        seconds += ahead * by_rows_B[rows] + per_context * seen
        now += ahead
        context += rows * ahead
        row = 0
        while row < rows:
            if end_S[row] <= now:
                context -= start_S[row] + now
                rows -= 1
                end_S[row], start_S[row] = end_S[rows], start_S[rows]
            else:
                row += 1
    return seconds


def replay(length_N: Ints, prompt_N: Ints, slots: int, times: StepTimes) -> float:
    """Decode seconds of completions that go through the slots in their order.

    length_N: their tokens, of which the prompt gives the first. prompt_N: tokens of their prompts.
    Raises ValueError for more slots than steps were timed with.
    """
    if not 1 <= slots <= times.slots:
        raise ValueError(
            f"replay with {slots} slots: steps of 1 to {times.slots} rows have been timed"
        )
    steps_N = np.ceil((length_N - 1) / times.tokens).astype(np.int64)
    stepping = through_slots(
        steps_N, prompt_N, slots, times.look, times.by_rows_B, times.per_context
    )
    return float(stepping) + times.start * len(length_N)


def together(
    lengths_P: Sequence[Lengths], k: int, slots: int, times: StepTimes, seed: int = 0
) -> float:
    """Decode seconds per problem of k completions of each, all through the slots one after another,
    in the mean over draws of k of the stored ones.
    """
    rng = np.random.default_rng(seed)
    order = sorted(lengths_P, key=lambda each: each.started)
    prompt_N = np.repeat([each.prompt_tokens for each in order], k)
    seconds = [
        replay(np.concatenate([_drawn(each, k, rng) for each in order]), prompt_N, slots, times)
        for _ in range(_draws(lengths_P, k))
    ]
    return float(np.mean(seconds)) / len(lengths_P)


def alone(
    lengths_P: Sequence[Lengths], k: int, slots: int, times: StepTimes, seed: int = 0
) -> float:
    """Decode seconds of k completions of one problem that has the slots for itself: what one who
    waits for an answer waits, in the mean over problems and over draws of k of the stored ones.
    """
    rng = np.random.default_rng(seed)
    seconds = [
        replay(_drawn(each, k, rng), np.full(k, each.prompt_tokens), slots, times)
        for each in lengths_P
        for _ in range(_draws(lengths_P, k))
    ]
    return float(np.mean(seconds))


def _draws(lengths_P: Sequence[Lengths], k: int) -> int:
    """All samples are drawn in one way alone; many problems need few draws of each."""
    everything = k == len(lengths_P[0].length_N)
    return 1 if everything else max(1, min(DRAWS, ceil(2_000 / len(lengths_P))))


def _drawn(each: Lengths, k: int, rng: np.random.Generator) -> Ints:
    """Lengths of k of the samples, in the order of their numbers."""
    return each.length_N[np.sort(rng.permutation(len(each.length_N))[:k])]
