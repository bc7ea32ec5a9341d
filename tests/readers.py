"""What readers of the documentation have beforehand, and how little of it is enough for tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

import retort
from retort.data import arithmetic
from retort.data.chat import train_tokenizer
from retort.grade.run import grade
from retort.recipe import BUNDLED_TEACHER, SampleRecipe, load
from retort.sample.run import sample

# What a command printed for a real model would spend hours on, a test's tiny one need not.
STAGE = ("tokens=600", "rows=1", "micro_rows=1", "length=300")
SMALLER = {
    "distill": [f"stages.{i}.{setting}" for i in (0, 1) for setting in STAGE],
    "sample": ["sampling.n=3", "sampling.max_tokens=8", "problems.count=2"],
}
# A verifier learns from right and wrong answers, which only a model that can do something gives.
ENOUGH = ["sampling.n=4", "sampling.max_tokens=250", "problems.count=24"]


def smaller(page: str, words: list[str]) -> list[str]:
    """What is put behind the words of a `retort` command of a page, so that it takes seconds."""
    if not words or "--plan" in words:
        return []
    if page == "docs/scoring.md" and words[0] == "sample":
        return ENOUGH
    return SMALLER.get(words[0], [])


@cache
def examples() -> list[arithmetic.Example]:
    return list(islice(arithmetic.examples("train", 0, (1, 2)), 40))


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer((e.question + e.solution for e in examples()), 400)


def llama(folder: Path) -> None:
    """A Llama of four layers."""
    config = retort.DecoderConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        layer_types=("full_attention",) * 4,
        heads=4,
        kv_heads=2,
        head_dim=8,
        eos_token_ids=(1,),
    )
    torch.manual_seed(0)
    teacher = retort.Decoder(config)
    teacher.reset_parameters()
    retort.save(teacher, folder, tokenizer())


def student(folder: Path) -> None:
    """A student of it, with Mamba-2 mixers in all layers but one."""
    llama(folder)
    types = ["linear_attention", "full_attention", *["linear_attention"] * 2]
    retort.save(retort.transplant(retort.load(folder), layer_types=types), folder, tokenizer())


def able(folder: Path) -> None:
    """A model that can do something: the bundled teacher."""
    shutil.copytree(BUNDLED_TEACHER, folder)


def run(folder: Path) -> None:
    """A graded run."""
    words = [f"out={folder}", "model=bundled", "problems.kind=arithmetic", *SMALLER["sample"]]
    grade(sample(load(SampleRecipe, words)))


def training(folder: Path) -> None:
    """What a training run has recorded."""
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step":1,"stage":"match","tokens":64,"loss":1.5}\n')


def problems(file: Path) -> None:
    """Problems with their answers and solutions."""
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"{json.dumps(vars(each))}\n" for each in examples()[:30]))


def recipe(file: Path) -> None:
    """A recipe for `retort sample`, with its model beside it."""
    llama(file.with_name("models") / "mine")
    file.write_text("out: runs/mine\nmodel: models/mine\nproblems: {kind: arithmetic}\n")


GIVEN: Mapping[str, Mapping[str, Callable[[Path], None]]] = {
    "README.md": {
        "models/my-llama": llama,
        "data/train.jsonl": problems,
        "data/test.jsonl": problems,
    },
    "docs/data.md": {"runs/teacher-gsm8k": run},
    "docs/internals.md": {"models/my-llama": llama},
    "docs/porting.md": {"models/my-family": llama},
    "docs/sampling.md": {"recipe.yaml": recipe},
    "docs/scoring.md": {"models/pure": able, "runs/pure": run},
    "docs/serving.md": {"models/my-student": student},
    "docs/speculative.md": {
        "models/my-model": llama,
        "models/my-draft": llama,
        "recipe.yaml": recipe,
    },
    "docs/watching.md": {
        "runs/pure.training": training,
        "runs/no-match.training": training,
        "runs/samples/pure": run,
    },
}
