"""The attention mixer as a matrix, and who reads which key."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retort.model.attention import Attention
from retort.model.decoder import Decoder

MakeDecoder = Callable[..., Decoder]


def attention_of(decoder: Decoder) -> Attention:
    mixer = decoder.blocks[0].mixer
    assert isinstance(mixer, Attention)
    return mixer


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("document", [None, [0, 0, 0, 1, 1, 2, -1]])
def test_matrix_times_values_equals_forward(
    make_decoder: MakeDecoder, kv_heads: int, document: list[int] | None
) -> None:
    decoder = make_decoder("a", kv_heads=kv_heads)
    attention = attention_of(decoder)
    ids_BT, u_BTC = torch.zeros(2, 7, dtype=torch.long), torch.randn(2, 7, 32)
    document_BT = None if document is None else torch.tensor([document, [0] * 7])
    context = decoder.context(ids_BT, None, document_BT)
    matrix_BHTS = attention.mixing_matrix(u_BTC, context)
    y_BTHD = torch.einsum("bhts,bshd->bthd", matrix_BHTS, attention.values(u_BTC))
    torch.testing.assert_close(attention.o_proj(y_BTHD.flatten(2)), attention(u_BTC, context))


def test_matrix_is_causal_and_its_rows_sum_to_one(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("a")
    context = decoder.context(torch.zeros(1, 6, dtype=torch.long), None, None)
    matrix_BHTS = attention_of(decoder).mixing_matrix(torch.randn(1, 6, 32), context)
    assert not matrix_BHTS.triu(1).any()
    torch.testing.assert_close(matrix_BHTS.sum(-1), torch.ones(1, 4, 6))


def test_one_query_reads_as_many_do(make_decoder: MakeDecoder) -> None:
    """A single token takes a path of its own; two of the same length must agree with one."""
    decoder = make_decoder("a", kv_heads=2)
    attention, u_BTC = attention_of(decoder), torch.randn(3, 5, 32)

    def last_output(split: int) -> Tensor:
        state, model_state = attention.init_state(3, 5), decoder.init_state(3, 5)
        for part in (u_BTC[:, :split], u_BTC[:, split:]):
            ids_BT = torch.zeros(3, part.shape[1], dtype=torch.long)
            y_BTC = attention(part, decoder.context(ids_BT, model_state, None), state)
            model_state.length_B += part.shape[1]
            model_state.reach += part.shape[1]
        return y_BTC[:, -1]

    torch.testing.assert_close(last_output(split=4), last_output(split=3))
