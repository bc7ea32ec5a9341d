"""Replay of the scheduler: stored completions, with their own lengths, go through slots again.

A row starts when a slot is free, writes a token in every step and leaves when it has written its
last; a step takes what `StepTimes` says of the rows that run and of what they read, a prompt once
for all rows that share it. So a few long completions cost what they cost: the others have left, and
the slots are empty.

Shape suffixes: N completions, P problems, S slots, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from sys import maxsize

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
    steps_N: Ints,
    problem_N: Ints,
    prompt_P: Ints,
    slots: int,
    look: int,
    share_from: int,
    by_rows_B: Floats,
    per_context: float,
) -> float:
    """Seconds of decode steps until all completions are through, in their order.

    steps_N: what each takes in steps; problem_N: its problem; prompt_P: tokens of the prompts.
    A row that has finished goes on until the next look, every `look` steps. Rows that start
    together share their prompt if others do, or if it has `share_from` tokens in all rows of it.
    """
    end_S, start_S, problem_S = np.zeros((3, slots), np.int64)
    shares_S = np.zeros(slots, np.bool_)
    copies_P, sharing_P = np.zeros((2, len(prompt_P)), np.int64)
    seconds, now, rows, context, waiting = 0.0, 0, 0, 0, 0
    while waiting < len(steps_N) or rows:
        while rows < slots and waiting < len(steps_N):
            problem, first, room = problem_N[waiting], waiting, slots - rows
            while waiting < min(first + room, len(steps_N)) and problem_N[waiting] == problem:
                waiting += 1
            prompt, starting = prompt_P[problem], copies_P[problem] + waiting - first
            shares = sharing_P[problem] > 0 or starting * prompt >= share_from
            for each in range(first, waiting):
                if steps_N[each] == 0:
                    continue
                context += 0 if shares and sharing_P[problem] else prompt
                sharing_P[problem] += shares
                copies_P[problem] += not shares
                end_S[rows], problem_S[rows], shares_S[rows] = now + steps_N[each], problem, shares
                start_S[rows] = (0 if shares else prompt) - now
                rows += 1
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
                problem = problem_S[row]
                sharing_P[problem] -= shares_S[row]
                copies_P[problem] -= not shares_S[row]
                if shares_S[row] and not sharing_P[problem]:
                    context -= prompt_P[problem]
                rows -= 1
                end_S[row], start_S[row] = end_S[rows], start_S[rows]
                problem_S[row], shares_S[row] = problem_S[rows], shares_S[rows]
            else:
                row += 1
    return seconds


def replay(length_N: Ints, problem_N: Ints, prompt_P: Ints, slots: int, times: StepTimes) -> float:
    """Decode seconds of completions that go through the slots in their order.

    length_N: their tokens, of which the prompt gives the first. problem_N: which problem each is
    of, all of one problem one after another. prompt_P: tokens of the problems' prompts.
    Raises ValueError for more slots than steps were timed with.
    """
    if not 1 <= slots <= times.slots:
        raise ValueError(
            f"replay with {slots} slots: steps of 1 to {times.slots} rows have been timed"
        )
    steps_N = np.ceil((length_N - 1) / times.tokens).astype(np.int64)
    share_from = maxsize if times.share_from is None else times.share_from
    stepping = through_slots(
        steps_N,
        problem_N,
        prompt_P,
        slots,
        times.look,
        share_from,
        times.by_rows_B,
        times.per_context,
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
    prompt_P = np.array([each.prompt_tokens for each in order])
    problem_N = np.repeat(np.arange(len(order)), k)
    seconds = [
        replay(_all_drawn(order, k, rng), problem_N, prompt_P, slots, times)
        for _ in range(_draws(lengths_P, k))
    ]
    return float(np.mean(seconds)) / len(lengths_P)


def alone(
    lengths_P: Sequence[Lengths], k: int, slots: int, times: StepTimes, seed: int = 0
) -> float:
    """Decode seconds of k completions of one problem that has the slots for itself: what one who
    waits for an answer waits, in the mean over problems and over draws of k of the stored ones.
    """
    rng, problem_N = np.random.default_rng(seed), np.zeros(k, np.int64)
    seconds = [
        replay(_drawn(each, k, rng), problem_N, np.array([each.prompt_tokens]), slots, times)
        for each in lengths_P
        for _ in range(_draws(lengths_P, k))
    ]
    return float(np.mean(seconds))


def _draws(lengths_P: Sequence[Lengths], k: int) -> int:
    """All samples are drawn in one way alone; many problems need few draws of each."""
    everything = k == len(lengths_P[0].length_N)
    return 1 if everything else max(1, min(DRAWS, ceil(2_000 / len(lengths_P))))


def _all_drawn(lengths_P: Sequence[Lengths], k: int, rng: np.random.Generator) -> Ints:
    """Lengths of k samples of each problem, one problem after another."""
    return np.concatenate([_drawn(each, k, rng) for each in lengths_P])


def _drawn(each: Lengths, k: int, rng: np.random.Generator) -> Ints:
    """Lengths of k of the samples, in the order of their numbers."""
    return each.length_N[np.sort(rng.permutation(len(each.length_N))[:k])]
