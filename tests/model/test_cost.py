"""Costs: counted parameters, states and FLOPs against what the decoder really has and does, and the
limits of published sizes on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.plain import only_torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from retort.model import cost
from retort.model.config import LINEAR, DecoderConfig, Mamba1Config, Mamba2Config
from retort.model.decoder import Decoder
from retort.model.geometries import GEOMETRIES, geometry
from retort.ops import conv, scan, ssd

MakeDecoder = Callable[..., Decoder]

KIB, MIB, GIB = 2**10, 2**20, 2**30
H100 = 3.35e12  # bytes per second

LAYERS = ["a", "aa", "m", "d", "s", "am", "mma", "dad", "ssas"]

# ------------------------------------------------------------------ parameters


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qkv_bias": True},
        {"qk_norm": True},
        {"kv_heads": 1},
        {"heads": 6, "head_dim": 10},
    ],
    ids=str,
)
def test_parameters(make_decoder: MakeDecoder, layers: str, changes: dict[str, object]) -> None:
    decoder = make_decoder(layers, **changes)
    counted = cost.parameters(decoder.config)
    assert counted.total == count(decoder)
    assert counted.embedding == count(decoder.model.embed_tokens)
    assert counted.norm == count(decoder.model.norm)
    for block, found in zip(decoder.blocks, counted.blocks, strict=True):
        norms = count(block.input_layernorm) + count(block.post_attention_layernorm)
        assert found == cost.BlockParameters(count(block.mixer), count(block.mlp), norms)
        assert found.total == count(block)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_parameters_of_published_sizes(name: str) -> None:
    config = geometry(name)
    with torch.device("meta"):
        decoder = Decoder(config)
    assert cost.parameters(config).total == count(decoder)


def test_tied_head_is_counted_once(make_decoder: MakeDecoder) -> None:
    tied = cost.parameters(make_decoder("a", tie_embeddings=True).config)
    untied = cost.parameters(make_decoder("a").config)
    assert (tied.head, untied.head) == (0, tied.embedding)
    assert untied.total - tied.total == tied.embedding


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", LAYERS)
def test_state(make_decoder: MakeDecoder, layers: str, dtype: torch.dtype) -> None:
    decoder = make_decoder(layers).to(dtype)
    batch, length = 3, 10
    fixed = cost.state_bytes(decoder.config, dtype.itemsize)
    growing = cost.kv_bytes_per_token(decoder.config, dtype.itemsize)
    assert decoder.init_state(batch, length).nbytes == batch * (fixed + length * growing)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3.2-1b", 32 * KIB),
        ("llama-3.2-3b", 112 * KIB),
        ("hybrid-1b", 8 * KIB),
        ("hybrid-3b", 24 * KIB),
        ("llamba-1b", 0),
    ],
)
def test_keys_and_values_of_a_token(name: str, expected: int) -> None:
    assert cost.kv_bytes_per_token(geometry(name), dtype_bytes=2) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3.2-1b", 0),
        ("llamba-1b", 8 * MIB),
        ("llamba-4b", 21 * MIB),
        ("hybrid-1b", 1.5 * MIB),
    ],
)
def test_recurrent_state_of_a_row(name: str, expected: float) -> None:
    assert cost.recurrent_bytes(geometry(name)) == expected


def test_llamba_state_is_256_tokens_of_its_teacher() -> None:
    teacher = cost.kv_bytes_per_token(geometry("llama-3.2-1b"), dtype_bytes=2)
    assert cost.recurrent_bytes(geometry("llamba-1b")) == 256 * teacher


# ------------------------------------------------------------------ floating-point operations
#
# PyTorch's counter sees matrix products in decoders: mm is every linear layer, bmm what mixes
# tokens. What the plain code does beyond what is counted is said below: whole squares for causal
# attention, and states carried between chunks by a matrix. What the counter does not see, the
# elementwise arithmetic of recurrences and convolutions, is counted on the plain operators.

BATCH = 2


class Products:
    """FLOPs of matrix products, per token."""

    mm = 0.0
    bmm = 0.0


@contextmanager
def products(tokens: int) -> Iterator[Products]:
    seen = Products()
    # The fused attention of CPUs is not in the counter's table.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        yield seen
    total = counter.get_flop_counts()["Global"]
    assert set(total) <= {torch.ops.aten.mm, torch.ops.aten.bmm}
    seen.mm = total.get(torch.ops.aten.mm, 0) / tokens
    seen.bmm = total.get(torch.ops.aten.bmm, 0) / tokens


def ids(length: int) -> torch.Tensor:
    return torch.zeros(BATCH, length, dtype=torch.long)


def attention(config: DecoderConfig, seen: float) -> float:
    """Scores and values of all attention layers, for a token that sees `seen`."""
    return len(config.attention_layers) * 4 * config.heads * config.head_dim * seen


def linear_states(config: DecoderConfig) -> int:
    """Numbers in the recurrent states of a row, all layers together."""
    return cost.recurrent_bytes(config) // 4


@pytest.mark.parametrize("layers", LAYERS)
def test_flops_of_decode(make_decoder: MakeDecoder, layers: str) -> None:
    decoder, context = make_decoder(layers), 7
    state = decoder.init_state(BATCH, context)
    decoder(ids(context - 1), state)
    with products(BATCH) as seen:
        decoder(ids(1), state)
    config, flops = decoder.config, cost.decode_flops(decoder.config, context)
    assert seen.mm == flops.projections + flops.mlp + flops.head
    # Of the recurrence only the states' product with C can be one of matrices.
    recurrence = flops.mixing - attention(config, context)
    assert seen.bmm - attention(config, context) in (0, 2 * linear_states(config))
    assert recurrence == (6 if "s" in layers else 5) * linear_states(config)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels write their products into buffers, where nothing counts them."""
    only_torch(monkeypatch)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("layers", LAYERS)
def test_flops_of_prefill(make_decoder: MakeDecoder, layers: str) -> None:
    decoder, length = make_decoder(layers), 12
    with products(BATCH * length) as seen:
        decoder(ids(length))
    config, flops = decoder.config, cost.prefill_flops(decoder.config, length)
    assert seen.mm == flops.projections + flops.mlp + flops.head

    # The code's attention computes all pairs of tokens; the causal ones are counted.
    causal = sum(attention(config, t) for t in range(1, length + 1)) / length
    seen_linear = seen.bmm - attention(config, length)
    linear = flops.mixing - causal
    if config.mixer is None:
        assert (seen_linear, linear) == (0, 0)
    elif isinstance(config.mixer, Mamba1Config):
        assert linear == 6 * linear_states(config)  # elementwise
    else:
        chunk = config.mixer.chunk_size
        by_matrix = 2 * linear_states(config) * (length // chunk + 1) ** 2 / length
        by_recurrence = 2 * linear_states(config) / chunk
        assert seen_linear - by_matrix == pytest.approx(linear - by_recurrence)


class Arithmetic(TorchDispatchMode):
    """Counts products and sums, of matrices or not; exponentials and copies are free."""

    flops = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        match func.overloadpacket:
            case aten.mul | aten.add:
                self.flops += out.numel()
            case aten.sum:
                self.flops += args[0].numel()
            case aten.addcmul:
                self.flops += 2 * out.numel()
            case aten.bmm:
                self.flops += 2 * out.numel() * args[0].shape[-1]
        return out


def test_flops_of_the_mamba2_recurrence() -> None:
    heads, channels, size = 3, 8, 16
    vector = torch.ones(1, heads, size)
    with Arithmetic() as seen:
        ssd.step(
            torch.ones(1, heads, channels),
            torch.zeros(1, heads),
            vector,
            vector,
            torch.ones(1, heads, channels, size),
        )
    assert seen.flops == 5 * heads * channels * size


def test_flops_of_the_mamba1_recurrence() -> None:
    heads, size = 3, 16
    vector, state = torch.ones(1, heads, size), torch.ones(1, heads, size, size)
    with Arithmetic() as seen:
        scan.step(vector, vector, state[0], vector, vector, state)
    inputs = heads * size  # dt * x, once for all states of a channel
    assert seen.flops == 6 * heads * size * size + inputs


def test_flops_of_the_chunked_form() -> None:
    """All the arithmetic of the plain code, decays too, with heads of a published size."""
    heads, size, chunk, length = 2, 64, 64, 128
    mixer = Mamba2Config(heads, size, state_size=size, groups=heads, chunk_size=chunk)
    config = DecoderConfig(8, 8, 8, (LINEAR,), heads=1, kv_heads=1, head_dim=8, mixer=mixer)
    vector = torch.ones(1, length, heads, size)
    with Arithmetic() as seen:
        ssd.scan_chunked(
            vector,
            torch.zeros(1, length, heads),
            vector,
            vector,
            torch.ones(1, heads, size, size),
            chunk=chunk,
        )
    counted = length * cost.prefill_flops(config, length).mixing
    assert counted == pytest.approx(seen.flops, rel=0.03)


def test_flops_of_one_convolution_step() -> None:
    """A product and a sum for each weight, and the bias, which is not counted."""
    channels, taps = 5, 4
    with Arithmetic() as seen:
        conv.step(
            torch.ones(1, channels),
            torch.ones(channels, taps),
            torch.ones(channels),
            torch.ones(1, taps - 1, channels),
        )
    assert seen.flops == 2 * channels * taps + channels


@pytest.mark.parametrize("layers", LAYERS)
def test_flops_of_convolutions(make_decoder: MakeDecoder, layers: str) -> None:
    """A product and a sum for each weight, in every layer that has one."""
    decoder = make_decoder(layers)
    weights = sum(
        decoder.blocks[i].mamba.conv1d.weight.numel() for i in decoder.config.linear_layers
    )
    assert cost.decode_flops(decoder.config, 5).convolution == 2 * weights
    assert cost.prefill_flops(decoder.config, 5).convolution == 2 * weights


@pytest.mark.usefixtures("counted")
def test_backward_costs_twice_the_forward(make_decoder: MakeDecoder) -> None:
    """Of a pure student, all of whose products are counted, less what states are carried by."""
    decoder, length = make_decoder("m").requires_grad_(True), 12
    with products(BATCH * length) as forward:
        decoder(ids(length))
    with products(BATCH * length) as both:
        decoder(ids(length)).sum().backward()
    config = decoder.config
    flops = cost.prefill_flops(config, length)
    assert both.mm == 3 * forward.mm
    assert cost.train_flops(config, length) == 3 * flops.total
    # The first chunk's starting state is a constant, so its gradient is not taken.
    assert both.bmm == pytest.approx(3 * forward.bmm, rel=0.05)


def test_parts_add_up(make_decoder: MakeDecoder) -> None:
    flops = cost.decode_flops(make_decoder("am").config, 3)
    parts = flops.projections, flops.convolution, flops.mixing, flops.mlp, flops.head
    assert flops.total == sum(parts)


def test_flops_are_near_two_for_each_parameter() -> None:
    """The usual estimate (arXiv 2001.08361) holds at short context, and attention outgrows it."""
    teacher = geometry("llama-3.2-1b")
    estimate = 2 * cost.parameters(teacher).total
    assert cost.decode_flops(teacher, 1).total == pytest.approx(estimate, rel=1e-3)
    assert cost.decode_flops(teacher, 16_384).total > 1.8 * estimate
    student = geometry("llamba-1b")
    estimate = 2 * cost.parameters(student).total
    assert cost.decode_flops(student, 16_384).total == pytest.approx(estimate, rel=5e-3)
    assert cost.prefill_flops(student, 16_384).total == pytest.approx(estimate, rel=2e-2)


# ------------------------------------------------------------------ bytes moved in decode

MODELS = ["llama-3.2-1b", "llamba-1b", "hybrid-1b", "llama-3.2-3b", "llamba-4b", "hybrid-3b"]

# Thousand tokens per second at context 1024, and the speed-up over the teacher.
LIMITS = {
    64: [(46, 1.0), (54, 1.2), (63, 1.4), (15, 1.0), (21, 1.4), (23, 1.5)],
    256: [(75, 1.0), (115, 1.5), (146, 1.9), (23, 1.0), (45, 1.9), (54, 2.3)],
    1024: [(90, 1.0), (161, 1.8), (218, 2.4), (27, 1.0), (64, 2.4), (80, 3.0)],
}


def limit(name: str, batch: int, context: int) -> float:
    return cost.decode_limit(geometry(name), batch, context, H100)


def speed_up(student: str, teacher: str, batch: int, context: int) -> float:
    return limit(student, batch, context) / limit(teacher, batch, context)


@pytest.mark.parametrize("batch", LIMITS)
def test_limits_on_an_h100(batch: int) -> None:
    found = [
        (round(limit(name, batch, 1024) / 1000), round(speed_up(name, teacher, batch, 1024), 1))
        for name, teacher in zip(MODELS, ["llama-3.2-1b"] * 3 + ["llama-3.2-3b"] * 3, strict=True)
    ]
    assert found == LIMITS[batch]


def test_long_context_favours_students() -> None:
    assert round(speed_up("llamba-1b", "llama-3.2-1b", 256, 4096), 1) == 5.0
    assert round(speed_up("hybrid-1b", "llama-3.2-1b", 256, 4096), 1) == 3.0


def test_what_fits_an_h100() -> None:
    fits = {name: cost.largest_batch(geometry(name), 1024, 80e9) for name in MODELS}
    assert [name for name, batch in fits.items() if batch < 1024] == ["llama-3.2-3b"]


def test_long_context_leaves_room_for_few_rows_of_a_teacher() -> None:
    # 64 GiB for weights and rows: four fifths of an 80 GiB card.
    assert cost.largest_batch(geometry("llama-3.2-1b"), 16_384, 64 * GIB) == 123
    assert cost.largest_batch(geometry("llamba-1b"), 16_384, 64 * GIB) > 5000


def test_largest_batch_is_the_largest(make_decoder: MakeDecoder) -> None:
    config = make_decoder("am").config
    weights = 4 * cost.parameters(config).total
    row = cost.state_bytes(config, 4) + 9 * cost.kv_bytes_per_token(config, 4) + 61 * (4 + 4)
    for rows in (0, 1, 5):
        assert cost.largest_batch(config, 9, weights + rows * row, 4) == rows
        assert cost.largest_batch(config, 9, weights + rows * row - 1, 4) == max(0, rows - 1)


def test_bytes_of_a_step(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("am")
    config, batch, context = decoder.config, 3, 9
    step = cost.decode_bytes(config, batch, context, dtype_bytes=4)
    cached, recurrent = decoder.init_state(batch, context).layers
    read = count(decoder) - count(decoder.model.embed_tokens)
    assert step.weights == 4 * read
    assert step.state == 2 * recurrent.tensors()[0].nbytes  # the other is of the convolution
    assert step.kv == sum(tensor.nbytes for tensor in cached.tensors())
    assert step.logits == batch * config.vocab_size * (4 + 2 * 4)
    assert step.total == step.weights + step.state + step.kv + step.logits
    assert step.per_token == pytest.approx(step.total / batch)


def test_tied_embedding_is_read_as_the_head(make_decoder: MakeDecoder) -> None:
    tied, untied = make_decoder("a", tie_embeddings=True).config, make_decoder("a").config
    assert cost.decode_bytes(tied, 1, 1) == cost.decode_bytes(untied, 1, 1)


def test_limit_is_bandwidth_over_bytes(make_decoder: MakeDecoder) -> None:
    config = make_decoder("am").config
    step = cost.decode_bytes(config, 8, 100)
    assert cost.decode_limit(config, 8, 100, 1e9) == pytest.approx(8 * 1e9 / step.total)


def test_bytes_of_a_step_with_a_smaller_cache(make_decoder: MakeDecoder) -> None:
    config, usual = make_decoder("am").config, cost.CacheBytes(4)
    step = cost.decode_bytes(config, 3, 9, 4, usual)
    assert step == cost.decode_bytes(config, 3, 9, 4)
    half = cost.decode_bytes(config, 3, 9, 4, cost.CacheBytes(kv=2, ssm=2))
    assert (2 * half.kv, 2 * half.state) == (step.kv, step.state)
    assert (half.weights, half.logits) == (step.weights, step.logits)


def test_states_that_are_written_rarely(make_decoder: MakeDecoder) -> None:
    config = make_decoder("am").config
    step = cost.decode_bytes(config, 3, 9, 4, cost.CacheBytes(4, 4, write_every=4))
    states = cost.recurrent_bytes(config)
    token = (64 + 2 * 8) * 4 + 2 * 4 * 4  # x, and B of each group; decay and scale of each head
    # states are read and in one step of four written; 0, 1, 2 or 3 inputs are read, one is written
    assert step.state == 3 * (states * 5 / 4 + token * (1.5 + 1))
    assert cost.state_bytes(config, 4, cost.CacheBytes(4, 4, 4)) == (
        cost.state_bytes(config, 4) + 4 * token
    )


def test_mamba1_writes_its_states_in_every_step(make_decoder: MakeDecoder) -> None:
    config = make_decoder("as").config
    rarely = cost.CacheBytes(4, 4, write_every=4)
    assert cost.state_bytes(config, 4, rarely) == cost.state_bytes(config, 4)
    assert cost.decode_bytes(config, 3, 9, 4, rarely) == cost.decode_bytes(config, 3, 9, 4)
