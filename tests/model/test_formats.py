"""Configurations in files: there and back, and what is refused says what would be right."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.model import formats
from retort.model.config import (
    ATTENTION,
    LINEAR,
    DecoderConfig,
    DiscreteMamba2Config,
    Llama3Rope,
    Mamba1Config,
    Mamba2Config,
)
from retort.model.formats import families, granite, own

from .published import CONFIG, MAMBA_CONFIG, llamba, mamba_in_llama

Values = dict[str, Any]

PLAIN = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    layer_types=(ATTENTION, ATTENTION),
    heads=4,
    kv_heads=2,
    head_dim=8,
)
MIXER = Mamba2Config(heads=4, head_dim=16, state_size=8, groups=2)
DISCRETE = DiscreteMamba2Config(heads=4, head_dim=12, state_size=6, groups=2)
MAMBA1 = Mamba1Config(heads=4, kv_heads=2, head_dim=8, dt_rank=3, state_size=4)
HYBRID = replace(PLAIN, layer_types=(LINEAR, ATTENTION), mixer=MIXER)
PURE = replace(HYBRID, layer_types=(LINEAR, LINEAR))
QWEN2 = replace(PLAIN, family="qwen2", qkv_bias=True)
QWEN3 = replace(PLAIN, family="qwen3", qk_norm=True, head_dim=16)
QWEN3_HYBRID = replace(QWEN3, layer_types=(LINEAR, ATTENTION), mixer=MIXER)
QWEN3_PURE = replace(QWEN3_HYBRID, layer_types=(LINEAR, LINEAR))

LLAMA3 = Llama3Rope(32.0, 1.0, 4.0, 8192)

FAMILIES = {
    "LlamaForCausalLM": PLAIN,
    "MistralForCausalLM": replace(PLAIN, family="mistral", head_dim=12),
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}
GRANITE = {
    "hybrid": HYBRID,
    "pure": PURE,
    "hybrid of qwen2": replace(HYBRID, family="qwen2", qkv_bias=True),
    "pure of qwen2": replace(PURE, family="qwen2", qkv_bias=True),
}
OWN = {
    "discrete": replace(HYBRID, mixer=DISCRETE),
    "mamba1": replace(PURE, mixer=MAMBA1),
    "mamba1 with quirks": replace(HYBRID, mixer=replace(MAMBA1, released_quirks=True)),
    "qk_norm": QWEN3_HYBRID,
    "wide heads": replace(HYBRID, head_dim=16),
}
ALL = [*FAMILIES.values(), *GRANITE.values(), *OWN.values()]


def write(config: DecoderConfig, dtype: str = "float32") -> Values:
    """What is found in the file: JSON knows no tuples."""
    values: Values = json.loads(json.dumps(formats.writer(config).config(config, dtype)))
    return values


def read(values: Values) -> DecoderConfig:
    return formats.reader(values).config(values)


def changed(values: Values, changes: Values) -> Values:
    """The values with changes; an ellipsis takes a key away."""
    return {key: value for key, value in (values | changes).items() if value is not ...}


# ---------------------------------------------------------------- there and back


@settings(max_examples=100, deadline=None)
@given(
    config=st.sampled_from(ALL),
    eos=st.lists(st.integers(0, 60), max_size=3).map(tuple),
    token=st.none() | st.integers(0, 60),
    tied=st.booleans(),
    theta=st.floats(1.0, 1e7),
    scaling=st.none() | st.just(LLAMA3),
    eps=st.floats(1e-8, 1e-3),
)
def test_there_and_back(
    config: DecoderConfig,
    eos: tuple[int, ...],
    token: int | None,
    tied: bool,
    theta: float,
    scaling: Llama3Rope | None,
    eps: float,
) -> None:
    config = replace(
        config,
        eos_token_ids=eos,
        bos_token_id=token,
        pad_token_id=token,
        tie_embeddings=tied,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=eps,
    )
    assert read(write(config)) == config


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.family)
def test_there_and_back_as_they_are(config: DecoderConfig) -> None:
    assert read(write(config)) == config


@pytest.mark.parametrize("architecture", FAMILIES)
def test_attention_alone_has_its_family(architecture: str) -> None:
    config = FAMILIES[architecture]
    assert formats.writer(config) is families.FAMILY
    values = write(config, "bfloat16")
    assert values["architectures"] == [architecture]
    assert values["model_type"] == config.family
    assert values["dtype"] == "bfloat16"
    assert values["head_dim"] == config.head_dim
    assert values.get("sliding_window") is None


@pytest.mark.parametrize("kind", GRANITE)
def test_mamba2_students_are_granite(kind: str) -> None:
    assert formats.writer(GRANITE[kind]) is granite.GRANITE
    values = write(GRANITE[kind], "bfloat16")
    assert values["architectures"][0] == "GraniteMoeHybridForCausalLM"
    assert values["model_type"] == "granitemoehybrid"
    assert values["dtype"] == "bfloat16"
    # A head_dim of None or of another width is read differently by each of its readers.
    assert "head_dim" not in values
    assert values["time_step_limit"] == [0.0, 1e9]
    assert values["num_local_experts"] == 0
    assert values["attention_multiplier"] == 8**-0.5
    assert values["attention_bias"] == GRANITE[kind].qkv_bias


@pytest.mark.parametrize(
    ("config", "bamba"),
    [
        (HYBRID, True),
        (replace(HYBRID, mixer=replace(MIXER, head_dim=8)), False),
        (replace(HYBRID, rope_scaling=LLAMA3), False),
        (PURE, False),
    ],
)
def test_hybrids_for_llama_cpp_name_bamba(config: DecoderConfig, bamba: bool) -> None:
    """Its converter would leave RoPE out otherwise."""
    assert ("BambaForCausalLM" in write(config)["architectures"]) == bamba
    assert (granite.GRANITE.runtimes(config)["llama.cpp"] == "") == (bamba or config == PURE)


def test_layers_have_the_words_that_all_releases_know() -> None:
    assert write(HYBRID)["layer_types"] == ["mamba", "attention"]
    assert "null_layers" not in write(HYBRID)
    values = write(PURE)
    assert values["layer_types"] == ["mamba", "mamba", "attention"]
    assert values["num_hidden_layers"] == 3
    assert values["null_layers"] == [2]


@pytest.mark.parametrize(
    "config", [PLAIN, QWEN2, HYBRID, PURE], ids=["", "qwen2", "hybrid", "pure"]
)
def test_both_spellings_of_rope_are_written(config: DecoderConfig) -> None:
    """Runtimes that read only the older one would assume base 10000 and no scaling."""
    values = write(replace(config, rope_theta=5e5, rope_scaling=LLAMA3))
    assert values["rope_theta"] == 5e5
    assert values["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert values["rope_parameters"] == values["rope_scaling"] | {"rope_theta": 5e5}
    values = write(replace(config, rope_theta=5e5))
    assert values["rope_theta"] == 5e5
    assert values["rope_scaling"] is None
    assert values["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}


# ---------------------------------------------------------------- what other programs cannot hold


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        (replace(HYBRID, mixer=DISCRETE), ["mixer is discrete_mamba2.* student.mixer=mamba2"]),
        (replace(PURE, mixer=MAMBA1), ["mixer is mamba1.* distil a student with student.mixer"]),
        (
            replace(PURE, mixer=replace(MIXER, head_dim=12)),
            ["48 is no multiple of hidden_size 32: choose heads and head_dim so"],
        ),
        (
            replace(HYBRID, qk_norm=True),
            [r"normalise queries and keys.*keep no attention \(student.keep_attention=\[\]\)"],
        ),
        (
            replace(HYBRID, head_dim=16),
            [r"heads \* head_dim = 64, .* 32 alone: keep no attention \(student.keep_attention"],
        ),
        (
            replace(QWEN3_HYBRID, mixer=replace(MIXER, head_dim=12)),
            ["48 is no multiple", "normalise queries", r"heads \* head_dim = 64"],
        ),
        (PLAIN, ["no state-space layers"]),
    ],
)
def test_students_that_granite_cannot_hold(config: DecoderConfig, reasons: list[str]) -> None:
    """Every reason is told, each with what to change."""
    found = granite.GRANITE.refusals(config)
    assert len(found) == len(reasons)
    for told, reason in zip(found, reasons, strict=True):
        assert "\n" not in told
        with pytest.raises(ValueError, match=reason):
            raise ValueError(told)


def test_advice_helps() -> None:
    """What a refusal says to change makes a student that can be given to others."""
    assert granite.GRANITE.refusals(QWEN3_HYBRID)
    assert granite.GRANITE.refusals(QWEN3_PURE) == []
    assert formats.portable(QWEN3_PURE) is granite.GRANITE
    assert formats.portable(replace(OWN["discrete"], mixer=MIXER)) is granite.GRANITE


def test_pure_students_of_qwen3_leave_their_attention_behind() -> None:
    values = write(QWEN3_PURE)
    assert values["num_attention_heads"] == values["num_key_value_heads"] == 4
    assert read(values) == replace(
        QWEN3_PURE, kv_heads=4, head_dim=8, qk_norm=False, family="llama"
    )


@pytest.mark.parametrize("changes", [{"qkv_bias": True}, {"qk_norm": True}, {"family": "qwen2"}])
def test_attention_that_its_family_has_not(changes: Values) -> None:
    (reason,) = families.FAMILY.refusals(replace(PLAIN, **changes))
    assert reason.endswith(" has not")


@pytest.mark.parametrize("kind", OWN)
def test_the_rest_has_a_format_of_its_own(kind: str) -> None:
    assert formats.portable(OWN[kind]) is None
    assert formats.writer(OWN[kind]) is own.OWN
    assert write(OWN[kind])["architectures"] == ["RetortForCausalLM"]


@pytest.mark.parametrize(
    ("place", "key"),
    [((), "gate"), (("mixer",), "gate"), (("rope_scaling",), "gate"), (("mixer",), "kv_heads")],
)
def test_unknown_keys_of_our_own_are_refused(place: tuple[str, ...], key: str) -> None:
    """They may be a later version's, and leaving them out would be another model."""
    values = write(replace(OWN["discrete"], rope_scaling=LLAMA3))
    inner = values["decoder"]
    for name in place:
        inner = inner[name]
    inner[key] = 2
    path = r"\.".join(("decoder", *place, key))
    with pytest.raises(ValueError, match=f"^{path}: unknown key$"):
        read(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "wide"}, "decoder.hidden_size: .* integer"),
        ({"hidden_size": ...}, "decoder.hidden_size: Field required"),
        ({"heads": 0}, "decoder.heads: .* greater than 0"),
        ({"layer_types": 3}, "decoder.layer_types"),
        ({"layer_types": ["mamba"]}, "decoder.layer_types.0"),
        ({"kv_heads": 3}, "decoder: .*num_attention_heads 4 is no multiple"),
        ({"mixer": None}, "decoder: .*no mixer settings"),
        ({"mixer": {"kind": "mamba9"}}, "decoder.mixer"),
        ({"rope_scaling": "yarn"}, "decoder.rope_scaling"),
    ],
)
def test_wrong_values_of_our_own_are_refused(changes: Values, message: str) -> None:
    values = write(OWN["discrete"])
    values["decoder"] = changed(values["decoder"], changes)
    with pytest.raises(ValueError, match=message) as caught:
        read(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decoder", ["words", None, 3, []])
def test_our_own_without_a_decoder(decoder: object) -> None:
    with pytest.raises(ValueError, match="decoder: "):
        read(write(OWN["discrete"]) | {"decoder": decoder})


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; supported are Granite.*Llama"),
        ({"architectures": []}, "architecture none"),
        ({"architectures": None}, "architecture none"),
        ({"architectures": ...}, "architecture none; supported are"),
        ({"architectures": "LlamaForCausalLM"}, "architectures 'Llama.*': a list of names"),
        ({"architectures": [{}]}, "architectures .*: a list of names"),
        ({"attention_bias": True}, "attention_bias = true is not supported"),
        ({"mlp_bias": True}, "mlp_bias = true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': only 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope type 'linear'"),
    ],
)
def test_refused_llama_configs(changes: Values, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(changed(write(PLAIN), changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 8}, "mixture-of-experts"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0: only 1"),
        ({"logits_scaling": 8.0}, "logits_scaling = 8.0: only 1"),
        ({"residual_multiplier": 0.22}, "residual_multiplier = 0.22: only 1"),
        ({"attention_multiplier": 0.5}, r"attention_multiplier: only head_dim\*\*-0.5"),
        # transformers takes a missing one for 1, not for what attention usually has.
        ({"attention_multiplier": ...}, r"attention_multiplier: only head_dim\*\*-0.5"),
        ({"position_embedding_type": "nope"}, "without rope"),
        ({"time_step_limit": [0.001, 0.1]}, "time_step_limit"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias = false"),
        ({"mamba_conv_bias": False}, "mamba_conv_bias = true"),
        ({"layer_types": ["mamba"]}, "layer_types: 1 for 2 layers"),
        ({"layer_types": ["mamba", "sliding_attention"]}, "unknown .'sliding_attention'."),
    ],
)
def test_refused_granite_configs(changes: Values, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(changed(write(HYBRID), changes))


@pytest.mark.parametrize(
    "limit", [..., None, [0.0, float("inf")], [0.0, {"__float__": "Infinity"}], [0.0, 1e9]]
)
def test_an_unlimited_time_step_is_read(limit: Any) -> None:
    """In all the ways that transformers, and Python's JSON, have of writing infinity."""
    assert read(changed(write(HYBRID), {"time_step_limit": limit})) == HYBRID


# ---------------------------------------------------------------- values of another kind

COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
WRONG: list[tuple[DecoderConfig, str, list[Any]]] = [
    *((PLAIN, key, ["abc", -3, 0, 2.5, None, [1], True]) for key in COUNTS),
    (PLAIN, "intermediate_size", ["abc", -3, None]),
    (PLAIN, "num_key_value_heads", ["abc", 0]),
    (PLAIN, "head_dim", ["abc", 0, 2.5]),
    (PLAIN, "max_position_embeddings", ["abc", None]),
    (PLAIN, "rms_norm_eps", ["abc", -1, None, True]),
    (PLAIN, "rope_theta", ["abc", -1, 0]),
    (PLAIN, "rope_parameters", ["abc", 3, [1]]),
    (PLAIN, "rope_scaling", ["abc", 3, [1]]),
    (PLAIN, "tie_word_embeddings", ["false", 1]),
    (PLAIN, "bos_token_id", ["<s>", 2.5, [1]]),
    (PLAIN, "eos_token_id", ["</s>", 2.5, ["</s>"]]),
    (FAMILIES["MistralForCausalLM"], "sliding_window", ["abc", -1]),
    (QWEN2, "use_sliding_window", ["abc", 1]),
    (HYBRID, "layer_types", [3, "mamba", [3, 4], {"a": 1}]),
    (HYBRID, "shared_intermediate_size", ["abc", None]),
    (HYBRID, "attention_multiplier", ["abc", None]),
    (HYBRID, "time_step_limit", ["abc", 3, [0.0], ["a", "b"], [0.0, "Infinity"]]),
    *(
        (HYBRID, f"mamba_{part}", ["abc", 0, -1, None, 2.5])
        for part in ("n_heads", "d_head", "d_state", "n_groups", "d_conv", "chunk_size")
    ),
    (PURE, "null_layers", [3, "abc", ["abc"]]),
]


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [(config, key, value) for config, key, values in WRONG for value in values],
    ids=str,
)
def test_wrong_values_are_told_by_their_key(config: DecoderConfig, key: str, value: Any) -> None:
    refused_for(write(config) | {key: value}, key)


@pytest.mark.parametrize("key", ["factor", "rope_theta", "original_max_position_embeddings"])
def test_wrong_values_of_rope(key: str) -> None:
    values = write(replace(PLAIN, rope_scaling=LLAMA3))
    values["rope_parameters"][key] = "abc"
    refused_for(values, f"rope_parameters.{key}")


LLAMBA_WRONG: Values = {
    "d_model": "abc",
    "n_layer": 2.5,
    "vocab_size": 0,
    "norm_epsilon": "abc",
    "tie_embeddings": "yes",
    "pad_vocab_size_multiple": 0,
    "eos_token_id": "abc",
    "mlp_cfg": 3,
    "mlp_cfg.intermediate_size": "abc",
    "ssm_cfg": [1],
    "ssm_cfg.d_state": None,
    "ssm_cfg.n_v_heads": 0,
    "ssm_cfg.n_qk_heads": "abc",
    "ssm_cfg.expand": "abc",
    "ssm_cfg.chunk_size": 0,
}


@pytest.mark.parametrize("path", LLAMBA_WRONG)
def test_wrong_values_of_llamba(path: str) -> None:
    refused_for(put(llamba().configs[CONFIG], path, LLAMBA_WRONG[path]), path)


MAMBA_IN_LLAMA_WRONG: Values = {
    "d_inner": "abc",
    "d_xb": 0,
    "attn_layers": 3,
    "attn_layers.0": "abc",
    "released_quirks": "no",
    "ssm_cfg": None,
    "ssm_cfg.d_state": "abc",
    "ssm_cfg.d_conv": 0,
    "ssm_cfg.dt_rank": "abc",
}


@pytest.mark.parametrize("path", MAMBA_IN_LLAMA_WRONG)
def test_wrong_values_of_mamba_in_llama(path: str) -> None:
    student = mamba_in_llama({"expand": 1, "d_state": 5})
    hybrid = put(student.configs[MAMBA_CONFIG], path, MAMBA_IN_LLAMA_WRONG[path])
    refused_for(student.configs[CONFIG] | {"mamba_config": hybrid}, f"mamba_config.{path}")


def put(values: Values, path: str, value: object) -> Values:
    """A copy with another value at the end of a path of keys."""
    copy: Values = json.loads(json.dumps(values))
    *place, last = path.split(".")
    inner: Any = copy
    for key in place:
        inner = inner[key]
    inner[int(last) if isinstance(inner, list) else last] = value
    return copy


def refused_for(values: Values, key: str) -> None:
    """In one line that begins with the key."""
    with pytest.raises(ValueError, match=f"^{key}") as caught:
        read(values)
    assert "\n" not in str(caught.value)
