"""For the server that forks runs: all that a run would otherwise import and load by itself."""

from types import SimpleNamespace
from typing import Any

import pandas
import torch
import torch._dynamo
import transformers.models.llama.modeling_llama

import retort.grade.run
import retort.sample.forward_cpu
import retort.sample.run
import retort.train.loop
import retort.train.on_policy
from retort.model.config import ATTENTION, LINEAR, DecoderConfig, Mamba2Config
from retort.model.decoder import Decoder
from retort.ops import chunked, conv, norms, rotary

__all__ = ["pandas", "retort", "transformers"]

torch.set_num_threads(1)


def load(function: Any, *inputs: Any) -> None:
    """Both kernels of a function: without autograd, whose threads no fork would have."""
    kept = SimpleNamespace()
    kept.save_for_backward = lambda *tensors: setattr(kept, "saved_tensors", tensors)
    found = function.forward(kept, *inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    function.backward(kept, *(torch.zeros_like(each) for each in outputs))


_ROWS_BTE, _HEADS_BTHP, _VECTOR_E = torch.zeros(1, 8, 4), torch.zeros(1, 8, 2, 2), torch.zeros(4)
load(conv._FastScan, _ROWS_BTE, torch.zeros(4, 4), _VECTOR_E, None, 0, True)
load(norms._Norm, _ROWS_BTE, _VECTOR_E, 1.0)
load(norms._Gate, _ROWS_BTE, _ROWS_BTE)
load(norms._GatedNorm, _ROWS_BTE, _ROWS_BTE, _VECTOR_E, _ROWS_BTE, _VECTOR_E, 2, 1.0)
load(rotary._Rotate, _HEADS_BTHP.transpose(1, 2), torch.ones(1, 8, 1), torch.zeros(1, 8, 1))
_STATES_BHPN = torch.zeros(1, 2, 2, 2)
load(chunked._Scan, _HEADS_BTHP, torch.zeros(1, 8, 2), *2 * [_HEADS_BTHP], _STATES_BHPN, None, 4)

# The kernels of a decode step.
_TINY = Decoder(
    DecoderConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        layer_types=(ATTENTION, LINEAR),
        heads=2,
        kv_heads=1,
        head_dim=4,
        mixer=Mamba2Config(heads=2, head_dim=4, state_size=4, groups=2, chunk_size=4),
    )
)
_TINY.reset_parameters()
retort.Engine(_TINY.requires_grad_(False), slots=2).warm(retort.SamplingParams())
