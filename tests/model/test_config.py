"""Configurations: there and back, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.model.config import (
    ATTENTION,
    LINEAR,
    DecoderConfig,
    Llama3Rope,
    Mamba2Config,
    from_hf,
    to_hf,
)

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
HYBRID = replace(PLAIN, layer_types=(LINEAR, ATTENTION), mixer=MIXER)


@settings(max_examples=40, deadline=None)
@given(
    config=st.sampled_from([PLAIN, HYBRID]),
    eos=st.lists(st.integers(0, 60), max_size=3).map(tuple),
    token=st.none() | st.integers(0, 60),
    tied=st.booleans(),
    theta=st.floats(1.0, 1e7),
    scaling=st.none() | st.just(Llama3Rope(32.0, 1.0, 4.0, 8192)),
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
    assert from_hf(to_hf(config, "float32")) == config


def test_both_spellings_of_rope_are_written() -> None:
    """Runtimes that read only the older one would assume base 10000 and no scaling."""
    scaled = replace(HYBRID, rope_theta=5e5, rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192))
    values = to_hf(scaled, "bfloat16")
    assert values["rope_theta"] == 5e5
    assert values["rope_scaling"]["rope_type"] == "llama3"
    assert values["rope_parameters"] == values["rope_scaling"] | {"rope_theta": 5e5}
    assert values["layer_types"] == ["mamba", "attention"]
    assert "head_dim" not in values
    assert max(values["time_step_limit"]) < float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 9}, "head_dim 9 is odd, and RoPE turns pairs of channels"),
        ({"layer_types": (ATTENTION, "mamba")}, r"layer_types: unknown \['mamba'\]"),
        ({"layer_types": (ATTENTION, LINEAR)}, "no mixer settings"),
        ({"mixer": replace(MIXER, groups=3)}, "4 heads do not divide into groups"),
    ],
)
def test_impossible_decoders(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; supported are Granite.*Llama"),
        ({"architectures": []}, "architecture none"),
        ({"architectures": None}, "architecture none"),
        ({"attention_bias": True}, "attention_bias = true is not supported"),
        ({"mlp_bias": True}, "mlp_bias = true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': only 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "no key 'factor'"),
        ({"vocab_size": ...}, "no key 'vocab_size'"),
        ({"num_hidden_layers": ...}, "no key 'num_hidden_layers'"),
    ],
)
def test_refused_llama_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(changed(to_hf(PLAIN, "float32"), changes))


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
        ({"mamba_d_state": ...}, "no key 'mamba_d_state'"),
    ],
)
def test_refused_granite_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(changed(to_hf(HYBRID, "float32"), changes))


@pytest.mark.parametrize(
    "limit", [..., None, [0.0, float("inf")], [0.0, {"__float__": "Infinity"}], [0.0, 1e9]]
)
def test_an_unlimited_time_step_is_read(limit: Any) -> None:
    """In all the ways that transformers, and Python's JSON, have of writing infinity."""
    values = changed(to_hf(HYBRID, "float32"), {"time_step_limit": limit})
    assert from_hf(values) == HYBRID


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(HYBRID, mixer=replace(MIXER, head_dim=12)), "48 is no multiple of hidden_size 32"),
        (replace(HYBRID, head_dim=16), r"head_dim 16 \* heads 4 differs from hidden_size 32"),
    ],
)
def test_students_that_the_format_cannot_hold(config: DecoderConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_hf(config, "float32")


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The values with changes; an ellipsis takes a key away."""
    return {key: value for key, value in (values | changes).items() if value is not ...}
