"""Scores of a run's completions, stored beside them; scoring touches neither them nor verdicts."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pyarrow.compute as pc
import torch

from retort import console, interrupts
from retort._version import __version__
from retort.recipe import BUNDLED_TEACHER, ScoreRecipe
from retort.sample.memory import is_out_of_memory
from retort.score.batches import batches
from retort.score.loading import dtype_of, open_model, scale_of
from retort.score.models import RewardModel
from retort.score.reading import Reading
from retort.store import SCORER, Run, Table, fingerprint
from retort.tables import row_keys, write_aside

WINDOW_ROWS = 4096
"""Completions in memory at once; their texts are sorted by length before they are batched."""
FLUSH_SECONDS = 20.0
"""A killed run loses at most this much of its scoring."""
SEEN_TEXTS = 131_072
"""A problem's samples often repeat one another, and lie close together."""

Key = tuple[str, int]
Text = tuple[str, str]
"""A completion's problem and what it says."""


@dataclass(frozen=True)
class ScoreSummary:
    """scored: completions that this call added. The rest counts the whole run: completions, and
    those without a score because they are empty or longer than the model can read."""

    scored: int
    total: int
    without_score: int


def score(recipe: ScoreRecipe) -> ScoreSummary:
    """Scores the completions of a run that have no score under the recipe's name yet.

    The same command continues what was stopped. Memory holds the model, a window of completions and
    the keys of those that are done. Raises ValueError, before anything is written, when the folder
    is no run or is being written, the model is none of its kind, or the name is another model's.
    """
    run = Run.open(recipe.run)
    name = _name(recipe)
    table, timing = run.scores(name), run.scoring(name)
    identity = _identity(recipe)
    with run.lock():
        _refuse_other(table, identity)
        for path in [*table.set_aside_damaged(), *timing.set_aside_damaged()]:
            console.warn(f"{path}: a damaged part, set aside; what it held is scored again")
        done, total = table.keys(), run.completions.rows()
        if len(done) < total:
            judge = Judge(open_model(recipe), _questions(run), recipe.batch_tokens)
            _write_scorer(table, identity | _facts(recipe))
            _score_missing(run, name, judge, done, total)
        return ScoreSummary(max(0, total - len(done)), total, _without_score(table))


def _score_missing(run: Run, name: str, judge: Judge, done: set[Key], total: int) -> None:
    table, timing = run.scores(name), run.scoring(name)
    began = time.monotonic()
    with console.progress(f"score {run.name}", total, "", len(done)) as advance:
        for rows in _flushes(_rows(run, judge, done)):
            now = time.monotonic()
            with interrupts.held_back():
                table.append(rows)
                timing.append([{"completions": len(rows), "seconds": now - began}])
            advance(len(rows))
            began = now
    if judge.too_long:
        console.warn(
            f"{judge.too_long} different completions have more than the {judge.model.limit} tokens "
            "that the model can read; they have no score and do not vote by it"
        )


class Judge:
    """A reward model at work: each text once, in batches of like length."""

    def __init__(self, model: RewardModel, questions: Mapping[str, str], tokens: int) -> None:
        self.model, self.questions, self.tokens = model, questions, tokens
        self.seen: dict[bytes, list[float]] = {}
        self.too_long = 0

    def scores(self, texts: Sequence[Text]) -> Iterator[tuple[Text, list[float]]]:
        """The scores of each text, in no particular order; none for one that cannot be judged.

        Raises ValueError for a problem without a question and for scores that are not finite.
        """
        new: list[tuple[tuple[Text, Reading], int]] = []
        for text in texts:
            known = self.seen.get(_digest(text))
            if known is not None:
                yield text, known
            elif (reading := self._reading(text)) is None:
                yield text, []
            else:
                new.append(((text, reading), len(reading.ids)))
        for batch in batches(new, self.tokens):
            scores = self._together([reading for _, reading in batch])
            for (text, _), found in zip(batch, scores, strict=True):
                self._remember(text, found)
                yield text, found

    def _reading(self, text: Text) -> Reading | None:
        """What the model reads of a text; None where there is no step, or no room for it."""
        if text[0] not in self.questions:
            raise ValueError(
                f"completions of problem {text[0]!r}, which the run's problems table lacks; "
                "continue the sampling command that made the run, it writes the problems"
            )
        reading = self.model.read(self.questions[text[0]], text[1])
        limit = self.model.limit
        if limit is not None and len(reading.ids) > limit:
            self.too_long += 1
            return None
        return reading if reading.at else None

    def _together(self, readings: Sequence[Reading]) -> list[list[float]]:
        """Scores of one batch, in halves where memory runs out."""
        try:
            return self.model.scores(readings)
        except (RuntimeError, MemoryError) as error:
            if len(readings) == 1 or not is_out_of_memory(error):
                raise
        self.tokens //= 2
        console.warn(f"out of memory: going on with batches of {self.tokens} tokens")
        half = len(readings) // 2
        return self._together(readings[:half]) + self._together(readings[half:])

    def _remember(self, text: Text, scores: list[float]) -> None:
        if not all(map(math.isfinite, scores)):
            raise ValueError(
                f"problem {text[0]!r}: a score is {scores}; with dtype=float32 it may be a number"
            )
        self.seen[_digest(text)] = scores
        if len(self.seen) > SEEN_TEXTS:
            del self.seen[next(iter(self.seen))]  # the oldest: dictionaries keep their order


def _digest(text: Text) -> bytes:
    name = f"{len(text[0])}/{text[0]}{text[1]}"  # the length: no two pairs are written the same way
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _rows(run: Run, judge: Judge, done: set[Key]) -> Iterator[dict[str, Any]]:
    """A row for each completion that is not done."""
    for window in _windows(run, done):
        for text, scores in judge.scores(list(window)):
            for sample in window[text]:
                yield {"problem_id": text[0], "sample_idx": sample, "scores": scores}


def _windows(run: Run, done: set[Key]) -> Iterator[dict[Text, list[int]]]:
    """The completions that are not done, as texts and the samples that say so."""
    window: dict[Text, list[int]] = defaultdict(list)
    rows = 0
    for part in run.completions.parts(["problem_id", "sample_idx", "text"]):
        for key, text in zip(row_keys(part), part["text"], strict=True):
            if key in done:
                continue
            window[key[0], text.as_py()].append(key[1])
            rows += 1
            if rows == WINDOW_ROWS:
                yield window
                window, rows = defaultdict(list), 0
    if window:
        yield window


def _flushes(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows to be written together. What is scored is handed out whatever ends scoring."""
    ready: list[dict[str, Any]] = []
    flushed = time.monotonic()
    try:
        for row in rows:
            ready.append(row)
            if len(ready) >= WINDOW_ROWS or time.monotonic() - flushed > FLUSH_SECONDS:
                yield ready
                ready, flushed = [], time.monotonic()
    except (Exception, KeyboardInterrupt):
        if ready:
            yield ready
        raise
    if ready:
        yield ready


def _questions(run: Run) -> dict[str, str]:
    problems = run.problems.read(["problem_id", "question"])
    ids, questions = (column.to_pylist() for column in problems.columns)
    return dict(zip(ids, questions, strict=True))


def _name(recipe: ScoreRecipe) -> str:
    """What the scores are called. Raises ValueError for a folder whose name is of no use."""
    name = recipe.name or recipe.model.resolve().name
    if not name or name.startswith("."):
        raise ValueError(f"{recipe.model}: its name cannot be that of the scores; set name=")
    return name


def _identity(recipe: ScoreRecipe) -> dict[str, Any]:
    """What decides the scores; one name never has those of two models."""
    kind, scale = scale_of(recipe)
    return {
        "kind": kind,
        "scale": scale,
        "reader": recipe.kind,
        "fingerprint": fingerprint(recipe.model),
        "dtype": str(dtype_of(recipe)).removeprefix("torch."),
    }


def _facts(recipe: ScoreRecipe) -> dict[str, Any]:
    return {
        "model": "bundled" if recipe.model == BUNDLED_TEACHER else str(recipe.model),
        "device": recipe.device,
        "versions": {
            "retort": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    }


def _refuse_other(table: Table, identity: dict[str, Any]) -> None:
    """Raises ValueError where the scores of a name are not, or may not be, this model's."""
    path = table.folder / SCORER
    if not path.is_file():
        if table.part_files():
            raise ValueError(f"{table.folder}: scores without {SCORER}; choose another name=")
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another name=") from None
    changes = [
        f"{key} was {known.get(key)}, is now {value}"
        for key, value in identity.items()
        if known.get(key) != value
    ]
    if changes:
        raise ValueError(
            f"{table.folder}: scores by another model: {'; '.join(changes)}; choose another name= "
            "(docs/scoring.md#the-run-folder)"
        )


def _write_scorer(table: Table, scorer: dict[str, Any]) -> None:
    table.folder.mkdir(exist_ok=True)
    write_aside(table.folder / SCORER, json.dumps(scorer, indent=2).encode())


def _without_score(table: Table) -> int:
    return sum(
        int(pc.sum(pc.equal(pc.list_value_length(part["scores"]), 0), min_count=0).as_py())
        for part in table.parts(["scores"])
    )
