"""From teacher to student: what is copied, what is repeated, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retort.model.attention import Attention
from retort.model.config import ATTENTION, LINEAR
from retort.model.decoder import Decoder
from retort.model.mamba2 import Mamba2
from retort.model.transplant import keep_attention, transplant

MakeDecoder = Callable[..., Decoder]


def mixers(student: Decoder, teacher: Decoder, layer: int) -> tuple[Mamba2, Attention]:
    new, old = student.blocks[layer].mixer, teacher.blocks[layer].mixer
    assert isinstance(new, Mamba2)
    assert isinstance(old, Attention)
    return new, old


def test_all_but_the_replaced_mixers_is_copied(make_decoder: MakeDecoder) -> None:
    teacher = make_decoder("aaa")
    student = transplant(teacher, [LINEAR, ATTENTION, LINEAR])
    assert student.config.layer_types == (LINEAR, ATTENTION, LINEAR)
    given, wanted = student.state_dict(), teacher.state_dict()
    shared = {name for name in given if ".mamba." not in name}
    assert shared == {
        name for name in wanted if "self_attn" not in name or name.startswith("model.layers.1.")
    }
    assert all(torch.equal(given[name], wanted[name]) for name in shared)
    assert not {t.data_ptr() for t in given.values()} & {t.data_ptr() for t in wanted.values()}


@pytest.mark.parametrize("tied", [False, True])
def test_keeping_every_layer_is_a_copy(make_decoder: MakeDecoder, tied: bool) -> None:
    teacher = make_decoder("aa", tie_embeddings=tied)
    student = transplant(teacher, [ATTENTION, ATTENTION])
    ids_BT = torch.randint(61, (2, 7))
    assert torch.equal(student(ids_BT), teacher(ids_BT))
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("state_size", [None, 8, 13])
def test_mixers_start_from_attention(
    make_decoder: MakeDecoder, kv_heads: int, state_size: int | None
) -> None:
    """Rows of in_proj are z | x | B | C | dt: x from v and B from k, each repeated over the query
    heads that read it, and C from q; states beyond head_dim start fresh.
    """
    teacher = make_decoder("a", kv_heads=kv_heads)
    student = transplant(teacher, [LINEAR], state_size=state_size, conv_width=3, chunk_size=16)
    mixer, attention = mixers(student, teacher, 0)
    states = state_size or 8
    assert mixer.config.state_size == states
    assert (mixer.config.conv_width, mixer.config.chunk_size) == (3, 16)
    _, x, b, c, dt = mixer.in_proj.weight.split([32, 32, 4 * states, 4 * states, 4])
    assert dt.shape == (4, 32)
    for head in range(4):
        source = head * kv_heads // 4  # the key/value head that this query head reads
        assert torch.equal(rows(x, head, 8), rows(attention.v_proj.weight, source, 8))
        assert torch.equal(rows(b, head, states)[:8], rows(attention.k_proj.weight, source, 8))
        assert torch.equal(rows(c, head, states)[:8], rows(attention.q_proj.weight, head, 8))
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
    assert mixer.in_proj.weight.isfinite().all()


def rows(weight: Tensor, head: int, size: int) -> Tensor:
    return weight[head * size : (head + 1) * size]


def test_only_fresh_parts_follow_the_generator(make_decoder: MakeDecoder) -> None:
    teacher = make_decoder("a")

    def in_proj(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        mixer, _ = mixers(transplant(teacher, [LINEAR]), teacher, 0)
        return mixer.in_proj.weight.split([32, 96, 4])

    first, again, other = in_proj(0), in_proj(0), in_proj(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    same = [torch.equal(a, b) for a, b in zip(first, other, strict=True)]
    assert same == [False, True, False]  # gate and dt are drawn, x, B and C are not


def test_the_teacher_is_left_alone(make_decoder: MakeDecoder) -> None:
    teacher = make_decoder("aa")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    transplant(teacher, [LINEAR, LINEAR])
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_hybrid_may_lose_more_layers(make_decoder: MakeDecoder) -> None:
    """Progressive replacement: mixers of an earlier pass are taken over as they are."""
    teacher = make_decoder("aa")
    half = transplant(teacher, [LINEAR, ATTENTION])
    student = transplant(half, [LINEAR, LINEAR], chunk_size=16)
    given, wanted = student.blocks[0].state_dict(), half.blocks[0].state_dict()
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)
    mixer, attention = mixers(student, half, 1)
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)


def test_precision_is_the_teachers(make_decoder: MakeDecoder) -> None:
    student = transplant(make_decoder("a").to(torch.bfloat16), [LINEAR])
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.bfloat16}


def test_mistakes(make_decoder: MakeDecoder) -> None:
    teacher = make_decoder("aa")
    with pytest.raises(ValueError, match="3 entries for a teacher of 2 layers"):
        transplant(teacher, [LINEAR] * 3)
    with pytest.raises(ValueError, match="mixer 'rwkv': only 'mamba2' is known"):
        transplant(teacher, [LINEAR] * 2, mixer="rwkv")
    with pytest.raises(ValueError, match="state_size 7 cannot hold the teacher's keys of 8"):
        transplant(teacher, [LINEAR] * 2, state_size=7)
    with pytest.raises(ValueError, match="the teacher has no attention in layer 1"):
        transplant(make_decoder("am"), [ATTENTION, ATTENTION])
    half = transplant(teacher, [LINEAR, ATTENTION])
    with pytest.raises(ValueError, match=r"linear layers have other mixers .* state_size"):
        transplant(half, [LINEAR, LINEAR], state_size=16)


def test_kept_layers() -> None:
    assert keep_attention(3, [1]) == [LINEAR, ATTENTION, LINEAR]
    assert keep_attention(2, []) == [LINEAR, LINEAR]
    for outside in (3, -1):
        with pytest.raises(ValueError, match=f"no layer {outside}; layers are 0 to 2"):
            keep_attention(3, [0, outside])
