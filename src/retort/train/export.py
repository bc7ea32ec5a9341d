"""Students out of a run: when it has finished, or at any step that it has kept."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from retort.data.chat import load_tokenizer
from retort.model import weights
from retort.model.decoder import Decoder
from retort.recipe import Parallel
from retort.train import checkpoint
from retort.train.parallel import cast, tie, whole_on_main
from retort.train.state import untied
from retort.train.world import World, compute_dtype, open_world

STUDENT = "student"
"""The folder of a run that says what the student is: a checkpoint but for the weights."""


def save(
    student: Decoder,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    settings: Parallel,
) -> None:
    """Writes the student as a checkpoint folder, in the dtype it is computed in.

    All processes must call it; the main one writes.
    """
    decoder = whole_on_main(student, world, compute_dtype(world.device, settings))
    if decoder is not None:
        weights.save(decoder, folder, tokenizer)
    world.wait()


def prepare(
    student: Decoder,
    work: Path,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    settings: Parallel,
) -> None:
    """Leaves in a run's folder what `export` needs besides the tensors of a state."""
    dtype = compute_dtype(world.device, settings)
    weights.save_config(student.config, work / STUDENT, dtype, tokenizer)


def export(work: Path, out: Path, step: int | None = None) -> Path:
    """Writes the student of a run's newest state, or of the state of a step, as a checkpoint
    folder; returns the state's folder. On this process alone, without a GPU.

    Raises ValueError where there is no such state, or nothing may be written to `out`.
    """
    weights.check_target(out)
    state = _state(work, step)
    config = weights.read_config(work / STUDENT)
    student = weights.empty(config).to_empty(device="cpu")
    tie(student)
    tensors = {f"model.{name}": tensor for name, tensor in untied(student).items()}
    with open_world("cpu", Parallel()) as world:
        checkpoint.read(state, tensors, world)
    told = json.loads((work / STUDENT / weights.CONFIG).read_text(encoding="utf-8"))
    cast(student, weights.DTYPES[told["dtype"]])
    weights.save(student, out, load_tokenizer(work / STUDENT))
    return state


def _state(work: Path, step: int | None) -> Path:
    """The state of a step, or the newest that is whole."""
    root = work / checkpoint.FOLDER
    if not (work / STUDENT).is_dir():
        raise ValueError(f"{work}: no training run (those of `retort distill` end in .training)")
    if step is None:
        found = checkpoint.newest(root)
        if found is None:
            saved = "is whole" if checkpoint.states(root) else "has been saved yet"
            raise ValueError(f"{work}: no state {saved}")
        return found[0]
    path = checkpoint.folder(root, step)
    if checkpoint.read_values(path) is None:
        kept = ", ".join(str(checkpoint.step_of(each)) for each in checkpoint.states(root))
        raise ValueError(f"{work}: no whole state of step {step} (there are: {kept or 'none'})")
    return path
