"""On-policy distillation (GKD, arXiv 2306.13649): the student learns from what it writes itself.

A document that asks and answers keeps its question, and the student's own answer takes the place of
the one in the data. Text without a question stays as it is.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import floor
from typing import NamedTuple

import torch
from torch import Tensor

from retort.data.packing import PADDING, Batch
from retort.model.decoder import Decoder
from retort.recipe import OnPolicy
from retort.sample.engine import Engine, Request
from retort.sample.tokens import SamplingParams
from retort.store import sample_seed
from retort.train.evaluation import eval_mode

SLOTS = 64
"""Answers that are written at once."""


@dataclass(frozen=True)
class _Piece:
    """A document of a row: its tokens, and for each whether the one that follows is learnt."""

    ids: list[int]
    learn: list[bool]

    @property
    def prompt(self) -> int:
        """Tokens before the last answer; 0 where there is no question in front of one."""
        learnt = [i for i, learnt in enumerate(self.learn) if learnt]
        before = [i for i in range(max(learnt, default=0)) if not self.learn[i]]
        return before[-1] + 2 if before else 0  # what follows the token behind is learnt


class Answered(NamedTuple):
    """Rows to learn from, and how many documents an answer left no room for; None where the rows
    are those of the data.
    """

    batch: Batch
    left_out: int | None = None


def is_on_policy(settings: OnPolicy, step: int) -> bool:
    """Whether a step, counted from 0, is one of the share that is; they are spread evenly."""
    return floor((step + 1) * settings.share) > floor(step * settings.share)


def on_policy_batch(
    student: Decoder, batch: Batch, settings: OnPolicy, seed: int, step: int
) -> Answered:
    """The batch with the student's answers in place of the last ones in its conversations.

    What is written depends on the prompt, `seed` and `step` alone, not on what shares the batch or
    on the number of processes. An answer ends with a stop token of the student's, or is cut off at
    `settings.max_tokens` or where its document would be longer than a row. It alone is learnt;
    documents that no longer fit their row are left out and counted, and what remains of it is
    padding.

    The student must be whole on this process, as for an evaluation.

    Args:
        batch: rows of any device; what is returned is on the same one, and of the same shape.
    """
    rows = [list(_pieces(*row)) for row in zip(*(t.tolist() for t in batch[:3]), strict=True)]
    asked = [piece for row in rows for piece in row if piece.prompt]
    prompts = [piece.ids[: piece.prompt] for piece in asked]
    length = batch.ids_BT.shape[1]
    answers = iter(_answers(student, prompts, length, settings, seed, step))
    written = [[next(answers) if piece.prompt else piece for piece in row] for row in rows]
    fitting = [_fitting(row, length) for row in written]
    columns = zip(*(_packed(row, length) for row in fitting), strict=True)
    ids_BT, document_BT, learn_BT = (torch.stack(column) for column in columns)
    made = Batch(ids_BT, document_BT, learn_BT).to(batch.ids_BT.device)
    return Answered(made, sum(map(len, written)) - sum(map(len, fitting)))


def _pieces(ids: list[int], document: list[int], learn: list[bool]) -> Iterator[_Piece]:
    """The documents of a row, padding apart."""
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or document[stop] != document[start]:
            if document[start] >= 0:
                yield _Piece(ids[start:stop], learn[start:stop])
            start = stop


def _answers(
    student: Decoder,
    prompts: Sequence[list[int]],
    length: int,
    settings: OnPolicy,
    seed: int,
    step: int,
) -> Iterator[_Piece]:
    """Prompts with the student's answers behind them."""
    room = [length - len(prompt) for prompt in prompts]
    longest = min(settings.max_tokens, max(room, default=1))
    params = SamplingParams(max_tokens=longest, temperature=settings.temperature)
    # The prompt's tokens are its name: the same whichever row and process it is in.
    requests = [Request(prompt, [sample_seed(seed, str(prompt), step)]) for prompt in prompts]
    with eval_mode(student):
        found = {done.request: done for done in Engine(student, SLOTS).stream(requests, params)}
    for i, prompt in enumerate(prompts):
        answer = found[i].completion.token_ids[: room[i]]
        learn = [False] * (len(prompt) - 1) + [True] * len(answer) + [False]
        yield _Piece(prompt + answer, learn)


def _fitting(pieces: Sequence[_Piece], length: int) -> list[_Piece]:
    """The documents for which a row has room, those in front first."""
    fitting, room = [], length
    for piece in pieces:
        if len(piece.ids) <= room:
            fitting.append(piece)
            room -= len(piece.ids)
    return fitting


def _packed(pieces: Sequence[_Piece], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """A row: ids, document numbers, and what is learnt."""
    ids = torch.zeros(length, dtype=torch.long)
    document = torch.full((length,), PADDING)
    learn = torch.zeros(length, dtype=torch.bool)
    start = 0
    for number, piece in enumerate(pieces):
        stop = start + len(piece.ids)
        ids[start:stop] = torch.tensor(piece.ids)
        document[start:stop] = number
        learn[start:stop] = torch.tensor(piece.learn)
        start = stop
    return ids, document, learn
