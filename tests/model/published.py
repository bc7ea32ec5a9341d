"""The published students, slowly: their formulas as plain loops, and folders in their layouts.

Nothing here uses retort and nothing is fast. The formulas take one sequence at a time, in float64.

Shapes: B batch, T time, D model width, E inner channels, X channels of x and of B before they are
repeated, P channels of a head, N state, K taps of a convolution, V vocabulary.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import silu, softplus

Config = dict[str, Any]
Weights = dict[str, Tensor]
Mixer = Callable[[Weights, Tensor], Tensor]  # (weights of one layer, u_TD) -> (T, D)

CONFIG, MAMBA_CONFIG = "config.json", "mamba_config.json"


class Quirks(NamedTuple):
    """What only the released MambaInLlama checkpoints do."""

    bias_twice: bool = True  # of dt, in the Mamba-1 kind
    repeat_by_state: bool = True  # x and B in blocks of d_state channels, not of whole heads
    unscaled_rope: bool = True  # no llama3 scaling


RELEASED, NO_QUIRKS = Quirks(), Quirks(False, False, False)


@dataclass(frozen=True)
class Student:
    """What a published folder holds, and the formulas that it stands for."""

    configs: dict[str, Config]  # by the name of the file
    weights: Weights
    quirks: Quirks = RELEASED

    def logits(self, ids_BT: Tensor) -> Tensor:
        """(B, T, V), one sequence at a time."""
        formula = mamba_in_llama_logits if MAMBA_CONFIG in self.configs else llamba_logits
        exact = {name: tensor.double() for name, tensor in self.weights.items()}
        one = replace(self, weights=exact)
        return torch.stack([formula(one, ids_T) for ids_T in ids_BT]).float()

    def with_config(self, file: str, **changes: Any) -> "Student":
        return replace(self, configs=self.configs | {file: self.configs[file] | changes})

    def write(self, folder: Path, shards: int = 1) -> None:
        for file, config in self.configs.items():
            (folder / file).write_text(json.dumps(config))
        if shards == 1:
            save_file(self.weights, folder / "model.safetensors", {"format": "pt"})
        else:
            self._write_shards(folder, shards)

    def _write_shards(self, folder: Path, shards: int) -> None:
        home = {}
        for index in range(shards):
            file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
            names = list(self.weights)[index::shards]
            save_file({name: self.weights[name] for name in names}, folder / file)
            home |= dict.fromkeys(names, file)
        size = sum(tensor.nbytes for tensor in self.weights.values())
        content = {"metadata": {"total_size": size}, "weight_map": home}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))


# ---------------------------------------------------------------- what all of them share


def below(weights: Weights, prefix: str) -> Weights:
    """The tensors under a prefix, by the rest of their name."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def linear(weights: Weights, name: str, u_TD: Tensor) -> Tensor:
    return u_TD @ weights[f"{name}.weight"].T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def mlp(weights: Weights, u_TD: Tensor) -> Tensor:
    gate, up = linear(weights, "gate_proj", u_TD), linear(weights, "up_proj", u_TD)
    return linear(weights, "down_proj", silu(gate) * up)


def block(weights: Weights, mixer: Mixer, h_TD: Tensor, eps: float) -> Tensor:
    h_TD = h_TD + mixer(weights, rms_norm(h_TD, weights["input_layernorm.weight"], eps))
    normed_TD = rms_norm(h_TD, weights["post_attention_layernorm.weight"], eps)
    return h_TD + mlp(below(weights, "mlp."), normed_TD)


def causal_conv(x_TE: Tensor, weights: Weights) -> Tensor:
    """The last tap weighs the present token, the first the one K - 1 before; before the start 0."""
    weight_E1K, bias_E = weights["conv1d.weight"], weights["conv1d.bias"]
    last = weight_E1K.shape[2] - 1
    y_TE = torch.zeros_like(x_TE)
    for t in range(len(x_TE)):
        y_TE[t] = bias_E
        for back in range(min(last, t) + 1):
            y_TE[t] += weight_E1K[:, 0, last - back] * x_TE[t - back]
    return y_TE


def repeat_blocks(x_TX: Tensor, width: int, times: int) -> Tensor:
    """Blocks of `width` channels, each `times` times side by side: a b becomes a a b b."""
    blocks = [
        x_TX[:, start : start + width]
        for start in range(0, x_TX.shape[1], width)
        for _ in range(times)
    ]
    return torch.cat(blocks, dim=1)


# ---------------------------------------------------------------- Llamba


def llamba_logits(student: Student, ids_T: Tensor) -> Tensor:
    config, weights = student.configs[CONFIG], student.weights
    eps = config["norm_epsilon"]

    def mixer(layer: Weights, u_TD: Tensor) -> Tensor:
        return discrete_mamba2(below(layer, "mixer."), u_TD, **config["ssm_cfg"])

    embedding_VD = weights["backbone.embedding.weight"]
    h_TD = embedding_VD[ids_T]
    for index in range(config["n_layer"]):
        h_TD = block(below(weights, f"backbone.layers.{index}."), mixer, h_TD, eps)
    h_TD = rms_norm(h_TD, weights["backbone.final_layernorm.weight"], eps)
    return h_TD @ (embedding_VD if config["tie_embeddings"] else weights["lm_head.weight"]).T


def discrete_mamba2(
    weights: Weights,
    u_TD: Tensor,
    n_v_heads: int,
    n_qk_heads: int,
    d_state: int,
    expand: int,
    **others: Any,
) -> Tensor:
    inner = expand * u_TD.shape[1]
    width, groups = inner // n_v_heads, n_qk_heads * d_state
    projected = linear(weights, "in_proj", u_TD)
    xbc, z_TE, a_TH = projected.split([inner + 2 * groups, inner, n_v_heads], dim=1)
    x_TE, b, c = causal_conv(xbc, weights).split([inner, groups, groups], dim=1)
    y_TE = torch.zeros_like(x_TE)
    for head in range(n_v_heads):
        group = head // (n_v_heads // n_qk_heads)
        own = slice(head * width, (head + 1) * width)
        read = slice(group * d_state, (group + 1) * d_state)
        state_PN = u_TD.new_zeros(width, d_state)
        for t in range(len(u_TD)):
            decay = torch.exp(-softplus(a_TH[t, head]))
            state_PN = decay * state_PN + torch.outer(x_TE[t, own], b[t, read])
            y_TE[t, own] = state_PN @ c[t, read] + weights["D"][head] * x_TE[t, own]
    return linear(weights, "out_proj", y_TE * silu(z_TE + weights["z_bias"]))


# ---------------------------------------------------------------- MambaInLlama


def mamba_in_llama_logits(student: Student, ids_T: Tensor) -> Tensor:
    """Of the layout written in training."""
    config, hybrid = student.configs[CONFIG], student.configs[MAMBA_CONFIG]
    weights, eps = student.weights, hybrid["rms_norm_eps"]
    recurrent = mamba2 if "ngroups" in hybrid["ssm_cfg"] else mamba1
    mixers: dict[bool, Mixer] = {
        True: lambda layer, u_TD: attention(below(layer, "self_attn."), u_TD, student),
        False: lambda layer, u_TD: recurrent(below(layer, "mamba."), u_TD, student),
    }
    h_TD = weights["model.embed_tokens.weight"][ids_T]
    for index in range(hybrid["n_layer"]):
        mixer = mixers[index in hybrid["attn_layers"]]
        h_TD = block(below(weights, f"model.layers.{index}."), mixer, h_TD, eps)
    h_TD = rms_norm(h_TD, weights["model.norm.weight"], eps)
    tied = config["tie_word_embeddings"]
    return linear(weights, "model.embed_tokens" if tied else "lm_head", h_TD)


def mamba1(weights: Weights, u_TD: Tensor, student: Student) -> Tensor:
    config, hybrid = student.configs[CONFIG], student.configs[MAMBA_CONFIG]
    states = hybrid["ssm_cfg"].get("d_state", 16)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    width = states if student.quirks.repeat_by_state else head_dim
    times = hybrid["d_inner"] // hybrid["d_xb"]

    z_TE, c_TE = linear(weights, "in_proj_z", u_TD), linear(weights, "C_proj", u_TD)
    b_TE = repeat_blocks(linear(weights, "B_proj", u_TD), width, times)
    x_TE = repeat_blocks(linear(weights, "in_proj_x", u_TD), width, times)
    x_TE = silu(causal_conv(x_TE, weights))
    dt_TE = linear(weights, "dt_proj", linear(weights, "dt_proj_down", u_TD))
    for _ in range(2 if student.quirks.bias_twice else 1):
        dt_TE = dt_TE + weights["dt_proj.bias"]
    dt_TE = softplus(dt_TE)

    y_TE = torch.zeros_like(x_TE)
    for e in range(hybrid["d_inner"]):
        first = e // states * states
        read = slice(first, first + states)
        a_N, state_N = -torch.exp(weights["A_log"][e]), u_TD.new_zeros(states)
        for t in range(len(u_TD)):
            dt, x = dt_TE[t, e], x_TE[t, e]
            state_N = torch.exp(dt * a_N) * state_N + dt * x * b_TE[t, read]
            y_TE[t, e] = state_N @ c_TE[t, read] + weights["D"][e] * x
    return linear(weights, "out_proj", y_TE * silu(z_TE))


def mamba2(weights: Weights, u_TD: Tensor, student: Student) -> Tensor:
    hybrid = student.configs[MAMBA_CONFIG]
    heads, width = hybrid["ssm_cfg"]["ngroups"], hybrid["ssm_cfg"]["d_state"]
    inner, narrow = hybrid["d_inner"], hybrid["d_xb"]
    z_TE, x, b, c, dt_TH = linear(weights, "in_proj", u_TD).split(
        [inner, narrow, narrow, inner, heads], dim=1
    )
    if hybrid["ssm_cfg"].get("repeat_kv_before_conv", False):
        x, b = (repeat_blocks(v, width, inner // narrow) for v in (x, b))
        x, b, c = silu(causal_conv(torch.cat([x, b, c], dim=1), weights)).split(inner, dim=1)
    else:
        xbc = silu(causal_conv(torch.cat([x, b, c], dim=1), weights))
        x, b, c = xbc.split([narrow, narrow, inner], dim=1)
        x, b = (repeat_blocks(v, width, inner // narrow) for v in (x, b))

    out_TE = torch.zeros_like(z_TE)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        a = -torch.exp(weights["A_log"][head])
        state_PN = u_TD.new_zeros(width, width)
        for t in range(len(u_TD)):
            dt = softplus(dt_TH[t, head] + weights["dt_bias"][head])
            state_PN = torch.exp(dt * a) * state_PN + dt * torch.outer(x[t, own], b[t, own])
            y_P = state_PN @ c[t, own] + weights["D"][head] * x[t, own]
            out_TE[t, own] = rms_norm(
                y_P * silu(z_TE[t, own]), weights["norm.weight"][own], eps=1e-5
            )
    return linear(weights, "out_proj", out_TE)


def attention(weights: Weights, u_TD: Tensor, student: Student) -> Tensor:
    config = student.configs[CONFIG]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    rates = frequencies(config, scaled=not student.quirks.unscaled_rope)
    q, k, v = (linear(weights, f"{letter}_proj", u_TD) for letter in "qkv")
    y = torch.zeros_like(q)
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        own = slice(head * width, (head + 1) * width)
        read = slice(kv_head * width, (kv_head + 1) * width)
        q_TP, k_TP = rotate(q[:, own], rates), rotate(k[:, read], rates)
        for t in range(len(u_TD)):
            scores = k_TP[: t + 1] @ q_TP[t] / math.sqrt(width)
            y[t, own] = torch.softmax(scores, dim=0) @ v[: t + 1, read]
    return linear(weights, "o_proj", y)


def frequencies(config: Config, scaled: bool) -> list[float]:
    """Radians per token of each pair of channels, with the scaling of Llama 3 if wanted."""
    width = config["hidden_size"] // config["num_attention_heads"]
    rates = [config["rope_theta"] ** (-2 * pair / width) for pair in range(width // 2)]
    return [llama3_scaled(rate, config["rope_scaling"]) if scaled else rate for rate in rates]


def llama3_scaled(rate: float, scaling: Config) -> float:
    """Fast rates are kept, slow ones divided by the factor, those between partly."""
    turns = scaling["original_max_position_embeddings"] * rate / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return kept * rate + (1 - kept) * rate / scaling["factor"]


def rotate(x_TP: Tensor, rates: list[float]) -> Tensor:
    """Channels i and i + P/2 are turned together."""
    position_T = torch.arange(len(x_TP), dtype=torch.float64)
    angle_TP = torch.outer(position_T, torch.tensor(rates, dtype=torch.float64))
    cos_TP, sin_TP = angle_TP.cos().to(x_TP.dtype), angle_TP.sin().to(x_TP.dtype)
    first_TP, second_TP = x_TP.split(len(rates), dim=1)
    turned = cos_TP * first_TP - sin_TP * second_TP, cos_TP * second_TP + sin_TP * first_TP
    return torch.cat(turned, dim=1)


# ---------------------------------------------------------------- random tensors by their layout


def randomised(shapes: dict[str, tuple[int, ...]]) -> Weights:
    """No tensor is 0 or 1 throughout, where leaving it out would not show."""
    return {name: _random(name, shape) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    if "norm" in name:
        return torch.empty(shape).uniform_(0.5, 1.5)
    if "embed" in name or "lm_head" in name:
        return 0.2 * torch.randn(shape)
    if len(shape) == 2 and "A_log" not in name:
        return torch.randn(shape) / math.sqrt(shape[1])
    return 0.5 * torch.randn(shape)


def mlp_and_norm_shapes(prefix: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}input_layernorm.weight": (width,),
        f"{prefix}post_attention_layernorm.weight": (width,),
        f"{prefix}mlp.gate_proj.weight": (inner, width),
        f"{prefix}mlp.up_proj.weight": (inner, width),
        f"{prefix}mlp.down_proj.weight": (width, inner),
    }


def llamba(
    *,
    d_model: int = 24,
    n_v_heads: int = 2,
    n_qk_heads: int = 2,
    d_state: int = 5,
    expand: int = 1,
    vocab_size: int = 64,
    tied: bool = True,
    n_layer: int = 2,
) -> Student:
    """As Cartesia writes it; the vocabulary's tensors are padded to a multiple of 8."""
    ssm_cfg = {
        "d_state": d_state,
        "n_v_heads": n_v_heads,
        "n_qk_heads": n_qk_heads,
        "expand": expand,
        "chunk_size": 4,
        "activation": "identity",
        "bias": False,
    }
    config = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "n_layer": n_layer,
        "tie_embeddings": tied,
        "pad_vocab_size_multiple": 8,
        "lm_head_bias": False,
        "resid_dropout": 0.0,
        "norm_epsilon": 1e-5,
        "mlp_cfg": {"intermediate_size": 40, "bias": False, "act_fn": "silu"},
        "ssm_cfg": ssm_cfg,
    }
    inner, rows = expand * d_model, math.ceil(vocab_size / 8) * 8
    channels = inner + 2 * n_qk_heads * d_state
    shapes: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (rows, d_model)}
    for index in range(n_layer):
        prefix = f"backbone.layers.{index}."
        shapes |= mlp_and_norm_shapes(prefix, d_model, 40) | {
            f"{prefix}mixer.in_proj.weight": (channels + inner + n_v_heads, d_model),
            f"{prefix}mixer.z_bias": (inner,),
            f"{prefix}mixer.conv1d.weight": (channels, 1, 4),
            f"{prefix}mixer.conv1d.bias": (channels,),
            f"{prefix}mixer.D": (n_v_heads,),
            f"{prefix}mixer.out_proj.weight": (d_model, inner),
        }
    shapes["backbone.final_layernorm.weight"] = (d_model,)
    if not tied:
        shapes["lm_head.weight"] = (rows, d_model)
    return Student({CONFIG: config}, randomised(shapes))


def mamba_in_llama(
    ssm_cfg: Config,
    *,
    attn_layers: tuple[int, ...] = (1,),
    n_layer: int = 3,
    hidden_size: int = 40,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = False,
    released_quirks: bool | None = None,
) -> Student:
    """In the layout written in training; `released_quirks` goes into the file unless it is None."""
    config = {
        "_name_or_path": "a Llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": n_layer,
        "num_key_value_heads": kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        # Of five rates one is kept, one lies between, three are divided.
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 500.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 61,
    }
    hybrid = {
        "d_model": hidden_size,
        "ssm_cfg": ssm_cfg,
        "rms_norm_eps": 1e-5,
        "vocab_size": None,
        "d_inner": hidden_size,
        "d_xb": hidden_size // heads * kv_heads,
        "intermediate_size": 48,
        "hidden_act": "silu",
        "n_layer": n_layer,
        "attn_layers": list(attn_layers),
    }
    if released_quirks is not None:
        hybrid["released_quirks"] = released_quirks
    quirks = NO_QUIRKS if released_quirks is False else RELEASED
    weights = randomised(mamba_in_llama_shapes(config, hybrid))
    return Student({CONFIG: config, MAMBA_CONFIG: hybrid}, weights, quirks)


def mamba_in_llama_shapes(config: Config, hybrid: Config) -> dict[str, tuple[int, ...]]:
    width, inner, narrow = hybrid["d_model"], hybrid["d_inner"], hybrid["d_xb"]
    recurrent = mamba2_shapes(hybrid) if "ngroups" in hybrid["ssm_cfg"] else mamba1_shapes(hybrid)
    attending = {
        "self_attn.q_proj.weight": (inner, width),
        "self_attn.k_proj.weight": (narrow, width),
        "self_attn.v_proj.weight": (narrow, width),
        "self_attn.o_proj.weight": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (61, width)}
    for index in range(hybrid["n_layer"]):
        prefix = f"model.layers.{index}."
        mixer = attending if index in hybrid["attn_layers"] else recurrent
        shapes |= mlp_and_norm_shapes(prefix, width, hybrid["intermediate_size"])
        shapes |= {f"{prefix}{name}": shape for name, shape in mixer.items()}
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (61, width)
    return shapes


def mamba1_shapes(hybrid: Config) -> dict[str, tuple[int, ...]]:
    width, inner, narrow = hybrid["d_model"], hybrid["d_inner"], hybrid["d_xb"]
    states, taps = hybrid["ssm_cfg"].get("d_state", 16), hybrid["ssm_cfg"].get("d_conv", 4)
    rank = hybrid["ssm_cfg"].get("dt_rank", math.ceil(width / 16))
    return {
        "mamba.in_proj_x.weight": (narrow, width),
        "mamba.in_proj_z.weight": (inner, width),
        "mamba.B_proj.weight": (narrow, width),
        "mamba.C_proj.weight": (inner, width),
        "mamba.dt_proj_down.weight": (rank, width),
        "mamba.dt_proj.weight": (inner, rank),
        "mamba.dt_proj.bias": (inner,),
        "mamba.conv1d.weight": (inner, 1, taps),
        "mamba.conv1d.bias": (inner,),
        "mamba.A_log": (inner, states),
        "mamba.D": (inner,),
        "mamba.out_proj.weight": (width, inner),
    }


def mamba2_shapes(hybrid: Config) -> dict[str, tuple[int, ...]]:
    width, inner, narrow = hybrid["d_model"], hybrid["d_inner"], hybrid["d_xb"]
    heads = hybrid["ssm_cfg"]["ngroups"]
    wide = hybrid["ssm_cfg"].get("repeat_kv_before_conv", False)
    channels = 3 * inner if wide else inner + 2 * narrow
    return {
        "mamba.in_proj.weight": (2 * inner + 2 * narrow + heads, width),
        "mamba.conv1d.weight": (channels, 1, 4),
        "mamba.conv1d.bias": (channels,),
        "mamba.dt_bias": (heads,),
        "mamba.A_log": (heads,),
        "mamba.D": (heads,),
        "mamba.norm.weight": (inner,),
        "mamba.out_proj.weight": (width, inner),
    }


FUSED = {
    "mamba.in_proj.weight": ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down"),
    "mha.in_proj.weight": ("q_proj", "k_proj", "v_proj"),
    "mha.out_proj.weight": ("o_proj",),
}


def fused(student: Student) -> Weights:
    """The tensors of a MambaInLlama in the layout used for inference."""
    weights = dict(student.weights)
    for index in range(student.configs[MAMBA_CONFIG]["n_layer"]):
        for whole, parts in FUSED.items():
            module = "mamba" if whole.startswith("mamba") else "self_attn"
            names = [f"model.layers.{index}.{module}.{part}.weight" for part in parts]
            if names[0] in weights:
                weights[f"model.layers.{index}.{whole}"] = torch.cat(
                    [weights.pop(name) for name in names]
                )
    return weights
