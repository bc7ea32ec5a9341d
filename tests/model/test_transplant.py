"""From teacher to student: what is copied, what is repeated, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from retort.model.attention import Attention
from retort.model.config import (
    ATTENTION,
    LINEAR,
    DiscreteMamba2Config,
    LayerType,
    Mamba1Config,
    Mamba2Config,
)
from retort.model.context import Context
from retort.model.decoder import Block, Decoder, StateSpace
from retort.model.mamba1 import Mamba1
from retort.model.mamba2 import DiscreteMamba2, Mamba2
from retort.model.transplant import (
    as_paper,
    every,
    keep_attention,
    mixer_config,
    replaced_block,
    transplant,
)

MakeDecoder = Callable[..., Decoder]
M = TypeVar("M", Mamba2, DiscreteMamba2, Mamba1)

KINDS = pytest.mark.parametrize("kind", ["mamba2", "discrete_mamba2", "mamba1"])
# Llamba-4B made from Llama 3.2 3B, in miniature: 32 heads of 96 from 24 of 128, states of 64.
LLAMBA: dict[str, Any] = {"heads": 8, "head_dim": 6, "state_size": 4}


def mixers(student: Decoder, teacher: Decoder, layer: int) -> tuple[Mamba2, Attention]:
    return mixer_of(student, Mamba2, layer), attention_of(teacher, layer)


def mixer_of(student: Decoder, kind: type[M], layer: int = 0) -> M:
    mixer = student.blocks[layer].mixer
    assert isinstance(mixer, kind)
    return mixer


def attention_of(teacher: Decoder, layer: int = 0) -> Attention:
    mixer = teacher.blocks[layer].mixer
    assert isinstance(mixer, Attention)
    return mixer


def input_of(decoder: Decoder, length: int = 7) -> tuple[Tensor, Context]:
    """An input of a mixer whose first channel is always 1."""
    u_BTD = torch.randn(2, length, decoder.config.hidden_size)
    u_BTD[..., 0] = 1
    return u_BTD, decoder.context(torch.zeros(2, length, dtype=torch.long), None, None)


def convolved(mixer: StateSpace, u_BTD: Tensor, context: Context) -> Tensor:
    """What comes out of the convolution."""
    seen: list[Tensor] = []
    handle = mixer.conv1d.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    mixer(u_BTD, context)
    handle.remove()
    return seen[0]


def queries_keys_values(attention: Attention, u_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without rotary positions, for every query head: (B, T, H, head_dim)."""
    times = attention.heads // attention.kv_heads
    q, k, v = (
        projection(u_BTD).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return q, *(torch.stack([y] * times, dim=3).flatten(2, 3) for y in (k, v))


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


@pytest.mark.parametrize("kind", ["mamba2", "discrete_mamba2"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("state_size", [None, 8, 13])
def test_mixers_start_from_attention(
    make_decoder: MakeDecoder, kind: str, kv_heads: int, state_size: int | None
) -> None:
    """Rows of in_proj are z | x | B | C | dt, or x | B | C | z | a: x from v and B from k, each
    repeated over the query heads that read it, and C from q; states beyond head_dim start fresh.
    """
    teacher = make_decoder("a", kv_heads=kv_heads)
    student = transplant(
        teacher, [LINEAR], kind, state_size=state_size, conv_width=3, chunk_size=16
    )
    mixer, attention = student.blocks[0].mixer, attention_of(teacher)
    assert isinstance(mixer, Mamba2 if kind == "mamba2" else DiscreteMamba2)
    states = state_size or 8
    assert (mixer.config.heads, mixer.config.head_dim, mixer.config.groups) == (4, 8, 4)
    assert mixer.config.state_size == states
    assert (mixer.config.conv_width, mixer.config.chunk_size) == (3, 16)
    sizes = [32, 4 * states, 4 * states]
    if kind == "mamba2":
        _, x, b, c, last = mixer.in_proj.weight.split([32, *sizes, 4])
    else:
        x, b, c, _, last = mixer.in_proj.weight.split([*sizes, 32, 4])
    assert last.shape == (4, 32)
    for head in range(4):
        source = head * kv_heads // 4  # the key/value head that this query head reads
        assert torch.equal(rows(x, head, 8), rows(attention.v_proj.weight, source, 8))
        assert torch.equal(rows(b, head, states)[:8], rows(attention.k_proj.weight, source, 8))
        assert torch.equal(rows(c, head, states)[:8], rows(attention.q_proj.weight, head, 8))
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
    assert mixer.in_proj.weight.isfinite().all()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_mamba1_starts_from_attention(make_decoder: MakeDecoder, kv_heads: int) -> None:
    """Rows of in_proj are z | x | B | C | dt; x and B stay shared among the query heads."""
    teacher = make_decoder("a", kv_heads=kv_heads)
    mixer = mixer_of(transplant(teacher, [LINEAR], "mamba1", state_size=4), Mamba1)
    attention, shared = attention_of(teacher), 8 * kv_heads
    assert mixer.config == Mamba1Config(
        heads=4, kv_heads=kv_heads, head_dim=8, dt_rank=2, state_size=4
    )
    _, x, b, c, low = mixer.in_proj.weight.split([32, shared, shared, 32, 2])
    assert low.shape == (2, 32)
    assert torch.equal(x, attention.v_proj.weight)
    assert torch.equal(b, attention.k_proj.weight)
    assert torch.equal(c, attention.q_proj.weight)
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 5).expand(32, 4))
    assert torch.equal(mixer.D, torch.ones(32))
    dt = softplus(mixer.dt_proj.bias)
    assert 9e-4 < dt.min() < 1e-2 < dt.max() < 0.11


@KINDS
@pytest.mark.parametrize("conv_width", [2, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_the_convolution_starts_with_what_attention_projects(
    make_decoder: MakeDecoder, kind: str, conv_width: int, biased: bool
) -> None:
    """It passes x, B and C on and adds the attention's biases, which in_proj has none of. Mamba-1
    convolves x alone, so biases of queries and keys are lost there.
    """
    teacher = make_decoder("a", qkv_bias=biased)
    student = transplant(teacher, [LINEAR], kind, conv_width=conv_width)
    u_BTD, context = input_of(teacher)
    mixer = student.blocks[0].mixer
    assert not isinstance(mixer, Attention)
    assert mixer.conv1d.weight.shape[-1] == conv_width
    q, k, v = queries_keys_values(attention_of(teacher), u_BTD)
    wanted = torch.cat([y.flatten(2) for y in ([v] if kind == "mamba1" else [v, k, q])], dim=-1)
    if kind != "discrete_mamba2":
        wanted = silu(wanted)
    torch.testing.assert_close(convolved(mixer, u_BTD, context), wanted)


def test_biases_leave_states_beyond_head_dim_alone(make_decoder: MakeDecoder) -> None:
    teacher = make_decoder("a", qkv_bias=True)
    student = transplant(teacher, [LINEAR], "discrete_mamba2", state_size=11)
    bias = mixer_of(student, DiscreteMamba2).conv1d.bias
    for part in bias[32:].split(44):
        found = part.unflatten(0, (4, 11))
        assert found[:, :8].all()
        assert not found[:, 8:].any()


def test_without_decay_a_discrete_mixer_is_linear_attention(make_decoder: MakeDecoder) -> None:
    """M[t, s] = q_t . k_s, and D on the diagonal; the gate is open."""
    teacher = make_decoder("a", qkv_bias=True)
    student = transplant(teacher, [LINEAR], "discrete_mamba2").requires_grad_(False)
    mixer, attention = mixer_of(student, DiscreteMamba2), attention_of(teacher)
    mixer.in_proj.weight[-4:] = 0
    mixer.in_proj.weight[-4:, 0] = -1e4  # the input's first channel is 1
    u_BTD, context = input_of(teacher)
    q, k, v = queries_keys_values(attention, u_BTD)
    wanted_BHTS = torch.einsum("bthn,bshn->bhts", q, k).tril() + torch.eye(7)
    torch.testing.assert_close(mixer.mixing_matrix(u_BTD, context), wanted_BHTS)
    y_BTE = torch.einsum("bhts,bshp->bthp", wanted_BHTS, v).flatten(2)
    torch.testing.assert_close(mixer(u_BTD, context), attention.o_proj(y_BTE), rtol=1e-4, atol=1e-4)


def test_without_decay_a_stock_mixer_is_linear_attention(make_decoder: MakeDecoder) -> None:
    """With activations on queries and keys, and a weight dt for every key."""
    teacher = make_decoder("a", qkv_bias=True)
    mixer = mixer_of(transplant(teacher, [LINEAR]).requires_grad_(False), Mamba2)
    mixer.A_log.fill_(-100)
    mixer.in_proj.weight[-4:] = 0
    mixer.dt_bias.copy_(torch.arange(4))
    u_BTD, context = input_of(teacher)
    q, k, _ = queries_keys_values(attention_of(teacher), u_BTD)
    scores_BHTS = torch.einsum("bthn,bshn->bhts", silu(q), silu(k)).tril()
    wanted_BHTS = softplus(torch.arange(4.0))[:, None, None] * scores_BHTS + torch.eye(7)
    torch.testing.assert_close(mixer.mixing_matrix(u_BTD, context), wanted_BHTS)


def test_decays_of_stock_mixers_start_slow(make_decoder: MakeDecoder) -> None:
    """A = -U(1/16, 1), a sixteenth of what a mixer without a teacher starts from."""
    teacher = make_decoder("a", heads=64, kv_heads=1, head_dim=2)
    rate = mixer_of(transplant(teacher, [LINEAR]), Mamba2).A_log.exp()
    assert 1 / 16 <= rate.min() < 0.2 < 0.9 < rate.max() <= 1.001


# ---------------------------------------------------------------- a start as the identity


@pytest.mark.parametrize("settings", [{}, LLAMBA], ids=["as-attention", "llamba"])
def test_a_start_as_the_identity(make_decoder: MakeDecoder, settings: dict[str, Any]) -> None:
    """A gate of 1 and a convolution that passes x, B and C on; projections are random."""
    teacher = make_decoder("a", heads=6, kv_heads=2, qkv_bias=True)
    student = transplant(teacher, [LINEAR], "discrete_mamba2", start="identity", **settings)
    mixer = mixer_of(student, DiscreteMamba2)
    geometry = settings or {"heads": 6, "head_dim": 8, "state_size": 8}
    assert mixer.config == DiscreteMamba2Config(**geometry, groups=geometry["heads"])
    u_BTD, context = input_of(teacher)
    inner = geometry["heads"] * geometry["head_dim"]
    assert mixer.out_proj.weight.shape == (32, inner)
    projected = 100 * u_BTD @ mixer.in_proj.weight.T
    xbc, z, a = projected.split([mixer.config.conv_channels, inner, geometry["heads"]], dim=-1)
    gate = silu(z + mixer.z_bias)
    torch.testing.assert_close(gate, torch.ones_like(gate), rtol=0, atol=1e-6)
    torch.testing.assert_close(convolved(mixer, 100 * u_BTD, context), xbc)
    assert a.any()
    assert torch.equal(mixer.D, torch.ones(geometry["heads"]))
    assert not torch.equal(mixer.rows()[0][:8], attention_of(teacher).v_proj.weight[:8])
    ids_BT = torch.randint(61, (2, 7))
    assert student(ids_BT).isfinite().all()


@pytest.mark.parametrize("kind", ["mamba2", "mamba1"])
def test_only_discrete_mixers_start_as_the_identity(make_decoder: MakeDecoder, kind: str) -> None:
    message = f"start identity: {kind} cannot pass its input on unchanged .* use discrete_mamba2"
    with pytest.raises(ValueError, match=message):
        transplant(make_decoder("a"), [LINEAR], kind, start="identity")


@pytest.mark.parametrize("kind", ["mamba2", "discrete_mamba2"])
@pytest.mark.parametrize("setting", [{"heads": 8}, {"head_dim": 6}, {"groups": 2}], ids=str)
def test_a_start_from_attention_keeps_its_heads(
    make_decoder: MakeDecoder, kind: str, setting: dict[str, int]
) -> None:
    message = "a start from the attention needs its 4 heads of 8 and a group each"
    with pytest.raises(ValueError, match=message):
        transplant(make_decoder("a"), [LINEAR], kind, **setting)


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


# ---------------------------------------------------------------- a few layers at a time


@KINDS
def test_a_hybrid_may_lose_more_layers(make_decoder: MakeDecoder, kind: str) -> None:
    """Progressive replacement: mixers of an earlier pass, trained since, stay byte for byte."""
    half = transplant(make_decoder("aaa"), [LINEAR, ATTENTION, ATTENTION], kind)
    for parameter in half.requires_grad_(False).parameters():
        parameter.add_(torch.randn_like(parameter))
    student = transplant(half, [LINEAR, LINEAR, ATTENTION], kind, chunk_size=32)
    assert student.config == replace(half.config, layer_types=(LINEAR, LINEAR, ATTENTION))
    given, wanted = student.state_dict(), half.state_dict()
    new = {name for name in given if name.startswith("model.layers.1.mamba.")}
    assert given.keys() - new == {n for n in wanted if "layers.1.self_attn." not in n}
    assert all(torch.equal(given[name], wanted[name]) for name in given.keys() - new)
    mixer, attention = student.blocks[1].mixer, attention_of(half, 1)
    assert not isinstance(mixer, Attention)
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))


def test_a_hybrid_with_a_start_as_the_identity_may_lose_more(make_decoder: MakeDecoder) -> None:
    settings = {"start": "identity", **LLAMBA}
    half = transplant(make_decoder("aa"), [LINEAR, ATTENTION], "discrete_mamba2", **settings)
    student = transplant(half, [LINEAR, LINEAR], "discrete_mamba2", **settings)
    given, wanted = (decoder.blocks[0].state_dict() for decoder in (student, half))
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)


def test_quirks_of_a_released_hybrid_stay(make_decoder: MakeDecoder) -> None:
    """Nobody asks for them: they are read with the weights that need them."""
    quirky = Mamba1Config(
        heads=4, kv_heads=2, head_dim=8, dt_rank=2, state_size=16, released_quirks=True
    )
    student = transplant(make_decoder("sa", mixer=quirky), [LINEAR, LINEAR], "mamba1")
    assert student.config.mixer == quirky


def test_rates_kept_in_float32_stay_so(make_decoder: MakeDecoder) -> None:
    """As a decoder in bfloat16 has them when it comes from a folder in float32."""
    half = transplant(make_decoder("aa"), [LINEAR, ATTENTION]).to(torch.bfloat16)
    rates = torch.rand(4)
    mixer_of(half, Mamba2).A_log.data = rates
    student = transplant(half, [LINEAR, LINEAR])
    assert torch.equal(mixer_of(student, Mamba2).A_log, rates)
    assert student.blocks[1].mixer.out_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mamba2", {"state_size": 16}),
        ("mamba2", {"conv_width": 2}),
        ("discrete_mamba2", {}),
        ("mamba1", {}),
    ],
)
def test_a_hybrid_with_other_mixers_is_refused(
    make_decoder: MakeDecoder, kind: str, settings: dict[str, Any]
) -> None:
    half = transplant(make_decoder("aa"), [LINEAR, ATTENTION])
    with pytest.raises(ValueError, match=r"linear layers have other mixers .* state_size"):
        transplant(half, [LINEAR, LINEAR], kind, **settings)


# ---------------------------------------------------------------- one block


@KINDS
def test_a_replaced_block_shares_all_but_its_mixer(make_decoder: MakeDecoder, kind: str) -> None:
    teacher = make_decoder("aa")
    before = teacher.state_dict()
    config = mixer_config(teacher.config, kind)
    new, old = replaced_block(teacher, 1, config, "attention"), teacher.blocks[1]
    assert isinstance(new, Block)
    assert new.layer_type == LINEAR
    for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
        assert getattr(new, name) is getattr(old, name)
    assert teacher.blocks[1] is old
    assert old.layer_type == ATTENTION
    assert before.keys() == teacher.state_dict().keys()
    started = transplant(teacher, [ATTENTION, LINEAR], kind).blocks[1].mixer
    mixer = new.mixer
    assert not isinstance(mixer, Attention)
    assert not isinstance(started, Attention)
    for ours, theirs in zip(mixer.rows(), started.rows(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(mixer.out_proj.weight, started.out_proj.weight)


def test_a_replaced_block_that_cannot_be_is_refused(make_decoder: MakeDecoder) -> None:
    teacher = make_decoder("a")
    stock = Mamba2Config(heads=4, head_dim=8, state_size=4, groups=4)
    with pytest.raises(ValueError, match="state_size 4 cannot hold"):
        replaced_block(teacher, 0, stock, "attention")
    with pytest.raises(ValueError, match="start identity: mamba2"):
        replaced_block(teacher, 0, stock, "identity")


# ---------------------------------------------------------------- precision, mistakes, layers


@KINDS
def test_precision_is_the_teachers(make_decoder: MakeDecoder, kind: str) -> None:
    student = transplant(make_decoder("a").to(torch.bfloat16), [LINEAR], kind)
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())


def test_mistakes(make_decoder: MakeDecoder) -> None:
    teacher = make_decoder("aa")
    with pytest.raises(ValueError, match="3 entries for a teacher of 2 layers"):
        transplant(teacher, [LINEAR] * 3)
    with pytest.raises(ValueError, match="'rwkv': choose mamba2, discrete_mamba2 or mamba1"):
        transplant(teacher, [LINEAR] * 2, mixer="rwkv")
    with pytest.raises(ValueError, match="start 'zero': choose attention or identity"):
        transplant(teacher, [LINEAR] * 2, start="zero")
    with pytest.raises(ValueError, match="state_size 7 cannot hold the teacher's keys of 8"):
        transplant(teacher, [LINEAR] * 2, state_size=7)
    with pytest.raises(ValueError, match="the teacher has no attention in layer 1"):
        transplant(make_decoder("am"), [ATTENTION, ATTENTION])


@pytest.mark.parametrize("setting", ["heads", "head_dim", "groups"])
def test_settings_that_mamba1_does_not_have(make_decoder: MakeDecoder, setting: str) -> None:
    with pytest.raises(ValueError, match="mamba1 takes heads, head_dim and groups from"):
        transplant(make_decoder("a"), [LINEAR], "mamba1", **{setting: 4})


def test_states_that_mamba1_cannot_have(make_decoder: MakeDecoder) -> None:
    """Its heads are as wide as its state, and x must split into them."""
    with pytest.raises(ValueError, match=r"kv_heads \* head_dim = 16 is no multiple of .* 5"):
        transplant(make_decoder("a"), [LINEAR], "mamba1", state_size=5)


def test_heads_that_do_not_divide_into_groups(make_decoder: MakeDecoder) -> None:
    with pytest.raises(ValueError, match="mixer: 8 heads do not divide into 3 groups"):
        transplant(
            make_decoder("a"), [LINEAR], "discrete_mamba2", start="identity", heads=8, groups=3
        )


def kept(layer_types: list[LayerType]) -> list[int]:
    return [i for i, name in enumerate(layer_types) if name == ATTENTION]


def test_kept_layers() -> None:
    assert keep_attention(3, [1]) == [LINEAR, ATTENTION, LINEAR]
    assert keep_attention(2, []) == [LINEAR, LINEAR]
    for outside in (3, -1):
        with pytest.raises(ValueError, match=f"no layer {outside}; layers are 0 to 2"):
            keep_attention(3, [0, outside])


@pytest.mark.parametrize(
    ("layers", "step", "wanted"),
    [(8, 4, [3, 7]), (16, 4, [3, 7, 11, 15]), (7, 3, [2, 5]), (3, 1, [0, 1, 2]), (3, 4, [])],
)
def test_every_so_many_layers(layers: int, step: int, wanted: list[int]) -> None:
    assert kept(every(layers, step)) == wanted


def test_layers_of_the_paper() -> None:
    assert kept(as_paper(16)) == [3, 7, 11, 15]
    assert kept(as_paper(28)) == [3, 8, 13, 18, 23, 27]
    assert len(as_paper(28)) == 28
    with pytest.raises(ValueError, match="hybrids of 16, 28 layers, and this teacher has 24"):
        as_paper(24)
