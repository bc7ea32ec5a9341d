"""A decoder's step on a CPU: matrix products, and a kernel or two between any of them.

A step has its memory from the start, and weights are read as they are fastest (`cpu_products`):
where memory is plentiful, from a copy that is made for it.

Shapes: S slots or the rows that run, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from retort.model.context import rotations
from retort.model.cost import kv_bytes_per_token, state_bytes
from retort.model.decoder import Decoder
from retort.model.state import DecoderState
from retort.ops.cpu import norms
from retort.ops.cpu.team import of_threads
from retort.sample.cpu_layers import FeedForward, Floats, OpenProduct, Shared, open_layer
from retort.sample.cpu_products import Matrix, Panels
from retort.sample.cpu_prompts import Prompts
from retort.sample.memory import free_memory, panel_bytes, weight_bytes

KV_DTYPES = (torch.float32, torch.bfloat16)

PACKED_SLOTS = 16
"""With fewer rows a product is bound by reading the weights, however they lie."""
PACKED_SHARE = 0.05
"""Of the free memory, what a second copy of the weights may take."""


class Cpu:
    """The decoder, in float32, for `slots` rows of at most `max_length` tokens each.

    Keys and values may be kept in bfloat16: half the memory, and faster where rows are long. The
    threads are torch's unless told. The decoder's weights are copied for our own products; where
    these are not faster, or memory is short, they are laid out anew, in place, and stay of use;
    those of a decoder in training are copied instead. Raises ValueError for other dtypes.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        decoder: Decoder,
        slots: int,
        max_length: int,
        kv_dtype: torch.dtype = torch.float32,
        threads: int | None = None,
    ) -> None:
        _check(decoder, kv_dtype)
        self.slots, self.max_length = slots, max_length
        self.shared = _share(decoder, slots, max_length, kv_dtype, threads)
        self.share_from = self.shared.prompts.share_from
        self.layers = [
            open_layer(block.mixer, i, self.shared) for i, block in enumerate(decoder.blocks)
        ]
        self.mlps = [FeedForward(block.mlp, self.shared) for block in decoder.blocks]
        self.head = self.shared.inward(decoder.lm_head)
        # The head's own weight where the two are tied; there its product counts for more.
        self.embedding_VD = decoder.model.embed_tokens.weight.detach()
        self.h_SD = torch.empty(slots, decoder.config.hidden_size)
        self.arrays = self.h_SD.numpy(), self.shared.u_SD.numpy()
        scales = [
            norm
            for block in decoder.blocks
            for norm in (block.input_layernorm, block.post_attention_layernorm)
        ]
        self.scales = [norm.weight.detach().numpy() for norm in [*scales, decoder.model.norm]]
        self.eps = decoder.config.norm_eps

    # ------------------------------------------------------------ rows

    @torch.inference_mode()
    def admit(self, slot_S: Tensor, prompt: DecoderState) -> None:
        """Starts rows from a prompt that has been read; its keys and values may be read where they
        are for as long as rows of it run.
        """
        length = int(prompt.length_B[0])
        self.shared.length_S[slot_S.numpy()] = length
        self.shared.prompts.admit(slot_S.tolist(), prompt, length)
        for layer, state in zip(self.layers, prompt.layers, strict=True):
            layer.admit(slot_S, state, length)

    @torch.inference_mode()
    def move(self, slot_S: Tensor, source_S: Tensor) -> None:
        """Copies rows from `source_S` over those of `slot_S`; the two do not meet."""
        length_S, prompts = self.shared.length_S, self.shared.prompts
        slots, sources = slot_S.numpy(), source_S.numpy()
        length_S[slots] = length_S[sources]
        prompts.move(slots.tolist(), sources.tolist())
        own = int((length_S - prompts.start_S)[slots].max())
        for layer in self.layers:
            layer.move(slot_S, source_S, own)

    def groups(self, rows: int) -> Iterable[list[int]]:
        """Those of the first rows that read the keys and values of one prompt together."""
        return self.shared.prompts.groups(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the states of all slots."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors())

    # ------------------------------------------------------------ steps

    @torch.inference_mode()
    def step(self, token_S: Tensor, reach: int) -> Tensor:
        """Logits_SV of the first S slots after one more token each; the next step overwrites them.

        Raises ValueError where a row would have more tokens than there is room for.
        """
        rows = token_S.shape[0]
        length_S = self.shared.length_S[:rows]
        self._check_room(max(reach, int(length_S.max()) + 1))
        torch.index_select(self.embedding_VD, 0, token_S, out=self.h_SD[:rows])
        norms.norm(self.arrays[0], self.scales[0], self.eps, self.arrays[1], rows, self.shared.team)
        parts = [part for pair in zip(self.layers, self.mlps, strict=True) for part in pair]
        for part, scale_D in zip(parts, self.scales[1:], strict=True):
            self._add_norm(part.step(rows), scale_D, rows)
        length_S += 1
        return torch.from_numpy(self.head(rows)[:rows])

    def _add_norm(self, y_SD: Floats, scale_D: Floats, rows: int) -> None:
        """Adds a layer's output to the residual stream, and norms the sum for the next one."""
        h_SD, u_SD = self.arrays
        norms.add_norm(h_SD, y_SD, scale_D, self.eps, u_SD, rows, self.shared.team)

    def _check_room(self, reach: int) -> None:
        if reach > self.max_length:
            raise ValueError(
                f"there is room for {self.max_length} tokens a row, and this step needs {reach}: "
                "use a larger max_length"
            )


def _check(decoder: Decoder, kv_dtype: torch.dtype) -> None:
    weight = decoder.lm_head.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(f"no CPU kernels for {weight.dtype} on {weight.device}: use float32, cpu")
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype {kv_dtype}: use float32 or bfloat16")


def _share(
    decoder: Decoder, slots: int, max_length: int, kv_dtype: torch.dtype, threads: int | None
) -> Shared:
    """What all layers share, of rows that have read nothing."""
    cos_1LD, sin_1LD = rotations(decoder.config, torch.arange(max_length)[None])
    threads = torch.get_num_threads() if threads is None else threads
    team = of_threads(threads)
    length_S = np.zeros(slots, np.int64)
    prompts = Prompts(decoder.config, slots, team, kv_dtype)
    angles = cos_1LD[0].numpy(), sin_1LD[0].numpy()
    token = kv_bytes_per_token(decoder.config, kv_dtype.itemsize)
    states = slots * (state_bytes(decoder.config, 4) + max_length * token)
    # Where our kernels have one thread only, torch's products still have all of them.
    ours = team[0] == threads and panel_bytes(decoder, states) > 0
    open_product = partial(Panels, team=team) if ours else _torchs_products(decoder, slots)
    u_SD, y_SD = torch.empty(2, slots, decoder.config.hidden_size)
    return Shared(u_SD, y_SD, length_S, prompts, *angles, kv_dtype, team, open_product)


def _torchs_products(decoder: Decoder, slots: int) -> OpenProduct:
    copied = any(parameter.requires_grad for parameter in decoder.parameters())
    packed = _worth_packing(decoder, slots)
    return partial(Matrix, copied=copied, packed=packed)


def _worth_packing(decoder: Decoder, slots: int) -> bool:
    """Whether a copy of the weights for products with all rows is of use, and small."""
    if not torch.backends.mkl.is_available() or slots < PACKED_SLOTS:
        return False
    return weight_bytes(decoder) < PACKED_SHARE * free_memory(decoder.device)
