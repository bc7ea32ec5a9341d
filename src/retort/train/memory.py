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
from retort.model.cost import kv_bytes_per_token, state_bytes
from retort.model.decoder import Decoder
from retort.model.weights import RATES
from retort.recipe import Distill, HiddenStates, MixingMatrices, Objective, Stage, Supervised
from retort.train.divergence import CHUNK_ELEMENTS
from retort.train.work import Recompute

_FLOAT32 = 4

SAVING = 3
"""Copies of a process's part of a state that are in host memory while it is written, besides the
tensors themselves: the one that training goes on without, and two of the file that is made of it.
"""

# Chunks of logits, in float32, that exist at once: counted in tests.
LOGITS = {"forward": 5, "reverse": 5, "jsd": 6}
LOGITS_ALONE = 2
LOGITS_MORE = 1  # of cross-entropy beside a divergence

# T x T matrices of one layer, in float32, that exist beside those which are kept; and where they
# are kept for one layer at a time.
_SQUARES, _SQUARES_AGAIN = 4.0, 3.0


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
    CPU does not), bytes of a number that products are computed with, what is computed again, and
    the logits that exist at once.
    """

    shard: int
    sharded: bool
    size: int
    recompute: Recompute
    chunk: int = CHUNK_ELEMENTS


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
    def saving(self) -> int:
        """Bytes of host memory that writing the state takes."""
        return SAVING * (self.weights + self.moments)

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
        gathered=_root(whole, setup),
        teacher=0 if teacher is None else _teacher(sizes(teacher), setup),
        activations=0,
        logits=0,
    )
    step = _Step(stage, micro_rows * stage.length, student.config, whole, trained, setup)
    reading = None if isinstance(stage.objective, Supervised) else teacher
    moments = step.moments(base, reading)
    return max(moments, key=lambda moment: moment.total)


def generating(
    student: Decoder, trained: Sizes, teacher: Decoder | None, slots: int, tokens: int, setup: Setup
) -> int:
    """Bytes of one process while the student writes `slots` answers of `tokens` at once: beside
    what training keeps, all of its weights, the largest of which is in float32 as it is gathered.
    """
    whole, config = sizes(student), student.config
    largest = max(parameter.numel() for parameter in student.parameters())
    copy = setup.size * whole.total + _FLOAT32 * largest if setup.sharded else 0
    kept = _share(whole, setup) + 2 * _share(trained, setup)
    read = 0 if teacher is None else setup.size * -(-sizes(teacher).total // setup.shard)
    row = state_bytes(config, setup.size) + tokens * kv_bytes_per_token(config, setup.size)
    return kept + read + copy + slots * row


# ---------------------------------------------------------------- weights


def _share(numbers: Sizes, setup: Setup) -> int:
    """Bytes of a process's part of so many float32 numbers."""
    return _FLOAT32 * (-(-(numbers.total - numbers.rates) // setup.shard) + numbers.rates)


def _teacher(numbers: Sizes, setup: Setup) -> int:
    """The teacher's part in the dtype of products, and what stays whole of it."""
    return setup.size * -(-numbers.total // setup.shard) + _root(numbers, setup)


def _root(numbers: Sizes, setup: Setup) -> int:
    """What belongs to no block stays whole between the forward and the backward pass."""
    return setup.size * numbers.root if setup.sharded else 0


def _blocks_ahead(numbers: Sizes, setup: Setup) -> int:
    """A block at work, and the next one, which is gathered meanwhile."""
    return 2 * setup.size * numbers.block if setup.sharded else 0


# ---------------------------------------------------------------- moments


@dataclass(frozen=True)
class _Step:
    """What the moments of a step depend on; `tokens` are those of a micro-batch."""

    stage: Stage
    tokens: int
    config: DecoderConfig
    whole: Sizes
    trained: Sizes
    setup: Setup

    def moments(self, base: Memory, teacher: Decoder | None) -> Iterator[Memory]:
        """All that may be the fullest, from what is there at any time."""
        objective, config = self.stage.objective, None if teacher is None else teacher.config
        seen = _activations(
            objective, self.config, config, self.stage.length, self.tokens, self.setup
        )
        full = replace(base, activations=seen)
        if teacher is not None:
            yield self._teacher_reads(full, teacher)
        if isinstance(objective, Distill | Supervised):
            yield self._losses(full, objective)
        yield self._last_block(full)
        yield self._first_block(full)
        yield self._end(base)

    def _teacher_reads(self, full: Memory, teacher: Decoder) -> Memory:
        """The widest part of a block: an MLP with the gate, its activation, and up."""
        config, size = teacher.config, self.setup.size
        block = size * 3 * (config.intermediate_size + config.hidden_size)
        normed = _FLOAT32 * config.hidden_size
        return replace(
            full,
            teacher=full.teacher + _blocks_ahead(sizes(teacher), self.setup),
            activations=full.activations + self.tokens * (block + normed),
        )

    def _losses(self, full: Memory, objective: Distill | Supervised) -> Memory:
        """A chunk of logits, its gradient of the head, and the sum of those before it in float32;
        then that sum as it is cast and scaled.
        """
        chunk = _chunk(self.config.vocab_size, self.tokens, self.setup.chunk)
        head = self._head // self.setup.size
        making = _FLOAT32 * (_buffers(objective) * chunk + head) + self._head
        return replace(full, logits=max(making, _FLOAT32 * head + max(2 * self._head, 4 * head)))

    def _last_block(self, full: Memory) -> Memory:
        """The first gradients of blocks."""
        return replace(
            full,
            gradients=full.gradients + _on_its_way(self.trained.block, self.setup),
            gathered=full.gathered + _blocks_ahead(self.whole, self.setup),
            activations=full.activations + self._working,
            logits=self._head,
        )

    def _first_block(self, full: Memory) -> Memory:
        """The last ones: of the other blocks nothing is left but their gradients."""
        blocks = len(_blocks(self.stage.objective, self.config))
        return replace(
            full,
            gradients=full.moments // 2 + _on_its_way(self.trained.block, self.setup),
            gathered=full.gathered + _blocks_ahead(self.whole, self.setup) // 2,
            activations=full.activations // blocks + self._working,
            logits=self._head,
        )

    def _end(self, base: Memory) -> Memory:
        """The embedding's gradient is reduced. Of a table that is the head as well there are two
        gradients before there is one.
        """
        twice = self._head if self.config.tie_embeddings and self.setup.sharded else 0
        coming = _on_its_way(self.trained.root, self.setup)
        return replace(base, gradients=base.moments // 2 + coming + twice)

    @property
    def _head(self) -> int:
        """Bytes of the head's gradient as it is computed, if it is trained."""
        numbers = self.config.vocab_size * self.config.hidden_size
        return self.setup.size * numbers if self.trained.root >= numbers else 0

    @property
    def _working(self) -> int:
        """What a block keeps, made again perhaps, and the gradients of gate and up."""
        if isinstance(self.stage.objective, MixingMatrices):
            return 0  # no MLP runs, and its matrices are counted with what is kept
        length, size = self.stage.length, self.setup.size
        again = max(
            activations.block(self.config, kind, length, size)
            - _kept(self.config, kind, length, self.setup)
            for kind in _blocks(self.stage.objective, self.config)
        )
        wide = 2 * size * self.config.intermediate_size
        return int(self.tokens * (wide + again * _wrapped(self.stage.objective)))


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
            each = activations.matrices(config, length, setup.size)
            all_at_once = setup.recompute == "none"
            squares = _SQUARES if all_at_once else _SQUARES_AGAIN
            beside = squares * _FLOAT32 * teacher.heads * length
            return int(tokens * (states + (len(blocks) if all_at_once else 1) * each + beside))
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
    if not isinstance(objective, Distill):
        return LOGITS_ALONE
    return LOGITS[objective.direction] + (LOGITS_MORE if objective.ce_weight else 0)


def _chunk(vocabulary: int, tokens: int, elements: int) -> int:
    """Logits of the tokens that are compared at once."""
    return vocabulary * min(tokens, max(1, elements // vocabulary))
