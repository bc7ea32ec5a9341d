"""`retort bench`: how fast models decode, side by side on this machine.

The paper's protocol (arXiv 2502.20339, section 4): a prompt of 512 tokens, 512 new ones, prefill
measured apart. Every row of a batch has a prompt state of its own, as if all prompts differed.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from retort import console
from retort._version import __version__
from retort.model import weights
from retort.model.decoder import Decoder
from retort.model.devices import fast_dtype, open_device
from retort.model.transplant import keep_attention, transplant
from retort.recipe import BUNDLED_TEACHER
from retort.sample.tokens import SamplingParams, draw, uniforms


@dataclass(frozen=True)
class Speed:
    """One model at one batch size. Seconds and rates are medians over repeats; `spread` is the
    largest rate less the smallest, as a fraction of the median. Bytes are of the whole state.
    """

    model: str
    parameters: int
    batch: int
    prompt: int
    new: int
    prefill_seconds: float
    ms_per_step: float
    tokens_per_second: float
    spread: float
    state_bytes: int


@dataclass(frozen=True)
class Bench:
    """The speeds, and what they were measured with."""

    speeds: list[Speed]
    machine: str
    threads: int
    torch: str
    retort: str


def bench(
    models: Sequence[tuple[str, Decoder]],
    batches: Sequence[int],
    prompt: int = 512,
    new: int = 512,
    repeats: int = 3,
) -> Bench:
    """Decodes with every model at every batch size. Repeats go round all models before the next
    one starts, so that a noisy minute touches all of them alike.
    """
    cases = [(name, decoder, batch) for batch in batches for name, decoder in models]
    runs: dict[int, list[tuple[float, float, int]]] = {i: [] for i in range(len(cases))}
    with console.progress("bench", len(cases) * (repeats + 1)) as advance:
        for repeat in range(repeats + 1):
            for i, (name, decoder, batch) in enumerate(cases):
                # The first round only warms up, and need not be long for that.
                measured = _decode(decoder, batch, prompt, new if repeat else min(new, 8))
                if repeat:
                    runs[i].append(measured)
                advance(1, f"{name}, batch {batch}")
    speeds = [
        _speed(name, decoder, batch, prompt, new, runs[i])
        for i, (name, decoder, batch) in enumerate(cases)
    ]
    return Bench(
        speeds,
        platform.processor() or platform.machine(),
        torch.get_num_threads(),
        torch.__version__,
        __version__,
    )


def open_models(folders: Sequence[Path], device: str = "cpu") -> list[tuple[str, Decoder]]:
    """Models by folder; without any, the bundled teacher beside a pure and a hybrid student of its
    shape. Raises ValueError for folders that are no checkpoints.
    """
    dtype = fast_dtype(open_device(device))
    if folders:
        return [(folder.resolve().name, weights.load(folder, dtype, device)) for folder in folders]
    teacher = weights.load(BUNDLED_TEACHER, dtype, device)
    layers = teacher.config.layers
    pure = transplant(teacher, keep_attention(layers, []))
    hybrid = transplant(teacher, keep_attention(layers, [layers // 2]))
    return [("teacher", teacher), ("pure", pure.eval()), ("hybrid", hybrid.eval())]


def table(result: Bench) -> Table:
    """The speeds for a person, with each model's rate over the first one's at the same batch."""
    shown = Table(title=f"decode, {result.threads} threads, {result.machine}")
    for heading in ("model", "batch", "prefill", "ms/step", "tokens/s", "spread", "state", "ratio"):
        shown.add_column(heading, justify="left" if heading == "model" else "right")
    first = {s.batch: s.tokens_per_second for s in reversed(result.speeds)}
    for s in result.speeds:
        shown.add_row(
            console.printable(s.model),
            str(s.batch),
            console.format_seconds(s.prefill_seconds),
            f"{s.ms_per_step:.2f}",
            f"{s.tokens_per_second:,.0f}",
            f"{100 * s.spread:.0f} %",
            f"{console.format_count(s.state_bytes)}B",
            f"{s.tokens_per_second / first[s.batch]:.2f}x",
        )
    return shown


@torch.inference_mode()
def _decode(decoder: Decoder, batch: int, prompt: int, new: int) -> tuple[float, float, int]:
    """Seconds of one prefill row, seconds of `new` steps of the batch, and bytes of its state."""
    device = decoder.device
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(decoder.config.vocab_size, (1, prompt), generator=generator).to(device)
    row = decoder.init_state(1, prompt + new)
    prefill_seconds = _timed(lambda: decoder(ids_BT, row), device)
    state = row.fork(batch)
    seed_B = torch.arange(batch, device=device)
    token_B = ids_BT[0, -1].expand(batch)
    params = SamplingParams()

    def steps() -> None:
        token = token_B
        for step in range(new):
            logits_BV = decoder(token[:, None], state).squeeze(1)
            token = draw(logits_BV, uniforms(seed_B, torch.full_like(seed_B, step)), params)

    return prefill_seconds, _timed(steps, device), state.nbytes


def _timed(work: Callable[[], object], device: torch.device) -> float:
    _synchronise(device)
    began = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _speed(
    name: str,
    decoder: Decoder,
    batch: int,
    prompt: int,
    new: int,
    runs: list[tuple[float, float, int]],
) -> Speed:
    seconds = statistics.median(decode for _, decode, _ in runs)
    rates = [batch * new / decode for _, decode, _ in runs]
    return Speed(
        model=name,
        parameters=decoder.size,
        batch=batch,
        prompt=prompt,
        new=new,
        prefill_seconds=statistics.median(prefill for prefill, _, _ in runs),
        ms_per_step=1000 * seconds / new,
        tokens_per_second=batch * new / seconds,
        spread=(max(rates) - min(rates)) / statistics.median(rates),
        state_bytes=runs[0][2],
    )
