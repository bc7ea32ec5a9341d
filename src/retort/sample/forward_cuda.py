"""A decoder's step on a GPU: kernels of ours between matrix products, nothing that waits for the
host or depends on what it knows, so that a whole step can be captured and replayed.

Rows of the same prompt read its keys and values together, and where they are: a prompt's cache is
never copied, however many rows start from it.

Shapes: S slots or the rows that run, D model width, V vocabulary, A attention layers, T tiles of W
rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from retort.model.attention import Attention
from retort.model.context import rotations
from retort.model.decoder import MLP, Decoder
from retort.model.state import AttentionState, DecoderState
from retort.ops.cuda import attention, norms
from retort.ops.cuda.maths import block
from retort.sample.cache import CacheSettings
from retort.sample.cuda_layers import Shared, Sums, open_layer

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROGRAMS = 4
"""Of attention, for each processor of a GPU: enough to hide what each of them waits for."""
MOST_PARTS = 32
"""Into which a row's tokens are split; more cost more to put together again."""


class Cuda:
    """The decoder for `slots` rows of at most `max_length` tokens each, on a GPU.

    `own_length` bounds the tokens of a row behind its prompt: caches have room for so many. It runs
    on a CPU, too, where Triton's interpreter does. Raises ValueError for dtypes without kernels.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: int,
        max_length: int,
        own_length: int | None = None,
        cache: CacheSettings | None = None,
    ) -> None:
        dtype = decoder.lm_head.weight.dtype
        if dtype not in DTYPES:
            raise ValueError(f"no kernels for {dtype}: use bfloat16, float16 or float32")
        self.decoder, self.slots, self.device = decoder, slots, decoder.device
        self.max_length, self.own_length = max_length, own_length or max_length
        self.cache = cache or CacheSettings()
        self.sharing = _Sharing(slots, attention_geometry(decoder))
        # rows of a prompt always share it
        self.share_from = None if self.sharing.geometry is None else 0
        self.shared = self._share()
        mixers = [block.mixer for block in decoder.blocks]
        self.layers = [
            open_layer(
                mixer, _attention_layers(mixers[:i]), self.shared, self.own_length, self.cache
            )
            for i, mixer in enumerate(mixers)
        ]
        self.programs = PROGRAMS * _processors(self.device)
        self.steps = 0

    def _share(self) -> Shared:
        """Registers of rows that have read nothing, and the angles of all positions."""
        position_1L = torch.arange(self.max_length, device=self.device)[None]
        cos_1LD, sin_1LD = rotations(self.decoder.config, position_1L)
        layers = len(self.decoder.config.attention_layers)
        length_S, start_S, room_S, held_S = torch.zeros(
            4, self.slots, dtype=torch.int32, device=self.device
        )
        address_SA2 = length_S.new_zeros(self.slots, layers, 2, dtype=torch.int64)
        tile_TW = self.sharing.empty_table().to(self.device)
        rows = attention.Rows(length_S, start_S, room_S, address_SA2, tile_TW)
        return Shared(rows, cos_1LD[0], sin_1LD[0], held_S)

    # ------------------------------------------------------------ rows

    def admit(self, slot_S: Tensor, prompt: DecoderState) -> None:
        """Starts rows from a prompt that has been read; it must not be read on from afterwards."""
        rows = self.shared.rows
        self.sharing.admit(slot_S.tolist(), prompt, self.steps)
        rows.length_S[slot_S] = prompt.length_B.int()
        self.shared.held_S[slot_S] = 0
        caches = [layer for layer in prompt.layers if isinstance(layer, AttentionState)]
        if caches:
            rows.start_S[slot_S] = prompt.length_B.int()
            rows.room_S[slot_S] = caches[0].k_BKLD.shape[2]
            rows.address_SA2[slot_S] = _addresses(caches).to(self.device)
        for layer, state in zip(self.layers, prompt.layers, strict=True):
            layer.admit(slot_S, state, prompt.length_B)

    def move(self, slot_S: Tensor, source_S: Tensor) -> None:
        """Copies rows from `source_S` over those of `slot_S`; the two do not meet."""
        self.sharing.move(slot_S.tolist(), source_S.tolist())
        for tensor in self._tensors():
            tensor[slot_S] = tensor[source_S]

    def groups(self, rows: int) -> Iterable[list[int]]:
        """Those of the first rows that read the keys and values of one prompt together."""
        return [] if self.sharing.geometry is None else self.sharing.groups(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the states of all slots, without the prompts that they share."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        """Everything that has a slot for its first dimension."""
        rows = self.shared.rows
        registers = [rows.length_S, rows.start_S, rows.room_S, rows.address_SA2, self.shared.held_S]
        return registers + [tensor for layer in self.layers for tensor in layer.tensors()]

    # ------------------------------------------------------------ steps

    def step(self, token_S: Tensor, reach: int) -> Tensor:
        """Logits_SV of the first S slots after one more token each; their states go on.

        Raises ValueError where rows would have more tokens than there is room for.
        """
        self.prepare(token_S.shape[0], reach)
        return self.launch(token_S)

    def prepare(self, rows: int, reach: int) -> int:
        """The host's part of a step, to be done once before each; it waits for nothing.

        Returns what a captured `launch` depends on besides the number of its rows, which may be
        larger than `rows`: the number of tiles of rows that share a prompt.
        """
        if reach > self.max_length:
            raise ValueError(
                f"there is room for {self.max_length} tokens a row, and this step needs {reach}: "
                "use a larger max_length"
            )
        self.steps += 1
        longest = self.steps - self.sharing.oldest(rows)
        if longest > self.own_length:
            raise ValueError(
                f"there is room for {self.own_length} tokens behind a prompt, and this step needs "
                f"{longest}: use a larger own_length"
            )
        table_TW = self.sharing.changed_table(rows)
        if table_TW is not None:
            if self.device.type == "cuda":
                table_TW = table_TW.pin_memory()
            tile_TW = self.shared.rows.tile_TW[: len(table_TW)]
            tile_TW.copy_(table_TW, non_blocking=True)
        return self.sharing.tiles

    @torch.no_grad()
    def launch(self, token_S: Tensor) -> Tensor:
        """The device's part of a step: logits_SV. It may be captured."""
        with torch.cuda.device_of(token_S):  # kernels run on the current one
            return self._launch(token_S)

    def _launch(self, token_S: Tensor) -> Tensor:
        model, eps = self.decoder.model, self.decoder.config.norm_eps
        sums = self._sums(token_S.shape[0])
        h_SD = embedding(token_S, model.embed_tokens.weight)
        scales = [block.input_layernorm.weight for block in self.decoder.blocks]
        u_SD = norms.rms_norm(h_SD, scales[0], eps)
        afters = [*scales[1:], model.norm.weight]
        for layer, each, after in zip(self.layers, self.decoder.blocks, afters, strict=True):
            y_SD = layer.step(u_SD, sums)
            u_SD = norms.add_norm(h_SD, y_SD, each.post_attention_layernorm.weight, eps)
            u_SD = norms.add_norm(h_SD, feed_forward(each.mlp, u_SD), after, eps)
        self._count(token_S.shape[0])
        return linear(u_SD, self.decoder.lm_head.weight)

    def _sums(self, rows: int) -> Sums | None:
        geometry = self.sharing.geometry
        if geometry is None:
            return None
        tiles = self.sharing.tiles
        own, shared = (self._parts(each * geometry.kv_heads) for each in (rows, tiles))
        parts = attention.Parts.empty(geometry, rows, shared, own, like=self.shared.held_S)
        return Sums(tiles, parts)

    def _parts(self, units: int) -> int:
        """Into how many parts to split each of some units of work."""
        return min(MOST_PARTS, block(-(-self.programs // max(1, units))))

    def _count(self, rows: int) -> None:
        self.shared.rows.length_S[:rows].add_(1)
        if self.cache.write_every > 1:
            self.shared.held_S[:rows].add_(1).remainder_(self.cache.write_every)


class _Sharing:
    """What the host knows: each slot's prompt, when it started, and which rows share a prompt."""

    def __init__(self, slots: int, geometry: attention.Geometry | None) -> None:
        self.geometry = geometry
        self.prompts: list[DecoderState | None] = [None] * slots
        self.started = [0] * slots
        self.rows = 0  # that the table and the oldest are of
        self.tiles = self.first_step = 0

    @property
    def width(self) -> int:
        """Rows of a tile."""
        return self.geometry.tile_rows if self.geometry else 1

    def empty_table(self) -> Tensor:
        """A table for as many tiles as there may be."""
        return torch.full((block(len(self.prompts)), self.width), -1, dtype=torch.int32)

    def admit(self, slots: Sequence[int], prompt: DecoderState, step: int) -> None:
        """Notes where a prompt's rows are, and keeps it while there are any that read it."""
        for slot in slots:
            self.prompts[slot] = prompt if self.geometry else None
            self.started[slot] = step
        self.rows = 0

    def move(self, slots: Sequence[int], sources: Sequence[int]) -> None:
        """Notes that rows were copied."""
        for slot, source in zip(slots, sources, strict=True):
            self.prompts[slot] = self.prompts[source]
            self.started[slot] = self.started[source]
        self.rows = 0

    def oldest(self, rows: int) -> int:
        """The step before the first one of the first `rows` rows."""
        if rows != self.rows:
            self.first_step = min(self.started[:rows])
        return self.first_step

    def changed_table(self, rows: int) -> Tensor | None:
        """Tiles of the first rows that share a prompt, where it is not those of the last call.

        Their number is a power of two, so that few numbers occur; empty tiles fill it up.
        """
        if rows == self.rows:
            return None
        self.rows = rows
        if self.geometry is None:
            return None
        tiles = [part for each in self.groups(rows) for part in _cut(each, self.width)]
        self.tiles = block(len(tiles))
        table_TW = torch.full((self.tiles, self.width), -1, dtype=torch.int32)
        for i, tile in enumerate(tiles):
            table_TW[i, : len(tile)] = torch.tensor(tile)
        return table_TW

    def groups(self, rows: int) -> list[list[int]]:
        """The first rows by their prompts."""
        rows_of: dict[int, list[int]] = {}
        for row, prompt in enumerate(self.prompts[:rows]):
            rows_of.setdefault(id(prompt), []).append(row)
        return list(rows_of.values())


def attention_geometry(decoder: Decoder) -> attention.Geometry | None:
    """That of the decoder's attention layers; None without any."""
    config = decoder.config
    if not config.attention_layers:
        return None
    return attention.Geometry(config.heads, config.kv_heads, config.head_dim)


def feed_forward(mlp: MLP, u_SD: Tensor) -> Tensor:
    """The gated feed-forward layer."""
    gate_SF, up_SF = linear(u_SD, mlp.gate_proj.weight), linear(u_SD, mlp.up_proj.weight)
    return linear(norms.silu_times(gate_SF, up_SF), mlp.down_proj.weight)


def _addresses(caches: Sequence[AttentionState]) -> Tensor:
    """Where keys and values of each layer are."""
    pairs = [cache.tensors() for cache in caches]
    assert all(tensor.is_contiguous() for pair in pairs for tensor in pair)
    return torch.tensor([[tensor.data_ptr() for tensor in pair] for pair in pairs])


def _cut(rows: list[int], width: int) -> list[list[int]]:
    return [rows[at : at + width] for at in range(0, len(rows), width)]


def _attention_layers(mixers: Sequence[object]) -> int:
    return sum(isinstance(mixer, Attention) for mixer in mixers)


def _processors(device: torch.device) -> int:
    """Of a GPU; a CPU runs one program at a time."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
