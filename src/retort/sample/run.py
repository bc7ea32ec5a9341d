"""Sampling into a run folder: what is asked less what is there, completed in any number of goes."""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from retort import console
from retort._version import __version__
from retort.data import problems as sets
from retort.data.chat import ask, load_tokenizer, prompt_ids
from retort.data.problems import Problem
from retort.model import weights
from retort.model.config import ATTENTION
from retort.model.decoder import Decoder
from retort.model.devices import fast_dtype, open_device
from retort.recipe import BUNDLED_TEACHER, SampleRecipe
from retort.sample.engine import Engine, Finished, Request, Timing
from retort.sample.tokens import SamplingParams
from retort.store import Run, fingerprint, sample_seed

FLUSH_ROWS = 512
FLUSH_SECONDS = 20.0
"""A killed run loses at most this much of its sampling."""


@dataclass(frozen=True)
class _Work:
    """A problem, its prompt, and the samples of it that are missing."""

    problem: Problem
    prompt: list[int]
    missing: list[int]


def sample(recipe: SampleRecipe) -> Path:
    """Samples what the recipe asks and its folder lacks, and returns the folder.

    The same command continues a run that was stopped, and does nothing once all is there; a larger
    `n` or more problems extend it. Raises ValueError for folders, files or settings that do not
    fit, and when the folder holds a run of something else.
    """
    problems = sets.load(recipe.problems)
    decoder = weights.load(recipe.model, _dtype(recipe), recipe.device)
    tokenizer = load_tokenizer(recipe.model)
    prompts = [prompt_ids(tokenizer, ask(recipe.prompt, problem.question)) for problem in problems]
    _check_lengths(decoder, recipe, max(len(prompt) for prompt in prompts))
    run = Run.start(recipe.out, _identity(recipe), _facts(recipe, decoder), force=recipe.force)
    with run.lock():
        _add_problems(run, problems)
        work = _missing(run, problems, prompts, recipe.sampling.n)
        asked = len(problems) * recipe.sampling.n
        left = sum(len(item.missing) for item in work)
        if left == 0:
            console.say(f"{recipe.out}: all {asked} completions are there, nothing to do")
            return recipe.out
        with console.progress(f"sample {run.name}", asked, "", asked - left) as advance:
            for finished, timing in _flushes(decoder, recipe, work):
                _write(run, recipe, tokenizer, work, finished, timing)
                advance(len(finished), _pace(timing))
    return recipe.out


def _dtype(recipe: SampleRecipe) -> torch.dtype:
    """The asked type, else the one that suits the device."""
    device = open_device(recipe.device)
    return fast_dtype(device) if recipe.dtype is None else weights.DTYPES[recipe.dtype]


def _check_lengths(decoder: Decoder, recipe: SampleRecipe, longest: int) -> None:
    config, asked = decoder.config, longest + recipe.sampling.max_tokens
    if ATTENTION in config.layer_types and asked > config.max_position:
        raise ValueError(
            f"sampling.max_tokens = {recipe.sampling.max_tokens}: with a prompt of {longest} "
            f"tokens that exceeds the {config.max_position} positions of {recipe.model}; "
            f"at most {config.max_position - longest} fit"
        )


def _identity(recipe: SampleRecipe) -> dict[str, Any]:
    """What decides which completions exist; `n` and the problem count only say how many."""
    return {
        "model": fingerprint(recipe.model),
        "problems": recipe.problems.model_dump(mode="json", exclude={"count"}),
        "prompt": recipe.prompt,
        "sampling": recipe.sampling.model_dump(exclude={"n"}),
        "dtype": str(_dtype(recipe)).removeprefix("torch."),
    }


def _facts(recipe: SampleRecipe, decoder: Decoder) -> dict[str, Any]:
    return {
        "name": recipe.name or recipe.model.resolve().name,
        "model": {
            "folder": "bundled" if recipe.model == BUNDLED_TEACHER else str(recipe.model),
            "fingerprint": fingerprint(recipe.model),
            "parameters": decoder.size,
        },
        "n": recipe.sampling.n,
        "recipe": recipe.model_dump(mode="json", exclude={"force"}),
        "versions": {
            "retort": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "device": _device_name(recipe.device),
    }


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _add_problems(run: Run, problems: list[Problem]) -> None:
    """Keeps a copy of question and answer, so that grading needs nothing but the run folder.

    Raises ValueError when a problem in the folder now reads differently.
    """
    known = {row["problem_id"]: row for row in run.problems.read().to_pylist()}
    new = []
    for problem in problems:
        row = {"problem_id": problem.id, "question": problem.question, "answer": problem.answer}
        if problem.id not in known:
            new.append(row)
        elif known[problem.id] != row:
            raise ValueError(
                f"problem {problem.id}: its text differs from the one sampled before in "
                f"{run.folder}; choose another out=, or force=true to start over"
            )
    run.problems.append(new)


def _missing(run: Run, problems: list[Problem], prompts: list[list[int]], n: int) -> list[_Work]:
    present: dict[str, set[int]] = defaultdict(set)
    for problem_id, sample_idx in run.completions.keys():  # noqa: SIM118  # not a dict
        present[problem_id].add(sample_idx)
    work = [
        _Work(problem, prompt, [j for j in range(n) if j not in present[problem.id]])
        for problem, prompt in zip(problems, prompts, strict=True)
    ]
    return [item for item in work if item.missing]


def _flushes(
    decoder: Decoder, recipe: SampleRecipe, work: list[_Work]
) -> Iterator[tuple[list[Finished], Timing]]:
    """Completions in portions to be written, each with the engine time since the last one.

    What is finished is handed out even when sampling is interrupted.
    """
    settings = recipe.sampling
    requests = [
        Request(item.prompt, [sample_seed(settings.seed, item.problem.id, j) for j in item.missing])
        for item in work
    ]
    engine = Engine(decoder, recipe.slots)
    params = SamplingParams(**settings.model_dump(exclude={"n"}))
    ready: list[Finished] = []
    flushed, told = time.monotonic(), Timing()
    try:
        for finished in engine.stream(requests, params):
            ready.append(finished)
            late = time.monotonic() - flushed > FLUSH_SECONDS
            if len(ready) >= FLUSH_ROWS or late:
                yield ready, engine.timing - told
                ready, flushed, told = [], time.monotonic(), engine.timing
    except KeyboardInterrupt:
        if ready:
            yield ready, engine.timing - told
        raise
    if ready:
        yield ready, engine.timing - told


def _pace(timing: Timing) -> str:
    """Empty for completions whose last tokens came with those of the portion before."""
    seconds = timing.decode_seconds
    return f"{timing.decode_tokens / seconds:.0f} tok/s" if seconds else ""


def _write(
    run: Run,
    recipe: SampleRecipe,
    tokenizer: PreTrainedTokenizerBase,
    work: list[_Work],
    finished: list[Finished],
    timing: Timing,
) -> None:
    texts = tokenizer.batch_decode(
        [done.completion.token_ids for done in finished], skip_special_tokens=True
    )
    # Parts are numbered from 0, so this is the number of the one being written.
    batch = len(run.completions.part_files())
    rows = [
        _row(recipe, work[done.request], done, text, batch)
        for done, text in zip(finished, texts, strict=True)
    ]
    run.completions.append(rows)
    run.timing.append([{"slots": recipe.slots, "started": finished[0].started, **asdict(timing)}])


def _row(
    recipe: SampleRecipe, item: _Work, done: Finished, text: str, batch: int
) -> dict[str, Any]:
    sample_idx = item.missing[done.sample]
    return {
        "problem_id": item.problem.id,
        "sample_idx": sample_idx,
        "seed": sample_seed(recipe.sampling.seed, item.problem.id, sample_idx),
        "text": text,
        "token_count": len(done.completion.token_ids),
        "finish_reason": done.completion.finish_reason,
        "prompt_tokens": len(item.prompt),
        "logprob": done.completion.logprob,
        "batch": batch,
        "started": done.started,
        "ended": done.ended,
    }
