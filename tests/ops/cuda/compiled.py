"""Compiles every kernel for a GPU that need not be there, as far as what does not depend on its
assembler, and prints their names: run by its test in a process in which nothing is interpreted.
"""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import compiler
from triton.runtime.jit import JITFunction

from retort.model.config import (
    ATTENTION,
    LINEAR,
    DecoderConfig,
    DiscreteMamba2Config,
    Mamba1Config,
    Mamba2Config,
    MixerConfig,
)
from retort.model.decoder import Decoder
from retort.ops.cuda.draw import Filters, draw, uniforms
from retort.sample.cache import CacheSettings
from retort.sample.forward_cuda import Cuda

SIZES: dict[str, Any] = {"heads": 2, "head_dim": 64, "state_size": 64}
RARELY = CacheSettings(ssm_dtype=torch.bfloat16, write_every=16)


class Driver:
    """What is asked of a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compile_only() -> None:
    """Launches become compilations, up to the layouts of tiles in registers."""
    stages, run = CUDABackend.add_stages, JITFunction.run

    def first_stages(self: Any, found: dict[str, Any], *others: Any) -> None:
        stages(self, found, *others)
        for name in ("llir", "ptx", "cubin"):
            del found[name]

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert min(grid) > 0
        run(self, *args, grid=grid, warmup=True, **kwargs)
        print(self._fn_name.split(".")[-1])

    CUDABackend.add_stages = first_stages
    compiler.CompiledKernel = lambda *_: object()
    JITFunction.run = warm_up
    triton.runtime.driver.set_active(Driver())


def step(mixer: MixerConfig | None, cache: CacheSettings | None, **changes: Any) -> None:
    """One of a decoder with one layer in bfloat16."""
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "layer_types": (LINEAR if mixer else ATTENTION,),
        "heads": 3,
        "kv_heads": 1,
        "head_dim": 64,
        "mixer": mixer,
    }
    decoder = Decoder(DecoderConfig(**settings | changes)).bfloat16()
    forward = Cuda(decoder, 2, 64, cache=cache)
    state = decoder.init_state(1, 32)
    forward.admit(torch.arange(2), state)
    forward.step(torch.zeros(2, dtype=torch.long), 8)


if __name__ == "__main__":
    compile_only()
    step(None, None, qk_norm=True, qkv_bias=True)
    step(Mamba2Config(**SIZES, groups=2), None)
    step(Mamba2Config(**SIZES, groups=1), RARELY)
    step(DiscreteMamba2Config(**SIZES, groups=2), RARELY)
    step(Mamba1Config(heads=4, kv_heads=2, head_dim=64, dt_rank=8), None)
    logits_SV = torch.zeros(2, 5000, dtype=torch.bfloat16)
    seed_S = torch.zeros(2, dtype=torch.long)
    draw(logits_SV, seed_S, seed_S, 0.0, Filters())
    draw(logits_SV.float(), seed_S, seed_S, 0.8, Filters(5, 0.9, 0.1))
    uniforms(seed_S, seed_S)
