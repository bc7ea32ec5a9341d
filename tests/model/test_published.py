"""Published students: the same numbers as their formulas, from folders in their own layouts."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus
from transformers import AutoModelForCausalLM

import retort
from retort.model.decoder import Decoder

from . import published
from .published import CONFIG, Config, Quirks, Student, llamba, mamba_in_llama

# Ten channels a head: the state of Mamba-1 is half as wide, that of Mamba-2 as wide.
MAMBA1: Config = {"expand": 1, "d_state": 5}
MAMBA2: Config = {"expand": 1, "ngroups": 4, "d_state": 10}
KINDS: dict[str, Callable[[], Student]] = {
    "llamba": llamba,
    "mamba1": lambda: mamba_in_llama(MAMBA1),
    "mamba2": lambda: mamba_in_llama(MAMBA2),
}


@pytest.fixture(params=KINDS)
def student(request: pytest.FixtureRequest) -> Student:
    return KINDS[request.param]()


def tokens(length: int = 11) -> Tensor:
    return torch.randint(61, (2, length))


def write(student: Student, folder: Path, shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    student.write(folder, shards)
    return folder


def decode(decoder: Decoder, ids_BT: Tensor, prompt: int) -> Tensor:
    """The logits from a prompt in one go, then one token at a time."""
    length = ids_BT.shape[1]
    state = decoder.init_state(len(ids_BT), length)
    cuts = [*([prompt] if prompt else []), *[1] * (length - prompt)]
    return torch.cat([decoder(part_BT, state) for part_BT in ids_BT.split(cuts, dim=1)], dim=1)


@torch.no_grad()
def assert_same_logits(decoder: Decoder, student: Student, length: int = 11) -> None:
    ids_BT = tokens(length)
    wanted = student.logits(ids_BT)
    assert wanted.std() > 0.1  # else the tolerance would say nothing
    # The formulas in float64, where only the student's own rounding is left; and in float32, which
    # in some of these networks comes to a ten-thousandth of what logits spread by.
    exact = deepcopy(decoder).double()(ids_BT).float()
    torch.testing.assert_close(exact, wanted, rtol=0, atol=4e-5)
    rounding = 1e-4 * float(wanted.std())
    torch.testing.assert_close(decoder(ids_BT), wanted, rtol=0, atol=rounding)
    for prompt in (0, 6, ids_BT.shape[1]):
        torch.testing.assert_close(decode(decoder, ids_BT, prompt), wanted, rtol=0, atol=rounding)


@torch.no_grad()
def logits(decoder: Decoder) -> Tensor:
    return decoder(torch.arange(22).view(2, 11))


# ---------------------------------------------------------------- Llamba


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("vocab_size", [61, 64])
def test_llamba(tmp_path: Path, tied: bool, vocab_size: int) -> None:
    """The tensors have 64 rows in either case."""
    student = llamba(tied=tied, vocab_size=vocab_size)
    assert_same_logits(retort.load(write(student, tmp_path)), student)


@pytest.mark.parametrize(
    "geometry",
    [
        {"n_v_heads": 4, "n_qk_heads": 2},
        {"n_v_heads": 6, "n_qk_heads": 2, "d_state": 12},
        {"n_v_heads": 3, "n_qk_heads": 1},
        {"n_v_heads": 8, "n_qk_heads": 8, "d_state": 1},
        {"n_v_heads": 4, "n_qk_heads": 2, "expand": 2},
    ],
    ids=lambda geometry: "-".join(map(str, geometry.values())),
)
def test_llamba_geometry(tmp_path: Path, geometry: dict[str, int]) -> None:
    student = llamba(**geometry)
    assert_same_logits(retort.load(write(student, tmp_path)), student)


def test_llamba_that_names_its_class(tmp_path: Path) -> None:
    plain = llamba(n_v_heads=4)
    named = plain.with_config(CONFIG, architectures=["LlambaLMHeadModel"], model_type="llamba")
    decoder = retort.load(write(named, tmp_path))
    assert_same_logits(decoder, named)
    without = retort.load(write(plain, tmp_path / "plain"))
    assert torch.equal(logits(decoder), logits(without))


# ---------------------------------------------------------------- MambaInLlama


@pytest.mark.parametrize("ssm_cfg", [MAMBA1, MAMBA2], ids=["mamba1", "mamba2"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("released_quirks", [None, True, False])
def test_mamba_in_llama(
    tmp_path: Path, ssm_cfg: Config, tied: bool, released_quirks: bool | None
) -> None:
    student = mamba_in_llama(ssm_cfg, tied=tied, released_quirks=released_quirks)
    assert_same_logits(retort.load(write(student, tmp_path)), student)


@pytest.mark.parametrize("ssm_cfg", [MAMBA1, MAMBA2], ids=["mamba1", "mamba2"])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("released_quirks", [True, False])
def test_kv_heads(tmp_path: Path, ssm_cfg: Config, kv_heads: int, released_quirks: bool) -> None:
    student = mamba_in_llama(
        ssm_cfg, attn_layers=(0,), n_layer=2, kv_heads=kv_heads, released_quirks=released_quirks
    )
    assert_same_logits(retort.load(write(student, tmp_path)), student)


@pytest.mark.parametrize("ssm_cfg", [MAMBA1, MAMBA2], ids=["mamba1", "mamba2"])
@pytest.mark.parametrize("attn_layers", [(), (0, 2)], ids=["none", "first and last"])
def test_kept_layers(tmp_path: Path, ssm_cfg: Config, attn_layers: tuple[int, ...]) -> None:
    student = mamba_in_llama(ssm_cfg, attn_layers=attn_layers)
    assert_same_logits(retort.load(write(student, tmp_path)), student)


@pytest.mark.parametrize("released_quirks", [True, False])
def test_mamba1_with_default_sizes(tmp_path: Path, released_quirks: bool) -> None:
    """A state of 16, as wide as half a head."""
    student = mamba_in_llama(
        {"expand": 1}, hidden_size=128, n_layer=2, released_quirks=released_quirks
    )
    assert_same_logits(retort.load(write(student, tmp_path)), student)


def test_mamba1_with_given_sizes(tmp_path: Path) -> None:
    student = mamba_in_llama(MAMBA1 | {"d_conv": 3, "dt_rank": 7})
    assert_same_logits(retort.load(write(student, tmp_path)), student)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("released_quirks", [True, False])
def test_mamba2_repeats_before_or_after_its_convolution(
    tmp_path: Path, before: bool, released_quirks: bool
) -> None:
    ssm_cfg = MAMBA2 | {"repeat_kv_before_conv": before}
    student = mamba_in_llama(ssm_cfg, released_quirks=released_quirks)
    assert_same_logits(retort.load(write(student, tmp_path)), student)


@pytest.mark.parametrize("ssm_cfg", [MAMBA1, MAMBA2], ids=["mamba1", "mamba2"])
@pytest.mark.parametrize("released_quirks", [True, False])
def test_layout_of_inference(tmp_path: Path, ssm_cfg: Config, released_quirks: bool) -> None:
    student = mamba_in_llama(ssm_cfg, released_quirks=released_quirks)
    fused = replace(student, weights=published.fused(student))
    assert fused.weights.keys() != student.weights.keys()
    found = retort.load(write(fused, tmp_path / "fused"))
    assert torch.equal(logits(found), logits(retort.load(write(student, tmp_path / "plain"))))
    assert_same_logits(found, student)


# ---------------------------------------------------------------- folders of every kind


def test_sharded_folder(tmp_path: Path, student: Student) -> None:
    decoder = retort.load(write(student, tmp_path, shards=3))
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
    assert_same_logits(decoder, student)


def test_longer_than_a_chunk(tmp_path: Path, student: Student) -> None:
    assert_same_logits(retort.load(write(student, tmp_path)), student, length=70)


@pytest.mark.parametrize("released_quirks", [True, False])
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_hybrid_written_and_read_again(tmp_path: Path, kind: str, released_quirks: bool) -> None:
    ssm_cfg = {"mamba1": MAMBA1, "mamba2": MAMBA2}[kind]
    assert_same_after_saving(mamba_in_llama(ssm_cfg, released_quirks=released_quirks), tmp_path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_llamba_written_and_read_again(tmp_path: Path, tied: bool) -> None:
    assert_same_after_saving(llamba(tied=tied, n_v_heads=4, vocab_size=61), tmp_path)


def assert_same_after_saving(student: Student, folder: Path) -> None:
    first = retort.load(write(student, folder / "published"))
    retort.save(first, folder / "ours")
    again = retort.load(folder / "ours")
    assert torch.equal(logits(again), logits(first))
    assert_same_logits(again, student)


# ---------------------------------------------------------------- the formulas themselves


def changed(student: Student, name: str) -> Student:
    """With other numbers in one tensor, in a new order of its rows."""
    weight = student.weights[name]
    other = weight[torch.randperm(len(weight))] + 0.1 * torch.randn_like(weight)
    return replace(student, weights=student.weights | {name: other})


def test_every_tensor_shows(student: Student) -> None:
    """A tensor read wrongly or not at all changes the logits far more than the tests allow."""
    ids_BT = tokens(6)[:1]
    wanted = student.logits(ids_BT)
    for name in student.weights:
        found = changed(student, name).logits(ids_BT)
        assert (found - wanted).abs().max() > 1e-2, name


@pytest.mark.parametrize("quirk", Quirks._fields)
def test_every_quirk_shows(quirk: str) -> None:
    student, ids_BT = mamba_in_llama(MAMBA1), tokens()
    without = replace(student, quirks=student.quirks._replace(**{quirk: False}))
    difference = student.logits(ids_BT) - without.logits(ids_BT)
    assert difference.abs().max() > 1e-2


def test_mamba2_has_the_quirk_of_rope_only() -> None:
    student, ids_BT = mamba_in_llama(MAMBA2), tokens()
    rope = replace(student, quirks=published.NO_QUIRKS._replace(unscaled_rope=True))
    assert torch.equal(student.logits(ids_BT), rope.logits(ids_BT))
    none = replace(student, quirks=published.NO_QUIRKS)
    assert (student.logits(ids_BT) - none.logits(ids_BT)).abs().max() > 1e-2


def test_kept_layers_alone_are_a_llama(tmp_path: Path) -> None:
    """Without quirks; transformers does not know of mamba_config.json."""
    student = mamba_in_llama(MAMBA1, attn_layers=(0, 1, 2), released_quirks=False)
    theirs = AutoModelForCausalLM.from_pretrained(write(student, tmp_path))
    ids_BT = tokens(40)
    with torch.no_grad():
        found = theirs(ids_BT, use_cache=False).logits
    torch.testing.assert_close(student.logits(ids_BT), found, rtol=0, atol=1e-5)


# With one head, or one block of channels: a token's part in a later one, in closed form.


def test_discrete_mamba2_is_a_matrix() -> None:
    student = llamba(d_model=6, n_v_heads=1, n_qk_heads=1, d_state=3, n_layer=1)
    weights = published.below(student.weights, "backbone.layers.0.mixer.")
    u_TD = torch.randn(7, 6)
    xbc, z, a = (u_TD @ weights["in_proj.weight"].T).split([12, 6, 1], dim=1)
    x, b, c = conv(xbc, weights).split([6, 3, 3], dim=1)
    matrix_TS = (c @ b.T) * torch.exp(-between(softplus(a[:, 0])))
    y = matrix_TS.tril() @ x + weights["D"] * x
    wanted = (y * silu(z + weights["z_bias"])) @ weights["out_proj.weight"].T
    found = published.discrete_mamba2(weights, u_TD, **student.configs[CONFIG]["ssm_cfg"])
    torch.testing.assert_close(found, wanted)


def test_mamba2_is_a_matrix() -> None:
    ssm_cfg = {"expand": 1, "ngroups": 1, "d_state": 6}
    student = mamba_in_llama(ssm_cfg, hidden_size=6, heads=1, kv_heads=1, attn_layers=())
    weights = published.below(student.weights, "model.layers.0.mamba.")
    u_TD = torch.randn(7, 6)
    z, xbc, dt = (u_TD @ weights["in_proj.weight"].T).split([6, 18, 1], dim=1)
    x, b, c = silu(conv(xbc, weights)).split(6, dim=1)
    dt = softplus(dt + weights["dt_bias"])[:, 0]
    matrix_TS = (c @ b.T) * torch.exp(-weights["A_log"].exp() * between(dt)) * dt
    gated = (matrix_TS.tril() @ x + weights["D"] * x) * silu(z)
    normed = torch.nn.functional.rms_norm(gated, (6,), weights["norm.weight"], 1e-5)
    wanted = normed @ weights["out_proj.weight"].T
    torch.testing.assert_close(published.mamba2(weights, u_TD, student), wanted)


def test_mamba1_is_a_matrix_for_each_channel() -> None:
    ssm_cfg = {"expand": 1, "d_state": 6}
    student = mamba_in_llama(ssm_cfg, hidden_size=6, heads=1, kv_heads=1, attn_layers=())
    weights = published.below(student.weights, "model.layers.0.mamba.")
    u_TD = torch.randn(7, 6)
    projections = ("in_proj_x", "in_proj_z", "B_proj", "C_proj", "dt_proj_down")
    x, z, b, c, low = (u_TD @ weights[f"{name}.weight"].T for name in projections)
    x = silu(conv(x, weights))
    dt = softplus(low @ weights["dt_proj.weight"].T + 2 * weights["dt_proj.bias"])
    y = weights["D"] * x
    for e in range(6):
        decay_TSN = torch.exp(-between(dt[:, e])[..., None] * weights["A_log"][e].exp())
        matrix_TS = torch.einsum("tn,sn,tsn->ts", c, b, decay_TSN) * dt[:, e]
        y[:, e] += matrix_TS.tril() @ x[:, e]
    wanted = (y * silu(z)) @ weights["out_proj.weight"].T
    torch.testing.assert_close(published.mamba1(weights, u_TD, student), wanted)


def conv(x_TE: Tensor, weights: published.Weights) -> Tensor:
    weight, bias = weights["conv1d.weight"], weights["conv1d.bias"]
    return conv1d(x_TE.T, weight, bias, padding=3, groups=len(bias))[:, : len(x_TE)].T


def between(rates_T: Tensor) -> Tensor:
    """The sum of the rates after s and up to t, at [t, s]."""
    total_T = rates_T.cumsum(0)
    return total_T[:, None] - total_T
