"""Sampling into a run folder: what is asked less what is there, completed in any number of goes."""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from retort import console, interrupts
from retort._version import __version__
from retort.data import problems as sets
from retort.data.chat import ask, load_tokenizer, prompt_ids
from retort.data.problems import Problem
from retort.model import weights
from retort.model.config import ATTENTION, DecoderConfig
from retort.model.cost import decode_bytes, decode_flops, kv_bytes_per_token
from retort.recipe import BUNDLED_TEACHER, Cache, SampleRecipe, Sampling
from retort.sample import workers
from retort.sample.cache import CacheSettings
from retort.sample.clock import Timing, together
from retort.sample.cluster import Cluster
from retort.sample.crew import Alone, Crew, dtype_of, open_engine
from retort.sample.stopping import until
from retort.sample.work import Done, Portion, Work
from retort.store import Run, fingerprint

FLUSH_ROWS = 512
FLUSH_SECONDS = 20.0
"""A killed run loses at most this much of its sampling."""


def sample(recipe: SampleRecipe, cluster: Cluster | None = None) -> Path:
    """Samples what the recipe asks and its folder lacks, and returns the folder.

    The same command continues a run that was stopped, and does nothing once all is there; a larger
    `n` or more problems extend it. With a cluster its workers sample, else this process does; what
    is sampled is the same. Raises ValueError for folders, files or settings that do not fit, when
    the folder holds a run of something else, and where the cluster cannot do the work.
    """
    problems = sets.load(recipe.problems)
    config = weights.read_config(recipe.model)
    tokenizer = load_tokenizer(recipe.model)
    shots = _shots(recipe, problems)
    prompts = [prompt_ids(tokenizer, ask(recipe.prompt, each.question), shots) for each in problems]
    longest = max(len(prompt) for prompt in prompts)
    _check_lengths(config, recipe, longest)
    with _crew(recipe, longest, cluster) as crew:
        run = Run.start(
            recipe.out,
            _identity(recipe),
            _facts(recipe, config, crew.device),
            force=recipe.force,
            check=lambda run: _mended(run, problems),
        )
        with run.lock():
            run.problems.append(_new_problems(run, problems))
            work = _missing(run, problems, prompts, recipe.sampling.n)
            asked = len(problems) * recipe.sampling.n
            _complete(run, crew, tokenizer, work, asked, recipe.sampling.stop)
    return recipe.out


def _shots(recipe: SampleRecipe, problems: list[Problem]) -> list[tuple[str, str]]:
    """The turns before each question: what the user asks, and what is answered."""
    if recipe.shots is None:
        return []
    shown = sets.shots(recipe.shots, problems)
    return [(ask(recipe.prompt, each.question), sets.worked(each)) for each in shown]


def _crew(
    recipe: SampleRecipe, prompt_tokens: int, cluster: Cluster | None
) -> AbstractContextManager[Crew]:
    if cluster is None:
        return nullcontext(Alone(recipe, open_engine(recipe, prompt_tokens)))
    return workers.crew(recipe, prompt_tokens, cluster)


def _complete(
    run: Run,
    crew: Crew,
    tokenizer: PreTrainedTokenizerBase,
    work: list[Work],
    asked: int,
    stop: Sequence[str],
) -> None:
    """Samples what is missing of a run, and shows how far it is."""
    left = sum(len(item.samples) for item in work)
    if left == 0:
        console.say(f"{run.folder}: all {asked} completions are there, nothing to do")
        return
    with console.progress(f"sample {run.name}", asked, "", asked - left) as advance:
        for portions in _flushes(crew.sample(work)):
            with interrupts.held_back():
                _write(run, tokenizer, stop, portions)
            advance(sum(len(portion.done) for portion in portions), _pace(portions))


def _check_lengths(config: DecoderConfig, recipe: SampleRecipe, longest: int) -> None:
    asked = longest + recipe.sampling.max_tokens
    if ATTENTION in config.layer_types and asked > config.max_position:
        raise ValueError(
            f"sampling.max_tokens = {recipe.sampling.max_tokens}: with a prompt of {longest} "
            f"tokens that exceeds the {config.max_position} positions of {recipe.model}; "
            f"at most {config.max_position - longest} fit"
        )


def _identity(recipe: SampleRecipe) -> dict[str, Any]:
    """What decides which completions exist; `n` and the problem count only say how many."""
    identity = {
        "model": fingerprint(recipe.model),
        "problems": recipe.problems.model_dump(mode="json", exclude={"count"}),
        "prompt": recipe.prompt,
        "sampling": _drawn(recipe.sampling),
        "dtype": str(dtype_of(recipe)).removeprefix("torch."),
    }
    # What is not asked for is not named, so that runs that knew of none of it are the same.
    if recipe.shots is not None:
        identity["shots"] = recipe.shots.model_dump(mode="json")
    if recipe.draft is not None:
        # The same distribution, but not the same draws from it.
        draft = {"model": fingerprint(recipe.draft.model), "tokens": recipe.draft.tokens}
        identity["draft"] = draft
    if recipe.cache != Cache():
        identity["cache"] = recipe.cache.model_dump()
    return identity


def _drawn(sampling: Sampling) -> dict[str, Any]:
    """How completions are drawn, in the words of runs that knew of no stop strings."""
    return sampling.model_dump(exclude={"n"} if sampling.stop else {"n", "stop"})


def _facts(recipe: SampleRecipe, config: DecoderConfig, device: str) -> dict[str, Any]:
    return {
        "name": recipe.name or recipe.model.resolve().name,
        "model": {
            "folder": "bundled" if recipe.model == BUNDLED_TEACHER else str(recipe.model),
            "fingerprint": fingerprint(recipe.model),
            "parameters": weights.empty(config).size,
            "token": _token(config, dtype_of(recipe), CacheSettings.of(recipe.cache)),
        },
        "n": recipe.sampling.n,
        "recipe": recipe.model_dump(mode="json", exclude={"force"}),
        "versions": {
            "retort": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "device": device,
    }


def _token(config: DecoderConfig, dtype: torch.dtype, cache: CacheSettings) -> dict[str, float]:
    """What decoding a token takes: of itself, for each token that it sees, and in weights, which
    all rows of a step share.
    """
    alone, beside_one = (decode_flops(config, context).total for context in (0, 1))
    kept = cache.bytes_of(dtype)
    moved = decode_bytes(config, 1, context=0, dtype_bytes=dtype.itemsize, cache=kept)
    return {
        "flops": alone,
        "flops_per_context": beside_one - alone,
        "weight_bytes": moved.weights,
        "row_bytes": moved.state + moved.logits,
        "bytes_per_context": kv_bytes_per_token(config, kept.kv),
    }


def _mended(run: Run, problems: list[Problem]) -> None:
    """Sets damaged parts of a run aside: what they held is missing now, and is made again.

    Raises ValueError as `_new_problems` does.
    """
    for table in (run.problems, run.completions, run.timing, run.steps):
        for path in table.set_aside_damaged():
            console.warn(f"{path}: a damaged part, set aside; what it held is made again")
    _new_problems(run, problems)


def _new_problems(run: Run, problems: list[Problem]) -> list[dict[str, Any]]:
    """Rows for the problems that a run lacks. It keeps a copy of question and answer, so that
    grading needs nothing but the run folder.

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
    return new


def _missing(run: Run, problems: list[Problem], prompts: list[list[int]], n: int) -> list[Work]:
    present: dict[str, set[int]] = defaultdict(set)
    for problem_id, sample_idx in run.completions.keys():  # noqa: SIM118  # not a dict
        present[problem_id].add(sample_idx)
    work = [
        Work(problem.id, prompt, [j for j in range(n) if j not in present[problem.id]])
        for problem, prompt in zip(problems, prompts, strict=True)
    ]
    return [item for item in work if item.samples]


def _flushes(portions: Iterator[Portion | None]) -> Iterator[list[Portion]]:
    """Portions to be written together. What is finished is handed out whatever ends sampling, and
    in time where nothing else finishes.
    """
    ready: list[Portion] = []
    rows, flushed = 0, time.monotonic()
    try:
        for portion in portions:
            if portion is not None:
                ready.append(portion)
                rows += len(portion.done)
            late = time.monotonic() - flushed > FLUSH_SECONDS
            if ready and (late or rows >= FLUSH_ROWS):
                yield ready
                ready, rows, flushed = [], 0, time.monotonic()
    except (Exception, KeyboardInterrupt):
        if ready:
            yield ready
        raise
    if ready:
        yield ready


def _by_worker(portions: list[Portion]) -> list[Portion]:
    """The same, with one portion for each worker."""
    merged: dict[int, Portion] = {}
    for each in portions:
        before = merged.get(each.worker)
        merged[each.worker] = before + each if before else each
    return list(merged.values())


def _pace(portions: list[Portion]) -> str:
    """What the workers do together, and what a verification accepts of a draft's proposals."""
    timings = [portion.timing for portion in _by_worker(portions)]
    rate = sum(each.decode_tokens / each.decode_seconds for each in timings)
    pace = f"{rate:.0f} tok/s"
    together = sum(timings, Timing())
    return f"{pace}, {together.acceptance:.1f} accepted" if together.verifications else pace


def _write(
    run: Run, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], portions: list[Portion]
) -> None:
    """Writes a part of completions, and what each worker did for it."""
    all_done = [done for portion in portions for done in portion.done]
    texts = tokenizer.batch_decode(
        [done.completion.token_ids for done in all_done], skip_special_tokens=True
    )
    batch = run.completions.next_number
    run.completions.append(
        [_row(done, until(text, stop), batch) for done, text in zip(all_done, texts, strict=True)]
    )
    merged = _by_worker(portions)
    run.timing.append([_timing(portion) for portion in merged])
    steps = together(portion.steps for portion in merged)
    run.steps.append([{"rows": rows, **asdict(spent)} for (rows, _), spent in steps.items()])


def _timing(portion: Portion) -> dict[str, Any]:
    settings = {"slots": portion.slots, "look": portion.look, "share_from": portion.share_from}
    return settings | {"started": portion.done[0].started} | asdict(portion.timing)


def _row(done: Done, text: str, batch: int) -> dict[str, Any]:
    return {
        "problem_id": done.problem_id,
        "sample_idx": done.sample_idx,
        "seed": done.seed,
        "text": text,
        "token_count": len(done.completion.token_ids),
        "finish_reason": done.completion.finish_reason,
        "prompt_tokens": done.prompt_tokens,
        "logprob": done.completion.logprob,
        "batch": batch,
        "started": done.started,
        "ended": done.ended,
    }
