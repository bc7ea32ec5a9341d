"""Seconds that a replay foretells against seconds that the engine takes.

    python benchmarks/replay.py MODEL ... [--threads N] [--repeats N] [--out FILE]

Each model (a folder, or `bundled`) answers word problems once while its decode steps are timed.
From those step times, and from the lengths of completions alone, runs of other problems and other
numbers of them and of completions are foretold, in as many slots, and then made. The speed of a
shared machine changes within seconds, so each run is made several times, each time right after a
calibration of its own, and the median ratio is what counts; all of them are kept.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from retort.data import arithmetic
from retort.data.chat import load_tokenizer, prompt_ids
from retort.model import weights
from retort.model.decoder import Decoder
from retort.recipe import BUNDLED_TEACHER
from retort.report.scheduler import replay
from retort.report.steps import StepTimes, fit
from retort.sample.clock import Timing, together
from retort.sample.engine import Engine, Finished, Request
from retort.sample.tokens import SamplingParams
from retort.store import sample_seed

PARAMS = SamplingParams(max_tokens=300, temperature=0.8)
SHAPES = [(24, 16, 64), (12, 8, 64), (1, 64, 64), (48, 2, 32), (16, 8, 16), (6, 4, 4), (2, 4, 1)]
"""Problems, completions of each, slots."""
CALIBRATION = (10, 16)
"""Problems, and completions of each at most: no more than there are slots."""

Prompts = list[list[int]]


@dataclass(frozen=True)
class Made:
    """A run of the engine: its completions, what its clocks say, and wall-clock seconds.

    share_from: as in `StepTimes`.
    """

    finished: list[Finished]
    timing: Timing
    steps: pa.Table
    share_from: int | None
    seconds: float

    @property
    def opening(self) -> float:
        """Seconds in which no prompt was read, no completion started and no step taken: slots are
        made, and weights laid out.
        """
        steps = sum(self.steps["seconds"].to_pylist())
        return self.seconds - self.timing.prefill_seconds - self.timing.start_seconds - steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for model in arguments.models for row in measure(model, arguments.repeats)]
    off = [abs(row["ratio"] - 1) for row in rows]
    print(f"off by {100 * max(off):.1f} % at most, {100 * median(off):.1f} % in the median")
    if arguments.out:
        facts = {"threads": arguments.threads, "repeats": arguments.repeats, "rows": rows}
        text = json.dumps({"torch": torch.__version__} | facts, indent=1)
        arguments.out.write_text(text + "\n", encoding="utf-8")


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """All shapes with one model."""
    folder = BUNDLED_TEACHER if name == "bundled" else Path(name)
    decoder = weights.load(folder, torch.float32, "cpu")
    prompts = _prompts(folder)
    run(decoder, prompts, (2, 8, 64))  # loads the kernels
    rows = []
    for shape in SHAPES:
        pairs = [_pair(decoder, prompts, shape) for _ in range(repeats)]
        ratio = median(foretold / measured for foretold, measured in pairs)
        sizes = dict(zip(("problems", "completions", "slots"), shape, strict=True))
        rows.append({"model": folder.name, **sizes, "ratio": ratio, "seconds": pairs})
        seconds = f"{median(measured for _, measured in pairs):6.2f} s"
        print(f"{folder.name:10} {shape!s:14} {seconds}, foretold {ratio:.3f} of it", flush=True)
    return rows


def _pair(decoder: Decoder, prompts: Prompts, shape: tuple[int, int, int]) -> tuple[float, float]:
    """Seconds foretold and measured, after a calibration with other problems."""
    slots, (problems, completions) = shape[2], CALIBRATION
    calibration = run(decoder, prompts, (problems, min(completions, slots), slots))
    made = run(decoder, prompts[::-1], shape)
    return foretell(made, prompts[::-1], slots, calibration), made.seconds


def run(decoder: Decoder, prompts: Prompts, shape: tuple[int, int, int]) -> Made:
    """Completions of the first problems."""
    problems, completions, slots = shape
    engine = Engine(decoder, slots)
    requests = [
        Request(prompt, [sample_seed(0, str(i), j) for j in range(completions)])
        for i, prompt in enumerate(prompts[:problems])
    ]
    began = time.perf_counter()
    finished = list(engine.stream(requests, PARAMS))
    seconds = time.perf_counter() - began
    log = together([engine.log.take()])
    steps = [{"rows": rows, **asdict(spent)} for (rows, _), spent in log.items()]
    table = pa.Table.from_pylist(steps)
    return Made(finished, engine.timing, table, engine.share_from, seconds)


def foretell(made: Made, prompts: Prompts, slots: int, calibration: Made) -> float:
    """Seconds of a run by the clocks of another: of it only the prompts and the completions'
    lengths are taken, in the order in which they were started.
    """
    timing = calibration.timing
    start = timing.start_seconds / timing.starts
    times = StepTimes(*fit(calibration.steps), start=start, share_from=calibration.share_from)
    order = sorted(made.finished, key=lambda done: done.started)
    length_N = np.array([len(done.completion.token_ids) for done in order])
    problem_N = np.array([done.request for done in order])
    prompt_P = np.array([len(prompt) for prompt in prompts])
    prefill = sum(prompt_P[np.unique(problem_N)]) * timing.prefill_seconds / timing.prefill_tokens
    return calibration.opening + prefill + replay(length_N, problem_N, prompt_P, slots, times)


def _prompts(folder: Path) -> Prompts:
    tokenizer = load_tokenizer(folder)
    examples = islice(arithmetic.examples("test", 1, (2, 4)), 64)
    return [prompt_ids(tokenizer, example.question) for example in examples]


if __name__ == "__main__":
    main()
