"""Recipes of runs that end in a second: two layers, two rows, sums of one step."""

from pathlib import Path
from typing import Any

from retort import recipe as recipes
from retort.recipe import DistillRecipe

Values = dict[str, Any]

PROBLEMS: Values = {"kind": "arithmetic", "split": "train", "difficulty": [1, 1]}
DATA: Values = {"kind": "worked", "prompt": "{question}", "problems": PROBLEMS}
FRESH: Values = {
    "start": "fresh",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
}
STUDENT: Values = {"start": "transplant", "keep_attention": [1], "settings": {"chunk_size": 16}}


def stage(kind: str = "supervised", steps: int = 3, **changes: Any) -> Values:
    """A stage of a few steps, two rows with room for two problems each."""
    values = {
        "name": kind,
        "objective": {"kind": kind},
        "data": DATA,
        "tokens": steps * 2 * 288,
        "rows": 2,
        "length": 288,
        "optim": {"lr": 5e-3},
    }
    return values | changes


def fresh(out: Path, *stages: Values, **changes: Any) -> DistillRecipe:
    """A tiny Llama from nothing."""
    values = {"out": out, "student": FRESH, "stages": stages or [stage()]}
    return recipes.parse(DistillRecipe, values | changes)


def hybrid(out: Path, teacher: Path, /, *stages: Values, **changes: Any) -> DistillRecipe:
    """A student that keeps one of the teacher's two attention layers, made in two stages."""
    values: Values = {
        "out": out,
        "teacher": teacher,
        "student": STUDENT,
        "stages": stages or [stage("hidden_states", 3), stage("distill", 4)],
        "checkpoints": {"every": 2},
    }
    return recipes.parse(DistillRecipe, values | changes)
