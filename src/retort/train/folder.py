"""The folder beside a student in which its run leaves what it needs to go on."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from retort.model import weights
from retort.recipe import DistillRecipe
from retort.store import LOCK

METRICS = "metrics.jsonl"
DROPPED = "decontamination.jsonl"
TOKENIZER = "tokenizer"
"""The folder, among a run's files, of the tokenizer that was made for it."""

RECIPE = "recipe.json"
"""The file that says what the run is."""

# What may change between a run and its continuation: how it is run, not what is computed.
_HOW = {
    "out", "force", "checkpoints", "device", "parallel", "guard", "evaluation", "trackers",
    "planning",
}  # fmt: skip


def work_folder(out: Path) -> Path:
    """The folder beside a student's in which its training leaves what it needs."""
    return out.with_name(f"{out.name}.training")


def identity(recipe: DistillRecipe) -> str:
    """The recipe as text, less what may change between a run and its continuation."""
    return recipe.model_dump_json(exclude=_HOW, indent=2)


def finished(recipe: DistillRecipe, work: Path) -> bool:
    """Whether there is nothing to do. Raises ValueError when another recipe's run is here."""
    if recipe.force or not (work / RECIPE).is_file():
        return False
    if (work / RECIPE).read_text(encoding="utf-8") != identity(recipe):
        raise ValueError(
            f"{work}: holds another recipe's run; choose another out=, or add force=true "
            "(docs/training.md#stopping-and-going-on)"
        )
    return (work / "finished").is_file() and (recipe.out / weights.CONFIG).is_file()


def keep_tokenizer(work: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Leaves the tokenizer of a fresh model for later starts, complete or not at all."""
    folder = work / TOKENIZER
    if not folder.is_dir():
        aside = work / f".{TOKENIZER}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        tokenizer.save_pretrained(aside)
        aside.rename(folder)


def clear(work: Path) -> None:
    """Deletes all that an earlier run has left, but for the lock that is held."""
    for path in sorted(work.iterdir(), key=Path.is_file):  # states before what says whose they are
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def check_shared(work: Path) -> None:
    """Raises ValueError where this process does not see what the main one has made."""
    if not (work / RECIPE).is_file():
        raise ValueError(
            f"{work}: not seen by all processes; `out` must be on a disk that all machines share"
        )
