"""The decoder: parallel, step by step, prefilled, padded and packed are one and the same map."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retort.model.config import ATTENTION, LINEAR, DecoderConfig, Mamba2Config
from retort.model.decoder import Decoder

MakeDecoder = Callable[..., Decoder]
KINDS = ["a", "m", "am", "ma", "mam", "ama", "d", "ad", "s", "sa"]
PADDING = -1


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(61, (rows, length))


def stepwise(decoder: Decoder, ids_BT: Tensor, prefill: int) -> Tensor:
    """Logits with the first `prefill` tokens read at once and the others one by one."""
    state = decoder.init_state(len(ids_BT), ids_BT.shape[1])
    parts = [decoder(ids_BT[:, :prefill], state)] if prefill else []
    for t in range(prefill, ids_BT.shape[1]):
        parts.append(decoder(ids_BT[:, t : t + 1], state))
    return torch.cat(parts, dim=1)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-5


# ---------------------------------------------------------------- with a state


@pytest.mark.parametrize("layers", KINDS)
@pytest.mark.parametrize("prefill", [0, 1, 3, 4, 9])
def test_steps_equal_parallel(make_decoder: MakeDecoder, layers: str, prefill: int) -> None:
    decoder, ids_BT = make_decoder(layers), tokens(2, 11)
    assert_same(stepwise(decoder, ids_BT, prefill), decoder(ids_BT))


@pytest.mark.parametrize("layers", KINDS)
def test_any_split_of_the_tokens_into_calls(make_decoder: MakeDecoder, layers: str) -> None:
    decoder, ids_BT = make_decoder(layers), tokens(2, 14)
    state = decoder.init_state(2, 14)
    parts = [decoder(part, state) for part in ids_BT.split([2, 1, 5, 1, 1, 4], dim=1)]
    assert_same(torch.cat(parts, dim=1), decoder(ids_BT))


@pytest.mark.parametrize("layers", KINDS)
def test_rows_continue_from_their_own_lengths(make_decoder: MakeDecoder, layers: str) -> None:
    """A prefill padded on the right reads each row as if it were alone, and steps go on from it."""
    decoder, lengths, more = make_decoder(layers), [5, 1, 8], 4
    ids_BT = tokens(3, 8)
    state = decoder.init_state(3, 12)
    padding_BT = torch.arange(8) >= torch.tensor(lengths)[:, None]
    prefilled = decoder(ids_BT, state, torch.where(padding_BT, PADDING, 0))
    assert state.length_B.tolist() == lengths
    following = tokens(3, more)
    stepped = torch.cat([decoder(following[:, t : t + 1], state) for t in range(more)], dim=1)
    for row, length in enumerate(lengths):
        alone = torch.cat([ids_BT[row, :length], following[row]])[None]
        wanted = decoder(alone)[0]
        assert_same(prefilled[row, :length], wanted[:length])
        assert_same(stepped[row], wanted[length:])


@pytest.mark.parametrize("layers", ["a", "m", "am", "d", "ad", "s", "as"])
def test_padded_calls_may_follow_each_other(make_decoder: MakeDecoder, layers: str) -> None:
    """A second padded call starts where each row's valid tokens ended, one token long or more."""
    decoder, ids_BT = make_decoder(layers), tokens(2, 9)
    state = decoder.init_state(2, 20)
    spans = [[(0, 3), (0, 2)], [(3, 4), (2, 2)], [(4, 6), (2, 7)]]
    found: list[list[Tensor]] = [[], []]
    for span in spans:
        width = max(stop - start for start, stop in span)
        padded, document_BT = torch.zeros(2, width, dtype=torch.long), torch.full((2, width), -1)
        for row, (start, stop) in enumerate(span):
            padded[row, : stop - start] = ids_BT[row, start:stop]
            document_BT[row, : stop - start] = 0
        logits = decoder(padded, state, document_BT)
        for row, (start, stop) in enumerate(span):
            found[row].append(logits[row, : stop - start])
    for row in range(2):
        logits = torch.cat(found[row])
        assert_same(logits, decoder(ids_BT[row : row + 1, : len(logits)])[0])


def test_a_full_state_is_a_mistake(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("am")
    state = decoder.init_state(1, 4)
    decoder(tokens(1, 3), state)
    with pytest.raises(ValueError, match=r"room for 4 tokens a row, and this call needs 5"):
        decoder(tokens(1, 2), state)
    decoder(tokens(1, 1), state)  # the refused call has left the state as it was
    with pytest.raises(ValueError, match="larger max_length"):
        decoder(tokens(1, 1), state)


def test_documents_of_a_continued_row_are_a_mistake(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("am")
    with pytest.raises(ValueError, match="a row is one document, use 0 and -1"):
        decoder(tokens(1, 2), decoder.init_state(1, 4), torch.tensor([[0, 1]]))


# ---------------------------------------------------------------- packed rows


@pytest.mark.parametrize("layers", KINDS)
def test_packed_documents_equal_separate_ones(make_decoder: MakeDecoder, layers: str) -> None:
    """Of all lengths: a single token, shorter than the filter, across chunks; padding behind."""
    decoder, rows, length = make_decoder(layers), [[5, 1, 2, 4], [13]], 14
    ids_BT = tokens(2, length)
    document_BT = torch.full((2, length), PADDING)
    for row, lengths in enumerate(rows):
        numbers = torch.repeat_interleave(torch.tensor(lengths))
        document_BT[row, : len(numbers)] = numbers
    packed = decoder(ids_BT, document_BT=document_BT)
    for row, lengths in enumerate(rows):
        start = 0
        for document in ids_BT[row, : sum(lengths)].split(lengths):
            wanted = decoder(document[None])[0]
            assert_same(packed[row, start : start + len(document)], wanted)
            start += len(document)
    assert packed.isfinite().all()


@pytest.mark.parametrize("layers", ["a", "m", "d", "s"])
def test_no_gradient_crosses_documents(make_decoder: MakeDecoder, layers: str) -> None:
    decoder, ids_BT = make_decoder(layers), tokens(1, 6)
    document_BT = torch.tensor([[0, 0, 0, 1, 1, 1]])
    context = decoder.context(ids_BT, None, document_BT)
    h_BTD = decoder.model.embed_tokens(ids_BT).requires_grad_()
    mixed_BTD = decoder.blocks[0].mix(h_BTD, context)
    (gradient,) = torch.autograd.grad(mixed_BTD[0, 3:].square().sum(), h_BTD)
    assert not gradient[0, :3].any()
    assert gradient[0, 3:].any()


# ---------------------------------------------------------------- parts


def test_hidden_states_are_those_of_the_forward(make_decoder: MakeDecoder) -> None:
    decoder, ids_BT = make_decoder("ama"), tokens(2, 7)
    document_BT = torch.tensor([[0] * 4 + [1] * 3, [0] * 5 + [-1] * 2])
    states = decoder.hidden_states(ids_BT, document_BT)
    assert len(states) == 4
    torch.testing.assert_close(states[0], decoder.model.embed_tokens(ids_BT))
    context = decoder.context(ids_BT, None, document_BT)
    for i, block in enumerate(decoder.blocks):
        torch.testing.assert_close(block(states[i], context), states[i + 1])
    final = decoder.model.norm(states[-1])
    torch.testing.assert_close(final, decoder.hidden(ids_BT, document_BT=document_BT))
    torch.testing.assert_close(decoder.lm_head(final), decoder(ids_BT, document_BT=document_BT))


@pytest.mark.parametrize("layers", ["a", "m", "am", "d", "ad", "s", "as"])
def test_half_precision_follows_full(make_decoder: MakeDecoder, layers: str) -> None:
    """bfloat16 logits are near the float32 ones, in parallel and in steps."""
    decoder, ids_BT = make_decoder(layers), tokens(2, 9)
    wanted = decoder(ids_BT)
    decoder = decoder.to(torch.bfloat16)
    for logits in (decoder(ids_BT), stepwise(decoder, ids_BT, prefill=4)):
        assert logits.dtype == torch.bfloat16
        assert float((logits - wanted).abs().max() / wanted.abs().max()) < 0.05


def test_a_tied_head_is_the_embedding(make_decoder: MakeDecoder) -> None:
    tied, untied = make_decoder("a", tie_embeddings=True), make_decoder("a")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.size - tied.size == 61 * 32


@pytest.mark.parametrize(
    ("layer", "mixer"),
    [
        ("a", 2 * 32 * 32 + 2 * 32 * 16),
        ("m", 32 * (64 + 96 + 4) + 5 * 96 + 3 * 4 + 64 + 64 * 32),
        ("d", 32 * (72 + 48 + 4) + 5 * 72 + 48 + 4 + 48 * 32),
        ("s", 32 * (32 + 16 + 16 + 32 + 3) + 5 * 32 + 4 * 32 + 32 * 4 + 32 + 32 * 32),
    ],
)
def test_size_counts_every_weight(make_decoder: MakeDecoder, layer: str, mixer: int) -> None:
    """By hand, from the shapes of the mixers."""
    mlp_and_norms = 3 * 32 * 48 + 2 * 32
    assert make_decoder(layer).size == 2 * 61 * 32 + 32 + mixer + mlp_and_norms


def test_fresh_weights_follow_the_generator() -> None:
    """The same seed gives the same weights; what writes to the residual stream starts small."""
    mixer = Mamba2Config(heads=4, head_dim=16, state_size=8, groups=2)
    config = DecoderConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        layer_types=(ATTENTION, LINEAR),
        heads=4,
        kv_heads=2,
        head_dim=8,
        mixer=mixer,
    )

    def fresh() -> dict[str, Tensor]:
        torch.manual_seed(3)
        decoder = Decoder(config)
        decoder.reset_parameters()
        return decoder.state_dict()

    first, second = fresh(), fresh()
    assert all(torch.equal(first[name], second[name]) for name in first)
    reads, writes = (first[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "down"))
    assert float(reads.std() * 32**0.5) == pytest.approx(1, rel=0.1)
    assert float(writes.std() * 48**0.5) == pytest.approx(4**-0.5, rel=0.1)
