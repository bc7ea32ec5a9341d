"""Which attention layers a student can least do without, found by replacing one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retort import console
from retort.data.mixture import open_data
from retort.data.packing import Batch, Rows
from retort.model.config import MixerConfig
from retort.model.decoder import Block, Decoder
from retort.model.transplant import Start, replaced_block
from retort.recipe import KeepImportant
from retort.train.divergence import divergence_sum

FILE = "importance.json"


def measure(
    decoder: Decoder,
    mixer: MixerConfig,
    start: Start,
    keep: KeepImportant,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> dict[int, float]:
    """What replacing each attention layer alone costs on the calibration rows of a recipe.

    Raises ValueError when there are fewer attention layers than are to be kept.
    """
    layers = decoder.config.attention_layers
    if keep.count > len(layers):
        raise ValueError(
            f"student.keep_attention.count: {keep.count}, but only {len(layers)} layers have "
            "attention"
        )
    rows = Rows(open_data(keep.data, tokenizer, seed), 1, keep.length, range(1))
    batches = [rows.batch().to(decoder.device) for _ in range(keep.rows)]
    costs = {}
    with console.progress("measuring layers", len(layers), "layers", 0) as advance:
        for index in layers:
            block = replaced_block(decoder, index, mixer, start)
            costs[index] = cost(decoder, index, block, batches)
            advance(1, f"layer {index}: KL {costs[index]:.4g}")
    return costs


@torch.no_grad()
def cost(decoder: Decoder, index: int, block: Block, batches: Iterable[Batch]) -> float:
    """KL(decoder || decoder with `block` in place of its block `index`), nats per learnt token."""
    total, count = 0.0, 0
    head_VD = decoder.lm_head.weight
    for batch in batches:
        context = decoder.context(batch.ids_BT, None, batch.document_BT)
        states = decoder.hidden_states(batch.ids_BT, batch.document_BT)
        changed_BTD: Tensor = block(states[index], context)
        for later in decoder.blocks[index + 1 :]:
            changed_BTD = later(changed_BTD, context)
        wanted_MD, found_MD = (
            decoder.model.norm(h_BTD)[batch.learn_BT] for h_BTD in (states[-1], changed_BTD)
        )
        total += float(divergence_sum(found_MD, head_VD, wanted_MD, head_VD))
        count += wanted_MD.shape[0]
    return total / max(count, 1)


def highest(costs: Mapping[int, float], count: int) -> list[int]:
    """The `count` layers that cost most, in their order in the decoder."""
    return sorted(sorted(costs, key=lambda index: -costs[index])[:count])


def remembered(folder: Path, recipe: str) -> dict[int, float] | None:
    """The costs that an earlier start of the same recipe has left in its folder, if any."""
    path = folder / FILE
    if not path.is_file():
        return None
    known = json.loads(path.read_text(encoding="utf-8"))
    if known["recipe"] != recipe:
        return None
    return {int(index): value for index, value in known["costs"].items()}


def remember(folder: Path, recipe: str, costs: Mapping[int, float]) -> None:
    """Leaves the costs for later starts: a student must not change while it is trained."""
    partial = (folder / FILE).with_suffix(".partial")
    partial.write_text(json.dumps({"recipe": recipe, "costs": costs}) + "\n", encoding="utf-8")
    partial.replace(folder / FILE)
