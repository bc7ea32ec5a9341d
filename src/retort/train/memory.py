"""The memory of one process at the fullest moment of a training step, from sizes alone.

What is assumed: FSDP2 shards each block and then the rest (`train.parallel`), gathers what it is
about to use in the dtype of products, one block ahead of time, and reduces gradients in float32.
Master weights, gradients and AdamW's two moments are in float32. Activations are those of plain
torch operators; all tokens are taken to be learnt. Optimiser state exists from the first step on,
and gradients from the first micro-batch of several.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from retort.model import activations
from retort.model.config import LINEAR, DecoderConfig, LayerType
from retort.model.decoder import Decoder
from retort.model.weights import RATES
from retort.recipe import Distill, HiddenStates, MixingMatrices, Objective, Stage, Supervised
from retort.train.divergence import CHUNK_ELEMENTS
from retort.train.work import Recompute

_FLOAT32 = 4

# Chunks of logits, in float32, that exist at once: counted in tests.
_LOGITS = {"forward": 5, "reverse": 5, "jsd": 8}
_LOGITS_ALONE = 3

# T x T matrices of one layer, in float32, that exist beside those which are kept.
_SQUARES = 4.5


@dataclass(frozen=True)
class Sizes:
    """Numbers in a decoder, or in some of its parameters. `rates` are those that are on every
    process; `root` and `block` what is gathered at once: all that is in no block, and the largest.
    """

    total: int
    rates: int
    root: int
    block: int


@dataclass(frozen=True)
class Setup:
    """How a run is spread: processes that share a copy, whether they shard at all (a process on a
    CPU does not), bytes of a number that products are computed with, and what is computed again.
    """

    shard: int
    sharded: bool
    size: int
    recompute: Recompute


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, by what they are of. `gathered` are weights that are whole for the
    moment; `gradients` and `logits` have what is on its way to a gradient.
    """

    weights: int
    gradients: int
    moments: int
    gathered: int
    teacher: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        kept = self.weights + self.gradients + self.moments + self.gathered
        return kept + self.teacher + self.activations + self.logits


def sizes(decoder: Decoder, names: Collection[str] | None = None) -> Sizes:
    """The numbers in a decoder's parameters, or in those named."""
    numbers = {
        name: parameter.numel()
        for name, parameter in decoder.named_parameters()
        if names is None or name in names
    }
    blocks = [0] * decoder.config.layers
    for name, count in numbers.items():
        if name.startswith("model.layers."):
            blocks[int(name.split(".")[2])] += count
    total = sum(numbers.values())
    rates = sum(count for name, count in numbers.items() if name.endswith(RATES))
    return Sizes(total, rates, total - sum(blocks), max(blocks))


def memory(
    stage: Stage,
    micro_rows: int,
    micro_batches: int,
    student: Decoder,
    trained: Sizes,
    teacher: Decoder | None,
    setup: Setup,
) -> Memory:
    """The fullest moment of a step in which each process reads `micro_batches` times `micro_rows`
    rows. Weights are not looked at.
    """
    whole = sizes(student)
    base = Memory(
        weights=_share(whole, setup),
        gradients=_share(trained, setup) if micro_batches > 1 else 0,
        moments=2 * _share(trained, setup),
        gathered=_gathered(whole, setup),
        teacher=0 if teacher is None else _teacher(sizes(teacher), setup),
        activations=0,
        logits=0,
    )
    config = student.config
    theirs = None if teacher is None else teacher.config
    tokens = micro_rows * stage.length
    seen = _activations(stage.objective, config, theirs, stage.length, tokens, setup)
    head = _head(config, trained, setup)
    moments = [
        *_forward(stage.objective, base, seen, config, theirs, tokens, head, setup),
        *_backward(base, seen, config, stage, tokens, head, trained, setup),
        _end(base, config, trained, setup),
    ]
    return max(moments, key=lambda moment: moment.total)


# ---------------------------------------------------------------- weights


def _share(numbers: Sizes, setup: Setup) -> int:
    """Bytes of a process's part of so many float32 numbers."""
    return _FLOAT32 * (-(-(numbers.total - numbers.rates) // setup.shard) + numbers.rates)


def _gathered(numbers: Sizes, setup: Setup) -> int:
    """What belongs to no block, and two blocks: one at work, and the next one."""
    return setup.size * (numbers.root + 2 * numbers.block) if setup.sharded else 0


def _teacher(numbers: Sizes, setup: Setup) -> int:
    own = setup.size * -(-numbers.total // setup.shard)
    return own + _gathered(numbers, setup)


# ---------------------------------------------------------------- moments


def _forward(
    objective: Objective,
    base: Memory,
    seen: int,
    config: DecoderConfig,
    teacher: DecoderConfig | None,
    tokens: int,
    head: int,
    setup: Setup,
) -> Iterator[Memory]:
    """While the teacher reads what the student has read, and while a loss is made of both."""
    if teacher is not None:
        # The widest part of a block: an MLP with the gate, its activation, and up.
        block = setup.size * (3 * teacher.intermediate_size + 3 * teacher.hidden_size)
        normed = _FLOAT32 * teacher.hidden_size
        yield replace(base, activations=seen + tokens * (block + normed))
    if isinstance(objective, Distill | Supervised):
        logits = _FLOAT32 * _buffers(objective) * _chunk(config.vocab_size, tokens)
        # A chunk's gradient of the head, and the sum of those before it.
        yield replace(base, activations=seen, logits=logits + 2 * head)


def _backward(
    base: Memory,
    seen: int,
    config: DecoderConfig,
    stage: Stage,
    tokens: int,
    head: int,
    trained: Sizes,
    setup: Setup,
) -> Iterator[Memory]:
    """While the gradients of the last block are made, and those of the first one, when nothing of
    the others is left but their gradients. What a block keeps is made again first, perhaps.
    """
    again = max(
        activations.block(config, kind, stage.length, setup.size)
        - _kept(config, kind, stage.length, setup)
        for kind in _blocks(stage.objective, config)
    )
    wide = 2 * setup.size * config.intermediate_size  # the gradients of gate and up
    working = int(tokens * (wide + again * _wrapped(stage.objective)))
    coming = _on_its_way(trained.block, setup)
    yield replace(
        base,
        gradients=base.gradients + coming,
        activations=seen + working,
        logits=head,
    )
    yield replace(
        base,
        gradients=base.moments // 2 + coming,
        activations=seen // len(_blocks(stage.objective, config)) + working,
        logits=head,
    )


def _end(base: Memory, config: DecoderConfig, trained: Sizes, setup: Setup) -> Memory:
    """When the last gradients are reduced, those of the embedding; no activation is left."""
    # Of a table that is the head as well there are two gradients before there is one.
    twice = _head(config, trained, setup) if config.tie_embeddings and setup.sharded else 0
    gradients = base.moments // 2 + _on_its_way(trained.root, setup) + twice
    return replace(base, gradients=gradients)


def _head(config: DecoderConfig, trained: Sizes, setup: Setup) -> int:
    """Bytes of the head's gradient as it is computed, if it is trained."""
    numbers = config.vocab_size * config.hidden_size
    return setup.size * numbers if trained.root >= numbers else 0


def _on_its_way(numbers: int, setup: Setup) -> int:
    """Gradients that are not sharded yet: as computed, and in float32 as they are reduced."""
    return (setup.size + _FLOAT32) * numbers if setup.sharded else 0


# ---------------------------------------------------------------- activations


def _activations(
    objective: Objective,
    config: DecoderConfig,
    teacher: DecoderConfig | None,
    length: int,
    tokens: int,
    setup: Setup,
) -> int:
    """What is kept for the backward pass of a whole loss, the teacher's hidden states included."""
    blocks = _blocks(objective, config)
    if isinstance(objective, Distill | Supervised):
        # After the final norm, all tokens and, once more, those to be learnt; of both models.
        width = config.hidden_size + (teacher.hidden_size if teacher else 0)
        head = activations.norm(config, setup.size) + 2 * setup.size * width
        kept = sum(_kept(config, kind, length, setup) for kind in blocks)
        return int(tokens * (kept + head))
    assert teacher is not None
    states = setup.size * teacher.hidden_size * (teacher.layers + 1)
    match objective:
        case MixingMatrices():
            square = _SQUARES * _FLOAT32 * teacher.heads * length
            each = activations.matrices(config, length, setup.size)
            return int(tokens * (states + len(blocks) * each + square))
        case HiddenStates():
            difference = _FLOAT32 * config.hidden_size
            if objective.compare == "mixer":
                each = activations.mixer(config, LINEAR, length, setup.size)
                each += activations.norm(config, setup.size)
            else:
                each = _kept(config, LINEAR, length, setup)
            return int(tokens * (states + len(blocks) * (each + difference)))


def _kept(config: DecoderConfig, kind: LayerType, length: int, setup: Setup) -> float:
    match setup.recompute:
        case "none":
            return activations.block(config, kind, length, setup.size)
        case "selective":
            return activations.products(config, kind, setup.size)
        case "full":
            return activations.inputs(config, setup.size)


def _blocks(objective: Objective, config: DecoderConfig) -> list[LayerType]:
    """The kinds of the blocks that are trained: layer-wise, only those with a new mixer."""
    if isinstance(objective, Distill | Supervised):
        return list(config.layer_types)
    return [LINEAR] * len(config.linear_layers)


def _wrapped(objective: Objective) -> bool:
    """Whether whole blocks are run: their parts are never computed again."""
    if isinstance(objective, HiddenStates):
        return objective.compare == "block"
    return not isinstance(objective, MixingMatrices)


def _buffers(objective: Distill | Supervised) -> int:
    return _LOGITS[objective.direction] if isinstance(objective, Distill) else _LOGITS_ALONE


def _chunk(vocabulary: int, tokens: int) -> int:
    """Logits of the tokens that are compared at once."""
    return vocabulary * min(tokens, max(1, CHUNK_ELEMENTS // vocabulary))
