"""Every mixer is one map: its formula in plain loops, in parallel, in any split, as a matrix.

Shapes: B rows, T tokens, D model width, E inner width, H heads, P head channels, G groups, N state.
"""

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu, softplus

from retort.model.attention import Attention
from retort.model.config import DiscreteMamba2Config, Mamba1Config, Mamba2Config
from retort.model.decoder import Decoder, Mixer
from retort.model.mamba1 import Mamba1
from retort.model.mamba2 import DiscreteMamba2, Mamba2
from retort.model.state import MambaState

MakeDecoder = Callable[..., Decoder]
Changes = dict[str, Any]
Parameters = dict[str, Tensor]

VOCABULARY, WIDTH = 61, 32
PADDING = -1
SHORT, LONG = 1, 11


# ---------------------------------------------------------------- formulas, one sequence each


def convolved(p: Parameters, x_TE: Tensor) -> Tensor:
    """The last tap meets the current input."""
    weight_EK = p["conv1d.weight"].squeeze(1)
    taps = weight_EK.shape[1]
    outputs = []
    for t in range(len(x_TE)):
        y_E = p["conv1d.bias"]
        for back in range(min(t + 1, taps)):
            y_E = y_E + weight_EK[:, taps - 1 - back] * x_TE[t - back]
        outputs.append(y_E)
    return torch.stack(outputs)


def repeated(x_TE: Tensor, width: int, times: int) -> Tensor:
    """Pieces of `width` channels, each `times` times side by side."""
    return torch.cat([piece for piece in x_TE.split(width, dim=-1) for _ in range(times)], dim=-1)


def state_space_dual(
    decay_TH: Tensor, v_THP: Tensor, b_TGN: Tensor, c_TGN: Tensor, d_H: Tensor, x_THP: Tensor
) -> Tensor:
    """S = decay S + v b^T, y = S c + D x, head by head; head h reads group h // (H / G)."""
    (length, heads), groups = decay_TH.shape, b_TGN.shape[1]
    outputs = []
    for h in range(heads):
        group = h // (heads // groups)
        state_PN = v_THP.new_zeros(v_THP.shape[2], b_TGN.shape[2])
        for t in range(length):
            state_PN = decay_TH[t, h] * state_PN + torch.outer(v_THP[t, h], b_TGN[t, group])
            outputs.append(state_PN @ c_TGN[t, group] + d_H[h] * x_THP[t, h])
    return torch.stack(outputs).unflatten(0, (heads, length)).transpose(0, 1).flatten(1)


def mamba2(p: Parameters, mixer: Mamba2, u_TD: Tensor) -> Tensor:
    c = mixer.config
    shared = c.groups * c.state_size
    projected = u_TD @ p["in_proj.weight"].T
    z_TE, xbc, dt_TH = projected.split([c.inner, c.inner + 2 * shared, c.heads], dim=-1)
    x_TE, b_TE, c_TE = silu(convolved(p, xbc)).split([c.inner, shared, shared], dim=-1)
    x_THP = x_TE.unflatten(-1, (c.heads, c.head_dim))
    b_TGN, c_TGN = (y.unflatten(-1, (c.groups, c.state_size)) for y in (b_TE, c_TE))
    dt_TH = softplus(dt_TH + p["dt_bias"])
    decay_TH = (dt_TH * -p["A_log"].exp()).exp()
    y_TE = state_space_dual(decay_TH, dt_TH[..., None] * x_THP, b_TGN, c_TGN, p["D"], x_THP)
    gated = (y_TE * silu(z_TE)).unflatten(-1, (c.groups, -1))
    normed = gated / (gated.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt()
    return (p["norm.weight"] * normed.flatten(1)) @ p["out_proj.weight"].T


def discrete_mamba2(p: Parameters, mixer: DiscreteMamba2, u_TD: Tensor) -> Tensor:
    c = mixer.config
    shared = c.groups * c.state_size
    projected = u_TD @ p["in_proj.weight"].T
    xbc, z_TE, a_TH = projected.split([c.inner + 2 * shared, c.inner, c.heads], dim=-1)
    x_TE, b_TE, c_TE = convolved(p, xbc).split([c.inner, shared, shared], dim=-1)
    x_THP = x_TE.unflatten(-1, (c.heads, c.head_dim))
    b_TGN, c_TGN = (y.unflatten(-1, (c.groups, c.state_size)) for y in (b_TE, c_TE))
    y_TE = state_space_dual((-softplus(a_TH)).exp(), x_THP, b_TGN, c_TGN, p["D"], x_THP)
    return (y_TE * silu(z_TE + p["z_bias"])) @ p["out_proj.weight"].T


def mamba1(p: Parameters, mixer: Mamba1, u_TD: Tensor) -> Tensor:
    """Every channel has states and decays of its own; N channels side by side share B and C."""
    c = mixer.config
    projected = u_TD @ p["in_proj.weight"].T
    sizes = [c.inner, c.kv_inner, c.kv_inner, c.inner, c.dt_rank]
    z_TE, x, b, c_TE, low = projected.split(sizes, dim=-1)
    width = c.state_size if c.released_quirks else c.head_dim
    x_TE, b_TE = (repeated(y, width, c.heads // c.kv_heads) for y in (x, b))
    x_TE = silu(convolved(p, x_TE))
    bias = p["dt_proj.bias"] * (2 if c.released_quirks else 1)
    dt_TE = softplus(low @ p["dt_proj.weight"].T + bias)
    rate_EN = -p["A_log"].exp()
    state_EN, outputs = torch.zeros_like(rate_EN), []
    for t in range(len(u_TD)):
        b_EN, c_EN = (
            y[t].unflatten(0, (-1, c.state_size)).repeat_interleave(c.state_size, 0)
            for y in (b_TE, c_TE)
        )
        state_EN = (dt_TE[t, :, None] * rate_EN).exp() * state_EN
        state_EN = state_EN + (dt_TE[t] * x_TE[t])[:, None] * b_EN
        outputs.append((state_EN * c_EN).sum(-1) + p["D"] * x_TE[t])
    return (torch.stack(outputs) * silu(z_TE)) @ p["out_proj.weight"].T


def attention(p: Parameters, decoder: Decoder, u_TD: Tensor) -> Tensor:
    """Rotary positions from 0 on, of channel pairs half a head apart."""
    c = decoder.config
    width, outputs = c.head_dim, []

    def projected(name: str, head: int) -> Tensor:
        rows = slice(head * width, (head + 1) * width)
        y = u_TD @ p[f"{name}_proj.weight"][rows].T
        return y + p[f"{name}_proj.bias"][rows] if c.qkv_bias else y

    def rotated(name: str, head: int) -> Tensor:
        y = projected(name, head)
        if c.qk_norm:
            rms = (y.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
            y = p[f"{name}_norm.weight"] * y / rms
        turned = torch.empty_like(y)
        for t in range(len(y)):
            for i in range(width // 2):
                angle, j = t * c.rope_theta ** (-2 * i / width), i + width // 2
                cos, sin = math.cos(angle), math.sin(angle)
                turned[t, i] = y[t, i] * cos - y[t, j] * sin
                turned[t, j] = y[t, j] * cos + y[t, i] * sin
        return turned

    for h in range(c.heads):
        source = h // (c.heads // c.kv_heads)
        q, k, v = rotated("q", h), rotated("k", source), projected("v", source)
        rows = [(k[: t + 1] @ q[t] / width**0.5).softmax(0) @ v[: t + 1] for t in range(len(q))]
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, dim=-1) @ p["o_proj.weight"].T


def formula(decoder: Decoder, p: Parameters, u_TD: Tensor) -> Tensor:
    """What the first block's mixer makes of one sequence."""
    match decoder.blocks[0].mixer:
        case Mamba2() as mixer:
            return mamba2(p, mixer, u_TD)
        case DiscreteMamba2() as mixer:
            return discrete_mamba2(p, mixer, u_TD)
        case Mamba1() as mixer:
            return mamba1(p, mixer, u_TD)
        case Attention():
            return attention(p, decoder, u_TD)


# ---------------------------------------------------------------- geometries


def mamba2_geometry(draw: st.DrawFn, kind: type[Mamba2Config | DiscreteMamba2Config]) -> Changes:
    groups = draw(st.integers(1, 3))
    mixer = kind(
        heads=groups * draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([3, 5, 8])),
        state_size=draw(st.integers(1, 7)),
        groups=groups,
        conv_width=draw(st.integers(2, 5)),
        chunk_size=draw(st.sampled_from([1, 2, 3, 4, 64])),
    )
    return {"layers": "m", "mixer": mixer}


def mamba1_geometry(draw: st.DrawFn, quirks: bool) -> Changes:
    kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([3, 6, 8]))
    divisors = [n for n in (2, 3, 4, 6) if kv_heads * head_dim % n == 0]
    mixer = Mamba1Config(
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        dt_rank=draw(st.integers(1, 4)),
        state_size=draw(st.sampled_from(divisors)),
        conv_width=draw(st.integers(2, 5)),
        chunk_size=draw(st.sampled_from([1, 2, 3, 4, 64])),
        released_quirks=quirks,
    )
    return {"layers": "s", "mixer": mixer}


def attention_geometry(draw: st.DrawFn) -> Changes:
    kv_heads = draw(st.integers(1, 3))
    return {
        "layers": "a",
        "heads": kv_heads * draw(st.integers(1, 3)),
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 6, 8])),
        "qkv_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
    }


GEOMETRIES: dict[str, st.SearchStrategy[Changes]] = {
    "mamba2": st.composite(mamba2_geometry)(Mamba2Config),
    "discrete_mamba2": st.composite(mamba2_geometry)(DiscreteMamba2Config),
    "mamba1": st.composite(mamba1_geometry)(quirks=False),
    "mamba1-released": st.composite(mamba1_geometry)(quirks=True),
    "attention": st.composite(attention_geometry)(),
}
STATE_SPACE = ["m", "d", "s"]
KINDS = pytest.mark.parametrize("kind", GEOMETRIES)


def drawn(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same few examples in every run; the fixtures of a test serve all of its examples."""
    shared = [HealthCheck.function_scoped_fixture]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        few = settings(
            derandomize=True, deadline=None, max_examples=examples, suppress_health_check=shared
        )
        return few(given(data=st.data())(test))

    return decorate


def draw_decoder(data: st.DataObject, make_decoder: MakeDecoder, kind: str) -> Decoder:
    changes = data.draw(GEOMETRIES[kind])
    torch.manual_seed(0)
    decoder = make_decoder(**changes)
    remember_well(decoder)
    return decoder


@torch.no_grad()
def remember_well(decoder: Decoder) -> None:
    """Steps of about 1 and decays of about a half: every token matters to those behind it."""
    for name, parameter in decoder.named_parameters():
        if name.endswith(("dt_bias", "dt_proj.bias", "A_log")):
            parameter.normal_(std=0.5).sub_(0.3)


def draw_split(data: st.DataObject, length: int) -> list[int]:
    """Lengths of parts that make up `length`; single tokens are as likely as all others."""
    parts: list[int] = []
    while length:
        parts.append(data.draw(st.one_of(st.just(1), st.integers(1, length)), label="part"))
        length -= parts[-1]
    return parts


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length))


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest deviation, as a part of the largest value."""
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def in_calls(decoder: Decoder, ids_BT: Tensor, calls: list[int]) -> Tensor:
    state = decoder.init_state(*ids_BT.shape)
    return torch.cat([decoder(part, state) for part in ids_BT.split(calls, dim=1)], dim=1)


# ---------------------------------------------------------------- one map


@KINDS
@drawn(examples=25)
def test_any_split_into_calls(make_decoder: MakeDecoder, kind: str, data: st.DataObject) -> None:
    decoder = draw_decoder(data, make_decoder, kind)
    calls = draw_split(data, data.draw(st.integers(SHORT, LONG), label="length"))
    ids_BT = tokens(2, sum(calls))
    wanted = decoder(ids_BT)
    assert error(in_calls(decoder, ids_BT, calls), wanted) <= 1e-5
    assert error(in_calls(decoder, ids_BT, [1] * sum(calls)), wanted) <= 1e-5


@KINDS
@drawn(examples=12)
def test_rows_of_different_lengths_equal_each_alone(
    make_decoder: MakeDecoder, kind: str, data: st.DataObject
) -> None:
    """Two calls padded on the right, in which a row may have nothing at all, and then a step."""
    decoder = draw_decoder(data, make_decoder, kind)
    ids_BT, state = tokens(3, 2 * LONG + 1), decoder.init_state(3, 2 * LONG + 1)
    read, found = [0, 0, 0], [torch.empty(0, VOCABULARY)] * 3
    for width in (LONG, LONG - 1):
        lengths = [data.draw(st.integers(0, width), label="length") for _ in range(3)]
        padded = torch.stack([ids_BT[row, start : start + width] for row, start in enumerate(read)])
        padding_BT = torch.arange(width) >= torch.tensor(lengths)[:, None]
        logits_BTV = decoder(padded, state, torch.where(padding_BT, PADDING, 0))
        for row, length in enumerate(lengths):
            found[row] = torch.cat([found[row], logits_BTV[row, :length]])
            read[row] += length
    assert state.length_B.tolist() == read
    last_BTV = decoder(torch.stack([ids_BT[row, n] for row, n in enumerate(read)])[:, None], state)
    for row, length in enumerate(read):
        wanted = decoder(ids_BT[row : row + 1, : length + 1])[0]
        assert error(torch.cat([found[row], last_BTV[row]]), wanted) <= 1e-5


@KINDS
@drawn(examples=12)
def test_packed_documents_equal_each_alone(
    make_decoder: MakeDecoder, kind: str, data: st.DataObject
) -> None:
    decoder = draw_decoder(data, make_decoder, kind)
    ids_BT, document_BT = tokens(2, LONG + 2), torch.full((2, LONG + 2), PADDING)
    rows = [draw_split(data, LONG + 2), draw_split(data, LONG)]
    for row, lengths in enumerate(rows):
        document_BT[row, : sum(lengths)] = torch.repeat_interleave(torch.tensor(lengths))
    packed = decoder(ids_BT, document_BT=document_BT)
    for row, lengths in enumerate(rows):
        for start, stop in pairwise(accumulate([0, *lengths])):
            wanted = decoder(ids_BT[row : row + 1, start:stop])[0]
            assert error(packed[row, start:stop], wanted) <= 1e-5


@KINDS
@drawn(examples=8)
def test_the_formula_and_its_gradients(
    make_decoder: MakeDecoder, kind: str, data: st.DataObject
) -> None:
    """Of every weight and of the input, for packed rows, against plain loops in float64."""
    decoder = draw_decoder(data, make_decoder, kind)
    mixer = decoder.blocks[0].mixer.requires_grad_()
    rows = [draw_split(data, LONG), [LONG]]
    document_BT = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in rows])
    context = decoder.context(tokens(2, LONG), None, document_BT)
    u_BTD, probe_BTD = torch.randn(2, LONG, WIDTH, requires_grad=True), torch.randn(2, LONG, WIDTH)
    found_BTD = mixer(u_BTD, context)
    (found_BTD * probe_BTD).sum().backward()

    exact_u_BTD = u_BTD.detach().double().requires_grad_()
    exact = {n: p.detach().double().requires_grad_() for n, p in mixer.named_parameters()}
    parts = [
        formula(decoder, exact, u_TD)
        for row, lengths in enumerate(rows)
        for u_TD in exact_u_BTD[row].split(lengths)
    ]
    wanted_BTD = torch.cat(parts).unflatten(0, (2, LONG))
    (wanted_BTD * probe_BTD).sum().backward()

    assert error(found_BTD, wanted_BTD) <= 1e-5
    gradients = {"the input": (u_BTD.grad, exact_u_BTD.grad)}
    gradients |= {name: (p.grad, exact[name].grad) for name, p in mixer.named_parameters()}
    for name, (ours, theirs) in gradients.items():
        assert ours is not None, name
        assert theirs is not None, name
        assert error(ours, theirs) <= 1e-4, name


# ---------------------------------------------------------------- as a matrix


@pytest.mark.parametrize("kind", ["mamba2", "discrete_mamba2"])
@drawn(examples=12)
def test_matrix_times_values_is_what_is_gated(
    make_decoder: MakeDecoder, kind: str, data: st.DataObject
) -> None:
    decoder = draw_decoder(data, make_decoder, kind)
    mixer = decoder.blocks[0].mixer
    assert isinstance(mixer, Mamba2 | DiscreteMamba2)
    documents = [draw_split(data, LONG) for _ in range(2)]
    document_BT = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in documents])
    document_BT[0, -1] = PADDING
    for packed in (None, document_BT):
        context, u_BTD = decoder.context(tokens(2, LONG), None, packed), torch.randn(2, LONG, WIDTH)
        matrix_BHTS, x_BTHP = mixer.mixing_matrix(u_BTD, context), mixer.values(u_BTD, context)
        assert not matrix_BHTS.triu(1).any()
        y_BTE = torch.einsum("bhts,bshp->bthp", matrix_BHTS, x_BTHP).flatten(2)
        gate_BTE = u_BTD @ gate_rows(mixer).T
        if isinstance(mixer, Mamba2):
            gated_BTE = mixer.norm(y_BTE, x_BTHP.flatten(2), 0 * mixer.D, gate_BTE)
        else:
            gated_BTE = y_BTE * silu(gate_BTE + mixer.z_bias)
        assert error(mixer.out_proj(gated_BTE), mixer(u_BTD, context)) <= 1e-5


def gate_rows(mixer: Mamba2 | DiscreteMamba2) -> Tensor:
    """z comes first in a stock mixer, and behind x, B and C in a discrete one."""
    start = 0 if isinstance(mixer, Mamba2) else mixer.config.conv_channels
    return mixer.in_proj.weight[start : start + mixer.config.inner]


def test_mamba1_has_no_matrix(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("s")
    context = decoder.context(tokens(1, 3), None, None)
    with pytest.raises(ValueError, match="mamba1 mixes the tokens of each channel in its own way"):
        decoder.blocks[0].mixing_matrix(torch.randn(1, 3, WIDTH), context)


# ---------------------------------------------------------------- the ends of the range


@torch.no_grad()
def obey_first_channel(mixer: Mixer) -> None:
    """The input's first channel becomes what dt (or a) is the softplus of, and nothing else."""
    assert not isinstance(mixer, Attention)
    rows = mixer.config.dt_rank if isinstance(mixer, Mamba1) else mixer.config.heads
    mixer.in_proj.weight[:, 0] = 0
    mixer.in_proj.weight[-rows:] = 0
    mixer.in_proj.weight[-rows:, 0] = 1
    match mixer:
        case Mamba2():
            mixer.dt_bias.zero_()
        case Mamba1():
            mixer.dt_proj.bias.zero_()
            mixer.dt_proj.weight.zero_()[:, 0] = 1


SMALL, HUGE = -100.0, 1e4  # softplus 4e-44, which float32 can just tell from 0, and 1e4


@pytest.mark.parametrize("layer", STATE_SPACE)
@pytest.mark.parametrize(
    "raw",
    [
        [SMALL] * 9,
        [HUGE] * 9,
        [SMALL, HUGE, 0, SMALL, SMALL, HUGE, HUGE, SMALL, 1],
        [-1e30, 0, 1e4, 0, 0, -1e30, -1e30, 0, 0],
    ],
    ids=["tiny", "huge", "both", "exactly-zero"],
)
@pytest.mark.parametrize("document", [None, [0, 0, 0, 0, 0, 1, 1, 2, -1]], ids=["one", "packed"])
def test_decays_of_zero_and_one(
    make_decoder: MakeDecoder, layer: str, raw: list[float], document: list[int] | None
) -> None:
    """Nothing becomes NaN: not the output, the state, or any gradient."""
    decoder = make_decoder(layer)
    mixer = decoder.blocks[0].mixer.requires_grad_()
    obey_first_channel(mixer)
    u_BTD = torch.randn(2, 9, WIDTH)
    u_BTD[:, :, 0] = torch.tensor(raw)
    u_BTD.requires_grad_()
    document_BT = None if document is None else torch.tensor([document] * 2)
    found_BTD = mixer(u_BTD, decoder.context(tokens(2, 9), None, document_BT))
    found_BTD.square().sum().backward()
    assert found_BTD.isfinite().all()
    assert u_BTD.grad is not None
    assert u_BTD.grad.isfinite().all()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if isinstance(mixer, Mamba2 | DiscreteMamba2):
        assert_finite_matrix(decoder, u_BTD.detach(), document_BT)
    exact = {name: p.detach().double() for name, p in mixer.named_parameters()}
    last = [9] if document is None else [5, 7, 8]
    for start, stop in pairwise([0, *last]):
        wanted_TD = formula(decoder, exact, u_BTD.detach()[0, start:stop].double())
        assert error(found_BTD[0, start:stop], wanted_TD) <= 1e-5
    if document is None:
        steps_BTD, state = mixed_in_steps(decoder, u_BTD.detach())
        assert error(steps_BTD, found_BTD) <= 1e-5
        assert all(tensor.isfinite().all() for tensor in state.tensors())


def assert_finite_matrix(decoder: Decoder, u_BTD: Tensor, document_BT: Tensor | None) -> None:
    """And what the objective on matrices would teach."""
    mixer = decoder.blocks[0].mixer
    assert isinstance(mixer, Mamba2 | DiscreteMamba2)
    mixer.zero_grad()
    context = decoder.context(tokens(*u_BTD.shape[:2]), None, document_BT)
    matrix_BHTS = mixer.mixing_matrix(u_BTD, context)
    torch.linalg.matrix_norm(matrix_BHTS).sum().backward()
    assert matrix_BHTS.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters() if p.grad is not None)


@torch.no_grad()
def mixed_in_steps(decoder: Decoder, u_BTD: Tensor) -> tuple[Tensor, MambaState]:
    """The first block's mixer, two tokens at once and then one by one."""
    mixer, whole = decoder.blocks[0].mixer, decoder.init_state(*u_BTD.shape[:2])
    state, outputs = mixer.init_state(len(u_BTD), u_BTD.shape[1]), []
    assert isinstance(state, MambaState)
    for part_BTD in u_BTD.split([2] + [1] * (u_BTD.shape[1] - 2), dim=1):
        context = decoder.context(tokens(*part_BTD.shape[:2]), whole, None)
        outputs.append(mixer(part_BTD, context, state))
    return torch.cat(outputs, dim=1), state


# ---------------------------------------------------------------- what is remembered


@pytest.mark.parametrize("layer", STATE_SPACE)
@pytest.mark.parametrize("calls", [[3], [1, 1, 1]], ids=["prefill", "steps"])
def test_state_stays_in_float32(make_decoder: MakeDecoder, layer: str, calls: list[int]) -> None:
    """Small contributions would be lost in a long bfloat16 sum."""
    decoder = make_decoder(layer).to(torch.bfloat16)
    state = decoder.init_state(1, 4)
    for part in tokens(1, 3).split(calls, dim=1):
        decoder(part, state)
    remembered = state.layers[0]
    assert isinstance(remembered, MambaState)
    assert remembered.ssm_BHPN.dtype == torch.float32
    assert (remembered.ssm_BHPN != remembered.ssm_BHPN.bfloat16()).any()
    assert remembered.conv_BWE.dtype == torch.bfloat16


@pytest.mark.parametrize("layer", STATE_SPACE)
def test_state_size_does_not_depend_on_the_length(make_decoder: MakeDecoder, layer: str) -> None:
    decoder = make_decoder(layer)
    assert decoder.init_state(2, 10_000).nbytes == decoder.init_state(2, 10).nbytes


@pytest.mark.parametrize("layer", STATE_SPACE)
def test_state_channels_count_the_recurrent_state(make_decoder: MakeDecoder, layer: str) -> None:
    decoder = make_decoder(layer)
    state, config = decoder.init_state(1, 1).layers[0], decoder.config.mixer
    assert isinstance(state, MambaState)
    assert config is not None
    assert state.ssm_BHPN[0].numel() == config.state_channels
    assert state.conv_BWE[0].numel() == (config.conv_width - 1) * config.conv_channels
