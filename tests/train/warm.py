"""For the server that forks runs: all that a run would otherwise import and load by itself."""

import torch
import torch._dynamo
import transformers.models.llama.modeling_llama

import retort.grade.run
import retort.sample.forward_cpu
import retort.sample.run
import retort.train.loop
import retort.train.on_policy
from retort.ops import conv

__all__ = ["retort", "transformers"]

torch.set_num_threads(1)
_INPUTS_BTE, _WEIGHTS_KE = torch.zeros(1, 8, 4), torch.zeros(4, 4)
conv.fast_outputs(_INPUTS_BTE, _WEIGHTS_KE, torch.zeros(4), None)
conv.fast_gradients(_INPUTS_BTE[:, 3:], _INPUTS_BTE, _WEIGHTS_KE, None)
