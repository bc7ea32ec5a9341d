"""What there is to be measured on a GPU, part by part; raw numbers go to gpu-*.json.

    python benchmarks/gpu.py tests decode-1b decode-3b peers train profile --out benchmarks/results

tests        the kernels and the training against the same on a CPU
decode-1b    teacher, students without attention and with some, with states of 16 and of 64, with
             states in bfloat16 that are written every 16 tokens beside them: 512 prompt tokens and
             512 new ones, and 512 and 3584
decode-3b    the same of 3B, with states of 16 and of 128
peers        beside transformers' generate, with the same weights
train        two steps of each stage of recipes/llamba-1b.yaml: memory beside the plan's, and the
             share of the GPU's arithmetic
profile      where the time of a decode step goes, by kernel

Without parts, all of them. Each takes minutes on a large GPU; they know nothing of each other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from retort.bench.commands import Asked, Where, measure_decode
from retort.bench.contenders import Case, Ours
from retort.bench.head import head
from retort.bench.models import open_models
from retort.bench.spans import Span
from retort.model.devices import open_device
from retort.recipe import DistillRecipe, load
from retort.sample.cache import CacheSettings
from retort.train.dry_run import dry_run

RARELY = CacheSettings(ssm_dtype=torch.bfloat16, write_every=16)
MODELS = {
    "1b": ("llama-3.2-1b", "llamba-1b", "hybrid-1b", "native-1b-hybrid"),
    "3b": ("llama-3.2-3b", "llamba-4b", "hybrid-3b", "native-3b-hybrid"),
}
PEERS = ("llama-3.2-1b", "native-1b-hybrid")
LENGTHS = {"1k": (512, 512), "4k": (512, 3584)}
"""Tokens of a prompt and of a completion."""
KERNELS = 25
"""That a profile names, those that take longest."""


@dataclass(frozen=True)
class Settings:
    """Where, and how much: batch sizes, steps that are measured of each protocol, repeats, and the
    cache that the usual one is compared with.
    """

    device: str = "cuda"
    batches: tuple[int, ...] = (1, 16, 64, 256, 512, 1024)
    steps: int = 64
    repeats: int = 2
    cache: CacheSettings = RARELY
    recipe: tuple[str, ...] = ("llamba-1b.yaml",)


Part = Callable[[Path, Settings], None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    try:
        open_device("cuda")
    except ValueError as error:
        parser.error(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.parts or PARTS:
        print(f"--- {name}", flush=True)
        PARTS[name](arguments.out, Settings())


def tests(out: Path, settings: Settings) -> None:
    """The tests that need a GPU; their summary is kept. Where one fails, nothing is measured."""
    command = [sys.executable, "-m", "pytest", "-m", settings.device, "-q", "--durations=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    print("\n".join(lines[-40:]))
    _write(out / "gpu-tests.json", {"returncode": done.returncode, "summary": lines[-40:]})
    if done.returncode:
        raise SystemExit(done.returncode)


def decode(models: Sequence[str], name: str, out: Path, settings: Settings) -> None:
    """A sweep over batch sizes at both lengths; one that memory has no room for is left out."""
    for length, (prompt, new) in LENGTHS.items():
        # With a prompt that rows share every step is measured, which takes long at 4 k.
        prompts = "both" if length == "1k" else "own"
        asked = Asked(models, cache=settings.cache)
        _sweep(asked, (prompt, new), prompts, out / f"gpu-decode-{name}-{length}.json", settings)


def peers(out: Path, settings: Settings) -> None:
    """Ours beside transformers'."""
    asked = Asked(PEERS, against=["transformers"])
    _sweep(asked, LENGTHS["1k"], "own", out / "gpu-decode-peers.json", settings)


def _sweep(
    asked: Asked, lengths: tuple[int, int], prompts: str, path: Path, settings: Settings
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = Where(settings.device, out=Path(folder))
        protocol = *lengths, settings.steps
        measure_decode(asked, where, protocol, prompts, settings.batches, None, settings.repeats)
        shutil.copyfile(Path(folder) / "bench-decode.json", path)


def train(out: Path, settings: Settings) -> None:
    """Steps of a recipe's stages, each of as many rows as two passes take."""
    recipe = load(DistillRecipe, [*settings.recipe, f"device={settings.device}"])
    few = [stage.model_copy(update={"rows": 2 * stage.micro_rows}) for stage in recipe.stages]
    trials = dry_run(recipe.model_copy(update={"stages": tuple(few)}))
    top = asdict(head([], open_device(settings.device), ()))
    told = [asdict(trial) for trial in trials]
    print(json.dumps(told, indent=1))
    _write(out / "gpu-train.json", {"head": top, "recipe": settings.recipe, "trials": told})


def profiles(models: Sequence[str], out: Path, settings: Settings) -> None:
    """A decode of each model at the largest batch but one, by kernel."""
    batch = settings.batches[-2]
    found = {name: _profile(name, batch, settings) for name in models}
    top = asdict(head([], open_device(settings.device), ()))
    told = {"head": top, "batch": batch, "steps": settings.steps, "kernels": found}
    _write(out / "gpu-profile.json", told)


def _profile(name: str, batch: int, settings: Settings) -> list[dict[str, Any]]:
    """Names, calls and microseconds of what takes longest; opening and first steps are in it."""
    (model,) = open_models([name], settings.device)
    ours, case = Ours(model), Case(batch, Span(LENGTHS["1k"][0], settings.steps))
    prompt = ours.read(case.lead)
    on_gpu = settings.device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        ours.decode(case, prompt)
    rows = [
        {
            "name": event.key,
            "calls": event.count,
            "us": event.self_device_time_total if on_gpu else event.self_cpu_time_total,
        }
        for event in profiler.key_averages()
    ]
    found = sorted(rows, key=lambda row: row["us"], reverse=True)[:KERNELS]
    for row in found[:10]:
        print(f"{name:18} {row['us'] / 1000:9.2f} ms {row['calls']:6} {row['name'][:70]}")
    return found


def _write(path: Path, told: dict[str, Any]) -> None:
    told = {"torch": torch.__version__, "command": sys.argv} | told
    path.write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")


PARTS: dict[str, Part] = {
    "tests": tests,
    "decode-1b": partial(decode, MODELS["1b"], "1b"),
    "decode-3b": partial(decode, MODELS["3b"], "3b"),
    "peers": peers,
    "train": train,
    "profile": partial(profiles, MODELS["1b"]),
}


if __name__ == "__main__":
    main()
