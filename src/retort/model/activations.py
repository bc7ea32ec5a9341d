"""What the backward pass keeps of the forward: bytes of one block, for each token of a packed row.

Derived from the operators as plain torch runs them, with `size` bytes for a number of the dtype
that products are computed in: norms, decays and recurrences are in float32 whatever that is, and a
cast is a copy unless it changes nothing. Rows have documents, as in training. Masks of a byte a
token are left out; a compiled block keeps less.
"""

from __future__ import annotations

from retort.model.config import (
    ATTENTION,
    DecoderConfig,
    DiscreteMamba2Config,
    LayerType,
    Mamba1Config,
    Mamba2Config,
)

_FLOAT32 = 4
_FLOAT64 = 8


def block(config: DecoderConfig, kind: LayerType, length: int, size: int) -> float:
    """All that a block of rows of `length` tokens keeps, where nothing is computed twice."""
    mlp = 4 * size * config.intermediate_size  # the gate, its activation, up, and their product
    return 2 * norm(config, size) + mixer(config, kind, length, size) + mlp


def norm(config: DecoderConfig, size: int) -> int:
    """What a norm over the model's width keeps, and the projection behind it: the input and its
    scale in float32, the normalised input, the output.
    """
    return (_FLOAT32 + 2 * size) * config.hidden_size + _FLOAT32


def mixer(config: DecoderConfig, kind: LayerType, length: int, size: int) -> float:
    """What a mixer keeps of one token, less the input that the norm before it has handed on."""
    if kind == ATTENTION:
        return _attention(config, length, size)
    assert config.mixer is not None
    match config.mixer:
        case Mamba2Config() as found:
            return _mamba2(found, size) + _dual(found, length)
        case DiscreteMamba2Config() as found:
            return _discrete(found, size) + _dual(found, length)
        case Mamba1Config() as found:
            return _mamba1(found, length, size)


def products(config: DecoderConfig, kind: LayerType, size: int) -> int:
    """What is kept where all is computed again but products with weights, and attention."""
    width = config.hidden_size
    kept = 3 * width + 2 * config.intermediate_size  # the input, two writes to it, gate and up
    if kind == ATTENTION:
        heads = 2 * config.heads + 2 * config.kv_heads  # q, k, v and what comes out
        return size * (kept + heads * config.head_dim) + _FLOAT32 * config.heads
    assert config.mixer is not None
    match config.mixer:
        case Mamba2Config() | DiscreteMamba2Config() as found:
            return size * (kept + _projected(found))
        case Mamba1Config() as found:
            return size * (kept + _projected1(found) + found.inner)


def inputs(config: DecoderConfig, size: int) -> int:
    """What is kept where the whole block is computed again."""
    return size * config.hidden_size


def _attention(config: DecoderConfig, length: int, size: int) -> int:
    """A fused attention: queries, keys, values and outputs, those once more as one row, and the
    logarithm of each head's sum. The documents' mask is a row of the dtype for each token.
    """
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    kept = size * (3 * q + 2 * kv + length) + _FLOAT32 * config.heads
    if config.qk_norm:
        kept += (_FLOAT32 + size) * (q + kv) + _FLOAT32 * (config.heads + config.kv_heads)
    return kept


def _projected(mixer: Mamba2Config | DiscreteMamba2Config) -> int:
    """Rows of in_proj: x, B and C, the gate, and a number a head."""
    return mixer.conv_channels + mixer.inner + mixer.heads


def _projected1(mixer: Mamba1Config) -> int:
    return 2 * mixer.inner + 2 * mixer.kv_inner + mixer.dt_rank


def _mamba2(mixer: Mamba2Config, size: int) -> int:
    """Around the recurrence: step sizes, the convolution, its activation's input and output, and
    a norm of the gated output. In float32 the gate is a view that keeps all of in_proj's output.
    """
    gate = _projected(mixer) if size == _FLOAT32 else mixer.inner
    steps = 2 * _FLOAT32 * mixer.heads
    convolved = (2 * size + _FLOAT32) * mixer.conv_channels
    normed = _FLOAT32 * (gate + 3 * mixer.inner + mixer.groups) + 2 * size * mixer.inner
    return steps + convolved + normed


def _discrete(mixer: DiscreteMamba2Config, size: int) -> int:
    """Around the recurrence: decays, the convolution and its output, the gate. In float32 the
    decays are a view that keeps all of in_proj's output.
    """
    decays = _FLOAT32 * (_projected(mixer) if size == _FLOAT32 else mixer.heads)
    convolved = (size + _FLOAT32) * mixer.conv_channels
    gated = (3 * _FLOAT32 + size) * mixer.inner
    return decays + convolved + gated


def _dual(mixer: Mamba2Config | DiscreteMamba2Config, length: int) -> float:
    """`ops.ssd.scan_chunked` in chunks of Q, in float32: for each head decays, scores and their
    product, all Q wide; B and C; values, values on their way to a state, and outputs of the state
    before; the states themselves once a chunk; and decays from every chunk to every other.
    """
    chunk = min(mixer.chunk_size, length)
    chunks = -(-length // chunk)
    padded = chunks * chunk / length
    heads = 3 * chunk + 2 * mixer.state_size + 3 * mixer.head_dim + 3
    within = _FLOAT32 * mixer.heads * heads + chunk  # and a mask of a byte for each pair
    states = _FLOAT32 * mixer.state_channels * (2 * chunks + 1) / length
    decays = mixer.heads * (_FLOAT32 + _FLOAT64) * (chunks + 1) ** 2 / length
    return padded * within + states + decays


def _mamba1(mixer: Mamba1Config, length: int, size: int) -> float:
    """`ops.scan.scan_chunked`: what in_proj gives, the convolution and its activation's input,
    x, B, C and dt in float32, a state for each chunk, and the gate.
    """
    casts = 0 if size == _FLOAT32 else 2  # C and the gate, else views of what in_proj gives
    convolved = size * mixer.conv_channels + size * mixer.inner
    scanned = _FLOAT32 * (6 + casts) * mixer.inner
    states = _FLOAT32 * mixer.state_channels * -(-length // min(mixer.chunk_size, length)) / length
    return size * (_projected1(mixer) + mixer.inner) + convolved + scanned + states


def matrices(config: DecoderConfig, length: int, size: int) -> float:
    """What the mixing matrices of a Mamba-2 layer keep: decays, scores, and what is compared, a
    number for each head and other token; with step sizes their product too.
    """
    assert isinstance(config.mixer, Mamba2Config | DiscreteMamba2Config)
    mixer, float32 = config.mixer, size == _FLOAT32
    kept = norm(config, size) + (size + _FLOAT32) * mixer.conv_channels
    match mixer:
        case Mamba2Config():
            kept += size * mixer.conv_channels + 2 * _FLOAT32 * mixer.heads
            squares = 4
        case DiscreteMamba2Config():
            kept += _FLOAT32 * (_projected(mixer) if float32 else mixer.heads)
            squares = 3
    return kept + length * (squares * _FLOAT32 * mixer.heads + 1)
