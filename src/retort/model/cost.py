"""What a decoder costs: parameters, state, floating-point operations, and bytes moved in decode.

Everything follows from the configuration; nothing is built or measured. A multiply-add is two
FLOPs, and only products and recurrences count: norms, gates, activations, RoPE, softmax and
sampling do not. Weights, caches and logits have `dtype_bytes` bytes a number and recurrent states
are in float32, unless `CacheBytes` says otherwise of what is remembered.
"""

from __future__ import annotations

from dataclasses import dataclass

from retort.model.config import (
    ATTENTION,
    DecoderConfig,
    DiscreteMamba2Config,
    LayerType,
    Mamba1Config,
    Mamba2Config,
    MixerConfig,
)

_FLOAT32 = 4

# ------------------------------------------------------------------ parameters


@dataclass(frozen=True)
class BlockParameters:
    """Parameters of one block, by part; `norms` are the two in front of mixer and MLP."""

    mixer: int
    mlp: int
    norms: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.mixer + self.mlp + self.norms


@dataclass(frozen=True)
class Parameters:
    """Parameters of a decoder, by part; `head` is 0 where it is the embedding."""

    embedding: int
    blocks: tuple[BlockParameters, ...]
    norm: int
    head: int

    @property
    def total(self) -> int:
        """All of them, a tied head counted once."""
        return self.embedding + sum(block.total for block in self.blocks) + self.norm + self.head


def parameters(config: DecoderConfig) -> Parameters:
    """The number of parameters of each part of a decoder."""
    table = config.vocab_size * config.hidden_size
    blocks = tuple(
        BlockParameters(
            mixer=_matrices(config, kind) + _vectors(config, kind),
            mlp=_mlp(config),
            norms=2 * config.hidden_size,
        )
        for kind in config.layer_types
    )
    head = 0 if config.tie_embeddings else table
    return Parameters(table, blocks, config.hidden_size, head)


def _mlp(config: DecoderConfig) -> int:
    return 3 * config.hidden_size * config.intermediate_size


def _matrices(config: DecoderConfig, kind: LayerType) -> int:
    """Weights of a mixer that every token is multiplied with."""
    width = config.hidden_size
    if kind == ATTENTION:
        return 2 * width * (config.heads + config.kv_heads) * config.head_dim
    match _mixer(config):
        case Mamba2Config() | DiscreteMamba2Config() as mixer:
            return width * (2 * mixer.inner + mixer.conv_channels + mixer.heads)
        case Mamba1Config() as mixer:
            projected = 3 * mixer.inner + 2 * mixer.kv_inner + mixer.dt_rank
            return width * projected + mixer.dt_rank * mixer.inner


def _vectors(config: DecoderConfig, kind: LayerType) -> int:
    """Parameters of a mixer that are no projections: biases, norms, convolution, decays."""
    if kind == ATTENTION:
        bias = (config.heads + 2 * config.kv_heads) * config.head_dim if config.qkv_bias else 0
        return bias + (2 * config.head_dim if config.qk_norm else 0)
    mixer = _mixer(config)
    convolution = mixer.conv_channels * (mixer.conv_width + 1)
    match mixer:
        case Mamba2Config():  # dt_bias, A_log and D; the norm
            return convolution + 3 * mixer.heads + mixer.inner
        case DiscreteMamba2Config():  # D; z_bias
            return convolution + mixer.heads + mixer.inner
        case Mamba1Config():  # the bias of dt and D; A_log
            return convolution + 2 * mixer.inner + mixer.state_channels


def _mixer(config: DecoderConfig) -> MixerConfig:
    assert config.mixer is not None, "a configuration with linear layers has a mixer"
    return config.mixer


# ------------------------------------------------------------------ state


@dataclass(frozen=True)
class CacheBytes:
    """How many bytes a number of what rows remember has: of keys and values, and of recurrent
    states, which are written every so many tokens.
    """

    kv: int
    ssm: int = _FLOAT32
    write_every: int = 1


def state_bytes(config: DecoderConfig, dtype_bytes: int, cache: CacheBytes | None = None) -> int:
    """Bytes of a row's state that do not grow with its length: recurrence and convolution, and the
    inputs since states were written where that is not in every step.
    """
    if not config.linear_layers:
        return 0
    mixer, cache = _mixer(config), cache or CacheBytes(dtype_bytes)
    past = (mixer.conv_width - 1) * mixer.conv_channels * dtype_bytes
    held = cache.write_every if cache.write_every > 1 else 0
    inputs = past + held * _input_bytes(mixer, dtype_bytes)
    return recurrent_bytes(config, cache.ssm) + len(config.linear_layers) * inputs


def recurrent_bytes(config: DecoderConfig, itemsize: int = _FLOAT32) -> int:
    """Bytes of a row's recurrent states: what a decode step reads, and writes."""
    if not config.linear_layers:
        return 0
    return len(config.linear_layers) * _mixer(config).state_channels * itemsize


def _input_bytes(mixer: MixerConfig, dtype_bytes: int) -> int:
    """What a token adds to one layer's state, kept until that is written: x and B, and of each head
    its decay and scale in float32. Mamba-1 writes its state in every step.
    """
    if isinstance(mixer, Mamba1Config):
        return 0
    shared = mixer.groups * mixer.state_size
    return (mixer.inner + shared) * dtype_bytes + 2 * mixer.heads * _FLOAT32


def kv_bytes_per_token(config: DecoderConfig, dtype_bytes: int) -> int:
    """Bytes of the keys and values that a row keeps for each of its tokens."""
    per_layer = 2 * config.kv_heads * config.head_dim * dtype_bytes
    return len(config.attention_layers) * per_layer


# ------------------------------------------------------------------ floating-point operations


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token, by part; `mixing` is what is done with the other tokens of its row:
    attention's scores and values, or the recurrence.
    """

    projections: float
    convolution: float
    mixing: float
    mlp: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.projections + self.convolution + self.mixing + self.mlp + self.head


def decode_flops(config: DecoderConfig, context: float) -> Flops:
    """FLOPs of a decoded token that sees `context` tokens, itself among them."""
    linear = _recurrence(_mixer(config)) if config.linear_layers else 0.0
    return _flops(config, _attention(config, context), linear)


def prefill_flops(config: DecoderConfig, length: int) -> Flops:
    """FLOPs of a token in a parallel pass over `length` tokens: the mean over positions.

    Attention counts the causal half alone: token t sees t tokens. The Mamba-2 mixers run in their
    chunked form (arXiv 2405.21060, section 6) with the whole square of each chunk, as kernels
    do, and Mamba-1 as its recurrence. The head counts for every token; a prefill that wants the
    last token's logits only saves nearly all of it.
    """
    linear = _parallel(_mixer(config)) if config.linear_layers else 0.0
    return _flops(config, _attention(config, (length + 1) / 2), linear)


def train_flops(config: DecoderConfig, length: int) -> float:
    """FLOPs of a token in training on rows of `length`: a forward and a backward of twice that.

    What activation checkpointing computes again is not counted.
    """
    return 3 * prefill_flops(config, length).total


def _flops(config: DecoderConfig, attention: float, linear: float) -> Flops:
    kept, replaced = len(config.attention_layers), len(config.linear_layers)
    mixer = config.mixer
    taps = mixer.conv_channels * mixer.conv_width if replaced and mixer is not None else 0
    return Flops(
        projections=2 * sum(_matrices(config, kind) for kind in config.layer_types),
        convolution=2 * replaced * taps,
        mixing=kept * attention + replaced * linear,
        mlp=2 * config.layers * _mlp(config),
        head=2 * config.vocab_size * config.hidden_size,
    )


def _attention(config: DecoderConfig, seen: float) -> float:
    """Scores of one layer against `seen` keys, and their values: a multiply-add a channel each."""
    return 4 * config.heads * config.head_dim * seen


def _recurrence(mixer: MixerConfig) -> float:
    """One step of one layer. For each number of the state: decay 1, input 2, output 2; Mamba-1
    has a decay for each of them, dt * A, 1 more. The exponential is not counted.
    """
    return (6 if isinstance(mixer, Mamba1Config) else 5) * mixer.state_channels


def _parallel(mixer: MixerConfig) -> float:
    """A token's share of one layer in chunks of Q: C B^T and its product with the values, both Q
    wide for each head; the chunk's contribution to the state and the state's to the outputs; and
    the states' own recurrence, once a chunk.
    """
    if isinstance(mixer, Mamba1Config):
        return _recurrence(mixer)
    within = 2 * mixer.chunk_size * mixer.heads * (mixer.state_size + mixer.head_dim)
    across = 4 * mixer.state_channels
    return within + across + 2 * mixer.state_channels / mixer.chunk_size


# ------------------------------------------------------------------ bytes moved in decode


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes that one decode step of `batch` rows moves, by what they are of."""

    batch: int
    weights: int
    state: int
    kv: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.state + self.kv + self.logits

    @property
    def per_token(self) -> float:
        """One row's share."""
        return self.total / self.batch


def decode_bytes(
    config: DecoderConfig,
    batch: int,
    context: int,
    dtype_bytes: int = 2,
    cache: CacheBytes | None = None,
) -> DecodeBytes:
    """Bytes of a decode step whose rows see `context` tokens each, in the mean over steps.

    Every weight is read once (an embedding that is not also the head is looked up, not read), the
    recurrent state is read and every so often written, and the inputs kept until then are read;
    keys and values are read, and a logit is written in the model's dtype and then written and read
    once in float32 for sampling. Left out: activations, the past inputs of convolutions, and
    writing the new keys and values.
    """
    cache = cache or CacheBytes(dtype_bytes)
    sizes = parameters(config)
    weights = sizes.total if config.tie_embeddings else sizes.total - sizes.embedding
    return DecodeBytes(
        batch=batch,
        weights=weights * dtype_bytes,
        state=batch * _state_traffic(config, dtype_bytes, cache),
        kv=batch * context * kv_bytes_per_token(config, cache.kv),
        logits=batch * config.vocab_size * (dtype_bytes + 2 * _FLOAT32),
    )


def _state_traffic(config: DecoderConfig, dtype_bytes: int, cache: CacheBytes) -> int:
    """What a row's step reads and writes of its recurrent states and of the inputs beside them."""
    states, every = recurrent_bytes(config, cache.ssm), cache.write_every
    if every == 1 or not config.linear_layers or isinstance(config.mixer, Mamba1Config):
        return 2 * states
    # One input is written, and between none and all but one of them are read.
    inputs = len(config.linear_layers) * _input_bytes(_mixer(config), dtype_bytes)
    return round(states * (1 + 1 / every) + inputs * (1 + (every - 1) / 2))


def decode_limit(
    config: DecoderConfig,
    batch: int,
    context: int,
    bytes_per_second: float,
    dtype_bytes: int = 2,
) -> float:
    """Tokens per second, all rows together, of a decode that only waits for its memory."""
    return bytes_per_second / decode_bytes(config, batch, context, dtype_bytes).per_token


def largest_batch(
    config: DecoderConfig,
    context: int,
    memory_bytes: float,
    dtype_bytes: int = 2,
    cache: CacheBytes | None = None,
) -> int:
    """How many rows of `context` tokens fit beside the weights; 0 where not even those do.

    A row holds its state, its keys and values, and its logits twice: in the model's dtype and in
    float32. Activations and what an allocator loses must be taken off `memory_bytes` before.
    """
    cache = cache or CacheBytes(dtype_bytes)
    row = state_bytes(config, dtype_bytes, cache) + context * kv_bytes_per_token(config, cache.kv)
    row += config.vocab_size * (dtype_bytes + _FLOAT32)
    return max(0, int((memory_bytes - parameters(config).total * dtype_bytes) // row))
