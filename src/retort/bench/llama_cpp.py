"""A Llama under llama.cpp: written as GGUF in float32, and decoded in batches.

llama-cpp-python builds llama.cpp from source where it is installed, so it is no dependency. Logits
are made and nothing is sampled: a step's token is the same in each row.
"""

from __future__ import annotations

import ctypes
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from retort.bench.contenders import WARM_STEPS, Case, Runtime, Timed, random_tokens
from retort.bench.gguf import write_gguf
from retort.bench.machine import timed
from retort.bench.models import Model
from retort.model.cost import CacheBytes

HOW_TO_INSTALL = "llama.cpp is not here: pip install llama-cpp-python gguf (builds from source)"
FLOAT32 = 0
"""ggml's number for it."""


def installed() -> bool:
    """Whether it can be measured here."""
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


def check() -> None:
    """Raises ValueError where it is not installed."""
    if not installed():
        raise ValueError(HOW_TO_INSTALL)


def caveats(_: Model) -> list[str]:
    """What makes the comparison less than fair."""
    return ["llama.cpp makes logits and does not sample; its keys and values are float32 too"]


def open_llama_cpp(model: Model) -> Theirs:
    """Writes a model as GGUF and loads that.

    Raises ValueError for what is not written here: mixers, other families, RoPE scaling, and
    models that are not in float32 on the CPU.
    """
    if reasons := list(refusals(model)):
        raise ValueError(f"{model.name} is not run under llama.cpp: {'; '.join(reasons)}")
    llama_cpp = _library()
    llama_cpp.llama_log_set(_SILENT, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model.decoder, path)
        params = llama_cpp.llama_model_default_params()
        params.use_mmap, params.n_gpu_layers = False, 0
        loaded = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not loaded:
        raise ValueError(f"{model.name}: llama.cpp cannot read what was written for it")
    return Theirs(model, loaded)


def refusals(model: Model) -> Iterator[str]:
    """Why a model is not written as GGUF, if anything keeps it."""
    config, weight = model.config, model.decoder.lm_head.weight
    if config.linear_layers or config.family != "llama":
        yield "only Llamas are written as GGUF here"
    if config.rope_scaling is not None:
        yield "RoPE scaling is not written"
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        yield "it is measured in float32 on a CPU"


@dataclass(frozen=True)
class Theirs:
    """A model under llama.cpp."""

    model: Model
    loaded: Any
    runtime: Runtime = "llama.cpp"

    @property
    def name(self) -> str:
        """The model's name, and that it is not ours."""
        return f"{self.model.name} (llama.cpp)"

    @property
    def cache(self) -> CacheBytes:
        """What its rows remember, as the cost model counts it."""
        return self.model.cache

    def read(self, length: int) -> list[int]:
        """Reads a prompt, and forgets it: a context has a fixed number of rows."""
        tokens = random_tokens(self.model.config.vocab_size, length)[0].tolist()
        with self._context(1, length) as context:
            _run(context, tokens, range(length), [0] * length)
        return tokens

    def decode(self, case: Case, prompt: list[int]) -> Timed:
        """Each row has keys and values of its own, copied from those of the first."""
        steps = WARM_STEPS + case.span.steps
        with self._context(case.batch, case.lead + steps) as context:
            _run(context, prompt, range(case.lead), [0] * case.lead)
            _fork(context, case.batch)
            _steps(context, case, range(WARM_STEPS))
            seconds = timed(
                lambda: _steps(context, case, range(WARM_STEPS, steps)), torch.device("cpu")
            )
        return Timed(seconds, None)

    def complete(self, length: int, n: int) -> tuple[int, float]:
        """A prompt is read once, and its cache copied."""
        seconds = timed(lambda: self.read(length), torch.device("cpu"))
        return length, seconds

    @contextmanager
    def _context(self, rows: int, tokens: int) -> Iterator[Any]:
        """Caches for so many rows of so many tokens. Raises MemoryError where it gets none."""
        llama_cpp = _library()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = rows * _padded(tokens), rows, False
        params.n_batch = params.n_ubatch = max(512, rows, tokens)
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.type_k = params.type_v = FLOAT32
        context = llama_cpp.llama_init_from_model(self.loaded, params)
        if not context:
            raise MemoryError(f"llama.cpp has no context for {rows} rows")
        try:
            yield context
        finally:
            llama_cpp.llama_free(context)


def _padded(tokens: int) -> int:
    """llama.cpp rounds a row's cells up to a multiple of this."""
    return -(-tokens // 256) * 256


def _steps(context: Any, case: Case, steps: range) -> None:
    """A token for every row, each in a sequence of its own."""
    for step in steps:
        _run(context, [step] * case.batch, [case.lead + step] * case.batch, range(case.batch))


def _run(
    context: Any, tokens: Sequence[int], positions: Sequence[int], rows: Sequence[int]
) -> None:
    """Reads tokens at positions of rows, up to the logits of the last token of each row."""
    llama_cpp = _library()
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    last = {row: i for i, row in enumerate(rows)}
    batch.n_tokens = len(tokens)
    for i, (token, position, row) in enumerate(zip(tokens, positions, rows, strict=True)):
        batch.token[i], batch.pos[i] = token, position
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        batch.logits[i] = last[row] == i
    try:
        if llama_cpp.llama_decode(context, batch) != 0:
            raise MemoryError("llama.cpp found no room for a batch")
        llama_cpp.llama_synchronize(context)
    finally:
        llama_cpp.llama_batch_free(batch)


def _fork(context: Any, rows: int) -> None:
    """Copies the first row's cache to the others."""
    llama_cpp = _library()
    memory = llama_cpp.llama_get_memory(context)
    for row in range(1, rows):
        llama_cpp.llama_memory_seq_cp(memory, 0, row, -1, -1)


def _library() -> Any:
    """llama-cpp-python, which is not installed everywhere."""
    return import_module("llama_cpp")


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _SILENT(level: int, text: bytes, data: int) -> None:
    """Takes llama.cpp's log, and drops it."""
